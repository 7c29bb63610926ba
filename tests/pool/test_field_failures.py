"""The twenty failures that users of such programs have met most, and that shall not happen here.

:data:`TESTS` says which tests play each; those that belong nowhere else are in this file, against real processes.
"""

import asyncio
import fcntl
import threading
from pathlib import Path

import msgspec
import psutil
import pytest

from herding import TRANSPORTS, fake, reach, run, until
from llamaherd.pool import BadRequest, LoadFailed, ModelSpec, Placement, Pool, State, SyncPool, WorkerDied, restart
from patience import patience

HERE = Path(__file__).parents[1]

#: Failure -> the tests that play it, as file and name.
TESTS = {
    "a busy model is evicted": [
        ("pool/test_pool.py", "test_a_busy_model_finishes_before_another_takes_its_place"),
        ("pool/test_schedule_machine.py", "TestHerd"),
    ],
    "a model is evicted between its ready and its first piece": [
        ("pool/test_field_failures.py", "test_no_model_is_evicted_between_its_ready_and_its_first_piece"),
    ],
    "two wait, one place becomes free, one wake-up is lost": [
        ("pool/test_field_failures.py", "test_no_wake_up_is_lost_when_two_wait_for_one_place"),
    ],
    "a worker that is killed while it loads leaves the model loading for ever": [
        ("pool/test_supervision.py", "test_a_worker_killed_from_outside_is_noticed_and_the_next_request_restarts_it"),
        ("pool/test_supervision.py", "test_a_worker_killed_while_it_is_told_to_stop_counts_as_stopped"),
    ],
    "the manager deadlocks": [
        ("pool/test_field_failures.py", "test_random_commands_always_make_progress"),
        ("pool/test_field_failures.py", "test_unloading_from_inside_an_event_stream_does_not_deadlock"),
        ("pool/test_soak.py", "test_nothing_is_lost_left_or_broken_in_a_long_disorder"),
    ],
    "loads at the same time pass the limit": [
        ("pool/test_field_failures.py", "test_fifty_loads_at_once_never_pass_the_limit_and_never_start_a_model_twice"),
    ],
    "a worker ignores exit and SIGTERM": [
        ("pool/test_supervision.py", "test_a_worker_that_ignores_everything_is_killed_at_its_stop_timeout"),
        (
            "pool/test_supervision.py",
            "test_a_worker_that_spins_in_a_step_and_never_returns_is_killed_at_its_stop_timeout",
        ),
        ("pool/test_supervision.py", "test_the_pool_answers_while_a_worker_refuses_to_stop"),
    ],
    "an exit command is not read during a load": [
        ("pool/test_supervision.py", "test_an_unload_right_after_the_spawn_does_not_wait_for_the_stop_timeout"),
        ("pool/test_supervision.py", "test_a_model_that_is_still_loading_is_killed_at_once_and_its_callers_are_told"),
    ],
    "a grandchild keeps a pipe open and the exit is not noticed": [
        (
            "pool/test_supervision.py",
            "test_a_grandchild_that_holds_every_descriptor_neither_delays_the_exit_nor_survives_it",
        ),
    ],
    "the manager dies and the workers stay": [
        ("pool/test_supervision.py", "test_no_worker_outlives_a_manager_that_is_killed"),
        ("pool/test_supervision.py", "test_a_worker_without_the_parent_death_signal_still_leaves_at_end_of_file"),
        ("pool/test_field_failures.py", "test_a_worker_outlives_the_thread_that_asked_for_it"),
    ],
    "a state is torn, glued or lost in log noise, or unknown": [
        ("transport/test_framing.py", "test_lines_survive_any_chunking_and_any_noise_between_them"),
        ("transport/test_framing.py", "test_an_open_line_of_progress_dots_loses_no_state"),
        ("transport/test_framing.py", "test_the_prefix_inside_a_line_is_log"),
        ("transport/test_contract.py", "test_unknown_kinds_and_malformed_bodies_arrive_as_unknown"),
    ],
    "an undrained pipe or a long line stalls the reader": [
        ("pool/test_supervision.py", "test_a_worker_that_floods_its_output_loses_nothing_and_costs_bounded_memory"),
        ("transport/test_framing.py", "test_a_line_over_the_cap_is_reported_once_and_the_stream_goes_on"),
    ],
    "memory runs out at a load, and the load is tried again and again": [
        (
            "pool/test_field_failures.py",
            "test_a_load_without_memory_stops_the_idle_model_used_longest_ago_and_is_tried_once_more",
        ),
        (
            "pool/test_field_failures.py",
            "test_a_load_without_memory_that_cannot_be_helped_cools_down_instead_of_being_tried_again_and_again",
        ),
        ("pool/test_field_failures.py", "test_a_second_try_that_finds_no_memory_either_is_the_last"),
    ],
    "memory is not back yet when the next load starts, or is waited for too long": [
        ("pool/test_field_failures.py", "test_the_next_load_waits_until_the_old_process_is_really_gone"),
        ("pool/test_field_failures.py", "test_the_next_load_does_not_wait_for_the_stop_timeout_of_a_worker_that_died"),
    ],
    "a port is taken between its choice and its use": [
        ("pool/test_field_failures.py", "test_no_worker_listens_on_any_port"),
    ],
    "a request arrives while an idle model is being stopped": [
        ("pool/test_policies.py", "test_requests_at_the_very_moment_of_falling_asleep_are_all_served"),
    ],
    "a caller that leaves keeps its slot": [
        ("pool/test_pool.py", "test_a_caller_that_leaves_frees_its_slot"),
        ("pool/test_pool.py", "test_a_caller_that_leaves_while_the_model_loads_or_in_the_queue_is_forgotten"),
        ("http/test_disconnect.py", "test_many_clients_that_leave_leave_nothing_behind"),
    ],
    "polls wake a model or keep it awake": [
        ("pool/test_policies.py", "test_looking_neither_wakes_a_model_nor_keeps_it_awake"),
        ("http/test_metrics.py", "test_a_scrape_shows_every_model_and_wakes_none"),
        ("http/test_routes.py", "test_listing_wakes_nothing"),
    ],
    "a proxy gives up on a long prompt, and a shutdown cuts answers off": [
        ("http/test_failures.py", "test_a_client_that_waits_for_a_load_is_kept_with_comments"),
        ("http/test_server.py", "test_a_shutdown_lets_answers_that_are_under_way_end"),
        ("pool/test_pool.py", "test_a_pool_that_drains_finishes_what_it_has_and_refuses_what_is_new"),
    ],
    "one bad model or a bad catalogue stops everything": [
        ("pool/test_field_failures.py", "test_one_broken_model_does_not_stop_the_others"),
        ("pool/test_field_failures.py", "test_a_thousand_bad_requests_leave_the_worker_healthy"),
        ("pool/test_reload.py", "test_a_broken_entry_is_listed_with_its_reason_and_the_others_serve"),
        ("pool/test_reload.py", "test_a_catalogue_that_is_none_changes_nothing"),
    ],
}


