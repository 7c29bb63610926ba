"""A stand-in for a Docker or OCI registry on the loopback: the part of the OCI distribution specification that a pull
needs, over real sockets, and every misbehaviour that a test wants to see.

Use it as a context manager, and its ``host`` as the registry in models' names::

    with StandInRegistry() as registry:
        registry.add("ai/smollm2", "135M-Q4_0", [Layer(content)])
        download(f"{registry.host}/ai/smollm2:135M-Q4_0")

It answers ``/v2/<repo>/manifests/<tag or digest>``, ``/v2/<repo>/blobs/<digest>`` with ranges, ``/token``, and, as the
storage that blobs may be redirected to, ``/storage/<digest>`` under another host name.
"""

import contextlib
import hashlib
import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar, Self
from urllib.parse import parse_qs, urlsplit

__all__ = [
    "DOCKER_INDEX",
    "DOCKER_MANIFEST",
    "GGUF",
    "LICENSE",
    "MMPROJ",
    "OCI_INDEX",
    "OCI_MANIFEST",
    "TEMPLATE",
    "Asked",
    "Layer",
    "RegistryFault",
    "StandInRegistry",
    "digest_of",
]

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_INDEX = "application/vnd.docker.distribution.manifest.list.v2+json"
GGUF = "application/vnd.docker.ai.gguf.v3"
MMPROJ = "application/vnd.docker.ai.mmproj"
TEMPLATE = "application/vnd.docker.ai.chat.template.jinja"
LICENSE = "application/vnd.docker.ai.license"

_BLOCK = 16 * 1024
_TOKEN = "anonymous-token"


