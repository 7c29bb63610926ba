"""The Hugging Face cache of this machine: where it is, what lies in it, and how a model goes out of it again.

The layout is huggingface_hub's and llama.cpp's::

    models--user--repo/
        blobs/<etag>                    the contents
        refs/main                       the commit that is current
        snapshots/<commit>/<path>       links to blobs

Nothing is listed that is not whole: a file whose blob is missing, or a split model that lacks a part. Nothing outside
the repository's folder is deleted, wherever links may lead.
"""

import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final, TypeAlias

import msgspec

from llamaherd.pool.errors import BadRequest, ModelNotFound
from llamaherd.pool.names import HubName, parse_hub_name
from llamaherd.pool.quants import listed_names, pick_model, pick_projector, split_files, split_of

__all__ = ["CachedModel", "Seen", "cache_folder", "find_cached", "remove_cached", "scan_cache", "url_folder"]

#: Environment variables in the reference's order, each with what follows its value.
_CACHE_VARIABLES: Final = (
    ("LLAMA_CACHE", ""),
    ("HF_HUB_CACHE", ""),
    ("HUGGINGFACE_HUB_CACHE", ""),
    ("HF_HOME", "hub"),
    ("XDG_CACHE_HOME", "huggingface/hub"),
    ("HOME", ".cache/huggingface/hub"),
)
_PREFIX: Final = "models--"
_COMMIT: Final = re.compile(r"[0-9a-fA-F]{40}")
#: How much of one repository is looked at: files, and folders within each other.
_MAX_FILES: Final = 10_000
_MAX_DEPTH: Final = 8


#: What one look at one cache has found, by the names of repositories: the current snapshot and its files.
Seen: TypeAlias = dict[str, tuple[Path, list[str]] | None]


class CachedModel(msgspec.Struct, frozen=True, kw_only=True):
    """One model of the cache.

    Attributes:
        name: ``user/repo:TAG``; of a registry ``registry/repo:tag`` or ``registry/repo@digest``.
        repo: ``user/repo``, or ``registry/repo``.
        path: Its file, or its first part.
        mmproj: The projector that goes with it, None if there is none.
        template: A chat template that came with it and counts instead of the file's; None if there is none.
        is_default: Whether the repository's name alone means it.
    """

    name: str
    repo: str
    path: Path
    mmproj: Path | None = None
    template: Path | None = None
    is_default: bool = False


def cache_folder(environment: Mapping[str, str] | None = None) -> Path:
    """Return where the cache is, whether or not it exists: the reference's variables, in its order.

    Raises:
        BadRequest: a variable begins with the home of a user who is not known; code ``no_home`` if nothing is set and
            nobody knows this user's.
    """
    environment = os.environ if environment is None else environment
    for variable, below in _CACHE_VARIABLES:
        value = environment.get(variable)
        if value:
            return _expanded(variable, value) / below
    return _home() / ".cache" / "huggingface" / "hub"


def url_folder(environment: Mapping[str, str] | None = None) -> Path:
    """Return where llama.cpp keeps the files that are downloaded by their address, whether or not it exists. Raises as
    :func:`cache_folder`.
    """
    environment = os.environ if environment is None else environment
    if environment.get("LLAMA_CACHE"):
        return _expanded("LLAMA_CACHE", environment["LLAMA_CACHE"])
    if sys.platform == "darwin":
        return _home() / "Library" / "Caches" / "llama.cpp"
    base = environment.get("XDG_CACHE_HOME")
    return (_expanded("XDG_CACHE_HOME", base) if base else _home() / ".cache") / "llama.cpp"


def _expanded(variable: str, value: str) -> Path:
    try:
        return Path(value).expanduser().absolute()
    except RuntimeError:
        raise BadRequest(
            f"{variable} begins with the home of a user who is not known here: {ascii(value[:200])}", code="bad_folder"
        ) from None


def _home() -> Path:
    try:
        return Path.home()
    except RuntimeError:
        raise BadRequest(
            "nobody knows where this user's home is: set LLAMA_CACHE to a folder", code="no_home"
        ) from None


def scan_cache(folder: Path, seen: Seen | None = None) -> list[CachedModel]:
    """Return every model of a cache, sorted by name. A folder that does not exist or cannot be read is empty. ``seen``
    takes down what was looked at.
    """
    models: list[CachedModel] = []
    for repo in _repositories(folder):
        models.extend(_models_in(folder, repo, seen))
    return sorted(models, key=lambda model: model.name)


def find_cached(folder: Path, name: HubName, file: str = "", seen: Seen | None = None) -> CachedModel | None:
    """Return the model that a name means in a cache, None if it is not there in whole.

    Args:
        file: The path of the file within the repository, where that is given instead of a quant.
        seen: What was looked at just now, which is not looked at again; it takes down what is looked at here.
    """
    contents = _contents(folder, name.repo, seen)
    if contents is None:
        return None
    snapshot, files = contents
    first = (file if file in files else None) if file else pick_model(files, name.tag)
    if first is None or not _is_whole(files, first):
        return None
    return CachedModel(
        name=str(name), repo=name.repo, path=snapshot / first, mmproj=_beside(snapshot, pick_projector(files, first))
    )


