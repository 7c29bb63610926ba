"""Prefix sharing on the real engine: the same output, computed once, and the counts tell the truth."""

from typing import Any

import pytest

from engine_driver import GREEDY, Collected, collect, drain, loaded
from llamaherd.pool.child.engine import RequestError
from llamaherd.pool.child.llama_engine import LlamaEngine
from llamaherd.transport.messages import Generate, Tokens

#: Token ids of plain letters in the tiny vocabularies.
LETTERS = range(263, 320)

#: Both layouts of the cache must give the same answers and the same counts. Where each sequence has a part of its own,
#: the context is divided among them.
LAYOUTS = pytest.mark.parametrize("unified", [True, False], ids=["unified", "divided"])


def tokens(length: int, seed: int = 1) -> tuple[int, ...]:
    """Return a prompt without repetition that would be the same by chance."""
    return tuple(LETTERS[(index * index * 7 + index * seed + seed) % len(LETTERS)] for index in range(length))


def request(number: int, prompt: tuple[int, ...], *, max_tokens: int = 8, **fields: Any) -> Generate:
    fields.setdefault("sampling", GREEDY)
    return Generate(request=number, prompt=prompt, max_tokens=max_tokens, ignore_eos=True, **fields)


def run(engine: LlamaEngine, prompt: tuple[int, ...], **fields: Any) -> Collected:
    engine.submit(request(1, prompt, **fields))
    return drain(engine)[1]


def alone(engine: LlamaEngine, prompt: tuple[int, ...], **fields: Any) -> list[int]:
    return run(engine, prompt, cache_prompt=False, **fields).tokens


def cached(got: Collected) -> int:
    assert got.done is not None
    return got.done.usage.cached_tokens


# --- one after the other ---


@LAYOUTS
@pytest.mark.parametrize("model", ["random", "gemma2"])
def test_a_prompt_that_was_computed_before_is_not_computed_again(unified: bool, model: str) -> None:
    prompt = tokens(100)
    with loaded(model, n_ctx=4096, kv_unified=unified) as engine:
        expected = alone(engine, prompt)
        first = run(engine, prompt)
        before = engine.figures.computed
        again = run(engine, prompt)
        assert engine.figures.computed - before == 8, "one prompt token for its logits, and seven of the answer"
    assert first.tokens == again.tokens == expected
    assert (cached(first), cached(again)) == (0, 99)


@LAYOUTS
@pytest.mark.parametrize("model", ["random", "gemma2"])
@pytest.mark.parametrize("common", [1, 37, 64, 99])
def test_any_common_beginning_is_taken_over(unified: bool, model: str, common: int) -> None:
    with loaded(model, n_ctx=4096, kv_unified=unified) as engine:
        run(engine, tokens(100))
        prompt = tokens(100)[:common] + tokens(40, seed=3)
        expected = alone(engine, prompt)
        got = run(engine, prompt)
    assert got.tokens == expected
    assert cached(got) == common


@LAYOUTS
@pytest.mark.parametrize("model", ["random", "gemma2", "mamba"])
def test_a_conversation_goes_on_where_it_ended(unified: bool, model: str) -> None:
    with loaded(model, n_ctx=4096, kv_unified=unified) as engine:
        first = run(engine, tokens(50))
        longer = tokens(50) + tuple(first.tokens) + tokens(20, seed=5)
        expected = alone(engine, longer)
        second = run(engine, longer)
    assert second.tokens == expected
    assert cached(second) == 50 + 8 - 1, "the last token of the answer was never computed"


@LAYOUTS
def test_a_recurrent_model_takes_over_whole_states_only(unified: bool) -> None:
    with loaded("mamba", n_ctx=4096, kv_unified=unified) as engine:
        run(engine, tokens(50))
        assert cached(run(engine, tokens(50))) == 0
        prompt = tokens(30) + tokens(20, seed=5)
        expected = alone(engine, prompt)
        got = run(engine, prompt)
    assert got.tokens == expected
    assert cached(got) == 0


