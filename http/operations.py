"""What each handler takes and answers, for ``/openapi.json``. A handler that is not here is described without types."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

import msgspec

from llamaherd.http import contract
from llamaherd.http.anthropic_body import MessagesBody
from llamaherd.http.responses_body import ResponsesBody
from llamaherd.http.schema import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    EmbeddingsBody,
    InfillBody,
    ModelBody,
    NativeBody,
    RerankBody,
    SlotBody,
    TokenizeBody,
)
from llamaherd.http.transcriptions import TranscriptionForm

__all__ = ["OPERATIONS", "Operation"]


class Operation(msgspec.Struct, frozen=True, kw_only=True):
    """What one handler takes and answers.

    Attributes:
        body: The type of the request's body; None says nothing of it.
        answer: The type of a whole answer; None says nothing of it.
        example: A body that is answered, if there is a model of that name.
        query: Parameters of the query.
        stream: Whether ``stream`` in the body makes the answer a stream of events.
        media_type: Of a whole answer.
        takes: Media type of the body.
    """

    body: type | None = None
    answer: Any = None
    example: dict[str, Any] | None = None
    query: tuple[str, ...] = ()
    stream: bool = False
    media_type: str = "application/json"
    takes: str = "application/json"


_MODEL: Final[dict[str, Any]] = {"model": "demo"}
_SAY: Final[dict[str, Any]] = {**_MODEL, "messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 8}
_COMPLETE: Final[dict[str, Any]] = {**_MODEL, "prompt": "The sky is", "max_tokens": 8}
_RESPOND: Final[dict[str, Any]] = {**_MODEL, "input": "Say hello.", "max_output_tokens": 8}
_INFILL: Final[dict[str, Any]] = {**_MODEL, "input_prefix": "def f(", "input_suffix": "):", "n_predict": 8}
_LOADS: Final = ("autoload",)

#: By the names of the handlers.
OPERATIONS: Final[Mapping[str, Operation]] = MappingProxyType(
    {
        "health": Operation(answer=contract.Health),
        "list_models": Operation(answer=contract.ModelList, query=("reload",)),
        "show_model": Operation(answer=contract.Model),
        "list_slots": Operation(answer=list[contract.Slot], query=("model", "fail_on_no_slot")),
        "slot_action": Operation(body=SlotBody, answer=contract.SlotAnswer, query=("model", "action")),
        "download_model": Operation(body=ModelBody, answer=contract.Success),
        "remove_model": Operation(answer=contract.Success, query=("model",)),
        "model_logs": Operation(answer=contract.ModelLogs, query=("model", "follow"), stream=True),
        "list_adapters": Operation(answer=list[contract.Adapter], query=("model",)),
        "set_adapters": Operation(body=list[contract.AdapterScale], answer=contract.Success, query=("model",)),
        "load_model": Operation(body=ModelBody, answer=contract.Success, example=_MODEL),
        "unload_model": Operation(body=ModelBody, answer=contract.Success, example=_MODEL),
        "model_events": Operation(media_type="text/event-stream"),
        "chat_completions": Operation(
            body=ChatBody, answer=contract.ChatCompletion, example=_SAY, query=_LOADS, stream=True
        ),
        "chat_input_tokens": Operation(body=ChatBody, answer=contract.InputTokens, example=_SAY, query=_LOADS),
        "completions": Operation(
            body=CompletionBody, answer=contract.TextCompletion, example=_COMPLETE, query=_LOADS, stream=True
        ),
        "responses": Operation(
            body=ResponsesBody, answer=contract.ResponseObject, example=_RESPOND, query=_LOADS, stream=True
        ),
        "responses_input_tokens": Operation(
            body=ResponsesBody, answer=contract.InputTokens, example=_RESPOND, query=_LOADS
        ),
        "messages": Operation(body=MessagesBody, answer=contract.Messages, example=_SAY, query=_LOADS, stream=True),
        "messages_count": Operation(body=MessagesBody, answer=contract.MessageTokens, example=_SAY, query=_LOADS),
        "transcriptions": Operation(
            body=TranscriptionForm,
            answer=contract.Transcript,
            query=_LOADS,
            stream=True,
            takes="multipart/form-data",
        ),
        "native_completion": Operation(
            body=NativeBody,
            answer=contract.NativeCompletion | list[contract.NativeCompletion],
            example=_COMPLETE,
            query=_LOADS,
            stream=True,
        ),
        "infill": Operation(
            body=InfillBody,
            answer=contract.NativeCompletion | list[contract.NativeCompletion],
            example=_INFILL,
            query=_LOADS,
            stream=True,
        ),
        "openai_embeddings": Operation(
            body=EmbeddingsBody,
            answer=contract.EmbeddingList | list[contract.NativeEmbedding],
            example={**_MODEL, "input": "hello"},
            query=_LOADS,
        ),
        "native_embeddings": Operation(
            body=EmbeddingsBody,
            answer=list[contract.NativeEmbedding],
            example={**_MODEL, "content": "hello"},
            query=_LOADS,
        ),
        "rerank": Operation(
            body=RerankBody,
            answer=contract.Ranked | list[contract.RankedText],
            example={**_MODEL, "query": "hello", "documents": ["hello", "bye"]},
            query=_LOADS,
        ),
        "tokenize": Operation(
            body=TokenizeBody, answer=contract.TokenList, example={**_MODEL, "content": "hello"}, query=_LOADS
        ),
        "detokenize": Operation(
            body=DetokenizeBody, answer=contract.Content, example={**_MODEL, "tokens": [1, 2]}, query=_LOADS
        ),
        "apply_template": Operation(body=ChatBody, answer=contract.Prompt, example=_SAY, query=_LOADS),
        "props": Operation(answer=contract.Props, query=("model",)),
        "metrics": Operation(media_type="text/plain"),
        "openapi": Operation(),
    }
)
