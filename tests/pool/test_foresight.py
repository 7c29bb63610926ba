"""A spare worker loads ahead what is likely wanted next: where there is room, when nobody has anything else to do, and
never in anybody's way. Real processes.
"""

import asyncio
import logging
import os
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from herding import TRANSPORTS, freeze, run, until
from llamaherd.pool import EngineOptions, ModelBusy, ModelSpec, Placement, Pool, PoolError, State, WorkerFailed, clocks
from llamaherd.pool.foresight import Foresight
from llamaherd.pool.schedule import Limits, Phase, Scheduler
from tiny_gguf import tiny_model

MIB = 1024 * 1024
#: What each model takes here, and room for two of them.
SIZE = 100 * MIB
BUDGET = 2 * SIZE


def model(name: str, **fields: Any) -> ModelSpec:
    return ModelSpec(name=name, engine="fake", memory=SIZE, **fields)


def pool_of(*models: ModelSpec, transport: str = "pipe", models_max: int = 1, memory_budget: int = BUDGET) -> Pool:
    """Return a pool with room for one model, a spare, and bytes for what that loads ahead."""
    return Pool(models, transport=transport, models_max=models_max, memory_budget=memory_budget, spare=True)


async def swap(pool: Pool, *names: str) -> None:
    for name in names:
        assert (await pool.complete(name, "hello").collect()).text == "hello"


async def loaded_ahead(pool: Pool, name: str) -> int:
    """Wait until the spare has loaded a model ahead, and return its process."""
    await until(lambda: pool.counts().ahead == name, f"{name} is loaded ahead")
    (spare,) = spares(pool)
    return spare


def gated(name: str, gate: Path) -> ModelSpec:
    """Return a model whose load starts a process, by which it can be seen, and then waits for the gate."""
    return model(name, script={"load_gate": str(gate), "grandchild": True})


def large(name: str, **fields: Any) -> ModelSpec:
    """Return a model that leaves no room for anything else."""
    return ModelSpec(name=name, engine="fake", memory=BUDGET, **fields)


async def under_way(pool: Pool, gate: Path) -> int:
    """Have the spare load ``a`` ahead, as far as its gate, and return its process."""
    gate.touch()
    await swap(pool, "a")
    gate.unlink()
    await swap(pool, "b")
    await until(lambda: any(psutil.Process(pid).children() for pid in spares(pool)), "a is being loaded ahead")
    (spare,) = spares(pool)
    return spare


def spares(pool: Pool) -> list[int]:
    known = {status.pid for status in pool.models()}
    return [child.pid for child in psutil.Process().children() if child.pid not in known]


# --- which ---


def likely(started: Sequence[str], displaced: Sequence[str] = ()) -> list[str]:
    foresight = Foresight()
    for name in started:
        foresight.started(name)
    for name in displaced:
        foresight.displaced(name)
    return list(foresight.likely())


def test_what_had_to_go_last_is_the_likeliest() -> None:
    assert likely(["a", "b", "c"], ["a", "b"]) == ["b", "a"]


def test_what_followed_the_newest_the_last_time_is_likelier() -> None:
    assert likely(["a", "b", "c", "a"], ["b", "c"]) == ["b", "c"]


def test_what_nobody_put_out_is_not_expected_back() -> None:
    assert likely(["a", "b", "a"]) == []
    foresight = Foresight()
    foresight.displaced("a")
    foresight.forget("a")
    assert list(foresight.likely()) == []


def test_what_is_started_is_not_expected_any_more() -> None:
    foresight = Foresight()
    foresight.displaced("a")
    foresight.started("a")
    assert list(foresight.likely()) == []


# --- the decision ---


class Quiet:
    """Has nothing done. Implements ``Effects``."""

    def __init__(self) -> None:
        self.starts: list[tuple[str, int]] = []
        self.drops = 0

    def start(self, model: str, replica: int) -> None:
        self.starts.append((model, replica))

    def drop_ahead(self) -> None:
        self.drops += 1

    def wake(self, model: str, replica: int) -> None: ...

    def stop(self, model: str, replica: int, heir: str | None = None) -> None: ...

    def grant(self, ticket: int, replica: int) -> None: ...

    def reject(self, ticket: int, error: PoolError) -> None: ...

    def threads(self, model: str, replica: int, n: int) -> None: ...


def swapped(size: int = SIZE, budget: int = BUDGET) -> Scheduler:
    """Return a scheduler with room for one model in which ``a`` has just made room for ``b``."""
    scheduler = Scheduler(Quiet(), Limits(models_max=1, memory_budget=budget))
    for ticket, name in enumerate("ab"):
        scheduler.add(name)
        scheduler.resize(name, size)
        scheduler.request(ticket, name)
        if name == "b":
            scheduler.exited("a")
        scheduler.ready(name)
        scheduler.finish(ticket)
    return scheduler


