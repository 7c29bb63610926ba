"""What a worker in download mode does with a hub that behaves and with one that does not: real sockets, real
huggingface_hub, and never anything in the cache's list that is not whole.
"""

import errno
import hashlib
import os
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llamaherd.pool import scan_cache
from llamaherd.pool.child.download import run_download
from llamaherd.pool.child.failures import explain
from llamaherd.pool.child.remote import stays_within
from llamaherd.transport.messages import Download
from patience import ended
from stand_in_hub import Fault, StandInHub

CONTENT = b"GGUF" + os.urandom(200_000)
#: Bytes of a file that is more than may wait to be hashed.
LARGE = 96 * 1024 * 1024
REPO = "u/r"
FILES = {"README.md": b"# r", "m-Q4_K_M.gguf": CONTENT, "m-Q8_0.gguf": b"GGUF eight", "mmproj-f16.gguf": b"GGUF eyes"}

Run = Callable[..., dict[str, Any]]


@pytest.fixture(autouse=True)
def no_login(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nobody is logged in unless a test says so."""
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))


@pytest.fixture
def hub() -> Iterator[StandInHub]:
    with StandInHub() as hub:
        hub.add(REPO, FILES)
        yield hub


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def download(hub: StandInHub, cache: Path) -> Run:
    """Runs a download and returns its last report, with all reports under ``reports``."""

    def run(repo: str = REPO, cancelled: threading.Event | None = None, **more: Any) -> dict[str, Any]:
        reports: list[dict[str, Any]] = []
        report: Callable[[Any], None] = reports.append
        fields: dict[str, Any] = {"model": repo, "repo": repo, "cache": str(cache), "endpoint": hub.url, **more}
        command = Download(**fields)
        run_download(command, report, cancelled or threading.Event(), pause=0.01)
        return {**reports[-1], "reports": reports}

    return run


def listed(cache: Path) -> list[str]:
    return [model.name for model in scan_cache(cache)]


def unfinished(cache: Path) -> list[Path]:
    return list(cache.rglob("*.incomplete"))


# --- a hub that behaves ---


def test_the_default_quant_arrives_with_its_projector(download: Run, cache: Path) -> None:
    end = download()

    assert end["result"] == "download_finished"
    (model,) = scan_cache(cache)
    assert (model.name, model.path.read_bytes()) == ("u/r:Q4_K_M", CONTENT)
    assert model.mmproj is not None and model.mmproj.read_bytes() == b"GGUF eyes"
    assert unfinished(cache) == []


def test_progress_is_told_from_plan_to_end(download: Run) -> None:
    reports = download()["reports"]

    plan = reports[0]["plan"]
    assert sorted(plan.values()) == [9, len(CONTENT)]
    for url, total in plan.items():
        steps = [report["downloaded"] for report in reports if report.get("url") == url]
        assert steps == sorted(steps) and steps[-1] == total
    assert reports[-1] == {"result": "download_finished"}


def test_progress_is_told_without_what_opens_a_mirror(download: Run, hub: StandInHub) -> None:
    end = download(endpoint=hub.url.replace("://", "://user:pass@"))

    assert end["result"] == "download_finished"
    assert "m-Q4_K_M.gguf" in str(end["reports"])
    assert "pass" not in str(end["reports"])


@pytest.mark.parametrize(
    ("more", "name"),
    [({"tag": "q8_0"}, "u/r:Q8_0"), ({"file": "m-Q8_0.gguf"}, "u/r:Q8_0"), ({"mmproj": False}, "u/r:Q4_K_M")],
)
def test_a_quant_or_a_file_may_be_named(download: Run, cache: Path, more: dict[str, Any], name: str) -> None:
    assert download(**more)["result"] == "download_finished"
    assert listed(cache) == [name]


def test_all_parts_of_a_split_model_arrive(download: Run, hub: StandInHub, cache: Path) -> None:
    parts = {f"q/s-Q8_0-0000{part}-of-00003.gguf": b"GGUF part %d" % part for part in (1, 2, 3)}
    hub.add("u/split", parts)

    download("u/split")

    (model,) = scan_cache(cache)
    assert model.path.name == "s-Q8_0-00001-of-00003.gguf"
    assert len(list(model.path.parent.iterdir())) == 3


def test_what_is_there_is_not_fetched_again(download: Run, hub: StandInHub) -> None:
    download()
    download()

    assert len(hub.downloads("m-Q4_K_M.gguf")) == 1


def test_another_commit_keeps_what_is_the_same_on_the_list(download: Run, hub: StandInHub, cache: Path) -> None:
    download(tag="Q8_0")
    hub.add(REPO, {**FILES, "README.md": b"# changed"})

    download(tag="Q4_K_M")

    assert listed(cache) == ["u/r:Q4_K_M", "u/r:Q8_0"]
    assert len(hub.downloads("m-Q8_0.gguf")) == 1


def test_huggingface_hub_finds_what_was_downloaded(download: Run, cache: Path) -> None:
    from huggingface_hub import scan_cache_dir, try_to_load_from_cache

    download()

    found = try_to_load_from_cache(REPO, "m-Q4_K_M.gguf", cache_dir=cache)
    assert isinstance(found, str) and Path(found).read_bytes() == CONTENT
    info = scan_cache_dir(cache)
    assert [repo.repo_id for repo in info.repos] == [REPO] and not info.warnings


def test_offline_nothing_is_asked(download: Run, hub: StandInHub) -> None:
    missing = download(offline=True)
    download()
    asked = len(hub.requests)

    assert (missing["code"], missing["retry"]) == ("offline", False)
    assert download(offline=True)["result"] == "download_finished"
    assert download(offline=True, tag="Q8_0")["code"] == "offline"
    assert len(hub.requests) == asked


# --- logins ---


def test_a_private_repository_wants_the_token(
    download: Run, hub: StandInHub, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    hub.add("u/private", FILES, token="hf_right")

    without = download("u/private")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    wrong = download("u/private")
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    right = download("u/private")

    assert (without["code"], "set HF_TOKEN" in without["reason"]) == ("no_repository", True)
    assert (wrong["code"], "accept its terms" in wrong["reason"]) == ("gated", True)
    assert right["result"] == "download_finished"
    assert listed(cache) == ["u/private:Q4_K_M"]


# --- a hub that does not ---


@pytest.mark.parametrize(
    ("fault", "code", "retry", "words"),
    [
        (Fault(status=401, error_code="RepoNotFound"), "no_repository", False, "set HF_TOKEN"),
        (Fault(status=401), "refused", False, "check HF_TOKEN"),
        (Fault(status=404, error_code="RepoNotFound"), "no_repository", False, "there is no repository u/r"),
        (Fault(status=403), "refused", False, "check HF_TOKEN"),
        (Fault(status=404, error_code="RevisionNotFound"), "no_repository", False, "no branch main"),
        (Fault(status=429, retry_after="17"), "rate_limited", True, "try again in 17 s"),
        (Fault(status=500), "hub_error", True, "answered 500"),
    ],
)
def test_a_refusal_is_explained_and_a_repeat_succeeds(
    download: Run, hub: StandInHub, cache: Path, fault: Fault, code: str, retry: bool, words: str
) -> None:
    hub.fault = fault

    end = download()

    assert (end["result"], end["code"], end["retry"]) == ("download_failed", code, retry)
    assert words in end["reason"]
    assert end["retry_after"] == (17.0 if fault.retry_after else None)
    assert listed(cache) == []
    hub.fault = Fault()
    assert download()["result"] == "download_finished"


def test_a_hub_that_is_not_there_is_unreachable(cache: Path) -> None:
    reports: list[Any] = []
    report: Callable[[Any], None] = reports.append
    command = Download(model=REPO, repo=REPO, cache=str(cache), endpoint="http://127.0.0.1:9")

    run_download(command, report, threading.Event())

    assert (reports[-1]["code"], reports[-1]["retry"]) == ("unreachable", True)


def test_a_connection_that_breaks_is_taken_up_again(download: Run, hub: StandInHub, cache: Path) -> None:
    hub.fault = Fault(cut_after=70_000)

    assert download(mmproj=False)["result"] == "download_finished"

    assert [request.range for request in hub.downloads("m-Q4_K_M.gguf")] == ["", "bytes=70000-", "bytes=140000-"]
    assert listed(cache) == ["u/r:Q4_K_M"]


def test_what_is_there_already_is_checked_in_little_memory(download: Run, hub: StandInHub, cache: Path) -> None:
    content = b"GGUF" + bytes(LARGE)
    hub.add("u/large", {"m-Q8_0.gguf": content})
    digest = hashlib.sha256(content).hexdigest()
    blobs = cache / "models--u--large" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / f"{digest}.incomplete").write_bytes(content[:-1])

    tracemalloc.start()
    try:
        end = download("u/large")
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert end["result"] == "download_finished"
    assert most < LARGE // 3


def test_a_connection_that_always_breaks_is_given_up_and_a_repeat_goes_on(
    download: Run, hub: StandInHub, cache: Path
) -> None:
    hub.fault = Fault(cut_after=70_000, cuts=1)
    cancelled = threading.Event()
    hub.fault = Fault(cut_after=0)
    end = download(cancelled=cancelled, mmproj=False)

    assert (end["code"], end["retry"]) == ("cut_off", True)
    assert "at byte 0 of m-Q4_K_M.gguf" in end["reason"]
    assert listed(cache) == []
    hub.fault = Fault()
    assert download(mmproj=False)["result"] == "download_finished"


def test_a_hub_that_knows_no_ranges_begins_anew(download: Run, hub: StandInHub, cache: Path) -> None:
    hub.fault = Fault(cut_after=70_000, cuts=1, ignore_range=True)

    assert download(mmproj=False)["result"] == "download_finished"

    assert scan_cache(cache)[0].path.read_bytes() == CONTENT


def test_wrong_contents_are_thrown_away(download: Run, hub: StandInHub, cache: Path) -> None:
    hub.fault = Fault(wrong_bytes=True)

    end = download(mmproj=False)

    assert (end["code"], end["retry"]) == ("wrong_contents", True)
    assert listed(cache) == []
    assert [path.stat().st_size for path in unfinished(cache)] == [0]
    hub.fault = Fault()
    assert download(mmproj=False)["result"] == "download_finished"


def test_a_file_that_is_too_short_never_counts_as_whole(download: Run, hub: StandInHub, cache: Path) -> None:
    hub.fault = Fault(short_by=10)

    assert download(mmproj=False)["code"] == "cut_off"

    assert listed(cache) == []
    hub.fault = Fault()
    assert download(mmproj=False)["result"] == "download_finished"


def test_a_file_that_is_too_long_never_counts_as_whole(download: Run, hub: StandInHub, cache: Path) -> None:
    hub.fault = Fault(claim=100)

    assert download(mmproj=False)["code"] == "wrong_contents"

    assert listed(cache) == []


def test_what_does_not_fit_on_the_disk_is_not_begun(download: Run, hub: StandInHub, cache: Path) -> None:
    hub.fault = Fault(claim=10**18)

    end = download(mmproj=False)

    assert (end["code"], end["retry"]) == ("disk_full", True)
    assert "1000000000.00 GB are missing" in end["reason"]
    assert hub.downloads("m-Q4_K_M.gguf") == []


def test_a_disk_that_fills_up_is_named() -> None:
    failure = explain(OSError(errno.ENOSPC, "No space left on device"), REPO)

    assert (failure.code, str(failure)) == ("disk_full", "the disk is full: No space left on device")


def test_a_repository_without_a_gguf_file_says_so(download: Run, hub: StandInHub) -> None:
    hub.add("u/none", {"model.safetensors": b"x", "mmproj-f16.gguf": b"GGUF"})

    assert download("u/none")["reason"] == "u/none has not a GGUF file; it has mmproj-f16.gguf"
    assert download(tag="Q2_K")["reason"].startswith(
        "u/r has not a GGUF file of the quant 'Q2_K'; it has m-Q4_K_M.gguf"
    )


def test_a_split_model_that_lacks_a_part_is_refused(download: Run, hub: StandInHub) -> None:
    hub.add("u/split", {"s-Q8_0-00001-of-00002.gguf": b"GGUF"})

    assert download("u/split")["code"] == "parts_missing"


@pytest.mark.parametrize(
    "path",
    ["../evil-Q4_K_M.gguf", "/evil-Q4_K_M.gguf", "a/../../evil.gguf", "a\\..\\evil.gguf", "a//evil.gguf", "a\n.gguf"],
)
def test_a_path_that_leads_out_does_not_exist(
    download: Run, hub: StandInHub, cache: Path, tmp_path: Path, path: str
) -> None:
    hub.add("u/evil", {path: b"GGUF evil"})

    assert not stays_within(path)
    assert download("u/evil")["code"] == "no_such_file"
    assert download("u/evil", file=path)["code"] == "no_such_file"
    assert not list(tmp_path.rglob("*evil*.gguf"))


def test_nothing_is_written_through_a_link(download: Run, cache: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    cache.mkdir()
    (cache / "models--u--r").symlink_to(outside)

    assert download()["code"] == "cache"
    assert list(outside.iterdir()) == [] or not list(outside.rglob("*.gguf"))


# --- in the middle ---


def test_a_download_that_is_cancelled_goes_on_where_it_ended(download: Run, hub: StandInHub, cache: Path) -> None:
    hub.fault = Fault(hold=threading.Event())
    cancelled = threading.Event()
    ends: list[dict[str, Any]] = []
    thread = threading.Thread(target=lambda: ends.append(download(cancelled=cancelled, mmproj=False)))
    thread.start()
    while not unfinished(cache) or not unfinished(cache)[0].stat().st_size:
        assert thread.is_alive()
    cancelled.set()
    hub.fault.hold.set()  # type: ignore[union-attr]
    assert ended(thread, 20)

    assert ends[0]["code"] == "cancelled"
    assert listed(cache) == []
    hub.fault = Fault()
    assert download(mmproj=False)["result"] == "download_finished"
    assert hub.downloads("m-Q4_K_M.gguf")[-1].range.startswith("bytes=")


def test_two_downloads_of_one_model_fetch_it_once(download: Run, hub: StandInHub, cache: Path) -> None:
    ends: list[dict[str, Any]] = []
    threads = [threading.Thread(target=lambda: ends.append(download())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        assert ended(thread, 30)

    assert [end["result"] for end in ends] == ["download_finished"] * 2
    assert len(hub.downloads("m-Q4_K_M.gguf")) == 1
    assert listed(cache) == ["u/r:Q4_K_M"]
