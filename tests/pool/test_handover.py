"""A worker that has to make room for another model becomes that model's worker: no process starts for a swap, none is
left behind, and where that cannot be the old one ends as ever. Real processes.
"""

import asyncio
import contextlib
import os
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest

from herding import TRANSPORTS, fake, freeze, reach, run, until, wait_gone
from llamaherd.pool import (
    Adapter,
    EngineOptions,
    LoadFailed,
    ModelSpec,
    Placement,
    Pool,
    State,
    clocks,
    handover,
    spares,
)
from llamaherd.pool.gpus import FixedGpus, Gpu
from llamaherd.pool.launch import LocalProcess
from llamaherd.pool.worker import Worker
from patience import holds_within
from tiny_gguf import tiny_model

MIB = 1024 * 1024
#: What each model takes here; room for one of them, and for two.
SIZE = 100 * MIB
BUDGETS = (0, SIZE, 2 * SIZE)
budgets = pytest.mark.parametrize("budget", BUDGETS, ids=["nothing counted", "room for one", "room for both"])


def model(name: str, **fields: Any) -> ModelSpec:
    return ModelSpec(name=name, engine="fake", memory=SIZE, **fields)


def pool_of(*models: ModelSpec, transport: str = "pipe", budget: int = 0, **settings: Any) -> Pool:
    """Return a pool with one place."""
    return Pool(models, transport=transport, models_max=1, memory_budget=budget, **settings)


async def answer(pool: Pool, name: str) -> str:
    return (await pool.complete(name, "hello").collect()).text


async def pid_of(pool: Pool, name: str) -> int:
    """Have a model answer, and return its process."""
    assert await answer(pool, name) == "hello"
    pid = pool.status(name).pid
    assert pid is not None
    return pid


async def half_way(pool: Pool) -> tuple[int, asyncio.Task[int]]:
    """Have ``b`` wait for the process of ``a``, which was told to free its model and stands still. Return its number,
    and that of ``b``'s process to come.
    """
    first = await pid_of(pool, "a")
    freeze(first)
    waiting = asyncio.create_task(pid_of(pool, "b"))
    await reach(pool, "a", State.STOPPING)
    return first, waiting


def children() -> list[int]:
    return [child.pid for child in psutil.Process().children()]


@pytest.mark.parametrize("transport", TRANSPORTS)
@budgets
def test_the_process_that_made_room_serves_the_next_model(transport: str, budget: int) -> None:
    async def scene() -> None:
        async with pool_of(model("a"), model("b"), transport=transport, budget=budget) as pool:
            first = await pid_of(pool, "a")
            assert await pid_of(pool, "b") == first
            assert pool.status("a").state is State.UNLOADED
            assert pool.status("a").pid is None
            assert await pid_of(pool, "a") == first
            assert children() == [first]
            assert pool.counts().evictions == {"a": 1, "b": 1}
        assert wait_gone([first]) == []

    run(scene())


@budgets
def test_a_sleeping_worker_gives_its_process_too(budget: int) -> None:
    async def scene() -> None:
        async with pool_of(model("a"), model("b"), budget=budget) as pool:
            first = await pid_of(pool, "a")
            pool.start_sleep("a")
            await reach(pool, "a", State.SLEEPING)
            assert await pid_of(pool, "b") == first
            pool.start_sleep("b")  # and one that is only told to sleep
            assert await pid_of(pool, "a") == first

    run(scene())


def test_listeners_hear_of_an_end_and_a_start_as_ever() -> None:
    async def scene() -> None:
        async with pool_of(model("a"), model("b")) as pool, pool.events() as events:
            assert (await anext(events)).event == "snapshot"
            for name in "ab":
                await answer(pool, name)
            heard: list[tuple[str, Any, Any]] = []
            async for event in events:
                heard.append((event.model, event.data.get("status"), event.data.get("exit_code")))
                if heard[-1][:2] == ("b", "loaded"):
                    break
            assert ("a", "unloaded", 0) in heard
            assert heard.index(("a", "unloaded", 0)) < heard.index(("b", "loading", None))

    run(scene())


def shown(pid: int | None) -> str:
    """Return the model of which the system's list of processes speaks."""
    return psutil.Process(pid).cmdline()[-1].strip()


