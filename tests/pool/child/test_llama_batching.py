"""Many requests at once on the real engine: sharing, fairness, cancelling, and what happens when the room runs out."""

from collections.abc import Generator
from contextlib import contextmanager

import msgspec
import pytest

from chat_templates import ALWAYS_THINKS
from engine_driver import GREEDY, Collected, ask, collect, drain, load_command, loaded
from llamaherd.pool.child import llama_backend
from llamaherd.pool.child.budget import Budget, BudgetedThoughts
from llamaherd.pool.child.grammars import Grammars
from llamaherd.pool.child.lazy import LazyConstraint
from llamaherd.pool.child.llama_engine import LlamaEngine
from llamaherd.pool.child.loaded import Loaded, make_chats
from llamaherd.pool.child.model import Model
from llamaherd.pool.child.resources import Resources
from llamaherd.pool.child.sequence import Sequence
from llamaherd.transport.deltas import join, thinks
from llamaherd.transport.messages import ChatOptions, Delta, Done, Generate, GrammarTrigger, Sampling, Tokens
from tiny_gguf import SCRIPT_TEXT

PROMPTS = ["abc", "a longer prompt than the others " * 8, "x", "The quick brown fox. " * 3, "né 😀"]


def request(number: int, prompt: str = "abc", *, max_tokens: int = 10, seed: int | None = None) -> Generate:
    return Generate(
        request=number,
        prompt=prompt,
        max_tokens=max_tokens,
        sampling=GREEDY if seed is None else Sampling(seed=seed),
        ignore_eos=True,
        # What sharing does has tests of its own.
        cache_prompt=False,
    )


def alone(engine: LlamaEngine, prompt: str, max_tokens: int, seed: int | None = None) -> list[int]:
    engine.submit(request(1, prompt, max_tokens=max_tokens, seed=seed))
    return drain(engine)[1].tokens


def test_greedy_output_is_the_same_alone_and_in_company() -> None:
    with loaded("random", n_parallel=5) as engine:
        expected = [alone(engine, prompt, 40) for prompt in PROMPTS]
        for number, prompt in enumerate(PROMPTS):
            engine.submit(request(number, prompt, max_tokens=40))
        together = drain(engine)
    assert [together[number].tokens for number in range(len(PROMPTS))] == expected


def test_greedy_and_sampled_requests_share_a_batch() -> None:
    with loaded("random", n_parallel=4) as engine:
        seeds = [None, 11, None, 12]
        expected = [alone(engine, prompt, 30, seed) for prompt, seed in zip(PROMPTS, seeds, strict=False)]
        for number, (prompt, seed) in enumerate(zip(PROMPTS, seeds, strict=False)):
            engine.submit(request(number, prompt, max_tokens=30, seed=seed))
        together = drain(engine)
    assert [together[number].tokens for number in range(4)] == expected


def test_one_message_a_step_holds_every_sequence_that_moved() -> None:
    with loaded("random", n_parallel=3) as engine:
        for number in range(3):
            engine.submit(request(number, max_tokens=5))
        steps = [engine.step() for _ in range(5)]
        assert not engine.busy
    for step in steps:
        assert isinstance(step[0], Tokens)
        assert [delta.request for delta in step[0].deltas] == [0, 1, 2]
        assert all(len(delta.tokens) == 1 for delta in step[0].deltas)
    assert [len(step) for step in steps] == [1, 1, 1, 1, 4]


def test_more_requests_than_slots_are_all_served_in_order() -> None:
    with loaded("random", n_parallel=2) as engine:
        for number in range(9):
            engine.submit(request(number, max_tokens=3 + number % 3))
        first_seen: list[int] = []
        most_at_once = 0
        while engine.busy:
            for message in engine.step():
                if isinstance(message, Tokens):
                    numbers = [delta.request for delta in message.deltas]
                    most_at_once = max(most_at_once, len(numbers))
                    first_seen += [number for number in numbers if number not in first_seen]
    assert first_seen == list(range(9))
    assert most_at_once == 2


def test_a_slot_that_is_used_again_remembers_nothing() -> None:
    with loaded("random", n_parallel=1) as engine:
        expected = alone(engine, "abc", 20)
        alone(engine, "something else entirely " * 5, 20)
        assert alone(engine, "abc", 20) == expected


def test_a_newcomer_joins_while_others_generate() -> None:
    with loaded("random", n_parallel=2) as engine:
        expected = alone(engine, PROMPTS[1], 10)
        got: dict[int, Collected] = {}
        engine.submit(request(7, max_tokens=30))
        for _ in range(5):
            collect(engine.step(), got)
        engine.submit(request(8, PROMPTS[1], max_tokens=10))
        drain(engine, got)
    assert got[8].tokens == expected
    assert len(got[7].tokens) == 30