@LAYOUTS
def test_without_the_full_window_only_safe_prefixes_are_taken(unified: bool) -> None:
    with loaded(
        "gemma2", swa_full=False, n_ctx=2048, n_ubatch=32, n_batch=32, n_parallel=1, kv_unified=unified
    ) as engine:
        first = run(engine, tokens(900))
        longer = tokens(900) + tuple(first.tokens) + tokens(20, seed=5)
        shorter = tokens(300) + tokens(20, seed=5)
        expected = [alone(engine, longer), alone(engine, shorter)]
        got = [run(engine, longer), run(engine, shorter)]
    assert [one.tokens for one in got] == expected
    assert [cached(one) for one in got] == [907, 0]


@LAYOUTS
def test_a_request_may_decline(unified: bool) -> None:
    with loaded("random", n_ctx=4096, kv_unified=unified) as engine:
        run(engine, tokens(60))
        assert cached(run(engine, tokens(60), cache_prompt=False)) == 0
        assert engine.figures.kept + engine.figures.stored == 1
        run(engine, tokens(60, seed=2), cache_prompt=False)
        assert engine.figures.kept + engine.figures.stored == 1
        assert cached(run(engine, tokens(60, seed=2))) == 0


@LAYOUTS
def test_a_cancelled_prompt_leaves_what_it_computed(unified: bool) -> None:
    prompt = tokens(100)
    with loaded("random", n_batch=16, n_ubatch=16, n_ctx=4096, kv_unified=unified) as engine:
        engine.submit(request(7, prompt))
        engine.step()
        engine.step()
        engine.cancel(7)
        drain(engine)
        got = run(engine, prompt)
        assert got.tokens == alone(engine, prompt)
    assert cached(got) == 32


def test_what_says_nothing_more_than_another_is_not_kept() -> None:
    with loaded("random") as engine:
        for length in (30, 90, 60, 90):
            run(engine, tokens(length), max_tokens=0)
            assert engine.figures.kept == 1
        assert engine.figures.cells == 90


def test_the_least_recently_used_makes_room_for_a_new_one() -> None:
    with loaded("random", n_parallel=1, n_cached=2, cache_ram=0) as engine:
        for seed in (1, 2, 3):
            run(engine, tokens(50, seed))
        run(engine, tokens(50, 1), max_tokens=0)
        run(engine, tokens(50, 4))
        assert [cached(run(engine, tokens(50, seed), max_tokens=0)) for seed in (4, 1, 2, 3)] == [49, 49, 0, 0]


@LAYOUTS
def test_without_spare_sequences_a_free_slot_keeps_its_last_one(unified: bool) -> None:
    with loaded("random", n_parallel=2, n_cached=0, n_ctx=4096, kv_unified=unified) as engine:
        run(engine, tokens(50))
        assert cached(run(engine, tokens(50))) == 49


def test_finished_sequences_make_room_for_a_large_prompt() -> None:
    with loaded("random", n_ctx=256) as engine:
        for seed in (1, 2, 3, 4):
            run(engine, tokens(60, seed), max_tokens=0)
        assert (engine.figures.kept, engine.figures.cells) == (4, 240)
        prompt = tokens(180, 5)
        assert run(engine, prompt).tokens == alone(engine, prompt)
        assert engine.figures.cells <= 256


# --- together ---


@LAYOUTS
def test_eight_simultaneous_requests_compute_their_common_prompt_once(unified: bool) -> None:
    prompts = [tokens(1000) + tokens(24, seed) for seed in range(2, 10)]
    with loaded("random", n_ctx=4096 if unified else 8 * 1280, n_parallel=8, kv_unified=unified) as engine:
        expected = [alone(engine, prompt, max_tokens=16) for prompt in prompts]
        before = engine.figures.computed
        for number, prompt in enumerate(prompts):
            engine.submit(request(number, prompt, max_tokens=16))
        got = drain(engine)
        computed = engine.figures.computed - before
    assert [got[number].tokens for number in range(8)] == expected
    assert computed == 1000 + 8 * 24 + 8 * 15
    assert [cached(got[number]) for number in range(8)] == [0] + [1000] * 7


