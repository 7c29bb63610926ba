"""How many prompt tokens go into one step."""

from typing import Final

__all__ = ["PrefillPace"]

#: Seconds that a step with prompt tokens may take while others wait for their next token, and while nobody does.
_SHARED_STEP: Final = 0.2
_LONE_STEP: Final = 1.0
#: A step's fixed cost is worth at least so many tokens.
_LEAST: Final = 16
#: Weight of the newest measurement.
_WEIGHT: Final = 0.5


class PrefillPace:
    """Adapts the prompt tokens per step to what the machine was measured to do.

    Small steps keep the running generations flowing and let a cancelled prompt go soon; large ones are a few per cent
    more efficient. Pure arithmetic: the caller brings the measurements.

    Args:
        most: The largest batch, in tokens.
        first: What to try before anything was measured.
    """

    def __init__(self, most: int, first: int) -> None:
        self._most: Final = most
        self._first: Final = min(first, most)
        self._seconds_per_token = 0.0

    @property
    def seconds_per_token(self) -> float:
        """What a prompt token costs, as measured; 0 before anything was."""
        return self._seconds_per_token

    def tokens(self, *, shared: bool) -> int:
        """Return the prompt tokens for the next step; ``shared``: some request waits for its next token meanwhile."""
        if self._seconds_per_token <= 0.0:
            return self._first
        wanted = (_SHARED_STEP if shared else _LONE_STEP) / self._seconds_per_token
        return int(max(min(wanted, self._most), min(_LEAST, self._most)))

    def note(self, rows: int, seconds: float) -> None:
        """Learn from a step of ``rows`` tokens; steps too small to tell are ignored."""
        if rows < min(_LEAST, self._most):
            return
        measured = seconds / rows
        known = self._seconds_per_token
        self._seconds_per_token = measured if known <= 0.0 else known + _WEIGHT * (measured - known)
