"""What all downloads have in common: files that are fetched side by side, and folders and links that lie where they
should.
"""

import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, Final

from llamaherd.pool.child.failures import DownloadCancelled, DownloadFailure
from llamaherd.pool.child.fetch import Fetcher
from llamaherd.pool.child.remote import RemoteFile

__all__ = ["PARALLEL", "LinkedEvent", "Progress", "Report", "fetch_all", "make_folder", "make_link"]

#: Takes the payload of a ``downloading`` message. Called from several threads.
Report = Callable[[Mapping[str, Any]], None]

#: Files that are fetched at a time.
PARALLEL: Final = 4
#: Least seconds between two reports of one file.
REPORT_SECONDS: Final = 0.1


class LinkedEvent(threading.Event):
    """Set by itself, or when another event is."""

    def __init__(self, other: threading.Event) -> None:
        super().__init__()
        self._other = other

    def is_set(self) -> bool:
        return super().is_set() or self._other.is_set()


def make_folder(folder: Path) -> None:
    """Make a folder of the cache, unless it is there. Raises DownloadFailure if a link is in its place."""
    folder.mkdir(parents=True, exist_ok=True)
    if folder.is_symlink():
        raise DownloadFailure(f"{folder} is a link: nothing is written through it", code="cache")


def fetch_all(fetcher: Fetcher, files: Iterable[RemoteFile], report: Report, stop: LinkedEvent) -> None:
    """Fetch files, several at a time, and report how far each is. When one fails the others end too.

    Args:
        stop: What the fetcher looks at.

    Raises:
        Exception: the reason that one of them failed for; see :meth:`Fetcher.fetch`.
    """
    # Two names of one contents are one download.
    distinct = list({file.digest: file for file in files}.values())
    with ThreadPoolExecutor(PARALLEL, thread_name_prefix="fetch") as threads:
        running: list[Future[None]] = []
        for file in distinct:
            progress = Progress(report, fetcher.url(file), file.size)
            running.append(threads.submit(fetcher.fetch, file, progress))
        done, _ = wait(running, return_when=FIRST_EXCEPTION)
        failed = [error for work in done if (error := work.exception()) is not None]
        if failed:
            stop.set()
            raise min(failed, key=lambda error: isinstance(error, DownloadCancelled))


def make_link(folder: Path, path: str, blob: Path) -> None:
    """Have a path below a folder lead to a blob, in one step."""
    link = folder / path
    link.parent.mkdir(parents=True, exist_ok=True)
    target = os.path.relpath(blob, link.parent)
    if link.is_symlink() and os.readlink(link) == target:
        return
    temporary = link.with_name(f".{link.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    temporary.replace(link)


class Progress:
    """Reports how far one file is: its beginning, its end, and in between not too often."""

    def __init__(self, report: Report, url: str, total: int) -> None:
        self._report = report
        self._url = url
        self._total = total
        self._due = 0.0

    def __call__(self, downloaded: int) -> None:
        now = time.monotonic()
        if now >= self._due or downloaded >= self._total:
            self._due = now + REPORT_SECONDS
            self._report({"url": self._url, "downloaded": downloaded, "total": self._total})
