"""``llamaherd pull``: a download with its progress on the terminal, by this process or by a running server."""

import asyncio
import sys
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Final, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from llamaherd.http.client import Server, ServerError
from llamaherd.http.signals import SignalGuard
from llamaherd.http.terminal import one_line
from llamaherd.http.wanted import Pull
from llamaherd.pool import Pool, Subscription

__all__ = ["pull_here", "pull_there"]

#: Of a file that has a digest for a name: what is shown of it.
_DIGEST: Final = "sha256:"
_DIGITS: Final = 12


async def pull_here(pull: Pull, guard: SignalGuard) -> None:
    """Download with a worker of this process.

    Raises:
        PoolError: it came to nothing. Interrupted: a signal ended it; what is there stays for a repeat.
    """
    async with Pool() as pool:
        await guard.guard(_pull(pool, pull))


async def _pull(pool: Pool, pull: Pull) -> None:
    async with pool.events() as events:
        with Bars() as bars:
            follower = asyncio.create_task(_follow(events, bars))
            try:
                if pull.url:
                    await pool.download_url(pull.url, path=pull.path, offline=pull.offline)
                else:
                    await pool.download(
                        pull.model, file=pull.file, cache=pull.cache, offline=pull.offline, token=pull.token or None
                    )
            finally:
                follower.cancel()
                await asyncio.wait([follower])


async def _follow(events: Subscription, bars: "Bars") -> None:
    async for event in events:
        if event.event == "download_progress":
            bars.show(event.data["progress"])


def pull_there(server: Server, model: str) -> None:
    """Have a server download, and watch it. An interrupt ends the watching alone. Raises ServerError."""
    with server.stream("/models/sse") as events, Bars() as bars:
        next(events)  # the snapshot: from here on nothing is missed
        server.ask("POST", "/models", {"model": model})
        for event in events:
            if event["model"] != model:
                continue
            data = event.get("data", {})
            match event["event"]:
                case "download_progress":
                    bars.show(data["progress"])
                case "download_finished":
                    return
                case "download_failed":
                    raise ServerError(str(data.get("reason", "the download failed")), code=str(data.get("code", "")))
                case _:
                    pass
    raise ServerError("the server ended before the download did", code="unreachable", retry=True)


class Bars:
    """A bar for each file with speed and time left, on standard error if that is a terminal."""

    def __init__(self) -> None:
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        console = Console(stderr=True)
        self._progress = Progress(*columns, console=console, disable=not sys.stderr.isatty())
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()

    def show(self, files: Mapping[str, Mapping[str, Any]]) -> None:
        """Show how far the files are: ``{url: {"done", "total"}}``."""
        for url, file in files.items():
            if url not in self._tasks:
                name = one_line(_label(url))
                self._tasks[url] = self._progress.add_task(name, total=file["total"], completed=file["done"])
            else:
                self._progress.update(self._tasks[url], completed=file["done"])


def _label(url: str) -> str:
    name = url.rpartition("/")[2]
    return name[: len(_DIGEST) + _DIGITS] if name.startswith(_DIGEST) else name
