"""A budget of thinking: counted where reasoning is, ended by the right tokens, and never within a character."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from chat_templates import ALWAYS_THINKS, HARMONY, QWEN3
from llamaherd.pool.child import llama_backend
from llamaherd.pool.child.budget import Budget, BudgetedThoughts
from llamaherd.pool.child.chat import Chats
from llamaherd.pool.child.constraint import Constraint
from llamaherd.pool.child.grammars import Grammars
from llamaherd.pool.child.model import Model
from llamaherd.pool.child.vocab import Vocab
from llamaherd.transport.messages import ChatOptions, EngineOptions, Generate
from tiny_gguf import write_random_llama

QUESTION: dict[str, Any] = {"role": "user", "content": "?"}


@pytest.fixture(scope="module")
def vocab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Vocab]:
    path = tmp_path_factory.mktemp("budget") / "m.gguf"
    write_random_llama(path, controls=("[THINK]", "[/THINK]"))
    llama_backend.init_backend()
    model = Model(str(path), EngineOptions(), lambda _: True)
    yield model.vocab
    model.free()


def budget(tokens: int, **fields: Any) -> Budget:
    given: dict[str, Any] = {"tokens": tokens, "start": "<think>", "end": "</think>", "closing": "</think>", **fields}
    return Budget(**given)


def controls(tokens: int, **fields: Any) -> Budget:
    return budget(tokens, start="[THINK]", end="[/THINK]", closing="[/THINK]", anywhere=True, **fields)


def ids(vocab: Vocab, text: str) -> list[int]:
    return vocab.tokenize(text, add_special=False, parse_special=True)


def say(vocab: Vocab, constraint: Any, text: str | Sequence[int], most: int = 60) -> str:
    """Return what a model says that wants to say ``text``, one token after the other, where it is allowed to."""
    wanted, said = list(ids(vocab, text) if isinstance(text, str) else text), b""
    for _ in range(most):
        if not wanted and constraint.candidates().size != 1:
            break
        token = wanted[0] if wanted else -1
        if token >= 0 and constraint.allows(token) and constraint.allowed([token], 1) == [token]:
            wanted.pop(0)
        else:
            (token,) = constraint.candidates().tolist()
            assert constraint.allows(token)
        constraint.accept(token)
        said += vocab.named_piece(token)
    return said.decode()


def make(vocab: Vocab) -> Callable[..., BudgetedThoughts]:
    def limited(limit: Budget, inner: Constraint | None = None) -> BudgetedThoughts:
        return BudgetedThoughts(limit, inner, vocab)

    return limited


@pytest.mark.parametrize(
    ("limit", "said"),
    [
        (budget(3, opened=True), "abc</think>defg"),
        (budget(0, opened=True), "</think>abcdefg"),
        (budget(7, opened=True), "abcdefg</think>"),
        (budget(8, opened=True), "abcdefg"),
        (budget(2, opened=True, closing=" Enough.\n</think>"), "ab Enough.\n</think>cdefg"),
        (budget(3), "abcdefg"),
        (controls(3, opened=True), "abc[/THINK]defg"),
        (controls(3), "abcdefg"),
    ],
)
def test_reasoning_that_the_prompt_has_opened_ends_at_its_budget(vocab: Vocab, limit: Budget, said: str) -> None:
    assert say(vocab, make(vocab)(limit), "abcdefg") == said


@pytest.mark.parametrize(
    ("limit", "text", "said"),
    [
        (budget(3), "\n <think>abcdef", "\n <think>abc</think>def"),
        (budget(0), "<think>abc", "<think></think>abc"),
        (budget(20), "<think>abc</think>defghijklmnopqrstuvwxyzabc", "<think>abc</think>defghijklmnopqrstuvwxyzabc"),
        (controls(1), "[THINK]abc", "[THINK]a[/THINK]bc"),
    ],
)
def test_a_model_that_opens_it_by_itself_has_the_same_budget(vocab: Vocab, limit: Budget, text: str, said: str) -> None:
    assert say(vocab, make(vocab)(limit), text) == said


def test_a_tag_of_text_within_an_answer_is_a_quotation(vocab: Vocab) -> None:
    text = "Use <think>abcdef"
    assert say(vocab, make(vocab)(budget(2)), text) == text


def test_another_reasoning_of_a_control_token_has_a_budget_of_its_own(vocab: Vocab) -> None:
    assert say(vocab, make(vocab)(controls(2)), "[THINK]a[/THINK]b[THINK]cdef") == (
        "[THINK]a[/THINK]b[THINK]cd[/THINK]ef"
    )


def test_a_character_is_not_cut_in_two(vocab: Vocab) -> None:
    # Four bytes, one token each.
    assert say(vocab, make(vocab)(budget(2, opened=True)), "😀ab") == "😀</think>ab"


def test_the_closing_words_cannot_be_left_out(vocab: Vocab) -> None:
    constraint = make(vocab)(budget(0, opened=True))
    first = ids(vocab, "</think>")[0]
    assert constraint.candidates().tolist() == [first]
    assert constraint.allowed([vocab.eos, first, 5], 3) == [first]
    assert not constraint.allows(vocab.eos)
    assert not constraint.complete


def test_a_grammar_that_waits_for_the_end_holds_behind_the_one_that_was_made(vocab: Vocab) -> None:
    request = Generate(request=1, prompt="x", grammar='root ::= "12"')
    inner = Grammars(vocab).make(request, "</think>")
    constraint = make(vocab)(budget(2, opened=True), inner)
    assert say(vocab, constraint, "ab12") == "ab</think>12"
    assert constraint.complete


def test_a_grammar_that_knows_of_no_reasoning_is_stronger(vocab: Vocab) -> None:
    inner = Grammars(vocab).make(Generate(request=1, prompt="x", grammar='root ::= "<think>" [a-z]*'))
    assert say(vocab, make(vocab)(budget(2), inner), "<think>abcdef") == "<think>abcdef"


def test_a_copy_goes_its_own_way(vocab: Vocab) -> None:
    one = make(vocab)(budget(3, opened=True))
    assert say(vocab, one, "ab") == "ab"
    other = one.copy()
    assert say(vocab, other, "xy") == "x</think>y"
    assert say(vocab, one, "cd") == "c</think>d"


# --- which budget a request has ---


def budget_of(vocab: Vocab, source: str, given: EngineOptions | None = None, **asked: Any) -> Budget | None:
    return Chats(source, "", vocab, given).turn([QUESTION], {}, ChatOptions(**asked)).budget


def test_a_request_is_asked_before_the_models_options(vocab: Vocab) -> None:
    given = EngineOptions(reasoning_budget=5, reasoning_budget_message="Done.")
    assert budget_of(vocab, ALWAYS_THINKS) is None
    by_default = budget_of(vocab, ALWAYS_THINKS, given)
    assert by_default == budget(5, opened=True, closing="Done.</think>")
    asked = budget_of(vocab, ALWAYS_THINKS, given, reasoning_budget=0, reasoning_budget_message="")
    assert asked == budget(0, opened=True)


def test_the_tags_are_those_of_the_template(vocab: Vocab) -> None:
    assert budget_of(vocab, QWEN3, reasoning_budget=4) == budget(4)
    assert budget_of(vocab, "[THINK][/THINK]", reasoning_budget=4) == controls(4)
    assert budget_of(vocab, "no tags", reasoning_budget=4) is None


def test_gpt_oss_goes_on_with_its_answer(vocab: Vocab) -> None:
    limit = budget_of(vocab, HARMONY, reasoning_budget=4, reasoning_budget_message="Done.")
    assert limit is not None
    assert limit.closing == "Done.<|end|><|start|>assistant<|channel|>final<|message|>"
    text = "<|channel|>analysis<|message|>abcdxyz"
    assert say(vocab, make(vocab)(limit), text, 200) == text[:-3] + limit.closing + "xyz"


def test_content_that_is_continued_has_no_reasoning_to_end(vocab: Vocab) -> None:
    message = {"role": "assistant", "content": "So"}
    options = ChatOptions(continuation="content", reasoning_budget=0)
    assert Chats(ALWAYS_THINKS, "", vocab).turn([QUESTION, message], {}, options).budget is None
