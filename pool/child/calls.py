"""Tool calls as models write them in JSON, read as they come.

The names of the fields differ from family to family and mean the same, so one reader knows them all: ``name`` or
``tool_name``; ``arguments`` or ``parameters``; ``id`` or ``tool_call_id``; the call itself or inside of ``function``,
``tool_call`` or ``tool_calls``.
"""

import re
import secrets
import string
from collections.abc import Callable, Iterable
from typing import Final

from llamaherd.pool.child.scan import Reading, Scan
from llamaherd.transport.messages import CallDelta

__all__ = ["NAME", "Calls", "long_id", "read_arguments", "read_json", "short_id"]

#: What a function's name is made of.
NAME: Final = re.compile(r"""[^\s\[\]{}()<>"'\\,]""")

_NAMES: Final = frozenset({"name", "tool_name"})
_ARGUMENTS: Final = frozenset({"arguments", "parameters"})
_IDS: Final = frozenset({"id", "tool_call_id"})
_WRAPPERS: Final = frozenset({"function", "tool_call", "tool_calls"})
_MOST_DEPTH: Final = 4
_ALPHABET: Final = string.ascii_letters + string.digits


def long_id() -> str:
    """Return a new call's id, in OpenAI's form."""
    return "call_" + "".join(secrets.choice(_ALPHABET) for _ in range(24))


def short_id() -> str:
    """Return a new call's id of nine characters, the only form that Mistral's templates take back."""
    return "".join(secrets.choice(_ALPHABET) for _ in range(9))


class Calls:
    """The calls of one answer, and what is told of them.

    Args:
        names: The functions that may be called; anything else is no call.
        new_id: Makes an id for a call that came without one.
    """

    def __init__(self, names: Iterable[str], new_id: Callable[[], str] = long_id) -> None:
        self._names: Final = frozenset(names)
        self._new_id: Final = new_id
        self._deltas: list[CallDelta] = []
        self._empty = False
        #: Calls that have begun, and calls that have ended.
        self.begun = 0
        self.ended = 0

    def knows(self, name: str) -> bool:
        """Whether there is a function of that name."""
        return name in self._names

    def begin(self, name: str, ident: str = "") -> None:
        """Tell a new call."""
        self._deltas.append(CallDelta(self.begun, "", ident or self._new_id(), name))
        self.begun += 1
        self._empty = True

    def add(self, text: str) -> None:
        """Tell more of the arguments, which are JSON, of the call that has begun."""
        if not text:
            return
        self._empty = False
        last = self._deltas[-1] if self._deltas else None
        if last is not None and last.index == self.begun - 1:
            self._deltas[-1] = CallDelta(last.index, last.arguments + text, last.id, last.name)
        else:
            self._deltas.append(CallDelta(self.begun - 1, text))

    def end(self) -> None:
        """Tell that a call is whole."""
        if self._empty:
            self.add("{}")
        self.ended += 1

    def take(self) -> tuple[CallDelta, ...]:
        """Return what was told since the last time."""
        deltas, self._deltas = tuple(self._deltas), []
        return deltas


def read_json(scan: Scan, calls: Calls) -> Reading[None]:
    """Read a call, or a list of them, as far as it is one."""
    yield from scan.blank()
    if (yield from scan.peek()) == "[":
        yield from _list(scan, calls, 0)
    else:
        yield from _Object(scan, calls).read(0)


def read_arguments(scan: Scan, calls: Calls) -> Reading[bool]:
    """Read the arguments of a call that has begun; whether they end."""
    if (yield from scan.peek()) == '"':  # some models write the object as a text
        text = yield from scan.string()
        if text is None:
            return False
        calls.add(text)
        scan.settle()
        return True
    return (yield from scan.value(calls.add))


def _list(scan: Scan, calls: Calls, depth: int) -> Reading[bool]:
    """Read a list of calls; whether it is one."""
    yield from scan.literal("[")
    while True:
        yield from scan.blank()
        if not (yield from _Object(scan, calls).read(depth)):
            return False
        yield from scan.blank()
        if (yield from scan.literal("]")):
            scan.settle()
            return True
        if not (yield from scan.literal(",")):
            return False


class _Object:
    """One object that may be a call."""

    def __init__(self, scan: Scan, calls: Calls) -> None:
        self._scan: Final = scan
        self._calls: Final = calls
        self._name = ""
        self._id = ""
        #: Arguments that came before the name.
        self._early: str | None = None
        self._begun = False
        #: Whether a list inside it held calls.
        self._several = False

    def read(self, depth: int) -> Reading[bool]:
        """Read it; whether it was a call, or held some, and is whole."""
        if not (yield from self._fields(depth)):
            return False
        if self._several:
            self._scan.settle()
            return True
        if not self._begun:
            if not self._name or not self._is_object(self._early or "{}"):
                return False
            self._calls.begin(self._name, self._id)
            self._calls.add(self._early or "{}")
            self._begun = True
        self._scan.settle()
        self._calls.end()
        return True

    def _fields(self, depth: int) -> Reading[bool]:
        scan = self._scan
        if depth > _MOST_DEPTH or not (yield from scan.literal("{")):
            return False
        first = True
        while True:
            yield from scan.blank()
            if (yield from scan.literal("}")):
                return not first
            if not first:
                if not (yield from scan.literal(",")):
                    return False
                yield from scan.blank()
            first = False
            key = yield from scan.string()
            yield from scan.blank()
            if key is None or not (yield from scan.literal(":")):
                return False
            yield from scan.blank()
            if not (yield from self._field(key, depth)):
                return False
            if self._begun:
                scan.settle()

    def _field(self, key: str, depth: int) -> Reading[bool]:
        scan, first = self._scan, (yield from self._scan.peek())
        if key in _NAMES or (key == "function" and first == '"'):
            name = yield from scan.string()
            if name is None or self._name or not self._calls.knows(name):
                return False
            self._name = name
        elif key in _ARGUMENTS and not self._begun:
            return (yield from self._arguments())
        elif key in _IDS and first == '"':
            self._id = (yield from scan.string()) or ""
        elif key in _WRAPPERS and first == "{" and not self._name:
            return (yield from self._fields(depth + 1))
        elif key in _WRAPPERS and first == "[" and not self._name:
            self._several = True
            return (yield from _list(scan, self._calls, depth + 1))
        else:
            return (yield from scan.whole()) is not None
        return True

    def _arguments(self) -> Reading[bool]:
        scan = self._scan
        if not self._name:
            text = yield from (scan.string() if (yield from scan.peek()) == '"' else scan.whole())
            self._early = text
            return text is not None
        if (yield from scan.peek()) not in ("{", '"'):
            return False
        self._begun = True
        self._calls.begin(self._name, self._id)
        scan.settle()
        return (yield from read_arguments(scan, self._calls))

    @staticmethod
    def _is_object(text: str) -> bool:
        return text.lstrip().startswith("{")
