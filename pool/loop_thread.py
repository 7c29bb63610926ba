"""A thread that runs an event loop for as long as an async resource is open, and serves the threads that wait for it.

Whoever waits does so on a :class:`queue.SimpleQueue`, its *inbox*, which no interrupted thread can leave locked: a ^C
may hit between any two instructions, and the loop must never be held up by it. When the loop ends, every inbox that is
known to it is told, so that nobody waits for an answer that cannot come.
"""

import asyncio
import contextlib
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import CancelledError
from contextlib import AbstractAsyncContextManager
from queue import Empty, SimpleQueue
from typing import Any, Final, TypeAlias, TypeVar

from llamaherd.pool.errors import PoolClosed

__all__ = ["Inbox", "LoopThread", "receive"]

T = TypeVar("T")

#: What a thread waits on; None says that the loop has ended.
Inbox: TypeAlias = "SimpleQueue[Any]"

#: Seconds between two looks at whether the program has ended without closing the resource.
ORPHAN_CHECK_SECONDS: Final = 0.25
#: Seconds after which a waiting thread looks up, see :func:`receive`.
LOOK_UP_SECONDS: Final = 0.25
#: Seconds that calls and streams have to notice that the resource has closed.
LAST_WORDS_SECONDS: Final = 1.0


class LoopThread:
    """Runs a loop, uvloop's where it is installed, in which ``resource`` is open from :meth:`open` to :meth:`close`.

    The thread is no daemon: the resource is always closed in order. A program that ends without :meth:`close` is
    noticed, once all of its other threads have ended, and the resource is closed then.

    All methods may be called from any thread, except that the loop's own thread cannot wait for itself.
    """

    def __init__(self, resource: AbstractAsyncContextManager[object], name: str) -> None:
        #: Called on the loop once the resource is closed, for tasks that wait for someone else.
        self.at_end: set[Callable[[], object]] = set()
        self._resource = resource
        self._thread = _Thread(target=self._run, name=name, daemon=False)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._serving: asyncio.Task[None] | None = None
        self._stop = asyncio.Event()
        self._abandoned = False
        self._inboxes: set[Inbox] = set()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._error: BaseException | None = None
        self._over = False

    # --- opening and closing ---

    def open(self) -> None:
        """Start the thread and return once the resource is open; once only.

        Raises:
            What opening the resource raised; the thread has ended then.
        """
        opened: SimpleQueue[Any] = SimpleQueue()
        self._inboxes.add(opened)
        try:
            self._thread.start()
            ended = receive(opened) is None
        except BaseException:
            self._abandoned = True  # the loop may not be there yet to be told
            self.stop_soon()
            raise
        finally:
            self._inboxes.discard(opened)
        if ended:
            self._thread.join()
            raise self._error or PoolClosed("the loop ended while it was opened")

    def close(self) -> None:
        """Close the resource and return once it is closed and the thread has ended. Idempotent.

        An interrupted call (^C) cancels the close, which makes it hurry, waits for its end, and is interrupted then.

        Raises:
            What closing the resource raised.
        """
        self._refuse_own_thread()
        if self._thread.ident is None:
            return
        try:
            self._await_end(hurry=False)
        except BaseException:
            self._await_end(hurry=True)
            raise
        error, self._error = self._error, None
        if error is not None and not isinstance(error, asyncio.CancelledError):
            raise error

    def stop_soon(self, *, hurry: bool = False) -> None:
        """Begin to close and return at once. With ``hurry``, cancel a close that is under way. Safe in finalisers."""
        self.post(self._request_stop, hurry)

    def _request_stop(self, hurry: bool) -> None:
        if hurry and self._stop.is_set() and self._serving is not None:
            self._serving.cancel()
        self._stop.set()

    def _await_end(self, *, hurry: bool) -> None:
        ended: SimpleQueue[Any] = SimpleQueue()
        self._inboxes.add(ended)
        try:
            self.stop_soon(hurry=hurry)
            if not self._over:
                receive(ended)
        finally:
            self._inboxes.discard(ended)
        self._thread.join()

    # --- what other threads ask for ---

    @property
    def running(self) -> bool:
        """Whether the loop serves."""
        return self._loop is not None and not self._over

    def post(self, function: Callable[..., object], *args: object) -> None:
        """Have the loop call a function, some time after this returns; not at all if the loop has ended. Safe in
        finalisers.
        """
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(function, *args)

    def wait(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run a coroutine on the loop and return its result. An interrupted call (^C) cancels it.

        Raises:
            PoolClosed: the loop has not been opened, has ended, or ended before the coroutine.
            RuntimeError: called in the loop's own thread.
            concurrent.futures.CancelledError: the coroutine was cancelled from within.
            Whatever else the coroutine raised.
        """
        tasks: list[asyncio.Task[T]] = []
        inbox: SimpleQueue[asyncio.Task[T] | None] = SimpleQueue()

        def start() -> None:
            task = self.spawn(work())
            task.add_done_callback(inbox.put)
            tasks.append(task)

        self.attend(inbox)
        try:
            self.post(start)
            task = receive(inbox)
        except BaseException:
            self.post(lambda: [task.cancel() for task in tasks])
            raise
        finally:
            self.leave(inbox)
        if task is None or (task.cancelled() and self._stop.is_set()):
            raise PoolClosed("the pool was closed")
        if task.cancelled():
            raise CancelledError("what was waited for was cancelled")
        return task.result()

    def call(self, function: Callable[[], T]) -> T:
        """Run a plain function on the loop and return its result. Raises as :meth:`wait`."""

        async def work() -> T:
            return function()

        return self.wait(work)

    def attend(self, inbox: Inbox) -> None:
        """Tell an inbox of the loop's end, until :meth:`leave`. Raises PoolClosed and RuntimeError as :meth:`wait`."""
        self._refuse_own_thread()
        self._inboxes.add(inbox)
        if not self.running:  # looked at after the inbox is known, so that an end in between is told to it
            self._inboxes.discard(inbox)
            raise PoolClosed("the pool is not open")

    def leave(self, inbox: Inbox) -> None:
        """Forget an inbox. Idempotent, safe in finalisers."""
        self._inboxes.discard(inbox)

    def _refuse_own_thread(self) -> None:
        if threading.current_thread() is self._thread:
            raise RuntimeError("the thread that runs the pool cannot wait for the pool")

    # --- on the loop ---

    def spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Start a task that the end of the loop waits for, briefly. Only in the loop's thread."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._forget)
        return task

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # whoever waits has it too; one that nobody waits for any more is no news

    def _run(self) -> None:
        try:
            with asyncio.Runner(loop_factory=_loop_factory()) as runner:
                runner.run(self._serve())
        except BaseException as error:  # raised by open or close, in a thread of the caller's
            self._error = error
        finally:
            self._over = True
            for inbox in list(self._inboxes):
                inbox.put(None)

    async def _serve(self) -> None:
        self._serving = asyncio.current_task()
        try:
            async with self._resource:
                self._loop = asyncio.get_running_loop()
                for inbox in list(self._inboxes):  # only the opener knows of the loop yet
                    inbox.put(True)
                await self._until_stopped()
        finally:
            for release in list(self.at_end):
                release()
            if self._tasks:
                await asyncio.wait(self._tasks, timeout=LAST_WORDS_SECONDS)

    async def _until_stopped(self) -> None:
        while not (self._stop.is_set() or self._abandoned) and _program_goes_on():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(ORPHAN_CHECK_SECONDS):
                    await self._stop.wait()
        self._stop.set()


def receive(inbox: "SimpleQueue[T]") -> T:
    """Wait for the next item of an inbox.

    A ^C that comes between the last instruction and the wait, or that the system gives to another thread, would not end
    the wait by itself; so it ends now and then, and begins anew.
    """
    while True:
        with contextlib.suppress(Empty):
            return inbox.get(timeout=LOOK_UP_SECONDS)


class _Thread(threading.Thread):
    """Tells the threads of this module from a program's own."""


def _program_goes_on() -> bool:
    # The interpreter waits for every thread that is no daemon, so this one has to see when it alone is waited for.
    return any(
        thread.is_alive() and not (thread.daemon or isinstance(thread, _Thread)) for thread in threading.enumerate()
    )


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop
    return uvloop.new_event_loop