@LAYOUTS
@pytest.mark.parametrize("model", ["random", "gemma2", "mamba"])
def test_simultaneous_requests_get_what_they_get_alone(unified: bool, model: str) -> None:
    prompts = [
        tokens(150) + tokens(10, 2),
        tokens(150) + tokens(10, 3),
        tokens(100) + tokens(30, 4),
        tokens(150) + tokens(10, 3),
        tokens(60, 5),
        tokens(150),
    ]
    with loaded(model, n_parallel=6, n_batch=64, n_ubatch=64, n_ctx=4096, kv_unified=unified) as engine:
        expected = [alone(engine, prompt) for prompt in prompts]
        for number, prompt in enumerate(prompts):
            engine.submit(request(number, prompt))
        got = drain(engine)
    assert [got[number].tokens for number in range(6)] == expected
    assert [cached(got[number]) for number in range(6)] == [0, 150, 100, 159, 0, 149]


@LAYOUTS
def test_without_the_full_window_followers_take_over_in_time(unified: bool) -> None:
    prompts = [tokens(300) + tokens(10, seed) for seed in (2, 3, 4)]
    with loaded(
        "gemma2", swa_full=False, n_parallel=3, n_batch=128, n_ubatch=128, n_ctx=4096, kv_unified=unified
    ) as engine:
        expected = [alone(engine, prompt) for prompt in prompts]
        for number, prompt in enumerate(prompts):
            engine.submit(request(number, prompt))
        got = drain(engine)
    assert [got[number].tokens for number in range(3)] == expected
    assert [cached(got[number]) for number in range(3)] == [0, 300, 300]


@LAYOUTS
def test_a_follower_of_a_cancelled_leader_goes_on_with_what_is_there(unified: bool) -> None:
    prompts = [tokens(100) + tokens(5, seed) for seed in (2, 3)]
    with loaded("random", n_parallel=2, n_batch=32, n_ubatch=32, n_ctx=4096, kv_unified=unified) as engine:
        expected = alone(engine, prompts[1])
        for number, prompt in enumerate(prompts):
            engine.submit(request(number, prompt))
        assert engine.step() == []
        engine.cancel(0)
        got = drain(engine)
    assert got[1].tokens == expected
    assert cached(got[1]) == 32


@LAYOUTS
def test_a_cancelled_follower_leaves_the_others_alone(unified: bool) -> None:
    prompts = [tokens(100) + tokens(5, seed) for seed in (2, 3, 4)]
    with loaded("random", n_parallel=3, n_batch=32, n_ubatch=32, n_ctx=4096, kv_unified=unified) as engine:
        expected = [alone(engine, prompt) for prompt in prompts]
        for number, prompt in enumerate(prompts):
            engine.submit(request(number, prompt))
        engine.step()
        engine.cancel(1)
        got = drain(engine)
    assert got[1].reason == "cancelled"
    assert [got[0].tokens, got[2].tokens] == [expected[0], expected[2]]


@LAYOUTS
def test_a_late_comer_shares_with_one_that_generates(unified: bool) -> None:
    with loaded("random", n_parallel=2, n_ctx=4096, kv_unified=unified) as engine:
        expected = alone(engine, tokens(90) + tokens(5, 2))
        got: dict[int, Collected] = {}
        engine.submit(request(1, tokens(90) + tokens(5, 3), max_tokens=30))
        for _ in range(4):
            collect(engine.step(), got)
        engine.submit(request(2, tokens(90) + tokens(5, 2)))
        drain(engine, got)
    assert got[2].tokens == expected
    assert cached(got[2]) == 90


@LAYOUTS
def test_a_request_that_declines_neither_follows_nor_leads(unified: bool) -> None:
    with loaded("random", n_parallel=3, n_ctx=4096, kv_unified=unified) as engine:
        engine.submit(request(1, tokens(100), cache_prompt=False))
        engine.submit(request(2, tokens(100)))
        engine.submit(request(3, tokens(100), cache_prompt=False))
        got = drain(engine)
        assert engine.figures.kept == 1
    assert [cached(got[number]) for number in (1, 2, 3)] == [0, 0, 0]
    assert got[1].tokens == got[2].tokens == got[3].tokens


