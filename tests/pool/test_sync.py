"""The pool without async: the same answers and errors, from any thread, and nothing left when it closes."""

import asyncio
import gc
import inspect
import itertools
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from herding import TRANSPORTS, fake, wait_gone
from llamaherd.pool import (
    BadRequest,
    Completion,
    LoadFailed,
    ModelBusy,
    ModelNotFound,
    ModelNotLoaded,
    Pool,
    PoolClosed,
    PoolError,
    State,
    SyncGeneration,
    SyncPool,
    WorkerFailed,
)
from llamaherd.pool.sync_map import MapPrompt
from llamaherd.pool.sync_stream import MAX_AHEAD
from llamaherd.transport.errors import ChannelError
from patience import holds_within

QUESTION = [{"role": "user", "content": "one two three"}]
DEADLINE = 20.0
ENDLESS: dict[str, Any] = {"pieces": ("x",), "repeat": 10**6, "step_seconds": 0.001}


def until(holds: Callable[[], bool]) -> None:
    """Wait until something holds, or fail at the deadline."""
    assert holds_within(DEADLINE, holds), "still not so"


def threads_beyond(before: set[threading.Thread]) -> set[threading.Thread]:
    """Return the threads that have come since; those of other tests may end meanwhile."""
    return set(threading.enumerate()) - before


def answers(results: Iterator[Completion]) -> list[str]:
    return [result.text for result in results]


# --- answers ---


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_chat_streams_its_answer_and_ends_with_a_reason(transport: str) -> None:
    with SyncPool([fake("m")], transport=transport) as pool:
        pieces = list(pool.chat("m", QUESTION))

        assert [piece.text for piece in pieces] == ["one", " two", " three", ""]
        assert pieces[-1].finish_reason == "stop"


def test_a_whole_answer_is_collected_at_once_or_after_its_first_piece() -> None:
    with SyncPool([fake("m")]) as pool:
        whole = pool.complete("m", "one two three", max_tokens=2).collect()
        generation = pool.complete("m", "one two three")
        first = next(generation)
        rest = generation.collect()

        assert (whole.text, whole.finish_reason, whole.usage.completion_tokens) == ("one two", "length", 2)
        assert (first.text, rest.text, rest.tokens, rest.usage.completion_tokens) == ("one", " two three", (1, 2), 3)
        assert list(generation) == []
        assert (generation.ended, repr(generation)) == (True, "<SyncGeneration of m ended>")


def test_a_reader_that_lags_gets_all_the_text_and_holds_up_nobody() -> None:
    words = " ".join(str(number) for number in range(20 * MAX_AHEAD))

    with SyncPool([fake("m")]) as pool:
        slow = pool.complete("m", words)
        said = next(slow).text
        assert pool.complete("m", words).collect().text == words
        until(lambda: slow.ended)
        assert said + "".join(piece.text for piece in slow) == words


def test_everything_that_a_pool_can_do_is_there_with_the_same_signature() -> None:
    def surface(owner: type) -> dict[str, dict[str, object]]:
        return {
            name: {
                parameter.name: (parameter.kind, parameter.default, parameter.annotation)
                for parameter in inspect.signature(member).parameters.values()
            }
            for name, member in inspect.getmembers(owner, inspect.isfunction)
            if not name.startswith("_") or name == "__init__"
        }

    renamed, own = {"aclose": "close"}, {"open", "map"}
    expected = {renamed.get(name, name): parameters for name, parameters in surface(Pool).items()}
    assert {name: parameters for name, parameters in surface(SyncPool).items() if name not in own} == expected


def test_a_drained_pool_has_finished_what_it_had() -> None:
    with SyncPool([fake("m", step_seconds=0.001)]) as pool:
        generation = pool.complete("m", "one two three")
        pool.drain()
        assert generation.collect().text == "one two three"
        with pytest.raises(PoolClosed):
            pool.complete("m", "hello")


def test_models_are_loaded_asked_and_unloaded() -> None:
    with SyncPool([fake("m"), fake("n")]) as pool:
        assert [status.state for status in pool.models()] == [State.UNLOADED, State.UNLOADED]
        pid = pool.load("m").pid
        tokens = pool.tokenize("m", "né")
        assert (tokens, pool.detokenize("m", tokens)) == ([0x6E, 0xC3, 0xA9], "né")
        assert pool.apply_template("m", QUESTION) == "<user>one two three\n"
        assert (pool.logs("m"), pool.status("m").pid) == ((), pid)
        pool.start_sleep("m")
        until(lambda: pool.status("m").state is State.SLEEPING)
        assert pool.unload("m").state is State.UNLOADED
        pool.start_load("n")
        until(lambda: pool.status("n").state is State.LOADED)
        pool.start_unload("n")
        until(lambda: pool.status("n").state is State.UNLOADED)


