"""The parameters of one request: their names for callers, and the check that makes a message of them.

Everything is checked here, before the worker sees it, so that a wrong value costs its caller an error and nobody else
anything. The last check is the codec itself: a message that would not arrive as it was meant is not sent.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final, TypedDict, TypeVar, cast

from llamaherd.pool.adapters import check_lora
from llamaherd.pool.chat_params import ChatMessage, TemplateParams, chat_options, check_messages
from llamaherd.pool.constraints import check_constraint
from llamaherd.pool.errors import BadRequest
from llamaherd.pool.sampling import FILE_KEYS, LIMITS, MAX_BIASES, SAMPLER_NAMES, problem_of, sampler_name
from llamaherd.transport.messages import (
    MAX_MESSAGE_BYTES,
    ChatOptions,
    Detokenize,
    Embed,
    Generate,
    Infill,
    InfillFile,
    Prompt,
    Rerank,
    Sampling,
    Template,
    Tokenize,
    Unknown,
    decode,
    encode,
)
from llamaherd.transport.messages import Sequence as SlotCommand

__all__ = [
    "ChatMessage",
    "ChatParams",
    "GenerateParams",
    "chat_request",
    "check_command",
    "check_defaults",
    "check_prompts",
    "check_tokens",
    "completion_request",
    "detokenize_request",
    "embed_request",
    "infill_request",
    "rerank_request",
    "template_request",
    "tokenize_request",
    "with_defaults",
]

Params = TypeVar("Params", bound="GenerateParams")
Command = TypeVar("Command", bound=Generate | Embed | Rerank | Tokenize | Detokenize | Template | SlotCommand)

RANDOM_SEED: Final = 0xFFFFFFFF
MAX_STOPS: Final = 64
MAX_STOP_LENGTH: Final = 1024
#: Most characters that are tokenized, and most ids that become text, for one request that asks for no more than that.
MAX_TOKENIZED: Final = 4 * 1024 * 1024
_INT32_MAX: Final = 2**31 - 1
#: More decides no more, and no float holds every integer.
_MOST_BIAS: Final = 1e9


#: Of one request only.
_NEVER_DEFAULTS: Final = {"id_slot", "return_progress", "timings_per_token", "whole"}
_CONSTRAINTS: Final = ("grammar", "json_schema", "response_format")


class GenerateParams(TypedDict, total=False):
    """Keyword arguments of ``Pool.complete``; all optional, defaults are llama-server's, with what the model's file
    recommends in their place (``general.sampling``).

    Attributes:
        max_tokens: Most tokens to generate, 0 or more; -1, the default, means until the context is full.
        seed: 0 to 2**32 - 1; -1, the default, draws one at random.
        stop: A text, or up to 64 texts, that end the generation.
        cache_prompt: Whether computed prefixes may be reused, by default True.
        ignore_eos: Never choose one of the model's end-of-generation tokens, by default False.
        n_keep: Tokens of the prompt that a context shift keeps, -1 all; by default what the model's options say.
        n_discard: Tokens that a context shift drops; 0, the default, is half of what it does not keep.
        id_slot: The slot to run in, for which the request waits; -1, the default, is any. Prompts find what is computed
            of them in any slot: this matters to those who save slots.
        return_progress: Tell how far the prompt is, once a step, in pieces of their own; by default False.
        timings_per_token: Tell counts and times with every piece, and not with the last alone; by default False.
        post_sampling_probs: Let ``n_probs`` tell the probabilities that the samplers have left, and not those before
            them; what they ruled out is left out. By default False.
        n_indent: Blanks that every line but the first must begin with: a line with fewer, an empty one too, ends the
            answer (``length``) and is no part of it. 0, the default, is off.
        t_max_predict_ms: When so many milliseconds have passed since the first token, a line break ends the answer
            (``length``); 0 or -1 is off.
        whole: The answer will be read when it is whole (``collect``): after the first, pieces may come late and in one,
            which saves work; by default False.
        samplers: Names of the samplers to use, in their order; the reference's spellings (``top-k``, ``topk``) are
            understood.
        logit_bias: ``(token id or text, bias)`` pairs, or a mapping of that (ids may be decimal texts there); a text
            means each of its tokens, a bias of False that they are never chosen.
        dry_sequence_breakers: Texts that no repetition is followed across.
        grammar: GBNF that the answer must follow, beginning at ``root``.
        json_schema: JSON Schema that the answer must follow instead; beside tools, an answer that calls none.
        response_format: The same in OpenAI's form: ``{"type": "text"}``, ``{"type": "json_object"}``, or ``{"type":
            "json_schema", "json_schema": {"schema": ...}}``.
        lora: Which LoRA adapters to apply, as objects with ``id`` and ``scale``; those that are not named are off. None
            or an empty list takes the model's defaults.

    The rest are numbers, described at :class:`~llamaherd.transport.messages.Sampling`.
    """

    max_tokens: int | None
    temperature: float | None
    dynatemp_range: float | None
    dynatemp_exponent: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    typical_p: float | None
    top_n_sigma: float | None
    xtc_probability: float | None
    xtc_threshold: float | None
    min_keep: int | None
    repeat_last_n: int | None
    repeat_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    dry_multiplier: float | None
    dry_base: float | None
    dry_allowed_length: int | None
    dry_penalty_last_n: int | None
    dry_sequence_breakers: Sequence[str] | None
    mirostat: int | None
    mirostat_tau: float | None
    mirostat_eta: float | None
    adaptive_target: float | None
    adaptive_decay: float | None
    samplers: Sequence[str] | None
    logit_bias: Sequence[Sequence[Any]] | Mapping[Any, Any] | None
    n_probs: int | None
    post_sampling_probs: bool | None
    seed: int | None
    stop: str | Sequence[str] | None
    cache_prompt: bool | None
    ignore_eos: bool | None
    grammar: str | None
    json_schema: Mapping[str, Any] | None
    response_format: Mapping[str, Any] | None
    lora: Sequence[Mapping[str, Any]] | None
    n_keep: int | None
    n_discard: int | None
    id_slot: int | None
    return_progress: bool | None
    timings_per_token: bool | None
    n_indent: int | None
    t_max_predict_ms: int | None
    whole: bool | None


#: Defaults that were found sound, by their looks.
_SOUND_DEFAULTS: Final[set[str]] = set()
_MOST_SOUND_DEFAULTS: Final = 1024


class ChatParams(GenerateParams, TemplateParams, total=False):
    """Keyword arguments of ``Pool.chat``: those of :class:`GenerateParams` and of
    :class:`~llamaherd.pool.chat_params.TemplateParams`.
    """


def check_defaults(defaults: Mapping[str, Any]) -> None:
    """Raise BadRequest unless these can be the parameters of requests that say nothing else."""
    # Of a catalogue's models many have the same, and a check takes as long as a request's.
    looks = repr(defaults)
    if not defaults or looks in _SOUND_DEFAULTS:
        return
    known = GenerateParams.__annotations__.keys() - _NEVER_DEFAULTS
    unknown = [name for name in defaults if name not in known]
    if unknown:
        raise BadRequest(f"{unknown[0][:50]!r} cannot be a default of requests")
    completion_request(0, "", cast(GenerateParams, defaults))
    if len(_SOUND_DEFAULTS) >= _MOST_SOUND_DEFAULTS:
        _SOUND_DEFAULTS.clear()
    _SOUND_DEFAULTS.add(looks)


def with_defaults(params: Params, defaults: Mapping[str, Any]) -> Params:
    """Return parameters with a model's defaults where they say nothing, which is also what None means."""
    if not defaults:
        return params
    given: dict[str, Any] = {name: value for name, value in params.items() if value is not None}
    # An empty schema lets any JSON pass, and nothing else.
    constrained = "json_schema" in given or any(given.get(name) for name in (*_CONSTRAINTS, "tools"))
    taken = {name: value for name, value in defaults.items() if not (constrained and name in _CONSTRAINTS)}
    return cast(Params, taken | given)


