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
    model, prompts = front.model_of(body), body.to_prompts()
    admission = front.admit(request, body, model)

    def begin(index: int) -> Generation:
        prompt, choice = divmod(index, body.choices)
        return front.pool.complete(model, prompts[prompt], **admission, **body.to_params(choice))

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
    """The pieces of several generations as they come, each with its generation's index. Close it.

    Args:
        on_news: Called whenever a piece or an end has come. It must not raise.
    """

    def __init__(self, meters: Sequence[Meter], on_news: Callable[[], None]) -> None:
        self._meters = meters
        self._open = dict(enumerate(meters))
        for meter in meters:
            meter.watch(on_news)

    @property
    def ended(self) -> bool:
        """Whether :meth:`raise_end` raises, once :meth:`take` has nothing more."""
        for meter in self._open.values():
            if meter.ended:
                return True
        return not self._open

    def take(self) -> list[tuple[int, Piece]]:
        """Return all pieces that are there; none at the end and on an error."""
        taken: list[tuple[int, Piece]] = []
        for index, meter in self._open.items():
            while (piece := meter.next_nowait()) is not None:
                taken.append((index, piece))
        for index, piece in taken:
            if piece.finish_reason is not None:
                del self._open[index]
        return taken

    def raise_end(self) -> None:
        """Do nothing while there is something to read or to come.

        Raises:
            StopAsyncIteration: all have ended.
            PoolError: as the generation that failed, when its pieces have been taken.
        """
        if not self._open:
            raise StopAsyncIteration
        for meter in self._open.values():
            meter.raise_end()

    async def aclose(self) -> None:
        """Cancel what has not ended. Idempotent."""
        self._open.clear()
        for meter in self._meters:
            meter.watch(None)
            await meter.aclose()
