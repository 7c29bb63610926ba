"""The Channel contract, on every transport and both event loops, with real processes wherever the transport has them.

``transport_peers`` holds the worker's side of each test.
"""

import asyncio
from collections.abc import Sequence
from contextlib import suppress

import pytest

from llamaherd.transport import (
    RECEIVE_LIMIT,
    SEND_LIMIT,
    BrokenChannel,
    ChannelClosed,
    ChannelError,
    ChannelFull,
    EndOfChannel,
    MessageTooLarge,
)
from llamaherd.transport.messages import ChildMessage, Exit, Result, State, Stats, Threads, Tokenize, Unknown
from transport_harness import LOOPS, PROCESS_TRANSPORTS, TRANSPORTS, Read, Started, delivered, open_world, read_all, run
from transport_peers import FIREHOSE_COUNT, FIREHOSE_TEXT, FLOOD_STATES, MANY

everywhere = pytest.mark.parametrize("transport", TRANSPORTS)
with_processes = pytest.mark.parametrize("transport", PROCESS_TRANSPORTS)
on_both_loops = pytest.mark.parametrize("loop", LOOPS)
both_ways = pytest.mark.parametrize("read", [read_all, delivered])


def numbers(messages: list[ChildMessage]) -> list[int]:
    return [message.rss_bytes for message in messages if isinstance(message, Stats)]


async def assert_echoes(peer: Started, number: int = 7) -> None:
    peer.channel.send_nowait(Threads(n=number))
    assert await peer.channel.receive() == [Stats(rss_bytes=number)]


@everywhere
@on_both_loops
def test_messages_sent_before_the_worker_connects_arrive(transport: str, loop: str) -> None:
    async def main() -> None:
        async with open_world(transport) as world:
            await assert_echoes(await world.start("echo"))

    run(loop, main())


@everywhere
@on_both_loops
@both_ways
def test_many_messages_cross_both_ways_at_once_in_order(transport: str, loop: str, read: Read) -> None:
    async def main() -> None:
        async with open_world(transport) as world:
            peer = await world.start("duplex")

            async def send() -> None:
                for number in range(MANY):
                    await peer.channel.send(Threads(n=number))
                await peer.channel.send(Exit())

            sending = asyncio.create_task(send())
            received, ending = await read(peer.channel)
            await sending
            assert numbers(received) == list(range(MANY))
            assert isinstance(ending, EndOfChannel)
            assert await peer.note() == f"{MANY} True"

    run(loop, main())


@everywhere
@on_both_loops
def test_large_messages_arrive_whole(transport: str, loop: str) -> None:
    texts = [chr(ord("a") + number) * (1024 * 1024) for number in range(8)]

    async def main() -> None:
        async with open_world(transport) as world:
            peer = await world.start("echo")

            async def send() -> None:
                for number, text in enumerate(texts):
                    await peer.channel.send(Tokenize(request=number, text=text))
                await peer.channel.send(Exit())

            sending = asyncio.create_task(send())
            received, _ = await read_all(peer.channel)
            await sending
            assert received == [Result(request=number, text=text) for number, text in enumerate(texts)]

    run(loop, main())


@everywhere
def test_threads_of_one_worker_may_send_at_once(transport: str) -> None:
    async def main() -> None:
        async with open_world(transport) as world:
            received = numbers((await read_all((await world.start("two_senders")).channel))[0])
            assert [n for n in received if n < 1000] == list(range(1000))
            assert [n for n in received if n >= 1000] == list(range(1000, 2000))

    run("asyncio", main())


@everywhere
def test_the_pool_cannot_send_a_message_over_the_cap_and_the_channel_goes_on(transport: str) -> None:
    async def main() -> None:
        async with open_world(transport) as world:
            peer = await world.start("echo")
            with pytest.raises(MessageTooLarge, match="a tokenize of 671089"):
                peer.channel.send_nowait(Tokenize(request=1, text="x" * (64 * 1024 * 1024 + 100)))
            await assert_echoes(peer)

    run("asyncio", main())


@everywhere
def test_a_worker_cannot_send_a_message_over_the_cap_and_the_channel_goes_on(transport: str) -> None:
    async def main() -> None:
        async with open_world(transport) as world:
            received, ending = await read_all((await world.start("send_too_large")).channel)
            assert received == [Result(request=2, text="MessageTooLarge")]
            assert isinstance(ending, EndOfChannel)

    run("asyncio", main())


