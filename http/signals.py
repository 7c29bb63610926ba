"""Runs a coroutine on an event loop so that a signal ends it in order."""

import asyncio
import functools
import os
import signal
import sys
from collections.abc import Callable, Coroutine
from types import FrameType
from typing import Any, Final, TypeVar

__all__ = ["Interrupted", "SignalGuard", "run"]

T = TypeVar("T")

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(Exception):
    """A signal ended the work; ``number`` says which."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class SignalGuard:
    """What SIGINT, SIGTERM and SIGHUP do to the task that made it.

    The first signal cancels the work that :meth:`guard` is waiting for and nothing around it, so that a pool around the
    work stops its workers in order. The second cancels the task itself, which makes a pool kill them. The third ends
    the process at once, for a loop that is stuck, such as in a write that nobody reads; workers notice that and leave.

    A signal that was ignored when the program started, as by ``nohup``, stays ignored.

    Args:
        on_abort: Called before the third signal ends the process.
    """

    def __init__(self, on_abort: Callable[[], None]) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._loop = task.get_loop()
        self._on_abort = on_abort
        self._work: asyncio.Task[Any] | None = None
        self._received: list[int] = []
        self._before = {number: signal.getsignal(number) for number in _SIGNALS}
        for number, handler in self._before.items():
            if handler is not signal.SIG_IGN:
                # Not the loop's own handlers: these run also while the loop is stuck.
                signal.signal(number, self._on_signal)

    @property
    def received(self) -> int | None:
        """The number of the first signal, None before it."""
        return self._received[0] if self._received else None

    def restore(self) -> None:
        """Put the handlers back that were there before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    async def guard(self, work: Coroutine[Any, Any, T]) -> T:
        """Return what the work returns. Call it once.

        Raises:
            Interrupted: a signal arrived before or during the work, which was cancelled and did not return.
        """
        self._work = task = asyncio.create_task(work)
        if self._received:
            task.cancel()
        try:
            return await task
        except BaseException as error:
            if self.received is None:
                raise
            raise Interrupted(self.received) from error
        finally:
            self._work = None

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self._received.append(number)
        if len(self._received) > 2:
            self._on_abort()
            os._exit(128 + number)
        self._loop.call_soon_threadsafe(functools.partial(self._cancel, first=len(self._received) == 1))

    def _cancel(self, *, first: bool) -> None:
        target = self._work if first else self._task
        if target is not None:
            target.cancel()


def run(main: Callable[[SignalGuard], Coroutine[Any, Any, T]], *, on_abort: Callable[[], None] = lambda: None) -> T:
    """Run ``main`` on a fresh event loop, uvloop's where there is one.

    Returns what it returns and raises what it raises.

    Raises:
        Interrupted: a signal ended it.
    """
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        return runner.run(_run(main, on_abort))


async def _run(main: Callable[[SignalGuard], Coroutine[Any, Any, T]], on_abort: Callable[[], None]) -> T:
    guard = SignalGuard(on_abort)
    try:
        return await main(guard)
    except asyncio.CancelledError:
        if guard.received is None:
            raise
        raise Interrupted(guard.received) from None
    finally:
        guard.restore()


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    if sys.platform == "win32":
        return None
    import uvloop

    return uvloop.new_event_loop
