"""Which cells of the cache are taken, counted here because llama.cpp does not tell.

Pure bookkeeping. A sequence is a list of runs, stretches of consecutive tokens; sequences that begin alike share the
runs of their beginning. A cell is free again when its last holder lets go.
"""

from collections.abc import Iterable, Set
from typing import Final

__all__ = ["Cells"]


class _Run:
    __slots__ = ("holders", "length")

    def __init__(self, length: int, holders: int) -> None:
        self.length = length
        self.holders = holders


class Cells:
    """The cells of sequences, by the sequence's id. An id that never grew holds none."""

    def __init__(self) -> None:
        self._runs: Final[dict[int, list[_Run]]] = {}
        #: Cells that somebody holds.
        self.used = 0

    def __repr__(self) -> str:
        return f"<Cells used={self.used} sequences={sorted(self._runs)}>"

    def grow(self, sequence: int, count: int) -> None:
        """Give a sequence ``count`` cells of its own at its end."""
        runs = self._runs.setdefault(sequence, [])
        if runs and runs[-1].holders == 1:
            runs[-1].length += count
        elif count:
            runs.append(_Run(count, 1))
        self.used += count

    def share(self, source: int, target: int, length: int) -> None:
        """Let an empty sequence hold the first ``length`` cells of another one too."""
        shared = self._runs.get(source, [])[: self._cut(source, length)]
        for run in shared:
            run.holders += 1
        self._runs[target] = shared

    def truncate(self, sequence: int, length: int) -> None:
        """Let go of everything beyond the first ``length`` cells."""
        kept = self._cut(sequence, length)
        runs = self._runs.get(sequence, [])
        for run in runs[kept:]:
            run.holders -= 1
            if not run.holders:
                self.used -= run.length
        del runs[kept:]

    def cut(self, sequence: int, start: int, end: int) -> None:
        """Let go of the cells from ``start`` to ``end``; what follows moves up."""
        first, last = self._cut(sequence, start), self._cut(sequence, end)
        runs = self._runs.get(sequence, [])
        for run in runs[first:last]:
            run.holders -= 1
            if not run.holders:
                self.used -= run.length
        del runs[first:last]

    def sharers(self, sequence: int, start: int) -> set[int]:
        """Return the other sequences that hold some of its cells from ``start`` on."""
        own = {id(run) for run in self._runs.get(sequence, [])[self._cut(sequence, start) :] if run.holders > 1}
        return {
            other for other, runs in self._runs.items() if other != sequence and any(id(run) in own for run in runs)
        }

    def drop(self, sequence: int) -> None:
        """Let go of everything."""
        self.truncate(sequence, 0)
        self._runs.pop(sequence, None)

    def held_by(self, sequences: Iterable[int]) -> int:
        """Return how many cells the sequences hold together, shared ones counted once."""
        runs = {id(run): run.length for sequence in sequences for run in self._runs.get(sequence, ())}
        return sum(runs.values())

    def own(self, sequence: int) -> int:
        """Return how many cells only this sequence holds."""
        return sum(run.length for run in self._runs.get(sequence, ()) if run.holders == 1)

    def runs(self, sequences: Iterable[int]) -> Set[int]:
        """Return what stands for all runs of the sequences in :meth:`idle`, until one of them changes."""
        return {id(run) for sequence in sequences for run in self._runs.get(sequence, ())}

    def idle(self, sequence: int, busy: Set[int]) -> float:
        """Return the cells of a sequence that are not of the ``busy`` runs, each counted for its part among those that
        hold it.
        """
        return sum(run.length / run.holders for run in self._runs.get(sequence, ()) if id(run) not in busy)

    def _cut(self, sequence: int, length: int) -> int:
        """Make a run end at ``length``; return how many runs come before that."""
        start = 0
        runs = self._runs.get(sequence, [])
        for index, run in enumerate(runs):
            if start == length:
                return index
            if start + run.length > length:
                self._split(run, length - start)
                return index + 1
            start += run.length
        return len(runs)

    def _split(self, run: _Run, length: int) -> None:
        rest = _Run(run.length - length, run.holders)
        run.length = length
        for runs in self._runs.values():
            for index, one in enumerate(runs):
                if one is run:
                    runs.insert(index + 1, rest)
                    break
