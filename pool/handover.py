"""Workers that change their model: where one has to make room for another, its process need not end for that.

It frees what it has, says so, and loads what the other is. That spares a swap an interpreter, its imports, and whatever
a GPU's driver sets up. To the rest of the pool the old worker is gone then, and the new one has started.
"""

from dataclasses import dataclass
from typing import Final

from llamaherd.pool.entry import Entry, Replica
from llamaherd.pool.lifecycle import State
from llamaherd.pool.worker import Worker

__all__ = ["Handovers", "may_hand_over"]

#: How often a process changes its model at most: what may be left of each, in a driver or a heap, does not add up.
MOST_HANDOVERS: Final = 64


@dataclass(slots=True)
class _Handover:
    """One change of a worker's model, from the word to free the old one to the news that it is free.

    Attributes:
        heir: The name of the model that it is made for; empty once the process may become anyone's.
        taker: The replica that has been started with the process; None before that.
    """

    heir: str
    taker: Replica | None = None


class Handovers:
    """Those that are under way."""

    def __init__(self) -> None:
        self._under_way: Final[dict[Worker, _Handover]] = {}

    def __contains__(self, worker: Worker) -> bool:
        return worker in self._under_way

    @property
    def workers(self) -> tuple[Worker, ...]:
        """Whose they are."""
        return tuple(self._under_way)

    def awaited_by(self, model: str) -> bool:
        """Whether a process is being freed for a model, which has not taken it yet."""
        return any(handover.heir == model and handover.taker is None for handover in self._under_way.values())

    def begin(self, worker: Worker, heir: str) -> None:
        """A worker is told to free its model for another."""
        self._under_way[worker] = _Handover(heir)

    def claim(self, taker: Replica) -> Worker | None:
        """Return a process that is free, or else one that is being freed for a replica's model; it is the replica's
        then. None without.
        """
        able = [
            (worker, handover)
            for worker, handover in self._under_way.items()
            if handover.heir in ("", taker.entry.name) and handover.taker is None and not worker.stopping
        ]
        if not able:
            return None
        worker, handover = min(able, key=lambda one: one[1].heir != "")  # the other may take its time
        handover.taker = taker
        return worker

    def open(self, worker: Worker) -> None:
        """A worker has freed its model. If its heir does not want it any more, whoever starts next may have it."""
        self._under_way[worker].heir = ""

    def end(self, worker: Worker) -> Replica | None:
        """The worker has freed its model, or is gone. Return who has taken it; None if nobody, or nothing was under
        way.
        """
        handover = self._under_way.pop(worker, None)
        return None if handover is None else handover.taker


def may_hand_over(leaver: Replica, heir: Entry) -> bool:
    """Whether a replica's process can become a worker of another model: it answers, as far as is known, and both are
    run by the same engine wherever there is room.
    """
    worker = leaver.worker
    if worker is None or worker.pid is None or worker.stopping or worker.kill_reason:
        return False
    if leaver.spec.is_placed or heir.spec.is_placed or leaver.spec.engine != heir.spec.engine:
        return False
    return leaver.state in (State.LOADED, State.SLEEPING) and worker.handed_over < MOST_HANDOVERS
