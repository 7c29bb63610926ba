"""Functions of the C library for memory; None where this one has none of that name."""

import ctypes
from typing import Any, Final

__all__ = ["bind", "madvise", "mincore"]

_libc: Final = ctypes.CDLL(None, use_errno=True)


def bind(name: str, result: Any, *arguments: Any) -> Any:
    """Return a function of the C library with these types; None where it has none of that name."""
    function = getattr(_libc, name, None)
    if function is not None:
        function.restype, function.argtypes = result, arguments
    return function


madvise = bind("madvise", ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
mincore = bind("mincore", ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p)