def test_events_are_heard_until_the_listener_or_the_pool_closes() -> None:
    with SyncPool([fake("m")]) as pool:
        events, forever = pool.events(), pool.events()
        assert next(events).event == "snapshot"
        pool.load("m")
        assert [event.data.get("status") for event in itertools.islice(events, 1)] == ["loading"]
        with events:
            pass
        assert list(events) == []
        assert next(forever).event == "snapshot"
        with ThreadPoolExecutor(1) as threads:
            heard = threads.submit(list, forever)
            until(lambda: pool.status("m").state is State.LOADED)
            pool.close()
            heard.result(DEADLINE)


def test_errors_are_the_pools_own() -> None:
    with SyncPool([fake("m", load="fail"), fake("n", fail_at=1)]) as pool:
        with pytest.raises(ModelNotFound):
            pool.chat("nobody", QUESTION)
        with pytest.raises(BadRequest, match="max_tokens"):
            pool.complete("m", "hello", max_tokens=-2)
        with pytest.raises(ModelNotLoaded):
            pool.complete("m", "hello", autoload=False)
        with pytest.raises(ModelBusy):
            pool.unload("m")
        with pytest.raises(LoadFailed, match="cannot be loaded"):
            pool.load("m")
        generation = pool.complete("n", "one two")
        assert next(generation).text == "one"
        with pytest.raises(WorkerFailed):
            next(generation)
        assert list(generation) == []
        with pytest.raises(WorkerFailed):
            pool.complete("n", "one two").collect()


# --- leaving early ---


@pytest.mark.parametrize("leaving", ["break", "forget", "cancel", "with", "unread"])
def test_a_caller_that_leaves_frees_its_slot(leaving: str) -> None:
    with SyncPool([fake("m", n_parallel=1, **ENDLESS)]) as pool:
        if leaving == "break":
            for piece in pool.complete("m", "go"):
                assert piece.text == "x"
                break
        else:
            generation: SyncGeneration | None = pool.complete("m", "go")
            assert generation is not None
            if leaving != "unread":
                assert next(generation).text == "x"
            if leaving == "cancel":
                generation.cancel()
                assert list(generation) == []
            if leaving == "with":
                with generation:
                    pass
            generation = None
        gc.collect()
        until(lambda: pool.status("m").in_flight == 0)
        assert pool.complete("m", "go", max_tokens=1).collect().text == "x"


def test_cancelling_from_another_thread_ends_a_reader_that_waits(tmp_path: Path) -> None:
    with SyncPool([fake("m", load_gate=str(tmp_path / "gate"))]) as pool, ThreadPoolExecutor(2) as threads:
        streamed, collected = pool.complete("m", "one"), pool.complete("m", "two")
        reading = threads.submit(list, streamed)
        collecting = threads.submit(collected.collect)
        until(lambda: pool.status("m").queued == 2)
        streamed.cancel()
        collected.cancel()
        assert reading.result(DEADLINE) == []
        assert isinstance(collecting.exception(DEADLINE), CancelledError)
        with pytest.raises(CancelledError):
            streamed.collect()
        assert pool.status("m").queued == 0


# --- threads ---


def test_many_threads_each_get_their_own_answers() -> None:
    def ask(number: int) -> list[str]:
        texts = [f"t{number} w{word} end" for word in range(5)]
        streamed = ["".join(piece.text for piece in pool.complete("m", text)) for text in texts[:3]]
        return [*streamed, *(pool.complete("m", text).collect().text for text in texts[3:])]

    with SyncPool([fake("m", n_parallel=8)]) as pool, ThreadPoolExecutor(24) as threads:
        for number, texts in enumerate(threads.map(ask, range(24))):
            assert texts == [f"t{number} w{word} end" for word in range(5)]


