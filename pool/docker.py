"""Models of Docker and OCI registries on this machine: what is listed of them, and how one goes out of the cache again.

:mod:`llamaherd.pool.docker_layout` says where they lie. What llama.cpp itself downloaded from Docker Hub is found by
its name, and listed if it is one of ``ai/``: files of other users cannot be told from llama.cpp's other files. Nothing
is listed that is not whole, and nothing outside the repository's folder is deleted but llama.cpp's own file of that
name.
"""

import contextlib
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from filelock import FileLock, Timeout

from llamaherd.pool.docker_layout import DockerFiles, DockerFolder, docker_folders
from llamaherd.pool.errors import BadRequest, ModelBusy, ModelNotFound
from llamaherd.pool.hub import CachedModel, url_folder
from llamaherd.pool.names import DOCKER_HUB, DockerName, is_loopback, parse_docker_name

__all__ = [
    "docker_cache",
    "docker_paths",
    "find_docker",
    "read_template",
    "registry_address",
    "remove_docker",
    "scan_docker",
]

#: What llama.cpp calls its files of ``ai/``, with a model's name that holds no ``_``.
_FLAT: Final = re.compile(r"ai_(?P<model>[a-z0-9.-]+)_(?P<tag>\w[\w.-]*)\.gguf", re.ASCII)
_BLOB: Final = re.compile(r"[0-9a-f]{64}(?:\.incomplete)?")
#: Where Docker's own registry is.
_DOCKER_HUB_HOST: Final = "registry-1.docker.io"
#: Largest template that is read, in bytes; as large as what is downloaded.
_MAX_TEMPLATE: Final = 1024 * 1024
#: Seconds that a deletion waits for a download to write down what it has.
_LOCK_SECONDS: Final = 10.0


def docker_cache(environment: Mapping[str, str] | None = None) -> Path:
    """Return llama.cpp's cache folder, whether or not it exists: ``LLAMA_CACHE``, else the user's."""
    return url_folder(environment)


def registry_address(name: DockerName, endpoint: str = "") -> str:
    """Return where a registry is asked: over plain HTTP on this machine, else over https.

    Args:
        endpoint: Another address, of a mirror.

    Raises:
        BadRequest: that is none, or would be plain HTTP to another machine.
    """
    if not endpoint:
        scheme = "http" if is_loopback(name.registry) else "https"
        return f"{scheme}://{_DOCKER_HUB_HOST if name.registry == DOCKER_HUB else name.registry}"
    address = urlsplit(endpoint)
    if address.scheme != "https" and not (address.scheme == "http" and is_loopback(address.hostname or "")):
        raise BadRequest(f"{ascii(endpoint[:200])} is no https address of a registry", code="bad_url")
    return endpoint.rstrip("/")


def scan_docker(cache: Path) -> list[CachedModel]:
    """Return every model of registries in a cache, sorted by name. A folder that cannot be read is empty."""
    found: dict[str, CachedModel] = {}
    for name in (*_named(cache), *_flat(cache)):
        model = find_docker(cache, name)
        if model is not None:
            found.setdefault(model.name, model)
    return [found[name] for name in sorted(found)]


def docker_paths(cache: Path) -> Iterator[Path]:
    """Yield what changes when the list does: folders of refs and snapshots, and llama.cpp's own files."""
    for folder in docker_folders(cache):
        yield from (folder.refs, folder.snapshots)
    yield from cache.glob("ai_*.gguf")


def find_docker(cache: Path, name: DockerName) -> CachedModel | None:
    """Return the model that a name means, None if it is not there in whole."""
    files = _folder(cache, name).find(name.reference)
    return None if files is None else _model(name, files)


def read_template(path: Path | None) -> str:
    """Return a chat template that came with a model; empty if there is none, or none that can be read."""
    if path is None:
        return ""
    try:
        with path.open("rb") as file:
            return file.read(_MAX_TEMPLATE).decode()
    except (OSError, UnicodeDecodeError):
        return ""


