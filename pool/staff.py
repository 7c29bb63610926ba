"""The worker processes of a herd: which there are, whose each is, and how one comes to be another's.

What a worker is to do is the herd's business; who does it is decided here. A replica that starts is given what has its
model loaded ahead, a process that another model gives up, the spare, or a new one, in this order.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping
from typing import Final, Protocol

from llamaherd.pool.clocks import now
from llamaherd.pool.entry import Entry, Replica
from llamaherd.pool.handover import Handovers, may_hand_over
from llamaherd.pool.launch import Exit, Launcher
from llamaherd.pool.outlook import Forecast
from llamaherd.pool.spares import SPARE, SpareKeeper
from llamaherd.pool.worker import Owner, Worker, wait_all
from llamaherd.transport import Traffic, Transport
from llamaherd.transport.errors import ChannelError

__all__ = ["Employer", "Staff"]

_log = logging.getLogger("llamaherd.pool")

#: The end of a worker whose process goes on with another model.
_GIVEN_UP: Final = Exit(reason="exited", code=0, signal=None, node="", detail="it gave its process to another model")


class Employer(Owner, Protocol):
    """Who hears of the workers, and what becomes of them. Its methods must not raise."""

    def settle(self, worker: Worker, replica: Replica) -> None:
        """A worker is a replica's from now on: tell it to load."""
        ...

    def vacate(self, replica: Replica, worker: Worker, end: Exit, *, told: bool) -> None:
        """A replica has no worker any more; ``told`` says whether that was told to go."""
        ...


