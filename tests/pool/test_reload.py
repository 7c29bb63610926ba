"""A new catalogue changes what it must and drops nothing. Real processes, scripted engine."""

import asyncio
import copy
import os
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from herding import fake, reach, run, until
from llamaherd.pool import (
    BadRequest,
    BrokenModel,
    EngineOptions,
    Event,
    LoadFailed,
    ModelNotFound,
    ModelSpec,
    Placement,
    Pool,
    PoolClosed,
    QueueFull,
    State,
    Subscription,
    SyncPool,
)
from llamaherd.pool.reload import plan_catalog
from llamaherd.transport.messages import MAX_MESSAGE_BYTES
from tiny_gguf import tiny_model


def changed(spec: ModelSpec, **fields: Any) -> ModelSpec:
    """Return the spec with other fields, and as the reload of a file would: nothing of it is the same object."""
    return copy.deepcopy(msgspec.structs.replace(spec, **fields))


async def events_until(events: Subscription, last: str) -> list[Event]:
    seen: list[Event] = []
    async for event in events:
        seen.append(event)
        if event.event == last:
            break
    return seen


def test_what_is_the_same_runs_on_untouched() -> None:
    async def scene() -> None:
        async with Pool([fake("m"), fake("n")]) as pool:
            before = await pool.load("m")
            report = pool.reload([changed(fake("n")), changed(fake("m"))])
            assert (report.unchanged, report.added, report.changed, report.removed) == (("n", "m"), (), (), ())
            assert [status.name for status in pool.models()] == ["n", "m"]
            assert pool.status("m").pid == before.pid
            assert (await pool.complete("m", "hello").collect()).text == "hello"

    run(scene())


def test_models_come_and_go_and_events_say_so() -> None:
    async def scene() -> None:
        async with Pool([fake("old"), fake("stays")]) as pool, pool.events() as events:
            await anext(events)
            report = pool.reload([fake("stays"), fake("new")])
            assert (report.added, report.removed, report.unchanged) == (("new",), ("old",), ("stays",))
            seen = await events_until(events, "models_reload")
            assert [(event.model, event.event) for event in seen] == [("old", "model_remove"), ("*", "models_reload")]
            assert (await pool.complete("new", "hello").collect()).text == "hello"
            with pytest.raises(ModelNotFound):
                pool.complete("old", "hello")
            assert [status.name for status in pool.models()] == ["stays", "new"]

    run(scene())


def test_a_busy_model_that_is_removed_finishes_its_answer_and_leaves_and_those_who_wait_are_told(
    tmp_path: Path,
) -> None:
    gate = tmp_path / "gate"

    async def scene() -> None:
        async with Pool([fake("m", n_parallel=1, step_gate=str(gate), gate_at=1)]) as pool, pool.events() as events:
            await anext(events)
            running, waiting = pool.complete("m", "one two"), pool.complete("m", "later")
            assert (await anext(running)).text == "one"
            assert pool.reload([]).removed == ("m",)
            with pytest.raises(ModelNotFound, match="'m' was removed"):
                await waiting.collect()
            assert [status.name for status in pool.models()] == ["m"]
            gate.touch()
            assert [piece.text async for piece in running] == [" two", ""]
            await events_until(events, "model_remove")
            assert pool.models() == []

    run(scene())


def test_a_busy_model_whose_options_changed_finishes_first_and_the_next_request_gets_the_new_one(
    tmp_path: Path,
) -> None:
    gate = tmp_path / "gate"

    async def scene() -> None:
        async with Pool([fake("m", step_gate=str(gate), gate_at=1)]) as pool:
            running = pool.complete("m", "one two")
            assert (await anext(running)).text == "one"
            pid = pool.status("m").pid
            assert pool.reload([fake("m", pieces=("new",))]).changed == ("m",)
            waiting = pool.complete("m", "hello")
            assert (pool.status("m").queued, pool.status("m").pid) == (1, pid)
            gate.touch()
            assert [piece.text async for piece in running] == [" two", ""]
            assert (await waiting.collect()).text == "new"
            assert pool.status("m").pid != pid

    run(scene())


