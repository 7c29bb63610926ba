"""The Engine: what turns requests into tokens inside a worker.

An engine belongs to one thread, its *engine thread* (``serve.py`` owns it). Every method but :meth:`Engine.interrupt`
is called there and nowhere else, so an engine needs no locks. The interface is the batching one: many requests are
submitted, each :meth:`Engine.step` moves all of them, and its output is a list of messages in which at most one is
``tokens``.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Protocol

import msgspec

from llamaherd.transport.messages import (
    ChildMessage,
    Detokenize,
    Embed,
    EngineLoad,
    Generate,
    Load,
    Rerank,
    SlotState,
    Template,
    Tokenize,
)
from llamaherd.transport.messages import Sequence as SlotCommand

__all__ = ["OUT_OF_MEMORY", "Engine", "EngineError", "ModelInfo", "Progress", "RequestError"]

#: ``progress(stage_fraction)`` with 0.0 to 1.0; return False to abandon the load.
Progress = Callable[[float], bool]


#: Facts that travel elsewhere.
_NOT_META: Final = ("modalities", "gpu", "sampling")


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True):
    """The model's facts, with the field names of the reference's ``meta`` object.

    Attributes:
        vocab_type: llama.cpp's number for the vocabulary's kind.
        n_ctx: Context cells as allocated (llama.cpp pads the wish).
        size: Bytes of all tensors.
        ftype: The quantisation's name, such as ``Q4_1``.
        modalities: What it takes in: ``text``, and with a projector ``image`` and ``audio``.
        gpu: Whether this process has any of a GPU: False without a backend for one, and where it is shown none.
        sampling: What its file recommends to requests that say nothing, by the names of
            :class:`~llamaherd.transport.messages.Sampling`.
    """

    vocab_type: int = 0
    n_vocab: int = 0
    n_ctx: int = 0
    n_ctx_train: int = 0
    n_embd: int = 0
    n_params: int = 0
    size: int = 0
    ftype: str = ""
    modalities: tuple[str, ...] = ("text",)
    gpu: bool = True
    sampling: Mapping[str, Any] = {}

    def to_meta(self) -> dict[str, Any]:
        """Return the facts as the ``meta`` object of the ``ready`` message; ``sampling`` only if there is any."""
        told = {field: getattr(self, field) for field in self.__struct_fields__ if field not in _NOT_META}
        return told | ({"sampling": dict(self.sampling)} if self.sampling else {})


#: The code of a load that found too little memory, wherever: the pool then makes room and tries again.
OUT_OF_MEMORY: Final = "out_of_memory"


class EngineError(Exception):
    """The model cannot be loaded or the engine is broken. The text is evidence for a person: file, reason, setting."""

    def __init__(self, message: str, *, code: str = "load_failed", retry: bool = False) -> None:
        super().__init__(message)
        self.code = code
        self.retry = retry


class RequestError(Exception):
    """One request is impossible, by its caller's fault; every other request goes on.

    Attributes:
        code: A short stable word, such as ``context_length_exceeded``.
        details: Figures that belong to the code, for programs.
    """

    def __init__(self, message: str, *, code: str = "invalid_request", details: dict[str, int] | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.details = details or {}


class Engine(Protocol):
    """See the module's text for the threading rule."""

    def load(self, command: Load, progress: Progress) -> ModelInfo:
        """Load the model; afterwards the engine takes requests.

        Raises:
            EngineError: with the reason. The engine holds nothing then, and may be asked to load again.
        """
        ...

    def unload(self) -> None:
        """Free model and context. Idempotent. Only called while :attr:`busy` is False."""
        ...

    @property
    def pause(self) -> float:
        """How many seconds the next step may wait for a further request: next to nothing of what it will take, and 0
        while somebody waits for a token of it.
        """
        ...

    @property
    def busy(self) -> bool:
        """Whether :meth:`step` has work: some request is queued or running."""
        ...

    def submit(self, request: Generate | Embed | Rerank) -> None:
        """Take a request into the engine's queue. One for embeddings or scores ends with ``result``.

        Raises:
            RequestError: the request is impossible; nothing was kept of it.
        """
        ...

    def cancel(self, request: int) -> None:
        """Drop a request. The next :meth:`step` returns its ``done`` with ``cancelled``. Unknown numbers are
        ignored.
        """
        ...

    def step(self) -> Sequence[ChildMessage]:
        """Advance every running request by one decode step and admit queued ones. Embeddings advance by one batch.

        Returns what happened: at most one ``tokens``, then ``done`` and ``failed`` of requests that ended in this step,
        the ``vectors`` and ends of requests for embeddings, and the ``result`` of commands to :meth:`sequence`.
        A fault of one request is its own ``failed``. Only call while :attr:`busy`.

        Raises:
            EngineError: the engine cannot go on; the worker leaves with a failure.
        """
        ...

    @property
    def load_figures(self) -> EngineLoad:
        """How busy it is, and what it has done; all zero while nothing is loaded. Cheap enough to ask in every step."""
        ...

    def slots(self) -> tuple[SlotState, ...]:
        """Return what runs where. Raises RequestError."""
        ...

    def sequence(self, command: SlotCommand) -> None:
        """Take a command to save, restore or erase what a slot has; :meth:`step` returns its ``result``, or ``failed``.

        Raises:
            RequestError: it is impossible; nothing was kept of it.
        """
        ...

    def tokenize(self, command: Tokenize) -> tuple[int, ...]:
        """Return the token ids of a text. Raises RequestError."""
        ...

    def pieces(self, tokens: Sequence[int]) -> tuple[bytes, ...]:
        """Return the bytes of each token, which need not be whole characters. Takes what :meth:`tokenize` returned."""
        ...

    def detokenize(self, command: Detokenize) -> str:
        """Return the text of token ids, invalid UTF-8 replaced. Raises RequestError for ids out of range."""
        ...

    def template(self, command: Template) -> str:
        """Return chat messages rendered to the prompt text, generation prompt included. Raises RequestError."""
        ...

    def set_threads(self, n: int, batch: int) -> None:
        """Use ``n`` threads for steps and ``batch`` (0: the same) for prompts from the next step on."""
        ...

    def expect_threads(self, n: int) -> None:
        """From any thread: :meth:`set_threads` will follow after the running step, because another model needs cores
        or needs them no more.
        """
        ...

    def set_scales(self, scales: Sequence[float]) -> None:
        """Use these default scales, one for each LoRA adapter, for requests from the next one on.

        Raises:
            EngineError: they are not as many as there are adapters, or out of range; nothing was changed.
        """
        ...

    def interrupt(self) -> None:
        """From any thread: make a running :meth:`load` or :meth:`step` return as soon as it can. Used when leaving."""
        ...
