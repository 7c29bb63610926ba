"""The parameters that only conversations have: messages, tools, reasoning, and what the answer continues.

The rules for tools and for continued messages are the reference's, made strict where it lets a mistake pass.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal, TypeAlias, TypedDict, cast

from llamaherd.pool.errors import BadRequest
from llamaherd.transport.messages import ChatOptions

__all__ = ["MAX_BUDGET_MESSAGE", "ChatMessage", "TemplateParams", "chat_options", "check_messages", "check_tools"]

#: An OpenAI chat message: ``role`` and ``content``, and whatever else the model's template reads.
ChatMessage: TypeAlias = Mapping[str, Any]

#: Models write names between brackets, tags and quotes, so none of these may be part of one.
_TOOL_NAME: Final = re.compile(r"""[^\s\[\]{}()<>"'\\,]{1,256}""")
_MOST_BUDGET: Final = 2**31 - 1
#: All of it is said in place of the model's own tokens.
MAX_BUDGET_MESSAGE: Final = 4096
_FORMATS: Final[tuple[Literal["auto", "none", "deepseek"], ...]] = ("auto", "none", "deepseek")


class TemplateParams(TypedDict, total=False):
    """What makes a prompt of a conversation; keyword arguments of ``Pool.apply_template``, all optional.

    Attributes:
        template_kwargs: Extra variables for the model's chat template, such as ``enable_thinking``.
        tools: OpenAI's ``function`` tools: objects of ``type`` and ``function``, and in that a ``name``, and if need be
            a ``description`` and ``parameters`` (a JSON schema).
        tool_choice: ``auto``, the default, lets the model call tools, ``none`` does not, ``required`` makes it, and
            ``{"type": "function", "function": {"name": ...}}`` makes it call that one. ``{"type": "allowed_tools",
            "allowed_tools": {"mode": ..., "tools": [...]}}`` is ``auto`` or ``required`` with only some of the tools,
            named as above; the prompt tells of all.
        parallel_tool_calls: Whether one answer may hold several calls; by default as the model's template can.
        reasoning_format: ``auto`` and ``deepseek`` tell reasoning apart from content, ``none`` leaves it there. By
            default as the model's options say.
        reasoning_budget_tokens: Most tokens of reasoning; the model is then made to end it. 0 ends it at once; -1, the
            default, does as the model's options say. Where calls of gpt-oss are to be made, there is no limit.
        reasoning_budget_message: What the reasoning ends with then, in the model's voice; by default as the model's
            options say.
        add_generation_prompt: Open the assistant's turn, by default True unless a message is continued.
        continue_final_message: Continue the last message, an assistant's: True, or ``content`` or
            ``reasoning_content`` to say where. By default this is done whenever the last message is an assistant's,
            unless the model's options forbid it (``prefill_assistant``); False does not.
    """

    template_kwargs: Mapping[str, Any] | None
    tools: Sequence[Mapping[str, Any]] | None
    tool_choice: str | Mapping[str, Any] | None
    parallel_tool_calls: bool | None
    reasoning_format: str | None
    reasoning_budget_tokens: int | None
    reasoning_budget_message: str | None
    add_generation_prompt: bool | None
    continue_final_message: bool | str | None


def check_messages(messages: Sequence[ChatMessage]) -> tuple[dict[str, Any], ...]:
    """Return chat messages as plain dicts, or raise :class:`~llamaherd.pool.errors.BadRequest`."""
    if isinstance(messages, str | bytes) or not isinstance(messages, Sequence) or not messages:
        raise BadRequest("messages must be a non-empty list")
    for index, message in enumerate(messages):
        _check_message(message, f"messages[{index}]")
    return tuple(dict(message) for message in messages)