def test_an_idle_model_whose_options_changed_leaves_and_comes_back_with_the_next_request() -> None:
    async def scene() -> None:
        async with Pool([fake("m")]) as pool:
            await pool.load("m")
            pool.reload([fake("m", n_parallel=2, pieces=("new",))])
            await reach(pool, "m", State.UNLOADED)
            assert pool.status("m").exit_code == 0
            assert (await pool.complete("m", "hello").collect()).text == "new"
            assert pool.status("m").slots == 2

    run(scene())


def test_a_model_that_loads_while_it_changes_is_loaded_anew_for_those_who_wait(tmp_path: Path) -> None:
    async def scene() -> None:
        async with Pool([fake("m", load_gate=str(tmp_path / "never"))], stop_timeout=3600) as pool:
            waiting = pool.complete("m", "hello")
            await reach(pool, "m", State.LOADING)
            pool.reload([fake("m", pieces=("new",))])
            assert (await waiting.collect()).text == "new"

    run(scene())


def test_a_change_that_is_undone_while_the_model_is_busy_costs_nothing(tmp_path: Path) -> None:
    gate = tmp_path / "gate"

    async def scene() -> None:
        model = fake("m", step_gate=str(gate), gate_at=1)
        async with Pool([model]) as pool:
            running = pool.complete("m", "one two")
            assert (await anext(running)).text == "one"
            pid = pool.status("m").pid
            pool.reload([])
            assert pool.reload([fake("m", pieces=("new",))]).added == ("m",)
            assert pool.reload([model]).changed == ("m",)
            gate.touch()
            assert [piece.text async for piece in running] == [" two", ""]
            assert (await pool.complete("m", "still here").collect()).text == "still here"
            assert pool.status("m").pid == pid

    run(scene())


def test_settings_of_the_pools_side_change_without_a_restart() -> None:
    async def scene() -> None:
        async with Pool([fake("m")]) as pool:
            pid = (await pool.load("m")).pid
            spec = changed(fake("m"), aliases=("short",), tags=("new",), priority=3, stop_timeout=1.5)
            assert pool.reload([spec]).changed == ("m",)
            status = pool.status("short")
            assert (status.pid, status.aliases, status.tags) == (pid, ("short",), ("new",))
            assert status.info is not None
            assert (status.info["aliases"], status.info["tags"]) == (["short"], ["new"])
            assert (await pool.complete("short", "hello").collect()).text == "hello"

    run(scene())


def test_new_idle_times_count_at_once() -> None:
    async def scene() -> None:
        async with Pool([fake("m")]) as pool:
            await pool.load("m")
            pool.reload([changed(fake("m"), unload_idle_seconds=0.0)])
            await reach(pool, "m", State.UNLOADED)

    run(scene())


def test_a_broken_entry_is_listed_with_its_reason_and_the_others_serve() -> None:
    async def scene() -> None:
        async with Pool([fake("fine"), fake("good until now")]) as pool:
            report = pool.reload(
                [
                    BrokenModel(name="broken", reason="its preset has no model", aliases=("b",)),
                    changed(fake("good until now"), stop_timeout=-1.0),
                    fake("fine"),
                ]
            )
            assert report.failed == {
                "broken": "its preset has no model",
                "good until now": "model 'good until now': stop_timeout must be a finite number of seconds, 0 or more",
            }
            assert [status.failed for status in pool.models()] == [True, True, False]
            for name in ("broken", "b"):
                with pytest.raises(LoadFailed, match="'broken' cannot be used: its preset has no model"):
                    pool.complete(name, "hello")
            with pytest.raises(LoadFailed):
                await pool.load("broken")
            assert (await pool.complete("fine", "hello").collect()).text == "hello"
            pool.reload([fake("broken"), fake("fine")])
            assert (await pool.complete("broken", "mended").collect()).text == "mended"
            assert pool.status("broken").error is None

    run(scene())


