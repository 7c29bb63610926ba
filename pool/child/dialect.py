"""How the families of models write tool calls: which one a chat template speaks, and how its calls are found.

A template shows by the marks in its text how its model was taught. What is not known by its marks, but takes tools,
writes plain JSON objects (Llama 3.x); what does not take tools is told in a system message to do the same.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Final

from llamaherd.pool.child.calls import NAME, Calls, long_id, read_arguments, read_json, short_id
from llamaherd.pool.child.calls_tagged import Kinds, read_bare, read_function, read_keyed
from llamaherd.pool.child.scan import Reading, Scan

__all__ = ["GENERIC", "PLAIN", "Dialect", "dialect_of"]

#: Reads calls from behind a mark, as far as there are some.
Reader = Callable[[Scan, Calls, Kinds], Reading[None]]


@dataclass(frozen=True)
class Dialect:
    """How one family writes calls.

    Attributes:
        name: The family.
        marks: Texts that a call begins with, each with the reader of what follows.
        ends: What may close a call, the mark's own end first.
        tokens: Texts that are control tokens in some vocabularies and must be seen all the same.
        noise: Texts around calls that say nothing and are never part of an answer.
        bare: Whether an object at the beginning of a line may be a call too, without any mark.
        new_id: Makes the ids of its calls.
    """

    name: str
    marks: tuple[tuple[str, Reader], ...] = ()
    ends: tuple[str, ...] = ()
    tokens: tuple[str, ...] = ()
    noise: tuple[str, ...] = ()
    bare: bool = False
    new_id: Callable[[], str] = field(default=long_id)

    @property
    def openings(self) -> tuple[str, ...]:
        """Everything that a reader must stop at, longest first."""
        bare = ("{", "[") if self.bare else ()
        return tuple(sorted((*(text for text, _ in self.marks), *self.noise, *bare), key=len, reverse=True))

    def read(self, mark: str, scan: Scan, calls: Calls, kinds: Kinds) -> Reading[None]:
        """Read calls at ``mark``, as far as there are some, and what closes them."""
        scan.skip(len(mark))
        reader = next((reader for text, reader in self.marks if text == mark), _json)
        if mark in ("{", "["):
            scan.skip(-len(mark))
        yield from scan.blank()
        begun = calls.begun
        yield from reader(scan, calls, kinds)
        scan.rewind()
        if calls.begun == begun:
            return
        yield from scan.blank()
        for end in self.ends:
            # An answer that was cut within a call's end has no content for that.
            if (yield from scan.literal(end)) or scan.torn(end):
                scan.settle()
                return
        scan.rewind()


def _json(scan: Scan, calls: Calls, kinds: Kinds) -> Reading[None]:
    yield from read_json(scan, calls)


def _hermes(scan: Scan, calls: Calls, kinds: Kinds) -> Reading[None]:
    """After ``<tool_call>``: JSON (Hermes, Qwen), function tags (Qwen3-Coder) or a name and its keys (GLM)."""
    first = yield from scan.peek()
    if first in ("{", "["):
        yield from read_json(scan, calls)
    elif first == "<":
        yield from read_function(scan, calls, kinds)
    else:
        yield from read_keyed(scan, calls, kinds)


def _function(scan: Scan, calls: Calls, kinds: Kinds) -> Reading[None]:
    scan.rewind()
    yield from read_function(scan, calls, kinds)


def _mistral(scan: Scan, calls: Calls, kinds: Kinds) -> Reading[None]:
    """After ``[TOOL_CALLS]``: a list of objects, or ``name[ARGS]{...}``, with ``[CALL_ID]id`` between in some."""
    if (yield from scan.peek()) in ("[", "{"):
        yield from read_json(scan, calls)
        return
    name = yield from scan.word(NAME)
    if not calls.knows(name):
        return
    ident = ""
    if (yield from scan.literal("[CALL_ID]")):
        ident = yield from scan.word(NAME)
    yield from scan.literal("[ARGS]")
    yield from scan.blank()
    if (yield from scan.peek()) != "{":
        return
    calls.begin(name, ident)
    scan.settle()
    if (yield from read_arguments(scan, calls)):
        calls.end()


def _kimi(scan: Scan, calls: Calls, kinds: Kinds) -> Reading[None]:
    """``functions.name:0``, which is the id too, and the arguments behind a mark."""
    ident = yield from scan.word(NAME)
    name = ident.removeprefix("functions.").rpartition(":")[0]
    if not calls.knows(name) or not (yield from scan.literal("<|tool_call_argument_begin|>")):
        return
    yield from scan.blank()
    if (yield from scan.peek()) != "{":
        return
    calls.begin(name, ident)
    scan.settle()
    if (yield from read_arguments(scan, calls)):
        calls.end()


def _bare(quote: str) -> Reader:
    def read(scan: Scan, calls: Calls, kinds: Kinds) -> Reading[None]:
        yield from read_bare(scan, calls, quote)

    return read


_DEEPSEEK_CALL: Final = "<｜tool▁call▁begin｜>"
_DEEPSEEK_SEPARATOR: Final = "<｜tool▁sep｜>"
_DEEPSEEK_END: Final = "<｜tool▁call▁end｜>"


def _deepseek(scan: Scan, calls: Calls, kinds: Kinds) -> Reading[None]:
    """``name<sep>{...}`` (V3.1), or ``function<sep>name`` and the arguments in a JSON fence (R1, V3)."""
    word = yield from scan.word(NAME)
    if not (yield from scan.literal(_DEEPSEEK_SEPARATOR)):
        return
    yield from scan.blank()
    if (yield from scan.peek()) != "{":
        word = yield from scan.word(NAME)
        yield from scan.blank()
        yield from scan.literal("```json")
        yield from scan.blank()
    if not calls.knows(word) or (yield from scan.peek()) != "{":
        return
    calls.begin(word)
    scan.settle()
    if (yield from read_arguments(scan, calls)):
        calls.end()
        yield from scan.blank()
        if (yield from scan.literal("```")) or scan.torn("```"):
            scan.settle()


#: By the mark that gives a family away in its template; the first that is found decides.
_FAMILIES: Final[tuple[tuple[re.Pattern[str], Dialect], ...]] = (
    (
        re.compile(re.escape("[TOOL_CALLS]")),
        Dialect(
            "mistral",
            (("[TOOL_CALLS]", _mistral),),
            tokens=("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"),
            new_id=short_id,
        ),
    ),
    (
        re.compile(re.escape("<|tool_call>call:")),
        Dialect(
            "gemma4",
            (("<|tool_call>", _bare('<|"|>')),),
            ends=("<tool_call|>",),
            tokens=("<|tool_call>", "<tool_call|>", '<|"|>'),
        ),
    ),
    (
        re.compile(re.escape("<start_function_call>")),
        Dialect(
            "functiongemma",
            (("<start_function_call>", _bare("<escape>")),),
            ends=("<end_function_call>",),
            tokens=("<start_function_call>", "<end_function_call>", "<escape>"),
        ),
    ),
    (
        re.compile(re.escape("<|START_ACTION|>")),
        Dialect(
            "command-r",
            (("<|START_ACTION|>", _json),),
            ends=("<|END_ACTION|>",),
            tokens=("<|START_ACTION|>", "<|END_ACTION|>"),
        ),
    ),
    (
        re.compile(re.escape(_DEEPSEEK_CALL)),
        Dialect(
            "deepseek",
            ((_DEEPSEEK_CALL, _deepseek),),
            ends=(_DEEPSEEK_END,),
            tokens=(_DEEPSEEK_CALL, _DEEPSEEK_SEPARATOR, _DEEPSEEK_END),
            noise=("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
        ),
    ),
    (
        re.compile(re.escape("<|tool_call_argument_begin|>")),
        Dialect(
            "kimi",
            (("<|tool_call_begin|>", _kimi),),
            ends=("<|tool_call_end|>",),
            tokens=("<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"),
            noise=("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),
        ),
    ),
    (
        re.compile(re.escape("<seed:tool_call>")),
        Dialect(
            "seed",
            (("<seed:tool_call>", _hermes),),
            ends=("</seed:tool_call>",),
            tokens=("<seed:tool_call>", "</seed:tool_call>"),
        ),
    ),
    (
        re.compile(re.escape("<tool_call>")),
        Dialect(
            "hermes",
            (("<tool_call>", _hermes), ("<function=", _function)),
            ends=("</tool_call>",),
            tokens=("<tool_call>", "</tool_call>"),
        ),
    ),
    (
        re.compile(re.escape("<TOOLCALL>")),
        Dialect("nemotron", (("<TOOLCALL>", _json),), ends=("</TOOLCALL>",), tokens=("<TOOLCALL>", "</TOOLCALL>")),
    ),
    (
        re.compile(re.escape("<|tool_call|>")),
        Dialect(
            "granite",
            (("<|tool_call|>", _json), ("<tool_call>", _json)),
            ends=("<|/tool_call|>", "</tool_call>"),
            tokens=("<|tool_call|>", "<|/tool_call|>"),
        ),
    ),
    (
        re.compile(re.escape("<function=")),
        Dialect("functions", (("<function=", _function),)),
    ),
    (
        re.compile(re.escape(" functools[")),
        Dialect("firefunction", ((" functools", _json), ("functools", _json))),
    ),
)
#: Llama 3.x, and whoever takes tools and is not known: objects, with or without a mark before them.
PLAIN: Final = Dialect("llama", (("<|python_tag|>", _json),), ends=(";",), tokens=("<|python_tag|>",), bare=True)
#: For templates that do not take tools: objects, in a fence or not, as the system message asks for.
GENERIC: Final = Dialect("generic", (("```json", _json), ("```", _json)), ends=("```", ";"), bare=True)


def dialect_of(template: str, *, takes_tools: bool) -> Dialect:
    """Return how the model of a chat template writes calls."""
    family = next((dialect for pattern, dialect in _FAMILIES if pattern.search(template)), None)
    if takes_tools:
        return family or PLAIN
    if family is None:
        return GENERIC
    # The template shows the family's calls without telling of tools: a model may write either.
    return replace(
        GENERIC,
        marks=(*GENERIC.marks, *family.marks),
        ends=(*GENERIC.ends, *family.ends),
        tokens=family.tokens,
        noise=family.noise,
        new_id=family.new_id,
    )
