"""The service connects a channel with an engine: commands in, news out, and an orderly end. In process, in memory."""

import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from queue import SimpleQueue

import pytest

from llamaherd.pool.child.engine import Engine, EngineError
from llamaherd.pool.child.fake_engine import FakeEngine
from llamaherd.pool.child.serve import ExitCode, Service
from llamaherd.transport import ChannelClosed, ChildChannel, EndOfChannel
from llamaherd.transport.framing import encode_checked
from llamaherd.transport.messages import (
    MAX_MESSAGE_BYTES,
    Cancel,
    ChildMessage,
    Done,
    Embed,
    EngineOptions,
    Exit,
    Failed,
    Generate,
    Load,
    PoolMessage,
    Prefetch,
    Rerank,
    Result,
    Sleep,
    State,
    Threads,
    Tokenize,
    Tokens,
    Unknown,
    Unload,
    Wake,
    decode,
    encode,
)
from patience import holds_within

DEADLINE = 20.0


class Desk(ChildChannel):
    """The worker's end of a channel whose other end is the test itself."""

    def __init__(self) -> None:
        self._commands: SimpleQueue[PoolMessage | None] = SimpleQueue()
        self._news: SimpleQueue[ChildMessage] = SimpleQueue()
        self._told = self._asked = 0
        self.closed = threading.Event()

    def tell(self, *commands: PoolMessage) -> None:
        self._told += len(commands)
        for command in commands:
            self._commands.put(command)

    def until_taken(self) -> None:
        """Wait until the engine can see all commands: whoever comes for the next one has handed the last one on."""
        assert holds_within(DEADLINE, lambda: self._asked > self._told), "commands are left"

    def hear(self) -> ChildMessage:
        assert holds_within(DEADLINE, lambda: not self._news.empty()), "nothing is said"
        return self._news.get()

    def hear_until(self, last: Callable[[ChildMessage], bool]) -> list[ChildMessage]:
        heard = [self.hear()]
        while not last(heard[-1]):
            heard.append(self.hear())
        return heard

    def send(self, message: ChildMessage) -> None:
        if self.closed.is_set():
            raise ChannelClosed
        encode_checked(message)
        self._news.put(message)

    def receive(self) -> Sequence[PoolMessage]:
        self._asked += 1
        command = self._commands.get()
        if command is None:
            raise EndOfChannel
        return [command]

    def close(self) -> None:
        self.closed.set()
        self._commands.put(None)  # whoever waits for the next command ends


class Shop:
    """A service with its desk, already started."""

    def __init__(self, engine: Engine | None = None) -> None:
        self.desk = Desk()
        self.engine = engine or FakeEngine()
        self.service = Service(self.desk, self._make)
        self.service.start()

    def _make(self, name: str) -> Engine:
        if name != "fake":
            raise EngineError(f"unknown engine {name!r}")
        return self.engine

    def load(self, **script: object) -> None:
        self.desk.tell(Load(model="m", engine="fake", script=script))
        self.desk.hear_until(lambda news: isinstance(news, State) and news.state == "ready")


@pytest.fixture
def shop() -> Iterator[Shop]:
    shop = Shop()
    yield shop
    shop.service.leave()
    shop.service.wait()


def is_done(news: ChildMessage) -> bool:
    return isinstance(news, Done)


def test_a_load_reports_progress_in_the_references_form_and_then_the_models_facts(shop: Shop) -> None:
    shop.desk.tell(Load(model="m", engine="fake", aliases=("a",), script={"load_steps": 2}))
    heard = shop.desk.hear_until(lambda news: isinstance(news, State) and news.state == "ready")
    states = [news for news in heard if isinstance(news, State)]
    values = [state.payload["value"] for state in states[:-1] if state.payload is not None]
    assert values == [0.0, 0.5, 1.0]
    assert states[0].payload == {"stages": ["text_model"], "current": "text_model", "value": 0.0}
    assert states[-1].payload is not None
    assert set(states[-1].payload) == {"id", "aliases", "tags", "object", "owned_by", "meta", "architecture"}


