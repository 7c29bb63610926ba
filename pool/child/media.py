"""Images and sounds in chat messages: from content parts to the bytes of files, checked before anything decodes them.

Files come from anyone, and C code will decode them. So only formats whose headers are read here are taken, what they
would become in memory is bounded before that, and nothing is fetched: an address in a message would let its sender
reach whatever this machine can reach.
"""

import base64
import binascii
import struct
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal, NamedTuple, cast

from llamaherd.pool.child.engine import RequestError

__all__ = ["Media", "check_file", "has_media", "take_media"]

MOST_MEDIA: Final = 32
MOST_BYTES: Final = 32 * 1024 * 1024
#: Pixels of one image and of all of a request: three bytes each, while they are prepared.
MOST_PIXELS: Final = 64_000_000
MOST_PIXELS_TOGETHER: Final = 128_000_000
#: Longer side by shorter side. Some models divide by what is left of the shorter one.
MOST_STRETCH: Final = 200
#: Of one sound. The frames of an MP3 grow by a factor of 64 at most, so its size bounds it.
MOST_SECONDS: Final = 1800
MOST_MP3_BYTES: Final = 16 * 1024 * 1024
_SAMPLE_RATES: Final = (4000, 384_000)
_MOST_CHANNELS: Final = 16
#: WAV's numbers for integers, floating point, and what is said further on.
_PLAIN_SAMPLES: Final = (1, 3)
_EXTENSIBLE: Final = 0xFFFE
#: Samples of an MP3 frame, and per second, at most.
_MP3_FRAME: Final = 1152
_MP3_RATE: Final = 48_000
_PIECE: Final = 1024 * 1024

#: From the alphabet of base64 that URLs have to the usual one.
_TO_STANDARD: Final = str.maketrans("-_", "+/")
_PNG: Final = b"\x89PNG\r\n\x1a\n"


class Media(NamedTuple):
    """One file."""

    kind: Literal["image", "audio"]
    data: bytes


def has_media(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether some content part is an image or a sound."""
    return any(_is_media(part) for message in messages for part in _parts(message))


def take_media(
    messages: Sequence[Mapping[str, Any]], marker: str
) -> tuple[tuple[Mapping[str, Any], ...], tuple[Media, ...]]:
    """Return the messages with a text part ``marker`` in the place of each image and sound, and these in their order.

    Raises:
        RequestError: a part is damaged, too large, of a kind that is not taken, or an address instead of a file; or
            there are too many.
    """
    found: list[Media] = []
    plain: list[Mapping[str, Any]] = []
    pixels = 0
    for message in messages:
        parts: list[object] = []
        for part in _parts(message):
            if not _is_media(part):
                parts.append(part)
                continue
            if len(found) == MOST_MEDIA:
                raise _refusal(f"there are more than {MOST_MEDIA} images and sounds")
            media = _media_of(cast("Mapping[str, Any]", part))
            pixels += check_file(media)
            if pixels > MOST_PIXELS_TOGETHER:
                raise _refusal(f"the images have more than {MOST_PIXELS_TOGETHER} pixels together")
            found.append(media)
            parts.append({"type": "text", "text": marker})
        plain.append({**message, "content": parts} if parts else message)
    return tuple(plain), tuple(found)


def _parts(message: Mapping[str, Any]) -> list[object]:
    content = message.get("content")
    return cast("list[object]", content) if isinstance(content, list) else []


def _is_media(part: object) -> bool:
    return isinstance(part, Mapping) and cast("Mapping[str, Any]", part).get("type") in ("image_url", "input_audio")


def _refusal(reason: str, code: str = "invalid_media") -> RequestError:
    return RequestError(reason, code=code)


def _media_of(part: Mapping[str, Any]) -> Media:
    kind = part["type"]
    value: object = part.get(kind)
    fields = ("url",) if kind == "image_url" else ("data", "url")
    text = value  # some clients give the file itself
    if isinstance(value, Mapping):
        given = cast("Mapping[str, Any]", value)
        text = next((given[field] for field in fields if given.get(field) is not None), None)
    if not isinstance(text, str) or not text:
        raise _refusal(f"{kind} must have a text {fields[0]!r}")
    return Media("image" if kind == "image_url" else "audio", _decode(text, kind))


def _decode(text: str, kind: str) -> bytes:
    told = text[:5].lower() == "data:"
    if told:
        head, comma, text = text.partition(",")
        if not comma or not head.lower().endswith(";base64"):
            raise _refusal(f"{kind}: a data URL must be base64 (data:image/png;base64,...)")
    if len(text) > MOST_BYTES * 4 // 3 + 4:
        raise _refusal(f"{kind} has more than {MOST_BYTES} bytes")
    plain = "".join(text.split()).translate(_TO_STANDARD)
    try:
        return base64.b64decode(plain + "=" * (-len(plain) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        if kind == "image_url" and not told:
            raise _refusal(
                "image_url must be a data URL (data:image/png;base64,...): nothing is fetched from an address",
                code="media_address",
            ) from None
        raise _refusal(f"{kind} is not valid base64: {error}") from None


# --- what files say of themselves ---


def check_file(media: Media) -> int:
    """Return the pixels of an image, 0 for a sound.

    Raises:
        RequestError: the file is of no format that is taken, is too large, or would grow beyond the bounds.
    """
    if media.kind == "audio":
        _check_sound(media.data)
        return 0
    size = _size_of(media.data)
    if size is None:
        raise _refusal("an image is in no format that is taken here: PNG, JPEG, GIF and BMP are", code="media_format")
    width, height = size
    if width < 1 or height < 1:
        raise _refusal("an image has no pixels")
    if width * height > MOST_PIXELS:
        raise _refusal(f"an image of {width} x {height} pixels has more than {MOST_PIXELS}")
    if max(size) > MOST_STRETCH * min(size):
        raise _refusal(f"an image of {width} x {height} pixels is too narrow")
    if media.data.startswith(_PNG):
        _check_growth(media.data, width, height)
    return width * height


def _size_of(data: bytes) -> tuple[int, int] | None:
    """Return width and height of an image; None if its format is not taken or its header is damaged."""
    try:
        if data.startswith(_PNG) and data[12:16] == b"IHDR":
            return struct.unpack_from(">II", data, 16)
        if data[:6] in (b"GIF87a", b"GIF89a"):
            return struct.unpack_from("<HH", data, 6)
        if data[:2] == b"BM":
            return _bmp_size(data)
        if data[:3] == b"\xff\xd8\xff":
            return _jpeg_size(data)
    except struct.error:
        pass
    return None


def _bmp_size(data: bytes) -> tuple[int, int] | None:
    (header,) = struct.unpack_from("<I", data, 14)
    if header == 12:
        return struct.unpack_from("<HH", data, 18)
    if header not in (40, 56, 108, 124):
        return None
    width, height = struct.unpack_from("<ii", data, 18)
    return width, abs(height)


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Return the size in the first frame header, which is where decoders look for it."""
    place = 2
    while place + 4 <= len(data):
        if data[place] != 0xFF:
            return None
        marker = data[place + 1]
        if marker == 0xFF:
            place += 1
            continue
        (length,) = struct.unpack_from(">H", data, place + 2)
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack_from(">HH", data, place + 5)
            return width, height
        if length < 2:
            return None
        place += 2 + length
    return None


def _check_growth(data: bytes, width: int, height: int) -> None:
    """Raise RequestError for a PNG whose compressed data are much larger than its picture: decoders unpack them all."""
    most = (width * 8 + 1) * height * 2 + _PIECE
    unpack, grown = zlib.decompressobj(), 0
    try:
        for piece in _png_data(data):
            while piece and not unpack.eof:
                grown += len(unpack.decompress(piece, _PIECE))
                piece = unpack.unconsumed_tail
                if grown > most:
                    raise _refusal(f"an image of {width} x {height} pixels unpacks to far more than these")
    except zlib.error:
        raise _refusal("an image is damaged") from None


def _png_data(data: bytes) -> Sequence[bytes]:
    pieces: list[bytes] = []
    place = len(_PNG)
    while place + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, place)
        if kind == b"IDAT":
            pieces.append(data[place + 8 : place + 8 + length])
        place += 12 + length
    return pieces


