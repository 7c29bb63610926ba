"""Huge pages under the memory that a model computes in, one after another between its steps.

A processor that goes through a cache or through weights looks up where each page of 4 KiB lies; with pages of 2 MiB it
hardly ever has to. To ask for these when the memory is allocated makes a load take twice as long where a virtual
machine's host has to bring them, so what lies there is moved once it is used (``MADV_COLLAPSE``, Linux 6.1): a piece at
a time, and never for more than a small part of the time that steps take. Only pieces that are resident as a whole are
moved, so hardly any memory is taken that was not. Files that are mapped stay as they are.

An operator who has switched transparent huge pages off gets none.
"""

import ctypes
import mmap
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from time import perf_counter
from typing import Final

from llamaherd.pool.child.libc import madvise, mincore

__all__ = ["PIECE", "HugePages", "allowed", "collapse", "pieces"]

#: Bytes of a huge page, where this is done at all: others are far larger, and take long to fill.
PIECE: Final = 2 * 1024 * 1024
_MADV_COLLAPSE: Final = 25
#: What moving pieces takes of the time, at most.
_SHARE: Final = 0.02
#: Seconds from the first call to the first piece: what a model was loaded for comes before.
_LATER: Final = 1.0
#: After so many pieces in a row that were refused, or took so many seconds, the kernel is not asked again: it has to
#: search.
_MOST_IN_VAIN: Final = 16
_SLOW: Final = 0.05
_SYSTEM: Final = Path("/sys/kernel/mm/transparent_hugepage")
_MAPS: Final = Path("/proc/self/maps")

#: A byte for each small page of a piece, whose lowest bit says whether it is resident.
_resident: Final = ctypes.create_string_buffer(PIECE // mmap.PAGESIZE)


def pieces(maps: Path = _MAPS) -> Iterator[int]:
    """Yield the address of each aligned piece of private memory that belongs to no file, as listed at the first one.

    Those of the heap come last: that is where the cache is (``heap.py``), of which each step reads a part, while it
    reads all weights.
    """
    try:
        lines = maps.read_bytes().split(b"\n")  # paths are bytes, and may have any but this one
    except OSError:
        return
    found: dict[bool, list[range]] = {False: [], True: []}
    for line in filter(None, lines):
        span, access, _, _, inode, *name = line.split(maxsplit=5)
        heap = name == [b"[heap]"]
        if access == b"rw-p" and inode == b"0" and (heap or not name or name[0].startswith(b"[anon")):
            start, end = (int(part, 16) for part in span.split(b"-"))
            found[heap].append(range(-(-start // PIECE) * PIECE, end - PIECE + 1, PIECE))
    for aligned in (*found[False], *found[True]):
        yield from aligned


def collapse(address: int) -> bool:
    """Have a piece lie in a huge page if it is resident as a whole; False if the kernel refused."""
    if mincore(address, PIECE, _resident) != 0 or not all(page & 1 for page in _resident.raw):
        return True
    return bool(madvise(address, PIECE, _MADV_COLLAPSE) == 0)


class HugePages:
    """Moves what is there into huge pages, once, from a while after the first call on.

    Args:
        allowed: Whether to do it at all.
        listed: Returns the addresses of the pieces.
        move: Moves one; False if the kernel refused.
        clock: Returns the time in seconds.
    """

    def __init__(
        self,
        *,
        allowed: bool,
        listed: Callable[[], Iterator[int]] = pieces,
        move: Callable[[int], bool] = collapse,
        clock: Callable[[], float] = perf_counter,
    ) -> None:
        self._left: Iterator[int] | None = listed() if allowed else None
        self._move: Final = move
        self._clock: Final = clock
        self._next: float | None = None
        self._in_vain = 0

    def tend(self) -> None:
        """Move one piece if it is time for that. Call between steps."""
        left = self._left
        if left is None:
            return
        began = self._clock()
        if self._next is None:
            self._next = began + _LATER
        if began < self._next:
            return
        address = next(left, None)
        if address is None:
            self._left = None
            return
        moved = self._move(address)
        now = self._clock()
        took = now - began
        self._next = now + took * (1 / _SHARE - 1)
        self._in_vain = 0 if moved and took <= _SLOW else self._in_vain + 1
        if self._in_vain >= _MOST_IN_VAIN:
            self._left = None


def allowed(system: Path = _SYSTEM) -> bool:
    """Whether this system moves memory into huge pages of that size, and its operator has not said no."""
    if sys.platform != "linux":
        return False
    try:
        size = int((system / "hpage_pmd_size").read_text())
        told = (system / "enabled").read_text()
    except (OSError, ValueError):
        return False
    with suppress(OSError):  # what newer kernels have for each size
        told += (system / f"hugepages-{PIECE // 1024}kB" / "enabled").read_text()
    return size == PIECE and "[never]" not in told
