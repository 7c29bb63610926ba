"""The spare worker: one that waits without a model, its engine imported, so that the next load need not start a
process.

A pool may always keep one, which also loads a model ahead if one is likely wanted next, there is room for it, and
nobody has anything else to do. Without that it has one only for as long as a worker that was freed for a model waits
for that model's start.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping
from typing import Final

from llamaherd.pool.outlook import Forecast
from llamaherd.pool.worker import Worker
from llamaherd.transport.messages import ChildMessage, Load, Prefetch, State

__all__ = ["SPARE", "SpareKeeper"]

_log = logging.getLogger("llamaherd.pool")

#: The model of a worker that has none yet; no model's name is empty.
SPARE: Final = ""
#: Seconds from a load to the start of the next spare, and how often that is put off for a busy herd.
SPARE_SECONDS: Final = 0.5
SPARE_PATIENCE: Final = 20
#: Seconds that a worker which was freed for an expected load waits for it.
EXPECTED_SECONDS: Final = 30.0
#: Environment variable that tells a worker which engine to import before it is told to load; read by ``pool/child``.
PRELOAD_ENV: Final = "LLAMAHERD_PRELOAD"
#: Most bytes that are kept of what a spare prints.
_LOG_BYTES: Final = 64 * 1024


class SpareKeeper:
    """Keeps one spare, if the herd wants one.

    Args:
        wanted: Whether there is to be one at all.
        start: Starts a worker with these environment variables, and returns it; None once the herd closes.
        is_busy: Whether the herd has better things to do than to start an interpreter, or to load what nobody wants.
        look_ahead: Returns what to load ahead, which takes room from then on; None for nothing.
        give_up: Called when that is not to be kept any more; leads to :meth:`drop`.
        gone: Called with the model's name when it is gone, or could not be loaded.

    Attributes:
        ahead: The model that the spare loads or has loaded ahead, by its command; None without one.
        ready: Whether it has.
        log: What the newest spare has printed.
    """

    def __init__(
        self,
        wanted: bool,
        *,
        start: Callable[[Mapping[str, str]], Worker | None],
        is_busy: Callable[[], bool],
        look_ahead: Callable[[], Forecast | None],
        give_up: Callable[[], None],
        gone: Callable[[str], None],
    ) -> None:
        self._wanted = wanted
        self._start = start
        self._is_busy = is_busy
        self._look_ahead = look_ahead
        self._give_up = give_up
        self._gone = gone
        self._spare: Worker | None = None
        #: It may load something ahead, once the herd has nothing else to do.
        self._curious = False
        #: The timers of: a spare for an expected load; the next spare; a look ahead; what was loaded ahead.
        self._patience = _Timer()
        self._replacement = _Timer()
        self._look = _Timer()
        self._expiry = _Timer()
        self._seconds: float | None = None
        self.ahead: Load | None = None
        self.ready = False
        self.log = bytearray()

    def keep(self) -> None:
        """Start a spare, if one is wanted and there is none."""
        if self._wanted and self._spare is None:
            self.log.clear()
            self._spare = self._start({PRELOAD_ENV: "llama"})

    def adopt(self, worker: Worker) -> bool:
        """Take a worker that has no model any more as the spare for an expected load, and let it go if that is called
        off. Returns False if there is one already.
        """
        if self._spare is not None:
            return False
        self.log.clear()
        self._spare = worker
        if not self._wanted:
            self._patience.start(EXPECTED_SECONDS, lambda: self.stop(0.0))
        return True

    def launched(self, worker: Worker) -> None:
        """A worker runs. If it is the spare, it may load something ahead."""
        if worker is self._spare and self._wanted:
            self._curious = True
            self._look_now()

    def take(self) -> Worker | None:
        """Return the spare, which is the caller's from now on; None if there is none yet."""
        spare = self._spare
        if spare is None or spare.pid is None or spare.stopping:
            return None
        self._spare = None
        self._patience.stop()
        self._forget_ahead()
        return spare

    def lost(self, worker: Worker) -> bool:
        """A worker is gone. Returns whether it was the spare; the next load brings a new one, and if it was dropped for
        what it had loaded, one comes by itself.
        """
        if worker is not self._spare:
            return False
        self._spare = None
        ahead = self.ahead
        self._forget_ahead()
        if ahead is not None:
            if worker.stopping:
                self.replace()
            self._gone(ahead.model)
        return True

    def stop(self, timeout: float) -> None:
        """Stop the spare, if there is one, within so many seconds."""
        self._patience.stop()
        if self._spare is not None:
            self._spare.stop(timeout)

    def replace(self, patience: int = SPARE_PATIENCE) -> None:
        """Start a new spare when the load that took the last one, and what it was for, have had their time: a starting
        interpreter would take a core from them.
        """
        if self._wanted and self._spare is None and not self._replacement.runs:
            self._replacement.start(SPARE_SECONDS, lambda: self._due(patience))
        elif self._spare is not None and self.ahead is None and self._wanted:
            self._curious = True
            self.at_rest()

    def close(self, timeout: float) -> None:
        """Keep none any more; one that there is stops within so many seconds."""
        self._wanted = self._curious = False
        self._replacement.stop()
        self._look.stop()
        self.stop(timeout)

    # --- what is loaded ahead ---

    def at_rest(self) -> None:
        """The herd may have nothing to do, and if that stays so for a moment the spare does something."""
        if self._curious and not self._look.runs:
            self._look.start(SPARE_SECONDS, self._look_now)

    def hear(self, worker: Worker, message: ChildMessage) -> None:
        """A worker that serves no model said something."""
        ahead = self.ahead
        if worker is not self._spare or ahead is None or not isinstance(message, State):
            return
        if message.state == "prefetched" and not worker.stopping:
            reason = (message.payload or {}).get("error")
            if reason is None:
                self.ready = True
                if self._seconds is not None:
                    self._expiry.start(self._seconds, self._give_up)
                _log.info("the spare worker has loaded %r ahead", ahead.model)
            else:
                _log.info("the spare worker could not load %r ahead: %s", ahead.model, reason)
                self._forget_ahead()
                self._gone(ahead.model)

    def note(self, worker: Worker, data: bytes) -> None:
        """A worker that serves no model printed something."""
        if worker is self._spare:
            self.log += data
            del self.log[:-_LOG_BYTES]

    def drop(self) -> None:
        """End the spare at once for what it has loaded ahead."""
        if self._spare is not None and self.ahead is not None:
            self._spare.stop(0.0)

    def _look_now(self) -> None:
        spare = self._spare
        if spare is None or spare.pid is None or spare.stopping or self.ahead is not None:
            self._curious = False
        elif not self._is_busy():
            self._curious = False
            forecast = self._look_ahead()
            if forecast is not None:
                self.ahead, self._seconds = forecast
                spare.post(Prefetch(load=forecast.load))

    def _forget_ahead(self) -> None:
        self.ahead, self.ready = None, False
        self._expiry.stop()

    # --- when ---

    def _due(self, patience: int) -> None:
        if patience > 0 and self._is_busy():
            self.replace(patience - 1)
        else:
            self.keep()


class _Timer:
    """Calls something once, some time after it was started last."""

    def __init__(self) -> None:
        self._handle: asyncio.TimerHandle | None = None

    @property
    def runs(self) -> bool:
        return self._handle is not None

    def start(self, seconds: float, call: Callable[[], None]) -> None:
        self.stop()
        self._handle = asyncio.get_running_loop().call_later(seconds, self._fire, call)

    def stop(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def _fire(self, call: Callable[[], None]) -> None:
        self._handle = None
        call()
