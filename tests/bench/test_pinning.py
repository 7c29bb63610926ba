"""Pinning: each side of a benchmark stays on its own cores, and nowhere unless it was asked for."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import pinning
from pinning import pin, want_pinning

CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


@pytest.fixture(autouse=True)
def nothing_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    # Set, so that what a test sets is taken back.
    monkeypatch.setenv("LLAMAHERD_BENCH_PIN", "")


def cores_of(side: str) -> list[int]:
    """Return the cores that a process of its own may use after it was pinned."""
    code = f"import json, os, pinning; pinning.pin({side!r}); print(json.dumps(sorted(os.sched_getaffinity(0))))"
    folder = str(Path(pinning.__file__).parent)
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, stdout=subprocess.PIPE, check=True)
    found: list[int] = json.loads(done.stdout)
    return found


def test_the_pool_has_the_first_core_and_the_workers_the_others() -> None:
    told = want_pinning()

    assert cores_of("pool") == CORES[:1]
    assert cores_of("worker") == CORES[1:]
    assert told == f"pool on {CORES[0]}, workers on {','.join(map(str, CORES[1:]))}"


def test_nobody_is_pinned_unasked() -> None:
    pin("pool")

    assert sorted(os.sched_getaffinity(0)) == CORES


def test_one_core_is_not_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    def one(pid: int) -> set[int]:
        del pid
        return {3}

    monkeypatch.setattr(os, "sched_getaffinity", one)

    with pytest.raises(RuntimeError, match="two cores"):
        want_pinning()
