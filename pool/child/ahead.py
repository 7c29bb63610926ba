"""The model that a spare worker loads ahead, for the command that may follow."""

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Final, TypeAlias

import msgspec

from llamaherd.pool.child.engine import Engine, ModelInfo, Progress
from llamaherd.transport.messages import Load

__all__ = ["Ahead"]

#: What tells a file from the one that had its name before: device, inode, bytes, and the time of its last change.
_Stamp: TypeAlias = tuple[int, int, int, int]


class Ahead:
    """At most one model, loaded before anybody has asked for it.

    All but :meth:`expect` belongs to the engine's thread.

    Args:
        leaving: Set when the process is to end.

    Attributes:
        engine: What has loaded it; None while there is none.
    """

    def __init__(self, leaving: threading.Event) -> None:
        self._leaving: Final = leaving
        self._command: Load | None = None
        self._expected: Load | None = None
        self._info: ModelInfo | None = None
        self._stamps: tuple[_Stamp | None, ...] = ()
        self.engine: Engine | None = None

    def load(self, engine: Engine, command: Load, progress: Progress) -> None:
        """Load a model, and tell of progress only once it is expected.

        Raises:
            EngineError: it cannot be loaded, or another one is expected; the engine holds nothing then.
        """
        self._command = command

        def go_on(fraction: float) -> bool:
            expected = self._expected
            if expected is None:
                return not self._leaving.is_set()
            return _same(expected, command) and progress(fraction)

        try:
            # Before the file is read: what changes meanwhile is not what was read.
            self._stamps = tuple(_stamps(command))
            self._info = engine.load(command, go_on)
        except BaseException:
            self._command = None
            raise
        self.engine = engine

    def expect(self, command: Load | None) -> None:
        """From any thread: this is to be loaded now, or nothing is any more. A load of another model that is under way
        is abandoned.
        """
        self._expected = command

    def take(self, command: Load) -> tuple[Engine | None, ModelInfo | None]:
        """Return the engine that has loaded what a command names, and what it found; if it has loaded something else,
        or its file has changed since, free that, and return nothing.
        """
        engine, info, loaded = self.engine, self._info, self._command
        self.engine = self._info = self._command = None
        if engine is None or loaded is None:
            return None, None
        if _same(loaded, command) and self._stamps == tuple(_stamps(command)):
            return engine, info
        engine.unload()
        return None, None


def _same(one: Load, other: Load) -> bool:
    """Whether two commands make an engine load the same; what it is called matters to nobody who computes."""
    first, second = (
        msgspec.structs.replace(load, model="", aliases=(), tags=(), cache_bytes=0) for load in (one, other)
    )
    return first == second


def _stamps(command: Load) -> Iterator[_Stamp | None]:
    """Yield what tells whether the files of a load are still those that they were."""
    for name in (*_parts(command.path), command.mmproj, *(adapter.path for adapter in command.options.adapters)):
        try:
            found = os.stat(name) if name else None
        except OSError:
            found = None
        yield None if found is None else (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


def _parts(path: str) -> tuple[str, ...]:
    """Return a model's file, or the files that it is split into."""
    if "-of-" not in path:
        return (path,)
    from llamaherd.pool.quants import split_files

    first = Path(path)
    try:
        return tuple(str(first.parent / name) for name in split_files(os.listdir(first.parent), first.name))
    except OSError:
        return (path,)
