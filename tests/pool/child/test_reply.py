"""An answer is told apart into content, reasoning and calls, the same however it is cut, and nothing of it is lost."""

import itertools
import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chat_templates import TEMPLATES
from llamaherd.pool.child.call_form import forms_of
from llamaherd.pool.child.calls import Calls
from llamaherd.pool.child.calls_tagged import kinds_of
from llamaherd.pool.child.dialect import GENERIC, PLAIN, Dialect, dialect_of
from llamaherd.pool.child.harmony import HarmonyReply
from llamaherd.pool.child.reply import Reply
from llamaherd.pool.child.thinking import Tags

THINK = Tags("<think>", "</think>")
DIALECTS = {
    **{name: dialect_of(source, takes_tools=True) for name, source in TEMPLATES if name != "generic"},
    "llama": PLAIN,
    "generic": GENERIC,
    "nemotron": dialect_of("<TOOLCALL>", takes_tools=True),
    "kimi": dialect_of("<|tool_call_argument_begin|>", takes_tools=True),
    "seed": dialect_of("<seed:tool_call>", takes_tools=True),
    "shown": dialect_of("<｜tool▁call▁begin｜>", takes_tools=False),
    "granite": dialect_of("<|tool_call|>", takes_tools=True),
    "functions": dialect_of("<function=", takes_tools=True),
    "functiongemma": dialect_of("<start_function_call>", takes_tools=True),
    "firefunction": dialect_of(" functools[", takes_tools=True),
}
KINDS = {"weather": {"city": True, "days": False}}

#: What is read: content, reasoning, and the name and arguments of each call.
Read = tuple[str, str, list[tuple[str, str]]]


def a_reply(dialect: str | Dialect | None, **more: Any) -> Reply:
    numbers = itertools.count()
    calls = Calls(["weather", "time"], lambda: f"id{next(numbers)}")
    chosen = DIALECTS[dialect] if isinstance(dialect, str) else dialect
    return Reply(dialect=chosen, calls=calls, kinds=KINDS, **more)


def read(pieces: Sequence[str], dialect: str | None, **more: Any) -> Read:
    return read_with(a_reply(dialect, **more), pieces)


def read_with(reply: Reply, pieces: Sequence[str], *, cut: bool = False) -> Read:
    parts = [*map(reply.feed, pieces), reply.finish(cut=cut)]
    calls: dict[int, tuple[str, str]] = {}
    for delta in (delta for part in parts for delta in part.calls):
        name, arguments = calls.get(delta.index, (delta.name, ""))
        assert bool(delta.name) == (delta.index not in calls), "a name comes with the first delta and no other"
        calls[delta.index] = (name, arguments + delta.arguments)
    text = "".join(part.text for part in parts)
    return text, "".join(part.reasoning for part in parts), list(calls.values())


