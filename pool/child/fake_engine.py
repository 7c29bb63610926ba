"""An engine without a model, that does what its script says: for tests, benchmarks and demonstrations.

By default it answers a prompt with the prompt's own words, one per step. It embeds a text as its length, its first and
its last byte, and scores a document by its length. The script is the ``script`` of a
:class:`~llamaherd.pool.config.ModelSpec`, with the fields of :class:`Script`. Times are real; everything else is
deterministic. Answers to chats are read as those of a Qwen model: ``<tool_call>`` where the request has tools, and
``<think>`` where the script says it. *Gates* are paths of files: the engine waits there until the file exists, so that
a test decides when it goes on.
"""

import contextlib
import ctypes
import fcntl
import os
import signal
import struct
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Final, Literal

import msgspec

from llamaherd.pool.child.calls import Calls
from llamaherd.pool.child.dialect import dialect_of
from llamaherd.pool.child.engine import OUT_OF_MEMORY, EngineError, ModelInfo, Progress, RequestError
from llamaherd.pool.child.reply import Reply, read_delta, sorted_tokens
from llamaherd.pool.child.thinking import Tags
from llamaherd.transport.messages import (
    ChatOptions,
    ChildMessage,
    Delta,
    Detokenize,
    Done,
    Embed,
    EngineLoad,
    Failed,
    FinishReason,
    Generate,
    Load,
    PromptProgress,
    Rerank,
    Result,
    SlotState,
    Template,
    Tokenize,
    Tokens,
    Usage,
    Vector,
    Vectors,
)
from llamaherd.transport.messages import Sequence as SlotCommand

__all__ = ["FakeEngine", "Script"]

_GATE_POLL_SECONDS: Final = 0.002
#: What ggml's CUDA backend prints at the end of a process that asked for more memory than its GPU has.
_CUDA_LAST_WORDS: Final = b"""\
CUDA error: out of memory
  current device: 0, in function alloc at /build/ggml/src/ggml-cuda/ggml-cuda.cu:603
  cuMemCreate(&handle, reserve_size, &prop, 0)
/build/ggml/src/ggml-cuda/ggml-cuda.cu:109: CUDA error
"""


