"""Sequences that leave the cache and come back, contexts that shift, and what the cache is made of."""

import threading
from array import array
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_driver import GREEDY, Collected, drain, loaded, smollm2_path
from llamaherd.pool.child import llama_backend
from llamaherd.pool.child.cache import Cache
from llamaherd.pool.child.context import Context
from llamaherd.pool.child.engine import EngineError, RequestError
from llamaherd.pool.child.model import Model
from llamaherd.pool.child.prefix import Rules
from llamaherd.pool.child.shift import cut
from llamaherd.pool.child.store import Store
from llamaherd.transport.messages import EngineOptions, Generate
from prompts import alone, cached, request, run, tokens
from tiny_gguf import tiny_model


@dataclass
class _Holder:
    slot: int
    computed: int
    tokens: "array[int]" = field(default_factory=lambda: array("i"))


# --- into RAM and back ---


@pytest.mark.parametrize(
    ("model", "options"),
    [("random", {}), ("gemma2", {}), ("gemma2", {"swa_full": False}), ("mamba", {}), ("random", {"flash_attn": "on"})],
)
def test_a_conversation_that_left_the_cache_comes_back_from_ram(model: str, options: dict[str, Any]) -> None:
    with loaded(model, n_parallel=1, n_cached=0, **options) as engine:
        first = run(engine, tokens(100))
        run(engine, tokens(90, 2))
        assert engine.figures.stored == 1
        longer = tokens(100) + tuple(first.tokens) + tokens(20, 5)
        expected = alone(engine, longer)
        before = engine.figures.computed
        got = run(engine, longer)
        assert engine.figures.computed - before == 1 + 20 + 7
    assert got.tokens == expected
    assert cached(got) == 107


@pytest.mark.parametrize(("model", "found"), [("random", 60), ("gemma2", 0), ("mamba", 0)])
def test_a_part_of_a_state_is_taken_where_the_model_can(model: str, found: int) -> None:
    with loaded(model, n_parallel=1, n_cached=0) as engine:
        run(engine, tokens(200))
        run(engine, tokens(90, 2))
        prompt = tokens(60) + tokens(30, 5)
        expected = alone(engine, prompt)
        got = run(engine, prompt)
        assert engine.figures.cells == (90 + 7 if model != "mamba" else 97)
    assert got.tokens == expected
    assert cached(got) == found


def test_without_ram_nothing_comes_back() -> None:
    with loaded("random", n_parallel=1, n_cached=0, cache_ram=0) as engine:
        run(engine, tokens(100))
        run(engine, tokens(90, 2))
        assert (engine.figures.stored, engine.figures.stored_bytes) == (0, 0)
        assert cached(run(engine, tokens(100))) == 0


def test_older_conversations_leave_a_crowded_cache_for_ram_and_come_back() -> None:
    """For llama.cpp goes over every cell in use for each token that anyone generates."""
    with loaded("random", n_ctx=4096, n_parallel=1) as engine:
        expected = alone(engine, tokens(900))
        for number in range(4):
            run(engine, tokens(900, number))
        assert engine.figures.kept + engine.figures.stored == 4
        assert engine.figures.cells == engine.figures.kept * (900 + 7)
        got = run(engine, tokens(900))
    assert (got.tokens, cached(got)) == (expected, 899)


def test_the_newest_conversation_stays_however_long_it_is() -> None:
    with loaded("random", n_ctx=4096, n_parallel=1) as engine:
        run(engine, tokens(3000))
        assert (engine.figures.kept, engine.figures.stored) == (1, 0)


def test_conversations_that_begin_alike_share_that_wherever_they_are() -> None:
    with loaded("random", n_ctx=4096, n_parallel=2) as engine:
        for number in range(4):
            run(engine, tokens(2100) + tokens(20, number + 1))
        assert cached(run(engine, tokens(2100) + tokens(30, 9))) == 2100


def test_without_ram_a_crowded_cache_stays_as_it_is() -> None:
    with loaded("random", n_ctx=4096, n_parallel=1, cache_ram=0) as engine:
        for number in range(3):
            run(engine, tokens(900, number))
        assert engine.figures.kept == 3


def test_a_state_that_is_too_short_to_be_worth_a_copy_is_not_taken() -> None:
    with loaded("random", n_parallel=1, n_cached=0) as engine:
        run(engine, tokens(10))
        run(engine, tokens(90, 2))
        assert engine.figures.stored == 0


def test_ram_is_bounded() -> None:
    with loaded("random", n_parallel=1, n_cached=0, cache_ram=1, n_ctx=4096) as engine:
        most = 0
        for seed in range(1, 9):
            run(engine, tokens(1500, seed), max_tokens=0)
            most = max(most, engine.figures.stored_bytes)
        assert 0 < most <= 1024 * 1024
        assert 0 < engine.figures.stored < 7


