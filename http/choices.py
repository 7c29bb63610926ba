"""Several answers to one request: generations that run side by side and reach the client as one."""

import asyncio
from collections.abc import Callable, Sequence

from starlette.requests import Request

from llamaherd.http.front import Front
from llamaherd.http.schema import CompletionBody
from llamaherd.http.tally import Meter
from llamaherd.pool import Completion, Generation, Piece

__all__ = ["Choices", "collect_all", "start_all", "start_prompts"]


def start_all(count: int, begin: Callable[[int], Generation]) -> list[Generation]:
    """Return the generations that ``begin`` starts for 0, 1 and so on; none is left if one cannot start."""
    works: list[Generation] = []
    try:
        for index in range(count):
            works.append(begin(index))
    except BaseException:
        for work in works:
            work.cancel()
        raise
    return works


def start_prompts(front: Front, request: Request, body: CompletionBody) -> list[Generation]:
    """Return the generations that continue the prompts of a body: as many as it wants of the first one, then of the
    next. Raises Problem, and as the pool; none is left then.
    """
    model, prompts, autoload = front.model_of(body), body.to_prompts(), front.autoload_of(request)

    def begin(index: int) -> Generation:
        prompt, choice = divmod(index, body.choices)
        return front.pool.complete(model, prompts[prompt], autoload=autoload, **body.to_params(choice))

    return start_all(len(prompts) * body.choices, begin)


async def collect_all(meters: Sequence[Meter]) -> list[Completion]:
    """Return all answers. The first that fails, or a cancellation, ends the others too; its error is raised."""
    if len(meters) == 1:
        return [await meters[0].collect()]
    tasks = [asyncio.ensure_future(meter.collect()) for meter in meters]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class Choices:
    """The pieces of several generations as they come, each with its generation's index. Close it."""

    def __init__(self, meters: Sequence[Meter]) -> None:
        self._meters = meters
        self._waiting: dict[asyncio.Task[Piece], int] = {}
        self._started = False

    async def __anext__(self) -> tuple[int, Piece]:
        """Return the next piece of any of them. A cancelled call loses nothing. Raises what a generation raises."""
        if len(self._meters) == 1:
            return 0, await anext(self._meters[0])
        if not self._started:
            self._started = True
            for index in range(len(self._meters)):
                self._await(index)
        if not self._waiting:
            raise StopAsyncIteration
        done, _ = await asyncio.wait(self._waiting, return_when=asyncio.FIRST_COMPLETED)
        task = min(done, key=self._waiting.__getitem__)
        index = self._waiting.pop(task)
        piece = task.result()
        if piece.finish_reason is None:
            self._await(index)
        return index, piece

    def next_nowait(self) -> tuple[int, Piece] | None:
        """Return the next piece if it is there already; always None where there are several generations."""
        piece = self._meters[0].next_nowait() if len(self._meters) == 1 else None
        return None if piece is None else (0, piece)

    def _await(self, index: int) -> None:
        self._waiting[asyncio.ensure_future(self._next(index))] = index

    async def _next(self, index: int) -> Piece:
        return await anext(self._meters[index])

    async def aclose(self) -> None:
        """Cancel what has not ended. Idempotent."""
        waiting = list(self._waiting)
        self._waiting.clear()
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        for meter in self._meters:
            await meter.aclose()
