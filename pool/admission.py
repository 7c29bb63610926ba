"""How a request waits for its model, and how long the model stays after it: what callers say of that, and its check."""

import math
import re
from typing import Final

from llamaherd.pool.errors import BadRequest

__all__ = ["check_keep_alive", "check_priority", "check_queue_timeout", "read_duration"]

_INT32_MAX: Final = 2**31 - 1
_UNITS: Final = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
#: A number and its unit; Go's durations are any number of these.
_PART: Final = re.compile(r"(\d{1,18}(?:\.\d{0,18})?|\.\d{1,18})(ns|us|µs|μs|ms|s|m|h)")
_NUMBER: Final = re.compile(r"[+-]?\d{1,18}(?:\.\d{0,18})?")
_LONGEST_TEXT: Final = 100


def check_priority(priority: int) -> int:
    """Return a priority, or raise BadRequest: it must be a 32-bit integer."""
    if type(priority) is not int or abs(priority) > _INT32_MAX:
        raise BadRequest(f"priority must be an integer from {-_INT32_MAX} to {_INT32_MAX}")
    return priority


def check_queue_timeout(seconds: float) -> float:
    """Return a limit to waiting in seconds, or raise BadRequest: it must be finite, and 0 (none) or more."""
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds < math.inf:
        raise BadRequest("queue_timeout must be a finite number of seconds, 0 or more")
    return _float(seconds, "queue_timeout")


def check_keep_alive(seconds: float) -> float:
    """Return how long a model stays in seconds, or raise BadRequest: it must be finite; negative is for good."""
    # No integer is infinite or not a number, and the largest ones are no floats.
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not -math.inf < seconds < math.inf:
        raise BadRequest("keep_alive must be a finite number of seconds")
    return _float(seconds, "keep_alive")


def read_duration(value: float | str, name: str) -> float:
    """Return the seconds that a number, or a text such as ``"5m"``, ``"1h30m"``, ``"-1"`` or ``"300ms"``, means.

    Texts are those of Ollama's ``keep_alive``, that is, Go's durations (https://pkg.go.dev/time#ParseDuration); a
    number without a unit is in seconds.

    Raises:
        BadRequest: it means nothing; the message begins with ``name``.
    """
    if not isinstance(value, str):
        return value
    text = value.strip()
    if len(text) <= _LONGEST_TEXT:
        if _NUMBER.fullmatch(text):
            return float(text)
        sign, rest = (-1.0, text[1:]) if text.startswith("-") else (1.0, text.removeprefix("+"))
        parts = list(_PART.finditer(rest))
        if parts and "".join(part[0] for part in parts) == rest:
            return sign * sum(float(part[1]) * _UNITS[part[2]] for part in parts)
    raise BadRequest(f'{name} must be a number of seconds or a duration such as "5m", not {value[:50]!r}')


def _float(value: float, name: str) -> float:
    try:
        return float(value)
    except OverflowError:
        raise BadRequest(f"{name} is out of range") from None
