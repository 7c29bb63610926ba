"""LoRA adapters: what they change, what they do not, and whose turn it is."""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_driver import GREEDY, Collected, collect, drain, load_command, loaded
from llamaherd.pool.child import adapters as adapters_module
from llamaherd.pool.child.adapters import AdapterSet, Turns
from llamaherd.pool.child.engine import EngineError, RequestError
from llamaherd.pool.child.llama_engine import LlamaEngine
from llamaherd.transport.messages import Adapter, Generate, Tokens
from tiny_gguf import tiny_model, write_lora

#: Token ids of plain letters in the tiny vocabulary.
LETTERS = range(263, 320)
PROMPT = tuple(LETTERS[(index * index * 7 + index) % len(LETTERS)] for index in range(60))
BASE: AdapterSet = ((0, 0.0),)
FIRST: AdapterSet = ((0, 1.0),)
SECOND: AdapterSet = ((1, 1.0),)
BOTH: AdapterSet = ((0, 0.5), (1, 1.5))


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> tuple[Adapter, ...]:
    """Two adapters that are off unless a request asks for them."""
    other = tmp_path_factory.mktemp("lora") / "other.gguf"
    write_lora(other, seed=11)
    return tuple(Adapter(path=str(path), scale=0.0) for path in (tiny_model("lora"), other))


@contextmanager
def engine_with(adapters: Sequence[Adapter], **options: Any) -> Generator[LlamaEngine]:
    with loaded("random", adapters=tuple(adapters), **options) as engine:
        yield engine


def request(number: int, lora: AdapterSet, *, length: int = 12, **fields: Any) -> Generate:
    prompt = fields.pop("prompt", PROMPT)
    return Generate(
        request=number, prompt=prompt, lora=lora, max_tokens=length, ignore_eos=True, sampling=GREEDY, **fields
    )


def run(engine: LlamaEngine, lora: AdapterSet, **fields: Any) -> Collected:
    engine.submit(request(1, lora, **fields))
    return drain(engine)[1]


def alone(engine: LlamaEngine, lora: AdapterSet, **fields: Any) -> list[int]:
    return run(engine, lora, cache_prompt=False, **fields).tokens


def cached(got: Collected) -> int:
    assert got.done is not None
    return got.done.usage.cached_tokens


# --- what they change ---


def test_an_adapter_changes_the_output_and_scale_zero_restores_it_exactly(adapters: tuple[Adapter, ...]) -> None:
    with loaded("random") as engine:
        plain = alone(engine, ())
    with engine_with(adapters) as engine:
        before, changed, after = (alone(engine, lora) for lora in (BASE, FIRST, BASE))
    assert before == after == plain
    assert changed != plain


def test_every_scale_and_every_adapter_is_a_set_of_its_own(adapters: tuple[Adapter, ...]) -> None:
    with engine_with(adapters) as engine:
        outputs = [alone(engine, lora) for lora in (BASE, FIRST, ((0, 0.5),), SECOND, BOTH)]
    assert len({tuple(output) for output in outputs}) == len(outputs)


def test_what_a_request_does_not_name_is_off_for_it(adapters: tuple[Adapter, ...]) -> None:
    on = tuple(Adapter(path=adapter.path) for adapter in adapters)
    with engine_with(adapters) as engine:
        second, both = alone(engine, SECOND), alone(engine, ((0, 1.0), (1, 1.0)))
    with engine_with(on) as engine:
        assert alone(engine, SECOND) == second
        assert alone(engine, ()) == both, "no wish at all takes the scales of the load"


def test_default_scales_hold_from_the_next_request_on(adapters: tuple[Adapter, ...]) -> None:
    with engine_with(adapters) as engine:
        base, first = alone(engine, BASE), alone(engine, FIRST)
        engine.submit(request(1, ()))
        engine.step()
        engine.set_scales((1.0, 0.0))
        assert drain(engine)[1].tokens[-8:] == base[-8:]
        assert alone(engine, ()) == first
        with pytest.raises(EngineError, match="1 scales are given for 2"):
            engine.set_scales((1.0,))
        with pytest.raises(EngineError, match="must be a number"):
            engine.set_scales((float("nan"), 0.0))
        assert alone(engine, ()) == first


# --- side by side ---


