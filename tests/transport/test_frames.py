"""What only the zmq transport has: routing ids, credit, keys, a private directory, and connections that are lost."""

import asyncio
import os
import stat
import tempfile
import threading
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import msgspec
import pytest
import zmq

from llamaherd.transport import (
    CHANNEL_ENV,
    BrokenChannel,
    ChannelClosed,
    ChildAddress,
    EndOfChannel,
    Endpoint,
    Transport,
    dealers,
    make_transport,
)
from llamaherd.transport.dealers import FrameChild
from llamaherd.transport.flow import BYE, CREDIT, Meter, Window, wire_size
from llamaherd.transport.messages import Exit, Stats, Threads, Unknown
from patience import ended
from transport_harness import LOOPS, open_descriptors, read_all, run

on_both_loops = pytest.mark.parametrize("loop", LOOPS)
TCP = "tcp://127.0.0.1:*"


def ignore(data: bytes) -> None:
    del data


def address_of(endpoint: Endpoint) -> ChildAddress:
    return msgspec.json.decode(endpoint.env[CHANNEL_ENV], type=ChildAddress)


@asynccontextmanager
async def opened(endpoint: str = "") -> AsyncGenerator[Transport]:
    transport = make_transport("zmq", endpoint=endpoint)
    await transport.open()
    try:
        yield transport
    finally:
        await transport.aclose()


