"""GBNF, llama.cpp's notation for grammars: read, and refused with a reason where it cannot be used.

The notation is the one of llama.cpp's ``grammars/README.md``. What its parser takes in silence and then does otherwise
is an error here: a repetition of more than 2,000 that becomes unlimited, bounds the wrong way round, an empty or a
backward range of characters. So is what would take its matcher for ever: hidden left recursion.

Pure; used by the manager, to refuse early, and by the worker.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple, TypeAlias

__all__ = ["MAX_SOURCE", "Chars", "Element", "GrammarError", "Ref", "Rule", "Rules", "TokenRef", "parse"]

#: Longest source, in characters.
MAX_SOURCE: Final = 64 * 1024
#: Most elements of all rules together, repetitions written out.
MAX_ELEMENTS: Final = 20_000
_MAX_NESTING: Final = 64
_MAX_REPEAT: Final = 2000
_LAST_CHAR: Final = 0x10FFFF

_WORD: Final = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-")
_DIGITS: Final = frozenset("0123456789")
_HEX: Final = frozenset("0123456789abcdefABCDEF")
_PLAIN_ESCAPES: Final = {"t": "\t", "r": "\r", "n": "\n", "\\": "\\", '"': '"', "[": "[", "]": "]", "-": "-"}
_HEX_ESCAPES: Final = {"x": 2, "u": 4, "U": 8}


class GrammarError(ValueError):
    """A grammar cannot be used; the text says where and why."""


class Chars(NamedTuple):
    """One character out of ranges, which are sorted, apart, and inclusive."""

    ranges: tuple[tuple[int, int], ...]


class Ref(NamedTuple):
    """Another rule, by its index."""

    rule: int


class TokenRef(NamedTuple):
    """One token of the model, by its id or its text; or any other token."""

    token: int | str
    negated: bool


Element: TypeAlias = Chars | Ref | TokenRef
#: A rule's alternatives, each a sequence of elements.
Rule: TypeAlias = tuple[tuple[Element, ...], ...]


@dataclass(frozen=True)
class Rules:
    """A grammar that was read. ``nullable`` tells of each rule whether it matches the empty text."""

    rules: tuple[Rule, ...]
    root: int
    nullable: tuple[bool, ...]


def parse(source: str) -> Rules:
    """Read a grammar, whose first symbol is ``root``.

    Raises:
        GrammarError: not GBNF, a rule is missing, left recursion, or too large.
    """
    if len(source) > MAX_SOURCE:
        raise GrammarError(f"the grammar has {len(source)} characters, and at most {MAX_SOURCE} are allowed")
    parser = _Parser(source)
    parser.read()
    names = parser.names
    for name, index in names.items():
        if index not in parser.rules:
            raise GrammarError(f"rule {name!r} is used and not defined")
    if "root" not in names:
        raise GrammarError("there is no rule named 'root'")
    rules = tuple(parser.rules[index] for index in range(len(parser.rules)))
    nullable = _nullable(rules)
    _refuse_left_recursion(rules, nullable, {index: name for name, index in names.items()})
    return Rules(rules, names["root"], nullable)


class _Parser:
    """Recursive descent over one source. Groups and repetitions become rules of their own."""

    def __init__(self, source: str) -> None:
        self._source: Final = source + "\0"
        self._at = 0
        self._depth = 0
        self._elements = 0
        self.names: Final[dict[str, int]] = {}
        self.rules: Final[dict[int, Rule]] = {}
        self._count = 0

    def read(self) -> None:
        if "\0" in self._source[:-1]:
            raise GrammarError("the grammar holds a NUL character")
        self._space(newlines=True)
        while self._next != "\0":
            self._rule()

    # --- characters ---

    @property
    def _next(self) -> str:
        return self._source[self._at]

    def _error(self, text: str, at: int | None = None) -> GrammarError:
        at = self._at if at is None else at
        line = self._source.count("\n", 0, at) + 1
        column = at - (self._source.rfind("\n", 0, at) + 1) + 1
        return GrammarError(f"line {line}, column {column}: {text}")

    def _found(self) -> str:
        return "the end" if self._next == "\0" else repr(self._next)

    def _take(self, text: str) -> bool:
        if not self._source.startswith(text, self._at):
            return False
        self._at += len(text)
        return True

    def _run(self, allowed: frozenset[str]) -> str:
        start = self._at
        while self._next in allowed:
            self._at += 1
        return self._source[start : self._at]

    def _space(self, *, newlines: bool) -> None:
        while True:
            if self._next in " \t" or (newlines and self._next in "\r\n"):
                self._at += 1
            elif self._next == "#":
                while self._next not in "\r\n\0":
                    self._at += 1
            else:
                return

    # --- rules ---

    def _symbol(self, name: str) -> int:
        if name not in self.names:
            self.names[name] = self._new_rule()
        return self.names[name]

    def _new_rule(self) -> int:
        self._count += 1
        return self._count - 1

    def _define(self, index: int, rule: Rule) -> None:
        self._elements += sum(map(len, rule)) + len(rule)
        if self._elements > MAX_ELEMENTS:
            raise self._error(f"the grammar is too large: more than {MAX_ELEMENTS} elements, repetitions written out")
        self.rules[index] = rule

    def _rule(self) -> None:
        name = self._run(_WORD)
        if not name:
            raise self._error(f"expected a rule's name, found {self._found()}")
        self._space(newlines=False)
        if not self._take("::="):
            raise self._error(f"expected '::=' after {name!r}, found {self._found()}")
        self._space(newlines=True)
        self._define(self._symbol(name), self._alternatives(nested=False))
        if self._next not in "\r\n\0":
            raise self._error(f"expected an element or the end of the line, found {self._found()}")
        self._space(newlines=True)

    def _alternatives(self, *, nested: bool) -> Rule:
        alternatives = [self._sequence(nested=nested)]
        while self._take("|"):
            self._space(newlines=True)
            alternatives.append(self._sequence(nested=nested))
        return tuple(alternatives)

    def _sequence(self, *, nested: bool) -> tuple[Element, ...]:
        sequence: list[Element] = []
        last: list[Element] | None = None
        while True:
            bounds = self._bounds(nested=nested)
            if bounds is not None:
                if not last:
                    raise self._error("a repetition needs something to repeat before it")
                last = self._repeated(last, *bounds)
            else:
                element = self._element(nested=nested)
                if element is None:
                    return (*sequence, *(last or ()))
                sequence += last or ()
                last = element
            if len(sequence) + len(last) > MAX_ELEMENTS:
                raise self._error(f"the grammar is too large: more than {MAX_ELEMENTS} elements")
            self._space(newlines=nested)

    def _element(self, *, nested: bool) -> list[Element] | None:
        """Return the next element, a literal's characters as one; None where the sequence ends."""
        start = self._at
        if self._take('"'):
            return list(self._literal(start))
        if self._take("["):
            return [self._class(start)]
        if self._take("."):
            return [Chars(((0, _LAST_CHAR),))]
        if self._next in "<!":
            return [self._token()]
        if self._next in _WORD:
            return [Ref(self._symbol(self._run(_WORD)))]
        if self._take("("):
            return [self._group(start)]
        return None

    def _group(self, start: int) -> Ref:
        self._depth += 1
        if self._depth > _MAX_NESTING:
            raise self._error(f"more than {_MAX_NESTING} nested parentheses")
        self._space(newlines=True)
        index = self._new_rule()
        self._define(index, self._alternatives(nested=True))
        if not self._take(")"):
            raise self._error(f"expected ')' for the '(' at {self._place(start)}, found {self._found()}")
        self._depth -= 1
        return Ref(index)

    def _place(self, at: int) -> str:
        return str(self._error("", at)).rstrip(": ")

    # --- repetitions ---

    def _bounds(self, *, nested: bool) -> tuple[int, int | None] | None:
        """Return least and most repetitions, most None for no limit; None if no repetition stands here."""
        for sign, bounds in (("*", (0, None)), ("+", (1, None)), ("?", (0, 1))):
            if self._take(sign):
                return bounds
        start = self._at
        if not self._take("{"):
            return None
        self._space(newlines=nested)
        least = self._number()
        most: int | None = least
        if self._take(","):
            self._space(newlines=nested)
            most = None if self._next == "}" else self._number()
        if not self._take("}"):
            raise self._error(f"expected '}}' for the '{{' at {self._place(start)}, found {self._found()}")
        if most is not None and most < least:
            raise self._error(f"a repetition from {least} to {most} times", start)
        if max(least, most or 0) > _MAX_REPEAT:
            raise self._error(f"a repetition may have at most {_MAX_REPEAT} times", start)
        return least, most

    def _number(self) -> int:
        digits = self._run(_DIGITS)
        if not digits:
            raise self._error(f"expected a number, found {self._found()}")
        self._space(newlines=True)
        return min(int(digits[:10]), 10**9)

    def _repeated(self, what: list[Element], least: int, most: int | None) -> list[Element]:
        """Return ``what`` so many times: as often as it must be, then a chain of rules that may each end."""
        if len(what) > 1:
            index = self._new_rule()
            self._define(index, (tuple(what),))
            what = [Ref(index)]
        again: list[Element] = []
        if most is None:
            index = self._new_rule()
            self._define(index, ((*what, Ref(index)), ()))
            again = [Ref(index)]
        else:
            for _ in range(most - least):
                index = self._new_rule()
                self._define(index, ((*what, *again), ()))
                again = [Ref(index)]
        return what * least + again

    # --- what stands for characters and tokens ---

    def _literal(self, start: int) -> Iterator[Chars]:
        while not self._take('"'):
            if self._next == "\0":
                raise self._error("this text has no closing quote", start)
            char = self._char()
            yield Chars(((char, char),))

    def _class(self, start: int) -> Chars:
        negated = self._take("^")
        ranges: list[tuple[int, int]] = []
        while not self._take("]"):
            if self._next == "\0":
                raise self._error("this class of characters has no closing bracket", start)
            at = self._at
            low = high = self._char()
            if self._next == "-" and self._source[self._at + 1] not in "]\0":
                self._at += 1
                high = self._char()
                if high < low:
                    raise self._error("a range of characters that runs backward", at)
            ranges.append((low, high))
        if not ranges:
            raise self._error("an empty class of characters", start)
        merged = _merged(ranges)
        return Chars(tuple(_gaps(merged)) if negated else tuple(merged))

    def _char(self) -> int:
        start = self._at
        self._at += 1
        char = self._source[start]
        if char != "\\":
            return ord(char)
        escape = self._next
        self._at += 1
        if escape in _PLAIN_ESCAPES:
            return ord(_PLAIN_ESCAPES[escape])
        length = _HEX_ESCAPES.get(escape)
        if length is None:
            raise self._error("an escape that is not known", start)
        digits = self._source[self._at : self._at + length]
        if len(digits) < length or not _HEX.issuperset(digits):
            raise self._error(f"'\\{escape}' needs {length} hexadecimal digits", start)
        self._at += length
        value = int(digits, 16)
        if value > _LAST_CHAR:
            raise self._error("a character beyond U+10FFFF", start)
        return value

    def _token(self) -> TokenRef:
        start = self._at
        negated = self._take("!")
        if not self._take("<"):
            raise self._error("expected '<' after '!'")
        if self._take("["):
            digits = self._run(_DIGITS)
            if not digits or len(digits) > 9 or not self._take("]>"):
                raise self._error("expected a token as '<[id]>'", start)
            return TokenRef(int(digits), negated)
        end = self._source.find(">", self._at)
        if end < 0:
            raise self._error("this token has no closing '>'", start)
        text = self._source[self._at - 1 : end + 1]
        self._at = end + 1
        return TokenRef(text, negated)


