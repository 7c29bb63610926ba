"""One model from a Docker or OCI registry into llama.cpp's cache; :mod:`llamaherd.pool.docker_layout` says where.

The manifest comes first and says what there is to fetch; the contents come under their digests; then the links of the
snapshot, the model's first file last; then the ref, which makes it a model that is listed. A lock named by the manifest
is held all the while: a second download of it waits and finds everything there, and a deletion knows of it.
"""

import os
import platform
import threading
from pathlib import Path
from typing import Final

import httpx2

from llamaherd.pool.child.artifact import Manifest, children, choose_layers, parse_manifest
from llamaherd.pool.child.disk import check_disk
from llamaherd.pool.child.failures import DownloadCancelled, DownloadFailure
from llamaherd.pool.child.fetch import Fetcher, held_lock
from llamaherd.pool.child.oci import Registry
from llamaherd.pool.child.remote import RemoteFile
from llamaherd.pool.child.transfer import LinkedEvent, Report, fetch_all, make_folder, make_link
from llamaherd.pool.docker_layout import DockerFolder
from llamaherd.transport.messages import Download

__all__ = ["download_artifact"]

#: Manifests that are asked for until one holds a model.
MAX_MANIFESTS: Final = 16
#: Indexes within each other.
MAX_DEPTH: Final = 3
_MACHINES: Final = {"x86_64": "amd64", "aarch64": "arm64"}
_MAGIC: Final = b"GGUF"


def download_artifact(command: Download, report: Report, cancelled: threading.Event, pause: float) -> None:
    """Carry a ``download`` command out that names a registry. Arguments as of
    :func:`~llamaherd.pool.child.download.run_download`.

    Raises:
        DownloadFailure, OSError: it came to nothing.
    """
    mark = "@" if ":" in command.tag else ":"
    name = f"{command.registry}/{command.repo}{mark}{command.tag}"
    folder = DockerFolder(Path(command.cache), command.registry, command.repo)
    if command.offline:
        if folder.find(command.tag) is None:
            raise DownloadFailure(f"{name} is not in the cache, and this is offline", code="offline")
        return
    with Registry(command.registry, command.repo, command.endpoint) as registry:
        try:
            digest, files = _Search(registry, name).run(command.tag, mmproj=command.mmproj)
            _Artifact(folder, digest, files, cancelled).fetch(registry, command.tag, report, pause)
        except httpx2.HTTPError as error:
            reason = str(error) or type(error).__name__
            raise DownloadFailure(
                f"{command.registry} cannot be reached: {reason}", code="unreachable", retry=True
            ) from None


class _Search:
    """Looks for the manifest that holds a model."""

    def __init__(self, registry: Registry, name: str) -> None:
        self._registry = registry
        self._name = name
        self._asked: set[str] = set()

    def run(self, reference: str, *, mmproj: bool) -> tuple[str, tuple[RemoteFile, ...]]:
        """Return the manifest's digest and its files."""
        return self._look(reference, mmproj, 0)

    def _look(self, reference: str, mmproj: bool, depth: int) -> tuple[str, tuple[RemoteFile, ...]]:
        digest, manifest = self._manifest(reference)
        if manifest.manifests is None:
            return digest, choose_layers(manifest, self._name, mmproj=mmproj)
        entries = children(manifest, _MACHINES.get(platform.machine(), platform.machine()))
        failure = DownloadFailure(f"{self._name} is an index without a model", code="no_such_file")
        for entry in entries:
            if depth >= MAX_DEPTH or entry.digest in self._asked:
                continue
            try:
                return self._look(entry.digest, mmproj, depth + 1)
            except DownloadFailure as error:
                if error.code != "no_such_file":
                    raise
                failure = error
        raise failure

    def _manifest(self, reference: str) -> tuple[str, Manifest]:
        if len(self._asked) >= MAX_MANIFESTS:
            raise DownloadFailure(
                f"{self._name} is an index of which {MAX_MANIFESTS} manifests hold no model", code="bad_answer"
            )
        self._asked.add(reference)
        raw, digest = self._registry.manifest(reference)
        return digest, parse_manifest(raw, self._name)


class _Artifact:
    """The files of one manifest on their way into the cache."""

    def __init__(
        self, folder: DockerFolder, digest: str, files: tuple[RemoteFile, ...], cancelled: threading.Event
    ) -> None:
        self._folder = folder
        self._digest = digest
        self._files = files
        self._cancelled = cancelled

    def fetch(self, registry: Registry, reference: str, report: Report, pause: float) -> None:
        """Fetch what is missing, and write down that all of it is there."""
        folder = self._folder
        for path in (folder.folder, folder.blobs, folder.snapshots, folder.refs):
            make_folder(path)
        folder.locks.mkdir(parents=True, exist_ok=True)
        stop = LinkedEvent(self._cancelled)
        fetcher = Fetcher(registry, folder.folder, folder.locks, stop, pause)
        distinct = {file.digest: file for file in self._files}.values()
        check_disk(folder.folder, sum(fetcher.missing(file) for file in distinct))
        report({"plan": {fetcher.url(file): file.size for file in self._files}})
        with held_lock(folder.locks / f"{self._digest}.lock", self._check):
            fetch_all(fetcher, self._files, report, stop)
            self._check_contents()
            with held_lock(folder.locks / "refs.lock", self._check):
                self._write_down(reference)

    def _check(self) -> None:
        if self._cancelled.is_set():
            raise DownloadCancelled

    def _check_contents(self) -> None:
        for file in self._files:
            if not file.path.endswith(".gguf"):
                continue
            blob = self._folder.blobs / file.digest
            with blob.open("rb") as contents:
                start = contents.read(len(_MAGIC))
            if start != _MAGIC:
                blob.unlink()
                shown = f"it starts with {start!r}" if start else "it is empty"
                raise DownloadFailure(f"the layer sha256:{file.digest} is no GGUF file: {shown}", code="not_gguf")

    def _write_down(self, reference: str) -> None:
        snapshot = self._folder.snapshots / self._digest
        make_folder(snapshot)
        for file in self._files:
            blob = self._folder.blobs / file.digest
            if not blob.is_file():
                raise DownloadFailure(f"the layer sha256:{file.digest} was deleted meanwhile", code="cache", retry=True)
            make_link(snapshot, file.path, blob)
        ref = self._folder.ref(reference)
        temporary = ref.with_name(f".{reference}.{os.getpid()}")
        temporary.write_text(self._digest)
        temporary.replace(ref)
