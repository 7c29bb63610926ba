"""The pool owns its workers' lives: what it stops is gone, what dies is noticed, nothing outlives it. Real
processes.
"""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from herding import TRANSPORTS, fake, reach, run, until, wait_gone
from llamaherd.pool import LoadFailed, ModelSpec, Pool, PoolClosed, PoolError, State, WorkerDied, WorkerFailed, worker
from llamaherd.pool.launch import Exit, LaunchSpec, LocalLauncher, Process, is_exiting

MANAGER = Path(__file__).parent.parent / "support" / "manager.py"
ENDLESS: dict[str, Any] = {"pieces": ("x",), "repeat": 10**6, "step_seconds": 0.001}


def descriptors() -> set[str]:
    """Return what is open; those of other tests may go meanwhile."""
    return set(os.listdir("/proc/self/fd"))


def pid_of(pool: Pool, model: str = "m") -> int:
    pid = pool.status(model).pid
    assert pid is not None
    return pid


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_worker_that_ignores_everything_is_killed_at_its_stop_timeout(transport: str) -> None:
    async def scene() -> None:
        deaf = fake("m", ignore_exit=True, stop_timeout=0.3)
        async with Pool([deaf], transport=transport, stop_timeout=3600) as pool:
            pid = (await pool.load("m")).pid
            assert pid is not None
            status = await pool.unload("m")
            assert status.exit_code == -signal.SIGKILL
            assert not psutil.pid_exists(pid)

    run(scene())


def test_a_worker_that_spins_in_a_step_and_never_returns_is_killed_at_its_stop_timeout() -> None:
    async def scene() -> None:
        async with Pool([fake("m", stall_at=1, ignore_exit=True, stop_timeout=0.3)]) as pool:
            generation = pool.complete("m", "one two")
            await anext(generation)
            pid = pid_of(pool)
            await pool.unload("m")
            assert not psutil.pid_exists(pid)
            with pytest.raises(WorkerFailed):
                await anext(generation)

    run(scene())


def test_the_pool_answers_while_a_worker_refuses_to_stop() -> None:
    async def scene() -> None:
        async with Pool([fake("deaf", ignore_exit=True, stop_timeout=3600), fake("m")]) as pool:
            await asyncio.gather(pool.load("deaf"), pool.load("m"))
            stopping = asyncio.ensure_future(pool.unload("deaf"))
            assert (await pool.complete("m", "still here").collect()).text == "still here"
            assert pool.status("deaf").state is State.STOPPING
            os.kill(pid_of(pool, "deaf"), signal.SIGKILL)
            await stopping

    run(scene())


def test_a_model_that_is_still_loading_is_killed_at_once_and_its_callers_are_told() -> None:
    async def scene() -> None:
        async with Pool([fake("m", load="stall")], stop_timeout=3600) as pool:
            generation = pool.complete("m", "hello")
            await reach(pool, "m", State.LOADING)
            status = await pool.unload("m")
            assert (status.state, status.exit_code) == (State.UNLOADED, -signal.SIGKILL)
            with pytest.raises(WorkerFailed, match="unloaded"):
                await generation.collect()

    run(scene())


def test_an_unload_right_after_the_spawn_does_not_wait_for_the_stop_timeout() -> None:
    async def scene() -> None:
        async with Pool([fake("m")], stop_timeout=3600) as pool:
            pool.start_load("m")
            assert (await pool.unload("m")).state is State.UNLOADED
            assert (await pool.complete("m", "hello").collect()).text == "hello"

    run(scene())


async def nothing(pool: Pool, gate: Path) -> None:
    await until(lambda: pool.status("m").pid is not None, "the worker is spawned")


async def loading(pool: Pool, gate: Path) -> None:
    await until(lambda: pool.status("m").progress is not None, "the worker reports progress")


async def loaded(pool: Pool, gate: Path) -> None:
    gate.touch()
    await reach(pool, "m", State.LOADED)


async def asleep(pool: Pool, gate: Path) -> None:
    await loaded(pool, gate)
    pool.start_sleep("m")
    await reach(pool, "m", State.SLEEPING)


