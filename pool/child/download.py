"""A worker in download mode: one model by its address (see :mod:`~llamaherd.pool.child.address`), from a registry (see
:mod:`~llamaherd.pool.child.docker_download`), or from the hub into the cache, as huggingface_hub and llama.cpp lay it
out.

Nothing is listed that is not whole: the contents come first, under their digests; then the links of the snapshot, the
model's first file last; then the ref that names the commit. Files of the repository that are in the cache already are
linked into the new snapshot too, so that a download of one quant does not take another off the list.
"""

import os
import threading
from pathlib import Path
from typing import Final

# The bars of huggingface_hub would fill the log.
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

from huggingface_hub import constants

from llamaherd.pool.child.address import download_address
from llamaherd.pool.child.disk import check_disk
from llamaherd.pool.child.docker_download import download_artifact
from llamaherd.pool.child.failures import DownloadFailure, explain
from llamaherd.pool.child.fetch import PAUSE_SECONDS, Fetcher
from llamaherd.pool.child.hub_files import HubFiles
from llamaherd.pool.child.remote import Remote, RemoteFile, choose, list_remote
from llamaherd.pool.child.transfer import LinkedEvent, Report, fetch_all, make_folder, make_link
from llamaherd.pool.quants import pick_model, split_files, split_of
from llamaherd.transport.messages import Download

__all__ = ["Report", "run_download"]

_MAIN: Final = "main"


def run_download(
    command: Download, report: Report, cancelled: threading.Event, *, pause: float = PAUSE_SECONDS
) -> None:
    """Carry a ``download`` command out, and report its progress and its end; see
    :class:`~llamaherd.transport.messages.Download`. ``pause`` is the wait before a broken connection is tried
    again; each further attempt waits twice as long. Raises what ``report`` raises, and nothing else.
    """
    try:
        if command.url:
            download_address(command, report, cancelled, pause, offline=constants.HF_HUB_OFFLINE)
        elif command.registry:
            download_artifact(command, report, cancelled, pause)
        else:
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
        for folder in (self._folder, self._folder / "blobs", self._folder / "snapshots", self._folder / "refs"):
            make_folder(folder)
        self._locks.mkdir(parents=True, exist_ok=True)
        stop = LinkedEvent(self._cancelled)
        source = HubFiles(self._command.repo, remote.commit, self._command.endpoint)
        fetcher = Fetcher(source, self._folder, self._locks, stop, self._pause)
        check_disk(self._folder, sum(fetcher.missing(file) for file in dict.fromkeys(files)))
        self._report({"plan": {fetcher.url(file): file.size for file in files}})
        fetch_all(fetcher, files, self._report, stop)
        self._link(remote, files)

    def _link(self, remote: Remote, files: tuple[RemoteFile, ...]) -> None:
        wanted = {file.path for file in files}
        others = [file for file in remote.files if file.path not in wanted and file.path.endswith(".gguf")]
        snapshot = self._folder / "snapshots" / remote.commit
        for file in (*others, *files):
            blob = self._folder / "blobs" / file.digest
            if blob.is_file():
                make_link(snapshot, file.path, blob)
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
