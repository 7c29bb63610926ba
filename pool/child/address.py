"""Files by their addresses, as llama.cpp's cache keeps them.

A file comes as ``<name>.downloadInProgress`` and gets its own name once it is whole; ``<name>.etag`` is what the server
called this version of it, and ``<name>.url`` of which address it is. What a broken connection, a cancellation or a
killed process leaves behind is taken up again as long as the server says that it is the same version. A file that is
there is not asked for again, unless it is of another address, whose file it then replaces.

An address is no repository: nobody says what its contents should be. So the length must be the server's, the digest
too where the answer has one, and the contents must begin like a GGUF file. Where the server does not say how long the
file is, what has come is thrown away if the disk has no room for more. No token is sent.
"""

import hashlib
import math
import os
import re
import threading
from collections.abc import Callable, Generator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Final
from urllib.parse import unquote, urlsplit

import httpx2
from filelock import Timeout
from huggingface_hub.utils import WeakFileLock

from llamaherd.pool.addresses import bare_address, is_other, note_address
from llamaherd.pool.child.disk import DiskFull, DiskGuard, check_disk
from llamaherd.pool.child.failures import DownloadCancelled, DownloadFailure
from llamaherd.pool.child.fetch import ATTEMPTS, RANGE_UNSATISFIABLE, TIMEOUT
from llamaherd.pool.child.transfer import PARALLEL, LinkedEvent, Progress, Report
from llamaherd.pool.quants import split_urls
from llamaherd.transport.messages import Download

__all__ = ["download_address"]

_MAGIC: Final = b"GGUF"
_PARTIAL: Final = 206
_REDIRECTS: Final = 10
_SHA256: Final = re.compile(r'"?([0-9a-f]{64})"?')
_HASH_BLOCK: Final = 1024 * 1024
_LOCK_SECONDS: Final = 0.5
#: Seconds until a pause sees that it is cancelled.
_TICK_SECONDS: Final = 0.25
#: Headers that name the digest: the hub's own, and that of servers that call a version by its digest.
_DIGEST_HEADERS: Final = ("X-Linked-Etag", "ETag")


class _CutOff(Exception):
    """An answer ended too early without looking broken."""


def download_address(
    command: Download, report: Report, cancelled: threading.Event, pause: float, *, offline: bool = False
) -> None:
    """Carry a ``download`` command with an address out: the file, or all parts of a split one, the first part last.

    Raises:
        DownloadFailure: of which :class:`DownloadCancelled` is one. And what the operating system raises.
    """
    target = Path(command.target)
    urls = split_urls(command.url)
    files = {url: target if len(urls) == 1 else target.with_name(_name(url)) for url in urls}
    missing = {url: file for url, file in files.items() if not file.is_file() or is_other(file, url)}
    if missing and (offline or command.offline):
        file = next(iter(missing.values()))
        why = "is that of another address" if file.is_file() else "is not there"
        raise DownloadFailure(f"{file} {why}, and this is offline", code="offline")
    target.parent.mkdir(parents=True, exist_ok=True)
    stop = LinkedEvent(cancelled)
    with _client() as client:
        downloads = [_AddressDownload(client, url, file, stop, pause) for url, file in missing.items()]
        sizes = {one.shown: one.size() for one in downloads}
        check_disk(target.parent, sum(max(0, sizes[one.shown] - one.partial_bytes) for one in downloads))
        report({"plan": sizes})
        _run_all(downloads[1:], report, sizes, stop)
        _run_all(downloads[:1], report, sizes, stop)


def _run_all(downloads: "list[_AddressDownload]", report: Report, sizes: dict[str, int], stop: LinkedEvent) -> None:
    with ThreadPoolExecutor(PARALLEL, thread_name_prefix="fetch") as threads:
        running = [threads.submit(one.run, Progress(report, one.shown, sizes[one.shown])) for one in downloads]
        done, _ = wait(running, return_when=FIRST_EXCEPTION)
        failed = [error for work in done if (error := work.exception()) is not None]
        if failed:
            stop.set()
            raise min(failed, key=lambda error: isinstance(error, DownloadCancelled))