def test_a_preempted_request_that_is_cancelled_leaves_its_state_for_others() -> None:
    with loaded("random", n_ctx=256, n_parallel=2) as engine:
        for number in (1, 2):
            engine.submit(request(number, tokens(40, number), max_tokens=200))
        engine.step()
        while engine.figures.running == 2:
            engine.step()
        assert engine.figures.waiting == 1
        engine.cancel(2)
        drain(engine)
        assert engine.figures.stored >= 1
        assert cached(run(engine, tokens(40, 2))) > 30


def test_a_preempted_request_shares_the_cells_of_its_prompt_again() -> None:
    prompts = [tokens(150) + tokens(5, seed) for seed in (2, 3, 4)]
    with loaded("random", n_ctx=512, n_parallel=3) as engine:
        expected = [alone(engine, prompt, max_tokens=200) for prompt in prompts]
        before = engine.figures.computed
        for number, prompt in enumerate(prompts):
            engine.submit(request(number, prompt, max_tokens=200))
        got = drain(engine)
        assert engine.figures.computed - before == 150 + 3 * (5 + 199)
    assert [got[number].tokens for number in range(3)] == expected


def test_a_restored_state_of_a_real_model_goes_on_word_for_word() -> None:
    prompt = "Once upon a time there was a small village by the sea. The people of the village were " * 4
    with loaded(smollm2_path(), n_ctx=512, n_parallel=1, n_cached=0) as engine:
        engine.submit(Generate(request=1, prompt=prompt, sampling=GREEDY, max_tokens=8))
        first = drain(engine)[1]
        engine.submit(Generate(request=2, prompt="Something else " * 40, sampling=GREEDY, max_tokens=2))
        drain(engine)
        engine.submit(Generate(request=3, prompt=prompt, sampling=GREEDY, max_tokens=8))
        again = drain(engine)[3]
    assert again.text == first.text
    assert cached(again) > 50


# --- context shift ---


def test_a_full_context_ends_the_answer_and_says_so() -> None:
    with loaded("random", n_ctx=256, n_parallel=1) as engine:
        full = run(engine, tokens(100), max_tokens=-1)
        own = run(engine, tokens(100), max_tokens=5)
    assert full.done is not None and own.done is not None
    assert (full.reason, full.done.truncated, len(full.tokens)) == ("length", True, 156)
    assert (own.reason, own.done.truncated) == ("length", False)


def test_a_shifted_generation_goes_on_past_the_context() -> None:
    with loaded("random", n_ctx=256, n_parallel=1, context_shift=True) as engine:
        got = run(engine, tokens(100), max_tokens=600, n_keep=20)
        assert engine.figures.cells <= 256
    assert got.done is not None
    assert (got.reason, len(got.tokens), got.done.truncated) == ("length", 600, True)
    assert got.done.usage.prompt_tokens == 100 and got.done.usage.completion_tokens == 600


def test_after_a_shift_only_the_kept_beginning_is_reused() -> None:
    with loaded("random", n_ctx=256, n_parallel=1, context_shift=True, n_keep=40) as engine:
        run(engine, tokens(100), max_tokens=300)
        expected = alone(engine, tokens(100))
        got = run(engine, tokens(100))
    assert cached(got) == 40
    assert got.tokens == expected


def test_after_a_shift_a_beginning_that_the_window_has_lost_is_not_kept() -> None:
    with loaded("gemma2", n_ctx=256, n_parallel=1, context_shift=True, cache_ram=0) as engine:
        run(engine, tokens(60), max_tokens=350, n_keep=50)
        assert (engine.figures.kept, engine.figures.cells) == (0, 0)
        run(engine, tokens(50), max_tokens=0)
        assert cached(run(engine, tokens(50) + tokens(9, 3))) == 50


@pytest.mark.parametrize(("n_discard", "kept"), [(0, 1), (50, 0)])
def test_a_shift_does_not_move_the_cells_of_finished_sequences(n_discard: int, kept: int) -> None:
    """What a finished sequence shares is left alone where it stays, and given up where it would have to move."""
    prompt = tokens(100)
    with loaded("random", n_ctx=256, n_parallel=1, context_shift=True) as engine:
        expected = alone(engine, prompt, max_tokens=60)
        run(engine, prompt, max_tokens=0)
        got: dict[int, Collected] = {}
        engine.submit(request(2, prompt, max_tokens=157, n_discard=n_discard))
        drain(engine, got)
        assert cached(got[2]) == 99 and got[2].done is not None and got[2].done.truncated
        assert engine.figures.kept == kept
        again = run(engine, prompt, max_tokens=60)
        assert (again.tokens, cached(again)) == (expected, 99)


