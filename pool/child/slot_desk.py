"""Saving, restoring and erasing slots, beside the requests that run.

A command waits until its slot is idle, as in the reference; a restored state comes into the slot when it is read and
the slot is idle, whatever ran there meanwhile. Files are read and written by a thread of their own: a
state has some hundred megabytes with a large model, and nobody's next token shall wait for a disk. Only the copies from
and to the cache are made between two steps.
"""

import sys
import threading
from array import array
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any, Final

from llamaherd.pool.child.adapters import AdapterSet
from llamaherd.pool.child.batcher import Batcher
from llamaherd.pool.child.cache import Kept, StateRefused
from llamaherd.pool.child.engine import EngineError, RequestError
from llamaherd.pool.child.state_file import Header, fingerprint, read_state, valid_name, write_state
from llamaherd.pool.child.store import State, Store
from llamaherd.transport.messages import EngineOptions, Failed, Load, Result, SlotFile
from llamaherd.transport.messages import Sequence as Command

__all__ = ["SlotDesk"]

#: Seconds that a step without other work waits for a file.
_PATIENCE: Final = 0.05
#: What llama.cpp says of a state whose values lie otherwise.
_TRANSPOSED: Final = "incompatible V transposition"
#: Options that the numbers in a state depend on.
_SETTINGS: Final = (
    "cache_type_k",
    "cache_type_v",
    "rope_scaling",
    "rope_freq_base",
    "rope_freq_scale",
    "yarn_orig_ctx",
    "yarn_ext_factor",
    "yarn_attn_factor",
    "yarn_beta_slow",
    "yarn_beta_fast",
)


class _Job:
    """One command on its way."""

    def __init__(self, command: Command) -> None:
        self.command: Final = command
        self.began = 0.0
        self.dropped = False
        self._thread: threading.Thread | None = None
        self._result: Any = None
        self._error: RequestError | None = None
        self._short = False

    @property
    def started(self) -> bool:
        return self._thread is not None

    def start(self, work: Callable[[], Any]) -> None:
        """Do the part that takes a disk's time in a thread."""

        def run() -> None:
            try:
                self._result = work()
            except RequestError as error:
                self._error = error
            except MemoryError:
                self._short = True
            except Exception as error:  # mostly of the disk; whatever it is, it is this command's alone
                self._error = RequestError(f"{self.command.name!r}: {error}", code="slot_file_unreadable")

        self.began = perf_counter()
        self._thread = threading.Thread(target=run, name="slot-file", daemon=True)
        self._thread.start()

    def finished(self, patience: float) -> bool:
        """Whether the thread is done, after waiting for it so long."""
        if self._thread is None:
            return False
        self._thread.join(patience)
        return not self._thread.is_alive()

    def take(self) -> Any:
        """Return what the thread made, None if there was none yet. Raises RequestError or StateRefused."""
        if self._short:
            raise StateRefused("there is no memory for it", retry=True)
        if self._error is not None:
            raise self._error
        return self._result

    def done(self, n_tokens: int, n_bytes: int = 0) -> Result:
        """Return the answer."""
        ms = (perf_counter() - self.began) * 1e3 if self.began else 0.0
        file = SlotFile(slot=self.command.slot, name=self.command.name, n_tokens=n_tokens, n_bytes=n_bytes, ms=ms)
        return Result(request=self.command.request, file=file)


