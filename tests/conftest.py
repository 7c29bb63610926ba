"""What holds for all tests: property tests draw the same examples every time, and no busy machine fails them, nor one
that is suspended for a while.
"""

import faulthandler
import os
import signal
from types import FrameType
from typing import Final, Protocol

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile(
    "llamaherd", derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("llamaherd")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # As a script's ``&`` hands it down. Tests interrupt themselves and processes of theirs, which would inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)

#: Seconds of a test's time limit that pass with one alarm, however long the process was stopped meanwhile.
PIECE: Final = 10.0


class TimeLimit(Protocol):
    """What pytest-timeout says of a test's limit; ``timeout`` is in seconds."""

    timeout: float


@pytest.hookimpl(tryfirst=True)
def pytest_timeout_set_timer(settings: TimeLimit) -> bool:
    """Count the limit down in pieces, in place of the one alarm that pytest-timeout would set.

    uvloop goes on whatever a signal's handler raises. A test that has not even failed a piece later ends the run.
    """
    left = settings.timeout

    def ring(number: int, frame: FrameType | None) -> None:
        nonlocal left
        left -= PIECE
        if left <= -PIECE:
            faulthandler.dump_traceback()
            os._exit(1)
        if left <= 0:
            faulthandler.dump_traceback()
            signal.setitimer(signal.ITIMER_REAL, PIECE)
            pytest.fail(f"the test has not ended within {settings.timeout:g} s")
        signal.setitimer(signal.ITIMER_REAL, min(PIECE, left))

    signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, min(PIECE, left))
    return True


@pytest.hookimpl(tryfirst=True)
def pytest_timeout_cancel_timer() -> bool:
    """Take the alarm back."""
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    return True


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of the soak test."""
    parser.addoption("--soak-minutes", default=30.0, type=float, help="how long `-m soak` goes on")
    parser.addoption("--soak-seed", default=1, type=int, help="the seed of its choices")
    parser.addoption("--soak-transport", default="pipe", choices=("pipe", "zmq", "stdio"), help="its transport")