def check_command(command: Command) -> Command:
    """Return a command that a worker will understand as it stands, or raise BadRequest: not JSON, too deep, too
    large.
    """
    try:
        kind, body = encode(command)
    except (TypeError, ValueError, RecursionError, OverflowError) as error:
        raise BadRequest(f"the request cannot be written as JSON: {error}") from None
    if len(body) > MAX_MESSAGE_BYTES:
        raise BadRequest(f"the request has {len(body)} bytes, and at most {MAX_MESSAGE_BYTES} are allowed")
    if isinstance(understood := decode(kind, body), Unknown):
        raise BadRequest(f"the request cannot be read back: {understood.reason}")
    return command


def completion_request(request: int, prompt: str | Sequence[int | str], params: GenerateParams) -> Generate:
    """Return the message for a completion, or raise :class:`~llamaherd.pool.errors.BadRequest`."""
    return _generate(request, {"prompt": _prompt(prompt, "prompt")}, params)


def infill_request(
    request: int, prefix: str, suffix: str, prompt: str, extra: Sequence[tuple[str, str]], params: GenerateParams
) -> Generate:
    """Return the message for an infill, or raise :class:`~llamaherd.pool.errors.BadRequest`."""
    files: list[InfillFile] = []
    if not isinstance(extra, list | tuple):
        raise BadRequest("extra must be a list of pairs of a file's name and its text")
    for pair in extra:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise BadRequest("extra: each entry must be a file's name and its text")
        files.append(InfillFile(filename=_text(pair[0], "extra"), text=_text(pair[1], "extra")))
    gap = Infill(
        prefix=_text(prefix, "prefix"),
        suffix=_text(suffix, "suffix"),
        prompt=_text(prompt, "prompt"),
        extra=tuple(files),
    )
    return _generate(request, {"infill": gap}, params)


