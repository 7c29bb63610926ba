"""Sampling on the real engine: every parameter does what it says, and no value takes the process down."""

import ctypes
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np
import pytest

from engine_driver import GREEDY, Collected, ask, drain, loaded
from llamaherd.pool.child import llama_backend
from llamaherd.pool.child.engine import RequestError
from llamaherd.pool.child.llama_engine import LlamaEngine
from llamaherd.pool.child.model import Model
from llamaherd.pool.child.sampler import Samplers, likeliest
from llamaherd.pool.machine import resident_bytes
from llamaherd.transport.messages import EngineOptions, Generate, Sampling, Tokenize
from tiny_gguf import SCRIPT, tiny_model

PROMPT = "the same words, the same words, the same"


@pytest.fixture(scope="module")
def engine() -> Iterator[LlamaEngine]:
    with loaded("random", n_parallel=8) as one:
        yield one


def tokens(engine: LlamaEngine, *, n: int = 40, prompt: str = PROMPT, **sampling: Any) -> list[int]:
    sampling.setdefault("seed", 5)
    # What is kept moves the next one's cells, and with them the order in which attention adds up.
    fields: dict[str, Any] = {"max_tokens": n, "ignore_eos": True, "cache_prompt": False}
    return ask(engine, prompt, sampling=Sampling(**sampling), **fields).tokens


#: The tokens of the tiny models that end a generation.
ENDS = (2, 260)


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0},
        {"temperature": 0, "repeat_penalty": 1.3},
        {"temperature": 1.5},
        {"top_k": 0, "min_p": 0.0, "top_p": 1.0},
        {"mirostat": 2},
        {"samplers": ("min_p", "adaptive_p"), "adaptive_target": 0.2},
        {"dry_multiplier": 1.0},
    ],
    ids=json.dumps,
)
def test_to_ignore_the_end_is_to_rule_out_the_tokens_that_end(engine: LlamaEngine, fields: dict[str, Any]) -> None:
    wanted = tuple((end, 100.0) for end in ENDS)
    sampling: dict[str, Any] = {"seed": 5, **fields}

    def told(count: int, biases: tuple[tuple[int, float | None], ...], *, ignore_eos: bool) -> list[int]:
        chosen = Sampling(**sampling, n_probs=count, logit_bias=biases)
        fields: dict[str, Any] = {"max_tokens": 30, "ignore_eos": ignore_eos, "cache_prompt": False}
        return ask(engine, PROMPT, sampling=chosen, **fields).tokens

    ended = told(0, wanted, ignore_eos=False)
    assert ended[-1] in ENDS, "the model would have ended"
    without = told(0, tuple((end, None) for end in ENDS), ignore_eos=False)
    assert len(without) == 30
    assert told(0, wanted, ignore_eos=True) == without
    assert told(3, wanted, ignore_eos=True) == without, "to look changes nothing"


@pytest.mark.parametrize("fields", [{"typical_p": 0.7}, {"mirostat": 1}, {"samplers": ("typ_p", "temperature")}])
def test_samplers_that_take_logarithms_do_not_see_the_ends_that_are_ignored(
    engine: LlamaEngine, fields: dict[str, Any]
) -> None:
    given: dict[str, Any] = {"top_k": 0, "typical_p": 0.7, "seed": 5, **fields}
    chosen = Sampling(**given)
    # So unlikely that they change nothing, and yet no nought.
    unlikely = msgspec.structs.replace(chosen, logit_bias=tuple((end, -40.0) for end in ENDS))
    ignored = ask(engine, PROMPT, sampling=chosen, max_tokens=60, cache_prompt=False, ignore_eos=True)
    expected = ask(engine, PROMPT, sampling=unlikely, max_tokens=60, cache_prompt=False).tokens
    assert len(expected) == 60
    assert ignored.tokens == expected
    banned = msgspec.structs.replace(chosen, logit_bias=tuple((end, None) for end in ENDS))
    assert ask(engine, PROMPT, sampling=banned, max_tokens=60, cache_prompt=False).tokens == expected


def test_what_is_told_where_the_end_is_ignored_is_what_the_model_said(engine: LlamaEngine) -> None:
    sampling = Sampling(temperature=0, n_probs=100)
    ignored, plain = (
        ask(engine, PROMPT, sampling=sampling, max_tokens=1, cache_prompt=False, ignore_eos=ignore_eos).deltas[0].probs
        for ignore_eos in (True, False)
    )
    # Without the ends, whatever their part is, all others would be likelier.
    assert ignored == plain


