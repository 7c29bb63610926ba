"""The records that the pool keeps: of models, their replicas and their requests. The pool alone changes them."""

import asyncio
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from llamaherd.pool.config import ModelSpec
from llamaherd.pool.downloads import Job
from llamaherd.pool.errors import PoolError, WorkerFailed
from llamaherd.pool.generation import Generation
from llamaherd.pool.lifecycle import State
from llamaherd.pool.logs import LogRing
from llamaherd.pool.restart import Backoff
from llamaherd.pool.worker import Worker
from llamaherd.transport.messages import Delta, Done, EngineLoad, Failed, PoolMessage, PromptProgress, Result, Vector

__all__ = ["Answer", "Entry", "Nobody", "Replica", "Request", "Sink", "Stream"]

#: States in which a replica has its model, or gets it again when it is asked.
_THERE: Final = frozenset({State.LOADED, State.SLEEPING})
#: A model with several replicas is in the first of these states that one of them is in.
_PRECEDENCE: Final = (State.LOADED, State.LOADING, State.SLEEPING, State.STOPPING, State.UNLOADED)


@dataclass(slots=True, eq=False)
class Replica:
    """One worker of a model, or the place for one.

    Attributes:
        spec: What its worker was started for; the model's own may have changed since.
        worker: Its current worker, None in the states without a process.
        requests: Those that its worker was given and has not ended, by number.
        failure: What the current worker said of its own failure, before its exit.
        adopted: Its worker was a spare.
        anew: That had not begun its model, or has it already: either way it says so at once.
        let_down: A spare did not, and was killed for it, since the model was ready last. The next one has its time: it
            may have only just been started, on a machine that needs long for that.
        load: What its worker does, as it told last; None before that.
        drowsy: A sleep command is under way, or was carried out: work needs a wake command first.
        waking: A wake command is under way.
        keep_alive: What the last request said of the time after it; see :func:`~llamaherd.pool.idle.rest_of`.
        rest: The timer of its idleness.
        stall: The timer of its load.
        heard: When its worker last gave a sign of life, in the loop's time.
        oom_kills: The kernel's count when its worker was started.
        vacated: Set when its worker is gone, or has become another model's; None while nobody waits for that.
    """

    entry: "Entry"
    index: int
    spec: ModelSpec
    state: State = State.UNLOADED
    worker: Worker | None = None
    requests: "dict[int, Request]" = field(default_factory=lambda: dict[int, Request]())
    log: LogRing = field(default_factory=LogRing)
    progress: dict[str, Any] | None = None
    failure: Failed | None = None
    error: PoolError | None = None
    exit_code: int | None = None
    adopted: bool = False
    anew: bool = False
    let_down: bool = False
    load: EngineLoad | None = None
    drowsy: bool = False
    waking: bool = False
    keep_alive: float | None = None
    rest: asyncio.TimerHandle | None = None
    stall: asyncio.TimerHandle | None = None
    heard: float = 0.0
    oom_kills: int = 0
    vacated: asyncio.Event | None = None

    @property
    def loading(self) -> bool:
        """Whether its worker loads the model, for the first time or again."""
        return self.state is State.LOADING or self.waking

    def vacancy(self) -> asyncio.Event:
        """Return what is set once the worker that it has now is gone, or has become another model's."""
        vacated = self.vacated or asyncio.Event()
        if self.worker is None:
            vacated.set()
        else:
            self.vacated = vacated
        return vacated

    @property
    def is_spare(self) -> bool:
        """Whether its model goes on without it."""
        return len(self.entry.replicas) > 1 and any(
            other is not self and other.state in _THERE for other in self.entry.replicas
        )


