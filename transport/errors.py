"""What can end or refuse a message: the transport's part of the error tree.

::

    ChannelError
    ├── ChannelClosed      I closed it: this side called ``aclose`` or ``abort``
    ├── EndOfChannel       they closed it: the peer said goodbye, or its end was closed in order
    ├── BrokenChannel      it broke: the peer died mid-record, or sent what cannot be framed
    ├── ChannelFull        the peer does not read and the send buffer is full
    ├── MessageTooLarge    the caller's message is over the size cap; nothing was sent
    └── UnknownTransport   no transport has this name (a ValueError too)
"""

__all__ = [
    "BrokenChannel",
    "ChannelClosed",
    "ChannelError",
    "ChannelFull",
    "EndOfChannel",
    "MessageTooLarge",
    "UnknownTransport",
]


class ChannelError(Exception):
    """Base of everything that a channel raises."""


class ChannelClosed(ChannelError):
    """This side closed the channel; the call came too late."""


class EndOfChannel(ChannelError):
    """The peer closed the channel, and every message that it sent before was received."""


class BrokenChannel(ChannelError):
    """The channel is unusable: a torn record, one over the size cap, or an error of the operating system."""


class ChannelFull(ChannelError):
    """The peer has stopped reading and the bounded send buffer has no room for this message; it was not sent."""


class MessageTooLarge(ChannelError):
    """The encoded message is over ``MAX_MESSAGE_BYTES``; it was not sent and the channel goes on."""


class UnknownTransport(ChannelError, ValueError):
    """No transport has the name that was asked for; the text lists those that exist."""
