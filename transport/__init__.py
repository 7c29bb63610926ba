"""Moves messages between the pool and its workers, the same ones over any transport.

Importing it loads neither asyncio nor ZeroMQ, since every worker starts with it.
"""

from llamaherd.transport.channel import (
    CHANNEL_ENV,
    RECEIVE_LIMIT,
    SEND_LIMIT,
    Channel,
    ChildAddress,
    ChildChannel,
    Endpoint,
    Transport,
)
from llamaherd.transport.errors import (
    BrokenChannel,
    ChannelClosed,
    ChannelError,
    ChannelFull,
    EndOfChannel,
    MessageTooLarge,
    UnknownTransport,
)
from llamaherd.transport.factory import TRANSPORTS, connect, make_transport
from llamaherd.transport.stdio import Stdio, take_stdio
from llamaherd.transport.traffic import Traffic

__all__ = [
    "CHANNEL_ENV",
    "RECEIVE_LIMIT",
    "SEND_LIMIT",
    "TRANSPORTS",
    "BrokenChannel",
    "Channel",
    "ChannelClosed",
    "ChannelError",
    "ChannelFull",
    "ChildAddress",
    "ChildChannel",
    "EndOfChannel",
    "Endpoint",
    "MessageTooLarge",
    "Stdio",
    "Traffic",
    "Transport",
    "UnknownTransport",
    "connect",
    "make_transport",
    "take_stdio",
]
