"""How the cores are divided among the models that are busy. Pure arithmetic.

ggml's threads spin while they wait for each other, so two workers that each use all cores take each other's time at
every barrier and collapse: on two cores, two busy models at llama-server's defaults make a ninth of the tokens of one.
With the cores divided they make nearly as many together as one alone.
"""

from collections.abc import Collection

__all__ = ["ThreadBudget"]


class ThreadBudget:
    """Keeps what each busy model was last told, and says who must be told anew.

    Args:
        cores: Cores to divide; every busy model gets at least one, even if there are more models than cores.
    """

    def __init__(self, cores: int) -> None:
        self._cores = max(1, cores)
        self._told: dict[str, int] = {}

    def update(self, busy: Collection[str]) -> dict[str, int]:
        """Return the threads of each busy model whose number changes, given all busy models in a stable order.

        The first ones get what does not divide evenly. A model that is not busy any more keeps its number, since it
        computes nothing, and is told when it is busy again.
        """
        share, rest = divmod(self._cores, len(busy)) if busy else (0, 0)
        wanted = {model: max(1, share + (rank < rest)) for rank, model in enumerate(busy)}
        news = {model: n for model, n in wanted.items() if self._told.get(model) != n}
        self._told.update(news)
        return news

    def forget(self, model: str) -> None:
        """The model's worker is gone; the next one starts with no number."""
        self._told.pop(model, None)
