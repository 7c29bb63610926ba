"""What OpenAI's clients send to ``/v1/responses``, and the chat that it means.

Nothing is kept between requests: what refers to an earlier one is refused. Fields that are not of this API alone go on
to the chat as they are, so everything that chats know works here too.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal, cast

import msgspec

from llamaherd.http.problems import INVALID_REQUEST, NOT_SUPPORTED, Problem
from llamaherd.http.schema import MAX_TOP_LOGPROBS, ModelBody

__all__ = ["ResponsesBody", "to_chat"]

#: In ``include``: tell how likely each token was.
_LOGPROBS: Final = "message.output_text.logprobs"


class InputText(msgspec.Struct, frozen=True, tag="input_text", tag_field="type"):
    """A text of the user's."""

    text: str

    def to_part(self) -> dict[str, Any]:
        """Return it as a part of a chat's message."""
        return {"type": "text", "text": self.text}


class OutputText(msgspec.Struct, frozen=True, tag="output_text", tag_field="type"):
    """A text of the assistant's."""

    text: str

    def to_part(self) -> dict[str, Any]:
        """Return it as a part of a chat's message."""
        return {"type": "text", "text": self.text}


class Refusal(msgspec.Struct, frozen=True, tag="refusal", tag_field="type"):
    """An answer that the assistant did not give."""

    refusal: str

    def to_part(self) -> dict[str, Any]:
        """Return it as a part of a chat's message."""
        return {"type": "refusal", "refusal": self.refusal}


class InputImage(msgspec.Struct, frozen=True, tag="input_image", tag_field="type"):
    """An image: a URL, or a data URL."""

    image_url: str

    def to_part(self) -> dict[str, Any]:
        """Return it as a part of a chat's message."""
        return {"type": "image_url", "image_url": {"url": self.image_url}}


Part = InputText | OutputText | Refusal | InputImage


class Message(msgspec.Struct, frozen=True, tag="message", tag_field="type"):
    """A message of anybody's; ``type`` may be left out."""

    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[Part]


