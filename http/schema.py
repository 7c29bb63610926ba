"""The bodies that clients send, and the check that makes typed values of them.

Fields that nobody here knows are ignored, as the reference does. Fields that are known and would change what the answer
means, but that the pool cannot serve yet, are refused by name unless their value means "off": an answer must never be
quietly another one than was asked for. Values out of range are for the pool to refuse.
"""

from collections.abc import Mapping
from functools import cache
from types import MappingProxyType
from typing import Annotated, Any, Final, TypeVar, cast, get_args

import msgspec

from llamaherd.http.letters import named_samplers
from llamaherd.http.problems import INVALID_REQUEST, NOT_SUPPORTED, Problem
from llamaherd.http.prompts import Prompt, prompts_of
from llamaherd.pool import ChatParams, GenerateParams, TemplateParams

__all__ = [
    "MAX_ANSWERS",
    "MAX_CHOICES",
    "MAX_PROBS",
    "MAX_TOP_LOGPROBS",
    "RANDOM_SEED",
    "UNSUPPORTED",
    "ChatBody",
    "CompletionBody",
    "DetokenizeBody",
    "EmbeddingsBody",
    "GenerateBody",
    "InfillBody",
    "ModelBody",
    "NativeBody",
    "QueuedBody",
    "RerankBody",
    "SamplingBody",
    "SlotBody",
    "StreamOptions",
    "TokenizeBody",
    "parse",
]

#: Known fields that cannot be served yet, each with the values that mean "off" and pass.
UNSUPPORTED: Final[Mapping[str, tuple[Any, ...]]] = MappingProxyType(
    {
        # what is answered
        "best_of": (None, 1),
        "echo": (None, False),
        "suffix": (None, ""),
        # what may be answered
        "functions": (None, []),
        "function_call": (None, "none", "auto"),
    }
)

#: Most answers to one prompt: each takes a slot, and one client must not take them all.
MAX_CHOICES: Final = 16
#: Most answers to one request with several prompts; they wait in the queue like as many requests.
MAX_ANSWERS: Final = 128
#: Most likely tokens that a chat may ask for with each, by OpenAI's rules, and what it gets that does not say how many.
MAX_TOP_LOGPROBS: Final = 20
#: Most that the pool tells.
MAX_PROBS: Final = 100
#: The seed that draws one at random; a seed that is counted up or folded must not become it.
RANDOM_SEED: Final = 0xFFFFFFFF
#: Numbers beyond this are no integers that anything could want.
_LARGEST: Final = 2**63


_Field = Annotated[str, msgspec.Meta(max_length=256)]


class StreamOptions(msgspec.Struct, frozen=True):
    """``include_usage``: end the stream with a chunk of token counts."""

    include_usage: bool | None = None


class ModelBody(msgspec.Struct, frozen=True, kw_only=True):
    """A body that names a model."""

    model: str | None = None


class QueuedBody(ModelBody, frozen=True, kw_only=True):
    """A body whose work waits for its model. Numbers are seconds; texts are durations such as ``5m``.

    Attributes:
        priority: Higher goes first among those that wait; the model's own by default.
        keep_alive: How long the model stays loaded after this request, if no other follows: 0 unloads it, a negative
            one keeps it for good. The model's idle times by default.
        queue_timeout: How long it may wait until its model is loaded and has a slot free; 0 means no limit.
    """

    priority: int | None = None
    keep_alive: float | str | None = None
    queue_timeout: float | str | None = None


class SamplingBody(QueuedBody, frozen=True, kw_only=True):
    """How tokens are drawn, in the pool's and llama-server's names; ranges and defaults are the pool's.

    Attributes:
        logit_bias: An object of token ids or texts and their bias, or a list of pairs of that.
        n_probs: How many likely tokens to tell with each.
        post_sampling_probs: Tell probabilities as the samplers have left them, as ``prob`` and not as ``logprob``.
        samplers: A list of names, or a text of one letter each.
        seed: OpenAI's has 64 bits; one that the samplers cannot take is folded into what they can, so that it still
            says which answer comes. -1 draws one at random.
    """

    temperature: float | None = None
    dynatemp_range: float | None = None
    dynatemp_exponent: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    top_n_sigma: float | None = None
    xtc_probability: float | None = None
    xtc_threshold: float | None = None
    min_keep: int | None = None
    repeat_last_n: int | None = None
    repeat_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    dry_multiplier: float | None = None
    dry_base: float | None = None
    dry_allowed_length: int | None = None
    dry_penalty_last_n: int | None = None
    dry_sequence_breakers: list[str] | None = None
    mirostat: int | None = None
    mirostat_tau: float | None = None
    mirostat_eta: float | None = None
    adaptive_target: float | None = None
    adaptive_decay: float | None = None
    samplers: str | list[str] | None = None
    logit_bias: dict[str, Any] | list[Any] | None = None
    n_probs: int | None = None
    post_sampling_probs: bool | None = None
    seed: int | None = None


