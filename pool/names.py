"""How models are called, and which files of a repository a name means.

The rules are the reference's (``common/download.cpp``, ``common/hf-cache.cpp``, ``common/preset.cpp``), so that a name
that works there works here and means the same files:

* A model is called by its Hugging Face repository, else by its Docker repository, else by its path.
* ``<user>/<repo>[:<quant>]``. The quant is looked for in the file's path, without regard to case, followed by ``-`` or
  ``.``; without one it is ``Q4_K_M``, else ``Q8_0``, else the first model file there is.
* A file's tag is what stands after its last ``-`` or ``.``, in capitals; of the parts of a split model it is that of
  the name without ``-00001-of-00003``. Files in a cache are listed as ``<user>/<repo>:<TAG>``.
* Files that accompany a model (projectors, importance matrices, draft heads) are no models.
"""

import re
from collections.abc import Iterable, Sequence
from itertools import takewhile
from typing import Final

import msgspec

from llamaherd.pool.errors import BadRequest

__all__ = [
    "HubName",
    "Split",
    "canonical_section",
    "canonical_tag",
    "is_model_file",
    "listed_names",
    "model_name",
    "parse_hub_name",
    "pick_model",
    "pick_projector",
    "split_files",
    "split_of",
]

SUFFIX: Final = ".gguf"
#: What the reference takes where a name has no quant.
DEFAULT_TAGS: Final = ("Q4_K_M", "Q8_0")
#: Parts of a file's name that tell that it only accompanies a model.
COMPANIONS: Final = ("mmproj", "imatrix", "mtp-", "eagle3-", "dflash-", "dspark-")

_SPLIT: Final = re.compile(r"(?P<prefix>.+)-(?P<index>[0-9]{5})-of-(?P<count>[0-9]{5})")
_TAG: Final = re.compile(r"[-.]([A-Z0-9_]+)$", re.IGNORECASE | re.ASCII)
#: Letters, digits and ``_``; ``.`` and ``-`` stand between those; one slash. Longer than 256 is none.
_REPO: Final = re.compile(r"\w+(?:[.-]\w+)*/\w+(?:[.-]\w+)*", re.ASCII)
_QUANT: Final = re.compile(r"[\w.-]+", re.ASCII)
_MAX_REPO: Final = 256


class HubName(msgspec.Struct, frozen=True):
    """A model of a Hugging Face repository.

    Attributes:
        repo: ``user/repo``.
        tag: The quant as it was given; empty for the default one.
    """

    repo: str
    tag: str = ""

    def __str__(self) -> str:
        return f"{self.repo}:{self.tag}" if self.tag else self.repo


class Split(msgspec.Struct, frozen=True):
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


def model_name(*, hf_repo: str = "", docker_repo: str = "", path: str = "") -> str:
    """Return how a model is called that comes from one of these; empty if it comes from none."""
    return hf_repo or docker_repo or path


def parse_hub_name(text: str) -> HubName:
    """Return what ``<user>/<repo>[:<quant>]`` names.

    Raises:
        BadRequest: it is no such name. Nothing that passes can lead out of a cache folder.
    """
    repo, colon, tag = text.partition(":")
    fits = len(repo) <= _MAX_REPO and _REPO.fullmatch(repo) is not None
    # huggingface_hub's own rule; its cache folders write / as --.
    fits = fits and "--" not in repo and (not colon or (_QUANT.fullmatch(tag) is not None and ".." not in tag))
    if not fits or len(tag) > _MAX_REPO:
        raise BadRequest(f"{ascii(text[:100])} is no model name of the form <user>/<repo>[:<quant>]", code="bad_name")
    return HubName(repo, tag)


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


def canonical_tag(tag: str) -> str:
    """Return a quant as listings write it: the last word in capitals, so ``model-q8_0`` is ``Q8_0``."""
    found = _TAG.search(tag)
    return (found[1] if found is not None else tag).upper()


def canonical_section(name: str) -> str:
    """Return the model that a section of a preset file speaks of: its quant as listings write it."""
    repo, colon, tag = name.rpartition(":")
    return f"{repo}:{canonical_tag(tag)}" if colon else name


def _is_first(path: str) -> bool:
    split = split_of(path)
    return split is not None and split.index == 1


def _bits(path: str) -> int:
    """Return the first number in a file's tag, such as 4 of ``Q4_K_M``; 0 without one."""
    split = split_of(path)
    tag = split.tag if split is not None else ""
    start = next((place for place, letter in enumerate(tag) if letter.isdigit()), len(tag))
    return int("".join(takewhile(str.isdigit, tag[start:])) or 0)
