"""Generations under a grammar on the real engine: alone, together, preempted, with stops, likelihoods and triggers."""

import json
import re
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from engine_driver import GREEDY, ask, drain, loaded, smollm2_path
from llamaherd.pool.child.engine import RequestError
from llamaherd.pool.child.llama_engine import LlamaEngine
from llamaherd.transport.messages import Delta, Generate, GrammarTrigger, Sampling, TokenProb
from tiny_gguf import SCRIPT_TEXT

PROMPT = "<|im_start|>user\nTell me of a person, as JSON.<|im_end|>\n<|im_start|>assistant\n"
HOT = Sampling(temperature=1.5, seed=11)
WORDS = 'root ::= word (" " word){3,5} "."\nword ::= [a-z]{1,6} | [A-Z] [a-z]{0,5}'


@pytest.fixture(scope="module")
def random() -> Iterator[LlamaEngine]:
    with loaded("random", n_ctx=512) as engine:
        yield engine


@pytest.fixture(scope="module")
def scripted() -> Iterator[LlamaEngine]:
    with loaded("scripted", n_ctx=256) as engine:
        yield engine


@pytest.fixture(scope="module")
def smollm2() -> Iterator[LlamaEngine]:
    with loaded(smollm2_path(), n_ctx=2048) as engine:
        yield engine


def refusal(engine: LlamaEngine, **fields: object) -> RequestError:
    with pytest.raises(RequestError) as caught:
        engine.submit(Generate(request=1, prompt="a", **fields))  # type: ignore[arg-type]
    assert not engine.busy, "nothing is kept of a refused request"
    return caught.value


KINDS = [
    GREEDY,
    HOT,
    Sampling(temperature=1, top_k=0, top_p=1, min_p=0, seed=5),
    Sampling(temperature=1, repeat_penalty=1.3, presence_penalty=0.5, seed=5),
    Sampling(temperature=1, repeat_penalty=1.3, repeat_last_n=-1, seed=5),
    Sampling(temperature=1, dry_multiplier=5, dry_allowed_length=1, seed=5),
    Sampling(temperature=1, top_n_sigma=1.0, samplers=("top_n_sigma", "temperature"), seed=5),
    Sampling(temperature=1.5, xtc_probability=0.5, xtc_threshold=0.02, seed=5),
    Sampling(mirostat=1, seed=5),
    Sampling(mirostat=2, seed=5),
    Sampling(temperature=0.7, samplers=("typ_p", "adaptive_p"), adaptive_target=0.5, typical_p=0.9, seed=5),
    Sampling(logit_bias=((0, 100.0), ("e", -5.0)), seed=5),
]
every_kind = pytest.mark.parametrize(
    "sampling",
    KINDS,
    ids=lambda sampling: "-".join(sampling.samplers[:1]) + str(sampling.mirostat) + str(sampling.temperature),
)


@every_kind
def test_every_kind_of_sampling_obeys(random: LlamaEngine, sampling: Sampling) -> None:
    got = ask(random, "abc", grammar=WORDS, sampling=sampling)
    assert re.fullmatch(r"([a-z]{1,6}|[A-Z][a-z]{0,5})( ([a-z]{1,6}|[A-Z][a-z]{0,5})){3,5}\.", got.text)
    assert got.reason == "stop"


def test_a_grammar_that_allows_the_models_own_words_changes_nothing(scripted: LlamaEngine) -> None:
    free, bound = (ask(scripted, "\n", grammar=grammar) for grammar in ("", "root ::= .*"))
    assert bound.text == free.text == SCRIPT_TEXT
    assert bound.tokens == free.tokens


def test_samplers_draw_the_same_under_a_grammar_that_allows_everything(random: LlamaEngine) -> None:
    sampling = Sampling(temperature=1.2, repeat_penalty=1.1, seed=3, logit_bias=((2, None),))
    free, bound = (
        ask(random, "abc", grammar=grammar, sampling=sampling, max_tokens=40)
        for grammar in ("", "root ::= (. | !<[2]>)*")
    )
    # Until a token comes that no text can hold; the random model says such things.
    assert bound.tokens[:5] == free.tokens[:5]


def test_the_end_comes_only_where_the_grammar_may_end(scripted: LlamaEngine) -> None:
    got = ask(scripted, "\n", grammar='root ::= [^!]* "!" "???"')
    assert got.text == SCRIPT_TEXT + "???"
    assert got.reason == "stop"


def test_a_complete_grammar_ends_at_once(random: LlamaEngine) -> None:
    got = ask(random, "abc", grammar='root ::= "yes" | "no"')
    assert got.text in ("yes", "no")
    assert got.reason == "stop"
    assert "".join(delta.text for delta in got.deltas) == got.text
    assert got.deltas[-1].text, "no further token was computed"


def test_an_empty_grammar_says_nothing(random: LlamaEngine) -> None:
    got = ask(random, "abc", grammar='root ::= ""')
    assert (got.text, got.reason) == ("", "stop")


