"""The llama.cpp engine: one model, one context, many requests in one batch."""

import gc
import importlib
import sys
import threading
from collections.abc import Generator
from collections.abc import Sequence as Ordered
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Final

from llamaherd.pool.child import llama_backend, llama_log
from llamaherd.pool.child.devices import on_device
from llamaherd.pool.child.engine import EngineError, ModelInfo, Progress, RequestError
from llamaherd.pool.child.errand import Errand
from llamaherd.pool.child.heap import Reserve, trim
from llamaherd.pool.child.media import has_media
from llamaherd.pool.child.model import Model, check_file
from llamaherd.pool.machine import usable_cores
from llamaherd.transport.messages import (
    ChildMessage,
    Detokenize,
    Embed,
    EngineLoad,
    EngineOptions,
    Generate,
    Load,
    Rerank,
    SlotState,
    Template,
    Tokenize,
)
from llamaherd.transport.messages import Sequence as SequenceCommand

if TYPE_CHECKING:
    from llamaherd.pool.child.batcher import Figures
    from llamaherd.pool.child.chat import Chats
    from llamaherd.pool.child.loaded import Loaded

__all__ = ["LlamaEngine"]

#: The modules that take long to import, numpy with the first and Jinja with the second, in the order of their use.
_HEAVY: Final = ("llamaherd.pool.child.resources", "llamaherd.pool.child.loaded")
#: Seconds after which a thread that imports lets llama.cpp's log and progress have the GIL: each tensor asks for it.
_LOAD_SWITCH_SECONDS: Final = 1e-5

#: Least progress between two calls of the progress function.
_PROGRESS_STEP: Final = 0.01


class LlamaEngine:
    """See :class:`llamaherd.pool.child.engine.Engine` for the contract.

    An interrupted engine is at its end: a load is refused, a step returns without tokens.
    """

    def __init__(self) -> None:
        self._abort: Final = llama_backend.AbortFlag()
        self._threads: tuple[int, int] | None = None
        self._loaded: Loaded | None = None
        # Beside what follows, which is mostly llama.cpp's own work without the interpreter's lock.
        threading.Thread(target=_import_heavy, name="imports", daemon=True).start()
        llama_backend.init_backend()

    # --- the model's life ---

    def load(self, command: Load, progress: Progress) -> ModelInfo:
        """Load the model, compute one token, and be ready. See :meth:`Engine.load`."""
        if self._loaded is not None:
            raise EngineError("a model is loaded already", code="already_loaded")
        check_file(command.path)
        llama_log.quieten(False)
        report = _Report(progress, self._abort)
        with _undisturbed():
            self._loaded = loaded = self._make(command, report)
        report.finish()
        llama_log.quieten(True)
        model = loaded.model
        return ModelInfo(
            vocab_type=model.vocab.kind,
            n_vocab=model.vocab.size,
            n_ctx=loaded.n_ctx,
            n_ctx_train=model.n_ctx_train,
            n_embd=model.n_embd,
            n_params=model.n_params,
            size=model.size,
            ftype=model.ftype,
            modalities=loaded.modalities,
            gpu=llama_backend.supports_gpu(),
            sampling=loaded.recommended,
        )

    def _make(self, command: Load, report: "_Report") -> "Loaded":
        """Have llama.cpp make what it makes, and beside that what is Python's."""
        with ExitStack() as undo:
            reserve = Reserve(_host_cache(command))
            undo.callback(reserve.drop)
            model = Model(command.path, command.options, report)
            undo.callback(model.free)
            chats = Errand(lambda: _make_chats(command, model), "chats")
            undo.callback(chats.wait)  # it reads the vocabulary
            from llamaherd.pool.child.resources import Resources  # waits for the thread that imports it

            resources = Resources(command, model, self._threads_for(command.options), self._abort, reserve)
            undo.callback(resources.free)
            from llamaherd.pool.child.loaded import Loaded

            loaded = Loaded(command, resources, chats.result())
            undo.pop_all()
            return loaded

    def unload(self) -> None:
        """Free model and context. Idempotent."""
        if self._loaded is not None:
            self._loaded.free()
            self._loaded = None
            trim()

    def set_threads(self, n: int, batch: int) -> None:
        """Use so many threads from the next step on, and after the next load unless its options say otherwise."""
        self._threads = (_clamped(n), _clamped(batch or n))
        if self._loaded is not None:
            self._loaded.set_threads(*self._threads)

    def expect_threads(self, n: int) -> None:
        """From any thread: let the others run that these threads are for, if the running step has more."""
        loaded, threads = self._loaded, self._threads
        if loaded is not None and threads and _clamped(n) < max(threads):
            loaded.context.share_cores()

    def set_scales(self, scales: Ordered[float]) -> None:
        """Use these default scales of the LoRA adapters from the next request on. See :meth:`Engine.set_scales`."""
        if self._loaded is not None:
            self._loaded.adapters.set_defaults(scales)

    def interrupt(self) -> None:
        """From any thread: end a running load or step soon, and refuse further ones."""
        self._abort.set()

    def _threads_for(self, options: EngineOptions) -> tuple[int, int]:
        told = self._threads or (usable_cores(),) * 2
        if options.n_threads <= 0:
            return told[0], options.n_threads_batch if options.n_threads_batch > 0 else told[1]
        return options.n_threads, options.n_threads_batch if options.n_threads_batch > 0 else options.n_threads

    # --- requests ---

    @property
    def pause(self) -> float:
        """How many seconds the next step may wait for a further request. See :attr:`Engine.pause`."""
        loaded = self._loaded
        return 0.0 if loaded is None or loaded.embedder.busy or loaded.desk.busy else loaded.batcher.pause

    @property
    def busy(self) -> bool:
        """Whether :meth:`step` has work."""
        return self._loaded is not None and self._loaded.busy

    @property
    def figures(self) -> "Figures":
        """How busy it is; all zero while nothing is loaded."""
        from llamaherd.pool.child.batcher import Figures

        return self._loaded.batcher.figures if self._loaded is not None else Figures()

    def submit(self, request: Generate | Embed | Rerank) -> None:
        """Check a request and queue it. See :meth:`Engine.submit`."""
        self._need().submit(request)

    def cancel(self, request: int) -> None:
        """Drop a request; the next step returns its ``done``."""
        if self._loaded is not None:
            self._loaded.cancel(request)

    def step(self) -> Ordered[ChildMessage]:
        """Advance every running request by one decode step. See :meth:`Engine.step`."""
        return self._loaded.step() if self._loaded is not None else []

    # --- slots ---

    @property
    def load_figures(self) -> EngineLoad:
        """How busy it is, and what it has done; all zero while nothing is loaded."""
        return self._loaded.batcher.load if self._loaded is not None else EngineLoad()

    def slots(self) -> tuple[SlotState, ...]:
        """Return what runs where."""
        return self._need().batcher.told_slots()

    def sequence(self, command: SequenceCommand) -> None:
        """Take a command about a slot. See :meth:`Engine.sequence`."""
        self._need().desk.submit(command)

    # --- text ---

    def tokenize(self, command: Tokenize) -> tuple[int, ...]:
        """Return the token ids of a text."""
        return self._need().tokenize(command)

    def pieces(self, tokens: Ordered[int]) -> tuple[bytes, ...]:
        """Return the bytes of each token."""
        return self._need().model.vocab.pieces(tokens)

    def detokenize(self, command: Detokenize) -> str:
        """Return the text of token ids."""
        vocab = self._need().model.vocab
        vocab.check(command.tokens)
        return vocab.detokenize(command.tokens)

    def template(self, command: Template) -> str:
        """Return chat messages rendered to the prompt text."""
        if has_media(command.messages):
            raise RequestError("a prompt with images or sounds is no text", code="unsupported_content")
        return self._need().chats.prompt(command.messages, command.template_kwargs, command.chat)

    def _need(self) -> "Loaded":
        if self._loaded is None:
            raise RequestError("no model is loaded", code="not_loaded")
        return self._loaded


