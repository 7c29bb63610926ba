"""Infilling on the real engine: what is put together, what is left out, and what is refused."""

from collections.abc import Iterator
from typing import Any

import pytest

from engine_driver import drain, loaded
from llamaherd.pool.child.engine import RequestError
from llamaherd.pool.child.infill import infill_tokens
from llamaherd.pool.child.llama_engine import LlamaEngine
from llamaherd.pool.child.vocab import Vocab
from llamaherd.transport.messages import Generate, Infill, InfillFile, Sampling
from tiny_gguf import INFILL_TOKENS

LARGE: dict[str, Any] = {"n_batch": 256, "n_ctx": 1024, "max_tokens": -1, "suffix_first": False}


@pytest.fixture(scope="module")
def engine() -> Iterator[LlamaEngine]:
    with loaded("random-infill") as one:
        yield one


@pytest.fixture(scope="module")
def vocab(engine: LlamaEngine) -> Vocab:
    return engine._need().model.vocab  # pyright: ignore[reportPrivateUsage]


def spelled(vocab: Vocab, tokens: list[int]) -> str:
    return vocab.detokenize(tokens)


def test_a_gap_is_described_with_the_vocabularys_own_tokens(vocab: Vocab) -> None:
    gap = Infill(prefix="def f():\n", suffix="\nend", prompt="    ret")
    text = spelled(vocab, infill_tokens(vocab, gap, **LARGE))
    assert text == (
        "<|repo_name|>myproject\n<|file_sep|>filename\n"
        "<s><|fim_prefix|>def f():\n    ret<|fim_suffix|>\nend<|fim_middle|>"
    )


def test_some_models_want_the_suffix_first(vocab: Vocab) -> None:
    gap = Infill(prefix="a", suffix="b")
    text = spelled(vocab, infill_tokens(vocab, gap, **{**LARGE, "suffix_first": True}))
    assert text.endswith("<s><|fim_suffix|>b<|fim_prefix|>a<|fim_middle|>")


def test_further_files_come_first(vocab: Vocab) -> None:
    files = (InfillFile(filename="one.h", text="int one;\n"), InfillFile(filename="two.h", text="int two;\n"))
    text = spelled(vocab, infill_tokens(vocab, Infill(prefix="a", suffix="b", extra=files), **LARGE))
    assert text.startswith(
        "<|repo_name|>myproject\n<|file_sep|>one.h\nint one;\n<|file_sep|>two.h\nint two;\n<|file_sep|>filename\n<s>"
    )


def test_texts_are_never_read_as_control_tokens(vocab: Vocab) -> None:
    gap = Infill(prefix="<|fim_middle|>", suffix="</s>")
    tokens = infill_tokens(vocab, gap, **LARGE)
    assert tokens.count(vocab.infill_token("mid")) == 1
    assert vocab.eos not in tokens


def test_what_is_farthest_from_the_gap_is_left_out(vocab: Vocab) -> None:
    numbers = "".join(f"{number:04d}" for number in range(1000))
    files = tuple(InfillFile(filename=f"{name}.c", text=numbers) for name in "ab")
    tokens = infill_tokens(vocab, Infill(prefix=numbers, suffix=numbers, extra=files), **LARGE)
    text = spelled(vocab, tokens)
    before, after = text.split("<|fim_prefix|>")[1].split("<|fim_suffix|>")
    assert before == numbers[-192:]
    assert after == numbers[: 64 - 2] + "<|fim_middle|>"
    assert "<|file_sep|>filename\n<s>" in text and "a.c" not in text
    assert len(tokens) < 1024


@pytest.mark.parametrize("n_ctx", [256, 300, 512])
@pytest.mark.parametrize("max_tokens", [-1, 0, 20, 10_000])
def test_it_always_fits_the_context(vocab: Vocab, n_ctx: int, max_tokens: int) -> None:
    text = "x" * 100_000
    gap = Infill(prefix=text, suffix=text, extra=(InfillFile(filename=text, text=text),))
    tokens = infill_tokens(vocab, gap, n_batch=256, n_ctx=n_ctx, max_tokens=max_tokens, suffix_first=False)
    assert len(tokens) < n_ctx


def test_the_engine_fills_gaps(engine: LlamaEngine) -> None:
    def ask(**fields: Any) -> list[int]:
        sampling = Sampling(temperature=0)
        engine.submit(Generate(request=1, max_tokens=8, ignore_eos=True, sampling=sampling, **fields))
        return drain(engine)[1].tokens

    gap = Infill(prefix="int main() {", suffix="}")
    prompt = infill_tokens(
        engine._need().model.vocab,  # pyright: ignore[reportPrivateUsage]
        gap,
        n_batch=1024,
        n_ctx=1024,
        max_tokens=8,
        suffix_first=False,
    )
    assert ask(infill=gap) == ask(prompt=tuple(prompt))
    with pytest.raises(RequestError, match="exactly one"):
        ask(infill=gap, prompt="a")


def test_a_model_without_the_tokens_says_which_are_missing() -> None:
    with loaded("random") as engine, pytest.raises(RequestError) as refusal:
        engine.submit(Generate(request=1, infill=Infill(prefix="a", suffix="b")))
    assert refusal.value.code == "unsupported_by_model"
    assert str(refusal.value) == (
        "Infill is not supported by this model: prefix token is missing. suffix token is missing. "
        "middle token is missing."
    )
    assert len(INFILL_TOKENS) == 5