def remove_cached(folder: Path, name: HubName) -> int:
    """Delete a model from a cache, and return the number of bytes that this freed.

    With a quant the files of that tag go, and the blobs that nothing else needs; without one the whole repository,
    unfinished downloads included.

    Raises:
        ModelNotFound: there is nothing of that name.
        BadRequest: the repository's folder is a link: what it leads to is not the cache's to delete.
        OSError: something could not be deleted.
    """
    repo = _repo_folder(folder, name.repo)
    if repo.is_symlink():
        raise BadRequest(
            f"{repo} is a link and is not followed: delete what it leads to yourself", code="not_removable"
        )
    if not repo.is_dir():
        raise ModelNotFound(f"{name} is not in the cache {folder}", code="model_not_found")
    if not name.tag:
        freed = sum(path.lstat().st_size for path in repo.rglob("*") if path.is_file() and not path.is_symlink())
        shutil.rmtree(repo)
        return freed
    going = [path for path in _links(repo) if (split := split_of(path.name)) and split.tag == name.tag.upper()]
    if not going:
        raise ModelNotFound(f"{name} is not in the cache {folder}", code="model_not_found")
    blobs = {blob for path in going if (blob := _blob_of(repo, path)) is not None}
    freed = 0
    for path in going:
        freed += 0 if path.is_symlink() else path.lstat().st_size
        path.unlink(missing_ok=True)
    for blob in blobs - {_blob_of(repo, path) for path in _links(repo)}:
        freed += blob.lstat().st_size
        blob.unlink(missing_ok=True)
    return freed


def _repo_folder(folder: Path, repo: str) -> Path:
    return folder / (_PREFIX + repo.replace("/", "--"))


def _repositories(folder: Path) -> Iterator[str]:
    try:
        entries = sorted(os.listdir(folder))
    except OSError:
        return
    for entry in entries:
        if not entry.startswith(_PREFIX):
            continue
        repo = entry.removeprefix(_PREFIX).replace("--", "/")
        try:
            parse_hub_name(repo)
        except BadRequest:
            continue
        yield repo


def _snapshot(repo: Path) -> Path | None:
    """Return the folder of the commit that is current: the one that ``main`` names, else the first ref."""
    try:
        refs = sorted((repo / "refs").iterdir(), key=lambda path: (path.name != "main", path.name))
    except OSError:
        return None
    for ref in refs:
        try:
            with open(ref, "rb", opener=_open_at_once) as file:
                commit = file.readline(100).decode("ascii", "replace").strip()
        except OSError:
            continue
        if _COMMIT.fullmatch(commit):
            snapshot = repo / "snapshots" / commit
            return snapshot if snapshot.is_dir() else None
    return None


def _files(snapshot: Path, below: str = "", depth: int = 0) -> Iterator[str]:
    """Yield the paths of a snapshot's files that have their contents, sorted, folder by folder."""
    try:
        entries = sorted(os.scandir(snapshot / below), key=lambda entry: entry.name)
    except OSError:
        return
    for entry in entries[:_MAX_FILES]:
        try:
            if entry.is_dir(follow_symlinks=False):
                if depth < _MAX_DEPTH:
                    yield from _files(snapshot, f"{below}{entry.name}/", depth + 1)
            elif entry.is_file():
                yield below + entry.name
        except OSError:
            continue


def _open_at_once(path: str, flags: int) -> int:
    """Open a file without waiting for anybody, should it be a pipe."""
    return os.open(path, flags | os.O_NONBLOCK)


def _contents(folder: Path, repo: str, seen: Seen | None) -> tuple[Path, list[str]] | None:
    """Return the current snapshot of a repository, and the files in it that have their contents."""
    if seen is not None and repo in seen:
        return seen[repo]
    snapshot = _snapshot(_repo_folder(folder, repo))
    found = None if snapshot is None else (snapshot, list(_files(snapshot)))
    if seen is not None:
        seen[repo] = found
    return found


def _models_in(folder: Path, repo: str, seen: Seen | None) -> Iterator[CachedModel]:
    contents = _contents(folder, repo, seen)
    if contents is None:
        return
    snapshot, files = contents
    default = pick_model(files)
    for name, first in listed_names(repo, files).items():
        if _is_whole(files, first):
            projector = _beside(snapshot, pick_projector(files, first))
            path = snapshot / first
            yield CachedModel(name=name, repo=repo, path=path, mmproj=projector, is_default=first == default)


def _is_whole(files: list[str], first: str) -> bool:
    split = split_of(first)
    return split is None or len(split_files(files, first)) == split.count


def _beside(snapshot: Path, file: str | None) -> Path | None:
    return None if file is None else snapshot / file


def _links(repo: Path) -> list[Path]:
    """Return every file of every snapshot, broken links included. No link to a folder is followed."""
    return [
        Path(folder) / name
        for folder, _, names in os.walk(repo / "snapshots", followlinks=False)
        for name in names
        if name.endswith(".gguf")
    ]


def _blob_of(repo: Path, path: Path) -> Path | None:
    """Return the blob that a snapshot's file is a link to, None if that is none of this repository's."""
    if not path.is_symlink():
        return None
    target = Path(os.path.normpath(path.parent / path.readlink()))
    return target if target.parent == repo / "blobs" and target.exists() else None
