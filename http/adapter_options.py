"""The command line's LoRA options, under llama-server's names."""

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import click

from llamaherd.pool import Adapter

__all__ = ["ADAPTER_OPTIONS", "adapters_of"]

_Command = Callable[..., Any]

ADAPTER_OPTIONS: Final[Sequence[Callable[[_Command], _Command]]] = (
    click.option(
        "--lora",
        "lora",
        multiple=True,
        metavar="PATH",
        help="A LoRA adapter of the model, or several, separated by commas. May be repeated.",
    ),
    click.option(
        "--lora-scaled",
        "lora_scaled",
        multiple=True,
        metavar="PATH:SCALE",
        help="The same with the factor that it is applied with. These get their ids after those of --lora.",
    ),
    click.option(
        "--lora-init-without-apply",
        "lora_unapplied",
        is_flag=True,
        help="Load the LoRA adapters with factor 0, for requests that ask for them.",
    ),
)


def adapters_of(plain: Sequence[str], scaled: Sequence[str], *, unapplied: bool) -> tuple[Adapter, ...]:
    """Return the adapters that the options name.

    Raises:
        click.BadParameter: a file does not exist, or a scale is none.
    """
    found = [_adapter(path, 1.0, "'--lora'") for path in _split(plain)]
    for entry in _split(scaled):
        path, _, text = entry.rpartition(":")
        scale = _number(text)
        if not path or scale is None:
            raise click.BadParameter(f"{entry!r} is not PATH:SCALE.", param_hint="'--lora-scaled'")
        found.append(_adapter(path, scale, "'--lora-scaled'"))
    return tuple(Adapter(path=one.path, scale=0.0) for one in found) if unapplied else tuple(found)


def _split(values: Sequence[str]) -> list[str]:
    """Split at commas outside of double quotes, as llama-server does."""
    return [path for value in values for row in csv.reader([value]) for path in row if path]


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _adapter(path: str, scale: float, hint: str) -> Adapter:
    file = Path(path)
    if not file.is_file():
        raise click.BadParameter(f"{path}: no such file.", param_hint=hint)
    return Adapter(path=str(file.absolute()), scale=scale)
