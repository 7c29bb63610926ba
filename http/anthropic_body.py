"""What Anthropic's clients send to ``/v1/messages``, and the chat that it means.

A request becomes a body of ``/v1/chat/completions``, as in llama-server, so everything behind it is the same for both.
Block types that are no part of a chat here are refused by their name: dropping one would answer another question.
"""

from typing import Any, Final, Literal

import msgspec

from llamaherd.http.problems import INVALID_REQUEST, Problem
from llamaherd.http.schema import QueuedBody

__all__ = ["DEFAULT_MAX_TOKENS", "MessagesBody", "to_chat"]

#: Most tokens of an answer whose request does not say; Anthropic wants it said, llama-server has this default.
DEFAULT_MAX_TOKENS: Final = 4096

#: Claude Code heads its system prompt with a line that has a stamp which changes with each request, so that no prefix
#: of the prompt could be reused. llama-server levels the stamp, and so does :func:`_levelled`.
_STAMPED: Final = "x-anthropic-billing-header:"
_STAMP: Final = "cch="
_STAMP_LENGTH: Final = 5


class TextBlock(msgspec.Struct, frozen=True, tag="text", tag_field="type"):
    """A text."""

    text: str


class ThinkingBlock(msgspec.Struct, frozen=True, tag="thinking", tag_field="type"):
    """What the model thought in an earlier turn; there is nothing to check the signature against."""

    thinking: str = ""


class RedactedThinkingBlock(msgspec.Struct, frozen=True, tag="redacted_thinking", tag_field="type"):
    """Thoughts that only Anthropic's own models can read; left out."""


class ImageSource(msgspec.Struct, frozen=True):
    """Where an image is: ``data`` in base64, or a ``url``."""

    type: Literal["base64", "url"]
    media_type: str = "image/jpeg"
    data: str = ""
    url: str = ""

    def to_part(self) -> dict[str, Any]:
        """Return the image as OpenAI has it."""
        url = self.url if self.type == "url" else f"data:{self.media_type};base64,{self.data}"
        return {"type": "image_url", "image_url": {"url": url}}


class ImageBlock(msgspec.Struct, frozen=True, tag="image", tag_field="type"):
    """An image."""

    source: ImageSource


class ToolUseBlock(msgspec.Struct, frozen=True, tag="tool_use", tag_field="type"):
    """A call of a tool in an earlier turn."""

    id: str
    name: str
    input: dict[str, Any] = {}

    def to_call(self) -> dict[str, Any]:
        """Return the call as OpenAI has it."""
        arguments = msgspec.json.encode(self.input).decode()
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": arguments}}


class ToolResultBlock(msgspec.Struct, frozen=True, tag="tool_result", tag_field="type"):
    """What a tool answered."""

    tool_use_id: str
    content: str | list[TextBlock | ImageBlock] | None = None
    is_error: bool | None = None

    def to_message(self) -> dict[str, Any]:
        """Return the message that OpenAI has for it; texts alone are one text, which every template can read."""
        content = self.content or ""
        shown: str | list[dict[str, Any]]
        if isinstance(content, str):
            shown = content
        elif any(isinstance(block, ImageBlock) for block in content):
            shown = [_part(block) for block in content]
        else:
            shown = "".join(block.text for block in content if isinstance(block, TextBlock))
        return {"role": "tool", "tool_call_id": self.tool_use_id, "content": shown}


Block = TextBlock | ThinkingBlock | RedactedThinkingBlock | ImageBlock | ToolUseBlock | ToolResultBlock


class Turn(msgspec.Struct, frozen=True):
    """One message."""

    role: Literal["user", "assistant", "system"]
    content: str | list[Block]


class Tool(msgspec.Struct, frozen=True):
    """A tool that the caller runs. Tools that Anthropic's servers run (those with another ``type``) are not there."""

    name: str
    description: str | None = None
    input_schema: dict[str, Any] = {}
    type: Literal["custom"] | None = None


class ToolChoice(msgspec.Struct, frozen=True):
    """Whether the model may, must or must not call a tool, and which."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(msgspec.Struct, frozen=True):
    """Whether the model shall think first, and for how many tokens at most."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = None


class OutputConfig(msgspec.Struct, frozen=True):
    """What the answer shall be.

    Attributes:
        format: ``{"type": "json_schema", "schema": ...}`` makes it JSON of that shape.
        effort: How hard the model shall think.
    """

    format: dict[str, Any] | None = None
    effort: str | None = None


class MessagesBody(QueuedBody, frozen=True, kw_only=True):
    """``POST /v1/messages`` and ``/v1/messages/count_tokens``.

    Attributes:
        max_tokens: 4096 by default.
    """

    messages: list[Turn] | None = None
    system: str | list[TextBlock] | None = None
    max_tokens: int | None = None
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    chat_template_kwargs: dict[str, Any] | None = None