class Staff:
    """All workers of a herd, from their start to their end.

    Args:
        stop_timeout: Seconds that a worker has to end, or to free its model, unless its model's spec says otherwise.
        next_generation: Returns a number for a new worker.
        reuse: Whether a worker may become another model's.
        adopts: Whether a worker whose heir was called off is kept for the next start. One that has used a GPU holds a
            part of it, which nobody counts.
        spare: Whether a spare is kept; see :class:`~llamaherd.pool.spares.SpareKeeper` for what it asks.

    Attributes:
        homes: Whose worker each is, to be read; spares are nobody's.
        spares: Keeps the spare.
    """

    def __init__(
        self,
        employer: Employer,
        transport: Transport,
        launcher: Launcher,
        *,
        stop_timeout: float,
        next_generation: Callable[[], int],
        spare: bool,
        reuse: bool,
        adopts: bool,
        is_busy: Callable[[], bool],
        look_ahead: Callable[[], Forecast | None],
        give_up: Callable[[], None],
        gone: Callable[[str], None],
    ) -> None:
        self._employer: Final = employer
        self._transport: Final = transport
        self._launcher: Final = launcher
        self._stop_timeout: Final = stop_timeout
        self._next_generation: Final = next_generation
        self._reuse: Final = reuse
        self._adopts: Final = adopts
        self._workers: set[Worker] = set()
        self._handovers: Final = Handovers()
        self._tasks: set[asyncio.Task[None]] = set()
        #: What the channels of workers have carried that are gone.
        self._carried: Final = Traffic()
        self._closing = False
        self.homes: Final[dict[Worker, Replica]] = {}
        self.spares: Final = SpareKeeper(
            spare, start=self._start_spare, is_busy=is_busy, look_ahead=look_ahead, give_up=give_up, gone=gone
        )

    def __len__(self) -> int:
        return len(self._workers)

    @property
    def traffic(self) -> Traffic:
        """What all channels have carried since the herd began."""
        carried = Traffic()
        carried.add(self._carried)
        for worker in self._workers:
            carried.add(worker.traffic)
        return carried

    # --- who works for whom ---

    def assign(self, replica: Replica) -> None:
        """Give a replica a worker. It is settled now, or once it has freed what it has."""
        entry, spec = replica.entry, replica.spec
        env = spec.placement(replica.index).environment()
        ahead, ready = self.spares.ahead, self.spares.ready
        given = self._handovers.claim(replica) if ahead is None and not spec.is_placed else None
        # A process that runs cannot be placed any more; and what the scheduler takes for placed is lent no bytes.
        spare = None if given or spec.is_placed else self.spares.take()
        label = entry.name if spec.replicas == 1 else f"{entry.name}#{replica.index}"
        worker = replica.worker = given or spare or self._new_worker(label)
        begun = ahead is not None and ahead.model == entry.name
        replica.adopted = given is not None or spare is not None
        replica.anew = replica.adopted and (ready or not begun) and not replica.let_down
        if spare is not None and begun:
            replica.log.feed(bytes(self.spares.log))
        worker.model = label
        if given is None:  # what that says and prints is its old model's until it has freed it, and so is its time
            self._settle(worker, replica)
        if not replica.adopted:
            self._launch(worker, env)

    def _settle(self, worker: Worker, replica: Replica) -> None:
        self.homes[worker] = replica
        self._employer.settle(worker, replica)

    def hand_over(self, leaver: Replica, heir: Entry) -> bool:
        """Have a worker free its model for another's start. Returns False, and does nothing, if it is to end instead:
        the start will take what is loaded ahead, or its process cannot go on.
        """
        worker, timeout = leaver.worker, self._time_to_stop(leaver)
        if worker is None or not self._reuse or self._closing or timeout <= 0 or not may_hand_over(leaver, heir):
            return False
        if self.spares.ahead is not None or self._handovers.awaited_by(heir.name):
            return False
        self._handovers.begin(worker, heir.name)
        worker.hand_over(timeout)
        return True

    def on_unloaded(self, worker: Worker, replica: Replica) -> None:
        """A worker has freed its model for another's, which may have been started with it already."""
        if worker.stopping or worker not in self._handovers:
            return  # it leaves after all, or nobody has told it to
        worker.be_free()
        self._handovers.open(worker)
        self._employer.vacate(replica, worker, _GIVEN_UP, told=True)  # if it was waited for, the heir takes it now
        taker = self._handovers.end(worker)
        if taker is not None:
            self._settle(worker, taker)
            return
        del self.homes[worker]
        worker.model = SPARE
        if not (self._adopts and self.spares.adopt(worker)):
            worker.stop(self._stop_timeout)

    # --- their ends ---

    def dismiss(self, replica: Replica) -> None:
        """Tell a replica's worker to leave. A load cannot be asked to hurry, and has nothing to lose: it is killed."""
        if replica.worker is not None:
            replica.worker.stop(0.0 if replica.loading else self._time_to_stop(replica))

    def _time_to_stop(self, replica: Replica) -> float:
        own = replica.entry.spec.stop_timeout
        return self._stop_timeout if own is None else own

    def on_exit(self, worker: Worker, end: Exit) -> None:
        """A worker is gone."""
        self._workers.discard(worker)
        self._carried.add(worker.traffic)
        if self.spares.lost(worker):
            return
        handing_over = worker in self._handovers
        taker, replica = self._handovers.end(worker), self.homes.pop(worker, None)
        if replica is not None:
            self._employer.vacate(replica, worker, end, told=worker.stopping or handing_over)
        if taker is not None:
            self._employer.vacate(taker, worker, end, told=worker.stopping)

    def close(self) -> None:
        """Start nobody any more, and stop those that are no replica's; the others are the herd's to stop."""
        self._closing = True
        self.spares.close(self._stop_timeout)
        for worker in self._handovers.workers:
            worker.stop(self._stop_timeout)

    async def wait(self) -> None:
        """Wait until all workers are gone, and were told of."""
        await wait_all(self._workers, self._tasks)

    def kill_all(self) -> None:
        """Kill every worker now."""
        for worker in self._workers:
            worker.kill()

    # --- their beginnings ---

    def _start_spare(self, env: Mapping[str, str]) -> Worker | None:
        if self._closing:
            return None
        worker = self._new_worker(SPARE)
        self._launch(worker, env)
        return worker

    def _new_worker(self, label: str) -> Worker:
        worker = Worker(label, self._next_generation(), self._employer)
        self._workers.add(worker)
        return worker

    def _launch(self, worker: Worker, env: Mapping[str, str]) -> None:
        task = asyncio.get_running_loop().create_task(self._run_launch(worker, env))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run_launch(self, worker: Worker, env: Mapping[str, str]) -> None:
        try:
            await worker.launch(self._launcher, self._transport, lambda data: self._on_log(worker, data), env)
            self.spares.launched(worker)
        except Exception as error:  # a launcher may be anyone's, and whatever it raises must reach those who wait
            expected = isinstance(error, OSError | ChannelError)
            _log.warning("%r could not be started: %s", worker, error, exc_info=not expected)
            end = Exit(reason="exited", code=None, signal=None, node="", detail=f"it could not be started: {error}")
            self._employer.on_exit(worker, end)

    def _on_log(self, worker: Worker, data: bytes) -> None:
        replica = self.homes.get(worker)
        if replica is not None:
            replica.heard = now()
            replica.log.feed(data)
        else:
            self.spares.note(worker, data)
