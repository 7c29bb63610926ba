"""The calls of a pool that make something of their inputs at once: vectors, scores, tokens and prompts."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Unpack

from llamaherd.pool.calls import Calls
from llamaherd.pool.chat_params import ChatMessage, TemplateParams
from llamaherd.pool.embeddings import (
    Embedding,
    Embeddings,
    Ranking,
    RowLimit,
    Vectorial,
    batches,
    first_float,
    joined,
    pipelined,
    size_of,
)
from llamaherd.pool.entry import Entry, Request
from llamaherd.pool.errors import BadRequest
from llamaherd.pool.params import (
    check_prompts,
    detokenize_request,
    embed_request,
    rerank_request,
    template_request,
    tokenize_request,
)
from llamaherd.transport.messages import Embed, Prompt, Rerank, Usage

__all__ = ["InputCalls"]


class InputCalls(Calls):
    """Embeddings and rankings, which are cut into batches, and what takes one command."""

    async def embed(
        self,
        model: str,
        inputs: Sequence[str | Sequence[int | str]],
        *,
        normalize: int | None = None,
        dimensions: int | None = None,
        pooled: bool = False,
        autoload: bool = True,
        priority: int | None = None,
        keep_alive: float | None = None,
        queue_timeout: float | None = None,
    ) -> Embeddings:
        """Return the embeddings of inputs. Thousands may be given: they reach the worker in batches of bounded size.

        Any model embeds, beside what it generates; its pooling is that of its file or of its option ``pooling``.

        Args:
            inputs: Texts, or lists of token ids with texts between them.
            normalize: -1 leaves vectors as they are, 0 scales their largest component to 32760, and any other p makes
                their p-norm 1; None is the model's option ``embd_normalize``, 2 by default. The embeddings of single
                tokens (pooling ``none``) stay as they are.
            dimensions: Keep only the first so many components, and normalise those.
            pooled: Make it an error if the model's pooling is ``none``, which gives several vectors per input.
            autoload, priority, keep_alive, queue_timeout: As in :meth:`chat`.

        Raises:
            BadRequest: an input is empty or longer than the model takes, or ``dimensions`` is more than it has, or the
                vectors of all tokens (pooling ``none``) take more than a sixteenth of the free memory; the message
                names the setting that decides. And as :meth:`chat`.
        """
        entry = self._entry_for(model, autoload)
        prompts = check_prompts(inputs)

        def command(number: int, batch: tuple[Prompt, ...]) -> Embed:
            return embed_request(number, batch, normalize=normalize, dimensions=dimensions, pooled=pooled)

        work = self._vectors(entry, command, priority, keep_alive, queue_timeout)
        items, usage = joined(await pipelined(batches(prompts, size_of), work))
        return Embeddings(model=entry.name, items=items, usage=usage)

    async def rerank(
        self,
        model: str,
        query: str,
        documents: Sequence[str],
        *,
        autoload: bool = True,
        priority: int | None = None,
        keep_alive: float | None = None,
        queue_timeout: float | None = None,
    ) -> Ranking:
        """Return how well each document answers a query. The model must be a reranker.

        Raises:
            BadRequest: it is none, or a document is longer than it takes together with the query. And as :meth:`chat`.
        """
        entry = self._entry_for(model, autoload)
        if isinstance(documents, str | bytes) or not isinstance(documents, Sequence) or not documents:
            raise BadRequest("documents must be a non-empty list of texts")
        rerank_request(0, query, documents)

        def command(number: int, batch: tuple[str, ...]) -> Rerank:
            return rerank_request(number, query, batch)

        work = self._vectors(entry, command, priority, keep_alive, queue_timeout)
        items, usage = joined(await pipelined(batches(documents, lambda text: len(text) + len(query)), work))
        return Ranking(model=entry.name, scores=tuple(map(first_float, items)), usage=usage)

    def _vectors(
        self,
        entry: Entry,
        command: Callable[[int, tuple[Any, ...]], Embed | Rerank],
        priority: int | None,
        keep_alive: float | None,
        queue_timeout: float | None,
    ) -> Callable[[tuple[Any, ...]], Awaitable[tuple[list[Embedding], Usage]]]:
        """Return the function that has a worker compute one batch."""
        wait, keep_alive, rank = self._admission(entry, priority, keep_alive, queue_timeout)
        limit = RowLimit()

        async def compute(batch: tuple[Any, ...]) -> tuple[list[Embedding], Usage]:
            number = self._herd.next_number()
            future: asyncio.Future[tuple[list[Embedding], Usage]] = asyncio.get_running_loop().create_future()
            request = Request(number, entry, command(number, batch), Vectorial(future, len(batch), limit))
            request.keep_alive, request.queue_timeout = keep_alive, wait
            request.priority = rank
            self._herd.accept(request)
            try:
                return await future
            finally:
                self._herd.leave(number)

        return compute

    async def tokenize(
        self, model: str, text: str | Sequence[int | str], *, add_special: bool = False, parse_special: bool = True
    ) -> list[int]:
        """Return the token ids of a text, or of token ids with texts between them. Raises as :meth:`chat`."""
        number = self._herd.next_number()
        command = tokenize_request(number, text, add_special=add_special, parse_special=parse_special)
        result = await self._ask(self._entry_for(model), number, command)
        return list(result.tokens or ()) if result is not None else []

    async def token_pieces(
        self, model: str, text: str | Sequence[int | str], *, add_special: bool = False, parse_special: bool = True
    ) -> list[tuple[int, bytes]]:
        """Return each token of a text with its bytes, which need not be whole characters. Otherwise as
        :meth:`tokenize`.
        """
        number = self._herd.next_number()
        command = tokenize_request(number, text, add_special=add_special, parse_special=parse_special, pieces=True)
        result = await self._ask(self._entry_for(model), number, command)
        return list(zip(result.tokens or (), result.pieces or (), strict=True)) if result is not None else []

    async def detokenize(self, model: str, tokens: Sequence[int]) -> str:
        """Return the text of token ids. Raises as :meth:`chat`."""
        number = self._herd.next_number()
        command = detokenize_request(number, tokens)
        result = await self._ask(self._entry_for(model), number, command)
        return (result.text or "") if result is not None else ""

    async def apply_template(
        self, model: str, messages: Sequence[ChatMessage], **params: Unpack[TemplateParams]
    ) -> str:
        """Return the prompt that :meth:`chat` would make of a conversation. Raises as :meth:`chat`.

        Args:
            model: A model's name or alias.
            messages: As :meth:`chat` takes them.
            **params: See :class:`~llamaherd.pool.chat_params.TemplateParams`.
        """
        number = self._herd.next_number()
        command = template_request(number, messages, params)
        result = await self._ask(self._entry_for(model), number, command)
        return (result.text or "") if result is not None else ""
