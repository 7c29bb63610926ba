"""Which cores the two sides of a benchmark run on, where the command line asks for it."""

import os
from typing import Final, Literal

__all__ = ["pin", "want_pinning"]

_ENV: Final = "LLAMAHERD_BENCH_PIN"


def want_pinning() -> str:
    """Have this process's descendants pin themselves: the pool's side to the first core, workers to the others.

    Returns:
        What to write into the report.

    Raises:
        RuntimeError: the system does not pin, or there is only one core.
    """
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if len(cores) < 2:
        raise RuntimeError("there are not two cores that processes can be pinned to")
    os.environ[_ENV] = ",".join(map(str, cores))
    return f"pool on {cores[0]}, workers on {','.join(map(str, cores[1:]))}"


def pin(side: Literal["pool", "worker"]) -> None:
    """Run on this side's cores from now on, if that was asked for."""
    cores = [int(core) for core in os.environ.get(_ENV, "").split(",") if core]
    if cores:
        os.sched_setaffinity(0, cores[:1] if side == "pool" else cores[1:])
