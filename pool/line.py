"""The line in which requests wait, all of them: bounded, and sorted by model."""

from typing import Final

from llamaherd.pool.errors import RETRY_AFTER, QueueFull
from llamaherd.pool.room import Limits
from llamaherd.pool.roster import Model, Waiting

__all__ = ["Line"]


class Line:
    """Requests that wait, by ticket, and the models that they wait for.

    Attributes:
        wanted: Models that someone waits for, by name; what happens is looked at for these and not for all models.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits: Final = limits
        self._waiting: dict[int, Waiting] = {}
        self.wanted: dict[str, Model] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def hungry(self) -> list[Model]:
        """The models that wait for a process."""
        return [model for model in self.wanted.values() if model.hungry]

    def refusal(self, model: Model) -> QueueFull | None:
        """Return why nobody more may wait for a model; None if they may."""
        limits = self._limits
        if limits.queue_max_per_model and model.waiting >= limits.queue_max_per_model:
            text = f"{model.waiting} requests wait for model {model.name!r} already, and the limit is"
            return _full(f"{text} {limits.queue_max_per_model}")
        if limits.queue_max and len(self) >= limits.queue_max:
            return _full(f"{len(self)} requests wait already, and the limit is {limits.queue_max}")
        return None

    def put(self, waiting: Waiting) -> None:
        """A request begins to wait."""
        self._waiting[waiting.ticket] = waiting
        waiting.model.put(waiting)
        self.wanted[waiting.model.name] = waiting.model

    def take(self, ticket: int) -> Waiting | None:
        """A request waits no more; return it, None if it did not."""
        waiting = self._waiting.pop(ticket, None)
        if waiting is not None:
            model = waiting.model
            model.remove(waiting)
            if not model.waiting:
                model.overtaken = 0
                del self.wanted[model.name]
        return waiting


def _full(text: str) -> QueueFull:
    return QueueFull(text, code="queue_full", retry=True, retry_after=RETRY_AFTER)