PARIS = ("weather", '{"city": "Paris"}')
SAID: list[tuple[str, str, Read]] = [
    ("hermes", '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>', ("", "", [PARIS])),
    (
        "hermes",
        'Let me see.\n\n<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>\n'
        '<tool_call>{"arguments": {}, "name": "time"}</tool_call>',
        ("Let me see.", "", [PARIS, ("time", "{}")]),
    ),
    (
        "hermes",
        "<tool_call>\n<function=weather>\n<parameter=city>\n7\n</parameter>\n<parameter=days>\n7\n</parameter>\n"
        "</function>\n</tool_call>",
        ("", "", [("weather", '{"city": "7", "days": 7}')]),
    ),
    (
        "hermes",
        "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n</tool_call>",
        ("", "", [PARIS]),
    ),
    ("hermes", "<tool_call>\n<function=time>\n</function>\n</tool_call>", ("", "", [("time", "{}")])),
    ("llama", '{"name": "weather", "parameters": {"city": "Paris"}}', ("", "", [PARIS])),
    ("llama", '<|python_tag|>{"name": "weather", "parameters": {"city": "Paris"}}', ("", "", [PARIS])),
    (
        "llama",
        '{"type": "function", "function": {"name": "weather", "parameters": {"city": "Paris"}}}; {"name": "time"}',
        ("", "", [PARIS, ("time", "{}")]),
    ),
    (
        "mistral",
        '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Paris"}, "id": "abcdefghi"}, {"name": "time"}]',
        ("", "", [PARIS, ("time", "{}")]),
    ),
    (
        "mistral",
        'Well.[TOOL_CALLS]weather[ARGS]{"city": "Paris"}[TOOL_CALLS]time[CALL_ID]abcdefghi[ARGS]{}',
        ("Well.", "", [PARIS, ("time", "{}")]),
    ),
    ("mistral", '[TOOL_CALLS]weather{"city": "Paris"}', ("", "", [PARIS])),
    (
        "gemma4",
        '<|tool_call>call:weather{city:<|"|>Pa"ris<|"|>,days:3,deep:{a:[true,null,<|"|>x<|"|>]}}<tool_call|>',
        ("", "", [("weather", '{"city": "Pa\\"ris", "days": 3, "deep": {"a": [true, null, "x"]}}')]),
    ),
    (
        "functiongemma",
        "<start_function_call>call:weather{city:<escape>Paris<escape>}<end_function_call>",
        ("", "", [PARIS]),
    ),
    ("generic", '{"tool_call": {"name": "weather", "arguments": {"city": "Paris"}}}', ("", "", [PARIS])),
    (
        "generic",
        '```json\n{"tool_calls": [{"name": "weather", "arguments": "{\\"city\\": \\"Paris\\"}"}, {"name": "time"}]}'
        "\n```",
        ("", "", [PARIS, ("time", "{}")]),
    ),
    (
        "command-r",
        '<|START_ACTION|>[\n{"tool_call_id": "0", "tool_name": "weather", "parameters": {"city": "Paris"}}\n]'
        "<|END_ACTION|>",
        ("", "", [PARIS]),
    ),
    (
        "deepseek",
        '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{"city": "Paris"}<｜tool▁call▁end｜>'
        "<｜tool▁calls▁end｜>",
        ("", "", [PARIS]),
    ),
    (
        "deepseek",
        '<｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n{"city": "Paris"}\n```<｜tool▁call▁end｜>',
        ("", "", [PARIS]),
    ),
    (
        "kimi",
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0<|tool_call_argument_begin|>"
        '{"city": "Paris"}<|tool_call_end|><|tool_call_begin|>functions.time:1<|tool_call_argument_begin|>{}'
        "<|tool_call_end|><|tool_calls_section_end|>",
        ("", "", [PARIS, ("time", "{}")]),
    ),
    (
        "seed",
        "<seed:tool_call>\n<function=weather>\n<parameter=city>Paris</parameter>\n</function>\n</seed:tool_call>",
        ("", "", [PARIS]),
    ),
    ("shown", "<｜tool▁call▁begin｜>time<｜tool▁sep｜>{}<｜tool▁call▁end｜>", ("", "", [("time", "{}")])),
    ("shown", '{"tool_call": {"name": "time"}}', ("", "", [("time", "{}")])),
    ("nemotron", '<TOOLCALL>[{"name": "weather", "arguments": {"city": "Paris"}}]</TOOLCALL>', ("", "", [PARIS])),
    ("granite", '<|tool_call|>[{"name": "weather", "arguments": {"city": "Paris"}}]', ("", "", [PARIS])),
    ("functions", '<function=weather>{"city": "Paris"}</function>', ("", "", [PARIS])),
    ("firefunction", ' functools[{"name": "weather", "arguments": {"city": "Paris"}}]', ("", "", [PARIS])),
]


@pytest.mark.parametrize(("dialect", "said", "expected"), SAID)
def test_every_family_is_understood(dialect: str, said: str, expected: Read) -> None:
    assert read([said], dialect) == expected
    assert read(list(said), dialect) == expected


@pytest.mark.parametrize(("dialect", "said", "expected"), SAID)
def test_arguments_are_json(dialect: str, said: str, expected: Read) -> None:
    for _, arguments in read([said], dialect)[2]:
        assert isinstance(json.loads(arguments), dict)


