"""How much a channel has carried."""

import msgspec

__all__ = ["Traffic"]


class Traffic(msgspec.Struct):
    """Counts of one end, or the sum of several; whoever owns it adds to it.

    Attributes:
        received, sent: Messages.
        received_bytes: Bytes of the former as they came, framing included where the transport can tell.
        sent_bytes: Bytes of the latter's bodies.
    """

    received: int = 0
    received_bytes: int = 0
    sent: int = 0
    sent_bytes: int = 0

    def add(self, other: "Traffic") -> None:
        """Add the counts of another."""
        self.received += other.received
        self.received_bytes += other.received_bytes
        self.sent += other.sent
        self.sent_bytes += other.sent_bytes
