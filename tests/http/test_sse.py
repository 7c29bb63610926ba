"""Server-sent events: the framing, and what a stream does in its beginning, its silences and its end."""

import asyncio
import json
from collections import deque
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.types import Message, Scope

from llamaherd.http.sse import COMMENT, EventStream, FrameSource, frame

TEXT = st.text(st.characters(exclude_categories=["Cs"]))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)


def read_events(stream: bytes) -> list[dict[str, str]]:
    """Return the fields of each event, read as the specification says: lines end with CR, LF or both."""
    events: list[dict[str, str]] = []
    fields: dict[str, str] = {}
    for line in stream.decode().replace("\r\n", "\n").replace("\r", "\n").split("\n"):
        name, _, value = line.partition(":")
        if line and name:
            fields[name] = value.removeprefix(" ")
        elif not line and fields:
            events.append(fields)
            fields = {}
    return events


@given(st.lists(st.tuples(JSON, st.none() | st.integers(0, 2**63)), max_size=5))
def test_whatever_the_data_each_frame_is_read_as_one_event(sent: list[tuple[Any, int | None]]) -> None:
    stream = b"".join(frame(data, number=number) + COMMENT for data, number in sent)
    read = [(json.loads(event["data"]), event.get("id")) for event in read_events(stream)]
    assert read == [(data, None if number is None else str(number)) for data, number in sent]


class Source(FrameSource):
    """Gives the frames that it is told to; an exception among them is raised."""

    def __init__(self, *frames: bytes | Exception, ends: bool = True) -> None:
        self._frames = deque(frames)
        self._ends = ends
        self.waiting = asyncio.Event()
        self.closed = False

    async def __anext__(self) -> bytes:
        if not self._frames:
            if self._ends:
                raise StopAsyncIteration
            self.waiting.set()
            await asyncio.Event().wait()
        item = self._frames.popleft()
        if isinstance(item, Exception):
            raise item
        return item

    def feed(self, chunk: bytes) -> None:
        self._frames.append(chunk)

    async def aclose(self) -> None:
        self.closed = True


class Client:
    """Both ends of one ASGI request."""

    def __init__(self, method: str = "GET") -> None:
        self.scope: Scope = {"type": "http", "method": method}
        self.messages: list[Message] = []
        self.got_body = asyncio.Event()
        self.gone = asyncio.Event()

    async def receive(self) -> Message:
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        self.messages.append(message)
        if message.get("body"):
            self.got_body.set()

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.messages)

    @property
    def complete(self) -> bool:
        return bool(self.messages) and self.messages[-1].get("more_body") is False


def stream_of(source: Source, ping: float | None = None) -> EventStream:
    return EventStream(source, ping=ping, on_error=lambda error: frame({"error": str(error)}))


def test_frames_are_passed_on_and_the_stream_is_ended() -> None:
    async def main() -> Client:
        client, source = Client(), Source(b"one", b"two")
        await stream_of(source)(client.scope, client.receive, client.send)
        assert source.closed
        return client

    client = asyncio.run(main())
    assert client.body == b"onetwo"
    assert client.complete
    headers = dict(client.messages[0]["headers"])
    assert headers[b"content-type"] == b"text/event-stream"
    assert headers[b"cache-control"] == b"no-cache"
    assert headers[b"x-accel-buffering"] == b"no"
    assert b"content-length" not in headers


def test_a_source_without_frames_is_an_empty_stream() -> None:
    async def main() -> Client:
        client = Client()
        await stream_of(Source())(client.scope, client.receive, client.send)
        return client

    client = asyncio.run(main())
    assert client.body == b""
    assert client.complete


def test_an_error_before_the_first_frame_can_still_be_a_status() -> None:
    async def main() -> None:
        client, source = Client(), Source(ValueError("early"))
        with pytest.raises(ValueError, match="early"):
            await stream_of(source)(client.scope, client.receive, client.send)
        assert client.messages == []
        assert source.closed

    asyncio.run(main())


def test_an_error_after_the_first_frame_is_the_last_frame() -> None:
    async def main() -> Client:
        client = Client()
        await stream_of(Source(b"one\n\n", ValueError("late")))(client.scope, client.receive, client.send)
        return client

    client = asyncio.run(main())
    assert client.body == b'one\n\ndata: {"error":"late"}\n\n'
    assert client.complete


def test_silence_begins_the_stream_with_comments() -> None:
    async def main() -> None:
        client, source = Client(), Source(ends=False)
        running = asyncio.ensure_future(stream_of(source, ping=0.001)(client.scope, client.receive, client.send))
        await client.got_body.wait()
        assert client.body.startswith(COMMENT)
        client.gone.set()
        await running

    asyncio.run(main())


def test_nothing_is_lost_between_comments() -> None:
    async def main() -> bytes:
        client, source = Client(), Source(ends=False)
        running = asyncio.ensure_future(stream_of(source, ping=0.001)(client.scope, client.receive, client.send))
        for number in range(20):
            source.feed(b"%d " % number)
            for _ in range(2):  # at least one comment goes in between
                client.got_body.clear()
                await client.got_body.wait()
        client.gone.set()
        await running
        return client.body.replace(COMMENT, b"")

    assert asyncio.run(main()).split() == [b"%d" % number for number in range(20)]


def test_a_client_that_leaves_closes_the_source() -> None:
    async def main() -> None:
        client, source = Client(), Source(b"one", ends=False)
        running = asyncio.ensure_future(stream_of(source)(client.scope, client.receive, client.send))
        await source.waiting.wait()
        client.gone.set()
        await running
        assert source.closed
        assert not client.complete

    asyncio.run(main())


def test_a_cancelled_stream_closes_the_source() -> None:
    async def main() -> None:
        client, source = Client(), Source(ends=False)
        running = asyncio.ensure_future(stream_of(source)(client.scope, client.receive, client.send))
        await source.waiting.wait()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert source.closed

    asyncio.run(main())


def test_head_gets_the_headers_and_no_stream() -> None:
    async def main() -> None:
        client, source = Client("HEAD"), Source(ends=False)
        await stream_of(source)(client.scope, client.receive, client.send)
        assert client.complete
        assert source.closed

    asyncio.run(main())
