"""Requests for embeddings and scores, checked and tokenised: what is refused here would abort the process later."""

from array import array
from collections import deque
from dataclasses import dataclass
from typing import Final

from llamaherd.pool.child import llama_model
from llamaherd.pool.child.embed_context import Shape
from llamaherd.pool.child.engine import RequestError
from llamaherd.pool.child.inputs import MOST_INPUTS, least_tokens, pair_tokens, prompt_tokens
from llamaherd.pool.child.model import Model
from llamaherd.transport.messages import Embed, Rerank, Result, Usage

__all__ = ["Job", "embed_job", "rerank_job"]

_AS_IT_IS: Final = -1


@dataclass(slots=True, eq=False)
class Job:
    """One request.

    Attributes:
        number: The request's.
        inputs: What has not been begun: each input's place and tokens.
        normalize: As in the command.
        dimensions: Components to keep; 0 keeps all.
        left: How many inputs are not done.
        n_tokens: Tokens of all inputs.
    """

    number: int
    inputs: "deque[tuple[int, array[int]]]"
    normalize: int
    dimensions: int
    left: int
    n_tokens: int

    def done(self) -> Result:
        """Return the message that ends it."""
        return Result(request=self.number, usage=Usage(prompt_tokens=self.n_tokens))


def embed_job(command: Embed, model: Model, shape: Shape, normalize: int) -> Job:
    """Return the job of a command; ``normalize`` is for those that do not say. Raises RequestError."""
    normalize = normalize if command.normalize is None else command.normalize
    if shape.pooling == "rank":
        raise RequestError("this model scores documents (pooling rank); ask it to rerank", code="unsupported_by_model")
    if command.pooled and shape.pooling == "none":
        raise RequestError(
            "pooling none gives a vector for each token of an input, and one for the input is asked for; "
            "set the option pooling (--pooling) to mean, cls or last",
            code="no_pooling",
        )
    if normalize < _AS_IT_IS:
        raise RequestError(f"normalize is {normalize}; it must be -1 or more", code="invalid_normalize")
    if not 0 <= command.dimensions <= shape.width:
        raise RequestError(
            f"dimensions is {command.dimensions}; this model's embeddings have {shape.width}",
            code="invalid_dimensions",
        )
    _check_count(len(command.inputs))
    inputs: deque[tuple[int, array[int]]] = deque()
    for index, prompt in enumerate(command.inputs):
        least = least_tokens(model.vocab, prompt, shape.longest + 1)
        tokens = [] if least > shape.longest else prompt_tokens(model.vocab, prompt)
        inputs.append((index, _checked(f"input {index}", tokens, least, model, shape)))
    return _job(command.request, inputs, normalize, command.dimensions)


def rerank_job(command: Rerank, model: Model, shape: Shape) -> Job:
    """Return the job of a command: one input per document. Raises RequestError."""
    if shape.pooling != "rank":
        raise RequestError(
            f"this model embeds (pooling {shape.pooling}) and does not score documents; a reranker is needed, or the "
            "option pooling (--pooling) set to rank for one whose file does not say so",
            code="unsupported_by_model",
        )
    _check_count(len(command.documents))
    template = llama_model.chat_template(model.handle, "rerank")
    inputs: deque[tuple[int, array[int]]] = deque()
    for index, document in enumerate(command.documents):
        least = model.vocab.least_tokens(len(command.query) + len(document), shape.longest + 1)
        tokens = [] if least > shape.longest else pair_tokens(model.vocab, template, command.query, document)
        inputs.append((index, _checked(f"document {index}", tokens, least, model, shape)))
    return _job(command.request, inputs, _AS_IT_IS, 0)


def _job(request: int, inputs: "deque[tuple[int, array[int]]]", normalize: int, dimensions: int) -> Job:
    return Job(request, inputs, normalize, dimensions, len(inputs), sum(len(tokens) for _, tokens in inputs))


def _checked(name: str, tokens: list[int], least: int, model: Model, shape: Shape) -> "array[int]":
    if max(least, len(tokens)) > shape.longest:
        count = str(len(tokens)) if tokens else f"at least {least}"
        raise RequestError(
            f"{name} ({count} tokens) is too large to process: at most {shape.longest} tokens"
            f"{_how_to_grow(model, shape)}",
            code="context_length_exceeded",
            details={"n_prompt_tokens": max(least, len(tokens)), "n_ctx": shape.longest},
        )
    if not tokens:
        raise RequestError(f"{name} is empty", code="empty_prompt")
    return array("i", tokens)


def _how_to_grow(model: Model, shape: Shape) -> str:
    if shape.splittable:
        return "; increase n_ctx (--ctx-size)"
    if shape.longest < model.n_ctx_train:
        return "; increase n_ubatch (--ubatch-size), as this model takes an input whole"
    return ", as the model was made for"


def _check_count(count: int) -> None:
    if count > MOST_INPUTS:
        raise RequestError(f"{count} inputs are given; at most {MOST_INPUTS} are taken at a time", code="too_large")
