"""The worker process: ``python -P -m llamaherd.pool.child [MODEL]``, started by the pool and by nobody else.

The order of what follows is the point. Descriptor 1 is taken from C code before anything can print; the guards are
armed and the control thread runs before the engine, which is heavy, is imported.
"""

import os
import signal
import sys
import threading

from llamaherd.pool.child.engine import Engine, EngineError
from llamaherd.pool.child.guards import arm_parent_death_signal, stay_on_cores, watch_lifeline
from llamaherd.pool.child.heap import use_one_arena
from llamaherd.pool.child.serve import ExitCode, Service
from llamaherd.pool.child.title import rename
from llamaherd.transport import CHANNEL_ENV, connect, take_stdio

#: The cores to run on, as numbers with commas; set by the pool for a worker that is placed.
CORES_ENV = "LLAMAHERD_CORES"
#: The engine to import before any command; set by the pool for a spare worker.
PRELOAD_ENV = "LLAMAHERD_PRELOAD"


def make_engine(name: str) -> Engine:
    """Import and return the engine of that name. Raises EngineError for a name that nobody knows."""
    if name == "fake":
        from llamaherd.pool.child.fake_engine import FakeEngine

        return FakeEngine()
    if name == "llama":
        try:
            from llamaherd.pool.child.llama_engine import LlamaEngine
        except ImportError as error:
            raise EngineError(f"llama-cpp-python cannot be used: {error}", code="engine_missing") from error
        return LlamaEngine()
    raise EngineError(f"unknown engine {name!r}, known are llama and fake", code="unknown_engine")


def main() -> int:
    """Serve one pool until told to leave, and return the exit code."""
    stdio = take_stdio()
    use_one_arena()
    # Before any thread: threads run where the one that started them does.
    stay_on_cores(os.environ.pop(CORES_ENV, ""))
    # No arithmetic here is OpenBLAS's, and its threads would spin for some milliseconds when numpy is imported, which
    # takes a core from a load.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    arm_parent_death_signal(os.environ, ExitCode.ORPHANED)
    # The interpreter gives up the lock within 0.1 ms, so that control never holds up a decode step for the default 5
    # ms.
    sys.setswitchinterval(1e-4)
    # Before the connection, which may be waited for. On stdio the channel reads this descriptor, and sees its end by
    # itself.
    if '"stdio"' not in os.environ.get(CHANNEL_ENV, ""):
        watch_lifeline(stdio.control, ExitCode.ORPHANED)
    channel = connect(stdio)
    service = Service(channel, make_engine, preload=os.environ.pop(PRELOAD_ENV, ""), rename=rename)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ^C is the pool's to handle

    def leave(number: int, frame: object) -> None:
        threading.Thread(target=service.leave, daemon=True).start()  # a handler must not wait for a lock

    signal.signal(signal.SIGTERM, leave)
    service.start()
    return service.wait()


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: C++ destructors of a loaded backend may wait for threads that a dying process has no use for.
    os._exit(code)