def test_the_list_of_processes_shows_the_model_that_a_worker_has_now() -> None:
    long = "m" * 100

    async def scene() -> None:
        async with pool_of(model("first"), model("b"), model("größer"), model(long)) as pool:
            for name, label in (("first", "first"), ("b", "b"), ("größer", r"gr\xf6\xdfer"), (long, long[:64])):
                assert shown(await pid_of(pool, name)) == label
                assert pool.status(name).args[-1] in (name, ascii(name))

    run(scene())


def test_the_list_of_processes_shows_what_became_of_a_spare() -> None:
    async def scene() -> None:
        async with pool_of(model("a"), spare=True) as pool:
            await until(lambda: bool(children()), "there is a spare")
            (spare,) = children()
            assert shown(spare) == "spare"
            assert await pid_of(pool, "a") == spare
            assert shown(spare) == "a"

    run(scene())


def test_what_was_printed_for_one_model_is_not_in_the_others_log() -> None:
    async def scene() -> None:
        async with pool_of(model("a", script={"flood_bytes": 200}), model("b")) as pool:
            await answer(pool, "a")
            await answer(pool, "b")
            assert any(pool.logs("a"))
            assert not any(pool.logs("b"))

    run(scene())


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_what_a_load_prints_is_in_the_log_of_its_model_also_where_it_follows_at_once(transport: str) -> None:
    several = [f"b{number}" for number in range(12)]

    async def scene() -> None:
        models = [model("a"), *(model(name, script={"flood_bytes": 50}) for name in several)]
        async with pool_of(*models, transport=transport, budget=2 * SIZE) as pool:
            for name in several:
                await answer(pool, "a")
                await pool.load(name)
            assert pool.logs("a") == ()
            # The last one's lines may come behind the news that it is loaded.
            await until(lambda: [sum(map(len, pool.logs(name))) for name in several] == [100] * len(several))

    run(scene(), 60.0)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ({"placements": (Placement(cores=(0,)),)}, {}),
        ({}, {"placements": (Placement(cores=(0,)),)}),
        ({"stop_timeout": 0.0}, {}),
    ],
    ids=["the old one runs on cores of its own", "the new one will", "there is no time to ask"],
)
@budgets
def test_a_process_ends_as_ever_where(a: dict[str, Any], b: dict[str, Any], budget: int) -> None:
    async def scene() -> None:
        async with pool_of(model("a", **a), model("b", **b), budget=budget) as pool:
            first = await pid_of(pool, "a")
            assert await pid_of(pool, "b") != first
            assert wait_gone([first]) == []

    run(scene())


@budgets
def test_no_process_serves_two_models_where_that_is_not_wanted(budget: int) -> None:
    async def scene() -> None:
        async with pool_of(model("a"), model("b"), budget=budget, reuse_workers=False) as pool:
            pids = [await pid_of(pool, name) for name in "aba"]
            assert len(set(pids)) == 3
            assert wait_gone(pids[:2]) == []

    run(scene())


def test_a_model_of_another_engine_has_a_process_of_its_own() -> None:
    path = tiny_model("random")
    options = EngineOptions(n_ctx=128, n_parallel=1, n_threads=1)

    async def scene() -> None:
        async with pool_of(model("a"), ModelSpec(name="b", path=path, options=options)) as pool:
            first = await pid_of(pool, "a")
            await pool.complete("b", "hello", max_tokens=1).collect()
            assert pool.status("b").pid != first

    run(scene())


def test_a_process_that_has_served_many_models_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handover, "MOST_HANDOVERS", 2)

    async def scene() -> None:
        async with pool_of(model("a"), model("b")) as pool:
            first = [await pid_of(pool, name) for name in "aba"]
            assert len(set(first)) == 1
            assert await pid_of(pool, "b") not in first

    run(scene())


@budgets
def test_a_worker_that_does_not_free_its_model_in_time_is_killed_and_nobody_else_pays(budget: int) -> None:
    async def scene() -> None:
        async with pool_of(model("a", stop_timeout=0.2), model("b"), budget=budget) as pool:
            first = await pid_of(pool, "a")
            freeze(first)
            assert await pid_of(pool, "b") != first
            assert pool.status("a").error is None, "it was told to go"
            assert pool.status("b").error is None
            assert wait_gone([first]) == []

    run(scene())


