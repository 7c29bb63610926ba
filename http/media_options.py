"""The command line's options for images and sounds, under llama-server's names."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import click

__all__ = ["MEDIA_OPTIONS", "PROJECTOR_OPTIONS"]

_Command = Callable[..., Any]

#: Fields of ``EngineOptions`` by their names.
MEDIA_OPTIONS: Final[Sequence[Callable[[_Command], _Command]]] = (
    click.option(
        "--mmproj-offload/--no-mmproj-offload",
        "mmproj_offload",
        default=True,
        show_default=True,
        envvar="LLAMA_ARG_MMPROJ_OFFLOAD",
        help="Keep the projector in GPU memory too.",
    ),
    click.option(
        "--image-min-tokens",
        "image_min_tokens",
        type=click.IntRange(-1, 2**20),
        metavar="N",
        default=-1,
        envvar="LLAMA_ARG_IMAGE_MIN_TOKENS",
        help="Fewest tokens of an image, for models that take images of any size. -1 is the model's own.",
    ),
    click.option(
        "--image-max-tokens",
        "image_max_tokens",
        type=click.IntRange(-1, 2**20),
        metavar="N",
        default=-1,
        envvar="LLAMA_ARG_IMAGE_MAX_TOKENS",
        help="Most tokens of an image, likewise.",
    ),
)
#: Which projector a model has.
PROJECTOR_OPTIONS: Final[Sequence[Callable[[_Command], _Command]]] = (
    click.option(
        "-mm",
        "--mmproj",
        "mmproj",
        type=click.Path(path_type=Path),
        metavar="PATH",
        envvar="LLAMA_ARG_MMPROJ",
        help="The projector of the one --model, with which it takes images or sounds.",
    ),
    click.option(
        "--mmproj-auto/--no-mmproj",
        " /--no-mmproj-auto",
        "mmproj_auto",
        default=True,
        show_default=True,
        envvar="LLAMA_ARG_MMPROJ_AUTO",
        help="Whether a projector that lies beside a model of a folder or the cache is used.",
    ),
)
