"""The Pool without async, for scripts and notebooks.

A pool's loop runs in a thread of its own from the opening to the close, because a worker is bound to the life of the
thread that spawned it. Every call hands its work to that loop and waits, so a SyncPool may be used from any thread, and
also where another loop runs already, as in a notebook; that other loop stands still meanwhile.
"""

import weakref
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, Self, Unpack, overload

from llamaherd.pool.adapters import AdapterStatus
from llamaherd.pool.chat_params import ChatMessage, TemplateParams
from llamaherd.pool.config import DEFAULT_DRAIN_TIMEOUT, DEFAULT_STOP_TIMEOUT, BrokenModel, ModelSpec
from llamaherd.pool.counts import PoolCounts
from llamaherd.pool.embeddings import Embeddings, Ranking
from llamaherd.pool.errors import BadRequest, PoolClosed, PoolError
from llamaherd.pool.generation import Completion, Generation
from llamaherd.pool.gpus import Gpus
from llamaherd.pool.launch import Launcher
from llamaherd.pool.loop_thread import LoopThread
from llamaherd.pool.params import ChatParams, GenerateParams
from llamaherd.pool.pool import Pool
from llamaherd.pool.reload import ReloadReport
from llamaherd.pool.status import ModelStatus
from llamaherd.pool.sync_map import MapParams, MapPlan, MapPrompt, MapReport, map_bar, map_results, start_prompt
from llamaherd.pool.sync_stream import SyncGeneration, SyncSubscription
from llamaherd.transport.messages import SlotFile, SlotState

__all__ = ["SyncPool"]

#: Requests in flight per slot of a model in :meth:`SyncPool.map`: one that computes, and one that waits to follow it.
IN_FLIGHT_PER_SLOT: Final = 2


