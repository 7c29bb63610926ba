"""Slots on the real engine: what runs where, and saving, restoring and erasing what they hold."""

import os
from pathlib import Path
from typing import Any, Literal

import pytest

from engine_driver import Collected, collect, drain, loaded
from llamaherd.pool.child.engine import RequestError
from llamaherd.pool.child.llama_engine import LlamaEngine
from llamaherd.pool.child.slot_desk import SlotDesk
from llamaherd.transport.messages import Adapter, ChildMessage, Done, Failed, Result, Sequence, SlotFile, Tokens
from prompts import alone, cached, request, run, tokens
from tiny_gguf import tiny_model


def act(
    engine: LlamaEngine, action: Literal["save", "restore", "erase"], slot: int, name: str = ""
) -> SlotFile | Failed:
    engine.sequence(Sequence(request=99, action=action, slot=slot, name=name))
    answers = [message for message in steps(engine) if isinstance(message, Result | Failed)]
    (answer,) = answers
    if isinstance(answer, Failed):
        assert answer.fault == "caller"
        return answer
    assert answer.file is not None
    return answer.file


def done(engine: LlamaEngine, action: Literal["save", "restore", "erase"], slot: int, name: str = "") -> SlotFile:
    answer = act(engine, action, slot, name)
    assert isinstance(answer, SlotFile), answer
    return answer


def failure(engine: LlamaEngine, action: Literal["save", "restore", "erase"], slot: int, name: str = "") -> Failed:
    answer = act(engine, action, slot, name)
    assert isinstance(answer, Failed), answer
    return answer


def steps(engine: LlamaEngine) -> list[ChildMessage]:
    messages: list[ChildMessage] = []
    while engine.busy:
        messages += engine.step()
    return messages


def slot_of(got: Collected) -> int:
    assert got.done is not None
    return got.done.slot


# --- the view ---


def test_an_unused_model_has_idle_slots() -> None:
    with loaded("random", n_parallel=3) as engine:
        slots = engine.slots()
    assert [slot.id for slot in slots] == [0, 1, 2]
    assert not any(slot.busy or slot.n_tokens or slot.request is not None for slot in slots)
    assert slots[0].n_ctx == 1024


def test_the_view_tells_what_runs_and_what_ran() -> None:
    with loaded("random", n_parallel=2) as engine:
        engine.submit(request(7, tokens(50), max_tokens=20, n_keep=5))
        for _ in range(4):
            engine.step()
        busy, idle = engine.slots()
        drain(engine)
        after = engine.slots()[0]
    assert (busy.busy, busy.request, busy.n_prompt, busy.n_processed) == (True, 7, 50, 50)
    assert (busy.n_decoded, busy.n_remaining, busy.max_tokens, busy.n_keep, busy.n_tokens) == (4, 16, 20, 5, 53)
    assert (idle.busy, idle.request) == (False, None)
    assert (after.busy, after.request, after.n_decoded, after.n_tokens) == (False, 7, 20, 69)


def test_a_slot_whose_tokens_have_gone_holds_none() -> None:
    with loaded("random", n_parallel=1, n_cached=0, cache_ram=0) as engine:
        run(engine, tokens(50))
        run(engine, tokens(60, 2), cache_prompt=False)
        assert engine.slots()[0].n_tokens == 0


# --- a slot of one's own ---


def test_a_request_runs_where_it_wants_to() -> None:
    with loaded("random", n_parallel=3) as engine:
        assert [slot_of(run(engine, tokens(20, seed), slot=slot)) for seed, slot in ((1, 2), (2, 0), (3, 2))] == [
            2,
            0,
            2,
        ]


def test_a_request_without_a_wish_runs_where_its_beginning_was_left() -> None:
    with loaded("random", n_parallel=3) as engine:
        first = slot_of(run(engine, tokens(60)))
        other = slot_of(run(engine, tokens(60, 2)))
        assert other != first
        assert slot_of(run(engine, tokens(60) + tokens(5, 3))) == first


def test_one_that_waits_for_its_slot_is_passed_by_others_and_comes_first_when_it_is_idle() -> None:
    with loaded("random", n_parallel=2) as engine:
        engine.submit(request(1, tokens(20), max_tokens=10, slot=0))
        engine.submit(request(2, tokens(20, 2), max_tokens=5, slot=0))
        engine.submit(request(3, tokens(20, 3), max_tokens=30))
        engine.submit(request(4, tokens(20, 4), max_tokens=5))
        began: list[int] = []
        got: dict[int, Collected] = {}
        while engine.busy:
            messages = engine.step()
            collect(messages, got)
            for message in messages:
                if isinstance(message, Tokens):
                    began += [delta.request for delta in message.deltas if delta.request not in began]
    assert began == [1, 3, 2, 4]
    assert [slot_of(got[number]) for number in (1, 2, 3, 4)] == [0, 0, 1, 0]


