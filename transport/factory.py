"""From a name to a transport, and from a worker's environment to its channel.

Both import what they need and no more: a worker that talks over a pipe loads neither asyncio nor ZeroMQ.
"""

import os
from typing import TYPE_CHECKING, Final

import msgspec

from llamaherd.transport.channel import CHANNEL_ENV, ChildAddress, ChildChannel, Transport
from llamaherd.transport.errors import BrokenChannel, UnknownTransport

if TYPE_CHECKING:
    from llamaherd.transport.stdio import Stdio

__all__ = ["TRANSPORTS", "connect", "make_transport"]

#: The names that :func:`make_transport` knows.
TRANSPORTS: Final = ("pipe", "zmq", "stdio")


def make_transport(name: str, *, endpoint: str = "") -> Transport:
    """Return a transport that is not open yet.

    Args:
        name: ``pipe``, ``zmq`` or ``stdio``.
        endpoint: Where the pool listens, for ``zmq`` only: empty for a socket in a private directory, or
            ``tcp://HOST:PORT`` (``*`` lets the system choose the port), which always means CURVE.

    Raises:
        UnknownTransport: no transport has that name.
        ValueError: the transport takes no such endpoint.
    """
    if name == "zmq":
        from llamaherd.transport.frames import FrameTransport

        return FrameTransport(endpoint)
    if name not in TRANSPORTS:
        raise UnknownTransport(f"no transport is called {name!r}; there are {', '.join(TRANSPORTS)}")
    if endpoint:
        raise ValueError(f"the transport {name} has no endpoint to listen on, so it cannot take {endpoint!r}")
    from llamaherd.transport.local import PipeTransport, StdioTransport

    return PipeTransport() if name == "pipe" else StdioTransport()


def connect(stdio: "Stdio") -> ChildChannel:
    """Return the channel of the worker that this process is.

    The address is read from the environment and removed from it. On the ``stdio`` transport the channel takes both of
    ``stdio``'s descriptors; on the others they stay the caller's, who watches ``stdio.control`` for end of file.

    Raises:
        BrokenChannel: this process was not started as a worker, or the pool does not answer.
        UnknownTransport: the address names a transport that this version does not have.
    """
    text = os.environ.pop(CHANNEL_ENV, None)
    if text is None:
        raise BrokenChannel(f"{CHANNEL_ENV} is not set: only a pool can start a worker")
    try:
        address = msgspec.json.decode(text, type=ChildAddress)
    except msgspec.DecodeError as error:
        raise BrokenChannel(f"{CHANNEL_ENV} holds no address: {error}") from None
    if address.transport == "zmq":
        from llamaherd.transport.dealers import FrameChild

        return FrameChild(address)
    from llamaherd.transport.blocking import PipeWire, StreamChild
    from llamaherd.transport.framing import from_pool

    if address.transport == "pipe":
        from llamaherd.transport.pipes import RecordFraming

        for fd in (address.read_fd, address.write_fd):
            os.set_inheritable(fd, False)
        return StreamChild(PipeWire(address.read_fd, address.write_fd), RecordFraming(from_pool))
    if address.transport == "stdio":
        from llamaherd.transport.lines import CHILD_PREFIX, POOL_PREFIX, LineFraming

        return StreamChild(PipeWire(*stdio), LineFraming(from_pool, sends=CHILD_PREFIX, receives=POOL_PREFIX))
    raise UnknownTransport(f"no transport is called {address.transport!r}; there are {', '.join(TRANSPORTS)}")
