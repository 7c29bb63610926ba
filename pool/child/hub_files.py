"""The files of one commit of a repository on the hub, as a :class:`~llamaherd.pool.child.fetch.FileSource`."""

from collections.abc import Generator
from contextlib import contextmanager
from urllib.parse import urlsplit

import httpx2
from huggingface_hub import hf_hub_url
from huggingface_hub.utils import (
    build_hf_headers,  # pyright: ignore[reportUnknownVariableType] - it takes a bare dict
    get_session,
    hf_raise_for_status,
)

from llamaherd.pool.child.fetch import RANGE_UNSATISFIABLE, TIMEOUT
from llamaherd.pool.child.remote import RemoteFile

__all__ = ["HubFiles"]


class HubFiles:
    """See the module's text. An answer that says no raises what huggingface_hub makes of it.

    Args:
        endpoint: The hub's address; empty for the environment's.
    """

    def __init__(self, repo: str, commit: str, endpoint: str = "") -> None:
        self._repo = repo
        self._commit = commit
        self._endpoint = endpoint or None
        self._headers = build_hf_headers() | {"Accept-Encoding": "identity"}

    def url(self, file: RemoteFile) -> str:
        # Of a mirror what stands before ``@`` is a secret.
        address = urlsplit(self._address(file))
        return address._replace(netloc=address.netloc.rpartition("@")[2]).geturl()

    def _address(self, file: RemoteFile) -> str:
        return hf_hub_url(self._repo, file.path, revision=self._commit, endpoint=self._endpoint)

    @contextmanager
    def open(self, file: RemoteFile, start: int) -> Generator[httpx2.Response]:
        headers = dict(self._headers) | ({"Range": f"bytes={start}-"} if start else {})
        with get_session().stream("GET", self._address(file), headers=headers, timeout=TIMEOUT) as response:
            if response.status_code != RANGE_UNSATISFIABLE:
                hf_raise_for_status(response)
            yield response
