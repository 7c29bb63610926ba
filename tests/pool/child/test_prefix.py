"""Which prefix is reused: the longest that is there, or one that is worth waiting for."""

from array import array
from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from llamaherd.pool.child.prefix import Reuse, Rules, common_length, find


@dataclass
class Fixed:
    slot: int
    tokens: "array[int]"
    computed: int


TOKENS = st.lists(st.integers(0, 2), max_size=12).map(lambda tokens: array("i", tokens))
DONORS = st.lists(st.tuples(TOKENS, st.integers(0, 12)), max_size=4).map(
    lambda shapes: [Fixed(slot, tokens, min(done, len(tokens))) for slot, (tokens, done) in enumerate(shapes)]
)
PLAIN = Rules(whole=False, window=0, first=lambda _slot: 0)
WHOLE = Rules(whole=True, window=0, first=lambda _slot: 0)


def sequence(slot: int, tokens: range, computed: int | None = None) -> Fixed:
    return Fixed(slot, array("i", tokens), len(tokens) if computed is None else computed)


def slowly(one: "array[int]", other: "array[int]") -> int:
    length = 0
    while length < min(len(one), len(other)) and one[length] == other[length]:
        length += 1
    return length


@given(TOKENS, TOKENS)
def test_the_common_length_is_that_of_a_plain_loop(one: "array[int]", other: "array[int]") -> None:
    assert common_length(one, other) == slowly(one, other)
    one.append(1)  # no view of it is left


@given(TOKENS, DONORS, DONORS)
def test_what_is_ready_is_the_longest_common_prefix_that_leaves_a_token(
    tokens: "array[int]", running: list[Fixed], cached: list[Fixed]
) -> None:
    best = max((min(slowly(tokens, one.tokens), one.computed, len(tokens) - 1) for one in running + cached), default=0)
    found = find(tokens, running, cached, PLAIN)
    assert (found.length if found is not None else 0) == max(best, 0)
    if found is not None:
        assert found.ready
        assert found.donor.tokens[: found.length] == tokens[: found.length]


@given(TOKENS, DONORS)
def test_a_running_state_is_taken_whole_or_not_at_all(tokens: "array[int]", donors: list[Fixed]) -> None:
    found = find(tokens, donors, (), WHOLE)
    whole = [one.computed for one in donors if 0 < one.computed <= min(slowly(tokens, one.tokens), len(tokens) - 1)]
    assert (found.length if found is not None else 0) == max(whole, default=0)
    assert found is None or found.length == found.donor.computed


def test_a_running_donor_is_taken_before_an_equal_cached_one() -> None:
    running, cached = sequence(1, range(50)), sequence(2, range(50))
    assert find(array("i", range(60)), [running], [cached], PLAIN) == Reuse(running, 50, ready=True)


def test_a_prompt_that_is_being_computed_is_waited_for() -> None:
    leader = sequence(1, range(1000), 10)
    assert find(array("i", range(900)), [leader], (), PLAIN) == Reuse(leader, 899, ready=False)


def test_a_few_tokens_are_not_worth_waiting_for() -> None:
    leader = sequence(1, range(40), 10)
    cached = sequence(2, range(20))
    assert find(array("i", range(60)), [leader], [cached], PLAIN) == Reuse(cached, 20, ready=True)


def test_what_left_the_window_is_lost_unless_it_is_needed_no_more() -> None:
    donor = sequence(1, range(100))
    prompt = array("i", [*range(60), 7, 7])
    for first, length in ((0, 60), (45, 60), (46, 0), (99, 0), (-1, 0)):
        rules = Rules(whole=False, window=16, first=lambda _slot, first=first: first)  # type: ignore[misc]
        found = find(prompt, (), [donor], rules)
        assert (found.length if found is not None else 0) == length


def test_sequences_without_anything_in_common_share_nothing() -> None:
    assert find(array("i", [1, 2]), [], [sequence(1, range(5, 9))], PLAIN) is None
    assert find(array("i", [1]), [], [sequence(1, range(1, 9))], PLAIN) is None


@given(st.integers(1, 60), st.integers(0, 60), st.integers(2, 20))
def test_a_copy_serves_for_a_beginning_whose_next_token_misses_nothing(computed: int, gone: int, window: int) -> None:
    rules = Rules(whole=False, window=window, first=lambda _slot: gone)
    first = rules.first_copied(0, computed)
    assert first == max(gone, computed - window)
    for length in range(1, computed + 1):
        seen = range(max(0, length - window + 1), length)
        assert rules.serves(computed, first, length) == (set(seen) <= set(range(first, computed)))