def refusal(engine: LlamaEngine, **sampling: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        engine.submit(Generate(request=1, prompt="x", sampling=Sampling(**sampling)))
    assert not engine.busy
    return caught.value


@pytest.mark.parametrize(
    "fields",
    [
        {"repeat_penalty": 1.5},
        {"presence_penalty": 2.0},
        {"frequency_penalty": 2.0},
        {"dry_multiplier": 5.0, "dry_allowed_length": 1},
        {"top_n_sigma": 0.5},
        {"typical_p": 0.3},
        {"xtc_probability": 1.0, "xtc_threshold": 0.01},
        {"dynatemp_range": 0.7},
        {"mirostat": 1},
        {"mirostat": 2},
        {"logit_bias": ((270, 50.0),)},
        {"samplers": ("temperature",)},
        {"samplers": ("adaptive_p",), "adaptive_target": 0.2},
        {"min_keep": 200, "top_k": 0},
    ],
)
def test_each_parameter_changes_what_is_drawn_and_the_seed_still_decides(
    engine: LlamaEngine, fields: dict[str, Any]
) -> None:
    plain = tokens(engine, temperature=1.5)
    changed = tokens(engine, temperature=1.5, **fields)
    assert len(changed) == 40
    assert changed != plain
    assert changed == tokens(engine, temperature=1.5, **fields)


@pytest.mark.parametrize("fields", [{"mirostat": 1}, {"mirostat": 2}, {"top_n_sigma": 1.0}, {"min_keep": 5}])
def test_greedy_stays_greedy(engine: LlamaEngine, fields: dict[str, Any]) -> None:
    assert tokens(engine, temperature=0, **fields) == tokens(engine, temperature=0)


def test_a_bias_forces_and_forbids(engine: LlamaEngine) -> None:
    first = tokens(engine, n=1, temperature=0)[0]
    assert tokens(engine, temperature=0, logit_bias=((270, 1e9),)) == [270] * 40
    assert first not in tokens(engine, temperature=0, logit_bias=((first, None),))
    second = tokens(engine, n=1, temperature=0, logit_bias=((first, None),))
    assert tokens(engine, n=1, temperature=0, logit_bias=((first, 5e3), (first, -1e4))) == second


def test_a_bias_on_a_text_means_its_tokens(engine: LlamaEngine) -> None:
    ids = engine.tokenize(Tokenize(request=0, text="zq"))
    assert len(ids) == 2
    assert set(tokens(engine, temperature=2.0, logit_bias=(("zq", 100.0),))) == set(ids)


def test_a_token_outside_the_vocabulary_has_no_bias(engine: LlamaEngine) -> None:
    for token in (-1, 512, 2**31):
        error = refusal(engine, logit_bias=((token, 1.0),))
        assert error.code == "invalid_sampling"
        assert f"token {token} is not in the vocabulary of 512 tokens" in str(error)


def test_a_penalty_counts_the_prompts_tail(engine: LlamaEngine) -> None:
    favourite = tokens(engine, n=1, temperature=0, prompt="abc")[0]
    ids = engine.tokenize(Tokenize(request=0, text="abc"))

    def next_one(prompt: tuple[int, ...], **fields: Any) -> int:
        sampling = Sampling(temperature=0, **fields)
        return ask(engine, prompt, sampling=sampling, max_tokens=1, ignore_eos=True).tokens[0]

    assert next_one(ids) == favourite
    assert next_one(ids, logit_bias=((favourite, 100.0),), presence_penalty=1e6) == favourite
    told = (favourite, *ids)
    assert next_one(told, logit_bias=((favourite, 100.0),)) == favourite
    assert next_one(told, logit_bias=((favourite, 100.0),), presence_penalty=1e6) != favourite
    assert next_one(told, logit_bias=((favourite, 100.0),), presence_penalty=1e6, repeat_last_n=3) == favourite


def test_the_penalties_see_only_as_far_as_they_are_told(engine: LlamaEngine) -> None:
    fields: dict[str, Any] = {"temperature": 0, "presence_penalty": 1e5}
    for last_n in (1, 5, 30):
        got = tokens(engine, repeat_last_n=last_n, **fields)
        seen = [*engine.tokenize(Tokenize(request=0, text=PROMPT)), *got]
        for index in range(len(seen) - 40, len(seen)):
            assert seen[index] not in seen[max(0, index - last_n) : index]


def test_dry_stops_a_repetition_except_across_a_breaker() -> None:
    # Its greedy output is to repeat the last token for ever.
    with loaded("scripted") as engine:
        fields: dict[str, Any] = {"temperature": 0, "n": 30, "prompt": "zz"}
        loop = tokens(engine, **fields)
        assert len(set(loop)) == 1
        assert len(set(tokens(engine, dry_multiplier=10.0, **fields))) > 1
        assert tokens(engine, dry_multiplier=10.0, dry_sequence_breakers=("z",), **fields) == loop
        assert tokens(engine, dry_multiplier=10.0, dry_allowed_length=50, **fields) == loop
        assert tokens(engine, dry_multiplier=10.0, dry_penalty_last_n=2, **fields) == loop


def test_xtc_passes_over_the_most_likely(engine: LlamaEngine) -> None:
    sampling = Sampling(seed=5, temperature=1.5, xtc_probability=1.0, xtc_threshold=0.02, n_probs=1, top_k=0, top_p=1)
    got = ask(engine, PROMPT, sampling=sampling, max_tokens=40, ignore_eos=True)
    passed = sum(probs.chosen.token != probs.top[0].token for delta in got.deltas for probs in delta.probs)
    assert passed > 20


def test_a_preempted_request_remembers_its_penalties() -> None:
    sampling = Sampling(temperature=0, presence_penalty=3.0, dry_multiplier=1.0, repeat_last_n=-1)
    with loaded("random", n_ctx=256, n_parallel=2) as engine:
        expected = ask(engine, "q" * 20, sampling=sampling, max_tokens=200, ignore_eos=True).tokens
        for number in (1, 2):
            engine.submit(Generate(request=number, prompt="q" * 20, sampling=sampling, max_tokens=200, ignore_eos=True))
        got = drain(engine)
    assert got[1].tokens == got[2].tokens == expected


def test_company_does_not_change_what_is_drawn(engine: LlamaEngine) -> None:
    recipes = [
        Sampling(seed=1, repeat_penalty=1.2),
        GREEDY,
        Sampling(seed=2, mirostat=2),
        Sampling(seed=3, dry_multiplier=0.8, xtc_probability=0.5),
        Sampling(temperature=0, n_probs=3),
        Sampling(seed=4, typical_p=0.5, logit_bias=((300, 2.0),)),
    ]
    expected = [ask(engine, PROMPT, sampling=one, max_tokens=20, ignore_eos=True).tokens for one in recipes]
    for number, one in enumerate(recipes):
        engine.submit(Generate(request=number, prompt=PROMPT, sampling=one, max_tokens=20, ignore_eos=True))
    got = drain(engine)
    assert [got[number].tokens for number in range(len(recipes))] == expected


# --- probabilities ---


def probs_of(got: Collected) -> list[Any]:
    return [probs for delta in got.deltas for probs in delta.probs]


def test_each_token_comes_with_the_likeliest_ones(engine: LlamaEngine) -> None:
    got = ask(engine, PROMPT, sampling=Sampling(temperature=0, n_probs=5), max_tokens=10, ignore_eos=True)
    probs = probs_of(got)
    assert [one.chosen.token for one in probs] == got.tokens
    for one in probs:
        assert len(one.top) == 5
        assert one.top[0] == one.chosen, "greedy takes the likeliest"
        logprobs = [entry.logprob for entry in one.top]
        assert logprobs == sorted(logprobs, reverse=True)
        assert all(-50 < value <= 0 for value in logprobs)


def test_the_probabilities_sum_to_one_and_are_those_before_the_samplers(engine: LlamaEngine) -> None:
    recipe = {"seed": 1, "logit_bias": ((270, 1e9),), "n_probs": 100}
    got = ask(engine, PROMPT, sampling=Sampling(**recipe), max_tokens=3, ignore_eos=True)  # type: ignore[arg-type]
    assert got.tokens == [270] * 3
    for one in probs_of(got):
        assert 0.5 < sum(math.exp(entry.logprob) for entry in one.top) <= 1.0 + 1e-6
        assert one.chosen.logprob <= one.top[0].logprob


def test_the_bytes_of_each_token_are_told() -> None:
    with loaded("scripted") as engine:
        got = ask(engine, "x\n", sampling=Sampling(temperature=0, n_probs=1))
    pieces = [one.chosen.piece for one in probs_of(got)]
    assert pieces == [piece.replace("▁", " ").encode() for piece in SCRIPT] + [b"</s>"]


def test_what_xtc_leaves_is_told_and_chosen_from(engine: LlamaEngine) -> None:
    xtc: dict[str, Any] = {"temperature": 1.5, "xtc_probability": 1.0, "xtc_threshold": 0.02, "seed": 5}
    plain = ask(engine, PROMPT, sampling=Sampling(**xtc), max_tokens=20, ignore_eos=True)
    sampling = Sampling(**xtc, n_probs=4, post_sampling_probs=True)
    told = ask(engine, PROMPT, sampling=sampling, max_tokens=20, ignore_eos=True)
    assert told.tokens == plain.tokens
    for delta in told.deltas:
        (probs,) = delta.probs
        assert probs.chosen.logprob > -9999, "it is one of those that were left"
        assert sum(math.exp(one.logprob) for one in probs.top) <= 1.001


def test_without_the_wish_nothing_is_told(engine: LlamaEngine) -> None:
    assert probs_of(ask(engine, PROMPT, max_tokens=3, ignore_eos=True)) == []


# --- in a process of their own, because llama.cpp might abort it ---

EXTREMES = """
import itertools, json, random, sys
from llamaherd.pool.child.llama_engine import LlamaEngine
from llamaherd.pool.sampling import LIMITS, problem_of
from llamaherd.transport.messages import Done, EngineOptions, Generate, Load, Sampling

engine = LlamaEngine()
options = EngineOptions(n_ctx=256, n_threads=1, n_parallel=4)
engine.load(Load(model="x", path=sys.argv[1], options=options), lambda _: True)
dice = random.Random(int(sys.argv[2]))
names = ("penalties", "dry", "top_n_sigma", "top_k", "typ_p", "top_p", "min_p", "xtc", "temperature", "adaptive_p")
ended = 0
for number in range(400):
    values = {}
    for name, (low, high) in LIMITS.items():
        if dice.random() < 0.4:
            whole = isinstance(getattr(Sampling(), name), int)
            low, high = max(low, -3e38), min(high, 3e38)
            value = dice.choice([low, high, 0 if low <= 0 <= high else low, dice.uniform(low, high),
                                 dice.uniform(max(low, -3), min(high, 3)), max(low, min(high, 1e-40))])
            values[name] = int(value) if whole else value
    if dice.random() < 0.5:
        values["samplers"] = tuple(dice.choices(names, k=dice.randrange(12)))
    if dice.random() < 0.5:
        count = dice.choice([1, 5, 512])
        some = range(512) if count == 512 else dice.choices(range(512), k=count)
        values["logit_bias"] = tuple((token, dice.choice([None, 1e300, -1e300, 1])) for token in some)
    if dice.random() < 0.3:
        values["dry_sequence_breakers"] = ("\\n", "é😀", "\\x7f", "a" * 40, "é" * 20)[: dice.randrange(6)]
    sampling = Sampling(**values)
    assert problem_of(sampling) is None, (problem_of(sampling), values)
    engine.submit(Generate(request=number, prompt="abcabcabc", sampling=sampling, max_tokens=8, ignore_eos=True))
    while engine.busy:
        ended += sum(isinstance(message, Done) for message in engine.step())
engine.unload()
print(json.dumps(ended))
"""


@pytest.mark.parametrize("seed", ["1", "2"])
def test_no_allowed_combination_takes_the_process_down(seed: str) -> None:
    command = [sys.executable, "-P", "-c", EXTREMES, str(tiny_model("random")), seed]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout) == 400


