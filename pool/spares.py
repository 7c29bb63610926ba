"""The spare worker: one that waits without a model, its engine imported, so that the next load need not start a
process.

A pool may always keep one. Without that it gets one when a model waits for room: the interpreter starts while the
worker in the way finishes and leaves.
"""

import asyncio
from collections.abc import Callable, Mapping
from typing import Final

from llamaherd.pool.worker import Worker

__all__ = ["SPARE", "SpareKeeper"]

#: The model of a worker that has none yet; no model's name is empty.
SPARE: Final = ""
#: Seconds from a load to the start of the next spare, and how often that is put off for a busy herd.
SPARE_SECONDS: Final = 0.5
SPARE_PATIENCE: Final = 20
#: Seconds that a spare which was only made for an expected load waits for it.
EXPECTED_SECONDS: Final = 30.0
#: Environment variable that tells a worker which engine to import before it is told to load; read by ``pool/child``.
PRELOAD_ENV: Final = "LLAMAHERD_PRELOAD"


class SpareKeeper:
    """Keeps one spare, if the herd wants one.

    Args:
        wanted: Whether there is to be one at all.
        start: Starts a worker with these environment variables, and returns it; None once the herd closes.
        is_busy: Whether the herd has better things to do than to start an interpreter.
    """

    def __init__(
        self, wanted: bool, start: Callable[[Mapping[str, str]], Worker | None], is_busy: Callable[[], bool]
    ) -> None:
        self._wanted = wanted
        self._start = start
        self._is_busy = is_busy
        self._spare: Worker | None = None
        self._patience: asyncio.TimerHandle | None = None
        self._replacement: asyncio.TimerHandle | None = None

    def keep(self) -> None:
        """Start a spare, if one is wanted and there is none."""
        if self._wanted and self._spare is None:
            self._spare = self._start({PRELOAD_ENV: "llama"})

    def expect(self, engine: str) -> None:
        """A load will follow: have a spare for it, and let it go if the load is called off."""
        if self._spare is None:
            self._spare = self._start({PRELOAD_ENV: engine})
        if not self._wanted:
            self._forget_patience()
            self._patience = asyncio.get_running_loop().call_later(EXPECTED_SECONDS, self.stop, 0.0)

    def take(self) -> Worker | None:
        """Return the spare, which is the caller's from now on; None if there is none yet."""
        spare = self._spare
        if spare is None or spare.pid is None or spare.stopping:
            return None
        self._spare = None
        self._forget_patience()
        return spare

    def lost(self, worker: Worker) -> bool:
        """A worker is gone. Returns whether it was the spare; the next load brings a new one."""
        if worker is not self._spare:
            return False
        self._spare = None
        return True

    def stop(self, timeout: float) -> None:
        """Stop the spare, if there is one, within so many seconds."""
        self._forget_patience()
        if self._spare is not None:
            self._spare.stop(timeout)

    def replace(self, patience: int = SPARE_PATIENCE) -> None:
        """Start a new spare when the load that took the last one, and what it was for, have had their time: a starting
        interpreter would take a core from them.
        """
        if self._wanted and self._spare is None and self._replacement is None:
            self._replacement = asyncio.get_running_loop().call_later(SPARE_SECONDS, self._due, patience)

    def close(self, timeout: float) -> None:
        """Keep none any more; one that there is stops within so many seconds."""
        self._wanted = False
        if self._replacement is not None:
            self._replacement.cancel()
            self._replacement = None
        self.stop(timeout)

    def _forget_patience(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None

    def _due(self, patience: int) -> None:
        self._replacement = None
        if patience > 0 and self._is_busy():
            self.replace(patience - 1)
        else:
            self.keep()
