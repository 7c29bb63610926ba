"""What can go for something else to start, and in which order. Pure questions about the scheduler's records."""

from collections.abc import Iterable
from typing import Final

from llamaherd.pool.errors import QueueFull
from llamaherd.pool.room import Limits, Room
from llamaherd.pool.roster import Instance, Model, Phase

__all__ = ["dispensable", "drainable", "hopeless"]

_MIB: Final = 1024 * 1024


def dispensable(models: Iterable[Model]) -> list[Instance]:
    """Return the instances that may be stopped for room, in the order in which they go.

    Idle ones only, and none that is wanted, retires, or is the last of a pinned model. What was drained goes first,
    then instances without which their model goes on, then by their last use.
    """
    found: list[tuple[bool, bool, int, Instance]] = []
    for model in models:
        live = sum(instance.live for instance in model.instances)
        idle = [one for one in model.instances if one.phase in (Phase.READY, Phase.ASLEEP) and not one.in_flight]
        for instance in sorted(idle, key=lambda one: one.last_used):
            last = live <= 1
            if (model.waiting and instance.drained_for is None) or (last and model.pinned) or instance.retiring:
                continue
            live -= 1
            found.append((instance.drained_for is None, last, instance.last_used, instance))
    found.sort(key=lambda entry: entry[:3])
    return [instance for *_, instance in found]


def drainable(models: Iterable[Model], wanted: Model, max_overtakes: int) -> list[Instance]:
    """Return the instances that are to be drained for a model now: one for every ``max_overtakes`` times that it was
    overtaken, the least busy first.
    """
    ready = [
        instance
        for model in models
        if not model.pinned
        for instance in model.instances
        if instance.phase is Phase.READY and not instance.retiring
    ]
    drained = sum(instance.drained_for is wanted for instance in ready)
    candidates = sorted(
        (instance for instance in ready if instance.drained_for is None),
        key=lambda instance: (instance.in_flight, instance.last_used),
    )
    return candidates[: wanted.overtaken // max_overtakes - drained]


def hopeless(model: Model, models: Iterable[Model], limits: Limits) -> QueueFull | None:
    """Return why a model can never start: it is too large, or what is pinned leaves no room; None if it can."""
    room = model.next_room
    if not limits.allow(room):
        return QueueFull(f"model {model.name!r} cannot be loaded: {_figures(room, limits)}", code="too_large")
    for other in models:
        if other.pinned:
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