def crowded(effects: Quiet) -> Scheduler:
    """Return a scheduler with two places and room for three models in which ``b`` runs and ``a``, which had to go, is
    loaded ahead.
    """
    scheduler = Scheduler(effects, Limits(models_max=2, memory_budget=3 * SIZE))
    for name, size in (("a", SIZE), ("big", 3 * SIZE), ("b", SIZE)):
        scheduler.add(name)
        scheduler.resize(name, size)
    for ticket, (name, before) in enumerate((("a", ""), ("big", "a"), ("b", "big"))):
        scheduler.request(ticket, name)
        if before:
            scheduler.exited(before)
        scheduler.ready(name)
        scheduler.finish(ticket)
    assert scheduler.load_ahead("a".__eq__) == "a"
    return scheduler


def anything(model: str) -> bool:
    return True


def test_what_made_room_is_loaded_ahead_and_its_bytes_count() -> None:
    scheduler = swapped()
    assert scheduler.load_ahead(anything) == "a"
    assert scheduler.load_ahead(anything) is None, "there is one spare"


@pytest.mark.parametrize(
    ("size", "budget"),
    [(SIZE, 0), (0, BUDGET), (SIZE, BUDGET - 1)],
    ids=["no memory is counted", "nobody knows what it takes", "there is no room"],
)
def test_nothing_is_loaded_ahead_where(size: int, budget: int) -> None:
    assert swapped(size, budget).load_ahead(anything) is None


def test_nothing_is_loaded_ahead_while_a_model_waits_for_room() -> None:
    scheduler = swapped()
    scheduler.request(10, "b")
    scheduler.request(11, "a")
    assert scheduler.load_ahead(anything) is None


def test_nothing_is_loaded_ahead_that_somebody_unloaded() -> None:
    scheduler = swapped()
    scheduler.unload("a", WorkerFailed("unloaded"))
    assert scheduler.load_ahead(anything) is None


def test_nothing_is_loaded_ahead_that_may_not_be() -> None:
    assert swapped().load_ahead(lambda model: False) is None


def test_bytes_that_are_being_given_up_are_lent_to_nobody() -> None:
    effects = Quiet()
    scheduler = crowded(effects)
    scheduler.add("placed", slots=1, replicas=2, placed=True)
    scheduler.resize("placed", SIZE)
    scheduler.add("next")
    scheduler.resize("next", SIZE)
    scheduler.request(9, "b")
    scheduler.request(10, "placed")
    scheduler.request(11, "next")  # there is no place for it, though what is loaded ahead would leave the bytes
    scheduler.resize("placed", 2 * SIZE + 1)
    scheduler.retire("placed")  # its place is free at once, and what it is now waits for more bytes
    assert effects.drops == 1
    assert effects.starts[-1] == ("placed", 0), "neither a nor placed is gone yet"
    scheduler.ahead_gone("a")
    assert effects.starts[-1] == ("next", 0)


def test_a_further_replica_that_cannot_be_the_spare_is_not_kept_away_by_it() -> None:
    effects = Quiet()
    scheduler = crowded(effects)
    scheduler.unload("b", WorkerFailed("unloaded"))
    scheduler.exited("b")
    scheduler.add("placed", slots=1, replicas=2, placed=True)
    scheduler.resize("placed", SIZE + 1)
    for ticket in (10, 11):
        scheduler.request(ticket, "placed")
    scheduler.ready("placed")
    assert effects.drops == 1
    scheduler.ahead_gone("a")
    assert effects.starts[-1] == ("placed", 1)


def test_what_is_loaded_ahead_goes_when_a_model_takes_more_than_was_expected() -> None:
    effects = Quiet()
    scheduler = crowded(effects)
    scheduler.measure("b", 2 * SIZE)
    fits = not effects.drops
    assert fits
    scheduler.measure("b", 2 * SIZE + 1)
    assert effects.drops == 1


def test_what_is_loaded_ahead_goes_for_a_model_that_finds_too_little_memory() -> None:
    effects = Quiet()
    scheduler = crowded(effects)
    scheduler.add("placed", placed=True)
    scheduler.resize("placed", SIZE)
    scheduler.request(10, "placed")
    assert scheduler.exited("placed", WorkerFailed("memory"), short_of_memory=True), "it is tried again"
    assert effects.drops == 1
    assert effects.starts.count(("placed", 0)) == 1, "not before the memory is free"
    assert scheduler.phase("b") is Phase.READY, "nothing else has to go"
    scheduler.ahead_gone("a")
    assert effects.starts.count(("placed", 0)) == 2


