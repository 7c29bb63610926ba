"""A pool answers, over every transport, and says what happens to its models. Real processes, scripted engine."""

import asyncio
import gc
from pathlib import Path

import pytest

from herding import TRANSPORTS, fake, reach, run, run_uvloop, until
from llamaherd.pool import (
    BadRequest,
    Event,
    Generation,
    ModelBusy,
    ModelNotFound,
    ModelNotLoaded,
    ModelSpec,
    PoolClosed,
    State,
    Subscription,
    WorkerFailed,
)
from llamaherd.pool import Pool as Herd
from llamaherd.transport import UnknownTransport

QUESTION = [{"role": "user", "content": "one two three"}]


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("runner", [run, run_uvloop], ids=["asyncio", "uvloop"])
def test_a_chat_streams_its_answer_and_ends_with_a_reason(transport: str, runner: type) -> None:
    async def scene() -> None:
        async with Herd([fake("m")], transport=transport) as pool:
            pieces = [piece async for piece in pool.chat("m", QUESTION)]
            assert [piece.text for piece in pieces] == ["one", " two", " three", ""]
            assert pieces[-1].finish_reason == "stop"
            assert pieces[-1].usage is not None
            assert pieces[-1].usage.completion_tokens == 3

    runner(scene())


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_many_requests_at_once_each_get_their_own_answer(transport: str) -> None:
    async def scene() -> None:
        async with Herd([fake("m", n_parallel=8)], transport=transport) as pool:
            prompts = [" ".join(f"w{number}-{word}" for word in range(20)) for number in range(200)]
            answers = await asyncio.gather(*(pool.complete("m", prompt).collect() for prompt in prompts))
            assert [answer.text for answer in answers] == prompts
            assert pool.status("m").in_flight == 0

    run(scene(), 50)


def test_max_tokens_ends_with_length() -> None:
    async def scene() -> None:
        async with Herd([fake("m")]) as pool:
            answer = await pool.complete("m", "one two three", max_tokens=2).collect()
            assert (answer.text, answer.finish_reason, answer.usage.completion_tokens) == ("one two", "length", 2)

    run(scene())


def test_an_alias_is_as_good_as_a_name() -> None:
    async def scene() -> None:
        spec = ModelSpec(name="long/name:Q4", aliases=("short",), engine="fake")
        async with Herd([spec]) as pool:
            assert (await pool.complete("short", "hello").collect()).text == "hello"
            assert pool.status("short").name == "long/name:Q4"

    run(scene())


def test_events_begin_with_a_snapshot_and_count_without_a_gap() -> None:
    async def scene() -> None:
        async with Herd([fake("m", load_steps=2)]) as pool:
            seen: list[Event] = []
            async with pool.events() as events:
                seen.append(await anext(events))
                pool.start_load("m")
                async for event in events:
                    seen.append(event)
                    if event.data.get("status") == State.LOADED:
                        break
            assert seen[0].event == "snapshot"
            assert seen[0].data["models"][0]["state"] == "unloaded"
            assert [event.seq for event in seen] == list(range(len(seen)))
            assert (seen[1].event, seen[1].data) == ("model_status", {"status": "loading"})
            values = [event.data["progress"]["value"] for event in seen[2:-1]]
            assert values == [0.0, 0.5, 1.0]
            assert seen[-1].event == "status_change"
            assert seen[-1].data["info"]["meta"]["ftype"] == "fake"

    run(scene())


def test_a_subscriber_that_comes_later_sees_the_present_in_its_snapshot() -> None:
    async def scene() -> None:
        async with Herd([fake("m")]) as pool:
            await pool.load("m")
            async with pool.events() as events:
                snapshot = await anext(events)
                assert snapshot.data["models"][0]["state"] == "loaded"
                await pool.unload("m")
                following = await anext(events)
                assert following.seq == snapshot.seq + 1
                assert following.data == {"status": "unloaded", "exit_code": 0}

    run(scene())


def test_closing_the_pool_ends_its_event_streams() -> None:
    async def scene() -> None:
        async with Herd([fake("m")]) as pool:
            events = pool.events()
            await anext(events)
            rest = asyncio.ensure_future(drain(events))
        assert await rest == []

    async def drain(events: Subscription) -> list[Event]:
        return [event async for event in events]

    run(scene())