def test_ignore_eos_goes_on_as_long_as_the_grammar_does(scripted: LlamaEngine) -> None:
    got = ask(scripted, "\n", grammar="root ::= [a-zA-Z]{1,40}", ignore_eos=True)
    assert len(got.text) == 40 and got.reason == "stop"


def test_limits_and_stop_texts_still_end_it(random: LlamaEngine) -> None:
    assert ask(random, "abc", grammar="root ::= [a-z]+", max_tokens=3, ignore_eos=True).reason == "length"
    got = ask(random, "abc", grammar='root ::= "one two three"', stop=("two",))
    assert (got.text, got.reason) == ("one ", "stop")
    assert got.done is not None and got.done.stopping_word == "two"


def test_likelihoods_are_those_before_the_grammar(scripted: LlamaEngine) -> None:
    got = ask(scripted, "\n", grammar='root ::= "xyz"', sampling=Sampling(temperature=0, n_probs=2))
    assert got.text == "xyz"
    assert got.deltas[0].probs[0].top[0].piece == b"Hello"
    assert got.deltas[0].probs[0].chosen.piece == b"x"


#: Neither the letter nor its byte.
NO_X = Sampling(seed=1, logit_bias=(("x", None), (3 + ord("x"), None)))


def test_what_is_banned_is_not_chosen_even_if_the_grammar_demands_it(random: LlamaEngine) -> None:
    failed = ask(random, "abc", grammar='root ::= "ax"', sampling=NO_X).failed
    assert failed is not None
    assert (failed.code, failed.fault, failed.retry) == ("grammar_dead_end", "caller", False)


def test_a_dead_end_fails_its_request_alone(random: LlamaEngine) -> None:
    random.submit(Generate(request=1, prompt="abc", grammar='root ::= [ab] "x"', sampling=NO_X))
    random.submit(Generate(request=2, prompt="abc", grammar="root ::= [ab]{9}", sampling=GREEDY))
    random.submit(Generate(request=3, prompt="abc", sampling=HOT, max_tokens=12, ignore_eos=True))
    got = drain(random)
    assert got[1].failed is not None and len(got[1].text) == 1
    assert len(got[2].text) == 9 and len(got[3].tokens) == 12


def test_sequences_with_and_without_grammars_share_a_batch_and_a_prefix(random: LlamaEngine) -> None:
    fields: list[dict[str, object]] = [
        {"grammar": WORDS},
        {"sampling": HOT, "grammar": WORDS},
        {},
        {"grammar": 'root ::= "fixed"'},
        {"sampling": HOT},
    ]
    prompt = "a long common beginning of all of these"
    alone = [ask(random, prompt, max_tokens=30, cache_prompt=False, **one) for one in fields]
    for number, one in enumerate(fields):
        submitted = {"sampling": GREEDY, **one}
        random.submit(Generate(request=number, prompt=prompt, max_tokens=30, **submitted))  # type: ignore[arg-type]
    together = drain(random)
    assert [together[number].text for number in range(len(fields))] == [one.text for one in alone]


def test_preempted_sequences_go_on_where_they_were() -> None:
    grammar = 'root ::= ([a-f]{7} " "){20} "end"'
    with loaded("random", n_ctx=512, n_parallel=4) as engine:
        alone = [ask(engine, f"{number}" * 40, grammar=grammar, cache_prompt=False) for number in range(4)]
        for number in range(4):
            engine.submit(
                Generate(request=number, prompt=f"{number}" * 40, grammar=grammar, sampling=GREEDY, cache_prompt=False)
            )
        together = drain(engine)
    assert [together[number].text for number in range(4)] == [one.text for one in alone]
    assert all(one.text.endswith("end") for one in alone)


# --- triggers ---------------------------------------------------------------------------------------------------------


def test_a_grammar_sleeps_until_its_word(scripted: LlamaEngine) -> None:
    got = ask(scripted, "\n", grammar='root ::= "tiny" " model" "!"', trigger=GrammarTrigger(words=("tiny",)))
    assert got.text == "Hello from a tiny model!"


def test_a_word_may_come_in_pieces_and_never_at_all(scripted: LlamaEngine) -> None:
    trigger = GrammarTrigger(words=("om a tiny", "nowhere"))
    assert (
        ask(scripted, "\n", grammar='root ::= "om a tiny, little"', trigger=trigger).text == "Hello from a tiny, little"
    )
    never = GrammarTrigger(words=("nowhere",))
    assert ask(scripted, "\n", grammar='root ::= "nowhere"', trigger=never).text == SCRIPT_TEXT


def test_a_token_that_completes_a_word_must_fit_the_grammar_whole(scripted: LlamaEngine) -> None:
    got = ask(scripted, "\n", grammar='root ::= "ti" "me"', trigger=GrammarTrigger(words=("ti",)), max_tokens=30)
    assert "ti" not in got.text.replace("time", "")


