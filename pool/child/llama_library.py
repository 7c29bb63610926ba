"""llama.cpp's library: where it comes from, and how its functions are bound.

With ``mtmd.py`` the only module that knows llama-cpp-python, of which it takes the low-level module: structures,
callback types and the path of the library. The ``llama_*`` modules beside it have the functions, typed, by what they
are about. Handles are plain integers there, and NULL is always ``None``.

Calls that run for long (load, context, decode) release the GIL: they are bound through ``LONG``. The short ones are
bound through ``SHORT`` and keep it: each release would be a chance to lose the GIL for a whole switch interval to
another thread.

Nothing there checks arguments. A wrong id or a batch that is too large makes llama.cpp abort the process, so the
callers validate first.
"""

import ctypes
import importlib
import importlib.util
import os
import sys
import types
from typing import Any, Final

from llamaherd.pool.child.lean import without_typing_extensions

__all__ = [
    "BOOL",
    "F32",
    "I32",
    "LONG",
    "LOW",
    "PTR",
    "SHORT",
    "SIZE",
    "STR",
    "U32",
    "U64",
    "bind",
    "import_lowlevel",
]

# C's types, as llama.h uses them.
I32: Final = ctypes.c_int32
U32: Final = ctypes.c_uint32
U64: Final = ctypes.c_uint64
F32: Final = ctypes.c_float
PTR: Final = ctypes.c_void_p
BOOL: Final = ctypes.c_bool
STR: Final = ctypes.c_char_p
SIZE: Final = ctypes.c_size_t


def import_lowlevel(name: str = "llama_cpp") -> Any:
    """Import a module of llama-cpp-python without ``llama_cpp/__init__``, which would load five times as much."""
    if "llama_cpp" in sys.modules:
        return importlib.import_module(f"llama_cpp.{name}")
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.submodule_search_locations is None:
        raise ModuleNotFoundError("llama-cpp-python is not installed", name="llama_cpp")
    package = types.ModuleType("llama_cpp")
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules["llama_cpp"] = package
    try:
        with without_typing_extensions():
            return importlib.import_module(f"llama_cpp.{name}")
    finally:
        # A later `import llama_cpp` elsewhere must find the real package.
        del sys.modules["llama_cpp"]


# ggml_abort would otherwise fork a debugger, which costs half a second and prints nothing useful.
os.environ.setdefault("GGML_NO_BACKTRACE", "1")
LOW: Final[Any] = import_lowlevel()
LONG: Final[Any] = ctypes.CDLL(LOW._lib._name)
SHORT: Final[Any] = ctypes.PyDLL(LOW._lib._name)


def bind(library: Any, name: str, result: Any, *arguments: Any) -> Any:
    """Return a function of ``LONG`` or ``SHORT`` with the types of its result and arguments."""
    function = getattr(library, name)
    function.restype, function.argtypes = result, arguments
    return function
