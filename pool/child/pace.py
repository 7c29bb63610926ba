"""How many prompt tokens go into one step."""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Final

from llamaherd.pool.child.tiles import TILE

__all__ = ["PrefillPace"]

#: Seconds that a step with prompt tokens may take while others wait for their next token, and while nobody does.
_SHARED_STEP: Final = 0.365
_LONE_STEP: Final = 1.0
#: While others wait, such a step is at most so many times as long as one without a prompt: their tokens then cost the
#: prompt a small part of its speed, and longer steps would gain little for what the others lose. Where more prompts
#: wait than there are others, that often: of many requests that come together, the one that came first would have steps
#: of its own while all the others wait for their first token.
_AMORTISED: Final = 28
#: What of a first step's time it may wait for what comes together, and the most, in seconds.
_PAUSE_SHARE: Final = 0.02
_LONGEST_PAUSE: Final = 0.002
#: A step's fixed cost is worth at least so many tokens.
_LEAST: Final = 16
#: Least share of the rows for which there is time that is left in order to have whole tiles.
_WORTH: Final = 0.6
#: How many times as long as the least step one with a whole tile may take.
_TILE_WORTH: Final = 1.4
#: Weight of the newest measurement.
_WEIGHT: Final = 0.5
#: What each measurement leaves of the older ones in the slope.
_REMEMBERED: Final = 0.9
#: How many times as long as expected a step counts at most in the slope: the machine may have been suspended.
_OUTLIER: Final = 2.0
#: Tokens below which a spread says less of a slope than arithmetic does.
_SPREAD: Final = 200.0
#: Least share of what a token cost lately that one is expected to cost.
_LEAST_LEVEL: Final = 0.125