def chat_request(request: int, messages: Sequence[ChatMessage], params: ChatParams) -> Generate:
    """Return the message for a chat, or raise :class:`~llamaherd.pool.errors.BadRequest`."""
    return _generate(request, _conversation(messages, params), cast(GenerateParams, params))


def template_request(request: int, messages: Sequence[ChatMessage], params: TemplateParams) -> Template:
    """Return the message for a prompt, or raise :class:`~llamaherd.pool.errors.BadRequest`."""
    if unknown := set(params) - set(TemplateParams.__annotations__):
        raise BadRequest(f"unknown parameter {sorted(unknown)[0]!r}")
    return check_command(Template(request=request, **_conversation(messages, params)))


def _conversation(messages: Sequence[ChatMessage], params: TemplateParams) -> dict[str, Any]:
    checked = check_messages(messages)
    kwargs = params.get("template_kwargs") or {}
    if not isinstance(kwargs, Mapping):
        raise BadRequest("template_kwargs must be an object")
    # The reference's check: a text would be true whatever it says.
    if isinstance(kwargs.get("enable_thinking"), str):
        raise BadRequest("template_kwargs: enable_thinking must be true or false, not a text")
    options = chat_options(checked, params)
    given = None if options == ChatOptions() else options
    return {"messages": checked, "template_kwargs": dict(kwargs), "chat": given}


def check_tokens(tokens: object, name: str = "tokens") -> tuple[int, ...]:
    """Return token ids as a tuple, or raise :class:`~llamaherd.pool.errors.BadRequest`. Their range is the model's to
    check.
    """
    if isinstance(tokens, bytes) or not isinstance(tokens, Sequence):
        raise BadRequest(f"{name} must be a list of token ids")
    checked: list[int] = []
    for token in cast(Sequence[object], tokens):
        if type(token) is not int or not 0 <= token <= _INT32_MAX:
            raise BadRequest(f"{name}: token ids must be integers, 0 or more")
        checked.append(token)
    return tuple(checked)


