"""The calls of a pool that generate."""

from collections.abc import Sequence
from typing import Unpack

from llamaherd.pool.calls import Calls
from llamaherd.pool.chat_params import ChatMessage
from llamaherd.pool.entry import Entry, Request, Stream
from llamaherd.pool.generation import Generation
from llamaherd.pool.params import (
    ChatParams,
    GenerateParams,
    chat_request,
    completion_request,
    infill_request,
    with_defaults,
)
from llamaherd.transport.messages import Generate

__all__ = ["GenerationCalls"]


class GenerationCalls(Calls):
    """Chats, continued texts and filled gaps, each as a stream of pieces."""

    def chat(
        self,
        model: str,
        messages: Sequence[ChatMessage],
        *,
        autoload: bool = True,
        priority: int | None = None,
        keep_alive: float | None = None,
        queue_timeout: float | None = None,
        **params: Unpack[ChatParams],
    ) -> Generation:
        """Answer a conversation, as a stream of pieces. Returns at once; the model is loaded if it must be.

        Args:
            model: A model's name or alias.
            messages: OpenAI chat messages: objects with ``role`` and ``content``; the model's own template renders
                them.
            autoload: If False, a model that is not running is an error instead of a load.
            priority: Higher goes first among those that wait; the model's own by default.
            keep_alive: Seconds that the model stays loaded after this request, if no other follows; negative means for
                good. The model's idle times by default.
            queue_timeout: Seconds that it may wait until its model is loaded and has a slot free; 0 means no limit,
                None the model's, or else the pool's.
            **params: See :class:`~llamaherd.pool.params.ChatParams`.

        Raises:
            BadRequest, ModelNotFound, ModelNotLoaded, PoolClosed, LoadFailed (of a broken model): at once.
            LoadFailed, WorkerDied, WorkerFailed, QueueFull, QueueTimeout, BadRequest (a prompt longer than the
                context): from the iteration.
        """
        entry = self._entry_for(model, autoload)
        params = with_defaults(params, entry.spec.defaults)
        command = chat_request(self._herd.next_number(), messages, params)
        return self._generate(entry, command, priority, keep_alive, queue_timeout)

    def complete(
        self,
        model: str,
        prompt: str | Sequence[int | str],
        *,
        autoload: bool = True,
        priority: int | None = None,
        keep_alive: float | None = None,
        queue_timeout: float | None = None,
        **params: Unpack[GenerateParams],
    ) -> Generation:
        """Continue a text, or a list of token ids with texts between them. Otherwise as :meth:`chat`, without a
        template.
        """
        entry = self._entry_for(model, autoload)
        params = with_defaults(params, entry.spec.defaults)
        command = completion_request(self._herd.next_number(), prompt, params)
        return self._generate(entry, command, priority, keep_alive, queue_timeout)

    def infill(
        self,
        model: str,
        prefix: str,
        suffix: str,
        *,
        prompt: str = "",
        extra: Sequence[tuple[str, str]] = (),
        autoload: bool = True,
        priority: int | None = None,
        keep_alive: float | None = None,
        queue_timeout: float | None = None,
        **params: Unpack[GenerateParams],
    ) -> Generation:
        """Fill the gap between two texts. Otherwise as :meth:`chat`, without a template.

        Args:
            prompt: The beginning of what is to fill the gap.
            extra: Further files of the project, each its name and its text; the last ones matter most. What does not
                fit is left out, of all texts what is farthest from the gap.

        Raises:
            BadRequest: the model has no tokens for it (code ``unsupported_by_model``). And as :meth:`chat`.
        """
        entry = self._entry_for(model, autoload)
        params = with_defaults(params, entry.spec.defaults)
        command = infill_request(self._herd.next_number(), prefix, suffix, prompt, extra, params)
        return self._generate(entry, command, priority, keep_alive, queue_timeout)

    def _generate(
        self,
        entry: Entry,
        command: Generate,
        priority: int | None,
        keep_alive: float | None,
        queue_timeout: float | None,
    ) -> Generation:
        wait, keep_alive, rank = self._admission(entry, priority, keep_alive, queue_timeout)
        number = command.request
        generation = Generation(entry.name, lambda: self._herd.leave(number), number)
        request = Request(number, entry, command, Stream(generation), keep_alive=keep_alive, queue_timeout=wait)
        request.priority = rank
        self._herd.accept(request)
        return generation
