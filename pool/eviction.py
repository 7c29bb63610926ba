"""What can go for something else to start, and in which order. Pure questions about the scheduler's records."""

from collections.abc import Iterable, Sequence
from typing import Final

from llamaherd.pool.errors import QueueFull
from llamaherd.pool.room import Limits, Room
from llamaherd.pool.roster import Instance, Model, Phase

__all__ = ["dispensable", "drainable", "hopeless", "victims"]

_MIB: Final = 1024 * 1024


def dispensable(idle: Iterable[Instance]) -> list[Instance]:
    """Return those of the idle instances that may be stopped for room, in the order in which they go.

    None that is wanted, or is the last of a pinned model. What was drained goes first, then instances without which
    their model goes on, then by their last use, which is the order that ``idle`` must have.
    """
    found: tuple[list[Instance], list[Instance], list[Instance]] = ([], [], [])
    live: dict[str, int] = {}
    for instance in idle:
        model = instance.model
        left = live.get(model.name)
        if left is None:
            left = sum(one.live for one in model.instances)
        last = left <= 1
        if (model.waiting and instance.drained_for is None) or (last and model.pinned):
            continue
        live[model.name] = left - 1
        found[0 if instance.drained_for is not None else 2 if last else 1].append(instance)
    return [instance for group in found for instance in group]


def victims(candidates: Sequence[Instance], left: Room, limits: Limits) -> list[Instance]:
    """Return which of the candidates have to go, the first ones first and no more than it takes; none if the end of all
    of them would not do.

    Args:
        left: What would be taken if none went; more than the limits allow.
    """
    for count, instance in enumerate(candidates, start=1):
        left -= instance.room
        if limits.allow(left):
            return _needed(candidates[:count], left, limits)
    return []


def _needed(found: Sequence[Instance], left: Room, limits: Limits) -> list[Instance]:
    """Return those without whose end it would not do: one on another GPU may help nothing."""
    needed = list(found)
    for instance in reversed(found):
        if limits.allow(left + instance.room):
            left += instance.room
            needed.remove(instance)
    return needed


def drainable(models: Iterable[Model], count: int) -> list[Instance]:
    """Return so many instances that are to be drained for a model now, the least busy first; fewer if there are no
    more.
    """
    candidates = [
        instance
        for model in models
        if not model.pinned
        for instance in model.instances
        if instance.phase is Phase.READY and not instance.retiring and instance.drained_for is None
    ]
    candidates.sort(key=lambda instance: (instance.in_flight, instance.last_used))
    return candidates[:count]


def hopeless(model: Model, pinned: Iterable[Model], limits: Limits) -> QueueFull | None:
    """Return why a model can never start: it is too large, or the pinned models leave no room; None if it can."""
    room = model.next_room
    if not limits.allow(room):
        return QueueFull(f"model {model.name!r} cannot be loaded: {_figures(room, limits)}", code="too_large")
    for other in pinned:
        room += max((one.room for one in other.instances if one.live), default=Room(), key=lambda one: one.total)
    if limits.allow(room):
        return None
    text = f"model {model.name!r} cannot be loaded: what pinned models hold leaves no room for it"
    return QueueFull(text, code="no_room")


def _figures(room: Room, limits: Limits) -> str:
    texts: list[str] = []
    if limits.memory_budget and room.memory > limits.memory_budget:
        texts.append(
            f"needs about {room.memory // _MIB} MiB, and the memory budget is {limits.memory_budget // _MIB} MiB"
        )
    for number, (need, budget) in enumerate(zip(room.gpus, limits.gpu_budgets, strict=False)):
        if need > budget:
            texts.append(f"needs about {need // _MIB} MiB of GPU {number}, whose budget is {budget // _MIB} MiB")
    return "it " + " and it ".join(texts)