class SlotDesk:
    """See the module's text.

    Args:
        check_tokens: Raises RequestError for ids that are not of the vocabulary.
    """

    def __init__(
        self,
        command: Load,
        batcher: Batcher,
        store: Store,
        *,
        most_tokens: int,
        check_tokens: Callable[["array[int]"], None],
    ) -> None:
        self._path: Final = command.path
        self._options: Final = command.options
        self._batcher: Final = batcher
        self._store: Final = store
        self._most_tokens: Final = most_tokens
        self._check_tokens: Final = check_tokens
        self._jobs: Final[list[_Job]] = []

    @property
    def busy(self) -> bool:
        """Whether a command waits or is being carried out."""
        return bool(self._jobs)

    def submit(self, command: Command) -> None:
        """Take a command. Raises RequestError for one that is impossible."""
        if not self._options.slot_save_path:
            raise RequestError(
                "slots of this model cannot be saved, restored or erased: set slot_save_path", code="not_supported"
            )
        if not 0 <= command.slot < len(self._batcher.slots):
            raise RequestError(
                f"slot {command.slot} does not exist; there are {len(self._batcher.slots)}", code="invalid_slot"
            )
        if command.action != "erase" and not valid_name(command.name):
            raise RequestError(f"{command.name!r} cannot be the name of a file", code="invalid_filename")
        self._jobs.append(_Job(command))

    def cancel(self, request: int) -> None:
        """Give up a command that has not begun; :meth:`step` says so. Unknown numbers are ignored."""
        for job in self._jobs:
            job.dropped = job.dropped or job.command.request == request

    def step(self, *, wait: bool) -> list[Result | Failed]:
        """Carry on; return the answers to commands that are done. With ``wait``, rather wait a moment than return
        without any.
        """
        answers: list[Result | Failed] = []
        for job in list(self._jobs):
            answer: Result | Failed | None
            try:
                answer = self._advance(job, _PATIENCE if wait and not answers else 0.0)
            except RequestError as error:
                answer = Failed(request=job.command.request, message=str(error), fault="caller", code=error.code)
            except StateRefused as error:
                answer = _refused(job.command, error)
            except EngineError:
                raise
            except Exception as error:  # a mistake of ours must cost this command and not everybody's requests
                sys.excepthook(type(error), error, error.__traceback__)
                text = f"the worker failed on this command: {error!r}"[:500]
                answer = Failed(request=job.command.request, message=text, fault="worker", code="request_broke")
            if answer is not None:
                self._jobs.remove(job)
                answers.append(answer)
        return answers

    def close(self) -> None:
        """Wait for files that are being written."""
        for job in self._jobs:
            while job.started and not job.finished(_PATIENCE):
                pass
        self._jobs.clear()

    def _advance(self, job: _Job, patience: float) -> Result | None:
        if job.started and not job.finished(patience):
            return None
        made = job.take()
        if made is not None and job.command.action == "save":
            return job.done(*made)
        if job.dropped:
            raise RequestError("the command was cancelled", code="cancelled")
        if self._batcher.slots[job.command.slot].sequence is not None or self._is_busy_with(job):
            return None
        if made is not None:
            return self._put(job, *made)
        return self._start(job)

    def _is_busy_with(self, job: _Job) -> bool:
        """Whether an earlier command for the same slot is not done yet."""
        earlier = self._jobs[: self._jobs.index(job)]
        return any(other.command.slot == job.command.slot for other in earlier)

    def _start(self, job: _Job) -> Result | None:
        command = job.command
        folder = Path(self._options.slot_save_path)
        match command.action:
            case "erase":
                return job.done(self._erase(command.slot))
            case "restore":
                self._batcher.slots[command.slot].kept = None
                job.start(lambda: self._read(folder, command.name))
            case "save":
                state = self._state_of(command.slot)
                if state is None:
                    return None
                job.start(lambda: self._write(folder, command.name, state))
        return None

    def _put(self, job: _Job, state: State, n_bytes: int) -> Result:
        """Take in what was read."""
        self._check_tokens(state.tokens)
        self._batcher.slots[job.command.slot].kept = self._batcher.cache.adopt(state)
        return job.done(state.computed, n_bytes)

    # --- what is in a slot ---

    def _found(self, number: int) -> Kept | State | None:
        kept = self._batcher.slots[number].kept
        return None if kept is None else self._batcher.cache.locate(kept)

    def _state_of(self, number: int) -> State | None:
        """Return the state of what a slot itself held, also where another one went on with it; None while there is no
        room for the way there. Raises RequestError or StateRefused.
        """
        kept, found = self._batcher.slots[number].kept, self._found(number)
        if kept is None or found is None:
            raise RequestError(f"slot {number} is empty", code="slot_empty")
        if min(kept.tokens) < 0:
            raise RequestError(f"slot {number} has images or sounds, which cannot be saved", code="not_supported")
        return self._batcher.cache.copy(found, kept.computed)

    def _erase(self, number: int) -> int:
        kept, found = self._batcher.slots[number].kept, self._found(number)
        self._batcher.slots[number].kept = None
        if kept is None or found is None:
            return 0
        if any(self._found(other.id) is found for other in self._batcher.slots):
            return kept.computed  # it is the beginning of what another slot has
        if isinstance(found, Kept):
            self._batcher.cache.drop(found)
        else:
            self._store.drop(found)
        return kept.computed

    # --- in the thread ---

    def _write(self, folder: Path, name: str, state: State) -> tuple[int, int]:
        header = Header(
            model=fingerprint(self._path),
            settings=self._settings(),
            adapters=tuple((prints, scale) for prints, scale in self._prints(state.adapters)),
            n_tokens=state.computed,
            n_bytes=state.data.nbytes,
        )
        return state.computed, write_state(folder, name, header, state.tokens, state.data)

    def _read(self, folder: Path, name: str) -> tuple[State, int]:
        header, tokens, data, size = read_state(folder, name, most_tokens=self._most_tokens)
        if header.model != fingerprint(self._path):
            raise RequestError(f"{name!r} was saved by another model", code="slot_file_foreign")
        if header.settings != self._settings():
            raise RequestError(
                f"{name!r} was saved with other settings: {header.settings or 'the defaults'} instead of "
                f"{self._settings() or 'the defaults'}",
                code="slot_file_foreign",
            )
        return State(tokens, data, self._adapters(header, name)), size

    def _settings(self) -> str:
        """Return what a state depends on beside the model. One of a divided cache says in how many parts."""
        told = [f"{name}={getattr(self._options, name)}" for name in _SETTINGS if _differs(self._options, name)]
        if not self._options.kv_unified:
            parts = self._options.n_parallel + max(0, self._options.n_cached)
            told.append(f"kv_unified=False n_parallel+n_cached={parts}")
        return " ".join(told)

    def _prints(self, adapters: AdapterSet) -> list[tuple[str, float]]:
        return [(fingerprint(self._options.adapters[index].path), scale) for index, scale in adapters]

    def _adapters(self, header: Header, name: str) -> AdapterSet:
        known = {fingerprint(one.path): index for index, one in enumerate(self._options.adapters)}
        if any(prints not in known for prints, _ in header.adapters):
            raise RequestError(f"{name!r} was saved with a LoRA adapter that is not loaded", code="slot_file_foreign")
        return tuple(sorted((known[prints], scale) for prints, scale in header.adapters))


def _differs(options: EngineOptions, name: str) -> bool:
    return bool(getattr(options, name) != getattr(EngineOptions(), name))


def _refused(command: Command, error: StateRefused) -> Failed:
    done = "restored" if command.action == "restore" else "saved"
    what = repr(command.name) if command.action == "restore" else f"slot {command.slot}"
    hint = ""
    if _TRANSPOSED in str(error):
        hint = "; values lie otherwise in the cache with flash attention than without: set flash_attn as it was"
    return Failed(
        request=command.request,
        message=f"{what} could not be {done}: {error}{hint}",
        fault="worker" if error.retry else "caller",
        retry=error.retry,
        code=f"slot_not_{done}",
    )