def test_closing_ends_what_every_thread_waits_for(tmp_path: Path) -> None:
    def attempt(call: Callable[[], object]) -> BaseException | None:
        try:
            call()
        except PoolClosed as error:
            return error
        return None

    pool = SyncPool([fake("m", load_gate=str(tmp_path / "gate"))]).open()
    calls: list[Callable[[], object]] = [
        lambda: pool.load("m"),
        lambda: list(pool.complete("m", "hello")),
        lambda: pool.complete("m", "hello").collect(),
        lambda: list(pool.map("m", ["hello"])),
    ]
    with ThreadPoolExecutor(len(calls)) as threads:
        ends = [threads.submit(attempt, call) for call in calls]
        until(lambda: pool.status("m").queued == len(calls))
        pool.close()
        assert [type(end.result(DEADLINE)) for end in ends] == [PoolClosed] * len(calls)


def test_it_works_where_another_loop_runs_already() -> None:
    async def cell() -> str:
        with SyncPool([fake("m")]) as pool:
            return "".join(piece.text for piece in pool.chat("m", QUESTION))

    assert asyncio.run(cell()) == "one two three"


def test_the_pools_own_thread_cannot_wait_for_itself() -> None:
    with SyncPool([fake("m")]) as pool:
        errors: list[BaseException] = []

        def wait_for_itself() -> None:
            for call in (pool.models, pool.close):
                try:
                    call()
                except RuntimeError as error:
                    errors.append(error)

        pool._loop.call(wait_for_itself)  # pyright: ignore[reportPrivateUsage]
        assert [str(error) for error in errors] == ["the thread that runs the pool cannot wait for the pool"] * 2


# --- opening and closing ---


