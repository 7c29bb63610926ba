"""The records that the pool keeps: one per model, one per request. Data and wording; the pool alone changes them."""

import asyncio
import signal
import weakref
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from llamaherd.pool.config import ModelSpec
from llamaherd.pool.errors import RETRY_AFTER, BadRequest, LoadFailed, PoolError, QueueTimeout, WorkerDied, WorkerFailed
from llamaherd.pool.generation import Generation
from llamaherd.pool.launch import Exit
from llamaherd.pool.lifecycle import State
from llamaherd.pool.logs import LogRing
from llamaherd.pool.machine import oom_kills
from llamaherd.pool.restart import Backoff
from llamaherd.pool.status import ModelStatus, QueuedRequest
from llamaherd.pool.worker import Worker
from llamaherd.transport.messages import Delta, Done, Failed, PoolMessage, Result, Vector

__all__ = [
    "Answer",
    "Entry",
    "Request",
    "Sink",
    "Stream",
    "explain_backoff",
    "explain_exit",
    "explain_failure",
    "explain_wait",
]

#: Log lines shown in an error for which the worker gave no reason, and kept in its ``log``.
SHOWN_LOG_LINES: Final = 3
KEPT_LOG_LINES: Final = 20


@dataclass(slots=True)
class Entry:
    """One model.

    Attributes:
        worker: Its current worker, None in the states without a process.
        failure: What the current worker said of its own failure, before its exit.
        adopted: Its worker was a spare.
        drowsy: A sleep command is under way, or was carried out: work needs a wake command first.
        waking: A wake command is under way.
        backoff: When it may be tried again after failed loads.
        keep_alive: What the last request said of the time after it; see :func:`~llamaherd.pool.idle.rest_of`.
        rest: The timer of its idleness.
        stall: The timer of its load.
        heard: When its worker last gave a sign of life, in the loop's time.
        oom_kills: The kernel's count when its worker was started.
        sized: Whether the scheduler knows what it takes, as far as that can be known before its first start.
        unsized: Requests that wait until it does.
        scales: Of its LoRA adapters, one for each; None while they are the spec's.
    """

    spec: ModelSpec
    state: State = State.UNLOADED
    worker: Worker | None = None
    log: LogRing = field(default_factory=LogRing)
    progress: dict[str, Any] | None = None
    info: dict[str, Any] | None = None
    failure: Failed | None = None
    error: PoolError | None = None
    exit_code: int | None = None
    adopted: bool = False
    drowsy: bool = False
    waking: bool = False
    backoff: Backoff = field(default_factory=Backoff)
    keep_alive: float | None = None
    rest: asyncio.TimerHandle | None = None
    stall: asyncio.TimerHandle | None = None
    heard: float = 0.0
    oom_kills: int = 0
    sized: bool = False
    unsized: list[int] = field(default_factory=list[int])
    scales: tuple[float, ...] | None = None

    @property
    def name(self) -> str:
        """The model's name."""
        return self.spec.name

    def status(self, in_flight: int, waiting: tuple[QueuedRequest, ...], memory: int) -> ModelStatus:
        """Return the model's public status."""
        worker = self.worker
        return ModelStatus(
            name=self.name,
            state=self.state,
            aliases=self.spec.aliases,
            tags=self.spec.tags,
            path=None if self.spec.path is None else str(self.spec.path),
            source=self.spec.source,
            args=() if worker is None else tuple(worker.args),
            progress=self.progress,
            info=self.info,
            failed=self.error is not None,
            exit_code=self.exit_code,
            error=None if self.error is None else str(self.error),
            pid=None if worker is None else worker.pid,
            in_flight=in_flight,
            queued=len(waiting),
            waiting=waiting,
            memory=memory,
        )


class Sink(Protocol):
    """Where the news of one request goes."""

    def feed(self, part: Delta | Vector) -> None:
        """The request made progress: more of a generation, or a vector."""
        ...

    def finish(self, end: Done | Result | None) -> None:
        """The request ended in order. None for a request that only wanted its model ready."""
        ...

    def fail(self, error: PoolError) -> None:
        """The request came to nothing."""
        ...


class Stream:
    """Feeds a generation, and lets go of it when its caller does."""

    def __init__(self, generation: Generation) -> None:
        self._generation = weakref.ref(generation)

    def feed(self, part: Delta | Vector) -> None:
        generation = self._generation()
        if generation is not None and isinstance(part, Delta):
            generation.feed(part)

    def finish(self, end: Done | Result | None) -> None:
        generation = self._generation()
        if generation is None:
            return
        if isinstance(end, Done):
            generation.finish(end)
        else:
            generation.fail(WorkerFailed("the worker answered a generation without a stream", code="protocol"))

    def fail(self, error: PoolError) -> None:
        generation = self._generation()
        if generation is not None:
            generation.fail(error)


