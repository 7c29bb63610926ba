"""How the next token is chosen: the highest logit, or a chain of llama.cpp's samplers."""

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Final, cast

import numpy as np
import numpy.typing as npt

from llamaherd.pool.child import llama_sampler
from llamaherd.pool.child.chain import Step, keeps, look_back, memory, plan
from llamaherd.pool.child.context import Context
from llamaherd.pool.child.engine import RequestError
from llamaherd.pool.child.llama_sampler import DryRecipe
from llamaherd.pool.child.vocab import Vocab
from llamaherd.pool.sampling import problem_of
from llamaherd.transport.messages import Sampling, TokenProb, TokenProbs

__all__ = ["Chain", "Samplers", "certain", "choose", "likeliest"]

#: DRY samplers kept as patterns for further ones.
_MOST_PATTERNS: Final = 8
#: Beyond this a bias decides everything, and sums of such stay finite.
_MOST_BIAS: Final = 1e6
#: Tokens that samplers are told again where the last one is taken back: that costs 0.1 us each.
_MOST_TOLD_AGAIN: Final = 256
#: Samplers that look back on the tokens before.
_LOOK_BACK: Final = ("penalties", "dry")
#: Samplers that take the logarithm of each candidate's probability.
_TAKE_LOGARITHMS: Final = frozenset({"typical", "mirostat"})
#: Logarithm that stands for "never"; JSON has no infinity.
_NEVER: Final = -9999.0
#: llama.cpp's ``llama_token_data``.
_CANDIDATE: Final = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])


class Chain:
    """One request's samplers. Free it after use.

    Attributes:
        keeps: Candidates that are left after the first cut, if nothing before that looks at the distribution; else 0.
        banned: Tokens that are never to be chosen.
        revocable: Whether a token that :meth:`sample` chose can be taken back, at little cost.
        takes_logarithms: Whether candidates without any probability, a logit of minus infinity, would spoil its choice:
            a sampler takes the logarithms of those of all, or nearly all, tokens.

    Args:
        memory: Tokens that its samplers look back on.
        looking_back: The samplers that do so.
        learns: Whether one of them learns of its choices otherwise, for good.
    """

    def __init__(
        self,
        handle: int,
        *,
        keeps: int = 0,
        memory: int = 0,
        looking_back: Sequence[int] = (),
        learns: bool = False,
        takes_logarithms: bool = False,
        biases: Mapping[int, float] = MappingProxyType({}),
    ) -> None:
        self._handle = handle
        self._memory: Final = memory
        self._looking_back: Final = looking_back
        self.revocable: Final = not learns and memory <= _MOST_TOLD_AGAIN
        self.takes_logarithms: Final = takes_logarithms
        self._biased: Final = frozenset(biases)
        #: What the last draw has left.
        self._left: npt.NDArray[np.void] | None = None
        self.keeps: Final = keeps
        self.banned: Final = frozenset(token for token, bias in biases.items() if bias == -np.inf)

    def moves(self, tokens: Sequence[int]) -> set[int]:
        """Return the tokens whose logits it changes on their own account, after these tokens. Negative ones stand for
        images.
        """
        recent = tokens[-self._memory :] if self._memory else ()
        return {*self._biased, *(token for token in recent if token >= 0)}

    def draw(self, tokens: npt.NDArray[np.int32], logits: npt.NDArray[np.float32]) -> int:
        """Choose among some tokens of a row of logits; :meth:`accept` what is taken."""
        candidates = np.empty(len(tokens), _CANDIDATE)
        candidates["id"] = tokens
        candidates["logit"] = logits[tokens] if len(tokens) < len(logits) else logits
        chosen, left = llama_sampler.apply(self._handle, candidates.ctypes.data, len(candidates))
        self._left = candidates[left.start : left.stop]
        return int(candidates["id"][chosen])

    def odds(self, token: int, count: int, vocab: Vocab) -> TokenProbs:
        """Return the probabilities of a token that was just drawn and of the ``count`` most likely ones, of those that
        the samplers have left.
        """
        left = self._left
        if left is None:
            return certain(token, vocab)
        order = np.argsort(-left["p"], kind="stable")[:count]
        best: list[tuple[int, float]] = list(zip(left["id"][order].tolist(), left["p"][order].tolist(), strict=True))
        own = left["p"][left["id"] == token]
        chosen = float(own[0]) if len(own) else 0.0
        return TokenProbs(
            _prob(token, chosen, vocab), tuple(_prob(which, value, vocab) for which, value in best if value > 0)
        )

    def take(self, token: int) -> None:
        """Remember a token that nothing was chosen beside."""
        self._left = None
        self.accept(token)

    def accept(self, token: int) -> None:
        """Remember a token that :meth:`draw` did not decide alone."""
        llama_sampler.accept(self._handle, token)

    def sample(self, context: int, row: int) -> int:
        """Choose a token from an output row of the last batch, and remember it."""
        return llama_sampler.sample(self._handle, context, row)

    def take_back(self, tokens: Sequence[int]) -> None:
        """Forget the token that :meth:`sample` chose, wholly if it is ``revocable``; ``tokens`` are those before it."""
        for sampler in self._looking_back:
            llama_sampler.reset(sampler)
            _tell(sampler, _tail(tokens, self._memory))

    def free(self) -> None:
        """Release the C memory. Idempotent."""
        if self._handle:
            llama_sampler.free(self._handle)
            self._handle = 0


