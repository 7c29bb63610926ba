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
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar
from urllib.parse import parse_qs, urlsplit

from stand_in_files import FileFault, FileHandler, FileRequest, StandIn

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
class RegistryFault(FileFault):
    """What goes wrong. By default nothing does.

    Attributes:
        blob_status: Of every answer about a blob.
        manifest: Answer every request for a manifest with this.
        said_digest: The header ``Docker-Content-Digest`` of manifests, instead of the true one.
        location: Where every request for a blob is redirected to.
        realm: Where tokens are said to be had.
        token: What the token endpoint answers.
        expire_after: Requests for blobs after which a token is not taken any more.
    """

    blob_status: int = 0
    manifest: bytes | None = None
    said_digest: str = ""
    location: str = ""
    realm: str = ""
    token: bytes | None = None
    expire_after: int | None = None


@dataclass
class Asked(FileRequest):
    """One request that was made."""

    host: str = ""
    authorization: str = ""
    query: dict[str, list[str]] = field(default_factory=dict[str, list[str]])


class StandInRegistry(StandIn[RegistryFault]):
    """See the module's text.

    Args:
        needs_token: Whether it wants the anonymous token.
        redirects: Whether blobs come from the storage on another host.

    Attributes:
        host: Its name in names of models, with its port.
        requests: What was asked, in order.
    """

    def __init__(self, *, needs_token: bool = False, redirects: bool = False) -> None:
        super().__init__(RegistryFault(), _Handler)
        self.host = f"127.0.0.1:{self.port}"
        self.requests: list[Asked] = []
        self.needs_token = needs_token
        self.redirects = redirects
        self.tokens = 0
        self.taken = 0
        self.blobs: dict[str, bytes] = {}
        self.manifests: dict[tuple[str, str], tuple[str, bytes]] = {}

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


class _Handler(FileHandler):
    stand_in: ClassVar[StandInRegistry]

    def do_GET(self) -> None:
        address = urlsplit(self.path)
        headers = self.headers
        request = Asked(
            address.path,
            headers.get("Range", ""),
            host=headers.get("Host", ""),
            authorization=headers.get("Authorization", ""),
            query=parse_qs(address.query),
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
        self.say(200, body, {"Content-Type": "application/json"})

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
            digest = fault.said_digest or digest_of(raw)
            self.say(200, raw, {"Content-Type": media_type, "Docker-Content-Digest": digest})
        elif fault.location or stand_in.redirects:
            location = fault.location or f"http://localhost:{stand_in.port}/storage/{name}"
            self.say(307, headers={"Location": location})
        else:
            self._send_blob(name, request)

    def _refuse(self, status: int, code: str = "", retry_after: str = "", challenge: str = "") -> None:
        body = json.dumps({"errors": [{"code": code, "message": "no"}]}).encode() if code else b"no"
        self.say(status, body, {"Retry-After": retry_after, "WWW-Authenticate": challenge})

    def _send_blob(self, digest: str, request: Asked) -> None:
        whole = self.stand_in.blobs.get(digest)
        if whole is None:
            self._refuse(404, "BLOB_UNKNOWN")
        else:
            self.send_contents(whole, request, self.stand_in.fault)


def digest_of(content: bytes) -> str:
    """Return the digest of contents as registries write it."""
    return f"sha256:{hashlib.sha256(content).hexdigest()}"
