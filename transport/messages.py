"""Every message that crosses the process boundary, and the one codec for all transports.

A message is a *kind* (a short ASCII word) and a JSON body. ``state`` and ``exit`` are llama.cpp's own (its router and
its children speak them over stdio); the rest is ours. Each transport frames the pair in its own way; none of them
changes the JSON.

The module is imported by the worker before anything heavy, so it imports msgspec and nothing else.
"""

from typing import Any, Final, Literal, TypeAlias, cast

import msgspec

__all__ = [
    "CHILD_KINDS",
    "MAX_MESSAGE_BYTES",
    "POOL_KINDS",
    "Cancel",
    "ChildMessage",
    "Delta",
    "Detokenize",
    "Done",
    "EngineOptions",
    "Exit",
    "Failed",
    "Fault",
    "FinishReason",
    "Generate",
    "Load",
    "Message",
    "PoolMessage",
    "Result",
    "Sampling",
    "Sleep",
    "State",
    "StateName",
    "Stats",
    "Template",
    "Threads",
    "Timings",
    "Tokenize",
    "Tokens",
    "Unknown",
    "Usage",
    "Wake",
    "decode",
    "encode",
    "kind_of",
]

#: Largest encoded body that any transport carries, in bytes. Images and long prompts fit; a runaway peer does not.
MAX_MESSAGE_BYTES: Final = 64 * 1024 * 1024

FinishReason: TypeAlias = Literal["stop", "length", "cancelled"]
StateName: TypeAlias = Literal["loading", "ready", "sleeping", "downloading"]
Fault: TypeAlias = Literal["caller", "model", "worker"]