def check_prompts(inputs: object) -> tuple[Prompt, ...]:
    """Return what is to be embedded, or raise :class:`~llamaherd.pool.errors.BadRequest`: a list of texts, of lists of
    token ids, and of lists of ids with texts between them.
    """
    if isinstance(inputs, str | bytes) or not isinstance(inputs, Sequence) or not inputs:
        raise BadRequest("inputs must be a non-empty list of texts or lists of token ids")
    return tuple(_prompt(prompt, "an input") for prompt in cast(Sequence[object], inputs))


def _prompt(prompt: object, name: str) -> Prompt:
    if isinstance(prompt, str):
        return _text(prompt, name)
    if isinstance(prompt, bytes) or not isinstance(prompt, Sequence):
        raise BadRequest(f"{name} must be a text or a list of token ids and texts")
    parts = cast(Sequence[object], prompt)
    if not any(isinstance(part, str) for part in parts):
        return check_tokens(parts, name)
    return tuple(_text(part, name) if isinstance(part, str) else check_tokens((part,), name)[0] for part in parts)


def embed_request(
    request: int, inputs: tuple[Prompt, ...], *, normalize: int | None, dimensions: int | None, pooled: bool
) -> Embed:
    """Return the message for a batch of checked inputs, or raise :class:`~llamaherd.pool.errors.BadRequest`."""
    if normalize is not None and (type(normalize) is not int or not -1 <= normalize <= _INT32_MAX):
        raise BadRequest(f"normalize must be an integer from -1 to {_INT32_MAX}")
    if dimensions is not None and (type(dimensions) is not int or not 1 <= dimensions <= _INT32_MAX):
        raise BadRequest("dimensions must be an integer, 1 or more")
    return check_command(
        Embed(request=request, inputs=inputs, normalize=normalize, dimensions=dimensions or 0, pooled=pooled)
    )


def rerank_request(request: int, query: str, documents: Sequence[str]) -> Rerank:
    """Return the message for a batch of documents, or raise :class:`~llamaherd.pool.errors.BadRequest`."""
    texts = tuple(_text(document, "a document") for document in documents)
    return check_command(Rerank(request=request, query=_text(query, "query"), documents=texts))


def tokenize_request(
    request: int,
    text: str | Sequence[int | str],
    *,
    add_special: bool = False,
    parse_special: bool = True,
    pieces: bool = False,
) -> Tokenize:
    """Return the message to tokenize a text, or raise :class:`~llamaherd.pool.errors.BadRequest`. There is a bound, for
    the worker hears no other command meanwhile.
    """
    prompt = _prompt(text, "a text")
    parts = (prompt,) if isinstance(prompt, str) else prompt
    length = sum(len(part) if isinstance(part, str) else 1 for part in parts)
    if length > MAX_TOKENIZED:
        raise BadRequest(f"the text has {length} characters, and at most {MAX_TOKENIZED} are tokenized at once")
    return check_command(
        Tokenize(request=request, text=prompt, add_special=add_special, parse_special=parse_special, pieces=pieces)
    )


def detokenize_request(request: int, tokens: object) -> Detokenize:
    """Return the message to make a text of token ids, or raise :class:`~llamaherd.pool.errors.BadRequest`."""
    checked = check_tokens(tokens)
    if len(checked) > MAX_TOKENIZED:
        raise BadRequest(f"there are {len(checked)} token ids, and at most {MAX_TOKENIZED} become text at once")
    return check_command(Detokenize(request=request, tokens=checked))


_PARAMETERS: Final = frozenset(ChatParams.__annotations__)


