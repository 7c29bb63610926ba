"""A client that stays and reads nothing of its answer is cut off; one that reads slowly is not."""

import asyncio
import contextlib
import json
import select
import socket
from collections.abc import Callable, Generator

import pytest
import uvloop

from live_front import DEADLINE, LiveFront, fake, say
from llamaherd.http.limits import Limits
from llamaherd.http.outflow import Outflow

CHAT = "/v1/chat/completions"
#: More than the kernel's buffers and the server's take.
LARGE = "word " * 1_200_000
IMPATIENT = {"limits": Limits(send_seconds=0.2)}
LOOPS = pytest.mark.parametrize("loop_factory", [asyncio.new_event_loop, uvloop.new_event_loop])


@contextlib.contextmanager
def asking(front: LiveFront, *bodies: dict[str, object]) -> Generator[socket.socket]:
    """Send chats on one connection with a small window, and read nothing."""
    port = int(front.url.rsplit(":", 1)[1])
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(DEADLINE)
        connection.connect(("127.0.0.1", port))
        for body in bodies:
            raw = json.dumps(body).encode()
            head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(raw)}\r\n\r\n"
            connection.sendall(head.encode() + raw)
        yield connection


def wait_for_reset(connection: socket.socket) -> None:
    """Wait until the server has cut the connection off; nothing is read of it."""
    waiting = select.poll()
    waiting.register(connection, 0)
    assert waiting.poll(DEADLINE * 1000), "the connection is still there"


@LOOPS
def test_a_stream_that_nobody_reads_is_ended_and_its_slot_is_free(
    loop_factory: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    talker = fake("talker", pieces=("word " * 200,), repeat=1_000_000, step_seconds=0.001)
    with LiveFront(talker, loop_factory=loop_factory, server=IMPATIENT) as front:
        with asking(front, say("hi", model="talker", stream=True)) as connection:
            wait_for_reset(connection)
            front.wait_for_requests("talker", 0)
        with front.client() as client:
            assert client.post(CHAT, json=say("hi", model="talker", max_tokens=1)).status_code == 200


@LOOPS
@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_has_ended_and_lies_unread_does_not_hold_its_connection(
    stream: bool, loop_factory: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    talker = fake("talker", pieces=(LARGE,))
    with (
        LiveFront(talker, loop_factory=loop_factory, server=IMPATIENT) as front,
        asking(front, say("hi", model="talker", stream=stream)) as connection,
    ):
        assert connection.recv(10)
        wait_for_reset(connection)


def test_requests_behind_an_answer_that_nobody_reads_go_with_it() -> None:
    talker = fake("talker", pieces=(LARGE,))
    with (
        LiveFront(talker, server=IMPATIENT) as front,
        asking(front, say("hi", model="talker"), say("again", model="talker")) as connection,
    ):
        wait_for_reset(connection)
        front.wait_for_requests("talker", 0)


@LOOPS
def test_a_client_that_reads_now_and_then_is_not_cut_off(
    loop_factory: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    answer = b"word " * 200_000

    async def main() -> None:
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        loop = asyncio.get_running_loop()
        _, writer = await asyncio.open_connection(sock=ours)
        outflow = Outflow(writer.transport, 60)
        writer.write(answer)
        await asyncio.sleep(0)
        now, received = 0.0, 0
        outflow.look(now)
        left = writer.transport.get_write_buffer_size()
        while left:
            now += 59
            outflow.look(now)
            assert not writer.is_closing()
            while writer.transport.get_write_buffer_size() == left:
                received += len(await loop.sock_recv(theirs, 1000))
                await asyncio.sleep(0)
            left = writer.transport.get_write_buffer_size()
        outflow.look(now)
        writer.write(b"the end")
        await writer.drain()
        writer.close()
        while chunk := await loop.sock_recv(theirs, 65536):
            received += len(chunk)
        theirs.close()
        assert received == len(answer) + len(b"the end")

    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(main())


@LOOPS
def test_what_lies_longer_than_the_limit_ends_the_connection_and_no_sooner(
    loop_factory: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    async def main() -> None:
        ours, theirs = socket.socketpair()
        _, writer = await asyncio.open_connection(sock=ours)
        outflow = Outflow(writer.transport, 60)
        outflow.look(0)
        outflow.look(1000)
        assert not writer.is_closing(), "nothing waits"
        writer.write(b"word " * 200_000)
        await asyncio.sleep(0)
        for now in (1000, 1059):
            outflow.look(now)
            assert not writer.is_closing()
        outflow.look(1060)
        assert writer.is_closing()
        theirs.close()

    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(main())
