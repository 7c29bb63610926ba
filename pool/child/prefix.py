"""What a prompt has in common with what is computed already, and how much of that may be taken over.

Pure decisions over token ids; the caller brings the sequences.
"""

from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

__all__ = ["Donor", "Reuse", "Rules", "common_length", "find"]

#: Tokens that make it worth waiting for a sequence which is about to compute them. Waiting costs at least a step.
_WORTH_WAITING: Final = 32
#: Tokens that are copied, at most, for each that need not be computed, and how many are whatever they spare: prompts
#: often have but their first token in common, and a long sequence has gigabytes.
_COPIED_IN_VAIN: Final = 16
_LITTLE: Final = 128


class Donor(Protocol):
    """A sequence in the cache: its id, which may change, its tokens, and how many of them are computed."""

    slot: int

    @property
    def tokens(self) -> "array[int]": ...
    @property
    def computed(self) -> int: ...


class Reuse(NamedTuple):
    """The first ``length`` tokens may be taken over from ``donor``: now, or when it will have computed them."""

    donor: Donor
    length: int
    ready: bool


@dataclass(frozen=True)
class Rules:
    """What the model's kind allows.

    Attributes:
        whole: Only a donor's entire state can be taken over (recurrent layers).
        window: Tokens that sliding-window attention sees; 0 when there is no such attention.
        first: Returns the lowest position that a sequence id still has.
        copies: Taking over costs a copy of everything that the donor has, as no cell can be shared.
    """

    whole: bool
    window: int
    first: Callable[[int], int]
    copies: bool = False

    @property
    def exact(self) -> bool:
        """Whether a prefix must be taken at the moment when its donor ends there."""
        return self.whole or self.window > 0

    def usable(self, donor: Donor, common: int) -> int:
        """Return how many of the ``common`` first tokens can be taken over now."""
        length = min(common, donor.computed)
        if length == 0 or (self.whole and length != donor.computed):
            return 0
        if self.copies and donor.computed > max(_LITTLE, _COPIED_IN_VAIN * length):
            return 0
        if self.window and not self._sees(self.first(donor.slot), length):
            return 0
        return length

    def first_copied(self, slot: int, computed: int) -> int:
        """Return the lowest position that a copy of a sequence has: llama.cpp leaves out what the window of the last
        token does not see, also where the cache keeps it (``swa_full``).
        """
        if not self.window:
            return 0
        first = self.first(slot)
        return first if first < 0 else max(first, computed - self.window)

    def serves(self, computed: int, first: int | None, length: int) -> bool:
        """Whether a copy of so many tokens serves for its first ``length``.

        Args:
            first: The lowest position that is in it; None where nobody knows: it serves as a whole then.
        """
        if self.whole or (self.window and first is None):
            return length == computed
        return not self.window or self._sees(first or 0, length)

    def _sees(self, first: int, length: int) -> bool:
        # Cells that have left the window get overwritten. The next token sees itself and the window - 1 before it.
        return 0 <= first <= max(0, length - self.window + 1)


def common_length(one: "array[int]", other: "array[int]") -> int:
    """Return how many tokens two sequences have in common from their beginning on."""
    count = min(len(one), len(other))
    if count == 0 or one[0] != other[0]:
        return 0
    differs = _view(one)[:count] != _view(other)[:count]
    first = int(differs.argmax())
    return first if differs[first] else count


def _view(tokens: "array[int]") -> npt.NDArray[np.intc]:
    # Without a copy. It must be gone before the array grows again, or the array refuses to.
    return np.frombuffer(tokens, np.intc)


def _anywhere(length: int) -> int:
    return length


def find(
    tokens: "array[int]",
    running: Iterable[Donor],
    cached: Iterable[Donor],
    rules: Rules,
    floor: Callable[[int], int] = _anywhere,
) -> Reuse | None:
    """Return the longest prefix that another sequence has, or soon will have; None when there is nothing to reuse.

    At least the last token is left to compute: its logits are needed. Of equals the first one wins, and a running
    donor before a cached one, as its cells are held anyway. A running donor that will soon have clearly more than what
    is there now is worth waiting for. ``floor`` returns the largest length, up to a given one, at which the
    tokens may be cut.
    """
    most = len(tokens) - 1
    now: Reuse | None = None
    later: Reuse | None = None
    for donor in running:
        common = floor(min(common_length(tokens, donor.tokens), most))
        now = _longer(now, Reuse(donor, rules.usable(donor, floor(min(common, donor.computed))), ready=True))
        if common > donor.computed:
            later = _longer(later, Reuse(donor, common, ready=False))
    for donor in cached:
        common = floor(min(common_length(tokens, donor.tokens), most))
        now = _longer(now, Reuse(donor, rules.usable(donor, floor(min(common, donor.computed))), ready=True))
    if later is not None and later.length >= _WORTH_WAITING + (now.length if now is not None else 0):
        return later
    return now


def _longer(known: Reuse | None, new: Reuse) -> Reuse | None:
    return new if new.length > (known.length if known is not None else 0) else known