def test_what_nobody_knows_does_not_start_beside_a_spare_that_leaves() -> None:
    effects = Quiet()
    scheduler = crowded(effects)
    scheduler.request(9, "b")
    scheduler.give_up_ahead()
    scheduler.add("unknown")
    scheduler.request(10, "unknown")
    assert effects.starts[-1] == ("b", 0)
    scheduler.ahead_gone("a")
    assert effects.starts[-1] == ("unknown", 0)


# --- a swap ---


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_the_model_that_had_to_go_is_there_again_before_it_is_asked_for(transport: str) -> None:
    async def scene() -> None:
        async with pool_of(model("a"), model("b"), transport=transport) as pool:
            await swap(pool, "a", "b")
            spare = await loaded_ahead(pool, "a")
            assert pool.status("a").state is State.UNLOADED
            await swap(pool, "a")
            assert pool.status("a").pid == spare
            assert pool.status("a").info
            spare = await loaded_ahead(pool, "b")
            await swap(pool, "b")
            assert pool.status("b").pid == spare

    run(scene())


def test_what_the_worker_printed_while_it_loaded_ahead_is_in_its_log() -> None:
    async def scene() -> None:
        async with pool_of(model("a", script={"flood_bytes": 200}), model("b")) as pool:
            await swap(pool, "a", "b")
            await loaded_ahead(pool, "a")
            await pool.load("a")
            assert any(line for line in pool.logs("a"))

    run(scene())


def test_a_real_model_answers_the_same_after_it_was_loaded_ahead(tmp_path: Path) -> None:
    paths = {name: tmp_path / f"{name}.gguf" for name in "ab"}
    for path in paths.values():
        shutil.copy(tiny_model("random"), path)
    options = EngineOptions(n_ctx=128, n_parallel=1, n_threads=1)
    models = [ModelSpec(name=name, path=path, options=options, memory=SIZE) for name, path in paths.items()]

    async def answer(pool: Pool, name: str) -> tuple[int, ...]:
        done = await pool.complete(name, (1, 2, 3), temperature=0, max_tokens=8, ignore_eos=True).collect()
        return done.tokens

    async def scene() -> None:
        async with pool_of(*models) as pool:
            first = await answer(pool, "a")
            assert await answer(pool, "b") == first
            spare = await loaded_ahead(pool, "a")
            assert await answer(pool, "a") == first
            assert pool.status("a").pid == spare
            spare = await loaded_ahead(pool, "b")
            shutil.copy(tiny_model("scripted"), tmp_path / "other")
            os.replace(tmp_path / "other", paths["b"])
            assert await answer(pool, "b") != first, "what was read of the file before is not used"
            assert pool.status("b").pid == spare

    run(scene(), 60.0)


def test_a_load_ahead_is_abandoned_for_another_model(tmp_path: Path) -> None:
    gate = tmp_path / "gate"

    async def scene() -> None:
        async with pool_of(gated("a", gate), model("b"), model("c")) as pool:
            spare = await under_way(pool, gate)
            await swap(pool, "c")
            assert pool.status("c").pid == spare
            assert pool.counts().ahead == ""

    run(scene())


def test_a_load_ahead_goes_on_for_who_wants_it_and_tells_how_far_it_is(tmp_path: Path) -> None:
    gate = tmp_path / "gate"

    async def scene() -> None:
        async with pool_of(gated("a", gate), model("b")) as pool:
            spare = await under_way(pool, gate)
            asked = asyncio.create_task(pool.complete("a", "hello").collect())
            await until(lambda: pool.status("a").progress is not None, "the load tells how far it is")
            assert pool.status("a").state is State.LOADING
            gate.touch()
            assert (await asked).text == "hello"
            assert pool.status("a").pid == spare

    run(scene())


def test_a_spare_that_dies_while_it_loads_ahead_gives_its_room_back(tmp_path: Path) -> None:
    gate = tmp_path / "gate"

    async def scene() -> None:
        async with pool_of(gated("a", gate), model("b"), large("c")) as pool:
            os.kill(await under_way(pool, gate), signal.SIGKILL)
            gate.touch()
            await swap(pool, "c", "a")

    run(scene())


def test_what_cannot_be_loaded_ahead_costs_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "llamaherd.pool")
    memory = tmp_path / "memory"

    async def scene() -> None:
        # There is memory for one of the two, so what is loaded beside the other finds none.
        models = [model(name, script={"memory": [str(memory)]}) for name in "ab"]
        async with pool_of(*models, large("c")) as pool:
            await swap(pool, "a", "b")
            await until(lambda: len(spares(pool)) == 1, "there is a spare")
            (spare,) = spares(pool)
            await until(lambda: "could not load 'a' ahead" in caplog.text, "it was tried")
            await pool.unload("b")
            await swap(pool, "c")
            assert pool.status("c").pid == spare

    run(scene())


