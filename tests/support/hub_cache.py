"""Writes Hugging Face caches for tests: repositories of files that pass for models as long as nobody loads them."""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

__all__ = ["COMMIT", "write_repo"]

#: The commit that ``main`` names.
COMMIT = "a" * 40


def write_repo(cache: Path, repo: str, files: Iterable[str]) -> Path:
    """Write files into a repository of a cache, in huggingface_hub's layout, and return the repository's folder."""
    folder = cache / ("models--" + repo.replace("/", "--"))
    (folder / "blobs").mkdir(parents=True, exist_ok=True)
    (folder / "refs").mkdir(exist_ok=True)
    (folder / "refs" / "main").write_text(COMMIT)
    for file in files:
        content = b"GGUF\x03\x00\x00\x00" + file.encode()
        blob = folder / "blobs" / hashlib.sha256(content).hexdigest()
        blob.write_bytes(content)
        link = folder / "snapshots" / COMMIT / file
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return folder
