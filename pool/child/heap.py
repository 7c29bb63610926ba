"""Memory for the cache, made ready while llama.cpp reads the model.

llama.cpp fills a new cache with zeros, and what that takes is mostly the kernel's work: it hands out one page after
another, at the first touch of each. Another thread can have that done meanwhile, and all at once, in a piece of the
heap that is given back to the allocator right before the cache is allocated, and so becomes the cache.

That needs an allocator that keeps what it was given and serves it again, which glibc's does when it is told to. With
another one, or an older kernel, the cache is allocated as ever.

The piece lies at the heap's end, where llama.cpp's other large pieces find room behind it. A process that has unloaded
a model has gaps before it, and glibc serves the smallest free piece that is large enough: gaps that could take the
cache are kept shut until it is allocated.
"""

import ctypes
import mmap
from collections.abc import Generator
from contextlib import contextmanager
from typing import Final

from llamaherd.pool.child.errand import Errand
from llamaherd.pool.child.libc import bind, madvise
from llamaherd.pool.machine import available_memory

__all__ = ["Reserve", "trim", "use_one_arena"]

#: glibc's names for what ``mallopt`` sets.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -3, -4, -8
_NEVER: Final = -1
_MMAP_MAX_DEFAULT: Final = 65_536
#: Where the thresholds end up that glibc moves by itself; once one of them is set it moves none.
_MOST_MMAP_THRESHOLD: Final = 32 * 1024 * 1024
_MOST_TRIM_THRESHOLD: Final = 2 * _MOST_MMAP_THRESHOLD
_MADV_POPULATE_WRITE: Final = 23
#: Least cache that is worth a thread.
_LEAST: Final = 4 * 1024 * 1024
#: What small allocations may take of the piece before the cache is allocated.
_SLACK: Final = 4 * 1024 * 1024
#: Most gaps that are kept shut; a heap with more of them is left alone.
_MOST_GAPS: Final = 8
#: What lies between one piece's end and the next one's beginning, at most: glibc's headers and its alignment.
_BETWEEN: Final = 64
#: How much is made ready at a time; a context that is to be made now waits for the rest of one such.
_PORTION: Final = 8 * 1024 * 1024
#: The cache is made ready only if so many times its size is free: nothing has checked yet whether the model fits.
_CAUTION: Final = 2


_malloc = bind("malloc", ctypes.c_void_p, ctypes.c_size_t)
_free = bind("free", None, ctypes.c_void_p)
_mallopt = bind("mallopt", ctypes.c_int, ctypes.c_int, ctypes.c_int)
_malloc_trim = bind("malloc_trim", ctypes.c_int, ctypes.c_size_t)


class _Figures(ctypes.Structure):
    """glibc's ``struct mallinfo2``, whose last field is the size of what is free at the heap's end."""

    _fields_ = (("others", ctypes.c_size_t * 9), ("keepcost", ctypes.c_size_t))


_mallinfo2 = bind("mallinfo2", _Figures)
_sbrk = bind("sbrk", ctypes.c_void_p, ctypes.c_ssize_t)
_usable_size = bind("malloc_usable_size", ctypes.c_size_t, ctypes.c_void_p)


def _ends_heap(address: int) -> bool:
    """Whether nothing but free memory lies behind a piece of the heap."""
    behind = (_sbrk(0) or 0) - _mallinfo2().keepcost
    return bool(abs(behind - (address + _usable_size(address))) <= _BETWEEN)


def _take_end(size: int) -> tuple[int, list[int]]:
    """Allocate so much, and some slack, at the heap's end; return its address, and the pieces that keep gaps of that
    size shut. 0 if that cannot be had.
    """
    shut: list[int] = []
    _mallopt(_MMAP_MAX, 0)
    try:
        while len(shut) <= _MOST_GAPS and (address := _malloc(size)):
            if _ends_heap(address):
                _free(address)
                if piece := _malloc(size + _SLACK):
                    return piece, shut
                break
            shut.append(address)
    finally:
        _mallopt(_MMAP_MAX, _MMAP_MAX_DEFAULT)
    _free_all(shut)
    return 0, []


def _free_all(addresses: list[int]) -> None:
    while addresses:
        _free(addresses.pop())


def use_one_arena() -> None:
    """Have all threads allocate from one heap: those of single threads hold no piece beyond 64 MiB, and grow in small
    steps. To be called before there are threads.
    """
    if _mallopt is not None:
        _mallopt(_ARENA_MAX, 1)


def trim() -> None:
    """Give the kernel what is free in the heap."""
    if _malloc_trim is not None:
        _malloc_trim(0)


class Reserve:
    """So many bytes of the heap, being made ready from now on. End it with :meth:`lent` or :meth:`drop`.

    Nothing is reserved where little memory is free, or where it could not be given back to the allocator.
    """

    def __init__(self, size: int) -> None:
        self._address = 0
        self._stopped = False
        #: Bytes that are ready: this process holds them already, and whoever looks for free memory misses them.
        self.ready = 0
        self._thread: Errand[None] | None = None
        self._shut: list[int] = []
        if size < _LEAST or None in (_mallopt, _malloc_trim, _mallinfo2, _sbrk, _usable_size):
            return
        if (size + _SLACK) * _CAUTION > (available_memory() or 0):
            return
        self._address, self._shut = _take_end(size)
        if self._address:
            self._thread = Errand(lambda: self._populate(size + _SLACK), "reserve")

    def _populate(self, size: int) -> None:
        start = -(-self._address // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (self._address + size) // mmap.PAGESIZE * mmap.PAGESIZE
        while start < end and not self._stopped:
            portion = min(_PORTION, end - start)
            if madvise(start, portion, _MADV_POPULATE_WRITE) != 0:
                return  # the kernel is older than 5.14, or has no more memory
            start += portion
            self.ready += portion

    @contextmanager
    def lent(self) -> Generator[None]:
        """Let what is allocated in this block have it."""
        if not self._address:
            yield
            return
        _mallopt(_MMAP_MAX, 0)
        _mallopt(_TRIM_THRESHOLD, _NEVER)
        try:
            self._free_piece()
            yield
        finally:
            _free_all(self._shut)
            _mallopt(_MMAP_MAX, _MMAP_MAX_DEFAULT)
            _mallopt(_MMAP_THRESHOLD, _MOST_MMAP_THRESHOLD)
            _mallopt(_TRIM_THRESHOLD, _MOST_TRIM_THRESHOLD)
            trim()  # what was too much

    def drop(self) -> None:
        """Give it back. Idempotent."""
        self._free_piece()
        _free_all(self._shut)

    def _free_piece(self) -> None:
        if self._address:
            self._stopped = True
            if self._thread is not None:
                self._thread.wait()
            _free(self._address)
            self._address = 0