def _check_message(message: object, at: str) -> None:
    if not isinstance(message, Mapping):
        raise BadRequest(f"{at} must be an object")
    fields = cast("Mapping[str, object]", message)
    if not isinstance(fields.get("role"), str):
        raise BadRequest(f"{at}.role must be a text")
    content = fields.get("content")
    if not (content is None or isinstance(content, str | Sequence)):
        raise BadRequest(f"{at}.content must be a text or a list of parts")
    if "content" not in fields and not (fields["role"] == "assistant" and fields.get("tool_calls")):
        wanted = "content or tool_calls" if fields["role"] == "assistant" else "content"
        raise BadRequest(f"{at} must have {wanted}")
    for name in ("reasoning_content", "tool_call_id", "name"):
        if not (fields.get(name) is None or isinstance(fields[name], str)):
            raise BadRequest(f"{at}.{name} must be a text")
    if fields.get("tool_calls") is not None:
        _check_calls(fields["tool_calls"], f"{at}.tool_calls")


def _check_calls(calls: object, at: str) -> None:
    if isinstance(calls, str | bytes) or not isinstance(calls, Sequence):
        raise BadRequest(f"{at} must be a list")
    for index, call in enumerate(cast("Sequence[object]", calls)):
        function = cast("Mapping[str, object]", call).get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping):
            raise BadRequest(f"{at}[{index}].function must be an object")
        if cast("Mapping[str, object]", call).get("type", "function") != "function":
            raise BadRequest(f"{at}[{index}].type must be 'function'")
        fields = cast("Mapping[str, object]", function)
        if not isinstance(fields.get("name"), str):
            raise BadRequest(f"{at}[{index}].function.name must be a text")
        if not isinstance(fields.get("arguments"), str | Mapping | None):
            raise BadRequest(f"{at}[{index}].function.arguments must be a text or an object")


def check_tools(tools: object) -> tuple[dict[str, Any], ...]:
    """Return tools in the one form that templates get, or raise :class:`~llamaherd.pool.errors.BadRequest`."""
    if tools is None:
        return ()
    if isinstance(tools, str | bytes) or not isinstance(tools, Sequence):
        raise BadRequest("tools must be a list")
    checked = tuple(_tool(tool, f"tools[{index}]") for index, tool in enumerate(cast("Sequence[object]", tools)))
    names = [tool["function"]["name"] for tool in checked]
    if len(set(names)) < len(names):
        raise BadRequest("tools: two functions have the same name")
    return checked


def _tool(tool: object, at: str) -> dict[str, Any]:
    if not isinstance(tool, Mapping):
        raise BadRequest(f"{at} must be an object")
    fields = cast("Mapping[str, object]", tool)
    function = fields.get("function")
    if fields.get("type") != "function" or not isinstance(function, Mapping):
        raise BadRequest(f"{at} must be of the type 'function' and have a function")
    facts = cast("Mapping[str, object]", function)
    name, description, parameters = facts.get("name"), facts.get("description"), facts.get("parameters")
    if not isinstance(name, str) or not _TOOL_NAME.fullmatch(name):
        raise BadRequest(
            f"{at}.function.name must be a text of 1 to 256 characters without blanks, brackets and quotes"
        )
    if not (description is None or isinstance(description, str)):
        raise BadRequest(f"{at}.function.description must be a text")
    if not (parameters is None or isinstance(parameters, Mapping)):
        raise BadRequest(f"{at}.function.parameters must be an object")
    schema: dict[str, Any] = dict(cast("Mapping[str, Any]", parameters or {})) or {"type": "object", "properties": {}}
    return {"type": "function", "function": {"name": name, "description": description or "", "parameters": schema}}


def chat_options(messages: Sequence[ChatMessage], params: TemplateParams) -> ChatOptions:
    """Return the options of a chat with checked messages, or raise :class:`~llamaherd.pool.errors.BadRequest`."""
    tools = check_tools(params.get("tools"))
    choice, names = _choice(params.get("tool_choice"), tools)
    continuation = _continuation(messages, params.get("continue_final_message"))
    opens = _flag(params, "add_generation_prompt")
    if continuation not in ("", "prefill") and opens:
        raise BadRequest("add_generation_prompt and continue_final_message cannot both be true")
    return ChatOptions(
        tools=tools,
        tool_choice=choice,
        tool_names=names,
        parallel_tool_calls=_flag(params, "parallel_tool_calls"),
        reasoning_format=_format(params.get("reasoning_format")),
        reasoning_budget=_budget(params.get("reasoning_budget_tokens")),
        reasoning_budget_message=_budget_message(params.get("reasoning_budget_message")),
        add_generation_prompt=opens is not False,
        continuation=continuation,
    )


