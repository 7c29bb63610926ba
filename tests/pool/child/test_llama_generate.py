"""One request at a time on the real engine: what comes out, and when it ends."""

from collections.abc import Iterator
from typing import Any

import pytest

from engine_driver import GREEDY, ask, drain, loaded
from llamaherd.pool.child.engine import RequestError
from llamaherd.pool.child.llama_engine import LlamaEngine
from llamaherd.transport.messages import Detokenize, Generate, Sampling, Template, Tokenize
from tiny_gguf import SCRIPT, SCRIPT_TEXT, tiny_model, write_random_llama

HELLO = ({"role": "user", "content": "Hi"},)


@pytest.fixture(scope="module")
def scripted() -> Iterator[LlamaEngine]:
    with loaded("scripted", n_ctx=256) as engine:
        yield engine


@pytest.fixture(scope="module")
def random() -> Iterator[LlamaEngine]:
    with loaded("random", n_ctx=256) as engine:
        yield engine


def chat(engine: LlamaEngine, **fields: Any) -> Any:
    fields.setdefault("sampling", GREEDY)
    engine.submit(Generate(request=1, messages=HELLO, **fields))
    return drain(engine)[1]


def refusal(engine: LlamaEngine, **fields: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        engine.submit(Generate(request=1, **fields))
    assert not engine.busy, "nothing is kept of a refused request"
    return caught.value


def test_a_chat_streams_the_script_and_stops_at_the_end_token(scripted: LlamaEngine) -> None:
    got = chat(scripted)
    assert got.text == SCRIPT_TEXT
    assert got.reason == "stop"
    assert got.done.stopping_word == ""
    assert [delta.text for delta in got.deltas] == ["Hello", " from", " a", " tiny", " GGUF", " né", " 😀", "!", ""]


def test_usage_counts_the_end_token_as_the_reference_does(scripted: LlamaEngine) -> None:
    usage = chat(scripted, cache_prompt=False).done.usage
    prompt = scripted.template(Template(request=0, messages=HELLO))
    assert usage.prompt_tokens == len(scripted.tokenize(Tokenize(request=0, text=prompt)))
    assert (usage.completion_tokens, usage.cached_tokens) == (len(SCRIPT) + 1, 0)


def test_timings_are_filled(scripted: LlamaEngine) -> None:
    timings = chat(scripted).done.timings
    assert timings.queue_ms >= 0 and timings.prompt_ms > 0 and timings.predicted_ms > 0


def test_a_text_prompt_continues(scripted: LlamaEngine) -> None:
    assert ask(scripted, "anything\n").text == SCRIPT_TEXT


def test_token_ids_are_taken_as_they_are(scripted: LlamaEngine) -> None:
    ids = scripted.tokenize(Tokenize(request=0, text="x\n"))
    got = ask(scripted, ids)
    assert got.text == SCRIPT_TEXT
    assert got.done is not None and got.done.usage.prompt_tokens == 2


def test_max_tokens_ends_with_length(scripted: LlamaEngine) -> None:
    got = chat(scripted, max_tokens=3)
    assert (got.text, got.reason, len(got.tokens)) == ("Hello from a", "length", 3)


def test_max_tokens_zero_computes_the_prompt_and_says_nothing(scripted: LlamaEngine) -> None:
    got = chat(scripted, max_tokens=0)
    assert (got.text, got.tokens, got.reason) == ("", [], "length")
    assert got.done.usage.completion_tokens == 0


def test_the_end_token_counts_even_when_it_is_the_last_one_allowed(scripted: LlamaEngine) -> None:
    assert chat(scripted, max_tokens=len(SCRIPT) + 1).reason == "stop"
    assert chat(scripted, max_tokens=len(SCRIPT)).reason == "length"


def test_without_a_limit_the_context_is_filled(random: LlamaEngine) -> None:
    got = ask(random, "abc", ignore_eos=True)
    assert got.reason == "length"
    assert got.done is not None
    assert got.done.usage.prompt_tokens + got.done.usage.completion_tokens == 256


@pytest.mark.parametrize(
    ("stops", "text", "word"),
    [
        (["tiny"], "Hello from a ", "tiny"),
        (["m a t"], "Hello fro", "m a t"),
        (["é 😀"], "Hello from a tiny GGUF n", "é 😀"),
        (["nothing", "GGUF n", "GGUF"], "Hello from a tiny ", "GGUF"),
        (["Hello"], "", "Hello"),
        (["!!"], SCRIPT_TEXT, ""),
        (["", "!"], SCRIPT_TEXT[:-1], "!"),
    ],
)
def test_stop_strings_end_the_text_across_tokens(scripted: LlamaEngine, stops: list[str], text: str, word: str) -> None:
    got = chat(scripted, stop=tuple(stops))
    assert (got.text, got.reason, got.done.stopping_word) == (text, "stop", word)


def test_text_held_back_for_a_stop_string_is_given_out_at_the_end(scripted: LlamaEngine) -> None:
    got = chat(scripted, stop=("from a mountain",), max_tokens=3)
    assert (got.text, got.reason) == ("Hello from a", "length")
    assert [delta.text for delta in got.deltas] == ["Hello", " ", "from a"]


def test_ignoring_the_end_token_goes_on(scripted: LlamaEngine) -> None:
    ended = chat(scripted)
    got = chat(scripted, ignore_eos=True, max_tokens=20)
    assert (got.reason, len(got.tokens)) == ("length", 20)
    assert got.tokens[: len(ended.tokens) - 1] == ended.tokens[:-1]
    assert ended.reason == "stop" and ended.tokens[-1] not in got.tokens


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0},
        {"temperature": 0, "n_probs": 3, "post_sampling_probs": True},
        {"temperature": 0, "repeat_penalty": 1.5, "repeat_last_n": -1},
        {"temperature": 2.0, "seed": 7, "top_k": 0, "top_p": 1.0, "min_p": 0.0},
        {"temperature": 2.0, "seed": 7, "dry_multiplier": 0.8},
    ],
    ids=lambda fields: "-".join(fields),
)
def test_an_ignored_end_is_never_chosen_however_likely_it_is(random: LlamaEngine, fields: dict[str, Any]) -> None:
    never, ends = Sampling(**fields, logit_bias=((2, None), (260, None))), (2, 260)
    assert [random.tokenize(Tokenize(request=0, text=text)) for text in ("</s>", "<|im_end|>")] == [(2,), (260,)]
    likely = Sampling(**fields, logit_bias=((2, 50.0), (260, 50.0)))
    got = ask(random, "abc", sampling=likely, max_tokens=30, ignore_eos=True)
    assert len(got.tokens) == 30 and not set(ends) & set(got.tokens)
    if not fields["temperature"]:
        assert got.tokens == ask(random, "abc", sampling=never, max_tokens=30).tokens