def test_a_long_prompt_goes_in_chunks_beside_a_generation() -> None:
    prompt = "word " * 150
    with loaded("random", n_parallel=2, n_batch=64, n_ubatch=32) as engine:
        expected = alone(engine, prompt, 5)
        got: dict[int, Collected] = {}
        engine.submit(request(7, max_tokens=60))
        collect(engine.step(), got)
        engine.submit(request(8, prompt, max_tokens=5))
        moved_before = 0
        while 8 not in got:
            collect(engine.step(), got)
            moved_before = len(got[7].tokens)
        drain(engine, got)
    assert got[8].tokens == expected
    assert moved_before > 8, "the running generation got a token in every step"


def test_more_slots_than_batch_rows_still_get_a_row_each() -> None:
    with loaded("random", n_parallel=8, n_batch=2, n_ubatch=2) as engine:
        for number in range(8):
            engine.submit(request(number, max_tokens=4))
        got = drain(engine)
    assert [len(got[number].tokens) for number in range(8)] == [4] * 8


def test_cancelling_a_running_request_frees_its_slot_in_the_next_step() -> None:
    with loaded("random", n_parallel=1) as engine:
        engine.submit(request(1, max_tokens=500))
        engine.submit(request(2, max_tokens=2))
        got: dict[int, Collected] = {}
        collect(engine.step(), got)
        engine.cancel(1)
        collect(engine.step(), got)
        assert got[1].reason == "cancelled"
        assert got[1].done is not None and got[1].done.usage.completion_tokens == 1
        assert len(got[2].tokens) == 1
        drain(engine, got)
    assert got[2].reason == "length"


def test_cancelling_a_queued_request_leaves_the_others_in_order() -> None:
    with loaded("random", n_parallel=1) as engine:
        for number in (1, 2, 3):
            engine.submit(request(number, max_tokens=2))
        engine.cancel(2)
        got = drain(engine)
    assert [got[number].reason for number in (1, 2, 3)] == ["length", "cancelled", "length"]
    assert got[2].tokens == []


def test_cancelling_a_request_in_the_middle_of_its_prompt_ends_it() -> None:
    with loaded("random", n_batch=16, n_ubatch=16) as engine:
        engine.submit(request(1, "word " * 100))
        assert engine.step() == []
        engine.cancel(1)
        got = drain(engine)
        assert got[1].reason == "cancelled"
        done = got[1].done
        assert done is not None and done.usage.prompt_tokens == 16, "of the prompt what was computed"
        assert len(alone(engine, "abc", 3)) == 3


def test_a_cancelled_request_is_still_told_when_nothing_else_runs() -> None:
    with loaded("random") as engine:
        engine.submit(request(1))
        engine.cancel(1)
        assert engine.busy
        assert drain(engine)[1].reason == "cancelled"


def test_unknown_and_finished_requests_cannot_be_cancelled() -> None:
    with loaded("random") as engine:
        assert len(ask(engine, "abc", max_tokens=2).tokens) == 2
        engine.cancel(1)
        engine.cancel(99)
        assert not engine.busy


@pytest.mark.parametrize("n_parallel", [2, 4])
def test_when_the_cache_is_full_the_youngest_waits_and_nobody_loses_a_token(n_parallel: int) -> None:
    prompts = [letter * 20 for letter in "abcd"[:n_parallel]]
    with loaded("random", n_ctx=256, n_parallel=n_parallel) as engine:
        expected = [alone(engine, prompt, 200) for prompt in prompts]
        for number, prompt in enumerate(prompts):
            engine.submit(request(number, prompt, max_tokens=200))
        got = drain(engine)
    assert [got[number].tokens for number in range(n_parallel)] == expected
    assert all(got[number].reason == "length" for number in range(n_parallel))


def test_a_preempted_sampled_request_goes_on_with_its_own_dice() -> None:
    with loaded("random", n_ctx=256, n_parallel=2) as engine:
        expected = alone(engine, "b" * 20, 200, seed=5)
        engine.submit(request(1, "a" * 20, max_tokens=200, seed=4))
        engine.submit(request(2, "b" * 20, max_tokens=200, seed=5))
        assert drain(engine)[2].tokens == expected


def test_the_first_of_many_fills_the_whole_context_if_it_likes() -> None:
    with loaded("random", n_ctx=256, n_parallel=2) as engine:
        for number in (1, 2):
            engine.submit(request(number, max_tokens=-1))
        got = drain(engine)
    for number in (1, 2):
        done = got[number].done
        assert done is not None and done.finish_reason == "length"
        assert done.usage.prompt_tokens + done.usage.completion_tokens == 256