def test_status_tells_the_process_the_command_line_and_the_models_facts() -> None:
    async def scene() -> None:
        async with Herd([fake("m")]) as pool:
            before = pool.status("m")
            assert (before.state, before.pid, before.args, before.exit_code) == (State.UNLOADED, None, (), None)
            status = await pool.load("m")
            assert status.state is State.LOADED
            assert status.pid is not None
            assert status.args[-1] == "m"
            assert status.info is not None
            assert status.info["owned_by"] == "llamacpp"
            after = await pool.unload("m")
            assert (after.state, after.pid, after.exit_code, after.failed) == (State.UNLOADED, None, 0, False)

    run(scene())


def test_only_so_many_models_run_and_the_least_recently_used_makes_room() -> None:
    async def scene() -> None:
        async with Herd([fake("a"), fake("b"), fake("c")], models_max=2) as pool:
            for model in ("a", "b", "a", "c"):
                await pool.complete(model, "hello").collect()
            assert [status.state for status in pool.models()] == [State.LOADED, State.UNLOADED, State.LOADED]

    run(scene())


def test_a_busy_model_finishes_before_another_takes_its_place(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    words = " ".join(str(word) for word in range(200))

    async def scene() -> None:
        models = [fake("a", step_gate=str(gate), gate_at=20), fake("b")]
        async with Herd(models, models_max=1) as pool:
            first = pool.complete("a", words)
            said = "".join([(await anext(first)).text for _ in range(20)])
            second = asyncio.ensure_future(pool.complete("b", "hello").collect())
            await until(lambda: pool.status("b").queued == 1, "the second request waits")
            gate.touch()
            rest = [piece async for piece in first]
            assert said + "".join(piece.text for piece in rest) == words
            assert rest[-1].finish_reason == "stop"
            assert (await second).text == "hello"
            assert pool.status("a").state is State.UNLOADED

    run(scene())


@pytest.mark.parametrize("leaving", ["break", "aclose", "forget"])
def test_a_caller_that_leaves_frees_its_slot(leaving: str, tmp_path: Path) -> None:
    async def scene() -> None:
        async with Herd([fake("m", n_parallel=1, pieces=("x",), repeat=10**6, step_seconds=0.001)]) as pool:
            generation: Generation | None = pool.complete("m", "go")
            assert generation is not None
            async for piece in generation:
                assert piece.text == "x"
                break
            if leaving == "aclose":
                await generation.aclose()
            generation = None
            gc.collect()
            await until(lambda: pool.status("m").in_flight == 0, "the slot is free")
            again = pool.complete("m", "go", max_tokens=1)
            assert (await again.collect()).text == "x"

    run(scene())


def test_a_caller_that_leaves_while_the_model_loads_or_in_the_queue_is_forgotten(tmp_path: Path) -> None:
    gate = tmp_path / "gate"

    async def scene() -> None:
        async with Herd([fake("a", load_gate=str(gate)), fake("b")], models_max=1) as pool:
            loading, queued = pool.complete("a", "hello"), pool.complete("b", "hello")
            await reach(pool, "a", State.LOADING)
            await loading.aclose()
            await queued.aclose()
            assert (pool.status("a").queued, pool.status("b").queued) == (0, 0)
            gate.touch()
            await reach(pool, "a", State.LOADED)
            assert pool.status("a").in_flight == 0

    run(scene())


def test_a_cancelled_collect_cancels_the_work() -> None:
    async def scene() -> None:
        async with Herd([fake("m", pieces=("x",), repeat=10**6, step_seconds=0.001)]) as pool:
            task = asyncio.ensure_future(pool.complete("m", "go").collect())
            await until(lambda: pool.status("m").in_flight == 1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await until(lambda: pool.status("m").in_flight == 0)

    run(scene())


def test_a_request_that_fails_harms_no_neighbour() -> None:
    async def scene() -> None:
        async with Herd([fake("m", fail_at=3)]) as pool:
            long, short = pool.complete("m", "a b c d e"), pool.complete("m", "a b")
            assert (await short.collect()).text == "a b"
            with pytest.raises(WorkerFailed, match="script says"):
                await long.collect()
            assert (await pool.complete("m", "c d").collect()).text == "c d"

    run(scene())


def test_a_sleeping_model_keeps_its_process_and_wakes_for_the_next_request() -> None:
    async def scene() -> None:
        async with Herd([fake("m")]) as pool:
            pid = (await pool.load("m")).pid
            pool.start_sleep("m")
            await reach(pool, "m", State.SLEEPING)
            assert (await pool.complete("m", "awake again").collect()).text == "awake again"
            assert pool.status("m").state is State.LOADED
            assert pool.status("m").pid == pid

    run(scene())


def test_a_request_on_the_heels_of_a_sleep_command_is_served() -> None:
    async def scene() -> None:
        async with Herd([fake("m")]) as pool:
            await pool.load("m")
            pool.start_sleep("m")
            assert (await pool.complete("m", "not so fast").collect()).text == "not so fast"

    run(scene())


def test_tokenize_detokenize_and_apply_template_ask_the_model() -> None:
    async def scene() -> None:
        async with Herd([fake("m")]) as pool:
            tokens = await pool.tokenize("m", "né")
            assert tokens == [0x6E, 0xC3, 0xA9]
            assert await pool.detokenize("m", tokens) == "né"
            assert await pool.apply_template("m", QUESTION) == "<user>one two three\n"
            with pytest.raises(BadRequest, match="bytes"):
                await pool.detokenize("m", [999])
            assert pool.status("m").in_flight == 0

    run(scene())


def test_unloading_a_busy_model_fails_its_requests_and_the_next_one_starts_it_again() -> None:
    async def scene() -> None:
        async with Herd([fake("m", pieces=("x",), repeat=10**6, step_seconds=0.001)]) as pool:
            generation = pool.complete("m", "go")
            await anext(generation)
            status = await pool.unload("m")
            assert (status.state, status.failed) == (State.UNLOADED, False)
            with pytest.raises(WorkerFailed, match="unloaded"):
                async for _ in generation:
                    pass
            assert (await pool.complete("m", "go", max_tokens=1).collect()).text == "x"

    run(scene())


def test_what_cannot_be_done_now_is_said_at_once() -> None:
    async def scene() -> None:
        async with Herd([fake("m")]) as pool:
            with pytest.raises(ModelBusy, match="not running"):
                pool.start_unload("m")
            with pytest.raises(ModelBusy, match="cannot sleep"):
                pool.start_sleep("m")
            with pytest.raises(ModelNotLoaded, match="not loaded"):
                pool.complete("m", "hello", autoload=False)
            with pytest.raises(ModelNotFound, match=r"'no\\x1bne' not found"):
                pool.complete("no\x1bne", "hello")
            with pytest.raises(ModelNotFound, match=rf"^model '{'n' * 60}' \.\.\. not found$"):
                pool.status("n" * 1_000_000)
            pool.start_load("m")
            with pytest.raises(ModelBusy, match="already running"):
                pool.start_load("m")

    run(scene())


@pytest.mark.parametrize(
    ("params", "complaint"),
    [
        ({"max_tokens": -2}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": 2.5}, "max_tokens"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"min_p": -0.1}, "min_p"),
        ({"top_k": 2**40}, "top_k"),
        ({"seed": 2**32}, "seed"),
        ({"stop": [1]}, "stop"),
        ({"stop": ["x"] * 65}, "stop"),
        ({"stop": "\ud800"}, "surrogate"),
        ({"cache_prompt": 1}, "cache_prompt"),
        ({"no_such": 1}, "no_such"),
    ],
)
def test_a_wrong_parameter_is_named_and_starts_nothing(params: dict[str, object], complaint: str) -> None:
    async def scene() -> None:
        async with Herd([fake("m")]) as pool:
            with pytest.raises(BadRequest, match=complaint):
                pool.complete("m", "hello", **params)  # type: ignore[arg-type]
            assert pool.status("m").state is State.UNLOADED

    run(scene())


@pytest.mark.parametrize("messages", ["hello", [], ["hello"], [{}], [{"role": 1}], [{"role": "user", "content": 1}]])
def test_wrong_messages_are_refused(messages: object) -> None:
    async def scene() -> None:
        async with Herd([fake("m")]) as pool:
            with pytest.raises(BadRequest, match="messages"):
                pool.chat("m", messages)  # type: ignore[arg-type]

    run(scene())


def test_what_cannot_travel_is_refused_and_starts_nothing() -> None:
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]

    async def scene() -> None:
        async with Herd([fake("m")]) as pool:
            with pytest.raises(BadRequest, match="JSON"):
                pool.chat("m", QUESTION, template_kwargs={"x": object()})
            with pytest.raises(BadRequest, match="recursion"):
                pool.chat("m", [{"role": "user", "content": deep}])
            with pytest.raises(BadRequest, match="bytes"):
                pool.complete("m", "x" * (64 * 1024 * 1024))
            with pytest.raises(BadRequest, match="surrogate"):
                await pool.tokenize("m", "\ud800")
            assert pool.status("m").state is State.UNLOADED

    run(scene())


@pytest.mark.parametrize(
    "spec",
    [
        ModelSpec(name="", engine="fake"),
        ModelSpec(name="bad\x1b[2J", engine="fake"),
        ModelSpec(name="x" * 257, engine="fake"),
        ModelSpec(name="m", engine="other"),
        ModelSpec(name="m"),
        ModelSpec(name="m", engine="fake", stop_timeout=-1),
        ModelSpec(name="m", engine="fake", aliases=("m",)),
        ModelSpec(name="n", engine="fake", aliases=("taken",)),
    ],
)
def test_a_wrong_spec_is_refused_before_anything_runs(spec: ModelSpec) -> None:
    with pytest.raises(BadRequest):
        Herd([fake("taken"), spec])


def test_wrong_limits_and_unknown_transports_are_refused() -> None:
    with pytest.raises(BadRequest, match="models_max"):
        Herd(models_max=-1)
    with pytest.raises(BadRequest, match="stop_timeout"):
        Herd(stop_timeout=float("nan"))
    with pytest.raises(UnknownTransport, match="pipe, zmq, stdio"):
        Herd(transport="carrier pigeon")


def test_a_pool_that_drains_finishes_what_it_has_and_refuses_what_is_new(tmp_path: Path) -> None:
    gate = tmp_path / "gate"

    async def scene() -> None:
        async with Herd([fake("m", n_parallel=1, step_gate=str(gate), gate_at=1)]) as pool:
            running, waiting = pool.complete("m", "one two"), pool.complete("m", "three four")
            assert (await anext(running)).text == "one"
            draining = asyncio.ensure_future(pool.drain())
            await asyncio.sleep(0)
            with pytest.raises(PoolClosed):
                pool.complete("m", "hello")
            gate.touch()
            assert [piece.text async for piece in running] == [" two", ""]
            assert (await waiting.collect()).text == "three four"
            await draining
            assert pool.status("m").state is State.UNLOADED

    run(scene())


def test_a_pool_that_drains_waits_no_longer_than_it_is_told() -> None:
    async def scene() -> None:
        async with Herd([fake("m", pieces=("x",), repeat=10**6, step_seconds=0.001)]) as pool:
            running = pool.complete("m", "go")
            await anext(running)
            with pytest.raises(BadRequest, match="limit"):
                await pool.drain(-1.0)
            await pool.drain(0.05)
            assert pool.status("m").pid is None
            with pytest.raises(PoolClosed):
                async for _ in running:
                    pass

    run(scene())


def test_a_pool_without_requests_drains_at_once() -> None:
    async def scene() -> None:
        async with Herd([fake("m")]) as pool:
            await pool.load("m")
            await pool.drain(3600)
            assert pool.status("m").pid is None

    run(scene())


def test_a_closed_pool_refuses_and_fails_what_it_held() -> None:
    async def scene() -> None:
        pool = Herd([fake("m", pieces=("x",), repeat=10**6, step_seconds=0.001), fake("other")], models_max=1)
        async with pool:
            running, waiting = pool.complete("m", "go"), pool.complete("other", "go")
            await anext(running)
        with pytest.raises(PoolClosed):
            async for _ in running:
                pass
        with pytest.raises(PoolClosed):
            await waiting.collect()
        with pytest.raises(PoolClosed):
            pool.complete("m", "hello")
        with pytest.raises(PoolClosed):
            async with pool:
                pass
        assert [status.state for status in pool.models()] == [State.UNLOADED, State.UNLOADED]

    run(scene())
