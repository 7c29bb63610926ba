"""One file from a server into a cache's ``blobs``.

It is written under a temporary name, ``<digest>.incomplete``, and gets its own once its length and its digest are what
the server said. What a broken connection, a cancellation or a killed process leaves behind is taken up again; what
turns out to be wrong is thrown away, so that a repeat begins anew. The lock is huggingface_hub's, so that two downloads
of one file, by whichever program, do not write at once.
"""

import hashlib
import math
import os
import queue
import threading
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import BinaryIO, Final, Protocol

import httpx2
from filelock import Timeout
from huggingface_hub.utils import WeakFileLock

from llamaherd.pool.child.disk import DiskGuard
from llamaherd.pool.child.failures import DownloadCancelled, DownloadFailure
from llamaherd.pool.child.remote import RemoteFile

__all__ = ["ATTEMPTS", "PAUSE_SECONDS", "RANGE_UNSATISFIABLE", "TIMEOUT", "Fetcher", "FileSource", "held_lock"]

#: Times in a row that a connection may break without a byte more.
ATTEMPTS: Final = 5
#: Seconds before the second attempt; each further one waits twice as long.
PAUSE_SECONDS: Final = 0.5
#: Seconds without a byte after which a connection counts as broken.
TIMEOUT: Final = httpx2.Timeout(30.0, connect=15.0)
RANGE_UNSATISFIABLE: Final = 416
_PARTIAL: Final = 206
_GIT_SHA1: Final = 40
_HASH_BLOCK: Final = 64 * 1024
#: Blocks that may wait for the thread that hashes, of about that size each.
_HASH_BACKLOG: Final = 256
_LOCK_SECONDS: Final = 0.5
#: Seconds until a pause sees that it is cancelled.
_TICK_SECONDS: Final = 0.25


class FileSource(Protocol):
    """A server that has files."""

    def url(self, file: RemoteFile) -> str:
        """Return a file's address, under which its progress is told."""
        ...

    def open(self, file: RemoteFile, start: int) -> AbstractContextManager[httpx2.Response]:
        """Ask for a file from a byte on, whose answer is 200, 206 or 416.

        Raises:
            Exception: any other answer, and what httpx2 raises; of that, a broken connection is tried again.
        """
        ...


class Fetcher:
    """Fetches files of one server.

    Args:
        source: The server.
        folder: Where the cache has the files' folder ``blobs``.
        locks: Where the cache has its locks for these files.
        cancelled: Set to stop; every call then ends with :class:`DownloadCancelled` within a second or two.
        pause: Seconds before the second attempt; each further one waits twice as long.
    """

    def __init__(
        self,
        source: FileSource,
        folder: Path,
        locks: Path,
        cancelled: threading.Event,
        pause: float = PAUSE_SECONDS,
    ) -> None:
        self._source = source
        self._blobs = folder / "blobs"
        self._locks = locks
        self._cancelled = cancelled
        self._pause_seconds = pause

    def url(self, file: RemoteFile) -> str:
        """Return a file's address."""
        return self._source.url(file)

    def blob(self, file: RemoteFile) -> Path:
        """Return where a file's contents are, or will be."""
        return self._blobs / file.digest

    def missing(self, file: RemoteFile) -> int:
        """Return how many bytes of a file have to be fetched yet."""
        if self.blob(file).exists():
            return 0
        partial = self._partial(file)
        return file.size - min(file.size, partial.stat().st_size if partial.exists() else 0)

    def _partial(self, file: RemoteFile) -> Path:
        return self._blobs / f"{file.digest}.incomplete"

    def fetch(self, file: RemoteFile, progress: Callable[[int], None]) -> None:
        """Fetch a file, unless it is there. ``progress`` gets the number of bytes that are there, often.

        Raises:
            DownloadFailure: of which :class:`DownloadCancelled` is one. And what httpx2, huggingface_hub and the
                operating system raise.
        """
        with self._locked(file):
            if self.blob(file).exists():
                progress(file.size)
                return
            partial = self._partial(file)
            with _open(partial) as target:
                self._fill(target, file, progress)
            os.replace(partial, self.blob(file))
        progress(file.size)

    @contextmanager
    def _locked(self, file: RemoteFile) -> Generator[None]:
        with held_lock(self._locks / f"{file.digest}.lock", self._check):
            yield

    def _check(self) -> None:
        if self._cancelled.is_set():
            raise DownloadCancelled

    def _fill(self, target: BinaryIO, file: RemoteFile, progress: Callable[[int], None]) -> None:
        # Only a byte that was never there is progress: a server that always ends too early must not be asked for ever.
        attempts, furthest = ATTEMPTS, -1
        while True:
            have = target.seek(0, os.SEEK_END)
            if have > file.size:
                have = target.truncate(0)
                target.seek(0)
            furthest = max(furthest, have)
            with _Digest(file) as digest:
                digest.take_up(target)
                try:
                    have = self._stream(target, file, digest, progress)
                except (httpx2.TransportError, _CutOff) as error:
                    self._check()
                    attempts = ATTEMPTS if target.tell() > furthest else attempts - 1
                    if attempts <= 0:
                        raise DownloadFailure(
                            f"the connection breaks again and again at byte {target.tell()} of {file.path}: "
                            f"{str(error) or type(error).__name__}",
                            code="cut_off",
                            retry=True,
                        ) from error
                    self._pause(self._pause_seconds * 2 ** (ATTEMPTS - attempts))
                    continue
                if have == file.size and digest.result() == file.digest:
                    return
            target.truncate(0)  # a repeat must not take up what is wrong
            raise DownloadFailure(
                f"{file.path} arrived with {have} bytes and another digest than the server says ({file.size} bytes, "
                f"{file.digest}); what came is thrown away",
                code="wrong_contents",
                retry=True,
            )

    def _pause(self, seconds: float) -> None:
        for _ in range(math.ceil(seconds / _TICK_SECONDS)):
            self._check()
            self._cancelled.wait(_TICK_SECONDS)

    def _stream(self, target: BinaryIO, file: RemoteFile, digest: "_Digest", progress: Callable[[int], None]) -> int:
        """Fetch what is missing, and return how long the file is then."""
        have = target.tell()
        progress(have)
        if have == file.size:
            return have
        with self._source.open(file, have) as response:
            if response.status_code == RANGE_UNSATISFIABLE:
                target.truncate(0)
                raise _CutOff("the server cannot go on where the last download ended")
            if have and not _goes_on(response, have):
                have = target.truncate(0)
                target.seek(0)
                digest.restart()
            disk = DiskGuard(self._blobs)
            for chunk in response.iter_bytes():
                self._check()
                have += len(chunk)
                if have > file.size:
                    return have
                disk.before(len(chunk))
                target.write(chunk)
                digest.feed(chunk)
                progress(have)
        target.flush()
        if have < file.size:
            raise _CutOff(f"the server ended it after {have} of {file.size} bytes")
        return have