@contextmanager
def raw_dealer(address: ChildAddress, prefix: bytes = b"u:") -> Generator["zmq.Socket[bytes]"]:
    """A worker's speaking socket, made without the code under test."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.linger = 0
        dealer.routing_id = prefix + address.identity.encode()
        dealer.immediate = dealer.probe_router = 1
        if address.server_key:
            dealer.curve_serverkey = address.server_key.encode()
            dealer.curve_publickey = address.public_key.encode()
            dealer.curve_secretkey = address.secret_key.encode()
        dealer.connect(address.endpoint)
        yield dealer


async def connect(endpoint: Endpoint) -> FrameChild:
    return await asyncio.to_thread(FrameChild, address_of(endpoint))


# --- where it listens -------------------------------------------------------------------------------------------------


def test_the_socket_lies_in_a_private_directory_that_goes_with_the_transport() -> None:
    async def main() -> str:
        async with opened() as transport:
            endpoint = await transport.endpoint("m#1", ignore)
            path = address_of(endpoint).endpoint.removeprefix("ipc://")
            directory = os.path.dirname(path)
            assert stat.S_ISSOCK(os.stat(path).st_mode)
            assert stat.S_IMODE(os.stat(directory).st_mode) == 0o700
            endpoint.discard()
        return directory

    assert not os.path.lexists(run("asyncio", main()))


def test_a_temporary_directory_with_a_long_name_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))

    async def main() -> None:
        async with opened() as transport:
            endpoint = await transport.endpoint("m#1", ignore)
            assert len(address_of(endpoint).endpoint) < 107
            endpoint.discard()

    run("asyncio", main())
    assert list(long.iterdir()) == []


def test_two_transports_do_not_meet() -> None:
    async def main() -> None:
        async with opened() as one, opened() as other:
            here, there = await one.endpoint("m#1", ignore), await other.endpoint("m#1", ignore)
            assert address_of(here).endpoint != address_of(there).endpoint
            here.discard()
            there.discard()

    run("asyncio", main())


def test_an_identity_is_used_once() -> None:
    async def main() -> None:
        async with opened() as transport:
            first = await transport.endpoint("m#1", ignore)
            with pytest.raises(ValueError, match="'m#1' is in use"):
                await transport.endpoint("m#1", ignore)
            first.discard()

    run("asyncio", main())


def test_a_transport_must_be_open() -> None:
    async def main() -> None:
        transport = make_transport("zmq")
        with pytest.raises(RuntimeError, match="not open"):
            await transport.endpoint("m#1", ignore)
        await transport.aclose()
        await transport.open()
        await transport.aclose()
        await transport.aclose()
        with pytest.raises(RuntimeError, match="not open"):
            await transport.endpoint("m#1", ignore)

    run("asyncio", main())


def test_an_address_that_cannot_be_bound_is_an_error_and_leaves_nothing() -> None:
    async def main() -> None:
        async with opened(TCP) as transport:
            endpoint = await transport.endpoint("m#1", ignore)
            with pytest.raises(zmq.ZMQError, match="in use"):
                await make_transport("zmq", endpoint=address_of(endpoint).endpoint).open()
            endpoint.discard()

    run("asyncio", main())


def test_a_transport_that_finds_no_folder_for_its_socket_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/nonexistent")

    async def main() -> None:
        before = open_descriptors()
        with pytest.raises(OSError, match="nonexistent"):
            await make_transport("zmq").open()
        assert open_descriptors() <= before

    run("asyncio", main())


# --- who may speak ----------------------------------------------------------------------------------------------------


@on_both_loops
def test_a_wrong_key_is_refused(loop: str) -> None:
    async def main() -> None:
        async with opened(TCP) as transport:
            endpoint = await transport.endpoint("m#1", ignore)
            public, secret = zmq.curve_keypair()
            forged = msgspec.structs.replace(
                address_of(endpoint), public_key=public.decode(), secret_key=secret.decode()
            )
            with pytest.raises(BrokenChannel, match="no pool answered"):
                await asyncio.to_thread(lambda: FrameChild(forged, connect_seconds=0.3))
            child = await connect(endpoint)
            child.send(Stats(rss_bytes=1))
            assert await endpoint.channel.receive() == [Stats(rss_bytes=1)]
            await asyncio.to_thread(child.close)
            endpoint.discard()

    run(loop, main())


def test_plain_tcp_is_refused() -> None:
    async def main() -> None:
        async with opened(TCP) as transport:
            endpoint = await transport.endpoint("m#1", ignore)
            plain = msgspec.structs.replace(address_of(endpoint), server_key="")
            with pytest.raises(BrokenChannel, match="no pool answered"):
                await asyncio.to_thread(lambda: FrameChild(plain, connect_seconds=0.3))
            endpoint.discard()

    run("asyncio", main())


def test_the_key_of_a_worker_that_is_gone_is_refused() -> None:
    async def main() -> None:
        async with opened(TCP) as transport:
            endpoint = await transport.endpoint("m#1", ignore)
            endpoint.discard()
            with pytest.raises(BrokenChannel, match="no pool answered"):
                await asyncio.to_thread(lambda: FrameChild(address_of(endpoint), connect_seconds=0.3))

    run("asyncio", main())


def test_one_worker_s_key_does_not_speak_for_another() -> None:
    async def main() -> None:
        async with opened(TCP) as transport:
            mine, yours = [await transport.endpoint(f"m#{n}", ignore) for n in range(2)]
            impostor = msgspec.structs.replace(address_of(mine), identity="m#1")
            with raw_dealer(impostor) as dealer:
                assert await asyncio.to_thread(dealer.poll, 10_000, zmq.POLLOUT)
                dealer.send_multipart([b"stats", b'{"rss_bytes":66}'])
                dealer.send_multipart([b"stats", b'{"rss_bytes":67}'])
                child = await connect(mine)
                child.send(Stats(rss_bytes=1))
                assert await mine.channel.receive() == [Stats(rss_bytes=1)]
            yours.channel.peer_exited()
            received, ending = await read_all(yours.channel)
            assert received == []
            assert isinstance(ending, EndOfChannel)
            await asyncio.to_thread(child.close)
            mine.discard()
            yours.discard()

    run("asyncio", main())


def test_an_older_spawn_does_not_reach_a_newer_one_s_channel() -> None:
    async def main() -> None:
        async with opened() as transport:
            old = await transport.endpoint("m/0#1", ignore)
            old_child = await connect(old)
            old_child.send(Stats(rss_bytes=1))
            assert await old.channel.receive() == [Stats(rss_bytes=1)]
            old.discard()
            new = await transport.endpoint("m/0#2", ignore)
            new_child = await connect(new)
            old_child.send(Stats(rss_bytes=2))
            new_child.send(Stats(rss_bytes=3))
            assert await new.channel.receive() == [Stats(rss_bytes=3)]
            with pytest.raises(EndOfChannel):
                await asyncio.to_thread(old_child.receive)
            with pytest.raises(BrokenChannel):
                old_child.send(Stats())
            await asyncio.to_thread(old_child.close)
            await asyncio.to_thread(new_child.close)
            new.discard()

    run("asyncio", main())


def test_a_worker_whose_channel_was_closed_before_it_connected_is_told() -> None:
    async def main() -> None:
        async with opened() as transport:
            endpoint = await transport.endpoint("m#1", ignore)
            endpoint.discard()
            child = await connect(endpoint)
            with pytest.raises(EndOfChannel):
                await asyncio.to_thread(child.receive)
            await asyncio.to_thread(child.close)

    run("asyncio", main())


# --- frames that are none ---------------------------------------------------------------------------------------------


@on_both_loops
def test_the_wrong_number_of_frames_breaks_that_channel_only(loop: str) -> None:
    async def main() -> None:
        async with opened() as transport:
            bad, good = [await transport.endpoint(f"m#{n}", ignore) for n in range(2)]
            child = await connect(good)
            with raw_dealer(address_of(bad)) as dealer:
                await asyncio.to_thread(dealer.poll, 10_000, zmq.POLLOUT)
                dealer.send_multipart([b"stats", b'{"rss_bytes":1}'])
                dealer.send_multipart([b"\xff\0", b"{}"])
                dealer.send_multipart([b"stats", b"{}", b"more"])
                received, ending = await read_all(bad.channel)
            first, second = received
            assert first == Stats(rss_bytes=1)
            assert isinstance(second, Unknown)
            assert isinstance(ending, BrokenChannel) and "3 frames" in str(ending)
            child.send(Stats(rss_bytes=2))
            assert await good.channel.receive() == [Stats(rss_bytes=2)]
            await asyncio.to_thread(child.close)
            bad.discard()
            good.discard()

    run(loop, main())


def test_a_connection_that_was_remade_is_a_broken_channel() -> None:
    async def main() -> None:
        async with opened() as transport:
            endpoint = await transport.endpoint("m#1", ignore)
            for number in range(2):
                with raw_dealer(address_of(endpoint)) as dealer:
                    await asyncio.to_thread(dealer.poll, 10_000, zmq.POLLOUT)
                    if number == 0:
                        dealer.send_multipart([b"stats", b"{}"])
                        assert await endpoint.channel.receive() == [Stats()]
                        continue
                    with pytest.raises(BrokenChannel, match="made again"):
                        await endpoint.channel.receive()
            endpoint.discard()

    run("asyncio", main())


def test_a_worker_that_ignores_its_credit_is_cut_off() -> None:
    async def main() -> None:
        async with opened() as transport:
            endpoint = await transport.endpoint("m#1", ignore)
            body = b'{"request":1,"text":"' + b"x" * (8 * 1024 * 1024) + b'"}'
            with raw_dealer(address_of(endpoint)) as dealer:
                for _ in range(10):
                    await asyncio.to_thread(dealer.send_multipart, [b"result", body])
                # All of it arrives before the pool reads any.
                while "BrokenChannel" not in repr(endpoint.channel):  # noqa: ASYNC110 - nothing to wait for but it
                    await asyncio.sleep(0)
            received, ending = await read_all(endpoint.channel)
            assert len(received) == 9
            assert "more than it had credit for" in str(ending)
            endpoint.discard()

    run("asyncio", main())


def test_a_body_over_the_cap_never_arrives_and_breaks_the_channel() -> None:
    async def main() -> None:
        async with opened() as transport:
            endpoint = await transport.endpoint("m#1", ignore)
            with raw_dealer(address_of(endpoint)) as dealer:
                assert await asyncio.to_thread(dealer.poll, 10_000, zmq.POLLOUT)
                dealer.send_multipart([b"result", b"x" * (64 * 1024 * 1024 + 1)])
                reading = asyncio.create_task(read_all(endpoint.channel))
                while not reading.done():
                    # ZeroMQ connects again, and greets again once the socket is used.
                    await asyncio.to_thread(dealer.poll, 10)
                received, ending = await reading
            assert received == []
            assert isinstance(ending, BrokenChannel)
            endpoint.discard()

    run("asyncio", main())


# --- a pool that is gone ----------------------------------------------------------------------------------------------


@contextmanager
def raw_pool(most_unread: int = 1000) -> Generator[tuple["zmq.Socket[bytes]", FrameChild]]:
    """A ROUTER without a pool behind it, and a worker connected to it."""
    with tempfile.TemporaryDirectory() as directory, zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        router.linger = 0
        router.rcvhwm = most_unread
        address = f"ipc://{directory}/pool"
        router.bind(address)
        child = FrameChild(ChildAddress(transport="zmq", endpoint=address, identity="m#1"))
        assert sorted(router.recv_multipart() for _ in range(2)) == [[b"d:m#1", b""], [b"u:m#1", b""]]
        try:
            yield router, child
        finally:
            router.close()
            child.close()


def test_a_lost_connection_ends_the_worker_s_channel() -> None:
    with raw_pool() as (router, child):
        router.close()
        with pytest.raises(EndOfChannel, match="connection to the pool is lost"):
            child.receive()
        with pytest.raises(BrokenChannel, match="connection to the pool is lost"):
            while True:
                child.send(Stats())


def test_a_lost_connection_ends_a_send_that_waits_for_credit() -> None:
    with raw_pool() as (router, child):
        failures: list[BaseException] = []

        def send() -> None:
            try:
                while True:
                    child.send_raw("stats", b"x" * 100_000)
            except BrokenChannel as error:
                failures.append(error)

        sender = threading.Thread(target=send)
        sender.start()
        for _ in range(40):
            assert len(router.recv_multipart()) == 3
        router.close()
        sender.join()
        assert "connection to the pool is lost" in str(failures[0])


def test_closing_wakes_a_send_that_waits_for_credit() -> None:
    with raw_pool() as (router, child):
        failures: list[str] = []

        def send() -> None:
            try:
                while True:
                    child.send_raw("stats", b"x" * 100_000)
            except Exception as error:
                failures.append(type(error).__name__)

        sender = threading.Thread(target=send)
        sender.start()
        for _ in range(40):
            router.recv_multipart()
        closer = threading.Thread(target=child.close)
        closer.start()
        sender.join()
        while router.recv_multipart()[1] != BYE:
            pass
        router.send_multipart([b"u:m#1", BYE, b""])
        closer.join()
        assert failures == ["ChannelClosed"]


def test_what_was_sent_before_the_close_arrives_however_slowly_the_pool_reads() -> None:
    with raw_pool(most_unread=1) as (router, child):
        for number in range(30):
            child.send_raw("stats", b"%d" % number + b"x" * 100_000)
        closer = threading.Thread(target=child.close)
        closer.start()
        closer.join(1.5)
        assert closer.is_alive(), "it waits for the pool"
        arrived = [router.recv_multipart()[2] for _ in range(30)]
        assert [int(body.rstrip(b"x")) for body in arrived] == list(range(30))
        assert router.recv_multipart()[1] == BYE
        closer.join(0.2)
        assert closer.is_alive(), "it keeps its socket until the pool says that nothing more is under way"
        router.send_multipart([b"u:m#1", BYE, b""])
        closer.join()


def test_what_was_sent_arrives_although_a_receive_is_slow_to_notice_the_close(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without a core to spare: the thread in ``receive`` was woken, and does not run yet."""
    monkeypatch.setattr(dealers, "_CLOSE_SECONDS", 0.01)
    with raw_pool() as (router, child):
        child.send_raw("stats", b"the last words")
        busy = child._down.lock  # pyright: ignore[reportPrivateUsage]
        with busy:
            closer = threading.Thread(target=child.close)
            closer.start()
            assert router.recv_multipart()[2] == b"the last words"
            assert router.poll(20_000), "it says goodbye"
            assert router.recv_multipart()[1] == BYE
            router.send_multipart([b"u:m#1", BYE, b""])
            closer.join()
        with pytest.raises(ChannelClosed):
            child.send(Stats())
        child._release()  # pyright: ignore[reportPrivateUsage]  # what the close had to leave to the process's end


