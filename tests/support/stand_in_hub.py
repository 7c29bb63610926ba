"""A stand-in for the Hugging Face hub on the loopback: what huggingface_hub asks of the real one, over real sockets,
and every misbehaviour that a test wants to see.

Use it as a context manager and name its ``url`` as ``HF_ENDPOINT``::

    with StandInHub() as hub:
        hub.add("user/repo", {"m-Q8_0.gguf": content})
        hub.fault = Fault(cut_after=1000)

It answers ``/api/models/<repo>/revision/<revision>`` and ``/<repo>/resolve/<commit>/<file>``, the latter with ranges,
an ``ETag`` and to ``HEAD`` too.
"""

import contextlib
import copy
import hashlib
import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar, Self
from urllib.parse import unquote, urlsplit

__all__ = ["Fault", "StandInHub"]

_BLOCK = 16 * 1024


@dataclass
class Fault:
    """What goes wrong. By default nothing does.

    Attributes:
        status: Of every answer about a repository; 0 for none.
        error_code: The hub's word for that, its header ``X-Error-Code``.
        retry_after: The header of that name.
        cut_after: Bytes of a file after which the connection is closed, each time.
        cuts: How often it is; None for always.
        wrong_bytes: Send other bytes of the same length.
        short_by: Say, and send, so many bytes less than there are.
        ignore_range: Answer a request for a part with the whole.
        hold: Files wait for this after their first block. Set it to let them go.
        claim: Bytes that every GGUF file is said to have; 0 for the truth.
        paths: Further files that a repository claims to have, by their paths.
        no_head: Refuse ``HEAD``, as signed addresses do.
        digest: Name this as the contents' SHA-256.
        etag: Name this as the version of every file.
        no_length: Do not say how long files are.
    """

    status: int = 0
    error_code: str = ""
    retry_after: str = ""
    cut_after: int | None = None
    cuts: int | None = None
    wrong_bytes: bool = False
    short_by: int = 0
    ignore_range: bool = False
    hold: threading.Event | None = None
    claim: int = 0
    paths: tuple[str, ...] = ()
    no_head: bool = False
    digest: str = ""
    etag: str = ""
    no_length: bool = False


@dataclass
class Repository:
    """What one repository holds."""

    files: dict[str, bytes]
    commit: str
    token: str
    siblings: list[dict[str, Any]]
    etags: dict[str, str]


@dataclass
class Request:
    """One request that was made."""

    path: str
    range: str = ""
    method: str = "GET"
    token: str = ""
    sent: int = field(default=0)


class StandInHub(contextlib.AbstractContextManager["StandInHub"]):
    """See the module's text.

    Attributes:
        url: Its address, without a slash at the end.
        fault: What goes wrong from now on.
        requests: What was asked, in order.
    """

    def __init__(self) -> None:
        self.fault = Fault()
        self.requests: list[Request] = []
        self._repositories: dict[str, Repository] = {}
        hub = self

        class Handler(_Handler):
            stand_in = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.fault.hold is not None:
            self.fault.hold.set()
        self._server.shutdown()
        self._server.server_close()

    def add(self, repo: str, files: Mapping[str, bytes], token: str = "") -> None:
        """Add a repository, or replace one by a new commit. With a token it is private."""
        commit = hashlib.sha1(repr(sorted(files)).encode() + b"".join(files.values())).hexdigest()
        siblings = [_sibling(path, content) for path, content in files.items()]
        etags = {path: f'"{hashlib.sha1(content).hexdigest()}"' for path, content in files.items()}
        self._repositories[repo] = Repository(dict(files), commit, token, siblings, etags)

    def find(self, repo: str) -> Repository | None:
        """Return a repository."""
        return self._repositories.get(repo)

    def downloads(self, file: str) -> list[Request]:
        """Return the requests for a file."""
        return [request for request in self.requests if request.path.endswith("/" + file) and request.method == "GET"]


class _Handler(BaseHTTPRequestHandler):
    stand_in: ClassVar[StandInHub]
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class has this name
        pass

    def do_HEAD(self) -> None:
        if self.stand_in.fault.no_head:
            self.send_response(403)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        request = Request(path, self.headers.get("Range", ""), self.command, token)
        self.stand_in.requests.append(request)
        with contextlib.suppress(OSError):
            if path.startswith("/api/models/"):
                self._tell(path.removeprefix("/api/models/").partition("/revision/")[0], request)
            else:
                repo, _, rest = path.removeprefix("/").partition("/resolve/")
                self._send_file(repo, rest.partition("/")[2], request)

    def _repository(self, repo: str, request: Request) -> Repository | None:
        fault = self.stand_in.fault
        found = self.stand_in.find(repo)
        if fault.status:
            self._refuse(fault.status, fault.error_code, fault.retry_after)
        elif found is None or (found.token and not request.token):
            self._refuse(401 if not request.token else 404, "RepoNotFound")
        elif found.token and found.token != request.token:
            self._refuse(403, "GatedRepo")
        else:
            return found
        return None

    def _refuse(self, status: int, code: str = "", retry_after: str = "") -> None:
        body = b'{"error": "no"}'
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        if code:
            self.send_header("X-Error-Code", code)
        if retry_after:
            self.send_header("Retry-After", retry_after)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def _tell(self, repo: str, request: Request) -> None:
        found = self._repository(repo, request)
        if found is None:
            return
        siblings = copy.deepcopy(found.siblings)
        siblings += [_sibling(path, b"GGUF") for path in self.stand_in.fault.paths]
        if self.stand_in.fault.claim:
            for sibling in siblings:
                if "lfs" in sibling:
                    sibling["lfs"]["size"] = self.stand_in.fault.claim
        body = json.dumps({"id": repo, "modelId": repo, "sha": found.commit, "siblings": siblings}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _send_file(self, repo: str, path: str, request: Request) -> None:
        found = self._repository(repo, request)
        if found is None:
            return
        if path not in found.files:
            self._refuse(404, "EntryNotFound")
            return
        fault = self.stand_in.fault
        whole = found.files[path]
        content = bytes(len(whole)) if fault.wrong_bytes else whole
        content = content[: len(content) - fault.short_by]
        etag = fault.etag or found.etags[path]
        other = self.headers.get("If-Range", etag) != etag
        start = 0 if fault.ignore_range or other else int(request.range.removeprefix("bytes=").rstrip("-") or 0)
        if start >= len(content) > 0:
            self._refuse(416)
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if fault.no_length:
            self.send_header("Connection", "close")
        else:
            self.send_header("Content-Length", str(len(content) - start))
        self.send_header("ETag", etag)
        self.send_header("X-Repo-Commit", found.commit)
        if fault.digest:
            self.send_header("X-Linked-Etag", f'"{fault.digest}"')
        self.end_headers()
        if self.command == "GET":
            self._send(content[start:], request)

    def _send(self, content: bytes, request: Request) -> None:
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


def _sibling(path: str, content: bytes) -> dict[str, Any]:
    sibling: dict[str, Any] = {"rfilename": path, "size": len(content)}
    if path.endswith(".gguf"):
        digest = hashlib.sha256(content).hexdigest()
        sibling["blobId"] = "0" * 40
        sibling["lfs"] = {"sha256": digest, "size": len(content), "pointerSize": 130}
    else:
        sibling["blobId"] = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    return sibling
