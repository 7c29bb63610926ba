"""Many prompts, one model: how :meth:`SyncPool.map <llamaherd.pool.sync.SyncPool.map>` keeps a few in flight."""

import asyncio
import sys
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from queue import SimpleQueue
from typing import Any, Final, NamedTuple, TypeAlias, cast

from llamaherd.pool.chat_params import ChatMessage
from llamaherd.pool.errors import PoolClosed, PoolError
from llamaherd.pool.generation import Completion, Generation
from llamaherd.pool.loop_thread import LoopThread, receive
from llamaherd.pool.params import ChatParams

__all__ = ["MapParams", "MapPlan", "MapPrompt", "MapReport", "map_bar", "map_results", "start_prompt"]

#: A text or token ids to continue, or a conversation to answer.
MapPrompt: TypeAlias = str | Sequence[int] | Sequence[ChatMessage]
#: Told how many results there are and how many there will be, None if nobody knows.
MapReport: TypeAlias = Callable[[int, int | None], object]


class MapParams(ChatParams, total=False):
    """Keyword arguments of ``SyncPool.map`` for every prompt: those of ``Pool.chat``."""

    autoload: bool
    priority: int | None
    keep_alive: float | None
    queue_timeout: float | None


#: Prompts that may be ahead of the oldest unfinished one, in units of the concurrency, so that one long answer does not
#: leave the other slots idle.
LOOKAHEAD: Final = 4


class MapPlan(NamedTuple):
    """How to go about it.

    Attributes:
        concurrency: Most requests in flight.
        ordered: Whether results come in the order of the prompts.
        keep_errors: Whether a prompt's PoolError is its result, instead of raised.
    """

    concurrency: int
    ordered: bool
    keep_errors: bool


class _Batch:
    """The requests in flight. Everything but :attr:`inbox` belongs to the loop."""

    def __init__(self, loop: LoopThread, start: Callable[[MapPrompt], Generation]) -> None:
        self.inbox: SimpleQueue[tuple[int, Completion | Exception] | None] = SimpleQueue()
        self._loop = loop
        self._start = start
        self._tasks: set[asyncio.Task[None]] = set()

    def add(self, number: int, prompt: MapPrompt) -> None:
        task = self._loop.spawn(self._collect(number, prompt))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _collect(self, number: int, prompt: MapPrompt) -> None:
        outcome: Completion | Exception = PoolClosed("the pool was closed")
        try:
            outcome = await self._start(prompt).collect()
        except Exception as error:
            outcome = error
        finally:
            self.inbox.put((number, outcome))

    def cancel(self) -> None:
        for task in self._tasks:
            task.cancel()


class _Window:
    """What has been asked for and not handed out yet."""

    def __init__(self, plan: MapPlan) -> None:
        self._plan = plan
        self._outcomes: dict[int, Completion | Exception] = {}
        self.asked = 0
        self.finished = 0
        self.handed_out = 0

    @property
    def has_room(self) -> bool:
        in_flight, kept = self.asked - self.finished, self.asked - self.handed_out
        return in_flight < self._plan.concurrency and kept < LOOKAHEAD * self._plan.concurrency

    @property
    def next_ready(self) -> int | None:
        if self._plan.ordered:
            return self.handed_out if self.handed_out in self._outcomes else None
        return next(iter(self._outcomes), None)

    def put(self, number: int, outcome: Completion | Exception) -> None:
        self._outcomes[number] = outcome
        self.finished += 1

    def take(self, number: int) -> Completion | PoolError:
        outcome = self._outcomes.pop(number)
        self.handed_out += 1
        if isinstance(outcome, Completion) or (self._plan.keep_errors and isinstance(outcome, PoolError)):
            return outcome
        raise outcome


def map_results(
    loop: LoopThread,
    start: Callable[[MapPrompt], Generation],
    prompts: Iterable[MapPrompt],
    plan: MapPlan,
    report: AbstractContextManager[MapReport | None],
) -> Generator[Completion | PoolError]:
    """Yield the results of all prompts; nothing happens before the first is asked for. ``start`` is called on the loop,
    ``prompts`` and ``report`` are used in the caller's thread. Whatever ends the iteration cancels what is in flight.
    """
    total = len(prompts) if isinstance(prompts, Sequence) else None
    source, window, batch = iter(prompts), _Window(plan), _Batch(loop, start)
    loop.attend(batch.inbox)
    try:
        with report as tell:
            while True:
                while window.has_room and (prompt := next(source, None)) is not None:
                    loop.post(batch.add, window.asked, prompt)
                    window.asked += 1
                if window.handed_out == window.asked:
                    return
                while window.next_ready is None or not batch.inbox.empty():
                    arrived = receive(batch.inbox)
                    if arrived is None:
                        raise PoolClosed("the pool was closed")
                    window.put(*arrived)
                    if tell is not None:
                        tell(window.finished, total)
                yield window.take(window.next_ready)
    finally:
        loop.leave(batch.inbox)
        loop.post(batch.cancel)


def start_prompt(
    chat: Callable[[Sequence[ChatMessage]], Generation], complete: Callable[[str | Sequence[int]], Generation]
) -> Callable[[MapPrompt], Generation]:
    """Return the function that starts a prompt of either kind."""

    def start(prompt: MapPrompt) -> Generation:
        if not isinstance(prompt, str) and isinstance(prompt, Sequence) and prompt and isinstance(prompt[0], Mapping):
            return chat(cast(Sequence[ChatMessage], prompt))
        return complete(cast("str | Sequence[int]", prompt))

    return start


def map_bar(label: str) -> AbstractContextManager[MapReport | None]:
    """Return a progress bar on stderr, or nothing if that is no terminal."""
    return _Bar(label) if sys.stderr.isatty() else nullcontext()


class _Bar:
    """A rich progress bar without the thread that would redraw it."""

    def __init__(self, label: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._progress = Progress(*columns, console=Console(stderr=True), auto_refresh=False)
        self._task = self._progress.add_task(label, total=None)

    def __enter__(self) -> MapReport:
        self._progress.start()
        return lambda done, total: self._progress.update(self._task, completed=done, total=total, refresh=True)

    def __exit__(self, *_: Any) -> None:
        self._progress.stop()
