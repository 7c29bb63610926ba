"""Why llama.cpp refused something: its error lines, and whether it was for want of memory.

No return value says that. The texts are those of ggml's allocators (``ggml-alloc.c``, ``ggml.c``, the buffers of each
backend) and of llama.cpp's loader and contexts (``src/llama-model.cpp``, ``src/llama-context.cpp``).
"""

import re
from typing import Final, NamedTuple

from llamaherd.pool.child import llama_log
from llamaherd.pool.child.engine import OUT_OF_MEMORY

__all__ = ["Refusal", "refusal"]

_SHORTAGE: Final = re.compile(
    r"out of memory|(?:failed|unable) to allocate \S+ buffer|failed to allocate buffer|insufficient memory"
    r"|OutOf(?:Device|Host)Memory"
)


class Refusal(NamedTuple):
    """Why something was refused.

    Attributes:
        reason: For people.
        code: ``out_of_memory``, or the code that its caller has for anything else.
    """

    reason: str
    code: str

    def remedy(self, settings: str) -> str:
        """Return the end of a message that names the settings to change; empty unless memory was short."""
        return f"; set {settings}" if self.code == OUT_OF_MEMORY else ""


def refusal(otherwise: str) -> Refusal:
    """Return why the call refused that was made since :func:`llama_log.forget_log`; ``otherwise`` is the code that it
    has if memory was not short.
    """
    short = any(map(_SHORTAGE.search, llama_log.all_error_lines()))
    return Refusal(llama_log.error_lines() or "llama.cpp gave no reason", OUT_OF_MEMORY if short else otherwise)