@contextmanager
def _cache(store: int | None = 0, n_ctx: int = 1024) -> Generator[tuple[Cache, Context]]:
    """A cache, and the context that it is of."""
    llama_backend.init_backend()
    options = EngineOptions(n_ctx=n_ctx, n_threads=1, n_parallel=4)
    model = Model(str(tiny_model("random")), options, lambda _fraction: True)
    context = Context(model, options, (1, 1), llama_backend.AbortFlag())
    rules = Rules(whole=False, window=0, first=context.first)
    try:
        yield Cache(context, rules, Store(store, rules)), context
    finally:
        context.free()
        model.free()


def _computed(cache: Cache, context: Context, count: int, seed: int = 1) -> _Holder:
    """A sequence that runs, with so many tokens."""
    prompt = array("i", tokens(count, seed))
    slot = cache.acquire()
    context.batch.clear()
    context.batch.extend(slot, 0, prompt, output=True)
    assert context.batch.decode(context.handle) == 0
    cache.cells.grow(slot, count)
    return _Holder(slot, count, prompt)


def test_cells_that_a_running_sequence_holds_are_not_moved() -> None:
    with _cache() as (cache, context):
        first, second = _computed(cache, context, 50).slot, cache.acquire()
        cache.share(_Holder(first, 50), second, 30)
        refused = cache.cut(first, 5, 20)
        lengths = context.length(first), context.length(second)
        allowed = cache.cut(first, 5, 30)
        after = context.length(first), context.length(second), cache.cells.used
        cache.release(first)
        cache.release(second)
        left = cache.cells.used
    assert (refused, lengths) == (False, (50, 30))
    assert (allowed, after, left) == (True, (25, 30, 50), 0)


def test_a_context_that_computes_nothing_has_no_cores_to_share() -> None:
    with _cache() as (cache, context):
        context.share_cores()
        assert [one.name for one in threading.enumerate() if one.name == "barriers"] == []
        assert _computed(cache, context, 10).computed == 10


# --- who may stay ---

#: Tokens to come beside which every copy is cheap.
_MUCH_WORK = 10**9


def test_finished_sequences_leave_for_ram_where_much_is_to_be_computed() -> None:
    with _cache(store=None) as (cache, context):
        for seed in range(3):
            one = _computed(cache, context, 100, seed)
            cache.keep(one.slot, one.tokens)
        running = _computed(cache, context, 80, 9)
        cache.settle([running.slot], _MUCH_WORK, 0)
        assert (list(cache.kept), cache.cells.used, cache.store.kept) == ([], 80, 3)
        assert context.length(running.slot) == 80
        back = cache.acquire()
        state = cache.store.covering(array("i", tokens(100, 1)))
        assert state is not None
        assert cache.restore(state, back, 100)
        assert context.length(back) == 100


def test_finished_sequences_stay_where_little_is_to_be_computed() -> None:
    with _cache(store=None) as (cache, context):
        one = _computed(cache, context, 100)
        kept = cache.keep(one.slot, one.tokens)
        running = _computed(cache, context, 80, 9)
        cache.settle([running.slot], 1, 0)
        assert (list(cache.kept), cache.store.kept) == ([kept], 0)


def test_what_a_running_sequence_shares_costs_nothing_where_it_is() -> None:
    with _cache(store=None) as (cache, context):
        one = _computed(cache, context, 100)
        kept = cache.keep(one.slot, one.tokens)
        assert kept is not None
        running = cache.acquire(kept)
        cache.share(kept, running, 100)
        cache.settle([running], _MUCH_WORK, 0)
        assert list(cache.kept) == [kept]


def test_a_short_ending_is_let_go_where_others_keep_the_beginning() -> None:
    with _cache(store=None) as (cache, context):
        first = _computed(cache, context, 100)
        kept = cache.keep(first.slot, first.tokens)
        assert kept is not None
        second = cache.acquire(kept)
        cache.share(kept, second, 90)
        context.batch.clear()
        context.batch.extend(second, 90, array("i", tokens(10, 7)), output=True)
        assert context.batch.decode(context.handle) == 0
        cache.cells.grow(second, 10)
        cache.keep(second, first.tokens[:90] + array("i", tokens(10, 7)))
        running = _computed(cache, context, 80, 9)
        cache.settle([running.slot], _MUCH_WORK, 0)
        assert (list(cache.kept), cache.cells.used, cache.store.kept) == ([], 80, 1)


def test_on_a_device_the_newest_stay_and_so_do_all_that_are_few() -> None:
    with _cache(store=None, n_ctx=4096) as (cache, context):
        context.cell_seconds = 0.0
        for seed in range(3):
            one = _computed(cache, context, 900, seed)
            cache.keep(one.slot, one.tokens)
        cache.settle([], _MUCH_WORK, 3)
        assert (len(list(cache.kept)), cache.store.kept) == (3, 0)
        cache.settle([], 1, 1)
        assert (len(list(cache.kept)), cache.store.kept) == (2, 1)
        assert cache.cells.used == 1800


