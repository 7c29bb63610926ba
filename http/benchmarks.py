"""``llamaherd bench NAME``: the benchmarks of the source tree, run as programs of their own.

They are no part of the package: they want a checkout, its extra ``bench`` and, for comparisons, a llama-server.
"""

import subprocess
import sys
from pathlib import Path
from typing import Final

import click

__all__ = ["bench"]

NAMES: Final = ("transport", "engine", "pool", "http")
#: This file lies in ``http/``, beside which a checkout has ``bench/``.
FOLDER: Final = Path(__file__).resolve().parents[1] / "bench"


@click.command(context_settings={"ignore_unknown_options": True, "help_option_names": []})
@click.argument("name", type=click.Choice(NAMES))
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def bench(name: str, arguments: tuple[str, ...]) -> int:
    """Measure this machine: transport, engine, pool or http.

    ARGUMENTS go to the benchmark itself; 'llamaherd bench transport --help' shows what it takes. It writes its report
    below bench/results of the source tree, in which this only works.
    """
    program = FOLDER / f"bench_{name}.py"
    if not program.is_file():
        raise click.ClickException(
            f"the benchmarks are part of the source tree, and {FOLDER} is not there: "
            "clone it and install it with pip install -e '.[demo,bench]'"
        )
    return subprocess.run([sys.executable, str(program), *arguments]).returncode
