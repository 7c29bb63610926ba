"""How tests run a pool: on a loop with a deadline, waiting for what they expect instead of for a time."""

import asyncio
import os
import signal
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar

import psutil
import uvloop

from llamaherd.pool import ModelSpec, Pool, State
from patience import POLL, holds_within, patience

__all__ = ["TRANSPORTS", "fake", "freeze", "reach", "run", "run_uvloop", "until", "wait_gone"]

T = TypeVar("T")

TRANSPORTS = ("pipe", "zmq", "stdio")
#: Seconds after which a test gives up; see ``patience``.
DEADLINE = 20.0


def run(work: Coroutine[object, object, T], seconds: float = DEADLINE) -> T:
    """Run a coroutine on a fresh asyncio loop, and fail if it takes longer than ``seconds``."""
    return asyncio.run(_within(work, seconds))


def run_uvloop(work: Coroutine[object, object, T], seconds: float = DEADLINE) -> T:
    """As :func:`run`, on a uvloop loop."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_within(work, seconds))


async def _within(work: Coroutine[object, object, T], seconds: float) -> T:
    async with patience(seconds):
        return await work


def fake(name: str = "m", /, *, n_parallel: int = 4, stop_timeout: float | None = None, **script: Any) -> ModelSpec:
    """Return the spec of a model that the scripted engine plays."""
    from llamaherd.pool import EngineOptions

    return ModelSpec(
        name=name,
        engine="fake",
        script=script,
        options=EngineOptions(n_parallel=n_parallel),
        stop_timeout=stop_timeout,
    )


async def until(holds: Callable[[], bool], what: str = "", seconds: float = DEADLINE) -> None:
    """Wait until something holds, or fail at the deadline."""
    try:
        async with patience(seconds):
            while not holds():  # noqa: ASYNC110 - what is waited for is another process's doing
                await asyncio.sleep(POLL)
    except TimeoutError:
        raise AssertionError(f"still not so after {seconds} s: {what or holds}") from None


async def reach(pool: Pool, model: str, state: State, seconds: float = DEADLINE) -> None:
    """Wait until a model is in a state, or fail at the deadline."""
    await until(lambda: pool.status(model).state is state, f"{model} is {state}", seconds)


def freeze(pid: int) -> None:
    """Stop a process, and return when all of it has stopped: its threads go on until one of them has the signal."""
    os.kill(pid, signal.SIGSTOP)
    threads = list(Path(f"/proc/{pid}/task").iterdir())
    # The state comes behind the name, which may hold anything.
    stopped = holds_within(DEADLINE, lambda: all(b") T " in (one / "stat").read_bytes() for one in threads))
    assert stopped


def wait_gone(pids: Sequence[int], seconds: float = DEADLINE) -> list[int]:
    """Wait until processes are gone, and return those that are not after ``seconds``. A zombie counts as gone."""
    holds_within(seconds, lambda: not any(map(_is_alive, pids)))
    return [pid for pid in pids if _is_alive(pid)]


def _is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
