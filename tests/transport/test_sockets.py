"""The pump that runs a ZeroMQ socket on a loop: nothing that arrived waits for a signal that was used up."""

import asyncio
from collections.abc import Callable, Generator
from contextlib import contextmanager

import pytest
import zmq

from llamaherd.transport.sockets import SocketPump
from transport_harness import LOOPS, run

on_both_loops = pytest.mark.parametrize("loop", LOOPS)


class Pair:
    """A ROUTER that a pump runs, a DEALER that talks to it, and what the pump handed out."""

    def __init__(self, router: "zmq.Socket[bytes]", dealer: "zmq.Socket[bytes]") -> None:
        self.router = router
        self.dealer = dealer
        self.handled: list[bytes] = []
        self.on_message: Callable[[], None] = lambda: None
        self._wanted = 0
        self._enough = asyncio.Event()
        self.pump = SocketPump(asyncio.get_running_loop(), router, self._handle)

    def say(self, count: int) -> None:
        for number in range(count):
            self.dealer.send_multipart([b"count", b"%d" % number])

    async def heard(self, count: int) -> None:
        self._wanted = count
        self._enough.clear()
        if len(self.handled) < count:
            await self._enough.wait()

    def answer(self) -> None:
        self.pump.touched()
        self.router.send_multipart([b"d", b"answer", b""])

    def _handle(self, parts: list[bytes], user: str | None) -> None:
        assert (parts[:2], user) == ([b"d", b"count"], None)
        self.handled.append(parts[2])
        if len(self.handled) == self._wanted:
            self._enough.set()
        self.on_message()


@contextmanager
def pumped() -> Generator[Pair]:
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router, context.socket(zmq.DEALER) as dealer:
        router.sndhwm = router.rcvhwm = dealer.sndhwm = dealer.rcvhwm = 0
        router.linger = dealer.linger = 0
        dealer.routing_id = b"d"
        router.bind("inproc://pump")
        dealer.connect("inproc://pump")
        pair = Pair(router, dealer)
        try:
            yield pair
        finally:
            pair.pump.close(0)


@on_both_loops
def test_more_than_one_turn_s_worth_of_messages_arrives_in_order(loop: str) -> None:
    async def main() -> None:
        with pumped() as pair:
            pair.say(1000)
            await pair.heard(1000)
            assert pair.handled == [b"%d" % number for number in range(1000)]

    run(loop, main())


@on_both_loops
def test_messages_arrive_however_sends_use_the_signal_up(loop: str) -> None:
    async def main() -> None:
        with pumped() as pair:
            pair.on_message = pair.answer
            for turn in range(200):
                pair.answer()
                pair.say(1)
                pair.answer()
                await pair.heard(turn + 1)

    run(loop, main())


@on_both_loops
def test_a_handler_that_raises_does_not_hold_up_the_messages_behind(loop: str) -> None:
    async def main() -> None:
        problems: list[str] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: problems.append(str(context["exception"])))
        with pumped() as pair:

            def fail() -> None:
                pair.answer()
                raise ValueError("on purpose")

            pair.on_message = fail
            pair.say(3)
            await pair.heard(3)
            await asyncio.sleep(0)
        assert problems == ["on purpose"] * 3

    run(loop, main())


def test_what_waits_for_the_socket_to_be_empty_comes_after_all_that_it_held() -> None:
    async def main() -> None:
        with pumped() as pair:
            pair.say(600)
            empty = asyncio.Event()
            pair.pump.when_empty(empty.set)
            await empty.wait()
            assert len(pair.handled) == 600

    run("asyncio", main())
