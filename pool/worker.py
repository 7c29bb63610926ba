"""The handle on one worker: one spawn of one process, with its channel, from launch to reaping.

A worker reports to its :class:`Owner` on the loop: every message in order, then its exit, once and last. It decides
nothing about models; the pool does.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from contextlib import suppress
from typing import Final, Protocol

from llamaherd.pool.launch import Exit, Launcher, LaunchSpec, Process
from llamaherd.transport import Traffic
from llamaherd.transport.channel import Channel, Endpoint, Transport
from llamaherd.transport.errors import BrokenChannel, ChannelError, ChannelFull, MessageTooLarge
from llamaherd.transport.messages import ChildMessage, PoolMessage, Unload
from llamaherd.transport.messages import Exit as ExitCommand

__all__ = ["Owner", "Worker", "wait_all"]

_log = logging.getLogger("llamaherd.pool")

#: Seconds that a dead worker's last messages have to arrive.
LAST_MESSAGES_SECONDS: Final = 1.0
#: Seconds that the system has to report the end of a worker whose channel broke, before it is killed for that.
BROKEN_SECONDS: Final = 0.2


class Owner(Protocol):
    """Who a worker reports to. Both methods are called on the loop and must not raise."""

    def on_message(self, worker: "Worker", message: ChildMessage) -> None:
        """The worker said something."""
        ...

    def on_exit(self, worker: "Worker", end: Exit) -> None:
        """The process is gone and reaped, and everything that it said was delivered."""
        ...


class Worker:
    """One worker process.

    Args:
        model: Whose worker it is; the pool may change it as long as the worker has no model loaded.
        generation: The spawn's number, unique in the pool; messages of older generations cannot reach this object.
        owner: Who is told.

    Attributes:
        handed_over: How often it has given up a model for another's.
    """

    __slots__ = (
        "_backlog",
        "_channel",
        "_gone",
        "_handing_over",
        "_kill_timer",
        "_kill_wanted",
        "_owner",
        "_process",
        "_pumping",
        "_reaped",
        "_silent",
        "_tasks",
        "generation",
        "handed_over",
        "kill_reason",
        "model",
        "stopping",
    )

    def __init__(self, model: str, generation: int, owner: Owner) -> None:
        self.model = model
        self.generation = generation
        self.stopping = False
        self.kill_reason = ""
        self.handed_over = 0
        self._owner = owner
        self._process: Process | None = None
        self._channel: Channel | None = None
        self._backlog: deque[PoolMessage] = deque()
        self._kill_timer: asyncio.TimerHandle | None = None
        self._handing_over: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._silent = asyncio.Event()  # nothing that it says counts any more
        self._gone = asyncio.Event()
        self._kill_wanted = False
        self._reaped = False
        self._pumping = False

    def __repr__(self) -> str:
        state = "gone" if self._gone.is_set() else "stopping" if self.stopping else "running"
        return f"<Worker {self.model}#{self.generation} {state}, pid {self.pid}>"

    @property
    def pid(self) -> int | None:
        """The process id; None before the launch, and once the process is reaped and the number may be another's."""
        return self._process.pid if self._process is not None and not self._reaped else None

    @property
    def args(self) -> Sequence[str]:
        """The command line, with the model that it has now; empty before the launch."""
        return (*self._process.args[:-1], self._label) if self._process is not None else ()

    @property
    def _label(self) -> str:
        return (self.model if self.model.isascii() else ascii(self.model)) or "spare"

    @property
    def traffic(self) -> Traffic:
        """What its channel has carried."""
        return Traffic() if self._channel is None else self._channel.traffic

    # --- start ---

    async def launch(
        self,
        launcher: Launcher,
        transport: Transport,
        on_log: Callable[[bytes], None],
        env: Mapping[str, str] | None = None,
    ) -> None:
        """Start the process and begin to listen. Raises what the launcher or the transport raises; the worker is void
        then, and nothing of it is left.
        """
        endpoint: Endpoint | None = None
        try:
            endpoint = await transport.endpoint(f"{self.generation}", on_log)
            spec = LaunchSpec(label=self._label, endpoint=endpoint, on_log=on_log, env=env or {})
            self._process = await launcher.launch(spec)
        except BaseException:
            if endpoint is not None:
                endpoint.discard()
            self._end()
            raise
        self._channel = endpoint.channel
        self._channel.deliver(self._on_messages, self._on_end)
        self._spawn(self._watch(self._process, self._channel))
        self._start_pump(self._channel)
        if self._kill_wanted:
            self._process.kill()

    def _spawn(self, work: Coroutine[object, object, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # --- messages ---

    def post(self, message: PoolMessage) -> None:
        """Send a message in its turn, without waiting. To a worker that is gone or broken this has no effect: its exit
        is news enough.
        """
        if self._channel is None or self._backlog or self._pumping:
            self._backlog.append(message)
            return
        try:
            self._channel.send_nowait(message)
        except ChannelFull:
            self._backlog.append(message)
            self._start_pump(self._channel)
        except Exception as error:
            self._not_sent(error)

    def _start_pump(self, channel: Channel) -> None:
        if self._backlog and not self._pumping:
            self._pumping = True
            self._spawn(self._pump(channel))

    async def _pump(self, channel: Channel) -> None:
        try:
            while self._backlog:
                await channel.send(self._backlog.popleft())
        except Exception as error:
            self._backlog.clear()
            self._not_sent(error)
        finally:
            self._pumping = False

    def _not_sent(self, error: Exception) -> None:
        if isinstance(error, ChannelError) and not isinstance(error, MessageTooLarge):
            _log.debug("%r did not take a message: %s", self, error)
            return
        # Nothing is wrong with the worker, but it would never do what somebody waits for.
        _log.error("%r cannot be told something: %s", self, error)
        self.fail(f"what it was to be told cannot be written: {error}")

    def _on_messages(self, messages: Sequence[ChildMessage]) -> None:
        if self._silent.is_set():
            return
        try:
            for message in messages:
                self._owner.on_message(self, message)
        except Exception:
            # A mistake of ours must cost this worker and not leave everyone who counts on it waiting.
            _log.exception("%r: the pool could not handle a message", self)
            self._silent.set()
            self.fail("the pool could not handle a message of it")

    def _on_end(self, error: ChannelError) -> None:
        if self._silent.is_set():
            return
        self._silent.set()
        if isinstance(error, BrokenChannel):
            # A worker that dies in the middle of a record breaks its channel too, and its exit tells more.
            self._kill_later(BROKEN_SECONDS, f"its channel broke: {error}")
            return
        _log.debug("%r: %s: %s", self, type(error).__name__, error)
        if not self.stopping:
            self._kill_later(LAST_MESSAGES_SECONDS, "it closed its channel and stayed")

    def fail(self, reason: str) -> None:
        """Kill the worker for a reason, which its exit is then explained with.

        One that is dying already keeps the reason of its own: its exit tells it, and whether memory was wanting.
        """
        dying = self._reaped or (self._process is not None and self._process.is_ending())
        if not dying and not self.kill_reason:
            self.kill_reason = reason
        self.kill()

    # --- from one model to the next ---

    def hand_over(self, timeout: float) -> None:
        """Tell the worker to free its model, and kill it ``timeout`` seconds later unless :meth:`be_free` was called.
        What is posted from now on is for after that.
        """
        self.handed_over += 1
        self.post(Unload())
        loop = asyncio.get_running_loop()
        self._handing_over = loop.call_later(timeout, self.fail, f"it did not free its model within {timeout:g} s")

    def be_free(self) -> None:
        """It has no model any more, and what it has printed until now was about that."""
        if self._process is not None and not self._reaped:
            self._process.read_log()
        if self._handing_over is not None:
            self._handing_over.cancel()
            self._handing_over = None

    # --- stop ---

    def stop(self, timeout: float) -> None:
        """Tell the worker to leave, and kill it and its group ``timeout`` seconds later if it has not. 0 or less kills
        at once.

        Idempotent; a later call can only shorten the time.
        """
        if not self.stopping:
            self.stopping = True
            if timeout > 0:
                # Ahead of anything that waits: what a leaving worker has not read, it need not read.
                self._backlog.clear()
                self.post(ExitCommand())
        if timeout <= 0:
            self.kill()
        else:
            self._kill_later(timeout, f"it did not leave within {timeout:g} s")

    def _kill_later(self, seconds: float, reason: str) -> None:
        loop = asyncio.get_running_loop()
        due = loop.time() + seconds
        if self._gone.is_set() or (self._kill_timer is not None and self._kill_timer.when() <= due):
            return
        if self._kill_timer is not None:
            self._kill_timer.cancel()
        self._kill_timer = loop.call_at(due, self.fail, reason)

    def kill(self) -> None:
        """End the process and its group now."""
        self._kill_wanted = True
        if self._process is not None:
            self._process.kill()

    async def wait(self) -> None:
        """Wait until the worker is gone and its owner was told. Cancelling the wait changes nothing."""
        await self._gone.wait()

    async def _watch(self, process: Process, channel: Channel) -> None:
        end = await process.wait()
        self._reaped = True
        channel.peer_exited()
        with suppress(TimeoutError):
            async with asyncio.timeout(LAST_MESSAGES_SECONDS):
                await self._silent.wait()
        self._silent.set()
        channel.abort()
        self._end()
        self._owner.on_exit(self, end)

    def _end(self) -> None:
        self._gone.set()
        self.be_free()
        if self._kill_timer is not None:
            self._kill_timer.cancel()
            self._kill_timer = None


async def wait_all(workers: Collection[Worker], tasks: Collection[asyncio.Task[None]]) -> None:
    """Wait until no worker and no task is left in these, which their owner empties as they end, and may add to."""
    while workers or tasks:
        for worker in list(workers):
            await worker.wait()
        await asyncio.gather(*tasks, return_exceptions=True)