def test_each_of_the_twenty_failures_is_played() -> None:
    assert len(TESTS) == 20
    sources = {path: (HERE / path).read_text() for tests in TESTS.values() for path, _ in tests}
    played = [
        name
        for tests in TESTS.values()
        for path, name in tests
        if f"{name}(" in sources[path] or f"\n{name} = " in sources[path]
    ]
    assert played == [name for tests in TESTS.values() for _, name in tests]


def test_a_worker_outlives_the_thread_that_asked_for_it() -> None:
    """The kernel's parent-death signal follows threads, so the one that spawns must be the pool's own."""
    with SyncPool([fake("m")]) as pool:
        loading = threading.Thread(target=pool.load, args=("m",))
        loading.start()
        loading.join()
        pid = pool.status("m").pid
        assert pool.complete("m", "still here").collect().text == "still here"
        assert pool.status("m").pid == pid


def test_the_next_load_does_not_wait_for_the_stop_timeout_of_a_worker_that_died() -> None:
    async def scene() -> None:
        async with Pool([fake("a", crash_at=1), fake("b")], models_max=1, stop_timeout=3600) as pool:
            dying = pool.complete("a", "one two")
            waiting = asyncio.ensure_future(pool.complete("b", "hello").collect())
            with pytest.raises(WorkerDied):
                await dying.collect()
            assert (await waiting).text == "hello"

    run(scene())


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_no_worker_listens_on_any_port(transport: str) -> None:
    def connections(pid: int | None = None) -> set[object]:
        return {(one.laddr, one.raddr) for one in psutil.Process(pid).net_connections(kind="inet")}

    async def scene() -> None:
        before = connections()  # other tests speak HTTP in this process
        async with Pool([fake("m")], transport=transport) as pool:
            pid = (await pool.load("m")).pid
            assert connections(pid) == set()
            assert connections() <= before

    run(scene())