@pytest.mark.parametrize("moment", [nothing, loading, loaded, asleep])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_worker_killed_from_outside_is_noticed_and_the_next_request_restarts_it(
    transport: str, moment: Callable[[Pool, Path], object], tmp_path: Path
) -> None:
    gate = tmp_path / "gate"

    async def scene() -> None:
        async with Pool([fake("m", load_gate=str(gate))], transport=transport) as pool:
            pool.start_load("m")
            await moment(pool, gate)  # type: ignore[misc]
            os.kill(pid_of(pool), signal.SIGKILL)
            await reach(pool, "m", State.UNLOADED)
            status = pool.status("m")
            assert (status.exit_code, status.failed, status.in_flight, status.queued) == (-signal.SIGKILL, True, 0, 0)
            assert status.error is not None
            assert "SIGKILL" in status.error
            gate.touch()
            assert (await pool.complete("m", "back again").collect()).text == "back again"
            assert not pool.status("m").failed

    run(scene())


def test_a_worker_killed_while_it_is_told_to_stop_counts_as_stopped() -> None:
    async def scene() -> None:
        async with Pool([fake("m", ignore_exit=True)], stop_timeout=3600) as pool:
            await pool.load("m")
            pid = pid_of(pool)
            pool.start_unload("m")
            os.kill(pid, signal.SIGKILL)
            status = await pool.unload("m")
            assert (status.state, status.exit_code, status.failed) == (State.UNLOADED, -signal.SIGKILL, False)

    run(scene())


@pytest.mark.parametrize("how", ["kill", "crash"])
def test_a_crash_fails_the_requests_that_the_worker_held_with_what_is_known(how: str) -> None:
    async def scene() -> None:
        async with Pool([fake("m", crash_at=2, crash=how)]) as pool:
            generation = pool.complete("m", "a b c")
            with pytest.raises(WorkerDied, match="killed by SIG") as caught:
                await generation.collect()
            assert caught.value.exit_code in (-signal.SIGKILL, -signal.SIGABRT)
            assert caught.value.retry
            assert (await pool.complete("m", "a b").collect()).text == "a b"

    run(scene())


def test_a_crash_while_loading_fails_everyone_who_waited_for_the_model() -> None:
    async def scene() -> None:
        async with Pool([fake("m", load="kill")]) as pool:
            waiting = [asyncio.ensure_future(pool.complete("m", "hello").collect()) for _ in range(3)]
            for task in waiting:
                with pytest.raises(LoadFailed, match="killed by SIGKILL"):
                    await task

    run(scene())


def test_a_load_that_fails_says_why_and_is_no_crash() -> None:
    async def scene() -> None:
        async with Pool([fake("m", load="fail"), fake("script", no_such_field=1)]) as pool:
            with pytest.raises(
                LoadFailed, match=r"script says that this model cannot be loaded \(exit code 3\)"
            ) as caught:
                await pool.load("m")
            assert caught.value.exit_code == 3
            with pytest.raises(LoadFailed, match="no_such_field"):
                await pool.load("script")
            assert pool.status("m").failed

    run(scene())


def test_the_last_log_lines_are_evidence() -> None:
    async def scene() -> None:
        async with Pool([fake("m", load="crash", flood_bytes=100)]) as pool:
            with pytest.raises(LoadFailed) as caught:
                await pool.load("m")
            assert "..." in "".join(caught.value.log)
            assert pool.logs("m") == caught.value.log

    run(scene())


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_worker_that_floods_its_output_loses_nothing_and_costs_bounded_memory(transport: str) -> None:
    async def scene() -> None:
        async with Pool([fake("m", flood_bytes=300_000)], transport=transport) as pool:
            words = " ".join(str(word) for word in range(50))
            assert (await pool.complete("m", words).collect()).text == words
            assert sum(len(line) for line in pool.logs("m")) <= 5_000_000

    run(scene())


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_grandchild_that_holds_every_descriptor_neither_delays_the_exit_nor_survives_it(transport: str) -> None:
    async def scene() -> None:
        async with Pool([fake("m", grandchild=True)], transport=transport) as pool:
            await pool.load("m")
            (grandchild,) = psutil.Process(pid_of(pool)).children()
            os.kill(pid_of(pool), signal.SIGKILL)
            await reach(pool, "m", State.UNLOADED)
            assert wait_gone([grandchild.pid]) == []

    run(scene())


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("moment", ["idle", "loading", "generating"])
def test_no_worker_outlives_a_manager_that_is_killed(transport: str, moment: str) -> None:
    spec = fake("m", load="stall") if moment == "loading" else fake("m", **ENDLESS)
    manager = subprocess.Popen(
        [sys.executable, str(MANAGER), transport, moment, msgspec.json.encode(spec).decode()], stdout=subprocess.PIPE
    )
    try:
        assert manager.stdout is not None
        worker = int(manager.stdout.readline())
        assert psutil.pid_exists(worker)
    finally:
        manager.kill()
        manager.communicate()
    assert wait_gone([worker]) == []


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_worker_without_the_parent_death_signal_still_leaves_at_end_of_file(transport: str) -> None:
    """The kernel's signal is one guard; here it is cleared, as a set-uid exec would, and the others must do."""
    spec = fake("m", forget_parent=True, **ENDLESS)
    manager = subprocess.Popen(
        [sys.executable, str(MANAGER), transport, "idle", msgspec.json.encode(spec).decode()], stdout=subprocess.PIPE
    )
    try:
        assert manager.stdout is not None
        worker = int(manager.stdout.readline())
    finally:
        manager.kill()
        manager.communicate()
    assert wait_gone([worker]) == []


