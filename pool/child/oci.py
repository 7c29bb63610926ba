"""A client of Docker and OCI registries, for what a download needs: manifests and blobs of one repository.

It follows the OCI distribution specification. Everything that arrives is checked against the digest that asked for it,
or that the registry said of it; a manifest has a largest size. Public repositories alone are read, with the anonymous
token that the registry names a place for. The token goes to the registry itself and to nobody whom it redirects to.
Plain HTTP is for registries on this machine.
"""

import hashlib
import threading
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Final
from urllib.parse import urljoin, urlsplit

import httpx2
import msgspec

from llamaherd.pool.child.artifact import MANIFEST_TYPES
from llamaherd.pool.child.challenge import BearerChallenge, parse_challenge
from llamaherd.pool.child.failures import DownloadFailure, retry_after_seconds
from llamaherd.pool.child.fetch import RANGE_UNSATISFIABLE, TIMEOUT
from llamaherd.pool.child.remote import RemoteFile

__all__ = ["MAX_MANIFEST", "Registry"]

#: Largest manifest that is read, in bytes: what the specification has registries accept at least.
MAX_MANIFEST: Final = 4 * 1024 * 1024
MAX_REDIRECTS: Final = 5
_MAX_ANSWER: Final = 64 * 1024
_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
_UNAUTHORIZED: Final = 401
_FORBIDDEN: Final = 403
_NOT_FOUND: Final = 404
_TOO_MANY: Final = 429
_HEADERS: Final = {"User-Agent": "llamaherd", "Accept-Encoding": "identity"}