def test_bytes_that_are_no_text_never_break_the_stream(random: LlamaEngine) -> None:
    got = ask(random, "abc", max_tokens=100, ignore_eos=True)
    whole = b"".join(random.detokenize(Detokenize(request=0, tokens=(token,))).encode() for token in got.tokens)
    assert whole
    for delta in got.deltas:
        delta.text.encode()


@pytest.mark.parametrize("sampling", [Sampling(seed=7), Sampling(seed=7, top_k=0), Sampling(seed=7, top_p=1, min_p=0)])
def test_the_same_seed_gives_the_same_text(random: LlamaEngine, sampling: Sampling) -> None:
    first = ask(random, "abc", sampling=sampling, max_tokens=40)
    assert ask(random, "abc", sampling=sampling, max_tokens=40).tokens == first.tokens


def test_different_seeds_give_different_texts(random: LlamaEngine) -> None:
    texts = {
        tuple(ask(random, "abc", sampling=Sampling(temperature=2, seed=s), max_tokens=30).tokens) for s in range(4)
    }
    assert len(texts) == 4


def test_the_default_seed_is_drawn_anew(random: LlamaEngine) -> None:
    texts = {tuple(ask(random, "abc", sampling=Sampling(temperature=2), max_tokens=30).tokens) for _ in range(4)}
    assert len(texts) > 1


def test_top_k_one_is_greedy(random: LlamaEngine) -> None:
    greedy = ask(random, "abc", max_tokens=30)
    assert ask(random, "abc", sampling=Sampling(top_k=1, seed=3), max_tokens=30).tokens == greedy.tokens


def test_a_vocabulary_that_adds_a_begin_token_adds_it_once() -> None:
    with loaded("random-bos") as engine:
        assert ask(engine, "abc", max_tokens=0).done is not None
        assert engine.tokenize(Tokenize(request=0, text="abc", add_special=True))[0] == 1
        assert 1 not in engine.tokenize(Tokenize(request=0, text="abc"))
        assert ask(engine, "abc", max_tokens=1).done.usage.prompt_tokens == 4  # type: ignore[union-attr]


def test_a_templates_own_begin_token_is_not_doubled() -> None:
    with loaded("random-bos", chat_template="{{ bos_token }}{{ messages[0].content }}") as engine:
        assert engine.template(Template(request=0, messages=HELLO)) == "Hi"
        assert chat(engine, max_tokens=1).done.usage.prompt_tokens == 3


def test_a_broken_template_fails_only_the_chats() -> None:
    with loaded("scripted", chat_template="{% for %}") as engine:
        assert refusal(engine, messages=HELLO).code == "template_invalid"
        assert ask(engine, "x\n").text == SCRIPT_TEXT


def test_a_model_without_a_template_gets_chatml(tmp_path: Any) -> None:
    write_random_llama(tmp_path / "bare.gguf", template=None)
    with loaded(tmp_path / "bare.gguf") as engine:
        assert engine.template(Template(request=0, messages=HELLO)).startswith("<|im_start|>user\nHi<|im_end|>")


