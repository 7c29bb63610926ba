"""What a key opens: all models or some, to use or only to look. The gate notes it for each request."""

from contextvars import ContextVar
from typing import Final

import msgspec

__all__ = ["CURRENT", "Grant", "parse_grant"]

_READ_ONLY: Final = "read-only"
_MODELS: Final = "models="


class Grant(msgspec.Struct, frozen=True, kw_only=True):
    """What one key opens.

    Attributes:
        models: Names or aliases of the models that may be used and seen; None means all.
        read_only: Only what changes nothing and asks no model: lists, states, properties, figures.
    """

    models: frozenset[str] | None = None
    read_only: bool = False


#: The grant of the request that is being answered.
CURRENT: Final[ContextVar[Grant]] = ContextVar("llamaherd_grant", default=Grant())  # noqa: B039 - it is immutable


def parse_grant(words: list[str]) -> Grant:
    """Return the grant that the words after a key in a file mean: ``read-only`` and ``models=NAME,NAME``.

    Raises:
        ValueError: a word means nothing; better no server than one that is open where it should not be.
    """
    models: frozenset[str] | None = None
    read_only = False
    for word in words:
        if word == _READ_ONLY:
            read_only = True
        elif word.startswith(_MODELS) and (names := [name for name in word.removeprefix(_MODELS).split(",") if name]):
            models = frozenset(names) if models is None else models | frozenset(names)
        else:
            raise ValueError(f"after a key only {_READ_ONLY} and {_MODELS}NAME,NAME may stand")
    return Grant(models=models, read_only=read_only)
