"""Pictures and sounds made on the spot."""

import base64
import struct
import zlib
from typing import Any

__all__ = ["BLUE", "RED", "data_url", "image_part", "png", "wave"]

Colour = tuple[int, int, int]


def png(colour: Colour, width: int = 40, height: int = 20, *, claimed: tuple[int, int] | None = None) -> bytes:
    """Return a PNG of one colour; ``claimed`` is what its header says instead of its size."""
    rows = (b"\0" + bytes(colour) * width) * height
    header = struct.pack(">IIBBBBB", *(claimed or (width, height)), 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def chunk(kind: bytes, data: bytes) -> bytes:
    """Return one chunk of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def wave(
    samples: int = 1600, rate: int = 16_000, channels: int = 1, *, kind: int = 1, tone: int = 0, more: bytes = b""
) -> bytes:
    """Return a WAV file: silence, or with ``tone`` steps that come so many times a second. ``more`` ends its layout."""
    period = max(1, rate // tone) if tone else 1
    level = [8000 if tone and index % period < period // 2 else 0 for index in range(samples)]
    data = b"".join(struct.pack("<h", one) * channels for one in level)
    layout = struct.pack("<HHIIHH", kind, channels, rate, rate * 2 * channels, 2 * channels, 16) + more
    body = b"WAVEfmt " + struct.pack("<I", len(layout)) + layout + b"data" + struct.pack("<I", len(data)) + data
    return b"RIFF" + struct.pack("<I", len(body)) + body


def data_url(data: bytes, kind: str = "image/png") -> str:
    """Return a file as a data URL."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def image_part(data: bytes) -> dict[str, Any]:
    """Return OpenAI's content part for an image."""
    return {"type": "image_url", "image_url": {"url": data_url(data)}}


RED = png((255, 0, 0))
BLUE = png((0, 0, 255))
