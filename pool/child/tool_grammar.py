"""Grammars that hold a model to well-formed tool calls of its own family, arguments that follow the schemas included.

Written in llguidance's variant of Lark, which takes JSON schemas as they are. A control token is named by its id, since
its text is no part of what a model says; a mark that begins a call is allowed as text too, because that is how a
grammar that waits for one is told.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple, cast

from llamaherd.pool.child.call_form import Alike, forms_of
from llamaherd.pool.child.calls_tagged import listed_texts
from llamaherd.pool.child.dialect import Dialect
from llamaherd.pool.child.thinking import Tags
from llamaherd.pool.json_schema import SchemaError, check_schema

__all__ = ["ToolGrammar", "tool_grammar"]

Schema = dict[str, Any]

#: White space between the parts of a call; bounded, or a small model fills its answer with it.
_BLANK: Final = "blank: BLANK?\nBLANK: /[ \\t\\n]{1,8}/"
_SPACE: Final = r"( |\n{1,2}[ \t]{0,20})"
_GUIDANCE: Final = {"whitespace_flexible": True, "whitespace_pattern": _SPACE, "lenient": False}
_ANY: Final = r"/(.|\n)*/"
_BARE: Final = r"""
bare_object: "{" blank ( bare_pair ( "," blank bare_pair )* )? blank "}"
bare_pair: BARE_KEY ":" blank bare_value
bare_array: "[" blank ( bare_value ( "," blank bare_value )* )? blank "]"
bare_value: bare_object | bare_array | bare_text | BARE_NUMBER | "true" | "false" | "null"
BARE_KEY: /[a-zA-Z0-9_.\-]+/
BARE_NUMBER: /-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][\-+]?[0-9]+)?/
"""
#: Most texts that a parameter in tags is held to.
_MOST_LISTED: Final = 1000
#: How an object may begin that a grammar waits for.
_LEADS: Final = ("{", "{ ", "{\n", "{\n  ")


class ToolGrammar(NamedTuple):
    """A grammar for an answer.

    Attributes:
        source: Lark, beginning at ``start``.
        words: Texts that it waits for; none if it holds from the beginning.
        leading: Texts that it waits for at the beginning of the answer alone.
        after: What it waits for before that: the end of reasoning, which may speak of calls without making one.
        alike: What tells calls apart where the grammar is of JSON too and both are objects; else None.
        subject: What it is made of, for errors.
    """

    source: str
    words: tuple[str, ...] = ()
    leading: tuple[str, ...] = ()
    after: str = ""
    alike: Alike | None = None
    subject: str = "tools"

    @property
    def waits(self) -> bool:
        """Whether an answer may also be something else."""
        return bool(self.words or self.leading)


class _Calls(NamedTuple):
    """The rule for all calls of an answer, and what begins them."""

    rule: str
    words: tuple[str, ...] = ()
    leading: tuple[str, ...] = ()


def tool_grammar(
    dialect: Dialect,
    template: str,
    tools: Sequence[Mapping[str, Any]],
    *,
    required: bool,
    parallel: bool,
    controls: Mapping[str, int],
    tags: Tags | None = None,
    opened: bool = False,
    schema: str = "",
) -> ToolGrammar | None:
    """Return the grammar of an answer that calls these tools; None for a family whose form is not fixed enough.

    Args:
        dialect: The family.
        template: The model's chat template, which tells the family's variants apart.
        tools: Those that may be called. A schema that cannot be followed allows any object.
        required: Whether the answer must be calls, after reasoning if there may be any; otherwise it may also be text,
            and the grammar holds from the beginning of a call on.
        parallel: Whether there may be several.
        controls: Ids of the texts that are control tokens.
        tags: Of the reasoning that comes first, or may; ``opened``: the prompt has opened it.
        schema: JSON Schema of an answer that is no calls: then it is one or the other, whole. Empty: it may be text.
    """
    builder = _Builder(tools, controls, template, parallel=parallel, whole=required or bool(schema))
    calls = builder.calls(dialect)
    if calls is None:
        return None
    if required or schema:
        harmony = dialect.name == "harmony"
        before = builder.analysis(opened=opened) if harmony else builder.reasoning(tags, opened=opened)
        alone = builder.source(f"start: {before}blank {calls.rule}")
        if required:
            return ToolGrammar(alone)
        content = builder.content(dialect, schema)
        both = builder.source(f"start: {before}blank ( {calls.rule} | {content} )")
        forms = forms_of(dialect, [tool["function"]["name"] for tool in tools])
        alike = Alike(alone, forms, tags, opened) if dialect.bare else None
        return ToolGrammar(both, alike=alike, subject="json_schema or tools")
    source = builder.source(f"start: {calls.rule}")
    return ToolGrammar(source, calls.words, calls.leading, tags.end if tags is not None else "")


def _quoted(text: str) -> str:
    # JSON leaves DEL as it is, which llguidance takes for no part of a text.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _moved(schema: object, to: str) -> Any:
    """Return a schema whose references are right where it is a part of another one."""
    if isinstance(schema, dict):
        return {
            key: f"#{to}{value[1:]}"
            if key == "$ref" and isinstance(value, str) and value.startswith("#")
            else _moved(value, to)
            for key, value in cast("dict[str, object]", schema).items()
        }
    if isinstance(schema, list):
        return [_moved(item, to) for item in cast("list[object]", schema)]
    return schema


def _usable(schema: object) -> Schema:
    """Return a schema of arguments, or that of any object where it cannot be followed."""
    try:
        check_schema(schema)
    except SchemaError:
        return {"type": "object"}
    return cast(Schema, schema)


def _object(**properties: Schema) -> Schema:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


class _Builder:
    """Collects the rules of one grammar."""

    def __init__(
        self,
        tools: Sequence[Mapping[str, Any]],
        controls: Mapping[str, int],
        template: str,
        *,
        parallel: bool,
        whole: bool,
    ) -> None:
        self._functions: Final = [cast("Mapping[str, Any]", tool["function"]) for tool in tools]
        self._arguments: Final = [_usable(function.get("parameters") or {}) for function in self._functions]
        self._controls: Final = controls
        self._template: Final = template
        self._parallel: Final = parallel
        #: Whether the grammar is of the whole answer.
        self._whole: Final = whole
        self._rules: Final = [_BLANK]

    def source(self, start: str) -> str:
        """Return the whole grammar."""
        return "\n".join([start, *self._rules])

    def reasoning(self, tags: Tags | None, *, opened: bool) -> str:
        """Return what may, or must, come before the calls."""
        if tags is None:
            return ""
        self._until("reasoning", tags.end)
        return "reasoning " if opened else f"( blank {self._mark(tags.start)} reasoning )? "

    def analysis(self, *, opened: bool) -> str:
        """Return the reasoning that may, or must, come first in harmony."""
        channel, message, start = map(self._mark, ("<|channel|>", "<|message|>", "<|start|>"))
        self._until("analysis", "<|end|>")
        thought = f'analysis {start} "assistant"'
        return f'{f"{thought} " if opened else ""}( {channel} "analysis" {message} {thought} )* '

    def content(self, dialect: Dialect, schema: str) -> str:
        """Return the rule for content that follows a schema."""
        value = self._json("content", json.loads(schema))
        if dialect.name != "harmony":
            return value
        kind = f'( " "? {self._mark("<|constrain|>")}? "json" )?'
        return f'{self._mark("<|channel|>")} "final" {kind} {self._mark("<|message|>")} {value}'

    def calls(self, dialect: Dialect) -> _Calls | None:
        """Return the rule for the calls of a family."""
        match dialect.name:
            case "hermes":
                return self._hermes("<tool_call>", "</tool_call>")
            case "seed":
                return self._hermes("<seed:tool_call>", "</seed:tool_call>")
            case "kimi":
                return self._kimi()
            case "llama":
                return self._bare_objects()
            case "generic":
                return self._generic()
            case "mistral":
                return self._mistral()
            case "gemma4":
                return self._gemma("<|tool_call>", "<tool_call|>", '<|"|>')
            case "functiongemma":
                return self._gemma("<start_function_call>", "<end_function_call>", "<escape>")
            case "command-r":
                objects = self._objects(
                    "tool_name", "parameters", tool_call_id={"type": "string", "pattern": "^[0-9]{1,2}$"}
                )
                return self._listed("<|START_ACTION|>", objects, "<|END_ACTION|>")
            case "deepseek":
                return self._deepseek()
            case "nemotron":
                return self._listed("<TOOLCALL>", self._objects("name", "arguments"), "</TOOLCALL>")
            case "granite":
                return self._listed("<|tool_call|>", self._objects("name", "arguments"))
            case "functions":
                parts = [_quoted(f"<function={name}>") + f' {rule} "</function>"' for name, rule in self._named()]
                return _Calls(self._repeated(self._choice("call", parts), "blank"), ("<function=",))
            case "firefunction":
                return self._listed("functools", self._objects("name", "arguments"))
            case "harmony":
                return self._harmony()
            case _:
                return None

    # --- parts ---

    def _rule(self, name: str, body: str) -> str:
        self._rules.append(f"{name}: {body}")
        return name

    def _choice(self, name: str, parts: Sequence[str]) -> str:
        return self._rule(name, " | ".join(f"( {part} )" for part in parts))

    def _json(self, name: str, schema: Schema) -> str:
        return self._rule(name, f"%json {json.dumps({'x-guidance': _GUIDANCE, **schema})}")

    def _named(self) -> list[tuple[str, str]]:
        """Return each function's name and the rule for its arguments alone."""
        return [
            (function["name"], self._json(f"arguments_{index}", schema))
            for index, (function, schema) in enumerate(zip(self._functions, self._arguments, strict=True))
        ]

    def _objects(self, name: str, arguments: str, **before: Schema) -> list[tuple[Schema, str]]:
        """Return the schema of each call as an object, and where its arguments' schema stands in that."""
        return [
            (
                _object(**before, **{name: {"const": function["name"]}, arguments: schema}),
                f"/properties/{arguments}",
            )
            for function, schema in zip(self._functions, self._arguments, strict=True)
        ]

    def _any_of(self, objects: Sequence[tuple[Schema, str]], at: str) -> Schema:
        return {"anyOf": [_moved(schema, f"{at}/anyOf/{index}{to}") for index, (schema, to) in enumerate(objects)]}

    def _mark(self, text: str) -> str:
        return f"<[{self._controls[text]}]>" if text in self._controls else _quoted(text)

    def _opening(self, text: str) -> str:
        return f"( {_quoted(text)} | {self._mark(text)} )" if text in self._controls else _quoted(text)

    def _repeated(self, rule: str, between: str) -> str:
        return f"{rule} ( {between} {rule} )*" if self._parallel else rule

    def _until(self, name: str, end: str) -> str:
        """Add the rule for any text up to and with ``end``."""
        if end in self._controls:
            return self._rule(name, f"{_ANY} {self._mark(end)}")
        return self._rule(f"{name}[suffix={_quoted(end)}]", _ANY) and name

    def _listed(self, mark: str, objects: Sequence[tuple[Schema, str]], end: str = "") -> _Calls:
        calls: Schema = {"type": "array", "items": self._any_of(objects, "/items"), "minItems": 1}
        if not self._parallel:
            calls["maxItems"] = 1
        closing = f" blank {self._mark(end)}" if end else ""
        return _Calls(f"{self._opening(mark)} blank {self._json('calls', calls)}{closing}", (mark,))

    # --- families ---

    def _hermes(self, mark: str, end: str) -> _Calls:
        if "<function=" in self._template:
            call = self._choice("call", [self._tagged(index) for index in range(len(self._functions))])
        elif "<arg_key>" in self._template:
            call = self._choice("call", [self._keyed(index) for index in range(len(self._functions))])
        else:
            call = self._json("call", self._any_of(self._objects("name", "arguments"), ""))
        one = f"{self._opening(mark)} blank {call} blank {self._mark(end)}"
        return _Calls(self._repeated(f"( {one} )", "blank"), (mark,))

    def _tagged(self, index: int) -> str:
        name = self._functions[index]["name"]
        inner = self._parameters(index, "<parameter={}>\n", "\n</parameter>", " blank")
        return _quoted(f"<function={name}>") + f' blank {inner} "</function>"'

    def _keyed(self, index: int) -> str:
        name = self._functions[index]["name"]
        inner = self._parameters(index, "<arg_key>{}</arg_key>\n<arg_value>", "</arg_value>", " blank")
        return f"{_quoted(name)} blank {inner}"

    def _parameters(self, index: int, begin: str, end: str, after: str) -> str:
        """Return the parameters of a function in tags: in their order, optional ones left out at will."""
        schema = self._arguments[index]
        required = cast("Sequence[str]", schema.get("required", ()))
        parts: list[str] = []
        properties = cast("dict[str, Schema | bool]", schema.get("properties", {}))
        for number, (key, given) in enumerate(properties.items()):
            if given is False:
                continue  # this parameter can have no value
            kind: Schema = {} if given is True else given
            name = f"value_{index}_{number}"
            texts = listed_texts(kind)
            if 0 < len(texts) <= _MOST_LISTED and not any(end.strip() in text for text in texts):
                value = self._one_of(name.upper(), texts, end)
            elif kind.get("type", "string") == "string" or "$ref" in json.dumps(kind):
                value = self._until(name, end)
            else:
                value = f"{self._json(name, kind)} {_quoted(end)}"
            pair = f"{_quoted(begin.format(key))} {value}{after}"
            parts.append(pair if key in required else f"( {pair} )?")
        return " ".join(parts)

    def _one_of(self, name: str, texts: Sequence[str], end: str) -> str:
        """Add the terminal for one of some texts with ``end`` behind it, and return what that is in a rule. One
        terminal: what the lexer sees as a whole may begin alike.
        """
        marked = end in self._controls
        self._rules.append(f"{name}: " + " | ".join(_quoted(text if marked else text + end) for text in texts))
        return f"{name} {self._mark(end)}" if marked else name

    def _bare_objects(self) -> _Calls:
        call = self._json("call", self._any_of(self._objects("name", "parameters"), ""))
        return _Calls(self._repeated(call, 'blank ";" blank'), leading=tuple(f'{lead}"name"' for lead in _LEADS))

    def _generic(self) -> _Calls:
        objects = self._objects("name", "arguments")
        one = self._json("one", _object(tool_call=self._any_of(objects, "/properties/tool_call")))
        leading = tuple(f'{lead}"tool_call' for lead in _LEADS)
        if not self._parallel:
            return _Calls(one, leading=leading)
        items = self._any_of(objects, "/properties/tool_calls/items")
        several = self._json("several", _object(tool_calls={"type": "array", "items": items, "minItems": 1}))
        return _Calls(f"( {one} | {several} )", leading=leading)

    def _mistral(self) -> _Calls:
        mark = "[TOOL_CALLS]"
        if "[ARGS]" not in self._template:
            ident = {"type": "string", "pattern": "^[a-zA-Z0-9]{9}$"}
            objects = self._objects("name", "arguments")
            for schema, _ in objects:
                schema["properties"]["id"] = ident  # not required: it comes after the arguments, if at all
            return self._listed(mark, objects)
        parts = [f"{_quoted(name)} {self._mark('[ARGS]')} blank {rule}" for name, rule in self._named()]
        return _Calls(self._repeated(f"( {self._opening(mark)} {self._choice('call', parts)} )", "blank"), (mark,))

    def _gemma(self, mark: str, end: str, quote: str) -> _Calls:
        self._rules.append(_BARE)
        self._rule("bare_text", f"{self._mark(quote)} {self._until('bare_end', quote)}")
        parts = [_quoted("call:" + function["name"]) + " bare_object" for function in self._functions]
        call = self._choice("call", parts)
        return _Calls(self._repeated(f"( {self._opening(mark)} {call} {self._mark(end)} )", "blank"), (mark,))

    def _deepseek(self) -> _Calls:
        begin, separator, end = (f"<｜tool▁{word}｜>" for word in ("call▁begin", "sep", "call▁end"))
        first, last = (f"<｜tool▁calls▁{word}｜>" for word in ("begin", "end"))
        if "```json" in self._template:
            parts = [
                f'"function" {self._mark(separator)} {_quoted(name)} "\\n```json\\n" {rule} "\\n```"'
                for name, rule in self._named()
            ]
        else:
            parts = [f"{_quoted(name)} {self._mark(separator)} {rule}" for name, rule in self._named()]
        call = f"( {self._opening(begin)} {self._choice('call', parts)} {self._mark(end)} )"
        rule = f"( {self._opening(first)} )? {self._repeated(call, 'blank')} ( {self._mark(last)} )?"
        return _Calls(rule, (first, begin))

    def _kimi(self) -> _Calls:
        begin, arguments, end = (f"<|tool_call_{word}|>" for word in ("begin", "argument_begin", "end"))
        first, last = (f"<|tool_calls_section_{word}|>" for word in ("begin", "end"))
        parts = [
            _quoted(f"functions.{name}:") + f" /[0-9]{{1,3}}/ {self._mark(arguments)} {rule}"
            for name, rule in self._named()
        ]
        call = f"( {self._opening(begin)} {self._choice('call', parts)} {self._mark(end)} )"
        rule = f"( {self._opening(first)} )? {self._repeated(call, 'blank')} ( {self._mark(last)} )?"
        return _Calls(rule, (first, begin))

    def _harmony(self) -> _Calls:
        channel, message = map(self._mark, ("<|channel|>", "<|message|>"))
        constrain = self._mark("<|constrain|>")
        kind = f'( " "? {constrain}? "json" )?'
        parts = [
            _quoted(f"to=functions.{name}") + f' ( {channel} "commentary" )? {kind} {message} {rule}'
            for name, rule in self._named()
        ]
        call = self._choice("call", parts)
        if not self._whole:
            return _Calls(call, ("to=functions.",))
        return _Calls(f'( {channel} "commentary " | " " ) {call}')
