"""Why a download came to nothing, in words for people, and whether a repeat may help."""

import errno
import re
from typing import Final

import httpx2
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

__all__ = ["DownloadCancelled", "DownloadFailure", "explain", "retry_after_seconds"]

_SECRET: Final = re.compile(r"hf_[A-Za-z0-9]{8,}")


class DownloadFailure(Exception):
    """A download came to nothing.

    Attributes:
        code: A short stable word for programs.
        retry: Whether the same download may succeed later.
        retry_after: Seconds to wait before that, if the hub said so.
    """

    def __init__(self, reason: str, *, code: str, retry: bool = False, retry_after: float | None = None) -> None:
        super().__init__(_SECRET.sub("hf_...", reason))
        self.code = code
        self.retry = retry
        self.retry_after = retry_after


class DownloadCancelled(DownloadFailure):
    """It was told to stop; what is there stays for a repeat."""

    def __init__(self) -> None:
        super().__init__("the download was cancelled", code="cancelled", retry=True)


def explain(error: Exception, repo: str) -> DownloadFailure:
    """Return what went wrong with the download of a repository."""
    match error:
        case DownloadFailure():
            return error
        case GatedRepoError():
            return DownloadFailure(
                f"{repo} is gated: accept its terms on the hub, and set HF_TOKEN to a token of that account",
                code="gated",
            )
        case RepositoryNotFoundError():
            return DownloadFailure(
                f"there is no repository {repo} on the hub, or it is private: then set HF_TOKEN", code="no_repository"
            )
        case RevisionNotFoundError():
            return DownloadFailure(f"{repo} has no branch main", code="no_repository")
        case RemoteEntryNotFoundError():
            return DownloadFailure(f"a file of {repo} is gone from the hub", code="no_such_file", retry=True)
        case OfflineModeIsEnabled():
            return DownloadFailure(f"{repo} is not in the cache, and HF_HUB_OFFLINE is set", code="offline")
        case HfHubHTTPError():
            return _explain_status(error, repo)
        case httpx2.HTTPError():
            return DownloadFailure(f"the hub cannot be reached: {_of(error)}", code="unreachable", retry=True)
        case OSError() if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return DownloadFailure(f"the disk is full: {error.strerror}", code="disk_full", retry=True)
        case OSError():
            return DownloadFailure(f"the cache cannot be written: {_of(error)}", code="cache", retry=True)
        case _:
            return DownloadFailure(f"the download failed: {_of(error)}", code="download_failed", retry=True)


def _explain_status(error: HfHubHTTPError, repo: str) -> DownloadFailure:
    status = error.response.status_code
    if status == 429:
        seconds = retry_after_seconds(error.response.headers.get("Retry-After", ""))
        wait = f", try again in {seconds:g} s" if seconds is not None else ""
        return DownloadFailure(
            f"the hub is asked too often{wait}", code="rate_limited", retry=True, retry_after=seconds
        )
    if status in (401, 403):
        return DownloadFailure(f"the hub refuses {repo} ({status}): check HF_TOKEN", code="refused")
    return DownloadFailure(f"the hub answered {status} for {repo}", code="hub_error", retry=status >= 500)


def retry_after_seconds(text: str) -> float | None:
    return float(text) if text.isascii() and text.isdigit() and len(text) < 7 else None


def _of(error: Exception) -> str:
    return str(error) or type(error).__name__