@pytest.mark.parametrize("wanted", ["a", "c"], ids=["what it has loaded", "another model"])
def test_a_spare_that_hangs_is_replaced_before_anybody_waits_for_it_long(
    wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clocks, "SPARE_SILENCE_SECONDS", 0.2)

    async def scene() -> None:
        async with pool_of(model("a"), model("b"), model("c")) as pool:
            await swap(pool, "a", "b")
            hung = await loaded_ahead(pool, "a")
            freeze(hung)
            await swap(pool, wanted)
            assert pool.status(wanted).pid != hung
            assert not psutil.pid_exists(hung)

    run(scene())


def test_a_machine_that_needs_long_to_start_a_process_is_given_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clocks, "SPARE_SILENCE_SECONDS", 0.0)  # no spare begins so soon

    async def scene() -> None:
        async with pool_of(model("a"), model("b")) as pool:
            await swap(pool, "a", "b", "a", "b")

    run(scene())


def test_the_log_of_a_model_has_nothing_of_another_that_was_loaded_ahead() -> None:
    async def scene() -> None:
        async with pool_of(model("a", script={"flood_bytes": 200}), model("b"), model("c")) as pool:
            await swap(pool, "a", "b")
            await loaded_ahead(pool, "a")
            await swap(pool, "c")
            assert not any("..." in line for line in pool.logs("c"))

    run(scene())


# --- out of the way ---


def test_what_is_loaded_ahead_goes_when_its_model_is_unloaded() -> None:
    async def scene() -> None:
        async with pool_of(model("a"), model("b")) as pool:
            await swap(pool, "a", "b")
            spare = await loaded_ahead(pool, "a")
            with pytest.raises(ModelBusy):
                await pool.unload("a")  # it is not running, and that is what the caller hears
            await until(lambda: spare not in spares(pool), "its memory is free")
            await until(lambda: len(spares(pool)) == 1, "there is another spare")
            assert pool.counts().ahead == ""

    run(scene())


def test_a_model_that_somebody_unloads_is_not_loaded_ahead_later() -> None:
    async def scene() -> None:
        async with pool_of(*map(model, "abcd")) as pool:
            await swap(pool, *"abcd")
            await loaded_ahead(pool, "c")
            for name in "bc":
                with pytest.raises(ModelBusy):
                    await pool.unload(name)
            await loaded_ahead(pool, "a")

    run(scene())


def test_a_model_with_a_placement_that_says_nothing_is_not_the_spare_either() -> None:
    async def scene() -> None:
        placed = model("c", placements=(Placement(),))
        async with pool_of(model("a"), model("b"), placed, models_max=2, memory_budget=4 * SIZE) as pool:
            await swap(pool, "a", "b", "c")
            spare = await loaded_ahead(pool, "a")
            await pool.unload("c")
            await swap(pool, "c")
            assert pool.status("c").pid != spare
            await swap(pool, "a")
            assert pool.status("a").pid == spare

    run(scene())


def test_what_is_loaded_ahead_goes_when_an_idle_model_would() -> None:
    async def scene() -> None:
        async with pool_of(model("a", unload_idle_seconds=0.2), model("b")) as pool:
            await swap(pool, "a", "b")
            spare = await loaded_ahead(pool, "a")
            await until(lambda: spare not in spares(pool), "its memory is free")
            await until(lambda: len(spares(pool)) == 1, "there is another spare")
            await swap(pool, "a")

    run(scene())


def test_what_is_loaded_ahead_goes_when_its_model_has_become_another() -> None:
    async def scene() -> None:
        async with pool_of(model("a"), model("b")) as pool:
            await swap(pool, "a", "b")
            spare = await loaded_ahead(pool, "a")
            pool.reload([model("a", aliases=("alpha",)), model("b")])
            assert pool.counts().ahead == "a", "another name is no other model"
            pool.reload([model("a", script={"load_steps": 2}), model("b")])
            await until(lambda: spare not in spares(pool), "its memory is free")
            pool.reload([model("b")])
            await swap(pool, "b")

    run(scene())


def test_what_is_loaded_ahead_makes_room_for_what_cannot_use_it() -> None:
    async def scene() -> None:
        placed = model("c", placements=(Placement(cores=(0,)),))
        async with pool_of(model("a"), model("b"), placed, models_max=2, memory_budget=3 * SIZE) as pool:
            await swap(pool, "a", "b", "c")
            spare = await loaded_ahead(pool, "a")
            pool.reload([model("a"), model("b"), placed, large("d", placements=(Placement(cores=(0,)),))])
            await swap(pool, "d")
            assert spare not in spares(pool)

    run(scene())
