"""The deadlines of tests are of the time that a test had."""

import asyncio
import signal
import threading
from concurrent.futures import Future

import pytest

from patience import ended, holds_within, patience, result_of


def test_an_hour_in_which_the_machine_was_suspended_costs_a_test_none_of_its_patience(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        before = loop.time
        async with patience(20):
            monkeypatch.setattr(loop, "time", lambda: before() + 3600)
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0):
                    await asyncio.Event().wait()

    asyncio.run(main())


def test_what_never_comes_uses_it_up() -> None:
    async def wait() -> None:
        async with patience(0.2):
            await asyncio.Event().wait()

    with pytest.raises(TimeoutError):
        asyncio.run(wait())
    with pytest.raises(TimeoutError):
        result_of(Future[None](), 0.2)
    assert not holds_within(0.02, lambda: False)
    gate = threading.Event()
    thread = threading.Thread(target=gate.wait)
    thread.start()
    assert not ended(thread, 0.2)
    gate.set()
    assert ended(thread, 20)


def test_what_comes_in_time_is_returned() -> None:
    future = Future[int]()
    future.set_result(7)
    assert result_of(future, 20) == 7
    assert holds_within(0, lambda: True)
    future = Future[int]()
    future.set_exception(ValueError("no"))
    with pytest.raises(ValueError, match="no"):
        result_of(future, 20)


@pytest.mark.timeout(60)
def test_one_alarm_does_not_fail_a_test_and_as_many_as_fill_its_time_limit_do() -> None:
    """After a machine was suspended the first alarm comes at once."""
    for _ in range(5):
        signal.raise_signal(signal.SIGALRM)
    with pytest.raises(pytest.fail.Exception, match="not ended within 60 s"):
        signal.raise_signal(signal.SIGALRM)
