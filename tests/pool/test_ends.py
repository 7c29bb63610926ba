"""Ends that are easily lost: answers that cannot be read, requests that were accepted once, work beside requests, and
timers.
"""

import asyncio
import os
import re
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from herding import fake, freeze, reach, run, until
from llamaherd.pool import (
    BadRequest,
    EngineOptions,
    LoadFailed,
    ModelSpec,
    ModelStatus,
    Pool,
    QueueFull,
    State,
    WorkerDied,
    WorkerFailed,
    errors,
)
from llamaherd.pool.herd import Herd
from llamaherd.pool.launch import LaunchSpec, LocalLauncher, Process
from llamaherd.pool.worker import Worker
from llamaherd.transport.messages import ChildMessage, decode
from patience import patience
from tiny_gguf import tiny_model

ASK: dict[str, Any] = {"temperature": 0, "max_tokens": 8, "ignore_eos": True}


def herd_of(pool: Pool) -> Herd:
    return pool._herd  # pyright: ignore[reportPrivateUsage]


def worker_of(pool: Pool, model: str = "m") -> Worker:
    entry = herd_of(pool).find(model)
    assert entry is not None and entry.worker is not None
    return entry.worker


def say(pool: Pool, kind: str, body: bytes) -> None:
    """Have a model's worker say something that no engine of ours says, through the pool's own door for messages."""
    message = decode(kind, body)
    herd_of(pool).on_message(worker_of(pool), message)  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("kind", ["done", "result", "failed"])
def test_an_answer_that_cannot_be_read_ends_its_request_and_no_other(kind: str, tmp_path: Path) -> None:
    async def scene() -> None:
        gate = tmp_path / "gate"
        async with Pool([fake("m", step_gate=str(gate), gate_at=1)]) as pool:
            lost, other = pool.complete("m", "a b"), pool.complete("m", "c d")
            await anext(lost)  # and the other may or may not have begun
            say(pool, kind, b'{"request":%d,"message":1,"text":2,"finish_reason":3}' % lost.request)
            with pytest.raises(WorkerFailed, match="cannot be read") as failure:
                await lost.collect()
            assert failure.value.code == "protocol"
            gate.touch()
            assert (await other.collect()).text == "c d"

    run(scene())


@pytest.mark.parametrize(("kind", "body"), [("tokens", b'{"deltas":[[1]]}'), ("vectors", b"{}"), ("done", b"\xff")])
def test_an_answer_that_may_be_anybodys_and_cannot_be_read_ends_its_worker(
    kind: str, body: bytes, tmp_path: Path
) -> None:
    async def scene() -> None:
        gate = tmp_path / "gate"
        async with Pool([fake("m", step_gate=str(gate), gate_at=1)]) as pool:
            begun = pool.complete("m", "a b")
            await anext(begun)
            pid = pool.status("m").pid
            say(pool, kind, body)
            with pytest.raises(WorkerDied, match="cannot be read"):
                await begun.collect()
            gate.touch()
            assert (await pool.complete("m", "a b").collect()).text == "a b"
            assert pool.status("m").pid != pid

    run(scene())


def test_what_nobody_waits_for_may_be_unreadable() -> None:
    async def scene() -> None:
        async with Pool([fake("m")]) as pool:
            await pool.load("m")
            pid = pool.status("m").pid
            for kind, body in (("stats", b"[]"), ("state", b"{}"), ("riddle", b"{}"), ("done", b'{"request":99}')):
                say(pool, kind, body)
            assert (await pool.complete("m", "hello").collect()).text == "hello"
            assert pool.status("m").pid == pid

    run(scene())


def test_a_request_that_was_accepted_is_not_refused_when_its_worker_dies_and_goes_before_those_who_came_later(
    tmp_path: Path,
) -> None:
    async def scene() -> None:
        gate = tmp_path / "gate"
        async with Pool([fake("m", n_parallel=1, step_gate=str(gate))], queue_max=1) as pool:
            first = pool.complete("m", "first")
            await until(lambda: pool.status("m").in_flight == 1)
            second = pool.complete("m", "second")
            pid = pool.status("m").pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            await until(lambda: pool.status("m").pid not in (pid, None))
            assert [one.request for one in pool.status("m").waiting] in (
                [first.request, second.request],
                [second.request],
            )
            with pytest.raises(QueueFull):
                await pool.complete("m", "third").collect()
            gate.touch()
            assert [(await one.collect()).text for one in (first, second)] == ["first", "second"]

    run(scene())


