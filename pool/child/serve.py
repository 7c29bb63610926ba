"""A worker's life: who reads commands, who runs the engine, and how it all ends.

Three threads, each with one job::

    main     waits for the word to leave (a command, a signal, the engine's end), then ends the process
    control  blocked in ``receive``; puts commands into the inbox; sees ``exit`` even while the engine loads
    engine   owns the engine: takes commands between steps, steps while there is work, sends what happened

The control thread starts before the engine is imported, so a worker that is told to leave in its first millisecond
leaves. The end of the channel means that the pool is gone: the process ends at once, without freeing anything, because
nobody is left to wait for it and the operating system frees faster.
"""

import contextlib
import os
import queue
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from enum import IntEnum
from time import monotonic
from typing import Final

import msgspec

from llamaherd.pool.child.ahead import Ahead
from llamaherd.pool.child.engine import Engine, EngineError, ModelInfo, RequestError
from llamaherd.pool.child.inbox import Inbox
from llamaherd.pool.child.parcels import send_all
from llamaherd.pool.machine import resident_bytes
from llamaherd.transport.channel import ChildChannel
from llamaherd.transport.errors import ChannelError, MessageTooLarge
from llamaherd.transport.messages import (
    Cancel,
    ChildMessage,
    Detokenize,
    Download,
    Embed,
    EngineLoad,
    Exit,
    Failed,
    Fault,
    Generate,
    Load,
    Lora,
    PoolMessage,
    Prefetch,
    Rerank,
    Result,
    Sequence,
    Sleep,
    Slots,
    State,
    Stats,
    Template,
    Threads,
    Tokenize,
    Unknown,
    Unload,
    Wake,
)

__all__ = ["EngineFactory", "ExitCode", "Service"]

#: Makes the engine that a ``load`` command names. Raises EngineError for a name that it does not know.
EngineFactory = Callable[[str], Engine]

#: Seconds that the engine thread has, once interrupted, before the process ends without it.
LEAVE_SECONDS: Final = 5.0
#: Least time between two messages of figures.
LOAD_SECONDS: Final = 1.0
#: Least progress between two ``loading`` messages.
PROGRESS_STEP: Final = 0.01


class ExitCode(IntEnum):
    """How a worker ends when it ends by itself. A start-up failure is not a crash."""

    DONE = 0
    ORPHANED = 1
    LOAD_FAILED = 3
    ENGINE_BROKE = 4


#: How long the first step waits at most for requests that come together.
_GATHER_SECONDS: Final = 0.01


