"""What answers hold, as types: for ``/openapi.json``, and so for the tests that hold the answers to it.

Answers are made elsewhere, as plain objects; nothing is made of these. Fields that are listed are there, unless they
have a default; others may be.
"""

from typing import Any, Literal

import msgspec

__all__ = [
    "ChatCompletion",
    "Adapter",
    "AdapterScale",
    "Content",
    "EmbeddingList",
    "ErrorBody",
    "Health",
    "InputTokens",
    "MessageTokens",
    "Messages",
    "Model",
    "ModelList",
    "ModelLogs",
    "NativeCompletion",
    "NativeEmbedding",
    "Prompt",
    "Props",
    "Ranked",
    "RankedText",
    "ResponseObject",
    "Success",
    "TextCompletion",
    "Slot",
    "SlotAnswer",
    "TokenList",
    "Transcript",
]


class Error(msgspec.Struct):
    """``code`` is the HTTP status, ``param`` the field of the request that is wrong."""

    message: str
    type: str
    code: int
    param: str | msgspec.UnsetType = msgspec.UNSET


class ErrorBody(msgspec.Struct):
    """Every error; under ``/v1/messages`` with a ``type`` that says so, as Anthropic has it."""

    error: Error
    type: Literal["error"] | msgspec.UnsetType = msgspec.UNSET


class Health(msgspec.Struct):
    """The server answers."""

    status: Literal["ok"]


class Adapter(msgspec.Struct):
    """A LoRA adapter of a model."""

    id: int
    path: str
    scale: float
    task_name: str
    prompt_prefix: str


class AdapterScale(msgspec.Struct):
    """How strongly an adapter is applied to requests that name none."""

    id: int
    scale: float


class ModelLogs(msgspec.Struct):
    """The last lines that a model's workers printed."""

    model: str
    lines: list[str]


class Success(msgspec.Struct):
    """It was done, or begun."""

    success: Literal[True]


class ModelState(msgspec.Struct):
    """``preset`` where settings made it; ``progress`` while it loads; ``failed`` and ``exit_code`` once its worker has
    ended with an error.
    """

    value: str
    args: list[str]
    preset: str | msgspec.UnsetType = msgspec.UNSET
    progress: dict[str, Any] | msgspec.UnsetType = msgspec.UNSET
    failed: bool | msgspec.UnsetType = msgspec.UNSET
    exit_code: int | None | msgspec.UnsetType = msgspec.UNSET


class Modalities(msgspec.Struct):
    """What a model reads and writes."""

    input_modalities: list[str]
    output_modalities: list[str]


class Model(msgspec.Struct):
    """One model; facts of it follow once it was loaded."""

    id: str
    aliases: list[str]
    tags: list[str]
    object: Literal["model"]
    owned_by: str
    created: int
    status: ModelState
    architecture: Modalities
    source: str
    can_remove: bool


class ModelList(msgspec.Struct):
    """All models."""

    data: list[Model]
    object: Literal["list"]


class PromptDetails(msgspec.Struct):
    """Of the prompt's tokens, those that were not computed again."""

    cached_tokens: int


class CompletionDetails(msgspec.Struct):
    """What the answer's tokens were."""

    reasoning_tokens: int


class Usage(msgspec.Struct):
    """Token counts of an answer."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: CompletionDetails


class ChatMessage(msgspec.Struct):
    """What the model says."""

    role: Literal["assistant"]
    content: str | None


class ChatChoice(msgspec.Struct):
    """One answer of a chat."""

    index: int
    message: ChatMessage
    finish_reason: str


class ChatCompletion(msgspec.Struct):
    """An answer of ``/v1/chat/completions``."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class TextChoice(msgspec.Struct):
    """One continuation."""

    index: int
    text: str
    finish_reason: str
    logprobs: dict[str, Any] | None


class TextCompletion(msgspec.Struct):
    """An answer of ``/v1/completions``."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage


class NativeCompletion(msgspec.Struct):
    """An answer of ``/completion``; ``response_fields`` may have chosen among all of this."""

    content: str | msgspec.UnsetType = msgspec.UNSET
    stop: bool | msgspec.UnsetType = msgspec.UNSET
    tokens_predicted: int | msgspec.UnsetType = msgspec.UNSET
    tokens_evaluated: int | msgspec.UnsetType = msgspec.UNSET
    stop_type: Literal["eos", "limit", "word", "none"] | msgspec.UnsetType = msgspec.UNSET


class MessageUsage(msgspec.Struct):
    """Token counts, as Anthropic has them."""

    input_tokens: int
    output_tokens: int
    cache_read_input_tokens: int


class Messages(msgspec.Struct):
    """An answer of ``/v1/messages``."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    content: list[dict[str, Any]]
    model: str
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]
    stop_sequence: str | None
    usage: MessageUsage


class MessageTokens(msgspec.Struct):
    """The tokens of a prompt, as Anthropic tells them."""

    input_tokens: int


class InputTokens(msgspec.Struct):
    """The tokens of a prompt, as OpenAI tells them."""

    object: Literal["response.input_tokens"]
    input_tokens: int


class ResponseObject(msgspec.Struct):
    """An answer of ``/v1/responses``."""

    id: str
    object: Literal["response"]
    created_at: int
    model: str
    output: list[dict[str, Any]]
    status: Literal["completed", "incomplete"]
    usage: dict[str, Any]


class InputUsage(msgspec.Struct):
    """Token counts of what was only read."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingItem(msgspec.Struct):
    """One embedding: numbers, or 32-bit floats in base64."""

    index: int
    object: Literal["embedding"]
    embedding: list[float] | str


class EmbeddingList(msgspec.Struct):
    """An answer of ``/v1/embeddings``; with ``content`` in the body it is that of ``/embeddings``."""

    object: Literal["list"]
    model: str
    data: list[EmbeddingItem]
    usage: InputUsage


class NativeEmbedding(msgspec.Struct):
    """An entry of an answer of ``/embeddings``: a vector, or without pooling one for each token."""

    index: int
    embedding: list[list[float]]


class RankedItem(msgspec.Struct):
    """One document's score, in Jina's words."""

    index: int
    relevance_score: float


class Ranked(msgspec.Struct):
    """An answer of ``/rerank``, best first."""

    object: Literal["list"]
    model: str
    results: list[RankedItem]
    usage: InputUsage


class RankedText(msgspec.Struct):
    """An entry of an answer of ``/rerank`` in TEI's words, for ``texts``."""

    index: int
    score: float


class Slot(msgspec.Struct):
    """A place where requests run, and the request that runs there or did last."""

    id: int
    n_ctx: int
    speculative: bool
    is_processing: bool
    n_prompt_tokens: int


class SlotAnswer(msgspec.Struct):
    """What came of saving, restoring or erasing a slot."""

    id_slot: int


class TokenList(msgspec.Struct):
    """The tokens of a text: their ids, or objects of ``id`` and ``piece``."""

    tokens: list[int | dict[str, Any]]


class Content(msgspec.Struct):
    """The text of tokens."""

    content: str


class Prompt(msgspec.Struct):
    """What a chat becomes."""

    prompt: str


class Props(msgspec.Struct):
    """The properties of the server or of a model."""

    default_generation_settings: dict[str, Any]
    build_info: str


class Transcript(msgspec.Struct):
    """What is said in a sound."""

    type: Literal["transcript.text.done"]
    text: str
    usage: dict[str, Any]
