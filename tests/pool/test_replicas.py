"""Several workers of one model: they start as they are needed, share the work, and go as they idle. Real processes."""

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from herding import TRANSPORTS, fake, freeze, reach, run, until
from llamaherd.pool import BadRequest, Generation, ModelSpec, Placement, Pool, State, WorkerDied
from llamaherd.pool.affinity import MOST_REMEMBERED, Prefixes, prefix_keys
from llamaherd.transport.messages import Generate, Tokenize

LONG = "word " * 100


def replicated(n: int, /, *, n_parallel: int = 1, script: dict[str, Any] | None = None, **fields: Any) -> ModelSpec:
    return msgspec.structs.replace(fake("m", n_parallel=n_parallel, **(script or {})), replicas=n, **fields)


def running(pool: Pool) -> list[int]:
    """Return the numbers of the replicas that have a process."""
    return [replica.index for replica in pool.status("m").replicas if replica.pid is not None]


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_replicas_start_as_requests_need_them_and_run_side_by_side(transport: str, tmp_path: Path) -> None:
    gate = tmp_path / "gate"

    async def scene() -> None:
        model = replicated(3, script={"step_gate": str(gate), "gate_at": 1})
        async with Pool([model], transport=transport) as pool:
            first = pool.complete("m", "one two")
            assert (await anext(first)).text == "one"
            assert running(pool) == [0]
            rest = [asyncio.ensure_future(pool.complete("m", f"{number} two").collect()) for number in range(2)]
            await until(lambda: [one.in_flight for one in pool.status("m").replicas] == [1, 1, 1], "all have work")
            status = pool.status("m")
            assert len({replica.pid for replica in status.replicas}) == 3
            assert (status.state, status.in_flight, status.pid) == (State.LOADED, 3, status.replicas[0].pid)
            gate.touch()
            assert [answer.text for answer in await asyncio.gather(*rest)] == ["0 two", "1 two"]

    run(scene())


def test_a_model_with_replicas_is_loaded_once_and_unloaded_whole() -> None:
    async def scene() -> None:
        async with Pool([replicated(2)]) as pool:
            await pool.load("m")
            assert running(pool) == [0]
            await asyncio.gather(*(pool.complete("m", "hello").collect() for _ in range(4)))
            status = await pool.unload("m")
            assert (status.state, running(pool)) == (State.UNLOADED, [])

    run(scene())


def test_an_unload_does_not_wait_for_a_replica_that_was_started_since() -> None:
    async def scene() -> None:
        async with Pool([replicated(2, stop_timeout=60.0)]) as pool:
            await asyncio.gather(*(pool.complete("m", "hello").collect() for _ in range(4)))
            await until(lambda: [one.state for one in pool.status("m").replicas] == [State.LOADED] * 2, "both run")
            first, second = [replica.pid for replica in pool.status("m").replicas]
            assert first is not None
            freeze(first)
            unloading = asyncio.create_task(pool.unload("m"))
            await until(lambda: running(pool) == [0], "one is gone")
            await pool.complete("m", "hello").collect()
            assert pool.status("m").replicas[1].pid not in (None, second)
            os.kill(first, signal.SIGCONT)
            await unloading
            assert running(pool) == [1]

    run(scene())


def test_a_replica_takes_a_place_and_stops_nobody_for_it(tmp_path: Path) -> None:
    gate = tmp_path / "gate"

    async def scene() -> None:
        model = replicated(2, script={"step_gate": str(gate)})
        async with Pool([model, fake("other")], models_max=2) as pool:
            await pool.load("other")
            answers = [asyncio.ensure_future(pool.complete("m", "hello").collect()) for _ in range(3)]
            await until(lambda: (pool.status("m").in_flight, pool.status("m").queued) == (1, 2))
            assert pool.status("other").state is State.LOADED
            await pool.unload("other")
            await until(lambda: running(pool) == [0, 1], "the free place is used")
            gate.touch()
            await asyncio.gather(*answers)

    run(scene())