class Service:
    """Connects one channel with one engine.

    Args:
        preload: The engine to make before any command asks for one: a spare worker has time then.
        rename: Called with the name of each model that the process was not started for, and when it is a spare again.
    """

    def __init__(
        self,
        channel: ChildChannel,
        make_engine: EngineFactory,
        preload: str = "",
        *,
        rename: Callable[[str], None] = lambda _name: None,
    ) -> None:
        self._channel = channel
        self._make_engine = make_engine
        self._preload = preload
        self._inbox: Inbox[PoolMessage] = Inbox()
        self._rename = rename
        self._is_spare = bool(preload)
        self._leaving = threading.Event()
        self._engines: dict[str, Engine] = {}
        self._engine: Engine | None = None
        self._load: Load | None = None
        self._ahead = Ahead(self._leaving)
        self._awake = False
        self._sleepy = False  # it is to sleep once it has nothing to do
        #: The engine's figures as they were told last, and when they may be told again.
        self._load_told: EngineLoad | None = None
        self._load_due = 0.0
        self._exit_code = ExitCode.DONE
        self._engine_thread = threading.Thread(target=self._run_engine, name="engine", daemon=True)

    def start(self) -> None:
        """Start the control and the engine thread."""
        threading.Thread(target=self._run_control, name="control", daemon=True).start()
        self._engine_thread.start()

    def leave(self, code: ExitCode = ExitCode.DONE) -> None:
        """From any thread: begin the orderly end. The first caller's code counts."""
        engine = self._engine
        if engine is not None:
            engine.interrupt()
        if not self._leaving.is_set():
            self._exit_code = code
            self._leaving.set()
        self._inbox.put(Exit())

    def wait(self) -> ExitCode:
        """Block the main thread until the worker may end, and return the exit code."""
        self._leaving.wait()
        self._engine_thread.join(LEAVE_SECONDS)
        self._channel.close()
        return self._exit_code

    # --- control thread ---

    def _run_control(self) -> None:
        try:
            while True:
                for message in self._channel.receive():
                    if isinstance(message, Exit):
                        self.leave()
                        return
                    engine = self._engine  # the engine's thread may forget it at any time
                    if isinstance(message, Threads) and engine is not None:
                        engine.expect_threads(message.n)
                    if isinstance(message, Load | Unload):
                        self._ahead.expect(message if isinstance(message, Load) else None)
                    self._inbox.put(message)
        except ChannelError:
            if not self._leaving.is_set():
                os._exit(ExitCode.ORPHANED)
        except BaseException as error:  # a worker that cannot hear must not live on
            sys.excepthook(type(error), error, error.__traceback__)
            os._exit(ExitCode.ENGINE_BROKE)

    # --- engine thread ---

    def _run_engine(self) -> None:
        try:
            self._make_ready()
            self._serve()
        except EngineError as error:
            self._report(Failed(message=str(error), fault="worker", code=error.code, retry=error.retry))
            self.leave(ExitCode.ENGINE_BROKE)
        except ChannelError:
            self.leave(ExitCode.ORPHANED)
        except BaseException as error:  # the last frame of this thread: what is not reported here is lost
            sys.excepthook(type(error), error, error.__traceback__)
            self._report(Failed(message=f"the worker's engine failed: {error!r}", fault="worker", code="engine_broke"))
            self.leave(ExitCode.ENGINE_BROKE)

    def _make_ready(self) -> None:
        if self._preload:
            try:
                self._engines[self._preload] = self._make_engine(self._preload)
            except EngineError as error:
                log(f"nothing is preloaded: {error}")  # the load will fail with the same reason

    def _report(self, failure: Failed) -> None:
        try:
            self._channel.send(failure)
        except ChannelError as error:
            log(f"could not report {failure.message!r}: {error}")

    def _serve(self) -> None:
        while not self._leaving.is_set():
            engine = self._engine
            if engine is not None and self._awake and engine.busy:
                self._take_waiting()
                if not self._leaving.is_set():
                    self._send_all(engine.step())
                    self._tell_load(engine)
                    if self._sleepy and not engine.busy:
                        self._sleep()
            elif engine is not None and self._load_told is not None and engine.load_figures != self._load_told:
                # What was too soon to be told is told when its time has come, if nothing else comes before.
                with contextlib.suppress(queue.Empty):
                    self._handle(self._inbox.get(timeout=max(0.0, self._load_due - monotonic())))
                    self._gather()
                self._tell_load(engine)
            else:
                self._handle(self._inbox.get())
                self._gather()

    def _gather(self) -> None:
        """Take what comes together with an idle engine's first request: who misses the first step waits for all of it,
        and ends by as much after the others.
        """
        engine, until = self._engine, monotonic() + _GATHER_SECONDS
        with contextlib.suppress(queue.Empty):
            while engine is not None and self._awake and not self._leaving.is_set():
                pause = min(engine.pause, until - monotonic())
                if pause <= 0:
                    return
                self._handle(self._inbox.get(timeout=pause))

    def _tell_load(self, engine: Engine) -> None:
        """Send the engine's figures, if they have changed and the last ones are a second old."""
        now = monotonic()
        if now < self._load_due or engine is not self._engine:  # a model that is gone has none
            return
        figures = engine.load_figures
        if figures != self._load_told:
            self._load_told, self._load_due = figures, now + LOAD_SECONDS
            self._channel.send(Stats(load=figures))

    def _take_waiting(self) -> None:
        # Asked for, since most steps find nothing, and an exception costs more than the rest of this.
        while not self._inbox.empty() and not self._leaving.is_set():
            self._handle(self._inbox.get())

    def _send_all(self, messages: Iterable[ChildMessage]) -> None:
        for number in send_all(messages, self._channel.send):
            if self._engine is not None:
                self._engine.cancel(number)

    def _handle(self, command: PoolMessage) -> None:
        match command:
            case Generate() | Embed() | Rerank() | Tokenize() | Detokenize() | Template() | Slots() | Sequence():
                self._answer(command)
            case Cancel():
                if self._engine is not None:
                    self._engine.cancel(command.request)
            case Threads():
                if self._engine is not None:
                    self._engine.set_threads(command.n, command.batch)
            case Lora():
                self._scale(command)
            case Download():
                self._download(command)
            case Load():
                self._begin(command)
            case Prefetch():
                self._prefetch(command.load)
            case Sleep():
                self._sleep()
            case Wake():
                self._wake()
            case Unload():
                self._unload()
            case Exit():
                pass  # the flag is set; the loops see it
            case Unknown():
                self._refuse(command)

    def _refuse(self, message: Unknown) -> None:
        """Say no to a message that means nothing here, if somebody waits for its answer."""
        log(f"a message of kind {message.kind!r} is not understood: {message.reason}")
        text = f"the worker does not understand the {message.kind}: {message.reason}"
        if message.kind == "load" and self._load is None:
            self._report(Failed(message=text, fault="model", code="invalid_option"))
            self.leave(ExitCode.LOAD_FAILED)
        elif message.request is not None and message.kind != "cancel":
            failure = Failed(request=message.request, message=text, fault="caller", code="invalid_request")
            self._channel.send(failure)

    def _answer(self, command: Generate | Embed | Rerank | Tokenize | Detokenize | Template | Slots | Sequence) -> None:
        engine = self._engine
        try:
            if engine is None or not self._awake:
                raise RequestError("the worker has no model loaded", code="not_loaded")
            match command:
                case Generate() | Embed() | Rerank():
                    engine.submit(command)
                case Slots():
                    self._channel.send(Result(request=command.request, slots=engine.slots()))
                case Sequence():
                    engine.sequence(command)
                case Tokenize():
                    tokens = engine.tokenize(command)
                    pieces = engine.pieces(tokens) if command.pieces else None
                    self._channel.send(Result(request=command.request, tokens=tokens, pieces=pieces))
                case Detokenize():
                    self._channel.send(Result(request=command.request, text=engine.detokenize(command)))
                case Template():
                    self._channel.send(Result(request=command.request, text=engine.template(command)))
        except MessageTooLarge as error:
            failure = Failed(request=command.request, message=str(error), fault="caller", code="too_large")
            self._channel.send(failure)
        except RequestError as error:
            fault: Fault = "worker" if error.code == "not_loaded" else "caller"
            failure = Failed(
                request=command.request, message=str(error), fault=fault, code=error.code, details=error.details
            )
            self._channel.send(failure)
        except (ChannelError, EngineError):
            raise
        except Exception as error:  # nothing that one caller sends may end the others' requests
            sys.excepthook(type(error), error, error.__traceback__)
            text = f"the worker failed on this request: {error!r}"[:500]
            self._channel.send(Failed(request=command.request, message=text, fault="worker", code="request_broke"))

    def _download(self, command: Download) -> None:
        from llamaherd.pool.child.download import run_download

        def report(payload: Mapping[str, object]) -> None:
            self._channel.send(State(state="downloading", payload=dict(payload)))

        run_download(command, report, self._leaving)

    # --- the model's life ---

    def _begin(self, command: Load) -> None:
        if self._load is not None:
            log(f"ignored a second load command, for {command.model!r}")
            return
        self._load = command
        if self._is_spare:
            self._rename(command.model)
        info = self._take_ahead(command) or self._load_model(command)
        if info is not None:
            self._channel.send(Stats(rss_bytes=resident_bytes(), gpu=info.gpu))
            self._channel.send(State(state="ready", payload=ready_payload(command, info)))

    def _prefetch(self, command: Load) -> None:
        """Load a model for a command that may follow. If that fails, this is a worker without a model as before."""
        if self._load is not None or self._ahead.engine is not None:
            log(f"ignored a prefetch command, for {command.model!r}")
            return
        payload = {"model": command.model}
        try:
            engine = self._engine_of(command)
            self._ahead.load(engine, command, LoadProgress(self._channel, self._leaving))
        except EngineError as error:
            payload["error"] = str(error)
        self._channel.send(State(state="prefetched", payload=payload))

    def _engine_of(self, command: Load) -> Engine:
        """Return the engine that a command names, made once in this process."""
        if command.engine not in self._engines:
            self._engines[command.engine] = self._make_engine(command.engine)
        return self._engines[command.engine]

    def _take_ahead(self, command: Load) -> ModelInfo | None:
        """Have what was loaded ahead, if it is this; if it is another model, free it."""
        engine, info = self._ahead.take(command)
        if engine is not None and info is not None:
            self._engine, self._awake = engine, True
        return info

    def _wake(self) -> None:
        self._sleepy = False
        if self._load is None:
            log("ignored a wake command: there is nothing to wake")
        elif self._awake or self._load_model(self._load) is not None:
            self._channel.send(State(state="ready"))

    def _sleep(self) -> None:
        engine = self._engine
        if engine is None or not self._awake:
            log("ignored a sleep command: there is no model")
            return
        self._sleepy = engine.busy
        if self._sleepy:
            return  # what it still does, such as to save a slot, comes first
        engine.unload()
        self._awake = False
        self._channel.send(State(state="sleeping"))

    def _unload(self) -> None:
        """Free the model and forget it; another may be loaded then."""
        engine = self._engine
        while engine is not None and self._awake and engine.busy and not self._leaving.is_set():
            self._send_all(engine.step())
        if engine is not None:
            engine.unload()
        self._engine = self._load = self._load_told = None
        self._awake = self._sleepy = False
        self._is_spare = True
        self._rename("spare")
        self._load_due = 0.0
        self._channel.send(State(state="unloaded"))

    def _scale(self, command: Lora) -> None:
        """Use other default scales of the adapters, also after the next wake."""
        load = self._load
        if load is None or len(command.scales) != len(load.options.adapters):
            log(f"ignored the scales of {len(command.scales)} adapters: the model has others")
            return
        try:
            if self._engine is not None:
                self._engine.set_scales(command.scales)
        except EngineError as error:
            log(f"ignored the scales of adapters: {error}")
            return
        pairs = zip(load.options.adapters, command.scales, strict=True)
        adapters = tuple(msgspec.structs.replace(adapter, scale=scale) for adapter, scale in pairs)
        self._load = msgspec.structs.replace(load, options=msgspec.structs.replace(load.options, adapters=adapters))

    def _load_model(self, command: Load) -> ModelInfo | None:
        """Load, and report how far it is. Return None after a failure: the worker is leaving then."""
        progress = LoadProgress(self._channel, self._leaving)
        try:
            if self._engine is None:
                self._engine = self._engine_of(command)
            progress(0.0)
            info = self._engine.load(command, progress)
            progress(1.0)
        except EngineError as error:
            if not self._leaving.is_set():
                self._report(Failed(message=str(error), fault="model", code=error.code, retry=error.retry))
            self.leave(ExitCode.LOAD_FAILED)
            return None
        self._awake = True
        return info


class LoadProgress:
    """The engine's progress callback: says how far the load is, in the reference's form, without flooding."""

    def __init__(self, channel: ChildChannel, leaving: threading.Event) -> None:
        self._channel = channel
        self._leaving = leaving
        self._last = -1.0

    def __call__(self, fraction: float) -> bool:
        due = fraction - self._last >= PROGRESS_STEP or fraction >= 1.0
        if due and fraction > self._last:
            self._last = fraction
            payload = {"stages": ["text_model"], "current": "text_model", "value": round(fraction, 4)}
            self._channel.send(State(state="loading", payload=payload))
        return not self._leaving.is_set()


def ready_payload(command: Load, info: ModelInfo) -> dict[str, object]:
    """Return the facts that a ``ready`` message carries, in the reference's form (the pool adds ``created``)."""
    return {
        "id": command.model,
        "aliases": list(command.aliases),
        "tags": list(command.tags),
        "object": "model",
        "owned_by": "llamacpp",
        "meta": info.to_meta(),
        "architecture": {"input_modalities": list(info.modalities), "output_modalities": ["text"]},
    }


def log(text: str) -> None:
    """Write one line to the model's log."""
    os.write(2, f"llamaherd: {text}\n".encode(errors="replace"))
