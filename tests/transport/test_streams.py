"""Pipe and stdio, with the test holding the worker's descriptors: half closes, torn and impossible records, leaks."""

import asyncio
import os
import socket
import sys
import threading
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager

import msgspec
import pytest

from llamaherd.transport import (
    CHANNEL_ENV,
    BrokenChannel,
    Channel,
    ChannelClosed,
    ChannelFull,
    ChildAddress,
    EndOfChannel,
    Endpoint,
    make_transport,
)
from llamaherd.transport.blocking import PipeWire, StreamChild
from llamaherd.transport.framing import from_child, from_pool
from llamaherd.transport.messages import Exit, State, Stats, Threads, Tokenize, Unknown
from llamaherd.transport.pipes import RecordFraming
from transport_harness import LOOPS, open_descriptors, read_all, run

on_both_loops = pytest.mark.parametrize("loop", LOOPS)
on_both_streams = pytest.mark.parametrize("name", ["pipe", "stdio"])


def ignore(data: bytes) -> None:
    del data


class Wire:
    """The worker's descriptors of one endpoint."""

    def __init__(self, name: str, endpoint: Endpoint) -> None:
        self.channel: Channel = endpoint.channel
        self.lifeline = os.dup(endpoint.stdin)
        if name == "pipe":
            self._input, self._output = map(os.dup, endpoint.pass_fds)
        else:
            assert endpoint.stdout is not None
            self._input, self._output = self.lifeline, os.dup(endpoint.stdout)
        self.name = name
        self._closed: set[int] = set()
        endpoint.spawned()

    def stats(self, number: int) -> bytes:
        body = b'{"rss_bytes":%d}' % number
        if self.name == "stdio":
            return b"\ncmd_child_to_router:stats:" + body + b"\n"
        return (len(body) + 6).to_bytes(4, "little") + b"\x05stats" + body

    def write(self, data: bytes) -> None:
        rest = data
        while rest:
            rest = rest[os.write(self._output, rest) :]

    def read(self) -> bytes:
        return os.read(self._input, 65536)

    def stop_writing(self) -> None:
        self._close(self._output)

    def stop_reading(self) -> None:
        self._close(self._input)

    def close(self) -> None:
        for fd in (self._output, self._input, self.lifeline):
            self._close(fd)

    def _close(self, fd: int) -> None:
        if fd not in self._closed:
            self._closed.add(fd)
            os.close(fd)


@asynccontextmanager
async def open_wire(name: str, on_log: Callable[[bytes], None] = ignore) -> AsyncGenerator[Wire]:
    transport = make_transport(name)
    await transport.open()
    wire = Wire(name, await transport.endpoint("m#1", on_log))
    try:
        yield wire
    finally:
        wire.close()
        await transport.aclose()


@on_both_streams
@on_both_loops
def test_a_worker_that_stops_writing_has_ended_the_channel(name: str, loop: str) -> None:
    async def main() -> None:
        async with open_wire(name) as wire:
            wire.write(wire.stats(1) + wire.stats(2))
            wire.stop_writing()
            received, ending = await read_all(wire.channel)
            assert received == [Stats(rss_bytes=1), Stats(rss_bytes=2)]
            assert isinstance(ending, EndOfChannel)
            with pytest.raises(EndOfChannel):
                wire.channel.send_nowait(Exit())

    run(loop, main())


@on_both_streams
@on_both_loops
def test_a_worker_that_stops_reading_can_still_be_heard(name: str, loop: str) -> None:
    async def main() -> None:
        async with open_wire(name) as wire:
            wire.stop_reading()
            wire.channel.send_nowait(Exit())
            with pytest.raises(EndOfChannel, match="closed its end"):
                wire.channel.send_nowait(Exit())
            wire.write(wire.stats(1))
            assert await wire.channel.receive() == [Stats(rss_bytes=1)]
            wire.stop_writing()
            assert isinstance((await read_all(wire.channel))[1], EndOfChannel)

    run(loop, main())


@on_both_streams
@on_both_loops
def test_a_worker_that_goes_while_a_sender_waits_ends_the_wait(name: str, loop: str) -> None:
    async def main() -> None:
        async with open_wire(name) as wire:
            with pytest.raises(ChannelFull):
                while True:
                    wire.channel.send_nowait(Tokenize(request=0, text="x" * 100_000))
            waiting = asyncio.create_task(wire.channel.send(Exit()))
            await asyncio.sleep(0)
            wire.stop_reading()
            with pytest.raises(EndOfChannel):
                await waiting

    run(loop, main())


