"""The listening server: where it listens, how it says so, and how it ends."""

import asyncio
import contextlib
import socket
from collections.abc import Callable

import httpx2
import pytest
import uvloop

from live_front import DEADLINE, LiveFront, fake, say
from llamaherd.http.server import CannotListen, PortInUse, serve
from llamaherd.pool import Pool

CHAT = "/v1/chat/completions"


@pytest.mark.parametrize("loop_factory", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_it_serves_on_every_event_loop(loop_factory: Callable[[], asyncio.AbstractEventLoop]) -> None:
    with LiveFront(fake("echo"), loop_factory=loop_factory) as front, front.client() as client:
        answer = client.post(CHAT, json=say("one two", model="echo")).json()
        assert answer["choices"][0]["message"]["content"] == "one two"
        with front.raw(CHAT, say("one two", model="echo", stream=True)) as request:
            request.read_until(b"[DONE]")


def test_it_listens_on_loopback_and_says_where() -> None:
    with LiveFront(fake("echo")) as front:
        assert front.url.startswith("http://127.0.0.1:")


@pytest.mark.parametrize(("host", "shown"), [("127.0.0.1", "127.0.0.1"), ("localhost", None), ("::1", "[::1]")])
def test_it_answers_at_the_url_that_it_tells(host: str, shown: str | None) -> None:
    async def main() -> str:
        ready: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        async with Pool([fake("echo")]) as pool:
            serving = asyncio.ensure_future(serve(pool, host=host, port=0, on_ready=ready.set_result))
            url = await ready
            async with httpx2.AsyncClient(timeout=DEADLINE) as client:
                assert (await client.get(f"{url}/health")).status_code == 200
            serving.cancel()
            with pytest.raises(asyncio.CancelledError):
                await serving
        return url

    url = asyncio.run(main())
    assert shown is None or shown in url


def test_a_port_in_use_is_one_clear_line() -> None:
    with LiveFront(fake("echo")) as front:
        port = int(front.url.rsplit(":", 1)[1])
        with pytest.raises(PortInUse, match=f"port {port} on 127.0.0.1 is in use") as caught:
            asyncio.run(serve(Pool(), port=port))
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, OSError)


def test_a_port_that_somebody_has_bound_but_not_yet_opened_is_in_use_too() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        with pytest.raises(PortInUse):
            asyncio.run(serve(Pool(), port=taken.getsockname()[1]))


@pytest.mark.parametrize("host", ["no.such.host.invalid", "192.0.2.1", "a" * 300, "bad\0host"])
def test_an_address_that_cannot_be_listened_on_is_one_clear_line(host: str) -> None:
    with pytest.raises(CannotListen) as caught:
        asyncio.run(serve(Pool(), host=host, port=0))
    assert not isinstance(caught.value, PortInUse)
    assert "\n" not in str(caught.value)


def test_a_caller_that_cannot_take_the_news_gets_its_error_back() -> None:
    def on_ready(url: str) -> None:
        raise BrokenPipeError("nobody reads")

    with pytest.raises(BrokenPipeError, match="nobody reads"):
        asyncio.run(serve(Pool(), port=0, on_ready=on_ready))


def test_a_shutdown_lets_answers_that_are_under_way_end() -> None:
    words = fake("words", pieces=("word ",), repeat=100, step_seconds=0.002)
    with LiveFront(words) as front, front.raw(CHAT, say("hi", model="words", stream=True)) as request:
        request.read_until(b"word")
        front.shut_down()
        answer = request.read_until(b"[DONE]")
    assert answer.count(b'"content":"word "') == 100


def test_a_second_cancellation_does_not_wait_for_answers() -> None:
    talker = fake("talker", pieces=("word ",), repeat=1_000_000, step_seconds=0.002)
    with LiveFront(talker) as front, front.raw(CHAT, say("hi", model="talker", stream=True)) as request:
        request.read_until(b"word")
        front.cancel()
        with pytest.raises(httpx2.ConnectError):
            while True:  # until it listens no more; what has just connected then may be dropped
                with contextlib.suppress(httpx2.RemoteProtocolError, httpx2.ReadError):
                    httpx2.get(f"{front.url}/health", timeout=DEADLINE)
        front.cancel()
        # The server has let go of the request, and the pool ends it.
        assert b"the pool is closing" in request.read_until(b'"error"')


def test_after_a_shutdown_nobody_listens() -> None:
    with LiveFront(fake("echo")) as front:
        url = front.url
        front.shut_down()
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(f"{url}/health", timeout=DEADLINE)


def test_what_is_no_http_is_refused_and_harms_nobody() -> None:
    with LiveFront(fake("echo")) as front, front.client() as client:
        port = int(front.url.rsplit(":", 1)[1])
        with socket.create_connection(("127.0.0.1", port), DEADLINE) as connection:
            connection.sendall(b"\x16\x03\x01 this is TLS\r\n\r\n")
            assert b"400" in connection.recv(4096)
        assert client.get("/health").status_code == 200