def remove_docker(cache: Path, name: DockerName) -> int:
    """Delete a model, with what an unfinished download left of its repository, and return the bytes that this freed.

    What another tag of the repository needs stays, and so does everything that a download is at work on.

    Raises:
        ModelNotFound: there is nothing of that name.
        BadRequest: the repository's folder is a link. ModelBusy: a download is writing down what it has, and does not
            end.
        OSError: something could not be deleted.
    """
    folder = _folder(cache, name)
    for path in (folder.folder, folder.refs, folder.blobs, folder.snapshots):
        if path.is_symlink():
            raise BadRequest(
                f"{path} is a link and is not followed: delete what it leads to yourself", code="not_removable"
            )
    freed = _remove_flat(folder, name.reference)
    known = freed is not None
    if folder.folder.is_dir():
        folder.locks.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(folder.locks / "refs.lock", timeout=_LOCK_SECONDS):
                ref = folder.ref(name.reference)
                known = known or ref.exists()
                ref.unlink(missing_ok=True)
                swept = _sweep(folder)
        except Timeout:
            raise ModelBusy(f"{name} is being written to", code="not_removable", retry=True) from None
        known = known or swept is not None
        freed = (freed or 0) + (swept or 0)
    if not known:
        raise ModelNotFound(f"{name} is not in the cache {cache}", code="model_not_found")
    return freed or 0


def _folder(cache: Path, name: DockerName) -> DockerFolder:
    return DockerFolder(cache, name.registry, name.repo)


def _model(name: DockerName, files: DockerFiles) -> CachedModel:
    return CachedModel(
        name=str(name),
        repo=name.repository,
        path=files.path,
        mmproj=files.mmproj,
        template=files.template,
        is_default=name.is_latest,
    )


def _named(cache: Path) -> Iterator[DockerName]:
    """Yield what has a ref, as far as its name is one."""
    for folder in docker_folders(cache):
        for reference in folder.references():
            name = DockerName(folder.registry, folder.repo, reference)
            with contextlib.suppress(BadRequest):
                if parse_docker_name(str(name)) == name:
                    yield name


def _flat(cache: Path) -> Iterator[DockerName]:
    """Yield what llama.cpp downloaded of ``ai/``."""
    for path in sorted(cache.glob("ai_*.gguf")):
        found = _FLAT.fullmatch(path.name)
        if found is not None:
            with contextlib.suppress(BadRequest):
                yield parse_docker_name(f"{DOCKER_HUB}/ai/{found['model']}:{found['tag']}")


def _remove_flat(folder: DockerFolder, reference: str) -> int | None:
    """Delete llama.cpp's own file and its note, and return its size; None if there is none."""
    path = folder.flat(reference)
    if path is None or not path.is_file():
        return None
    size = path.lstat().st_size
    path.unlink()
    path.with_name(f"{path.name}.etag").unlink(missing_ok=True)
    return size


def _sweep(folder: DockerFolder) -> int | None:
    """Delete the snapshots that nothing names, their blobs, and, unless a download of the repository goes on, all that
    is in no snapshot. Return the bytes of it; None if there was nothing.
    """
    wanted = {folder.digest(reference) for reference in folder.references()}
    snapshots = [path for path in _entries(folder.snapshots) if path.is_dir() and not path.is_symlink()]
    going = [path for path in snapshots if path.name not in wanted]
    kept = _blobs_of([path for path in snapshots if path.name in wanted])
    doomed = _blobs_of(going)
    if not _is_downloading(folder):
        doomed |= {path.name for path in _entries(folder.blobs)}
    for snapshot in going:
        shutil.rmtree(snapshot)
    freed = None if not going else 0
    for blob in sorted(blob for blob in doomed - kept if _BLOB.fullmatch(blob)):
        with contextlib.suppress(FileNotFoundError):
            path = folder.blobs / blob
            size = path.lstat().st_size
            path.unlink()
            freed = (freed or 0) + size
    return freed


def _entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _blobs_of(snapshots: list[Path]) -> set[str]:
    """Return the names of the blobs that snapshots lead to."""
    links = [path for snapshot in snapshots for path in snapshot.iterdir() if path.is_symlink()]
    return {path.readlink().name for path in links}


def _is_downloading(folder: DockerFolder) -> bool:
    """Whether a download holds one of the locks, each of which is named by a digest."""
    for path in folder.locks.glob("*.lock"):
        if path.name == "refs.lock":
            continue
        try:
            with FileLock(path, timeout=0):
                pass
        except Timeout:
            return True
    return False
