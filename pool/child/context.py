"""One llama.cpp context: its creation from options, its batch, its sequences and the flag that aborts a decode."""

from time import perf_counter, process_time
from typing import Final

import numpy as np
import numpy.typing as npt

from llamaherd.pool.child import llama_backend, llama_context, llama_log, llama_model
from llamaherd.pool.child.barriers import Barriers, Contention
from llamaherd.pool.child.batch import Batch, Folds, position_of
from llamaherd.pool.child.devices import on_device
from llamaherd.pool.child.engine import EngineError
from llamaherd.pool.child.fit import check_memory
from llamaherd.pool.child.llama_backend import AbortFlag
from llamaherd.pool.child.llama_context import ContextSettings
from llamaherd.pool.child.model import Model
from llamaherd.pool.child.refusal import refusal
from llamaherd.pool.child.tiles import attended
from llamaherd.pool.machine import available_memory
from llamaherd.transport.messages import EngineOptions

__all__ = ["Context", "settings_for"]

_FLASH_ATTENTION: Final = {"auto": -1, "off": 0, "on": 1}
#: What ggml's attention on CPUs takes to pass over a cell, per head and layer, in seconds: measured with two threads.
_CELL_SECONDS: Final = 1e-9
_ROPE_SCALING: Final = {"": -1, "none": 0, "linear": 1, "yarn": 2}
_ROPE_LIMITS: Final = {
    "rope_freq_base": (0.0, 1e12),
    "rope_freq_scale": (0.0, 1e3),
    "yarn_ext_factor": (-1.0, 1e3),
    "yarn_attn_factor": (-1.0, 1e3),
    "yarn_beta_slow": (-1.0, 1e6),
    "yarn_beta_fast": (-1.0, 1e6),
}
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
        ("n_threads", threads[0], 1, llama_backend.MOST_THREADS),
        ("n_threads_batch", threads[1], 1, llama_backend.MOST_THREADS),
        ("yarn_orig_ctx", options.yarn_orig_ctx, 0, _MOST_CELLS),
        ("cache_ram", options.cache_ram, -1, _MOST_CELLS),
        ("n_keep", options.n_keep, -1, _MOST_CELLS),
        *((name, getattr(options, name), low, high) for name, (low, high) in _ROPE_LIMITS.items()),
    ):
        if not low <= value <= high:
            raise EngineError(f"{name} is {value}; it must be {low} to {high}", code="invalid_option")
    _check_cache_types(model, options)
    n_seq_max = options.n_parallel + _cached_sequences(model, options)
    parts = 1 if options.kv_unified else n_seq_max
    cells = -(-cells // (_CELL_STEP * parts)) * _CELL_STEP * parts
    # Every slot needs its row in each step.
    n_batch = min(max(options.n_batch, options.n_parallel), cells)
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
        kv_unified=options.kv_unified,
        swa_full=options.swa_full,
        type_k=llama_context.CACHE_TYPES[options.cache_type_k][0],
        type_v=llama_context.CACHE_TYPES[options.cache_type_v][0],
        rope_scaling_type=_ROPE_SCALING[options.rope_scaling],
        yarn_orig_ctx=options.yarn_orig_ctx,
        **{name: getattr(options, name) for name in _ROPE_LIMITS},
    )


def _check_cache_types(model: Model, options: EngineOptions) -> None:
    """Raise EngineError for types that this model's cache cannot have: llama.cpp refuses some and aborts for others."""
    if llama_context.CACHE_TYPES[options.cache_type_v][1] > 1 and options.flash_attn == "off":
        raise EngineError(
            f"cache_type_v is {options.cache_type_v}, and quantised values need flash attention; "
            "set flash_attn to auto or on, or cache_type_v to f16",
            code="invalid_option",
        )
    for name, width in (("cache_type_k", model.key_length), ("cache_type_v", model.value_length)):
        kind = getattr(options, name)
        block = llama_context.CACHE_TYPES[kind][1]
        if width % block:
            raise EngineError(
                f"{name} is {kind}, which packs {block} elements, and the attention heads of this model have {width}; "
                "set it to f16",
                code="invalid_option",
            )