@dataclass
class Layer:
    """One layer of a manifest."""

    content: bytes
    media_type: str = GGUF
    title: str = ""
    size: int | None = None
    digest: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return its descriptor, which tells the truth unless it was told not to."""
        size = len(self.content) if self.size is None else self.size
        found: dict[str, Any] = {
            "mediaType": self.media_type,
            "digest": self.digest or digest_of(self.content),
            "size": size,
        }
        if self.title:
            found["annotations"] = {"org.opencontainers.image.title": self.title}
        return found


@dataclass
class RegistryFault:
    """What goes wrong. By default nothing does.

    Attributes:
        status: Of every answer about a manifest or blob; 0 for none.
        blob_status: Of every answer about a blob.
        error_code: The registry's word for that.
        retry_after: The header of that name.
        cut_after: Bytes of a blob after which the connection is closed, each time.
        cuts: How often it is; None for always.
        wrong_bytes: Send other bytes of the same length.
        short_by: Say, and send, so many bytes less than there are.
        ignore_range: Answer a request for a part with the whole.
        hold: Blobs wait for this after their first block. Set it to let them go.
        manifest: Answer every request for a manifest with this.
        said_digest: The header ``Docker-Content-Digest`` of manifests, instead of the true one.
        location: Where every request for a blob is redirected to.
        realm: Where tokens are said to be had.
        token: What the token endpoint answers.
        expire_after: Requests for blobs after which a token is not taken any more.
    """

    status: int = 0
    blob_status: int = 0
    error_code: str = ""
    retry_after: str = ""
    cut_after: int | None = None
    cuts: int | None = None
    wrong_bytes: bool = False
    short_by: int = 0
    ignore_range: bool = False
    hold: threading.Event | None = None
    manifest: bytes | None = None
    said_digest: str = ""
    location: str = ""
    realm: str = ""
    token: bytes | None = None
    expire_after: int | None = None


@dataclass
class Asked:
    """One request that was made."""

    path: str
    host: str
    range: str = ""
    authorization: str = ""
    query: dict[str, list[str]] = field(default_factory=dict[str, list[str]])
    sent: int = 0


class StandInRegistry(contextlib.AbstractContextManager["StandInRegistry"]):
    """See the module's text.

    Args:
        needs_token: Whether it wants the anonymous token.
        redirects: Whether blobs come from the storage on another host.

    Attributes:
        host: Its name in names of models, with its port.
        fault: What goes wrong from now on.
        requests: What was asked, in order.
    """

    def __init__(self, *, needs_token: bool = False, redirects: bool = False) -> None:
        self.fault = RegistryFault()
        self.requests: list[Asked] = []
        self.needs_token = needs_token
        self.redirects = redirects
        self.tokens = 0
        self.taken = 0
        self.blobs: dict[str, bytes] = {}
        self.manifests: dict[tuple[str, str], tuple[str, bytes]] = {}
        registry = self

        class Handler(_Handler):
            stand_in = registry

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self.port = self._server.server_port
        self.host = f"127.0.0.1:{self.port}"
        self.url = f"http://{self.host}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.fault.hold is not None:
            self.fault.hold.set()
        self._server.shutdown()
        self._server.server_close()

    def add(self, repo: str, tag: str, layers: Sequence[Layer], media_type: str = OCI_MANIFEST) -> str:
        """Add a model, or have a tag name another one. Return the manifest's digest."""
        for layer in layers:
            self.blobs[digest_of(layer.content)] = layer.content
        config = Layer(b"{}", "application/vnd.docker.ai.model.config.v0.1+json")
        body = {
            "schemaVersion": 2,
            "mediaType": media_type,
            "config": config.to_json(),
            "layers": [layer.to_json() for layer in layers],
        }
        return self.put(repo, tag, body, media_type)

    def add_index(self, repo: str, tag: str, entries: Sequence[dict[str, Any]], media_type: str = OCI_INDEX) -> str:
        """Add an index of manifests that are there already. Return its digest."""
        return self.put(repo, tag, {"schemaVersion": 2, "mediaType": media_type, "manifests": entries}, media_type)

    def entry(self, repo: str, digest: str, **more: Any) -> dict[str, Any]:
        """Return what an index says of a manifest."""
        media_type, raw = self.manifests[repo, digest]
        return {"mediaType": media_type, "digest": digest, "size": len(raw), **more}

    def put(self, repo: str, tag: str, body: object, media_type: str = OCI_MANIFEST) -> str:
        """Add any manifest. Return its digest."""
        raw = json.dumps(body).encode()
        digest = digest_of(raw)
        self.manifests[repo, digest] = self.manifests[repo, tag] = (media_type, raw)
        return digest

    def asked(self, part: str) -> list[Asked]:
        """Return the requests whose path holds a text."""
        return [request for request in self.requests if part in request.path]

    def pulls(self, content: bytes) -> list[Asked]:
        """Return the requests for contents that were answered with them."""
        return [request for request in self.asked(digest_of(content)) if request.sent]