class PrefillPace:
    """Adapts the prompt tokens per step to what the machine was measured to do.

    Small steps keep the running generations flowing and let a cancelled prompt go soon; large ones are a few per cent
    more efficient. Pure arithmetic: the caller brings the measurements.

    Args:
        most: The largest batch, in tokens.
        first: What to try before anything was measured.
        attended: For how many rows the attention of a batch of so many takes the time.
        attention: What a token's attention costs for each token that it looks at, by its arithmetic, as a share of what
            all else of it costs: what is believed until it was measured.
    """

    def __init__(self, most: int, first: int, attended: Callable[[int], float] = float, attention: float = 0.0) -> None:
        self._most: Final = most
        self._least: Final = min(_LEAST, most)
        self._first: Final = min(first, most)
        self._attended: Final = attended
        self._cost: Final = _Cost(attention)
        self._plain = _Plain()

    @property
    def seconds_per_token(self) -> float:
        """What a prompt token costs, as measured; 0 before anything was."""
        return self._cost.seconds

    def within(self, seconds: float) -> int:
        """Return the prompt tokens of a step of so many seconds."""
        if not self._cost.known:
            return self._first
        return int(max(min(seconds / self._cost.seconds, self._most), self._least))

    def pause(self, tokens: int) -> float:
        """Return the seconds for which so many prompt tokens may wait for further ones before they are computed; 0
        before anything was measured.
        """
        return min(_PAUSE_SHARE * tokens * self._cost.seconds, _LONGEST_PAUSE)

    def tokens(self, prompts: Sequence[tuple[int, int]], *, shared: bool, beside: int = 0) -> int:
        """Return the prompt tokens for the next step: at most what fits its time, and no more than wait.

        Args:
            prompts: For each request whose prompt waits, in their order, how many tokens of its sequence are computed
                and how many are not.
            shared: Some request waits for its next token meanwhile.
            beside: Rows that the batch has already, one for each of these.
        """
        if not self._cost.known:
            return self._first
        limit = self._shared_step(len(prompts) / max(1, beside)) if shared else _LONE_STEP
        plain = self._plain.step(beside)

        def seconds(tokens: int) -> float:
            looked = self._looked(tokens, beside, _seen(prompts, tokens))
            return plain + tokens * self._cost.of_token(looked)

        most = min(self._most, sum(pending for _, pending in prompts))
        if seconds(most) <= limit:
            return most
        wanted = self._fitting(limit, most, beside, seconds)
        return self._in_whole_tiles(wanted, beside, plain, _seen(prompts, wanted))

    def note(self, tokens: int, seconds: float, *, beside: int = 0, seen: float = 0.0) -> None:
        """Learn from a step with ``tokens`` of prompts; steps too small to tell are ignored.

        Args:
            beside: Rows that its batch had beside them.
            seen: The tokens before each of the prompts', added up.
        """
        if tokens >= self._least:
            own = max(seconds - self._plain.step(beside), seconds / 2)
            looked = self._looked(tokens, beside, seen)
            # A short step tells little of a long one; one that was expected to be long, whatever it was.
            expected = tokens * self._cost.of_token(looked)
            size = max(max(expected, seconds) / self._shared_step(1.0), tokens / self._most)
            self._cost.note(tokens, own / tokens, looked, min(1.0, 2 * size))

    def note_plain(self, rows: int, seconds: float) -> None:
        """Learn from a step without prompt tokens."""
        self._plain.note(rows, seconds)

    def _shared_step(self, waiting_for_each: float) -> float:
        if not self._plain.seconds:
            return _SHARED_STEP
        return min(_SHARED_STEP, _AMORTISED * max(1.0, waiting_for_each) * self._plain.seconds)

    def _looked(self, tokens: int, beside: int, seen: float) -> float:
        """Return what a token's attention looks at: more where the time goes for rows that are not there."""
        rows = tokens + beside
        return seen / tokens * self._attended(rows) / rows

    def _fitting(self, limit: float, most: int, beside: int, seconds: Callable[[int], float]) -> int:
        """Return the most tokens for which there is time: enough for a tile if there is time for that, since fewer rows
        may cost more. Where there is no time for anything it is the least, or a tile if that takes hardly longer.
        """
        least = min(self._least, most)
        tile = max(TILE - beside, least)
        if tile <= most and seconds(tile) <= limit:
            sizes = range(tile, most + 1)
        elif tile <= most and limit < seconds(least) >= seconds(tile) / _TILE_WORTH:
            return tile
        else:
            sizes = range(least, min(tile, most + 1))
        return sizes[max(0, bisect_right(sizes, limit, key=seconds) - 1)]

    def _in_whole_tiles(self, wanted: int, beside: int, plain: float, seen: float) -> int:
        """Return so many tokens, or fewer if the costs that lie in the size of a step are less for each of these."""
        rows = wanted + beside
        cell = self._cost.slope * seen / wanted

        def waste(tokens: int) -> float:
            return (plain + cell * (self._attended(tokens + beside) - tokens)) / tokens

        whole = range(rows // TILE * TILE - beside, max(self._least, int(_WORTH * rows) - beside), -TILE)
        sizes: list[int] = [wanted, *whole]
        return min(sizes, key=waste)


class _Plain:
    """What a step without prompt tokens takes."""

    def __init__(self) -> None:
        #: Seconds, lately; 0 before anything was measured.
        self.seconds = 0.0
        self._rows = 1

    def step(self, rows: int) -> float:
        """Return the seconds of so many rows: at most of those that were measured."""
        return self.seconds * min(1.0, rows / self._rows)

    def note(self, rows: int, seconds: float) -> None:
        """Learn from a step of so many rows."""
        self.seconds, self._rows = _moved(self.seconds, seconds), rows


class _Cost:
    """What a prompt's token costs, by what its attention looks at: a level that follows quickly, and a slope that does
    not.
    """

    def __init__(self, attention: float) -> None:
        self._attention: Final = attention
        #: Seconds of a token, lately; 0 before anything was measured.
        self.seconds = 0.0
        #: Seconds more for each token that it looks at.
        self.slope = 0.0
        #: What it looked at, lately.
        self._at = 0.0
        # Sums over the measurements, weighted by their tokens.
        self._tokens = self._looked = self._took = self._looked_squared = self._product = 0.0

    @property
    def known(self) -> bool:
        """Whether anything was measured."""
        return self.seconds > 0.0

    def of_token(self, looked: float) -> float:
        """Return the seconds of a token whose attention looks at so much."""
        return max(self.seconds + self.slope * (looked - self._at), self.seconds * _LEAST_LEVEL)

    def note(self, tokens: int, seconds: float, looked: float, weight: float) -> None:
        """Learn from so many tokens, of so many seconds each.

        Args:
            weight: How much they say of the level, up to 1.
        """
        expected = self.of_token(looked) if self.known else seconds
        self._at = _moved(self._at, looked, weight) if self.known else looked
        self.seconds = _moved(self.seconds, seconds, weight)
        seconds = min(seconds, _OUTLIER * expected)
        self._tokens = _REMEMBERED * self._tokens + tokens
        self._looked = _REMEMBERED * self._looked + tokens * looked
        self._took = _REMEMBERED * self._took + tokens * seconds
        self._looked_squared = _REMEMBERED * self._looked_squared + tokens * looked**2
        self._product = _REMEMBERED * self._product + tokens * looked * seconds
        believed = self.seconds * self._attention / (1 + self._attention * self._at)
        doubt = self._tokens * _SPREAD**2
        spread = self._looked_squared - self._looked**2 / self._tokens + doubt
        slope = (self._product - self._looked * self._took / self._tokens + believed * doubt) / spread
        # Attention is not all that costs, and costs something.
        self.slope = min(max(0.0, slope), self.seconds / self._at if self._at else 0.0)


def _seen(prompts: Sequence[tuple[int, int]], tokens: int) -> float:
    """Return the tokens before each of so many of the prompts', added up."""
    seen = 0.0
    for computed, pending in prompts:
        taken = min(pending, tokens)
        seen += taken * (computed + taken / 2)
        tokens -= taken
    return seen


def _moved(known: float, measured: float, weight: float = 1.0) -> float:
    return measured if known <= 0.0 else known + weight * _WEIGHT * (measured - known)