def test_no_model_is_evicted_between_its_ready_and_its_first_piece() -> None:
    """A request for another model at any moment after the first one harms neither."""

    async def scene() -> None:
        async with Pool([fake("a"), fake("b")], models_max=1) as pool:
            for offset in range(24):
                first = asyncio.ensure_future(pool.complete("a", "from a").collect())
                for _ in range(offset):
                    await asyncio.sleep(0)
                if offset > 12:
                    await reach(pool, "a", State.LOADED)
                second = asyncio.ensure_future(pool.complete("b", "from b").collect())
                assert (await first).text == "from a"
                assert (await second).text == "from b"

    run(scene(), 55)


def test_no_wake_up_is_lost_when_two_wait_for_one_place() -> None:
    async def scene() -> None:
        async with Pool([fake("a"), fake("b"), fake("c")], models_max=1) as pool:
            for _ in range(8):
                await pool.complete("a", "first").collect()
                answers = await asyncio.gather(pool.complete("b", "b").collect(), pool.complete("c", "c").collect())
                assert [answer.text for answer in answers] == ["b", "c"]

    run(scene(), 55)


def test_unloading_from_inside_an_event_stream_does_not_deadlock() -> None:
    async def scene() -> None:
        async with Pool([fake("m")]) as pool:
            pool.start_load("m")
            async for event in pool.events():
                if event.data.get("status") == State.LOADED:
                    assert (await pool.unload("m")).state is State.UNLOADED
                    break
            assert (await pool.complete("m", "again").collect()).text == "again"

    run(scene())


def model_of(worker: psutil.Process) -> str:
    """Return the model that a living worker was started for, nothing for one that is gone."""
    try:
        return str(worker.cmdline()[-1])
    except (psutil.Error, IndexError):
        return ""


def test_fifty_loads_at_once_never_pass_the_limit_and_never_start_a_model_twice() -> None:
    async def scene() -> None:
        names = [f"m{number % 10}" for number in range(50)]
        me = psutil.Process()
        most = 0

        async def watch(pool: Pool) -> None:
            nonlocal most
            while True:
                holders = {status.pid for status in pool.models()}
                living = {child.pid: name for child in me.children() if (name := model_of(child))}
                strangers = [name for pid, name in living.items() if pid not in holders]
                assert not strangers, f"the pool knows whose each process is: {living}"
                most = max(most, len(living))
                await asyncio.sleep(0)

        async with Pool([fake(name) for name in sorted(set(names))], models_max=2) as pool:
            watching = asyncio.ensure_future(watch(pool))
            await asyncio.gather(*(pool.load(name) for name in names))
            watching.cancel()
            with pytest.raises(asyncio.CancelledError):
                await watching
        assert most == 2

    run(scene(), 55)