def test_a_worker_that_was_free_just_before_it_was_killed_is_not_the_new_models_failure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    kill = LocalProcess.kill

    def kill_late(process: LocalProcess) -> None:
        """Be slower than what the worker has still to say: it begins the new model's load before it ends."""
        gone_on = psutil.Process(process.pid)
        gone_on.resume()
        holds_within(0.3, lambda: bool(gone_on.children()))
        kill(process)
        monkeypatch.undo()
        gate.touch()

    async def scene() -> None:
        loading = model("b", script={"load_gate": str(gate), "grandchild": True})
        async with pool_of(model("a", stop_timeout=0.1), loading, budget=2 * SIZE) as pool:
            first = await pid_of(pool, "a")
            freeze(first)
            monkeypatch.setattr(LocalProcess, "kill", kill_late)
            assert await pid_of(pool, "b") != first

    run(scene())


def test_the_time_in_which_a_load_has_to_begin_is_not_spent_while_the_old_model_is_freed() -> None:
    async def scene() -> None:
        clock = Pool([fake("slow", load_seconds=0.2)])
        async with pool_of(model("a"), model("b"), budget=2 * SIZE) as pool, clock:
            first = await pid_of(pool, "a")
            freeze(first)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(clocks, "SPARE_SILENCE_SECONDS", 0.01)
                waiting = asyncio.create_task(pid_of(pool, "b"))
                await reach(pool, "b", State.LOADING)
                await clock.load("slow")
            os.kill(first, signal.SIGCONT)
            assert await waiting == first

    run(scene())


@budgets
def test_a_worker_that_dies_while_it_frees_its_model_costs_nobody_anything(budget: int) -> None:
    async def scene() -> None:
        async with pool_of(model("a"), model("b"), budget=budget) as pool:
            first, waiting = await half_way(pool)
            os.kill(first, signal.SIGKILL)
            assert await waiting != first
            assert pool.status("a").state is State.UNLOADED
            assert pool.status("a").error is None

    run(scene())


@budgets
def test_a_load_that_fails_in_a_process_that_was_given_fails_alone(budget: int) -> None:
    async def scene() -> None:
        async with pool_of(model("a"), model("b", script={"load": "fail"}), budget=budget) as pool:
            first = await pid_of(pool, "a")
            with pytest.raises(LoadFailed, match="the script says"):
                await answer(pool, "b")
            assert wait_gone([first]) == []
            assert await pid_of(pool, "a") != first

    run(scene())


@budgets
def test_a_model_that_is_unloaded_while_its_process_is_being_freed_leaves_none(budget: int) -> None:
    async def scene() -> None:
        async with pool_of(model("a"), model("b"), budget=budget) as pool:
            first, waiting = await half_way(pool)
            pool.start_unload("b")
            with pytest.raises(Exception, match="unloaded"):
                await waiting
            with contextlib.suppress(ProcessLookupError):  # a load is not waited for
                os.kill(first, signal.SIGCONT)
            await until(lambda: not {pool.status(name).state for name in "ab"} - {State.UNLOADED}, "both are gone")
            assert await pid_of(pool, "a")

    run(scene())


def test_a_process_that_nobody_takes_after_all_does_not_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spares, "EXPECTED_SECONDS", 0.1)

    async def scene() -> None:
        async with pool_of(model("a"), model("b")) as pool:
            first, waiting = await half_way(pool)
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
            os.kill(first, signal.SIGCONT)
            await until(lambda: not children(), "the process is gone")
            assert pool.status("a").state is State.UNLOADED

    run(scene())


def test_a_process_that_nobody_takes_and_that_may_hold_a_part_of_a_counted_gpu_ends_at_once() -> None:
    gpu = Gpu(index=0, uuid="GPU-0", name="a GPU", total=4 * SIZE, free=4 * SIZE)

    async def scene() -> None:
        models = [ModelSpec(name=name, engine="fake", memory=1 << 50) for name in "ab"]  # each takes all there is
        async with Pool(models, models_max=1, memory_budget="auto", gpus=FixedGpus([gpu])) as pool:
            first, waiting = await half_way(pool)
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
            os.kill(first, signal.SIGCONT)
            await until(lambda: not children(), "the process is gone")

    run(scene())