def test_a_leading_word_counts_only_at_the_beginning(scripted: LlamaEngine) -> None:
    at_start = GrammarTrigger(leading=("Hel",))
    assert ask(scripted, "\n", grammar='root ::= "Hello" " you"', trigger=at_start).text == "Hello you"
    later = GrammarTrigger(leading=("from",))
    assert ask(scripted, "\n", grammar='root ::= "from" " you"', trigger=later).text == SCRIPT_TEXT


#: Letters with which the grammar never begins: a token that shows one is refused, each time.
NEVER: dict[str, Any] = {
    "grammar": 'root ::= "zz" [a-z]*',
    "trigger": GrammarTrigger(words=(*"aeioutns", "zz")),
}


@every_kind
@pytest.mark.parametrize("bound", [NEVER, {"grammar": WORDS}], ids=["waits", "holds"])
def test_a_choice_that_a_grammar_refuses_leaves_no_trace(
    random: LlamaEngine, bound: dict[str, Any], sampling: Sampling
) -> None:
    fields: dict[str, Any] = {"max_tokens": 60, "ignore_eos": True, **bound}
    quick = ask(random, "abcabcabc", sampling=sampling, **fields)
    # Where it is to be told what the samplers leave, they choose among candidates of ours, and accept none unasked.
    told = msgspec.structs.replace(sampling, n_probs=1, post_sampling_probs=True)
    slow = ask(random, "abcabcabc", sampling=told, **fields)
    assert quick.text == slow.text
    assert quick.tokens == slow.tokens
    assert len(quick.tokens) > 4


def odds(delta: Delta) -> list[TokenProb]:
    (probs,) = delta.probs
    return [probs.chosen, *probs.top]


@every_kind
def test_a_grammar_that_sleeps_changes_nothing(random: LlamaEngine, sampling: Sampling) -> None:
    trigger = GrammarTrigger(words=("nowhere to be seen",))
    fields: dict[str, Any] = {
        "sampling": msgspec.structs.replace(sampling, n_probs=3, logit_bias=((2, None), *sampling.logit_bias)),
        "max_tokens": 40,
    }
    free = ask(random, "abc", **fields)
    sleeping = ask(random, "abc", grammar='root ::= "nowhere"', trigger=trigger, **fields)
    assert sleeping.tokens == free.tokens
    told, expected = ([one for delta in got.deltas for one in odds(delta)] for got in (sleeping, free))
    assert [one.token for one in told] == [one.token for one in expected]
    # Where a sequence lies in the cache changes the last digits.
    assert [one.logprob for one in told] == pytest.approx([one.logprob for one in expected], abs=1e-2)


@pytest.mark.parametrize("words", [(), ("",), ("x" * 300,), ("x",) * 65])
def test_triggers_are_checked(random: LlamaEngine, words: tuple[str, ...]) -> None:
    error = refusal(random, grammar='root ::= "x"', trigger=GrammarTrigger(words=words))
    assert error.code == "invalid_grammar"


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grammar", "reason"),
    [
        ("root ::= other", "grammar: rule 'other' is used and not defined"),
        ('root ::= root "x" | "y"', "left recursion"),
        ("root ::= <[512]>", "token 512 is not in the vocabulary of 512 tokens"),
        ("root ::= <no such token>", "'<no such token>' is 15 tokens of this model, and must be one"),
        ('root ::= "a"{1000000}', "at most 2000 times"),
    ],
)
def test_bad_grammars_are_refused(random: LlamaEngine, grammar: str, reason: str) -> None:
    error = refusal(random, grammar=grammar)
    assert error.code == "invalid_grammar"
    assert reason in str(error)


def test_a_grammar_that_is_too_ambiguous_fails_its_request(random: LlamaEngine) -> None:
    rules = "".join(f"r{i} ::= r{i + 1} | r{i + 1} [x]\n" for i in range(1500))
    error = refusal(random, grammar=f"root ::= r0\n{rules}r1500 ::= [y]")
    assert error.code == "grammar_too_complex"


# --- the real model ---------------------------------------------------------------------------------------------------

JSON = r"""
root ::= object
value ::= object | array | string | number | ("true" | "false" | "null") ws
object ::= "{" ws (string ":" ws value ("," ws string ":" ws value)*)? "}" ws
array ::= "[" ws (value ("," ws value)*)? "]" ws
string ::= "\"" ([^"\\\x7F\x00-\x1F] | "\\" (["\\bfnrt] | "u" [0-9a-fA-F]{4}))* "\"" ws
number ::= ("-"? ([0-9] | [1-9] [0-9]{0,15})) ("." [0-9]+)? ([eE] [-+]? [0-9] [1-9]{0,15})? ws
ws ::= | " " | "\n" [ \t]{0,20}
"""


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=1.2, seed=4), Sampling(temperature=1.2, seed=9)])
def test_a_real_model_writes_json(smollm2: LlamaEngine, sampling: Sampling) -> None:
    got = ask(smollm2, PROMPT, grammar=JSON, sampling=sampling, max_tokens=400)
    assert got.reason in ("stop", "length")
    if got.reason == "stop":
        assert isinstance(json.loads(got.text), dict)
    else:
        assert got.text.startswith("{")