@dataclass(slots=True, eq=False)
class Entry:
    """One model.

    Attributes:
        spec: How it is to be run from now on.
        catalogued: What the catalogue says, where the spec also has files that were found since; else None.
        replicas: By their number; as many as any of its specs has had.
        info: Its facts from the last ``ready``.
        backoff: When it may be tried again after failed loads.
        sized: Whether the scheduler knows what it takes, as far as that can be known before its first start, and its
            files were there when they were last looked for.
        estimated: Whether the scheduler knows, and nothing has changed what it takes.
        unsized: Requests that wait until it does, and until its files are there.
        preparing: Whether somebody sees to both.
        fetching: The download of its files.
        cache_bytes: What its cache is expected to take; 0 where that is not known.
        broken: Why the catalogue has it, but it cannot be used; empty if it can.
        removed: It is in the catalogue no more, and goes when its last worker has.
        reviving: It is pinned, and its worker died: it is brought back until it is there again.
        scales: Of its LoRA adapters, one for each; None while they are the spec's.
        revival: The timer of a pinned model's next attempt to come back.
        growth: The timer of the next attempt to have a further replica, after one that could not be loaded.
    """

    spec: ModelSpec
    catalogued: ModelSpec | None = None
    replicas: list[Replica] = field(default_factory=list[Replica])
    info: dict[str, Any] | None = None
    backoff: Backoff = field(default_factory=Backoff)
    sized: bool = False
    estimated: bool = False
    unsized: list[int] = field(default_factory=list[int])
    preparing: bool = False
    fetching: Job | None = None
    cache_bytes: int = 0
    broken: str = ""
    removed: bool = False
    scales: tuple[float, ...] | None = None
    reviving: bool = False
    revival: asyncio.TimerHandle | None = None
    growth: asyncio.TimerHandle | None = None

    @property
    def name(self) -> str:
        """The model's name."""
        return self.spec.name

    @property
    def state(self) -> State:
        """The state of its replica that is furthest on; or that its files are being downloaded."""
        if (job := self.download) is not None:
            return job.state
        if len(self.replicas) == 1:
            return self.replicas[0].state
        states = {replica.state for replica in self.replicas}
        return next((state for state in _PRECEDENCE if state in states), State.UNLOADED)

    @property
    def download(self) -> Job | None:
        """The download of its files, unless it has failed, or something runs of what the model was before."""
        job = self.fetching
        return job if job is not None and job.failure is None and self.worker is None else None

    @property
    def workers(self) -> Iterator[Worker]:
        """Its workers, in the order of the replicas."""
        return (replica.worker for replica in self.replicas if replica.worker is not None)

    @property
    def worker(self) -> Worker | None:
        """Its first worker, None if it has no process."""
        if len(self.replicas) == 1:
            return self.replicas[0].worker
        return next(self.workers, None)

    @property
    def awake(self) -> bool:
        """Whether any of its workers has its model, or loads it, or ends."""
        return any(one.worker is not None and not one.drowsy for one in self.replicas)

    @property
    def lives(self) -> bool:
        """Whether any of its workers is not on its way out."""
        return any(one.worker is not None and one.state is not State.STOPPING for one in self.replicas)

    @property
    def last_end(self) -> Replica | None:
        """A replica whose worker ended with an error, if none has a worker now."""
        if self.worker is not None:
            return None
        return next((replica for replica in self.replicas if replica.error is not None), None)

    def resize(self) -> None:
        """Have as many replicas as the spec wants, at least."""
        while len(self.replicas) < self.spec.replicas:
            self.replicas.append(Replica(self, len(self.replicas), self.spec))

    def stop_revival(self) -> None:
        """Stop the timer of a pinned model's return."""
        if self.revival is not None:
            self.revival.cancel()
            self.revival = None

    def stop_timers(self) -> None:
        """Stop all timers of its own."""
        self.reviving = False
        self.stop_revival()
        if self.growth is not None:
            self.growth.cancel()
            self.growth = None

    def logs_since(self, marks: Sequence[int]) -> tuple[tuple[str, ...], tuple[int, ...]]:
        """Return the lines that its workers printed since the marks were taken, and new marks; one of each replica."""
        several = len(self.replicas) > 1
        lines: list[str] = []
        for replica in self.replicas:
            before = marks[replica.index] if replica.index < len(marks) else 0
            lines.extend(f"#{replica.index} {line}" if several else line for line in replica.log.since(before))
        return tuple(lines), tuple(replica.log.count for replica in self.replicas)

    def logs(self) -> tuple[str, ...]:
        """Return the last lines that its workers printed, oldest first; of several replicas, one after the other and
        with their numbers.
        """
        if len(self.replicas) == 1:
            return self.replicas[0].log.tail()
        return tuple(f"#{replica.index} {line}" for replica in self.replicas for line in replica.log.tail())


class Sink(Protocol):
    """Where the news of one request goes."""

    def feed(self, part: Delta | Vector | PromptProgress) -> None:
        """The request made progress: more of a generation, a vector, or more of a prompt."""
        ...

    def finish(self, end: Done | Result | None) -> None:
        """The request ended in order. None for a request that only wanted its model ready."""
        ...

    def fail(self, error: PoolError) -> None:
        """The request came to nothing."""
        ...


class Stream:
    """Feeds a generation, and lets go of it when its caller does."""

    __slots__ = ("_generation",)

    def __init__(self, generation: Generation) -> None:
        self._generation = weakref.ref(generation)

    def start(self, waited: float) -> None:
        """The request was given to a worker after so many seconds."""
        generation = self._generation()
        if generation is not None:
            generation.waited = waited

    def feed(self, part: Delta | Vector | PromptProgress) -> None:
        generation = self._generation()
        if generation is None:
            return
        if type(part) is Delta or isinstance(part, Delta):
            generation.feed(part)
        elif isinstance(part, PromptProgress):
            generation.feed_progress(part)

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

    def feed(self, part: Delta | Vector | PromptProgress) -> None:
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


class Nobody:
    """Listens to a request that the pool makes for itself."""

    def feed(self, part: Delta | Vector | PromptProgress) -> None:
        pass

    def finish(self, end: Done | Result | None) -> None:
        pass

    def fail(self, error: PoolError) -> None:
        pass


@dataclass(slots=True, eq=False)
class Request:
    """One request, from its acceptance until its worker says that it has ended.

    Attributes:
        command: What its worker is told; None if the request only wants its model ready.
        sink: Who listens; None once the caller has left.
        priority: Higher goes first.
        keep_alive: See :class:`Replica`.
        queue_timeout: Seconds that it may wait for its model; 0 means no limit.
        since: When it began to wait, in the loop's time.
        patience: The timer of its wait.
        replica: To whose worker it was sent; None while it waits.
        aside: It goes past the scheduler, wakes nothing and does not count as use.
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
    replica: Replica | None = None
    aside: bool = False
    answered: bool = False
    retried: bool = False

    def stop_waiting(self) -> None:
        """Its wait is over, however."""
        if self.patience is not None:
            self.patience.cancel()
            self.patience = None