def _merged(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for low, high in sorted(ranges):
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
        else:
            merged.append((low, high))
    return merged


def _gaps(ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    start = 0
    for low, high in ranges:
        if start < low:
            yield start, low - 1
        start = high + 1
    if start <= _LAST_CHAR:
        yield start, _LAST_CHAR


def _nullable(rules: tuple[Rule, ...]) -> tuple[bool, ...]:
    """Return of each rule whether it matches the empty text. Linear: a rule is looked at again only for its users."""
    users: dict[int, set[int]] = {}
    for index, rule in enumerate(rules):
        for sequence in rule:
            for element in sequence:
                if isinstance(element, Ref):
                    users.setdefault(element.rule, set()).add(index)
    empty = [False] * len(rules)
    todo = list(range(len(rules)))
    while todo:
        index = todo.pop()
        if not empty[index] and any(
            all(isinstance(element, Ref) and empty[element.rule] for element in sequence) for sequence in rules[index]
        ):
            empty[index] = True
            todo.extend(users.get(index, ()))
    return tuple(empty)


def _refuse_left_recursion(rules: tuple[Rule, ...], nullable: tuple[bool, ...], names: dict[int, str]) -> None:
    """Refuse a rule that can begin with itself and has something to follow: matching it would never come to a
    character. A rule that can begin with itself alone is harmless.
    """
    edges = [list(_begins_with(rule, nullable)) for rule in rules]
    component = _components([[target for target, _ in targets] for targets in edges])
    for index, targets in enumerate(edges):
        for target, followed in targets:
            if followed and component[index] == component[target]:
                name = names.get(index) or names.get(target)
                where = f"rule {name!r}" if name else "a group or repetition"
                raise GrammarError(f"left recursion: {where} can begin with itself")


def _begins_with(rule: Rule, nullable: tuple[bool, ...]) -> Iterator[tuple[int, bool]]:
    """Yield the rules that a rule may begin with, and whether anything stands behind them."""
    for sequence in rule:
        for position, element in enumerate(sequence):
            if not isinstance(element, Ref):
                break
            yield element.rule, position + 1 < len(sequence)
            if not nullable[element.rule]:
                break


def _components(edges: list[list[int]]) -> list[int]:
    """Return the strongly connected component of each node (Tarjan's algorithm, without recursion)."""
    order = [-1] * len(edges)
    low = [0] * len(edges)
    component = [-1] * len(edges)
    path: list[int] = []
    count = 0
    for start in range(len(edges)):
        work = [(start, 0)] if order[start] < 0 else []
        while work:
            node, position = work.pop()
            if position == 0:
                order[node] = low[node] = count
                count += 1
                path.append(node)
            for index in range(position, len(edges[node])):
                target = edges[node][index]
                if order[target] < 0:
                    work += ((node, index + 1), (target, 0))
                    break
                if component[target] < 0:
                    low[node] = min(low[node], order[target])
            else:
                if low[node] == order[node]:
                    while component[node] < 0:
                        component[path.pop()] = node
                if work:
                    parent = work[-1][0]
                    low[parent] = min(low[parent], low[node])
    return component
