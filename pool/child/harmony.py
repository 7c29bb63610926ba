"""Answers in OpenAI's harmony format, which gpt-oss writes: every part is a message of its own, with a channel.

``analysis`` is reasoning, ``final`` is content, ``commentary`` with a recipient is a call of it. A message is
``<|start|>assistant<|channel|>final<|message|>text<|end|>``; the prompt has written the first ``<|start|>assistant``.
"""

import re
from typing import Any, Final

from llamaherd.pool.child.calls import read_arguments
from llamaherd.pool.child.dialect import Dialect
from llamaherd.pool.child.reply import Reply
from llamaherd.pool.child.scan import Reading

__all__ = ["ANALYSIS", "ANALYSIS_END", "FINAL", "HARMONY", "HarmonyReply", "is_harmony", "opened_message"]

_CHANNEL, _MESSAGE, _START, _END = "<|channel|>", "<|message|>", "<|start|>", "<|end|>"
#: What opens reasoning, what ends it, and what opens the content behind that.
ANALYSIS: Final = f"{_CHANNEL}analysis{_MESSAGE}"
ANALYSIS_END: Final = _END
FINAL: Final = f"{_START}assistant{_CHANNEL}final{_MESSAGE}"
_RECIPIENT: Final = re.compile(r"to=functions\.([^\s<]+)")
_NAMED_CHANNEL: Final = re.compile(re.escape(_CHANNEL) + r"\s*(\w+)")

HARMONY: Final = Dialect("harmony", tokens=(_CHANNEL, _MESSAGE, _START, _END, "<|constrain|>"))


def is_harmony(template: str) -> bool:
    """Whether a chat template speaks this format."""
    return _CHANNEL in template and _MESSAGE in template


def opened_message(reasoning: str, content: str | None) -> str:
    """Return the beginning of an answer that goes on behind its reasoning, or behind its content if there is some."""
    begun = f"{_START}assistant{ANALYSIS}{reasoning}"
    return begun if content is None else f"{begun}{_END}{FINAL}{content}"


class HarmonyReply(Reply):
    """A :class:`~llamaherd.pool.child.reply.Reply` in this format.

    Args:
        split: Tell reasoning apart; otherwise it stays in the content, in its marks.
        within: The prompt has begun this channel's text.
        **more: As for a :class:`Reply`.
    """

    def __init__(self, *, split: bool, within: str = "", **more: Any) -> None:
        self._split: Final = split
        self._within: Final = within
        super().__init__(**more)

    def _read(self) -> Reading[None]:
        scan = self._scan
        if self._within:
            yield from self._text(reasoning=self._within == "analysis" and self._split)
        while (yield from scan.has()):
            scan.short = False
            header = yield from self._header()
            if header is None and self._cut and scan.short:
                return  # it was cut before it said anything
            if header is None:
                scan.rewind()
                yield from self._text(reasoning=False)
                continue
            recipient, channel = _RECIPIENT.search(header), _NAMED_CHANNEL.search(header)
            name = recipient[1] if recipient is not None else ""
            if self._calls.knows(name):
                scan.settle()
                yield from self._call(name)
                if self.full:
                    return
            elif channel is not None and channel[1] == "analysis" and "to=" not in header:
                scan.settle()
                if self._split:
                    yield from self._text(reasoning=True)
                else:
                    self._tell(ANALYSIS)
                    yield from self._text(reasoning=False)
                    self._tell(_END)
            else:
                if "to=" in header:  # a call of something that nobody offered
                    self._tell(header)
                scan.settle()
                yield from self._text(reasoning=False)

    def _header(self) -> Reading[str | None]:
        """Read what comes before a message's text; None if there is no such thing."""
        for begin in (_START, _CHANNEL, " to=", "to="):
            if (yield from self._scan.literal(begin)):
                rest = yield from self._scan.until(_MESSAGE)
                return None if rest is None else begin + rest
        return None

    def _text(self, *, reasoning: bool) -> Reading[None]:
        """Read a message's text and its end."""
        yield from self._scan.until(_END, self._reasoning.add if reasoning else self._tell)
        if reasoning:
            self._content.drop_lead()

    def _call(self, name: str) -> Reading[None]:
        scan, calls = self._scan, self._calls
        calls.begin(name)
        yield from scan.blank()
        if (yield from read_arguments(scan, calls)):
            calls.end()
            yield from scan.blank()
            scan.settle()
            self.full = not self._parallel
        for end in (_END, "<|call|>"):
            if (yield from scan.literal(end)):
                scan.settle()