def test_the_samplers_are_freed_with_the_model() -> None:
    with loaded("random") as engine:
        for last_n in range(20):
            tokens(engine, n=1, dry_multiplier=1.0, dry_penalty_last_n=10 + last_n)
        engine.submit(Generate(request=1, prompt="x", sampling=Sampling(dry_multiplier=1.0)))
        engine.unload()
        assert not engine.busy


def test_infinite_logits_give_probabilities_that_a_message_can_hold() -> None:
    llama_backend.init_backend()
    model = Model(str(tiny_model("scripted")), EngineOptions(), lambda _: True)
    logits = np.zeros(model.vocab.size, np.float32)
    logits[3] = np.inf
    probs = likeliest(logits, 3, 2, model.vocab)
    model.free()
    assert all(math.isfinite(one.logprob) for one in (probs.chosen, *probs.top))


def test_samplers_that_come_to_nothing_leave_no_memory_behind() -> None:
    llama_backend.init_backend()
    model = Model(str(tiny_model("random")), EngineOptions(), lambda _fraction: True)
    samplers = Samplers(model.vocab, 4096)
    sampling = Sampling(repeat_last_n=-1, repeat_penalty=1.1)
    junk: Any = [1, "no token"]

    def fail(times: int) -> int:
        for _ in range(times):
            with pytest.raises(ctypes.ArgumentError):
                samplers.make(sampling, junk)
        return resident_bytes()

    before = fail(100)
    # Each one has 16 KiB for the last 4096 tokens alone.
    assert fail(2000) - before < 8 * 2**20
    model.free()
