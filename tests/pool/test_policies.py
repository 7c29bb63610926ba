"""What the pool does by itself: idle models sleep and go, failed loads back off, silent ones are given up. Real
processes.
"""

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from herding import TRANSPORTS, fake, reach, run, until
from llamaherd.pool import (
    Adapter,
    BadRequest,
    EngineOptions,
    LoadFailed,
    ModelBusy,
    ModelSpec,
    Origin,
    Pool,
    QueueFull,
    QueueTimeout,
    State,
    WorkerDied,
    WorkerFailed,
    find_model,
    kv_bytes,
    read_facts,
    restart,
)
from llamaherd.pool.idle import Rest, rest_of
from llamaherd.pool.machine import oom_kills
from llamaherd.pool.memory import Expected, expected, expected_memory
from llamaherd.pool.restart import MOST_SECONDS, Backoff
from tiny_gguf import tiny_model

MIB = 1024 * 1024
#: A prompt whose words take a while to say again.
LONG = "word " * 1000


def spec(name: str = "m", **fields: Any) -> ModelSpec:
    return ModelSpec(name=name, engine="fake", **fields)


# --- idleness ---


@pytest.mark.parametrize(
    ("fields", "state", "keep_alive", "expected"),
    [
        ({}, State.LOADED, None, None),
        ({"sleep_idle_seconds": 5.0, "unload_idle_seconds": 7.0}, State.LOADED, None, Rest("sleep", 5.0)),
        ({"sleep_idle_seconds": 5.0, "unload_idle_seconds": 7.0}, State.SLEEPING, None, Rest("unload", 7.0)),
        ({"sleep_idle_seconds": 5.0}, State.SLEEPING, None, None),
        ({"unload_idle_seconds": 7.0}, State.LOADED, None, Rest("unload", 7.0)),
        ({"unload_idle_seconds": 7.0}, State.LOADED, 0.0, Rest("unload", 0.0)),
        ({"unload_idle_seconds": 7.0}, State.LOADED, -1.0, None),
        ({"pinned": True, "sleep_idle_seconds": 5.0}, State.LOADED, None, Rest("sleep", 5.0)),
        ({"pinned": True, "unload_idle_seconds": 7.0}, State.LOADED, None, None),
        ({"pinned": True}, State.LOADED, 0.0, None),
        ({"unload_idle_seconds": 7.0}, State.LOADING, None, None),
        ({"unload_idle_seconds": 7.0}, State.STOPPING, 1.0, None),
    ],
)
def test_what_is_next_for_an_idle_model(
    fields: dict[str, Any], state: State, keep_alive: float | None, expected: Rest | None
) -> None:
    assert rest_of(spec(**fields), state, keep_alive) == expected


def test_an_idle_model_sleeps_and_then_its_process_ends() -> None:
    async def scene() -> None:
        async with Pool([spec(sleep_idle_seconds=0.05, unload_idle_seconds=0.05)]) as pool:
            states: list[str] = []
            async with pool.events() as events:
                await anext(events)
                assert (await pool.complete("m", "hello").collect()).text == "hello"
                async for event in events:
                    if event.data["status"] not in states:
                        states.append(event.data["status"])
                    if event.data["status"] == State.UNLOADED:
                        break
            assert states == ["loading", "loaded", "sleeping", "unloaded"]
            assert pool.status("m").exit_code == 0
            assert (await pool.complete("m", "back").collect()).text == "back"

    run(scene())


def test_looking_neither_wakes_a_model_nor_keeps_it_awake() -> None:
    async def scene() -> None:
        async with Pool([spec(sleep_idle_seconds=0.2)]) as pool:
            await pool.load("m")

            def look() -> bool:
                pool.models()
                pool.logs("m")
                pool.events()
                return pool.status("m").state is State.SLEEPING

            await until(look, "it sleeps although somebody looks all the time")
            pid = pool.status("m").pid
            for _ in range(50):
                assert look()
                await asyncio.sleep(0)
            assert pool.status("m").pid == pid

    run(scene())