def test_a_prompt_that_does_not_fit_beside_the_others_waits_its_turn() -> None:
    with loaded("random", n_ctx=256, n_parallel=4) as engine:
        engine.submit(request(1, "a" * 150, max_tokens=20))
        engine.submit(request(2, "b" * 150, max_tokens=5))
        engine.submit(request(3, "cc", max_tokens=5))
        order: list[int] = []
        while engine.busy:
            for message in engine.step():
                if isinstance(message, Tokens):
                    order += [delta.request for delta in message.deltas if delta.request not in order]
    assert order == [1, 2, 3]


def test_threads_may_change_between_steps() -> None:
    with loaded("scripted") as engine:
        engine.submit(Generate(request=1, prompt="x\n", sampling=GREEDY))
        got: dict[int, Collected] = {}
        for n, batch in ((2, 0), (1, 2), (0, 0)):
            engine.set_threads(n, batch)
            collect(engine.step(), got)
        drain(engine, got)
    assert got[1].text == SCRIPT_TEXT


def test_an_interrupted_step_returns_and_loses_nothing_of_the_sequence() -> None:
    with loaded("random") as engine:
        engine.submit(request(1))
        got: dict[int, Collected] = {}
        collect(engine.step(), got)
        before = len(got[1].tokens)
        engine.interrupt()
        collect(engine.step(), got)
        assert len(got[1].tokens) == before
        assert engine.busy


def test_unloading_a_busy_engine_is_safe_when_leaving() -> None:
    with loaded("random") as engine:
        engine.submit(request(1, seed=1))
        engine.submit(request(2, seed=2))
        engine.step()
        engine.interrupt()
        engine.step()
        engine.unload()
        assert not engine.busy


class Untold(LazyConstraint):
    """Breaks over a token in a way that nobody foresaw."""

    def allows(self, token: int) -> bool:
        raise KeyError(token)


def test_an_answer_that_breaks_the_engines_code_fails_alone(capsys: pytest.CaptureFixture[str]) -> None:
    command = load_command("random", n_parallel=2)
    llama_backend.init_backend()
    model = Model(command.path, command.options, lambda _: True)
    resources = Resources(command, model, (1, 1), llama_backend.AbortFlag())
    engine = Loaded(command, resources, make_chats(command, model))
    trigger = GrammarTrigger(words=("never",))
    inner = engine.grammars.make(Generate(request=1, prompt="", grammar='root ::= "a"'))
    assert inner is not None
    constraint = Untold(inner, trigger, model.vocab)
    engine.batcher.submit(Sequence(request(1), [263, 264], 64, None, constraint=constraint))
    engine.batcher.submit(Sequence(request(2), [265, 266], 64, None))
    got: dict[int, Collected] = {}
    while engine.busy:
        collect(engine.step(), got)
    engine.free()
    failed = got[1].failed
    assert failed is not None
    assert (failed.fault, failed.code) == ("worker", "request_broke")
    assert len(got[2].tokens) == 10
    assert "KeyError" in capsys.readouterr().err


@contextmanager
def parts() -> Generator[tuple[Loaded, Model]]:
    """Yield what an engine is made of."""
    command = load_command("random", n_parallel=1)
    llama_backend.init_backend()
    model = Model(command.path, command.options, lambda _: True)
    resources = Resources(command, model, (1, 1), llama_backend.AbortFlag())
    engine = Loaded(command, resources, make_chats(command, model))
    yield engine, model
    engine.free()


def picked(engine: Loaded, sequence: Sequence) -> list[bool]:
    """Run a sequence; return of each of its tokens whether the picker chose it, and not llama.cpp alone."""
    engine.batcher.submit(sequence)
    told: list[bool] = []
    while engine.busy:
        told.append(sequence.picked)
        engine.step()
    return told


