"""What a worker that died can still tell: the text of an assertion or of an exception, and what its signal means."""

import re
import signal
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Final

__all__ = ["explain_signal", "last_words", "tells_of_a_full_gpu"]

#: ``ggml_abort`` prints a file, a line and a text. The folder is the builder's and of no use.
_ASSERTION: Final = re.compile(r"^(?:\S*[/\\])?([\w.+-]+\.\w+:\d+: .+)$")
_TERMINATE: Final = re.compile(r"^terminate called (?:after throwing an instance of '(.+)'|.+)$")
_WHAT: Final = re.compile(r"^\s*what\(\):\s*(.*)$")
#: A GPU backend of the CUDA family names the error in a line of its own and then asserts "CUDA error", which says
#: nothing (ggml/src/ggml-cuda/ggml-cuda.cu, ``ggml_cuda_error``).
_GPU_ERROR: Final = re.compile(r"^(CUDA|ROCm|MUSA) error: (.+)$")
_GPU_ASSERTION: Final = re.compile(r"^(\S+) (?:CUDA|ROCm|MUSA) error$")
_LINES_BETWEEN: Final = 4
#: Vulkan's is an exception.
_FULL_GPU: Final = re.compile(
    r"(?:CUDA|ROCm|MUSA) error: .*(?:out of memory|resource allocation failed)|OutOfDeviceMemory"
)
#: What the C library says of a damaged heap or stack.
_DAMAGE: Final = re.compile(
    r"^(?:\*\*\* .+ \*\*\*.*|(?:free|malloc|realloc|munmap_chunk)\(\): .+|double free .+|corrupted .+)$"
)

_HINTS: Final[Mapping[int, str]] = MappingProxyType(
    {
        signal.SIGBUS: "a mapped model file was cut short, or its disk failed: replace model files by renaming, or set "
        "use_mmap to false (--no-mmap)",
        signal.SIGILL: "llama.cpp was built for another processor",
    }
)


def last_words(log: Sequence[str]) -> str:
    """Return the newest assertion or uncaught exception of a log; empty if there is none."""
    for index in range(len(log) - 1, -1, -1):
        line = log[index].strip()
        if found := _ASSERTION.match(line):
            return _with_gpu_error(found[1], log[max(0, index - _LINES_BETWEEN) : index])
        if found := _TERMINATE.match(line):
            what = next((text for text in map(_WHAT.match, log[index + 1 : index + 3]) if text), None)
            return f"{found[1] or line}: {what[1]}" if what else found[1] or line
        if _DAMAGE.match(line):
            return line
    return ""


def tells_of_a_full_gpu(log: Sequence[str]) -> bool:
    """Whether the newest assertion or uncaught exception of a log is a GPU's that had no memory left."""
    return _FULL_GPU.search(last_words(log)) is not None


def _with_gpu_error(assertion: str, before: Sequence[str]) -> str:
    if found := _GPU_ASSERTION.match(assertion):
        error = next((line for line in map(_GPU_ERROR.match, map(str.strip, reversed(before))) if line), None)
        if error is not None:
            return f"{found[1]} {error[0]}"
    return assertion


def explain_signal(number: int, log: Sequence[str]) -> str:
    """Return why a signal may have ended a process; empty if nobody knows."""
    return last_words(log) if number == signal.SIGABRT else _HINTS.get(number, "")
