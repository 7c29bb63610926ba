"""What comes before a model's start: its files have to be there, and the scheduler has to know what it takes."""

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Final

from llamaherd.pool.config import ModelSpec
from llamaherd.pool.entry import Entry
from llamaherd.pool.errands import in_thread
from llamaherd.pool.errors import DownloadFailed
from llamaherd.pool.gpus import Gpu
from llamaherd.pool.memory import Expected, expected
from llamaherd.pool.room import Limits, Room
from llamaherd.pool.schedule import Scheduler
from llamaherd.pool.supply import Supply

__all__ = ["Preparation"]

_log = logging.getLogger("llamaherd.pool")


class Preparation:
    """Prepares models, each at most once at a time. A part of the herd, and called by it alone.

    Args:
        entries: The registry's, to be read.
        gpus: Those whose memory is counted.
        lenient: Nobody chose the budget: what is too large for it runs alone.
        go_on: Called with the requests that waited, once their model is prepared.
        go_without: Called when the files of a model cannot be had.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        supply: Supply,
        entries: Mapping[str, Entry],
        limits: Limits,
        gpus: tuple[Gpu, ...],
        *,
        lenient: bool,
        go_on: Callable[[Iterable[int]], None],
        go_without: Callable[[Entry, DownloadFailed], None],
    ) -> None:
        self._scheduler: Final = scheduler
        self._supply: Final = supply
        self._entries: Final = entries
        self._limits: Final = limits
        self._gpus: Final = gpus
        self._lenient: Final = lenient
        self._go_on: Final = go_on
        self._go_without: Final = go_without
        #: Not waited for at the end: a file system may hang.
        self._tasks: set[asyncio.Task[None]] = set()

    def put(self, entry: Entry, number: int) -> None:
        """Have a request go on once its model is prepared, which may be now."""
        if not entry.preparing and not entry.spec.may_be_gone and self.is_told(entry):
            self._go_on((number,))
            return
        entry.unsized.append(number)
        if not entry.preparing:
            entry.preparing = True
            task = asyncio.get_running_loop().create_task(self._prepare(entry))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def is_told(self, entry: Entry) -> bool:
        """Tell the scheduler what a model takes, if nobody has to read its file for that. Returns whether it knows."""
        if entry.estimated:
            entry.sized = True
            return True
        if self._limits.budgeted and (entry.spec.memory is None or self._gpus):
            return False
        entry.sized = entry.estimated = True
        self._scheduler.resize(entry.name, self._fit(Room(1, entry.spec.memory or 0)).memory)
        return True

    def stop(self) -> None:
        """Let go of what is under way."""
        for task in self._tasks:
            task.cancel()

    async def wait(self) -> None:
        """Return when everything that was stopped has ended."""
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _prepare(self, entry: Entry) -> None:
        spec: ModelSpec | None = None
        rooms: list[Room] | None = None
        while spec is not entry.spec:  # a reload may change it meanwhile
            await self._miss(entry)
            spec = entry.spec
            failure = await self._bring(entry)
            if self._entries.get(entry.name) is not entry:
                break
            if failure is not None and spec is entry.spec:
                entry.preparing = False
                self._go_without(entry, failure)
                return
            if spec is entry.spec and not self.is_told(entry):
                needs = await self._read_needs(spec)
                rooms = [self._fit(Room(1, needs.host, share)) for share in needs.gpus]
                entry.cache_bytes = needs.cache if spec is entry.spec else 0
        entry.preparing = False
        if self._entries.get(entry.name) is not entry:
            return  # it was removed, and those who waited for it were told
        if not entry.sized and rooms is not None:
            entry.sized = entry.estimated = True
            self._scheduler.resize(entry.name, rooms[0].memory, [room.gpus for room in rooms])
        waiting, entry.unsized = entry.unsized, []
        self._go_on(waiting)

    async def _miss(self, entry: Entry) -> None:
        try:
            await self._supply.miss(entry)
        except Exception:  # whatever it is, such as no thread to be had, those who wait go on: the load will tell
            _log.exception("the files of model %r could not be looked for", entry.name)

    async def _bring(self, entry: Entry) -> DownloadFailed | None:
        try:
            return await self._supply.bring(entry)
        except Exception as error:  # whatever it is, those who wait have to be told
            _log.exception("the files of model %r could not be looked for", entry.name)
            return DownloadFailed(f"what it needs could not be looked for: {error}", code="not_looked_for")

    async def _read_needs(self, spec: ModelSpec) -> Expected:
        try:
            # In a thread: the header of a model with a large vocabulary takes a good part of a second to read.
            return await in_thread(expected, spec, self._gpus)
        except Exception:  # whatever it is, those who wait must go on: the load will tell what is wrong
            _log.exception("the memory of model %r could not be estimated", spec.name)
            return Expected()

    def _fit(self, room: Room) -> Room:
        """Return an estimate; with a budget that nobody chose, no more than that."""
        return self._limits.clamp(room) if self._lenient else room