def test_the_next_load_waits_until_the_old_process_is_really_gone(tmp_path: Path) -> None:
    async def scene() -> None:
        # A process of the next one's own, since it cannot take over one that runs.
        elsewhere = msgspec.structs.replace(fake("next"), placements=(Placement(cores=(0,)),))
        models = [fake("slow", ignore_exit=True, stop_timeout=0.4), elsewhere]
        async with Pool(models, models_max=1) as pool:
            pid = (await pool.load("slow")).pid
            assert pid is not None
            second = asyncio.ensure_future(pool.complete("next", "hello").collect())
            await reach(pool, "slow", State.STOPPING)
            await until(lambda: pool.status("next").state is not State.UNLOADED, "the next one starts")
            assert not psutil.pid_exists(pid)
            assert (await second).text == "hello"

    run(scene())


def test_the_next_load_waits_until_the_process_that_it_takes_over_has_freed_what_the_old_model_had(
    tmp_path: Path,
) -> None:
    memory = [str(tmp_path / "memory")]

    async def scene() -> None:
        async with Pool([fake("old", memory=memory), fake("next", memory=memory)], models_max=1) as pool:
            pid = (await pool.load("old")).pid
            assert (await pool.complete("next", "hello").collect()).text == "hello"
            assert pool.status("next").pid == pid

    run(scene())


def test_a_load_without_memory_stops_the_idle_model_used_longest_ago_and_is_tried_once_more(tmp_path: Path) -> None:
    async def scene() -> None:
        pieces = (str(tmp_path / "piece 1"), str(tmp_path / "piece 2"))
        async with Pool([fake(name, memory=pieces) for name in "abc"]) as pool:
            for name in "ab":
                await pool.load(name)
            await pool.complete("a", "used last").collect()
            answers = await asyncio.gather(*(pool.complete("c", f"waits {number}").collect() for number in range(3)))
            assert [answer.text for answer in answers] == [f"waits {number}" for number in range(3)]
            assert [status.state for status in pool.models()] == [State.LOADED, State.UNLOADED, State.LOADED]
            assert not any(status.failed for status in pool.models())

    run(scene())


def test_a_load_that_crashes_for_want_of_gpu_memory_is_such_a_load_too(tmp_path: Path) -> None:
    async def scene() -> None:
        piece = (str(tmp_path / "piece"),)
        models = [fake("idle", memory=piece), fake("m", memory=piece, starve="crash")]
        async with Pool(models) as pool:
            await pool.load("idle")
            assert (await pool.complete("m", "hello").collect()).text == "hello"
            assert pool.status("idle").state is State.UNLOADED

    run(scene())


def test_a_gpu_that_stays_full_is_named_with_what_to_change(tmp_path: Path) -> None:
    async def scene() -> None:
        async with Pool([fake("m", memory=(str(tmp_path / "held"),), starve="crash")]) as pool:
            with pytest.raises(
                LoadFailed, match="ran out of GPU memory .*CUDA error: out of memory.*n_gpu_layers"
            ) as caught:
                await pool.complete("m", "hello").collect()
            assert (caught.value.code, caught.value.retry) == ("out_of_memory", True)

    with (tmp_path / "held").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        run(scene())


def test_a_load_without_memory_that_cannot_be_helped_cools_down_instead_of_being_tried_again_and_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restart, "FIRST_SECONDS", 60.0)
    gate, started = tmp_path / "gate", tmp_path / "only piece"

    async def scene() -> None:
        busy = fake("busy", memory=(str(started),), step_gate=str(gate), gate_at=1)
        async with Pool([busy, fake("m", memory=(str(started),))]) as pool:
            running = pool.complete("busy", "one two")
            assert (await anext(running)).text == "one"
            with pytest.raises(LoadFailed, match="no memory left") as first:
                await pool.complete("m", "hello").collect()
            assert (first.value.code, first.value.retry) == ("out_of_memory", True)
            with pytest.raises(LoadFailed, match="not tried again for") as second:
                await pool.complete("m", "hello").collect()
            for error in (first.value, second.value):
                assert error.retry_after is not None
                assert 0 < error.retry_after <= 60
            assert pool.status("busy").state is State.LOADED
            gate.touch()
            assert [piece.text async for piece in running] == [" two", ""]
            # A command is carried out at once; now that the other one is idle, it makes way.
            assert (await pool.load("m")).state is State.LOADED
            assert pool.status("busy").state is State.UNLOADED

    run(scene())


