"""Mistakes that were found and mended, each with the order of events that showed it. Real processes, scripted
engine.
"""

import asyncio
import contextlib
import os
import resource
import signal
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from herding import TRANSPORTS, fake, freeze, reach, run, until
from llamaherd.pool import (
    BadRequest,
    EngineOptions,
    LoadFailed,
    ModelSpec,
    Pool,
    State,
    WorkerDied,
    WorkerFailed,
)
from llamaherd.pool.launch import LaunchSpec, LocalLauncher, Process
from llamaherd.transport.messages import MAX_MESSAGE_BYTES, Done, Failed, Result, Stats, Tokens

MIB = 1024 * 1024


def test_an_answer_too_large_to_send_is_an_error_of_its_own_request_only(monkeypatch: pytest.MonkeyPatch) -> None:
    # The pool would refuse so long a text before it came to that.
    monkeypatch.setattr("llamaherd.pool.params.MAX_TOKENIZED", MAX_MESSAGE_BYTES)

    async def scene() -> None:
        async with Pool([fake("m", pieces=("x",), repeat=10**6, step_seconds=0.001)]) as pool:
            running = pool.complete("m", "go")
            await anext(running)
            pid = pool.status("m").pid
            with pytest.raises(BadRequest, match="over the cap"):
                await pool.tokenize("m", "a" * (MAX_MESSAGE_BYTES // 3 + 100))
            await anext(running)
            assert pool.status("m").pid == pid

    run(scene(), 50)


def test_a_waking_that_stalls_is_given_up_even_if_the_request_overtook_the_falling_asleep(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    gate.touch()

    async def scene() -> None:
        model = ModelSpec(name="m", engine="fake", script={"load_gate": str(gate)})
        async with Pool([model]) as pool:
            await pool.load("m")
            # Only now, since the start of an interpreter counts as silence.
            pool.reload([msgspec.structs.replace(model, load_stall_seconds=0.3)])
            gate.unlink()
            pool.start_sleep("m")
            with pytest.raises(LoadFailed, match="made no progress"):
                await pool.complete("m", "hello").collect()

    run(scene())


def test_a_worker_that_speaks_of_requests_that_are_not_its_own_changes_nothing(tmp_path: Path) -> None:
    """Through the pool's own door for messages, since no engine of ours says such things."""

    async def scene() -> None:
        async with Pool([fake("a", load_gate=str(tmp_path / "gate")), fake("b")]) as pool:
            waiting = pool.complete("a", "hello")
            await pool.load("b")
            herd = pool._herd  # pyright: ignore[reportPrivateUsage]
            worker = next(worker for worker in herd._homes if worker.model == "b")  # pyright: ignore[reportPrivateUsage]
            for number in (-1, 0, 1, 2, 10**12):
                herd.on_message(worker, Done(request=number, finish_reason="stop"))
                herd.on_message(worker, Result(request=number))
                herd.on_message(worker, Failed(request=number, message="no"))
                herd.on_message(worker, Tokens(deltas=()))
            herd.on_message(worker, Stats(rss_bytes=-1))
            (tmp_path / "gate").touch()
            assert (await waiting.collect()).text == "hello"
            assert (await pool.complete("b", "and b").collect()).text == "and b"

    run(scene())


class Faulty(LocalLauncher):
    """A launcher with a mistake in it."""

    async def launch(self, spec: LaunchSpec) -> Process:
        raise RuntimeError("a mistake")


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_launcher_that_raises_anything_fails_the_load_and_the_pool_closes(transport: str) -> None:
    async def scene() -> None:
        async with Pool([fake("m")], transport=transport, launcher=Faulty(), spare=True) as pool:
            with pytest.raises(LoadFailed, match="a mistake"):
                await pool.load("m")

    run(scene())


def test_an_unload_ends_although_the_machine_had_no_descriptors_for_the_worker() -> None:
    async def scene() -> None:
        async with Pool([fake("m")]) as pool:
            held: list[int] = []
            with contextlib.suppress(OSError):
                while True:
                    held.append(os.dup(0))
            pool.start_load("m")
            try:
                assert (await pool.unload("m")).state is State.UNLOADED
            finally:
                for fd in held:
                    os.close(fd)
            await pool.load("m")
            assert (await pool.complete("m", "hello").collect()).text == "hello"

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        run(scene())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_spare_that_is_dead_when_it_is_taken_fails_no_request() -> None:
    async def scene() -> None:
        async with Pool([fake("m")], spare=True) as pool:
            me = psutil.Process()
            await until(lambda: len(me.children()) == 1)
            os.kill(me.children()[0].pid, signal.SIGKILL)
            assert (await pool.complete("m", "hello").collect()).text == "hello"
            assert not pool.status("m").failed

    run(scene())


def test_a_worker_that_was_a_spare_and_dies_after_its_load_is_told_as_dead() -> None:
    async def scene() -> None:
        async with Pool([fake("m", crash_at=1)], spare=True) as pool:
            me = psutil.Process()
            await until(lambda: len(me.children()) == 1)
            spare = me.children()[0].pid
            await pool.load("m")
            assert pool.status("m").pid == spare
            with pytest.raises(WorkerDied, match="SIGKILL"):
                await pool.complete("m", "one two").collect()
            assert pool.status("m").failed

    run(scene())


def test_loading_a_sleeping_model_waits_until_it_is_awake_and_nobody_takes_its_place_meanwhile(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    gate.touch()

    async def scene() -> None:
        async with Pool([fake("m", load_gate=str(gate)), fake("other")], models_max=1) as pool:
            await pool.load("m")
            pool.start_sleep("m")
            await reach(pool, "m", State.SLEEPING)
            gate.unlink()
            waking = asyncio.ensure_future(pool.load("m"))
            await reach(pool, "m", State.LOADING)
            other = asyncio.ensure_future(pool.complete("other", "hello").collect())
            await until(lambda: pool.status("other").queued == 1)
            assert pool.status("m").state is State.LOADING
            gate.touch()
            await waking
            assert (await other).text == "hello"
            assert pool.status("m").exit_code == 0  # it was loaded first, and stopped in order then

    run(scene())


def test_a_waking_that_fails_is_reported_to_who_wanted_the_model(tmp_path: Path) -> None:
    async def scene() -> None:
        async with Pool([fake("m", load_gate=str(tmp_path / "gate"))]) as pool:
            (tmp_path / "gate").touch()
            pid = (await pool.load("m")).pid
            assert pid is not None
            pool.start_sleep("m")
            await reach(pool, "m", State.SLEEPING)
            (tmp_path / "gate").unlink()
            waking = asyncio.ensure_future(pool.load("m"))
            await reach(pool, "m", State.LOADING)
            os.kill(pid, signal.SIGKILL)
            with pytest.raises(LoadFailed, match="SIGKILL"):
                await waking

    run(scene())


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"options": EngineOptions(n_ctx="4096")}, "n_ctx"),  # type: ignore[arg-type]
        ({"script": {"x": object()}}, "JSON"),
        ({"options": EngineOptions(n_parallel=-1)}, "n_parallel"),
    ],
)
def test_a_spec_that_no_worker_could_read_is_refused_at_once(fields: dict[str, Any], complaint: str) -> None:
    with pytest.raises(BadRequest, match=complaint):
        Pool([ModelSpec(name="m", engine="fake", **fields)])


