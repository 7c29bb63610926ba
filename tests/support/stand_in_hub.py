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
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar
from urllib.parse import unquote, urlsplit

from stand_in_files import FileFault, FileHandler, FileRequest, StandIn

__all__ = ["Fault", "StandInHub"]


@dataclass
class Fault(FileFault):
    """What goes wrong. By default nothing does. The hub's word for an error is its header ``X-Error-Code``.

    Attributes:
        claim: Bytes that every GGUF file is said to have; 0 for the truth.
        paths: Further files that a repository claims to have, by their paths.
        no_head: Refuse ``HEAD``, as signed addresses do.
        digest: Name this as the contents' SHA-256.
        etag: Name this as the version of every file.
        no_length: Do not say how long files are.
    """

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
class Request(FileRequest):
    """One request that was made."""

    method: str = "GET"
    token: str = ""


class StandInHub(StandIn[Fault]):
    """See the module's text.

    Attributes:
        requests: What was asked, in order.
    """

    def __init__(self) -> None:
        super().__init__(Fault(), _Handler)
        self.requests: list[Request] = []
        self._repositories: dict[str, Repository] = {}

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


class _Handler(FileHandler):
    stand_in: ClassVar[StandInHub]

    def do_HEAD(self) -> None:
        if self.stand_in.fault.no_head:
            self.say(403)
        else:
            self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        request = Request(path, self.headers.get("Range", ""), method=self.command, token=token)
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
        self.say(status, b'{"error": "no"}', {"X-Error-Code": code, "Retry-After": retry_after})

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
        self.say(200, body, {"Content-Type": "application/json"})

    def _send_file(self, repo: str, path: str, request: Request) -> None:
        found = self._repository(repo, request)
        if found is None:
            return
        if path not in found.files:
            self._refuse(404, "EntryNotFound")
            return
        fault = self.stand_in.fault
        etag = fault.etag or found.etags[path]
        other = self.headers.get("If-Range", etag) != etag
        linked = f'"{fault.digest}"' if fault.digest else ""
        headers = {"ETag": etag, "X-Repo-Commit": found.commit, "X-Linked-Etag": linked}
        self.send_contents(found.files[path], request, fault, headers, anew=other, sized=not fault.no_length)


def _sibling(path: str, content: bytes) -> dict[str, Any]:
    sibling: dict[str, Any] = {"rfilename": path, "size": len(content)}
    if path.endswith(".gguf"):
        digest = hashlib.sha256(content).hexdigest()
        sibling["blobId"] = "0" * 40
        sibling["lfs"] = {"sha256": digest, "size": len(content), "pointerSize": 130}
    else:
        sibling["blobId"] = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    return sibling