@pytest.fixture
def short_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Change sets at every step: the tiny model would be done within one turn."""
    monkeypatch.setattr(adapters_module, "TURN_SECONDS", 0.0)


@pytest.mark.usefixtures("short_turns")
def test_sets_side_by_side_get_exactly_what_each_gets_alone(adapters: tuple[Adapter, ...]) -> None:
    sets = (BASE, FIRST, SECOND, BOTH, FIRST, BASE)
    with engine_with(adapters, n_parallel=6) as engine:
        expected = [alone(engine, lora, length=40) for lora in sets]
        for number, lora in enumerate(sets):
            engine.submit(request(number, lora, length=40))
        got = drain(engine)
    assert [got[number].tokens for number in range(len(sets))] == expected


@pytest.mark.usefixtures("short_turns")
def test_a_step_moves_sequences_of_one_set_only(adapters: tuple[Adapter, ...]) -> None:
    with engine_with(adapters) as engine:
        for number, lora in enumerate((FIRST, BASE, FIRST, BASE)):
            engine.submit(request(number, lora, length=30, cache_prompt=False))
        moved: set[frozenset[int]] = set()
        while engine.busy:
            for message in engine.step():
                if isinstance(message, Tokens):
                    moved.add(frozenset(delta.request for delta in message.deltas))
    assert all(group <= {0, 2} or group <= {1, 3} for group in moved)
    assert {frozenset({0, 2}), frozenset({1, 3})} <= moved, "those of one set move together"


def test_no_set_waits_for_the_end_of_another(adapters: tuple[Adapter, ...]) -> None:
    with engine_with(adapters, n_ctx=16_384) as engine:  # far more than any machine computes in a turn
        engine.submit(request(0, FIRST, length=-1))
        collected: dict[int, Collected] = {}
        collect(engine.step(), collected)
        engine.submit(request(1, BASE, length=4))
        while 1 not in collected or collected[1].done is None:
            assert engine.busy
            collect(engine.step(), collected)
        assert collected[0].done is None, "the endless one still runs"
        engine.cancel(0)
        drain(engine, collected)


# --- the prefix cache ---


def test_no_set_takes_over_what_another_has_computed(adapters: tuple[Adapter, ...]) -> None:
    with engine_with(adapters) as engine:
        expected = [alone(engine, lora) for lora in (BASE, FIRST)]
        first, other, again = (run(engine, lora) for lora in (BASE, FIRST, FIRST))
        back = run(engine, BASE)
        assert engine.figures.kept == 2, "each set keeps its own"
    assert [first.tokens, other.tokens, again.tokens, back.tokens] == [expected[i] for i in (0, 1, 1, 0)]
    assert [cached(one) for one in (first, other, again, back)] == [0, 0, 59, 59]


@pytest.mark.usefixtures("short_turns")
def test_no_set_follows_another_that_computes_the_same_prompt(adapters: tuple[Adapter, ...]) -> None:
    with engine_with(adapters, n_batch=16, n_ubatch=16) as engine:
        expected = [alone(engine, lora) for lora in (BASE, FIRST)]
        sets = (BASE, FIRST, BASE, FIRST)
        for number, lora in enumerate(sets):
            engine.submit(request(number, lora))
        got = drain(engine)
    assert [got[number].tokens for number in range(4)] == [*expected, *expected]
    assert [cached(got[number]) for number in range(4)] == [0, 0, 59, 59]


def test_scales_that_are_equal_to_llama_cpp_share(adapters: tuple[Adapter, ...]) -> None:
    with engine_with(adapters) as engine:
        run(engine, ((0, 0.1),))
        assert cached(run(engine, ((1, 0.0), (0, 0.1 + 1e-12)))) == 59


@pytest.mark.usefixtures("short_turns")
def test_sets_that_do_not_fit_together_preempt_each_other_and_lose_nothing(adapters: tuple[Adapter, ...]) -> None:
    sets = (BASE, FIRST, SECOND)
    with engine_with(adapters, n_ctx=256, n_parallel=3) as engine:
        expected = [alone(engine, lora, length=120) for lora in sets]
        for number, lora in enumerate(sets):
            engine.submit(request(number, lora, length=120))
        got = drain(engine)
    assert [got[number].tokens for number in range(3)] == expected
    assert all(got[number].reason == "length" for number in range(3))


# --- what is refused ---


@pytest.mark.parametrize(
    ("lora", "reason"),
    [
        (((2, 1.0),), "there is no adapter 2, the model has 2"),
        (((-1, 1.0),), "there is no adapter -1"),
        (((0, 1e30),), "must be a number from -1000 to 1000"),
        (((0, float("nan")),), "must be a number"),
    ],
)
def test_a_wish_that_cannot_be_had_is_its_callers_error(
    adapters: tuple[Adapter, ...], lora: AdapterSet, reason: str
) -> None:
    with engine_with(adapters) as engine:
        with pytest.raises(RequestError, match=reason) as caught:
            engine.submit(request(1, lora))
        assert caught.value.code == "invalid_lora"
        assert not engine.busy
        assert alone(engine, FIRST)


def test_a_model_without_adapters_says_so() -> None:
    with loaded("random") as engine, pytest.raises(RequestError, match="the model has 0"):
        engine.submit(request(1, FIRST))


def _broken(folder: Path, kind: str) -> Path:
    path = folder / f"{kind}.gguf"
    match kind:
        case "garbage":
            path.write_bytes(b"not a model at all")
        case "cut":
            path.write_bytes(tiny_model("lora").read_bytes()[:-4000])
        case "model":
            return tiny_model("random")
        case "projector":
            return tiny_model("mmproj")
        case "shape":
            write_lora(path, width=32)
        case "layers":
            write_lora(path, layers=3)
        case "architecture":
            write_lora(path, architecture="gemma2")
        case "activated":
            write_lora(path, invocation=(5, 6))
        case "half":
            write_lora(path, half=True)
        case _:
            assert kind == "missing"
    return path


@pytest.mark.parametrize(
    ("kind", "code", "reason"),
    [
        ("missing", "model_not_found", "does not exist"),
        ("garbage", "model_invalid", "is no GGUF file"),
        ("cut", "adapter_invalid", "not within the file bounds"),
        ("model", "adapter_invalid", "expect general.type to be 'adapter'"),
        ("projector", "adapter_invalid", "expect general.type to be 'adapter'"),
        ("shape", "adapter_invalid", "incorrect shape"),
        ("layers", "adapter_invalid", "does not exist in base model"),
        ("architecture", "adapter_invalid", "arch mismatch"),
        ("activated", "adapter_unsupported", "activated LoRA"),
        ("half", "adapter_invalid", "missing one component"),
    ],
)
def test_a_file_that_is_no_adapter_of_the_model_fails_the_load_with_the_reason(
    tmp_path: Path, kind: str, code: str, reason: str
) -> None:
    bad = Adapter(path=str(_broken(tmp_path, kind)))
    engine = LlamaEngine()
    for wanted in ((bad,), (Adapter(path=str(tiny_model("lora"))), bad)):
        with pytest.raises(EngineError, match=reason) as caught:
            engine.load(load_command("random", adapters=wanted), lambda _fraction: True)
        assert caught.value.code == code
        assert bad.path in str(caught.value)
    # The engine holds nothing and may be asked again.
    engine.load(load_command("random"), lambda _fraction: True)
    engine.unload()


def test_a_scale_that_is_no_number_fails_the_load() -> None:
    wanted = (Adapter(path=str(tiny_model("lora")), scale=float("inf")),)
    with pytest.raises(EngineError, match="must be a number"):
        LlamaEngine().load(load_command("random", adapters=wanted), lambda _fraction: True)


def test_loading_again_and_again_leaves_nothing_behind(adapters: tuple[Adapter, ...]) -> None:
    outputs: list[list[int]] = []
    for _ in range(3):
        with engine_with(adapters) as engine:
            outputs.append(alone(engine, BOTH))
    assert outputs[0] == outputs[1] == outputs[2]


# --- turns ---

SETS = st.sampled_from([(), FIRST, SECOND, BOTH])


@given(st.lists(st.tuples(st.lists(SETS, min_size=1, unique=True), st.floats(0.001, 0.2)), max_size=60))
def test_a_turn_goes_to_somebody_who_is_there(steps: list[tuple[list[AdapterSet], float]]) -> None:
    turns = Turns()
    for present, seconds in steps:
        assert turns.choose(present) in present
        turns.note(seconds)


@given(st.lists(SETS, min_size=2, unique=True), st.floats(0.001, 0.2), st.integers(0, 20))
def test_nobody_who_stays_is_passed_over_twice(present: list[AdapterSet], seconds: float, lead: int) -> None:
    turns = Turns(0.05)
    for _ in range(lead):
        turns.choose(present[:1])
        turns.note(seconds)
    order: list[AdapterSet] = []
    for _ in range(400):
        chosen = turns.choose(present)
        if not order or order[-1] != chosen:
            order.append(chosen)
        turns.note(seconds)
    assert len(order) > len(present)
    for start in range(len(order) - len(present) + 1):
        assert set(order[start : start + len(present)]) == set(present)


def test_a_turn_is_a_time_and_ends_early_when_nothing_is_left() -> None:
    turns = Turns(0.05)
    assert turns.choose([FIRST, SECOND]) == FIRST
    turns.note(0.03)
    assert turns.choose([SECOND, FIRST]) == FIRST
    turns.note(0.03)
    assert turns.choose([FIRST, SECOND]) == SECOND
    turns.note(0.01)
    assert turns.choose([FIRST]) == FIRST


def test_one_set_alone_is_never_interrupted() -> None:
    turns = Turns(0.05)
    for _ in range(10):
        assert turns.choose([FIRST]) == FIRST
        turns.note(1.0)
