"""Unix sockets and TLS: the same server behind other doors."""

import asyncio
import socket
import ssl
import subprocess
from collections.abc import Callable
from pathlib import Path

import httpx2
import pytest
import uvloop

from live_front import DEADLINE, LiveFront, fake, say
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


def test_wrong_tls_files_are_one_clear_line(pair: tuple[Path, Path], tmp_path: Path) -> None:
    certificate, key = pair
    locked, other = tmp_path / "locked.pem", tmp_path / "other.pem"
    openssl("ec", "-aes256", "-passout", "pass:x")("-in", key, "-out", locked)
    openssl("ecparam", "-name", "prime256v1", "-genkey", "-noout")("-out", other)
    for files in ((certificate, locked), (certificate, other), (key, key), (tmp_path / "none", key), (tmp_path, key)):
        with pytest.raises(CannotListen) as caught:
            make_tls(*files)
        assert "\n" not in str(caught.value)
