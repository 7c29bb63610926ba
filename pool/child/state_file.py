"""Files of saved sequences: written whole or not at all, and read only if every byte is as it was written.

::

    8 bytes   magic
    4 bytes   length of the header, little-endian
    header    JSON, see :class:`Header`
    tokens    int32, little-endian
    state     the bytes of llama.cpp
    32 bytes  BLAKE2b of all that comes before

llama.cpp checks sizes and types of a state but not its values, and aborts the process for some of them. So a file must
be whole, and of the same model and the same settings, before llama.cpp gets to see it.
"""

import contextlib
import os
import secrets
import stat
from array import array
from hashlib import blake2b
from pathlib import Path
from typing import BinaryIO, Final

import msgspec
import numpy as np
import numpy.typing as npt

from llamaherd.pool.child.engine import RequestError

__all__ = ["Header", "fingerprint", "read_state", "valid_name", "write_state"]

_MAGIC: Final = b"llamaKV\x01"
_DIGEST: Final = 32
_MOST_HEADER: Final = 65536
#: Longest name in bytes; that of the temporary file is longer.
_MOST_NAME: Final = 200
#: Parts of a model file that stand for the whole.
_SAMPLES: Final = 64
_SAMPLE_BYTES: Final = 4096


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """What a state belongs to.

    Attributes:
        model: The fingerprint of the model's file.
        settings: What else the numbers depend on, such as the cache's types.
        adapters: Fingerprint and scale of each LoRA adapter.
    """

    model: str
    settings: str
    adapters: tuple[tuple[str, float], ...] = ()
    n_tokens: int
    n_bytes: int


def valid_name(name: str) -> bool:
    """Whether a file may be called that: printable, no path, not hidden, at most 200 bytes."""
    return (
        0 < len(name.encode("utf-8", "replace")) <= _MOST_NAME
        and name.isprintable()
        and not name.startswith(".")
        and not set(name) & set('/\\:*?"<>|')
    )


def fingerprint(path: str) -> str:
    """Return what tells a file from others, from its size and some parts of it. Raises OSError."""
    digest = blake2b(digest_size=16)
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        digest.update(size.to_bytes(8, "little"))
        for index in range(_SAMPLES):
            file.seek(size * index // _SAMPLES)
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def write_state(folder: Path, name: str, header: Header, tokens: "array[int]", data: npt.NDArray[np.uint8]) -> int:
    """Write a file and return its size. It appears under its name when it is complete.

    Raises:
        RequestError: it cannot be written, with the reason, or would take the place of another model's; nothing is left
            of it.
    """
    if (other := _model_of(folder / name)) is not None and other != header.model:
        raise RequestError(
            f"{name!r} holds a slot of another model, which saving would destroy: choose another name",
            code="slot_file_of_another_model",
        )
    temporary = folder / f".{name}.{secrets.token_hex(4)}.tmp"
    encoded = msgspec.json.encode(header)
    parts = (_MAGIC, len(encoded).to_bytes(4, "little"), encoded, np.array(tokens, "<i4").data.cast("B"), data.data)
    digest = blake2b(digest_size=_DIGEST)
    try:
        with open(temporary, "xb", opener=_private) as file:
            for part in parts:
                digest.update(part)
                file.write(part)
            file.write(digest.digest())
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
        os.replace(temporary, folder / name)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise RequestError(f"{name!r} cannot be saved: {error.strerror}", code="slot_file_unwritable") from error
    return size


def _model_of(path: Path) -> str | None:
    """Return the fingerprint of the model whose state a file holds; None if there is none that can be read."""
    try:
        with open(path, "rb", opener=_plain) as file:
            if file.read(len(_MAGIC)) != _MAGIC:
                return None
            length = int.from_bytes(file.read(4), "little")
            return msgspec.json.decode(file.read(min(length, _MOST_HEADER)), type=Header).model
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _plain(path: str, flags: int) -> int:
    # Neither a link out of the folder, nor a pipe that nobody writes to.
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)


def read_state(folder: Path, name: str, *, most_tokens: int) -> tuple[Header, "array[int]", npt.NDArray[np.uint8], int]:
    """Return header, tokens and state of a file, and its size.

    Raises:
        RequestError: there is no such file, or it is not whole, with the reason.
    """
    try:
        with open(folder / name, "rb", opener=_plain) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise _damaged(name, "it is no regular file")
            return _read(file, name, status.st_size, most_tokens)
    except FileNotFoundError:
        raise RequestError(f"there is no saved slot called {name!r}", code="slot_file_not_found") from None
    except OSError as error:
        raise RequestError(f"{name!r} cannot be read: {error.strerror}", code="slot_file_unreadable") from error


def _read(
    file: BinaryIO, name: str, size: int, most_tokens: int
) -> tuple[Header, "array[int]", npt.NDArray[np.uint8], int]:
    digest = blake2b(digest_size=_DIGEST)

    def take(count: int) -> bytes:
        part = file.read(count)
        if len(part) != count:
            raise _damaged(name, "it ends too early")
        digest.update(part)
        return part

    if take(len(_MAGIC)) != _MAGIC:
        raise _damaged(name, "it was not saved by this program")
    length = int.from_bytes(take(4), "little")
    if length > _MOST_HEADER:
        raise _damaged(name, "its header is too long")
    try:
        header = msgspec.json.decode(take(length), type=Header)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _damaged(name, f"its header is wrong: {error}") from None
    if not 0 < header.n_tokens <= most_tokens:
        raise RequestError(
            f"{name!r} has {header.n_tokens} tokens and does not fit the context of {most_tokens}",
            code="slot_file_too_long",
        )
    whole = len(_MAGIC) + 4 + length + 4 * header.n_tokens + header.n_bytes + _DIGEST
    if header.n_bytes < 0 or size != whole:
        raise _damaged(name, f"it has {size} bytes instead of {whole}")
    tokens = array("i", np.frombuffer(take(4 * header.n_tokens), "<i4").tolist())
    data = np.frombuffer(take(header.n_bytes), np.uint8)
    expected = digest.digest()
    if file.read(_DIGEST) != expected:
        raise _damaged(name, "its checksum is wrong")
    return header, tokens, data, size


def _damaged(name: str, reason: str) -> RequestError:
    return RequestError(f"{name!r} is not a saved slot that can be used: {reason}", code="slot_file_invalid")
