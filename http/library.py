"""The catalogue behind a server: read anew on request, after a download, and when its sources change.

Reading is file work and happens in a thread, which a hung file system may keep; what it finds is handed to the pool in
one piece, so that requests see the old catalogue or the new one. One reading at a time.
"""

import asyncio
import logging
from collections.abc import Callable
from typing import Final

from llamaherd.pool import (
    BadRequest,
    Caches,
    Catalog,
    DockerName,
    HubName,
    ModelNotFound,
    ModelSpec,
    Pool,
    PoolError,
    ReloadReport,
    Sources,
    State,
    fingerprint,
    in_thread,
    parse_name,
)

__all__ = ["Library"]

logger: Final = logging.getLogger("llamaherd.http")

#: Seconds between two looks at the sources of a catalogue that is watched.
WATCH_SECONDS: Final = 2.0


class Library:
    """See the module's text. All methods belong to the pool's loop.

    Args:
        sources: Where to look.
        read: Reads them; :func:`~llamaherd.pool.gather` with whoever understands settings.
        caches: Where downloads go, and what may be deleted.
        watch: Whether changes of the sources are taken up by themselves, and how often they are looked for.

    Attributes:
        specs: The models' settings, by name. The same object for good.
    """

    def __init__(
        self,
        sources: Sources,
        read: Callable[[Sources], Catalog],
        caches: Caches,
        *,
        watch: bool = False,
        watch_seconds: float = WATCH_SECONDS,
    ) -> None:
        self._sources = sources
        self._read = read
        self._lock = asyncio.Lock()
        self._watched = watch
        self._seconds = watch_seconds
        self.caches = caches
        self.specs: dict[str, ModelSpec] = {}

    def take(self, catalog: Catalog) -> None:
        """Note what a catalogue says of models' settings."""
        self.specs.clear()
        self.specs.update((spec.name, spec) for spec in catalog.models)

    async def reload(self, pool: Pool) -> ReloadReport:
        """Read the catalogue anew and give it to the pool.

        Raises:
            BadRequest: a source cannot be read; nothing has changed.
        """
        async with self._lock:
            catalog = await in_thread(self._read, self._sources)
            for problem in catalog.problems:
                logger.warning("%s", problem)
            report = pool.reload((*catalog.models, *catalog.broken))
            self.take(catalog)
            return report

    async def remove(self, pool: Pool, model: str) -> None:
        """Delete a model of the cache, or a download, from disk and from the pool; it is stopped for that.

        Raises:
            ModelNotFound: there is no such model. BadRequest: it is none of the cache's.
        """
        status = pool.status(model)
        if status.source != "cache":
            raise BadRequest(f"model {status.name!r} cannot be removed: it is not from the cache", code="not_removable")
        name = parse_name(status.name)
        if status.state is not State.UNLOADED and status.state is not State.DOWNLOADED:
            await pool.unload(status.name)
        async with self._lock:
            try:
                await in_thread(_delete, self.caches, name)
            except OSError as error:
                raise BadRequest(f"model {status.name!r} cannot be removed: {error}", code="not_removable") from None
        await self.reload(pool)

    async def run(self, pool: Pool) -> None:
        """Keep the pool's catalogue up to date until cancelled: after downloads, and if asked for on every change."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._follow(pool))
            if self._watched:
                tasks.create_task(self._watch(pool))

    async def _follow(self, pool: Pool) -> None:
        begun = False
        async for event in pool.events():
            # A second snapshot stands for events that were too many to wait here, and one may have been of a download.
            if event.event == "download_finished" or (begun and event.event == "snapshot"):
                await self._try_reload(pool)
            begun = True

    async def _watch(self, pool: Pool) -> None:
        seen = await in_thread(fingerprint, self._sources)
        # What has changed since the catalogue was read at the start.
        await self._try_reload(pool)
        while True:
            await asyncio.sleep(self._seconds)
            now = await in_thread(fingerprint, self._sources)
            if now != seen:
                seen = now
                await self._try_reload(pool)

    async def _try_reload(self, pool: Pool) -> None:
        try:
            await self.reload(pool)
        except (PoolError, OSError) as error:  # something may vanish while it is being read
            logger.warning("the catalogue stays as it is: %s", error)


def _delete(caches: Caches, name: HubName | DockerName) -> None:
    try:
        caches.remove(name)
    except ModelNotFound:
        # A download that was cancelled: what it left goes too, unless other models live beside it.
        if isinstance(name, HubName) and not any(model.repo == name.repo for model in caches.scan()):
            caches.remove(HubName(name.repo))
