"""The messages of a chat in the form that its template wants, and what stands in where a template cannot do something.

The rules are the reference's: content is never null, ``developer`` is another word for ``system``, arguments are
objects or texts as the template reads them, a system message that it refuses moves into the next one. Where a template
knows no tools, a system message describes them, and calls and their results are told as text.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final, cast

from llamaherd.pool.child.engine import RequestError
from llamaherd.pool.child.traits import Traits

__all__ = ["describe_tools", "prepared", "text_of", "with_instruction"]

Message = dict[str, Any]

_CHOICE: Final = {
    "auto": "Otherwise answer in plain text.",
    "schema": "Otherwise answer in the JSON that you were asked for.",
    "required": "You must call a function now.",
}


def prepared(messages: Sequence[Mapping[str, Any]], traits: Traits, *, harmony: bool = False) -> list[Message]:
    """Return messages as a template with these traits wants them. Raises RequestError.

    Args:
        harmony: Whether the template speaks OpenAI's harmony format, in which ``developer`` is a role of its own and
            reasoning is called ``thinking``.
    """
    result = [_plain(message) for message in messages]
    for message in result:
        if message["role"] == "developer" and not harmony:
            message["role"] = "system"
        if harmony and message.get("reasoning_content"):
            message["thinking"] = message["reasoning_content"]
            if message.get("tool_calls"):
                message["content"] = ""
    if any(message.get("tool_calls") or message["role"] == "tool" for message in result):
        result = _with_arguments(result, traits) if traits.takes_calls else _calls_as_text(result)
    if result and result[0]["role"] == "system" and not traits.takes_system:
        result = _without_system(result)
    return [_with_content(message, traits) for message in result]


def _plain(message: Mapping[str, Any]) -> Message:
    result = dict(message)
    if result.get("content") is None:
        result["content"] = ""
    if not result.get("tool_calls"):
        result.pop("tool_calls", None)
    return result


def _with_content(message: Message, traits: Traits) -> Message:
    """Join a list of text parts where lists are not read, or make a list where nothing else is."""
    content = message["content"]
    if isinstance(content, list):
        text = text_of(cast("object", content))
        return message if traits.takes_parts else {**message, "content": text}
    if not traits.takes_text and traits.takes_parts:
        return {**message, "content": [{"type": "text", "text": content}]}
    return message


def text_of(content: object) -> str:
    """Return content as one text. Raises RequestError for a part that is no text."""
    if not isinstance(content, list):
        return content if isinstance(content, str) else ""
    texts: list[str] = []
    for part in cast("list[object]", content):
        text = cast("dict[str, object]", part).get("text") if isinstance(part, dict) else None
        if not isinstance(text, str) or cast("dict[str, object]", part).get("type") != "text":
            raise RequestError(
                "this model takes text content only: a part is not of the type 'text'", code="unsupported_content"
            )
        texts.append(text)
    return "\n".join(texts)


def _without_system(messages: list[Message]) -> list[Message]:
    """Move a system message into the one that follows it."""
    if len(messages) < 2:
        return [{**messages[0], "role": "user"}]
    text = f"{text_of(messages[0]['content'])}\n{text_of(messages[1]['content'])}"
    return [{**messages[1], "content": text}, *messages[2:]]


# --- calls ------------------------------------------------------------------------------------------------------------


def _with_arguments(messages: list[Message], traits: Traits) -> list[Message]:
    return [
        {**message, "tool_calls": [_call(call, objects=traits.takes_objects) for call in message["tool_calls"]]}
        if message.get("tool_calls")
        else message
        for message in messages
    ]


def _call(call: Mapping[str, Any], *, objects: bool) -> Message:
    function = dict(call["function"])
    arguments = function.get("arguments")
    if arguments is None:
        arguments = "{}"
    if objects:
        value = _value_of(arguments)
        # Many templates go through the arguments by their names.
        function["arguments"] = {"arguments": value} if isinstance(value, str) else value
    else:
        function["arguments"] = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return {"type": "function", **call, "function": function}


def _value_of(arguments: object) -> object:
    """Return what the arguments of a call say; those that are no JSON as they are.

    An answer that ends at its limit may end within a call, and whoever has one in the conversation must be able to go
    on. llama-server refuses it where the template wants objects.
    """
    if not isinstance(arguments, str):
        return {} if arguments is None else arguments
    try:
        return json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        return arguments


def _calls_as_text(messages: list[Message]) -> list[Message]:
    """Tell calls and their results as text, for a template that shows neither."""
    result: list[Message] = []
    merging = False
    for message in messages:
        if message.get("tool_calls"):
            calls = [
                {"name": call["function"]["name"], "arguments": _value_of(call["function"].get("arguments"))}
                for call in message["tool_calls"]
            ]
            told = {"tool_call": calls[0]} if len(calls) == 1 else {"tool_calls": calls}
            text = "\n".join(filter(None, (text_of(message["content"]), json.dumps(told, ensure_ascii=False))))
            result.append({"role": "assistant", "content": text})
        elif message["role"] == "tool":
            named = {key: message[key] for key in ("name", "tool_call_id") if message.get(key)}
            told = {"tool_response": {**named, "content": text_of(message["content"])}}
            text = json.dumps(told, ensure_ascii=False)
            # Templates that know no tools often want the roles to alternate.
            if merging:
                result[-1] = {"role": "user", "content": f"{result[-1]['content']}\n{text}"}
            else:
                result.append({"role": "user", "content": text})
            merging = True
            continue
        elif merging and message["role"] == "user":
            result[-1] = {"role": "user", "content": f"{result[-1]['content']}\n{text_of(message['content'])}"}
        else:
            result.append(message)
        merging = False
    return result


# --- tools ------------------------------------------------------------------------------------------------------------


def describe_tools(tools: Sequence[Mapping[str, Any]], *, choice: str, parallel: bool) -> str:
    """Return the instruction that makes a model without a form of its own for calls write them as JSON."""
    functions = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    several = (
        ' To call several at once, answer {"tool_calls": [{"name": ..., "arguments": {...}}, ...]}.' if parallel else ""
    )
    return (
        f"You can call these functions:\n{functions}\n\n"
        'To call one, answer with nothing but this JSON: {"tool_call": {"name": "the function\'s name", "arguments": '
        f"{{the arguments by their names}}}}}}.{several} {_CHOICE.get(choice, _CHOICE['auto'])}"
    )


def with_instruction(messages: Sequence[Mapping[str, Any]], instruction: str) -> list[Mapping[str, Any]]:
    """Return messages with an instruction at the end of their system message, which is made if there is none."""
    if messages and messages[0]["role"] in ("system", "developer"):
        text = "\n\n".join(filter(None, (text_of(messages[0].get("content")), instruction)))
        return [{**messages[0], "content": text}, *messages[1:]]
    return [{"role": "system", "content": instruction}, *messages]