def test_the_codes_that_are_described_are_those_that_are_used() -> None:
    described = set(re.findall(r"^``(\w+)``", errors.__doc__ or "", re.MULTILINE))
    assert {"request_broke", "protocol", "queue_full"} <= described
    root = Path(errors.__file__).parent
    used = {code for path in root.rglob("*.py") for code in re.findall(r'"([a-z_]+)"', path.read_text())}
    assert described <= used


# --- work beside requests ---------------------------------------------------------------------------------------------


def saver(folder: Path, **settings: Any) -> ModelSpec:
    options = EngineOptions(
        n_ctx=512, n_threads=1, n_parallel=2, flash_attn="off", slot_save_path=str(folder), n_batch=32, n_ubatch=32
    )
    return ModelSpec(name="m", path=tiny_model("random"), options=options, **settings)


async def _begin_save(pool: Pool) -> "asyncio.Future[Any]":
    """Begin to save a slot, with the worker stopped so that it is not done before it is let go on."""
    slot = (await pool.complete("m", "The quick brown fox jumps over the lazy dog.", **ASK).collect()).slot
    pid = pool.status("m").pid
    assert pid is not None
    freeze(pid)
    saving = asyncio.ensure_future(pool.save_slot("m", slot, "fox.bin"))
    await asyncio.sleep(0)
    return saving


def _status(pool: Pool) -> ModelStatus:
    """Of the first model, which has no name any more once it is removed."""
    return next(status for status in pool.models() if status.name == "m")


def _go_on(pool: Pool) -> None:
    pid = _status(pool).pid
    assert pid is not None
    os.kill(pid, signal.SIGCONT)


def _reloaded(pool: Pool, folder: Path) -> None:
    del folder
    pool.reload([fake("b")])


#: Seconds for which it may idle.
IDLE = 0.05


def _idle(pool: Pool, folder: Path) -> None:
    """Only now, or it may have gone before it is asked to save anything."""
    pool.reload([saver(folder, unload_idle_seconds=IDLE), fake("b")])


DISTURBANCES: dict[str, Callable[[Pool, Path], None]] = {
    "a model that needs its place": lambda pool, _: pool.start_load("b"),
    "a reload without it": _reloaded,
    "its idle time": _idle,
}


@pytest.mark.parametrize("disturbance", DISTURBANCES)
def test_a_slot_that_is_being_saved_is_saved_whole(disturbance: str, tmp_path: Path) -> None:
    async def scene() -> None:
        async with Pool([saver(tmp_path), fake("b")], models_max=1) as pool:
            saving = await _begin_save(pool)
            pid = _status(pool).pid
            DISTURBANCES[disturbance](pool, tmp_path)
            if disturbance == "its idle time":
                # As long again as it may idle: a timer that is due in that time has fired before this one.
                await asyncio.wait([saving], timeout=2 * IDLE)
            assert _status(pool).pid == pid and _status(pool).state is State.LOADED
            _go_on(pool)
            saved = await saving
            assert saved.n_tokens > 0 and (tmp_path / "fox.bin").stat().st_size == saved.n_bytes
            if disturbance == "a reload without it":
                await until(lambda: [status.name for status in pool.models()] == ["b"])
            else:
                await reach(pool, "m", State.UNLOADED)

    run(scene())


def test_a_worker_that_dies_while_it_saves_a_slot_can_be_stopped_for_room_again(tmp_path: Path) -> None:
    async def scene() -> None:
        async with Pool([saver(tmp_path), fake("b")], models_max=1) as pool:
            saving = await _begin_save(pool)
            pid = pool.status("m").pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            with pytest.raises(WorkerDied):
                await saving
            await pool.complete("m", "a", **ASK).collect()
            assert (await pool.complete("b", "there is room").collect()).text == "there is room"

    run(scene())


def test_a_slot_that_cannot_be_saved_leaves_nothing_held(tmp_path: Path) -> None:
    async def scene() -> None:
        async with Pool([saver(tmp_path), fake("b")], models_max=1) as pool:
            await pool.load("m")
            with pytest.raises(BadRequest):
                await pool.save_slot("m", 0, "fox.bin")
            assert (await pool.complete("b", "there is room").collect()).text == "there is room"

    run(scene())


# --- timers -----------------------------------------------------------------------------------------------------------


class OneOnly(LocalLauncher):
    """A launcher that can start one worker and no more."""

    def __init__(self) -> None:
        self.started = 0

    async def launch(self, spec: LaunchSpec) -> Process:
        self.started += 1
        if self.started > 1:
            raise OSError("there are no processes left")
        return await super().launch(spec)


