"""Fields of llama-server's ``/completion`` that have no other place, through the pool and a real worker."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from chat_templates import ALWAYS_THINKS
from llamaherd.pool import BadRequest, Completion, EngineOptions, ModelSpec, SyncPool
from tiny_gguf import tiny_model, write_scripted_llama

OPTIONS = EngineOptions(n_ctx=512, n_threads=1, flash_attn="off")
#: The tiny models' ends, of a text and of a turn.
ENDS = frozenset({2, 260})
DRAWN: dict[str, Any] = {"seed": 3, "max_tokens": 12, "ignore_eos": True, "n_probs": 5}


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SyncPool]:
    folder: Path = tmp_path_factory.mktemp("lines")
    models = [ModelSpec(name="tiny", path=tiny_model("random"), options=OPTIONS)]
    for name, script in (
        ("python", ("def", "▁f():", "\n▁▁", "return", "\n▁▁1", "\nend")),
        ("thinker", ("Hm.", "</think>", "Yes.")),
    ):
        path = folder / f"{name}.gguf"
        write_scripted_llama(path, script=script, template=ALWAYS_THINKS)
        models.append(ModelSpec(name=name, path=path, options=OPTIONS))
    with SyncPool(models) as herd:
        yield herd


def complete(pool: SyncPool, name: str = "tiny", prompt: str = "the cat", **params: Any) -> Completion:
    return pool.complete(name, prompt, **params).collect()


def odds(answer: Completion) -> list[dict[int, float]]:
    return [{one.token: math.exp(one.logprob) for one in (entry.chosen, *entry.top)} for entry in answer.probs]


# --- post_sampling_probs ---


def test_the_probabilities_are_those_that_the_samplers_have_left(pool: SyncPool) -> None:
    chain: dict[str, Any] = {"samplers": ["top_k", "temperature"], "top_k": 3, "temperature": 1.0}
    answer = complete(pool, post_sampling_probs=True, **DRAWN, **chain)
    before = complete(pool, **{**DRAWN, "n_probs": 100}, **chain)
    assert answer.tokens == before.tokens, "to look changes nothing"
    for left, raw, entry in zip(odds(answer), odds(before), answer.probs, strict=True):
        assert len(entry.top) == len(left) == 3
        assert sum(left.values()) == pytest.approx(1.0, abs=1e-5)
        # ignore_eos takes the ends from the samplers, and not from what they are given.
        likeliest = sum(sorted(value for token, value in raw.items() if token not in ENDS)[-3:])
        for token, value in left.items():
            assert value == pytest.approx(raw[token] / likeliest, rel=1e-3)
        shown = [one.logprob for one in entry.top]
        assert shown == sorted(shown, reverse=True)


@pytest.mark.parametrize("params", [{"temperature": 0}, {"top_k": 1}, {"temperature": 0, "repeat_penalty": 1.1}])
def test_where_only_one_can_be_chosen_it_is_certain(pool: SyncPool, params: dict[str, Any]) -> None:
    for entry in complete(pool, post_sampling_probs=True, **DRAWN, **params).probs:
        assert entry.top == (entry.chosen,)
        assert entry.chosen.logprob == 0


@pytest.mark.parametrize("params", [{"mirostat": 1}, {"mirostat": 2}, {"samplers": ["min_p", "adaptive_p"]}, {}])
def test_every_kind_of_chain_tells(pool: SyncPool, params: dict[str, Any]) -> None:
    answer = complete(pool, post_sampling_probs=True, **DRAWN, **params)
    assert answer.tokens == complete(pool, **DRAWN, **params).tokens
    assert all(0 < sum(math.exp(one.logprob) for one in entry.top) < 1.001 for entry in answer.probs)


def test_under_a_grammar_they_are_those_of_what_is_allowed(pool: SyncPool) -> None:
    answer = complete(
        pool, grammar="root ::= [ab]+", post_sampling_probs=True, temperature=1.0, n_probs=5, seed=1, max_tokens=8
    )
    assert set(answer.text) <= set("ab")
    assert all(one.chosen.logprob > -9999 for one in answer.probs)


def test_without_a_number_nothing_is_told(pool: SyncPool) -> None:
    assert complete(pool, post_sampling_probs=True, max_tokens=3).probs == ()


# --- lines ---


def test_a_line_with_too_few_blanks_ends_the_answer(pool: SyncPool) -> None:
    greedy: dict[str, Any] = {"prompt": "\n", "temperature": 0}
    assert complete(pool, "python", **greedy).text == "def f():\n  return\n  1\nend"
    cut = complete(pool, "python", n_indent=2, **greedy)
    assert (cut.text, cut.finish_reason) == ("def f():\n  return\n  1\n", "length")
    assert complete(pool, "python", n_indent=3, **greedy).text == "def f():\n  "


def test_a_line_break_ends_an_answer_whose_time_is_over(pool: SyncPool) -> None:
    # It would fill the context with line breaks, which takes longer than a millisecond.
    params: dict[str, Any] = {"logit_bias": {"\n": 100.0}, "temperature": 0, "ignore_eos": True}
    full = complete(pool, **params)
    cut = complete(pool, t_max_predict_ms=1, **params)
    assert full.truncated
    assert (cut.truncated, cut.finish_reason) == (False, "length")
    assert 0 < cut.usage.completion_tokens < full.usage.completion_tokens


# --- timings_per_token ---


def test_counts_and_times_come_with_every_piece(pool: SyncPool) -> None:
    pieces = list(pool.complete("tiny", "the cat", timings_per_token=True, max_tokens=5, ignore_eos=True))
    counts = [piece.usage.completion_tokens for piece in pieces if piece.usage is not None]
    assert counts[-1] == 5
    assert counts == sorted(counts)
    assert all(piece.usage is not None and piece.timings is not None for piece in pieces)
    plain = list(pool.complete("tiny", "the cat", max_tokens=5, ignore_eos=True))
    assert all(piece.timings is None for piece in plain[:-1])


def test_they_come_with_reasoning_too(pool: SyncPool) -> None:
    question = [{"role": "user", "content": "?"}]
    pieces = list(pool.chat("thinker", question, timings_per_token=True, temperature=0))
    assert "".join(piece.reasoning for piece in pieces) == "Hm."
    assert all(piece.timings is not None for piece in pieces)


@pytest.mark.parametrize(
    "params",
    [
        {"post_sampling_probs": 1},
        {"n_indent": -1},
        {"n_indent": 2**31},
        {"t_max_predict_ms": -2},
        {"t_max_predict_ms": 1.5},
        {"timings_per_token": "yes"},
    ],
)
def test_a_wrong_value_is_refused(pool: SyncPool, params: dict[str, Any]) -> None:
    with pytest.raises(BadRequest, match=next(iter(params))):
        complete(pool, **params)
