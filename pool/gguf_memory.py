"""How much memory a model will take, computed from its shape. Estimates: llama.cpp's own figures may differ.

What llama.cpp allocates for a context is a cache of keys and values, the running states of recurrent layers, and
buffers for one step's computation. The first is exact for the usual decoders (src/llama-kv-cache.cpp: for each layer
``cells * heads * (key length + value length)`` elements, cells in steps of 256), the last is a bound by experience.
"""

import math
from collections.abc import Sequence
from typing import Final, Protocol

import msgspec

from llamaherd.pool.errors import BadRequest
from llamaherd.transport.messages import EngineOptions

__all__ = ["Attention", "RecurrentState", "Shape", "cache_bytes", "estimate_bytes", "kv_bytes", "state_bytes"]

#: llama.cpp allocates cells in steps of this many.
CELL_STEP: Final = 256
#: Bytes of a block and elements in it, of the types that a cache can have (ggml's).
_CACHE_TYPES: Final = {
    "f32": (4, 1),
    "f16": (2, 1),
    "bf16": (2, 1),
    "q8_0": (34, 32),
    "q5_1": (24, 32),
    "q5_0": (22, 32),
    "q4_1": (20, 32),
    "q4_0": (18, 32),
    "iq4_nl": (18, 32),
}
_F32_BYTES: Final = 4
#: Vectors of the model's and of the feed-forward's width that a step holds at one time, by experience.
_WIDTHS_HELD: Final = 8
_FF_WIDTHS_HELD: Final = 3
#: llama.cpp's notes on each cell: its position, and a bit for each of 256 sequences.
_CELL_BYTES: Final = 64
#: Finished sequences kept per slot by default, and where each has states of its own.
_CACHED_PER_SLOT: Final = 3
_CACHED_STATES_PER_SLOT: Final = 1


class Attention(msgspec.Struct, frozen=True, kw_only=True):
    """What layers with attention keep of a token.

    Attributes:
        n_head_kv: Heads of each layer; 0 for one that keeps nothing.
        key_length: Elements of one head's key.
        value_length: Elements of one head's value; 0 where the key holds both.
        windowed: Which layers see a sliding window only.
        window: Its width in tokens.
        key_length_windowed: As ``key_length``, in those layers.
        value_length_windowed: As ``value_length``, in those layers.
    """

    n_head_kv: tuple[int, ...] = ()
    key_length: int = 0
    value_length: int = 0
    windowed: tuple[bool, ...] = ()
    window: int = 0
    key_length_windowed: int = 0
    value_length_windowed: int = 0


class RecurrentState(msgspec.Struct, frozen=True, kw_only=True):
    """What recurrent layers of the Mamba family keep of a sequence.

    Attributes:
        n_layer: How many layers do.
        convolution: Steps that the convolution sees.
        inner: Width of the inner state.
        state: Elements of the state per inner element.
        groups: Groups that share the input's projections.
    """

    n_layer: int = 0
    convolution: int = 0
    inner: int = 0
    state: int = 0
    groups: int = 0


class Shape(Protocol):
    """What an estimate has to know of a model: :class:`~llamaherd.pool.gguf.ModelFacts` tells it."""

    @property
    def size_bytes(self) -> int: ...
    @property
    def n_ctx_train(self) -> int: ...
    @property
    def n_vocab(self) -> int: ...
    @property
    def n_embd(self) -> int: ...
    @property
    def n_ff(self) -> int: ...
    @property
    def n_head(self) -> Sequence[int]: ...
    @property
    def attention(self) -> Attention: ...
    @property
    def state(self) -> RecurrentState: ...


