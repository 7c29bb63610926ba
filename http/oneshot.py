"""One question to one model, which is loaded for it: the work of ``llamaherd run``."""

import asyncio
import sys
from collections.abc import Callable

import msgspec
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn

from llamaherd.http.signals import SignalGuard
from llamaherd.http.terminal import one_line
from llamaherd.pool import ChatParams, Completion, ModelSpec, Piece, Pool, Subscription

__all__ = ["Question", "ask"]


class Question(msgspec.Struct, frozen=True, kw_only=True):
    """What to ask whom.

    Attributes:
        spec: The model; it is loaded for this one question.
        prompt: The user's message.
        params: Sampling and limits.
        transport: ``pipe``, ``zmq`` or ``stdio``.
    """

    spec: ModelSpec
    prompt: str
    params: ChatParams
    transport: str


async def ask(question: Question, on_text: Callable[[str], None], guard: SignalGuard) -> Completion:
    """Start a worker, load the model, and return the answer after giving its text to ``on_text`` as it comes.

    The worker has ended when this returns or raises.

    Raises:
        PoolError: the model cannot be loaded, a parameter is wrong, or the worker failed.
        Interrupted: a signal ended it.
    """
    async with Pool([question.spec], transport=question.transport, models_max=1) as pool:
        return await guard.guard(_answer(pool, question, on_text))


async def _answer(pool: Pool, question: Question, on_text: Callable[[str], None]) -> Completion:
    model = question.spec.name
    await _load(pool, model)
    pieces: list[Piece] = []
    async with pool.chat(model, [{"role": "user", "content": question.prompt}], **question.params) as generation:
        async for piece in generation:
            pieces.append(piece)
            on_text(piece.text)
    return Completion.join(pieces)


async def _load(pool: Pool, model: str) -> None:
    """Load a model; on a terminal, show a bar on standard error meanwhile. Raises as ``Pool.load``."""
    if not sys.stderr.isatty():
        await pool.load(model)
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(f"loading {one_line(model)}", total=1.0)
        async with pool.events() as events:
            follower = asyncio.create_task(_follow(events, model, bar, task))
            try:
                await pool.load(model)
            finally:
                follower.cancel()
                await asyncio.wait([follower])


async def _follow(events: Subscription, model: str, bar: Progress, task: TaskID) -> None:
    async for event in events:
        progress = event.data.get("progress") if event.model == model else None
        if progress and "value" in progress:
            bar.update(task, completed=progress["value"])
