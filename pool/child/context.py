"""One llama.cpp context: its creation from options, its batch, its sequences and the flag that aborts a decode."""

from typing import Final

import numpy as np
import numpy.typing as npt

from llamaherd.pool.child import bindings
from llamaherd.pool.child.batch import Batch
from llamaherd.pool.child.bindings import AbortFlag, ContextSettings
from llamaherd.pool.child.engine import EngineError
from llamaherd.pool.child.fit import check_memory
from llamaherd.pool.child.model import Model
from llamaherd.pool.machine import available_memory
from llamaherd.transport.messages import EngineOptions

__all__ = ["Context", "settings_for"]

_FLASH_ATTENTION: Final = {"auto": -1, "off": 0, "on": 1}
#: llama.cpp allocates cells in steps of this many.
_CELL_STEP: Final = 256
#: llama.cpp's LLAMA_MAX_SEQ.
_MOST_SEQUENCES: Final = 256
_MOST_CELLS: Final = 2**31 - _CELL_STEP


def settings_for(model: Model, options: EngineOptions, threads: tuple[int, int]) -> ContextSettings:
    """Return the settings of a context; ``threads`` are those for steps and for prompts.

    Raises:
        EngineError: an option is out of its range.
    """
    cells = options.n_ctx or model.n_ctx_train
    for name, value, low, high in (
        ("n_ctx", cells, 1, _MOST_CELLS),
        ("n_parallel", options.n_parallel, 1, _MOST_SEQUENCES),
        ("n_cached", options.n_cached, -1, _MOST_SEQUENCES - options.n_parallel),
        ("n_batch", options.n_batch, 1, _MOST_CELLS),
        ("n_ubatch", options.n_ubatch, 1, _MOST_CELLS),
        ("n_threads", threads[0], 1, bindings.MOST_THREADS),
        ("n_threads_batch", threads[1], 1, bindings.MOST_THREADS),
    ):
        if not low <= value <= high:
            raise EngineError(f"{name} is {value}; it must be {low} to {high}", code="invalid_option")
    cells = -(-cells // _CELL_STEP) * _CELL_STEP
    # Every slot needs its row in each step.
    n_batch = min(max(options.n_batch, options.n_parallel), cells)
    n_seq_max = options.n_parallel + _cached_sequences(model, options)
    return ContextSettings(
        n_ctx=cells,
        n_batch=n_batch,
        n_ubatch=min(options.n_ubatch, n_batch),
        n_seq_max=n_seq_max,
        # The default reserves logits for a whole batch: 100 MB and more with a large vocabulary. llama.cpp wants one
        # for every sequence, and aborts the process if there are fewer.
        n_outputs_max=n_seq_max,
        n_threads=threads[0],
        n_threads_batch=threads[1],
        flash_attn_type=_FLASH_ATTENTION[options.flash_attn],
        swa_full=options.swa_full,
    )


def _cached_sequences(model: Model, options: EngineOptions) -> int:
    if model.unfit:
        return 0
    if options.n_cached >= 0:
        return options.n_cached
    per_slot = 1 if model.recurrent else 3
    return min(per_slot * options.n_parallel, _MOST_SEQUENCES - options.n_parallel)


class Context:
    """The KV cache, the compute buffers and the one batch of a model. Free it before the model.

    Attributes:
        n_ctx: Cells of the cache, shared by all sequences.
        n_ctx_seq: Most tokens of one sequence.
        n_sequences: Sequence ids, from 0 on.
        unfit: Why this model cannot continue a text; empty when it can.

    Raises:
        EngineError: it does not fit, or llama.cpp refused, with its reason.
    """

    def __init__(self, model: Model, options: EngineOptions, threads: tuple[int, int], abort: AbortFlag) -> None:
        settings = settings_for(model, options, threads)
        # The cache lies on the device that has the layers; a GPU's allocator says no by itself.
        on_device = options.n_gpu_layers != 0 and bindings.supports_gpu()
        check_memory(model, settings, None if on_device else available_memory())
        bindings.forget_log()
        handle = bindings.context_create(model.handle, settings, abort)
        if handle is None:
            reason = bindings.error_lines() or "llama.cpp gave no reason"
            raise EngineError(f"{model.path}: no context of {settings.n_ctx} tokens: {reason}")
        self.handle: Final = handle
        self._abort: Final = abort
        self._memory: Final = bindings.context_memory(handle)
        # llama.cpp calls BERT a decoder too, but gives it no memory.
        self.unfit: Final = model.unfit or ("" if self._memory else "it keeps no context (an embedding model)")
        self._freed = False
        self._n_vocab: Final = model.vocab.size
        self.n_ctx: Final = bindings.n_ctx(handle)
        self.n_ctx_seq: Final = bindings.n_ctx_seq(handle)
        self.n_ubatch: Final = settings.n_ubatch
        self.n_sequences: Final = settings.n_seq_max
        self.batch: Final = Batch(bindings.n_batch(handle))

    def warm_up(self, token: int) -> None:
        """Compute one token and forget it, so that the first request does not pay for lazy set-up.

        Raises:
            EngineError: the model does not compute.
        """
        self.batch.clear()
        self.batch.add(0, 0, token)
        code = self.batch.decode(self.handle)
        if self._memory is not None:
            bindings.memory_clear(self._memory, True)
        if self._abort:
            raise EngineError("loading was abandoned", code="load_abandoned")
        if code != 0:
            reason = bindings.error_lines() or "llama.cpp gave no reason"
            raise EngineError(f"the model cannot compute a token (llama_decode returned {code}): {reason}")

    def logits(self, n_outputs: int) -> npt.NDArray[np.float32]:
        """Return a view of the last batch's logits, one row per output in batch order; valid until the next decode."""
        address = bindings.logits(self.handle)
        if address is None:
            raise EngineError("llama.cpp has no logits for a batch that asked for them")
        return bindings.float_rows(address, n_outputs, self._n_vocab)

    def forget(self, sequence: int) -> None:
        """Drop everything that a sequence holds in the cache."""
        if self._memory is not None:
            bindings.memory_seq_rm(self._memory, sequence, -1, -1)

    def truncate(self, sequence: int, length: int) -> bool:
        """Keep the first ``length`` tokens of a sequence; False when this kind of model cannot (nothing changed)."""
        return self._memory is not None and bindings.memory_seq_rm(self._memory, sequence, length, -1)

    def share(self, source: int, target: int, length: int) -> None:
        """Let an empty sequence begin with the first ``length`` tokens of another, whose cells then serve both.

        Whether the model allows that for this length is the caller's to know; see :class:`prefix.Rules`.
        """
        if self._memory is not None:
            bindings.memory_seq_cp(self._memory, source, target, 0, length)

    def first(self, sequence: int) -> int:
        """Return the lowest position that a sequence still has in every layer, -1 for an empty one."""
        return -1 if self._memory is None else bindings.memory_seq_pos_min(self._memory, sequence)

    def length(self, sequence: int) -> int:
        """Return how many tokens of a sequence are in the cache."""
        return 0 if self._memory is None else bindings.memory_seq_pos_max(self._memory, sequence) + 1

    def set_threads(self, n: int, batch: int) -> None:
        """Use so many threads from the next decode on."""
        bindings.set_n_threads(self.handle, n, batch)

    def free(self) -> None:
        """Release the memory. Idempotent."""
        if not self._freed:
            self._freed = True
            bindings.context_free(self.handle)
