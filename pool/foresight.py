"""Which model will be wanted next, as far as its past tells. Pure."""

from collections.abc import Iterator

__all__ = ["Foresight"]


class Foresight:
    """Remembers which model was started after which, and what had to make room.

    A model that somebody unloaded, or that nobody used for long, is not expected back; one that had to go for another
    is. Of these the one that followed the last time that the newest was started is the likeliest, then what went last.
    """

    def __init__(self) -> None:
        self._newest: str | None = None
        #: Which model was started after a model, the last time.
        self._followers: dict[str, str] = {}
        #: Models that had to make room and have not been started since, in the order in which they went.
        self._displaced: dict[str, None] = {}

    def started(self, model: str) -> None:
        """A model is started."""
        if self._newest is not None and self._newest != model:
            self._followers[self._newest] = model
        self._newest = model
        self._displaced.pop(model, None)

    def displaced(self, model: str) -> None:
        """A model is stopped to make room."""
        self._displaced.pop(model, None)
        self._displaced[model] = None

    def forget(self, model: str) -> None:
        """A model is not expected back."""
        self._displaced.pop(model, None)

    def likely(self) -> Iterator[str]:
        """Yield the models that are expected back, the likeliest first."""
        follower = None if self._newest is None else self._followers.get(self._newest)
        if follower in self._displaced:
            yield follower
        yield from (model for model in reversed(self._displaced) if model != follower)