def test_a_second_try_that_finds_no_memory_either_is_the_last(tmp_path: Path) -> None:
    async def scene() -> None:
        # What the idle model gives up is not what this one needs.
        async with Pool([fake("idle"), fake("m", memory=(str(tmp_path / "held"),))]) as pool:
            await pool.load("idle")
            with pytest.raises(LoadFailed, match="no memory left"):
                await pool.complete("m", "hello").collect()
            assert [status.state for status in pool.models()] == [State.UNLOADED, State.UNLOADED]

    with (tmp_path / "held").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        run(scene())


def test_one_broken_model_does_not_stop_the_others() -> None:
    async def scene() -> None:
        models = [ModelSpec(name="broken", path=Path("/nowhere.gguf")), fake("fine"), fake("failing", load="fail")]
        async with Pool(models) as pool:
            answers = await asyncio.gather(
                *(pool.complete(name, "hello").collect() for name in ("broken", "fine", "failing")),
                return_exceptions=True,
            )
            assert isinstance(answers[0], LoadFailed)
            assert "/nowhere.gguf" in str(answers[0])
            assert isinstance(answers[2], LoadFailed)
            assert (await pool.complete("fine", "still").collect()).text == "still"
            assert [status.failed for status in pool.models()] == [True, False, True]

    run(scene())


def test_a_thousand_bad_requests_leave_the_worker_healthy() -> None:
    async def scene() -> None:
        async with Pool([fake("m")]) as pool:
            pid = (await pool.load("m")).pid
            for _ in range(1000):
                with pytest.raises(BadRequest):
                    await pool.complete("m", [999]).collect()
            assert (await pool.complete("m", "fine").collect()).text == "fine"
            assert pool.status("m").pid == pid

    run(scene(), 50)


def test_random_commands_always_make_progress() -> None:
    """Loads, unloads, sleeps, requests and kills in a fixed disorder; whatever happens, the pool comes to rest and
    serves.
    """

    async def scene() -> None:
        names = ["a", "b", "c", "d", "e"]
        async with Pool([fake(name, step_seconds=0.001) for name in names], models_max=2) as pool:
            tasks: list[asyncio.Task[object]] = []
            for turn in range(150):
                name = names[turn * 7 % 5]
                match turn * 11 % 6:
                    case 0:
                        tasks.append(asyncio.ensure_future(pool.load(name)))
                    case 1 if pool.status(name).state not in (State.UNLOADED, State.STOPPING):
                        pool.start_unload(name)
                    case 2 if pool.status(name).state is State.LOADED and not pool.status(name).in_flight:
                        pool.start_sleep(name)
                    case 3 if (pid := pool.status(name).pid) is not None and psutil.pid_exists(pid):
                        psutil.Process(pid).kill()
                    case _:
                        tasks.append(asyncio.ensure_future(pool.complete(name, f"turn {turn}").collect()))
                for _ in range(turn % 13):
                    await asyncio.sleep(0)
            async with patience(40):
                outcomes = await asyncio.gather(*tasks, return_exceptions=True)
            assert len(outcomes) == len(tasks)
            await until(lambda: all(status.in_flight == status.queued == 0 for status in pool.models()))
            for name in names:
                await pool.load(name)
                assert (await pool.complete(name, "at rest").collect()).text == "at rest"

    run(scene(), 58)