@on_both_streams
@on_both_loops
def test_a_torn_last_record_is_a_broken_channel(name: str, loop: str) -> None:
    async def main(confirm: bool) -> None:
        async with open_wire(name) as wire:
            wire.write(wire.stats(1) + wire.stats(2)[:-3])
            if confirm:
                wire.channel.peer_exited()
            else:
                wire.stop_writing()
            received, ending = await read_all(wire.channel)
            assert received == [Stats(rss_bytes=1)]
            assert isinstance(ending, BrokenChannel)
            assert "ended inside a" in str(ending)

    run(loop, main(confirm=False))
    run(loop, main(confirm=True))


@on_both_loops
def test_bytes_that_are_no_record_break_a_pipe_after_what_came_before(loop: str) -> None:
    async def main() -> None:
        async with open_wire("pipe") as wire:
            wire.write(wire.stats(1) + b"\xff" * 100)
            received, ending = await read_all(wire.channel)
            assert received == [Stats(rss_bytes=1)]
            assert isinstance(ending, BrokenChannel)
            with pytest.raises(BrokenChannel):
                wire.channel.send_nowait(Exit())

    run(loop, main())


@on_both_loops
def test_a_record_over_the_cap_breaks_a_pipe(loop: str) -> None:
    async def main() -> None:
        async with open_wire("pipe") as wire:
            wire.write((2**31).to_bytes(4, "little"))
            with pytest.raises(BrokenChannel, match="2147483648"):
                await wire.channel.receive()

    run(loop, main())


@on_both_loops
def test_anything_on_standard_output_is_log_or_a_state(loop: str) -> None:
    log: list[bytes] = []

    async def main() -> None:
        async with open_wire("stdio", log.append) as wire:
            wire.write(b"main: hello\n....\xff\0")
            wire.write(b'\ncmd_child_to_router:state:{"payload":{},"state":"hibernating"}\n')
            wire.write(b"cmd_child_to_router:what:1\n")
            assert (await wire.channel.receive())[0] == State(state="hibernating", payload={})
            wire.stop_writing()
            await read_all(wire.channel)

    run(loop, main())
    assert b"".join(log) == b"main: hello\n....\xff\0\n"


@on_both_loops
def test_a_command_is_one_line_on_standard_input(loop: str) -> None:
    async def main() -> None:
        async with open_wire("stdio") as wire:
            wire.channel.send_nowait(Threads(n=2))
            assert wire.read() == b'cmd_router_to_child:threads:{"n":2}\n'
            wire.channel.send_nowait(Exit())
            await wire.channel.aclose()
            assert wire.read() == b"cmd_router_to_child:exit\n"
            assert wire.read() == b""

    run(loop, main())


@on_both_loops
def test_messages_sent_in_one_turn_of_the_loop_leave_together(loop: str) -> None:
    async def main() -> None:
        async with open_wire("pipe") as wire:
            for number in range(100):
                wire.channel.send_nowait(Threads(n=number))
            first = wire.read()
            await asyncio.sleep(0)
            assert wire.read().count(b"threads") == 98
            assert first.count(b"threads") == 2

    run(loop, main())


@on_both_loops
def test_a_dead_peer_s_pipe_that_a_descendant_keeps_filling_is_read_only_so_far(loop: str) -> None:
    async def main() -> None:
        async with open_wire("pipe") as wire:
            wire.write(wire.stats(1))
            wire.channel.peer_exited()
            wire.write(wire.stats(2))
            received, ending = await read_all(wire.channel)
            assert received == [Stats(rss_bytes=1)]
            assert isinstance(ending, EndOfChannel)

    run(loop, main())


@on_both_streams
def test_closing_a_clogged_channel_gives_up_and_loses_the_rest(name: str) -> None:
    async def main() -> None:
        async with open_wire(name) as wire:
            with pytest.raises(ChannelFull):
                while True:
                    wire.channel.send_nowait(Tokenize(request=0, text="x" * 100_000))
            await wire.channel.aclose()
            assert "ChannelClosed" in repr(wire.channel)

    run("asyncio", main())