class _Report:
    """Turns llama.cpp's progress, which is called for every tensor, into few and rising calls that end at 1.0."""

    def __init__(self, progress: Progress, abort: llama_backend.AbortFlag) -> None:
        self._progress: Final = progress
        self._abort: Final = abort
        self._last = 0.0

    def __call__(self, fraction: float) -> bool:
        if self._abort:
            return False
        # The context and the first token are still to come, so the tensors alone never make 1.0.
        fraction = min(fraction, 1.0 - _PROGRESS_STEP)
        if fraction - self._last < _PROGRESS_STEP:
            return True
        self._last = fraction
        return self._progress(fraction)

    def finish(self) -> None:
        """Report that everything is loaded; too late to abandon."""
        self._progress(1.0)


def _import_heavy() -> None:
    for name in _HEAVY:
        importlib.import_module(name)


def _host_cache(command: Load) -> int:
    """Return the bytes that the cache will take of this machine's memory, as far as the pool knows."""
    return 0 if on_device(command.options) else command.cache_bytes


def _make_chats(command: Load, model: Model) -> "Chats":
    from llamaherd.pool.child.loaded import make_chats

    return make_chats(command, model)


@contextmanager
def _undisturbed() -> Generator[None]:
    """Keep the interpreter from holding up a load: imports make no garbage, and threads that import give way."""
    usual, collects = sys.getswitchinterval(), gc.isenabled()
    gc.disable()
    sys.setswitchinterval(_LOAD_SWITCH_SECONDS)
    try:
        yield
    finally:
        sys.setswitchinterval(usual)
        if collects:
            gc.enable()


def _clamped(threads: int) -> int:
    return max(1, min(threads, llama_backend.MOST_THREADS))
