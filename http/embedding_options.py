"""The command line's options of embeddings, of scores and of infilling."""

from collections.abc import Callable, Sequence
from typing import Any, Final

import click

from llamaherd.pool import EngineOptions

__all__ = ["EMBEDDING_OPTIONS", "embedding_fields"]

_Command = Callable[..., Any]
_INT32_MAX: Final = 2**31 - 1
_DEFAULTS: Final = EngineOptions()

#: :func:`embedding_fields` takes what these give.
EMBEDDING_OPTIONS: Final[Sequence[Callable[[_Command], _Command]]] = (
    click.option(
        "--embedding",
        "--embeddings",
        "embedding",
        is_flag=True,
        envvar="LLAMA_ARG_EMBEDDINGS",
        help="Embed and do nothing else, without a cache for generations. Models embed also without this.",
    ),
    click.option(
        "--rerank",
        "--reranking",
        "reranking",
        is_flag=True,
        envvar="LLAMA_ARG_RERANKING",
        help="The same as --embedding --pooling rank, for a reranker whose file does not say that it is one.",
    ),
    click.option(
        "--pooling",
        type=click.Choice(["none", "mean", "cls", "last", "rank"]),
        envvar="LLAMA_ARG_POOLING",
        help="How the embeddings of an input's tokens become one.  [default: the model's own, or none]",
    ),
    click.option(
        "--embd-normalize",
        type=click.IntRange(-1, _INT32_MAX),
        metavar="N",
        default=_DEFAULTS.embd_normalize,
        show_default=True,
        help="How embeddings are normalised: -1 not, 0 to 16-bit integers, 1 taxicab, 2 euclidean, more: that p-norm.",
    ),
    click.option(
        "--spm-infill",
        is_flag=True,
        help="Infill with the suffix first, as some models want it.",
    ),
)


def embedding_fields(values: dict[str, Any]) -> dict[str, Any]:
    """Take what these options gave out of ``values``, and return it as fields of EngineOptions.

    Raises:
        click.UsageError: ``--reranking`` and another pooling are both given.
    """
    pooling, reranking = values.pop("pooling") or "", values.pop("reranking")
    if reranking:
        if pooling not in ("", "rank"):
            raise click.UsageError(f"--reranking and --pooling {pooling} contradict each other.")
        pooling = "rank"
    return {
        "embedding": values.pop("embedding") or reranking,
        "pooling": pooling,
        "embd_normalize": values.pop("embd_normalize"),
        "spm_infill": values.pop("spm_infill"),
    }