def test_who_waits_for_a_model_that_breaks_is_told(tmp_path: Path) -> None:
    async def scene() -> None:
        async with Pool([fake("m", load_gate=str(tmp_path / "never"))]) as pool:
            waiting = pool.complete("m", "hello")
            await reach(pool, "m", State.LOADING)
            pool.reload([BrokenModel(name="m", reason="it is gone")])
            with pytest.raises(LoadFailed, match="it is gone"):
                await waiting.collect()
            await until(lambda: pool.status("m").pid is None)

    run(scene())


def test_a_catalogue_that_is_none_changes_nothing() -> None:
    async def scene() -> None:
        async with Pool([fake("m")]) as pool:
            await pool.load("m")

            def wrong() -> Any:
                yield fake("new")
                raise OSError("the folder is gone")

            with pytest.raises(OSError, match="the folder is gone"):
                pool.reload(wrong())
            not_models: Any = ["m"]
            with pytest.raises(BadRequest, match="not str"):
                pool.reload(not_models)
            assert [status.name for status in pool.models()] == ["m"]
            assert pool.status("m").state is State.LOADED
        with pytest.raises(PoolClosed):
            pool.reload([])

    run(scene())


def test_a_model_may_be_removed_while_its_size_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF and no more")

    async def scene() -> None:
        async with Pool([ModelSpec(name="m", path=path, engine="fake")], memory_budget=1) as pool:
            waiting = pool.complete("m", "hello")
            pool.reload([])
            with pytest.raises(ModelNotFound):
                await waiting.collect()
            assert pool.models() == []

    run(scene())


def test_the_rest_of_a_long_list_to_embed_is_refused_when_its_model_is_removed_meanwhile() -> None:
    async def scene() -> None:
        async with Pool([fake("m")]) as pool:
            await pool.load("m")
            work = asyncio.ensure_future(pool.embed("m", ["x"] * 64 * 20))
            while not pool.status("m").in_flight:  # noqa: ASYNC110 - its first commands are on their way
                await asyncio.sleep(0)
            pool.reload([])
            with pytest.raises(ModelNotFound, match="'m' was removed"):
                await work
            await until(lambda: pool.models() == [])
            await pool.drain(5)

    run(scene())


def test_who_waits_for_a_changed_model_starts_it_by_its_new_size(tmp_path: Path) -> None:
    gate = tmp_path / "gate"

    def sized(memory: int, **script: Any) -> ModelSpec:
        return msgspec.structs.replace(fake("m", n_parallel=1, **script), memory=memory)

    async def scene() -> None:
        async with Pool([sized(4, step_gate=str(gate))], memory_budget=10) as pool:
            running, waiting = pool.complete("m", "one"), pool.complete("m", "later")
            await until(lambda: pool.status("m").in_flight == 1)
            pool.reload([sized(11)])
            gate.touch()
            assert (await running.collect()).text == "one"
            with pytest.raises(QueueFull, match="memory budget"):
                await waiting.collect()

    run(scene())


