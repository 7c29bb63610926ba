"""Where a model's workers run, as the keys ``gpus`` and ``cores`` of a preset say it."""

import re
from itertools import chain
from typing import Any, Final

import click

from llamaherd.pool import Placement

__all__ = ["CoreLists", "GpuLists", "placements_of"]

#: Between what is for one replica and for the next.
_NEXT: Final = "|"
_NONE: Final = "none"
_CORES: Final = re.compile(r"([0-9]{1,5})(?:-([0-9]{1,5}))?", re.ASCII)
_GPU: Final = re.compile(r"[\w./:-]+", re.ASCII)


class GpuLists(click.ParamType[tuple[tuple[str, ...], ...]]):
    """``0,1`` for all workers, ``0 | 1`` for the first and the second replica; ``none`` for no GPU."""

    name = "gpus"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        lists: list[tuple[str, ...]] = []
        for part in value.split(_NEXT):
            words = [word.strip() for word in part.split(",")]
            if words == [_NONE]:
                lists.append(())
            elif all(_GPU.fullmatch(word) for word in words):
                lists.append(tuple(words))
            else:
                self.fail(f"{value!r} is not a list of GPUs such as '0,1', or one for each replica: '0 | 1'.")
        return tuple(lists)


class CoreLists(click.ParamType[tuple[tuple[int, ...], ...]]):
    """``0-3,6`` for all workers, ``0-3 | 4-7`` for the first and the second replica."""

    name = "cores"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        lists: list[tuple[int, ...]] = []
        for part in value.split(_NEXT):
            ranges = [_CORES.fullmatch(word.strip()) for word in part.split(",")]
            spans = [range(int(one[1]), int(one[2] or one[1]) + 1) for one in ranges if one is not None]
            if len(spans) < len(ranges) or not all(spans):
                self.fail(f"{value!r} is not a list of cores such as '0-3,6', or one for each replica: '0-3 | 4-7'.")
            lists.append(tuple(chain.from_iterable(spans)))
        return tuple(lists)


def placements_of(gpus: tuple[tuple[str, ...], ...], cores: tuple[tuple[int, ...], ...]) -> tuple[Placement, ...]:
    """Return where the replicas run. The shorter of two lists begins again at its end."""
    if not gpus and not cores:
        return ()
    return tuple(
        Placement(gpus=gpus[number % len(gpus)] if gpus else None, cores=cores[number % len(cores)] if cores else ())
        for number in range(max(len(gpus), len(cores)))
    )