def _flag(params: TemplateParams, name: str) -> bool | None:
    value = cast("Mapping[str, object]", params).get(name)
    if value is not None and not isinstance(value, bool):
        raise BadRequest(f"{name} must be true or false")
    return value


def _format(value: object) -> Literal["", "auto", "none", "deepseek"]:
    if value is None or value == "":
        return ""
    for known in _FORMATS:
        if value == known:
            return known
    raise BadRequest(f"reasoning_format must be one of {', '.join(_FORMATS)}")


def _budget(value: object) -> int:
    if value is None:
        return -1
    if type(value) is not int or not -1 <= value <= _MOST_BUDGET:
        raise BadRequest(f"reasoning_budget_tokens must be an integer from -1 to {_MOST_BUDGET}")
    return value


def _budget_message(value: object) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str) or len(value) > MAX_BUDGET_MESSAGE:
        raise BadRequest(f"reasoning_budget_message must be a text of at most {MAX_BUDGET_MESSAGE} characters")
    return value


def _choice(
    choice: object, tools: Sequence[Mapping[str, Any]]
) -> tuple[Literal["auto", "none", "required"], tuple[str, ...]]:
    """Return whether a function is to be called, and the only ones that may be, none named if all may."""
    if choice is None:
        return "auto", ()
    if choice in ("auto", "none"):
        return choice, ()
    if choice == "required":
        if not tools:
            raise BadRequest("tool_choice: 'required' needs tools")
        return "required", ()
    if _fields(choice).get("type") != "allowed_tools":
        return "required", (_named(choice, tools),)
    allowed = _fields(_fields(choice).get("allowed_tools"))
    mode, named = allowed.get("mode"), allowed.get("tools")
    if mode not in ("auto", "required"):
        raise BadRequest("tool_choice: the mode of allowed_tools must be 'auto' or 'required'")
    if isinstance(named, str | bytes) or not isinstance(named, Sequence) or not named:
        raise BadRequest("tool_choice: the tools of allowed_tools must be a list that names at least one function")
    names = [_named(one, tools) for one in cast("Sequence[object]", named)]
    return mode, tuple(dict.fromkeys(names))


def _named(choice: object, tools: Sequence[Mapping[str, Any]]) -> str:
    """Return the function that an object names, one of the tools'."""
    name = _fields(_fields(choice).get("function")).get("name")
    if not isinstance(name, str):
        raise BadRequest("tool_choice must be 'auto', 'none', 'required' or an object that names a function")
    if all(tool["function"]["name"] != name for tool in tools):
        raise BadRequest(f"tool_choice: there is no function {name[:100]!r} in tools")
    return name


def _fields(value: object) -> Mapping[str, object]:
    """Return an object's fields; none if it is no object."""
    return cast("Mapping[str, object]", value) if isinstance(value, Mapping) else {}


def _continuation(
    messages: Sequence[ChatMessage], wish: object
) -> Literal["", "prefill", "auto", "content", "reasoning"]:
    if not (wish is None or isinstance(wish, bool) or wish in ("content", "reasoning_content")):
        raise BadRequest("continue_final_message must be true, false, 'content' or 'reasoning_content'")
    last = messages[-1]["role"]
    if wish is False or (wish is None and last != "assistant"):
        return ""
    if last != "assistant":
        raise BadRequest("continue_final_message: the last message must be the assistant's")
    if wish is None:
        return "prefill"
    return "reasoning" if wish == "reasoning_content" else "content" if wish == "content" else "auto"