def test_a_slot_that_does_not_exist_is_refused() -> None:
    with loaded("random", n_parallel=2) as engine, pytest.raises(RequestError, match="slot 2 does not exist") as caught:
        engine.submit(request(1, tokens(5), slot=2))
    assert caught.value.code == "invalid_slot"


# --- files ---


@pytest.mark.parametrize(
    ("model", "options"),
    [("random", {}), ("gemma2", {}), ("gemma2", {"swa_full": False}), ("mamba", {}), ("random", {"flash_attn": "on"})],
)
def test_a_saved_slot_is_restored_in_another_process_as_it_were(
    model: str, options: dict[str, Any], tmp_path: Path
) -> None:
    folder = str(tmp_path)
    with loaded(model, slot_save_path=folder, **options) as engine:
        first = run(engine, tokens(100))
        saved = done(engine, "save", slot_of(first), "one.bin")
    longer = tokens(100) + tuple(first.tokens) + tokens(20, 5)
    with loaded(model, slot_save_path=folder, **options) as engine:
        restored = done(engine, "restore", 2, "one.bin")
        assert engine.slots()[2].n_tokens == 107
        got = run(engine, longer)
        assert got.tokens == alone(engine, longer)
    assert (saved.n_tokens, restored.n_tokens, cached(got)) == (107, 107, 107)
    assert saved.n_bytes == restored.n_bytes == (tmp_path / "one.bin").stat().st_size


def test_an_erased_slot_is_empty_and_its_prompt_computed_again(tmp_path: Path) -> None:
    with loaded("random", slot_save_path=str(tmp_path)) as engine:
        slot = slot_of(run(engine, tokens(50)))
        assert done(engine, "erase", slot).n_tokens == 57
        assert done(engine, "erase", slot).n_tokens == 0
        assert engine.slots()[slot].n_tokens == 0
        assert cached(run(engine, tokens(50))) == 0
        assert failure(engine, "save", 3, "x").code == "slot_empty"


def test_a_mistake_over_a_command_costs_nobody_else_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def mistake(_desk: SlotDesk, _number: int) -> int:
        raise KeyError("a mistake")

    monkeypatch.setattr(SlotDesk, "_erase", mistake)
    with loaded("random", n_parallel=2, slot_save_path=str(tmp_path)) as engine:
        engine.submit(request(7, tokens(50), max_tokens=20))
        engine.step()
        engine.sequence(Sequence(request=99, action="erase", slot=1))
        news = steps(engine)
    (failure,) = [one for one in news if isinstance(one, Failed)]
    assert (failure.request, failure.fault, failure.code) == (99, "worker", "request_broke")
    assert [one.request for one in news if isinstance(one, Done)] == [7]
    assert "a mistake" in capsys.readouterr().err


def test_an_erased_slot_takes_nothing_from_one_that_went_on_with_it(tmp_path: Path) -> None:
    with loaded("random", n_parallel=2, slot_save_path=str(tmp_path)) as engine:
        run(engine, tokens(50), max_tokens=0, slot=0)
        run(engine, tokens(60), max_tokens=0, slot=1)
        assert done(engine, "erase", 0).n_tokens == 50
        assert [slot.n_tokens for slot in engine.slots()] == [0, 60]
        assert done(engine, "erase", 1).n_tokens == 60
        assert engine.figures.cells == 0


def test_a_slot_whose_request_was_cancelled_before_anything_was_computed_is_empty(tmp_path: Path) -> None:
    with loaded("random", n_parallel=2, cache_ram=0, n_batch=64, slot_save_path=str(tmp_path)) as engine:
        run(engine, tokens(50))  # what is kept begins with nothing, as everything does
        engine.submit(request(1, tokens(100, 2), slot=1))
        engine.submit(request(2, tokens(100, 3), slot=0))
        engine.step()
        engine.cancel(2)
        drain(engine)
        assert failure(engine, "save", 0, "x").code == "slot_empty"
        assert done(engine, "erase", 0).n_tokens == 0
        assert cached(run(engine, tokens(50) + tokens(9, 4))) >= 50