@pytest.mark.parametrize("writable", [True, False], ids=["linux", "elsewhere"])
def test_a_blocked_reader_of_a_pipe_is_woken_with_and_without_a_name_for_it(
    writable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not writable:
        monkeypatch.setattr(sys, "platform", "somewhere")
    (their_read, our_write), (our_read, their_write) = os.pipe(), os.pipe()
    child = StreamChild(PipeWire(their_read, their_write), RecordFraming(from_pool))
    framing = RecordFraming(from_child)
    os.write(our_write, framing.frame("threads", b'{"n":1}'))
    assert child.receive() == [Threads(n=1)]
    endings: list[str] = []

    def receive() -> None:
        try:
            child.receive()
        except ChannelClosed as error:
            endings.append(type(error).__name__)

    reader = threading.Thread(target=receive)
    reader.start()
    child.close()
    reader.join()
    assert endings == ["ChannelClosed"]
    os.close(our_write)
    os.close(our_read)


def test_what_is_no_pipe_can_be_a_worker_s_input() -> None:
    ours, theirs = socket.socketpair()
    their_read = theirs.detach()
    our_read, their_write = os.pipe()
    child = StreamChild(PipeWire(their_read, their_write), RecordFraming(from_pool))
    ours.sendall(RecordFraming(from_child).frame("threads", b'{"n":1}'))
    assert child.receive() == [Threads(n=1)]
    child.close()
    with pytest.raises(ChannelClosed):
        child.receive()
    ours.close()
    os.close(our_read)


@on_both_streams
def test_the_lifeline_ends_with_the_channel_and_not_before(name: str) -> None:
    async def main() -> None:
        async with open_wire(name) as wire:
            os.set_blocking(wire.lifeline, False)
            with pytest.raises(BlockingIOError):
                os.read(wire.lifeline, 1)
            await wire.channel.aclose()
            assert os.read(wire.lifeline, 1) == b""

    run("asyncio", main())


@on_both_streams
def test_no_descriptor_is_inherited_and_none_is_left(name: str) -> None:
    async def main() -> None:
        before = open_descriptors()
        transport = make_transport(name)
        await transport.open()
        one, other = [await transport.endpoint(f"m#{n}", ignore) for n in range(2)]
        opened = open_descriptors() - before
        assert len(opened) == (12 if name == "pipe" else 8)
        assert not any(os.get_inheritable(fd) for fd in opened)
        one.discard()
        one.discard()
        other.spawned()
        other.spawned()
        await transport.aclose()
        await transport.aclose()
        assert open_descriptors() <= before  # other tests' may go meanwhile

    run("asyncio", main())


@on_both_streams
def test_an_address_says_no_more_than_it_must(name: str) -> None:
    async def main() -> None:
        transport = make_transport(name)
        endpoint = await transport.endpoint("m#1", ignore)
        address = msgspec.json.decode(endpoint.env[CHANNEL_ENV], type=ChildAddress)
        read_fd, write_fd = endpoint.pass_fds or (-1, -1)
        assert address == ChildAddress(transport=name, read_fd=read_fd, write_fd=write_fd)
        endpoint.discard()
        await transport.aclose()

    run("asyncio", main())


@pytest.mark.parametrize("identity", ["", "x" * 201, "päd", "a\nb"])
def test_an_identity_is_short_and_printable(identity: str) -> None:
    async def main() -> None:
        with pytest.raises(ValueError, match="identity"):
            await make_transport("pipe").endpoint(identity, ignore)

    run("asyncio", main())


def test_a_line_over_the_cap_is_skipped_and_reported() -> None:
    async def main() -> None:
        async with open_wire("stdio") as wire:

            async def write() -> None:
                chunk = b"x" * (1024 * 1024)
                for piece in (b"cmd_child_to_router:result:", *[chunk] * 66, b"\n", wire.stats(1)):
                    await asyncio.to_thread(wire.write, piece)

            writing = asyncio.create_task(write())
            (unknown,) = await wire.channel.receive()
            assert isinstance(unknown, Unknown) and "over the cap" in unknown.reason
            assert await wire.channel.receive() == [Stats(rss_bytes=1)]
            await writing

    run("asyncio", main())
