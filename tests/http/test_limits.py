"""What a server puts up with: connections, heads and bodies that are too many, too large or too slow."""

import contextlib
import json
import socket
from collections.abc import Generator

import pytest

from live_front import DEADLINE, LiveFront, RawRequest, fake, say
from llamaherd.http.limits import Limits

CHAT = "/v1/chat/completions"
#: Seconds for a head where one is sent: a client that loses its core between its connection and that is in time still.
HEAD = 0.6


@contextlib.contextmanager
def connected(front: LiveFront) -> Generator[socket.socket]:
    port = int(front.url.rsplit(":", 1)[1])
    with socket.create_connection(("127.0.0.1", port), DEADLINE) as connection:
        yield connection


def read_all(connection: socket.socket) -> bytes:
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while chunk := connection.recv(65536):
            received += chunk
    return received


def answer_of(connection: socket.socket) -> tuple[int, str]:
    """Return the status and the error message of the answer, after which the server hung up."""
    head, _, body = read_all(connection).partition(b"\r\n\r\n")
    assert b"connection: close" in head.lower()
    return int(head.split()[1]), json.loads(body)["error"]["message"]


def test_a_head_that_never_ends_is_refused() -> None:
    with LiveFront(server={"limits": Limits(head_bytes=1000)}) as front, connected(front) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Long: " + b"x" * 2000)
        assert answer_of(connection) == (431, "the request's headers are over the limit of 1000 bytes")


def test_a_head_that_is_too_large_is_refused_even_if_it_comes_at_once() -> None:
    with LiveFront(server={"limits": Limits(head_bytes=1000)}) as front, connected(front) as connection:
        many = b"".join(b"X-%d: %s\r\n" % (number, b"y" * 90) for number in range(20))
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + many + b"\r\n")
        assert answer_of(connection)[0] == 431


def test_a_head_within_the_limit_is_fine_again_and_again() -> None:
    with LiveFront(server={"limits": Limits(head_bytes=1000)}) as front, front.client() as client:
        for _ in range(5):
            assert client.get("/health", headers={"X-Long": "x" * 500}).status_code == 200


def test_a_head_that_is_too_slow_is_refused() -> None:
    with LiveFront(server={"limits": Limits(head_seconds=HEAD)}) as front, connected(front) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\n")
        assert answer_of(connection)[0] == 408


def test_a_connection_that_asks_for_nothing_is_closed() -> None:
    with LiveFront(server={"limits": Limits(head_seconds=0.05)}) as front, connected(front) as connection:
        assert read_all(connection) == b""


@pytest.mark.parametrize("body", [b"12345", b"1234567890", b"1234567890\r\n"])
def test_a_connection_whose_request_was_answered_before_its_body_came_does_not_stay(body: bytes) -> None:
    with LiveFront(server={"limits": Limits(head_seconds=HEAD)}) as front, connected(front) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n\r\n")
        assert connection.recv(4096).startswith(b"HTTP/1.1 200")
        connection.sendall(body)
        assert b"HTTP/1.1" not in read_all(connection)


def test_a_body_that_comes_behind_its_answer_is_dropped_and_the_next_request_answered() -> None:
    with LiveFront() as front, connected(front) as connection:
        for _ in range(3):
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n\r\n")
            answer = connection.recv(4096)
            while not answer.endswith(b"}"):
                answer += connection.recv(4096)
            assert answer.startswith(b"HTTP/1.1 200")
            connection.sendall(b"1234567890")


def test_a_second_head_has_its_own_time_and_an_answer_as_much_as_it_needs() -> None:
    slow = fake("slow", pieces=("word ",), repeat=20, step_seconds=HEAD / 10)
    with (
        LiveFront(slow, server={"limits": Limits(head_seconds=HEAD)}) as front,
        front.raw(CHAT, say("hi", model="slow", stream=True)) as request,
    ):
        request.read_until(b"[DONE]")


def test_a_stray_line_break_behind_a_request_does_not_end_its_answer() -> None:
    slow = fake("slow", pieces=("word ",), repeat=20, step_seconds=HEAD / 10)
    body = json.dumps(say("hi", model="slow", stream=True)).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with LiveFront(slow, server={"limits": Limits(head_seconds=HEAD)}) as front, connected(front) as connection:
        connection.sendall(head + body)
        answer = connection.recv(65536)
        connection.sendall(b"\r\n")
        while chunk := connection.recv(65536):
            answer += chunk
            if answer.endswith(b"[DONE]\n\n\r\n0\r\n\r\n"):
                break
    assert answer.count(b"HTTP/1.1") == 1
    assert b"[DONE]" in answer


def framed(path: str, body: dict[str, object]) -> bytes:
    raw = json.dumps(body).encode()
    return f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(raw)}\r\n\r\n".encode() + raw


@pytest.mark.parametrize(
    ("behind", "status"),
    [
        (b"no HTTP at all\r\n\r\n", 400),
        (b"POST /health HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nno size\r\n", 400),
        (b"GET /health HTTP/1.1\r\nX-Long: " + b"x" * 70_000, 431),
    ],
)
def test_what_is_wrong_behind_a_request_is_told_behind_its_answer(behind: bytes, status: int) -> None:
    slow = fake("slow", pieces=("word ",), repeat=50, step_seconds=0.01)
    with LiveFront(slow) as front, connected(front) as connection:
        connection.sendall(framed(CHAT, say("hi", model="slow", stream=True)))
        answer = connection.recv(65536)
        connection.sendall(behind)
        answer += read_all(connection)
    first, end, second = answer.partition(b"0\r\n\r\n")
    assert end
    assert first.endswith(b"data: [DONE]\n\n\r\n")
    assert first.count(b'"content":"word "') == 50
    assert second.startswith(b"HTTP/1.1 %d " % status)
    assert answer.count(b"HTTP/1.1") == 2