@pytest.mark.parametrize("n_cached", [0, 2, 4])
@pytest.mark.parametrize("unified", [True, False], ids=["unified", "divided"])
@pytest.mark.parametrize("longer_first", [True, False])
def test_a_slot_is_saved_without_what_another_one_went_on_with(
    unified: bool, n_cached: int, longer_first: bool, tmp_path: Path
) -> None:
    longer = tokens(50) + tokens(60, 2)
    options: dict[str, Any] = {"n_ctx": 2048, "n_parallel": 2, "n_cached": n_cached, "kv_unified": unified}
    with loaded("random", slot_save_path=str(tmp_path), **options) as engine:
        expected = alone(engine, longer)
        for slot in (1, 0) if longer_first else (0, 1):
            run(engine, longer if slot else tokens(50), max_tokens=0, slot=slot)
        assert [slot.n_tokens for slot in engine.slots()] == [50, 110]
        assert done(engine, "save", 0, "short").n_tokens == 50
        assert done(engine, "save", 1, "long").n_tokens == 110
        assert [slot.n_tokens for slot in engine.slots()] == [50, 110]
        done(engine, "erase", 0)
        done(engine, "erase", 1)
        assert done(engine, "restore", 0, "short").n_tokens == 50
        got = run(engine, longer)
    assert (cached(got), got.tokens) == (50, expected)


def test_a_slot_is_saved_where_only_one_sequence_has_a_place(tmp_path: Path) -> None:
    with loaded("random", slot_save_path=str(tmp_path), n_parallel=1, n_cached=0) as engine:
        run(engine, tokens(50), max_tokens=0)
        done(engine, "save", 0, "short")
        run(engine, tokens(50) + tokens(60, 2), max_tokens=0)
        done(engine, "restore", 0, "short")
        (tmp_path / "short").unlink()
        assert done(engine, "save", 0, "short").n_tokens == 50
        assert (engine.figures.kept, engine.figures.cells) == (1, 110)
        assert cached(run(engine, tokens(50) + tokens(60, 2))) == 109


def test_a_slot_of_which_ram_has_more_is_saved_when_there_is_room_for_the_way(tmp_path: Path) -> None:
    with loaded("random", slot_save_path=str(tmp_path), n_ctx=256, n_parallel=2, n_cached=0) as engine:
        run(engine, tokens(100), max_tokens=0, slot=0)
        run(engine, tokens(100) + tokens(20, 2), max_tokens=0, slot=1)
        engine.submit(request(1, tokens(200, 3), max_tokens=20, slot=1))
        for _ in range(3):
            engine.step()
        assert engine.figures.stored == 1
        engine.sequence(Sequence(request=9, action="save", slot=0, name="a"))
        engine.step()
        messages = steps(engine)
    assert [one.file and one.file.n_tokens for one in messages if isinstance(one, Result)] == [100]
    kinds = [type(one).__name__ for one in messages if isinstance(one, Result | Done)]
    assert kinds == ["Done", "Result"], "it waited for the other's end"


def test_a_slot_is_restored_when_it_is_idle_although_a_request_came_in_between(tmp_path: Path) -> None:
    with loaded("random", slot_save_path=str(tmp_path), n_parallel=2) as engine:
        run(engine, tokens(50), max_tokens=0, slot=0)
        done(engine, "save", 0, "a")
        done(engine, "erase", 0)
        engine.sequence(Sequence(request=9, action="restore", slot=0, name="a"))
        engine.step()  # the file is being read
        engine.submit(request(1, tokens(30, 2), max_tokens=20, slot=0))
        messages = steps(engine)
        assert engine.slots()[0].n_tokens == 50
    kinds = [type(one).__name__ for one in messages if isinstance(one, Result | Done)]
    assert kinds == ["Done", "Result"]


def test_a_file_of_a_cache_that_is_divided_otherwise_is_refused_with_the_reason(tmp_path: Path) -> None:
    folder = str(tmp_path)
    with loaded("random", slot_save_path=folder, n_parallel=2, kv_unified=False) as engine:
        run(engine, tokens(50), max_tokens=0, slot=0)
        done(engine, "save", 0, "a")
    others: list[dict[str, Any]] = [{}, {"n_parallel": 3, "kv_unified": False}]
    for options in others:
        with loaded("random", slot_save_path=folder, n_ctx=2048, **options) as engine:
            refused = failure(engine, "restore", 0, "a")
            assert refused.code == "slot_file_foreign"
            assert "kv_unified=False n_parallel+n_cached=2 instead of" in refused.message