def test_a_process_that_was_called_off_serves_whoever_comes_next() -> None:
    async def scene() -> None:
        async with pool_of(model("a"), model("b"), model("c")) as pool:
            first, waiting = await half_way(pool)
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
            os.kill(first, signal.SIGCONT)
            assert await pid_of(pool, "c") == first

    run(scene())


@budgets
def test_a_pool_that_closes_in_the_middle_leaves_nothing_behind(budget: int) -> None:
    async def scene() -> None:
        async with pool_of(model("a"), model("b"), budget=budget, stop_timeout=0.3) as pool:
            first, waiting = await half_way(pool)
        await asyncio.gather(waiting, return_exceptions=True)
        assert wait_gone([first]) == []
        assert not children()

    run(scene())


def test_each_of_two_models_that_want_room_has_one_process() -> None:
    async def scene() -> None:
        models = [model(name) for name in "abcd"]
        async with Pool(models, models_max=2, memory_budget=2 * SIZE) as pool:
            first = {await pid_of(pool, name) for name in "ab"}
            second = set(await asyncio.gather(*(pid_of(pool, name) for name in "cd")))
            assert second == first

    run(scene())


def test_a_process_that_is_free_goes_to_whoever_starts_and_not_one_that_is_still_to_be_freed() -> None:
    async def scene() -> None:
        models = [model("a", stop_timeout=60.0), *(model(name) for name in "bcd")]
        async with Pool(models, models_max=2, memory_budget=2 * SIZE) as pool:
            first, second = [await pid_of(pool, name) for name in "ab"]
            freeze(first)
            waiting = [asyncio.create_task(pid_of(pool, name)) for name in "cd"]
            assert await waiting[0] == second, "which was freed for d"
            os.kill(first, signal.SIGCONT)
            assert await waiting[1] == first

    run(scene())


def test_a_large_model_takes_one_process_of_those_that_make_room() -> None:
    async def scene() -> None:
        models = [model("a"), model("b"), ModelSpec(name="large", engine="fake", memory=2 * SIZE)]
        async with Pool(models, models_max=2, memory_budget=2 * SIZE) as pool:
            first, second = [await pid_of(pool, name) for name in "ab"]
            assert await pid_of(pool, "large") == first
            assert wait_gone([second]) == []

    run(scene())


def test_a_spare_is_kept_for_what_no_process_is_given_to() -> None:
    async def scene() -> None:
        async with Pool([model(name) for name in "abc"], models_max=2, spare=True) as pool:
            first = await pid_of(pool, "a")
            await until(lambda: len(children()) == 2, "there is a spare")
            (spare,) = set(children()) - {first}
            assert await pid_of(pool, "b") == spare
            await until(lambda: len(children()) == 3, "there is another one")
            assert await pid_of(pool, "c") == first
            assert len(children()) == 3

    run(scene())


def test_what_is_loaded_ahead_goes_before_a_process_that_has_to_be_freed() -> None:
    async def scene() -> None:
        async with pool_of(model("a"), model("b"), budget=2 * SIZE, spare=True) as pool:
            await pid_of(pool, "a")
            second = await pid_of(pool, "b")
            await until(lambda: pool.counts().ahead == "a", "a is loaded ahead")
            assert await pid_of(pool, "a") != second
            assert wait_gone([second]) == []

    run(scene())


def test_a_model_that_was_given_a_process_is_told_its_threads() -> None:
    """The old model may have been told to use fewer."""
    options = EngineOptions(n_ctx=128, n_parallel=1)
    path = tiny_model("random")
    posted: list[tuple[str, str]] = []
    post = Worker.post

    def listen(worker: Worker, message: Any) -> None:
        posted.append((worker.model, type(message).__name__))
        post(worker, message)

    async def scene() -> None:
        models = [ModelSpec(name=name, path=path, options=options) for name in "ab"]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Worker, "post", listen)
            async with pool_of(*models) as pool:
                for name in "ab":
                    await pool.complete(name, "hello", max_tokens=1).collect()
        of_b = [kind for name, kind in posted if name == "b"]
        assert of_b.index("Load") < of_b.index("Threads") < of_b.index("Generate")

    run(scene())


#: Models of different kinds, each twice, so that each follows the others.
KINDS = ("random", "mamba", "scripted", "gemma2", "random", "scripted", "mamba", "gemma2", "random")


