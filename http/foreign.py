"""A command that takes llama-server's whole command line and its ``LLAMA_ARG_*`` variables.

What the command has works. What llama-server knows and the command has not is left out and named in one warning. What
neither knows is click's error.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

import click

from llamaherd.http.terminal import report
from llamaherd.pool import FLAGS, Flag, find_flag

__all__ = ["ForeignCommand", "foreign_variables", "take_foreign"]

_END_OF_OPTIONS: Final = "--"


class _Taken(NamedTuple):
    arguments: list[str]
    flags: list[Flag]


class ForeignCommand(click.Command):
    """A click command with the rule of this module."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        taken = take_foreign(args, _values_of(self, ctx))
        variables = foreign_variables(os.environ, {str(name) for param in self.params for name in _envs_of(param)})
        rest = super().parse_args(ctx, taken.arguments)
        names = [flag.name for flag in taken.flags] + variables
        if names and not ctx.resilient_parsing:
            report("warning", f"known to llama-server and not to this engine, so ignored: {', '.join(names)}")
        return rest


def take_foreign(args: Sequence[str], own: Mapping[str, int]) -> _Taken:
    """Return the arguments without the flags that only llama-server knows, and those flags, each once.

    Args:
        args: The command line.
        own: How many values follow each option of the command.

    Raises:
        click.UsageError: a flag of llama-server lacks its value.
    """
    kept: list[str] = []
    flags: dict[str, Flag] = {}
    place = 0
    while place < len(args):
        written = args[place]
        name, equals, value = written.partition("=")
        # llama-server takes _ for - in long names.
        name = name.replace("_", "-") if name.startswith("--") and name not in own else name
        flag = None if name in own or written == _END_OF_OPTIONS else find_flag(name)
        if written == _END_OF_OPTIONS:
            kept.extend(args[place:])
            break
        if flag is not None:
            flags[flag.name] = flag
            follow = 0 if equals else flag.values
            if place + follow >= len(args):
                raise click.UsageError(f"Option '{written}' requires an argument.")
        else:
            kept.append(name + equals + value if name in own else written)
            follow = 0 if equals else own.get(name, 0)
            kept.extend(args[place + 1 : place + 1 + follow])
        place += 1 + follow
    return _Taken(kept, list(flags.values()))


def foreign_variables(environment: Mapping[str, str], own: set[str]) -> list[str]:
    """Return the variables of llama-server that are set and that no option of the command reads."""
    return [env for flag in FLAGS for env in flag.envs if env not in own and environment.get(env)]


def _values_of(command: click.Command, ctx: click.Context) -> dict[str, int]:
    values = dict.fromkeys(ctx.help_option_names, 0)
    for param in command.params:
        if isinstance(param, click.Option):
            count = 0 if param.is_flag or param.count else param.nargs
            values |= dict.fromkeys((*param.opts, *param.secondary_opts), count)
    return values


def _envs_of(param: click.Parameter) -> Sequence[str]:
    return [param.envvar] if isinstance(param.envvar, str) else param.envvar or ()
