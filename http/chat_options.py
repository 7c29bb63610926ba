"""The command line's options of chats: how conversations are put to a model, where a request does not say."""

import json
from collections.abc import Callable, Sequence
from typing import Any, Final, cast

import click

__all__ = ["CHAT_OPTIONS", "chat_fields"]

_Command = Callable[..., Any]
_TRUE: Final = ("on", "enabled", "true", "1")
_FALSE: Final = ("off", "disabled", "false", "0")


class _Switch(click.ParamType[str]):
    """``on``, ``off`` or ``auto``, in llama-server's other words for them too."""

    name = "on|off|auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if value in _TRUE:
            return "on"
        if value in _FALSE:
            return "off"
        if value in ("auto", "-1"):
            return "auto"
        return self.fail(f"{value!r} is not one of on, off, auto.", param, ctx)


class _JsonObject(click.ParamType[dict[str, Any]]):
    """A JSON object."""

    name = "json"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> dict[str, Any]:
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError) as error:
                return self.fail(f"not JSON: {error}.", param, ctx)
        if not isinstance(value, dict):
            return self.fail("a JSON object is expected.", param, ctx)
        return cast("dict[str, Any]", value)


CHAT_OPTIONS: Final[Sequence[Callable[[_Command], _Command]]] = (
    click.option(
        "--chat-template-kwargs",
        "template_kwargs",
        type=_JsonObject(),
        metavar="JSON",
        envvar="LLAMA_ARG_CHAT_TEMPLATE_KWARGS",
        help="Variables for the chat template; those of a request take precedence.",
    ),
    click.option(
        "--jinja/--no-jinja",
        "jinja",
        default=True,
        envvar="LLAMA_ARG_JINJA",
        help="Accepted for llama-server's sake: templates are always Jinja.",
    ),
    click.option(
        "--reasoning-format",
        type=click.Choice(["auto", "none", "deepseek"]),
        default="auto",
        show_default=True,
        envvar="LLAMA_ARG_THINK",
        help="Whether reasoning is told apart from content (auto, deepseek), or left in it (none).",
    ),
    click.option(
        "-rea",
        "--reasoning",
        type=_Switch(),
        default="auto",
        show_default=True,
        envvar="LLAMA_ARG_REASONING",
        help="Tell the template to have the model think, or not.",
    ),
    click.option(
        "--reasoning-effort",
        metavar="LEVEL",
        default="default",
        show_default=True,
        envvar="LLAMA_ARG_REASONING_EFFORT",
        help="How much to think, in the template's words.",
    ),
    click.option(
        "--reasoning-budget",
        type=click.IntRange(min=-1, max=2**31 - 1),
        metavar="N",
        default=-1,
        show_default=True,
        envvar="LLAMA_ARG_THINK_BUDGET",
        help="Most tokens of reasoning, which is then ended: 0 ends it at once, -1 sets no limit.",
    ),
    click.option(
        "--reasoning-budget-message",
        metavar="MESSAGE",
        default="",
        envvar="LLAMA_ARG_THINK_BUDGET_MESSAGE",
        help="What the reasoning ends with when its budget is used up.",
    ),
    click.option(
        "--reasoning-preserve/--no-reasoning-preserve",
        default=None,
        envvar="LLAMA_ARG_REASONING_PRESERVE",
        help="Whether a prompt keeps the reasoning of earlier answers.  [default: the template's own]",
    ),
    click.option(
        "--prefill-assistant/--no-prefill-assistant",
        default=True,
        show_default=True,
        envvar="LLAMA_ARG_PREFILL_ASSISTANT",
        help="Continue an assistant's message at the end of a conversation.",
    ),
)


def chat_fields(values: dict[str, Any]) -> dict[str, Any]:
    """Return what these options say, as fields of EngineOptions; takes them out of ``values``.

    Raises:
        click.UsageError: ``--no-jinja``.
    """
    if not values.pop("jinja"):
        raise click.UsageError("--no-jinja: templates are always Jinja here.")
    kwargs: dict[str, Any] = dict(values.pop("template_kwargs") or {})
    reasoning, effort = values.pop("reasoning"), values.pop("reasoning_effort")
    preserve = values.pop("reasoning_preserve")
    if reasoning != "auto":
        kwargs["enable_thinking"] = reasoning == "on"
    if effort != "default":
        kwargs["reasoning_effort"] = effort
    if preserve is not None:
        kwargs["preserve_reasoning"] = preserve
    return {
        "template_kwargs": kwargs,
        "reasoning_format": values.pop("reasoning_format"),
        "reasoning_budget": values.pop("reasoning_budget"),
        "reasoning_budget_message": values.pop("reasoning_budget_message"),
        "prefill_assistant": values.pop("prefill_assistant"),
    }