def test_who_waits_for_a_changed_model_does_not_start_it_before_its_new_file_is_measured(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    file = tmp_path / "large.gguf"
    file.write_bytes(tiny_model("random").read_bytes())
    os.truncate(file, 2**30)  # of no bytes on the disk

    async def scene() -> None:
        small = msgspec.structs.replace(fake("m", n_parallel=1, step_gate=str(gate)), memory=4)
        async with Pool([small], memory_budget=2**20) as pool:
            running, waiting = pool.complete("m", "one"), pool.complete("m", "later")
            await until(lambda: pool.status("m").in_flight == 1)
            pool.reload([msgspec.structs.replace(fake("m"), path=file)])
            assert pool.status("m").queued == 1
            gate.touch()
            assert (await running.collect()).text == "one"
            with pytest.raises(QueueFull, match="memory budget"):
                await waiting.collect()

    run(scene())


def test_an_unload_of_a_model_that_is_removed_meanwhile_ends_like_any_other() -> None:
    async def scene() -> None:
        async with Pool([fake("m")]) as pool:
            await pool.load("m")
            unloading = asyncio.ensure_future(pool.unload("m"))
            await asyncio.sleep(0)
            pool.reload([])
            status = await unloading
            assert (status.state, status.exit_code, status.in_flight) == (State.UNLOADED, 0, 0)
            assert pool.models() == []

    run(scene())


def test_a_crash_after_its_removal_does_not_bring_a_model_back(tmp_path: Path) -> None:
    gate = tmp_path / "gate"

    async def scene() -> None:
        async with Pool([fake("m", crash_at=1, step_gate=str(gate), gate_at=1)]) as pool:
            running = asyncio.ensure_future(pool.complete("m", "one two").collect())
            await until(lambda: pool.status("m").in_flight == 1)
            pool.reload([])
            gate.touch()
            with pytest.raises(Exception, match="SIGKILL"):
                await running
            await until(lambda: pool.models() == [])

    run(scene())


def test_the_sync_pool_reloads_too() -> None:
    with SyncPool([fake("m")]) as pool:
        assert pool.reload([fake("m"), fake("n")]).added == ("n",)
        assert [answer.text for answer in pool.map("n", ["one", "two"])] == ["one", "two"]


# --- the plan ---


def test_names_go_before_aliases_and_the_first_of_two_counts() -> None:
    plan = plan_catalog(
        [
            ModelSpec(name="a", engine="fake", aliases=("b", "x", "x")),
            ModelSpec(name="b", engine="fake", aliases=("x", "y")),
            ModelSpec(name="a", engine="fake", tags=("second",)),
            ModelSpec(name="", engine="fake"),
            ModelSpec(name="c"),
        ]
    )
    assert {name: model.aliases for name, model in plan.models.items()} == {"a": ("x",), "b": ("y",), "c": ()}
    assert plan.models["a"].tags == ()
    assert plan.models["c"] == BrokenModel(name="c", reason="model 'c' has no path")
    assert len(plan.problems) == 5


NAMES = st.sampled_from(["a", "b", "c", "d", "", "bad\n"])
MODELS = st.builds(
    ModelSpec, name=NAMES, aliases=st.lists(NAMES, max_size=3).map(tuple), engine=st.sampled_from(["fake", "llama"])
)
BROKEN = st.builds(BrokenModel, name=NAMES, reason=st.just("no"), aliases=st.lists(NAMES, max_size=3).map(tuple))


@given(st.lists(st.one_of(MODELS, BROKEN), max_size=8))
def test_every_name_of_a_plan_has_one_owner_and_every_model_of_it_can_be_listed(
    models: list[ModelSpec | BrokenModel],
) -> None:
    plan = plan_catalog(models)
    names = [name for model in plan.models.values() for name in (model.name, *model.aliases)]
    assert len(names) == len(set(names))
    assert all(name.isprintable() and name for name in names)
    for model in plan.models.values():
        if isinstance(model, ModelSpec):
            model.check()
    assert {model.name for model in models if model.name and model.name.isprintable()} == set(plan.models)
    assert plan_catalog(plan.models.values()).models == plan.models


def test_only_what_the_worker_is_told_makes_a_worker_another() -> None:
    spec = ModelSpec(name="m", path=Path("/m.gguf"))
    for same in ({"tags": ("t",)}, {"priority": 2}, {"pinned": True}, {"unload_idle_seconds": 3.0}, {"replicas": 4}):
        assert changed(spec, **same).runs_as(spec)
    for other in (
        {"path": Path("/n.gguf")},
        {"options": EngineOptions(n_ctx=7)},
        {"placements": (Placement(gpus=("1",)),)},
    ):
        assert not changed(spec, **other).runs_as(spec)


def test_a_template_that_no_message_could_carry_costs_one_model_before_any_process_starts() -> None:
    wrong = msgspec.structs.replace(fake("m"), options=EngineOptions(chat_template="x" * (MAX_MESSAGE_BYTES + 1)))

    async def scene() -> None:
        async with Pool([fake("sound")]) as pool:
            report = pool.reload([fake("sound"), wrong])
            assert report.unchanged == ("sound",)
            assert "its chat template or its other texts are too long" in report.failed["m"]
            with pytest.raises(LoadFailed, match="too long"):
                await pool.load("m")
            assert pool.status("m").exit_code is None

    run(scene())
