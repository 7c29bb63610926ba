"""Pushed streams: whatever the client's pace, it gets every frame once and in order, then the end or the error."""

import asyncio
import json
from collections.abc import Sequence
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.types import Message

from llamaherd.http.chat import ChatAnswer
from llamaherd.http.connection import DIRECT
from llamaherd.http.delivery import Chunks
from llamaherd.http.sse import EventStream
from llamaherd.http.tally import Meter, Tally
from llamaherd.http.turn import Turn
from llamaherd.pool import Generation, WorkerFailed
from llamaherd.transport.messages import Delta, Done, TypedDelta, Usage
from patience import patience

DONE = Done(request=1, finish_reason="stop", usage=Usage(completion_tokens=3))


class Client:
    """Reads a stream. ``refusals`` say in turn whether a part that is pushed has to go the usual way."""

    def __init__(self, refusals: Sequence[bool] = ()) -> None:
        self.refusals = list(refusals)
        self.body = b""
        self.pushed = 0
        self.sent = 0
        self.complete = False
        self.left = asyncio.Event()
        self.scope: dict[str, Any] = {"type": "http", "method": "POST", DIRECT: self.write}

    def write(self, part: bytes) -> bool:
        if self.refusals and self.refusals.pop(0):
            return False
        self.pushed += 1
        self.body += part
        return True

    async def receive(self) -> Message:
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        await asyncio.sleep(0)  # as a lagging client has it
        self.sent += 1
        self.body += message.get("body", b"")
        self.complete = message.get("more_body") is False

    @property
    def texts(self) -> str:
        events = [line[6:] for line in self.body.decode().splitlines() if line.startswith("data: {")]
        deltas = [choice["delta"] for event in events for choice in json.loads(event).get("choices", ())]
        return "".join(delta.get("reasoning_content", "") + (delta.get("content") or "") for delta in deltas)


class Clocked(asyncio.SelectorEventLoop):
    """A loop whose time the test makes."""

    def __init__(self) -> None:
        self.now = 0.0
        super().__init__()

    def time(self) -> float:
        return self.now


def stream_of(works: Sequence[Generation], ping: float | None = None) -> EventStream:
    answer = ChatAnswer("m")
    chunks = Chunks([Meter(work, Tally()) for work in works], answer, Turn(), include_usage=False)
    return EventStream(chunks, ping=ping, on_error=answer.error_frame)