def test_shared_cells_let_more_requests_in_than_their_lengths_would() -> None:
    prompts = [tokens(150) + tokens(5, seed) for seed in (2, 3, 4, 5)]
    with loaded("random", n_ctx=512, n_parallel=4) as engine:
        for number, prompt in enumerate(prompts):
            engine.submit(request(number, prompt, max_tokens=40))
        most_at_once = 0
        while engine.busy:
            for message in engine.step():
                if isinstance(message, Tokens):
                    most_at_once = max(most_at_once, len(message.deltas))
    assert most_at_once == 4


# --- when the room runs out ---


@pytest.mark.parametrize("cache_ram", [0, 64])
@pytest.mark.parametrize("model", ["random", "gemma2", "mamba"])
def test_preempted_and_resumed_requests_get_what_they_get_alone(model: str, cache_ram: int) -> None:
    prompts = [tokens(40) + tokens(5, seed) for seed in (2, 3, 4, 5)]
    with loaded(model, n_ctx=256, n_parallel=4, cache_ram=cache_ram) as engine:
        expected = [alone(engine, prompt, max_tokens=150) for prompt in prompts]
        before = engine.figures.computed
        for number, prompt in enumerate(prompts):
            engine.submit(request(number, prompt, max_tokens=150))
        got = drain(engine)
        computed = engine.figures.computed - before
    assert [got[number].tokens for number in range(4)] == expected
    once = 40 + 4 * (5 + 149)
    if model == "random":
        assert computed == once if cache_ram else computed > once, "what comes back from RAM is not computed twice"
    assert cached(got[0]) == 0
    assert {cached(got[number]) for number in range(1, 4)} <= {0, 40}


def test_where_a_sequence_is_a_state_alone_long_ones_run_together_and_others_stay() -> None:
    with loaded("mamba", n_ctx=256, n_parallel=2, cache_ram=0) as engine:
        run(engine, tokens(150, 3))
        for number in (1, 2):
            engine.submit(request(number, tokens(200, number), max_tokens=50))
        most = 0
        while engine.busy:
            engine.step()
            most = max(most, engine.figures.running)
            load = engine.load_figures
            assert load.cells_used <= load.cells
        assert (most, engine.figures.kept) == (2, 3)


def test_what_a_preempted_request_computes_twice_was_not_cached() -> None:
    with loaded("random", n_ctx=256, n_parallel=2) as engine:
        expected = alone(engine, tokens(40, 3), max_tokens=150)
        engine.submit(request(1, tokens(40, 2), max_tokens=150))
        engine.submit(request(2, tokens(40, 3), max_tokens=150))
        got = drain(engine)
    assert got[2].tokens == expected
    assert cached(got[2]) == 0


def test_a_mixed_crowd_in_a_small_cache_is_served_exactly() -> None:
    prompts = [tokens(20 + 13 * (number % 4), 1 + number % 3) + tokens(number % 5, 7) for number in range(24)]
    with loaded("random", n_ctx=256, n_parallel=4, n_cached=3, n_batch=32, n_ubatch=32) as engine:
        lengths = [10 + 9 * (number % 7) for number in range(24)]
        expected = [alone(engine, prompt, max_tokens=length) for prompt, length in zip(prompts, lengths, strict=True)]
        for number, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
            engine.submit(request(number, prompt, max_tokens=length))
        got = drain(engine)
        assert engine.figures.cells <= 256
    assert [got[number].tokens for number in range(24)] == expected


# --- each sequence its own part of the cache ---


def test_a_divided_cache_gives_each_slot_its_share() -> None:
    with loaded("random", n_ctx=1000, n_parallel=3, kv_unified=False) as engine:
        assert [slot.n_ctx for slot in engine.slots()] == [512] * 3
        prompt = tokens(600)
        with pytest.raises(RequestError, match="512"):
            engine.submit(request(1, prompt))
        got = run(engine, tokens(500), max_tokens=100)
    assert got.reason == "length"
    assert len(got.tokens) == 12


