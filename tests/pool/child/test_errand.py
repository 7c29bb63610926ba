"""Work on a thread of its own, and what becomes of it."""

import threading

import pytest

from llamaherd.pool.child.errand import Errand


def test_an_errand_runs_beside_its_caller_and_brings_its_result() -> None:
    gate = threading.Event()

    def work() -> int:
        assert gate.wait(10)
        return threading.get_ident()

    errand = Errand(work, "test")
    gate.set()
    assert errand.result() not in (0, threading.get_ident())
    assert errand.result() == errand.result()


def test_what_went_wrong_is_raised_where_the_result_is_asked_for() -> None:
    def work() -> None:
        raise ValueError("no")

    errand = Errand(work, "test")
    errand.wait()
    with pytest.raises(ValueError, match="no"):
        errand.result()