@pytest.mark.parametrize(("dialect", "said", "expected"), SAID)
def test_an_answer_that_breaks_off_is_the_same_however_it_is_cut(dialect: str, said: str, expected: Read) -> None:
    for end in range(len(said)):
        whole = read([said[:end]], dialect)
        assert read(list(said[:end]), dialect) == whole
        for (name, arguments), (full_name, full_arguments) in zip(whole[2], expected[2], strict=False):
            assert name == full_name
            assert full_arguments.startswith(arguments.rstrip("}")), "what came of a call is true so far"


def cuts(text: str, at: list[int]) -> list[str]:
    ends = sorted({0, len(text), *(place % (len(text) + 1) for place in at)})
    return [text[start:end] for start, end in itertools.pairwise(ends)]


#: Text that is full of what marks are made of.
BITS = st.sampled_from(
    [
        *(mark for dialect in DIALECTS.values() for mark in (*dialect.openings, *dialect.ends)),
        "<think>",
        "</think>",
        *(said for _, said, _ in SAID),
        *'{}[]":,\n\t <>`\\',
        '"name"',
        '"arguments"',
        '{"name": "weather", "arguments": ',
        "weather",
        "text ",
        "é😀",
    ]
)
TEXTS = st.lists(BITS, max_size=12).map("".join)


@given(TEXTS, st.sampled_from(sorted(DIALECTS)), st.booleans(), st.lists(st.integers(0, 10_000), max_size=20))
def test_the_cut_never_matters(text: str, dialect: str, opened: bool, at: list[int]) -> None:
    for parallel in (True, False):
        whole = read([text], dialect, tags=THINK, opened=opened, parallel=parallel)
        assert read(cuts(text, at), dialect, tags=THINK, opened=opened, parallel=parallel) == whole
        assert read(list(text), dialect, tags=THINK, opened=opened, parallel=parallel) == whole


@given(TEXTS, st.sampled_from(sorted(DIALECTS)))
def test_what_calls_no_known_function_is_content_to_the_last_character(text: str, dialect: str) -> None:
    unknown = text.replace("weather", "whether").replace("time", "tame")
    shown, reasoning, calls = read([unknown], dialect)
    for noise in DIALECTS[dialect].noise:
        unknown = unknown.replace(noise, "")
    assert (shown, reasoning, calls) == (unknown, "", [])


@given(TEXTS)
def test_nothing_but_content_is_passed_on_as_it_is(text: str) -> None:
    assert read(cuts(text, [1, 5, 9]), None) == (text, "", [])


@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>\n{"name": "unknown", "arguments": {}}\n</tool_call>',
        "a <tool_call> is a tag",
        "<tool_call>",
        "<tool_call>\n{}\n</tool_call>",
        '<tool_call>{"name": 5}</tool_call>',
        '<tool_call>{"name": "weather", "arguments": [1]}</tool_call>',
        "<tool_call>\n<function=nope></function></tool_call>",
        "<tool_call>weather and more</tool_call>",
    ],
)
def test_what_only_looks_like_a_call_is_content(text: str) -> None:
    assert read(list(text), "hermes") == (text, "", [])


def test_an_object_in_the_middle_of_a_line_is_no_call() -> None:
    text = 'You could write {"name": "weather", "parameters": {}} here.'
    assert read(list(text), "llama") == (text, "", [])


def test_arguments_come_as_they_are_written() -> None:
    reply = a_reply("hermes")
    told = [
        reply.feed(piece).calls for piece in ("<tool_call>", '{"name": "weather", "arguments": ', '{"ci', 'ty": "P')
    ]
    assert [[(call.name, call.arguments) for call in calls] for calls in told] == [
        [],
        [],
        [("weather", '{"ci')],
        [("", 'ty": "P')],
    ]