def test_where_ram_takes_nothing_finished_sequences_stay() -> None:
    with _cache(store=0) as (cache, context):
        one = _computed(cache, context, 100)
        kept = cache.keep(one.slot, one.tokens)
        cache.settle([], _MUCH_WORK, 0)
        assert list(cache.kept) == [kept]


def test_requests_that_share_all_they_have_shift_each_for_itself() -> None:
    prompt = tokens(230)
    with loaded("random", n_ctx=256, n_parallel=2, context_shift=True) as engine:
        for number in (1, 2):
            engine.submit(request(number, prompt, max_tokens=300))
        got = drain(engine)
        assert engine.figures.cells <= 256
        assert run(engine, prompt, max_tokens=5).tokens == alone(engine, prompt, max_tokens=5)
    assert [len(got[number].tokens) for number in (1, 2)] == [300, 300]


@pytest.mark.parametrize(("model", "options"), [("mamba", {}), ("gemma2", {"swa_full": False})])
def test_models_that_cannot_shift_end_as_without_the_option(model: str, options: dict[str, Any]) -> None:
    with loaded(model, n_ctx=256, n_parallel=1, context_shift=True, **options) as engine:
        got = run(engine, tokens(100), max_tokens=400)
    assert got.done is not None and got.done.truncated
    assert len(got.tokens) == 156


def test_impossible_numbers_of_a_shift_are_refused() -> None:
    with loaded("random") as engine:
        for fields in ({"n_keep": -2}, {"n_discard": -1}):
            with pytest.raises(RequestError):
                engine.submit(request(1, tokens(5), **fields))


@given(
    n_ctx=st.integers(16, 512),
    n_keep=st.integers(-1, 600),
    n_discard=st.integers(0, 600),
    n_prompt=st.integers(1, 500),
    adds_bos=st.booleans(),
)
def test_a_shift_always_frees_something_and_keeps_the_newest(
    n_ctx: int, n_keep: int, n_discard: int, n_prompt: int, adds_bos: bool
) -> None:
    start, end = cut(
        n_ctx=n_ctx,
        computed=n_ctx - 1,
        n_prompt=min(n_prompt, n_ctx - 1),
        n_keep=n_keep,
        n_discard=n_discard,
        adds_bos=adds_bos,
    )
    assert 0 <= start < end < n_ctx - 1
    held = array("i", range(n_ctx - 1))
    del held[start:end]
    assert held[-1] == n_ctx - 2


# --- what the cache is made of ---


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl"])
def test_the_cache_may_have_any_of_the_references_types(kind: str) -> None:
    with loaded(smollm2_path(), n_ctx=256, cache_type_k=kind, cache_type_v=kind, flash_attn="auto") as engine:
        engine.submit(Generate(request=1, prompt="The capital of France is", sampling=GREEDY, max_tokens=3))
        assert len(drain(engine)[1].tokens) == 3


def test_quantised_values_need_flash_attention_and_the_error_says_so() -> None:
    with (
        pytest.raises(EngineError, match="cache_type_v is q8_0.*flash_attn") as caught,
        loaded(smollm2_path(), cache_type_v="q8_0", flash_attn="off"),
    ):
        pass
    assert caught.value.code == "invalid_option"


def test_a_type_that_does_not_fit_the_heads_is_refused() -> None:
    with (
        pytest.raises(EngineError, match="cache_type_k is q4_0, which packs 32 elements.* have 16"),
        loaded("random", cache_type_k="q4_0", flash_attn="on"),
    ):
        pass


def test_a_shifted_quantised_cache_goes_on() -> None:
    with loaded(
        smollm2_path(), n_ctx=256, n_parallel=1, cache_type_k="q8_0", flash_attn="auto", context_shift=True
    ) as engine:
        engine.submit(Generate(request=1, prompt="word " * 240, sampling=GREEDY, max_tokens=30, ignore_eos=True))
        assert len(drain(engine)[1].tokens) == 30


@pytest.mark.parametrize("fields", [{"rope_freq_base": -1.0}, {"yarn_orig_ctx": -1}, {"cache_ram": -2}, {"n_keep": -2}])
def test_options_out_of_range_are_named(fields: dict[str, Any]) -> None:
    with pytest.raises(EngineError, match=next(iter(fields))), loaded("random", **fields):
        pass


def test_scaled_positions_change_the_answer() -> None:
    answers = [
        alone_with(options)
        for options in ({}, {"rope_freq_scale": 0.25}, {"rope_scaling": "yarn", "rope_freq_scale": 0.25}, {})
    ]
    assert answers[0] == answers[3]
    assert len({tuple(answer) for answer in answers}) == 3


def alone_with(options: dict[str, Any]) -> list[int]:
    with loaded("random", **options) as engine:
        return alone(engine, tokens(60), max_tokens=20)
