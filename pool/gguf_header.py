"""A bounded reader of GGUF headers: the metadata and the tensors' shapes, without any weights.

A GGUF file is untrusted input. Every count and length in it is a claim, and nothing here is allocated, looped over or
believed because of one: what is read grows with the bytes that the file really has, up to :data:`MAX_HEADER_BYTES`, and
anything else is a :class:`GGUFError`. Large tables, such as a tokenizer's, are walked over and only counted.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import os
import stat
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Final, TypeAlias

import msgspec

from llamaherd.pool.errors import LoadFailed

__all__ = ["Array", "GGUFError", "Header", "Value", "read_header"]

MAX_HEADER_BYTES: Final = 64 * 1024 * 1024
#: The longest text that is kept; a chat template has some thousand characters.
MAX_TEXT_BYTES: Final = 1024 * 1024
#: The longest array whose values are kept: one per layer, and llama.cpp has at most 512.
MAX_KEPT_VALUES: Final = 1024
MAX_KEYS: Final = 65_536
MAX_KEY_BYTES: Final = 65_535
MAX_TENSORS: Final = 131_072
#: Texts walked over in all arrays together; the largest vocabularies have some 300,000, and as many merges.
MAX_TABLE_TEXTS: Final = 2_000_000
MAX_DIMENSIONS: Final = 4
_INT64_MAX: Final = 2**63 - 1
_FIRST_READ_BYTES: Final = 256 * 1024
_STRING: Final = 8
_ARRAY: Final = 9
#: GGUF's value types of a fixed size, as struct knows them.
_SCALARS: Final = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


class GGUFError(LoadFailed):
    """A file is no sound GGUF file, or cannot be read. The model's fault; the text says what was found where."""


class Array(msgspec.Struct, frozen=True):
    """An array of the metadata.

    Attributes:
        length: How many values it has.
        values: The values of a short array of numbers; empty for a long one, or one of texts.
    """

    length: int
    values: tuple[int | float | bool, ...] = ()


Value: TypeAlias = int | float | bool | str | Array


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """What a file says of itself.

    Attributes:
        version: 2 or 3.
        keys: The metadata. A text of more than 1 MiB is left out.
        n_tensors: Tensors in this file.
        n_elements: Their elements.
        file_bytes: The file's size.
    """

    version: int
    keys: Mapping[str, Value]
    n_tensors: int
    n_elements: int
    file_bytes: int


def read_header(path: Path) -> Header:
    """Return a file's header.

    Raises:
        GGUFError: there is no such file, it cannot be read, or it is no sound GGUF file of version 2 or 3.
    """
    try:
        # A FIFO would otherwise keep the caller waiting for someone to write into it.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from None
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise GGUFError(f"{path} is no regular file", code="bad_gguf")
        return _Reader(path, fd, status.st_size).header()
    except OSError as error:
        raise _unreadable(path, error) from None
    finally:
        os.close(fd)


def _unreadable(path: Path, error: OSError | ValueError) -> GGUFError:
    reason = error.strerror if isinstance(error, OSError) else error
    return GGUFError(f"{ascii(str(path))} cannot be read: {reason}", code="bad_gguf")


