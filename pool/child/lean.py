"""A start without typing_extensions.

msgspec and llama-cpp-python ask it for a few names that typing has as well, and it brings inspect, ast and dis: a sixth
of what a worker imports before its first command.
"""

import importlib
import sys
import types
import typing
from collections.abc import Generator
from contextlib import contextmanager

__all__ = ["without_typing_extensions"]

_NAME = "typing_extensions"


class _StandIn(types.ModuleType):
    """Has what typing has, and for everything else makes room for the real one."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        if hasattr(typing, name):
            return getattr(typing, name)
        _remove(self)
        return getattr(importlib.import_module(_NAME), name)


def _remove(stand_in: _StandIn) -> None:
    if sys.modules.get(_NAME) is stand_in:
        del sys.modules[_NAME]


@contextmanager
def without_typing_extensions() -> Generator[None]:
    """Have modules that are imported in this block find typing's names in the place of typing_extensions.

    No effect where that is imported already. Only for modules that are content with either: what is left with the
    stand-in asks it for names as they come, and gets the real one's where typing has none.
    """
    if _NAME in sys.modules:
        yield
        return
    stand_in = _StandIn(_NAME)
    sys.modules[_NAME] = stand_in
    try:
        yield
    finally:
        _remove(stand_in)