@everywhere
@on_both_loops
def test_a_worker_that_does_not_read_fills_a_bounded_queue_and_hinders_nobody(transport: str, loop: str) -> None:
    async def main() -> None:
        async with open_world(transport) as world:
            deaf, other = await world.start("deaf"), await world.start("echo")
            await deaf.channel.receive()
            while "waiting" in repr(deaf.channel):  # noqa: ASYNC110 - zmq: its other socket may come later
                await asyncio.sleep(0)
            text = "x" * 10_000
            accepted = 0
            with pytest.raises(ChannelFull, match="bytes are unsent"):
                while True:
                    deaf.channel.send_nowait(Tokenize(request=accepted, text=text))
                    accepted += 1
                    await asyncio.sleep(0)
            assert SEND_LIMIT * 0.9 < accepted * len(text) < SEND_LIMIT * 4

            waiting = [
                asyncio.create_task(deaf.channel.send(Tokenize(request=accepted + n, text=text))) for n in range(3)
            ]
            for number in range(50):
                await assert_echoes(other, number)
            assert not any(task.done() for task in waiting)
            with pytest.raises(ChannelFull):
                deaf.channel.send_nowait(Tokenize(request=-1, text=text))

            waiting[1].cancel()
            deaf.open_gate()
            await asyncio.gather(*waiting, return_exceptions=True)
            await deaf.channel.send(Exit())
            received, _ = await read_all(deaf.channel)
            assert received == [Result(request=0, tokens=(*range(accepted), accepted, accepted + 2))]

    run(loop, main())


@everywhere
@on_both_loops
def test_a_pool_that_does_not_read_holds_its_worker_back_and_loses_nothing(transport: str, loop: str) -> None:
    async def main() -> None:
        async with open_world(transport) as world:
            peer, other = await world.start("firehose"), await world.start("echo")
            while peer.notes_waiting() * len(FIREHOSE_TEXT) < RECEIVE_LIMIT // 2:
                await assert_echoes(other)
            for number in range(300):
                await assert_echoes(other, number)
            assert peer.notes_waiting() * len(FIREHOSE_TEXT) < 3 * RECEIVE_LIMIT
            received, _ = await read_all(peer.channel)
            assert [m.request for m in received if isinstance(m, Result)] == list(range(FIREHOSE_COUNT))

    run(loop, main())


@everywhere
@on_both_loops
@both_ways
def test_everything_sent_before_the_worker_closed_arrives_before_the_end(transport: str, loop: str, read: Read) -> None:
    async def main() -> None:
        async with open_world(transport) as world:
            peer = await world.start("send_and_close")
            received, ending = await read(peer.channel)
            assert numbers(received) == list(range(500))
            assert isinstance(ending, EndOfChannel)
            with pytest.raises(EndOfChannel):
                peer.channel.send_nowait(Exit())
            with pytest.raises(EndOfChannel):
                await peer.channel.send(Exit())

    run(loop, main())


@everywhere
@on_both_loops
@both_ways
def test_a_worker_that_closes_with_commands_unread_ends_in_order_all_the_same(
    transport: str, loop: str, read: Read
) -> None:
    async def main() -> None:
        async with open_world(transport) as world:
            peer = await world.start("send_and_close_unread")
            for number in range(10):
                peer.channel.send_nowait(Threads(n=number))
            peer.open_gate()
            received, ending = await read(peer.channel)
            assert numbers(received) == list(range(500))
            assert isinstance(ending, EndOfChannel)

    run(loop, main())


@with_processes
@on_both_loops
@both_ways
def test_a_worker_that_sent_closed_and_died_before_anyone_read_loses_nothing(
    transport: str, loop: str, read: Read
) -> None:
    async def main() -> None:
        async with open_world(transport) as world:
            peer = await world.start("send_and_close")
            await peer.wait()
            peer.channel.peer_exited()
            peer.channel.peer_exited()
            received, ending = await read(peer.channel)
            assert numbers(received) == list(range(500))
            assert isinstance(ending, EndOfChannel)

    run(loop, main())


@everywhere
@on_both_loops
def test_everything_sent_before_the_pool_closed_arrives_before_the_end(transport: str, loop: str) -> None:
    async def main() -> None:
        async with open_world(transport) as world:
            peer = await world.start("count_to_the_end")
            for number in range(500):
                await peer.channel.send(Threads(n=number))
            await peer.channel.aclose()
            await peer.channel.aclose()
            assert await peer.note() == "True EndOfChannel"
            assert await peer.note() == "BrokenChannel"

    run(loop, main())


@with_processes
@on_both_loops
@both_ways
def test_a_killed_worker_ends_its_channel_after_what_had_arrived(transport: str, loop: str, read: Read) -> None:
    async def main() -> None:
        async with open_world(transport) as world:
            peer = await world.start("send_and_hang")
            for number in range(10):
                peer.channel.send_nowait(Threads(n=number))
            assert await peer.note() == "sent"
            await peer.kill()
            peer.channel.peer_exited()
            received, ending = await read(peer.channel)
            # What ZeroMQ's own thread in the worker had not sent yet died with it.
            assert numbers(received) == list(range(500 if transport in {"pipe", "stdio"} else len(received)))
            assert isinstance(ending, EndOfChannel)

    run(loop, main())