def test_a_cancelled_close_kills_what_is_left() -> None:
    async def scene() -> None:
        pool = Pool([fake("m", ignore_exit=True)], stop_timeout=3600)
        await pool.__aenter__()
        pid = (await pool.load("m")).pid
        assert pid is not None
        closing = asyncio.ensure_future(pool.aclose())
        await reach(pool, "m", State.STOPPING)
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing
        assert not psutil.pid_exists(pid)

    run(scene())


def test_closing_while_a_model_loads_ends_at_once() -> None:
    async def scene() -> None:
        async with Pool([fake("m", load="stall"), fake("n")], models_max=1, stop_timeout=3600) as pool:
            one, other = pool.complete("m", "hello"), pool.complete("n", "hello")
            await reach(pool, "m", State.LOADING)
        for generation in (one, other):
            with pytest.raises(PoolClosed):
                await generation.collect()

    run(scene())


class LongEnd:
    """A process whose end takes its time after its channel has ended, as where a driver has much memory to free: the
    system says that it is over only when ``over`` does.
    """

    def __init__(self, process: Process) -> None:
        self._process = process
        self.over = asyncio.Event()
        self.killed = asyncio.Event()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def node(self) -> str:
        return self._process.node

    @property
    def args(self) -> Sequence[str]:
        return self._process.args

    async def wait(self) -> Exit:
        end = await self._process.wait()
        await self.over.wait()
        return end

    def read_log(self) -> None:
        self._process.read_log()

    def is_ending(self) -> bool:
        return self._process.is_ending()

    def terminate(self) -> None:
        self._process.terminate()

    def kill(self) -> None:
        self.killed.set()
        self._process.kill()


class Slow(LocalLauncher):
    """A launcher whose processes end slowly."""

    def __init__(self) -> None:
        self.started: list[LongEnd] = []

    async def launch(self, spec: LaunchSpec) -> Process:
        self.started.append(LongEnd(await super().launch(spec)))
        return self.started[-1]


def test_closing_stops_all_workers_at_the_same_time() -> None:
    async def scene() -> None:
        launcher, names = Slow(), [f"m{number}" for number in range(5)]
        models = [fake(name, ignore_exit=True) for name in names]
        pool = Pool(models, models_max=0, stop_timeout=0.1, launcher=launcher)
        await pool.__aenter__()
        await asyncio.gather(*(pool.load(name) for name in names))
        pids = [pid_of(pool, name) for name in names]
        closing = asyncio.ensure_future(pool.__aexit__(None, None, None))
        for process in launcher.started:
            await process.killed.wait()
        assert not closing.done()
        for process in launcher.started:
            process.over.set()
        await closing
        assert not any(psutil.pid_exists(pid) for pid in pids)

    run(scene())


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_worker_that_is_long_in_dying_is_said_to_have_died_of_what_it_died_of(
    transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "LAST_MESSAGES_SECONDS", 0.05)

    async def scene() -> None:
        launcher = Slow()
        async with Pool([fake("m", **ENDLESS)], transport=transport, launcher=launcher) as pool:
            generation = pool.complete("m", "go on")
            await anext(generation)
            os.kill(pid_of(pool), signal.SIGABRT)
            (process,) = launcher.started
            if transport != "zmq":  # which has no end of a connection but the process's
                await process.killed.wait()
            process.over.set()
            with pytest.raises(WorkerDied, match="SIGABRT"):
                await generation.collect()

    run(scene())


