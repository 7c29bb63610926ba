"""What every call of a pool needs: the model that it names, its place in the line, and its answer."""

import asyncio

from llamaherd.pool.admission import check_keep_alive, check_priority, check_queue_timeout
from llamaherd.pool.config import MAX_NAME_LENGTH
from llamaherd.pool.entry import Answer, Entry, Request
from llamaherd.pool.errors import ModelNotFound, ModelNotLoaded, PoolClosed
from llamaherd.pool.explain import explain_broken
from llamaherd.pool.herd import Herd
from llamaherd.pool.lifecycle import RUNNING
from llamaherd.transport.messages import PoolMessage, Result

__all__ = ["Calls", "quoted"]


class Calls:
    """The base of what a pool offers; :class:`~llamaherd.pool.pool.Pool` puts its groups of calls together.

    Args:
        herd: Who is asked. It owns all state but whether the pool is open.
        queue_timeout: Seconds that a request may wait where neither it nor its model says; 0 means no limit.
    """

    def __init__(self, herd: Herd, queue_timeout: float) -> None:
        self._herd = herd
        self._queue_timeout = queue_timeout
        self._open = False

    def _check_open(self) -> None:
        if not self._open:
            raise PoolClosed("the pool is not open")

    def _entry_for(self, model: str, autoload: bool = True) -> Entry:
        self._check_open()
        entry = self._entry(model)
        if entry.broken:
            raise explain_broken(entry)
        if not autoload and entry.state not in RUNNING:
            raise ModelNotLoaded(f"model {entry.name!r} is not loaded", code="model_not_loaded")
        return entry

    def _entry(self, model: str) -> Entry:
        entry = self._herd.find(model)
        if entry is None:
            raise ModelNotFound(f"model {quoted(model)} not found", code="model_not_found")
        return entry

    def _patience(self, entry: Entry) -> float:
        """Return how long a request may wait for a model that sets no limit itself."""
        own = entry.spec.queue_timeout
        return self._queue_timeout if own is None else own

    def _admission(
        self, entry: Entry, priority: int | None, keep_alive: float | None, queue_timeout: float | None
    ) -> tuple[float, float | None, int]:
        """Return a request's limit to waiting, its ``keep_alive`` and its priority. Raises BadRequest."""
        return (
            self._patience(entry) if queue_timeout is None else check_queue_timeout(queue_timeout),
            None if keep_alive is None else check_keep_alive(keep_alive),
            entry.spec.priority if priority is None else check_priority(priority),
        )

    async def _ask(self, entry: Entry, number: int, command: PoolMessage | None) -> Result | None:
        future: asyncio.Future[Result | None] = asyncio.get_running_loop().create_future()
        request = Request(number, entry, command, Answer(future), priority=entry.spec.priority)
        if command is not None:
            request.queue_timeout = self._patience(entry)
        self._herd.accept(request)
        try:
            return await future
        finally:
            self._herd.leave(number)


def quoted(name: str) -> str:
    """Return a name in quotes, escaped if a terminal or a log could misread it; of what is too long, the beginning."""
    if len(name) > MAX_NAME_LENGTH:
        return f"{ascii(name[:60])} ..."
    return repr(name) if name.isprintable() else ascii(name[:200])
