"""Files of addresses on this machine: of which address each of them is. Asked on both sides of the process boundary.

Two addresses may end in the same name, and so mean the same file of llama.cpp's cache. Beside each file that is
downloaded by its address lies a record of that address and of the file's length. A file without a record that fits it
was put there by somebody else, and is taken as it is.
"""

import os
from contextlib import suppress
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

__all__ = ["bare_address", "is_other", "note_address", "record_of"]

#: Longest record that is read, in bytes.
_MAX_RECORD: Final = 64 * 1024


def bare_address(url: str) -> str:
    """Return what of an address says which file it is: without user, password, query and fragment, which may be
    secrets, and signatures that are new each time.
    """
    parts = urlsplit(url)
    return parts._replace(query="", fragment="", netloc=parts.netloc.rpartition("@")[2]).geturl()


def record_of(file: Path) -> Path:
    """Return where the record of a file lies."""
    return file.with_name(f"{file.name}.url")


def is_other(file: Path, url: str) -> bool:
    """Whether a file that is there was downloaded from another address. Raises OSError if that cannot be read."""
    try:
        with record_of(file).open("rb") as record:
            length, _, address = record.read(_MAX_RECORD).decode(errors="replace").strip().partition(" ")
        size = file.stat().st_size
    except FileNotFoundError:
        return False
    return length == str(size) and address != bare_address(url)


def note_address(file: Path, url: str) -> None:
    """Note that a file is of that address. The file must be there already: a record that is older than its file, or
    none, costs a download at most.
    """
    record = record_of(file)
    temporary = record.with_name(f".{record.name}.{os.getpid()}")
    with suppress(FileNotFoundError):
        temporary.unlink()
    temporary.write_text(f"{file.stat().st_size} {bare_address(url)}\n", encoding="utf-8")
    os.replace(temporary, record)