class Samplers:
    """Makes the chains of one loaded model.

    Args:
        context: Most tokens of one sequence.
    """

    def __init__(self, vocab: Vocab, context: int) -> None:
        self._vocab: Final = vocab
        self._context: Final = context
        self._patterns: Final[dict[DryRecipe, int]] = {}

    def check(self, sampling: Sampling) -> None:
        """Raise RequestError for what the samplers cannot take."""
        problem = problem_of(sampling)
        if problem is not None:
            raise RequestError(problem, code="invalid_sampling")
        for target, _ in sampling.logit_bias:
            if isinstance(target, int) and not 0 <= target < self._vocab.size:
                raise RequestError(
                    f"logit_bias: token {target} is not in the vocabulary of {self._vocab.size} tokens",
                    code="invalid_sampling",
                )

    def make(self, sampling: Sampling, prompt: Sequence[int]) -> Chain | None:
        """Return the samplers for checked parameters; None when the highest logit is always the answer."""
        biases = self._biases(sampling)
        steps = plan(sampling, self._vocab.size, self._context, biased=bool(biases))
        if steps is None:
            return None
        handle = llama_sampler.chain()
        looking_back: list[int] = []
        try:
            for step in steps:
                sampler = self._sampler(step, sampling, biases)
                llama_sampler.chain_add(handle, sampler)
                if step.kind in _LOOK_BACK:
                    looking_back.append(sampler)
            count = memory(sampling, steps, self._context)
            _tell(handle, prompt[-count:] if count else ())
        except BaseException:
            llama_sampler.free(handle)
            raise
        kinds, kept = {step.kind for step in steps}, keeps(steps)
        # What is ruled out is cut off first where only the likeliest half of the tokens, or fewer, stay.
        cut = 0 < kept <= self._vocab.size // 2
        return Chain(
            handle,
            keeps=kept,
            memory=count,
            looking_back=looking_back,
            learns="adaptive_p" in kinds,
            takes_logarithms=not cut and not kinds.isdisjoint(_TAKE_LOGARITHMS),
            biases=biases,
        )

    def free(self) -> None:
        """Release the C memory. Idempotent. Chains that were made remain valid."""
        while self._patterns:
            llama_sampler.free(self._patterns.popitem()[1])

    def _sampler(self, step: Step, sampling: Sampling, biases: dict[int, float]) -> int:
        if step.kind == "logit_bias":
            return llama_sampler.logit_bias(self._vocab.size, list(biases.items()))
        if step.kind == "dry":
            return llama_sampler.clone(self._dry_pattern(sampling))
        handle: int = getattr(llama_sampler, step.kind)(*step.values)
        return handle

    def _dry_pattern(self, sampling: Sampling) -> int:
        """Return a DRY sampler to clone. Making one takes tens of milliseconds, in which nobody gets a token."""
        recipe = DryRecipe(
            multiplier=sampling.dry_multiplier,
            base=sampling.dry_base,
            allowed_length=sampling.dry_allowed_length,
            last_n=look_back(sampling.dry_penalty_last_n, self._context),
            breakers=tuple(text.encode("utf-8", "replace") for text in sampling.dry_sequence_breakers),
        )
        pattern = self._patterns.pop(recipe, 0) or self._vocab.dry_sampler(recipe)
        self._patterns[recipe] = pattern
        if len(self._patterns) > _MOST_PATTERNS:
            llama_sampler.free(self._patterns.pop(next(iter(self._patterns))))
        return pattern

    def _biases(self, sampling: Sampling) -> dict[int, float]:
        """Return the change of each logit: the caller's, and the tokens that the model's maker ruled out."""
        biases = dict.fromkeys(self._vocab.suppressed, -np.inf)
        for target, bias in sampling.logit_bias:
            tokens = [target] if isinstance(target, int) else self._vocab.tokenize(target, add_special=False)
            change = -np.inf if bias is None else min(max(bias, -_MOST_BIAS), _MOST_BIAS)
            for token in tokens:
                biases[token] = biases.get(token, 0.0) + change
        return biases


