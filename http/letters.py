"""llama-server's letters for samplers: how a text names them."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from llamaherd.http.problems import INVALID_REQUEST, Problem

__all__ = ["SAMPLER_LETTERS", "named_samplers"]

SAMPLER_LETTERS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "d": "dry",
        "k": "top_k",
        "y": "typ_p",
        "p": "top_p",
        "s": "top_n_sigma",
        "m": "min_p",
        "t": "temperature",
        "x": "xtc",
        "e": "penalties",
        "a": "adaptive_p",
    }
)


def named_samplers(letters: str) -> list[str]:
    """Return the samplers that the letters of a text stand for. Raises Problem for one that stands for none."""
    unknown = [letter for letter in letters if letter not in SAMPLER_LETTERS]
    if unknown:
        raise Problem(
            INVALID_REQUEST,
            f"samplers: no sampler has the letter {unknown[0]!r}; known are {''.join(SAMPLER_LETTERS)}",
            param="samplers",
        )
    return [SAMPLER_LETTERS[letter] for letter in letters]
