"""The Pool: what a program uses. It checks what callers say, and asks the herd."""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, Unpack

import msgspec
from msgspec.structs import replace

from llamaherd.pool.adapters import AdapterStatus, check_lora, describe, scales_of
from llamaherd.pool.admission import check_keep_alive, check_priority, check_queue_timeout
from llamaherd.pool.chat_params import ChatMessage, TemplateParams
from llamaherd.pool.config import (
    DEFAULT_DRAIN_TIMEOUT,
    DEFAULT_STOP_TIMEOUT,
    MAX_NAME_LENGTH,
    BrokenModel,
    ModelSpec,
)
from llamaherd.pool.counts import PoolCounts
from llamaherd.pool.downloads import Job
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
from llamaherd.pool.entry import Answer, Entry, Replica, Request, Stream
from llamaherd.pool.errands import in_thread
from llamaherd.pool.errors import BadRequest, ModelBusy, ModelNotFound, ModelNotLoaded, PoolClosed, PoolError
from llamaherd.pool.events import Subscription
from llamaherd.pool.explain import explain_broken
from llamaherd.pool.generation import Generation
from llamaherd.pool.gpus import FixedGpus, Gpus, find_gpus
from llamaherd.pool.herd import Herd
from llamaherd.pool.launch import Launcher, LocalLauncher
from llamaherd.pool.lifecycle import RUNNING, State
from llamaherd.pool.machine import usable_cores
from llamaherd.pool.memory import Budget, automatic_budget
from llamaherd.pool.names import parse_name
from llamaherd.pool.origin import Origin, file_of_url
from llamaherd.pool.params import (
    ChatParams,
    GenerateParams,
    chat_request,
    check_command,
    check_prompts,
    completion_request,
    detokenize_request,
    embed_request,
    infill_request,
    rerank_request,
    template_request,
    tokenize_request,
    with_defaults,
)
from llamaherd.pool.reload import ReloadReport
from llamaherd.pool.schedule import Limits
from llamaherd.pool.status import ModelStatus
from llamaherd.transport import make_transport
from llamaherd.transport.messages import (
    Embed,
    Generate,
    PoolMessage,
    Prompt,
    Rerank,
    Result,
    SlotFile,
    Slots,
    SlotState,
    Usage,
)
from llamaherd.transport.messages import Sequence as SlotCommand

__all__ = ["Pool"]

_log = logging.getLogger("llamaherd.pool")


