"""Unix sockets and TLS: the same server behind other doors."""

import asyncio
import contextlib
import json
import socket
import ssl
import subprocess
from collections.abc import Callable, Generator
from pathlib import Path

import httpx2
import pytest
import uvloop

from live_front import DEADLINE, LiveFront, fake, say
from llamaherd.http.limits import Limits
from llamaherd.http.listen import CannotListen, Listener, PortInUse, make_tls

LOOPS = [asyncio.new_event_loop, uvloop.new_event_loop]
ASK = b"GET /health HTTP/1.1\r\nHost: whatever\r\n\r\n"


def health_over(path: Path) -> bytes:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(DEADLINE)
        connection.connect(str(path))
        connection.sendall(ASK)
        return connection.recv(4096)


# --- Unix sockets ---


@pytest.mark.parametrize("loop_factory", LOOPS)
def test_it_serves_on_a_unix_socket(tmp_path: Path, loop_factory: Callable[[], asyncio.AbstractEventLoop]) -> None:
    path = tmp_path / "herd.sock"
    with LiveFront(fake("echo"), loop_factory=loop_factory, server={"host": str(path)}) as front:
        assert front.url == f"unix://{path}"
        assert health_over(path).startswith(b"HTTP/1.1 200")
    assert not path.exists()


def test_a_socket_that_nobody_listens_on_any_more_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "left.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as left:
        left.bind(str(path))
    with LiveFront(server={"host": str(path)}):
        assert health_over(path).startswith(b"HTTP/1.1 200")


def test_a_socket_in_use_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "used.sock"
    with LiveFront(server={"host": str(path)}):
        with pytest.raises(PortInUse, match="in use by another program"):
            Listener(str(path), 0)
        assert health_over(path).startswith(b"HTTP/1.1 200")


def test_another_kind_of_file_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "notes.sock"
    path.write_text("mine")
    with pytest.raises(CannotListen, match="another kind of file"):
        Listener(str(path), 0)
    assert path.read_text() == "mine"


@pytest.mark.parametrize("host", ["/no/such/folder/x.sock", "/tmp/" + "x" * 200 + ".sock", "a\0b.sock"])
def test_a_path_that_cannot_be_listened_on_is_one_clear_line(host: str) -> None:
    with pytest.raises(CannotListen) as caught:
        Listener(host, 0)
    assert "\n" not in str(caught.value)


def test_a_socket_that_somebody_replaced_is_not_removed(tmp_path: Path) -> None:
    path = tmp_path / "mine.sock"
    listener = Listener(str(path), 0)
    path.unlink()
    path.write_text("theirs")
    listener.close()
    assert path.read_text() == "theirs"