def test_a_fine_grained_load_does_not_flood(shop: Shop) -> None:
    shop.desk.tell(Load(model="m", engine="fake", script={"load_steps": 5000}))
    heard = shop.desk.hear_until(lambda news: isinstance(news, State) and news.state == "ready")
    assert len(heard) <= 104


def test_every_sequence_that_moves_in_a_step_is_in_its_one_tokens_message(shop: Shop, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    shop.load(step_gate=str(gate))
    shop.desk.tell(*(Generate(request=number, prompt="a b") for number in (1, 2, 3)))
    shop.desk.until_taken()
    gate.touch()
    heard = shop.desk.hear_until(lambda news: is_done(news) and news.request == 3)  # type: ignore[union-attr]
    moved = [[delta.request for delta in news.deltas] for news in heard if isinstance(news, Tokens)]
    assert [1, 2, 3] in moved
    assert len([news for news in heard if isinstance(news, Done)]) == 3


def test_a_cancelled_request_is_confirmed_and_an_unknown_one_is_ignored(shop: Shop) -> None:
    shop.load(pieces=["x"], repeat=10**6, step_seconds=0.001)
    shop.desk.tell(Generate(request=1, prompt="go"), Cancel(request=77), Cancel(request=1))
    (*_, last) = shop.desk.hear_until(is_done)
    assert isinstance(last, Done)
    assert (last.request, last.finish_reason) == (1, "cancelled")


def test_an_answer_without_a_stream_does_not_wait_for_generations(shop: Shop) -> None:
    shop.load(pieces=["x"], repeat=10**6, step_seconds=0.001)
    shop.desk.tell(Generate(request=1, prompt="go"), Tokenize(request=2, text="hi"))
    heard = shop.desk.hear_until(lambda news: isinstance(news, Result))
    assert heard[-1] == Result(request=2, tokens=(104, 105))
    shop.desk.tell(Cancel(request=1))
    shop.desk.hear_until(is_done)


def test_an_impossible_request_is_its_callers_fault_and_work_goes_on(shop: Shop) -> None:
    shop.load()
    shop.desk.tell(Generate(request=1, prompt=(999,)), Generate(request=2, prompt="fine"))
    failed = shop.desk.hear()
    assert isinstance(failed, Failed)
    assert (failed.request, failed.fault, failed.retry) == (1, "caller", False)
    assert is_done(shop.desk.hear_until(is_done)[-1])


def test_work_before_a_model_is_loaded_is_refused(shop: Shop) -> None:
    shop.desk.tell(Generate(request=1, prompt="hello"))
    failed = shop.desk.hear()
    assert isinstance(failed, Failed)
    assert failed.code == "not_loaded"


def test_sleep_and_wake_are_reported_and_a_busy_engine_does_not_sleep(shop: Shop) -> None:
    shop.load(pieces=["x"], repeat=10**6, step_seconds=0.001)
    shop.desk.tell(Sleep())
    assert shop.desk.hear() == State(state="sleeping")
    shop.desk.tell(Wake())
    assert shop.desk.hear_until(lambda news: news == State(state="ready"))
    shop.desk.tell(Generate(request=1, prompt="go"), Sleep(), Cancel(request=1))
    heard = shop.desk.hear_until(is_done)
    assert State(state="sleeping") not in heard


def test_a_busy_engine_that_is_told_to_sleep_does_so_at_its_end_unless_it_is_woken_before(
    shop: Shop, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    gate.touch()
    shop.load(step_gate=str(gate))
    shop.desk.tell(Generate(request=1, prompt="go"), Sleep())
    heard = shop.desk.hear_until(lambda news: news == State(state="sleeping"))
    assert any(map(is_done, heard))
    shop.desk.tell(Wake())
    shop.desk.hear_until(lambda news: news == State(state="ready"))
    gate.unlink()
    shop.desk.tell(Generate(request=2, prompt="go on"), Sleep(), Wake())
    shop.desk.until_taken()
    gate.touch()
    heard = shop.desk.hear_until(is_done)
    shop.desk.tell(Tokenize(request=3, text=""))
    heard += shop.desk.hear_until(lambda news: isinstance(news, Result))
    assert State(state="sleeping") not in heard


def test_threads_are_handed_to_the_engine(shop: Shop) -> None:
    shop.load()
    shop.desk.tell(Threads(n=3), Tokenize(request=1, text=""))
    shop.desk.hear()
    assert isinstance(shop.engine, FakeEngine)
    assert shop.engine.threads == (3, 3)


def test_what_nobody_understands_is_ignored(shop: Shop) -> None:
    shop.load()
    again = Load(model="second", engine="fake")
    shop.desk.tell(Unknown("riddle", "unknown kind"), again, Tokenize(request=1, text=""))
    assert isinstance(shop.desk.hear(), Result)


@pytest.mark.parametrize(
    "command", [Load(model="m", engine="fake", script={"load": "fail"}), Load(model="m", engine="x")]
)
def test_a_load_that_fails_is_reported_and_ends_the_worker_with_its_own_code(command: Load) -> None:
    shop = Shop()
    shop.desk.tell(command)
    heard = shop.desk.hear_until(lambda news: isinstance(news, Failed))
    assert isinstance(heard[-1], Failed)
    assert (heard[-1].request, heard[-1].fault) == (None, "model")
    assert shop.service.wait() is ExitCode.LOAD_FAILED
    assert shop.desk.closed.is_set()


def test_an_exit_command_during_a_load_ends_the_worker_without_a_complaint() -> None:
    shop = Shop()
    shop.desk.tell(Load(model="m", engine="fake", script={"load_gate": "/nonexistent/gate"}))
    shop.desk.hear()
    shop.desk.tell(Exit())
    assert shop.service.wait() is ExitCode.DONE


def test_an_exit_command_ends_an_idle_and_a_busy_worker() -> None:
    for request in ((), (Generate(request=1, prompt="go"),)):
        shop = Shop()
        shop.load(pieces=["x"], repeat=10**6, step_seconds=0.001)
        shop.desk.tell(*request, Exit())
        assert shop.service.wait() is ExitCode.DONE


class Breaking(FakeEngine):
    """An engine whose step cannot go on."""

    def step(self) -> list[ChildMessage]:
        raise EngineError("the GPU is lost", code="device_lost")


class Waiting(FakeEngine):
    """An engine whose first step is worth a wait until two requests are there."""

    @property
    def pause(self) -> float:
        return 60.0 if 0 < self.load_figures.waiting < 2 else 0.0


def test_requests_that_come_together_have_their_first_step_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llamaherd.pool.child.serve._GATHER_SECONDS", 60.0)
    shop = Shop(Waiting())
    shop.load(pieces=["x"], repeat=3)
    shop.desk.tell(Generate(request=1, prompt="go"))
    shop.desk.tell(Generate(request=2, prompt="go"))
    *_, first = shop.desk.hear_until(lambda news: isinstance(news, Tokens))
    assert isinstance(first, Tokens)
    assert [delta.request for delta in first.deltas] == [1, 2]
    shop.service.leave()
    shop.service.wait()


class Buggy(FakeEngine):
    """An engine with a mistake in it."""

    def set_threads(self, n: int, batch: int) -> None:
        raise ZeroDivisionError("a mistake")


def test_an_engine_that_breaks_says_why_and_ends_the_worker() -> None:
    shop = Shop(Breaking())
    shop.load()
    shop.desk.tell(Generate(request=1, prompt="go"))
    failed = shop.desk.hear()
    assert isinstance(failed, Failed)
    assert (failed.message, failed.code, failed.request) == ("the GPU is lost", "device_lost", None)
    assert shop.service.wait() is ExitCode.ENGINE_BROKE


def test_a_mistake_in_an_engine_is_reported_with_its_traceback(capfd: pytest.CaptureFixture[str]) -> None:
    shop = Shop(Buggy())
    shop.load()
    shop.desk.tell(Threads(n=1))
    failed = shop.desk.hear()
    assert isinstance(failed, Failed)
    assert "ZeroDivisionError" in failed.message
    assert shop.service.wait() is ExitCode.ENGINE_BROKE
    assert "a mistake" in capfd.readouterr().err


def test_options_travel_with_defaults_left_out() -> None:
    import msgspec

    assert msgspec.json.encode(Load(model="m", options=EngineOptions(n_ctx=512))) == (
        b'{"model":"m","options":{"n_ctx":512}}'
    )


class Fragile(FakeEngine):
    """Breaks over a prompt in a way that nobody foresaw."""

    def submit(self, request: Generate | Embed | Rerank) -> None:
        if isinstance(request, Generate) and request.prompt == "break":
            raise KeyError("role")
        super().submit(request)


def test_a_request_that_breaks_the_engines_code_fails_alone(capsys: pytest.CaptureFixture[str]) -> None:
    shop = Shop(Fragile())
    shop.load()
    shop.desk.tell(Generate(request=1, prompt="break"), Generate(request=2, prompt="a"))
    heard = shop.desk.hear_until(is_done)
    failures = [news for news in heard if isinstance(news, Failed)]
    assert [(failure.request, failure.fault, failure.code) for failure in failures] == [(1, "worker", "request_broke")]
    assert "KeyError('role')" in failures[0].message
    shop.service.leave()
    assert shop.service.wait() is ExitCode.DONE
    assert "KeyError" in capsys.readouterr().err


def test_a_step_with_more_news_than_a_message_holds_tells_them_in_several() -> None:
    shop = Shop()
    shop.desk.tell(Load(model="m", engine="fake", options=EngineOptions(n_parallel=2)))
    prompts = {number: f"{letter * (MAX_MESSAGE_BYTES // 2)} end" for number, letter in ((1, "a"), (2, "b"))}
    shop.desk.tell(*(Generate(request=number, prompt=prompt) for number, prompt in prompts.items()))
    heard = [*shop.desk.hear_until(is_done), *shop.desk.hear_until(is_done)]
    deltas = [delta for news in heard if isinstance(news, Tokens) for delta in news.deltas]
    for number, prompt in prompts.items():
        assert "".join(delta.text for delta in deltas if delta.request == number) == prompt
    shop.service.leave()
    assert shop.service.wait() is ExitCode.DONE


def test_a_request_with_more_news_than_a_message_holds_fails_alone(shop: Shop) -> None:
    shop.load()
    prompts = (f"before {'a' * MAX_MESSAGE_BYTES} never", "another one")
    shop.desk.tell(*(Generate(request=number, prompt=prompt) for number, prompt in enumerate(prompts)))
    heard = shop.desk.hear_until(lambda news: is_done(news) and getattr(news, "request", None) == 1)
    (failure,) = (news for news in heard if isinstance(news, Failed))
    assert (failure.request, failure.fault, failure.code) == (0, "caller", "too_large")
    texts = [delta.text for news in heard if isinstance(news, Tokens) for delta in news.deltas]
    assert texts == ["before", "another", " one"]


def test_a_request_that_cannot_be_decoded_is_refused_and_not_lost(shop: Shop) -> None:
    shop.load()
    shop.desk.tell(as_received(Generate(request=7, prompt="a", lora=((0, float("nan")),))))
    failure = shop.desk.hear_until(lambda news: isinstance(news, Failed))[-1]
    assert isinstance(failure, Failed)
    assert (failure.request, failure.fault, failure.code) == (7, "caller", "invalid_request")
    assert "lora" in failure.message


def test_a_load_that_cannot_be_decoded_ends_the_worker_with_the_reason() -> None:
    shop = Shop()
    shop.desk.tell(as_received(Load(model="m", options=EngineOptions(rope_freq_base=float("nan")))))
    failure = shop.desk.hear()
    assert isinstance(failure, Failed)
    assert (failure.fault, failure.code) == ("model", "invalid_option")
    assert "rope_freq_base" in failure.message
    assert shop.service.wait() is ExitCode.LOAD_FAILED


def as_received(message: Generate | Load) -> PoolMessage:
    """What the worker's side of a channel makes of a message."""
    received = decode(*encode(message))
    assert isinstance(received, Unknown)
    return received


# --- a model that is loaded ahead ---


def is_state(name: str) -> Callable[[ChildMessage], bool]:
    return lambda news: isinstance(news, State) and news.state == name


def loads_heard(news: Sequence[ChildMessage]) -> int:
    return sum(isinstance(one, State) and one.state == "loading" for one in news)


def test_what_was_loaded_ahead_is_ready_at_once(shop: Shop) -> None:
    command = Load(model="m", engine="fake")
    shop.desk.tell(Prefetch(load=command))
    assert shop.desk.hear_until(is_state("prefetched")) == [State(state="prefetched", payload={"model": "m"})]
    shop.desk.tell(Load(model="alias", engine="fake", aliases=("m",), cache_bytes=7))
    news = shop.desk.hear_until(is_state("ready"))
    assert not loads_heard(news), "nothing is loaded twice"
    assert isinstance(news[-1], State) and news[-1].payload is not None and news[-1].payload["id"] == "alias"
    shop.desk.tell(Generate(request=1, prompt="hello"))
    assert shop.desk.hear_until(is_done)


def test_another_model_is_loaded_in_the_place_of_what_was_loaded_ahead(shop: Shop) -> None:
    shop.desk.tell(Prefetch(load=Load(model="m", engine="fake", script={"pieces": ["m"]})))
    shop.desk.hear_until(is_state("prefetched"))
    shop.load(pieces=["other"])
    shop.desk.tell(Generate(request=1, prompt="hello"))
    texts = [delta.text for news in shop.desk.hear_until(is_done) if isinstance(news, Tokens) for delta in news.deltas]
    assert texts == ["other"]


def test_a_load_ahead_that_fails_leaves_a_worker_that_loads(shop: Shop) -> None:
    shop.desk.tell(Prefetch(load=Load(model="m", engine="fake", script={"load": "fail"})))
    (news,) = shop.desk.hear_until(is_state("prefetched"))
    assert isinstance(news, State) and news.payload is not None and "cannot be loaded" in news.payload["error"]
    shop.load()


def test_a_worker_that_has_a_model_loads_nothing_ahead(shop: Shop) -> None:
    shop.load()
    shop.desk.tell(Prefetch(load=Load(model="other", engine="fake")), Generate(request=1, prompt="hello"))
    assert not any(map(is_state("prefetched"), shop.desk.hear_until(is_done)))


def test_what_was_loaded_ahead_is_loaded_again_if_its_file_has_changed(shop: Shop, tmp_path: Path) -> None:
    file = tmp_path / "m-00002-of-00002.gguf"
    file.touch()
    command = Load(model="m", engine="fake", path=str(tmp_path / "m-00001-of-00002.gguf"))
    shop.desk.tell(Prefetch(load=command))
    shop.desk.hear_until(is_state("prefetched"))
    file.write_bytes(b"another")
    shop.desk.tell(command)
    assert loads_heard(shop.desk.hear_until(is_state("ready")))


# --- from one model to the next ---


def is_unloaded(news: ChildMessage) -> bool:
    return news == State(state="unloaded")


def answer(shop: Shop) -> str:
    shop.desk.tell(Generate(request=9, prompt="hello"))
    heard = shop.desk.hear_until(is_done)
    return "".join(delta.text for news in heard if isinstance(news, Tokens) for delta in news.deltas)


def test_a_worker_that_has_freed_its_model_loads_another(shop: Shop) -> None:
    shop.load(pieces=["m"])
    other = Load(model="other", engine="fake", script={"pieces": ["o"]})
    shop.desk.tell(Unload(), other)
    heard = shop.desk.hear_until(is_state("ready"))
    assert is_unloaded(heard[0])
    ready = heard[-1]
    assert isinstance(ready, State)
    assert ready.payload is not None
    assert ready.payload["id"] == "other"
    assert answer(shop) == "o"


def test_what_runs_ends_before_its_model_is_freed(shop: Shop) -> None:
    shop.load(pieces=["x"], repeat=3)
    shop.desk.tell(Generate(request=1, prompt="go"), Unload())
    *heard, last = shop.desk.hear_until(is_unloaded)
    assert any(map(is_done, heard))
    assert is_unloaded(last)


def test_a_worker_that_sleeps_or_has_nothing_says_that_it_is_free_too(shop: Shop) -> None:
    shop.desk.tell(Unload())
    assert is_unloaded(shop.desk.hear())
    shop.load()
    shop.desk.tell(Sleep(), Unload(), Wake(), Generate(request=1, prompt="go"))
    assert shop.desk.hear() == State(state="sleeping")
    assert is_unloaded(shop.desk.hear())
    refusal = shop.desk.hear()
    assert isinstance(refusal, Failed)
    assert refusal.code == "not_loaded"


def test_a_worker_that_has_freed_its_model_may_load_one_ahead(shop: Shop) -> None:
    shop.load(pieces=["m"])
    other = Load(model="other", engine="fake", script={"pieces": ["o"]})
    shop.desk.tell(Unload(), Prefetch(load=other), other)
    heard = shop.desk.hear_until(is_state("ready"))
    assert State(state="prefetched", payload={"model": "other"}) in heard
    assert answer(shop) == "o"


def test_what_was_loaded_once_does_not_keep_another_model_from_being_loaded_ahead(shop: Shop) -> None:
    shop.load()
    shop.desk.tell(Unload(), Prefetch(load=Load(model="other", engine="fake", script={"pieces": ["o"]})))
    shop.desk.hear_until(is_unloaded)
    assert shop.desk.hear() == State(state="prefetched", payload={"model": "other"})


def test_a_worker_that_has_freed_its_model_tells_no_figures_of_it(shop: Shop) -> None:
    shop.load(pieces=["x"], repeat=3)
    shop.desk.tell(Generate(request=1, prompt="go"))
    shop.desk.hear_until(is_done)  # what it does has changed since it told it, and is to be told in a second
    shop.desk.tell(Unload(), Load(model="other", engine="fake"))
    shop.desk.hear_until(is_unloaded)
    assert is_state("loading")(shop.desk.hear())


def test_an_exit_command_ends_a_worker_that_finishes_what_it_runs_before_it_frees_its_model() -> None:
    shop = Shop()
    shop.load(pieces=["x"], repeat=10**6, step_seconds=0.001)
    shop.desk.tell(Generate(request=1, prompt="go"), Unload())
    shop.desk.hear_until(lambda news: isinstance(news, Tokens))
    shop.desk.tell(Exit())
    assert shop.service.wait() is ExitCode.DONE


def test_a_worker_is_named_after_what_it_has_now() -> None:
    names: list[str] = []
    desk = Desk()
    service = Service(desk, lambda _engine: FakeEngine(), rename=names.append)
    service.start()
    for name in "abc":
        desk.tell(Load(model=name, engine="fake"), Unload())
        desk.hear_until(is_unloaded)
    service.leave()
    service.wait()
    assert names == ["spare", "b", "spare", "c", "spare"]