def _timers(loop: asyncio.AbstractEventLoop) -> list[asyncio.TimerHandle]:
    """Return the timers that are set but for the one of the test's own patience, which may be due in this very turn."""
    scheduled = cast("list[asyncio.TimerHandle]", vars(loop)["_scheduled"])
    return [timer for timer in scheduled if not timer.cancelled() and patience.__name__ not in repr(timer)]


def test_a_pool_that_has_closed_leaves_no_timer_behind(tmp_path: Path) -> None:
    """Of loads, idle times, kills, spares, revivals and replicas that are to be tried again."""

    async def scene() -> None:
        loop = asyncio.get_running_loop()
        assert _timers(loop) == []
        pinned = ModelSpec(name="pinned", engine="fake", pinned=True, script={"crash_at": 0})
        several = ModelSpec(
            name="several",
            engine="fake",
            replicas=2,
            unload_idle_seconds=100.0,
            options=EngineOptions(n_parallel=1),
            script={"step_gate": str(tmp_path / "gate")},
        )
        async with Pool([several], launcher=OneOnly(), stop_timeout=9.0) as pool:
            works = [pool.complete("several", "a", queue_timeout=100.0) for _ in range(2)]
            await until(lambda: any(one.error for one in pool.status("several").replicas))
            await until(lambda: pool.status("several").in_flight == 1)
            pool.start_unload("several")
            for work in works:
                with pytest.raises(WorkerFailed):
                    await work.collect()
        async with Pool([pinned], spare=True, stop_timeout=9.0) as pool:
            for _ in range(2):
                with pytest.raises((WorkerDied, LoadFailed)):
                    await pool.complete("pinned", "a").collect()
        async with Pool([fake("m")], launcher=OneOnly(), stop_timeout=9.0, spare=True) as pool:
            pool.start_load("m")
            pool.start_unload("m")
        assert _timers(loop) == []

    run(scene())


def test_a_worker_that_was_told_to_stop_and_could_not_be_started_leaves_no_timer_behind() -> None:
    class Nobody:
        def on_message(self, worker: Worker, message: ChildMessage) -> None: ...

        def on_exit(self, worker: Worker, end: object) -> None: ...

    class Faulty(LocalLauncher):
        async def launch(self, spec: LaunchSpec) -> Process:
            raise OSError("no")

    async def scene() -> None:
        from llamaherd.transport import make_transport

        loop = asyncio.get_running_loop()
        assert _timers(loop) == []
        transport = make_transport("pipe")
        await transport.open()
        worker = Worker("m", 1, Nobody())
        worker.stop(9.0)
        with pytest.raises(OSError, match="no"):
            await worker.launch(Faulty(), transport, lambda data: None)
        await transport.aclose()
        assert _timers(loop) == []

    run(scene())


def test_a_worker_is_not_told_of_the_cache_that_its_model_had_before_a_reload() -> None:
    large = ModelSpec(name="m", engine="fake", path=tiny_model("random"), options=EngineOptions(n_ctx=65_536))
    small = ModelSpec(name="m", engine="fake", path=large.path, options=EngineOptions(n_ctx=256), memory=1)

    async def scene() -> None:
        async with Pool([large], memory_budget=2**40) as pool:
            await pool.load("m")
            entry = herd_of(pool).find("m")
            assert entry is not None and entry.cache_bytes > 0
            pool.reload([small])
            await pool.load("m")
            assert entry.spec.memory == 1 and entry.cache_bytes == 0

    run(scene())


def test_nor_is_it_told_of_one_that_was_computed_while_the_reload_came() -> None:
    large = ModelSpec(name="m", engine="fake", path=tiny_model("random"), options=EngineOptions(n_ctx=65_536))
    small = ModelSpec(name="m", engine="fake", path=large.path, options=EngineOptions(n_ctx=256), memory=1)

    async def scene() -> None:
        async with Pool([large], memory_budget=2**40) as pool:
            entry = herd_of(pool).find("m")
            assert entry is not None
            load = asyncio.ensure_future(pool.load("m"))
            # Each turn of the loop: a thread reads the header, and what it found is heard in a turn of its own.
            while not (entry.sized or any(one.name == "llamaherd-files" for one in threading.enumerate())):  # noqa: ASYNC110
                await asyncio.sleep(0)
            pool.reload([small])
            await load
            assert entry.spec.memory == 1 and entry.cache_bytes == 0

    run(scene())