ENDS = [
    ("hermes", '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}', "\n</tool_call>"),
    (
        "hermes",
        "<tool_call>\n<function=weather>\n<parameter=city>\nParis\n</parameter>",
        "\n</function>\n</tool_call>",
    ),
    ("hermes", '<tool_call>\n<function=weather>\n{"city": "Paris"}', "\n</function>\n</tool_call>"),
    ("hermes", "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>", "\n</tool_call>"),
    ("generic", '```json\n{"name": "weather", "arguments": {"city": "Paris"}}', "\n```"),
    ("seed", '<seed:tool_call>{"name": "weather", "arguments": {"city": "Paris"}}', "</seed:tool_call>"),
]


@pytest.mark.parametrize(("dialect", "call", "end"), ENDS)
def test_an_answer_that_breaks_off_within_a_calls_end_has_no_content(dialect: str, call: str, end: str) -> None:
    for length in range(len(end) + 1):
        said = call + end[:length]
        for pieces in ([said], list(said)):
            text, _, [(name, arguments)] = read(pieces, dialect)
            assert (text, name) == ("", "weather"), length
            assert arguments in ('{"city": "Paris"', '{"city": "Paris"}')


FUNCTION = "<tool_call>\n<function=weather>\n"
KEYED = "<tool_call>weather\n"


@pytest.mark.parametrize(
    ("said", "arguments"),
    [
        (FUNCTION, "{"),
        (f"{FUNCTION}<par", "{"),
        (f"{FUNCTION}<parameter=ci", "{"),
        (f"{FUNCTION}<parameter=city>", '{"city": "'),
        (f"{FUNCTION}<parameter=city>\nPar", '{"city": "Par'),
        (f"{FUNCTION}<parameter=city>\nPar\nis\n", '{"city": "Par\\nis'),
        (f"{FUNCTION}<parameter=city>\nParis\n</para", '{"city": "Paris'),
        (f"{FUNCTION}<parameter=city>\nParis\n</parameter>\n<parameter=d", '{"city": "Paris"'),
        (f"{FUNCTION}<parameter=days>\n1", '{"days": '),
        (f"{FUNCTION}<parameter=days>\n[1, 2\n</p", '{"days": [1, 2'),
        (f"{FUNCTION}<parameter=odd>\n[1", '{"odd": '),
        (KEYED, "{"),
        (f"{KEYED}<arg_ke", "{"),
        (f"{KEYED}<arg_key>ci", "{"),
        (f"{KEYED}<arg_key>city</arg_key>\n", "{"),
        (f"{KEYED}<arg_key>city</arg_key>\n<arg_value>Par", '{"city": "Par'),
        (f"{KEYED}<arg_key>city</arg_key>\n<arg_value>Paris</arg_v", '{"city": "Paris'),
    ],
)
def test_a_call_in_tags_that_is_cut_off_is_a_call_and_no_content(said: str, arguments: str) -> None:
    for pieces in ([said], list(said)):
        assert read(pieces, "hermes") == ("", "", [("weather", arguments)])


@pytest.mark.parametrize(
    ("dialect", "said"),
    [
        ("hermes", "<tool_call>"),
        ("hermes", "<tool_call>\n<func"),
        ("hermes", "<tool_call>\n<function=weather"),
        ("hermes", "<tool_call>weather"),
        ("hermes", '<tool_call>\n{"name": "weather", "argu'),
        ("mistral", "[TOOL_CALLS]wea"),
        ("kimi", "<|tool_call_begin|>functions.wea"),
        ("gemma4", "<|tool_call>call:weather"),
        ("command-r", '<|START_ACTION|>[\n{"tool_call_id": "0", "to'),
    ],
)
def test_of_a_call_that_is_cut_before_anything_can_be_told_of_it_there_is_nothing(dialect: str, said: str) -> None:
    for pieces in ([said], list(said)):
        assert read_with(a_reply(dialect), ["Well.", *pieces], cut=True) == ("Well.", "", [])
        assert read_with(a_reply(dialect), ["Well.", *pieces]) == (f"Well.{said}", "", [])