def test_text_survives_the_way_to_ids_and_back(random: LlamaEngine) -> None:
    text = "Hello, né 😀\n<tool_call>\0 end"
    ids = random.tokenize(Tokenize(request=0, text=text))
    assert random.detokenize(Detokenize(request=0, tokens=ids)) == text


def test_half_a_surrogate_pair_is_replaced(random: LlamaEngine) -> None:
    ids = random.tokenize(Tokenize(request=0, text="a\ud800b"))
    assert random.detokenize(Detokenize(request=0, tokens=ids)) == "a?b"


@pytest.mark.parametrize("bad", [-1, 512, 2**31 - 1, 2**31, -(2**40)])
def test_a_token_outside_the_vocabulary_is_refused(random: LlamaEngine, bad: int) -> None:
    error = refusal(random, prompt=(1, bad))
    assert error.code == "invalid_token"
    assert f"token {bad} at index 1" in str(error)
    with pytest.raises(RequestError):
        random.detokenize(Detokenize(request=0, tokens=(bad,)))


@pytest.mark.parametrize("prompt", ["", ()])
def test_an_empty_prompt_is_refused(random: LlamaEngine, prompt: Any) -> None:
    assert refusal(random, prompt=prompt).code == "empty_prompt"


@pytest.mark.parametrize("prompt", ["a" * 256, (5,) * 256, "a" * 5_000_000, (5,) * 1_000_000])
def test_a_prompt_that_fills_the_context_is_refused_with_the_figures(random: LlamaEngine, prompt: Any) -> None:
    error = refusal(random, prompt=prompt)
    assert error.code == "context_length_exceeded"
    assert "exceeds the available context size (256 tokens)" in str(error)


def test_a_prompt_that_leaves_one_token_is_taken(random: LlamaEngine) -> None:
    got = ask(random, (5,) * 255)
    assert got.reason == "length"
    assert len(got.tokens) == 1


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({}, "invalid_request"),
        ({"prompt": "a", "messages": HELLO}, "invalid_request"),
        ({"prompt": "a", "max_tokens": -2}, "invalid_max_tokens"),
        ({"prompt": "a", "stop": ("x",) * 65}, "invalid_stop"),
        ({"prompt": "a", "stop": ("x" * 5000,)}, "invalid_stop"),
        ({"prompt": "a", "sampling": Sampling(seed=-1)}, "invalid_sampling"),
        ({"prompt": "a", "sampling": Sampling(seed=2**32)}, "invalid_sampling"),
        ({"prompt": "a", "sampling": Sampling(top_k=2**31)}, "invalid_sampling"),
    ],
)
def test_an_impossible_request_is_refused(random: LlamaEngine, fields: dict[str, Any], code: str) -> None:
    assert refusal(random, **fields).code == code


@pytest.mark.parametrize(
    "sampling", [Sampling(top_p=0), Sampling(min_p=1), Sampling(temperature=1e9), Sampling(temperature=1e-45)]
)
def test_extreme_sampling_settings_still_give_a_token(random: LlamaEngine, sampling: Sampling) -> None:
    assert len(ask(random, "abc", sampling=sampling, max_tokens=5, ignore_eos=True).tokens) == 5


def test_a_number_in_use_is_refused(random: LlamaEngine) -> None:
    random.submit(Generate(request=1, prompt="abc", max_tokens=3))
    with pytest.raises(RequestError, match="request 1 is running already"):
        random.submit(Generate(request=1, prompt="abc"))
    assert drain(random)[1].done is not None


def test_before_a_load_everything_is_refused() -> None:
    engine = LlamaEngine()
    assert refusal(engine, prompt="a").code == "not_loaded"
    assert engine.step() == []
    engine.cancel(1)
    engine.unload()


@pytest.mark.parametrize("model", ["bert", "rank"])
def test_an_embedding_model_loads_but_does_not_generate(model: str) -> None:
    with loaded(model) as engine:
        assert refusal(engine, prompt="hello").code == "unsupported_by_model"
        assert len(engine.tokenize(Tokenize(request=0, text="hello", add_special=True))) == 3


@pytest.mark.parametrize("model", ["mamba", "gemma2", "random-f16"])
def test_other_architectures_generate(model: str) -> None:
    with loaded(model) as engine:
        assert len(ask(engine, "hello", max_tokens=20, ignore_eos=True).tokens) == 20


def test_logits_that_are_no_numbers_blame_the_model(tmp_path: Any) -> None:
    write_random_llama(tmp_path / "nan.gguf", poison=True)
    with loaded(tmp_path / "nan.gguf") as engine:
        for sampling in (GREEDY, Sampling(seed=1)):
            for ignore_eos in (False, True):
                got = ask(engine, "abc", sampling=sampling, ignore_eos=ignore_eos)
                assert got.failed is not None
                assert (got.failed.fault, got.failed.code) == ("model", "bad_logits")


def test_the_f16_file_reports_its_type() -> None:
    assert tiny_model("random-f16").stat().st_size < tiny_model("random").stat().st_size
