"""The llama.cpp context that embeds, beside the one that generates.

One context could do both, as llama-server's does, but would pay for it all the time: its pooling is fixed when it is
made, every token of an embedding is an output, and room for a batch of outputs is reserved ahead (100 MB with a
vocabulary of 50,000). A second one is made when the first request for embeddings comes, has the cells that the inputs
need, and never disturbs the cache of the generations.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt

from llamaherd.pool.child import llama_context, llama_log, llama_model
from llamaherd.pool.child.adapters import Adapters, AdapterSet
from llamaherd.pool.child.batch import Batch
from llamaherd.pool.child.context import settings_for
from llamaherd.pool.child.devices import on_device
from llamaherd.pool.child.engine import EngineError
from llamaherd.pool.child.fit import check_memory
from llamaherd.pool.child.llama_backend import AbortFlag
from llamaherd.pool.child.model import Model
from llamaherd.pool.child.refusal import refusal
from llamaherd.pool.machine import available_memory
from llamaherd.transport.messages import EngineOptions

__all__ = ["Chunk", "EmbedContext", "Shape", "shape_of"]

#: Inputs that one batch may hold, each a sequence of its own.
_MOST_SEQUENCES: Final = 64
#: llama.cpp allocates cells in steps of this many.
_CELL_STEP: Final = 256
#: llama.cpp's numbers.
_POOLINGS: Final = {"none": 0, "mean": 1, "cls": 2, "last": 3, "rank": 4}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """How a model embeds.

    Attributes:
        pooling: ``none``, ``mean``, ``cls``, ``last`` or ``rank``.
        splittable: Whether an input may be computed in several steps: its tokens look back only, at a cache.
        last_only: Whether only an input's last token needs its output.
        width: Components of an embedding.
        n_ubatch: Most tokens in one step.
        n_sequences: Most inputs on their way together.
        longest: Most tokens of one input.
    """

    pooling: str
    splittable: bool
    last_only: bool
    width: int
    n_ubatch: int
    n_sequences: int
    longest: int

    @property
    def n_outputs(self) -> int:
        """Most outputs of one step. Logits come with every output, so fewer are much memory saved."""
        return self.n_sequences if self.last_only else self.n_ubatch


def shape_of(model: Model, options: EngineOptions, *, has_memory: bool) -> Shape:
    """Return how a model embeds; ``has_memory`` says whether its contexts have a cache."""
    arch = llama_model.meta(model.handle, "general.architecture")
    causal = llama_model.meta(model.handle, f"{arch}.attention.causal") != "false"
    own = llama_model.meta(model.handle, f"{arch}.pooling_type")
    numbers = {str(number): name for name, number in _POOLINGS.items()}
    pooling = options.pooling or numbers.get(own, "none")
    splittable = has_memory and causal
    cells = options.n_ctx or model.n_ctx_train
    n_ubatch = min(options.n_ubatch, cells if splittable else max(cells, model.n_ctx_train))
    # Each sequence of a recurrent model costs memory of its own.
    sequences = options.n_parallel if model.recurrent else _MOST_SEQUENCES
    return Shape(
        pooling=pooling,
        splittable=splittable,
        last_only=splittable and pooling in ("last", "rank"),
        width=llama_model.n_labels(model.handle) if pooling == "rank" else llama_model.n_embd_out(model.handle),
        n_ubatch=n_ubatch,
        n_sequences=max(1, min(sequences, n_ubatch)),
        # Positions beyond an encoder's table abort the process, and so does an input of more than one physical batch.
        longest=cells if splittable else min(n_ubatch, model.n_ctx_train),
    )


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive tokens of one sequence; ``start`` is the position of the first."""

    sequence: int
    start: int
    tokens: "array[int]"


class EmbedContext:
    """A context with room for ``cells`` tokens. Free it before the model.

    Raises:
        EngineError: it does not fit, or llama.cpp refused, with its reason.
    """

    def __init__(
        self,
        model: Model,
        options: EngineOptions,
        shape: Shape,
        cells: int,
        threads: tuple[int, int],
        abort: AbortFlag,
    ) -> None:
        self.cells: Final = -(-max(cells, shape.n_ubatch) // _CELL_STEP) * _CELL_STEP
        settings = msgspec.structs.replace(
            settings_for(model, options, threads),
            n_ctx=self.cells,
            n_batch=shape.n_ubatch,
            n_ubatch=shape.n_ubatch,
            n_seq_max=shape.n_sequences,
            n_outputs_max=shape.n_outputs,
            n_threads=threads[1],
            kv_unified=True,  # divided among so many inputs, a part would hold none of any length
            embeddings=True,
            pooling_type=_POOLINGS[shape.pooling],
        )
        free = None if on_device(options) else available_memory()
        # Twice: as llama.cpp computes the logits of all outputs, and as it hands them out.
        outputs = 2 * shape.n_outputs * (model.vocab.size + shape.width) * np.dtype(np.float32).itemsize
        check_memory(model, settings, None if free is None else max(0, free - outputs))
        llama_log.forget_log()
        handle = llama_context.create(model.handle, settings, abort)
        if handle is None:
            why = refusal("load_failed")
            raise EngineError(
                f"{model.path}: no context of {settings.n_ctx} tokens for embeddings: {why.reason}", code=why.code
            )
        self._handle: Final = handle
        #: What :meth:`use` was given last.
        self.adapters: AdapterSet = ()
        self._memory: Final = llama_context.memory(handle)
        self._shape: Final = shape
        self._batch: Final = Batch(llama_context.n_batch(handle))

    def use(self, adapters: AdapterSet, known: Adapters) -> None:
        """Have the next batches computed with a set of LoRA adapters."""
        if adapters != self.adapters:
            known.apply_beside(self._handle, adapters)
            self.adapters = adapters

    def compute(self, chunks: Sequence[Chunk], *, outputs: bool) -> int:
        """Compute chunks, with the embeddings of all their tokens or of none. The codes are those of a decode."""
        self._batch.clear()
        for chunk in chunks:
            self._batch.extend(chunk.sequence, chunk.start, chunk.tokens)
        if outputs:
            self._batch.want_all()
        llama_context.set_embeddings(self._handle, outputs)
        return self._batch.decode(self._handle)

    def rows(self) -> npt.NDArray[np.float32] | None:
        """Return the last batch's embeddings, one row per token in batch order; valid until the next one."""
        address = llama_context.embeddings(self._handle)
        if address is None:
            return None
        return llama_context.float_rows(address, self._batch.n_rows, self._shape.width)

    def pooled(self, sequence: int) -> npt.NDArray[np.float32] | None:
        """Return what a sequence's tokens of the last batch were pooled to; valid until the next one."""
        address = llama_context.embeddings_of(self._handle, sequence)
        return None if address is None else llama_context.float_rows(address, 1, self._shape.width)[0]

    def forget(self, sequence: int) -> None:
        """Drop a sequence. An encoder's context has nothing to drop."""
        if self._memory is not None:
            llama_context.memory_seq_rm(self._memory, sequence, -1, -1)

    def set_threads(self, threads: int) -> None:
        """Use so many threads from the next batch on."""
        llama_context.set_n_threads(self._handle, threads, threads)

    def free(self) -> None:
        """Release the memory. Call it once."""
        llama_context.free(self._handle)