@pytest.mark.parametrize(
    ("dialect", "said"),
    [
        ("hermes", "<tool_call>\n{ what"),
        ("hermes", "<tool_call> is a"),
        ("hermes", "a <"),
        ("generic", '```json\n{"answer": 4'),
        ("generic", '{"answer": 4'),
        ("llama", '{"name": "wea'),
    ],
)
def test_what_may_be_an_answer_is_told_though_it_is_cut(dialect: str, said: str) -> None:
    for pieces in ([said], list(said)):
        assert read_with(a_reply(dialect), pieces, cut=True) == (said, "", [])


@pytest.mark.parametrize("said", ["<tool_call>\n<function=weather", "<tool_call>weather", "<tool_call>weather\nand"])
def test_a_name_that_may_go_on_calls_nothing(said: str) -> None:
    assert read(list(said), "hermes") == (said, "", [])


def test_a_text_in_tags_comes_as_it_is_written_however_long_it_is() -> None:
    reply = a_reply("hermes")
    told = [reply.feed(piece).calls for piece in (FUNCTION, "<parameter=city>", "\nPa", "r\n", "is", '"')]
    assert [[(call.name, call.arguments) for call in calls] for calls in told] == [
        [],
        [("weather", '{"city": "')],
        [("", "Pa")],
        [("", "r")],
        [("", "\\nis")],
        [("", '\\"')],
    ]
    much = "x" * 2_000_000
    assert "".join(call.arguments for call in reply.feed(much).calls) == much
    assert [call.arguments for call in reply.feed("\n</parameter>\n</function>").calls] == ['"}']
    assert reply.finish() == ("", "", ())


def test_what_begins_like_a_calls_end_and_goes_on_is_content() -> None:
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n'
    for more in ("</tool_cat>", "</", "<"):
        assert read([call, more, " and so on"], "hermes") == (f"\n{more} and so on", "", [PARIS])


def test_without_parallel_calls_the_first_ends_the_answer() -> None:
    reply = a_reply("hermes", parallel=False)
    call = '<tool_call>{"name": "time"}</tool_call>'
    assert [delta.name for delta in reply.feed(call + call).calls] == ["time"]
    assert reply.full
    assert reply.finish().calls == ()


def test_a_mark_that_is_a_control_token_does_not_leak() -> None:
    silent = frozenset({"[TOOL_CALLS]"})
    assert read(["[TOOL_CALLS]What?"], "mistral", silent=silent) == ("What?", "", [])


def test_an_id_that_the_model_gives_is_kept() -> None:
    (call,) = a_reply("mistral").feed("[TOOL_CALLS]time[CALL_ID]abcdefghi[ARGS]{}").calls
    assert (call.id, call.arguments) == ("abcdefghi", "{}")


# --- reasoning --------------------------------------------------------------------------------------------------------


def test_reasoning_is_told_apart_without_the_white_space_around_it() -> None:
    assert read(list("<think>\nHm.\n\nYes.\n</think>\n\nHello.\n"), None, tags=THINK) == ("Hello.\n", "Hm.\n\nYes.", [])


def test_reasoning_that_the_prompt_has_opened_needs_no_tag() -> None:
    assert read(list("Hm.\n</think>\n\nHello."), None, tags=THINK, opened=True) == ("Hello.", "Hm.", [])
    assert read(["<think>\nHm.</think>Hello."], None, tags=THINK, opened=True) == ("Hello.", "Hm.", [])


def test_reasoning_that_does_not_end_is_reasoning() -> None:
    assert read(list("<think>Hm. <tool_call>"), "hermes", tags=THINK) == ("", "Hm. <tool_call>", [])


def test_an_answer_without_reasoning_is_content() -> None:
    assert read(list("  <thin> air"), None, tags=THINK) == ("  <thin> air", "", [])


def test_a_tag_later_on_is_content() -> None:
    assert read(list("The tag <think> opens."), None, tags=THINK) == ("The tag <think> opens.", "", [])


def test_a_call_may_follow_reasoning() -> None:
    said = '<think>Hm.</think>\n\n<tool_call>{"name": "time"}</tool_call>'
    assert read(list(said), "hermes", tags=THINK) == ("", "Hm.", [("time", "{}")])