def test_a_process_is_ending_from_its_death_on_whether_it_is_reaped_or_not() -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert not is_exiting(process.pid)
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert is_exiting(process.pid)
    process.communicate()
    assert not is_exiting(process.pid)


class Unable(LocalLauncher):
    """A launcher on a machine that is out of processes, until it is told otherwise."""

    def __init__(self) -> None:
        self.able = False

    async def launch(self, spec: LaunchSpec) -> Process:
        if not self.able:
            raise BlockingIOError("Resource temporarily unavailable")
        return await super().launch(spec)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_worker_that_cannot_be_started_is_an_error_and_the_next_request_tries_again(transport: str) -> None:
    async def scene() -> None:
        launcher = Unable()
        before = descriptors()
        async with Pool([fake("m")], transport=transport, launcher=launcher) as pool:
            opened = descriptors()
            for _ in range(3):
                with pytest.raises(LoadFailed, match="could not be started: Resource temporarily unavailable"):
                    await pool.load("m")
            assert descriptors() <= opened
            launcher.able = True
            await pool.load("m")  # by command: requests are refused for a while after so many failures
            assert (await pool.complete("m", "hello").collect()).text == "hello"
        assert len(descriptors() - before) <= 1

    run(scene())


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_worker_leaves_no_descriptor_behind(transport: str) -> None:
    async def scene() -> None:
        async with Pool([fake("m")], transport=transport) as pool:
            opened = descriptors()
            for _ in range(3):
                await pool.complete("m", "hello").collect()
                await pool.unload("m")
            # ZeroMQ closes a connection in a thread of its own.
            await until(lambda: descriptors() <= opened)

    run(scene())


def test_random_loads_requests_and_kills_end_with_every_request_answered() -> None:
    """Many callers, two places, and someone who kills workers: each request ends in an answer or a typed error."""

    async def scene() -> None:
        names = ["a", "b", "c", "d"]
        outcomes: list[str] = []

        async def call(caller: int) -> None:
            for number in range(15):
                prompt = f"request {number} of {caller}"
                try:
                    answer = await pool.complete(names[(caller + number) % 4], prompt).collect()
                    outcomes.append("answered" if answer.text == prompt else "wrong")
                except PoolError as error:
                    outcomes.append(type(error).__name__)

        async def kill() -> None:
            for threshold in range(10, 110, 20):
                await until(lambda least=threshold: len(outcomes) >= least, seconds=40)  # type: ignore[misc]
                pids = [status.pid for status in pool.models() if status.pid is not None]
                if pids:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pids[0], signal.SIGKILL)

        async with Pool([fake(name, step_seconds=0.001) for name in names], models_max=2) as pool:
            async with asyncio.TaskGroup() as group:
                group.create_task(kill())
                for caller in range(8):
                    group.create_task(call(caller))
            assert len(outcomes) == 120
            assert set(outcomes) <= {"answered", "WorkerDied", "LoadFailed"}
            assert outcomes.count("answered") >= 60
            assert all(status.in_flight == status.queued == 0 for status in pool.models())

    run(scene(), 50)


def test_a_spec_travels_to_the_worker_as_it_was_given() -> None:
    spec = ModelSpec(name="owner/model:Q4_0", engine="fake", aliases=("x",), tags=("t",), script={"pieces": ["é😀"]})

    async def scene() -> None:
        async with Pool([spec]) as pool:
            assert (await pool.complete("x", "hello").collect()).text == "é😀"
            info = pool.status("x").info
            assert info is not None
            assert (info["id"], info["aliases"], info["tags"]) == ("owner/model:Q4_0", ["x"], ["t"])

    run(scene())


@pytest.mark.parametrize("calls", [("pidfd_open",), ("pidfd_open", "waitid")])
def test_where_the_system_has_no_pidfds_ends_are_noticed_and_no_others_wait_for_them(
    calls: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    for call in calls:
        monkeypatch.delattr(os, call)

    async def scene() -> None:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
        async with Pool([fake("a"), fake("b")]) as pool:
            for name in ("a", "b"):
                assert (await pool.complete(name, "hello").collect()).text == "hello"
            assert await asyncio.to_thread(lambda: "done") == "done"
            os.kill(pid_of(pool, "a"), signal.SIGKILL)
            await reach(pool, "a", State.UNLOADED)
            assert pool.status("a").exit_code == -signal.SIGKILL
            assert (await pool.unload("b")).exit_code == 0

    run(scene())
