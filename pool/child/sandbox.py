"""A Jinja environment for templates that nobody has vetted: no way out of it, and no way to use the machine up."""

import json
from collections.abc import Generator, Iterator, Sized
from contextlib import contextmanager
from datetime import datetime
from time import monotonic
from typing import Any, Final, NoReturn, cast

from jinja2 import TemplateRuntimeError, nodes
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

__all__ = ["BoundedEnvironment", "Bounds", "OverBounds"]

#: Largest value, in characters or items, that an operation or a call may return.
_MOST_ITEMS: Final = 10_000_000
#: Largest number that a template may pass to a call or raise to a power: widths and counts, not data.
_MOST_NUMBER: Final = 1_000_000


class OverBounds(Exception):
    """The template used more than it may."""


class Bounds:
    """What one rendering may use: seconds of time, characters of output."""

    def __init__(self, *, seconds: float = 5.0, characters: int = 8_000_000) -> None:
        self._seconds = seconds
        self._deadline = monotonic() + seconds
        self._characters = characters

    def tick(self) -> None:
        """Raise OverBounds when the time is up."""
        if monotonic() > self._deadline:
            raise OverBounds(f"it ran longer than {self._seconds:g} s")

    def collect(self, chunks: Iterator[str]) -> str:
        """Join the output, chunk by chunk. Raises OverBounds when it is too long or too late."""
        taken: list[str] = []
        length = 0
        for chunk in chunks:
            self.tick()
            length += len(chunk)
            if length > self._characters:
                raise OverBounds(f"its output is longer than {self._characters} characters")
            taken.append(chunk)
        return "".join(taken)


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """The environment that chat templates expect (that of Hugging Face's ``apply_chat_template``), with bounds.

    Loops and calls check the time, operators and calls check the size of what they make. Rendering is for one thread
    and must happen inside :meth:`bounded`.
    """

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[LoopControlExtension, _GenerationTag])
        self._bounds = Bounds()
        self.filters.update(tojson=_tojson)
        self.globals.update(cast(Any, {"raise_exception": _raise_exception, "strftime_now": _strftime_now}))

    @contextmanager
    def bounded(self, bounds: Bounds) -> Generator[Bounds]:
        """Apply ``bounds`` to what is rendered inside."""
        before, self._bounds = self._bounds, bounds
        try:
            yield bounds
        finally:
            self._bounds = before

    def tick(self) -> str:
        """Called at the head of every loop body that a template has."""
        self._bounds.tick()
        return ""

    def concat_bounded(self, *values: object) -> str:
        """Stands for the ``~`` operator."""
        self._bounds.tick()
        texts = [str(value) for value in values]
        _check_total(sum(map(len, texts)))
        return "".join(texts)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Call something for the template, bounded."""
        __self._bounds.tick()
        for value in (*args, *kwargs.values()):
            if isinstance(value, int) and abs(value) > _MOST_NUMBER:
                raise OverBounds(f"a call was given the number {value:.3e}")
        return _checked(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Compute an operator, bounded."""
        self._bounds.tick()
        if operator == "*":
            _check_product(left, right)
        elif operator == "**" and not (abs(left) <= _MOST_NUMBER and abs(right) <= 64):
            raise OverBounds("a power is too large")
        elif operator == "%" and isinstance(left, str):
            # A width in a format string allocates what it says; chat templates have no use for it.
            raise OverBounds("the % operator on text is not available")
        return _checked(super().call_binop(context, operator, left, right))

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all(nodes.For):
            tick = nodes.Call(nodes.EnvironmentAttribute("tick"), [], [], None, None)
            loop.body.insert(0, nodes.ExprStmt(tick).set_lineno(loop.lineno))
        return _ConcatToCall().visit(tree)  # type: ignore[no-any-return]


class _ConcatToCall(NodeTransformer):
    """Sends ``~``, which Jinja compiles to plain joining, through the bounded function."""

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        function = nodes.EnvironmentAttribute("concat_bounded")
        return nodes.Call(function, node.nodes, [], None, None).set_lineno(node.lineno)


class _GenerationTag(Extension):
    """``{% generation %}`` marks an assistant's text for training; for a prompt it is just its content."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _checked(value: Any) -> Any:
    if isinstance(value, str | bytes | list | tuple | dict):
        _check_total(len(cast(Sized, value)))
    return cast(Any, value)


def _check_product(left: Any, right: Any) -> None:
    for text, times in ((left, right), (right, left)):
        if isinstance(text, str | list | tuple) and isinstance(times, int):
            _check_total(len(cast(Sized, text)) * max(times, 0))
    if isinstance(left, int) and isinstance(right, int) and left.bit_length() + right.bit_length() > _MOST_NUMBER:
        raise OverBounds("a product is too large")


def _check_total(length: int) -> None:
    if length > _MOST_ITEMS:
        raise OverBounds(f"a value of {length} items is larger than {_MOST_ITEMS}")


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
        default=_listed,
    )


def _listed(value: Any) -> list[Any]:
    """Return what filters such as ``map`` make, which are lists for a template."""
    if not hasattr(value, "__next__"):
        raise TypeError(f"a value of type {type(value).__name__} is not JSON")
    return list(value)


def _raise_exception(message: object) -> NoReturn:
    raise TemplateRuntimeError(str(message))


def _strftime_now(pattern: str) -> str:
    return datetime.now().astimezone().strftime(pattern)