class FunctionCall(msgspec.Struct, frozen=True, tag="function_call", tag_field="type"):
    """A call of a function in an earlier turn."""

    call_id: str
    name: str
    arguments: str

    def to_call(self) -> dict[str, Any]:
        """Return it as a chat has it."""
        return {"id": self.call_id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


class FunctionCallOutput(msgspec.Struct, frozen=True, tag="function_call_output", tag_field="type"):
    """What a function answered."""

    call_id: str
    output: str | list[InputText | InputImage]


class ReasoningText(msgspec.Struct, frozen=True):
    """A part of what the model thought."""

    text: str


class Reasoning(msgspec.Struct, frozen=True, tag="reasoning", tag_field="type"):
    """What the model thought in an earlier turn; what is encrypted only OpenAI can read, and is left out."""

    content: list[ReasoningText] | None = None
    summary: list[ReasoningText] | None = None


Item = Message | FunctionCall | FunctionCallOutput | Reasoning


class ReasoningOptions(msgspec.Struct, frozen=True):
    """How hard the model shall think."""

    effort: str | None = None


class TextOptions(msgspec.Struct, frozen=True):
    """``format``: ``{"type": "json_schema", "name", "schema", "strict"}``, ``{"type": "json_object"}`` or text."""

    format: dict[str, Any] | None = None


class ResponsesBody(ModelBody, frozen=True, kw_only=True):
    """``POST /v1/responses`` and ``/v1/responses/input_tokens``.

    Attributes:
        tools: Those whose type is not ``function`` are OpenAI's own and are left out, as in llama-server.
        previous_response_id, conversation, background, prompt: Need a memory that there is not.
    """

    input: str | list[dict[str, Any]] | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    reasoning: ReasoningOptions | None = None
    text: TextOptions | None = None
    include: list[str] | None = None
    top_logprobs: int | None = None
    metadata: dict[str, Any] | None = None
    previous_response_id: str | None = None
    conversation: str | dict[str, Any] | None = None
    background: bool | None = None
    prompt: dict[str, Any] | None = None
    store: bool | None = None
    stream_options: dict[str, Any] | None = None


#: What a chat does not get as it is; a response has one answer.
_OWN: Final = frozenset({*ResponsesBody.__struct_fields__, "n", "n_cmpl"} - {"model"})
_MEMORY: Final = ("previous_response_id", "conversation", "background", "prompt")


def to_chat(body: ResponsesBody, raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return the body of the chat that is meant, fields that are not of this API alone included. Raises Problem."""
    for name in _MEMORY:
        if getattr(body, name):
            raise Problem(NOT_SUPPORTED, f"{name}: nothing is kept between requests here", param=name)
    if body.input is None:
        raise Problem(INVALID_REQUEST, '"input" is required', param="input")
    chat: dict[str, Any] = {name: value for name, value in raw.items() if name not in _OWN}
    chat["messages"] = _messages(body)
    if body.max_output_tokens is not None:
        chat["max_tokens"] = body.max_output_tokens
    if body.reasoning is not None and body.reasoning.effort is not None:
        chat["reasoning_effort"] = body.reasoning.effort
    if body.top_logprobs is not None and not 0 <= body.top_logprobs <= MAX_TOP_LOGPROBS:
        message = f"top_logprobs must be an integer from 0 to {MAX_TOP_LOGPROBS}"
        raise Problem(INVALID_REQUEST, message, param="top_logprobs")
    if body.include and _LOGPROBS in body.include:
        chat |= {"logprobs": True, "top_logprobs": body.top_logprobs or 0}
    return chat | _tools(body) | _format(body)


def _messages(body: ResponsesBody) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    if body.instructions:
        messages.append({"role": "system", "content": body.instructions})
    if isinstance(body.input, str):
        return [*messages, {"role": "user", "content": body.input}]
    for index, item in enumerate(body.input or ()):
        _add(messages, _item(index, item))
    return messages


def _item(index: int, item: dict[str, Any]) -> Item:
    try:
        typed: Item = msgspec.convert({"type": "message", **item}, Item)
    except msgspec.ValidationError as error:
        reason, _, path = str(error).partition(" - at `$")
        field = f"input[{index}]{path.rstrip('`')}"
        raise Problem(INVALID_REQUEST, f"{field}: {reason[:1].lower()}{reason[1:]}", param=field) from None
    return typed


def _add(messages: list[dict[str, Any]], item: Item) -> None:
    """Add an item. All that the assistant did in one turn is one message, as in llama-server."""
    match item:
        case Message() if item.role == "assistant":
            turn = _turn(messages)
            turn["content"] = _content([*_parts(turn["content"]), *_parts(item.content)])
        case Message():
            messages.append({"role": item.role, "content": _content(_parts(item.content))})
        case FunctionCall():
            _turn(messages).setdefault("tool_calls", []).append(item.to_call())
        case FunctionCallOutput():
            content = _content(_parts(item.output))
            messages.append({"role": "tool", "tool_call_id": item.call_id, "content": content})
        case Reasoning():
            thoughts = "".join(part.text for part in item.content or item.summary or ())
            if thoughts:
                _turn(messages)["reasoning_content"] = thoughts


def _turn(messages: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the assistant's message at the end, a new one if there is none."""
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": ""})
    return messages[-1]


def _parts(content: str | Sequence[Part | dict[str, Any]]) -> list[dict[str, Any]]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}] if content else []
    return [part if isinstance(part, dict) else part.to_part() for part in content]


def _content(parts: list[dict[str, Any]]) -> str | list[dict[str, Any]]:
    """Return parts as a message's content: one text alone is what every template can read."""
    if not parts:
        return ""
    return parts[0]["text"] if len(parts) == 1 and parts[0]["type"] == "text" else parts


def _tools(body: ResponsesBody) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    functions = [tool for tool in body.tools or () if tool.get("type") == "function"]
    if functions:
        fields["tools"] = [
            {
                "type": "function",
                "function": {"strict": True, **{name: value for name, value in tool.items() if name != "type"}},
            }
            for tool in functions
        ]
    choice = body.tool_choice
    if choice is not None:
        fields["tool_choice"] = _choice(choice) if isinstance(choice, dict) else choice
    return fields


def _choice(choice: dict[str, Any]) -> dict[str, Any]:
    """Return the choice of a function, or of some, as chats have it."""
    if choice.get("type") == "function":
        return {"type": "function", "function": {"name": choice.get("name")}}
    if choice.get("type") != "allowed_tools":
        raise Problem(NOT_SUPPORTED, "tool_choice: only functions can be chosen", param="tool_choice")
    tools: object = choice.get("tools")
    if isinstance(tools, list):
        named = [cast("dict[str, Any]", tool) for tool in cast("list[object]", tools) if isinstance(tool, dict)]
        # Those that are no functions are left out of the tools too.
        tools = [_choice(tool) for tool in named if tool.get("type") == "function"]
    return {"type": "allowed_tools", "allowed_tools": {"mode": choice.get("mode"), "tools": tools}}


def _format(body: ResponsesBody) -> dict[str, Any]:
    wanted = body.text.format if body.text is not None else None
    if wanted is None:
        return {}
    if wanted.get("type") != "json_schema":
        return {"response_format": wanted}
    schema = {name: value for name, value in wanted.items() if name != "type"}
    return {"response_format": {"type": "json_schema", "json_schema": schema}}
