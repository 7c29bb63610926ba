"""What the scheduler may have done: the interface between deciding and doing."""

from typing import Protocol

from llamaherd.pool.errors import PoolError

__all__ = ["Effects"]


class Effects(Protocol):
    """What the scheduler decides. Implementations take note and return; they do not call back into the scheduler."""

    def start(self, model: str, replica: int) -> None:
        """Start a worker for the model. Answered by ``ready`` or ``exited``."""
        ...

    def drop_ahead(self) -> None:
        """Stop the spare that has loaded a model ahead. Answered by ``ahead_gone``."""
        ...

    def wake(self, model: str, replica: int) -> None:
        """Have a sleeping worker load its model again. Answered by ``ready`` or ``exited``."""
        ...

    def stop(self, model: str, replica: int, heir: str | None = None) -> None:
        """Stop a worker. Answered by ``exited``.

        ``heir`` is the model that room is made for: its start is likely to follow, maybe before the answer, so the
        process may become its worker instead of ending. That counts as the old worker's exit and the new one's start.
        """
        ...

    def grant(self, ticket: int, replica: int) -> None:
        """Send the request to its model's worker. Answered by ``finish``, if it holds the model."""
        ...

    def reject(self, ticket: int, error: PoolError) -> None:
        """End a request that was never granted."""
        ...

    def threads(self, model: str, replica: int, n: int) -> None:
        """Tell a worker how many threads to compute with."""
        ...
