"""How long OpenMP's threads spin at a barrier before they sleep.

ggml's threads meet at hundreds of barriers in each step. Threads that spin there go on at once, and those that sleep
must be woken: with the cores to itself a model is 3 to 9 % faster with the former. Where other programs use the same
cores, they hold up the very thread that they wait for: a step then took eight times as long. So they spin, as
OpenMP's do by default, until the cores are seen to be contended, and then for a moment only.

libgomp decides at its start how long they spin, but for one thing: while there are more threads of its teams than
cores, they spin for a hundred turns only. So threads that sleep are all that is needed to change its mind. Where
the runtime is another one, or the user has chosen (``OMP_WAIT_POLICY``, ``GOMP_SPINCOUNT``), nothing is done.
"""

import ctypes
import os
import threading
from pathlib import Path
from typing import Any, Final

__all__ = ["Barriers", "Contention"]

#: With which the user chooses. Ours are none: other runtimes, for whom ``active`` means for ever, read them too.
_CHOICES: Final = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")

#: What of a core must be lost to others for this to be contention: passing on tokens costs much less.
_LOST_CORES: Final = 0.5
#: Seconds of computing after which that is judged.
_WINDOW: Final = 0.1
#: Seconds for which threads then spin for a moment only, at first and at most. It doubles with each attempt that finds
#: the cores contended still.
_FIRST_PERIOD: Final = 1.0
_LONGEST_PERIOD: Final = 16.0
#: How long a close waits for the thread that it ends.
_END_SECONDS: Final = 1.0


class Contention:
    """Tells from what steps took whether other programs use the same cores. Pure arithmetic.

    Attributes:
        short: Whether threads should spin for a moment only.
    """

    def __init__(self) -> None:
        self.short = False
        self._seconds = 0.0
        self._lost = 0.0
        self._period = _FIRST_PERIOD
        self._until = 0.0

    def note(self, now: float, seconds: float, processor: float, threads: int) -> None:
        """Learn from a step.

        Args:
            now: The time at its end, in seconds.
            seconds: What it took.
            processor: Seconds of processor time that all threads had meanwhile.
            threads: How many computed it.
        """
        if self.short:
            if now >= self._until:
                self.short = False
            return
        if threads < 2:
            return
        self._seconds += seconds
        self._lost += threads * seconds - processor
        if self._seconds < _WINDOW:
            return
        if self._lost > _LOST_CORES * self._seconds:
            again = now - self._until < self._period
            self._period = min(2 * self._period, _LONGEST_PERIOD) if again else _FIRST_PERIOD
            self.short, self._until = True, now + self._period
        self._seconds = self._lost = 0.0


class Barriers:
    """Has the threads of this process spin for a moment only, or as long as they do by default. Close it at the end.

    Attributes:
        adjustable: Whether that can be had here.
    """

    def __init__(self) -> None:
        self._library: Final = None if any(name in os.environ for name in _CHOICES) else _libgomp()
        self.adjustable: Final = self._library is not None
        self._over: threading.Event | None = None
        self._holder: threading.Thread | None = None
        self._lock: Final = threading.Lock()

    def set_short(self, short: bool) -> None:
        """From any thread: spin for a moment only from now on, in a running step too, or not. Costs some tenths of a
        millisecond when it changes.
        """
        if self._library is not None and short != (self._over is not None):
            with self._lock:
                self._change(short)

    def _change(self, short: bool) -> None:
        if short == (self._over is not None):
            return
        if self._over is not None:
            self._over.set()
            self._over = None
            return
        self._over, ready = threading.Event(), threading.Event()
        arguments = (self._library, self._over, ready)
        self._holder = threading.Thread(target=_hold_a_crowd, args=arguments, name="barriers", daemon=True)
        self._holder.start()
        ready.wait()

    def close(self) -> None:
        """Undo everything, and wait for that. Idempotent."""
        self.set_short(False)
        if self._holder is not None:
            self._holder.join(_END_SECONDS)


def _hold_a_crowd(library: Any, over: threading.Event, ready: threading.Event) -> None:
    """Have a team of more threads than there are cores. They sleep, and go when this thread ends."""
    nothing = ctypes.cast(library.omp_get_num_procs, ctypes.c_void_p)  # harmless, and takes no notice of its argument
    try:
        library.GOMP_parallel(nothing, None, library.omp_get_num_procs() + 1, 0)
    finally:
        ready.set()
    over.wait()


def _libgomp() -> Any:
    """Return the libgomp that ggml has loaded; None where there is none."""
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="surrogateescape")
        path = next(line.split(maxsplit=5)[5] for line in maps.splitlines() if "/libgomp" in line)
        library = ctypes.CDLL(path)
        library.GOMP_parallel.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
        library.GOMP_parallel.restype = None
    except (OSError, StopIteration, AttributeError):
        return None
    return library
