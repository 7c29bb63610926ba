"""The llama.cpp engine: one model, one context, many requests in one batch."""

from collections.abc import Sequence as Ordered
from contextlib import ExitStack
from typing import Final

from llamaherd.pool.child import bindings
from llamaherd.pool.child.batcher import Batcher, Figures
from llamaherd.pool.child.context import MOST_THREADS, Context
from llamaherd.pool.child.engine import EngineError, ModelInfo, Progress, RequestError
from llamaherd.pool.child.model import Model, check_file
from llamaherd.pool.child.prefix import Rules
from llamaherd.pool.child.sampler import Samplers
from llamaherd.pool.child.sequence import Sequence
from llamaherd.pool.child.template import ChatTemplate
from llamaherd.pool.machine import usable_cores
from llamaherd.transport.messages import (
    ChildMessage,
    Detokenize,
    EngineOptions,
    Generate,
    Load,
    Template,
    Tokenize,
)

__all__ = ["LlamaEngine"]

_MOST_STOPS: Final = 64
_LONGEST_STOP: Final = 4096
#: Least progress between two calls of the progress function.
_PROGRESS_STEP: Final = 0.01


class _Loaded:
    """What exists between load and unload, made and freed as one."""

    def __init__(self, command: Load, threads: tuple[int, int], progress: Progress, abort: bindings.AbortFlag) -> None:
        with ExitStack() as undo:  # runs backwards: llama.cpp wants contexts freed before their model
            self.model: Final = Model(command.path, command.options, progress)
            undo.callback(self.model.free)
            self.context: Final = Context(self.model, command.options, threads, abort)
            undo.callback(self.context.free)
            vocab = self.model.vocab
            if not self.context.unfit:
                self.context.warm_up(max(vocab.bos, 0))
            rules = Rules(whole=self.model.recurrent, window=self.model.window, first=self.context.first)
            self.batcher: Final = Batcher(self.context, vocab, command.options.n_parallel, rules)
            undo.callback(self.batcher.clear)
            self.samplers: Final = Samplers(vocab, self.context.n_ctx_seq)
            undo.callback(self.samplers.free)
            self.template: Final = ChatTemplate(
                command.options.chat_template or self.model.chat_template,
                bos=vocab.name(vocab.bos),
                eos=vocab.name(vocab.eos),
                adds_bos=vocab.adds_bos,
                adds_eos=vocab.adds_eos,
            )
            self._undo: Final = undo.pop_all()

    def free(self) -> None:
        """Release everything."""
        self._undo.close()


