"""The timers of models: how long one may idle, and how long a load may be silent. One timer per deadline, no ticker."""

import asyncio
from collections.abc import Callable

from llamaherd.pool.entry import Entry
from llamaherd.pool.idle import Rest, rest_of
from llamaherd.pool.lifecycle import State
from llamaherd.pool.worker import Worker

__all__ = ["Clocks", "now"]


def now() -> float:
    """Return the running loop's time, in seconds."""
    return asyncio.get_running_loop().time()


class Clocks:
    """Keeps every model's timers, and tells when one is due.

    Args:
        is_idle: Whether nobody uses a model or waits for it.
        on_rest: Called when an idle model is to sleep or to be unloaded.
    """

    def __init__(self, is_idle: Callable[[Entry], bool], on_rest: Callable[[Entry, Rest], None]) -> None:
        self._is_idle = is_idle
        self._on_rest = on_rest

    def mind(self, entry: Entry) -> None:
        """Start the clock of a model that came to rest, or stop that of one that did not. Called after every change."""
        self.stop(entry)
        falling_asleep = entry.drowsy and entry.state is State.LOADED
        if falling_asleep or not self._is_idle(entry):
            return
        rest = rest_of(entry.spec, entry.state, entry.keep_alive)
        if rest is not None:
            entry.rest = asyncio.get_running_loop().call_later(rest.seconds, self._rest, entry, rest)

    def stop(self, entry: Entry) -> None:
        """Stop the clock of a model's rest."""
        if entry.rest is not None:
            entry.rest.cancel()
            entry.rest = None

    def forget_load(self, entry: Entry) -> None:
        """The load is over, however: stop its clock."""
        if entry.stall is not None:
            entry.stall.cancel()
            entry.stall = None

    def _rest(self, entry: Entry, rest: Rest) -> None:
        entry.rest = None
        self._on_rest(entry, rest)

    def watch_load(self, entry: Entry, worker: Worker) -> None:
        """A load, or a waking, begins: the worker fails if it gives no sign of progress for ``load_stall_seconds``."""
        entry.heard = now()
        self.forget_load(entry)
        self._check_load(entry, worker)

    def _check_load(self, entry: Entry, worker: Worker) -> None:
        entry.stall = None
        limit = entry.spec.load_stall_seconds
        if entry.worker is not worker or not limit or not (entry.waking or entry.state is State.LOADING):
            return
        silent = now() - entry.heard
        if silent >= limit:
            worker.fail(f"its load made no progress for {limit:g} s (load_stall_seconds)")
        else:
            loop = asyncio.get_running_loop()
            entry.stall = loop.call_later(limit - silent, self._check_load, entry, worker)
