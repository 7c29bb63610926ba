"""Files by their addresses, from a server that behaves and from one that does not: real sockets, and never a file under
its own name that is not whole.
"""

import asyncio
import hashlib
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from herding import fake, run, until
from llamaherd.pool import LoadFailed, ModelSpec, Origin, Pool
from llamaherd.pool.child.disk import LOOK_BYTES, SPARE_BYTES
from llamaherd.pool.child.download import run_download
from llamaherd.pool.hub import url_folder
from stand_in_hub import Fault, StandInHub

CONTENT = b"GGUF" + os.urandom(200_000)

Run = Callable[..., dict[str, Any]]


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LLAMA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")


@pytest.fixture
def hub() -> Iterator[StandInHub]:
    with StandInHub() as hub:
        parts = {f"s-0000{part}-of-00003.gguf": b"GGUF" + os.urandom(1000) for part in (1, 2, 3)}
        hub.add("u/r", {"m.gguf": CONTENT, "page.gguf": b"<html>", **parts})
        yield hub


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "m.gguf"


def address(hub: StandInHub, file: str = "m.gguf") -> str:
    return f"{hub.url}/u/r/resolve/main/{file}"


@pytest.fixture
def download(hub: StandInHub) -> Run:
    """Runs a download and returns its last report, with all reports under ``reports``."""

    def run(
        url: str = "", path: Path | None = None, cancelled: threading.Event | None = None, **more: Any
    ) -> dict[str, Any]:
        reports: list[dict[str, Any]] = []
        report: Callable[[Any], None] = reports.append
        command = Origin(url=url or address(hub), path=path, **more).to_download("m")
        run_download(command, report, cancelled or threading.Event(), pause=0.01)
        return {**reports[-1], "reports": reports}

    return run


def left(target: Path) -> list[str]:
    """Return the names of visible files beside the target."""
    return sorted(path.name for path in target.parent.iterdir() if not path.name.startswith("."))


def test_a_file_arrives_under_its_name_with_what_the_server_calls_it(
    download: Run, hub: StandInHub, target: Path
) -> None:
    told = download(f"{address(hub)}?download=true&key=secret#x")

    assert told["result"] == "download_finished"
    assert target.read_bytes() == CONTENT
    assert left(target) == ["m.gguf", "m.gguf.etag", "m.gguf.url"]
    assert target.with_name("m.gguf.etag").read_text() == f'"{hashlib.sha1(CONTENT).hexdigest()}"'
    first, *progress, _ = told["reports"]
    assert first == {"plan": {address(hub): len(CONTENT)}}
    assert progress[-1] == {"url": address(hub), "downloaded": len(CONTENT), "total": len(CONTENT)}
    assert "secret" not in str(told)


def test_no_token_is_sent(download: Run, hub: StandInHub) -> None:
    download()

    assert {request.token for request in hub.requests} == {""}