def test_what_left_the_cache_is_saved_and_erased_in_ram(tmp_path: Path) -> None:
    with loaded("random", n_parallel=2, n_ctx=256, slot_save_path=str(tmp_path)) as engine:
        slot = slot_of(run(engine, tokens(100)))
        run(engine, tokens(240, 2), cache_prompt=False, slot=1 - slot)
        assert (engine.figures.kept, engine.figures.stored) == (0, 1)
        assert engine.slots()[slot].n_tokens == 107
        assert done(engine, "save", slot, "a").n_tokens == 107
        assert done(engine, "erase", slot).n_tokens == 107
        assert engine.figures.stored == 0
        assert done(engine, "restore", slot, "a").n_tokens == 107
        assert cached(run(engine, tokens(100))) == 99


def test_a_command_waits_for_its_slot_and_hinders_nobody(tmp_path: Path) -> None:
    with loaded("random", n_parallel=2, slot_save_path=str(tmp_path)) as engine:
        expected = alone(engine, tokens(30, 2), max_tokens=40)
        engine.submit(request(1, tokens(50), max_tokens=10, slot=0))
        engine.submit(request(2, tokens(30, 2), max_tokens=40, slot=1))
        engine.step()
        engine.sequence(Sequence(request=8, action="save", slot=0, name="a"))
        engine.sequence(Sequence(request=9, action="erase", slot=0))
        messages = steps(engine)
        results = [message for message in messages if isinstance(message, Result)]
        answer = [
            token
            for message in messages
            if isinstance(message, Tokens)
            for delta in message.deltas
            if delta.request == 2
            for token in delta.tokens
        ]
        assert [(one.request, one.file and one.file.n_tokens) for one in results] == [(8, 59), (9, 59)]
        assert answer == expected[1:]


def test_a_restored_slot_that_has_no_room_beside_the_others_waits_in_ram(tmp_path: Path) -> None:
    with loaded("random", n_ctx=256, n_parallel=2, slot_save_path=str(tmp_path)) as engine:
        done(engine, "save", slot_of(run(engine, tokens(150))), "a")
        done(engine, "erase", 0)
        engine.submit(request(1, tokens(150, 2), max_tokens=90, slot=0))
        for _ in range(3):
            engine.step()
        engine.sequence(Sequence(request=9, action="restore", slot=1, name="a"))
        while not any(isinstance(message, Result) for message in engine.step()):
            pass
        assert engine.figures.stored == 1
        drain(engine)
        assert cached(run(engine, tokens(150))) == 149


def test_a_slot_that_finds_no_room_now_may_be_restored_later(tmp_path: Path) -> None:
    with loaded("random", n_ctx=256, n_parallel=2, cache_ram=0, slot_save_path=str(tmp_path)) as engine:
        done(engine, "save", slot_of(run(engine, tokens(150))), "a")
        done(engine, "erase", 0)
        engine.submit(request(1, tokens(150, 2), max_tokens=90, slot=0))
        for _ in range(3):
            engine.step()
        engine.sequence(Sequence(request=9, action="restore", slot=1, name="a"))
        (refused,) = (message for message in steps(engine) if isinstance(message, Failed))
        assert (refused.code, refused.fault, refused.retry) == ("slot_not_restored", "worker", True)
        assert "no room for its 157 tokens beside the requests that run" in refused.message
        assert done(engine, "restore", 1, "a").n_tokens == 157


def test_a_cancelled_command_that_waits_ends(tmp_path: Path) -> None:
    with loaded("random", n_parallel=1, slot_save_path=str(tmp_path)) as engine:
        engine.submit(request(1, tokens(50), max_tokens=30))
        engine.step()
        engine.sequence(Sequence(request=9, action="save", slot=0, name="a"))
        engine.cancel(9)
        answers = [message for message in engine.step() if isinstance(message, Failed)]
        assert [(one.request, one.code) for one in answers] == [(9, "cancelled")]
        drain(engine)
        assert os.listdir(tmp_path) == []


