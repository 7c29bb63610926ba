"""What each sequence's next token is, and what its caller gets of it."""

from collections.abc import Sequence as Ordered
from typing import Final

from llamaherd.pool.child.composer import Part
from llamaherd.pool.child.constraint import Constraint
from llamaherd.pool.child.context import Context
from llamaherd.pool.child.pick import Picker
from llamaherd.pool.child.sampler import Chain, certain, choose, likeliest
from llamaherd.pool.child.sequence import Sequence
from llamaherd.pool.child.vocab import Vocab
from llamaherd.transport.messages import Delta, FinishReason, TokenProbs

__all__ = ["NextTokens"]


class NextTokens:
    """Chooses for all sequences of one context, from the outputs of its last batch."""

    def __init__(self, context: Context, vocab: Vocab) -> None:
        self._context: Final = context
        self._vocab: Final = vocab
        self._picker: Final = Picker(vocab)

    def choose(self, parts: Ordered[Part]) -> list[int | None]:
        """Return a token for each output, in their order: what llama.cpp chooses. None where the logits are no numbers.

        Where the picker will choose, it is the highest logit, which serves only to tell damaged weights.
        """
        wanted: list[tuple[int, Chain | None]] = []
        endless: list[int] = []
        told = False
        for index, part in enumerate(parts):
            sequence = part.sequence
            wanted.append((part.row, None if sequence.picked else sequence.chain))
            if sequence.request.ignore_eos:
                endless.append(index)
                told = told or sequence.request.sampling.n_probs > 0
        ends = self._vocab.end_tokens if endless else ()
        return choose(self._context, wanted, endless, ends, told=told)

    def take(self, sequence: Sequence, token: int, index: int, outputs: int) -> tuple[Delta, FinishReason | None]:
        """Give a sequence its next token, ``token`` unless it is to be picked or may not stand; return what its caller
        gets, and why it was the last, if it was.

        Args:
            index: The place of its output among all ``outputs``.

        Raises:
            ConstraintError: it cannot go on under its grammar.
        """
        if sequence.picked:
            token = self._pick(sequence, index, outputs)
        elif sequence.constraint is not None:
            token = self._hold(sequence, sequence.constraint, token, index, outputs)
        count = sequence.request.sampling.n_probs
        probs = (self._probs(sequence, index, outputs, token),) if count else ()
        return sequence.accept(token, self._vocab, probs)

    def _pick(self, sequence: Sequence, index: int, outputs: int) -> int:
        logits = self._context.logits(outputs)[index]
        go_on = sequence.request.ignore_eos
        return self._picker.pick(logits, sequence.chain, sequence.constraint, sequence.tokens, go_on=go_on)

    def _hold(self, sequence: Sequence, constraint: Constraint, token: int, index: int, outputs: int) -> int:
        """Return a token that was chosen freely if a constraint lets it pass, else another."""
        chain, go_on = sequence.chain, sequence.request.ignore_eos
        if constraint.choice == "any" or self._picker.may_stand(token, chain, constraint, go_on=go_on):
            constraint.accept(token)
            return token
        logits = self._context.logits(outputs)[index]
        return self._picker.replace(logits, chain, constraint, sequence.tokens, go_on=go_on)

    def _probs(self, sequence: Sequence, index: int, outputs: int, token: int) -> TokenProbs:
        sampling = sequence.request.sampling
        if not sampling.post_sampling_probs:
            return likeliest(self._context.logits(outputs)[index], token, sampling.n_probs, self._vocab)
        if sequence.chain is None:
            return certain(token, self._vocab)
        return sequence.chain.odds(token, sampling.n_probs, self._vocab)
