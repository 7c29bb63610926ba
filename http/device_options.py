"""The command line's options for GPUs, under llama-server's names: which ones a model gets, and how it is divided."""

import re
from collections.abc import Callable, Sequence
from typing import Any, Final, cast

import click

from llamaherd.pool import EngineOptions

__all__ = ["DEVICE_OPTIONS", "device_fields"]

_Command = Callable[..., Any]
_DEFAULTS: Final = EngineOptions()
_MOST_DEVICES: Final = 1024


class Proportions(click.ParamType[tuple[float, ...]]):
    """Numbers from 0 on, with commas or slashes between them."""

    name = "n0,n1,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        if isinstance(value, tuple):
            return cast(tuple[float, ...], value)
        try:
            found = tuple(float(part) for part in re.split("[,/]+", str(value)))
        except ValueError:
            self.fail(f"{value!r} is no list of numbers such as 3,1.", param, ctx)
        if not all(0 <= part < float("inf") for part in found) or not any(found):
            self.fail(f"{value!r} must be numbers from 0 on, and not all 0.", param, ctx)
        return found


class Devices(click.ParamType[tuple[str, ...]]):
    """Names with commas between them."""

    name = "dev1,dev2,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return cast(tuple[str, ...], value)
        found = tuple(name.strip() for name in str(value).split(","))
        if not all(found):
            self.fail(f"{value!r} is no list of devices such as CUDA0,CUDA1.", param, ctx)
        return found


#: The destination of each is a field of EngineOptions.
DEVICE_OPTIONS: Final[Sequence[Callable[[_Command], _Command]]] = (
    click.option(
        "-dev",
        "--device",
        "devices",
        type=Devices(),
        envvar="LLAMA_ARG_DEVICE",
        help="The only GPUs to use, as llama.cpp names them (CUDA0,CUDA1), or none.  [default: all]",
    ),
    click.option(
        "-sm",
        "--split-mode",
        "split_mode",
        type=click.Choice(["none", "layer", "row"]),
        default=_DEFAULTS.split_mode,
        show_default=True,
        envvar="LLAMA_ARG_SPLIT_MODE",
        help="How a model is divided among several GPUs: by layers, by the rows of its matrices (not with CUDA), or "
        "not at all.",
    ),
    click.option(
        "-ts",
        "--tensor-split",
        "tensor_split",
        type=Proportions(),
        envvar="LLAMA_ARG_TENSOR_SPLIT",
        help="What part each GPU gets, such as 3,1.  [default: by their free memory]",
    ),
    click.option(
        "-mg",
        "--main-gpu",
        "main_gpu",
        type=click.IntRange(0, _MOST_DEVICES),
        metavar="INDEX",
        default=_DEFAULTS.main_gpu,
        show_default=True,
        envvar="LLAMA_ARG_MAIN_GPU",
        help="The GPU that has the whole model with --split-mode none.",
    ),
)


def device_fields(values: dict[str, Any]) -> dict[str, Any]:
    """Return what these options say, as fields of EngineOptions; what was not given is left out."""
    names = ("devices", "split_mode", "tensor_split", "main_gpu")
    return {name: values[name] for name in names if values.get(name) is not None}