_DRAWN: Final = tuple(name for name in SamplingBody.__struct_fields__ if name not in QueuedBody.__struct_fields__)


class GenerateBody(SamplingBody, frozen=True, kw_only=True):
    """What ``/chat/completions`` and ``/completions`` share. Null is the same as leaving a field out.

    Attributes:
        n_predict, max_completion_tokens, max_tokens: One setting by three names, in order of precedence.
        n, n_cmpl: How many answers to each prompt, each from a seed of its own. Two names, the first takes precedence.
        lora: Which LoRA adapters to apply, as objects of ``id`` and ``scale``; the model's defaults if it names none.
        id_slot: The slot to run in; -1 is any.
        return_progress: Tell how far the prompt is; streams only.
        timings_per_token: Tell ``timings`` in every chunk; streams only.
        n_indent, t_max_predict_ms: The pool's, see :class:`~llamaherd.pool.GenerateParams`.
        sse_ping_interval: Seconds between the comments of a silent stream; 0 or less sends none.
    """

    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n_predict: int | None = None
    max_completion_tokens: int | None = None
    max_tokens: int | None = None
    stop: str | list[str] | None = None
    cache_prompt: bool | None = None
    ignore_eos: bool | None = None
    grammar: str | None = None
    json_schema: dict[str, Any] | bool | None = None
    response_format: dict[str, Any] | None = None
    lora: list[dict[str, Any]] | None = None
    n_keep: int | None = None
    n_discard: int | None = None
    id_slot: int | None = None
    return_progress: bool | None = None
    timings_per_token: bool | None = None
    n_indent: int | None = None
    t_max_predict_ms: int | None = None
    sse_ping_interval: int | None = None
    n: int | None = None
    n_cmpl: int | None = None

    @property
    def choices(self) -> int:
        """How many answers are wanted. Raises Problem if that is out of range."""
        name = "n" if self.n_cmpl is None or self.n is not None else "n_cmpl"
        count: int | None = getattr(self, name)
        if count is not None and not 1 <= count <= MAX_CHOICES:
            raise Problem(INVALID_REQUEST, f"{name} must be an integer from 1 to {MAX_CHOICES}", param=name)
        return 1 if count is None else count

    @property
    def include_usage(self) -> bool:
        """Whether a stream shall end with a chunk of token counts."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def shown_probs(self) -> int | None:
        """How many likely tokens to tell with each; None tells nothing of any. Raises Problem if that is out of range.

        A wrong ``n_probs`` is returned as it is, for the pool to refuse.
        """
        return self.n_probs or None

    def to_params(self, index: int = 0) -> GenerateParams:
        """Return the pool's parameters for one of the answers. Raises Problem as ``shown_probs`` does."""
        limits = (self.n_predict, self.max_completion_tokens, self.max_tokens)
        drawn = cast("GenerateParams", {name: getattr(self, name) for name in _DRAWN})
        if isinstance(self.samplers, str):
            drawn["samplers"] = named_samplers(self.samplers)
        shown = self.shown_probs
        return GenerateParams(
            **drawn
            | GenerateParams(
                max_tokens=next((limit for limit in limits if limit is not None), None),
                # The pool tells nothing of the chosen token either unless it is asked for one more.
                n_probs=None if shown is None else shown or 1,
                seed=_seed(self.seed, index),
                stop=self.stop,
                cache_prompt=self.cache_prompt,
                ignore_eos=self.ignore_eos,
                grammar=self.grammar,
                json_schema=cast("dict[str, Any] | None", self.json_schema),
                response_format=self.response_format,
                lora=self.lora,
                n_keep=self.n_keep,
                n_discard=self.n_discard,
                id_slot=self.id_slot,
                n_indent=self.n_indent,
                t_max_predict_ms=self.t_max_predict_ms,
                # Only a stream has a place for these.
                return_progress=bool(self.stream and self.return_progress),
                timings_per_token=bool(self.stream and self.timings_per_token),
                whole=not self.stream,
            )
        )


def _seed(seed: int | None, index: int) -> int | None:
    """Return the seed of one of the answers to a request with this seed."""
    if seed is None or seed in (-1, RANDOM_SEED) or (0 <= seed < RANDOM_SEED and not index):
        return seed
    return (seed % (RANDOM_SEED + 1) + index) % RANDOM_SEED


