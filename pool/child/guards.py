"""How a worker makes sure that it does not outlive its pool.

Three guards, because each has a hole: the parent-death signal exists on Linux only, follows the *thread* that spawned
the worker, and is cleared by a set-uid exec; end of file on standard input needs a thread of this process to run; the
channel's end likewise, and ZeroMQ has none. The pool adds a fourth: it kills what it started when it ends in order.
"""

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Mapping
from typing import Final

__all__ = ["PARENT_ENV", "arm_parent_death_signal", "stay_on_cores", "watch_lifeline"]

#: The pool's process id, for the check that it did not die before the signal was armed.
PARENT_ENV: Final = "LLAMAHERD_PARENT"
_PR_SET_PDEATHSIG: Final = 1


def arm_parent_death_signal(environ: Mapping[str, str], orphaned: int) -> None:
    """Have the kernel kill this process when the pool dies; end at once, with code ``orphaned``, if it is gone
    already.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    parent = environ.get(PARENT_ENV, "")
    if parent.isdigit() and os.getppid() != int(parent):
        os._exit(orphaned)


def stay_on_cores(cores: str) -> None:
    """Run this thread, and those that it starts, on these cores only: numbers with commas; all for none.

    Where that cannot be (another system, a core that is not there) it says so in the log and runs anywhere.
    """
    if not cores:
        return
    try:
        os.sched_setaffinity(0, {int(core) for core in cores.split(",")})
    except (AttributeError, OSError, ValueError) as error:
        os.write(2, f"llamaherd: cannot stay on cores {cores}: {error}\n".encode(errors="replace"))


def watch_lifeline(fd: int, orphaned: int) -> None:
    """Start a thread that ends this process, with code ``orphaned``, at end of file on ``fd``."""

    def watch() -> None:
        try:
            while os.read(fd, 4096):
                pass
        except OSError:
            pass  # a lifeline that cannot be read is as good as cut
        os._exit(orphaned)

    threading.Thread(target=watch, name="lifeline", daemon=True).start()