class _AddressDownload:
    """One file.

    Attributes:
        shown: Its address as messages have it.
    """

    def __init__(self, client: httpx2.Client, url: str, file: Path, cancelled: threading.Event, pause: float) -> None:
        self._url = url
        self._client = client
        self._file = file
        self._cancelled = cancelled
        self._pause_seconds = pause
        self._partial = file.with_name(f"{file.name}.downloadInProgress")
        #: What the server called the version that the unfinished file is of.
        self._version = file.with_name(f"{file.name}.downloadInProgress.etag")
        self.shown = bare_address(url)

    @property
    def partial_bytes(self) -> int:
        """How much of the file is there."""
        return self._partial.stat().st_size if self._partial.is_file() else 0

    def size(self) -> int:
        """Return how long the server says that the file is; 0 if it does not say so."""
        self._check()
        with self._explained():
            answer = self._client.head(self._url)
        if answer.status_code in (404, 410, 429) or answer.status_code >= 500:
            raise self._refusal(answer)
        # Others may refuse to say, and give the file all the same: signed addresses are for GET alone.
        return _length(answer) if answer.is_success else 0

    def run(self, progress: Callable[[int], None]) -> None:
        """Fetch the file."""
        with self._locked():
            if self._file.is_file() and not is_other(self._file, self._url):
                progress(self._file.stat().st_size)
                return
            descriptor = os.open(self._partial, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
            with os.fdopen(descriptor, "r+b") as target:
                etag = self._fill(target, progress)
                have = target.seek(0, os.SEEK_END)
            self._version.unlink(missing_ok=True)
            if etag:
                self._file.with_name(f"{self._file.name}.etag").write_text(etag)
            os.replace(self._partial, self._file)
            note_address(self._file, self._url)
        progress(have)

    @contextmanager
    def _locked(self) -> Generator[None]:
        while True:
            self._check()
            lock = WeakFileLock(self._file.with_name(f".{self._file.name}.lock"), timeout=_LOCK_SECONDS)
            try:
                lock.__enter__()
            except Timeout:
                continue
            try:
                yield
            finally:
                lock.__exit__(None, None, None)
            return

    def _check(self) -> None:
        if self._cancelled.is_set():
            raise DownloadCancelled

    def _fill(self, target: BinaryIO, progress: Callable[[int], None]) -> str:
        """Fetch what is missing, and return what the server calls this version."""
        # Only a byte that was never there is progress: a server that always ends too early must not be asked for ever.
        attempts, furthest = ATTEMPTS, -1
        while True:
            have = target.seek(0, os.SEEK_END)
            furthest = max(furthest, have)
            try:
                return self._stream(target, have, progress)
            except (httpx2.TransportError, _CutOff) as error:
                self._check()
                attempts = ATTEMPTS if target.tell() > furthest else attempts - 1
                if attempts <= 0:
                    raise DownloadFailure(
                        f"the connection breaks again and again at byte {target.tell()} of {self.shown}: "
                        f"{str(error) or type(error).__name__}",
                        code="cut_off" if target.tell() else "unreachable",
                        retry=True,
                    ) from error
                self._pause(self._pause_seconds * 2 ** (ATTEMPTS - attempts))

    def _pause(self, seconds: float) -> None:
        for _ in range(math.ceil(seconds / _TICK_SECONDS)):
            self._check()
            self._cancelled.wait(_TICK_SECONDS)

    def _stream(self, target: BinaryIO, have: int, progress: Callable[[int], None]) -> str:
        version = self._version_of_partial() if have else ""
        have = have if version else _emptied(target)
        headers = {"Range": f"bytes={have}-", "If-Range": version} if have else {}
        with self._client.stream("GET", self._url, headers=headers) as answer:
            if answer.status_code == RANGE_UNSATISFIABLE:
                _emptied(target)
                raise _CutOff("the server cannot go on where the last download ended")
            if not answer.is_success:
                raise self._refusal(answer)
            if not (answer.status_code == _PARTIAL and _starts_at(answer, have)):
                have = _emptied(target)
                self._version.unlink(missing_ok=True)
            etag = answer.headers.get("ETag", "")
            # A weak one may be of other bytes, and what is not ASCII cannot be sent back.
            if etag.isascii() and etag and not etag.startswith("W/"):
                self._version.write_text(f"{etag}\n{self.shown}")
            # Of a server that says nothing to HEAD this is the first that is known of the size.
            check_disk(self._file.parent, _length(answer))
            total = have + _length(answer) if _length(answer) else 0
            progress(have)
            disk = DiskGuard(self._file.parent)
            for chunk in answer.iter_bytes():
                self._check()
                try:
                    disk.before(len(chunk))
                except DiskFull:
                    if not total:
                        _emptied(target)  # nobody knows whether there will ever be room for all of it
                    raise
                have += len(chunk)
                target.write(chunk)
                progress(have)
        target.flush()
        if have < total:
            raise _CutOff(f"the server ended it after {have} of {total} bytes")
        self._verify(target, have, total, _digest(answer))
        return etag

    def _version_of_partial(self) -> str:
        """Return what the server called the version that there is a part of; empty if that was another address's."""
        if not self._version.is_file():
            return ""
        etag, _, address = self._version.read_text().partition("\n")
        return etag if address == self.shown else ""

    def _verify(self, target: BinaryIO, have: int, total: int, digest: str) -> None:
        target.seek(0)
        start = target.read(len(_MAGIC))
        complaint = ""
        if total and have != total:
            complaint = f"has {have} bytes, and the server says {total}"
        elif start != _MAGIC:
            complaint = f"is no GGUF file: it starts with {start!r}"
        elif digest and self._digest_of(target) != digest:
            complaint = f"has another digest than the server says, {digest}"
        if complaint:
            _emptied(target)  # a repeat must not take up what is wrong
            raise DownloadFailure(
                f"what arrived from {self.shown} {complaint}; it is thrown away", code="wrong_contents", retry=True
            )

    def _digest_of(self, target: BinaryIO) -> str:
        target.seek(0)
        hashed = hashlib.sha256()
        while block := target.read(_HASH_BLOCK):
            self._check()
            hashed.update(block)
        return hashed.hexdigest()

    @contextmanager
    def _explained(self) -> Generator[None]:
        try:
            yield
        except httpx2.HTTPError as error:
            raise DownloadFailure(
                f"{self.shown} cannot be reached: {str(error) or type(error).__name__}", code="unreachable", retry=True
            ) from error

    def _refusal(self, answer: httpx2.Response) -> DownloadFailure:
        status = answer.status_code
        seconds = answer.headers.get("Retry-After", "")
        if status == 429:
            after = float(seconds) if seconds.isascii() and seconds.isdigit() and len(seconds) < 7 else None
            wait = f", try again in {after:g} s" if after is not None else ""
            reason = f"the server of {self.shown} is asked too often{wait}"
            return DownloadFailure(reason, code="rate_limited", retry=True, retry_after=after)
        if status in (404, 410):
            return DownloadFailure(f"there is no file {self.shown} ({status})", code="no_such_file")
        if status in (401, 403):
            hint = "no token is sent to an address; name the repository to have HF_TOKEN sent to the hub"
            return DownloadFailure(f"the server refuses {self.shown} ({status}): {hint}", code="refused")
        return DownloadFailure(f"the server answered {status} for {self.shown}", code="server", retry=status >= 500)


def _client() -> httpx2.Client:
    return httpx2.Client(
        timeout=TIMEOUT,
        follow_redirects=True,
        max_redirects=_REDIRECTS,
        headers={"Accept-Encoding": "identity", "User-Agent": "llamaherd"},
    )


def _emptied(target: BinaryIO) -> int:
    target.seek(0)
    return target.truncate(0)


def _length(answer: httpx2.Response) -> int:
    text = answer.headers.get("Content-Length", "")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 16 else 0


def _starts_at(answer: httpx2.Response, have: int) -> bool:
    return answer.headers.get("Content-Range", "").startswith(f"bytes {have}-")


def _digest(answer: httpx2.Response) -> str:
    """Return the SHA-256 that an answer, or what led to it, names; empty if none does."""
    for one in (*answer.history, answer):
        for name in _DIGEST_HEADERS:
            found = _SHA256.fullmatch(one.headers.get(name, ""))
            if found is not None:
                return found[1]
    return ""


def _name(url: str) -> str:
    return unquote(urlsplit(url).path.rpartition("/")[2])