def to_chat(body: MessagesBody) -> dict[str, Any]:
    """Return the body of the chat that is meant. Raises Problem where there is none."""
    chat: dict[str, Any] = {
        "model": body.model,
        "messages": None if body.messages is None else _messages(body),
        "stream": body.stream,
        # A stream's first event tells how long the prompt is.
        "return_progress": body.stream,
        "max_tokens": DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens,
        "stop": body.stop_sequences,
        "temperature": body.temperature,
        "top_k": body.top_k,
        "top_p": body.top_p,
        "chat_template_kwargs": body.chat_template_kwargs,
        "priority": body.priority,
        "keep_alive": body.keep_alive,
        "queue_timeout": body.queue_timeout,
        **_tools(body),
        **_thinking(body),
    }
    output = body.output_config or OutputConfig()
    chat["reasoning_effort"] = output.effort
    if output.format is not None:
        chat["response_format"] = _response_format(output.format)
    return {name: value for name, value in chat.items() if value is not None}


def _messages(body: MessagesBody) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    if body.system is not None:
        blocks = [body.system] if isinstance(body.system, str) else [block.text for block in body.system]
        messages.append({"role": "system", "content": "".join(map(_levelled, blocks))})
    for turn in body.messages or ():
        if isinstance(turn.content, str):
            messages.append({"role": turn.role, "content": turn.content})
        else:
            messages.extend(_of_blocks(turn.role, turn.content))
    return messages


def _of_blocks(role: str, blocks: list[Block]) -> list[dict[str, Any]]:
    """Return a message of blocks as OpenAI has it: the turn itself, and one more for each result of a tool."""
    parts = [_part(block) for block in blocks if isinstance(block, TextBlock | ImageBlock)]
    calls = [block.to_call() for block in blocks if isinstance(block, ToolUseBlock)]
    thoughts = "".join(block.thinking for block in blocks if isinstance(block, ThinkingBlock))
    results = [block.to_message() for block in blocks if isinstance(block, ToolResultBlock)]
    # One text alone is what every template can read.
    turn: dict[str, Any] = {"role": role, "content": _text_alone(parts)}
    if calls:
        turn["tool_calls"] = calls
    if thoughts:
        turn["reasoning_content"] = thoughts
    # llama-server puts the results last; the model has seen them before what the user says to them.
    return [*results, turn] if parts or calls or thoughts else results


def _text_alone(parts: list[dict[str, Any]]) -> str | list[dict[str, Any]]:
    if not parts:
        return ""
    return parts[0]["text"] if len(parts) == 1 and parts[0]["type"] == "text" else parts


def _part(block: TextBlock | ImageBlock) -> dict[str, Any]:
    return {"type": "text", "text": block.text} if isinstance(block, TextBlock) else block.source.to_part()


def _tools(body: MessagesBody) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    if body.tools:
        fields["tools"] = [
            {
                "type": "function",
                "function": {
                    "name": tool.name,
                    "description": tool.description or "",
                    "parameters": tool.input_schema,
                },
            }
            for tool in body.tools
        ]
    choice = body.tool_choice
    if choice is None:
        return fields
    if choice.disable_parallel_tool_use is not None:
        fields["parallel_tool_calls"] = not choice.disable_parallel_tool_use
    if choice.type == "tool":
        if not choice.name:
            raise Problem(INVALID_REQUEST, "tool_choice: the name of the tool is missing", param="tool_choice")
        fields["tool_choice"] = {"type": "function", "function": {"name": choice.name}}
    else:
        fields["tool_choice"] = "required" if choice.type == "any" else choice.type
    return fields


def _thinking(body: MessagesBody) -> dict[str, Any]:
    if body.thinking is None:
        return {}
    if body.thinking.type == "disabled":
        return {"chat_template_kwargs": {"enable_thinking": False, **(body.chat_template_kwargs or {})}}
    budget = body.thinking.budget_tokens
    return {} if budget is None else {"thinking_budget_tokens": budget}


def _response_format(wanted: dict[str, Any]) -> dict[str, Any]:
    if wanted.get("type") != "json_schema":
        raise Problem(INVALID_REQUEST, "output_config: format must be of type json_schema", param="output_config")
    return {"type": "json_schema", "json_schema": {"name": "output", "schema": wanted.get("schema")}}


def _levelled(system: str) -> str:
    if not system.startswith(_STAMPED):
        return system
    place = system.find(_STAMP, len(_STAMPED))
    begin = place + len(_STAMP)
    end = begin + _STAMP_LENGTH
    if place < 0 or system[end : end + 1] != ";":
        return system
    return system[:begin] + "f" * _STAMP_LENGTH + system[end:]
