"""The count of cells against the plain truth: a set of cells per sequence."""

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from llamaherd.pool.child.cells import Cells

SEQUENCES = st.integers(0, 4)
LENGTHS = st.integers(0, 12)
ACTIONS = st.one_of(
    st.tuples(st.just("grow"), SEQUENCES, LENGTHS),
    st.tuples(st.just("share"), SEQUENCES, SEQUENCES, LENGTHS),
    st.tuples(st.just("truncate"), SEQUENCES, LENGTHS),
    st.tuples(st.just("cut"), SEQUENCES, LENGTHS, LENGTHS),
    st.tuples(st.just("drop"), SEQUENCES),
)


@settings(max_examples=300)
@given(st.lists(ACTIONS, max_size=30), st.sets(SEQUENCES))
def test_shared_cells_count_once_and_are_free_when_the_last_holder_lets_go(actions: Any, some: set[int]) -> None:
    cells, truth, fresh = Cells(), {sequence: list[int]() for sequence in range(5)}, iter(range(10**6))
    for action in actions:
        match action:
            case ("grow", one, count):
                cells.grow(one, count)
                truth[one] += [next(fresh) for _ in range(count)]
            case ("share", source, target, length):
                if source == target or length > len(truth[source]):
                    continue
                cells.drop(target)
                cells.share(source, target, length)
                truth[target] = truth[source][:length]
            case ("truncate", one, length):
                length = min(length, len(truth[one]))
                cells.truncate(one, length)
                truth[one] = truth[one][:length]
            case ("cut", one, start, count):
                end = min(start + count, len(truth[one]))
                if start > end:
                    continue
                cells.cut(one, start, end)
                truth[one] = truth[one][:start] + truth[one][end:]
            case ("drop", one):
                cells.drop(one)
                truth[one] = []
            case _:
                raise AssertionError(action)
        assert cells.used == len({cell for held in truth.values() for cell in held})
        for one, held in truth.items():
            for start in (0, 3):
                others = {other for other in truth if other != one and set(held[start:]) & set(truth[other])}
                assert cells.sharers(one, start) == others
    assert cells.held_by(some) == len({cell for one in some for cell in truth[one]})


def test_its_repr_shows_the_figures() -> None:
    cells = Cells()
    cells.grow(3, 5)
    assert repr(cells) == "<Cells used=5 sequences=[3]>"
