"""The inbox of the engine's thread: nothing is lost, whenever it comes, and a wait with an end has one."""

import contextlib
import signal
import threading
from collections.abc import Callable, Generator
from itertools import chain, repeat
from queue import Empty
from time import monotonic

import pytest

from llamaherd.pool.child.inbox import Inbox

DEADLINE = 30.0

pytestmark = pytest.mark.timeout(60)


def ticking(*times: float) -> Callable[[], float]:
    """Return a clock that shows one time after the other, and then the last one for good."""
    ticks = chain(times, repeat(times[-1]))
    return lambda: next(ticks)


def test_what_was_put_is_got_in_its_order_without_a_wait() -> None:
    inbox: Inbox[int] = Inbox()
    for number in range(3):
        inbox.put(number)
    assert not inbox.empty()
    assert [inbox.get(), inbox.get(timeout=0.0), inbox.get(timeout=DEADLINE)] == [0, 1, 2]
    assert inbox.empty()


def test_who_waits_is_woken_by_another_thread() -> None:
    inbox: Inbox[int] = Inbox()
    answers: Inbox[int] = Inbox()

    def answer() -> None:
        for _ in range(1000):
            answers.put(-inbox.get())

    other = threading.Thread(target=answer, daemon=True)
    other.start()
    for number in range(1000):
        inbox.put(number)
        assert answers.get(timeout=DEADLINE) == -number
    other.join(DEADLINE)
    assert not other.is_alive()


def test_many_may_put_and_nothing_is_lost() -> None:
    inbox: Inbox[tuple[int, int]] = Inbox()

    def fill(mine: int) -> None:
        for number in range(500):
            inbox.put((mine, number))

    threads = [threading.Thread(target=fill, args=(mine,)) for mine in range(4)]
    for thread in threads:
        thread.start()
    got = [inbox.get(timeout=DEADLINE) for _ in range(4 * 500)]
    for thread in threads:
        thread.join(DEADLINE)
    assert inbox.empty()
    for mine in range(4):
        assert [number for who, number in got if who == mine] == list(range(500))


def test_what_comes_between_the_look_and_the_wait_is_not_waited_for() -> None:
    def tick() -> float:
        if inbox.empty():
            inbox.put(7)
        return 0.0

    inbox: Inbox[int] = Inbox(tick)
    assert inbox.get(timeout=DEADLINE) == 7
    assert inbox.empty()


def test_what_was_got_without_a_wait_does_not_pass_for_news_later() -> None:
    inbox: Inbox[int] = Inbox(ticking(0.0, 0.5, 1.0))
    inbox.put(1)
    assert inbox.get() == 1
    with pytest.raises(Empty):
        inbox.get(timeout=1.0)


def test_a_wait_whose_time_passes_before_it_begins_ends() -> None:
    inbox: Inbox[int] = Inbox(ticking(0.0, 5.0))
    inbox.put(1)
    inbox.get()
    with pytest.raises(Empty):
        inbox.get(timeout=1.0)


def test_what_comes_at_the_last_moment_is_got() -> None:
    inbox: Inbox[int] = Inbox(ticking(0.0, 5.0))
    inbox.put(1)
    assert inbox.get(timeout=1.0) == 1


@contextlib.contextmanager
def disturbed(handle: Callable[[], object]) -> Generator[None]:
    """Interrupt this thread again and again, and have it do something each time."""
    over, handled = threading.Event(), threading.Event()
    disturbed_one = threading.get_ident()

    def on_signal(*_: object) -> None:
        handle()
        handled.set()

    def disturb() -> None:
        while not over.wait(0.005):
            handled.clear()
            signal.pthread_kill(disturbed_one, signal.SIGUSR1)
            assert handled.wait(DEADLINE)  # or one would interrupt the other

    before = signal.signal(signal.SIGUSR1, on_signal)
    disturber = threading.Thread(target=disturb)
    disturber.start()
    try:
        yield
    finally:
        over.set()
        disturber.join(DEADLINE)
        signal.signal(signal.SIGUSR1, before)


def test_a_thread_that_is_held_up_in_its_wait_beyond_the_end_of_that_goes_on() -> None:
    """The same with the real clock: a signal's handler holds up the wait until its time is over."""
    seconds = 0.05

    def hold_up() -> None:
        end = monotonic() + 2 * seconds
        while monotonic() < end:
            pass

    with disturbed(hold_up), pytest.raises(Empty):
        Inbox[int]().get(timeout=seconds)


def test_a_put_within_a_signals_handler_wakes_the_thread_that_it_interrupts() -> None:
    inbox: Inbox[int] = Inbox()
    with disturbed(lambda: inbox.put(1)):
        assert inbox.get() == 1
