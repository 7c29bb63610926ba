"""A worker in download mode: one model from the hub into the cache, as huggingface_hub and llama.cpp lay it out.

Nothing is listed that is not whole: the contents come first, under their digests; then the links of the snapshot, the
model's first file last; then the ref that names the commit. Files of the repository that are in the cache already are
linked into the new snapshot too, so that a download of one quant does not take another off the list.
"""

import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, Final

# The bars of huggingface_hub would fill the log.
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

from huggingface_hub import constants

from llamaherd.pool.child.failures import DownloadCancelled, DownloadFailure, explain
from llamaherd.pool.child.fetch import PAUSE_SECONDS, Fetcher
from llamaherd.pool.child.remote import Remote, RemoteFile, choose, list_remote
from llamaherd.pool.quants import pick_model, split_files, split_of
from llamaherd.transport.messages import Download

__all__ = ["Report", "run_download"]

#: Takes the payload of a ``downloading`` message. Called from several threads.
Report = Callable[[Mapping[str, Any]], None]

#: Files that are fetched at a time.
PARALLEL: Final = 4
#: Least seconds between two reports of one file.
REPORT_SECONDS: Final = 0.1
#: Bytes that a download leaves free on the disk.
SPARE_BYTES: Final = 64 * 1024 * 1024
_MAIN: Final = "main"


def run_download(
    command: Download, report: Report, cancelled: threading.Event, *, pause: float = PAUSE_SECONDS
) -> None:
    """Carry a ``download`` command out, and report its progress and its end; see
    :class:`~llamaherd.transport.messages.Download`. ``pause`` is the wait before a broken connection is tried
    again; each further attempt waits twice as long. Raises what ``report`` raises, and nothing else.
    """
    try:
        _Downloader(command, report, cancelled, pause).run()
    except Exception as error:
        failure = explain(error, command.repo)
        payload = {
            "result": "download_failed",
            "reason": str(failure),
            "code": failure.code,
            "retry": failure.retry,
            "retry_after": failure.retry_after,
        }
        report(payload)
    else:
        report({"result": "download_finished"})


class _Downloader:
    """One download."""

    def __init__(self, command: Download, report: Report, cancelled: threading.Event, pause: float) -> None:
        self._command = command
        self._report = report
        self._cancelled = cancelled
        self._pause = pause
        cache = Path(command.cache)
        name = "models--" + command.repo.replace("/", "--")
        self._folder = cache / name
        self._locks = cache / ".locks" / name

    def run(self) -> None:
        if self._command.offline or constants.HF_HUB_OFFLINE:
            self._find_offline()
            return
        remote = list_remote(self._command.repo, self._command.endpoint)
        files = choose(remote, self._command)
        self._make_folders()
        # Set when one file fails: the others then end too.
        stop = _Linked(self._cancelled)
        fetcher = Fetcher(
            self._command.repo,
            remote.commit,
            self._folder,
            self._locks,
            stop,
            self._command.endpoint,
            self._pause,
        )
        self._check_disk(sum(fetcher.missing(file) for file in dict.fromkeys(files)))
        self._report({"plan": {fetcher.url(file): file.size for file in files}})
        self._fetch_all(fetcher, files, stop)
        self._link(remote, files)

    def _make_folders(self) -> None:
        for folder in (self._folder, self._folder / "blobs", self._folder / "snapshots", self._folder / "refs"):
            folder.mkdir(parents=True, exist_ok=True)
            if folder.is_symlink():
                raise DownloadFailure(f"{folder} is a link: nothing is written through it", code="cache")
        self._locks.mkdir(parents=True, exist_ok=True)

    def _check_disk(self, needed: int) -> None:
        free = shutil.disk_usage(self._folder).free
        if needed and needed + SPARE_BYTES > free:
            raise DownloadFailure(
                f"{needed / 1e9:.2f} GB are missing and {free / 1e9:.2f} GB are free on the disk of {self._folder}",
                code="disk_full",
                retry=True,
            )

    def _fetch_all(self, fetcher: Fetcher, files: tuple[RemoteFile, ...], stop: "_Linked") -> None:
        # Two names of one contents are one download.
        distinct = list({file.digest: file for file in files}.values())
        with ThreadPoolExecutor(PARALLEL, thread_name_prefix="fetch") as threads:
            running: list[Future[None]] = []
            for file in distinct:
                progress = _Progress(self._report, fetcher.url(file), file.size)
                running.append(threads.submit(fetcher.fetch, file, progress))
            done, _ = wait(running, return_when=FIRST_EXCEPTION)
            failed = [error for work in done if (error := work.exception()) is not None]
            if failed:
                stop.set()
                raise min(failed, key=lambda error: isinstance(error, DownloadCancelled))

    def _link(self, remote: Remote, files: tuple[RemoteFile, ...]) -> None:
        wanted = {file.path for file in files}
        others = [file for file in remote.files if file.path not in wanted and file.path.endswith(".gguf")]
        snapshot = self._folder / "snapshots" / remote.commit
        for file in (*others, *files):
            blob = self._folder / "blobs" / file.digest
            if blob.is_file():
                _link(snapshot, file.path, blob)
        ref = self._folder / "refs" / _MAIN
        temporary = ref.with_name(f".{_MAIN}.{os.getpid()}")
        temporary.write_text(remote.commit)
        temporary.replace(ref)

    def _find_offline(self) -> None:
        commit = ""
        ref = self._folder / "refs" / _MAIN
        if ref.is_file():
            commit = ref.read_text().strip()
        snapshot = self._folder / "snapshots" / commit
        files = [str(path.relative_to(snapshot)) for path in sorted(snapshot.rglob("*.gguf"))] if commit else []
        wanted = self._command.file or pick_model(files, self._command.tag)
        split = split_of(wanted) if wanted else None
        if wanted not in files or (split is not None and len(split_files(files, wanted)) != split.count):
            name = f"{self._command.repo}:{self._command.tag}" if self._command.tag else self._command.repo
            raise DownloadFailure(f"{name} is not in the cache, and this is offline", code="offline")


class _Linked(threading.Event):
    """Set by itself, or when another event is."""

    def __init__(self, other: threading.Event) -> None:
        super().__init__()
        self._other = other

    def is_set(self) -> bool:
        return super().is_set() or self._other.is_set()


class _Progress:
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


def _link(snapshot: Path, path: str, blob: Path) -> None:
    link = snapshot / path
    link.parent.mkdir(parents=True, exist_ok=True)
    target = os.path.relpath(blob, link.parent)
    if link.is_symlink() and os.readlink(link) == target:
        return
    temporary = link.with_name(f".{link.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    temporary.replace(link)
