"""From a name to a transport, and what a worker's start costs."""

import os
import subprocess
import sys

import pytest

from llamaherd import transport
from llamaherd.transport import (
    CHANNEL_ENV,
    BrokenChannel,
    ChannelError,
    Stdio,
    UnknownTransport,
    connect,
    make_transport,
)

NOBODY = Stdio(-1, -1)


@pytest.mark.parametrize("name", ["pipe", "zmq", "stdio"])
def test_a_transport_knows_its_name(name: str) -> None:
    assert make_transport(name).name == name


def test_an_unknown_name_is_answered_with_those_that_exist() -> None:
    with pytest.raises(UnknownTransport, match="'carrier pigeon'; there are pipe, zmq, stdio") as caught:
        make_transport("carrier pigeon")
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, ChannelError)


@pytest.mark.parametrize(
    ("name", "endpoint"), [("pipe", "tcp://127.0.0.1:1"), ("zmq", "udp://x:1"), ("zmq", "ipc://x")]
)
def test_an_endpoint_that_does_not_fit_is_refused(name: str, endpoint: str) -> None:
    with pytest.raises(ValueError, match=endpoint):
        make_transport(name, endpoint=endpoint)


def test_a_process_that_no_pool_started_has_no_channel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(CHANNEL_ENV, raising=False)
    with pytest.raises(BrokenChannel, match="only a pool can start a worker"):
        connect(NOBODY)


@pytest.mark.parametrize(
    ("text", "error"),
    [("{", BrokenChannel), ('{"fd":3}', BrokenChannel), ('{"transport":"carrier pigeon"}', UnknownTransport)],
)
def test_a_bad_address_is_refused_and_removed(
    text: str, error: type[ChannelError], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CHANNEL_ENV, text)
    with pytest.raises(error):
        connect(NOBODY)
    assert CHANNEL_ENV not in os.environ


def test_importing_the_package_loads_neither_asyncio_nor_zeromq() -> None:
    script = "import sys, llamaherd.transport; print([m for m in ('asyncio', 'zmq') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_everything_that_the_package_lists_is_there() -> None:
    assert all(hasattr(transport, name) for name in transport.__all__)