class Registry:
    """One repository of a registry. Implements :class:`~llamaherd.pool.child.fetch.FileSource` for its blobs. May be
    used by several threads. Use it as a context manager.

    Args:
        registry: Its name, for messages.
        repo: The repository's path.
        address: Where it is, such as ``https://registry-1.docker.io``. If that is plain HTTP, the registry may lead to
            other such addresses; otherwise all have to be https.
    """

    def __init__(self, registry: str, repo: str, address: str) -> None:
        self._name = f"{registry}/{repo}"
        self._host = registry
        self._base = f"{address}/v2/{repo}"
        self._plain = address.startswith("http://")
        self._repo = repo
        self._origin = _origin(address)
        self._token = ""
        self._lock = threading.Lock()
        # Plain HTTP is for this machine, and a proxy for the way out.
        self._client = httpx2.Client(timeout=TIMEOUT, trust_env=not self._plain)

    def __enter__(self) -> "Registry":
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def manifest(self, reference: str) -> tuple[bytes, str]:
        """Return a manifest or an index, and its digest without ``sha256:``.

        Args:
            reference: A tag, or a digest with ``sha256:``, which the answer then has.

        Raises:
            DownloadFailure: the registry said no, or what came is too large or has another digest. And what httpx2
                raises.
        """
        url = f"{self._base}/manifests/{reference}"
        with self._request(url, {"Accept": ", ".join(MANIFEST_TYPES)}) as response:
            self._check(response, f"{self._name}{'@' if ':' in reference else ':'}{reference}")
            raw = _read(response, MAX_MANIFEST)
            said = response.headers.get("Docker-Content-Digest", "")
        if raw is None:
            raise DownloadFailure(f"the manifest of {self._name} is over {MAX_MANIFEST} bytes", code="bad_answer")
        digest = hashlib.sha256(raw).hexdigest()
        wanted = reference if ":" in reference else said
        if wanted.startswith("sha256:") and wanted != f"sha256:{digest}":
            raise DownloadFailure(
                f"the manifest of {self._name} arrived with the digest sha256:{digest}, and {wanted[:80]!a} was due",
                code="wrong_contents",
                retry=True,
            )
        return raw, digest

    def url(self, file: RemoteFile) -> str:
        return f"{self._base}/blobs/sha256:{file.digest}"

    @contextmanager
    def open(self, file: RemoteFile, start: int) -> Generator[httpx2.Response]:
        headers = {"Range": f"bytes={start}-"} if start else {}
        with self._request(self.url(file), headers) as response:
            if response.status_code != RANGE_UNSATISFIABLE:
                self._check(response, f"{self._name}@sha256:{file.digest}")
            yield response

    @contextmanager
    def _request(self, url: str, headers: Mapping[str, str]) -> Generator[httpx2.Response]:
        """Ask, with a new token if the registry wants one."""
        token = self._token
        with self._follow(url, headers, token) as response:
            challenge = self._challenge(response)
            if challenge is None:
                yield response
                return
        with self._lock:
            # Of several threads whose token is too old, one gets a new one.
            if self._token == token:
                self._token = self._new_token(challenge)
            token = self._token
        with self._follow(url, headers, token) as response:
            yield response

    def _challenge(self, response: httpx2.Response) -> BearerChallenge | None:
        if response.status_code != _UNAUTHORIZED or _origin(str(response.url)) != self._origin:
            return None
        return parse_challenge(response.headers.get("WWW-Authenticate", ""))

    def _new_token(self, challenge: BearerChallenge) -> str:
        realm = self._address(challenge.realm, "", "has tokens at")
        params = {"scope": challenge.scope or f"repository:{self._repo}:pull"}
        if challenge.service:
            params["service"] = challenge.service
        url = str(httpx2.URL(realm).copy_merge_params(params))
        with self._follow(url, {}, "") as response:
            self._check(response, self._name)
            raw = _read(response, _MAX_ANSWER)
        token = _token_of(raw or b"")
        if not token:
            raise DownloadFailure(f"{self._host} gives no token for {self._name}", code="bad_answer", retry=True)
        return token

    @contextmanager
    def _follow(self, url: str, headers: Mapping[str, str], token: str) -> Generator[httpx2.Response]:
        """Ask, and go where the answers lead."""
        sent = {**_HEADERS, **headers}
        for _ in range(MAX_REDIRECTS + 1):
            if token and _origin(url) != self._origin:
                token = ""  # for good: whoever was asked in between could send it anywhere
            own = {"Authorization": f"Bearer {token}"} if token else {}
            with self._client.stream("GET", url, headers=sent | own, follow_redirects=False) as response:
                location = response.headers.get("Location", "")
                if response.status_code not in _REDIRECTS or not location:
                    yield response
                    return
            url = self._address(url, location, "redirects to")
        raise DownloadFailure(f"{self._host} redirects without end", code="bad_answer", retry=True)

    def _address(self, base: str, location: str, does: str) -> str:
        """Return the address that a registry leads to. Raises DownloadFailure for one that must not be asked: plain
        HTTP, but for registries of this machine.
        """
        try:
            url = urljoin(base, location)
            scheme, host, _ = _origin(url)
            fits = bool(host) and (scheme == "https" or (scheme == "http" and self._plain))
            fits = fits and httpx2.URL(url).scheme == scheme
        except (ValueError, httpx2.InvalidURL):
            url, fits = location or base, False
        if not fits:
            raise DownloadFailure(f"{self._host} {does} {url[:200]!a}, which is no https address", code="bad_answer")
        return url

    def _check(self, response: httpx2.Response, name: str) -> None:
        """Raise DownloadFailure unless an answer is one."""
        status = response.status_code
        if status in (200, 206):
            return
        word = _error_code(response)
        shown = f"{status} {word}" if word else str(status)
        if status == _TOO_MANY:
            seconds = retry_after_seconds(response.headers.get("Retry-After", ""))
            wait = f", try again in {seconds:g} s" if seconds is not None else ""
            raise DownloadFailure(
                f"{self._host} is asked too often{wait}", code="rate_limited", retry=True, retry_after=seconds
            )
        if status == _UNAUTHORIZED:
            raise DownloadFailure(
                f"there is no {name}, or it is not public ({shown}): only what needs no login is downloaded",
                code="no_repository",
            )
        if status == _FORBIDDEN:
            raise DownloadFailure(f"{self._host} refuses {name} ({shown})", code="refused")
        if status == _NOT_FOUND:
            raise DownloadFailure(f"there is no {name} ({shown})", code="no_repository")
        raise DownloadFailure(f"{self._host} answered {shown} for {name}", code="hub_error", retry=status >= 500)


class _Error(msgspec.Struct):
    code: str = ""


class _Errors(msgspec.Struct):
    errors: list[_Error] = []


class _Tokens(msgspec.Struct):
    token: str = ""
    access_token: str = ""


def _origin(url: str) -> tuple[str, str, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname or "", parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def _read(response: httpx2.Response, limit: int) -> bytes | None:
    """Return an answer's body; None if it is too large."""
    body = bytearray()
    for chunk in response.iter_raw():
        body += chunk
        if len(body) > limit:
            return None
    return bytes(body)


def _token_of(raw: bytes) -> str:
    try:
        found = msgspec.json.decode(raw, type=_Tokens)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return ""
    token = found.token or found.access_token
    return token if token.isascii() and token.isprintable() and " " not in token else ""


def _error_code(response: httpx2.Response) -> str:
    """Return the registry's word for what went wrong, such as ``MANIFEST_UNKNOWN``; empty without one."""
    try:
        found = msgspec.json.decode(_read(response, _MAX_ANSWER) or b"", type=_Errors)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, httpx2.HTTPError):
        return ""
    word = found.errors[0].code if found.errors else ""
    return word if word.isascii() and word.isprintable() and len(word) <= 60 else ""