def test_a_busy_model_does_not_sleep(tmp_path: Path) -> None:
    gate = tmp_path / "gate"

    async def scene() -> None:
        model = spec(sleep_idle_seconds=0.0, unload_idle_seconds=0.0, script={"step_gate": str(gate), "gate_at": 1})
        async with Pool([model]) as pool:
            generation = pool.complete("m", "one two")
            assert (await anext(generation)).text == "one"
            assert pool.status("m").state is State.LOADED
            gate.touch()
            assert (await anext(generation)).text == " two"
            await reach(pool, "m", State.UNLOADED)

    run(scene())


def test_keep_alive_of_the_last_request_decides_how_long_the_model_stays() -> None:
    async def scene() -> None:
        async with Pool([spec("short"), spec("long", unload_idle_seconds=0.0)]) as pool:
            await pool.complete("short", "hello", keep_alive=0).collect()
            await pool.complete("long", "hello", keep_alive=-1).collect()
            await reach(pool, "short", State.UNLOADED)
            assert pool.status("long").state is State.LOADED
            with pytest.raises(BadRequest, match="keep_alive"):
                pool.complete("short", "hello", keep_alive=float("nan"))

    run(scene())


def test_requests_at_the_very_moment_of_falling_asleep_are_all_served() -> None:
    async def scene() -> None:
        async with Pool([spec(sleep_idle_seconds=0.0, unload_idle_seconds=0.0)]) as pool:
            for number in range(60):
                assert (await pool.complete("m", f"request {number}").collect()).text == f"request {number}"
                for _ in range(number % 7):
                    await asyncio.sleep(0)

    run(scene(), 50)


def test_models_marked_for_it_are_loaded_when_the_pool_opens() -> None:
    async def scene() -> None:
        async with Pool([spec("a", load_on_startup=True), spec("b")]) as pool:
            await reach(pool, "a", State.LOADED)
            assert pool.status("b").state is State.UNLOADED

    run(scene())


# --- priorities and limits ---


def test_a_pinned_model_stays_when_others_need_room() -> None:
    async def scene() -> None:
        async with Pool([spec("pinned", pinned=True), spec("a"), spec("b")], models_max=2) as pool:
            for model in ("pinned", "a", "b", "a"):
                await pool.complete(model, "hello").collect()
            assert pool.status("pinned").state is State.LOADED

    run(scene())


def test_a_full_queue_is_refused_with_a_hint_to_come_back(tmp_path: Path) -> None:
    async def scene() -> None:
        model = fake("m", load_gate=str(tmp_path / "never"))
        async with Pool([model], queue_max=2) as pool:
            held = [pool.complete("m", "hello") for _ in range(2)]
            with pytest.raises(QueueFull, match="limit is 2") as caught:
                await pool.complete("m", "hello").collect()
            assert (caught.value.retry, caught.value.retry_after) == (True, 1.0)
            assert pool.status("m").queued == len(held)

    run(scene())


def test_a_request_that_waits_too_long_fails_with_its_place_and_may_be_tried_again(tmp_path: Path) -> None:
    gate = tmp_path / "gate"

    async def scene() -> None:
        async with Pool([fake("m", load_gate=str(gate))], queue_timeout=0.05) as pool:
            patient = pool.complete("m", "patient", queue_timeout=0)
            with pytest.raises(
                QueueTimeout, match=r"waited 0\.05 s .* 'm', which is loading, and is number 2 of 2"
            ) as late:
                await pool.complete("m", "hello").collect()
            assert (late.value.retry, late.value.retry_after, late.value.code) == (True, 1.0, "queue_timeout")
            with pytest.raises(QueueTimeout):
                await pool.tokenize("m", "hello")
            assert pool.status("m").queued == 1
            gate.touch()
            assert (await patient.collect()).text == "patient"
            assert pool.status("m").queued == pool.status("m").in_flight == 0

    run(scene())


def test_the_limit_of_waiting_does_not_cut_an_answer_short(tmp_path: Path) -> None:
    gate = tmp_path / "gate"

    async def scene() -> None:
        async with Pool([fake("m", n_parallel=1, step_gate=str(gate), gate_at=1)]) as pool:
            await pool.load("m")
            answer = pool.complete("m", "one two", queue_timeout=0.01)
            assert (await anext(answer)).text == "one"
            with pytest.raises(QueueTimeout):  # this one's limit comes after that of the running one
                await pool.complete("m", "hello", queue_timeout=0.02).collect()
            gate.touch()
            assert (await anext(answer)).text == " two"

    run(scene())


