"""A request's body: read within a limit, and parsed to JSON that everything behind it can carry."""

import asyncio
from typing import Any, Final, cast

import msgspec
from starlette.requests import Request

from llamaherd.http.problems import INVALID_REQUEST, Kind, Problem

__all__ = ["MAX_CONTAINERS", "MAX_DEPTH", "read_bytes", "read_json", "read_json_list"]

#: Deepest nesting of objects and lists in a body. Far more than any chat, far less than a decoder's recursion limit.
MAX_DEPTH: Final = 100

#: Most objects and lists in a body. 64 MiB of empty lists took 4.7 s to decode, 1.9 s to check and 1.8 GB of memory; no
#: stream of the server got a token meanwhile. Brackets in texts count, and no prompt has so many.
MAX_CONTAINERS: Final = 2_000_000

_TOO_LARGE: Final = Kind(413, INVALID_REQUEST.type)
_TOO_SLOW: Final = Kind(408, INVALID_REQUEST.type)
_CODED: Final = Kind(415, INVALID_REQUEST.type)
_CLOSE: Final = {"Connection": "close"}
#: Some Windows programs begin a text with it; JSON allows to pass it over.
_BYTE_ORDER_MARK: Final = b"\xef\xbb\xbf"
_decoder: Final = msgspec.json.Decoder()


async def read_json(request: Request, limit: int, *, patience: float) -> dict[str, Any]:
    """Return the body as an object.

    Args:
        limit: Most bytes to take.
        patience: Seconds to wait for its next part.

    Raises:
        Problem: 413 if the body is larger than that; 408 if it stays away; 415 if it is compressed; 400 if it is no
            JSON object, nested deeper than :data:`MAX_DEPTH`, or has more than :data:`MAX_CONTAINERS` objects and
            lists.
        ClientDisconnect: the client left before the end of the body.
    """
    value = await _read_value(request, limit, patience, "object")
    if not isinstance(value, dict):
        raise Problem(INVALID_REQUEST, "the request body must be a JSON object")
    return cast("dict[str, Any]", value)


async def read_json_list(request: Request, limit: int, *, patience: float) -> list[object]:
    """Return the body as a list. Otherwise as :func:`read_json`."""
    value = await _read_value(request, limit, patience, "array")
    if not isinstance(value, list):
        raise Problem(INVALID_REQUEST, "the request body must be a JSON array")
    return cast("list[object]", value)


async def _read_value(request: Request, limit: int, patience: float, expected: str) -> object:
    raw = (await read_bytes(request, limit, patience=patience)).removeprefix(_BYTE_ORDER_MARK)
    if not raw:
        raise Problem(INVALID_REQUEST, f"the request body is empty, a JSON {expected} is expected")
    containers = raw.count(b"[") + raw.count(b"{")
    if containers > MAX_CONTAINERS:
        raise Problem(INVALID_REQUEST, f"the request body has more than {MAX_CONTAINERS:,} objects and lists")
    try:
        value: object = _decoder.decode(raw)
    except RecursionError:
        raise _too_deep() from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Problem(INVALID_REQUEST, f"the request body is not valid JSON: {error}") from None
    if containers > MAX_DEPTH:
        _check_depth(value)
    return value


async def read_bytes(request: Request, limit: int, *, patience: float) -> bytes:
    """Return the body as it is. Otherwise as :func:`read_json`."""
    coding = request.headers.get("content-encoding", "identity").strip().lower()
    if coding != "identity":
        raise Problem(
            _CODED, f"a body with Content-Encoding {coding[:50]!r} is not taken; send it as it is", headers=_CLOSE
        )
    announced = request.headers.get("content-length", "")
    if announced.isascii() and announced.isdigit() and int(announced[:20]) > limit:
        raise _too_large(limit)
    received = bytearray()
    stream = request.stream()
    while True:
        try:
            async with asyncio.timeout(patience):
                chunk = await anext(stream)
        except StopAsyncIteration:
            return bytes(received)
        except TimeoutError:
            raise Problem(
                _TOO_SLOW, f"nothing of the request body came for {patience:g} seconds", headers=_CLOSE
            ) from None
        received += chunk
        if len(received) > limit:
            raise _too_large(limit)


def _too_large(limit: int) -> Problem:
    # Closing spares both sides the rest of the upload.
    return Problem(_TOO_LARGE, f"the request body is over the limit of {limit} bytes", headers=_CLOSE)


def _too_deep() -> Problem:
    return Problem(INVALID_REQUEST, f"the request body is nested deeper than {MAX_DEPTH} levels")


def _check_depth(body: object) -> None:
    level: list[Any] = [body] if isinstance(body, dict | list) else []
    for _ in range(MAX_DEPTH):
        level = [
            child
            for value in level
            for child in (cast("dict[str, Any]", value).values() if type(value) is dict else value)
            if type(child) is dict or type(child) is list
        ]
        if not level:
            return
    raise _too_deep()
