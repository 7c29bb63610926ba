"""Which slot a request gets where the cache does not decide: by what the idle ones have left, which may be in RAM."""

from array import array

from llamaherd.pool.child.adapters import AdapterSet
from llamaherd.pool.child.cache import Kept
from llamaherd.pool.child.sequence import Sequence
from llamaherd.pool.child.slots import Slots
from llamaherd.transport.messages import Generate

ALICE = list(range(100, 140))
BOB = list(range(200, 240))


def sequence(prompt: list[int], adapters: AdapterSet = (), *, slot: int = -1) -> Sequence:
    return Sequence(Generate(request=1, prompt=tuple(prompt), slot=slot), prompt, 512, None, adapters)


def used(*left: list[int] | None, order: tuple[int, ...] = (), adapters: AdapterSet = ()) -> Slots:
    """Return slots that have left these tokens, None for nothing, in their order unless told another."""
    slots = Slots(len(left))
    running = [sequence([1], slot=number) for number in range(len(left))]
    for one in running:
        slots.take(one, None)
    for number in order or range(len(left)):
        tokens = left[number]
        slots.leave(running[number], 512, None if tokens is None else Kept(-1, array("i", tokens), adapters))
    return slots


def taken(slots: Slots, prompt: list[int], donor: object = None) -> int:
    one = sequence(prompt)
    slots.take(one, donor)
    return one.lane


def test_the_slot_that_left_the_most_of_a_prompt_is_taken() -> None:
    slots = used(ALICE[:10], BOB, ALICE[:30], ALICE[:20])
    assert taken(slots, [*ALICE, 7]) == 2
    assert taken(slots, [*ALICE, 7]) == 3, "the best of the others, as that one is busy"


def test_of_slots_that_left_as_much_the_longest_idle_is_taken() -> None:
    assert taken(used(ALICE, ALICE, BOB, order=(1, 2, 0)), [*ALICE, 7]) == 1


def test_a_slot_that_left_more_of_something_else_is_left_alone() -> None:
    slots = used([*ALICE[:15], *BOB], None, order=(1, 0))
    assert taken(slots, [*ALICE, 7]) == 1


def test_a_prompt_that_is_new_to_all_takes_the_longest_idle() -> None:
    assert taken(used(ALICE, BOB, None, order=(2, 0, 1)), [1, 2, 3]) == 2


def test_what_other_adapters_have_computed_does_not_count() -> None:
    slots = used(None, ALICE, adapters=((0, 1.0),))
    assert taken(slots, [*ALICE, 7]) == 0


def test_the_slot_that_left_what_the_cache_lends_comes_first() -> None:
    slots = used(ALICE[:10], ALICE)
    assert taken(slots, [*ALICE, 7], donor=slots[0].kept) == 0