def test_a_full_queue_of_one_model_does_not_refuse_a_request_for_a_ready_one(tmp_path: Path) -> None:
    async def scene() -> None:
        async with Pool([fake("slow", load_gate=str(tmp_path / "never")), fake("ready")], queue_max=1) as pool:
            await pool.load("ready")
            waiting = pool.complete("slow", "hello")
            assert (await pool.complete("ready", "hello").collect()).text == "hello"
            await waiting.aclose()

    run(scene())


def test_a_model_that_was_loaded_once_is_not_refused_for_what_was_measured() -> None:
    async def scene() -> None:
        async with Pool([ModelSpec(name="m", engine="fake")], memory_budget=5 * MIB) as pool:
            for _ in range(2):
                assert (await pool.complete("m", "hello").collect()).text == "hello"
                assert pool.status("m").memory == 5 * MIB
                await pool.unload("m")

    run(scene())


def test_a_worker_that_dies_in_the_middle_of_a_record_is_reported_by_its_signal() -> None:
    async def scene() -> None:
        text = "x" * 3_000_000
        async with Pool([fake("m", pieces=(text,), repeat=100)]) as pool:
            generation = pool.complete("m", "go")
            await anext(generation)
            pid = pool.status("m").pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            with pytest.raises(WorkerDied, match="SIGKILL"):
                async for _ in generation:
                    pass

    run(scene())


def test_commands_that_wait_for_a_worker_that_stopped_reading_do_not_trip_over_its_stop() -> None:
    async def scene() -> None:
        errors: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: errors.append(context))
        async with Pool([fake("m", n_parallel=64)], stop_timeout=5) as pool:
            pid = (await pool.load("m")).pid
            assert pid is not None
            freeze(pid)
            pending = [pool.complete("m", "x" * 700_000) for _ in range(6)]
            await asyncio.sleep(0)
            pool.start_unload("m")
            os.kill(pid, signal.SIGCONT)
            assert (await pool.unload("m")).state is State.UNLOADED
            for generation in pending:
                with pytest.raises(WorkerFailed):
                    await generation.collect()
        assert errors == []

    run(scene())


def test_a_model_that_is_told_to_stop_is_not_told_to_sleep() -> None:
    async def scene() -> None:
        errors: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: errors.append(context))
        model = ModelSpec(
            name="m", engine="fake", sleep_idle_seconds=0.05, stop_timeout=0.3, script={"ignore_exit": True}
        )
        async with Pool([model]) as pool:
            await pool.load("m")
            await pool.unload("m")
        assert errors == []

    run(scene())


def test_a_listener_that_is_dropped_is_forgotten() -> None:
    async def scene() -> None:
        async with Pool([fake("m")]) as pool:
            for _ in range(10):
                pool.events()
            assert len(pool._herd.events._subscribers) == 0  # pyright: ignore[reportPrivateUsage]

    run(scene())


def test_a_pool_shows_its_state_in_one_line() -> None:
    assert repr(Pool([fake("m")])) == (
        "<Pool closed, <Herd over pipe, 0 workers, "
        "<Scheduler [Models: 0 of 4 running, 0 busy | Requests: 0 granted, 0 waiting]>>>"
    )
