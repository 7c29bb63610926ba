"""What a registry wants of whoever asks: the header ``WWW-Authenticate`` (RFC 9110, section 11.6.1), of which only the
scheme ``Bearer`` of the registries' token flow is understood.
"""

import re
from typing import Final

import msgspec

__all__ = ["BearerChallenge", "parse_challenge"]

_BEARER: Final = re.compile(r"bearer[ ]+", re.IGNORECASE | re.ASCII)
_PARAMETER: Final = re.compile(
    r'[ ,]*(?P<name>[A-Za-z_]{1,32})[ ]?=[ ]?(?:"(?P<quoted>(?:[^"\\]|\\.)*)"|(?P<plain>[^\s",]+))', re.ASCII
)
_ESCAPE: Final = re.compile(r"\\(.)")
_MAX_LENGTH: Final = 8192


class BearerChallenge(msgspec.Struct, frozen=True):
    """Where a token is to be had.

    Attributes:
        realm: Its address.
        service: For whom it is; may be empty.
        scope: For what it is; may be empty.
    """

    realm: str
    service: str = ""
    scope: str = ""


def parse_challenge(header: str) -> BearerChallenge | None:
    """Return what a header asks for, None if it is nothing that is understood."""
    start = _BEARER.match(header)
    if start is None or len(header) > _MAX_LENGTH:
        return None
    found: dict[str, str] = {}
    place = start.end()
    while (parameter := _PARAMETER.match(header, place)) is not None:
        quoted = parameter["quoted"]
        value = parameter["plain"] if quoted is None else _ESCAPE.sub(r"\1", quoted)
        found.setdefault(parameter["name"].lower(), value)
        place = parameter.end()
    realm = found.get("realm", "")
    return BearerChallenge(realm, found.get("service", ""), found.get("scope", "")) if realm else None
