"""What signals do to a command: the first ends its work, the second everything, the third the process."""

import asyncio
import signal
import subprocess
import sys

import pytest

from llamaherd.http.signals import Interrupted, SignalGuard, run


async def forever() -> None:
    await asyncio.get_running_loop().create_future()


async def told_to_stop(number: int, said: list[str]) -> None:
    """Work that is signalled as soon as it runs, and says so when it is cancelled."""
    asyncio.get_running_loop().call_soon(signal.raise_signal, number)
    try:
        await forever()
    except asyncio.CancelledError:
        said.append("cancelled")
        raise


def test_without_a_signal_the_result_is_returned() -> None:
    async def main(guard: SignalGuard) -> int:
        return await guard.guard(asyncio.sleep(0, 42))

    assert run(main) == 42


def test_an_error_of_the_work_is_raised_as_it_is() -> None:
    async def fail() -> None:
        raise LookupError("nothing")

    async def main(guard: SignalGuard) -> None:
        await guard.guard(fail())

    with pytest.raises(LookupError, match="nothing"):
        run(main)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_signal_cancels_the_work_and_not_what_surrounds_it(number: signal.Signals) -> None:
    said: list[str] = []

    async def main(guard: SignalGuard) -> None:
        try:
            await guard.guard(told_to_stop(number, said))
        finally:
            await asyncio.sleep(0)
            said.append("cleaned up")

    before = signal.signal(number, signal.SIG_DFL)  # the tests themselves may run under ``nohup``
    try:
        with pytest.raises(Interrupted) as caught:
            run(main)
    finally:
        signal.signal(number, before)
    assert caught.value.number == number
    assert said == ["cancelled", "cleaned up"]


def test_the_second_signal_cancels_what_surrounds_the_work() -> None:
    said: list[str] = []

    async def main(guard: SignalGuard) -> None:
        try:
            await guard.guard(told_to_stop(signal.SIGTERM, said))
        finally:
            await told_to_stop(signal.SIGINT, said)

    with pytest.raises(Interrupted) as caught:
        run(main)
    assert caught.value.number == signal.SIGTERM
    assert said == ["cancelled", "cancelled"]


def test_a_signal_before_the_work_ends_it_at_its_first_step() -> None:
    async def main(guard: SignalGuard) -> None:
        signal.raise_signal(signal.SIGTERM)
        await guard.guard(forever())

    with pytest.raises(Interrupted):
        run(main)


def test_a_signal_after_the_work_changes_nothing() -> None:
    async def main(guard: SignalGuard) -> str:
        answer = await guard.guard(asyncio.sleep(0, "done"))
        signal.raise_signal(signal.SIGTERM)
        await asyncio.sleep(0)
        return answer

    assert run(main) == "done"


def test_the_handlers_of_before_are_put_back_and_an_ignored_signal_stays_ignored() -> None:
    seen: list[object] = []

    async def main(_guard: SignalGuard) -> None:
        seen.extend(signal.getsignal(number) for number in (signal.SIGHUP, signal.SIGTERM))
        signal.raise_signal(signal.SIGHUP)

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        run(main)
        assert seen[0] is signal.SIG_IGN
        assert seen[1] is not signal.SIG_DFL
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_third_signal_ends_a_process_whose_loop_is_stuck() -> None:
    program = """
import signal
from llamaherd.http.signals import run

async def main(guard):
    for _ in range(3):
        signal.raise_signal(signal.SIGTERM)

run(main, on_abort=lambda: print("aborting", flush=True))
"""
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True)

    assert (done.returncode, done.stdout, done.stderr) == (128 + signal.SIGTERM, "aborting\n", "")
