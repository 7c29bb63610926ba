"""Models whose files are not there yet: they are downloaded when the model is loaded, and then it is loaded."""

import asyncio
import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from herding import fake, reach, run, until
from llamaherd.pool import (
    BadRequest,
    EngineOptions,
    LoadFailed,
    ModelBusy,
    ModelNotFound,
    ModelSpec,
    Origin,
    Pool,
    PoolClosed,
    QueueFull,
    QueueTimeout,
    State,
    WorkerFailed,
    restart,
)
from llamaherd.pool.downloads import MAX_DOWNLOADS
from stand_in_hub import Fault, StandInHub
from tiny_gguf import tiny_model

CONTENT = b"GGUF" + os.urandom(200_000)
ORIGIN = Origin(repo="u/r:Q8_0")


@pytest.fixture(autouse=True)
def no_login(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nobody is logged in, and what is downloaded goes into the test's own cache."""
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("LLAMA_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandInHub]:
    with StandInHub() as hub:
        hub.add("u/r", {"m-Q8_0.gguf": CONTENT, "mmproj-f16.gguf": b"GGUF eyes"})
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        yield hub


def absent(name: str = "m", origin: Origin = ORIGIN, **settings: Any) -> ModelSpec:
    """Return the spec of a model whose files have to be downloaded, and that the scripted engine plays then."""
    return msgspec.structs.replace(fake(name), origin=origin, **settings)


def held(hub: StandInHub) -> threading.Event:
    """Let files stop after their first block, until the event is set."""
    hub.fault = Fault(hold=threading.Event())
    assert hub.fault.hold is not None
    return hub.fault.hold


def begun(tmp_path: Path) -> bool:
    """Whether some bytes of the model have arrived; those of what comes with it are fewer."""
    with contextlib.suppress(FileNotFoundError):  # it has its own name by now
        return any(path.stat().st_size > 100 for path in tmp_path.rglob("*.incomplete"))
    return False


def test_a_request_downloads_its_model_loads_it_and_is_answered(hub: StandInHub, tmp_path: Path) -> None:
    async def scene() -> list[tuple[str, Any]]:
        told: list[tuple[str, Any]] = []
        async with Pool([absent()]) as pool:
            events = pool.events()
            await anext(events)
            assert (await pool.complete("m", "hello").collect()).text == "hello"
            status = pool.status("m")
            assert (status.state, status.source) == (State.LOADED, "preset")
            assert status.path is not None and Path(status.path).read_bytes() == CONTENT
            assert [one.name for one in pool.models()] == ["m"]
            while not told or told[-1] != ("status_change", "loaded"):
                event = await anext(events)
                told.append((event.event, event.data.get("status")))
        return told

    told = list(dict.fromkeys(run(scene())))

    assert told == [
        ("model_status", "downloading"),
        ("download_progress", None),
        ("download_finished", None),
        ("model_status", "loading"),
        ("status_change", "loading"),
        ("status_change", "loaded"),
    ]


def test_a_model_that_was_downloaded_by_its_name_tells_its_own_state_again(hub: StandInHub) -> None:
    name = "u/r:Q8_0"

    async def scene() -> None:
        async with Pool([absent(name)]) as pool:
            await pool.download(name)
            assert pool.status(name).state is State.UNLOADED
            await pool.load(name)
            assert pool.status(name).state is State.LOADED
            assert [status.state for status in pool.models()] == [State.LOADED]

    run(scene())


def test_a_projector_comes_with_it_unless_it_is_not_wanted(hub: StandInHub, tmp_path: Path) -> None:
    async def scene() -> None:
        plain = msgspec.structs.replace(ORIGIN, mmproj=False)
        async with Pool([absent("plain", plain), absent("seeing")]) as pool:
            await pool.load("plain")
            assert not hub.downloads("mmproj-f16.gguf")
            await pool.load("seeing")
            assert not hub.downloads("mmproj-f16.gguf")  # what is there in whole is not asked for

    run(scene())


def test_while_it_comes_the_model_is_listed_as_downloading_with_its_progress(hub: StandInHub, tmp_path: Path) -> None:
    async def scene() -> None:
        hold = held(hub)
        async with Pool([absent(aliases=("also",))]) as pool:
            pool.start_load("m")
            await until(lambda: begun(tmp_path) and pool.status("also").progress is not None)
            (status,) = pool.models()
            assert (status.name, status.state, status.aliases) == ("m", State.DOWNLOADING, ("also",))
            assert {url.rpartition("/")[2]: file["total"] for url, file in (status.progress or {}).items()} == {
                "mmproj-f16.gguf": 9,
                "m-Q8_0.gguf": len(CONTENT),
            }
            assert status.pid is not None and status.args
            assert pool.logs("m") == ()
            with pytest.raises(ModelBusy):
                pool.start_load("m")
            hold.set()
            await reach(pool, "m", State.LOADED)

    run(scene())


def test_an_unload_cancels_it_and_a_repeat_goes_on_where_it_ended(hub: StandInHub, tmp_path: Path) -> None:
    async def scene() -> None:
        held(hub)
        async with Pool([absent()]) as pool:
            waiting = pool.complete("m", "hello")
            await until(lambda: begun(tmp_path))
            assert (await pool.unload("m")).state is State.UNLOADED
            with pytest.raises(WorkerFailed, match="was unloaded"):
                await waiting.collect()
            status = pool.status("m")
            assert (status.state, status.failed, status.queued) == (State.UNLOADED, False, 0)
            hub.fault = Fault()
            assert (await pool.load("m")).state is State.LOADED

    run(scene())

    assert hub.downloads("m-Q8_0.gguf")[-1].range.startswith("bytes=")


def test_who_asks_while_a_download_is_being_cancelled_begins_it_anew(hub: StandInHub, tmp_path: Path) -> None:
    async def scene() -> None:
        held(hub)
        async with Pool([absent()]) as pool:
            pool.start_load("m")
            await until(lambda: begun(tmp_path))
            pool.start_unload("m")
            again = pool.complete("m", "again")
            hub.fault = Fault()
            assert (await again.collect()).text == "again"

    run(scene())


def test_what_is_to_be_loaded_at_the_start_is_downloaded_then(hub: StandInHub) -> None:
    async def scene() -> None:
        async with Pool([absent(load_on_startup=True)]) as pool:
            await reach(pool, "m", State.LOADED)

    run(scene())


def test_a_repositorys_name_alone_is_origin_enough(hub: StandInHub) -> None:
    spec = ModelSpec(name="m", repo="u/r:Q8_0")

    assert spec.missing() == ORIGIN
    assert msgspec.structs.replace(spec, path=Path("/m.gguf")).missing() is None


@pytest.mark.parametrize(
    ("origin", "message"),
    [
        (Origin(), "a repository or an address"),
        (Origin(repo="u/r", url="http://h/m.gguf"), "a repository or an address"),
        (Origin(repo="../r"), "no model name"),
        (Origin(url="file:///etc/passwd"), "no http or https address"),
        (Origin(url="http://h/m.bin"), "does not end in the name of a .gguf file"),
        (Origin(url="http://h/..%2f..%2fm.gguf"), "does not end in the name of a .gguf file"),
        (Origin(url="http://h/.m.gguf"), "does not end in the name of a .gguf file"),
        (Origin(url="http://[/m.gguf"), "is no address"),
    ],
)
def test_an_origin_that_is_none_is_refused(origin: Origin, message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        absent(origin=origin).check()


def test_an_origin_shows_no_token() -> None:
    assert "hf_secret" not in repr(absent(origin=Origin(repo="u/r", token="hf_secret")))


def test_the_token_of_an_origin_opens_its_repository(hub: StandInHub) -> None:
    hub.add("u/private", {"m-Q8_0.gguf": CONTENT}, token="hf_given")

    async def scene() -> None:
        async with Pool([absent(origin=Origin(repo="u/private", token="hf_given")), absent("n")]) as pool:
            assert (await pool.load("m")).state is State.LOADED
            assert pool.status("n").state is State.UNLOADED

    run(scene())


def test_offline_the_reason_is_told_and_nobody_is_asked(hub: StandInHub) -> None:
    async def scene() -> None:
        async with Pool([absent(origin=Origin(repo="u/r:Q8_0", offline=True))]) as pool:
            with pytest.raises(
                LoadFailed, match="'m' could not be loaded.*u/r:Q8_0 is not in the cache.*offline"
            ) as no:
                await pool.complete("m", "hello").collect()
            assert (no.value.code, no.value.retry) == ("offline", False)
            status = pool.status("m")
            assert (status.failed, status.state) == (True, State.UNLOADED)
            assert "offline" in (status.error or "")

    run(scene())

    assert hub.requests == []


def test_a_failed_download_is_told_and_a_repeat_succeeds(hub: StandInHub) -> None:
    async def scene() -> None:
        hub.fault = Fault(status=429, retry_after="7")
        async with Pool([absent()]) as pool:
            with pytest.raises(LoadFailed, match="asked too often") as caught:
                await pool.complete("m", "hello").collect()
            assert (caught.value.code, caught.value.retry, caught.value.retry_after) == ("rate_limited", True, 7.0)
            assert pool.status("m").failed
            hub.fault = Fault()
            assert (await pool.complete("m", "hello").collect()).text == "hello"
            assert not pool.status("m").failed

    run(scene())


def test_downloads_that_fail_again_and_again_are_not_tried_at_once(
    hub: StandInHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restart, "FIRST_SECONDS", 60.0)

    async def scene() -> None:
        hub.fault = Fault(status=500)
        async with Pool([absent()]) as pool:
            for _ in range(2):
                with pytest.raises(LoadFailed, match="answered 500"):
                    await pool.complete("m", "hello").collect()
            with pytest.raises(LoadFailed, match="is not tried again for.*answered 500") as caught:
                await pool.complete("m", "hello").collect()
            assert caught.value.code == "load_backoff"

    run(scene())


def test_a_killed_download_is_told_and_a_repeat_succeeds(hub: StandInHub, tmp_path: Path) -> None:
    async def scene() -> None:
        held(hub)
        async with Pool([absent()]) as pool:
            loading = asyncio.ensure_future(pool.load("m"))
            await until(lambda: begun(tmp_path))
            pid = pool.status("m").pid
            assert pid
            os.kill(pid, signal.SIGKILL)
            with pytest.raises(LoadFailed, match="killed by SIGKILL"):
                await loading
            hub.fault = Fault()
            assert (await pool.load("m")).state is State.LOADED

    run(scene())


def test_a_caller_that_leaves_does_not_end_it(hub: StandInHub, tmp_path: Path) -> None:
    async def scene() -> None:
        hold = held(hub)
        async with Pool([absent()]) as pool:
            loading = asyncio.ensure_future(pool.load("m"))
            await until(lambda: begun(tmp_path))
            loading.cancel()
            await asyncio.wait([loading])
            assert pool.status("m").state is State.DOWNLOADING
            hold.set()
            await until(lambda: pool.status("m").path is not None)
            assert pool.status("m").state is State.UNLOADED
            await pool.load("m")

    run(scene())

    assert len(hub.downloads("m-Q8_0.gguf")) == 1


def test_a_request_waits_no_longer_than_it_may(hub: StandInHub) -> None:
    async def scene() -> None:
        held(hub)
        async with Pool([absent(queue_timeout=0.05)]) as pool:
            pool.start_load("m")
            await reach(pool, "m", State.DOWNLOADING)
            with pytest.raises(QueueTimeout, match="'m', which is downloading"):
                await pool.complete("m", "hello").collect()

    run(scene())


@pytest.mark.parametrize(("own", "of_pool"), [(2, 9), (None, 2)])
def test_no_more_wait_for_a_download_than_may(hub: StandInHub, own: int | None, of_pool: int) -> None:
    async def scene() -> None:
        hold = held(hub)
        async with Pool([absent(queue_max=own)], queue_max_per_model=of_pool) as pool:
            first = [pool.complete("m", "hello") for _ in range(2)]
            with pytest.raises(QueueFull, match="2 requests wait for model 'm' already, and the limit is 2"):
                await pool.complete("m", "hello").collect()
            hold.set()
            assert [(await one.collect()).text for one in first] == ["hello", "hello"]

    run(scene())


def test_a_pool_that_closes_leaves_no_download_behind(hub: StandInHub, tmp_path: Path) -> None:
    async def scene() -> None:
        held(hub)
        async with Pool([absent()]) as pool:
            waiting = pool.complete("m", "hello")
            await until(lambda: begun(tmp_path))
        with pytest.raises(PoolClosed):
            await waiting.collect()

    run(scene())


def test_a_model_that_is_removed_meanwhile_is_downloaded_no_more(hub: StandInHub, tmp_path: Path) -> None:
    async def scene() -> None:
        held(hub)
        async with Pool([absent()]) as pool:
            waiting = pool.complete("m", "hello")
            await until(lambda: begun(tmp_path))
            pid = pool.status("m").pid
            assert pid
            pool.reload([])
            with pytest.raises(ModelNotFound, match="'m' was removed"):
                await waiting.collect()
            assert pool.models() == []
            await until(lambda: not Path(f"/proc/{pid}").exists())

    run(scene())


def test_a_model_whose_file_turns_up_meanwhile_is_loaded_from_there(hub: StandInHub, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF")

    async def scene() -> None:
        held(hub)
        async with Pool([absent()]) as pool:
            waiting = pool.complete("m", "hello")
            await until(lambda: begun(tmp_path))
            pool.reload([absent(path=path)])
            assert (await waiting.collect()).text == "hello"
            assert pool.status("m").path == str(path)

    run(scene())


def test_who_waits_for_a_model_that_becomes_another_gets_the_other(hub: StandInHub, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    hub.add("u/new", {"n-Q8_0.gguf": CONTENT})

    async def scene() -> None:
        async with Pool([fake("m", n_parallel=1, step_gate=str(gate))]) as pool:
            running, waiting = pool.complete("m", "one"), pool.complete("m", "later")
            await until(lambda: pool.status("m").in_flight == 1)
            pool.reload([absent(origin=Origin(repo="u/new"))])
            gate.touch()
            assert (await running.collect()).text == "one"
            assert (await waiting.collect()).text == "later"
            assert (pool.status("m").path or "").endswith("n-Q8_0.gguf")

    run(scene())


def test_more_models_than_may_be_downloaded_at_a_time_come_one_after_the_other(hub: StandInHub, tmp_path: Path) -> None:
    names = [f"m{number}" for number in range(MAX_DOWNLOADS + 2)]
    for name in names:
        hub.add(f"u/{name}", {f"{name}-Q8_0.gguf": b"GGUF" + name.encode() * 10_000})

    async def scene() -> None:
        hold = held(hub)
        specs = [absent(name, Origin(repo=f"u/{name}")) for name in names]
        async with Pool(specs, models_max=0) as pool:
            loads = [asyncio.ensure_future(pool.load(name)) for name in names]
            await until(lambda: all(pool.status(name).state is State.DOWNLOADING for name in names))
            assert sum(pool.status(name).pid is not None for name in names) <= MAX_DOWNLOADS
            assert (await pool.unload(names[-1])).state is State.UNLOADED
            hold.set()
            done = await asyncio.gather(*loads, return_exceptions=True)
            assert [str(one) for one in done if isinstance(one, Exception)] == [f"model '{names[-1]}' was unloaded"]

    run(scene())


def test_who_waits_is_told_when_the_place_of_its_files_cannot_be_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_CACHE", "~nobody-has-this-name/cache")

    async def scene() -> None:
        async with Pool([absent(origin=Origin(url="http://127.0.0.1:9/m.gguf"))]) as pool:
            for _ in range(2):
                with pytest.raises(LoadFailed, match="LLAMA_CACHE begins with the home of a user") as failure:
                    await pool.load("m")
                assert failure.value.code == "bad_folder"
            assert pool.status("m").state is State.UNLOADED

    run(scene())


def test_who_waits_is_told_when_a_download_cannot_be_described(tmp_path: Path) -> None:
    origin = Origin(url="http://127.0.0.1:9/m.gguf", path=tmp_path / os.fsdecode(b"\xff.gguf"))

    async def scene() -> None:
        async with Pool([absent(origin=origin)]) as pool:
            with pytest.raises(LoadFailed, match="cannot be written: .*surrogates"):
                await pool.load("m")
            assert pool.status("m").state is State.UNLOADED

    run(scene())


@pytest.mark.parametrize("spare", [False, True])
def test_who_waits_is_told_when_a_load_cannot_be_described(spare: bool, tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"\xff.gguf")
    path.write_bytes(CONTENT)
    origin = Origin(url="http://127.0.0.1:9/m.gguf", path=path)

    async def scene() -> None:
        async with Pool([absent(origin=origin), fake("other")], spare=spare) as pool:
            with pytest.raises(LoadFailed, match="cannot be written: .*surrogates"):
                await pool.load("m")
            assert pool.status("m").state is State.UNLOADED
            await pool.load("other")

    run(scene())


def test_a_reload_that_says_the_same_leaves_alone_what_was_downloaded_as_long_as_it_is_there(hub: StandInHub) -> None:
    async def scene() -> None:
        async with Pool([absent()]) as pool:
            pid = (await pool.load("m")).pid
            report = pool.reload([absent()])
            assert (report.unchanged, report.changed) == (("m",), ())
            assert (pool.status("m").state, pool.status("m").pid) == (State.LOADED, pid)
            path = pool.status("m").path
            assert path is not None
            Path(path).unlink()
            assert pool.reload([absent()]).changed == ("m",)
            assert (await pool.load("m")).path == path and Path(path).is_file()
            assert pool.status("m").pid != pid

    run(scene())


# --- files that are deleted from outside ---


def downloaded(hub: StandInHub, **settings: Any) -> ModelSpec:
    """Return the spec of a model whose files are there, as a catalogue that was read now would have it."""

    async def fetch() -> None:
        async with Pool() as pool:
            await pool.download("u/r:Q8_0")

    run(fetch())
    found = ORIGIN.find()
    assert found is not None
    return absent(path=found.path, mmproj=found.mmproj, **settings)


@pytest.mark.parametrize("budget", [0, 100_000_000])
def test_a_file_that_is_deleted_before_its_model_is_loaded_is_downloaded_again(hub: StandInHub, budget: int) -> None:
    spec = downloaded(hub)
    assert spec.path is not None
    spec.path.resolve().unlink()

    async def scene() -> None:
        async with Pool([spec], memory_budget=budget) as pool:
            assert (await pool.complete("m", "hello").collect()).text == "hello"
            assert pool.status("m").path == str(spec.path)

    run(scene())
    assert spec.path.read_bytes() == CONTENT
    assert len(hub.downloads("m-Q8_0.gguf")) == 2


def test_who_waits_goes_on_when_nobody_can_look_for_the_files(hub: StandInHub, monkeypatch: pytest.MonkeyPatch) -> None:
    start, refused = threading.Thread.start, list[str]()

    def start_no_more(thread: threading.Thread) -> None:
        if thread.name == "llamaherd-files":
            refused.append(thread.name)
            raise RuntimeError("can't start new thread")  # as where the system has none left
        start(thread)

    spec = downloaded(hub)

    async def scene() -> None:
        async with Pool([spec]) as pool:
            monkeypatch.setattr(threading.Thread, "start", start_no_more)
            assert (await pool.complete("m", "hello").collect()).text == "hello"

    run(scene())
    assert refused


def test_a_file_that_is_deleted_after_its_model_was_unloaded_is_downloaded_again(hub: StandInHub) -> None:
    spec = downloaded(hub)
    path = spec.path
    assert path is not None

    async def scene() -> None:
        async with Pool([spec]) as pool:
            await pool.load("m")
            path.resolve().unlink()
            assert (await pool.complete("m", "it has its file").collect()).text == "it has its file"
            assert len(hub.downloads("m-Q8_0.gguf")) == 1
            await pool.unload("m")
            texts = await asyncio.gather(*(pool.complete("m", "hello").collect() for _ in range(3)))
            assert [text.text for text in texts] == ["hello"] * 3
            assert pool.reload([spec]).unchanged == ("m",)

    run(scene())
    assert path.read_bytes() == CONTENT
    assert len(hub.downloads("m-Q8_0.gguf")) == 2


def test_a_projector_that_is_deleted_with_its_model_is_downloaded_again(hub: StandInHub) -> None:
    spec = downloaded(hub)
    assert spec.path is not None and spec.mmproj is not None
    for file in (spec.path, spec.mmproj):
        file.resolve().unlink()

    async def scene() -> None:
        async with Pool([spec]) as pool:
            await pool.load("m")

    run(scene())
    assert spec.mmproj.read_bytes() == b"GGUF eyes"


def test_of_a_deleted_file_that_cannot_be_had_the_reason_is_told_once(hub: StandInHub) -> None:
    spec = downloaded(hub)
    assert spec.path is not None
    spec.path.resolve().unlink()
    hub.fault = Fault(status=503)
    hub.requests.clear()

    async def scene() -> None:
        async with Pool([spec]) as pool:
            with pytest.raises(LoadFailed, match="its download failed: the hub answered 503"):
                await pool.load("m")
            assert len([request for request in hub.requests if "/revision/" in request.path]) == 1
            hub.fault = Fault()
            await pool.load("m")

    run(scene())


def test_a_model_that_is_there_is_asked_of_nobody(hub: StandInHub) -> None:
    spec = downloaded(hub)
    before = len(hub.requests)

    async def scene() -> None:
        async with Pool([spec]) as pool:
            for _ in range(2):
                await pool.load("m")
                await pool.unload("m")

    run(scene())
    assert len(hub.requests) == before


# --- files that are deleted while their model sleeps ---


async def fall_asleep(pool: Pool, model: str = "m") -> int | None:
    """Load a model, have it sleep, and return its worker's pid."""
    await pool.load(model)
    pool.start_sleep(model)
    await reach(pool, model, State.SLEEPING)
    return pool.status(model).pid


def test_a_file_that_is_deleted_while_its_model_sleeps_is_downloaded_again_for_the_first_who_asks(
    hub: StandInHub,
) -> None:
    content = tiny_model("random").read_bytes()
    hub.add("u/tiny", {"t-Q8_0.gguf": content})
    spec = ModelSpec(name="m", origin=Origin(repo="u/tiny:Q8_0"), options=EngineOptions(n_ctx=64))

    async def scene() -> None:
        async with Pool([spec]) as pool:
            await fall_asleep(pool)
            path = Path(pool.status("m").path or "")
            path.resolve().unlink()
            texts = [pool.complete("m", "hello", max_tokens=2).collect() for _ in range(3)]
            assert all(answer.usage is not None for answer in await asyncio.gather(*texts))
            assert (pool.status("m").path, path.read_bytes()) == (str(path), content)

    run(scene(), 60)
    assert len(hub.downloads("t-Q8_0.gguf")) == 2


def test_of_a_file_that_is_gone_when_its_model_wakes_the_reason_is_told_until_it_can_be_had(hub: StandInHub) -> None:
    async def scene() -> None:
        async with Pool([absent()]) as pool:
            await fall_asleep(pool)
            path = Path(pool.status("m").path or "")
            path.resolve().unlink()
            hub.fault = Fault(status=503)
            with pytest.raises(LoadFailed, match="its download failed: the hub answered 503"):
                await pool.complete("m", "hello").collect()
            status = pool.status("m")
            assert (status.state, status.pid, "503" in str(status.error)) == (State.UNLOADED, None, True)
            hub.fault = Fault()
            assert (await pool.complete("m", "hello").collect()).text == "hello"
            assert path.read_bytes() == CONTENT

    run(scene())


def test_a_model_whose_file_is_there_is_woken_where_it_sleeps(hub: StandInHub) -> None:
    async def scene() -> None:
        async with Pool([absent()]) as pool:
            for _ in range(2):
                pid = await fall_asleep(pool)
                before = len(hub.requests)
                assert (await pool.complete("m", "hello").collect()).text == "hello"
                assert (pool.status("m").pid, len(hub.requests)) == (pid, before)

    run(scene())


@pytest.mark.parametrize("awake", [False, True])
def test_a_replica_that_is_awake_keeps_its_model_when_the_file_is_deleted(
    awake: bool, hub: StandInHub, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    options = EngineOptions(n_parallel=1)
    spec = absent(replicas=2, options=options, script={"step_gate": str(gate)}, sleep_idle_seconds=0.0)

    async def scene() -> None:
        async with Pool([spec]) as pool:
            answers = [asyncio.ensure_future(pool.complete("m", "hello").collect()) for _ in range(2)]
            await until(lambda: pool.status("m").in_flight == 2)
            gate.touch()
            await until(lambda: {replica.state for replica in pool.status("m").replicas} == {State.SLEEPING})
            if awake:
                gate.unlink()
                answers.append(asyncio.ensure_future(pool.complete("m", "hello").collect()))
                await until(lambda: pool.status("m").in_flight == 1)
            before = pool.status("m").replicas[0].pid
            Path(pool.status("m").path or "").resolve().unlink()
            answers.append(asyncio.ensure_future(pool.complete("m", "hello").collect()))
            await until(lambda: not awake or pool.status("m").in_flight == 2)
            gate.touch()
            assert {answer.text for answer in await asyncio.gather(*answers)} == {"hello"}
            assert (pool.status("m").replicas[0].pid == before) is awake
            assert len(hub.downloads("m-Q8_0.gguf")) == (1 if awake else 2)

    run(scene())


# --- file systems that hang ---


@pytest.fixture
def hung(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], int]]:
    """Let whoever looks for ``hung.gguf`` wait, as on a network's file system whose server is gone; returns how many
    do.
    """
    back, is_file = threading.Event(), Path.is_file
    asked: list[Path] = []

    def look(path: Path) -> bool:
        if path.name == "hung.gguf":
            asked.append(path)
            back.wait()
        return is_file(path)

    monkeypatch.setattr(Path, "is_file", look)
    yield lambda: len(asked)
    back.set()


def test_a_close_does_not_wait_for_a_file_system_that_hangs(hung: Callable[[], int]) -> None:
    async def scene() -> None:
        async with Pool([absent(path=Path("/net/hung.gguf"))]) as pool:
            loading = asyncio.ensure_future(pool.load("m"))
            await until(lambda: hung() == 1)
        with pytest.raises(PoolClosed):
            await loading

    run(scene())  # which waits for the loop's threads too


def test_a_model_is_loaded_while_the_file_systems_of_others_hang(hung: Callable[[], int], hub: StandInHub) -> None:
    others = [absent(f"m{number}", path=Path("/net/hung.gguf")) for number in range(40)]

    async def scene() -> None:
        async with Pool([*others, absent("sound")]) as pool:
            loading = [asyncio.ensure_future(pool.load(spec.name)) for spec in others]
            await until(lambda: hung() == len(others))
            await pool.load("sound")
            assert not any(one.done() for one in loading)
        assert all(isinstance(end, PoolClosed) for end in await asyncio.gather(*loading, return_exceptions=True))

    run(scene())


def test_a_reload_starts_no_model_that_has_just_lost_its_file(hub: StandInHub, tmp_path: Path) -> None:
    """What gives up its place in a reload is another's at once, which may be another by then."""
    ours: dict[str, Any] = {"memory": 2_000_000}
    other = msgspec.structs.replace(fake("other", load_seconds=60.0), **ours)
    there = msgspec.structs.replace(fake("m"), path=Path(__file__), **ours)

    async def scene() -> list[str]:
        told: list[str] = []
        async with Pool([there, other], models_max=1, memory_budget=10_000_000) as pool:
            pool.start_load("other")
            await reach(pool, "other", State.LOADING)
            waiting = asyncio.ensure_future(pool.complete("m", "hello").collect())
            await until(lambda: pool.status("m").queued == 1)
            events = pool.events()
            await anext(events)
            pool.reload([absent(**ours), msgspec.structs.replace(other, script={})])
            assert (await waiting).text == "hello"
            while not told or told[-1] != "loaded":
                event = await anext(events)
                if event.model == "m" and "status" in event.data:
                    told.append(event.data["status"])
        return told

    assert list(dict.fromkeys(run(scene()))) == ["downloading", "loading", "loaded"]


def test_a_pinned_model_that_died_comes_back_once_its_deleted_file_can_be_had_again(hub: StandInHub) -> None:
    spec = downloaded(hub, pinned=True)
    path = spec.path
    assert path is not None

    async def scene() -> None:
        async with Pool([spec]) as pool:
            pid = (await pool.load("m")).pid
            assert pid is not None
            path.resolve().unlink()
            hub.fault = Fault(status=503)
            events = pool.events()
            os.kill(pid, signal.SIGKILL)
            while (await anext(events)).event != "download_failed":
                pass
            hub.fault = Fault()
            await reach(pool, "m", State.LOADED)
            assert path.read_bytes() == CONTENT

    run(scene())
