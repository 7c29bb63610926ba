"""Tool calls are held to their family's form and to their tools' schemas, with reasoning before them or not."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from chat_templates import ALWAYS_THINKS, TEMPLATES
from chat_templates import HARMONY as HARMONY_TEMPLATE
from llamaherd.pool.child import llama_backend
from llamaherd.pool.child.chat import Chats, Turn
from llamaherd.pool.child.constraint import Constraint
from llamaherd.pool.child.dialect import Dialect, dialect_of
from llamaherd.pool.child.engine import RequestError
from llamaherd.pool.child.grammars import Grammars
from llamaherd.pool.child.harmony import HARMONY
from llamaherd.pool.child.model import Model
from llamaherd.pool.child.thinking import Tags
from llamaherd.pool.child.tool_grammar import ToolGrammar, tool_grammar
from llamaherd.pool.child.vocab import Vocab
from llamaherd.transport.messages import ChatOptions, EngineOptions
from tiny_gguf import write_random_llama, write_scripted_llama

THINK = Tags("<think>", "</think>")
#: With a reference, which must still be found where the schema is a part of another one.
PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"$ref": "#/$defs/city"}, "days": {"type": "integer"}},
    "required": ["city"],
    "additionalProperties": False,
    "$defs": {"city": {"type": "string"}},
}
TOOLS = [
    {"type": "function", "function": {"name": name, "description": "", "parameters": PARAMETERS}}
    for name in ("weather", "time")
]
ARGUMENTS = '{"city": "Paris", "days": 3}'
#: By dialect: the template that shows the variant, a call, and whether its arguments' names are held to the schema.
CALLS: list[tuple[str, str, str]] = [
    ("hermes", "<tool_call>", f'<tool_call>\n{{"name": "time", "arguments": {ARGUMENTS}}}\n</tool_call>'),
    (
        "hermes",
        "<tool_call><function=",
        "<tool_call>\n<function=time>\n<parameter=city>\n<p>Paris</p>\n</parameter>\n<parameter=days>\n3\n</parameter>\n"
        "</function>\n</tool_call>",
    ),
    (
        "hermes",
        "<tool_call><arg_key>",
        "<tool_call>time\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n</tool_call>",
    ),
    ("llama", "", f'{{"name": "time", "parameters": {ARGUMENTS}}}'),
    ("generic", "", f'{{"tool_call": {{"name": "time", "arguments": {ARGUMENTS}}}}}'),
    ("mistral", "[TOOL_CALLS]", f'[TOOL_CALLS][{{"name": "time", "arguments": {ARGUMENTS}, "id": "abcdefghi"}}]'),
    ("mistral", "[TOOL_CALLS][ARGS]", f"[TOOL_CALLS]time[ARGS]{ARGUMENTS}"),
    (
        "gemma4",
        "<|tool_call>call:",
        '<|tool_call>call:time{city:<|"|>Pa<ris<|"|>,days:3,deep:{a:[true,1.5]}}<tool_call|>',
    ),
    (
        "functiongemma",
        "<start_function_call>",
        "<start_function_call>call:time{city:<escape>Paris<escape>}<end_function_call>",
    ),
    (
        "command-r",
        "<|START_ACTION|>",
        f'<|START_ACTION|>[\n{{"tool_call_id": "0", "tool_name": "time", "parameters": {ARGUMENTS}}}\n]<|END_ACTION|>',
    ),
    ("deepseek", "<｜tool▁call▁begin｜>", f"<｜tool▁call▁begin｜>time<｜tool▁sep｜>{ARGUMENTS}<｜tool▁call▁end｜>"),
    (
        "deepseek",
        "<｜tool▁call▁begin｜>```json",
        f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>time\n```json\n{ARGUMENTS}\n```<｜tool▁call▁end｜>",
    ),
    (
        "kimi",
        "<|tool_call_argument_begin|>",
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.time:0<|tool_call_argument_begin|>"
        f"{ARGUMENTS}<|tool_call_end|><|tool_calls_section_end|>",
    ),
    (
        "seed",
        "<seed:tool_call><function=",
        "<seed:tool_call><function=time>\n<parameter=city>\nParis\n</parameter>\n</function></seed:tool_call>",
    ),
    ("nemotron", "<TOOLCALL>", f'<TOOLCALL>[{{"name": "time", "arguments": {ARGUMENTS}}}]</TOOLCALL>'),
    ("granite", "<|tool_call|>", f'<|tool_call|>[{{"name": "time", "arguments": {ARGUMENTS}}}]'),
    ("functions", "<function=", f"<function=time>{ARGUMENTS}</function>"),
    ("firefunction", " functools[", f'functools[{{"name": "time", "arguments": {ARGUMENTS}}}]'),
    (
        "harmony",
        HARMONY_TEMPLATE,
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary to=functions.time "
        f"<|constrain|>json<|message|>{ARGUMENTS}",
    ),
]
#: With all of gpt-oss's, llama.cpp knows it, and <|end|> does not end an answer.
CONTROLS: tuple[str, ...] = (
    *("[TOOL_CALLS]", "[ARGS]", "<|tool_call>", "<tool_call|>", '<|"|>', "<|START_ACTION|>", "<|END_ACTION|>"),
    *("<|channel|>", "<|message|>", "<|start|>", "<|end|>", "<|constrain|>", "<|return|>", "<|call|>"),
    *(f"<｜tool▁{word}｜>" for word in ("calls▁begin", "call▁begin", "sep", "call▁end", "calls▁end")),
)


def dialect(name: str, template: str) -> Dialect:
    return HARMONY if name == "harmony" else dialect_of(template, takes_tools=name != "generic")


@pytest.fixture(scope="module")
def vocab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Vocab]:
    path: Path = tmp_path_factory.mktemp("vocab") / "controls.gguf"
    write_scripted_llama(path, controls=CONTROLS)
    llama_backend.init_backend()
    model = Model(str(path), EngineOptions(), lambda _: True)
    yield model.vocab
    model.free()


@pytest.fixture(scope="module")
def grammars(vocab: Vocab) -> Grammars:
    return Grammars(vocab)


def spelled(call: str) -> bool:
    """Whether this vocabulary can spell the marks of a call: the mark for a space is one for it."""
    return "▁" not in call


def grammar(name: str, template: str, controls: Mapping[str, int] | None = None, **more: Any) -> ToolGrammar:
    more = {"required": True, "parallel": False, **more}
    made = tool_grammar(dialect(name, template), template, TOOLS, controls=controls or {}, **more)
    assert made is not None
    return made


def controls_of(vocab: Vocab) -> dict[str, int]:
    return {text: vocab.tokenize(text, add_special=False, parse_special=True)[0] for text in CONTROLS}


def follows(constraint: Constraint, vocab: Vocab, text: str, *, special: bool = True) -> bool:
    """Whether a text is allowed token by token, and may end there."""
    for token in vocab.tokenize(text, add_special=False, parse_special=special):
        if not constraint.allows(token):
            return False
        constraint.accept(token)
    return constraint.allows(vocab.eos)


@pytest.mark.parametrize(("name", "template", "call"), CALLS)
def test_every_familys_calls_follow_its_grammar(
    vocab: Vocab, grammars: Grammars, name: str, template: str, call: str
) -> None:
    for parallel in (True, False):
        if spelled(call):
            plain = grammars.make_calls(grammar(name, template, parallel=parallel))
            assert follows(plain, vocab, call, special=False)
        named = grammars.make_calls(grammar(name, template, controls_of(vocab), parallel=parallel))
        assert follows(named, vocab, call)


@pytest.mark.parametrize(("name", "template", "call"), CALLS)
def test_nothing_else_follows_it(vocab: Vocab, grammars: Grammars, name: str, template: str, call: str) -> None:
    made = grammar(name, template)
    for wrong in (call.replace("time", "thyme"), f"Sure! {call}", "Sure!", "", call[:-1]):
        assert not follows(grammars.make_calls(made), vocab, wrong, special=False), wrong


@pytest.mark.parametrize(
    ("name", "template", "call"), [call for call in CALLS if "days" in call[2] and call[0] != "gemma4"]
)
def test_arguments_follow_the_schema(vocab: Vocab, grammars: Grammars, name: str, template: str, call: str) -> None:
    for wrong in (call.replace("days", "dayz"), call.replace("3", '"3"')):
        assert not follows(grammars.make_calls(grammar(name, template)), vocab, wrong, special=False), wrong


SPELLED = [call for call in CALLS if spelled(call[2])]


@pytest.mark.parametrize(("name", "template", "call"), SPELLED)
def test_an_answer_may_also_be_text_until_a_call_begins(
    vocab: Vocab, grammars: Grammars, name: str, template: str, call: str
) -> None:
    made = grammar(name, template, required=False)
    assert made.words or made.leading
    assert follows(grammars.make_calls(made), vocab, "Just { some <text> [here].", special=False)
    assert follows(grammars.make_calls(made), vocab, call, special=False)
    assert not follows(grammars.make_calls(made), vocab, call.replace("time", "thyme"), special=False)


@pytest.mark.parametrize(("name", "template", "call"), [call for call in SPELLED if call[0] != "harmony"])
def test_reasoning_may_come_before_calls(vocab: Vocab, grammars: Grammars, name: str, template: str, call: str) -> None:
    thought = "I could <tool_call> it.\n</think>\n\n"
    required = grammar(name, template, tags=THINK, opened=True)
    assert follows(grammars.make_calls(required), vocab, thought + call, special=False)
    assert not follows(grammars.make_calls(required), vocab, call, special=False), "the reasoning must end first"
    optional = grammar(name, template, tags=THINK)
    assert follows(grammars.make_calls(optional), vocab, "<think>" + thought + call, special=False)
    assert follows(grammars.make_calls(optional), vocab, call, special=False)
    waiting = grammar(name, template, tags=THINK, opened=True, required=False)
    assert follows(grammars.make_calls(waiting), vocab, thought + call, special=False)
    assert not follows(grammars.make_calls(waiting), vocab, thought + call.replace("time", "thyme"), special=False)


def test_several_calls_are_allowed_or_not(vocab: Vocab, grammars: Grammars) -> None:
    call = '<tool_call>{"name": "time", "arguments": {"city": "Rome"}}</tool_call>'
    assert follows(
        grammars.make_calls(grammar("hermes", "<tool_call>", parallel=True)), vocab, f"{call}\n{call}", special=False
    )
    single = grammars.make_calls(grammar("hermes", "<tool_call>"))
    assert follows(single, vocab, call, special=False)
    assert single.complete


def test_a_schema_that_cannot_be_followed_allows_any_object(vocab: Vocab, grammars: Grammars) -> None:
    odd: dict[str, Any] = {"type": "object", "patternProperties": {"^x": {}}, "not": {}}
    tools: list[dict[str, Any]] = [{"type": "function", "function": {"name": "time", "parameters": odd}}]
    made = tool_grammar(dialect("llama", "x"), "x", tools, required=True, parallel=False, controls={})
    assert made is not None
    assert follows(grammars.make_calls(made), vocab, '{"name": "time", "parameters": {"y": [1]}}', special=False)


# --- calls or JSON ----------------------------------------------------------------------------------------------------

#: Its texts look like marks, which must not matter.
CLOSED = '{"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"], "additionalProperties": false}'
CONTENT = '{"a": "<tool_call> ```json functools[{ </think> to=functions.time"}'


def content(name: str, text: str = CONTENT) -> str:
    return f"<|channel|>final<|message|>{text}" if name == "harmony" else text


@pytest.mark.parametrize(("name", "template", "call"), CALLS)
@pytest.mark.parametrize("schema", [CLOSED, "{}", '{"type": "object"}'])
def test_an_answer_may_be_calls_or_json_and_nothing_else(
    vocab: Vocab, grammars: Grammars, name: str, template: str, call: str, schema: str
) -> None:
    for controls in ({}, controls_of(vocab)) if spelled(call) else (controls_of(vocab),):
        made = grammar(name, template, controls, required=False, parallel=True, schema=schema)
        assert not made.waits

        def fits(text: str, made: ToolGrammar = made, special: bool = bool(controls)) -> bool:
            return follows(grammars.make_calls(made), vocab, text, special=special)

        said = content(name)
        assert fits(call)
        assert fits(said)
        for wrong in ("Sure!", "", f"{call}x", f"{call}{said}", f"{said}{call}", said[:-1], call[:-1]):
            assert not fits(wrong), wrong


@pytest.mark.parametrize(("name", "template", "call"), [call for call in CALLS if call[0] not in ("llama", "generic")])
def test_a_call_of_nothing_known_is_no_json(
    vocab: Vocab, grammars: Grammars, name: str, template: str, call: str
) -> None:
    made = grammar(name, template, controls_of(vocab), required=False, schema="{}")
    assert not follows(grammars.make_calls(made), vocab, call.replace("time", "thyme"))


ALIKE = [call for call in CALLS if call[0] in ("llama", "generic")]


@pytest.mark.parametrize(("name", "template", "call"), ALIKE)
@pytest.mark.parametrize("thought", ["", "<think>Hm. {\n</think>\n\n"])
def test_an_object_that_begins_as_a_call_is_one(
    vocab: Vocab, grammars: Grammars, name: str, template: str, call: str, thought: str
) -> None:
    """Whatever the schema lets pass: its reader tells it as a call."""
    made = grammar(name, template, required=False, schema='{"type": "object"}', tags=THINK)
    free = grammars.make_calls(made)
    opened = grammars.make_calls(grammar(name, template, required=False, schema="{}", tags=THINK, opened=True))

    def fits(text: str) -> bool:
        if thought and follows(opened.copy(), vocab, thought.removeprefix("<think>") + text, special=False) is not (
            follows(free.copy(), vocab, thought + text, special=False)
        ):
            pytest.fail("it is the same whoever opens the reasoning")
        return follows(free.copy(), vocab, thought + text, special=False)

    assert fits(call)
    assert not fits(call.replace("3", '"3"')), "the tool's schema forbids it"
    assert not fits(call.replace("days", "dayz"))
    assert fits(call.replace("time", "thyme")), "that is no tool"
    assert fits(call.replace('"parameters"', '"age"').replace('"arguments"', '"age"'))
    assert fits('{"name": "Anna", "parameters": 3}')
    assert fits('{ "b": {"name": "time", "parameters": 3}}')


@pytest.mark.parametrize(("name", "template", "call"), ALIKE)
def test_what_may_begin_as_a_call_is_asked_for_many_tokens_at_once(
    vocab: Vocab, grammars: Grammars, name: str, template: str, call: str
) -> None:
    constraint = grammars.make_calls(grammar(name, template, required=False, schema='{"type": "object"}'))
    for token in vocab.tokenize(call, add_special=False):
        # Of several tokens with one text a mask has one.
        singly = [one for one in constraint.candidates().tolist() if constraint.allows(one)]
        assert token in singly
        assert constraint.allowed(range(vocab.size), vocab.size) == singly
        assert constraint.allowed(range(vocab.size), 2) == singly[:2]
        constraint.accept(token)
    assert constraint.complete


@pytest.mark.parametrize(("name", "template", "call"), ALIKE)
def test_texts_are_taken_as_tokens_are(vocab: Vocab, grammars: Grammars, name: str, template: str, call: str) -> None:
    made = grammar(name, template, required=False, schema='{"type": "object"}')
    assert grammars.make_calls(made).feed(call.encode())
    assert not grammars.make_calls(made).feed(call.replace("3", '"3"').encode())
    assert grammars.make_calls(made).feed(b'{"b": 1}')
    assert not grammars.make_calls(made).feed(b"Sure")


# --- what a request comes to ------------------------------------------------------------------------------------------


def turn(vocab: Vocab, source: str, **options: Any) -> Turn:
    messages = [{"role": "user", "content": "Hi"}]
    return Chats(source, "", vocab).turn(messages, {}, ChatOptions(tools=tuple(TOOLS), **options))


@pytest.mark.parametrize(("_name", "source"), TEMPLATES)
def test_every_template_gets_a_grammar_when_it_may_call(vocab: Vocab, _name: str, source: str) -> None:
    waiting, required = turn(vocab, source).grammar, turn(vocab, source, tool_choice="required").grammar
    assert waiting is not None
    assert required is not None
    assert waiting.words or waiting.leading
    assert not (required.words or required.leading)
    assert turn(vocab, source, tool_choice="none").grammar is None


def test_a_named_function_is_the_only_one(vocab: Vocab, grammars: Grammars) -> None:
    made = turn(vocab, "", tool_choice="required", tool_names=("weather",)).grammar
    assert made is not None
    for name, expected in (("weather", True), ("time", False)):
        call = f'{{"tool_call": {{"name": "{name}", "arguments": {ARGUMENTS}}}}}'
        assert follows(grammars.make_calls(made), vocab, call, special=False) is expected


@pytest.mark.parametrize(("_name", "source"), TEMPLATES)
def test_a_function_that_is_not_allowed_is_not_called(vocab: Vocab, _name: str, source: str) -> None:
    chosen = turn(vocab, source, tool_names=("weather",))
    assert chosen.grammar is not None
    assert chosen.prompt == turn(vocab, source).prompt
    assert "weather" in chosen.grammar.source
    assert "time" not in chosen.grammar.source


def with_schema(vocab: Vocab, source: str, schema: str = CLOSED, **options: Any) -> Turn:
    messages = options.pop("messages", [{"role": "user", "content": "Hi"}])
    return Chats(source, "", vocab).turn(messages, {}, ChatOptions(tools=tuple(TOOLS), **options), schema)


@pytest.mark.parametrize(("name", "source"), TEMPLATES)
def test_with_every_template_an_answer_may_be_json_or_calls(
    vocab: Vocab, grammars: Grammars, name: str, source: str
) -> None:
    made = with_schema(vocab, source).grammar
    assert made is not None
    assert not made.waits
    grammars.make_calls(made)
    assert with_schema(vocab, source, tool_choice="none").grammar is None
    assert (
        with_schema(vocab, source, tool_choice="required").grammar
        == turn(vocab, source, tool_choice="required").grammar
    ), "the schema has nothing to say of calls"


def test_a_model_that_is_told_of_tools_is_told_of_json_too(vocab: Vocab) -> None:
    assert "plain text" in turn(vocab, "").prompt
    assert "plain text" not in with_schema(vocab, "").prompt


@pytest.mark.parametrize("source", [ALWAYS_THINKS, HARMONY_TEMPLATE])
def test_reasoning_that_is_continued_ends_in_json_or_calls(vocab: Vocab, grammars: Grammars, source: str) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "", "reasoning_content": "Hm"}]
    made = with_schema(vocab, source, messages=messages, continuation="auto").grammar
    assert made is not None
    if source is HARMONY_TEMPLATE:
        head, call = "m.<|end|><|start|>assistant", CALLS[-1][2].partition("<|start|>assistant")[2]
        said = content("harmony")
    else:
        head, call, said = "m.</think>\n", f'{{"tool_call": {{"name": "time", "arguments": {ARGUMENTS}}}}}', CONTENT
    for text, expected in ((head + call, True), (head + said, True), (said, False), (call, False)):
        assert follows(grammars.make_calls(made), vocab, text) is expected, text


def test_content_that_is_continued_is_no_call(vocab: Vocab) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": '{"a"'}]
    read = with_schema(vocab, "", messages=messages, continuation="auto")
    assert (read.grammar, read.reply, read.begun) == (None, None, '{"a"')


def test_a_token_without_a_name_is_no_control_token(tmp_path: Path) -> None:
    path = tmp_path / "padded.gguf"
    write_random_llama(path, controls=("<think>", "</think>"))
    model = Model(str(path), EngineOptions(), lambda _: True)
    vocab = model.vocab
    start, end = vocab.tokenize("<think></think>", add_special=False, parse_special=True)
    controls = {THINK.start: start, THINK.end: end}
    made = grammar("hermes", "<tool_call>", controls, tags=THINK)
    constraint = Grammars(vocab).make_calls(made)
    nameless = [token for token in range(vocab.size) if not vocab.named_piece(token)]
    assert nameless
    assert constraint.allowed(nameless, 1) == []
    assert constraint.allows(start)
    model.free()


def test_of_very_many_tools_nothing_is_enforced_and_nothing_can_be_required(vocab: Vocab) -> None:
    many: list[dict[str, Any]] = [{"type": "function", "function": {"name": f"f{number}"}} for number in range(257)]
    chats, messages = Chats("", "", vocab), [{"role": "user", "content": "Hi"}]
    read = chats.turn(messages, {}, ChatOptions(tools=tuple(many)))
    assert read.grammar is None
    assert read.reply is not None
    with pytest.raises(RequestError, match="at most 256 tools"):
        chats.turn(messages, {}, ChatOptions(tools=tuple(many), tool_choice="required"))
    with pytest.raises(RequestError, match="at most 256 tools"):
        chats.turn(messages, {}, ChatOptions(tools=tuple(many)), "{}")
    named = ChatOptions(tools=tuple(many), tool_choice="required", tool_names=("f9",))
    assert chats.turn(messages, {}, named).grammar is not None


IN_TAGS = {
    "<tool_call><function=": (
        "<tool_call>\n<function=time>\n<parameter=unit>\n{}\n</parameter>\n</function>\n</tool_call>"
    ),
    "<tool_call><arg_key>": "<tool_call>time\n<arg_key>unit</arg_key>\n<arg_value>{}</arg_value>\n</tool_call>",
}


@pytest.mark.parametrize("template", IN_TAGS)
@pytest.mark.parametrize(
    ("unit", "allowed", "refused"),
    [
        ({"type": "string", "enum": ["celsius", "cel", 'f"\n']}, ("celsius", "cel", 'f"\n'), ("c", "celsiuss", "")),
        ({"const": "celsius"}, ("celsius",), ("kelvin",)),
        # The end of one begins as another goes on.
        ({"enum": ["=", "=<", "=\n<"]}, ("=", "=<", "=\n<"), ("", "<", "=\n")),
        (
            {"enum": [f"zone {number}" for number in range(1_000)]},
            ("zone 1", "zone 10", "zone 999"),
            ("zone 1000", "zone "),
        ),
        ({"enum": [f"zone {number}" for number in range(1_001)]}, ("zone 1", "elsewhere"), ()),
        ({"enum": ["a", "b</parameter></arg_value>c"]}, ("a", "elsewhere"), ()),
        # What is no text, or may be none, stands as JSON or freely.
        ({"enum": ["celsius", 3]}, ("celsius", "3", "kelvin"), ()),
        ({"type": "string", "enum": ["", "celsius"]}, ("celsius", "kelvin"), ()),
        ({"type": ["string", "null"], "enum": ["celsius", None]}, ('"celsius"', "null"), ("celsius", '"kelvin"')),
    ],
)
def test_a_text_in_tags_is_one_of_those_that_are_listed(
    vocab: Vocab,
    grammars: Grammars,
    template: str,
    unit: dict[str, Any],
    allowed: tuple[str, ...],
    refused: tuple[str, ...],
) -> None:
    parameters = {"type": "object", "properties": {"unit": unit}, "required": ["unit"]}
    tool = {"type": "function", "function": {"name": "time", "parameters": parameters}}
    dialect = dialect_of(template, takes_tools=True)
    made = tool_grammar(dialect, template, [tool], required=True, parallel=False, controls={})
    assert made is not None
    for value in (*allowed, *refused):
        call = IN_TAGS[template].format(value)
        assert follows(grammars.make_calls(made), vocab, call, special=False) is (value in allowed), value


@pytest.mark.parametrize("template", ["<tool_call><function=", "<tool_call><arg_key>"])
def test_a_parameter_whose_schema_is_true_may_be_anything_and_one_that_is_false_is_left_out(template: str) -> None:
    parameters = {"type": "object", "properties": {"anything": True, "nothing": False}}
    tool = {"type": "function", "function": {"name": "time", "parameters": parameters}}
    dialect = dialect_of(template, takes_tools=True)
    grammar = tool_grammar(dialect, template, [tool], required=False, parallel=False, controls={})
    assert grammar is not None
    assert "anything" in grammar.source
    assert "nothing" not in grammar.source
