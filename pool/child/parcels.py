"""News of a step that are too large for one message: they go in several, and a request that asks for more than a
message holds is told so.
"""

from collections.abc import Callable, Iterable
from typing import Final

from llamaherd.transport import MessageTooLarge
from llamaherd.transport.messages import ChildMessage, Failed, Tokens

__all__ = ["send_all"]

_TOO_LARGE: Final = "too_large"


def send_all(messages: Iterable[ChildMessage], send: Callable[[ChildMessage], None]) -> list[int]:
    """Send messages in their order.

    Return the requests whose news no message holds: they have failed, and their callers wait for nothing more.
    """
    failed: list[int] = []
    for message in messages:
        try:
            send(message)
        except MessageTooLarge as error:
            if not isinstance(message, Tokens):
                raise
            failed += _send_apart(message, send, error)
    return failed


def _send_apart(message: Tokens, send: Callable[[ChildMessage], None], error: MessageTooLarge) -> list[int]:
    parts = [
        *(Tokens(deltas=(delta,)) for delta in message.deltas),
        *(Tokens(typed=(delta,)) for delta in message.typed),
        *(Tokens(progress=(one,)) for one in message.progress),
    ]
    if len(parts) > 1:
        return send_all(parts, send)
    number = next(one.request for news in (message.deltas, message.typed, message.progress) for one in news)
    text = f"what there is to tell of this request at a time is too much, ask for less (n_probs): {error}"
    send(Failed(request=number, message=text, fault="caller", code=_TOO_LARGE))
    return [number]