def test_nothing_is_left_after_the_close() -> None:
    def fds() -> set[str]:
        return set(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else set()

    with SyncPool([fake("m")]):
        pass  # what is imported and opened once for all
    before, descriptors = set(threading.enumerate()), fds()
    with SyncPool([fake("m"), fake("n")]) as pool:
        pids = [status.pid for status in (pool.load("m"), pool.load("n")) if status.pid is not None]
        running = pool.complete("m", "hello")
        assert len(threads_beyond(before)) == 1
    assert wait_gone(pids, 0) == []
    assert threads_beyond(before) == set()
    assert fds() <= descriptors
    with pytest.raises(PoolClosed):
        running.collect()


def test_it_serves_only_while_it_is_open() -> None:
    pool = SyncPool([fake("m")])
    with pytest.raises(PoolClosed, match="not open"):
        pool.models()
    assert repr(pool) == "<SyncPool closed>"
    with pool:
        assert repr(pool) == "<SyncPool open>"
        results = pool.map("m", ["hello"])
        with pytest.raises(PoolClosed, match="once"):
            pool.open()
    pool.close()
    for call in (pool.models, pool.open, lambda: pool.complete("m", "hello"), lambda: next(results), pool.events):
        with pytest.raises(PoolClosed):
            call()
    unopened = SyncPool()
    unopened.close()
    with pytest.raises(PoolClosed):
        unopened.open()


def test_wrong_arguments_are_refused_before_anything_runs() -> None:
    with pytest.raises(BadRequest, match="models_max"):
        SyncPool([fake("m")], models_max=-1)
    with pytest.raises(BadRequest, match="two models"):
        SyncPool([fake("m"), fake("m")])


def test_a_pool_that_cannot_open_says_why_and_leaves_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    before = set(threading.enumerate())
    monkeypatch.setenv("TMPDIR", "/nonexistent")
    monkeypatch.setattr("tempfile.tempdir", "/nonexistent")

    with pytest.raises((OSError, ChannelError)):
        SyncPool([fake("m")], transport="zmq").open()
    assert threads_beyond(before) == set()


def test_a_forgotten_pool_closes_but_not_while_it_is_read() -> None:
    before = set(threading.enumerate())
    pool: SyncPool | None = SyncPool([fake("m", **ENDLESS)]).open()
    assert pool is not None
    pid = pool.load("m").pid
    assert pid is not None
    generation: SyncGeneration | None = pool.complete("m", "go", max_tokens=3)
    assert generation is not None
    pool = None
    gc.collect()
    assert generation.collect().text == "xxx"
    generation = None
    gc.collect()
    assert wait_gone([pid], DEADLINE) == []
    until(lambda: threads_beyond(before) == set())


# --- programs of their own ---

PROGRAM = """
import sys, threading
from llamaherd.pool import EngineOptions, ModelSpec, SyncPool
script = {{"pieces": ("x",), "repeat": 10**6, "step_seconds": 0.001, **{script}}}
pool = SyncPool([ModelSpec(name="m", engine="fake", script=script)], stop_timeout=60).open()
print(pool.load("m").pid if "load_gate" not in script else 0, flush=True)
"""


@contextmanager
def start(program: str, **script: object) -> Generator["subprocess.Popen[str]"]:
    source = PROGRAM.format(script=script) + program
    with subprocess.Popen([sys.executable, "-P", "-c", source], stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def read_line(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.mark.parametrize(
    "work",
    [
        "for piece in generation: print('go', flush=True)",
        "next(generation); print('go', flush=True); generation.collect()",
        "print('go', flush=True); pool.complete('m', 'go').collect()",
        "print('go', flush=True); list(pool.map('m', ['a'] * 100))",
    ],
)
def test_an_interrupt_ends_any_wait_and_cancels_its_work(work: str) -> None:
    program = f"""
generation = pool.complete("m", "go")
try:
    {work}
except KeyboardInterrupt:
    del generation
    while pool.status("m").in_flight: pass
    print("free", flush=True)
pool.close()
print("closed", threading.active_count(), flush=True)
"""
    with start(program) as process:
        pid = int(read_line(process))
        assert read_line(process) == "go"
        process.send_signal(signal.SIGINT)
        assert process.stdout is not None
        lines = process.stdout.read().split("\n")
        assert process.wait(DEADLINE) == 0
    assert lines[-3:] == ["free", "closed 1", ""]
    assert wait_gone([pid], 0) == []


def test_an_interrupt_while_a_generation_is_made_leaves_none_behind() -> None:
    program = """
class Prompt(list):
    def __iter__(self):
        os.kill(os.getpid(), signal.SIGINT)  # read by the pool's thread, while the caller waits for its generation
        return super().__iter__()
try:
    kept = pool.complete("m", Prompt([1, 2, 3]))
    while True: pass
except KeyboardInterrupt:
    while pool.status("m").in_flight or pool.status("m").queued: pass
    print("free", flush=True)
pool.close()
"""
    with start("import os, signal\n" + program) as process:
        read_line(process)
        assert read_line(process) == "free"
        assert process.wait(DEADLINE) == 0


def test_an_interrupt_ends_a_load_and_the_program_ends_in_order(tmp_path: Path) -> None:
    program = """
def tell():
    while pool.status("m").pid is None: pass
    print(pool.status("m").pid, flush=True)
threading.Thread(target=tell).start()
try:
    pool.load("m")
except KeyboardInterrupt:
    print(pool.status("m").queued, flush=True)
"""
    with start(program, load_gate=str(tmp_path / "gate")) as process:
        read_line(process)
        pid = int(read_line(process))
        process.send_signal(signal.SIGINT)
        assert read_line(process) == "0"
        assert process.wait(DEADLINE) == 0, "it was not closed, and ends all the same"
    assert wait_gone([pid], 0) == []


def test_an_interrupted_close_kills_what_is_left_and_is_interrupted_then() -> None:
    program = """
import signal, time
def hurry():
    while pool.status("m").state != "stopping": pass
    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
threading.Thread(target=hurry).start()
try:
    pool.close()
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""
    with start(program, ignore_exit=True) as process:
        pid = int(read_line(process))
        assert read_line(process) == "interrupted"
        assert wait_gone([pid], 0) == []
        assert process.wait(DEADLINE) == 0


def test_a_program_that_ends_without_closing_leaves_nothing() -> None:
    program = """
def later():
    threading.main_thread().join()
    print(pool.complete("m", "go", max_tokens=2).collect().text, flush=True)
threading.Thread(target=later).start()
"""
    with start(program) as process:
        pid = int(read_line(process))
        assert read_line(process) == "xx", "its other threads are served to their end"
        assert process.wait(DEADLINE) == 0
    assert wait_gone([pid], 0) == []


# --- map ---


def test_map_yields_in_the_order_of_the_prompts() -> None:
    prompts = ["a " * (30 - number) + str(number) for number in range(30)]
    with SyncPool([fake("m", n_parallel=4)]) as pool:
        assert answers(pool.map("m", prompts)) == [" ".join(prompt.split()) for prompt in prompts]
        assert sorted(answers(pool.map("m", prompts, ordered=False, concurrency=7))) == sorted(
            " ".join(prompt.split()) for prompt in prompts
        )
        assert answers(pool.map("m", [])) == []


def test_map_takes_texts_tokens_and_conversations() -> None:
    with SyncPool([fake("m")]) as pool:
        mixed: list[MapPrompt] = ["one two", list(b"three four"), QUESTION]
        assert answers(pool.map("m", mixed, max_tokens=2)) == ["one two", "three four", "one two"]


def test_map_draws_lazily_from_an_endless_source_in_the_callers_thread() -> None:
    drawn: list[int] = []

    def prompts() -> Iterator[str]:
        for number in itertools.count():
            assert threading.current_thread() is threading.main_thread()
            drawn.append(number)
            yield f"n{number}"

    with SyncPool([fake("m", n_parallel=2)]) as pool:
        results = pool.map("m", prompts())
        assert drawn == []
        assert answers(itertools.islice(results, 10)) == [f"n{number}" for number in range(10)]
        assert len(drawn) <= 10 + 4 * 2 * 2
        results.close()
        until(lambda: pool.status("m").in_flight + pool.status("m").queued == 0)


def test_map_keeps_a_bounded_number_in_flight(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    with SyncPool([fake("m", n_parallel=2, load_gate=str(gate))]) as pool, ThreadPoolExecutor(1) as threads:
        for concurrency, expected in ((None, 4), (3, 3)):
            results = threads.submit(answers, pool.map("m", ["a"] * 10, concurrency=concurrency))
            until(lambda expected=expected: pool.status("m").queued == expected)  # type: ignore[misc]
            gate.touch()
            assert results.result(DEADLINE) == ["a"] * 10
            gate.unlink()
            pool.unload("m")


def test_leaving_map_early_cancels_the_rest() -> None:
    with SyncPool([fake("m", n_parallel=2, **ENDLESS)]) as pool:
        for result in pool.map("m", ["short", "long", "longer"], max_tokens=5):
            assert result.text == "xxxxx"
            break
        results = pool.map("m", ["a"] * 8)
        with ThreadPoolExecutor(1) as threads:
            waiting = threads.submit(next, results)
            until(lambda: pool.status("m").in_flight > 0)
            pool.unload("m")
            assert isinstance(waiting.exception(DEADLINE), WorkerFailed)
        until(lambda: pool.status("m").in_flight + pool.status("m").queued == 0)


def test_a_failing_prompt_raises_where_its_result_would_be() -> None:
    prompts = ["one", "two", "\ud800", "four"]
    with SyncPool([fake("m")]) as pool:
        results = pool.map("m", prompts, concurrency=4)
        assert [next(results).text, next(results).text] == ["one", "two"]
        with pytest.raises(BadRequest, match="surrogate"):
            next(results)
        assert list(results) == []

        outcomes = list(pool.map("m", prompts, errors="return"))
        assert [isinstance(outcome, PoolError) for outcome in outcomes] == [False, False, True, False]


def test_a_failing_source_of_prompts_cancels_the_rest() -> None:
    def prompts() -> Iterator[str]:
        yield "go"
        raise LookupError("no more")

    with SyncPool([fake("m", **ENDLESS)]) as pool:
        with pytest.raises(LookupError):
            next(pool.map("m", prompts()))
        until(lambda: pool.status("m").in_flight + pool.status("m").queued == 0)


def test_map_tells_its_progress(capsys: pytest.CaptureFixture[str]) -> None:
    told: list[tuple[int, int | None]] = []
    with SyncPool([fake("m")]) as pool:
        list(pool.map("m", ["a", "b"], progress=lambda done, total: told.append((done, total))))
        list(pool.map("m", iter(["a"]), progress=lambda done, total: told.append((done, total))))
        assert told == [(1, 2), (2, 2), (1, None)]
        assert answers(pool.map("m", ["a", "b"], progress=True)) == ["a", "b"]
    assert capsys.readouterr().err == ""


def test_map_draws_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    before = set(threading.enumerate())
    with SyncPool([fake("m")]) as pool:
        for _ in pool.map("m", ["a", "b"], progress=True):
            assert len(threads_beyond(before)) == 1
    assert "2/2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [({"concurrency": 0}, "concurrency"), ({"concurrency": True}, "concurrency"), ({"errors": "ignore"}, "errors")],
)
def test_wrong_arguments_of_map_are_said_at_once(wrong: dict[str, object], complaint: str) -> None:
    with SyncPool([fake("m")]) as pool:
        with pytest.raises(BadRequest, match=complaint):
            pool.map("m", ["a"], **wrong)  # type: ignore[call-overload]
        with pytest.raises(ModelNotFound):
            pool.map("nobody", ["a"])
