"""Server-sent events: the framing, and the response that streams them.

A stream that has nothing to say for a while sends a comment, so that proxies and clients keep the connection open. The
same interval decides how long the first frame is waited for before the headers go out: until then, an error is still a
proper HTTP status; afterwards it can only be a frame.
"""

import asyncio
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final, Protocol

import msgspec
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from llamaherd.http.connection import DIRECT, DirectWrite, while_connected

__all__ = ["COMMENT", "DONE", "EventStream", "FrameSource", "frame", "named_frame"]

#: The comment that keeps a silent stream open.
COMMENT: Final = b":\n\n"
#: What ends a stream of the OpenAI family.
DONE: Final = b"data: [DONE]\n\n"


def frame(data: Any, *, number: int | None = None) -> bytes:
    """Return one event. The JSON holds no line break, so it is always a single ``data:`` line.

    Args:
        number: The event's ``id:``.
    """
    line = b"data: " + msgspec.json.encode(data) + b"\n\n"
    return line if number is None else b"id: %d\n%b" % (number, line)


def named_frame(data: Mapping[str, Any]) -> bytes:
    """Return one event whose name is the ``type`` of its data."""
    return b"event: %b\n%b" % (data["type"].encode(), frame(data))


class FrameSource(Protocol):
    """Where a stream's frames come from."""

    async def __anext__(self) -> bytes:
        """Return the next frame or frames; raise StopAsyncIteration at the end. A cancelled call must lose nothing."""
        ...

    def push(self, write: DirectWrite) -> None:
        """Give frames to ``write`` as they come, while a call of ``anext`` waits for them, instead of to that call; the
        call returns what ``write`` has not taken. A source of few frames need not, and by default none does.
        """
        return

    async def aclose(self) -> None:
        """Stop the work behind the frames. Idempotent."""
        ...


class EventStream(Response):
    """Streams the frames of a source to one client, and closes the source when the client leaves.

    Args:
        ping: Seconds of silence before a comment is sent; None sends none, and waits for the first frame without end.
        on_error: Returns the frame that tells of an error after the headers have gone; the stream then ends.

    Raises, when called as an application, what the source raises before its first frame.
    """

    def __init__(self, source: FrameSource, *, ping: float | None, on_error: Callable[[Exception], bytes]) -> None:
        self.status_code = 200
        self.background = None
        # Without X-Accel-Buffering nginx would hold the pieces back.
        self.init_headers({"Content-Type": "text/event-stream", "Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._source = source
        self._on_error = on_error
        self._started = False
        self._silence = _Silence(ping)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            if scope["method"] == "HEAD":
                await self._send(send, b"", last=True)
            else:
                await while_connected(receive, self._stream(send, scope.get(DIRECT)))
        except ClientDisconnect:
            pass
        finally:
            self._silence.close()
            await self._source.aclose()

    async def _stream(self, send: Send, direct: DirectWrite | None) -> None:
        try:
            while True:
                chunk = await self._silence.wait(self._source)
                await self._send(send, COMMENT if chunk is None else chunk)
                if direct is not None:
                    # From here on the task sleeps, and a token costs neither a switch to it nor the layers above it.
                    self._source.push(partial(self._push, direct))
                    direct = None
        except StopAsyncIteration:
            chunk = b""
        except Exception as error:
            if not self._started:
                raise
            chunk = self._on_error(error)
        await self._send(send, chunk, last=True)

    def _push(self, direct: DirectWrite, chunk: bytes) -> bool:
        written = direct(chunk)
        if written:
            self._silence.put_off()
        return written

    async def _send(self, send: Send, chunk: bytes, *, last: bool = False) -> None:
        if not self._started:
            self._started = True
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": chunk, "more_body": not last})


class _Silence:
    """Waits for frames, and for no longer than the ping interval.

    ``asyncio.timeout`` does the same with a timer for every frame. This timer is set once per interval: when it goes
    off it looks whether the wait has really been so long.
    """

    def __init__(self, seconds: float | None) -> None:
        self._seconds = seconds
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[Any] | None = None
        self._due = 0.0
        self._over = False

    async def wait(self, source: FrameSource) -> bytes | None:
        """Return what comes next from a source; None if nothing has come. Raises what the source raises."""
        if self._seconds is None:
            return await anext(source)
        self._task = asyncio.current_task()
        self.put_off()
        if self._timer is None:
            self._timer = self._loop.call_at(self._due, self._look)
        try:
            return await anext(source)
        except asyncio.CancelledError:
            task, over, self._over = self._task, self._over, False
            if not over or task is None or task.uncancel() > 0:
                raise
            return None
        finally:
            self._task = None

    def put_off(self) -> None:
        """Count the silence from now on."""
        if self._seconds is not None:
            self._due = self._loop.time() + self._seconds

    def close(self) -> None:
        """Forget the timer. Idempotent."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        self._timer = None
        if self._task is None:
            return  # nobody waits; who waits next sets it again
        if self._loop.time() < self._due:
            self._timer = self._loop.call_at(self._due, self._look)
        else:
            self._over = True
            self._task.cancel()
