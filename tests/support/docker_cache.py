"""Writes models of registries into caches for tests: files that pass for models as long as nobody loads them."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

from llamaherd.pool.docker_layout import DockerFolder

__all__ = ["write_artifact"]


def write_artifact(cache: Path, repository: str, reference: str, files: Mapping[str, bytes]) -> DockerFolder:
    """Write a snapshot of files, have a tag or a digest name it, and return the repository's folder."""
    registry, _, repo = repository.partition("/")
    folder = DockerFolder(cache, registry, repo)
    digest = hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest()
    snapshot = folder.snapshots / digest
    for path in (folder.blobs, folder.refs, snapshot):
        path.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        blob = folder.blobs / hashlib.sha256(content).hexdigest()
        blob.write_bytes(content)
        link = snapshot / name
        link.unlink(missing_ok=True)
        link.symlink_to(f"../../blobs/{blob.name}")
    folder.ref(reference).write_text(digest)
    return folder