class _Handler(BaseHTTPRequestHandler):
    stand_in: ClassVar[StandInRegistry]
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class has this name
        pass

    def do_GET(self) -> None:
        address = urlsplit(self.path)
        headers = self.headers
        request = Asked(
            address.path,
            headers.get("Host", ""),
            headers.get("Range", ""),
            headers.get("Authorization", ""),
            parse_qs(address.query),
        )
        self.stand_in.requests.append(request)
        with contextlib.suppress(OSError):
            if request.path == "/token":
                self._give_token()
            elif request.path.startswith("/storage/"):
                self._send_blob(request.path.removeprefix("/storage/"), request)
            elif self._may(request):
                self._answer(request)

    def _may(self, request: Asked) -> bool:
        stand_in, fault = self.stand_in, self.stand_in.fault
        is_blob = "/blobs/" in request.path
        status = (fault.blob_status if is_blob else 0) or fault.status
        if status:
            self._refuse(status, fault.error_code, fault.retry_after)
            return False
        wanted = f"Bearer {_TOKEN}-{stand_in.tokens}"
        old = is_blob and fault.expire_after is not None and stand_in.taken >= fault.expire_after
        if stand_in.needs_token and (request.authorization != wanted or old):
            if old:
                stand_in.taken, fault.expire_after = 0, None
                stand_in.tokens += 1  # what was given out counts no more
            realm = fault.realm or f"{stand_in.url}/token"
            scope = f"repository:{request.path.split('/manifests/')[0].split('/blobs/')[0].removeprefix('/v2/')}:pull"
            self._refuse(401, "UNAUTHORIZED", challenge=f'Bearer realm="{realm}",service="stand-in",scope="{scope}"')
            return False
        stand_in.taken += is_blob
        return True

    def _give_token(self) -> None:
        stand_in = self.stand_in
        stand_in.tokens += 1
        body = stand_in.fault.token or json.dumps({"token": f"{_TOKEN}-{stand_in.tokens}"}).encode()
        self._send_json(body, "application/json")

    def _answer(self, request: Asked) -> None:
        stand_in, fault = self.stand_in, self.stand_in.fault
        *parts, kind, name = request.path.removeprefix("/v2/").split("/")
        repo = "/".join(parts)
        if kind == "manifests":
            media_type, raw = stand_in.manifests.get((repo, name), ("", b""))
            raw = raw if fault.manifest is None else fault.manifest
            if not raw:
                self._refuse(404, "MANIFEST_UNKNOWN")
                return
            self._send_json(raw, media_type, fault.said_digest or digest_of(raw))
        elif fault.location or stand_in.redirects:
            location = fault.location or f"http://localhost:{stand_in.port}/storage/{name}"
            self.send_response(307)
            self.send_header("Location", location)
            self.send_header("Content-Length", "0")
            self.end_headers()
        else:
            self._send_blob(name, request)

    def _send_json(self, raw: bytes, media_type: str, digest: str = "") -> None:
        self.send_response(200)
        self.send_header("Content-Type", media_type)
        self.send_header("Content-Length", str(len(raw)))
        if digest:
            self.send_header("Docker-Content-Digest", digest)
        self.end_headers()
        self.wfile.write(raw)

    def _refuse(self, status: int, code: str = "", retry_after: str = "", challenge: str = "") -> None:
        body = json.dumps({"errors": [{"code": code, "message": "no"}]}).encode() if code else b"no"
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        if retry_after:
            self.send_header("Retry-After", retry_after)
        if challenge:
            self.send_header("WWW-Authenticate", challenge)
        self.end_headers()
        self.wfile.write(body)

    def _send_blob(self, digest: str, request: Asked) -> None:
        whole = self.stand_in.blobs.get(digest)
        if whole is None:
            self._refuse(404, "BLOB_UNKNOWN")
            return
        fault = self.stand_in.fault
        content = bytes(len(whole)) if fault.wrong_bytes else whole
        content = content[: len(content) - fault.short_by]
        start = 0 if fault.ignore_range else int(request.range.removeprefix("bytes=").rstrip("-") or 0)
        if start >= len(content) > 0:
            self._refuse(416)
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self._send(content[start:], request)

    def _send(self, content: bytes, request: Asked) -> None:
        fault = self.stand_in.fault
        cut = None
        if fault.cut_after is not None and fault.cuts != 0:
            cut = fault.cut_after
            fault.cuts = None if fault.cuts is None else fault.cuts - 1
        for start in range(0, len(content), _BLOCK):
            block = content[start : start + _BLOCK]
            if cut is not None and request.sent + len(block) > cut:
                self.wfile.write(block[: cut - request.sent])
                request.sent = cut
                self.close_connection = True
                self.connection.close()
                return
            self.wfile.write(block)
            request.sent += len(block)
            if fault.hold is not None:
                self.wfile.flush()
                fault.hold.wait(30)


def digest_of(content: bytes) -> str:
    """Return the digest of contents as registries write it."""
    return f"sha256:{hashlib.sha256(content).hexdigest()}"
