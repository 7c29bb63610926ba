"""The timers of models: how long one may idle, and how long a load may be silent. One timer per deadline, no ticker."""

import asyncio
import time
from collections.abc import Callable
from typing import Final

from llamaherd.pool.entry import Replica
from llamaherd.pool.idle import Rest, rest_of
from llamaherd.pool.lifecycle import State
from llamaherd.pool.worker import Worker

__all__ = ["Clocks", "now"]


#: Seconds in which a worker that was a spare has to begin its load.
SPARE_SILENCE_SECONDS: Final = 10.0
#: Seconds of the clock by which all waiting of the herd is measured. Not the loop's: to ask for that is a system call.
now: Final = time.monotonic


class Clocks:
    """Keeps every replica's timers, and tells when one is due.

    Args:
        is_idle: Whether nobody uses a replica or waits for its model.
        on_rest: Called when an idle one is to sleep or to end.
    """

    def __init__(self, is_idle: Callable[[Replica], bool], on_rest: Callable[[Replica, Rest], None]) -> None:
        self._is_idle = is_idle
        self._on_rest = on_rest

    def mind(self, replica: Replica) -> None:
        """Start the clock of a replica that came to rest, or stop that of one that did not. Called after each of its
        changes.
        """
        self.stop(replica)
        falling_asleep = replica.drowsy and replica.state is State.LOADED
        if falling_asleep or not self._is_idle(replica):
            return
        rest = rest_of(replica.entry.spec, replica.state, replica.keep_alive, spare=replica.is_spare)
        if rest is not None:
            replica.rest = asyncio.get_running_loop().call_later(rest.seconds, self._rest, replica, rest)

    def stop(self, replica: Replica) -> None:
        """Stop the clock of a replica's rest."""
        if replica.rest is not None:
            replica.rest.cancel()
            replica.rest = None

    def forget_load(self, replica: Replica) -> None:
        """The load is over, however: stop its clock."""
        if replica.stall is not None:
            replica.stall.cancel()
            replica.stall = None

    def _rest(self, replica: Replica, rest: Rest) -> None:
        replica.rest = None
        self._on_rest(replica, rest)

    def watch_load(self, replica: Replica, worker: Worker) -> None:
        """A load, or a waking, begins: the worker fails if it gives no sign of progress for ``load_stall_seconds``. One
        that was a spare and does not even begin, be it hung or stopped or at work on what it was to load ahead, is
        killed sooner: that says nothing about the model, and another is started.
        """
        replica.heard = now()
        self.forget_load(replica)
        self._check_load(replica, worker)

    def _check_load(self, replica: Replica, worker: Worker) -> None:
        replica.stall = None
        deaf = replica.anew and replica.progress is None and not replica.waking
        limit = replica.entry.spec.load_stall_seconds
        if deaf:
            limit = min(limit or SPARE_SILENCE_SECONDS, SPARE_SILENCE_SECONDS)
        if replica.worker is not worker or not limit or not replica.loading:
            return
        silent = now() - replica.heard
        if silent >= limit and deaf:
            replica.let_down = True
            worker.kill()
        elif silent >= limit:
            worker.fail(f"its load made no progress for {limit:g} s (load_stall_seconds)")
        else:
            loop = asyncio.get_running_loop()
            replica.stall = loop.call_later(limit - silent, self._check_load, replica, worker)
