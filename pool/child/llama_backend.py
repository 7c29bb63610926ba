"""llama.cpp in this process: its start and its assertions, how a decode is interrupted, and which GPUs it has."""

import atexit
import ctypes
from collections.abc import Callable
from typing import Any, Final

from llamaherd.pool.child.llama_library import BOOL, LONG, LOW, PTR, SIZE, STR, bind
from llamaherd.pool.child.llama_log import log_callback, to_stderr

__all__ = ["MOST_THREADS", "AbortFlag", "gpu_devices", "init_backend", "max_devices", "supports_gpu"]

#: ggml's limit; more abort the process.
MOST_THREADS: Final = 512
_abort_type: Any = ctypes.CFUNCTYPE(None, ctypes.c_char_p)


@_abort_type  # type: ignore[untyped-decorator]
def _on_abort(message: bytes) -> None:
    """Leave the assertion's text on stderr: it is all that remains of the process."""
    to_stderr(message + b"\n")


_backend_ready = False


def init_backend() -> None:
    """Start llama.cpp in this process. Idempotent."""
    global _backend_ready
    if _backend_ready:
        return
    bind(LONG, "llama_log_set", None, LOW.llama_log_callback, PTR)(log_callback(), None)
    bind(LONG, "ggml_set_abort_callback", PTR, _abort_type)(_on_abort)
    bind(LONG, "llama_backend_init", None)()
    # C destructors may still log when Python is gone.
    atexit.register(LONG.llama_log_set, LOW.llama_log_callback(), None)
    atexit.register(LONG.ggml_set_abort_callback, _abort_type())
    _backend_ready = True


class AbortFlag:
    """A flag that a decode polls without running Python.

    The abort callback is C's ``strlen`` on a two-byte buffer: the empty string is False, one byte is True. It is called
    after every graph node, where a Python callback would cost half a millisecond per step. CPU backend only.
    """

    def __init__(self) -> None:
        self._buffer = ctypes.create_string_buffer(2)
        self.function: Any = ctypes.cast(ctypes.CDLL(None).strlen, LOW.ggml_abort_callback)
        self.address = ctypes.addressof(self._buffer)

    def set(self) -> None:
        """Raise the flag, from any thread, for good."""
        self._buffer.raw = b"\1\0"

    def __bool__(self) -> bool:
        return self._buffer.raw[0] != 0


max_devices: Callable[[], int] = bind(LONG, "llama_max_devices", SIZE)
_device_count = bind(LONG, "ggml_backend_dev_count", SIZE)
_device = bind(LONG, "ggml_backend_dev_get", PTR, SIZE)
_device_name = bind(LONG, "ggml_backend_dev_name", STR, PTR)
_device_type = bind(LONG, "ggml_backend_dev_type", ctypes.c_int, PTR)
#: ggml's numbers for GPUs with memory of their own, and with the machine's.
_GPU_TYPES: Final = (1, 2)


def gpu_devices() -> dict[str, int]:
    """Return the handles of the GPUs that llama.cpp has a backend for, by their names."""
    handles = [_device(index) for index in range(_device_count())]
    return {_device_name(one).decode("utf-8", "replace"): one for one in handles if _device_type(one) in _GPU_TYPES}


supports_gpu: Callable[[], bool] = bind(LONG, "llama_supports_gpu_offload", BOOL)