def test_every_waiting_request_shows_its_place(tmp_path: Path) -> None:
    async def scene() -> None:
        async with Pool([fake("m", load_gate=str(tmp_path / "never"))]) as pool:
            waiting = [pool.complete("m", "hello", priority=priority) for priority in (0, 5, 0)]
            shown = pool.status("m").waiting
            assert [(request.request, request.position, request.priority) for request in shown] == [
                (waiting[1].request, 1, 5),
                (waiting[0].request, 2, 0),
                (waiting[2].request, 3, 0),
            ]
            assert all(request.seconds >= 0 for request in shown)
            assert pool.status("m").to_dict()["waiting"][0]["position"] == 1

    run(scene())


def test_a_limit_of_waiting_must_be_a_time() -> None:
    with pytest.raises(BadRequest, match="queue_timeout"):
        Pool(queue_timeout=-1.0)

    async def scene() -> None:
        async with Pool([fake("m")]) as pool:
            with pytest.raises(BadRequest, match="queue_timeout"):
                pool.complete("m", "hello", queue_timeout=float("nan"))

    run(scene())


def test_waiting_requests_go_by_priority() -> None:
    async def scene() -> None:
        async with Pool([fake("m", n_parallel=1, step_seconds=0.001)]) as pool:
            order: list[str] = []

            async def ask(name: str, priority: int) -> None:
                await pool.complete("m", name, priority=priority).collect()
                order.append(name)

            async with asyncio.TaskGroup() as group:
                for name, priority in (("low", 0), ("high", 9), ("middle", 5)):
                    group.create_task(ask(name, priority))
            assert order == ["high", "middle", "low"]

    run(scene())


def test_models_make_way_by_memory_and_not_only_by_number() -> None:
    async def scene() -> None:
        models = [spec("a", memory=3 * MIB), spec("b", memory=3 * MIB), spec("big", memory=7 * MIB)]
        async with Pool(models, memory_budget=10 * MIB) as pool:
            for model in ("a", "b", "big"):
                await pool.complete(model, "hello").collect()
            assert [status.state for status in pool.models()] == [State.UNLOADED, State.LOADED, State.LOADED]
            assert pool.status("big").memory == 7 * MIB

    run(scene())


def test_a_model_that_cannot_be_downloaded_does_not_keep_a_pool_from_opening(tmp_path: Path) -> None:
    async def scene() -> None:
        origin = Origin(repo="user/repo", cache=tmp_path, offline=True)
        async with Pool([spec("a", load_on_startup=True), spec("b", origin=origin, load_on_startup=True)]) as pool:
            await reach(pool, "a", State.LOADED)
            await until(lambda: pool.status("b").failed)
            assert pool.status("b").state is State.UNLOADED

    run(scene())


def test_a_size_that_cannot_even_be_asked_for_keeps_nobody_waiting() -> None:
    options = EngineOptions(adapters=(Adapter(path="no\0path"),))
    model = ModelSpec(name="m", path=tiny_model("random"), engine="fake", options=options)

    async def scene() -> None:
        async with Pool([model], memory_budget=2**40) as pool:
            assert (await pool.complete("m", "hello").collect()).text == "hello"

    run(scene())


def test_a_model_over_the_memory_budget_is_refused_with_the_figures() -> None:
    async def scene() -> None:
        async with Pool([spec(memory=11 * MIB)], memory_budget=10 * MIB) as pool:
            with pytest.raises(QueueFull, match="needs about 11 MiB, and the memory budget is 10 MiB") as caught:
                await pool.complete("m", "hello").collect()
            assert not caught.value.retry

    run(scene())


def test_what_a_model_takes_is_measured_once_it_is_loaded() -> None:
    async def scene() -> None:
        async with Pool([spec()]) as pool:
            assert pool.status("m").memory == 0
            await pool.load("m")
            assert 5 * MIB < pool.status("m").memory < 500 * MIB

    run(scene())