def test_slots_of_a_divided_cache_never_take_from_each_other() -> None:
    prompts = [tokens(100, seed) for seed in (2, 3, 4, 5)]
    with loaded("random", n_ctx=1024, n_parallel=4, kv_unified=False) as engine:
        expected = [alone(engine, prompt, max_tokens=150) for prompt in prompts]
        before = engine.figures.computed
        for number, prompt in enumerate(prompts):
            engine.submit(request(number, prompt, max_tokens=150))
        got = drain(engine)
        assert engine.figures.computed - before == 4 * (100 + 149), "nobody was preempted"
        assert engine.figures.kept == 4
    assert [got[number].tokens for number in range(4)] == expected


@pytest.mark.parametrize("model", ["random", "gemma2", "mamba"])
def test_a_conversation_in_a_divided_cache_goes_on_in_place(model: str) -> None:
    with loaded(model, n_ctx=1024, n_parallel=2, kv_unified=False, cache_ram=0) as engine:
        first = run(engine, tokens(50))
        other = run(engine, tokens(60, 9))
        longer = tokens(50) + tuple(first.tokens) + tokens(20, seed=5)
        second = run(engine, longer)
        assert engine.figures.kept == 2, "the other conversation was not evicted for it"
        assert cached(run(engine, tokens(60, 9) + tuple(other.tokens) + tokens(3, 2))) == 67
        assert second.tokens == alone(engine, longer)
    assert cached(second) == 57


@LAYOUTS
def test_whoever_waits_for_a_beginning_gets_it_before_a_newcomer_goes_on_with_it(unified: bool) -> None:
    prompts = [tokens(100) + tokens(5, seed) for seed in (2, 3, 4)]
    with loaded("random", n_parallel=2, n_cached=0, n_ctx=2048, kv_unified=unified) as engine:
        expected = [alone(engine, prompt) for prompt in prompts]
        for number, prompt in enumerate(prompts):
            engine.submit(request(number, prompt, max_tokens=8 if number else 1))
        got = drain(engine)
    assert [got[number].tokens for number in (1, 2)] == expected[1:]
    assert [cached(got[number]) for number in range(3)] == [0, 100, 100]


@LAYOUTS
def test_a_slot_keeps_what_it_has_when_another_one_goes_on_with_it(unified: bool) -> None:
    longer = tokens(100) + tokens(30, 5)
    with loaded("random", n_parallel=2, n_ctx=2048, kv_unified=unified) as engine:
        engine.submit(request(1, tokens(100), max_tokens=0, slot=0))
        drain(engine)
        engine.submit(request(2, longer, max_tokens=30, slot=1))
        got: dict[int, Collected] = {}
        collect(engine.step(), got)
        assert [slot.n_tokens for slot in engine.slots()] == [100, 130]
        drain(engine, got)
        assert got[2].tokens == alone(engine, longer, max_tokens=30)
    assert cached(got[2]) == 100


@pytest.mark.parametrize("common", [100, 240, 280, 307])
def test_a_beginning_that_the_window_has_left_is_taken_and_the_whole_moves(common: int) -> None:
    with loaded("gemma2", n_ctx=2048, n_parallel=2, kv_unified=False) as engine:
        first = run(engine, tokens(300))
        whole = tokens(300) + tuple(first.tokens)
        prompt, longer = whole[:common] + tokens(40, seed=3), whole + tokens(10, seed=4)
        expected = [alone(engine, prompt), alone(engine, longer)]
        got = [run(engine, prompt), run(engine, longer)]
    assert [one.tokens for one in got] == expected
    assert cached(got[0]) == common
    assert cached(got[1]) == (307 if common < 244 else common), "a short rest is cut off, as without a window"


