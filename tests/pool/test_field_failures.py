"""Failures that users of such programs have met, each played against real processes. Others have their tests where
they belong:

a busy model evicted, a caller that leaves, a request at the moment of falling asleep (``test_pool``,
``test_policies``); a worker killed at every moment, deaf to everything, with a grandchild, with a dead manager
(``test_supervision``); torn, glued and flooded records (``tests/transport``); disconnects and slow loads as HTTP
clients see them (``tests/http``).
"""

import asyncio
import fcntl
from pathlib import Path

import psutil
import pytest

from herding import fake, reach, run, until
from llamaherd.pool import BadRequest, LoadFailed, ModelSpec, Pool, State


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
                prepared = [name for pid, name in living.items() if pid not in holders]
                assert prepared in ([], ["spare"]), f"no process has a model that the pool does not know: {living}"
                most = max(most, len(living) - len(prepared))
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
        models = [fake("slow", ignore_exit=True, stop_timeout=0.4), fake("next")]
        async with Pool(models, models_max=1) as pool:
            pid = (await pool.load("slow")).pid
            assert pid is not None
            second = asyncio.ensure_future(pool.complete("next", "hello").collect())
            await reach(pool, "slow", State.STOPPING)
            await until(lambda: pool.status("next").state is not State.UNLOADED, "the next one starts")
            assert not psutil.pid_exists(pid)
            assert (await second).text == "hello"

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


def test_a_load_without_memory_that_cannot_be_helped_cools_down_instead_of_being_tried_again_and_again(
    tmp_path: Path,
) -> None:
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
                assert 0 < error.retry_after <= 1
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
            outcomes = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 40)
            assert len(outcomes) == len(tasks)
            await until(lambda: all(status.in_flight == status.queued == 0 for status in pool.models()))
            for name in names:
                await pool.load(name)
                assert (await pool.complete(name, "at rest").collect()).text == "at rest"

    run(scene(), 58)
