"""Which files of a repository belong to which model, by the reference's rules (``common/download.cpp``).

* A file's tag is what stands after its last ``-`` or ``.``, in capitals; of the parts of a split model it is that of
  the name without ``-00001-of-00003``. Files in a cache are listed as ``<user>/<repo>:<TAG>``.
* A quant is looked for in the file's path, without regard to case, followed by ``-`` or ``.``; without one it is
  ``Q4_K_M``, else ``Q8_0``, else the first model file there is.
* Files that accompany a model (projectors, importance matrices, draft heads) are no models.

Asked on both sides of the process boundary: by the catalogue, and by the worker that downloads.
"""

import re
from collections.abc import Iterable, Sequence
from itertools import takewhile
from typing import Final
from urllib.parse import urlsplit, urlunsplit

import msgspec

__all__ = [
    "Split",
    "is_model_file",
    "listed_names",
    "pick_model",
    "pick_projector",
    "split_files",
    "split_of",
    "split_urls",
]

SUFFIX: Final = ".gguf"
#: What the reference takes where a name has no quant.
DEFAULT_TAGS: Final = ("Q4_K_M", "Q8_0")
#: Parts of a file's name that tell that it only accompanies a model.
COMPANIONS: Final = ("mmproj", "imatrix", "mtp-", "eagle3-", "dflash-", "dspark-")

_SPLIT: Final = re.compile(r"(?P<prefix>.+)-(?P<index>[0-9]{5})-of-(?P<count>[0-9]{5})")
_TAG: Final = re.compile(r"[-.]([A-Z0-9_]+)$", re.IGNORECASE | re.ASCII)


class Split(msgspec.Struct, frozen=True, gc=False):
    """What a GGUF file's name says.

    Attributes:
        prefix: The path without suffix and number.
        tag: In capitals; empty if there is none.
        index: Of this part, from 1.
        count: Of all parts; 1 for a model that is not split.
    """

    prefix: str
    tag: str
    index: int = 1
    count: int = 1


def split_of(path: str) -> Split | None:
    """Return what the path of a GGUF file in a repository says, None for any other file."""
    if not path.endswith(SUFFIX):
        return None
    prefix, index, count = path.removesuffix(SUFFIX), 1, 1
    parts = _SPLIT.fullmatch(prefix)
    if parts is not None:
        prefix, index, count = parts["prefix"], int(parts["index"]), int(parts["count"])
    tag = _TAG.search(prefix)
    return Split(prefix, tag[1].upper() if tag is not None else "", index, count)


def is_model_file(path: str) -> bool:
    """Whether the file is a model, or a part of one, and does not only accompany one."""
    name = path.rpartition("/")[2]
    return name.endswith(SUFFIX) and not any(word in name for word in COMPANIONS)


def pick_model(files: Iterable[str], tag: str = "") -> str | None:
    """Return the file that a name means among a repository's files: the first part, if the model is split.

    Args:
        files: Paths within the repository, in its order.
        tag: The quant; empty for the default rule.
    """
    first_parts = [path for path in files if is_model_file(path) and _is_first(path)]
    for wanted in (tag,) if tag else DEFAULT_TAGS:
        pattern = re.compile(re.escape(wanted) + "[.-]", re.IGNORECASE)
        for path in first_parts:
            if pattern.search(path):
                return path
    return first_parts[0] if first_parts and not tag else None


def split_files(files: Iterable[str], first: str) -> tuple[str, ...]:
    """Return all parts of the model that begins with a file, in order. Parts that are missing are missing."""
    split = split_of(first)
    if split is None or split.count <= 1:
        return (first,)
    parts: list[tuple[int, str]] = []
    for path in files:
        other = split_of(path)
        if other is not None and other.count == split.count and other.prefix == split.prefix:
            parts.append((other.index, path))
    return tuple(path for _, path in sorted(parts))


def split_urls(url: str) -> tuple[str, ...]:
    """Return the addresses of all parts of the model that an address belongs to, in order."""
    address = urlsplit(url)
    split = split_of(address.path)
    if split is None or split.count <= 1:
        return (url,)
    paths = [f"{split.prefix}-{part:05}-of-{split.count:05}{SUFFIX}" for part in range(1, split.count + 1)]
    return tuple(urlunsplit(address._replace(path=path)) for path in paths)


def pick_projector(files: Iterable[str], model: str) -> str | None:
    """Return the multimodal projector that goes with a model of the same repository, None if there is none.

    It lies in the model's folder or above it. The deepest such folder wins, then the nearest quantization.
    """
    bits = _bits(model)
    folders = model.split("/")[:-1]

    def rank(path: str) -> tuple[int, int]:
        return (len(path.split("/")), -abs(_bits(path) - bits))

    def above(path: str) -> bool:
        own = path.split("/")[:-1]
        return own == folders[: len(own)]

    fitting = [path for path in files if path.endswith(SUFFIX) and "mmproj" in path and above(path)]
    return max(fitting, key=rank, default=None)  # the first of equals, as the reference


def listed_names(repo: str, files: Sequence[str]) -> dict[str, str]:
    """Return the names under which a repository's files are listed, each with its (first) file, in the files' order."""
    names: dict[str, str] = {}
    for path in files:
        split = split_of(path)
        if split is None or split.index != 1 or not split.tag:
            continue
        # imatrix files are left out, unlike in the reference, which lists them and fails to load them.
        if not any(word in split.prefix for word in COMPANIONS):
            names.setdefault(f"{repo}:{split.tag}", path)
    return names


def _is_first(path: str) -> bool:
    split = split_of(path)
    return split is not None and split.index == 1


def _bits(path: str) -> int:
    """Return the first number in a file's tag, such as 4 of ``Q4_K_M``; 0 without one."""
    split = split_of(path)
    tag = split.tag if split is not None else ""
    start = next((place for place, letter in enumerate(tag) if letter.isdigit()), len(tag))
    return int("".join(takewhile(str.isdigit, tag[start:])) or 0)