def test_under_a_budget_alone_only_the_words_that_end_the_thinking_are_picked() -> None:
    with parts() as (engine, model):
        closing = model.vocab.tokenize("xyz", add_special=False)
        budget = Budget(tokens=3, start="<think>", end="xyz", closing="xyz", opened=True)
        constraint = BudgetedThoughts(budget, None, model.vocab)
        sequence = Sequence(request(1), [263, 264], 64, None, constraint=constraint)
        told = picked(engine, sequence)
    assert sequence.tokens[2:].tolist()[3 : 3 + len(closing)] == closing
    assert told == [False] * 3 + [True] * len(closing) + [False] * (10 - 3 - len(closing))


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (GREEDY, False),
        (Sampling(seed=3), False),
        (Sampling(seed=3, presence_penalty=1.5, dry_multiplier=0.8), False),
        (Sampling(seed=3, n_probs=2), False),
        # What cannot be taken back, or not cheaply, is not chosen before it is known that it may stand.
        (Sampling(seed=3, samplers=("adaptive_p",), adaptive_target=0.5), True),
        (Sampling(seed=3, presence_penalty=1.5, repeat_last_n=-1), True),
        (Sampling(seed=3, n_probs=2, post_sampling_probs=True), True),
    ],
)
def test_under_a_grammar_llama_cpp_chooses_as_without_one(sampling: Sampling, expected: bool) -> None:
    with parts() as (engine, model):
        inner = Grammars(model.vocab).make(Generate(request=1, grammar="root ::= .*"))
        assert inner is not None
        waiting = LazyConstraint(inner, GrammarTrigger(words=("nowhere at all",)), model.vocab)
        budget = Budget(tokens=3, start="<think>", end="xyz", closing="xyz", opened=True)
        both = BudgetedThoughts(budget, waiting, model.vocab)
        closing = len(model.vocab.tokenize("xyz", add_special=False))
        told: list[list[bool]] = []
        for constraint in (inner, waiting.copy(), both):
            asked = msgspec.structs.replace(request(1), sampling=sampling)
            chain = engine.samplers.make(sampling, [263, 264])
            told.append(picked(engine, Sequence(asked, [263, 264], 64, chain, constraint=constraint)))
    assert told[:2] == [[expected] * 10] * 2
    assert told[2] == [expected] * 3 + [True] * closing + [expected] * (10 - 3 - closing)


# --- answers that are read whole ---


def deltas_of(engine: LlamaEngine, number: int) -> list[Delta]:
    """Return what each step told of a request until nothing is left to do."""
    found: list[Delta] = []
    while engine.busy:
        for message in engine.step():
            if isinstance(message, Tokens):
                found += [delta for delta in message.deltas if delta.request == number]
    return found


def test_an_answer_that_is_read_whole_is_told_in_few_deltas_and_says_the_same() -> None:
    with loaded("random") as engine:
        engine.submit(request(1, max_tokens=70))
        single = deltas_of(engine, 1)
        engine.submit(msgspec.structs.replace(request(1, max_tokens=70), whole=True))
        gathered = deltas_of(engine, 1)
    assert [len(delta.tokens) for delta in single] == [1] * 70
    assert [len(delta.tokens) for delta in gathered] == [1, 32, 32, 5], "the first at once, so that all know it began"
    assert join(gathered) == join(single)


def test_what_was_held_back_comes_before_the_end_of_a_cancelled_request() -> None:
    with loaded("random") as engine:
        engine.submit(msgspec.structs.replace(request(1, max_tokens=500), whole=True))
        for _ in range(10):
            engine.step()
        engine.cancel(1)
        tokens, done = engine.step()
    assert isinstance(tokens, Tokens)
    assert isinstance(done, Done)
    assert len(tokens.deltas[0].tokens) == 9
    assert done.usage.completion_tokens == 10


def test_streams_are_told_each_step_beside_answers_that_are_read_whole() -> None:
    with loaded("random") as engine:
        engine.submit(msgspec.structs.replace(request(1, max_tokens=20), whole=True))
        engine.submit(request(2, "x", max_tokens=20))
        assert [len(delta.tokens) for delta in deltas_of(engine, 2)] == [1] * 20


def test_of_an_answer_that_is_read_whole_the_tokens_of_reasoning_can_be_counted() -> None:
    messages = ({"role": "user", "content": "Why?"},)
    asked = Generate(
        request=1,
        messages=messages,
        sampling=GREEDY,
        max_tokens=60,
        ignore_eos=True,
        chat=ChatOptions(reasoning_budget=10, reasoning_budget_message=" So:\n"),
    )
    with loaded("random", n_ctx=2048, chat_template=ALWAYS_THINKS) as engine:
        found: list[list[Delta]] = []
        for whole in (False, True):
            engine.submit(msgspec.structs.replace(asked, whole=whole))
            found.append([])
            while engine.busy:
                for message in engine.step():
                    if isinstance(message, Tokens):
                        found[-1] += [*message.deltas, *message.typed]
    single, gathered = found
    counts = [sum(len(delta.tokens) for delta in deltas if thinks(delta)) for deltas in found]
    assert counts[1] == counts[0] > 5
    assert len(gathered) < len(single) / 2
    assert join(gathered) == join(single)