def _generate(request: int, subject: dict[str, Any], params: GenerateParams) -> Generate:
    if not params:
        return check_command(Generate(request=request, **subject))
    unknown = params.keys() - _PARAMETERS
    if unknown:
        raise BadRequest(f"unknown parameter {sorted(unknown)[0]!r}")
    grammar, json_schema = check_constraint(
        params.get("grammar"), params.get("json_schema"), params.get("response_format")
    )
    chat: ChatOptions | None = subject.get("chat")
    if chat is not None and chat.tools and chat.tool_choice != "none":
        if grammar:
            raise BadRequest("tools and a grammar cannot be used together")
        if chat.tool_choice == "required":
            json_schema = ""  # it is of answers that call nothing
    sampling = _sampling(params)
    command = Generate(
        request=request,
        sampling=sampling,
        insisted=_insisted(params, sampling),
        max_tokens=_integer(params, "max_tokens", -1, low=-1, high=_INT32_MAX),
        stop=_stops(params.get("stop")),
        cache_prompt=_flag(params, "cache_prompt", True),
        ignore_eos=_flag(params, "ignore_eos", False),
        lora=check_lora(params.get("lora") or ()),
        n_keep=None if params.get("n_keep") is None else _integer(params, "n_keep", 0, low=-1, high=_INT32_MAX),
        n_discard=_integer(params, "n_discard", 0, low=0, high=_INT32_MAX),
        grammar=grammar,
        json_schema=json_schema,
        slot=_integer(params, "id_slot", -1, low=-1, high=_INT32_MAX),
        progress=_flag(params, "return_progress", False),
        timed=_flag(params, "timings_per_token", False),
        n_indent=_integer(params, "n_indent", 0, low=0, high=_INT32_MAX),
        t_max_predict_ms=_integer(params, "t_max_predict_ms", 0, low=-1, high=_INT32_MAX),
        whole=_flag(params, "whole", False),
        **subject,
    )
    return check_command(command)


#: Most requests leave most of it as it is, which need not be checked each time.
_DEFAULTS: Final = Sampling()
#: What belongs to sampling and is no number.
_UNNUMBERED: Final = frozenset({"post_sampling_probs", "samplers", "dry_sequence_breakers", "logit_bias"})


def _sampling(params: GenerateParams) -> Sampling:
    given = [name for name in LIMITS if name in params]
    if not given and params.keys().isdisjoint(_UNNUMBERED):
        return _DEFAULTS
    values: dict[str, Any] = {"post_sampling_probs": _flag(params, "post_sampling_probs", False)}
    for name in given:
        low, high = LIMITS[name]
        default = getattr(_DEFAULTS, name)
        if name == "seed":
            seed = _integer(params, name, -1, low=-1, high=RANDOM_SEED)
            values[name] = default if seed == -1 else seed
        elif isinstance(default, int):
            values[name] = _integer(params, name, default, low=int(low), high=int(high))
        else:
            values[name] = _number(params, name, default, low=low, high=high)
    if params.get("samplers") is not None:
        values["samplers"] = _samplers(params.get("samplers"))
    if params.get("dry_sequence_breakers") is not None:
        values["dry_sequence_breakers"] = _texts(params.get("dry_sequence_breakers"), "dry_sequence_breakers")
    if params.get("logit_bias") is not None:
        values["logit_bias"] = _biases(params.get("logit_bias"))
    sampling = Sampling(**values)
    problem = problem_of(sampling)
    if problem is not None:
        raise BadRequest(problem)
    return sampling


def _insisted(params: GenerateParams, sampling: Sampling) -> tuple[str, ...]:
    """Return what was asked for and is as usual, of that which a model's file may recommend otherwise."""
    given = (name for name in FILE_KEYS if params.get(name) is not None)
    return tuple(name for name in given if getattr(sampling, name) == getattr(_DEFAULTS, name))


