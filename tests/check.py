"""The one command that checks everything: ``python tests/check.py``.

It runs the steps below in their order, prints each, and stops at the first that fails, with that one's exit code.
``--fast`` leaves out pyright and the coverage. Names of steps run only those.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Final

__all__ = ["STEPS", "main"]

ROOT: Final = Path(__file__).resolve().parents[1]

#: step -> commands, each the arguments of ``python -P``.
STEPS: Final = {
    "format": (("-m", "ruff", "format", "--check", "."),),
    "lint": (("-m", "ruff", "check", "."),),
    "mypy": (("-m", "mypy"),),
    "pyright": (("-m", "pyright", "--pythonpath", sys.executable),),
    "tests": (("-m", "pytest", "-q"),),
    "coverage": (
        ("-m", "coverage", "erase"),
        ("-m", "coverage", "run", "-m", "pytest", "-q"),
        ("-m", "coverage", "combine", "--quiet"),
        ("-m", "coverage", "report", "--skip-covered", "--sort=cover"),
    ),
}
FAST: Final = ("format", "lint", "mypy", "tests")
FULL: Final = ("format", "lint", "mypy", "pyright", "coverage")


def run(step: str) -> int:
    """Run one step and return its exit code."""
    started = time.monotonic()
    # pyright's own news about its next version is no finding.
    environment = {**os.environ, "PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"}
    for arguments in STEPS[step]:
        print(f"--- {step}: python {' '.join(arguments)}", flush=True)
        code = subprocess.run([sys.executable, "-P", *arguments], cwd=ROOT, env=environment).returncode
        if code:
            print(f"--- {step} failed with exit code {code}", flush=True)
            return code if code > 0 else 1
    print(f"--- {step} passed in {time.monotonic() - started:.1f} s", flush=True)
    return 0


def main() -> int:
    """Run the steps that the command line asks for and return the exit code."""
    parser = argparse.ArgumentParser(description="Check format, lint, types and tests.")
    parser.add_argument("--fast", action="store_true", help="leave out pyright and the coverage")
    parser.add_argument("steps", nargs="*", metavar="STEP", help=f"run only these: {', '.join(STEPS)}")
    arguments = parser.parse_args()
    unknown = set(arguments.steps) - set(STEPS)
    if unknown:
        parser.error(f"unknown step {sorted(unknown)[0]!r}, known are {', '.join(STEPS)}")
    for step in arguments.steps or (FAST if arguments.fast else FULL):
        code = run(step)
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
