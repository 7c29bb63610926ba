"""How the cores are divided among the models that are busy. Pure arithmetic.

ggml's threads spin while they wait for each other, so two workers that each use all cores take each other's time at
every barrier and collapse: on two cores, two busy models at llama-server's defaults make a ninth of the tokens of one.
With the cores divided they make nearly as many together as one alone.
"""

from collections.abc import Collection, Hashable
from typing import Generic, TypeVar

__all__ = ["ThreadBudget"]

#: What names a process.
K = TypeVar("K", bound=Hashable)


class ThreadBudget(Generic[K]):
    """Keeps what each busy worker was last told, and says who must be told anew.

    Args:
        cores: Cores to divide; every busy worker gets at least one, even if there are more workers than cores.
    """

    def __init__(self, cores: int) -> None:
        self._cores = max(1, cores)
        self._told: dict[K, int] = {}

    def update(self, busy: Collection[K]) -> dict[K, int]:
        """Return the threads of each busy worker whose number changes, given all busy ones in a stable order.

        The first ones get what does not divide evenly. A worker that is not busy any more keeps its number, since it
        computes nothing, and is told when it is busy again.
        """
        share, rest = divmod(self._cores, len(busy)) if busy else (0, 0)
        wanted = {worker: max(1, share + (rank < rest)) for rank, worker in enumerate(busy)}
        news = {worker: n for worker, n in wanted.items() if self._told.get(worker) != n}
        self._told.update(news)
        return news

    def forget(self, worker: K) -> None:
        """The worker is gone; the next one starts with no number."""
        self._told.pop(worker, None)
