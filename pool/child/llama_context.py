"""Contexts of llama.cpp: creating one, its cache, what is computed in it, and what comes of that."""

import ctypes
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

import msgspec

from llamaherd.pool.child.llama_backend import AbortFlag
from llamaherd.pool.child.llama_library import BOOL, F32, I32, LONG, LOW, PTR, SHORT, SIZE, U32, bind

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = [
    "CACHE_TYPES",
    "ContextSettings",
    "batch_struct",
    "create",
    "decode",
    "embedding_struct",
    "embeddings",
    "embeddings_of",
    "float_rows",
    "free",
    "logits",
    "memory",
    "memory_can_shift",
    "memory_clear",
    "memory_seq_add",
    "memory_seq_cp",
    "memory_seq_pos_max",
    "memory_seq_pos_min",
    "memory_seq_rm",
    "n_batch",
    "n_ctx",
    "n_ctx_seq",
    "set_adapters",
    "set_causal_attn",
    "set_embeddings",
    "set_n_threads",
    "state_seq_get_data",
    "state_seq_get_size",
    "state_seq_set_data",
    "synchronize",
]

#: Element types that a KV cache can have: ggml's number, the elements of a block, and the bytes of one.
CACHE_TYPES: Final = {
    "f32": (0, 1, 4),
    "f16": (1, 1, 2),
    "bf16": (30, 1, 2),
    "q8_0": (8, 32, 34),
    "q5_1": (7, 32, 24),
    "q5_0": (6, 32, 22),
    "q4_1": (3, 32, 20),
    "q4_0": (2, 32, 18),
    "iq4_nl": (20, 32, 18),
}


class ContextSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What a context is created with, in tokens, sequences and threads.

    Field names are those of llama.cpp's ``llama_context_params``; ``flash_attn_type`` is -1 auto, 0 off, 1 on;
    ``kv_unified`` lets all sequences use all cells, else each has its part of them; ``swa_full`` keeps what has left
    the window of a sliding-window model; ``type_k`` and ``type_v`` are ggml's numbers
    (:data:`CACHE_TYPES`). Of ``rope_*`` and ``yarn_*`` the defaults mean what the model says. ``embeddings``
    makes every token an output; ``pooling_type`` -1 is the model's own.
    """

    n_ctx: int
    n_batch: int
    n_ubatch: int
    n_seq_max: int
    n_outputs_max: int
    n_threads: int
    n_threads_batch: int
    flash_attn_type: int = -1
    kv_unified: bool = True
    swa_full: bool = True
    type_k: int = 1
    type_v: int = 1
    rope_scaling_type: int = -1
    rope_freq_base: float = 0.0
    rope_freq_scale: float = 0.0
    yarn_ext_factor: float = -1.0
    yarn_attn_factor: float = -1.0
    yarn_beta_fast: float = -1.0
    yarn_beta_slow: float = -1.0
    yarn_orig_ctx: int = 0
    embeddings: bool = False
    pooling_type: int = -1


_context_defaults = bind(LONG, "llama_context_default_params", LOW.llama_context_params)
_context_create = bind(LONG, "llama_init_from_model", PTR, PTR, LOW.llama_context_params)


def create(model: int, settings: ContextSettings, abort: AbortFlag) -> int | None:
    """Create a context; ``None`` when it failed. ``abort`` must outlive it."""
    params = _context_defaults()
    for name in settings.__struct_fields__:
        setattr(params, name, getattr(settings, name))
    params.no_perf = True
    params.abort_callback = abort.function
    params.abort_callback_data = abort.address
    handle: int | None = _context_create(model, params)
    return handle


free: Callable[[int], None] = bind(LONG, "llama_free", None, PTR)
memory: Callable[[int], int | None] = bind(SHORT, "llama_get_memory", PTR, PTR)
n_ctx: Callable[[int], int] = bind(SHORT, "llama_n_ctx", U32, PTR)
n_ctx_seq: Callable[[int], int] = bind(SHORT, "llama_n_ctx_seq", U32, PTR)
n_batch: Callable[[int], int] = bind(SHORT, "llama_n_batch", U32, PTR)
set_n_threads: Callable[[int, int, int], None] = bind(SHORT, "llama_set_n_threads", None, PTR, I32, I32)
memory_clear: Callable[[int, bool], None] = bind(SHORT, "llama_memory_clear", None, PTR, BOOL)
memory_seq_rm: Callable[[int, int, int, int], bool] = bind(SHORT, "llama_memory_seq_rm", BOOL, PTR, I32, I32, I32)
#: Lets a sequence hold positions ``p0`` to ``p1`` - 1 of another one too. Ids of 256 and more abort the process.
memory_seq_cp: Callable[[int, int, int, int, int], None] = bind(
    SHORT, "llama_memory_seq_cp", None, PTR, I32, I32, I32, I32
)
memory_seq_pos_min: Callable[[int, int], int] = bind(SHORT, "llama_memory_seq_pos_min", I32, PTR, I32)
memory_seq_pos_max: Callable[[int, int], int] = bind(SHORT, "llama_memory_seq_pos_max", I32, PTR, I32)
#: Moves positions ``p0`` to ``p1`` - 1 of a sequence by an offset. A cell has one position for all its sequences, so
#: this moves it for those too that merely share it. Aborts the process where :data:`memory_can_shift` says no.
memory_seq_add: Callable[[int, int, int, int, int], None] = bind(
    SHORT, "llama_memory_seq_add", None, PTR, I32, I32, I32, I32
)
memory_can_shift: Callable[[int], bool] = bind(SHORT, "llama_memory_can_shift", BOOL, PTR)
#: Bytes of a sequence's state.
state_seq_get_size: Callable[[int, int], int] = bind(SHORT, "llama_state_seq_get_size", SIZE, PTR, I32)
#: Writes a sequence's state to an address with room for ``size`` bytes; returns the bytes written, 0 on failure.
state_seq_get_data: Callable[[int, int, int, int], int] = bind(
    LONG, "llama_state_seq_get_data", SIZE, PTR, PTR, SIZE, I32
)
#: Replaces a sequence by a state of ``size`` bytes at an address; returns the bytes read, 0 on failure, and then
#: the sequence is empty.
state_seq_set_data: Callable[[int, int, int, int], int] = bind(
    LONG, "llama_state_seq_set_data", SIZE, PTR, PTR, SIZE, I32
)
#: Waits for a device that computes asynchronously. The getters of results wait too, but with the GIL held.
synchronize: Callable[[int], None] = bind(LONG, "llama_synchronize", None, PTR)
logits: Callable[[int], int | None] = bind(SHORT, "llama_get_logits", PTR, PTR)
#: Whether the next decodes give embeddings, and then of every token.
set_embeddings: Callable[[int, bool], None] = bind(SHORT, "llama_set_embeddings", None, PTR, BOOL)
#: The embeddings of the last batch's outputs, in batch order; None with pooling.
embeddings: Callable[[int], int | None] = bind(SHORT, "llama_get_embeddings", PTR, PTR)
#: The pooled embedding of a sequence of the last batch, or its scores; None without pooling.
embeddings_of: Callable[[int, int], int | None] = bind(SHORT, "llama_get_embeddings_seq", PTR, PTR, I32)


def float_rows(address: int, rows: int, columns: int) -> "npt.NDArray[np.float32]":
    """Return a view of C memory as a float32 array; valid as long as the memory is."""
    import numpy as np  # here and not above: the model is read before numpy is there

    memory: Any = (F32 * (rows * columns)).from_address(address)
    view: npt.NDArray[np.float32] = np.frombuffer(memory, np.float32).reshape(rows, columns)
    return view


_decode = bind(LONG, "llama_decode", I32, PTR, LOW.llama_batch)


def batch_struct(token: int, pos: int, n_seq_id: int, seq_id: int, output: int) -> Any:
    """Return a ``llama_batch`` over memory that the caller owns and keeps; the arguments are addresses."""
    int_pointer = ctypes.POINTER(ctypes.c_int32)
    return LOW.llama_batch(
        0,
        ctypes.cast(token, int_pointer),
        None,
        ctypes.cast(pos, int_pointer),
        ctypes.cast(n_seq_id, int_pointer),
        ctypes.cast(seq_id, ctypes.POINTER(int_pointer)),
        ctypes.cast(output, ctypes.POINTER(ctypes.c_int8)),
    )


def embedding_struct(like: Any, rows: int, pos: int) -> Any:
    """Return a ``llama_batch`` of embeddings instead of tokens, with all but their positions as another one has it.

    The arguments are addresses. With M-RoPE there are four positions of each: first the first of all, and so on.
    """
    struct = LOW.llama_batch()
    ctypes.pointer(struct)[0] = like
    struct.token = None
    struct.embd = ctypes.cast(rows, ctypes.POINTER(F32))
    struct.pos = ctypes.cast(pos, ctypes.POINTER(ctypes.c_int32))
    return struct


#: Whether tokens see only what is before them; off for images whose parts see each other.
set_causal_attn: Callable[[int, bool], None] = bind(SHORT, "llama_set_causal_attn", None, PTR, BOOL)


def decode(context: int, batch: Any, n_tokens: int) -> int:
    """Compute a batch. 0: done, 1: no KV room (nothing changed), 2: aborted, -1: bad batch, below: broken."""
    batch.n_tokens = n_tokens
    code: int = _decode(context, batch)
    return code


_set_adapters = bind(SHORT, "llama_set_adapters_lora", I32, PTR, ctypes.POINTER(PTR), SIZE, ctypes.POINTER(F32))


def set_adapters(context: int, adapters: Sequence[tuple[int, float]]) -> bool:
    """Compute the next batches with these ``(adapter, scale)`` and no others. Return whether llama.cpp took them."""
    count = len(adapters)
    handles = (PTR * count)(*(adapter for adapter, _ in adapters))
    scales = (F32 * count)(*(scale for _, scale in adapters))
    return bool(_set_adapters(context, handles, count, scales) == 0)
