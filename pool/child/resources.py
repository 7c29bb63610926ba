"""What llama.cpp holds for one load: the model, its adapters and projector, and the context.

Apart from :mod:`~llamaherd.pool.child.loaded`, because making these is llama.cpp's own work, beside which the rest is
imported.
"""

from contextlib import ExitStack
from typing import TYPE_CHECKING, Final

import msgspec

from llamaherd.pool.child import llama_backend
from llamaherd.pool.child.adapters import Adapters
from llamaherd.pool.child.context import Context
from llamaherd.pool.child.heap import Reserve
from llamaherd.pool.child.model import Model
from llamaherd.transport.messages import EngineOptions, Load

if TYPE_CHECKING:
    from llamaherd.pool.child.projector import Projector

__all__ = ["Resources"]

_EMBEDS_ONLY: Final = "its option embedding (--embedding) is set, so it embeds and nothing else"


class Resources:
    """Takes the model once it is made: :meth:`free` frees it with the rest. If it cannot be made, the model stays.

    Attributes:
        threads: How many compute steps, and prompts.
        abort: The flag that ends a decode.
        unfit: Why nothing can be generated; empty when it can.

    Raises:
        EngineError: an adapter or the context does not fit, or the model does not compute.
    """

    def __init__(
        self,
        command: Load,
        model: Model,
        threads: tuple[int, int],
        abort: llama_backend.AbortFlag,
        reserve: Reserve | None = None,
    ) -> None:
        options = command.options
        self.model: Final = model
        self.threads: Final = threads
        self.abort: Final = abort
        with ExitStack() as undo:  # runs backwards: llama.cpp wants contexts freed before their model
            self.adapters: Final = Adapters(model, options.adapters)
            undo.callback(self.adapters.free)
            self.projector: Final = _projector(command, model, threads)
            if self.projector is not None:
                undo.callback(self.projector.free)
            self.context: Final = self._make_context(options, reserve or Reserve(0))
            undo.callback(self.context.free)
            self.unfit: Final = self.context.unfit or (_EMBEDS_ONLY if options.embedding else "")
            if not self.unfit:
                self.context.warm_up(max(model.vocab.bos, 0))
            self._undo: Final = undo.pop_all()

    def _make_context(self, options: EngineOptions, reserve: Reserve) -> Context:
        options = _least(options) if options.embedding else options
        with reserve.lent():
            return Context(self.model, options, self.threads, self.abort, readied=reserve.ready)

    def free(self) -> None:
        """Release everything. Idempotent."""
        self._undo.close()
        self.model.free()


def _projector(command: Load, model: Model, threads: tuple[int, int]) -> "Projector | None":
    if not command.mmproj:
        return None
    from llamaherd.pool.child.projector import Projector  # brings a library that most models have no use for

    return Projector(command.mmproj, model, command.options, threads[1])


def _least(options: EngineOptions) -> EngineOptions:
    """Return the options of a context that nobody will generate with."""
    return msgspec.structs.replace(options, n_ctx=1, n_parallel=1, n_cached=0, n_ubatch=1, n_batch=1)
