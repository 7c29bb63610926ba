"""How models are called, by the reference's rules (``common/common.h``, ``common/preset.cpp``).

A model is called by its Hugging Face repository, else by its Docker repository, else by its path. The first is written
``<user>/<repo>[:<quant>]``; what a quant means among files is in :mod:`llamaherd.pool.quants`.
"""

import re
from typing import Final

import msgspec

from llamaherd.pool.errors import BadRequest

__all__ = ["HubName", "canonical_section", "canonical_tag", "model_name", "parse_hub_name"]

_LAST_WORD: Final = re.compile(r"[-.]([A-Z0-9_]+)$", re.IGNORECASE | re.ASCII)
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


def canonical_tag(tag: str) -> str:
    """Return a quant as listings write it: the last word in capitals, so ``model-q8_0`` is ``Q8_0``."""
    found = _LAST_WORD.search(tag)
    return (found[1] if found is not None else tag).upper()


def canonical_section(name: str) -> str:
    """Return the model that a section of a preset file speaks of: its quant as listings write it."""
    repo, colon, tag = name.rpartition(":")
    return f"{repo}:{canonical_tag(tag)}" if colon else name
