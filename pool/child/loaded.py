"""What exists between a load and an unload, made and freed as one.

This module brings in what takes long to import, Jinja above all. The engine has it imported by a second thread while
llama.cpp reads the model and makes the context, which hides that time.
"""

from collections.abc import Mapping
from collections.abc import Sequence as Ordered
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Final

import msgspec

from llamaherd.pool.child import huge_pages, llama_model
from llamaherd.pool.child.adapters import AdapterSet
from llamaherd.pool.child.batcher import Batcher
from llamaherd.pool.child.budget import BudgetedThoughts
from llamaherd.pool.child.chat import Chats, Turn
from llamaherd.pool.child.constraint import Constraint
from llamaherd.pool.child.devices import on_device
from llamaherd.pool.child.embedder import Embedder
from llamaherd.pool.child.engine import RequestError
from llamaherd.pool.child.grammars import Grammars
from llamaherd.pool.child.huge_pages import HugePages
from llamaherd.pool.child.infill import infill_tokens
from llamaherd.pool.child.inputs import least_tokens, prompt_tokens
from llamaherd.pool.child.media import Media, has_media, take_media
from llamaherd.pool.child.model import Model
from llamaherd.pool.child.prefix import Rules
from llamaherd.pool.child.recommended import read_recommended, recommend
from llamaherd.pool.child.resources import Resources
from llamaherd.pool.child.sampler import Samplers
from llamaherd.pool.child.sequence import Sequence
from llamaherd.pool.child.slot_desk import SlotDesk
from llamaherd.pool.child.store import Store
from llamaherd.pool.child.tool_grammar import ToolGrammar
from llamaherd.transport.messages import (
    ChildMessage,
    Embed,
    EngineOptions,
    Generate,
    Infill,
    Load,
    Prompt,
    Rerank,
    Tokenize,
)

if TYPE_CHECKING:
    from llamaherd.pool.child.projector import MediaPrompt

__all__ = ["Loaded", "make_chats"]

_MIB: Final = 1024 * 1024
_MOST_STOPS: Final = 64
_LONGEST_STOP: Final = 4096


