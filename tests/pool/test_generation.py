"""A generation hands out what it is fed, ends once, and cancels when its caller leaves."""

import asyncio
import gc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from herding import run
from llamaherd.pool import Generation, TokenProb, TokenProbs, WorkerFailed
from llamaherd.pool.generation import MAX_WAITING_PIECES
from llamaherd.transport.messages import CallDelta, Delta, Done, TypedDelta, Usage

DONE = Done(request=1, finish_reason="stop", usage=Usage(completion_tokens=3))


class Caller:
    """Counts how often the work was cancelled."""

    def __init__(self) -> None:
        self.cancelled = 0
        self.generation = Generation("m", self.on_cancel)

    def on_cancel(self) -> None:
        self.cancelled += 1


def test_pieces_come_in_order_and_the_last_has_the_reason() -> None:
    async def scene() -> None:
        caller = Caller()
        for word in ("a", "b"):
            caller.generation.feed(Delta(1, word, (7,)))
        caller.generation.finish(DONE)
        pieces = [piece async for piece in caller.generation]
        assert [piece.text for piece in pieces] == ["a", "b", ""]
        assert [piece.finish_reason for piece in pieces] == [None, None, "stop"]
        assert repr(caller.generation) == "<Generation of m ended, 0 pieces waiting>"

    run(scene())


@given(st.lists(st.tuples(st.integers(0, 200), st.integers(0, 100)), max_size=12))
def test_a_reader_at_any_pace_gets_every_piece_in_its_order(turns: list[tuple[int, int]]) -> None:
    async def scene() -> None:
        generation = Caller().generation
        written: list[str] = []
        read: list[str] = []
        for feeds, reads in turns:
            for _ in range(feeds):
                written.append(f"{len(written)} ")
                generation.feed(Delta(1, written[-1]))
            for _ in range(reads):
                if len("".join(read)) < len("".join(written)):
                    read.append((await anext(generation)).text)
        generation.finish(DONE)
        read += [piece.text async for piece in generation]
        assert "".join(read) == "".join(written)

    run(scene())


def test_a_waiting_reader_is_woken() -> None:
    async def scene() -> None:
        caller = Caller()
        reading = asyncio.ensure_future(anext(caller.generation))
        await asyncio.sleep(0)
        caller.generation.feed(Delta(1, "late"))
        assert (await reading).text == "late"

    run(scene())


def test_what_came_before_an_error_is_delivered_before_it_and_the_error_once() -> None:
    async def scene() -> None:
        generation = Caller().generation
        generation.feed(Delta(1, "a"))
        generation.fail(WorkerFailed("broken"))
        assert (await anext(generation)).text == "a"
        with pytest.raises(WorkerFailed):
            await anext(generation)
        with pytest.raises(StopAsyncIteration):
            await anext(generation)

    run(scene())


@given(st.lists(st.text(max_size=5), max_size=3 * MAX_WAITING_PIECES))
@settings(deadline=None, derandomize=True, max_examples=50)
def test_a_reader_that_lags_gets_all_the_text_in_few_pieces(words: list[str]) -> None:
    async def scene() -> None:
        generation = Caller().generation
        for number, word in enumerate(words):
            generation.feed(Delta(1, word, (number,)))
        generation.finish(DONE)
        pieces = [piece async for piece in generation]
        assert len(pieces) <= MAX_WAITING_PIECES + 1
        assert "".join(piece.text for piece in pieces) == "".join(words)
        assert [token for piece in pieces for token in piece.tokens] == list(range(len(words)))

    run(scene())


def test_cancelling_drops_what_waits_and_tells_the_pool_once() -> None:
    async def scene() -> None:
        caller = Caller()
        caller.generation.feed(Delta(1, "a"))
        caller.generation.cancel()
        await caller.generation.aclose()
        assert caller.cancelled == 1
        assert [piece async for piece in caller.generation] == []

    run(scene())


def test_an_ended_generation_has_nothing_to_cancel() -> None:
    async def scene() -> None:
        caller = Caller()
        caller.generation.finish(DONE)
        caller.generation.cancel()
        assert caller.cancelled == 0
        assert (await anext(caller.generation)).finish_reason == "stop"

    run(scene())


def test_a_forgotten_generation_is_cancelled_on_the_loop_and_not_by_the_collector() -> None:
    async def scene() -> None:
        cancelled: list[int] = []
        generation: Generation | None = Generation("m", lambda: cancelled.append(1))
        assert generation is not None
        generation = None
        gc.collect()
        assert cancelled == []
        await asyncio.sleep(0)
        assert cancelled == [1]

    run(scene())


def test_collect_returns_the_whole_answer() -> None:
    async def scene() -> None:
        generation = Caller().generation
        generation.feed(Delta(1, "a", (1,)))
        generation.feed(Delta(1, "b", (2,)))
        generation.finish(DONE)
        answer = await generation.collect()
        assert (answer.text, answer.tokens, answer.finish_reason) == ("ab", (1, 2), "stop")
        assert answer.usage.completion_tokens == 3

    run(scene())


def test_leaving_the_block_early_cancels() -> None:
    async def scene() -> None:
        caller = Caller()
        async with caller.generation:
            pass
        assert caller.cancelled == 1

    run(scene())


def test_probabilities_follow_their_tokens_even_to_a_slow_reader() -> None:
    async def scene() -> None:
        caller = Caller()
        fed = [TokenProbs(TokenProb(number, -1.0, b"a")) for number in range(MAX_WAITING_PIECES + 5)]
        for number, probs in enumerate(fed):
            caller.generation.feed(Delta(1, "a", (number,), (probs,)))
        caller.generation.finish(DONE)
        whole = await caller.generation.collect()
        assert whole.probs == tuple(fed)
        assert whole.tokens == tuple(range(len(fed)))

    run(scene())


def test_calls_and_reasoning_are_whole_even_for_a_slow_reader() -> None:
    async def scene() -> None:
        for ahead in (0, MAX_WAITING_PIECES):
            generation = Caller().generation
            for number in range(ahead):
                generation.feed(Delta(1, "a", (number,)))
            generation.feed(TypedDelta(1, "", (1,), (), "Hm. "))
            generation.feed(TypedDelta(1, "b", (2,), (), "So.", (CallDelta(0, '{"x"', "id0", "f"),)))
            generation.feed(TypedDelta(1, "", (3,), (), "", (CallDelta(0, ": 1}"), CallDelta(1, "{}", "id1", "g"))))
            generation.finish(Done(request=1, finish_reason="tool_calls"))
            answer = await generation.collect()
            assert answer.text == "a" * ahead + "b"
            assert answer.reasoning == "Hm. So."
            calls = [(call.id, call.name, call.arguments) for call in answer.tool_calls]
            assert calls == [("id0", "f", '{"x": 1}'), ("id1", "g", "{}")]
            assert answer.finish_reason == "tool_calls"

    run(scene())


def test_tokens_of_reasoning_are_counted_however_slow_the_reader() -> None:
    async def scene() -> None:
        for ahead in (0, MAX_WAITING_PIECES):
            generation = Caller().generation
            for number in range(ahead):
                generation.feed(TypedDelta(1, "", (number,), (), "Hm "))
            generation.feed(TypedDelta(1, "", (1, 2), (), "so."))
            generation.feed(TypedDelta(1, "text", (3,)))
            generation.feed(Delta(1, "more", (4,)))
            generation.finish(DONE)
            assert (await generation.collect()).reasoning_tokens == ahead + 2

    run(scene())
