"""The calls of a pool that download models."""

import asyncio
from pathlib import Path

from llamaherd.pool.calls import Calls, quoted
from llamaherd.pool.downloads import Job
from llamaherd.pool.errands import in_thread
from llamaherd.pool.errors import BadRequest, ModelBusy
from llamaherd.pool.names import parse_name
from llamaherd.pool.origin import Origin, file_of_url

__all__ = ["DownloadCalls"]


class DownloadCalls(Calls):
    """Models of the Hugging Face hub and of registries, and files by their addresses."""

    async def download(
        self,
        model: str,
        *,
        file: str = "",
        cache: Path | None = None,
        endpoint: str = "",
        offline: bool = False,
        token: str | None = None,
    ) -> None:
        """Download a model from the Hugging Face hub, or from a Docker or OCI registry, into the cache, and return once
        it is there in whole.

        A worker of its own does it, which takes no place of the models'. ``models()`` shows its progress, events tell
        of it, and :meth:`unload` cancels it; so does a cancelled wait. A repeat goes on where the last one ended.

        Args:
            model: ``<user>/<repo>[:<quant>]``, or ``<registry>/<repo>[:<tag>|@<digest>]`` such as
                ``docker.io/ai/smollm2:135M-Q4_0``.
            file: A file of the repository, instead of a quant.
            cache: The cache's folder; None is the one that the environment names, llama.cpp's own for registries.
            endpoint: The hub's address; empty is the environment's (``HF_ENDPOINT``). Of a registry, a mirror's.
            offline: Look whether it is in the cache, and ask nobody.
            token: For private and gated repositories; None is the environment's (``HF_TOKEN``) or the one that was
                stored by huggingface_hub. Registries never get it: only what is public is downloaded from them.

        Raises:
            DownloadFailed: with the reason; ``retry`` says whether a repeat may help.
            BadRequest: it is no such name, or such a model is there already. ModelBusy: it is being downloaded
                already. QueueFull: too many downloads go on. PoolClosed.
        """
        await self._finish(self._download(model, file, cache, endpoint, offline, token))

    async def download_url(self, url: str, *, path: Path | None = None, offline: bool = False) -> Path:
        """Download a GGUF file by its address, and return where it is once it is there in whole. One that is there is
        not asked for again. Otherwise as :meth:`download`; it is listed by the file's name.

        Args:
            url: ``http`` or ``https``; of a split model that of its first part, beside which the others lie.
            path: Where it goes; None is llama.cpp's cache. The parts of a split model go into its folder.
            offline: Look whether it is there, and ask nobody.

        Raises:
            DownloadFailed, ModelBusy, QueueFull, PoolClosed: as :meth:`download`. BadRequest: it is no such address.
        """
        self._check_open()
        origin = Origin(url=url, path=path, offline=offline)
        origin.check()
        name = file_of_url(url)
        await self._finish(self._herd.downloads.start(name, origin.to_download(name), None))
        found = await in_thread(origin.find)
        return origin.target if found is None else found.path

    async def _finish(self, job: Job) -> None:
        try:
            await asyncio.shield(job.ended)
        except asyncio.CancelledError:
            self._herd.downloads.cancel(job)
            raise
        if job.failure is not None:
            raise job.failure

    async def start_download(
        self,
        model: str,
        *,
        file: str = "",
        cache: Path | None = None,
        endpoint: str = "",
        offline: bool = False,
        token: str | None = None,
    ) -> None:
        """Begin a download, and return once the hub has said what there is to fetch, or that there is nothing.
        Otherwise as :meth:`download`; a cancelled wait lets it go on.
        """
        job = self._download(model, file, cache, endpoint, offline, token)
        await asyncio.shield(job.begun)
        if job.failure is not None:
            raise job.failure

    def _download(
        self, model: str, file: str, cache: Path | None, endpoint: str, offline: bool, token: str | None
    ) -> Job:
        self._check_open()
        name = parse_name(model)
        entry = self._herd.find(str(name))
        if entry is not None and entry.spec.path is not None:
            raise BadRequest(f"model {quoted(model)} already exists", code="model_exists")
        if entry is not None and entry.fetching is not None:
            raise ModelBusy(f"{name} is being downloaded already", code="download_running")
        origin = Origin(repo=str(name), file=file, cache=cache, offline=offline)
        command = origin.to_download(str(name), endpoint)
        return self._herd.downloads.start(str(name), command, token)
