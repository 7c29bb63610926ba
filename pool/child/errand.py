"""One piece of work on a thread of its own, beside what the engine's thread has llama.cpp do."""

import threading
from collections.abc import Callable
from typing import Final, Generic, TypeVar

__all__ = ["Errand"]

_T = TypeVar("_T")


class Errand(Generic[_T]):
    """Runs ``work`` once, from now on. It is Python, so it only gains where the caller's thread gives up the GIL."""

    def __init__(self, work: Callable[[], _T], name: str) -> None:
        self._work: Final = work
        self._got: list[_T] = []
        self._error: BaseException | None = None
        self._thread: Final = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._got.append(self._work())
        except BaseException as error:  # it is raised where the result is asked for
            self._error = error

    def wait(self) -> None:
        """Return when it has ended, however."""
        self._thread.join()

    def result(self) -> _T:
        """Wait, and return what it returned or raise what it raised."""
        self.wait()
        if self._error is not None:
            raise self._error
        return self._got[0]
