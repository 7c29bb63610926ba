"""How the next token is chosen where a grammar restricts it.

By rejection, as in llama.cpp's ``common_sampler_sample``: the samplers choose freely, and if the grammar allows their
choice, which it mostly does, that was all. Else they choose once more, among the allowed tokens alone. The result is
the same as if they always did; for chains that cut the candidates down early it is enough to find as many allowed
tokens as they keep.

The free choice is llama.cpp's own way from logits to a token wherever it can be, as for sequences without a grammar,
and half as dear as a draw from here.
"""

from collections.abc import Collection, Sequence
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from llamaherd.pool.child.constraint import Constraint, ConstraintError
from llamaherd.pool.child.sampler import Chain
from llamaherd.pool.child.vocab import Vocab

__all__ = ["Picker"]

#: Most likely tokens that are looked at first, beside as many again as the samplers keep.
_NEAR: Final = 64
_NONE: Final[frozenset[int]] = frozenset()


class _Allowed(Protocol):
    def __call__(self, tokens: npt.NDArray[np.int64], most: int, but: Collection[int] = ...) -> list[int]: ...


class Picker:
    """Chooses for all sequences of one context."""

    def __init__(self, vocab: Vocab) -> None:
        self._vocab: Final = vocab
        self._all: Final = np.arange(vocab.size, dtype=np.int32)
        self._endless: npt.NDArray[np.int32] | None = None

    def pick(
        self,
        logits: npt.NDArray[np.float32],
        chain: Chain | None,
        constraint: Constraint | None,
        recent: Sequence[int],
        *,
        go_on: bool,
    ) -> int:
        """Return the next token from a row of logits, chosen here; chain and constraint have then accepted it.

        Args:
            constraint: What restricts the choice; None for one whose candidates shall be known afterwards.
            recent: The sequence's tokens.
            go_on: Never choose the end.

        Raises:
            ConstraintError: no token is allowed, or the grammar gives up.
        """
        due = constraint.due() if constraint is not None else None
        if constraint is not None and due is not None:
            constraint.accept(due)
            if chain is not None:
                chain.take(due)
            return due
        wanted = self._without_ends() if go_on else self._all
        if chain is not None and chain.takes_logarithms and chain.banned:
            rest = wanted[~np.isin(wanted, list(chain.banned))]
            wanted = rest if len(rest) else wanted
        token = _drawn(chain, wanted, logits)
        if constraint is not None:
            if not self.may_stand(token, chain, constraint, go_on=go_on):
                token = self._among_allowed(logits, chain, constraint, recent, go_on=go_on)
            constraint.accept(token)
        if chain is not None:
            chain.accept(token)
        return token

    def may_stand(self, token: int, chain: Chain | None, constraint: Constraint, *, go_on: bool) -> bool:
        """Whether a constraint lets a token pass that was chosen without it. May raise ConstraintError."""
        if (chain is not None and token in chain.banned) or (go_on and self._vocab.ends(token)):
            return False
        return constraint.allows(token)

    def replace(
        self,
        logits: npt.NDArray[np.float32],
        chain: Chain | None,
        constraint: Constraint,
        recent: Sequence[int],
        *,
        go_on: bool,
    ) -> int:
        """Return another token for one that may not stand and that the chain, a revocable one, has accepted; chain and
        constraint have then accepted this one instead. See :meth:`pick`.
        """
        if chain is not None:
            chain.take_back(recent)
        token = self._among_allowed(logits, chain, constraint, recent, go_on=go_on)
        constraint.accept(token)
        if chain is not None:
            chain.accept(token)
        return token

    def _without_ends(self) -> npt.NDArray[np.int32]:
        if self._endless is None:
            self._endless = np.delete(self._all, self._vocab.end_tokens)
        return self._endless

    def _among_allowed(
        self,
        logits: npt.NDArray[np.float32],
        chain: Chain | None,
        constraint: Constraint,
        recent: Sequence[int],
        *,
        go_on: bool,
    ) -> int:
        banned = chain.banned if chain is not None else _NONE

        def allowed(tokens: npt.NDArray[np.int64], most: int, but: Collection[int] = _NONE) -> list[int]:
            listed: list[int] = tokens.tolist()
            if but or banned or go_on:
                listed = [t for t in listed if t not in but and t not in banned and not (go_on and self._vocab.ends(t))]
            return constraint.allowed(listed, most)

        if chain is None:
            found = self._most_likely(logits, constraint, 1, allowed, _NONE)
        elif chain.keeps:
            # What the chain raises or lowers before it cuts may be anywhere, so all of it takes part.
            moved = chain.moves(recent)
            found = self._most_likely(logits, constraint, chain.keeps, allowed, moved)
            found += allowed(np.array(sorted(moved), np.int64), len(moved))
        else:
            found = allowed(constraint.candidates(), self._vocab.size)
        if not found:
            raise ConstraintError(
                "no token of this model can continue the text as the grammar demands", code="grammar_dead_end"
            )
        return found[0] if chain is None else chain.draw(np.array(found, np.int32), logits)

    def _most_likely(
        self,
        logits: npt.NDArray[np.float32],
        constraint: Constraint,
        most: int,
        allowed: _Allowed,
        but: Collection[int],
    ) -> list[int]:
        """Return the most likely allowed tokens, at most so many, best first."""
        near = 2 * most + _NEAR + len(but)
        if near < len(logits):
            likely = logits.argpartition(-near)[-near:]
            found = allowed(likely[np.argsort(-logits[likely], kind="stable")], most, but)
            if len(found) == most:
                return found
        rest = constraint.candidates()
        return allowed(rest[np.argsort(-logits[rest], kind="stable")], most, but)


def _drawn(chain: Chain | None, tokens: npt.NDArray[np.int32], logits: npt.NDArray[np.float32]) -> int:
    if chain is not None:
        return chain.draw(tokens, logits)
    return int(logits.argmax() if len(tokens) == len(logits) else tokens[logits[tokens].argmax()])