def test_the_beginning_of_one_that_runs_is_taken_and_it_goes_on_elsewhere() -> None:
    prompts = [tokens(300) + tokens(20, seed) for seed in (2, 3, 4, 5)]
    with loaded("gemma2", n_ctx=2048, n_parallel=4, kv_unified=False) as engine:
        expected = [alone(engine, prompt, max_tokens=60) for prompt in prompts]
        got: dict[int, Collected] = {}
        for number, prompt in enumerate(prompts):
            engine.submit(request(number, prompt, max_tokens=60))
            for _ in range(10):
                collect(engine.step(), got)
        drain(engine, got)
    assert [got[number].tokens for number in range(4)] == expected
    assert [cached(got[number]) for number in range(4)] == [0, 300, 300, 300]


@pytest.mark.parametrize("full", [True, False])
def test_a_crowd_in_a_divided_cache_with_a_window_is_served_exactly(full: bool) -> None:
    prompts = [tokens(20 + 31 * (number % 4), 1 + number % 3) + tokens(number % 5, 7) for number in range(24)]
    with loaded("gemma2", n_ctx=1024, n_parallel=4, n_batch=32, n_ubatch=32, kv_unified=False, swa_full=full) as engine:
        lengths = [10 + 9 * (number % 7) for number in range(24)]
        expected = [alone(engine, prompt, max_tokens=length) for prompt, length in zip(prompts, lengths, strict=True)]
        for number, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
            engine.submit(request(number, prompt, max_tokens=length))
        got = drain(engine)
    assert [got[number].tokens for number in range(24)] == expected


def test_in_a_divided_cache_much_is_not_copied_for_little() -> None:
    with loaded("random", n_ctx=4096, n_parallel=2, kv_unified=False) as engine:
        run(engine, tokens(1000))
        got = [run(engine, tokens(common) + tokens(40, seed=3), max_tokens=0) for common in (10, 200)]
    assert [cached(one) for one in got] == [0, 200]


@pytest.mark.parametrize("unified", [True, False])
def test_the_only_place_of_a_prefix_is_given_to_whoever_goes_on_with_it(unified: bool) -> None:
    branch = tokens(100) + tokens(30, 5)
    with loaded("random", n_parallel=1, n_cached=0, kv_unified=unified) as engine:
        run(engine, tokens(100) + tokens(100, 3), max_tokens=0)
        got = run(engine, branch)
        assert engine.figures.stored == 1, "what was cut off is in RAM"
        again = run(engine, tokens(100) + tokens(100, 3), max_tokens=0)
        assert got.tokens == alone(engine, branch)
    assert (cached(got), cached(again)) == (100, 199)


def test_without_ram_the_only_place_of_a_prefix_still_serves_it() -> None:
    with loaded("random", n_parallel=1, n_cached=0, cache_ram=0) as engine:
        run(engine, tokens(100) + tokens(100, 3), max_tokens=0)
        assert cached(run(engine, tokens(100) + tokens(30, 5))) == 100


def test_a_shift_in_a_divided_cache_goes_on_past_its_share() -> None:
    with loaded("random", n_ctx=512, n_parallel=2, kv_unified=False, context_shift=True) as engine:
        got = run(engine, tokens(200), max_tokens=200)
        both = {number: request(number, tokens(200), max_tokens=200) for number in (1, 2)}
        for one in both.values():
            engine.submit(one)
        together = drain(engine)
    assert len(got.tokens) == 200
    assert together[1].tokens == together[2].tokens == got.tokens


def test_a_mixed_crowd_in_a_divided_cache_is_served_exactly() -> None:
    prompts = [tokens(20 + 13 * (number % 4), 1 + number % 3) + tokens(number % 5, 7) for number in range(24)]
    with loaded("random", n_ctx=1024, n_parallel=4, n_batch=32, n_ubatch=32, kv_unified=False) as engine:
        lengths = [10 + 9 * (number % 7) for number in range(24)]
        expected = [alone(engine, prompt, max_tokens=length) for prompt, length in zip(prompts, lengths, strict=True)]
        for number, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
            engine.submit(request(number, prompt, max_tokens=length))
        got = drain(engine)
    assert [got[number].tokens for number in range(24)] == expected
