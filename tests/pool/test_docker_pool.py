"""Downloads from registries by a pool: events, cancellation and death, with real workers and real sockets."""

import asyncio
import os
import signal
import threading
from asyncio import run
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from herding import until
from llamaherd.pool import BadRequest, DownloadFailed, Pool, State, SyncPool, scan_docker
from stand_in_registry import Layer, RegistryFault, StandInRegistry

CONTENT = b"GGUF" + os.urandom(200_000)


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LLAMA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecret")


@pytest.fixture
def registry() -> Iterator[StandInRegistry]:
    with StandInRegistry(needs_token=True, redirects=True) as registry:
        registry.add("ai/smollm2", "135M-Q4_0", [Layer(CONTENT)])
        yield registry


def name_of(registry: StandInRegistry) -> str:
    return f"{registry.host}/ai/smollm2:135M-Q4_0"


def listed(tmp_path: Path) -> list[str]:
    return [model.name for model in scan_docker(tmp_path / "cache")]


def begun(tmp_path: Path) -> bool:
    return any(path.stat().st_size for path in tmp_path.rglob("*.incomplete"))


def test_a_download_is_told_and_then_there(registry: StandInRegistry, tmp_path: Path) -> None:
    name = name_of(registry)

    async def scene() -> None:
        async with Pool() as pool:
            events = pool.events()
            await anext(events)
            await pool.download(name)
            assert [(status.name, status.state) for status in pool.models()] == [(name, State.DOWNLOADED)]
            told = [await anext(events)]
            while told[-1].event != "download_finished":
                told.append(await anext(events))
            ((url, last),) = told[-2].data["progress"].items()
            assert url.startswith(f"{registry.url}/v2/ai/smollm2/blobs/sha256:")
            assert last == {"done": len(CONTENT), "total": len(CONTENT)}

    run(scene())

    assert listed(tmp_path) == [name]


def test_a_killed_worker_leaves_nothing_on_the_list_and_a_repeat_goes_on(
    registry: StandInRegistry, tmp_path: Path
) -> None:
    name = name_of(registry)
    registry.fault = RegistryFault(hold=threading.Event())

    async def scene() -> None:
        async with Pool() as pool:
            work = asyncio.ensure_future(pool.download(name))
            await until(lambda: begun(tmp_path))
            process = psutil.Process(pool.status(name).pid or 0)
            assert "HF_TOKEN" not in process.environ()
            os.kill(process.pid, signal.SIGKILL)
            with pytest.raises(DownloadFailed, match="killed by SIGKILL"):
                await work
            assert listed(tmp_path) == []
            registry.fault = RegistryFault()
            await pool.download(name)

    run(scene())

    assert listed(tmp_path) == [name]
    assert registry.pulls(CONTENT)[-1].range.startswith("bytes=")


def test_an_unload_cancels_and_a_repeat_goes_on(registry: StandInRegistry, tmp_path: Path) -> None:
    name = name_of(registry)
    registry.fault = RegistryFault(hold=threading.Event())

    async def scene() -> None:
        async with Pool() as pool:
            work = asyncio.ensure_future(pool.download(name))
            await until(lambda: begun(tmp_path))
            assert (await pool.unload(name)).state is State.UNLOADED
            with pytest.raises(DownloadFailed, match="was cancelled"):
                await work
            assert (pool.models(), listed(tmp_path)) == ([], [])
            registry.fault = RegistryFault()
            await pool.download(name)

    run(scene())

    assert registry.pulls(CONTENT)[-1].range.startswith("bytes=")


def test_what_cannot_be_downloaded_is_told_at_the_start(registry: StandInRegistry) -> None:
    async def scene() -> None:
        async with Pool() as pool:
            with pytest.raises(BadRequest, match="no files to choose from"):
                await pool.start_download(name_of(registry), file="m.gguf")
            with pytest.raises(BadRequest, match="no https address"):
                await pool.start_download("docker.io/ai/x", endpoint="http://example.invalid")
            with pytest.raises(DownloadFailed, match="there is no 127.0.0.1:") as caught:
                await pool.start_download(f"{registry.host}/ai/missing")
            assert (caught.value.code, caught.value.retry) == ("no_repository", False)

    run(scene())


def test_another_address_serves_dockers_own_names(registry: StandInRegistry, tmp_path: Path) -> None:
    with SyncPool() as pool:
        pool.download("docker.io/ai/smollm2:135M-Q4_0", endpoint=registry.url)

    assert listed(tmp_path) == ["docker.io/ai/smollm2:135M-Q4_0"]
