"""Who may use the server: API keys, the origins of web pages, and the names that the server answers to.

Three doors, for three kinds of stranger. Keys keep people out. The check of ``Host`` keeps out web pages whose name was
made to resolve to this machine (DNS rebinding), and the origins keep out all other web pages, for which the user's own
browser would carry requests.
"""

import hashlib
import hmac
import ipaddress
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, cast
from urllib.parse import urlsplit

from llamaherd.http.grants import Grant, parse_grant

__all__ = ["ANY", "LOCALHOST", "ApiKeys", "Cors", "Security", "host_of", "is_loopback", "read_keys"]

#: Every origin, or every host name.
ANY: Final = "*"
#: Origins on this machine, at any port.
LOCALHOST: Final = "localhost"

_MAX_KEY_FILE: Final = 1024 * 1024
_BEARER: Final = b"bearer "


class ApiKeys:
    """The keys that open the server. It keeps their digests only, so that no dump or repr can show one.

    Args:
        keys: Without any, everybody may enter. A mapping says what each opens, a list opens everything.
    """

    def __init__(self, keys: Iterable[str] | Mapping[str, Grant] = ()) -> None:
        grants: Mapping[str, Grant] = (
            cast("Mapping[str, Grant]", keys) if isinstance(keys, Mapping) else {key: Grant() for key in keys}
        )
        self._digests: Final[tuple[tuple[bytes, Grant], ...]] = tuple(
            (_digest(key.encode()), grant) for key, grant in grants.items() if key
        )

    def __len__(self) -> int:
        return len(self._digests)

    def __repr__(self) -> str:
        return f"<{len(self)} API keys>"

    def admit(self, given: bytes) -> Grant | None:
        """Return what somebody may do who gives this, a key or ``Bearer`` and a key; None if it opens nothing.

        How long that takes does not depend on how much of a key is right.
        """
        if not self._digests:
            return Grant()
        # HTTP's schemes may be written in small letters.
        key = given[len(_BEARER) :] if given[: len(_BEARER)].lower() == _BEARER else given
        digest = _digest(key.strip())
        matches = [grant for known, grant in self._digests if hmac.compare_digest(digest, known)]
        return matches[0] if matches else None


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def read_keys(path: Path) -> dict[str, Grant]:
    """Return the keys in a file and what they open: one per line, then ``read-only`` or ``models=NAME,NAME`` or both.

    Empty lines and those that begin with ``#`` are none.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is over 1 MiB, is not UTF-8 text, holds no key, or says something else after one.
    """
    with path.open("rb") as file:
        raw = file.read(_MAX_KEY_FILE + 1)
    if len(raw) > _MAX_KEY_FILE:
        raise ValueError(f"{path} is over {_MAX_KEY_FILE} bytes")
    try:
        lines = [line.strip() for line in raw.decode().splitlines()]
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text") from None
    keys: dict[str, Grant] = {}
    for number, line in enumerate(lines, 1):
        if line and not line.startswith("#"):
            key, *words = line.split()
            try:
                keys[key] = parse_grant(words)
            except ValueError as error:
                raise ValueError(f"{path} line {number}: {error}") from None
    if not keys:
        raise ValueError(f"{path} holds no API key")
    return keys


@dataclass(frozen=True, kw_only=True)
class Cors:
    """Which web pages may use the server, and how browsers are told.

    Attributes:
        origins: ``*``, ``localhost``, or origins such as ``https://example.org``. None means ``*`` where a key is
            needed, which no page of a stranger has, and ``localhost`` where none is. A page that the server itself has
            sent may always.
        methods: What a preflight answer allows.
        headers: Likewise; ``*`` allows what was asked for.
        credentials: Whether browsers may send cookies and the like along.
    """

    origins: tuple[str, ...] | None = None
    methods: str = "GET, POST, DELETE, OPTIONS"
    headers: str = ANY
    credentials: bool = True


@dataclass(frozen=True, kw_only=True)
class Security:
    """The whole policy.

    Attributes:
        keys: Empty lets everybody in.
        cors: Which web pages may use the server.
        allowed_hosts: Further host names that the server answers to; ``*`` for any. Given at all, they are checked on
            every connection, otherwise only on those that come over loopback.
        own_names: What the server goes by anyway: the address that it was told to listen on.
    """

    keys: ApiKeys = field(default_factory=ApiKeys)
    cors: Cors = Cors()
    allowed_hosts: tuple[str, ...] = ()
    own_names: tuple[str, ...] = ()

    @property
    def origins(self) -> tuple[str, ...]:
        """The origins whose pages may use the server, with the default filled in."""
        if self.cors.origins is None:
            return (ANY,) if self.keys else (LOCALHOST,)
        return self.cors.origins

    def allows(self, origin: str) -> bool:
        """Whether pages of an origin may use the server."""
        origins = self.origins
        if ANY in origins or (LOCALHOST in origins and _is_local(origin)):
            return True
        return origin.lower().rstrip("/") in {known.lower().rstrip("/") for known in origins}

    def answers_to(self, host: str) -> bool:
        """Whether the server goes by the name in a ``Host`` header; the port does not matter."""
        name = host_of(host)
        names = {known.lower() for known in (*self.allowed_hosts, *self.own_names)}
        return ANY in names or name == LOCALHOST or is_loopback(name) or name in names


def host_of(header: str) -> str:
    """Return the host of a ``Host`` header in lower case, without port and brackets; empty if it is none."""
    try:
        return (urlsplit(f"//{header}").hostname or "").lower()
    except ValueError:
        return ""


def is_loopback(address: str) -> bool:
    """Whether a text is an IP address of this machine alone."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    mapped = ip.ipv4_mapped if isinstance(ip, ipaddress.IPv6Address) else None
    return (mapped or ip).is_loopback


def _is_local(origin: str) -> bool:
    try:
        name = urlsplit(origin).hostname or ""
    except ValueError:
        return False
    return name == LOCALHOST or is_loopback(name)
