"""Threads of a worker that wait for each other let others run: what OpenMP says of itself in a fresh process."""

import os
import re
import subprocess
import sys
from collections.abc import Mapping

import pytest

#: What a user may have chosen; none of it may come from where the tests run.
CHOICES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS")


@pytest.mark.parametrize(
    ("chosen", "turns"),
    [
        ({}, 2000),
        ({"GOMP_SPINCOUNT": "77"}, 77),
        ({"OMP_WAIT_POLICY": "passive"}, 0),
    ],
)
def test_barriers_spin_for_a_moment_only_unless_the_user_has_chosen(chosen: Mapping[str, str], turns: int) -> None:
    env = {name: value for name, value in os.environ.items() if name not in CHOICES}
    told = subprocess.run(
        [sys.executable, "-P", "-c", "import llamaherd.pool.child.bindings"],
        env={**env, "OMP_DISPLAY_ENV": "VERBOSE", **chosen},
        capture_output=True,
        text=True,
        check=True,
    )
    assert re.findall(r"GOMP_SPINCOUNT = '(\d+)'", told.stderr) == [str(turns)]