def test_of_several_answers_none_is_lost_to_what_is_wrong_behind_them() -> None:
    requests = framed(CHAT, say("one", model="echo")) + framed(CHAT, say("two", model="echo"))
    with LiveFront(fake("echo")) as front, connected(front) as connection:
        connection.sendall(requests + b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nno size\r\n")
        answers = read_all(connection).split(b"HTTP/1.1 ")[1:]
    assert [answer[:3] for answer in answers] == [b"200", b"200", b"400"]
    assert [b'"content":"%b"' % word in answer for word, answer in zip((b"one", b"two"), answers, strict=False)]


def test_a_body_that_is_wrong_is_its_requests_answer_and_nobody_waits_for_it() -> None:
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    with LiveFront(fake("echo")) as front, connected(front) as connection:
        connection.sendall(head + b"2\r\n{}\r\nno size\r\n")
        assert answer_of(connection) == (400, "Invalid HTTP request received.")


def test_a_client_that_leaves_with_something_wrong_behind_its_request_stops_its_work() -> None:
    talker = fake("talker", pieces=("word ",), repeat=1_000_000, step_seconds=0.001)
    with LiveFront(talker) as front:
        with connected(front) as connection:
            connection.sendall(framed(CHAT, say("hi", model="talker", stream=True)) + b"no HTTP at all\r\n\r\n")
            assert connection.recv(10)
        front.wait_for_requests("talker", 0)


def test_a_body_that_stays_away_is_refused() -> None:
    with LiveFront(fake("echo"), body_seconds=0.05) as front, RawRequest(front.url, CHAT, b"{", announced=9) as request:
        answer = request.read_until(b'"type"')
        assert b"408" in answer.split(b"\r\n")[0]
        assert b"nothing of the request body came for 0.05 seconds" in answer


def test_one_connection_too_many_is_told_so_and_room_is_room_again() -> None:
    with LiveFront(server={"limits": Limits(max_connections=2)}) as front:
        with connected(front) as first, connected(front) as second:
            for connection in (first, second):
                connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
                assert connection.recv(4096).startswith(b"HTTP/1.1 200")
            with connected(front) as third:
                third.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
                assert answer_of(third) == (503, "2 connections are open already")
        with front.client() as client:
            response = client.get("/health")
            while response.status_code != 200:  # until the server has noticed that the others left
                response = client.get("/health")


def test_far_too_many_connections_are_cut_off() -> None:
    with LiveFront(server={"limits": Limits(max_connections=1)}) as front, contextlib.ExitStack() as stack:
        connections = [stack.enter_context(connected(front)) for _ in range(70)]
        assert read_all(connections[-1]) == b""


def test_what_is_no_http_is_told_so_in_json() -> None:
    with LiveFront() as front, connected(front) as connection:
        connection.sendall(b"\x16\x03\x01 this is TLS\r\n\r\n")
        assert answer_of(connection) == (400, "Invalid HTTP request received.")


def test_trailers_are_dropped() -> None:
    body = json.dumps(say("one two", model="echo")).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    with LiveFront(fake("echo")) as front, connected(front) as connection:
        connection.sendall(head + b"%x\r\n%b\r\n0\r\nX-Trailer: x\r\n\r\n" % (len(body), body))
        assert connection.recv(4096).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("pieces", [1, 1000])
def test_a_wish_for_another_protocol_is_passed_over(chunked: bool, pieces: int) -> None:
    wish = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n"
    body = json.dumps(say("one two", model="echo")).encode()
    framing = b"Transfer-Encoding: chunked\r\n" if chunked else b"Content-Length: %d\r\n" % len(body)
    sent = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body) if chunked else body
    post = b"POST %b HTTP/1.1\r\nHost: localhost\r\n%b%b\r\n%b" % (CHAT.encode(), wish, framing, sent)
    get = b"GET /health HTTP/1.1\r\nHost: localhost\r\n%b\r\n" % wish
    last = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    request = post + get + post + last
    with LiveFront(fake("echo")) as front, connected(front) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        size = -(-len(request) // pieces)
        for start in range(0, len(request), size):
            connection.sendall(request[start : start + size])
        answers = read_all(connection)
    assert answers.count(b"HTTP/1.1 200 OK") == 4
    assert answers.count(b'"content":"one two"') == 2


@pytest.mark.parametrize("method", ["POST", "HEAD"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_of_the_first_http_gets_no_chunks(method: str, stream: bool) -> None:
    path = CHAT if method == "POST" else "/models/sse" if stream else "/health"
    body = json.dumps(say("one two", model="echo", stream=stream)).encode() if method == "POST" else b""
    head = f"{method} {path} HTTP/1.0\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with LiveFront(fake("echo")) as front, connected(front) as connection:
        connection.sendall(head + body)
        head, _, answer = read_all(connection).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"transfer-encoding" not in head.lower()
    assert (b"content-length: %d" % len(answer) in head.lower()) is (method == "POST" and not stream)
    if method == "HEAD":
        assert answer == b""
    elif stream:
        lines = [line for line in answer.decode().split("\n\n") if line]
        assert all(line.startswith("data: ") for line in lines)
        assert lines[-1] == "data: [DONE]"
    else:
        assert json.loads(answer)["choices"][0]["message"]["content"] == "one two"