def test_requests_wait_while_a_files_size_is_read_and_those_that_leave_meanwhile_are_forgotten(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF and no more")

    async def scene() -> None:
        model = ModelSpec(name="m", path=path, engine="fake")
        async with Pool([model], memory_budget=10 * MIB) as pool:
            stays, leaves = pool.complete("m", "hello"), pool.complete("m", "hello")
            assert pool.status("m").queued == 2
            await leaves.aclose()
            assert pool.status("m").queued == 1
            assert (await stays.collect()).text == "hello"
            assert pool.status("m").queued == 0

    run(scene())


def test_what_a_file_will_take_is_estimated_before_it_is_loaded() -> None:
    demo = find_model("demo")
    assert demo.path is not None
    assert expected_memory(demo) > demo.path.stat().st_size
    assert expected_memory(ModelSpec(name="m", path=Path(__file__))) == 0
    assert expected_memory(ModelSpec(name="m", path=Path("/nowhere"))) == 0


def test_a_worker_is_told_what_its_cache_will_take_where_that_is_known() -> None:
    path = tiny_model("random")
    cells = EngineOptions(n_ctx=1000)
    assert expected(ModelSpec(name="m", path=path, options=cells), ()).cache == kv_bytes(read_facts(path), 1024)
    embeds = EngineOptions(n_ctx=1000, embedding=True)
    assert expected(ModelSpec(name="m", path=path, options=embeds), ()).cache == 0
    assert expected(ModelSpec(name="m", path=Path("/nowhere")), ()) == Expected()
    assert expected(ModelSpec(name="m"), ()) == Expected()


# --- the spare ---


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_spare_worker_takes_the_next_model_and_is_replaced(transport: str) -> None:
    async def scene() -> None:
        async with Pool([spec("a"), spec("b")], transport=transport, spare=True) as pool:
            me = psutil.Process()
            await until(lambda: len(me.children()) == 1, "the spare is there")
            (spare,) = (child.pid for child in me.children())
            assert (await pool.complete("a", "hello").collect()).text == "hello"
            assert pool.status("a").pid == spare
            await until(lambda: len(me.children()) == 2, "there is a new spare")
            assert (await pool.complete("b", "hello").collect()).text == "hello"
            assert pool.status("b").pid != spare
            assert pool.status("b").args
        assert me.children() == []

    run(scene())


def test_a_spare_that_dies_costs_nothing_and_the_next_load_brings_a_new_one() -> None:
    async def scene() -> None:
        async with Pool([spec("a")], spare=True) as pool:
            me = psutil.Process()
            await until(lambda: len(me.children()) == 1)
            me.children()[0].kill()
            await until(lambda: not me.children())
            assert (await pool.complete("a", "hello").collect()).text == "hello"
            await until(lambda: len(me.children()) == 2, "there is a new spare")

    run(scene())


def test_while_a_model_waits_for_room_nothing_is_started_for_it_and_it_takes_the_process_in_its_way() -> None:
    async def scene() -> None:
        async with Pool([spec("a", script={"step_seconds": 0.01}), spec("b")], models_max=1) as pool:
            me = psutil.Process()
            running = pool.complete("a", LONG)
            await anext(running)
            first = pool.status("a").pid
            waiting = asyncio.create_task(pool.complete("b", "hello").collect())
            await anext(running)
            assert pool.status("b").state is State.UNLOADED
            await running.aclose()
            assert (await waiting).text == "hello"
            assert [child.pid for child in me.children()] == [pool.status("b").pid] == [first]

    run(scene())


# --- failures ---


def test_backing_off_doubles_up_to_a_minute_and_ends_with_a_success() -> None:
    backoff = Backoff()
    waits: list[float] = []
    for _ in range(9):
        backoff.failed(100.0)
        waits.append(backoff.wait(100.0))
    assert waits == [0, 1, 2, 4, 8, 16, 32, MOST_SECONDS, MOST_SECONDS]
    assert backoff.wait(100.0 + MOST_SECONDS) == 0
    backoff.succeeded()
    backoff.failed(0.0)
    assert backoff.wait(0.0) == 0


def test_a_model_that_failed_twice_is_refused_for_a_while_and_a_load_command_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(restart, "FIRST_SECONDS", 60.0)

    async def scene() -> None:
        async with Pool([fake("m", load="fail")]) as pool:
            for _ in range(2):
                with pytest.raises(LoadFailed, match="script says"):
                    await pool.complete("m", "hello").collect()
            with pytest.raises(LoadFailed, match="not tried again for") as caught:
                await pool.complete("m", "hello").collect()
            assert caught.value.retry_after is not None
            assert 0 < caught.value.retry_after <= 60
            assert caught.value.code == "load_backoff"
            with pytest.raises(LoadFailed, match="script says"):
                await pool.load("m")

    run(scene())


def test_a_load_without_progress_is_given_up_and_one_with_progress_is_not(tmp_path: Path) -> None:
    async def scene() -> None:
        silent = spec("silent", load_stall_seconds=0.3, script={"load": "stall"})
        slow = spec("slow", script={"load_steps": 40, "load_seconds": 1.5})
        async with Pool([silent, slow]) as pool:
            with pytest.raises(LoadFailed, match="made no progress for 0.3 s") as caught:
                await pool.load("silent")
            assert caught.value.exit_code == -signal.SIGKILL
            await pool.load("slow")
            pool.start_sleep("slow")
            # The second load has the limit: with the first, the start of an interpreter would count as silence.
            pool.reload([silent, msgspec.structs.replace(slow, load_stall_seconds=1.4)])
            assert (await pool.load("slow")).state is State.LOADED

    run(scene())


def test_a_request_without_an_answer_yet_gets_a_second_worker_and_one_with_an_answer_does_not(tmp_path: Path) -> None:
    gate = tmp_path / "gate"

    async def scene() -> None:
        async with Pool([fake("m", n_parallel=2, step_gate=str(gate), gate_at=1)]) as pool:
            begun = pool.complete("m", "one two")
            assert (await anext(begun)).text == "one"
            waiting = asyncio.ensure_future(pool.complete("m", "fresh").collect())
            await until(lambda: pool.status("m").in_flight == 2)
            pid = pool.status("m").pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            gate.touch()
            with pytest.raises(WorkerDied):
                async for _ in begun:
                    pass
            assert (await waiting).text == "fresh"

    run(scene())


def test_a_request_that_kills_two_workers_is_not_given_a_third() -> None:
    async def scene() -> None:
        async with Pool([fake("m", crash_at=0)]) as pool:
            with pytest.raises(WorkerDied, match="SIGKILL"):
                await pool.complete("m", "poison").collect()
            assert pool.status("m").in_flight == 0

    run(scene())


def test_the_kernels_count_of_its_kills_is_read(tmp_path: Path) -> None:
    vmstat = tmp_path / "vmstat"
    assert oom_kills(vmstat) == 0
    vmstat.write_text("nr_free_pages 17\noom_kill 3\n")
    assert oom_kills(vmstat) == 3


@pytest.mark.parametrize("field", ["sleep_idle_seconds", "unload_idle_seconds", "load_stall_seconds"])
def test_wrong_times_are_refused(field: str) -> None:
    wrong: dict[str, Any] = {field: -1.0}
    with pytest.raises(BadRequest, match=field):
        Pool([spec("m", **wrong)])


def test_a_load_that_waits_for_room_can_be_called_off(tmp_path: Path) -> None:
    gate = tmp_path / "gate"

    async def scene() -> None:
        async with Pool([fake("busy", step_gate=str(gate), gate_at=1), fake("m")], models_max=1) as pool:
            running = pool.complete("busy", "one two")
            assert (await anext(running)).text == "one"
            pool.start_load("m")
            waiting = asyncio.ensure_future(pool.complete("m", "hello").collect())
            await until(lambda: pool.status("m").queued == 2)

            assert (await pool.unload("m")).state is State.UNLOADED

            with pytest.raises(WorkerFailed, match="'m' was unloaded") as failure:
                await waiting
            assert failure.value.code == "unloaded" and pool.status("m").queued == 0
            with pytest.raises(ModelBusy, match="not running"):
                await pool.unload("m")
            gate.touch()
            assert [piece.text async for piece in running] == [" two", ""]
            assert pool.status("m").pid is None

    run(scene())