class Script(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the fake engine does.

    Attributes:
        pieces: The answer to every request, one text per step; empty means the prompt's words.
        repeat: Say the pieces so many times over.
        step_seconds: Duration of one step.
        load: How the load ends: ``ok``, ``fail`` (with a reason), ``crash`` (SIGABRT), ``kill`` (SIGKILL), ``stall``
            (never).
        load_steps: Progress messages of one load.
        load_seconds: Duration of one load.
        memory: Paths of files that stand for pieces of memory: the load takes one that no other process holds, and
            fails if there is none. A process gives its piece up when it ends, or sleeps.
        starve: How such a load fails: ``fail`` with ``out_of_memory``, or ``crash`` as CUDA's backend does.
        load_gate: Path of the file that the load waits for, after half of its progress; it can be abandoned there.
        step_gate: Path of the file that steps wait for, once ``gate_at`` tokens have been made.
        gate_at: See ``step_gate``.
        crash_at: Token number at which the process crashes in the way of ``crash``; -1 never.
        crash: ``crash`` or ``kill``.
        fail_at: Token number at which the request alone fails; -1 never.
        stall_at: Token number at which the engine stops for good, deaf to everything; -1 never.
        flood_bytes: Bytes of noise written to each of descriptors 1 and 2, at load and at every step.
        ignore_exit: Be deaf to ``exit`` and to SIGTERM from the load on.
        grandchild: Start a process at load that inherits every descriptor and sleeps for an hour.
        forget_parent: Clear the parent-death signal at load, as a set-uid exec would.
    """

    pieces: tuple[str, ...] = ()
    repeat: int = 1
    step_seconds: float = 0.0
    load: Literal["ok", "fail", "crash", "kill", "stall"] = "ok"
    load_steps: int = 4
    load_seconds: float = 0.0
    memory: tuple[str, ...] = ()
    starve: Literal["fail", "crash"] = "fail"
    load_gate: str = ""
    step_gate: str = ""
    gate_at: int = 0
    crash_at: int = -1
    crash: Literal["crash", "kill"] = "kill"
    fail_at: int = -1
    stall_at: int = -1
    flood_bytes: int = 0
    ignore_exit: bool = False
    grandchild: bool = False
    forget_parent: bool = False


class _Job:
    """One request: the words still to say."""

    def __init__(self, request: Generate, words: tuple[str, ...], prompt_tokens: int, reply: Reply | None) -> None:
        self.request = request
        self.reply = reply
        self._reason: FinishReason | None = None
        self.words = words
        self.said = 0
        self.slot = -1
        self.prompt_tokens = prompt_tokens
        limit = request.max_tokens
        self.length = len(words) if limit < 0 else min(limit, len(words))

    @property
    def finish_reason(self) -> FinishReason:
        return self._reason or ("stop" if self.length == len(self.words) else "length")

    @property
    def ended(self) -> bool:
        return self._reason is not None or self.said >= self.length

    def say(self) -> Delta:
        delta = Delta(self.request.request, self.words[self.said], (self.said,))
        self.said += 1
        if self.reply is None:
            return delta
        delta, self._reason = read_delta(self.reply, delta, self.finish_reason if self.ended else None)
        return delta


class FakeEngine:
    """See the module's text. Implements :class:`~llamaherd.pool.child.engine.Engine`."""

    def __init__(self) -> None:
        self._script = Script()
        self._slots = 1
        self._queue: deque[_Job] = deque()
        self._running: list[_Job] = []
        self._cancelled: list[_Job] = []
        self._told: list[PromptProgress] = []
        self._questions: deque[Embed | Rerank] = deque()
        self._interrupted = threading.Event()
        self._memory: int | None = None
        self.threads = (0, 0)
        self.scales: tuple[float, ...] = ()

    # --- the model's life ---

    def load(self, command: Load, progress: Progress) -> ModelInfo:
        try:
            script = self._script = msgspec.convert(command.script, Script)
        except msgspec.ValidationError as error:
            raise EngineError(f"the fake engine's script is wrong: {error}", code="bad_script") from error
        self._slots = max(1, command.options.n_parallel)
        if script.ignore_exit:
            ctypes.CDLL(None).signal(signal.SIGTERM, 1)  # SIG_IGN; Python's own call works in the main thread only
        if script.forget_parent:
            ctypes.CDLL(None).prctl(1, 0, 0, 0, 0)  # PR_SET_PDEATHSIG
        if script.grandchild:
            subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"], close_fds=False)
        self._flood()
        if script.memory:
            self._take_memory(script.memory)
        for step in range(1, script.load_steps + 1):
            if step > script.load_steps // 2:
                self._load_halfway(partial(progress, (step - 1) / script.load_steps))
            self._interrupted.wait(script.load_seconds / script.load_steps)
            if not progress(step / script.load_steps):
                raise _abandoned()
        return ModelInfo(n_vocab=256, n_ctx=command.options.n_ctx, n_ctx_train=command.options.n_ctx, ftype="fake")

    def _take_memory(self, pieces: tuple[str, ...]) -> None:
        for piece in pieces:
            held = os.open(piece, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(held)
            else:
                self._memory = held
                return
        if self._script.starve == "crash":
            os.write(2, _CUDA_LAST_WORDS)
            _end_process("crash")
        raise EngineError("the script says that there is no memory left", code=OUT_OF_MEMORY)

    def _load_halfway(self, may_go_on: Callable[[], bool]) -> None:
        script = self._script
        if script.load_gate and not self._wait_for(script.load_gate, may_go_on):
            raise _abandoned()
        if script.load == "fail":
            raise EngineError("the script says that this model cannot be loaded")
        if script.load == "stall":
            _stall()
        if script.load in ("crash", "kill"):
            _end_process(script.load)

    def unload(self) -> None:
        self._queue.clear()
        if self._memory is not None:
            os.close(self._memory)
            self._memory = None

    # --- requests ---

    @property
    def pause(self) -> float:
        """None: its steps take no time."""
        return 0.0

    @property
    def busy(self) -> bool:
        return bool(self._queue or self._running or self._cancelled or self._questions)

    def submit(self, request: Generate | Embed | Rerank) -> None:
        if isinstance(request, Embed | Rerank):
            self._questions.append(request)
            return
        prompt = self._prompt_of(request)
        script = self._script
        words = script.pieces or tuple(_words(prompt))
        count = len(prompt.split())
        self._queue.append(_Job(request, words * script.repeat, count, self._reply_to(request)))
        if request.progress:
            self._told.append(PromptProgress(request.request, count, 0, count, 0.0))

    @staticmethod
    def _prompt_of(request: Generate) -> str:
        if request.messages is not None:
            content = request.messages[-1].get("content")
            return content if isinstance(content, str) else ""
        if request.infill is not None:
            return f"{request.infill.prefix} {request.infill.prompt} {request.infill.suffix}"
        if isinstance(request.prompt, tuple):
            if any(not 0 <= part < 256 for part in request.prompt if isinstance(part, int)):
                raise RequestError("token ids of the fake engine are bytes, 0 to 255")
            parts = (part.encode() if isinstance(part, str) else bytes((part,)) for part in request.prompt)
            return b"".join(parts).decode(errors="replace")
        return request.prompt or ""

    def _reply_to(self, request: Generate) -> Reply | None:
        options = request.chat or ChatOptions()
        tools = options.tools if options.tool_choice != "none" else ()
        thinks = options.reasoning_format != "none" and any("<think>" in piece for piece in self._script.pieces)
        if request.messages is None or not (tools or thinks):
            return None
        return Reply(
            tags=Tags("<think>", "</think>") if thinks else None,
            dialect=dialect_of("<tool_call>", takes_tools=True) if tools else None,
            calls=Calls(tool["function"]["name"] for tool in tools),
            parallel=options.parallel_tool_calls is not False,
        )

    def cancel(self, request: int) -> None:
        for jobs in (self._queue, self._running):
            for job in [job for job in jobs if job.request.request == request]:
                jobs.remove(job)
                self._cancelled.append(job)

    def step(self) -> list[ChildMessage]:
        script = self._script
        while self._queue and len(self._running) < self._slots:
            job = self._queue.popleft()
            job.slot = min(set(range(self._slots)) - {other.slot for other in self._running})
            self._running.append(job)
        if script.step_seconds:
            self._interrupted.wait(script.step_seconds)
        self._flood()
        ended: list[ChildMessage] = [_done(job, "cancelled") for job in self._cancelled]
        self._cancelled.clear()
        if self._questions:
            ended += _vectors(self._questions.popleft())
        deltas: list[Delta] = []
        for job in list(self._running):
            self._advance(job, deltas, ended)
        told, self._told = tuple(self._told), []
        messages: list[ChildMessage] = [Tokens(progress=told)] if told else []
        return [*messages, sorted_tokens(deltas), *ended] if deltas else [*messages, *ended]

    def _advance(self, job: _Job, deltas: list[Delta], ended: list[ChildMessage]) -> None:
        self._misbehave(job)
        number = job.request.request
        if self._script.fail_at == job.said:
            self._running.remove(job)
            ended.append(Failed(request=number, message="the script says that this request fails", retry=True))
            return
        if job.said < job.length:
            deltas.append(job.say())
        if job.ended:
            self._running.remove(job)
            ended.append(_done(job, job.finish_reason))

    def _misbehave(self, job: _Job) -> None:
        script = self._script
        if script.step_gate and job.said >= script.gate_at:
            self._wait_for(script.step_gate)
        if script.crash_at == job.said:
            _end_process(script.crash)
        if script.stall_at == job.said:
            _stall()

    # --- slots ---

    @property
    def load_figures(self) -> EngineLoad:
        return EngineLoad(slots_busy=len(self._running), waiting=len(self._queue))

    def slots(self) -> tuple[SlotState, ...]:
        jobs = {job.slot: job for job in self._running}
        return tuple(
            SlotState(
                id=number,
                n_ctx=4096,
                busy=number in jobs,
                request=jobs[number].request.request if number in jobs else None,
                n_decoded=jobs[number].said if number in jobs else 0,
            )
            for number in range(self._slots)
        )

    def sequence(self, command: SlotCommand) -> None:
        raise RequestError("the fake engine has nothing to save", code="not_supported")

    # --- text ---

    def tokenize(self, command: Tokenize) -> tuple[int, ...]:
        if isinstance(command.text, str):
            return tuple(command.text.encode())
        return tuple(
            byte for part in command.text for byte in (part.encode() if isinstance(part, str) else bytes((part,)))
        )

    def pieces(self, tokens: Sequence[int]) -> tuple[bytes, ...]:
        return tuple(bytes((token,)) for token in tokens)

    def detokenize(self, command: Detokenize) -> str:
        if any(not 0 <= token < 256 for token in command.tokens):
            raise RequestError("token ids of the fake engine are bytes, 0 to 255")
        return bytes(command.tokens).decode(errors="replace")

    def template(self, command: Template) -> str:
        return "".join(f"<{message['role']}>{message.get('content') or ''}\n" for message in command.messages)

    def set_threads(self, n: int, batch: int) -> None:
        self.threads = (n, batch or n)

    def set_scales(self, scales: Sequence[float]) -> None:
        self.scales = tuple(scales)

    def expect_threads(self, n: int) -> None:
        del n  # a step of it uses none

    def interrupt(self) -> None:
        if not self._script.ignore_exit:
            self._interrupted.set()
            return
        _stall()

    # --- misbehaviour ---

    def _wait_for(self, gate: str, may_go_on: Callable[[], bool] = lambda: True) -> bool:
        while not os.path.exists(gate) and not self._interrupted.wait(_GATE_POLL_SECONDS):
            if not may_go_on():
                return False
        return True

    def _flood(self) -> None:
        noise = b"." * self._script.flood_bytes
        for fd in (1, 2):
            rest = memoryview(noise)
            while rest:
                rest = rest[os.write(fd, rest) :]


def _abandoned() -> EngineError:
    return EngineError("the load was abandoned", code="abandoned")


def _words(text: str) -> Iterator[str]:
    for index, word in enumerate(text.split()):
        yield word if index == 0 else f" {word}"


def _vectors(question: Embed | Rerank) -> list[ChildMessage]:
    """Answer with vectors of three numbers, the length, the first and the last byte; a document's score is its
    length.
    """
    number = question.request
    if isinstance(question, Embed):
        inputs = [one.encode() if isinstance(one, str) else repr(one).encode() for one in question.inputs]
        rows = [(float(len(data)), *(float(byte) for byte in (data[:1] + data[-1:]))) for data in inputs]
    else:
        inputs = [document.encode() for document in question.documents]
        rows = [(float(len(data)),) for data in inputs]
    vectors = tuple(Vector(number, index, 0, 1, struct.pack(f"<{len(row)}f", *row)) for index, row in enumerate(rows))
    usage = Usage(prompt_tokens=sum(len(data.split()) for data in inputs))
    return [Vectors(vectors=vectors), Result(request=number, usage=usage)]


def _done(job: _Job, reason: FinishReason) -> Done:
    usage = Usage(prompt_tokens=job.prompt_tokens, completion_tokens=job.said)
    return Done(request=job.request.request, finish_reason=reason, usage=usage, slot=job.slot)


def _stall() -> None:
    while True:
        with contextlib.suppress(InterruptedError):
            signal.pause()


def _end_process(how: Literal["crash", "kill"]) -> None:
    if how == "crash":
        os.abort()
    os.kill(os.getpid(), signal.SIGKILL)