class LlamaEngine:
    """See :class:`llamaherd.pool.child.engine.Engine` for the contract.

    An interrupted engine is at its end: a load is refused, a step returns without tokens.
    """

    def __init__(self) -> None:
        self._abort: Final = bindings.AbortFlag()
        self._threads: tuple[int, int] | None = None
        self._loaded: _Loaded | None = None

    # --- the model's life ---

    def load(self, command: Load, progress: Progress) -> ModelInfo:
        """Load the model, compute one token, and be ready. See :meth:`Engine.load`."""
        if self._loaded is not None:
            raise EngineError("a model is loaded already", code="already_loaded")
        check_file(command.path)
        bindings.init_backend()
        report = _Report(progress, self._abort)
        self._loaded = _Loaded(command, self._threads_for(command.options), report, self._abort)
        report.finish()
        model, context = self._loaded.model, self._loaded.context
        return ModelInfo(
            vocab_type=model.vocab.kind,
            n_vocab=model.vocab.size,
            n_ctx=context.n_ctx,
            n_ctx_train=model.n_ctx_train,
            n_embd=model.n_embd,
            n_params=model.n_params,
            size=model.size,
            ftype=model.ftype,
        )

    def unload(self) -> None:
        """Free model and context. Idempotent."""
        if self._loaded is not None:
            self._loaded.free()
            self._loaded = None

    def set_threads(self, n: int, batch: int) -> None:
        """Use so many threads from the next step on, and after the next load unless its options say otherwise."""
        self._threads = (_clamped(n), _clamped(batch or n))
        if self._loaded is not None:
            self._loaded.context.set_threads(*self._threads)

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
    def busy(self) -> bool:
        """Whether :meth:`step` has work."""
        return self._loaded is not None and self._loaded.batcher.busy

    @property
    def figures(self) -> Figures:
        """How busy it is; all zero while nothing is loaded."""
        return self._loaded.batcher.figures if self._loaded is not None else Figures()

    def submit(self, request: Generate) -> None:
        """Check a request and queue it. See :meth:`Engine.submit`."""
        loaded = self._need()
        if loaded.context.unfit:
            raise RequestError(f"this model cannot generate: {loaded.context.unfit}", code="not_supported")
        if loaded.batcher.knows(request.request):
            raise RequestError(f"request {request.request} is running already", code="duplicate_request")
        _check_limits(request)
        loaded.samplers.check(request.sampling)
        prompt = self._prompt(loaded, request)
        limit = loaded.context.n_ctx_seq
        if not prompt:
            raise RequestError("the prompt is empty", code="empty_prompt")
        if len(prompt) >= limit:
            raise _too_long(f"{len(prompt)}", limit)
        loaded.batcher.submit(Sequence(request, prompt, limit, loaded.samplers.make(request.sampling, prompt)))

    def cancel(self, request: int) -> None:
        """Drop a request; the next step returns its ``done``."""
        if self._loaded is not None:
            self._loaded.batcher.cancel(request)

    def step(self) -> Ordered[ChildMessage]:
        """Advance every running request by one decode step. See :meth:`Engine.step`."""
        return self._loaded.batcher.step() if self._loaded is not None else []

    # --- text ---

    def tokenize(self, command: Tokenize) -> tuple[int, ...]:
        """Return the token ids of a text."""
        vocab = self._need().model.vocab
        return tuple(vocab.tokenize(command.text, add_special=command.add_special, parse_special=command.parse_special))

    def detokenize(self, command: Detokenize) -> str:
        """Return the text of token ids."""
        vocab = self._need().model.vocab
        vocab.check(command.tokens)
        return vocab.detokenize(command.tokens)

    def template(self, command: Template) -> str:
        """Return chat messages rendered to the prompt text."""
        return self._need().template.render(command.messages, command.template_kwargs)

    def _need(self) -> _Loaded:
        if self._loaded is None:
            raise RequestError("no model is loaded", code="not_loaded")
        return self._loaded

    def _prompt(self, loaded: _Loaded, request: Generate) -> list[int]:
        vocab, limit = loaded.model.vocab, loaded.context.n_ctx_seq
        prompt = request.prompt
        if (prompt is None) == (request.messages is None):
            raise RequestError("exactly one of prompt and messages must be given")
        if isinstance(prompt, tuple):
            if len(prompt) >= limit:
                raise _too_long(f"{len(prompt)}", limit)
            vocab.check(prompt)
            return list(prompt)
        text = prompt if prompt is not None else loaded.template.render(request.messages or (), request.template_kwargs)
        least = vocab.least_tokens(len(text), limit)
        if least >= limit:
            raise _too_long(f"at least {least}", limit)
        return vocab.tokenize(text, add_special=True, parse_special=True)


class _Report:
    """Turns llama.cpp's progress, which is called for every tensor, into few and rising calls that end at 1.0."""

    def __init__(self, progress: Progress, abort: bindings.AbortFlag) -> None:
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


def _clamped(threads: int) -> int:
    return max(1, min(threads, MOST_THREADS))


def _check_limits(request: Generate) -> None:
    if request.max_tokens < -1:
        raise RequestError(f"max_tokens is {request.max_tokens}; it must be -1 or more", code="invalid_max_tokens")
    if len(request.stop) > _MOST_STOPS:
        raise RequestError(
            f"{len(request.stop)} stop strings are given; at most {_MOST_STOPS} are taken", code="invalid_stop"
        )
    longest = max(map(len, request.stop), default=0)
    if longest > _LONGEST_STOP:
        raise RequestError(
            f"a stop string has {longest} characters; at most {_LONGEST_STOP} are taken", code="invalid_stop"
        )


def _too_long(count: str, limit: int) -> RequestError:
    return RequestError(
        f"the request ({count} tokens) exceeds the available context size ({limit} tokens), try increasing it",
        code="context_length_exceeded",
    )