class Answer:
    """Resolves a future with the request's one answer."""

    def __init__(self, future: asyncio.Future[Result | None]) -> None:
        self._future = future

    def feed(self, part: Delta | Vector) -> None:
        pass  # no answer of this kind has parts

    def finish(self, end: Done | Result | None) -> None:
        if self._future.done():
            return
        if isinstance(end, Done):
            self._future.set_exception(WorkerFailed("the worker answered with a stream", code="protocol"))
        else:
            self._future.set_result(end)

    def fail(self, error: PoolError) -> None:
        if not self._future.done():
            self._future.set_exception(error)


@dataclass(slots=True)
class Request:
    """One request, from its acceptance until its worker says that it has ended.

    Attributes:
        command: What its worker is told; None if the request only wants its model ready.
        sink: Who listens; None once the caller has left.
        priority: Higher goes first.
        keep_alive: See :class:`Entry`.
        queue_timeout: Seconds that it may wait for its model; 0 means no limit.
        since: When it began to wait, in the loop's time.
        patience: The timer of its wait.
        granted: Whether it was sent to a worker.
        answered: Whether its caller has got a part of the answer.
        retried: Whether it was given to a second worker because its first one died.
    """

    number: int
    entry: Entry
    command: PoolMessage | None
    sink: Sink | None
    priority: int = 0
    keep_alive: float | None = None
    queue_timeout: float = 0.0
    since: float = 0.0
    patience: asyncio.TimerHandle | None = None
    granted: bool = False
    answered: bool = False
    retried: bool = False

    def stop_waiting(self) -> None:
        """Its wait is over, however."""
        if self.patience is not None:
            self.patience.cancel()
            self.patience = None

    def is_with(self, entry: Entry) -> bool:
        """Whether the request was sent to this model's worker: only that may speak of it."""
        return self.granted and self.entry is entry


def explain_failure(failure: Failed) -> PoolError:
    """Return the error that a worker's ``failed`` for one request means."""
    if failure.fault == "caller":
        return BadRequest(failure.message, code=failure.code)
    return WorkerFailed(failure.message, code=failure.code, retry=failure.retry)


def explain_backoff(entry: Entry, seconds: float) -> LoadFailed:
    """Return the error for a request that comes too soon after failed loads."""
    return LoadFailed(
        f"model {entry.name!r} is not tried again for {seconds:.1f} s, after: {entry.error}",
        code="load_backoff",
        retry=True,
        retry_after=seconds,
        exit_code=entry.exit_code,
    )


def explain_wait(request: Request, position: int, waiting: int) -> QueueTimeout:
    """Return the error for a request that has waited too long."""
    entry = request.entry
    return QueueTimeout(
        f"the request waited {request.queue_timeout:g} s (queue_timeout) for model {entry.name!r}, which is "
        f"{entry.state}, and is number {position} of {waiting} that wait for it",
        code="queue_timeout",
        retry=True,
        retry_after=RETRY_AFTER,
    )


def explain_exit(entry: Entry, worker: Worker, end: Exit) -> LoadFailed | WorkerDied:
    """Return the error for those who counted on a worker that ended without being told to."""
    log = entry.log.tail(KEPT_LOG_LINES)
    failure = entry.failure
    if failure is not None:
        reason = f"{failure.message} ({end.detail})"
    elif worker.kill_reason:
        reason = f"its worker was killed because {worker.kill_reason}"
    elif end.signal == signal.SIGKILL and oom_kills() > entry.oom_kills:
        reason = "the kernel killed its worker for want of memory; set a smaller context or fewer models at a time"
    else:
        lines = [line.strip() for line in log if line.strip()][-SHOWN_LOG_LINES:]
        reason = f"its worker ended: {end.detail}" + ("; last log lines: " + " | ".join(lines) if lines else "")
    code = failure.code if failure is not None else ""
    if entry.state is State.LOADING or entry.waking:
        return LoadFailed(
            f"model {entry.name!r} could not be loaded: {reason}",
            code=code or "load_failed",
            retry=failure.retry if failure is not None else True,
            exit_code=end.code,
            log=log,
        )
    return WorkerDied(
        f"model {entry.name!r} failed: {reason}", code=code or "worker_died", retry=True, exit_code=end.code, log=log
    )