def _samplers(value: object) -> tuple[str, ...]:
    names = [(text, sampler_name(text)) for text in _texts(value, "samplers")]
    unknown = [text for text, name in names if name is None]
    if unknown:
        known = ", ".join(sorted(SAMPLER_NAMES))
        raise BadRequest(f"samplers: there is no {unknown[0][:50]!r}; known are {known}")
    return tuple(name for _, name in names if name is not None)


def _biases(value: object) -> tuple[tuple[int | str, float | None], ...]:
    pairs: list[Any]
    if isinstance(value, Mapping):
        entries = cast("Mapping[object, object]", value).items()
        pairs = [(_token_or_text(key), bias) for key, bias in entries]
    elif isinstance(value, list | tuple):
        pairs = list(cast("Sequence[Any]", value))
    else:
        raise BadRequest("logit_bias must be a list of [token, bias] pairs or an object")
    if len(pairs) > MAX_BIASES:
        raise BadRequest(f"logit_bias has {len(pairs)} entries, and at most {MAX_BIASES} are allowed")
    return tuple(_bias(pair) for pair in pairs)


def _token_or_text(key: object) -> object:
    """Read a key of OpenAI's object form: digits are a token's id. More than an id can have are a text like any
    other.
    """
    return int(key) if isinstance(key, str) and len(key) <= len(str(_INT32_MAX)) and key.isdecimal() else key


def _bias(pair: object) -> tuple[int | str, float | None]:
    if not isinstance(pair, list | tuple) or len(cast("Sequence[object]", pair)) != 2:
        raise BadRequest("logit_bias: each entry must be a token and its bias")
    target, bias = cast("Sequence[object]", pair)
    if isinstance(target, str):
        target = _text(target, "logit_bias")
    elif type(target) is not int or not 0 <= target <= _INT32_MAX:
        raise BadRequest("logit_bias: a token must be an id, 0 or more, or a text")
    if bias is False:
        return target, None
    if isinstance(bias, bool) or not isinstance(bias, int | float) or not abs(bias) < math.inf:
        raise BadRequest(f"logit_bias of {target!r} must be a finite number, or false")
    return target, float(min(max(bias, -_MOST_BIAS), _MOST_BIAS))


def _texts(value: object, name: str) -> tuple[str, ...]:
    if not isinstance(value, list | tuple):
        raise BadRequest(f"{name} must be a list of texts")
    return tuple(_text(text, name) for text in cast("Sequence[object]", value))


def _integer(params: GenerateParams, name: str, default: int, *, low: int, high: int) -> int:
    value = cast(dict[str, object], params).get(name)
    if value is None:
        return default
    if type(value) is not int or not low <= value <= high:
        raise BadRequest(f"{name} must be an integer from {low} to {high}")
    return value


def _number(
    params: GenerateParams, name: str, default: float, *, low: float = -math.inf, high: float = math.inf
) -> float:
    value = cast(dict[str, object], params).get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise BadRequest(f"{name} must be a number" + ("" if math.isinf(low) else f" from {low:g} to {high:g}"))
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise BadRequest(f"{name} must be a finite number")
    return number


def _flag(params: GenerateParams, name: str, default: bool) -> bool:
    value = cast(dict[str, object], params).get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise BadRequest(f"{name} must be true or false")
    return value


def _stops(stop: object) -> tuple[str, ...]:
    if stop is None:
        return ()
    stops: object = [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list | tuple) or len(cast(Sequence[object], stops)) > MAX_STOPS:
        raise BadRequest(f"stop must be a text or a list of at most {MAX_STOPS} texts")
    texts = tuple(_text(text, "stop") for text in cast(Sequence[object], stops))
    if any(len(text) > MAX_STOP_LENGTH for text in texts):
        raise BadRequest(f"stop: a text may have at most {MAX_STOP_LENGTH} characters")
    return tuple(text for text in texts if text)


def _text(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise BadRequest(f"{name} must be a text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadRequest(f"{name} holds a lone surrogate, which no UTF-8 text can") from None
    return value