@with_processes
@on_both_loops
def test_a_worker_that_dies_before_it_says_anything_ends_its_channel(transport: str, loop: str) -> None:
    async def main() -> None:
        async with open_world(transport) as world:
            peer = await world.start("echo")
            await peer.kill()
            receiving = asyncio.create_task(peer.channel.receive())
            await asyncio.sleep(0)
            peer.channel.peer_exited()
            with pytest.raises(EndOfChannel):
                await receiving

    run(loop, main())


@with_processes
@on_both_loops
def test_a_grandchild_that_holds_the_connection_open_does_not_hold_up_the_end(transport: str, loop: str) -> None:
    async def main() -> None:
        async with open_world(transport) as world:
            peer = await world.start("leave_a_grandchild")
            assert await peer.channel.receive() == [Stats()]
            await peer.channel.send(Threads(n=1))
            await peer.wait()
            peer.channel.peer_exited()
            received, ending = await read_all(peer.channel)
            assert received == []
            assert isinstance(ending, EndOfChannel)

    run(loop, main())


@everywhere
@on_both_loops
def test_a_channel_that_I_closed_says_so(transport: str, loop: str) -> None:
    async def main() -> None:
        async with open_world(transport) as world:
            peer = await world.start("echo")
            await assert_echoes(peer)
            receiving = asyncio.create_task(peer.channel.receive())
            await asyncio.sleep(0)
            await peer.channel.aclose()
            with pytest.raises(ChannelClosed):
                await receiving
            with pytest.raises(ChannelClosed):
                await peer.channel.receive()
            with pytest.raises(ChannelClosed):
                peer.channel.send_nowait(Exit())
            with pytest.raises(ChannelClosed):
                await peer.channel.send(Exit())
            peer.channel.peer_exited()
            peer.channel.abort()

    run(loop, main())


@everywhere
@on_both_loops
def test_aborting_a_clogged_channel_ends_whoever_waits_in_it(transport: str, loop: str) -> None:
    async def main() -> None:
        async with open_world(transport) as world:
            peer = await world.start("deaf")
            await peer.channel.receive()
            with pytest.raises(ChannelFull):
                while True:
                    peer.channel.send_nowait(Tokenize(request=0, text="x" * 100_000))
                    await asyncio.sleep(0)
            sending = [asyncio.create_task(peer.channel.send(Exit())) for _ in range(2)]
            await asyncio.sleep(0)
            peer.channel.abort()
            for task in sending:
                with pytest.raises(ChannelClosed):
                    await task

    run(loop, main())


@everywhere
def test_closing_a_worker_s_channel_from_another_thread_wakes_its_receiver(transport: str) -> None:
    async def main() -> None:
        async with open_world(transport) as world:
            peer = await world.start("close_in_another_thread")
            await peer.channel.receive()
            peer.open_gate()
            assert await peer.note() == "ChannelClosed ChannelClosed ChannelClosed"

    run("asyncio", main())


@everywhere
@on_both_loops
def test_a_cancelled_receive_loses_nothing(transport: str, loop: str) -> None:
    async def main() -> None:
        async with open_world(transport) as world:
            peer = await world.start("echo")
            received: list[ChildMessage] = []
            for number in range(300):
                peer.channel.send_nowait(Threads(n=number))
                task = asyncio.create_task(peer.channel.receive())
                await asyncio.sleep(0)
                task.cancel()
                with suppress(asyncio.CancelledError):
                    received += await task
            peer.channel.send_nowait(Exit())
            received += (await read_all(peer.channel))[0]
            assert numbers(received) == list(range(300))

    run(loop, main())


@everywhere
def test_only_one_task_may_receive(transport: str) -> None:
    async def main() -> None:
        async with open_world(transport) as world:
            peer = await world.start("echo")
            receiving = asyncio.create_task(peer.channel.receive())
            await asyncio.sleep(0)
            with pytest.raises(RuntimeError, match="another task"):
                await peer.channel.receive()
            peer.channel.send_nowait(Threads(n=1))
            assert await receiving == [Stats(rss_bytes=1)]

    run("asyncio", main())


