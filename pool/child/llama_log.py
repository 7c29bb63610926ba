"""What llama.cpp says: its log lines, passed on to the model's log and kept as evidence."""

import contextlib
import os
from collections import deque
from typing import Any, Final

from llamaherd.pool.child.llama_library import LOW

__all__ = [
    "all_error_lines",
    "error_lines",
    "forget_errors",
    "forget_log",
    "info_lines",
    "log_callback",
    "quieten",
    "to_stderr",
]

_DEBUG, _INFO, _ERROR, _CONTINUED = 1, 2, 4, 5
_KEPT_LINES: Final = 40
#: Longest stored line; llama.cpp quotes parts of damaged files.
_LINE_LIMIT: Final = 500
_errors: Final[deque[str]] = deque(maxlen=_KEPT_LINES)
_infos: Final[deque[str]] = deque(maxlen=400)
_last_level = _INFO
_quiet = False


def to_stderr(text: bytes) -> None:
    """Write to the model's log."""
    # Past Python's buffers, and past a parent that has gone.
    with contextlib.suppress(OSError):
        os.write(2, text)


@LOW.llama_log_callback  # type: ignore[untyped-decorator]
def _on_log(level: int, text: bytes, _data: object) -> None:
    """Forward a line to stderr, which the parent collects; keep the errors as evidence. Runs on any native thread."""
    global _last_level
    if level == _CONTINUED:
        level = _last_level
    else:
        _last_level = level
    if level == _DEBUG or (_quiet and level == _INFO):
        return
    to_stderr(text)
    line = text[:_LINE_LIMIT].decode("utf-8", "replace").strip()
    if line:
        (_errors if level == _ERROR else _infos).append(line)


def log_callback() -> Any:
    """Return the function that takes log lines, for libraries that have a setter of their own."""
    return _on_log


def forget_log() -> None:
    """Forget the log lines kept so far, so that the next ones belong to the call that follows."""
    _errors.clear()
    _infos.clear()


def forget_errors() -> None:
    """Forget the ERROR lines only: what was said of the load is still asked for after the first batch."""
    _errors.clear()


def quieten(quiet: bool) -> None:
    """Drop INFO lines, or show them again. A loaded model prints some at every change of adapters."""
    global _quiet
    _quiet = quiet


def error_lines(most: int = 5) -> str:
    """Return the last ERROR lines, joined, since :func:`forget_log` or :func:`forget_errors`; empty when there was
    none.
    """
    return "; ".join(list(_errors)[-most:])


def all_error_lines() -> tuple[str, ...]:
    """Return the ERROR lines since :func:`forget_log`, the newest 40 at most."""
    return tuple(_errors)


def info_lines() -> tuple[str, ...]:
    """Return the INFO and WARN lines since :func:`forget_log`, the newest 400 at most."""
    return tuple(_infos)