@contextmanager
def held_lock(path: Path, check: Callable[[], None]) -> Generator[None]:
    """Wait for a lock, however long another download takes. ``check`` may raise meanwhile."""
    while True:
        check()
        lock = WeakFileLock(path, timeout=_LOCK_SECONDS)
        try:
            lock.__enter__()
        except Timeout:
            continue
        try:
            yield
        finally:
            lock.__exit__(None, None, None)
        return


class _CutOff(Exception):
    """An answer ended too early without looking broken."""


class _Hashing(Protocol):
    """What hashlib makes."""

    def update(self, data: bytes, /) -> None: ...

    def hexdigest(self) -> str: ...


class _Digest:
    """The digest of what is written, computed in a thread of its own: the network need not wait for it."""

    def __init__(self, file: RemoteFile) -> None:
        self._file = file
        self._blocks: queue.Queue[bytes | None] = queue.Queue(_HASH_BACKLOG)
        self._hash = self._new()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "_Digest":
        self._thread = threading.Thread(target=self._run, name="digest", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._stop()

    def _new(self) -> "_Hashing":
        if len(self._file.digest) != _GIT_SHA1:
            return hashlib.sha256()
        # Git names contents by their SHA-1 after this head; it is no defence, and the hub offers no other.
        return hashlib.sha1(b"blob %d\0" % self._file.size, usedforsecurity=False)

    def _run(self) -> None:
        while (block := self._blocks.get()) is not None:
            self._hash.update(block)

    def _stop(self) -> None:
        if self._thread is not None:
            self._blocks.put(None)
            self._thread.join()
            self._thread = None

    def take_up(self, target: BinaryIO) -> None:
        """Read what is there already, and leave the file at its end."""
        target.seek(0)
        while block := target.read(_HASH_BLOCK):
            self.feed(block)

    def feed(self, block: bytes) -> None:
        """Go on with a block."""
        self._blocks.put(block)

    def restart(self) -> None:
        """Forget everything: the file begins anew."""
        self._stop()
        self._hash = self._new()
        self.__enter__()

    def result(self) -> str:
        """Return the digest of everything; nothing may follow."""
        self._stop()
        return self._hash.hexdigest()


def _open(partial: Path) -> BinaryIO:
    """Open an unfinished file, new or old, at no place in particular. A link in its place is not followed."""
    descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    return os.fdopen(descriptor, "r+b")


def _goes_on(response: httpx2.Response, have: int) -> bool:
    return response.status_code == _PARTIAL and response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
