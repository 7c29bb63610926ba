"""Threads that wait for each other spin while the cores are theirs, and let others run where they are not."""

import os
import re
import subprocess
import sys
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamaherd.pool.child.barriers import Contention

#: What a user may have chosen; none of it may come from where the tests run.
CHOICES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS")

_COUNT_THREADS = """
import os
import time

import llamaherd.pool.child.llama_library
from llamaherd.pool.child.barriers import Barriers

def threads():
    return len(os.listdir("/proc/self/task"))

barriers, cores, before = Barriers(), len(os.sched_getaffinity(0)), threads()
print(barriers.adjustable)
for short in (True, True, False, False, True):
    barriers.set_short(short)
    deadline = time.monotonic() + 30
    while not short and threads() > before and time.monotonic() < deadline:
        os.sched_yield()
    print(threads() - before > cores)
barriers.close()
"""


def fresh(code: str, **chosen: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process of its own, where OpenMP starts anew."""
    env = {name: value for name, value in os.environ.items() if name not in CHOICES}
    return subprocess.run(
        [sys.executable, "-P", "-c", code], env={**env, **chosen}, capture_output=True, text=True, check=True
    )


@pytest.mark.parametrize("chosen", [{"GOMP_SPINCOUNT": "77"}, {"OMP_WAIT_POLICY": "passive"}])
def test_what_the_user_has_chosen_stays(chosen: Mapping[str, str]) -> None:
    assert fresh(_COUNT_THREADS, **chosen).stdout.split() == ["False"] * 6


def test_openmp_is_left_at_its_own_choice() -> None:
    told = fresh("import llamaherd.pool.child.llama_library", OMP_DISPLAY_ENV="VERBOSE")
    assert re.findall(r"GOMP_SPINCOUNT = '(\d+)'", told.stderr) == ["300000"]


def test_more_threads_than_cores_sleep_while_barriers_are_short_and_go_afterwards() -> None:
    assert fresh(_COUNT_THREADS).stdout.split() == ["True", "True", "True", "False", "False", "True"]


def contended(contention: Contention, start: float, lost: float, steps: int = 4, threads: int = 2) -> float:
    """Let steps of 50 ms pass of which that many cores were lost; return the time at their end."""
    for _ in range(steps):
        start += 0.05
        contention.note(start, 0.05, (threads - lost) * 0.05, threads)
    return start


def test_cores_that_others_take_make_barriers_short_for_a_second() -> None:
    contention = Contention()
    now = contended(contention, 100.0, lost=0.05, steps=40)
    assert not contention.short
    now = contended(contention, now, lost=0.9, steps=2)
    assert contention.short
    now = contended(contention, now, lost=0.9, steps=19)
    assert contention.short
    contended(contention, now, lost=0.9, steps=2)
    assert not contention.short


def test_contention_that_lasts_is_looked_for_ever_more_seldom() -> None:
    contention, now = Contention(), 100.0
    lengths: list[float] = []
    for _ in range(7):
        while not contention.short:
            now = contended(contention, now, lost=0.9, steps=1)
        began = now
        while contention.short:
            now = contended(contention, now, lost=0.9, steps=1)
        lengths.append(round(now - began, 1))
    assert [round(length) for length in lengths] == [1, 2, 4, 8, 16, 16, 16]


def test_after_a_quiet_time_it_begins_with_a_second_again() -> None:
    contention, now = Contention(), 100.0
    for _ in range(3):
        while not contention.short:
            now = contended(contention, now, lost=0.9, steps=1)
        while contention.short:
            now = contended(contention, now, lost=0.9, steps=1)
    now = contended(contention, now, lost=0.0, steps=400)
    began = now = contended(contention, now, lost=0.9, steps=2)
    assert contention.short
    while contention.short:
        now = contended(contention, now, lost=0.9, steps=1)
    assert now - began < 1.1


def test_one_thread_meets_nobody() -> None:
    contention = Contention()
    contended(contention, 100.0, lost=0.9, steps=100, threads=1)
    assert not contention.short


@given(st.lists(st.tuples(st.floats(1e-4, 2.0), st.floats(0.0, 1.0), st.integers(1, 64))))
def test_whoever_has_the_cores_is_never_slowed_down(steps: list[tuple[float, float, int]]) -> None:
    contention, now = Contention(), 0.0
    for seconds, share, threads in steps:
        now += seconds
        contention.note(now, seconds, seconds * (threads - 0.49 * share), threads)
        assert not contention.short