class ChatBody(GenerateBody, frozen=True, kw_only=True):
    """``POST /v1/chat/completions``. What a message may hold is for the pool and the model's template to say.

    Attributes:
        chat_template_kwargs: Variables for the template; the pool's ``template_kwargs``.
        reasoning_effort: OpenAI's word for how much to think; ``none`` is ``enable_thinking: false``.
        reasoning_budget_tokens, thinking_budget_tokens: One setting by two names, the first takes precedence.
        logprobs: Tell how likely each token was.
        top_logprobs: How many likely ones to tell with it, 0 to 20; more than 0 only with ``logprobs``.

    The others are the pool's, see :class:`~llamaherd.pool.TemplateParams`.
    """

    messages: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning_format: str | None = None
    reasoning_effort: str | None = None
    reasoning_budget_tokens: int | None = None
    thinking_budget_tokens: int | None = None
    reasoning_budget_message: str | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | str | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None

    @property
    def shown_probs(self) -> int | None:
        top = self.top_logprobs
        if top is not None and not 0 <= top <= MAX_TOP_LOGPROBS:
            raise Problem(
                INVALID_REQUEST,
                f"top_logprobs must be an integer from 0 to {MAX_TOP_LOGPROBS}",
                param="top_logprobs",
            )
        if self.logprobs:
            return MAX_TOP_LOGPROBS if top is None else top
        if top:
            raise Problem(INVALID_REQUEST, "top_logprobs requires logprobs to be true", param="top_logprobs")
        return super().shown_probs

    def to_chat_params(self, index: int = 0) -> ChatParams:
        """Return the pool's parameters for one of the answers."""
        return ChatParams(**self.to_params(index), **self.to_template_params())

    def to_template_params(self) -> TemplateParams:
        """Return the pool's parameters for the prompt."""
        kwargs = dict(self.chat_template_kwargs or {})
        if self.reasoning_effort == "none":
            kwargs.pop("reasoning_effort", None)
            kwargs["enable_thinking"] = False
        elif self.reasoning_effort:
            kwargs["reasoning_effort"] = self.reasoning_effort
        return TemplateParams(
            template_kwargs=kwargs,
            tools=self.tools,
            tool_choice=self.tool_choice,
            parallel_tool_calls=self.parallel_tool_calls,
            reasoning_format=self.reasoning_format,
            reasoning_budget_tokens=self.thinking_budget_tokens
            if self.reasoning_budget_tokens is None
            else self.reasoning_budget_tokens,
            reasoning_budget_message=self.reasoning_budget_message,
            add_generation_prompt=self.add_generation_prompt,
            continue_final_message=self.continue_final_message,
        )


class CompletionBody(GenerateBody, frozen=True, kw_only=True):
    """``POST /v1/completions``.

    Attributes:
        prompt: One prompt or a list of several, in the shapes of :mod:`llamaherd.http.prompts`.
        logprobs: ``n_probs`` by OpenAI's name; the other takes precedence.
    """

    prompt: str | list[Any] | dict[str, Any] | None = None
    logprobs: bool | int | None = None

    @property
    def shown_probs(self) -> int | None:
        if self.n_probs is not None or not self.logprobs:
            return super().shown_probs
        if not 0 < self.logprobs <= MAX_PROBS:
            raise Problem(INVALID_REQUEST, f"logprobs must be an integer from 0 to {MAX_PROBS}", param="logprobs")
        return int(self.logprobs)

    def to_prompts(self) -> list[Prompt]:
        """Return the prompts. Raises Problem if there is none, or too many."""
        if self.prompt is None or self.prompt == []:
            raise Problem(INVALID_REQUEST, '"prompt" is required', param="prompt")
        prompts = prompts_of(self.prompt, "prompt")
        if len(prompts) > 1 and len(prompts) * self.choices > MAX_ANSWERS:
            raise Problem(
                INVALID_REQUEST,
                f"prompt: one request may ask for at most {MAX_ANSWERS} answers, and these prompts for "
                f"{len(prompts) * self.choices}",
                param="prompt",
            )
        return prompts


class NativeBody(CompletionBody, frozen=True, kw_only=True):
    """``POST /completion``: as the above, in llama-server's own terms.

    Attributes:
        return_tokens: Give the ids of the answer's tokens too; a stream always does.
        response_fields: The fields to answer with; ``a/b`` takes the field ``b`` out of the object ``a``. More than 256
            are refused, and longer ones: each is looked for in every answer.
    """

    return_tokens: bool | None = None
    response_fields: Annotated[list[_Field], msgspec.Meta(max_length=256)] | None = None

    def shown_prompts(self) -> list[str | None]:
        """Return the prompts that the answers repeat; None for one that is not known as a text."""
        return [prompt if isinstance(prompt, str) else None for prompt in self.to_prompts()]