def _cached_sequences(model: Model, options: EngineOptions) -> int:
    if model.unfit:
        return 0
    if options.n_cached >= 0:
        return options.n_cached
    if not options.kv_unified:
        return 0
    per_slot = 1 if model.recurrent else 3
    return min(per_slot * options.n_parallel, _MOST_SEQUENCES - options.n_parallel)


def _heads(model: Model) -> int:
    return llama_model.n_layer(model.handle) * llama_model.n_head(model.handle)


def _tiled_heads(model: Model, options: EngineOptions) -> int:
    """Return the heads of an attention that ggml computes in tiles on the CPU; 0 where it does otherwise."""
    plain = options.cache_type_k == options.cache_type_v and options.cache_type_k in ("f16", "f32")
    tiled = plain and options.flash_attn != "off" and not on_device(options)
    return llama_model.n_head(model.handle) if tiled else 0


class Context:
    """The KV cache, the compute buffers and the one batch of a model. Free it before the model.

    Args:
        threads: How many compute steps, and prompts.
        readied: Bytes for the cache that this process holds already.

    Attributes:
        n_ctx: Cells of the cache.
        n_cells: Tokens that its sequences may have together: as many as there are cells, or, where a sequence takes the
            same room however long it is, as many as all of them may have.
        unified: Whether any sequence may use any cell, and several may share some.
        n_ctx_seq: Most tokens of one sequence.
        cell_seconds: What a token costs for each cell of the cache in use that is not its sequence's; 0 where that is
            not known.
        attention: Multiplications for each token that a token looks at, as a share of those with the model's weights,
            if all of these and all layers' attention take part.
        n_sequences: Sequence ids, from 0 on.
        unfit: Why this model cannot continue a text; empty when it can.

    Raises:
        EngineError: it does not fit, or llama.cpp refused, with its reason.
    """

    def __init__(
        self, model: Model, options: EngineOptions, threads: tuple[int, int], abort: AbortFlag, *, readied: int = 0
    ) -> None:
        settings = settings_for(model, options, threads)
        # The cache lies on the device that has the layers; a GPU's allocator says no by itself.
        free = None if on_device(options) else available_memory()
        check_memory(model, settings, None if free is None else free + readied)
        llama_log.forget_log()
        handle = llama_context.create(model.handle, settings, abort)
        if handle is None:
            why = refusal("load_failed")
            remedy = why.remedy("a smaller n_ctx or fewer n_gpu_layers")
            raise EngineError(
                f"{model.path}: no context of {settings.n_ctx} tokens: {why.reason}{remedy}", code=why.code
            )
        self.handle: Final = handle
        self._abort: Final = abort
        self._memory: Final = llama_context.memory(handle)
        # llama.cpp calls BERT a decoder too, but gives it no memory.
        self.unfit: Final = model.unfit or ("" if self._memory else "it keeps no context (an embedding model)")
        self._freed = False
        self._n_vocab: Final = model.vocab.size
        self._folds: Final[dict[int, Folds]] = {}
        #: The view of the last logits, and where they were and how many rows.
        self._logits: npt.NDArray[np.float32] = np.empty((0, 0), np.float32)
        self._viewed = (0, 0)
        self._threads = threads
        self._contention: Final = Contention()
        self._computing = self._sharing = False
        self._barriers: Final = None if on_device(options) else Barriers()  # waiting for a GPU looks like contention
        self.n_ctx: Final = llama_context.n_ctx(handle)
        self.n_ctx_seq: Final = llama_context.n_ctx_seq(handle)
        self.n_ubatch: Final = settings.n_ubatch
        self.unified: Final = settings.kv_unified
        self.cell_seconds = 0.0 if on_device(options) else _CELL_SECONDS * _heads(model)
        self.attention: Final = _heads(model) * (model.key_length + model.value_length) / max(1, model.n_params)
        self._heads: Final = _tiled_heads(model, options)
        self.n_sequences: Final = settings.n_seq_max
        self.n_cells: Final = self.n_ctx_seq * self.n_sequences if model.celless else self.n_ctx
        self.batch: Final = Batch(llama_context.n_batch(handle))

    @property
    def has_memory(self) -> bool:
        """Whether it has a cache; an encoder's has none."""
        return self._memory is not None

    def warm_up(self, token: int) -> None:
        """Compute one token and forget it, so that the first request does not pay for lazy set-up.

        Raises:
            EngineError: the model does not compute.
        """
        self.batch.clear()
        self.batch.add(0, 0, token)
        code = self.batch.decode(self.handle)
        if self._memory is not None:
            llama_context.memory_clear(self._memory, True)
        if self._abort:
            raise EngineError("loading was abandoned", code="load_abandoned")
        if code != 0:
            why = refusal("load_failed")
            raise EngineError(
                f"the model cannot compute a token (llama_decode returned {code}): {why.reason}", code=why.code
            )

    def decode(self) -> int:
        """Compute the batch; the codes are those of :meth:`Batch.decode`."""
        barriers = self._barriers
        if barriers is None or not barriers.adjustable:
            return self.batch.decode(self.handle)
        began, had = perf_counter(), process_time()
        self._computing = True
        code = self.batch.decode(self.handle)
        self._computing = False
        now, threads = perf_counter(), self._threads[self.batch.n_rows > 1]
        if self._sharing:
            self._sharing = False  # what was lost was lost to another model, which has cores of its own from now on
        else:
            self._contention.note(now, now - began, process_time() - had, threads)
        barriers.set_short(self._contention.short)
        return code

    def share_cores(self) -> None:
        """From any thread: another model needs cores that the running step has; its threads now let that run. Where
        none runs, the next one will have its own threads anyway.
        """
        if self._barriers is not None and self._computing:
            self._sharing = True
            self._barriers.set_short(True)

    def attended(self, rows: int) -> float:
        """Return for how many rows in full tiles the attention of a batch takes the time, at least ``rows``."""
        if not self._heads:
            return float(rows)
        whole, rest = divmod(rows, self.n_ubatch)
        threads = self._threads[1]
        return whole * attended(self.n_ubatch, self._heads, threads) + attended(rest, self._heads, threads)

    def logits(self, n_outputs: int) -> npt.NDArray[np.float32]:
        """Return a view of the last batch's logits, one row per output in batch order; valid until the next decode."""
        address = llama_context.logits(self.handle)
        if address is None:
            raise EngineError("llama.cpp has no logits for a batch that asked for them")
        if self._viewed != (address, n_outputs):
            self._logits = llama_context.float_rows(address, n_outputs, self._n_vocab)
            self._viewed = address, n_outputs
        return self._logits

    def forget(self, sequence: int) -> None:
        """Drop everything that a sequence holds in the cache."""
        if self._memory is not None:
            llama_context.memory_seq_rm(self._memory, sequence, -1, -1)

    def truncate(self, sequence: int, length: int) -> bool:
        """Keep the first ``length`` tokens of a sequence; False when this kind of model cannot (nothing changed)."""
        place = position_of(self._folds.get(sequence, ()), length)
        return self._memory is not None and llama_context.memory_seq_rm(self._memory, sequence, place, -1)

    def fold(self, sequence: int, folds: Folds) -> None:
        """Count the positions of a sequence with these folds from now on."""
        if folds:
            self._folds[sequence] = folds
        else:
            self._folds.pop(sequence, None)

    def share(self, source: int, target: int, length: int, start: int = 0) -> None:
        """Let a sequence of ``start`` tokens hold the tokens from there to ``length`` of another, whose cells then
        serve both. Only where the cache is unified: otherwise llama.cpp aborts the process, or copies later than it
        says; see :meth:`copy`.

        Whether the model allows that for this length is the caller's to know; see :class:`prefix.Rules`.
        """
        if self._memory is not None:
            folds = self._folds.get(target, ())
            first, end = position_of(folds, start), position_of(folds, length)
            llama_context.memory_seq_cp(self._memory, source, target, first, end)

    def copy(self, source: int, target: int, length: int) -> bool:
        """Let an empty sequence hold copies of the first ``length`` tokens of another; False leaves it empty."""
        data = self.save(source)
        if data is None or not self.load(target, data) or not self.truncate(target, length):
            self.forget(target)
            return False
        return True

    def exchange(self, source: int, target: int, length: int) -> bool:
        """Let an empty sequence hold what another one needs to go on, and that one its first ``length`` tokens alone:
        they have changed places. False leaves both as they were.

        That is how a beginning is had which no copy has, since the window of the last token does not see it.
        """
        data = self.save(source)
        if data is None or not self.load(target, data):
            return False
        if not self.truncate(source, length):
            self.forget(target)
            return False
        folds = self._folds.get(source, ())
        self.fold(source, self._folds.get(target, ()))
        self.fold(target, folds)
        return True

    @property
    def can_shift(self) -> bool:
        """Whether tokens can be moved to earlier positions."""
        return self._memory is not None and llama_context.memory_can_shift(self._memory)

    def cut(self, sequence: int, start: int, end: int) -> None:
        """Take the tokens from ``start`` to ``end`` out of a sequence and move up what follows.

        Only where it :attr:`can_shift`, and where nobody else holds what follows: a cell has one position for all.
        """
        if self._memory is not None:
            llama_context.memory_seq_rm(self._memory, sequence, start, end)
            llama_context.memory_seq_add(self._memory, sequence, end, -1, start - end)

    def state_size(self, sequence: int) -> int:
        """Return the bytes that :meth:`save` returns."""
        return llama_context.state_seq_get_size(self.handle, sequence)

    def save(self, sequence: int) -> npt.NDArray[np.uint8] | None:
        """Return a copy of everything that a sequence has in the cache; None if there is no memory for it."""
        try:
            data = np.empty(self.state_size(sequence), np.uint8)
        except MemoryError:
            return None
        written = llama_context.state_seq_get_data(self.handle, data.ctypes.data, data.nbytes, sequence)
        return data if 0 < written == data.nbytes else None

    def load(self, sequence: int, data: npt.NDArray[np.uint8]) -> bool:
        """Let an empty sequence hold what :meth:`save` returned; False leaves it empty.

        llama.cpp checks sizes and types, not values: only pass what came from a context of the same settings. Its
        error lines are then those of this call; see :func:`~llamaherd.pool.child.refusal.refusal`.
        """
        llama_log.forget_log()
        return llama_context.state_seq_set_data(self.handle, data.ctypes.data, data.nbytes, sequence) == data.nbytes

    def first(self, sequence: int) -> int:
        """Return the lowest position that a sequence still has in every layer, -1 for an empty one."""
        return -1 if self._memory is None else llama_context.memory_seq_pos_min(self._memory, sequence)

    def length(self, sequence: int) -> int:
        """Return how many tokens of a sequence are in the cache."""
        return 0 if self._memory is None else llama_context.memory_seq_pos_max(self._memory, sequence) + 1

    def set_causal(self, causal: bool) -> None:
        """Whether the tokens of the next batches see only what is before them."""
        llama_context.set_causal_attn(self.handle, causal)

    def set_threads(self, n: int, batch: int) -> None:
        """Use so many threads from the next decode on."""
        self._threads = (n, batch)
        llama_context.set_n_threads(self.handle, n, batch)

    def free(self) -> None:
        """Release the memory. Idempotent."""
        if not self._freed:
            self._freed = True
            if self._barriers is not None:
                self._barriers.close()
            llama_context.free(self.handle)