def test_a_pool_that_is_gone_is_not_waited_for() -> None:
    with raw_pool(most_unread=1) as (router, child):
        for _ in range(30):
            child.send_raw("stats", b"x" * 100_000)
        router.close()
        closer = threading.Thread(target=child.close)
        closer.start()
        assert ended(closer, 10)


def test_a_worker_takes_no_torn_frames() -> None:
    with raw_pool() as (router, child):
        router.send_multipart([b"d:m#1", b"threads", b'{"n":1}'])
        router.send_multipart([b"d:m#1", b"\x01future", b""])
        router.send_multipart([b"d:m#1", b"threads", b'{"n":2}', b"more"])
        received = list(child.receive())
        with pytest.raises(BrokenChannel, match="3 frames"):
            while True:
                received += child.receive()
        assert received == [Threads(n=1)]


# --- flow control -----------------------------------------------------------------------------------------------------


def test_a_window_closes_at_its_limit_and_opens_with_credit() -> None:
    window = Window(100)
    window.sent(99)
    assert window.is_open
    window.sent(500)
    assert not window.is_open
    window.acknowledge(b"500")
    assert window.is_open


@pytest.mark.parametrize("nonsense", [b"", b"-1", b"many", b"9" * 30, b"\xff", b"600"])
def test_a_window_takes_no_credit_for_what_was_never_sent(nonsense: bytes) -> None:
    window = Window(100)
    window.sent(150)
    window.acknowledge(nonsense)
    window.sent(100)
    assert not window.is_open


def test_a_meter_reports_each_quarter_of_the_limit() -> None:
    meter = Meter(100)
    assert [meter.due(consumed) for consumed in (10, 24, 25, 49, 70, 94, 95)] == [
        None,
        None,
        b"25",
        None,
        b"70",
        None,
        b"95",
    ]


def test_an_empty_body_is_not_free() -> None:
    assert wire_size(b"") > 0
    assert BYE[:1] == CREDIT[:1] == b"\x01"


def test_no_descriptor_is_left() -> None:
    async def main() -> None:
        async with opened() as warm_up:
            (await warm_up.endpoint("m#1", ignore)).discard()
        before = open_descriptors()
        async with opened(TCP) as transport:
            endpoint = await transport.endpoint("m#1", ignore)
            child = await connect(endpoint)
            endpoint.channel.send_nowait(Exit())
            assert await asyncio.to_thread(child.receive) == [Exit()]
            await asyncio.to_thread(child.close)
            endpoint.spawned()
        assert open_descriptors() <= before  # other tests' may go meanwhile

    run("asyncio", main())
