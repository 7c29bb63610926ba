"""What a person sees in the terminal: text that cannot drive it, and lines about the command itself."""

import contextlib
import logging
import os
import sys
from typing import Final

__all__ = ["log_to_stderr", "one_line", "printable", "report", "restore"]

#: Each control character shown as its picture; those without one, and the marks that reorder text, as U+FFFD.
_PICTURES: Final = {
    **{code: 0x2400 + code for code in range(0x20)},
    0x7F: 0x2421,
    **dict.fromkeys([*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)], 0xFFFD),
}
_KEPT: Final = {ord("\n"), ord("\t")}
_TEXT: Final = {code: shown for code, shown in _PICTURES.items() if code not in _KEPT}


def printable(text: str) -> str:
    """Return text that cannot drive a terminal: line ends and tabs stay, other control characters become visible."""
    return text.translate(_TEXT)


def one_line(text: str) -> str:
    """Return text as one line, without anything that could drive a terminal."""
    return " ".join(text.split()).translate(_PICTURES)


def report(kind: str, text: str) -> None:
    """Write one line about the command itself to standard error. ``kind`` is ``error`` or ``warning``."""
    with contextlib.suppress(OSError):
        print(f"llamaherd: {kind}: {one_line(text)}", file=sys.stderr, flush=True)


def restore() -> None:
    """Show the cursor again, which a progress bar that was cut off has left hidden."""
    with contextlib.suppress(OSError):
        if sys.stderr.isatty():
            os.write(sys.stderr.fileno(), b"\x1b[?25h")


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def log_to_stderr() -> None:
    """Write the program's log to standard error: its own notes from INFO on, those of others from WARNING on."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("llamaherd").setLevel(logging.INFO)