def _tell(sampler: int, tokens: Sequence[int]) -> None:
    for token in tokens:
        llama_sampler.accept(sampler, token)


def _tail(tokens: Sequence[int], count: int) -> Sequence[int]:
    """Return the last ``count`` of some tokens, but for negative ones, which stand for images."""
    tail = tokens[-count:]
    return tail if min(tail, default=0) >= 0 else [token for token in tokens if token >= 0][-count:]


def choose(
    context: Context,
    wanted: Sequence[tuple[int, Chain | None]],
    endless: Sequence[int] = (),
    ends: Sequence[int] = (),
    *,
    told: bool = False,
) -> list[int | None]:
    """Return the next token of each ``(row, chain)``, which are all the outputs of the last batch in its order.

    A chain of None takes the highest logit. None comes back where the logits are no numbers: of those a sampler would
    make junk.

    Args:
        endless: Places of outputs where none of ``ends`` may be chosen, which is what a bias of minus infinity does in
            llama.cpp's ``ignore_eos``. Their logits are minus infinity afterwards.
        told: Leave all logits as they are: they are told.
    """
    logits = context.logits(len(wanted))
    # Damaged weights spoil every logit of a row, so one of them tells.
    damaged = [first != first for first in logits[:, 0].tolist()]
    if not endless:
        return _chosen(context, wanted, logits, damaged)
    barred = [(index, token) for index in endless for token in ends]
    # Single numbers are reached for half of what numpy's own indexing costs.
    single = cast("memoryview[float]", logits.data)
    kept = [single[place] for place in barred] if told else []
    for place in barred:
        single[place] = -math.inf
    chosen = _chosen(context, wanted, logits, damaged)
    for place, logit in zip(barred, kept, strict=False):
        single[place] = logit
    return chosen


def _chosen(
    context: Context,
    wanted: Sequence[tuple[int, Chain | None]],
    logits: npt.NDArray[np.float32],
    damaged: Sequence[bool],
) -> list[int | None]:
    if all(chain is None for _, chain in wanted):
        tokens: list[int] = logits.argmax(axis=1).tolist()
        return [None if bad else token for token, bad in zip(tokens, damaged, strict=True)]
    chosen: list[int | None] = []
    for index, (row, chain) in enumerate(wanted):
        if damaged[index]:
            chosen.append(None)
        elif chain is None:
            chosen.append(int(logits[index].argmax()))
        else:
            chosen.append(chain.sample(context.handle, row))
    return chosen


def certain(token: int, vocab: Vocab) -> TokenProbs:
    """Return what there is to tell of a token that nothing could be chosen beside."""
    only = _prob(token, 1.0, vocab)
    return TokenProbs(only, (only,))


def _prob(token: int, value: float, vocab: Vocab) -> TokenProb:
    return TokenProb(token, math.log(value) if value > 0 else _NEVER, vocab.named_piece(token))


def likeliest(logits: npt.NDArray[np.float32], token: int, count: int, vocab: Vocab) -> TokenProbs:
    """Return the log-probabilities of a chosen token and of the ``count`` most likely ones, from a row of logits."""
    best = logits.argpartition(-count)[-count:] if count < len(logits) else np.arange(len(logits))
    best = best[np.argsort(-logits[best], kind="stable")]
    highest = logits[best[0]]
    # Infinite logits have no distribution. What is no number becomes "never": JSON has none, and the whole step is one
    # message.
    with np.errstate(invalid="ignore"):
        total = highest + np.log(np.exp(logits - highest, dtype=np.float64).sum())
        told = {which: max(_NEVER, float(logits[which] - total)) for which in (token, *best.tolist())}
    probs = {which: TokenProb(which, value, vocab.named_piece(which)) for which, value in told.items()}
    return TokenProbs(probs[token], tuple(probs[which] for which in best.tolist()))
