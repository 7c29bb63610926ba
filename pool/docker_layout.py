"""Where models of registries lie in llama.cpp's cache folder, for the manager and for the worker that downloads.

::

    docker/
        docker.io+ai+smollm2/           one repository: registry and path, with + for /
            blobs/<digest>              the contents
            refs/<tag>                  the digest of the manifest that has the tag, or of one named by its digest
            snapshots/<digest>/         links to blobs: what one manifest holds
                model.gguf, or model-00001-of-00002.gguf and so on
                mmproj.gguf
                template.jinja
        .locks/docker.io+ai+smollm2/
    ai_smollm2_135M-Q4_0.gguf           what llama.cpp itself downloaded from Docker Hub

A ref is written when its snapshot is whole, and deleted before anything of it is.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

__all__ = ["MMPROJ", "TEMPLATE", "DockerFiles", "DockerFolder", "docker_folders", "file_names"]

MMPROJ: Final = "mmproj.gguf"
TEMPLATE: Final = "template.jinja"

_ROOT: Final = "docker"
_SEPARATOR: Final = "+"
_MODEL: Final = "model.gguf"
_FIRST_PART: Final = re.compile(r"model-00001-of-(?P<count>[0-9]{5})\.gguf")
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")
_SUFFIX: Final = ".gguf"
#: Whose models llama.cpp itself downloads.
_DOCKER_HUB: Final = "docker.io"


@dataclass(frozen=True)
class DockerFiles:
    """The files of a model that is there in whole.

    Attributes:
        path: Its file, or its first part.
        mmproj: Its projector, None without one.
        template: Its own chat template, Jinja source; None if the file's counts.
    """

    path: Path
    mmproj: Path | None = None
    template: Path | None = None


@dataclass(frozen=True)
class DockerFolder:
    """One repository of a registry in a cache, whether or not it exists.

    Attributes:
        cache: llama.cpp's cache folder.
        registry: Such as ``docker.io``.
        repo: Its path there, such as ``ai/smollm2``.
    """

    cache: Path
    registry: str
    repo: str

    @property
    def folder(self) -> Path:
        """The repository's folder."""
        return self.cache / _ROOT / self._name

    @property
    def locks(self) -> Path:
        """The folder of its locks."""
        return self.cache / _ROOT / ".locks" / self._name

    @property
    def blobs(self) -> Path:
        """The folder of its contents."""
        return self.folder / "blobs"

    @property
    def refs(self) -> Path:
        """The folder of what has a name."""
        return self.folder / "refs"

    @property
    def snapshots(self) -> Path:
        """The folder of its snapshots."""
        return self.folder / "snapshots"

    @property
    def _name(self) -> str:
        return f"{self.registry}/{self.repo}".replace("/", _SEPARATOR)

    def ref(self, reference: str) -> Path:
        """Return the file that says which manifest a tag or a digest means."""
        return self.refs / reference

    def references(self) -> list[str]:
        """Return every tag and digest that is known, sorted."""
        try:
            return sorted(entry.name for entry in self.refs.iterdir() if not entry.name.startswith("."))
        except OSError:
            return []

    def digest(self, reference: str) -> str | None:
        """Return the digest of the manifest that a tag or a digest means, None if there is none."""
        path = self.ref(reference)
        try:
            if not path.is_file():
                return None  # a pipe would keep its reader waiting
            with path.open("rb") as file:
                digest = file.read(65).decode("ascii", "replace").strip()
        except OSError:
            return None
        return digest if _DIGEST.fullmatch(digest) else None

    def flat(self, reference: str) -> Path | None:
        """Return where llama.cpp puts such a model; None where it cannot have it."""
        if self.registry != _DOCKER_HUB or ":" in reference:
            return None
        return self.cache / f"{self.repo.replace('/', '_')}_{reference}{_SUFFIX}"

    def find(self, reference: str) -> DockerFiles | None:
        """Return the files of a tag or a digest, None if they are not there in whole."""
        digest = self.digest(reference)
        snapshot = None if digest is None else self.snapshots / digest
        first = None if snapshot is None else _first_file(snapshot)
        if snapshot is not None and first is not None:
            mmproj, template = snapshot / MMPROJ, snapshot / TEMPLATE
            return DockerFiles(first, mmproj if mmproj.is_file() else None, template if template.is_file() else None)
        flat = self.flat(reference)
        return DockerFiles(flat) if flat is not None and flat.is_file() else None


def docker_folders(cache: Path) -> Iterator[DockerFolder]:
    """Yield every repository that has a folder in a cache, sorted. Names are as they were found."""
    try:
        entries = sorted((cache / _ROOT).iterdir())
    except OSError:
        return
    for entry in entries:
        registry, separator, repo = entry.name.partition(_SEPARATOR)
        if separator and not entry.name.startswith(".") and not entry.is_symlink():
            yield DockerFolder(cache, registry, repo.replace(_SEPARATOR, "/"))


def file_names(count: int) -> tuple[str, ...]:
    """Return what the parts of a model are called."""
    if count == 1:
        return (_MODEL,)
    return tuple(f"model-{part:05}-of-{count:05}{_SUFFIX}" for part in range(1, count + 1))


def _first_file(snapshot: Path) -> Path | None:
    """Return a snapshot's model, or its first part if all parts are there."""
    if (snapshot / _MODEL).is_file():
        return snapshot / _MODEL
    for path in sorted(snapshot.glob("model-00001-of-*.gguf")):
        found = _FIRST_PART.fullmatch(path.name)
        if found is not None and all((snapshot / name).is_file() for name in file_names(int(found["count"]))):
            return path
    return None
