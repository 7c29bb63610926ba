"""What a repository on the hub holds, and which of its files a model needs.

The hub's answers are untrusted: a file whose path could lead out of its folder, or whose digest is none, does not
exist for us.
"""

import re
from typing import Final

import msgspec
from huggingface_hub import HfApi
from huggingface_hub.hf_api import RepoSibling

from llamaherd.pool.child.failures import DownloadFailure
from llamaherd.pool.quants import pick_model, pick_projector, split_files, split_of
from llamaherd.transport.messages import Download

__all__ = ["Remote", "RemoteFile", "choose", "list_remote"]

_COMMIT: Final = re.compile(r"[0-9a-f]{40}")
_DIGEST: Final = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
#: Seconds for the hub to answer what a repository holds.
_API_SECONDS: Final = 30.0
_SHOWN: Final = 12


class RemoteFile(msgspec.Struct, frozen=True):
    """One file of a repository.

    Attributes:
        path: Within the repository, with ``/``; it stays within.
        size: In bytes.
        digest: SHA-256 of the contents (64 digits), or git's SHA-1 of them (40), in lower case.
    """

    path: str
    size: int
    digest: str


class Remote(msgspec.Struct, frozen=True):
    """A repository at one commit."""

    commit: str
    files: tuple[RemoteFile, ...]


def list_remote(repo: str, endpoint: str = "") -> Remote:
    """Ask the hub what a repository holds now. One request.

    Raises:
        DownloadFailure: the answer makes no sense. And what huggingface_hub raises.
    """
    info = HfApi(endpoint=endpoint or None).model_info(repo, revision="main", files_metadata=True, timeout=_API_SECONDS)
    commit = info.sha or ""
    if not _COMMIT.fullmatch(commit):
        raise DownloadFailure(f"the hub names no commit for {repo}", code="bad_answer", retry=True)
    files = [file for sibling in info.siblings or () if (file := _file(sibling)) is not None]
    return Remote(commit, tuple(files))


def choose(remote: Remote, command: Download) -> tuple[RemoteFile, ...]:
    """Return the files of the model that a command names, its first part last: once that is there, all of it is.

    Raises:
        DownloadFailure: there is no such model, or a part of it is missing.
    """
    by_path = {file.path: file for file in remote.files}
    paths = list(by_path)
    if command.file:
        first = command.file if command.file in by_path else None
        wanted = f"the file {command.file!r}"
    else:
        first = pick_model(paths, command.tag)
        wanted = f"a GGUF file of the quant {command.tag!r}" if command.tag else "a GGUF file"
    if first is None:
        raise DownloadFailure(f"{command.repo} has not {wanted}{_offer(paths)}", code="no_such_file")
    split = split_of(first)
    parts = split_files(paths, first)
    if split is not None and len(parts) != split.count:
        raise DownloadFailure(
            f"{command.repo}: {first} is one of {split.count} parts, and {len(parts)} are there", code="parts_missing"
        )
    projector = pick_projector(paths, first) if command.mmproj else None
    needed = [path for path in (projector, *parts) if path is not None and path != first]
    return tuple(by_path[path] for path in (*needed, first))


def _offer(paths: list[str]) -> str:
    found = [path for path in paths if path.endswith(".gguf")]
    if not found:
        return ", and no other GGUF file either"
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return f"; it has {', '.join(found[:_SHOWN])}{more}"


def _file(sibling: RepoSibling) -> RemoteFile | None:
    path, lfs = sibling.rfilename, sibling.lfs
    digest = (lfs.sha256 if lfs is not None else sibling.blob_id) or ""
    size = lfs.size if lfs is not None else sibling.size
    if not stays_within(path) or not _DIGEST.fullmatch(digest) or not isinstance(size, int) or size < 0:
        return None
    return RemoteFile(path, size, digest)


def stays_within(path: str) -> bool:
    """Whether a path of the hub names a place below the folder that it is put into."""
    parts = path.split("/")
    return path.isprintable() and "\\" not in path and len(path) < 1024 and not {"", ".", ".."} & set(parts)