def _check_sound(data: bytes) -> None:
    if data[:4] == b"RIFF" and data[8:12] == b"WAVE":
        _check_wave(data)
        return
    start = _after_tags(data)
    if len(data) < start + 4 or data[start] != 0xFF or data[start + 1] & 0xE0 != 0xE0:
        raise _refusal("a sound is in no format that is taken here: WAV and MP3 are", code="media_format")
    if len(data) > MOST_MP3_BYTES:
        raise _refusal(f"an MP3 file has more than {MOST_MP3_BYTES} bytes")
    _check_claims(data)


def _after_tags(data: bytes) -> int:
    """Return where a file goes on after its ID3 tags. Behind them other formats could hide."""
    place = 0
    while data[place : place + 3] == b"ID3" and len(data) >= place + 10:
        size = 0
        for byte in data[place + 6 : place + 10]:
            size = size << 7 | byte & 0x7F
        footer = 10 if data[place + 5] & 0x10 else 0
        place += 10 + size + footer
    return place


def _check_claims(data: bytes) -> None:
    """Raise RequestError for an MP3 that says that it has more frames than is allowed: decoders reserve memory for what
    it says, wherever they find it.
    """
    for word in (b"Xing", b"Info"):
        place = data.find(word)
        while place >= 0:
            tag = data[place : place + 12]
            if len(tag) == 12 and tag[7] & 1 and int.from_bytes(tag[8:]) * _MP3_FRAME > MOST_SECONDS * _MP3_RATE:
                raise _refusal(f"an MP3 file says that it lasts longer than {MOST_SECONDS} seconds")
            place = data.find(word, place + 1)


def _check_wave(data: bytes) -> None:
    place = 12
    while place + 8 <= len(data):
        kind, length = struct.unpack_from("<4sI", data, place)
        if kind == b"data":
            break
        if kind == b"fmt " and length >= 16 and place + 24 <= len(data):
            _check_layout(data, place + 8, length)
            return
        place += 8 + length + (length & 1)
    raise _refusal("a WAV file does not say what its samples are")


def _check_layout(data: bytes, place: int, length: int) -> None:
    """Raise RequestError unless samples are plain numbers, of which no more come than bytes are there."""
    kind, channels, rate, _, block, bits = struct.unpack_from("<HHIIHH", data, place)
    if kind == _EXTENSIBLE and length >= 26 and place + 26 <= len(data):
        (kind,) = struct.unpack_from("<H", data, place + 24)
    if kind not in _PLAIN_SAMPLES:
        raise _refusal("a WAV file is compressed; PCM and floating point are taken", code="media_format")
    low, high = _SAMPLE_RATES
    if not low <= rate <= high or not 1 <= channels <= _MOST_CHANNELS or bits < 8 or block < channels:
        raise _refusal("a WAV file has an impossible sample rate, number of channels or sample size")
    if len(data) > MOST_SECONDS * rate * block:
        raise _refusal(f"a WAV file lasts longer than {MOST_SECONDS} seconds")