def test_idle_replicas_go_one_by_one_and_each_by_its_own_clock(tmp_path: Path) -> None:
    gate = tmp_path / "gate"

    async def scene() -> None:
        async with Pool(
            [replicated(2, unload_idle_seconds=0.0, script={"step_gate": str(gate), "gate_at": 1})]
        ) as pool:
            first = pool.complete("m", "one two")
            assert (await anext(first)).text == "one"
            assert (await pool.complete("m", "one", max_tokens=1).collect()).text == "one"
            await until(lambda: running(pool) == [0], "the second replica ends, the first has work")
            gate.touch()
            assert (await first.collect()).text == " two"
            await reach(pool, "m", State.UNLOADED)

    run(scene())


def test_a_pinned_model_comes_back_whose_last_replica_dies_while_another_one_leaves(tmp_path: Path) -> None:
    gate = tmp_path / "gate"

    async def scene() -> None:
        model = replicated(2, pinned=True, script={"step_gate": str(gate), "ignore_exit": True}, stop_timeout=1.5)
        async with Pool([model]) as pool:
            answers = [asyncio.ensure_future(pool.complete("m", "one", keep_alive=0.0).collect()) for _ in range(2)]
            await until(lambda: pool.status("m").in_flight == 2)
            gate.touch()
            await asyncio.gather(*answers)
            await until(lambda: any(one.state is State.STOPPING for one in pool.status("m").replicas))
            left = next(one for one in pool.status("m").replicas if one.state is not State.STOPPING)
            assert left.pid is not None
            os.kill(left.pid, signal.SIGKILL)
            await until(lambda: left.pid not in {one.pid for one in pool.status("m").replicas})
            await reach(pool, "m", State.LOADED)

    run(scene())


def test_a_pinned_model_keeps_one_replica() -> None:
    async def scene() -> None:
        model = replicated(2, pinned=True, unload_idle_seconds=0.0, script={"step_seconds": 0.01})
        async with Pool([model]) as pool:
            await asyncio.gather(*(pool.complete("m", "a b c").collect() for _ in range(4)))
            await until(lambda: len(running(pool)) == 1)
            assert pool.status("m").state is State.LOADED

    run(scene())


def test_a_replica_that_dies_takes_only_its_own_requests_with_it(tmp_path: Path) -> None:
    gate = tmp_path / "gate"

    async def scene() -> None:
        async with Pool([replicated(2, script={"step_gate": str(gate), "gate_at": 1})]) as pool:
            generations: list[Generation] = []
            for _ in range(2):
                generations.append(pool.complete("m", "one two"))
                assert (await anext(generations[-1])).text == "one"
            pid = pool.status("m").replicas[1].pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            with pytest.raises(WorkerDied, match="SIGKILL"):
                await generations[1].collect()
            await until(lambda: running(pool) == [0])
            status = pool.status("m")
            assert (status.state, status.failed, status.replicas[1].exit_code) == (State.LOADED, False, -signal.SIGKILL)
            gate.touch()
            assert (await generations[0].collect()).text == " two"

    run(scene())


def test_a_further_replica_that_cannot_be_loaded_costs_nobody_anything(tmp_path: Path) -> None:
    async def scene() -> None:
        model = replicated(2, script={"memory": (str(tmp_path / "the only piece"),), "step_seconds": 0.002})
        async with Pool([model]) as pool:
            answers = await asyncio.gather(*(pool.complete("m", f"{number} b c").collect() for number in range(6)))
            assert [answer.text for answer in answers] == [f"{number} b c" for number in range(6)]
            assert pool.status("m").state is State.LOADED

    run(scene())


def test_the_replica_that_knows_the_beginning_is_preferred(tmp_path: Path) -> None:
    async def scene() -> None:
        gate = tmp_path / "gate"
        async with Pool([replicated(2, n_parallel=4, script={"step_gate": str(gate)})]) as pool:
            both = [pool.complete("m", f"{name} {LONG}") for name in "abcdefgh"]
            await until(lambda: [one.in_flight for one in pool.status("m").replicas] == [4, 4])
            gate.touch()
            await asyncio.gather(*(generation.collect() for generation in both))
            holders: dict[str, set[int]] = {}
            for name in "hgfedcbahgfedcba":
                generation = pool.complete("m", f"{name} {LONG} and more", max_tokens=1)
                (holder,) = [replica.index for replica in pool.status("m").replicas if replica.in_flight]
                holders.setdefault(name, set()).add(holder)
                await generation.collect()
            assert all(len(replicas) == 1 for replicas in holders.values())
            assert {index for replicas in holders.values() for index in replicas} == {0, 1}

    run(scene())