class Pool:
    """A pool of models, each served by a worker process that starts when it is needed.

    Use it as an async context manager; every method belongs to the loop that entered it. Leaving it stops all workers
    and returns when the last one is reaped.

    Args:
        models: What the pool may run. Nothing is loaded before it is asked for.
        transport: How workers are spoken to: ``pipe`` (default), ``zmq`` or ``stdio``.
        models_max: Most models with a process at one time; 0 means no limit.
        memory_budget: Most bytes that all workers together may take, wherever; 0, the default, means no limit. What a
            model takes is estimated from its file before the first load, and measured after it; one that does not fit
            alone is refused. ``auto`` takes 80 % of the memory that is free now, and 90 % of what is free of each
            NVIDIA GPU where the package ``nvidia-ml-py`` is installed; one that does not fit alone then runs alone.
        stop_timeout: Seconds from a worker's exit command to its kill, where the model sets none of its own.
        cores: Cores to divide among the models that are busy at the moment; None takes those that this process may
            use, 0 leaves each model its own choice. Models whose ``n_threads`` is set keep it.
        spare: Keep one more worker, without a model and with the engine imported, so that the next load does not wait
            for the start of a process.
        queue_max: Most requests that wait, in total; further ones fail with ``QueueFull``. 0 means no limit.
        queue_max_per_model: The same for one model.
        queue_timeout: Seconds that a request may wait until its model is loaded and has a slot free for it, where the
            request sets no limit of its own; it fails with ``QueueTimeout`` then. 0, the default, means no limit.
        launcher: How workers come to run; local processes by default.
        gpus: Who knows the GPUs, for ``memory_budget="auto"``; NVIDIA's driver by default.

    Raises:
        BadRequest: a number is out of range, a spec is wrong, or two models share a name.
        UnknownTransport: ``transport`` names none.
    """

    def __init__(
        self,
        models: Iterable[ModelSpec] = (),
        *,
        transport: str = "pipe",
        models_max: int = 4,
        memory_budget: int | Literal["auto"] = 0,
        stop_timeout: float = DEFAULT_STOP_TIMEOUT,
        cores: int | None = None,
        spare: bool = False,
        queue_max: int = 1024,
        queue_max_per_model: int = 0,
        queue_timeout: float = 0.0,
        launcher: Launcher | None = None,
        gpus: Gpus | None = None,
    ) -> None:
        if isinstance(memory_budget, str) and memory_budget != "auto":
            raise BadRequest("memory_budget must be a number of bytes, or 'auto'")
        lenient = memory_budget == "auto"
        gpu_memory = (gpus or find_gpus()) if lenient else FixedGpus()
        budget = automatic_budget(gpu_memory) if lenient else Budget(int(memory_budget))
        limits = Limits(
            models_max=models_max,
            memory_budget=budget.host,
            gpu_budgets=budget.gpu_bytes,
            cores=usable_cores() if cores is None else cores,
            queue_max=queue_max,
            queue_max_per_model=queue_max_per_model,
        )
        for name in ("models_max", "memory_budget", "cores", "queue_max", "queue_max_per_model"):
            if getattr(limits, name) < 0:
                raise BadRequest(f"{name} must be 0 or more")
        if not 0 <= stop_timeout < float("inf"):
            raise BadRequest("stop_timeout must be a finite number of seconds, 0 or more")
        self._queue_timeout = check_queue_timeout(queue_timeout)
        self._transport = make_transport(transport)
        self._herd = Herd(
            self._transport,
            launcher or LocalLauncher(),
            limits=limits,
            stop_timeout=stop_timeout,
            spare=spare,
            gpus=budget.gpus,
            gpu_memory=gpu_memory,
            lenient=lenient,
        )
        self._open = False
        self._closing: asyncio.Task[None] | None = None
        for spec in models:
            self._herd.add(spec)

    def __repr__(self) -> str:
        return f"<Pool {'open' if self._open else 'closed'}, {self._herd!r}>"

    # --- opening and closing ---

    async def __aenter__(self) -> Self:
        if self._open or self._closing is not None:
            raise PoolClosed("a pool can be entered once")
        await self._transport.open()
        self._open = True
        for name in self._herd.wanted_at_start():
            try:
                self.start_load(name)
            except PoolError as error:  # such as one that is not downloaded yet; the others serve
                _log.warning("not loaded at the start: %s", error)
        self._herd.keep_spare()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Refuse what is new, fail what waits or runs with ``PoolClosed``, stop all workers, and return when all are
        reaped.

        Idempotent. A cancelled call kills what is left, waits until it is gone, and is cancelled then.
        """
        if self._closing is None:
            self._open = False
            self._closing = asyncio.get_running_loop().create_task(self._herd.close())
        try:
            await asyncio.shield(self._closing)
        except asyncio.CancelledError:
            self._herd.kill_all()
            await asyncio.shield(self._closing)
            raise

    async def drain(self, limit: float = DEFAULT_DRAIN_TIMEOUT) -> None:
        """Refuse what is new, let what waits or runs come to its end, and close as :meth:`aclose` does, when nothing is
        left or ``limit`` seconds have passed.

        A cancelled call does not close; the pool goes on refusing.

        Raises:
            BadRequest: ``limit`` is no time.
        """
        if not 0 <= limit < float("inf"):
            raise BadRequest("limit must be a finite number of seconds, 0 or more")
        self._open = False
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit):
                await self._herd.rest()
        await self.aclose()

    # --- requests ---

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

    def _entry_for(self, model: str, autoload: bool = True) -> Entry:
        if not self._open:
            raise PoolClosed("the pool is not open")
        entry = self._entry(model)
        if entry.broken:
            raise explain_broken(entry)
        if not autoload and entry.state not in RUNNING:
            raise ModelNotLoaded(f"model {entry.name!r} is not loaded", code="model_not_loaded")
        return entry

    def _entry(self, model: str) -> Entry:
        entry = self._herd.find(model)
        if entry is None:
            raise ModelNotFound(f"model {_quoted(model)} not found", code="model_not_found")
        return entry

    def _patience(self, entry: Entry) -> float:
        """Return how long a request may wait for a model that sets no limit itself."""
        own = entry.spec.queue_timeout
        return self._queue_timeout if own is None else own

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

    def _admission(
        self, entry: Entry, priority: int | None, keep_alive: float | None, queue_timeout: float | None
    ) -> tuple[float, float | None, int]:
        """Return a request's limit to waiting, its ``keep_alive`` and its priority. Raises BadRequest."""
        return (
            self._patience(entry) if queue_timeout is None else check_queue_timeout(queue_timeout),
            None if keep_alive is None else check_keep_alive(keep_alive),
            entry.spec.priority if priority is None else check_priority(priority),
        )

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

    async def _ask(self, entry: Entry, number: int, command: PoolMessage | None) -> Result | None:
        future: asyncio.Future[Result | None] = asyncio.get_running_loop().create_future()
        request = Request(number, entry, command, Answer(future), priority=entry.spec.priority)
        if command is not None:
            request.queue_timeout = self._patience(entry)
        self._herd.accept(request)
        try:
            return await future
        finally:
            self._herd.leave(number)

    # --- slots ---

    async def slots(self, model: str) -> list[SlotState]:
        """Return what runs where in a model's workers. Wakes and loads nothing, and is not held up by what waits.

        With several replicas their slots follow each other: the second one's begin at ``n_parallel``.

        Raises:
            ModelNotLoaded: it is not loaded, or asleep. ModelNotFound, PoolClosed, WorkerDied, WorkerFailed.
        """
        entry = self._entry_for(model)
        awake = [one for one in entry.replicas if one.state is State.LOADED and not one.drowsy]
        if not awake:
            raise ModelNotLoaded(f"model {entry.name!r} is not loaded", code="model_not_loaded")
        found: list[SlotState] = []
        for replica in awake:
            result = await self._look(replica, Slots(request=self._herd.next_number()))
            first = replica.index * replica.spec.options.n_parallel
            found += [replace(slot, id=first + slot.id) for slot in result.slots or ()]
        return found

    async def save_slot(self, model: str, slot: int, name: str) -> SlotFile:
        """Save what a slot's last request has left in the cache, once the slot is idle.

        Args:
            model: A model's name or alias.
            slot: The slot's number, as the last piece of an answer tells it.
            name: Of the file in the model's ``slot_save_path``: printable, no path. A file of that name is replaced.

        Raises:
            BadRequest: the slot is empty or does not exist, the name cannot be a file's, saving is not set up
                (``not_supported``), or the file cannot be written.
            ModelNotLoaded: there is nothing to save. ModelNotFound, PoolClosed, WorkerDied, WorkerFailed.
        """
        return await self._slot(self._entry_for(model), "save", slot, name)

    async def restore_slot(self, model: str, slot: int, name: str) -> SlotFile:
        """Put what was saved back into the cache, as what a slot's last request has left; the model is loaded if it
        must be. Prompts that begin alike then find it, in whatever slot they run.

        Raises:
            BadRequest: as :meth:`save_slot`; and there is no such file, it is damaged, was saved by another model or
                with other settings, or does not fit. The slot is empty then.
            LoadFailed: as :meth:`load`.
        """
        entry = self._entry_for(model)
        self._check_slot(entry, slot)
        await self.load(model)
        return await self._slot(entry, "restore", slot, name)

    async def erase_slot(self, model: str, slot: int) -> SlotFile:
        """Forget what a slot's last request has left in the cache. Raises as :meth:`save_slot`."""
        return await self._slot(self._entry_for(model), "erase", slot, "")

    @staticmethod
    def _check_slot(entry: Entry, slot: int) -> None:
        most = entry.spec.options.n_parallel * len(entry.replicas)
        if type(slot) is not int or not 0 <= slot < most:
            raise BadRequest(f"slot must be an integer from 0 to {most - 1}", code="invalid_slot")

    async def _slot(self, entry: Entry, action: Literal["save", "restore", "erase"], slot: int, name: str) -> SlotFile:
        self._check_slot(entry, slot)
        index, inner = divmod(slot, entry.spec.options.n_parallel)
        number = self._herd.next_number()
        command = check_command(SlotCommand(request=number, action=action, slot=inner, name=name))
        result = await self._look(entry.replicas[index], command)
        return replace(result.file or SlotFile(slot=slot, name=name), slot=slot)

    async def _look(self, replica: Replica, command: Slots | SlotCommand) -> Result:
        future: asyncio.Future[Result | None] = asyncio.get_running_loop().create_future()
        self._herd.look(Request(command.request, replica.entry, command, Answer(future)), replica)
        try:
            return await future or Result(request=command.request)
        finally:
            self._herd.leave(command.request)

    # --- adapters ---

    async def adapters(self, model: str) -> list[AdapterStatus]:
        """Return a model's LoRA adapters. Loads nothing. Raises ModelNotFound."""
        entry = self._entry(model)
        adapters = entry.spec.options.adapters
        scales = entry.scales if entry.scales is not None else tuple(adapter.scale for adapter in adapters)
        return await in_thread(describe, [adapter.path for adapter in adapters], scales)

    def set_adapters(self, model: str, lora: Sequence[Mapping[str, Any]]) -> None:
        """Choose how a model's LoRA adapters are applied where a request does not say.

        The choice holds for what a worker is given from now on, and outlives sleep, unloading and crashes. It loads
        nothing.

        Args:
            model: A model's name or alias.
            lora: Objects with ``id`` and ``scale``; adapters that are not named are off.

        Raises:
            BadRequest: there is no such adapter. ModelNotFound, PoolClosed.
        """
        entry = self._entry_for(model)
        self._herd.scale(entry, scales_of(check_lora(lora), len(entry.spec.options.adapters)))

    # --- models ---

    def reload(self, models: Iterable[ModelSpec | BrokenModel]) -> ReloadReport:
        """Take a new catalogue in the place of the old one, and return what that changed.

        Nothing is dropped. Models that are the same go on untouched, also where only settings of the pool's side
        differ (times, priority, aliases and so on), which count from now on. A worker that would be started otherwise
        now, or whose model is gone, takes no new requests, finishes those that it has, and leaves; requests for a
        changed model wait for that and start it anew. Who waits for a model that is gone gets ``ModelNotFound``.
        Nothing is loaded, not even what is marked for the start. An entry that cannot be used (a
        :class:`~llamaherd.pool.config.BrokenModel`, or a spec that is wrong) is listed as failed, with its reason.

        Raises:
            BadRequest: something is no model; nothing has changed. PoolClosed.
        """
        if not self._open:
            raise PoolClosed("the pool is not open")
        report = self._herd.reload(models)
        self._herd.downloads.forget_finished()
        return report

    def models(self) -> list[ModelStatus]:
        """Return the status of every model, in the catalogue's order; removed ones that still finish their requests
        come last. Reading wakes and changes nothing.
        """
        return self._herd.statuses()

    def counts(self) -> PoolCounts:
        """Return what the pool has counted since it was opened: messages, bytes, models that made room."""
        return self._herd.counts()

    def status(self, model: str) -> ModelStatus:
        """Return one model's status, by name or alias. Raises ModelNotFound."""
        job = self._herd.downloads.find(model)
        if job is not None and (job.state is not State.DOWNLOADED or self._herd.find(model) is None):
            return self._herd.downloads.status(job)
        return self._herd.status(self._entry(model))

    def logs(self, model: str) -> tuple[str, ...]:
        """Return the last lines that the model's workers printed, oldest first: at most 1,000 of each replica, which
        follow one another where there are several, with ``#1`` and so on before each line. Raises ModelNotFound.
        """
        job = self._job(model)
        return job.log.tail() if job is not None else self._entry(model).logs()

    def _job(self, model: str) -> Job | None:
        """Return the download that goes on under a name, or for the model of that name."""
        job = self._herd.downloads.active(model)
        entry = self._herd.find(model)
        return job if job is not None or entry is None else entry.download

    def logs_since(self, model: str, marks: Sequence[int] = ()) -> tuple[tuple[str, ...], tuple[int, ...]]:
        """Return the lines that a model's workers finished since the last call, and the marks for the next.

        Args:
            marks: What the last call returned beside its lines; empty for all that is kept.

        Raises:
            ModelNotFound: there is no such model.
        """
        job = self._job(model)
        if job is not None:
            return job.log.since(marks[0] if marks else 0), (job.log.count,)
        return self._entry(model).logs_since(marks)

    def events(self, since: int | None = None) -> Subscription:
        """Return a stream of events: a snapshot first, then every change in order; see
        :class:`~llamaherd.pool.events.Event`.

        Args:
            since: The ``seq`` of the last event that the caller knows. The stream begins with what came after it,
                without a snapshot, as long as that is kept: the last 1,024 events.
        """
        return self._herd.events.subscribe(since)

    async def load(self, model: str) -> ModelStatus:
        """Load a model, if it is not loaded, and return its status once it is ready. Files that are not there are
        downloaded first, if its spec says from where.

        Waits for room if ``models_max`` models are running and busy; a cancelled wait gives the place up.

        Raises:
            LoadFailed: with the reason. ModelNotFound, PoolClosed.
        """
        entry = self._entry_for(model)
        await self._ask(entry, self._herd.next_number(), None)
        return self._herd.status(entry)

    def start_load(self, model: str) -> None:
        """Begin to load a model and return at once; events tell what comes of it.

        Raises:
            ModelBusy: it is running, or being loaded, already. ModelNotFound, PoolClosed.
        """
        entry = self._entry_for(model)
        if entry.state is not State.UNLOADED or self._herd.queued(entry):
            raise ModelBusy("model is already running", code="model_running")
        future: asyncio.Future[Result | None] = asyncio.get_running_loop().create_future()
        future.add_done_callback(_note_failure)
        self._herd.accept(Request(self._herd.next_number(), entry, None, Answer(future), priority=entry.spec.priority))

    async def unload(self, model: str) -> ModelStatus:
        """Stop a model's worker and return its status once the process is gone. A download is cancelled.

        What the worker runs, and what waits for the model, fails with ``WorkerFailed`` (code ``unloaded``).

        Raises:
            ModelBusy: it is not running, and nothing waits for it. ModelNotFound.
        """
        job = self._herd.downloads.active(model)
        if job is not None:
            status = self._herd.downloads.status(job)
            self._herd.downloads.cancel(job)
            await asyncio.shield(job.ended)
            return msgspec.structs.replace(status, state=State.UNLOADED, progress=None, pid=None)
        entry = self._entry(model)
        workers, fetching = list(entry.workers), entry.download
        if entry.state is not State.STOPPING:
            self.start_unload(model)
        for worker in workers:
            await worker.wait()
        if fetching is not None:
            await asyncio.shield(fetching.ended)
        return self._herd.status(entry)

    def start_unload(self, model: str) -> None:
        """Begin to stop a model's worker and return at once. Otherwise as :meth:`unload`; no effect on one that is
        stopping.
        """
        job = self._herd.downloads.active(model)
        if job is not None:
            self._herd.downloads.cancel(job)
        else:
            self._herd.unload(self._entry(model))

    # --- downloads ---

    async def download(
        self,
        model: str,
        *,
        file: str = "",
        cache: Path | None = None,
        endpoint: str = "",
        offline: bool = False,
        token: str | None = None,
    ) -> None:
        """Download a model from the Hugging Face hub, or from a Docker or OCI registry, into the cache, and return once
        it is there in whole.

        A worker of its own does it, which takes no place of the models'. ``models()`` shows its progress, events tell
        of it, and :meth:`unload` cancels it; so does a cancelled wait. A repeat goes on where the last one ended.

        Args:
            model: ``<user>/<repo>[:<quant>]``, or ``<registry>/<repo>[:<tag>|@<digest>]`` such as
                ``docker.io/ai/smollm2:135M-Q4_0``.
            file: A file of the repository, instead of a quant.
            cache: The cache's folder; None is the one that the environment names, llama.cpp's own for registries.
            endpoint: The hub's address; empty is the environment's (``HF_ENDPOINT``). Of a registry, a mirror's.
            offline: Look whether it is in the cache, and ask nobody.
            token: For private and gated repositories; None is the environment's (``HF_TOKEN``) or the one that was
                stored by huggingface_hub. Registries never get it: only what is public is downloaded from them.

        Raises:
            DownloadFailed: with the reason; ``retry`` says whether a repeat may help.
            BadRequest: it is no such name, or such a model is there already. ModelBusy: it is being downloaded
                already. QueueFull: too many downloads go on. PoolClosed.
        """
        await self._finish(self._download(model, file, cache, endpoint, offline, token))

    async def download_url(self, url: str, *, path: Path | None = None, offline: bool = False) -> Path:
        """Download a GGUF file by its address, and return where it is once it is there in whole. One that is there is
        not asked for again. Otherwise as :meth:`download`; it is listed by the file's name.

        Args:
            url: ``http`` or ``https``; of a split model that of its first part, beside which the others lie.
            path: Where it goes; None is llama.cpp's cache. The parts of a split model go into its folder.
            offline: Look whether it is there, and ask nobody.

        Raises:
            DownloadFailed, ModelBusy, QueueFull, PoolClosed: as :meth:`download`. BadRequest: it is no such address.
        """
        self._check_open()
        origin = Origin(url=url, path=path, offline=offline)
        origin.check()
        name = file_of_url(url)
        await self._finish(self._herd.downloads.start(name, origin.to_download(name), None))
        found = await in_thread(origin.find)
        return origin.target if found is None else found.path

    async def _finish(self, job: Job) -> None:
        try:
            await asyncio.shield(job.ended)
        except asyncio.CancelledError:
            self._herd.downloads.cancel(job)
            raise
        if job.failure is not None:
            raise job.failure

    def _check_open(self) -> None:
        if not self._open:
            raise PoolClosed("the pool is not open")

    async def start_download(
        self,
        model: str,
        *,
        file: str = "",
        cache: Path | None = None,
        endpoint: str = "",
        offline: bool = False,
        token: str | None = None,
    ) -> None:
        """Begin a download, and return once the hub has said what there is to fetch, or that there is nothing.
        Otherwise as :meth:`download`; a cancelled wait lets it go on.
        """
        job = self._download(model, file, cache, endpoint, offline, token)
        await asyncio.shield(job.begun)
        if job.failure is not None:
            raise job.failure

    def _download(
        self, model: str, file: str, cache: Path | None, endpoint: str, offline: bool, token: str | None
    ) -> Job:
        if not self._open:
            raise PoolClosed("the pool is not open")
        name = parse_name(model)
        entry = self._herd.find(str(name))
        if entry is not None and entry.spec.path is not None:
            raise BadRequest(f"model {_quoted(model)} already exists", code="model_exists")
        if entry is not None and entry.fetching is not None:
            raise ModelBusy(f"{name} is being downloaded already", code="download_running")
        origin = Origin(repo=str(name), file=file, cache=cache, offline=offline)
        command = origin.to_download(str(name), endpoint)
        return self._herd.downloads.start(str(name), command, token)

    def start_sleep(self, model: str) -> None:
        """Have a worker free its model but keep its process; the next request wakes it.

        Raises:
            ModelBusy: the model is not loaded, or has requests. ModelNotFound.
        """
        self._herd.sleep(self._entry(model))


def _note_failure(future: asyncio.Future[Result | None]) -> None:
    if not future.cancelled() and (error := future.exception()) is not None:
        _log.info("%s", error)


def _quoted(name: str) -> str:
    """Return a name in quotes, escaped if a terminal or a log could misread it; of what is too long, the beginning."""
    if len(name) > MAX_NAME_LENGTH:
        return f"{ascii(name[:60])} ..."
    return repr(name) if name.isprintable() else ascii(name[:200])