class Loaded:
    """A model with its context and everything that belongs to it. Takes the resources: frees them, also if this raises.

    Raises:
        EngineError: the context that embeds does not fit.
    """

    def __init__(self, command: Load, resources: Resources, chats: Chats) -> None:
        with ExitStack() as undo:  # runs backwards
            undo.callback(resources.free)
            self.model: Final = resources.model
            self.adapters: Final = resources.adapters
            self.projector: Final = resources.projector
            self.context: Final = resources.context
            self.unfit: Final = resources.unfit
            options, vocab = command.options, self.model.vocab
            self.embedder: Final = Embedder(
                self.model,
                options,
                resources.threads,
                resources.abort,
                has_memory=self.context.has_memory,
                adapters=self.adapters,
            )
            undo.callback(self.embedder.free)
            if self.unfit:
                self.embedder.prepare()
            rules = Rules(
                whole=self.model.recurrent,
                window=self.model.window,
                first=self.context.first,
                copies=not self.context.unified,
            )
            store = _store(options, rules)
            self.batcher: Final = Batcher(
                self.context,
                vocab,
                options.n_parallel,
                rules,
                adapters=self.adapters,
                store=store,
                projector=self.projector,
            )
            undo.callback(self.batcher.clear)
            self.desk: Final = SlotDesk(
                command, self.batcher, store, most_tokens=self.context.n_ctx_seq, check_tokens=vocab.check
            )
            undo.callback(self.desk.close)
            self._n_keep: Final = command.options.n_keep
            self._shifts: Final = command.options.context_shift and not self._why_unshiftable(command.options)
            self._suffix_first: Final = options.spm_infill
            self.samplers: Final = Samplers(vocab, self.context.n_ctx_seq)
            undo.callback(self.samplers.free)
            #: What the model's file recommends, by the names of ``Sampling``.
            self.recommended: Final = read_recommended(lambda key: llama_model.meta(self.model.handle, key))
            self.grammars: Final = Grammars(vocab)
            self.chats: Final = chats
            self._huge_pages: Final = HugePages(allowed=not on_device(options) and huge_pages.allowed())
            self._undo: Final = undo.pop_all()

    def _why_unshiftable(self, options: EngineOptions) -> str:
        """Say why contexts of this model cannot be shifted; empty when they can."""
        if self.model.recurrent:
            return "it keeps running states, which cannot forget"
        if self.model.window and not options.swa_full:
            return "what has left its sliding window is gone (swa_full is off)"
        if not self.context.can_shift:
            return "llama.cpp cannot shift this cache"
        return ""

    def free(self) -> None:
        """Release everything."""
        self._undo.close()

    @property
    def busy(self) -> bool:
        """Whether a step has something to do or to tell."""
        return self.batcher.busy or self.embedder.busy or self.desk.busy

    @property
    def modalities(self) -> tuple[str, ...]:
        """What the model takes in."""
        eye = self.projector
        if eye is None or self.unfit:
            return ("text",)
        return ("text", *(("image",) if eye.vision else ()), *(("audio",) if eye.audio else ()))

    @property
    def n_ctx(self) -> int:
        """Most tokens that a model of this load takes."""
        return self.embedder.shape.longest if self.unfit else self.context.n_ctx

    def step(self) -> list[ChildMessage]:
        """Advance the generations by a token each, and then the embeddings by a batch."""
        self._huge_pages.tend()
        told = self.batcher.step() if self.batcher.busy else []
        if self.embedder.busy:
            told += self.embedder.step(shared=self.batcher.busy)
        if self.desk.busy:
            told += self.desk.step(wait=not (told or self.batcher.busy or self.embedder.busy))
        return told

    def cancel(self, request: int) -> None:
        """End a request now; the next step returns its ``done``. Unknown numbers are ignored."""
        self.batcher.cancel(request)
        self.embedder.cancel(request)
        self.desk.cancel(request)

    def set_threads(self, n: int, batch: int) -> None:
        """Use so many threads from the next step on."""
        self.context.set_threads(n, batch)
        self.embedder.set_threads(n, batch)

    def _check_number(self, request: int) -> None:
        if self.batcher.knows(request) or self.embedder.knows(request):
            raise RequestError(f"request {request} is running already", code="duplicate_request")

    def submit(self, request: Generate | Embed | Rerank) -> None:
        """Check a request and queue it. Raises RequestError."""
        self._check_number(request.request)
        if isinstance(request, Embed | Rerank):
            self.embedder.submit(request)
            return
        if self.unfit:
            raise RequestError(f"this model cannot generate: {self.unfit}", code="unsupported_by_model")
        _check_limits(request)
        if request.slot >= len(self.batcher.slots):
            raise RequestError(
                f"slot {request.slot} does not exist; there are {len(self.batcher.slots)}", code="invalid_slot"
            )
        if self.recommended:
            request = recommend(request, self.recommended)
        self.samplers.check(request.sampling)
        adapters = self.adapters.chosen(request.lora)
        messages, files = self._files_of(request)
        turn = self._turn(request, messages)
        media = self._media_prompt(turn, files)
        try:
            self._queue(request, turn, adapters, media)
        except BaseException:
            if media is not None:
                media.free()
            raise

    def _queue(self, request: Generate, turn: Turn | None, adapters: AdapterSet, media: "MediaPrompt | None") -> None:
        if media is not None:
            prompt = media.tokens
        elif request.infill is not None:
            prompt = self._infill(request, request.infill)
        else:
            prompt = self._tokens(turn.prompt if turn is not None else request.prompt or "")
        limit = self.context.n_ctx_seq
        if not prompt:
            raise RequestError("the prompt is empty", code="empty_prompt")
        if len(prompt) >= limit:
            raise _too_long(len(prompt), limit)
        if request.n_keep is None:
            request = msgspec.structs.replace(request, n_keep=self._n_keep)
        if media is not None:
            self._check_media(media)
        constraint = self._constraint(request, turn)
        if turn is not None and turn.budget is not None:
            constraint = BudgetedThoughts(turn.budget, constraint, self.model.vocab)
        chain = self.samplers.make(request.sampling, [token for token in prompt if token >= 0] if media else prompt)
        try:
            sequence = Sequence(
                request,
                prompt,
                limit,
                chain,
                adapters,
                constraint=constraint,
                shifts=self._shifts,
                turn=turn,
                media=media,
            )
            self.batcher.submit(sequence)
        except BaseException:
            if chain is not None:
                chain.free()
            raise

    def _constraint(self, request: Generate, turn: Turn | None) -> Constraint | None:
        if turn is None:
            return self.grammars.make(request)
        if turn.grammar is not None and not request.grammar:
            return self._calls(turn.grammar)  # with the request's schema, if there is one
        return self.grammars.make(request, turn.closing, turn.begun)

    def _calls(self, grammar: ToolGrammar) -> Constraint | None:
        """Return what holds calls to their form. Raises RequestError if it cannot be had and the answer must be one."""
        try:
            return self.grammars.make_calls(grammar)
        except RequestError:
            if grammar.waits:
                return None  # the calls are read all the same
            raise

    def tokenize(self, command: Tokenize) -> tuple[int, ...]:
        """Return the token ids of a text. Raises RequestError."""
        tokens = prompt_tokens(
            self.model.vocab, command.text, add_special=command.add_special, parse_special=command.parse_special
        )
        return tuple(tokens)

    def _files_of(self, request: Generate) -> tuple[Ordered[Mapping[str, Any]] | None, tuple[Media, ...]]:
        """Return the messages of a chat with a marker for each image and sound, and these."""
        if not request.messages or not has_media(request.messages):
            return request.messages, ()
        if self.projector is None:
            raise RequestError(
                "this model takes text only: it was loaded without a projector for images and sounds (mmproj)",
                code="unsupported_content",
            )
        return take_media(request.messages, self.projector.marker)

    def _media_prompt(self, turn: Turn | None, files: tuple[Media, ...]) -> "MediaPrompt | None":
        """Return the prompt of a chat with images or sounds; None for any other request."""
        if turn is None or not files or self.projector is None:
            return None
        self._check_length(turn.prompt)
        return self.projector.read(turn.prompt, files)

    def _check_media(self, media: "MediaPrompt") -> None:
        if media.chunks and media.chunks[-1].end == len(media.tokens):
            raise RequestError("the prompt ends with an image or a sound; text must follow", code="invalid_media")
        for chunk in media.chunks:
            length = chunk.end - chunk.start
            if chunk.whole and length > self.context.n_ubatch:
                raise RequestError(
                    f"an image has {length} tokens, which this model wants in one physical batch of at most "
                    f"{self.context.n_ubatch}; set n_ubatch to {length} or more",
                    code="media_too_large",
                )

    def _turn(self, request: Generate, messages: Ordered[Mapping[str, Any]] | None) -> Turn | None:
        """Return what a conversation comes to; None for a prompt."""
        if sum(one is not None for one in (request.prompt, request.messages, request.infill)) != 1:
            raise RequestError("exactly one of prompt, messages and infill must be given")
        if messages is None:
            return None
        return self.chats.turn(messages, request.template_kwargs, request.chat, request.json_schema)

    def _infill(self, request: Generate, gap: Infill) -> list[int]:
        return infill_tokens(
            self.model.vocab,
            gap,
            n_batch=self.context.batch.capacity,
            n_ctx=self.context.n_ctx_seq,
            max_tokens=request.max_tokens,
            suffix_first=self._suffix_first,
        )

    def _tokens(self, prompt: Prompt) -> list[int]:
        self._check_length(prompt)
        return prompt_tokens(self.model.vocab, prompt)

    def _check_length(self, prompt: Prompt) -> None:
        """Raise RequestError for a prompt that is so long that counting its tokens is not worth the time."""
        limit = self.context.n_ctx_seq
        least = least_tokens(self.model.vocab, prompt, limit)
        if least >= limit:
            raise _too_long(least, limit, "at least ")


def make_chats(command: Load, model: Model) -> Chats:
    """Return a model's chat templates, with the usual one compiled."""
    given = command.options.chat_template
    chats = Chats(given or model.chat_template, "" if given else model.tool_template, model.vocab, command.options)
    chats.prepare()
    return chats


def _store(options: EngineOptions, rules: Rules) -> Store:
    return Store(None if options.cache_ram < 0 else options.cache_ram * _MIB, rules)


def _check_limits(request: Generate) -> None:
    if (request.n_keep is not None and request.n_keep < -1) or request.n_discard < 0:
        raise RequestError("n_keep must be -1 or more and n_discard 0 or more", code="invalid_request")
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


def _too_long(count: int, limit: int, about: str = "") -> RequestError:
    return RequestError(
        f"the request ({about}{count} tokens) exceeds the available context size ({limit} tokens), try increasing it",
        code="context_length_exceeded",
        details={"n_prompt_tokens": count, "n_ctx": limit},
    )
