"""Work for a client goes on while the client is there, and no longer."""

import asyncio

import pytest
from starlette.requests import ClientDisconnect
from starlette.types import Message

from llamaherd.http.connection import while_connected


class Client:
    """The receiving end of a request whose body has been read."""

    def __init__(self) -> None:
        self.gone = asyncio.Event()

    async def receive(self) -> Message:
        await self.gone.wait()
        return {"type": "http.disconnect"}


class Work:
    """Work that waits to be finished, and notes its end."""

    def __init__(self) -> None:
        self.started = asyncio.Event()
        self.end = ""

    async def run(self) -> str:
        self.started.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            await asyncio.sleep(0)
            self.end = "cancelled"
            raise
        return "never"


def test_the_result_of_the_work_is_returned() -> None:
    async def work() -> int:
        return 7

    async def main() -> int:
        return await while_connected(Client().receive, work())

    assert asyncio.run(main()) == 7


def test_an_error_of_the_work_is_raised() -> None:
    async def work() -> None:
        raise ValueError("mine")

    async def main() -> None:
        await while_connected(Client().receive, work())

    with pytest.raises(ValueError, match="mine"):
        asyncio.run(main())


def test_a_client_that_leaves_cancels_the_work() -> None:
    async def main() -> None:
        client, work = Client(), Work()
        running = asyncio.ensure_future(while_connected(client.receive, work.run()))
        await work.started.wait()
        client.gone.set()
        with pytest.raises(ClientDisconnect):
            await running
        assert work.end == "cancelled"

    asyncio.run(main())


def test_a_cancelled_request_has_no_work_left_behind() -> None:
    async def main() -> None:
        work = Work()
        running = asyncio.ensure_future(while_connected(Client().receive, work.run()))
        await work.started.wait()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert work.end == "cancelled"
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())


def test_a_result_that_is_there_when_the_client_leaves_is_kept() -> None:
    async def work() -> int:
        return 7

    async def main() -> int:
        client = Client()
        client.gone.set()
        return await while_connected(client.receive, work())

    assert asyncio.run(main()) == 7
