"""Downloads as the pool runs them: in workers of their own that take nobody's place, can be cancelled and may die."""

import asyncio
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from herding import fake, run, until, wait_gone
from llamaherd.pool import (
    BadRequest,
    DownloadFailed,
    Event,
    ModelBusy,
    ModelNotFound,
    ModelSpec,
    Pool,
    QueueFull,
    State,
    SyncPool,
    scan_cache,
)
from llamaherd.pool.downloads import MAX_DOWNLOADS
from stand_in_hub import Fault, StandInHub

CONTENT = b"GGUF" + os.urandom(200_000)
NAME = "u/r:Q8_0"


@pytest.fixture(autouse=True)
def no_login(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nobody is logged in, and what is downloaded goes into the test's own cache."""
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("LLAMA_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandInHub]:
    with StandInHub() as hub:
        hub.add("u/r", {"m-Q8_0.gguf": CONTENT})
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        yield hub


def held(hub: StandInHub) -> threading.Event:
    """Let files stop after their first block, until the event is set."""
    hold = threading.Event()
    hub.fault = Fault(hold=hold)
    return hold


def listed(tmp_path: Path) -> list[str]:
    return [model.name for model in scan_cache(tmp_path / "cache")]


def begun(tmp_path: Path) -> bool:
    """Whether some bytes have arrived."""
    return any(path.stat().st_size for path in tmp_path.rglob("*.incomplete"))


def test_a_download_is_listed_told_and_then_there(hub: StandInHub, tmp_path: Path) -> None:
    async def scene() -> list[Event]:
        told: list[Event] = []
        async with Pool() as pool:
            events = pool.events()
            await anext(events)
            await pool.download(NAME)
            assert [(status.name, status.state, status.source) for status in pool.models()] == [
                (NAME, State.DOWNLOADED, "cache")
            ]
            while not told or told[-1].event != "download_finished":
                told.append(await anext(events))
        return told

    told = run(scene())

    assert listed(tmp_path) == [NAME]
    assert (told[0].event, told[0].data) == ("model_status", {"status": "downloading"})
    ((url, last),) = told[-2].data["progress"].items()
    assert url.endswith("/m-Q8_0.gguf") and last == {"done": len(CONTENT), "total": len(CONTENT)}
    assert told[-2].event == "download_progress" and told[-2].data[url] == last


def test_a_download_takes_no_models_place(hub: StandInHub) -> None:
    async def scene() -> None:
        hold = held(hub)
        async with Pool([fake("m")], models_max=1) as pool:
            await pool.start_download(NAME)
            assert pool.status(NAME).state is State.DOWNLOADING
            assert (await pool.load("m")).state is State.LOADED
            assert (await pool.chat("m", [{"role": "user", "content": "hi"}]).collect()).text
            hold.set()
            await until(lambda: pool.status(NAME).state is State.DOWNLOADED)

    run(scene())


def test_an_unload_cancels_and_a_repeat_goes_on(hub: StandInHub, tmp_path: Path) -> None:
    async def scene() -> None:
        held(hub)
        async with Pool() as pool:
            work = asyncio.ensure_future(pool.download(NAME))
            await until(lambda: begun(tmp_path))
            status = await pool.unload(NAME)
            assert status.state is State.UNLOADED
            with pytest.raises(DownloadFailed, match="was cancelled") as caught:
                await work
            assert (caught.value.code, caught.value.retry) == ("cancelled", True)
            assert pool.models() == []
            with pytest.raises(ModelNotFound):
                pool.status(NAME)
            assert listed(tmp_path) == []
            hub.fault = Fault()
            await pool.download(NAME)

    run(scene())

    assert listed(tmp_path) == [NAME]
    assert hub.downloads("m-Q8_0.gguf")[-1].range.startswith("bytes=")


def test_a_killed_worker_leaves_nothing_on_the_list_and_a_repeat_goes_on(hub: StandInHub, tmp_path: Path) -> None:
    async def scene() -> None:
        held(hub)
        async with Pool() as pool:
            events = pool.events()
            await anext(events)
            work = asyncio.ensure_future(pool.download(NAME))
            await until(lambda: begun(tmp_path))
            pid = pool.status(NAME).pid
            assert pid
            os.kill(pid, signal.SIGKILL)
            with pytest.raises(DownloadFailed, match="killed by SIGKILL") as caught:
                await work
            assert (caught.value.code, caught.value.retry) == ("worker_died", True)
            assert pool.models() == [] and listed(tmp_path) == []
            async for event in events:
                if event.event == "download_failed":
                    assert event.data["code"] == "worker_died" and "SIGKILL" in event.data["reason"]
                    break
            hub.fault = Fault()
            await pool.download(NAME)

    run(scene())

    assert listed(tmp_path) == [NAME]
    assert hub.downloads("m-Q8_0.gguf")[-1].range.startswith("bytes=")


def test_a_pool_that_closes_leaves_no_download_behind(hub: StandInHub) -> None:
    async def scene() -> int:
        held(hub)
        async with Pool() as pool:
            await pool.start_download(NAME)
            return pool.status(NAME).pid or 0

    assert wait_gone([run(scene())]) == []


def test_a_cancelled_wait_cancels_the_download(hub: StandInHub, tmp_path: Path) -> None:
    async def scene() -> None:
        held(hub)
        async with Pool() as pool:
            work = asyncio.ensure_future(pool.download(NAME))
            await until(lambda: begun(tmp_path))
            work.cancel()
            await until(lambda: not pool.models())

    run(scene())


def test_one_model_is_downloaded_once_at_a_time_and_not_too_many_are(hub: StandInHub) -> None:
    async def scene() -> None:
        held(hub)
        async with Pool() as pool:
            await pool.start_download(NAME)
            with pytest.raises(ModelBusy, match="is being downloaded already"):
                await pool.start_download(NAME)
            others = [asyncio.ensure_future(pool.download(f"u/other{n}")) for n in range(MAX_DOWNLOADS - 1)]
            await asyncio.sleep(0)
            with pytest.raises(QueueFull, match="downloads go on already"):
                await pool.start_download("u/last")
            await asyncio.gather(*others, return_exceptions=True)

    run(scene())


def test_the_token_is_in_no_command_line_and_in_no_other_worker(
    hub: StandInHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecret")
    hub.add("u/private", {"m-Q8_0.gguf": CONTENT}, token="hf_secretsecret")

    async def scene() -> None:
        hold = held(hub)
        async with Pool([fake("m")]) as pool:
            await pool.load("m")
            await pool.start_download("u/private:Q8_0")
            process = psutil.Process(pool.status("u/private:Q8_0").pid)
            other = psutil.Process(pool.status("m").pid)
            assert "hf_secretsecret" not in " ".join(process.cmdline())
            assert process.environ().get("HF_TOKEN") == "hf_secretsecret"
            assert "HF_TOKEN" not in other.environ()
            hold.set()
            await until(lambda: pool.status("u/private:Q8_0").state is State.DOWNLOADED)

    run(scene())

    assert listed(tmp_path) == ["u/private:Q8_0"]


def test_a_token_may_be_given_for_one_download(hub: StandInHub, tmp_path: Path) -> None:
    hub.add("u/private", {"m-Q8_0.gguf": CONTENT}, token="hf_given")

    async def scene() -> None:
        async with Pool() as pool:
            with pytest.raises(DownloadFailed, match="set HF_TOKEN"):
                await pool.start_download("u/private")
            await pool.download("u/private", token="hf_given")

    run(scene())

    assert listed(tmp_path) == ["u/private:Q8_0"]


def test_what_cannot_be_downloaded_is_told_at_the_start(hub: StandInHub) -> None:
    async def scene() -> None:
        async with Pool([ModelSpec(name="u/here", engine="fake", path=Path("/m.gguf"))]) as pool:
            with pytest.raises(BadRequest, match="no model name"):
                await pool.start_download("../x")
            with pytest.raises(BadRequest, match="already exists"):
                await pool.start_download("u/here")
            with pytest.raises(DownloadFailed, match="no repository u/missing") as caught:
                await pool.start_download("u/missing")
            assert (caught.value.code, caught.value.retry) == ("no_repository", False)

    run(scene())


def test_the_pool_without_async_downloads_too(hub: StandInHub, tmp_path: Path) -> None:
    with SyncPool() as pool:
        pool.download(NAME)
        states: list[Any] = [status.state for status in pool.models()]

    assert (states, listed(tmp_path)) == ([State.DOWNLOADED], [NAME])
