"""llama.cpp's own grammar sampler, to compare ours with. For harmless grammars only: it may run for ever or abort."""

import importlib
from typing import Any

import numpy as np
import numpy.typing as npt

from llamaherd.pool.child.vocab import Vocab

__all__ = ["ReferenceGrammar"]

_low: Any = importlib.import_module("llama_cpp.llama_cpp")


class ReferenceGrammar:
    """A grammar on a vocabulary. ``usable`` is False where llama.cpp refuses it. Free it after use."""

    def __init__(self, vocab: Vocab, handle: int, source: str) -> None:
        self._size = vocab.size
        self._sampler = _low.llama_sampler_init_grammar(handle, source.encode(), b"root")
        self.usable = bool(self._sampler)
        self._candidates = (_low.llama_token_data * self._size)()

    def allowed(self) -> npt.NDArray[np.bool_]:
        """Return of each token whether it may come next."""
        for token in range(self._size):
            self._candidates[token] = (token, 1.0, 0.0)
        array = _low.llama_token_data_array(self._candidates, self._size, -1, False)
        _low.llama_sampler_apply(self._sampler, array)
        return np.array([self._candidates[token].logit > 0 for token in range(self._size)])

    def accept(self, token: int) -> None:
        """Take an allowed token; a forbidden one ends the process."""
        _low.llama_sampler_accept(self._sampler, token)

    def free(self) -> None:
        """Release the C memory."""
        if self._sampler:
            _low.llama_sampler_free(self._sampler)
            self._sampler = None
