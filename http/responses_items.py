"""The items that a response's output is made of, each with the events that add, extend and end it.

An item keeps what it was told, for the events at its end say all of it again.
"""

import secrets
from abc import ABC, abstractmethod
from typing import Any

import msgspec

__all__ = ["CallItem", "Item", "MessageItem", "ReasoningItem"]


class Item(ABC):
    """One item of the output.

    Args:
        index: Its place in the output.
        prefix: How its id begins.
    """

    def __init__(self, index: int, prefix: str) -> None:
        self.index = index
        self.id = f"{prefix}_{secrets.token_hex(24)}"
        self._texts: list[str] = []

    @property
    def text(self) -> str:
        """All that it was told."""
        return "".join(self._texts)

    @abstractmethod
    def to_json(self, status: str) -> dict[str, Any]:
        """Return the item as it is by now."""

    def begin(self) -> list[dict[str, Any]]:
        """Return the events that add it, while it is empty."""
        return [self._event("output_item.added", item=self.to_json("in_progress"))]

    def end(self, status: str) -> list[dict[str, Any]]:
        """Return the events that end it."""
        return [self._event("output_item.done", item=self.to_json(status))]

    def status_at(self, *, limit: bool) -> str:
        """Return what it is at its end, or where the answer was cut at its limit."""
        return "incomplete" if limit else "completed"

    def _event(self, name: str, /, **more: Any) -> dict[str, Any]:
        return {"type": f"response.{name}", "output_index": self.index, **more}

    def _inner(self, name: str, /, **more: Any) -> dict[str, Any]:
        return self._event(name, item_id=self.id, **more)


class MessageItem(Item):
    """Text for the user."""

    def __init__(self, index: int) -> None:
        super().__init__(index, "msg")
        self._probs: list[dict[str, Any]] = []

    def to_json(self, status: str) -> dict[str, Any]:
        content = [self._part(self.text, self._probs)] if self._texts else []
        return {"id": self.id, "type": "message", "role": "assistant", "status": status, "content": content}

    def add(self, text: str, probs: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the event that brings more text, and how likely its tokens were."""
        self._texts.append(text)
        self._probs += probs
        return self._inner("output_text.delta", content_index=0, delta=text, logprobs=probs)

    def begin(self) -> list[dict[str, Any]]:
        return [*super().begin(), self._inner("content_part.added", content_index=0, part=self._part("", []))]

    def end(self, status: str) -> list[dict[str, Any]]:
        return [
            self._inner("output_text.done", content_index=0, text=self.text, logprobs=self._probs),
            self._inner("content_part.done", content_index=0, part=self._part(self.text, self._probs)),
            *super().end(status),
        ]

    def _part(self, text: str, probs: list[dict[str, Any]]) -> dict[str, Any]:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": probs}


class ReasoningItem(Item):
    """What the model thinks before it speaks."""

    def __init__(self, index: int) -> None:
        super().__init__(index, "rs")

    def to_json(self, status: str) -> dict[str, Any]:
        content = [self._part(self.text)] if self._texts else []
        return {
            "id": self.id,
            "type": "reasoning",
            "status": status,
            "summary": [],
            "content": content,
            "encrypted_content": "",
        }

    def add(self, text: str) -> dict[str, Any]:
        """Return the event that brings more of it."""
        self._texts.append(text)
        return self._inner("reasoning_text.delta", content_index=0, delta=text)

    def begin(self) -> list[dict[str, Any]]:
        return [*super().begin(), self._inner("content_part.added", content_index=0, part=self._part(""))]

    def end(self, status: str) -> list[dict[str, Any]]:
        return [
            self._inner("reasoning_text.done", content_index=0, text=self.text),
            self._inner("content_part.done", content_index=0, part=self._part(self.text)),
            *super().end(status),
        ]

    def _part(self, text: str) -> dict[str, Any]:
        return {"type": "reasoning_text", "text": text}


class CallItem(Item):
    """A function that the model wants to be called.

    Args:
        call: What the function's answer refers to.
    """

    def __init__(self, index: int, call: str, name: str) -> None:
        super().__init__(index, "fc")
        self._call = call
        self._name = name

    def to_json(self, status: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "type": "function_call",
            "status": status,
            "call_id": self._call,
            "name": self._name,
            "arguments": self.text,
        }

    def add(self, arguments: str) -> dict[str, Any]:
        """Return the event that brings more of the arguments."""
        self._texts.append(arguments)
        return self._inner("function_call_arguments.delta", delta=arguments)

    def end(self, status: str) -> list[dict[str, Any]]:
        done = self._inner("function_call_arguments.done", name=self._name, arguments=self.text)
        return [done, *super().end(status)]

    def status_at(self, *, limit: bool) -> str:
        # The limit may have come behind the call: it can be made then.
        return super().status_at(limit=limit and not _is_json(self.text))


def _is_json(text: str) -> bool:
    try:
        msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):
        return False
    return True