def test_a_file_of_another_model_or_of_other_settings_is_refused_and_the_slot_empty(tmp_path: Path) -> None:
    folder = str(tmp_path)
    with loaded("random", slot_save_path=folder) as engine:
        done(engine, "save", slot_of(run(engine, tokens(50))), "a")
    for model, options in (("scripted", {}), ("random", {"cache_type_k": "f32"}), ("random", {"rope_freq_base": 5e4})):
        with loaded(model, slot_save_path=folder, **options) as engine:
            assert failure(engine, "restore", 0, "a").code == "slot_file_foreign"
            assert engine.slots()[0].n_tokens == 0
            assert engine.figures.cells == 0
    with loaded("random", slot_save_path=folder, n_ctx=256, flash_attn="on") as engine:
        refused = failure(engine, "restore", 0, "a")
        assert refused.code == "slot_not_restored", "values lie otherwise without flash attention: llama.cpp says no"
        assert "V transposition" in refused.message and "set flash_attn as it was" in refused.message
        assert engine.figures.cells == 0
        assert len(run(engine, tokens(50)).tokens) == 8


def test_a_damaged_file_leaves_the_slot_empty(tmp_path: Path) -> None:
    with loaded("random", slot_save_path=str(tmp_path)) as engine:
        slot = slot_of(run(engine, tokens(50)))
        done(engine, "save", slot, "a")
        (tmp_path / "a").write_bytes((tmp_path / "a").read_bytes()[:-40])
        assert failure(engine, "restore", slot, "a").code == "slot_file_invalid"
        assert engine.slots()[slot].n_tokens == 0
        assert failure(engine, "restore", slot, "missing").code == "slot_file_not_found"


def test_adapters_belong_to_what_was_saved(tmp_path: Path) -> None:
    adapters = (Adapter(path=str(tiny_model("lora"))),)
    with loaded("random", slot_save_path=str(tmp_path), adapters=adapters) as engine:
        done(engine, "save", slot_of(run(engine, tokens(50), lora=((0, 0.5),))), "half")
        done(engine, "erase", 0)
        done(engine, "restore", 0, "half")
        assert cached(run(engine, tokens(50), lora=((0, 0.5),))) == 49
        assert cached(run(engine, tokens(50), lora=((0, 1.0),))) == 0
    with loaded("random", slot_save_path=str(tmp_path)) as engine:
        assert failure(engine, "restore", 0, "half").code == "slot_file_foreign"


def test_impossible_commands_are_refused_at_once(tmp_path: Path) -> None:
    with loaded("random", n_parallel=2, slot_save_path=str(tmp_path)) as engine:
        for command, code in (
            (Sequence(request=1, action="save", slot=2, name="a"), "invalid_slot"),
            (Sequence(request=1, action="save", slot=-1, name="a"), "invalid_slot"),
            (Sequence(request=1, action="save", slot=0, name="../a"), "invalid_filename"),
            (Sequence(request=1, action="restore", slot=0), "invalid_filename"),
        ):
            with pytest.raises(RequestError) as caught:
                engine.sequence(command)
            assert caught.value.code == code
        assert not engine.busy
    with loaded("random") as engine, pytest.raises(RequestError, match="set slot_save_path") as caught:
        engine.sequence(Sequence(request=1, action="erase", slot=0))
    assert caught.value.code == "not_supported"


# --- how far it is ---


def test_the_progress_of_a_prompt_is_told_once_a_step_to_those_who_ask() -> None:
    with loaded("random", n_batch=32, n_ubatch=32, n_parallel=2) as engine:
        run(engine, tokens(20), max_tokens=0)
        engine.submit(request(1, tokens(20) + tokens(80, 2), max_tokens=3, progress=True))
        engine.submit(request(2, tokens(90, 3), max_tokens=3))
        told = [
            (one.request, one.total, one.cache, one.processed)
            for message in steps(engine)
            if isinstance(message, Tokens)
            for one in message.progress
        ]
    assert [one[:3] for one in told] == [(1, 100, 20)] * len(told)
    processed = [one[3] for one in told]
    assert processed == sorted(set(processed)) and processed[-1] == 100 and len(processed) >= 3


def test_the_figures_of_the_engine_count_what_it_does() -> None:
    with loaded("random", n_parallel=2) as engine:
        before = engine.load_figures
        run(engine, tokens(50), max_tokens=10)
        after = engine.load_figures
    assert (before.decodes, before.cells, before.cells_used) == (1, 1024, 0), "the warm-up is one"
    assert after.decodes - before.decodes == 10
    assert after.decoded - before.decoded == 59
    assert (after.slots_decoded, after.longest, after.cells_used, after.cached, after.slots_busy) == (10, 59, 59, 1, 0)
    assert LlamaEngine().load_figures.cells == 0