def kv_bytes(
    facts: Shape,
    n_ctx: int,
    type_k: str = "f16",
    type_v: str = "f16",
    *,
    swa_full: bool = True,
    kv_unified: bool = True,
    n_seq: int = 1,
    n_ubatch: int = 512,
) -> int:
    """Return the bytes of the cache of keys and values for ``n_ctx`` tokens, shared by all sequences.

    For each layer with attention, ``cells * heads * (key + value length)`` elements of the cache's types, where cells
    are ``n_ctx`` in steps of 256 (llama.cpp's src/llama-kv-cache.cpp); with ``swa_full`` False, layers with a sliding
    window have only ``n_seq * window + n_ubatch`` cells, again in steps of 256 (src/llama-kv-cache-iswa.cpp). Without
    ``kv_unified`` each sequence has its own part of the cells, and its own window with a physical batch.

    Not covered: the states of recurrent layers (see :func:`state_bytes`), the index caches of sparse attention, and
    value caches that are padded to the widest layer where flash attention is off. A window's pattern that llama.cpp
    knows and the file does not tell is assumed to be absent, which estimates too much.

    Raises:
        BadRequest: a type is not one that a cache can have, or ``n_ctx`` is negative.
    """
    if n_ctx < 0:
        raise BadRequest("n_ctx must be 0 or more")
    for name in (type_k, type_v):
        if name not in _CACHE_TYPES:
            raise BadRequest(f"unknown cache type {name!r}, known are {', '.join(_CACHE_TYPES)}")
    attention = facts.attention
    parts, sharers = (1, n_seq) if kv_unified else (n_seq, 1)
    cells = parts * _padded(math.ceil(n_ctx / parts))
    window = parts * _padded(sharers * attention.window + n_ubatch)
    windowed_cells = cells if swa_full else min(cells, window)
    total = 0
    for heads, windowed in zip(attention.n_head_kv, attention.windowed, strict=True):
        key = attention.key_length_windowed if windowed else attention.key_length
        value = attention.value_length_windowed if windowed else attention.value_length
        row = _row_bytes(type_k, heads * key) + _row_bytes(type_v, heads * value)
        total += (windowed_cells if windowed else cells) * row
    return total


def cache_bytes(facts: Shape, options: EngineOptions) -> int:
    """Return what :func:`kv_bytes` says of a context with these options."""
    _, cells, n_ubatch, n_seq = _dimensions(facts, options)
    types = options.cache_type_k, options.cache_type_v
    return kv_bytes(
        facts,
        cells,
        *types,
        swa_full=options.swa_full,
        kv_unified=options.kv_unified,
        n_seq=n_seq,
        n_ubatch=n_ubatch,
    )


def state_bytes(facts: Shape, n_seq: int) -> int:
    """Return the bytes of the running states of ``n_seq`` sequences, in F32.

    For each recurrent layer of the Mamba family ``(convolution - 1) * (inner + 2 * groups * state) + state * inner``
    elements (llama.cpp's src/llama-hparams.cpp). Other recurrent kinds (RWKV, linear attention) are not covered.
    """
    state = facts.state
    convolution = max(0, state.convolution - 1) * (state.inner + 2 * state.groups * state.state)
    return n_seq * state.n_layer * (convolution + state.state * state.inner) * _F32_BYTES


def estimate_bytes(facts: Shape, options: EngineOptions) -> int:
    """Return the bytes of a loaded model with its context: weights, cache, states and buffers.

    An estimate, meant to be too large rather than too small. Weights count with the size of the file, also where they
    are mapped and so can be given up by the kernel. The buffers grow with the physical batch, the widths of the model
    and the vocabulary, and with the length of the context; without flash attention they hold the scores of a whole
    batch for every head. Not covered: the process itself (some 80 MB), ``cache_ram``, projectors, adapters, what a
    GPU's driver takes, and how it is all divided between several devices.
    """
    parts, cells, n_ubatch, n_seq = _dimensions(facts, options)
    cache = cache_bytes(facts, options)
    outputs = 2 * n_seq * facts.n_vocab * _F32_BYTES
    widths = n_ubatch * (_WIDTHS_HELD * facts.n_embd + _FF_WIDTHS_HELD * facts.n_ff) * _F32_BYTES
    # Who sees whom, once more for the layers with a window, and without flash attention the scores of every head.
    tables = 1 + any(facts.attention.windowed) + (max(facts.n_head, default=0) if options.flash_attn == "off" else 0)
    scores = tables * n_ubatch * cells // parts * _F32_BYTES
    return facts.size_bytes + cache + state_bytes(facts, n_seq) + cells * _CELL_BYTES + outputs + widths + scores


def _cached(facts: Shape, options: EngineOptions) -> int:
    if options.n_cached >= 0:
        return options.n_cached
    if not options.kv_unified:
        return 0
    return options.n_parallel * (_CACHED_STATES_PER_SLOT if facts.state.n_layer else _CACHED_PER_SLOT)


def _dimensions(facts: Shape, options: EngineOptions) -> tuple[int, int, int, int]:
    """Return into how many parts a context is divided, its cells, its physical batch and its sequences."""
    n_seq = options.n_parallel + _cached(facts, options)
    parts = 1 if options.kv_unified else n_seq
    cells = parts * _padded(math.ceil((options.n_ctx or facts.n_ctx_train) / parts))
    n_ubatch = min(options.n_ubatch, max(options.n_batch, options.n_parallel), cells)
    return parts, cells, n_ubatch, n_seq


def _padded(cells: int) -> int:
    return math.ceil(cells / CELL_STEP) * CELL_STEP


def _row_bytes(name: str, elements: int) -> int:
    block, count = _CACHE_TYPES[name]
    return -(-elements // count) * block
