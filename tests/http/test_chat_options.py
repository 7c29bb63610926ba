"""The command line says how conversations are put to a model where a request does not."""

import click
import pytest
from click.testing import CliRunner

from llamaherd.http.options import engine_options
from llamaherd.pool import EngineOptions


def parsed(*arguments: str) -> EngineOptions:
    got: list[EngineOptions] = []

    @click.command()
    @engine_options
    def command(options: EngineOptions) -> None:
        got.append(options)

    result = CliRunner().invoke(command, arguments)
    if result.exit_code:
        raise click.UsageError(result.output)
    return got[0]


def test_without_options_the_template_decides() -> None:
    options = parsed("--jinja")
    assert (options.template_kwargs, options.reasoning_format, options.prefill_assistant) == ({}, "auto", True)


def test_variables_of_the_template_are_collected() -> None:
    options = parsed("--chat-template-kwargs", '{"a": [1]}', "--reasoning", "off", "--reasoning-effort", "low")
    assert options.template_kwargs == {"a": [1], "enable_thinking": False, "reasoning_effort": "low"}
    assert parsed("--no-reasoning-preserve").template_kwargs == {"preserve_reasoning": False}
    assert parsed("-rea", "on").template_kwargs == {"enable_thinking": True}


def test_the_rest_is_taken_as_it_is() -> None:
    budget = parsed("--reasoning-budget", "9", "--reasoning-budget-message", "So.")
    assert (budget.reasoning_budget, budget.reasoning_budget_message) == (9, "So.")
    assert (parsed().reasoning_budget, parsed().reasoning_budget_message) == (-1, "")
    options = parsed("--reasoning-format", "none", "--no-prefill-assistant")
    assert (options.reasoning_format, options.prefill_assistant) == ("none", False)


@pytest.mark.parametrize(
    "arguments",
    [
        ("--no-jinja",),
        ("--chat-template-kwargs", "x"),
        ("--chat-template-kwargs", "[1]"),
        ("--reasoning", "loud"),
        ("--reasoning-budget", "-2"),
        ("--reasoning-format", "deepseek-legacy"),
    ],
)
def test_what_means_nothing_here_is_a_mistake(arguments: tuple[str, ...]) -> None:
    with pytest.raises(click.UsageError):
        parsed(*arguments)