class _Struct(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Shared configuration: immutable, keyword-only; unknown fields of a newer peer are ignored."""


# --- shapes inside messages -------------------------------------------------------------------------------------------


class EngineOptions(_Struct, frozen=True, kw_only=True):
    """How an engine loads a model. Names and defaults follow llama-server; ``0`` or ``-1`` mean "decide from the
    model".

    Attributes:
        n_ctx: Context cells shared by all slots, in tokens; 0 takes the model's training length.
        n_batch: Most tokens in one decode call.
        n_ubatch: Most tokens in one physical batch.
        n_parallel: Slots, that is sequences decoded together.
        n_cached: Finished sequences that may stay in the context for requests that begin alike; -1 means three per
            slot, or one per slot where each costs memory of its own (recurrent models).
        n_threads: Threads for one-token steps; 0 means the cores available to the worker.
        n_threads_batch: Threads for prompt processing; 0 means ``n_threads``.
        n_gpu_layers: Layers offloaded to a GPU; -1 means all (no effect in a CPU build), 0 none.
        use_mmap: Map the file instead of reading it.
        flash_attn: ``auto``, ``on`` or ``off``.
        swa_full: Keep what has left the window of a sliding-window model: more memory, and any prefix can be reused.
        chat_template: Jinja source that replaces the model's own; empty keeps the model's.
    """

    n_ctx: int = 4096
    n_batch: int = 2048
    n_ubatch: int = 512
    n_parallel: int = 4
    n_cached: int = -1
    n_threads: int = 0
    n_threads_batch: int = 0
    n_gpu_layers: int = -1
    use_mmap: bool = True
    flash_attn: Literal["auto", "on", "off"] = "auto"
    swa_full: bool = True
    chat_template: str = ""


class Sampling(_Struct, frozen=True, kw_only=True):
    """How the next token is chosen. Defaults are llama-server's; ``temperature`` <= 0 is greedy.

    Attributes:
        seed: 0 to 2**32 - 1; 4294967295 draws a random seed.
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    seed: int = 0xFFFFFFFF


class Usage(_Struct, frozen=True, kw_only=True):
    """Token counts of one finished request; ``cached_tokens`` of the prompt were not computed again."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0


class Timings(_Struct, frozen=True, kw_only=True):
    """Where the time of one request went inside the worker, in milliseconds."""

    queue_ms: float = 0.0
    prompt_ms: float = 0.0
    predicted_ms: float = 0.0


class Delta(msgspec.Struct, frozen=True, array_like=True):
    """What one sequence gained in one decode step.

    Attributes:
        request: The request's number.
        text: Complete UTF-8 characters only; may be empty while a character or a stop string is pending.
        tokens: Ids of the tokens sampled since the request's last delta.
    """

    request: int
    text: str
    tokens: tuple[int, ...] = ()


# --- child to pool ----------------------------------------------------------------------------------------------------


class State(_Struct, frozen=True, kw_only=True, omit_defaults=False):
    """``state``: what the worker is doing, in llama.cpp's words. An unknown ``state`` is for the receiver to ignore.

    Attributes:
        state: One of :data:`StateName`; a plain string here, because a newer peer may know more.
        payload: Progress while loading (``stages``, ``current``, ``value`` in 0..1), the model's facts when ready.
    """

    state: str
    payload: dict[str, Any] | None = None


class Tokens(_Struct, frozen=True, kw_only=True):
    """``tokens``: one decode step, with every sequence that moved in it."""

    deltas: tuple[Delta, ...]


class Done(_Struct, frozen=True, kw_only=True):
    """``done``: a generation ended in order; nothing more follows for this request."""

    request: int
    finish_reason: FinishReason
    usage: Usage = Usage()
    timings: Timings = Timings()
    stopping_word: str = ""


class Result(_Struct, frozen=True, kw_only=True):
    """``result``: the answer to a request without a stream.

    Exactly one field is set: ``tokens`` for ``tokenize``, ``text`` for ``detokenize`` and ``template``.
    """

    request: int
    tokens: tuple[int, ...] | None = None
    text: str | None = None


class Failed(_Struct, frozen=True, kw_only=True):
    """``failed``: a request, or with ``request`` None the load itself, came to nothing.

    Attributes:
        fault: Whose fault: the ``caller`` asked for something impossible, the ``model`` file or its settings are bad,
            or the ``worker`` could not.
        retry: Whether the same request may succeed later or elsewhere.
        code: A short stable word for programs, such as ``context_length_exceeded``.
    """

    message: str
    fault: Fault = "worker"
    retry: bool = False
    code: str = ""
    request: int | None = None


class Stats(_Struct, frozen=True, kw_only=True):
    """``stats``: what the worker takes, sent ahead of each ``ready``.

    Attributes:
        rss_bytes: Resident memory, mapped file pages included; 0 where unknown.
    """

    rss_bytes: int = 0


# --- pool to child ----------------------------------------------------------------------------------------------------


class Exit(_Struct, frozen=True, kw_only=True):
    """``exit``: leave now, in order. Carries no body."""


class Load(_Struct, frozen=True, kw_only=True):
    """``load``: the first command of a worker's life; workers are spawned without a model.

    Attributes:
        engine: ``llama`` or ``fake``.
        script: The fake engine's script, as its module documents; ignored by others.
    """

    model: str
    path: str = ""
    engine: str = "llama"
    options: EngineOptions = EngineOptions()
    aliases: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    script: dict[str, Any] = {}


class Sleep(_Struct, frozen=True, kw_only=True):
    """``sleep``: free model and context, keep the process. Refused (logged) while a request runs."""


class Wake(_Struct, frozen=True, kw_only=True):
    """``wake``: load again what ``load`` named."""


class Generate(_Struct, frozen=True, kw_only=True):
    """``generate``: start one generation. Exactly one of ``prompt`` and ``messages`` is set.

    Attributes:
        request: A number unique within the worker's life; every answer carries it.
        prompt: Text, or token ids taken as they are.
        messages: OpenAI chat messages, rendered with the model's template inside the worker.
        template_kwargs: Extra variables for the template.
        max_tokens: Most tokens to generate; -1 means until the context is full.
        stop: Texts that end the generation and are not part of its output.
        cache_prompt: Whether computed prefixes may be reused.
        ignore_eos: Go on past end-of-generation tokens.
    """

    request: int
    prompt: str | tuple[int, ...] | None = None
    messages: tuple[dict[str, Any], ...] | None = None
    template_kwargs: dict[str, Any] = {}
    sampling: Sampling = Sampling()
    max_tokens: int = -1
    stop: tuple[str, ...] = ()
    cache_prompt: bool = True
    ignore_eos: bool = False


class Tokenize(_Struct, frozen=True, kw_only=True):
    """``tokenize``: text to ids; answered by ``result``. ``add_special`` adds BOS/EOS, ``parse_special`` reads control
    tokens.
    """

    request: int
    text: str
    add_special: bool = False
    parse_special: bool = True


class Detokenize(_Struct, frozen=True, kw_only=True):
    """``detokenize``: ids to text; answered by ``result``."""

    request: int
    tokens: tuple[int, ...]


class Template(_Struct, frozen=True, kw_only=True):
    """``template``: render chat messages to the prompt text; answered by ``result``."""

    request: int
    messages: tuple[dict[str, Any], ...]
    template_kwargs: dict[str, Any] = {}


class Cancel(_Struct, frozen=True, kw_only=True):
    """``cancel``: stop a request. Answered by ``done`` with ``cancelled``, unless it had ended before."""

    request: int


class Threads(_Struct, frozen=True, kw_only=True):
    """``threads``: use so many threads from the next step on; ``batch`` 0 means the same for prompts."""

    n: int
    batch: int = 0


class Unknown(msgspec.Struct, frozen=True):
    """A record that arrived whole but means nothing here: an unknown kind, or a body that is not what its kind says.

    Receivers log and ignore it. ``reason`` says what was wrong; ``body`` is cut to 200 bytes.
    """

    kind: str
    reason: str
    body: bytes = b""


ChildMessage: TypeAlias = State | Tokens | Done | Result | Failed | Stats | Unknown
PoolMessage: TypeAlias = (
    Exit | Load | Sleep | Wake | Generate | Tokenize | Detokenize | Template | Cancel | Threads | Unknown
)
Message: TypeAlias = (
    State
    | Tokens
    | Done
    | Result
    | Failed
    | Stats
    | Exit
    | Load
    | Sleep
    | Wake
    | Generate
    | Tokenize
    | Detokenize
    | Template
    | Cancel
    | Threads
    | Unknown
)

# --- codec ------------------------------------------------------------------------------------------------------------

_CHILD_TYPES: Final[dict[str, type[msgspec.Struct]]] = {
    "state": State,
    "tokens": Tokens,
    "done": Done,
    "result": Result,
    "failed": Failed,
    "stats": Stats,
}
_POOL_TYPES: Final[dict[str, type[msgspec.Struct]]] = {
    "exit": Exit,
    "load": Load,
    "sleep": Sleep,
    "wake": Wake,
    "generate": Generate,
    "tokenize": Tokenize,
    "detokenize": Detokenize,
    "template": Template,
    "cancel": Cancel,
    "threads": Threads,
}
#: Kinds that a worker sends.
CHILD_KINDS: Final = frozenset(_CHILD_TYPES)
#: Kinds that a pool sends.
POOL_KINDS: Final = frozenset(_POOL_TYPES)

_KINDS: Final[dict[type, str]] = {cls: kind for kind, cls in (_CHILD_TYPES | _POOL_TYPES).items()}
_BODILESS: Final = frozenset({"exit", "sleep", "wake"})
_decoders: Final = {kind: msgspec.json.Decoder(cls) for kind, cls in (_CHILD_TYPES | _POOL_TYPES).items()}
_encoder: Final = msgspec.json.Encoder()
_EXCERPT: Final = 200


def kind_of(message: Message) -> str:
    """Return the kind word of a message. Raises TypeError for :class:`Unknown`, which is never sent."""
    try:
        return _KINDS[type(message)]
    except KeyError:
        raise TypeError(f"{type(message).__name__} is not a message that can be sent") from None


def encode(message: Message) -> tuple[str, bytes]:
    """Encode a message as ``(kind, body)``.

    The body is compact JSON without a newline, or empty for the kinds that carry none. Raises TypeError for what is no
    message or holds what JSON cannot say.
    """
    kind = kind_of(message)
    return kind, b"" if kind in _BODILESS else _encoder.encode(message)


def decode(kind: str, body: bytes | bytearray | memoryview) -> Message:
    """Decode one record. Never raises on what a peer may send: the unintelligible comes back as :class:`Unknown`."""
    decoder = _decoders.get(kind)
    if decoder is None:
        return Unknown(kind[:64], "unknown kind", bytes(body[:_EXCERPT]))
    try:
        return cast(Message, decoder.decode(body or b"{}"))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        return Unknown(kind, str(error), bytes(body[:_EXCERPT]))