# --- TLS ---


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate for localhost, signed by itself, and its key."""
    folder = tmp_path_factory.mktemp("tls")
    certificate, key = folder / "cert.pem", folder / "key.pem"
    openssl("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2")(
        "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-out", certificate, "-keyout", key
    )
    return certificate, key


def openssl(*arguments: str) -> Callable[..., None]:
    def run(*more: str | Path) -> None:
        subprocess.run(["openssl", *arguments, *more], check=True, capture_output=True, timeout=DEADLINE)

    return run


@pytest.mark.parametrize("loop_factory", LOOPS)
def test_it_speaks_tls(pair: tuple[Path, Path], loop_factory: Callable[[], asyncio.AbstractEventLoop]) -> None:
    with LiveFront(fake("echo"), loop_factory=loop_factory, server={"tls": pair}) as front:
        assert front.url.startswith("https://127.0.0.1:")
        url = front.url.replace("127.0.0.1", "localhost")
        trust = ssl.create_default_context(cafile=str(pair[0]))
        with httpx2.Client(base_url=url, verify=trust, timeout=DEADLINE) as client:
            answer = client.post("/v1/chat/completions", json=say("one two", model="echo")).json()
    assert answer["choices"][0]["message"]["content"] == "one two"


@contextlib.contextmanager
def silent(front: LiveFront, count: int) -> Generator[list[socket.socket]]:
    """Connect so many times, and say nothing."""
    port = int(front.url.rsplit(":", 1)[1])
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=DEADLINE)) for _ in range(count)
        ]


def trusting(front: LiveFront, pair: tuple[Path, Path]) -> httpx2.Client:
    trust = ssl.create_default_context(cafile=str(pair[0]))
    return httpx2.Client(base_url=front.url.replace("127.0.0.1", "localhost"), verify=trust, timeout=DEADLINE)


@pytest.mark.parametrize("loop_factory", LOOPS)
def test_handshakes_are_counted_among_the_connections(
    pair: tuple[Path, Path], loop_factory: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    limits = Limits(max_connections=3)
    with LiveFront(loop_factory=loop_factory, server={"tls": pair, "limits": limits}) as front:
        with silent(front, 3), trusting(front, pair) as client:
            response = client.get("/health")
            assert response.status_code == 503
            assert response.json()["error"]["message"] == "3 connections are open already"
        with trusting(front, pair) as client:
            while client.get("/health").status_code != 200:  # until the server has noticed that the others left
                pass
        with silent(front, 80) as connections:
            assert connections[-1].recv(1) == b""


@pytest.mark.parametrize("loop_factory", LOOPS)
def test_a_handshake_that_takes_too_long_ends(
    pair: tuple[Path, Path], loop_factory: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    server = {"tls": pair, "limits": Limits(head_seconds=0.6)}
    with LiveFront(loop_factory=loop_factory, server=server) as front, silent(front, 2) as (mute, slow):
        slow.sendall(b"\x16\x03\x01\x02\x00")
        assert mute.recv(1) == b""
        assert slow.recv(1) == b""


@pytest.mark.parametrize("loop_factory", LOOPS)
def test_what_is_no_tls_and_a_handshake_at_the_end_of_the_server_harm_nobody(
    pair: tuple[Path, Path], loop_factory: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    with (
        LiveFront(loop_factory=loop_factory, server={"tls": pair}) as front,
        silent(front, 3) as (plain, leaving, staying),
    ):
        plain.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        while plain.recv(4096):
            pass
        leaving.close()
        with trusting(front, pair) as client:
            assert client.get("/health").status_code == 200
        front.shut_down()
        assert staying.recv(1) == b""


@pytest.mark.parametrize("loop_factory", LOOPS)
def test_a_request_that_comes_with_the_end_of_the_handshake_is_answered(
    pair: tuple[Path, Path], loop_factory: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    trust = ssl.create_default_context(cafile=str(pair[0]))
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = trust.wrap_bio(incoming, outgoing, server_hostname="localhost")
    with LiveFront(loop_factory=loop_factory, server={"tls": pair}) as front, silent(front, 1) as (connection,):
        while True:
            try:
                tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                connection.sendall(outgoing.read())
                incoming.write(connection.recv(65536))
        tls.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        connection.sendall(outgoing.read())
        answer = b""
        while b"}" not in answer:
            received = connection.recv(65536)
            assert received, answer
            incoming.write(received)
            with contextlib.suppress(ssl.SSLWantReadError):
                while chunk := tls.read(65536):
                    answer += chunk
    assert answer.startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("loop_factory", LOOPS)
def test_a_stream_that_nobody_reads_is_ended_under_tls_too(
    pair: tuple[Path, Path], loop_factory: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    talker = fake("talker", pieces=("word " * 200,), repeat=1_000_000, step_seconds=0.001)
    trust = ssl.create_default_context(cafile=str(pair[0]))
    body = json.dumps(say("hi", model="talker", stream=True)).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    server = {"tls": pair, "limits": Limits(send_seconds=0.2)}
    with (
        LiveFront(talker, loop_factory=loop_factory, server=server) as front,
        silent(front, 1) as (plain,),
        trust.wrap_socket(plain, server_hostname="localhost") as connection,
    ):
        connection.sendall(head + body)
        assert connection.recv(10)
        front.wait_for_requests("talker", 0)


def test_wrong_tls_files_are_one_clear_line(pair: tuple[Path, Path], tmp_path: Path) -> None:
    certificate, key = pair
    locked, other = tmp_path / "locked.pem", tmp_path / "other.pem"
    openssl("ec", "-aes256", "-passout", "pass:x")("-in", key, "-out", locked)
    openssl("ecparam", "-name", "prime256v1", "-genkey", "-noout")("-out", other)
    for files in ((certificate, locked), (certificate, other), (key, key), (tmp_path / "none", key), (tmp_path, key)):
        with pytest.raises(CannotListen) as caught:
            make_tls(*files)
        assert "\n" not in str(caught.value)
