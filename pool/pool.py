"""The Pool: what a program uses. How it comes to be, and how it ends; its calls are in groups of their own."""

import asyncio
import contextlib
import logging
from collections.abc import Iterable
from types import TracebackType
from typing import Literal, Self

from llamaherd.pool.admission import check_queue_timeout
from llamaherd.pool.config import DEFAULT_DRAIN_TIMEOUT, DEFAULT_STOP_TIMEOUT, ModelSpec
from llamaherd.pool.download_calls import DownloadCalls
from llamaherd.pool.errors import BadRequest, PoolClosed, PoolError
from llamaherd.pool.generation_calls import GenerationCalls
from llamaherd.pool.gpus import FixedGpus, Gpus, find_gpus
from llamaherd.pool.herd import Herd
from llamaherd.pool.input_calls import InputCalls
from llamaherd.pool.launch import Launcher, LocalLauncher
from llamaherd.pool.machine import usable_cores
from llamaherd.pool.memory import Budget, automatic_budget
from llamaherd.pool.model_calls import ModelCalls
from llamaherd.pool.schedule import Limits
from llamaherd.pool.slot_calls import SlotCalls
from llamaherd.transport import make_transport

__all__ = ["Pool"]

_log = logging.getLogger("llamaherd.pool")


class Pool(GenerationCalls, InputCalls, SlotCalls, ModelCalls, DownloadCalls):
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
            for the start of a process. With a ``memory_budget`` it also loads ahead, while nobody has anything else to
            do, the model that had to make room and is likely wanted next, if that fits beside what runs; it counts for
            the budget, not for ``models_max``, and goes for whatever else needs the room.
        reuse_workers: Whether a worker that has to make room for another model frees its own and becomes the other's,
            which spares a swap the start of a process. With False it ends: no process ever serves two models, which
            keeps apart what files from strangers may do to it.
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
        reuse_workers: bool = True,
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
        patience = check_queue_timeout(queue_timeout)
        self._transport = make_transport(transport)
        herd = Herd(
            self._transport,
            launcher or LocalLauncher(),
            limits=limits,
            stop_timeout=stop_timeout,
            spare=spare,
            reuse_workers=reuse_workers,
            gpus=budget.gpus,
            gpu_memory=gpu_memory,
            lenient=lenient,
        )
        super().__init__(herd, patience)
        self._closing: asyncio.Task[None] | None = None
        for spec in models:
            herd.add(spec)

    def __repr__(self) -> str:
        return f"<Pool {'open' if self._open else 'closed'}, {self._herd!r}>"

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