class InfillBody(NativeBody, frozen=True, kw_only=True):
    """``POST /infill``: as the above, with a gap.

    Attributes:
        input_prefix, input_suffix: What is before and after the gap.
        input_extra: Further files, as objects of ``text`` and ``filename``.
    """

    input_prefix: str | None = None
    input_suffix: str | None = None
    input_extra: list[dict[str, Any]] | None = None

    def shown_prompts(self) -> list[str | None]:
        return [None]


class EmbeddingsBody(QueuedBody, frozen=True, kw_only=True):
    """``POST /v1/embeddings`` and llama-server's own routes.

    Attributes:
        input, content: What to embed, in one of the shapes of :mod:`llamaherd.http.prompts`.
        encoding_format: ``float`` or ``base64``.
        dimensions: Keep only so many components, and normalise those.
        embd_normalize: -1 leaves vectors as they are, 0 scales to 16-bit integers, any other p makes their p-norm 1.
    """

    input: Any = None
    content: Any = None
    encoding_format: str | None = None
    dimensions: int | None = None
    embd_normalize: int | None = None


class RerankBody(QueuedBody, frozen=True, kw_only=True):
    """``POST /rerank``.

    Attributes:
        documents, texts: What to score; ``texts`` is TEI's name, and makes the answer TEI's.
        top_n: Answer with the best so many.
        return_text: TEI's way to ask for the documents themselves in the answer.
        return_documents: Jina's.
    """

    query: str | None = None
    documents: list[Any] | None = None
    texts: list[Any] | None = None
    top_n: int | None = None
    return_text: bool | None = None
    return_documents: bool | None = None


class SlotBody(ModelBody, frozen=True, kw_only=True):
    """``POST /slots/{id_slot}``.

    Attributes:
        filename: Of the saved slot, in the folder of ``--slot-save-path``.
    """

    filename: str | None = None


class TokenizeBody(ModelBody, frozen=True, kw_only=True):
    """``POST /tokenize``."""

    content: str | list[int | str] | None = None
    add_special: bool | None = None
    parse_special: bool | None = None
    with_pieces: bool | None = None


class DetokenizeBody(ModelBody, frozen=True, kw_only=True):
    """``POST /detokenize``."""

    tokens: list[int] | None = None


B = TypeVar("B", bound=ModelBody)


def parse(raw: Mapping[str, Any], kind: type[B], *, strict: bool = True) -> B:
    """Return the body as the given kind; without ``strict`` a text may stand for a value of another type.

    ``256.0`` is an integer too: in JSON it is the same number as ``256``, and some clients know no other.

    Raises:
        Problem: 400, with the path of the first field of a wrong type or the name of one that is not supported.
    """
    try:
        body = msgspec.convert(raw, kind, strict=strict)
    except msgspec.ValidationError as error:
        whole = _integral(raw, kind)
        if whole:
            return parse({**raw, **whole}, kind, strict=strict)
        reason, _, path = str(error).partition(" - at `$")
        # Of a field that is missing from the body itself, the text has the name and no path.
        field = path.strip(".`") or reason.split("`")[1]
        raise Problem(INVALID_REQUEST, f"{field}: {reason[:1].lower()}{reason[1:]}", param=field) from None
    if issubclass(kind, GenerateBody):
        _refuse_unsupported(raw)
    return body


def _integral(raw: Mapping[str, Any], kind: type[ModelBody]) -> dict[str, int]:
    """Return the fields that shall be integers and are written as another kind of number."""
    return {
        name: int(value)
        for name in _integers(kind)
        if type(value := raw.get(name)) is float and value.is_integer() and abs(value) < _LARGEST
    }


@cache
def _integers(kind: type[ModelBody]) -> tuple[str, ...]:
    """Return the fields of a body that take integers, and no other numbers."""
    types = {field.name: get_args(field.type) for field in msgspec.structs.fields(kind)}
    return tuple(name for name, some in types.items() if int in some and float not in some)


def _refuse_unsupported(raw: Mapping[str, Any]) -> None:
    for name, off in UNSUPPORTED.items():
        if name == "best_of":
            wanted = raw.get("n")
            off = (*off, raw.get("n_cmpl") if wanted is None else wanted)  # nothing is left to choose
        if name in raw and raw[name] not in off:
            raise Problem(NOT_SUPPORTED, f"{name}: this value is not supported yet; leave the field out", param=name)
