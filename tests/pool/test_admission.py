"""What callers say of waiting and staying is read as it was meant, or refused."""

import contextlib
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamaherd.pool import BadRequest, read_duration
from llamaherd.pool.admission import check_keep_alive, check_priority, check_queue_timeout


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("5m", 300),
        ("1h30m", 5400),
        ("24h", 86400),
        ("300ms", 0.3),
        ("1.5h", 5400),
        (".5s", 0.5),
        ("-1", -1),
        ("-1m", -60),
        ("-1s", -1),
        ("0", 0),
        ("0s", 0),
        ("3600", 3600),
        ("+2m", 120),
        (" 10s ", 10),
        (7, 7),
        (-1, -1),
        (2.5, 2.5),
    ],
)
def test_durations_are_ollamas(value: float | str, seconds: float) -> None:
    assert read_duration(value, "keep_alive") == pytest.approx(seconds)


@pytest.mark.parametrize("value", ["", "m", "5 m", "5x", "forever", "1h-30m", "--1", "1e3s", "nan", "inf", "5m" * 200])
def test_what_is_no_duration_is_refused_by_its_name(value: str) -> None:
    with pytest.raises(BadRequest, match="^keep_alive must be"):
        read_duration(value, "keep_alive")


@given(st.text(max_size=30))
def test_any_text_is_a_number_of_seconds_or_refused(text: str) -> None:
    with contextlib.suppress(BadRequest):
        assert math.isfinite(read_duration(text, "x"))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, True, "5", None, 10**400])
def test_times_are_finite_numbers(value: object) -> None:
    with pytest.raises(BadRequest, match="keep_alive"):
        check_keep_alive(value)  # type: ignore[arg-type]
    with pytest.raises(BadRequest, match="queue_timeout"):
        check_queue_timeout(value)  # type: ignore[arg-type]


def test_only_a_model_may_stay_for_good() -> None:
    assert check_keep_alive(-1) == -1
    with pytest.raises(BadRequest, match="queue_timeout"):
        check_queue_timeout(-1)


@pytest.mark.parametrize("value", [1.5, "1", True, 2**31, None])
def test_priorities_are_integers(value: object) -> None:
    with pytest.raises(BadRequest, match="priority"):
        check_priority(value)  # type: ignore[arg-type]
