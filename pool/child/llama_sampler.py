"""Samplers of llama.cpp: their making, and how a chain of them chooses."""

import ctypes
from collections.abc import Callable, Sequence
from typing import Any, Final

import msgspec

from llamaherd.pool.child.llama_library import F32, I32, LOW, PTR, SHORT, SIZE, STR, U32, bind

__all__ = [
    "DryRecipe",
    "accept",
    "adaptive_p",
    "apply",
    "chain",
    "chain_add",
    "clone",
    "dist",
    "dry",
    "free",
    "logit_bias",
    "min_p",
    "mirostat",
    "mirostat_v2",
    "penalties",
    "reset",
    "sample",
    "temp",
    "temp_ext",
    "top_k",
    "top_n_sigma",
    "top_p",
    "typical",
    "xtc",
]

_chain_create = bind(SHORT, "llama_sampler_chain_init", PTR, LOW.llama_sampler_chain_params)
chain_add: Callable[[int, int], None] = bind(SHORT, "llama_sampler_chain_add", None, PTR, PTR)
free: Callable[[int], None] = bind(SHORT, "llama_sampler_free", None, PTR)
top_k: Callable[[int], int] = bind(SHORT, "llama_sampler_init_top_k", PTR, I32)
top_p: Callable[[float, int], int] = bind(SHORT, "llama_sampler_init_top_p", PTR, F32, SIZE)
min_p: Callable[[float, int], int] = bind(SHORT, "llama_sampler_init_min_p", PTR, F32, SIZE)
typical: Callable[[float, int], int] = bind(SHORT, "llama_sampler_init_typical", PTR, F32, SIZE)
top_n_sigma: Callable[[float], int] = bind(SHORT, "llama_sampler_init_top_n_sigma", PTR, F32)
#: Probability, threshold, min_keep, seed.
xtc: Callable[[float, float, int, int], int] = bind(SHORT, "llama_sampler_init_xtc", PTR, F32, F32, SIZE, U32)
temp: Callable[[float], int] = bind(SHORT, "llama_sampler_init_temp", PTR, F32)
#: Temperature, range, exponent.
temp_ext: Callable[[float, float, float], int] = bind(SHORT, "llama_sampler_init_temp_ext", PTR, F32, F32, F32)
#: n_vocab, last_n, repeat, frequency, presence. It allocates ``last_n`` entries at once.
penalties: Callable[[int, int, float, float, float], int] = bind(
    SHORT, "llama_sampler_init_penalties", PTR, I32, I32, F32, F32, F32
)
#: n_vocab, seed, tau, eta, m.
mirostat: Callable[[int, int, float, float, int], int] = bind(
    SHORT, "llama_sampler_init_mirostat", PTR, I32, U32, F32, F32, I32
)
#: Seed, tau, eta.
mirostat_v2: Callable[[int, float, float], int] = bind(SHORT, "llama_sampler_init_mirostat_v2", PTR, U32, F32, F32)
#: Target, decay, seed.
adaptive_p: Callable[[float, float, int], int] = bind(SHORT, "llama_sampler_init_adaptive_p", PTR, F32, F32, U32)
dist: Callable[[int], int] = bind(SHORT, "llama_sampler_init_dist", PTR, U32)
clone: Callable[[int], int] = bind(SHORT, "llama_sampler_clone", PTR, PTR)
#: Tells a sampler of a token that it did not choose itself.
accept: Callable[[int, int], None] = bind(SHORT, "llama_sampler_accept", None, PTR, I32)
#: Makes a sampler forget what it was told, and what it has drawn.
reset: Callable[[int], None] = bind(SHORT, "llama_sampler_reset", None, PTR)
#: Samples from a row of the last batch and accepts the token. The row must have been an output, or the process aborts.
sample: Callable[[int, int, int], int] = bind(SHORT, "llama_sampler_sample", I32, PTR, PTR, I32)


_apply = bind(SHORT, "llama_sampler_apply", None, PTR, ctypes.POINTER(LOW.llama_token_data_array))
_pointer_to: Any = ctypes.POINTER
_token_data: Any = _pointer_to(LOW.llama_token_data)
_TOKEN_DATA_BYTES: Final = ctypes.sizeof(LOW.llama_token_data)


def apply(chain: int, address: int, count: int) -> tuple[int, range]:
    """Have a chain choose among candidates without telling it that they were accepted; return the index of its choice,
    and those of the candidates that it has left.

    Args:
        address: Where ``count`` >= 1 candidates lie, each an int32 id and two float32, its logit and a probability
            to be written. They are reordered, so the indices are those of the order afterwards. What is left need
            not be at the front: XTC drops the likeliest.
    """
    array = LOW.llama_token_data_array(ctypes.cast(address, _token_data), count, -1, False)
    _apply(chain, ctypes.byref(array))
    left: Any = ctypes.cast(array.data, PTR).value
    first = (left - address) // _TOKEN_DATA_BYTES
    return first + int(array.selected), range(first, first + int(array.size))


_dry = bind(SHORT, "llama_sampler_init_dry", PTR, PTR, F32, F32, I32, I32, ctypes.POINTER(STR), SIZE)
_logit_bias = bind(SHORT, "llama_sampler_init_logit_bias", PTR, I32, I32, ctypes.POINTER(LOW.llama_logit_bias))


class DryRecipe(msgspec.Struct, frozen=True, kw_only=True):
    """The arguments of a DRY sampler. ``last_n`` entries are allocated at once."""

    multiplier: float
    base: float
    allowed_length: int
    last_n: int
    breakers: tuple[bytes, ...]


def dry(vocab: int, recipe: DryRecipe) -> int:
    """Return a DRY sampler. It searches the whole vocabulary for each breaker: 10 ms and more with a large one."""
    texts = (ctypes.c_char_p * len(recipe.breakers))(*recipe.breakers)
    numbers = (recipe.multiplier, recipe.base, recipe.allowed_length, recipe.last_n)
    handle: int = _dry(vocab, *numbers, texts, len(recipe.breakers))
    return handle


def logit_bias(n_vocab: int, biases: Sequence[tuple[int, float]]) -> int:
    """Return a sampler that adds a bias to the logits of tokens, whose ids must be of the vocabulary."""
    array = (LOW.llama_logit_bias * len(biases))(*biases)
    handle: int = _logit_bias(n_vocab, len(biases), array)
    return handle


def chain() -> int:
    """Return a new empty chain; freeing it frees what was added."""
    handle: int = _chain_create(LOW.llama_sampler_chain_params(no_perf=True))
    return handle
