"""How the cores are divided among the models that are busy. Pure arithmetic.

ggml's threads spin while they wait for each other, so two workers that each use all cores take each other's time at
every barrier and collapse: on two cores, two busy models at llama-server's defaults make a ninth of the tokens of one.
With the cores divided they make nearly as many together as one alone.
"""

from collections.abc import Hashable
from typing import Final, Generic, TypeVar

__all__ = ["ThreadBudget"]

#: What names a process.
K = TypeVar("K", bound=Hashable)


class ThreadBudget(Generic[K]):
    """Keeps which workers are busy and what each was last told, and says who must be told anew.

    Beyond as many busy workers as cores everybody has one thread, so what an event costs does not grow with them.

    Args:
        cores: Cores to divide; every busy worker gets at least one, even if there are more workers than cores. 0 leaves
            the threads alone.
    """

    def __init__(self, cores: int) -> None:
        self._cores: Final = cores
        self._busy: dict[K, None] = {}
        self._told: dict[K, int] = {}
        #: Who has come since the last news, and whether the shares of the others may have changed too.
        self._newcomers: list[K] = []
        self._changed = False

    def __len__(self) -> int:
        """How many workers are busy."""
        return len(self._busy)

    def join(self, worker: K) -> None:
        """A worker is busy from now on; it was not."""
        self._busy[worker] = None
        if len(self._busy) > self._cores:
            if self._told.get(worker) != 1:
                self._newcomers.append(worker)
        else:
            self._changed = True

    def leave(self, worker: K) -> None:
        """A worker is busy no more. It keeps its number, since it computes nothing."""
        del self._busy[worker]
        self._changed = self._changed or len(self._busy) < self._cores

    def forget(self, worker: K) -> None:
        """The worker is gone; the next one starts with no number."""
        self._told.pop(worker, None)

    @property
    def stale(self) -> bool:
        """Whether there may be news."""
        return self._changed or bool(self._newcomers)

    def news(self) -> dict[K, int]:
        """Return the threads of each busy worker whose number has changed. Those that were busy first get what does not
        divide evenly.
        """
        if not (self._changed or self._newcomers):
            return {}
        wanted = self._shares() if self._changed else dict.fromkeys(self._newcomers, 1)
        self._changed = False
        self._newcomers.clear()
        if not self._cores:
            return {}
        news = {worker: n for worker, n in wanted.items() if worker in self._busy and self._told.get(worker) != n}
        self._told.update(news)
        return news

    def _shares(self) -> dict[K, int]:
        share, rest = divmod(self._cores, len(self._busy)) if self._busy else (0, 0)
        return {worker: max(1, share + (rank < rest)) for rank, worker in enumerate(self._busy)}