@everywhere
@on_both_loops
def test_messages_are_answered_from_within_their_delivery(transport: str, loop: str) -> None:
    async def main() -> None:
        async with open_world(transport) as world:
            peer = await world.start("echo")
            heard: list[int] = []

            def answer(messages: Sequence[ChildMessage]) -> None:
                heard.extend(numbers([*messages]))
                peer.channel.send_nowait(Threads(n=heard[-1] + 1) if heard[-1] < 300 else Exit())

            ended: asyncio.Future[ChannelError] = asyncio.get_running_loop().create_future()
            peer.channel.deliver(answer, ended.set_result)
            peer.channel.send_nowait(Threads(n=0))
            assert isinstance(await ended, EndOfChannel)
            assert heard == list(range(301))

    run(loop, main())


@everywhere
def test_messages_are_delivered_to_one_only_and_those_that_waited_come_first(transport: str) -> None:
    async def main() -> None:
        async with open_world(transport) as world:
            peer = await world.start("send_and_close")
            received = [*await peer.channel.receive()]
            waiting = asyncio.create_task(peer.channel.receive())
            await asyncio.sleep(0)
            if not waiting.done():
                with pytest.raises(RuntimeError, match="another one"):
                    peer.channel.deliver(received.extend, lambda _: None)
            with suppress(EndOfChannel):
                received += await waiting
            delivery = asyncio.create_task(delivered(peer.channel))
            await asyncio.sleep(0)
            with pytest.raises(RuntimeError, match="another one"):
                peer.channel.deliver(received.extend, lambda _: None)
            with pytest.raises(RuntimeError, match="another one"):
                await peer.channel.receive()
            messages, ending = await delivery
            assert numbers(received + messages) == list(range(500))
            assert isinstance(ending, EndOfChannel)

    run("asyncio", main())


@everywhere
@on_both_loops
def test_a_channel_that_is_closed_within_a_delivery_ends_there(transport: str, loop: str) -> None:
    async def main() -> None:
        async with open_world(transport) as world:
            peer = await world.start("echo")
            endings: list[ChannelError] = []
            heard = asyncio.Event()

            def close(messages: Sequence[ChildMessage]) -> None:
                assert numbers([*messages]) == [1]
                peer.channel.abort()
                heard.set()

            peer.channel.deliver(close, endings.append)
            peer.channel.send_nowait(Threads(n=1))
            await heard.wait()
            peer.channel.peer_exited()
            assert [type(ending) for ending in endings] == [ChannelClosed]

    run(loop, main())


@everywhere
def test_more_than_all_buffers_hold_is_delivered_without_a_loss(transport: str) -> None:
    async def main() -> None:
        async with open_world(transport) as world:
            peer = await world.start("firehose")
            received, ending = await delivered(peer.channel)
            assert [m.request for m in received if isinstance(m, Result)] == list(range(FIREHOSE_COUNT))
            assert isinstance(ending, EndOfChannel)

    run("asyncio", main())


@everywhere
def test_unknown_kinds_and_malformed_bodies_arrive_as_unknown(transport: str) -> None:
    async def main() -> None:
        async with open_world(transport) as world:
            received, ending = await read_all((await world.start("strangers")).channel)
            assert isinstance(ending, EndOfChannel)
            newer, invented, pools, wrong_type, no_json, no_body, extra = received
            assert newer == State(state="hibernating", payload={})
            assert invented == Unknown("invented", "unknown kind", b'{"a":1}')
            assert pools == Unknown("load", "unknown kind", b'{"model":"m"}')
            assert isinstance(wrong_type, Unknown) and "rss_bytes" in wrong_type.reason
            assert isinstance(no_json, Unknown) and no_json.body == b"\xff\x00{"
            assert no_body == Stats()
            assert extra == Stats(rss_bytes=3)

    run("asyncio", main())


@with_processes
@on_both_loops
def test_prints_from_c_lose_no_state_and_invent_none(transport: str, loop: str) -> None:
    async def main() -> None:
        async with open_world(transport) as world:
            peer = await world.start("flood", collect_log=True)
            received, ending = await read_all(peer.channel)
            assert received == [State(state="loading", payload={"number": n}) for n in range(FLOOD_STATES)]
            assert isinstance(ending, EndOfChannel)
            await peer.wait()
            assert b"forged" in peer.log[0]
            assert b"".join(world.stray) == b""

    run(loop, main())


@with_processes
@on_both_loops
def test_a_worker_notices_that_its_pool_is_gone(transport: str, loop: str) -> None:
    async def main() -> None:
        async with open_world(transport) as world:
            peer = await world.start("end_with_pool")
            await peer.channel.receive()
            peer.channel.abort()
            assert world.transport is not None
            await world.transport.aclose()
            assert await peer.note() == "end"
            await peer.wait()

    run(loop, main())


def test_the_endings_are_three_different_errors() -> None:
    assert len({ChannelClosed, EndOfChannel, BrokenChannel}) == 3
    assert not issubclass(EndOfChannel, ChannelClosed) and not issubclass(BrokenChannel, EndOfChannel)