def test_a_path_may_be_named(download: Run, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "other.gguf"

    assert download(path=path)["result"] == "download_finished"
    assert path.read_bytes() == CONTENT


def test_all_parts_of_a_split_model_arrive(download: Run, hub: StandInHub, target: Path) -> None:
    url = address(hub, "s-00001-of-00003.gguf")
    assert Origin(url=url).find() is None

    assert download(url)["result"] == "download_finished"
    names = [f"s-0000{part}-of-00003.gguf" for part in (1, 2, 3)]
    assert [name for name in left(target) if name.endswith(".gguf")] == names
    found = Origin(url=url).find()
    assert found is not None and found.path == target.with_name(names[0])


def test_what_is_there_is_not_asked_for(download: Run, hub: StandInHub, target: Path) -> None:
    target.parent.mkdir()
    target.write_bytes(b"GGUF mine")

    assert download()["result"] == "download_finished"
    assert (target.read_bytes(), hub.requests) == (b"GGUF mine", [])


def test_an_address_that_is_for_get_alone_is_fetched_all_the_same(download: Run, hub: StandInHub, target: Path) -> None:
    hub.fault = Fault(no_head=True)

    assert download()["result"] == "download_finished"
    assert target.read_bytes() == CONTENT


def test_what_does_not_fit_on_the_disk_is_not_begun_even_if_only_the_answer_says_its_size(
    download: Run, hub: StandInHub, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.fault = Fault(no_head=True)

    def nearly_full(_folder: Path) -> SimpleNamespace:
        return SimpleNamespace(free=SPARE_BYTES + len(CONTENT) // 2)

    monkeypatch.setattr(shutil, "disk_usage", nearly_full)

    end = download()

    assert (end["result"], end["code"]) == ("download_failed", "disk_full")
    assert target.with_name("m.gguf.downloadInProgress").stat().st_size == 0


def test_a_file_of_unknown_length_arrives(download: Run, hub: StandInHub, target: Path) -> None:
    hub.fault = Fault(no_length=True)

    assert download()["result"] == "download_finished"
    assert target.read_bytes() == CONTENT


def test_a_file_that_does_not_say_its_length_leaves_room_on_the_disk(
    download: Run, hub: StandInHub, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("u/r", {"m.gguf": b"GGUF" + bytes(4 * LOOK_BYTES)})
    hub.fault = Fault(no_length=True)
    partial = target.with_name("m.gguf.downloadInProgress")
    most = 0

    def small(_folder: Path) -> SimpleNamespace:
        nonlocal most
        used = partial.stat().st_size if partial.exists() else 0
        most = max(most, used)
        return SimpleNamespace(free=2 * LOOK_BYTES + SPARE_BYTES - used)

    monkeypatch.setattr(shutil, "disk_usage", small)

    end = download()

    assert (end["result"], end["code"], end["retry"]) == ("download_failed", "disk_full", True)
    assert f"the disk of {target.parent} is full" in end["reason"] and "make room" in end["reason"]
    assert 0 < most < 3 * LOOK_BYTES
    # It may be endless: what has come of it takes nobody's room.
    assert partial.stat().st_size == 0 and not target.exists()


def test_a_file_of_another_address_is_replaced(download: Run, hub: StandInHub, target: Path) -> None:
    hub.add("other/r", {"m.gguf": b"GGUF the other"})
    other = f"{hub.url}/other/r/resolve/main/m.gguf"
    assert download()["result"] == "download_finished"
    assert Origin(url=address(hub)).find() is not None and Origin(url=other).find() is None
    assert "is that of another address" in download(other, offline=True)["reason"]

    assert download(other)["result"] == "download_finished"

    assert target.read_bytes() == b"GGUF the other"
    assert Origin(url=other).find() is not None and Origin(url=address(hub)).find() is None


def test_a_file_of_another_address_stays_until_its_successor_is_whole(
    download: Run, hub: StandInHub, target: Path
) -> None:
    assert download()["result"] == "download_finished"

    assert download(f"{hub.url}/nobody/r/resolve/main/m.gguf")["code"] == "refused"

    assert target.read_bytes() == CONTENT
    assert Origin(url=address(hub)).find() is not None


def test_a_part_of_a_file_of_another_address_is_not_gone_on_with(download: Run, hub: StandInHub, target: Path) -> None:
    cancel_at(download, hub, target)
    hub.add("other/r", {"m.gguf": b"GGUF" + bytes(len(CONTENT))})
    hub.fault = Fault(etag=f'"{hashlib.sha1(CONTENT).hexdigest()}"')  # they may call their versions alike

    assert download(f"{hub.url}/other/r/resolve/main/m.gguf")["result"] == "download_finished"

    assert target.read_bytes() == b"GGUF" + bytes(len(CONTENT))


@pytest.mark.parametrize(
    "other",
    ["{0}?X-Signature=new", "{0}#part"],
    ids=["signature", "fragment"],
)
def test_an_address_that_is_signed_anew_is_the_same(download: Run, hub: StandInHub, other: str) -> None:
    assert download()["result"] == "download_finished"

    assert Origin(url=other.format(address(hub))).find() is not None


def test_a_file_that_somebody_else_put_there_is_taken_as_it_is(download: Run, hub: StandInHub, target: Path) -> None:
    other = f"{hub.url}/other/r/resolve/main/m.gguf"
    assert download()["result"] == "download_finished"
    target.write_bytes(b"GGUF mine")

    assert Origin(url=other).find() is not None
    assert download(other)["result"] == "download_finished"
    assert target.read_bytes() == b"GGUF mine"


def test_a_connection_that_breaks_is_taken_up_again(download: Run, hub: StandInHub, target: Path) -> None:
    hub.fault = Fault(cut_after=50_000, cuts=2)

    assert download()["result"] == "download_finished"
    assert target.read_bytes() == CONTENT
    assert [request.range for request in hub.downloads("m.gguf")] == ["", "bytes=50000-", "bytes=100000-"]


def test_a_connection_that_always_breaks_is_given_up_and_a_repeat_goes_on(
    download: Run, hub: StandInHub, target: Path
) -> None:
    hub.fault = Fault(cut_after=0)
    told = download()
    assert (told["result"], told["retry"]) == ("download_failed", True)
    hub.fault = Fault(cut_after=50_000, cuts=1)

    assert download()["result"] == "download_finished"
    assert target.read_bytes() == CONTENT


def test_another_version_is_not_mixed_with_what_is_there_of_the_last(
    download: Run, hub: StandInHub, target: Path
) -> None:
    cancel_at(download, hub, target)
    newer = b"GGUF" + os.urandom(len(CONTENT))
    hub.add("u/r", {"m.gguf": newer})
    hub.fault = Fault()

    assert download()["result"] == "download_finished"
    assert target.read_bytes() == newer


def test_a_version_that_has_no_name_of_its_own_is_not_mixed_with_one_that_has(
    download: Run, hub: StandInHub, target: Path
) -> None:
    hub.fault = Fault(etag='"one"', cut_after=50_000, ignore_range=True)
    assert download()["code"] == "cut_off"
    hub.add("u/r", {"m.gguf": b"GGUF" + os.urandom(len(CONTENT))})
    hub.fault = Fault(etag='W/"two"', cut_after=50_000, ignore_range=True)
    assert download()["code"] == "cut_off"
    hub.add("u/r", {"m.gguf": CONTENT})
    hub.fault = Fault(etag='"one"')

    assert download()["result"] == "download_finished"
    assert target.read_bytes() == CONTENT


def test_a_version_whose_name_cannot_be_sent_back_begins_anew(download: Run, hub: StandInHub, target: Path) -> None:
    hub.fault = Fault(etag='"\xe4"', cut_after=50_000, cuts=1)

    assert download()["result"] == "download_finished"
    assert target.read_bytes() == CONTENT


def test_a_download_that_is_cancelled_goes_on_where_it_ended(download: Run, hub: StandInHub, target: Path) -> None:
    have = cancel_at(download, hub, target)
    assert Origin(url=address(hub)).find() is None
    hub.fault = Fault()

    assert download()["result"] == "download_finished"
    assert target.read_bytes() == CONTENT
    assert hub.downloads("m.gguf")[-1].range == f"bytes={have}-"


def cancel_at(download: Run, hub: StandInHub, target: Path) -> int:
    """Cancel a download in its middle, and return how many bytes are there."""
    cancelled = threading.Event()
    hub.fault = Fault(hold=threading.Event())
    assert hub.fault.hold is not None
    partial = target.with_name("m.gguf.downloadInProgress")
    results: list[dict[str, Any]] = []
    thread = threading.Thread(target=lambda: results.append(download(cancelled=cancelled)))
    thread.start()
    while not (partial.exists() and partial.stat().st_size):
        pass  # the test's timeout is the deadline
    cancelled.set()
    hub.fault.hold.set()
    thread.join()
    assert results[0]["code"] == "cancelled"
    assert not target.exists()
    return partial.stat().st_size


@pytest.mark.parametrize(
    ("fault", "code", "retry", "reason"),
    [
        (Fault(status=401), "refused", False, "refuses .*m.gguf .401"),
        (Fault(status=404), "no_such_file", False, "there is no file .*m.gguf"),
        (Fault(status=429, retry_after="7"), "rate_limited", True, "asked too often, try again in 7 s"),
        (Fault(status=503), "server", True, "answered 503"),
        (Fault(digest="0" * 64), "wrong_contents", True, "another digest than the server says"),
        (Fault(wrong_bytes=True), "wrong_contents", True, "no GGUF file: it starts with"),
    ],
)
def test_a_refusal_is_explained_and_a_repeat_succeeds(
    download: Run, hub: StandInHub, target: Path, fault: Fault, code: str, retry: bool, reason: str
) -> None:
    hub.fault = fault
    told = download()
    assert (told["result"], told["code"], told["retry"]) == ("download_failed", code, retry)
    assert told["retry_after"] == (7.0 if fault.retry_after else None)
    assert re.search(reason, told["reason"])
    assert not target.exists()
    hub.fault = Fault()

    assert download()["result"] == "download_finished"
    assert target.read_bytes() == CONTENT


def test_a_server_that_is_not_there_is_unreachable(download: Run) -> None:
    told = download("http://127.0.0.1:9/m.gguf")

    assert (told["code"], told["retry"]) == ("unreachable", True)


def test_a_page_is_no_model(download: Run, hub: StandInHub, target: Path) -> None:
    told = download(address(hub, "page.gguf"))

    assert "is no GGUF file: it starts with b'<htm'" in told["reason"]
    assert not target.with_name("page.gguf").exists()


def test_offline_nobody_is_asked(download: Run, hub: StandInHub) -> None:
    told = download(offline=True)

    assert told["code"] == "offline" and "m.gguf is not there, and this is offline" in told["reason"]
    assert hub.requests == []


def test_nothing_is_written_through_a_link(download: Run, target: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"mine")
    target.parent.mkdir()
    target.with_name("m.gguf.downloadInProgress").symlink_to(victim)

    assert download()["result"] == "download_failed"
    assert victim.read_bytes() == b"mine"


def test_two_downloads_of_one_file_fetch_it_once(download: Run, hub: StandInHub, target: Path) -> None:
    results: list[dict[str, Any]] = []
    threads = [threading.Thread(target=lambda: results.append(download())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert [told["result"] for told in results] == ["download_finished"] * 2
    assert len(hub.downloads("m.gguf")) == 1


def test_the_folder_of_addresses_is_llama_cpps(tmp_path: Path) -> None:
    assert url_folder({"LLAMA_CACHE": "/a", "XDG_CACHE_HOME": "/b"}) == Path("/a")
    assert url_folder({"XDG_CACHE_HOME": "/b"}) == Path("/b/llama.cpp")


def test_a_model_of_an_address_is_downloaded_when_it_is_loaded(hub: StandInHub, target: Path) -> None:
    spec = msgspec.structs.replace(fake("m"), origin=Origin(url=address(hub)))

    async def scene() -> None:
        async with Pool([spec]) as pool:
            hub.fault = Fault(status=404)
            with pytest.raises(LoadFailed, match="its download failed: there is no file"):
                await pool.load("m")
            hub.fault = Fault()
            texts = await asyncio.gather(*(pool.complete("m", "hello").collect() for _ in range(3)))
            assert [text.text for text in texts] == ["hello"] * 3
            assert pool.status("m").path == str(target)

    run(scene())


def test_a_preset_that_names_another_address_is_served_its_file_and_no_longer_the_old_one(
    hub: StandInHub, target: Path
) -> None:
    hub.add("other/r", {"m.gguf": b"GGUF the other"})
    other = f"{hub.url}/other/r/resolve/main/m.gguf"

    def catalogued(url: str) -> ModelSpec:
        found = Origin(url=url).find()
        spec = fake("m", step_seconds=0.01)
        return msgspec.structs.replace(spec, origin=Origin(url=url), path=None if found is None else found.path)

    async def scene() -> None:
        async with Pool([catalogued(address(hub))]) as pool:
            await pool.load("m")
            pid = pool.status("m").pid
            running = pool.complete("m", " ".join(["word"] * 10_000))
            await anext(aiter(running))
            pool.reload([catalogued(other)])
            waits = asyncio.ensure_future(pool.complete("m", "hello").collect())
            # The worker of the old file has not ended when the new one is there.
            await until(lambda: pool.status("m").path is not None)
            assert target.read_bytes() == b"GGUF the other"
            assert pool.status("m").pid == pid and not waits.done()
            await running.aclose()
            assert (await waits).text == "hello"
            assert pool.status("m").pid != pid

    run(scene())
