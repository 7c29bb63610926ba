"""One model file in memory: checks before the load, the load itself, and the facts of what was loaded."""

from collections.abc import Callable
from pathlib import Path
from typing import Final

from llamaherd.pool.child import llama_log, llama_model
from llamaherd.pool.child.devices import division
from llamaherd.pool.child.engine import EngineError
from llamaherd.pool.child.refusal import refusal
from llamaherd.pool.child.vocab import Vocab
from llamaherd.transport.messages import EngineOptions

__all__ = ["Model", "check_file"]

_MAGIC: Final = b"GGUF"


def check_file(path: str) -> int:
    """Raise EngineError unless ``path`` looks like a GGUF file that can be read; return its size in bytes."""
    if not path or "\0" in path:
        raise EngineError(f"{path!r} is not a path of a model file", code="model_not_found")
    file = Path(path)
    try:
        if file.is_dir():
            raise EngineError(f"{path} is a directory, not a GGUF file", code="model_invalid")
        with file.open("rb") as stream:
            magic = stream.read(len(_MAGIC))
        size = file.stat().st_size
    except FileNotFoundError:
        raise EngineError(f"{path} does not exist", code="model_not_found") from None
    except OSError as error:
        raise EngineError(f"{path} cannot be read: {error.strerror}", code="model_unreadable") from error
    if magic != _MAGIC:
        found = "is empty" if not magic else f"starts with {magic!r}"
        raise EngineError(f"{path} is no GGUF file: it {found}, not with {_MAGIC!r}", code="model_invalid")
    return size


class _ProgressGuard:
    """Keeps an exception of the caller's function out of C, which would swallow it, and stops asking after a "no"."""

    def __init__(self, progress: Callable[[float], bool]) -> None:
        self._progress: Final = progress
        self.abandoned = False
        self.error: BaseException | None = None

    def __call__(self, fraction: float) -> bool:
        if not self.abandoned:
            try:
                self.abandoned = not self._progress(fraction)
            except BaseException as error:
                self.abandoned, self.error = True, error
        return not self.abandoned


class Model:
    """A loaded model. :meth:`free` it after every context that uses it.

    ``progress`` is called with llama.cpp's own fraction; returning False abandons the load, and what it raises
    is raised from here.

    Raises:
        EngineError: with llama.cpp's last error lines.
    """

    def __init__(self, path: str, options: EngineOptions, progress: Callable[[float], bool]) -> None:
        self.path: Final = path
        guard = _ProgressGuard(progress)
        divided = division(options)
        llama_log.forget_log()
        handle = llama_model.load(
            path.encode("utf-8", "surrogateescape"),
            n_gpu_layers=options.n_gpu_layers,
            use_mmap=options.use_mmap,
            progress=guard,
            division=divided,
        )
        if guard.abandoned:
            if handle is not None:
                llama_model.free(handle)
            if guard.error is not None:
                raise guard.error
            raise EngineError(f"loading {path} was abandoned", code="load_abandoned")
        if handle is None:
            why = refusal("model_invalid")
            remedy = why.remedy("fewer n_gpu_layers, or load fewer models at a time")
            raise EngineError(f"{path} cannot be loaded: {why.reason}{remedy}", code=why.code)
        self.handle: Final = handle
        self._freed = False
        self.vocab: Final = Vocab(handle)
        self.ftype: Final = llama_model.ftype_name(handle)
        self.n_ctx_train: Final = llama_model.n_ctx_train(handle)
        self.n_embd: Final = llama_model.n_embd(handle)
        self.n_params: Final = llama_model.n_params(handle)
        self.size: Final = llama_model.size(handle)
        #: Tokens that its narrowest attention sees; 0 when every layer sees everything.
        self.window: Final = llama_model.n_swa(handle)
        #: Whether no layer attends: a running state is all that a sequence has, however long it is.
        self.celless: Final = llama_model.is_recurrent(handle)
        #: Whether some layer keeps a running state, which has no earlier version to go back to.
        self.recurrent: Final = self.celless or llama_model.is_hybrid(handle)
        #: Elements of one attention head's key, and of its value; 0 where nothing attends.
        self.key_length: Final = self._head_length("key")
        self.value_length: Final = self._head_length("value")
        self.chat_template: Final = llama_model.chat_template(handle)
        self.tool_template: Final = llama_model.chat_template(handle, "tool_use")
        self.unfit: Final = self._why_unfit()

    def _head_length(self, part: str) -> int:
        arch = llama_model.meta(self.handle, "general.architecture")
        text = llama_model.meta(self.handle, f"{arch}.attention.{part}_length")
        return int(text) if text.isdigit() else self.n_embd // max(1, llama_model.n_head(self.handle))

    def _why_unfit(self) -> str:
        """Say why this model cannot continue a text; empty when it may."""
        if llama_model.has_encoder(self.handle):
            return "it has an encoder (an embedding, translation or draft model)"
        if not llama_model.has_decoder(self.handle):
            return "it has no decoder"
        if llama_model.is_diffusion(self.handle):
            return "it is a diffusion model"
        if self.vocab.size == 0:
            return "it has no vocabulary"
        return ""

    def free(self) -> None:
        """Release the memory. Idempotent."""
        if not self._freed:
            self._freed = True
            llama_model.free(self.handle)
