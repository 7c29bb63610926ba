"""Sees to it that the files of a model are there before it is loaded: what is missing is downloaded.

A download belongs to its model's entry while it goes on, and nobody's leaving ends it: what has come is of use to the
next who asks. Only an unload does, a reload that makes it pointless, and the end of the pool.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping

import msgspec

from llamaherd.pool.catalog import model_parts
from llamaherd.pool.config import ModelSpec
from llamaherd.pool.downloads import Downloads, Job
from llamaherd.pool.entry import Entry
from llamaherd.pool.errands import in_thread
from llamaherd.pool.errors import BadRequest, DownloadFailed, PoolClosed
from llamaherd.pool.origin import Found, Origin

__all__ = ["Supply"]

_log = logging.getLogger("llamaherd.pool")


class Supply:
    """See the module's text. A part of the herd, and called by it alone.

    Args:
        adopt: Called with a model and its spec once its files are there.
    """

    def __init__(self, downloads: Downloads, adopt: Callable[[Entry, ModelSpec], None]) -> None:
        self._downloads = downloads
        self._adopt = adopt
        #: What is being downloaded, for whom.
        self._jobs: dict[Entry, tuple[Job, Origin]] = {}

    async def bring(self, entry: Entry) -> DownloadFailed | None:
        """Download what a model lacks, and return why that failed if it did.

        The model's spec has its files afterwards, unless a reload has changed it meanwhile.
        """
        while (origin := entry.spec.missing()) is not None:
            spec = entry.spec
            failure = None
            found = await self._find(origin)
            if found is None:
                failure = await self._download(entry, origin)
                found = None if failure is not None else await self._find(origin)
            if entry.spec is not spec or entry.removed:
                return None
            if found is not None:
                mmproj = spec.mmproj or found.mmproj
                spec = spec.with_template(found.template)
                self._adopt(entry, msgspec.structs.replace(spec, path=found.path, mmproj=mmproj))
                return None
            if failure is None:
                return DownloadFailed(f"what was downloaded for {entry.name} is gone again", code="gone", retry=True)
            if failure.code != "cancelled" or not entry.unsized:
                return failure
        return None

    async def miss(self, entry: Entry) -> None:
        """See whether the files of a model that could be had again are still there. If they are gone since the
        catalogue was read, its spec has none afterwards, and :meth:`bring` has something to do. Workers that sleep have
        ended then: they have nothing to wake to.
        """
        spec = entry.spec
        if spec.path is None or spec.origin is None or entry.awake:
            return
        try:
            left = await in_thread(_left_of, spec)
        except (BadRequest, OSError) as error:  # such as a file system that is not mounted now: the load will tell
            _log.warning("the files of model %r cannot be looked for: %s", entry.name, error)
            return
        if left is not spec and entry.spec is spec and not entry.awake and not entry.removed:
            _log.warning("%s, a file of model %r, is gone", spec.path, entry.name)
            self._adopt(entry, left)
            for end in [sleeper.vacancy() for sleeper in entry.replicas]:
                await end.wait()

    async def _find(self, origin: Origin) -> Found | None:
        try:
            return await in_thread(origin.find)
        except (BadRequest, OSError) as error:
            _log.warning("%r cannot be looked for: %s", origin, error)
            return None

    async def _download(self, entry: Entry, origin: Origin) -> DownloadFailed | None:
        try:
            job = self._downloads.fetch(entry.name, origin.to_download(entry.name), origin.token)
        except (BadRequest, PoolClosed) as error:
            return DownloadFailed(str(error), code=error.code or "closed")
        entry.fetching = job
        self._jobs[entry] = (job, origin)
        try:
            return await asyncio.shield(job.ended)
        finally:
            entry.fetching = None
            del self._jobs[entry]

    def mind(self, entries: Mapping[str, Entry]) -> None:
        """Cancel what a reload has made pointless."""
        for entry, (job, origin) in self._jobs.items():
            if entries.get(entry.name) is not entry or entry.spec.missing() != origin:
                self._downloads.cancel(job)


def _left_of(spec: ModelSpec) -> ModelSpec:
    """Return a spec without its files if they are gone; the same one otherwise."""
    path, origin, mmproj = spec.path, spec.origin, spec.mmproj
    if path is None or origin is None:
        return spec
    # Of an address the file that is there may be another's by now.
    if origin.find() is not None if origin.url else all(part.is_file() for part in model_parts(path)):
        return spec
    came_with_it = bool(origin.repo) and origin.mmproj
    kept = mmproj if mmproj is None or not came_with_it or mmproj.is_file() else None
    return msgspec.structs.replace(spec, path=None, mmproj=kept)
