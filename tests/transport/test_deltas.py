"""Joining deltas loses nothing, in whatever portions it is done."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamaherd.transport.deltas import join, join_calls
from llamaherd.transport.messages import CallDelta, Delta, Timings, TokenProb, TokenProbs, TypedDelta, Usage

TEXTS = st.text(max_size=4)
PROBS = st.integers(0, 9).map(lambda token: TokenProbs(TokenProb(token, -1.0, b"x"), ()))
CALLS = st.builds(CallDelta, st.integers(0, 2), TEXTS, TEXTS, TEXTS)
PLAIN = st.builds(
    Delta,
    st.just(7),
    TEXTS,
    st.lists(st.integers(0, 99), max_size=2).map(tuple),
    st.lists(PROBS, max_size=2).map(tuple),
)
TYPED = st.builds(
    TypedDelta,
    st.just(7),
    TEXTS,
    st.lists(st.integers(0, 99), max_size=2).map(tuple),
    st.just(()),
    TEXTS,
    st.lists(CALLS, max_size=3).map(tuple),
)


@given(st.lists(PLAIN | TYPED, min_size=1, max_size=8))
def test_a_joined_delta_says_what_its_parts_say(deltas: list[Delta]) -> None:
    joined = join(deltas)

    assert joined.request == 7
    assert joined.text == "".join(one.text for one in deltas)
    assert joined.tokens == tuple(token for one in deltas for token in one.tokens)
    assert joined.probs == tuple(prob for one in deltas for prob in one.probs)
    typed = [one for one in deltas if isinstance(one, TypedDelta)]
    if isinstance(joined, TypedDelta):
        assert joined.reasoning == "".join(one.reasoning for one in typed)
    else:
        assert not typed


@given(st.lists(CALLS, max_size=9))
def test_each_call_is_told_once_with_all_its_arguments(deltas: list[CallDelta]) -> None:
    joined = join_calls(deltas)

    assert [one.index for one in joined] == sorted({one.index for one in deltas})
    for one in joined:
        parts = [part for part in deltas if part.index == one.index]
        assert one.arguments == "".join(part.arguments for part in parts)
        assert (one.id, one.name) == (parts[0].id, parts[0].name)


@given(st.lists(PLAIN | TYPED, min_size=2, max_size=8), st.data())
def test_portions_do_not_matter(deltas: list[Delta], data: st.DataObject) -> None:
    cut = data.draw(st.integers(1, len(deltas) - 1))

    one, other = join(deltas), join([join(deltas[:cut]), join(deltas[cut:])])

    assert (one.text, one.tokens, one.probs) == (other.text, other.tokens, other.probs)
    assert getattr(one, "reasoning", "") == getattr(other, "reasoning", "")


def test_of_counts_and_times_the_last_ones_are_told() -> None:
    timed = [
        TypedDelta(7, str(count), (count,), usage=Usage(completion_tokens=count), timings=Timings(predicted_ms=count))
        for count in (1, 2, 3)
    ]

    assert join(timed) == TypedDelta(
        7, "123", (1, 2, 3), usage=Usage(completion_tokens=3), timings=Timings(predicted_ms=3)
    )


def test_nothing_cannot_be_joined() -> None:
    with pytest.raises(IndexError):
        join([])