def test_fewer_replicas_after_a_reload_finish_what_they_have(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    script = {"step_gate": str(gate), "gate_at": 1}

    async def scene() -> None:
        async with Pool([replicated(2, script=script)]) as pool:
            generations = [pool.complete("m", "one two") for _ in range(2)]
            for generation in generations:
                assert (await anext(generation)).text == "one"
            pool.reload([replicated(1, script=script)])
            assert running(pool) == [0, 1]
            gate.touch()
            for generation in generations:
                assert (await generation.collect()).text == " two"
            await until(lambda: running(pool) == [0])
            assert len(pool.status("m").replicas) == 1

    run(scene())


def test_each_replica_runs_where_it_is_placed(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    cores = sorted(os.sched_getaffinity(0))
    places = (
        Placement(cores=(cores[0],), gpus=("0",)),
        Placement(cores=(cores[-1],), gpus=("1", "2"), env={"HSA_VISIBLE": "1"}),
    )

    async def scene() -> None:
        async with Pool([replicated(2, placements=places, script={"step_gate": str(gate)})], spare=True) as pool:
            answers = [asyncio.ensure_future(pool.complete("m", "a b c").collect()) for _ in range(4)]
            await until(lambda: [one.in_flight for one in pool.status("m").replicas] == [1, 1], "both have work")
            workers = [psutil.Process(replica.pid) for replica in pool.status("m").replicas]
            assert [worker.cpu_affinity() for worker in workers] == [[cores[0]], [cores[-1]]]
            assert [worker.environ()["CUDA_VISIBLE_DEVICES"] for worker in workers] == ["0", "1,2"]
            assert workers[1].environ()["HSA_VISIBLE"] == "1"
            assert all(
                os.sched_getaffinity(thread.id) == set(worker.cpu_affinity() or ())
                for worker in workers
                for thread in worker.threads()
            )
            gate.touch()
            await asyncio.gather(*answers)

    run(scene())


def test_a_core_that_is_not_there_is_told_in_the_log() -> None:
    async def scene() -> None:
        async with Pool([replicated(1, placements=(Placement(cores=(100_000,)),))]) as pool:
            assert (await pool.complete("m", "hello").collect()).text == "hello"
            assert any("cannot stay on cores 100000" in line for line in pool.logs("m"))

    run(scene())


@pytest.mark.parametrize(
    "wrong",
    [
        {"replicas": 0},
        {"replicas": 65},
        {"placements": (Placement(cores=(-1,)),)},
        {"placements": (Placement(env={"A=B": "c"}),)},
        {"placements": (Placement(env={"A": "\0"}),)},
    ],
)
def test_impossible_replicas_and_places_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(BadRequest):
        Pool([msgspec.structs.replace(fake("m"), **wrong)])


# --- the keys of prompts ---


def test_a_conversation_that_goes_on_shares_the_keys_of_its_past() -> None:
    past = ({"role": "user", "content": "tell me " * 100}, {"role": "assistant", "content": "well " * 100})
    before = prefix_keys(Generate(request=1, messages=past))
    after = prefix_keys(Generate(request=2, messages=(*past, {"role": "user", "content": "and then?"})))
    assert len(before) > 2
    assert after[: len(before)] == before
    assert prefix_keys(Generate(request=3, messages=({"role": "user", "content": "other " * 300},)))[0] != before[0]


def test_short_prompts_and_other_commands_have_no_keys() -> None:
    assert prefix_keys(Generate(request=1, prompt="short")) == ()
    assert prefix_keys(Tokenize(request=1, text=LONG)) == ()
    assert prefix_keys(None) == ()
    assert len(prefix_keys(Generate(request=1, prompt=tuple(range(64))))) == 2
    assert len(prefix_keys(Generate(request=1, prompt="x" * 10_000_000))) == 16


def test_the_longest_known_beginning_counts_and_what_is_remembered_is_bounded() -> None:
    known = Prefixes()
    known.note((1, 2, 3))
    assert [known.match(keys) for keys in ((1, 2, 3, 4), (1, 2, 9), (9, 2), (9,), ())] == [3, 2, 2, 0, 0]
    for key in range(10, 10 + MOST_REMEMBERED):
        known.note((key,))
    assert (len(known), known.match((1, 2, 3))) == (MOST_REMEMBERED, 0)
    known.clear()
    assert len(known) == 0