@budgets
def test_real_models_answer_as_in_a_process_of_their_own(budget: int) -> None:
    options = EngineOptions(n_ctx=256, n_parallel=2, n_threads=1)
    models = [
        ModelSpec(name=kind, path=tiny_model(kind), options=options, memory=SIZE) for kind in dict.fromkeys(KINDS)
    ]

    async def tokens(pool: Pool, kind: str) -> tuple[int, ...]:
        done = await pool.complete(kind, (1, 2, 3), temperature=0, max_tokens=12, ignore_eos=True).collect()
        return done.tokens

    async def scene() -> None:
        async with Pool(models, models_max=0) as pool:
            apart = {spec.name: await tokens(pool, spec.name) for spec in models}
            assert len({pool.status(spec.name).pid for spec in models}) == len(models)
        async with pool_of(*models, budget=budget) as pool:
            pids: set[int | None] = set()
            for kind in KINDS:
                assert await tokens(pool, kind) == apart[kind], kind
                pids.add(pool.status(kind).pid)
            assert len(pids) == 1

    run(scene(), 60.0)


def test_scales_that_are_set_for_the_old_model_do_not_reach_the_new_one() -> None:
    lora = str(tiny_model("lora"))
    options = EngineOptions(
        n_ctx=128, n_parallel=1, n_threads=1, flash_attn="off", adapters=(Adapter(path=lora, scale=1.0),)
    )
    models = [ModelSpec(name=name, path=tiny_model("random"), options=options, memory=SIZE) for name in "ab"]

    async def tokens(pool: Pool, name: str) -> tuple[int, ...]:
        done = await pool.complete(name, "hello there", temperature=0, max_tokens=8, ignore_eos=True).collect()
        return done.tokens

    async def scene() -> None:
        async with pool_of(*models, budget=2 * SIZE) as pool:
            on = await tokens(pool, "a")
            pid = pool.status("a").pid
            assert pid is not None
            freeze(pid)
            waiting = asyncio.create_task(tokens(pool, "b"))
            await reach(pool, "a", State.STOPPING)
            pool.set_adapters("a", [{"id": 0, "scale": 0.0}])
            os.kill(pid, signal.SIGCONT)
            assert await waiting == on
            assert pool.status("b").pid == pid
            assert await tokens(pool, "a") != on

    run(scene())


def test_a_process_with_a_model_file_that_is_gone_is_given_all_the_same(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(Path(tiny_model("random")).read_bytes())
    options = EngineOptions(n_ctx=128, n_parallel=1, n_threads=1)
    models = [ModelSpec(name="a", path=path, options=options), ModelSpec(name="b", path=tiny_model("scripted"))]

    async def scene() -> None:
        async with pool_of(*models) as pool:
            await pool.complete("a", (1, 2), max_tokens=1).collect()
            first = pool.status("a").pid
            path.unlink()
            await pool.complete("b", (1, 2), max_tokens=1).collect()
            assert pool.status("b").pid == first

    run(scene())


def test_a_request_for_the_old_model_waits_for_its_turn_again() -> None:
    async def scene() -> None:
        async with pool_of(model("a"), model("b"), budget=2 * SIZE) as pool:
            first, *waiting = await half_way(pool)
            waiting.append(asyncio.create_task(pid_of(pool, "a")))
            await asyncio.sleep(0)
            os.kill(first, signal.SIGCONT)
            assert await asyncio.gather(*waiting) == [first, first]

    run(scene())


def test_a_stop_for_good_gives_no_process() -> None:
    async def scene() -> None:
        async with pool_of(fake("a"), fake("b")) as pool:
            first = await pid_of(pool, "a")
            await pool.unload("a")
            assert await pid_of(pool, "b") != first
            assert wait_gone([first]) == []

    run(scene())


def test_unloading_a_model_that_gives_its_process_returns_when_it_has() -> None:
    async def scene() -> None:
        async with pool_of(model("a"), model("b")) as pool:
            first, waiting = await half_way(pool)
            unloading = asyncio.create_task(pool.unload("a"))
            await asyncio.sleep(0)
            os.kill(first, signal.SIGCONT)
            assert (await unloading).state is State.UNLOADED
            assert await waiting == first

    run(scene())