# --- harmony ----------------------------------------------------------------------------------------------------------


def harmony(*, split: bool = True, within: str = "") -> HarmonyReply:
    return HarmonyReply(split=split, within=within, calls=Calls(["weather", "time"], lambda: "id"))


HARMONY_SAID: list[tuple[str, Read]] = [
    (
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Yes.",
        ("Yes.", "Hm.", []),
    ),
    (
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary to=functions.weather "
        '<|constrain|>json<|message|>{"city": "Paris"}<|call|>',
        ("", "Hm.", [PARIS]),
    ),
    (' to=functions.weather<|channel|>commentary json<|message|>{"city": "Paris"}', ("", "", [PARIS])),
    (
        "<|channel|>commentary<|message|>Let me see.<|end|><|start|>assistant<|channel|>analysis<|message|>Hm.<|end|>",
        ("Let me see.", "Hm.", []),
    ),
    (
        "<|channel|>commentary to=browser.search<|message|>{}<|end|>",
        ("<|channel|>commentary to=browser.search{}", "", []),
    ),
    ("No channel at all.", ("No channel at all.", "", [])),
    ("<|channel|>analysis", ("<|channel|>analysis", "", [])),
]


@pytest.mark.parametrize(("said", "expected"), HARMONY_SAID)
def test_the_channels_of_gpt_oss_are_told_apart(said: str, expected: Read) -> None:
    assert read_with(harmony(), [said]) == expected
    assert read_with(harmony(), list(said)) == expected


@pytest.mark.parametrize(
    "mark", ["<|chan", "<|channel|>", "<|channel|>analysis", "<|channel|>commentary to=functions.wea"]
)
def test_an_answer_of_gpt_oss_that_is_cut_before_it_says_anything_is_empty(mark: str) -> None:
    for pieces in ([mark], list(mark)):
        assert read_with(harmony(), pieces, cut=True) == ("", "", [])
        assert read_with(harmony(), pieces) == (mark, "", [])
    said = f"<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant{mark}"
    assert read_with(harmony(), [said], cut=True) == ("", "Hm.", [])
    assert read_with(harmony(), ["No channel"], cut=True) == ("No channel", "", [])


def test_the_channel_may_have_begun_in_the_prompt() -> None:
    rest = " more.<|end|><|start|>assistant<|channel|>final<|message|>Yes."
    assert read_with(harmony(within="analysis"), list(rest))[:2] == ("Yes.", "more.")
    assert read_with(harmony(within="final"), list(" more."))[:2] == (" more.", "")


def test_reasoning_of_gpt_oss_can_stay_in_the_content() -> None:
    said = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Yes."
    expected = "<|channel|>analysis<|message|>Hm.<|end|>Yes."
    assert read_with(harmony(split=False), list(said)) == (expected, "", [])


HARMONY_BITS = st.lists(
    st.sampled_from(
        [
            "<|channel|>",
            "<|message|>",
            "<|start|>",
            "<|end|>",
            "<|call|>",
            "analysis",
            "final",
            "commentary",
            "assistant",
        ]
        + [" to=functions.weather", " json", '{"city": ', '"Paris"}', "text ", "<", "|", "\n", *dict(HARMONY_SAID)]
    ),
    max_size=12,
).map("".join)


@given(
    HARMONY_BITS, st.booleans(), st.sampled_from(["", "analysis", "final"]), st.lists(st.integers(0, 999), max_size=9)
)
def test_the_cut_never_matters_to_channels(text: str, split: bool, within: str, at: list[int]) -> None:
    whole = read_with(harmony(split=split, within=within), [text])
    assert read_with(harmony(split=split, within=within), cuts(text, at)) == whole
    assert read_with(harmony(split=split, within=within), list(text)) == whole


def test_half_of_a_surrogate_pair_in_a_call_is_told_as_what_a_message_can_hold() -> None:
    call = '<tool_call>{"name": "time", "id": "\\udc00", "arguments": "\\ud83d {}"}</tool_call>'
    parts = a_reply("hermes").feed(call)
    assert [(delta.id, delta.arguments) for delta in parts.calls] == [("\ufffd", "\ufffd {}")]