class SyncPool:
    """A :class:`~llamaherd.pool.pool.Pool` for callers without async: the same arguments, methods and errors.

    Use it in a ``with`` block, or between :meth:`open` and :meth:`close`; it can be opened once. One that is dropped,
    or left open by a program that ends, closes by itself. Methods may be called from any thread. Each waits for its
    result, and ``KeyboardInterrupt`` (^C) ends the wait and cancels the work.

    Raises:
        PoolClosed: by every method, before the opening and after the close.
        RuntimeError: called in the pool's own thread, which cannot wait for itself.
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
        reuse_workers: bool = True,
        queue_max: int = 1024,
        queue_max_per_model: int = 0,
        queue_timeout: float = 0.0,
        launcher: Launcher | None = None,
        gpus: Gpus | None = None,
    ) -> None:
        self._pool = Pool(
            models,
            transport=transport,
            models_max=models_max,
            memory_budget=memory_budget,
            stop_timeout=stop_timeout,
            cores=cores,
            spare=spare,
            reuse_workers=reuse_workers,
            queue_max=queue_max,
            queue_max_per_model=queue_max_per_model,
            queue_timeout=queue_timeout,
            launcher=launcher,
            gpus=gpus,
        )
        self._loop = LoopThread(self._pool, "llamaherd")
        self._opened = False
        weakref.finalize(self, self._loop.stop_soon).atexit = False

    def __repr__(self) -> str:
        return f"<SyncPool {'open' if self._loop.running else 'closed'}>"

    # --- opening and closing ---

    def open(self) -> Self:
        """Start the pool's thread, and return the pool once it is open. No model is loaded yet.

        Raises:
            PoolClosed: it was opened before.
        """
        if self._opened:
            raise PoolClosed("a pool can be opened once")
        self._opened = True
        self._loop.open()
        return self

    def close(self) -> None:
        """As ``Pool.aclose``: fail what waits or runs, stop all workers, and return when all are reaped. Idempotent.

        An interrupted call (^C) kills the workers that are left and waits until they are gone.
        """
        self._opened = True
        self._loop.close()

    def drain(self, limit: float = DEFAULT_DRAIN_TIMEOUT) -> None:
        """Let what waits or runs come to its end within so many seconds, and stop all workers; see ``Pool.drain``.

        Answers that are not read yet can be read until :meth:`close`.
        """
        self._loop.wait(lambda: self._pool.drain(limit))

    def __enter__(self) -> Self:
        return self.open()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

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
    ) -> SyncGeneration:
        """Answer a conversation, as a stream of pieces; see ``Pool.chat``."""
        return self._generate(
            lambda: self._pool.chat(
                model,
                messages,
                autoload=autoload,
                priority=priority,
                keep_alive=keep_alive,
                queue_timeout=queue_timeout,
                **params,
            )
        )

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
    ) -> SyncGeneration:
        """Continue a text, or a list of token ids; see ``Pool.complete``."""
        return self._generate(
            lambda: self._pool.complete(
                model,
                prompt,
                autoload=autoload,
                priority=priority,
                keep_alive=keep_alive,
                queue_timeout=queue_timeout,
                **params,
            )
        )

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
    ) -> SyncGeneration:
        """Fill the gap between two texts; see ``Pool.infill``."""
        return self._generate(
            lambda: self._pool.infill(
                model,
                prefix,
                suffix,
                prompt=prompt,
                extra=extra,
                autoload=autoload,
                priority=priority,
                keep_alive=keep_alive,
                queue_timeout=queue_timeout,
                **params,
            )
        )

    def _generate(self, make: Callable[[], Generation]) -> SyncGeneration:
        made: list[Generation] = []
        try:
            self._loop.call(lambda: made.append(make()))
            return SyncGeneration(self._loop, made[0], self)
        except BaseException:
            # An interrupt can come when the generation is there and nobody has it: the traceback alone would keep it
            # alive.
            self._loop.post(_cancel_all, made)
            raise

    @overload
    def map(
        self,
        model: str,
        prompts: Iterable[MapPrompt],
        *,
        concurrency: int | None = None,
        progress: bool | MapReport = False,
        ordered: bool = True,
        errors: Literal["raise"] = "raise",
        **params: Unpack[MapParams],
    ) -> Generator[Completion]: ...

    @overload
    def map(
        self,
        model: str,
        prompts: Iterable[MapPrompt],
        *,
        concurrency: int | None = None,
        progress: bool | MapReport = False,
        ordered: bool = True,
        errors: Literal["return"],
        **params: Unpack[MapParams],
    ) -> Generator[Completion | PoolError]: ...

    def map(
        self,
        model: str,
        prompts: Iterable[MapPrompt],
        *,
        concurrency: int | None = None,
        progress: bool | MapReport = False,
        ordered: bool = True,
        errors: Literal["raise", "return"] = "raise",
        **params: Unpack[MapParams],
    ) -> Generator[Completion | PoolError]:
        """Answer many prompts, a few at a time, and yield the whole answers.

        Prompts are drawn from their iterable as there is room, in the caller's thread, so it may be endless. Nothing
        starts before the first result is asked for. Leaving early, by ``break``, ``close()`` or an interrupt, cancels
        the rest.

        Args:
            model: A model's name or alias.
            prompts: Texts or lists of token ids, which are continued as by :meth:`complete`, and conversations (lists
                of messages), which are answered as by :meth:`chat`.
            concurrency: Most requests in flight; None is twice the model's slots. At most four times as many results
                are kept for one that is late.
            progress: Called with the number of results so far, and with the number of prompts where it is known; True
                draws a bar on stderr, if that is a terminal.
            ordered: Yield in the order of the prompts; False yields what is ready first.
            errors: ``raise`` raises a prompt's error where its result would be, and ends; ``return`` yields a
                :class:`~llamaherd.pool.errors.PoolError` instead and goes on.
            **params: As in :meth:`chat`, for every prompt.

        Raises:
            BadRequest, ModelNotFound, PoolClosed: at once.
        """
        if concurrency is not None and (type(concurrency) is not int or concurrency < 1):
            raise BadRequest("concurrency must be 1 or more")
        if errors not in ("raise", "return"):
            raise BadRequest("errors must be 'raise' or 'return'")
        status = self.status(model)
        name, slots = status.name, status.slots * len(status.replicas)
        plan = MapPlan(concurrency or IN_FLIGHT_PER_SLOT * slots, ordered, errors == "return")
        whole: Any = {**params, "whole": True}
        start = start_prompt(
            lambda messages: self._pool.chat(model, messages, **whole),
            lambda prompt: self._pool.complete(model, prompt, **whole),
        )
        report = map_bar(name) if progress is True else nullcontext(progress or None)
        return map_results(self._loop, start, prompts, plan, report)

    def embed(
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
        """Return the embeddings of inputs; see ``Pool.embed``."""
        return self._loop.wait(
            lambda: self._pool.embed(
                model,
                inputs,
                normalize=normalize,
                dimensions=dimensions,
                pooled=pooled,
                autoload=autoload,
                priority=priority,
                keep_alive=keep_alive,
                queue_timeout=queue_timeout,
            )
        )

    def rerank(
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
        """Return how well each document answers a query; see ``Pool.rerank``."""
        return self._loop.wait(
            lambda: self._pool.rerank(
                model,
                query,
                documents,
                autoload=autoload,
                priority=priority,
                keep_alive=keep_alive,
                queue_timeout=queue_timeout,
            )
        )

    def tokenize(
        self, model: str, text: str | Sequence[int | str], *, add_special: bool = False, parse_special: bool = True
    ) -> list[int]:
        """Return the token ids of a text; see ``Pool.tokenize``."""
        return self._loop.wait(
            lambda: self._pool.tokenize(model, text, add_special=add_special, parse_special=parse_special)
        )

    def token_pieces(
        self, model: str, text: str | Sequence[int | str], *, add_special: bool = False, parse_special: bool = True
    ) -> list[tuple[int, bytes]]:
        """Return each token of a text with its bytes; see ``Pool.token_pieces``."""
        return self._loop.wait(
            lambda: self._pool.token_pieces(model, text, add_special=add_special, parse_special=parse_special)
        )

    def detokenize(self, model: str, tokens: Sequence[int]) -> str:
        """Return the text of token ids; see ``Pool.detokenize``."""
        return self._loop.wait(lambda: self._pool.detokenize(model, tokens))

    def apply_template(self, model: str, messages: Sequence[ChatMessage], **params: Unpack[TemplateParams]) -> str:
        """Return the prompt that :meth:`chat` would make of a conversation; see ``Pool.apply_template``."""
        return self._loop.wait(lambda: self._pool.apply_template(model, messages, **params))

    # --- slots ---

    def slots(self, model: str) -> list[SlotState]:
        """Return what runs where in a model's worker; see ``Pool.slots``."""
        return self._loop.wait(lambda: self._pool.slots(model))

    def save_slot(self, model: str, slot: int, name: str) -> SlotFile:
        """Save what a slot's last request has left in the cache; see ``Pool.save_slot``."""
        return self._loop.wait(lambda: self._pool.save_slot(model, slot, name))

    def restore_slot(self, model: str, slot: int, name: str) -> SlotFile:
        """Put what was saved back into the cache; see ``Pool.restore_slot``."""
        return self._loop.wait(lambda: self._pool.restore_slot(model, slot, name))

    def erase_slot(self, model: str, slot: int) -> SlotFile:
        """Forget what a slot's last request has left in the cache; see ``Pool.erase_slot``."""
        return self._loop.wait(lambda: self._pool.erase_slot(model, slot))

    # --- adapters ---

    def adapters(self, model: str) -> list[AdapterStatus]:
        """Return a model's LoRA adapters; see ``Pool.adapters``."""
        return self._loop.wait(lambda: self._pool.adapters(model))

    def set_adapters(self, model: str, lora: Sequence[Mapping[str, Any]]) -> None:
        """Choose how a model's LoRA adapters are applied; see ``Pool.set_adapters``."""
        self._loop.call(lambda: self._pool.set_adapters(model, lora))

    # --- models ---

    def reload(self, models: Iterable[ModelSpec | BrokenModel]) -> ReloadReport:
        """Take a new catalogue in the place of the old one; see ``Pool.reload``."""
        return self._loop.call(lambda: self._pool.reload(models))

    def models(self) -> list[ModelStatus]:
        """Return the status of every model; see ``Pool.models``."""
        return self._loop.call(self._pool.models)

    def counts(self) -> PoolCounts:
        """Return what the pool has counted; see ``Pool.counts``."""
        return self._loop.call(self._pool.counts)

    def status(self, model: str) -> ModelStatus:
        """Return one model's status; see ``Pool.status``."""
        return self._loop.call(lambda: self._pool.status(model))

    def logs(self, model: str) -> tuple[str, ...]:
        """Return the last lines that the model's workers printed; see ``Pool.logs``."""
        return self._loop.call(lambda: self._pool.logs(model))

    def logs_since(self, model: str, marks: Sequence[int] = ()) -> tuple[tuple[str, ...], tuple[int, ...]]:
        """Return new log lines; see ``Pool.logs_since``."""
        return self._loop.call(lambda: self._pool.logs_since(model, marks))

    def events(self, since: int | None = None) -> SyncSubscription:
        """Return a stream of events, a snapshot first; see ``Pool.events``."""
        return SyncSubscription(self._loop, self._loop.call(lambda: self._pool.events(since)), self)

    def load(self, model: str) -> ModelStatus:
        """Load a model and return its status once it is ready; see ``Pool.load``."""
        return self._loop.wait(lambda: self._pool.load(model))

    def start_load(self, model: str) -> None:
        """Begin to load a model and return at once; see ``Pool.start_load``."""
        self._loop.call(lambda: self._pool.start_load(model))

    def unload(self, model: str) -> ModelStatus:
        """Stop a model's worker and return its status once the process is gone; see ``Pool.unload``."""
        return self._loop.wait(lambda: self._pool.unload(model))

    def start_unload(self, model: str) -> None:
        """Begin to stop a model's worker and return at once; see ``Pool.start_unload``."""
        self._loop.call(lambda: self._pool.start_unload(model))

    def download(
        self,
        model: str,
        *,
        file: str = "",
        cache: Path | None = None,
        endpoint: str = "",
        offline: bool = False,
        token: str | None = None,
    ) -> None:
        """Download a model into the cache; see ``Pool.download``."""
        self._loop.wait(
            lambda: self._pool.download(model, file=file, cache=cache, endpoint=endpoint, offline=offline, token=token)
        )

    def start_download(
        self,
        model: str,
        *,
        file: str = "",
        cache: Path | None = None,
        endpoint: str = "",
        offline: bool = False,
        token: str | None = None,
    ) -> None:
        """Begin a download; see ``Pool.start_download``."""
        self._loop.wait(
            lambda: self._pool.start_download(
                model, file=file, cache=cache, endpoint=endpoint, offline=offline, token=token
            )
        )

    def download_url(self, url: str, *, path: Path | None = None, offline: bool = False) -> Path:
        """Download a file by its address and return where it is; see ``Pool.download_url``."""
        return self._loop.wait(lambda: self._pool.download_url(url, path=path, offline=offline))

    def start_sleep(self, model: str) -> None:
        """Have a worker free its model but keep its process; see ``Pool.start_sleep``."""
        self._loop.call(lambda: self._pool.start_sleep(model))


def _cancel_all(generations: list[Generation]) -> None:
    for generation in generations:
        generation.cancel()
