"""Whether a context fits the memory, asked before it is allocated.

llama.cpp fills the KV cache with zeros, so a context beyond the free memory ends in the kernel's OOM killer and not in
an error. A quick upper estimate from the model's shape passes nearly every load; only a close call pays for llama.cpp's
own figures from a dry run, which takes about as long as loading the model.
"""

import re
from typing import Final

from llamaherd.pool.child import llama_backend, llama_context, llama_log, llama_model
from llamaherd.pool.child.engine import OUT_OF_MEMORY, EngineError
from llamaherd.pool.child.llama_context import ContextSettings
from llamaherd.pool.child.model import Model

__all__ = ["check_memory", "estimate"]

#: Head room over the quick estimate, which knows neither varying layer shapes nor compute buffers.
_CAUTION: Final = 2
#: What llama.cpp notes about each cell: its position and a bit for each of 256 sequences.
_CELL_BYTES: Final = 64
_TABLE_SHARE: Final = 8
_BUFFER = re.compile(r"(?:KV buffer|RS buffer|compute buffer|output buffer) size =\s*([0-9.]+) MiB")
_MIB: Final = 1024 * 1024


def check_memory(model: Model, settings: ContextSettings, available: int | None) -> None:
    """Raise EngineError (``out_of_memory``) when the context would not fit, with both figures and what to change.

    ``available`` are the free bytes; None means that nobody knows, and everything passes.
    """
    if available is None:
        return
    needed = estimate(model, settings)
    # The quick estimate knows nothing of running states.
    if needed * _CAUTION < available and not model.recurrent:
        return
    # The dry run allocates no cache, but the table of its cells.
    if settings.n_ctx * _CELL_BYTES * _TABLE_SHARE < available:
        needed = _dry_run(model, settings)
    if needed >= available:
        raise EngineError(
            f"{model.path}: a context of {settings.n_ctx} tokens needs {needed // _MIB} MiB "
            f"and {available // _MIB} MiB are free; set a smaller n_ctx",
            code=OUT_OF_MEMORY,
        )


def estimate(model: Model, settings: ContextSettings) -> int:
    """Return the bytes of a context from the model's shape, rather too many than too few."""
    handle = model.handle
    heads = llama_model.n_head_kv(handle) or llama_model.n_head(handle) or 1
    sizes = {number: size / block for number, block, size in llama_context.CACHE_TYPES.values()}
    per_head = model.key_length * sizes[settings.type_k] + model.value_length * sizes[settings.type_v]
    cache = int(settings.n_ctx * llama_model.n_layer(handle) * heads * per_head)
    outputs = settings.n_seq_max * model.vocab.size * 4
    return cache + settings.n_ctx * _CELL_BYTES + outputs + settings.n_ubatch * model.n_embd * 4 * 16


def _dry_run(model: Model, settings: ContextSettings) -> int:
    """Return the bytes that llama.cpp would allocate for the context. Raises EngineError when it would refuse."""
    llama_log.forget_log()
    dry = llama_model.load(
        model.path.encode("utf-8", "surrogateescape"),
        n_gpu_layers=0,
        use_mmap=False,
        no_alloc=True,
        progress=lambda _value: True,
    )
    context = None if dry is None else llama_context.create(dry, settings, llama_backend.AbortFlag())
    if context is not None:
        llama_context.free(context)
    if dry is not None:
        llama_model.free(dry)
    if context is None:
        reason = llama_log.error_lines() or "llama.cpp gave no reason"
        raise EngineError(f"{model.path}: no context of {settings.n_ctx} tokens: {reason}")
    sizes = [float(size) for line in llama_log.info_lines() for size in _BUFFER.findall(line)]
    return int(sum(sizes) * _MIB) + settings.n_ctx * _CELL_BYTES
