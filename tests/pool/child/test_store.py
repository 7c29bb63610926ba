"""States in RAM: within their bounds, the least useful goes first, and what is held stays."""

from array import array

import numpy as np

from llamaherd.pool.child.prefix import Rules
from llamaherd.pool.child.store import State, Store

ANY = Rules(whole=False, window=0, first=lambda _slot: 0)
WHOLE = Rules(whole=True, window=0, first=lambda _slot: 0)


def state(*tokens: int, size: int = 100) -> State:
    return State(array("i", tokens), np.zeros(size - 4 * len(tokens), np.uint8))


def keep(store: Store, *states: State) -> None:
    for one in states:
        assert store.admit(one.size)
        store.keep(one)


def test_the_least_recently_used_goes_for_room() -> None:
    store = Store(250, ANY, free=lambda: None)
    first, second, third = state(1, 2), state(3, 4), state(5, 6)
    keep(store, first, second)
    store.touch(first)
    keep(store, third)
    assert store.find(array("i", [1, 2, 9])) == (first, 2)
    assert store.find(array("i", [3, 4, 9])) is None
    assert (store.kept, store.used) == (2, 200)


def test_a_held_state_is_not_given_up_for_others() -> None:
    store = Store(250, ANY, free=lambda: None)
    held = state(1, 2, size=200)
    assert store.admit(held.size)
    store.hold(held)
    assert not store.admit(100)
    keep(store, state(3, 4, size=50))
    store.release(held)
    assert store.used == 50


def test_a_released_state_may_become_one_of_a_finished_sequence() -> None:
    store = Store(None, ANY, free=lambda: None)
    held = state(1, 2, 3)
    store.hold(held)
    assert store.find(array("i", [1, 2, 3, 4])) is None, "held for one request alone"
    store.release(held, keep=True)
    assert store.find(array("i", [1, 2, 3, 4])) == (held, 3)


def test_what_says_nothing_new_is_not_kept() -> None:
    store = Store(None, ANY, free=lambda: None)
    keep(store, state(1, 2), state(1, 2, 3), state(1))
    assert store.kept == 1
    assert store.covers(array("i", [1, 2, 3])) and not store.covers(array("i", [1, 2, 3, 4]))


def test_the_longest_beginning_is_found_and_leaves_one_token() -> None:
    store = Store(None, ANY, free=lambda: None)
    one, other = state(1, 2, 3, 4), state(1, 2, 9, 9, 9)
    keep(store, one, other)
    assert store.find(array("i", [1, 2, 9, 7])) == (other, 3)
    assert store.find(array("i", [1, 2, 3, 4])) == (one, 3)
    assert store.find(array("i", [1])) is None
    assert store.find(array("i", [8, 8])) is None


def test_where_a_state_cannot_be_cut_the_prompt_must_contain_all_of_it() -> None:
    store = Store(None, WHOLE, free=lambda: None)
    short, long = state(1, 2), state(1, 2, 3, 4)
    keep(store, short, long)
    assert store.kept == 2
    assert store.find(array("i", [1, 2, 3, 9])) == (short, 2)
    assert store.find(array("i", [1, 2, 3, 4, 5])) == (long, 4)


def test_the_machine_is_left_most_of_its_free_memory() -> None:
    store = Store(None, ANY, free=lambda: 1000)
    assert store.admit(250)
    assert not store.admit(251)


def test_a_store_of_no_bytes_is_off() -> None:
    store = Store(0, ANY, free=lambda: None)
    assert not store.on
    assert not store.admit(1)
    assert repr(store) == "<Store kept=0 held=0 used=0 of 0>"


def test_states_of_other_adapters_are_as_if_they_were_not_there() -> None:
    store = Store(None, ANY, free=lambda: None)
    adapted = State(array("i", [1, 2]), np.zeros(8, np.uint8), ((0, 1.0),))
    keep(store, adapted, state(1, 2))
    assert store.kept == 2
    assert store.find(array("i", [1, 2, 3]), ((0, 1.0),)) == (adapted, 2)
    assert store.find(array("i", [1, 2, 3]), ((0, 0.5),)) is None