class _Reader:
    """Reads one file from its start; :attr:`_at` is the next byte to look at."""

    def __init__(self, path: Path, fd: int, size: int) -> None:
        self._path = path
        self._fd = fd
        self._size = size
        self._data = bytearray()
        self._at = 0
        self._table_texts = 0
        self._order = "<"

    def header(self) -> Header:
        version = self._start()
        n_tensors, n_keys = self._number("Q"), self._number("Q")
        for claimed, most, what in ((n_tensors, MAX_TENSORS, "tensors"), (n_keys, MAX_KEYS, "keys")):
            if claimed > most:
                raise self._error(f"claims {claimed} {what}, and at most {most} are read")
        keys: dict[str, Value] = {}
        for _ in range(n_keys):
            self._key(keys)
        n_elements = last = 0
        for _ in range(n_tensors):
            elements, offset = self._tensor()
            n_elements, last = n_elements + elements, max(last, offset)
        if last > self._size - self._at:
            raise self._error(f"has {self._size} bytes, and a tensor that starts after them: it is cut short")
        return Header(version=version, keys=keys, n_tensors=n_tensors, n_elements=n_elements, file_bytes=self._size)

    def _start(self) -> int:
        magic = self._bytes(4) if self._size >= 4 else b""
        if magic != b"GGUF":
            raise self._error(f"is not a GGUF file: it starts with {magic!r}" if magic else "is not a GGUF file")
        version = self._number("I")
        if version & 0xFFFF == 0:  # another byte order than this one
            self._order = ">"
            (version,) = struct.unpack(">I", struct.pack("<I", version))
        if version not in (2, 3):
            raise self._error(f"is a GGUF file of version {version}, and only 2 and 3 are read")
        return version

    def _key(self, keys: dict[str, Value]) -> None:
        length = self._length(MAX_KEY_BYTES, "a key")
        key = self._bytes(length).decode(errors="replace")
        if not key or key in keys:
            raise self._error(f"has the key {key[:64]!r} twice" if key else "has a key without a name")
        kind = self._number("I")
        if kind == _ARRAY:
            keys[key] = self._array(key)
        elif kind == _STRING:
            text = self._text()
            if text is not None:
                keys[key] = text
        else:
            keys[key] = self._scalar(self._format(kind, key))

    def _array(self, key: str) -> Array:
        kind, count = self._number("I"), self._number("Q")
        if kind == _STRING:
            self._skip_texts(count, key)
            return Array(count)
        one = self._format(kind, key)
        total = count * struct.calcsize(one)
        if count > MAX_KEPT_VALUES:
            self._skip(total)
            return Array(count)
        return Array(count, tuple(struct.unpack(f"{self._order}{count}{one}", self._bytes(total))))

    def _format(self, kind: int, key: str) -> str:
        one = _SCALARS.get(kind)
        if one is None:  # arrays of arrays are among these: llama.cpp reads none either
            raise self._error(f"has a value of unknown type {kind} for the key {key[:64]!r}")
        return one

    def _skip_texts(self, count: int, key: str) -> None:
        self._table_texts += count
        if self._table_texts > MAX_TABLE_TEXTS or count * 8 > self._size - self._at:
            raise self._error(f"claims {count} texts for the key {key[:64]!r}")
        unpack = struct.Struct(f"{self._order}Q").unpack_from
        at, there = self._at, len(self._data)
        for _ in range(count):
            if at + 8 > there:
                self._at = at
                self._need(8)
                there = len(self._data)
            at += 8 + unpack(self._data, at)[0]
        self._at = at
        self._need(0)

    def _text(self) -> str | None:
        length = self._number("Q")
        if length > MAX_TEXT_BYTES:
            self._skip(length)
            return None
        return self._bytes(length).decode(errors="replace")

    def _tensor(self) -> tuple[int, int]:
        """Return a tensor's number of elements, and where its data starts, counted from the end of the header."""
        self._skip(self._length(MAX_KEY_BYTES, "a tensor's name"))
        dimensions = self._number("I")
        if dimensions > MAX_DIMENSIONS:
            raise self._error(f"has a tensor of {dimensions} dimensions, and at most {MAX_DIMENSIONS} are known")
        elements = math.prod(self._number("Q") for _ in range(dimensions))
        if elements > _INT64_MAX:
            raise self._error("has a tensor with more elements than can be counted")
        self._number("I")
        return elements, self._number("Q")

    # --- bytes ---

    def _length(self, most: int, what: str) -> int:
        length = self._number("Q")
        if length > most:
            raise self._error(f"claims {length} bytes for {what}, and at most {most} are read")
        return length

    def _scalar(self, one: str) -> int | float | bool:
        value: int | float | bool = struct.unpack(self._order + one, self._bytes(struct.calcsize(one)))[0]
        return value

    def _number(self, one: str) -> int:
        return int(self._scalar(one))

    def _bytes(self, count: int) -> bytes:
        self._need(count)
        at, self._at = self._at, self._at + count
        return bytes(self._data[at : self._at])

    def _skip(self, count: int) -> None:
        if self._at + count > len(self._data):
            self._need(count)
        self._at += count

    def _need(self, count: int) -> None:
        """Have ``count`` more bytes, or raise."""
        end = self._at + count
        if end > self._size:
            raise self._error(f"has {self._size} bytes, and a header that goes on for at least {end}: it is cut short")
        if end > MAX_HEADER_BYTES:
            raise self._error(f"has a header of more than {MAX_HEADER_BYTES} bytes")
        wanted = min(max(end, 2 * len(self._data), _FIRST_READ_BYTES), MAX_HEADER_BYTES)
        while len(self._data) < end:
            data = os.read(self._fd, wanted - len(self._data))
            if not data:
                raise self._error("became shorter while it was read")
            self._data += data

    def _error(self, what: str) -> GGUFError:
        return GGUFError(f"{self._path} {what} (at byte {self._at})", code="bad_gguf")
