"""How the next token is chosen: the highest logit, or a chain of llama.cpp's samplers."""

from collections.abc import Sequence
from typing import Final

import numpy as np

from llamaherd.pool.child import bindings
from llamaherd.pool.child.context import Context
from llamaherd.pool.child.engine import RequestError
from llamaherd.transport.messages import Sampling

__all__ = ["Chain", "check", "choose"]

#: Candidates that stay when the caller switched ``top_k`` off: sorting a whole vocabulary costs milliseconds per token,
#: and what lies beyond a thousand has no weight that ``top_p`` or ``min_p`` would keep.
_WIDE_TOP_K: Final = 1000
_SEEDS: Final = 2**32


def check(sampling: Sampling) -> None:
    """Raise RequestError for settings that the samplers cannot take."""
    if not 0 <= sampling.seed < _SEEDS:
        raise RequestError(f"seed {sampling.seed} is not between 0 and {_SEEDS - 1}", code="invalid_sampling")
    if not -(2**31) <= sampling.top_k < 2**31:
        raise RequestError(f"top_k {sampling.top_k} does not fit 32 bits", code="invalid_sampling")


class Chain:
    """One request's samplers in the reference's order: top_k, top_p, min_p, temperature, draw. Free it after use."""

    def __init__(self, sampling: Sampling) -> None:
        self._handle = bindings.sampler_chain()
        narrowing = sampling.top_p < 1.0 or sampling.min_p > 0.0
        if sampling.top_k > 0:
            self._add(bindings.sampler_top_k(sampling.top_k))
        elif narrowing:
            self._add(bindings.sampler_top_k(_WIDE_TOP_K))
        if sampling.top_p < 1.0:
            self._add(bindings.sampler_top_p(sampling.top_p, 1))
        if sampling.min_p > 0.0:
            self._add(bindings.sampler_min_p(sampling.min_p, 1))
        self._add(bindings.sampler_temp(sampling.temperature))
        self._add(bindings.sampler_dist(sampling.seed))

    def sample(self, context: int, row: int) -> int:
        """Draw a token from an output row of the last batch."""
        return bindings.sampler_sample(self._handle, context, row)

    def free(self) -> None:
        """Release the C memory. Idempotent."""
        if self._handle:
            bindings.sampler_free(self._handle)
            self._handle = 0

    def _add(self, sampler: int) -> None:
        bindings.sampler_chain_add(self._handle, sampler)


def choose(context: Context, wanted: Sequence[tuple[int, Chain | None]]) -> list[int | None]:
    """Return the next token of each ``(row, chain)``, which are all the outputs of the last batch in its order.

    A chain of None takes the highest logit. None comes back where the logits are no numbers: of those a sampler would
    make junk.
    """
    logits = context.logits(len(wanted))
    # Damaged weights spoil every logit of a row, so one of them tells.
    damaged = np.isnan(logits[:, 0]).tolist()
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
