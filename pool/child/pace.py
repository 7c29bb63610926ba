"""How many prompt tokens go into one step."""

from typing import Final

__all__ = ["PrefillPace"]

#: Seconds that a step with prompt tokens may take while others wait for their next token, and while nobody does.
_SHARED_STEP: Final = 0.33
_LONE_STEP: Final = 1.0
#: While others wait, such a step is at most so many times as long as one without a prompt: their tokens then cost the
#: prompt a twentieth of its speed, and longer steps would gain little for what the others lose. Where more prompts wait
#: than there are others, that often: of many requests that come together, the one that came first would have steps of
#: its own while all the others wait for their first token.
_AMORTISED: Final = 20
#: What of a first step's time it may wait for what comes together, and the most, in seconds.
_PAUSE_SHARE: Final = 0.02
_LONGEST_PAUSE: Final = 0.002
#: A step's fixed cost is worth at least so many tokens.
_LEAST: Final = 16
#: Rows that ggml's attention on CPUs computes together (``GGML_FA_TILE_Q``): a tile that is not full costs as much as
#: one that is. GPUs have smaller ones.
_TILE: Final = 64
#: Least share of the wanted tokens that is left when the last tile is dropped; below that steps would become too many.
_WORTH: Final = 0.8
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
        self._plain_step = 0.0

    @property
    def seconds_per_token(self) -> float:
        """What a prompt token costs, as measured; 0 before anything was."""
        return self._seconds_per_token

    def within(self, seconds: float) -> int:
        """Return the prompt tokens of a step of so many seconds."""
        if self._seconds_per_token <= 0.0:
            return self._first
        return int(max(min(seconds / self._seconds_per_token, self._most), min(_LEAST, self._most)))

    def pause(self, tokens: int) -> float:
        """Return the seconds for which so many prompt tokens may wait for further ones before they are computed; 0
        before anything was measured.
        """
        return min(_PAUSE_SHARE * tokens * self._seconds_per_token, _LONGEST_PAUSE)

    def tokens(self, *, shared: bool, beside: int = 0, prompts: int = 1) -> int:
        """Return the prompt tokens for the next step.

        Args:
            shared: Some request waits for its next token meanwhile.
            beside: Rows that the batch has already, one for each of these.
            prompts: Requests whose prompts wait.
        """
        wanted = float(self._first)
        if self._seconds_per_token > 0.0:
            wanted = (self._shared_step(prompts / max(1, beside)) if shared else _LONE_STEP) / self._seconds_per_token
        return _in_whole_tiles(int(max(min(wanted, self._most), min(_LEAST, self._most))), beside)

    def note(self, rows: int, seconds: float) -> None:
        """Learn from a step of ``rows`` tokens; steps too small to tell are ignored."""
        if rows < min(_LEAST, self._most):
            return
        self._seconds_per_token = _moved(self._seconds_per_token, seconds / rows)

    def note_plain(self, seconds: float) -> None:
        """Learn from a step without prompt tokens."""
        self._plain_step = _moved(self._plain_step, seconds)

    def _shared_step(self, waiting_for_each: float) -> float:
        if not self._plain_step:
            return _SHARED_STEP
        return min(_SHARED_STEP, _AMORTISED * max(1.0, waiting_for_each) * self._plain_step)


def _in_whole_tiles(tokens: int, beside: int) -> int:
    whole = tokens - (tokens + beside) % _TILE
    return whole if whole >= _WORTH * tokens else tokens


def _moved(known: float, measured: float) -> float:
    return measured if known <= 0.0 else known + _WEIGHT * (measured - known)