async def turns(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


@given(
    st.lists(st.tuples(st.text(max_size=3), st.booleans(), st.integers(0, 6)), max_size=30),
    st.lists(st.booleans(), max_size=30),
    st.booleans(),
)
@settings(deadline=None)
def test_a_client_at_any_pace_gets_every_frame_once_and_in_order(
    fed: list[tuple[str, bool, int]], refusals: list[bool], fails: bool
) -> None:
    async def scene() -> None:
        client, work = Client(refusals), Generation("m", lambda: None)
        running = asyncio.ensure_future(stream_of([work])(client.scope, client.receive, client.send))
        await turns(3)
        for text, reasons, pause in fed:
            work.feed(TypedDelta(1, "", (1,), (), text) if reasons else Delta(1, text, (1,)))
            await turns(pause)
        if fails:
            work.feed(Delta(1, "last", (1,)))
            work.fail(WorkerFailed("broken"))
        else:
            work.finish(DONE)
        async with patience(10):
            await running
        assert client.texts == "".join(text for text, _, _ in fed) + ("last" if fails else "")
        assert client.complete
        assert client.body.endswith(b"data: [DONE]\n\n") != fails
        assert (b'"message":"broken"' in client.body) == fails

    asyncio.run(scene())


@given(
    st.lists(st.tuples(st.text(max_size=3), st.integers(0, 5), st.booleans(), st.integers(0, 5)), max_size=20),
    st.lists(st.booleans(), max_size=20),
    st.sampled_from(["ends", "fails", "is left"]),
)
@settings(deadline=None)
def test_a_comment_that_comes_due_in_any_turn_costs_no_frame_and_no_end(
    fed: list[tuple[str, int, bool, int]], refusals: list[bool], end: str
) -> None:
    loop = Clocked()

    async def scene() -> None:
        client, cancelled = Client(refusals), list[int]()
        work = Generation("m", lambda: cancelled.append(1))
        running = asyncio.ensure_future(stream_of([work], ping=1.0)(client.scope, client.receive, client.send))
        for text, before, silent, after in fed:
            await turns(before)
            if silent:
                loop.now += 1.5  # in the next turn the reader is woken for a comment
            await turns(after)
            work.feed(Delta(1, text, (1,)))
        if end == "ends":
            work.finish(DONE)
        elif end == "fails":
            work.fail(WorkerFailed("broken"))
        else:
            client.left.set()
        for _ in range(100):  # no time passes any more, so nothing but what is woken goes on
            if running.done():
                break
            await asyncio.sleep(0)
        assert running.done(), "nobody woke the reader"
        if end == "is left":
            assert cancelled == [1]
            return
        assert client.texts == "".join(text for text, *_ in fed)
        assert client.complete or not client.sent
        assert (running.exception() is None) == (end == "ends" or client.sent > 0)

    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        runner.run(scene())


def test_choices_begin_in_their_order_whichever_speaks_first() -> None:
    async def scene() -> None:
        client, works = Client(), [Generation("m", lambda: None) for _ in range(3)]
        running = asyncio.ensure_future(stream_of(works)(client.scope, client.receive, client.send))
        for work in (works[1], works[2], works[0]):
            work.feed(Delta(1, "x", (1,)))
            await turns(4)
        for work in works:
            work.finish(DONE)
        await running
        events = [json.loads(line[6:]) for line in client.body.decode().splitlines() if line.startswith("data: {")]
        choices = [event["choices"][0] for event in events if event["choices"]]
        assert [choice["index"] for choice in choices if "role" in choice["delta"]] == [0, 1, 2]
        spoken: set[int] = set()
        for choice in choices:
            assert choice["index"] in spoken or "role" in choice["delta"]
            spoken.add(choice["index"])

    asyncio.run(scene())


def test_after_its_first_part_a_stream_is_pushed() -> None:
    async def scene() -> None:
        client, work = Client(), Generation("m", lambda: None)
        running = asyncio.ensure_future(stream_of([work])(client.scope, client.receive, client.send))
        for _ in range(20):
            work.feed(Delta(1, "x", (1,)))
            await turns(4)
        work.finish(DONE)
        await running
        assert client.texts == "x" * 20
        assert client.pushed >= 19
        assert client.sent <= 3  # the head, the first part, the end

    asyncio.run(scene())


def test_what_one_turn_brings_is_one_write() -> None:
    async def scene() -> None:
        client, work = Client(), Generation("m", lambda: None)
        running = asyncio.ensure_future(stream_of([work])(client.scope, client.receive, client.send))
        work.feed(Delta(1, "first", (1,)))
        await turns(5)
        for _ in range(10):
            work.feed(Delta(1, "x", (1,)))
        await turns(3)
        assert client.pushed == 1
        assert client.texts == "first" + "x" * 10
        work.finish(DONE)
        await running

    asyncio.run(scene())


def test_answers_side_by_side_are_pushed_each_under_its_index() -> None:
    async def scene() -> None:
        client = Client()
        works = [Generation("m", lambda: None) for _ in range(3)]
        running = asyncio.ensure_future(stream_of(works)(client.scope, client.receive, client.send))
        for number in range(5):
            for index, work in enumerate(works):
                work.feed(Delta(1, f"{index}", (number,)))
            await turns(2)
        for work in works:
            work.finish(DONE)
        await running
        texts = ["", "", ""]
        for line in client.body.decode().splitlines():
            if line.startswith("data: {"):
                choice = json.loads(line[6:])["choices"][0]
                texts[choice["index"]] += choice["delta"].get("content") or ""
        assert texts == ["00000", "11111", "22222"]

    asyncio.run(scene())


def test_a_client_that_leaves_ends_the_work_of_a_pushed_stream() -> None:
    async def scene() -> None:
        cancelled: list[int] = []
        client, work = Client(), Generation("m", lambda: cancelled.append(1))
        running = asyncio.ensure_future(stream_of([work])(client.scope, client.receive, client.send))
        work.feed(Delta(1, "x", (1,)))
        await turns(5)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        assert cancelled == [1]

    asyncio.run(scene())