# --- calls or JSON ----------------------------------------------------------------------------------------------------


def read_either(pieces: Sequence[str], dialect: str, *, cut: bool = False, **more: Any) -> Read:
    forms = forms_of(DIALECTS[dialect], ["weather", "time"])
    return read_with(a_reply(dialect, forms=forms, **more), pieces, cut=cut)


#: JSON with what would be a call elsewhere.
ANSWERS = [
    '{"a": "<tool_call><function=time>\\n</function></tool_call>"}',
    '[\n{"name": "time", "parameters": {}, "arguments": {}}]',
    '{"a": 1, "name": "time", "parameters": {}}',
    '{"name": "thyme", "parameters": {}}',
    '{"name": "time", "age": 7}',
    '{"tool_call": {"name": "time", "age": 7}}',
    '{"tool_calls": []}',
    '"[TOOL_CALLS]time[ARGS]{}"',
    "7",
    "",
]


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("answer", ANSWERS)
def test_where_an_answer_is_calls_or_json_what_begins_as_json_is_content_to_its_end(dialect: str, answer: str) -> None:
    for pieces in ([answer], list(answer)):
        assert read_either(pieces, dialect) == (answer, "", [])
        thought = ["<think>", "Hm. <tool_call>", "</think>\n\n", *pieces]
        assert read_either(thought, dialect, tags=THINK) == (answer, "Hm. <tool_call>", [])


@pytest.mark.parametrize(
    ("dialect", "answer"),
    [
        ("hermes", '<tool_call>{"name": "weather", "arguments": {"city": "Paris"}}</tool_call>'),
        ("hermes", "\n<tool_call><function=weather>\n<parameter=city>\nParis\n</parameter>\n</function></tool_call>"),
        ("llama", '{ "name":\n"weather", "parameters": {"city": "Paris"}}'),
        ("generic", '{"tool_call": {"name": "weather", "arguments": {"city": "Paris"}}}'),
        ("generic", '{"tool_calls": [{"name": "weather", "arguments": {"city": "Paris"}}]}'),
        ("mistral", '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Paris"}}]'),
    ],
)
def test_calls_are_read_there_as_everywhere(dialect: str, answer: str) -> None:
    for pieces in ([answer], list(answer)):
        assert read_either(pieces, dialect) == ("", "", [PARIS])
        assert read_either(["<think>Hm.</think>", *pieces], dialect, tags=THINK) == ("", "Hm.", [PARIS])


def test_json_is_told_as_it_comes() -> None:
    for dialect in DIALECTS:
        reply = a_reply(dialect, forms=forms_of(DIALECTS[dialect], ["weather", "time"]))
        assert reply.feed('{"age"').text == '{"age"', dialect
        assert reply.feed(": {").text == ": {", dialect


def test_json_that_is_cut_is_content_and_a_mark_that_is_cut_is_not() -> None:
    assert read_either(['{"name": "ti'], "llama", cut=True) == ('{"name": "ti', "", [])
    assert read_either(['<tool_call>{"na'], "hermes", cut=True) == ("", "", [])


@pytest.mark.parametrize("schema", [{"enum": ["1", "true"]}, {"const": "1"}, {"type": "string"}])
def test_a_text_in_a_tag_is_a_text_where_the_schema_lists_it_whatever_it_looks_like(schema: dict[str, Any]) -> None:
    tools = ({"type": "function", "function": {"name": "weather", "parameters": {"properties": {"city": schema}}}},)
    dialect = dialect_of("<tool_call><function=", takes_tools=True)
    reply = Reply(dialect=dialect, calls=Calls(["weather"], lambda: "id"), kinds=kinds_of(tools))
    call = "<tool_call>\n<function=weather>\n<parameter=city>\n1\n</parameter>\n</function>\n</tool_call>"
    assert read_with(reply, [call]) == ("", "", [("weather", '{"city": "1"}')])
