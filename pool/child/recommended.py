"""How a model's maker recommends to sample it: the ``general.sampling`` keys of its file, as the reference reads them.

They take the place of defaults, never of what somebody asked for. A value that no request could have is left out: the
file is not to be trusted.
"""

import re
from collections.abc import Callable, Mapping
from typing import Final

from msgspec.structs import replace

from llamaherd.pool.sampling import FILE_KEYS, problem_of, sampler_name
from llamaherd.transport.messages import Generate, Sampling

__all__ = ["read_recommended", "recommend"]

Values = Mapping[str, float | tuple[str, ...]]

_USUAL: Final = Sampling()
#: What C's strtol and strtof take of a text, without their other notations.
_WHOLE: Final = re.compile(r"\s*([+-]?\d{1,18})")
_NUMBER: Final = re.compile(r"\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,3})?)")


def read_recommended(meta: Callable[[str], str]) -> Values:
    """Return the values by the names of :class:`Sampling`; empty when there are none.

    Args:
        meta: Returns the text of a metadata key; empty when it is not there.
    """
    found: dict[str, float | tuple[str, ...]] = {}
    for name, key in FILE_KEYS.items():
        text = meta(key)
        value = _read(name, text) if text else None
        if value is not None and problem_of(replace(_USUAL, **{name: value})) is None:
            found[name] = value
    return found


def _read(name: str, text: str) -> float | tuple[str, ...] | None:
    if name == "samplers":
        names = [sampler_name(word.strip()) for word in text.split(";")]
        return tuple(name for name in names if name is not None) or None
    whole = isinstance(getattr(_USUAL, name), int)
    match = (_WHOLE if whole else _NUMBER).match(text)
    if match is None:
        return None
    return int(match[1]) if whole else float(match[1])


def recommend(request: Generate, values: Values) -> Generate:
    """Return a request with these values where it has defaults that nobody asked for."""
    taken = {
        name: value
        for name, value in values.items()
        if name not in request.insisted and getattr(request.sampling, name) == getattr(_USUAL, name)
    }
    return replace(request, sampling=replace(request.sampling, **taken)) if taken else request
