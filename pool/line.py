"""The line in which requests wait, all of them: bounded, and sorted by model."""

from collections.abc import Iterator
from typing import Final

from llamaherd.pool.errors import RETRY_AFTER, QueueFull
from llamaherd.pool.room import Limits
from llamaherd.pool.roster import Model, Waiting

__all__ = ["Line"]


class Line:
    """Requests that wait, by ticket, and what their models lack.

    Which models wait for a process is kept and not searched for, and so is how often each was overtaken: one count goes
    on for all of them, and each remembers where it began.

    Attributes:
        hungry: Models that wait for a process, by name.
        growing: Models that would have a further process if there were room to spare, by name.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits: Final = limits
        self._waiting: dict[int, Waiting] = {}
        self.hungry: Final[dict[str, Model]] = {}
        self.growing: Final[dict[str, Model]] = {}
        self._passes = 0
        #: The count at which each hungry model began, less what it had been overtaken before.
        self._began: dict[str, int] = {}
        #: The count at which the next of them has been overtaken too often.
        self._alarm = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def refusal(self, model: Model, more: int = 0, more_in_all: int = 0) -> QueueFull | None:
        """Return why nobody more may wait for a model, None if they may. So many ``more`` wait for it, and in all, that
        are not in the line.
        """
        own = self._limits.queue_max_per_model if model.queue_max is None else model.queue_max
        waiting, in_all = model.waiting + more, len(self) + more_in_all
        if own and waiting >= own:
            return _full(f"{waiting} requests wait for model {model.name!r} already, and the limit is {own}")
        if self._limits.queue_max and in_all >= self._limits.queue_max:
            return _full(f"{in_all} requests wait already, and the limit is {self._limits.queue_max}")
        return None

    def put(self, waiting: Waiting) -> None:
        """A request begins to wait."""
        self._waiting[waiting.ticket] = waiting
        waiting.model.put(waiting)

    def take(self, ticket: int) -> Waiting | None:
        """A request waits no more; return it, None if it did not."""
        waiting = self._waiting.pop(ticket, None)
        if waiting is not None:
            waiting.model.remove(waiting)
            if not waiting.model.waiting:
                self.satisfy(waiting.model)
        return waiting

    # --- who lacks a process ---

    def look_at(self, model: Model) -> bool:
        """See what a model lacks now. Returns whether that has changed."""
        name = model.name
        grows = model.may_grow
        changed = grows is not (name in self.growing)
        if changed:
            _keep(self.growing, model, grows)
        if model.hungry is not (name in self.hungry):
            changed = True
            _keep(self.hungry, model, model.hungry)
            if model.hungry:
                self._began[name] = self._passes - model.overtaken
            else:
                model.overtaken = self._passes - self._began.pop(name)
        return changed

    def in_turn(self) -> list[Model]:
        """Return the models that wait for a process, in the order in which they get room."""
        return sorted(self.hungry.values(), key=self._turn) if len(self.hungry) > 1 else list(self.hungry.values())

    def _turn(self, model: Model) -> tuple[bool, int, int]:
        head = model.head
        return self.overtaken(model) < self._limits.max_overtakes, -head.priority, head.ticket

    # --- overtaking ---

    def overtaken(self, model: Model) -> int:
        """Return how often a model's waiting requests were overtaken."""
        began = self._began.get(model.name)
        return model.overtaken if began is None else self._passes - began

    def satisfy(self, model: Model) -> None:
        """A model has got what it waited for, or nobody waits for it: it begins anew."""
        model.overtaken = 0
        if model.name in self._began:
            self._began[model.name] = self._passes

    def overtake(self) -> bool:
        """A request passes all that wait for a process. Returns whether one of them has been passed too often now."""
        self._passes += 1
        return self._passes >= self._alarm

    def set_alarm(self) -> None:
        """Have :meth:`overtake` tell when the next model has been passed ``max_overtakes`` times more."""
        self._alarm = min(self._alarms(), default=0)

    def _alarms(self) -> Iterator[int]:
        most = self._limits.max_overtakes
        return (began + ((self._passes - began) // most + 1) * most for began in self._began.values())


def _keep(index: dict[str, Model], model: Model, belongs: bool) -> None:
    if belongs:
        index[model.name] = model
    else:
        del index[model.name]


def _full(text: str) -> QueueFull:
    return QueueFull(text, code="queue_full", retry=True, retry_after=RETRY_AFTER)
