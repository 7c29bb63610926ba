"""Embeddings and scores on the real engine, with tiny models of every kind."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from engine_driver import GREEDY, collect, drain, loaded
from llamaherd.pool.child.engine import RequestError
from llamaherd.pool.child.llama_engine import LlamaEngine
from llamaherd.transport.messages import (
    Adapter,
    ChildMessage,
    Done,
    Embed,
    Failed,
    Generate,
    Prompt,
    Rerank,
    Result,
    Tokens,
    Usage,
    Vectors,
)
from tiny_gguf import tiny_model, write_random_llama

Floats = npt.NDArray[np.float32]

LONG = "the quick brown fox jumps over the lazy dog " * 10
TEXTS = ["hello world", "cat", "a", LONG, "hello world"]


class Answers:
    """What the requests of some steps got: rows per request and input, and the ends."""

    def __init__(self) -> None:
        self.rows: dict[tuple[int, int], list[Floats]] = {}
        self.ends: dict[int, ChildMessage] = {}
        self.messages = 0

    def take(self, messages: Sequence[ChildMessage]) -> None:
        for message in messages:
            match message:
                case Vectors(vectors=vectors):
                    self.messages += 1
                    for one in vectors:
                        rows = self.rows.setdefault((one.request, one.input), [])
                        assert sum(len(part) for part in rows) == one.row, "the rows come in order"
                        rows.append(np.frombuffer(one.data, "<f4").reshape(one.rows, -1))
                case Done() | Failed() | Result():
                    assert message.request is not None and message.request not in self.ends
                    self.ends[message.request] = message
                case Tokens():
                    pass
                case _:
                    raise AssertionError(f"a step does not say {message}")

    def matrix(self, request: int = 1, index: int = 0) -> Floats:
        return np.concatenate(self.rows[request, index])

    def vector(self, request: int = 1, index: int = 0) -> Floats:
        (row,) = self.matrix(request, index)
        vector: Floats = row
        return vector


def run(engine: LlamaEngine) -> Answers:
    answers = Answers()
    while engine.busy:
        answers.take(engine.step())
    return answers


def embed(engine: LlamaEngine, *inputs: Prompt, **fields: Any) -> list[Floats]:
    engine.submit(Embed(request=1, inputs=inputs, **fields))
    answers = run(engine)
    assert isinstance(answers.ends[1], Result), answers.ends
    return [answers.vector(index=index) for index in range(len(inputs))]


def rows_of(engine: LlamaEngine, prompt: Prompt) -> Floats:
    engine.submit(Embed(request=1, inputs=(prompt,)))
    return run(engine).matrix()


def close(one: Floats, other: Floats) -> bool:
    # A product's last digits depend on how many rows are computed together.
    return bool(np.abs(one - other).max() < 2e-4)


def unit(vector: Floats) -> Floats:
    return (vector / np.linalg.norm(vector)).astype(np.float32)


# --- what is computed ---


def test_equal_texts_have_equal_embeddings_of_length_one() -> None:
    with loaded("bert") as engine:
        vectors = embed(engine, *TEXTS)
    assert [vector.shape for vector in vectors] == [(64,)] * len(TEXTS)
    assert all(float(np.linalg.norm(vector)) == pytest.approx(1.0, abs=1e-5) for vector in vectors)
    assert close(vectors[0], vectors[4])
    assert float(vectors[0] @ vectors[1]) < 0.9


@pytest.mark.parametrize("model", ["random", "bert"])
@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_pooling_is_that_of_the_tokens_embeddings(model: str, pooling: str) -> None:
    with loaded(model, pooling="none") as engine:
        tokens = [rows_of(engine, text) for text in TEXTS]
    with loaded(model, pooling=pooling) as engine:
        vectors = embed(engine, *TEXTS, normalize=-1)
    for rows, vector in zip(tokens, vectors, strict=True):
        expected = {"mean": rows.mean(axis=0), "cls": rows[0], "last": rows[-1]}[pooling]
        assert close(vector, expected)


@pytest.mark.parametrize("pooling", ["none", "mean", "cls", "last"])
def test_an_input_computed_in_chunks_is_what_it_is_in_one(pooling: str) -> None:
    with loaded("random", pooling=pooling, n_ubatch=1024) as engine:
        engine.submit(Embed(request=1, inputs=(LONG, "cat")))
        whole = run(engine)
    with loaded("random", pooling=pooling, n_ubatch=24) as engine:
        engine.submit(Embed(request=1, inputs=(LONG, "cat")))
        chunked = run(engine)
    for index in (0, 1):
        assert close(whole.matrix(index=index), chunked.matrix(index=index))


@pytest.mark.parametrize(("model", "options"), [("mamba", {}), ("gemma2", {}), ("gemma2", {"swa_full": False})])
@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_recurrent_and_sliding_window_models_embed(model: str, options: dict[str, Any], pooling: str) -> None:
    with loaded(model, pooling=pooling, **options) as engine:
        together = embed(engine, *TEXTS)
        alone = [embed(engine, text)[0] for text in TEXTS]
    assert all(close(one, other) for one, other in zip(together, alone, strict=True))
    assert close(together[0], together[4])


def test_the_models_own_pooling_is_used_unless_an_option_says_otherwise() -> None:
    with loaded("random-mean") as engine:
        own = embed(engine, LONG)[0]
    with loaded("random", pooling="mean") as engine:
        assert close(own, embed(engine, LONG)[0])
    with loaded("random-last") as engine:
        assert not close(own, embed(engine, LONG)[0])
    with loaded("random-last", pooling="mean") as engine:
        assert close(own, embed(engine, LONG)[0])


def test_dimensions_cut_and_normalise_again() -> None:
    with loaded("bert") as engine:
        plain, cut = embed(engine, "cat", normalize=-1)[0], embed(engine, "cat", dimensions=8)[0]
        assert close(cut, unit(plain[:8]))
        assert close(embed(engine, "cat", normalize=1)[0], plain / np.abs(plain).sum())
        assert np.abs(embed(engine, "cat", normalize=0)[0]).max() == pytest.approx(32760)


def test_without_pooling_every_token_has_a_row_as_it_is() -> None:
    with loaded("random") as engine:
        rows = rows_of(engine, "cat dog")
        assert rows.shape == (7, 64)
        assert not np.allclose(np.linalg.norm(rows, axis=1), 1.0, atol=1e-2)
        assert close(rows, rows_of(engine, "cat dog"))


def test_token_ids_and_texts_may_be_mixed() -> None:
    with loaded("random-bos", pooling="mean") as engine:
        loaded_model = engine._need().model.vocab  # pyright: ignore[reportPrivateUsage]
        ids = loaded_model.tokenize("cat dog", add_special=True)
        cat, dog = loaded_model.tokenize("cat", add_special=True), loaded_model.tokenize("dog", add_special=False)
        as_text, as_ids = embed(engine, "cat dog", tuple(ids))
        assert close(as_text, as_ids)
        mixed, plain = embed(engine, ("cat", dog[0], "og"), tuple([*cat, *dog]))
        assert close(mixed, plain)


def test_a_reranker_scores_pairs_and_the_answer_counts_their_tokens() -> None:
    with loaded("rank") as engine:
        engine.submit(Rerank(request=1, query="cat", documents=("dog", "cat cat", "dog")))
        answers = run(engine)
    scores = [answers.vector(index=index) for index in range(3)]
    assert [score.shape for score in scores] == [(1,)] * 3
    assert close(scores[0], scores[2]) and not close(scores[0], scores[1])
    # [CLS] cat [SEP] [SEP] dog [SEP]: this vocabulary wants an end and a separator.
    assert answers.ends[1] == Result(request=1, usage=Usage(prompt_tokens=6 + 7 + 6))


# --- how it is shared ---


def test_many_inputs_share_a_step_and_a_message() -> None:
    with loaded("bert") as engine:
        engine.submit(Embed(request=1, inputs=("cat",) * 40))
        messages = engine.step()
        assert not engine.busy
    assert [type(message) for message in messages] == [Vectors, Result]


def test_more_inputs_than_a_step_holds_come_one_step_after_the_other() -> None:
    with loaded("bert", n_ubatch=8) as engine:
        engine.submit(Embed(request=1, inputs=("cat", "dog", "king") * 20))
        answers = run(engine)
    assert answers.messages > 10
    assert len(answers.rows) == 60
    assert close(answers.vector(index=0), answers.vector(index=57))


def test_a_small_request_does_not_wait_for_a_large_one() -> None:
    with loaded("bert", n_ubatch=8) as engine:
        engine.submit(Embed(request=1, inputs=("cat",) * 200))
        answers = Answers()
        answers.take(engine.step())
        engine.submit(Embed(request=2, inputs=("dog",)))
        answers.take(engine.step())
        answers.take(engine.step())
        assert isinstance(answers.ends[2], Result)
        assert 1 not in answers.ends
        while engine.busy:
            answers.take(engine.step())
    assert isinstance(answers.ends[1], Result)


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_embeddings_and_generations_leave_each_other_alone(pooling: str) -> None:
    with loaded("random", pooling=pooling) as engine:
        engine.submit(Generate(request=1, prompt="abc", sampling=GREEDY, max_tokens=40, ignore_eos=True))
        expected = drain(engine)[1].tokens
        vectors = embed(engine, *TEXTS)

        engine.submit(Generate(request=1, prompt="abc", sampling=GREEDY, max_tokens=40, ignore_eos=True))
        engine.submit(Embed(request=2, inputs=tuple(TEXTS)))
        generated: dict[int, Any] = {}
        answers = Answers()
        while engine.busy:
            step = engine.step()
            assert isinstance(step[0], Tokens) or 1 in generated and generated[1].done, "no step without a token"
            collect([m for m in step if isinstance(m, Tokens | Done)], generated)
            answers.take([m for m in step if not isinstance(m, Tokens | Done)])
    assert generated[1].tokens == expected
    assert all(close(vectors[index], answers.vector(2, index)) for index in range(len(TEXTS)))


def test_a_cancelled_request_ends_and_leaves_the_others() -> None:
    with loaded("random", pooling="mean", n_ubatch=16) as engine:
        alone = embed(engine, "cat")[0]
        engine.submit(Embed(request=1, inputs=(LONG, LONG)))
        engine.submit(Embed(request=2, inputs=("cat",)))
        answers = Answers()
        answers.take(engine.step())
        engine.cancel(1)
        engine.cancel(7)
        while engine.busy:
            answers.take(engine.step())
        assert answers.ends[1] == Done(request=1, finish_reason="cancelled")
        assert close(answers.vector(2), alone)
        assert (1, 0) not in answers.rows


def test_a_model_that_only_embeds_has_no_cache_for_generations() -> None:
    with loaded("random", pooling="last", embedding=True, n_ctx=4096) as engine:
        assert engine.figures.cells == 0
        assert engine._need().context.n_ctx == 256  # pyright: ignore[reportPrivateUsage]
        assert embed(engine, LONG)[0].shape == (64,)
        with pytest.raises(RequestError, match="embedding") as refusal:
            engine.submit(Generate(request=1, prompt="a"))
        assert refusal.value.code == "unsupported_by_model"


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_a_cache_that_is_divided_takes_inputs_as_long_as_one_that_is_not(pooling: str) -> None:
    long = LONG * 2
    with loaded("random", pooling=pooling, n_ctx=2048) as engine:
        expected = embed(engine, "cat", long, LONG)
    with loaded("random", pooling=pooling, n_ctx=2048, kv_unified=False) as engine:
        got = embed(engine, "cat", long, LONG)
    assert all(close(one, other) for one, other in zip(got, expected, strict=True))


def test_the_context_grows_with_the_inputs() -> None:
    with loaded("random", pooling="last", n_ctx=8192) as engine:
        ids = tuple(300 + index % 50 for index in range(5000))
        short, long, again = embed(engine, "cat", ids, "cat")
        assert close(short, again)
        assert close(embed(engine, ids)[0], long)


def test_it_sleeps_and_wakes() -> None:
    from engine_driver import load_command

    engine = LlamaEngine()
    command = load_command("bert")
    first = None
    for _ in range(3):
        engine.load(command, lambda _fraction: True)
        vector = embed(engine, "cat")[0]
        assert first is None or close(first, vector)
        first = vector
        engine.unload()


# --- what is refused ---


def refused(engine: LlamaEngine, command: Embed | Rerank) -> RequestError:
    with pytest.raises(RequestError) as refusal:
        engine.submit(command)
    assert not engine.busy
    return refusal.value


def test_an_input_longer_than_the_position_table_is_refused() -> None:
    with loaded("bert", n_ubatch=2048, n_batch=2048) as engine:
        error = refused(engine, Embed(request=1, inputs=("cat", "cat " * 600)))
        assert error.code == "context_length_exceeded"
        assert "input 1" in str(error) and "too large" in str(error) and "512 tokens" in str(error)
        assert embed(engine, "cat " * 510)[0].shape == (64,)


def test_an_input_longer_than_a_physical_batch_is_refused_by_encoders() -> None:
    with loaded("bert", n_ubatch=16) as engine:
        error = refused(engine, Embed(request=1, inputs=("cat " * 15,)))
        assert "--ubatch-size" in str(error)
        assert embed(engine, "cat " * 14)[0].shape == (64,)


def test_an_input_longer_than_the_context_is_refused() -> None:
    with loaded("random", pooling="mean", n_ctx=256) as engine:
        error = refused(engine, Embed(request=1, inputs=("cat " * 100,)))
        assert "--ctx-size" in str(error)
        assert "at least" in str(refused(engine, Embed(request=1, inputs=("x" * 10_000_000,))))
        assert embed(engine, "cat")[0].shape == (64,)


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"inputs": ("",)}, "empty_prompt"),
        ({"inputs": ((),)}, "empty_prompt"),
        ({"inputs": ((1, 512),)}, "invalid_token"),
        ({"inputs": ((-1,),)}, "invalid_token"),
        ({"inputs": ("a",), "dimensions": 65}, "invalid_dimensions"),
        ({"inputs": ("a",), "dimensions": -1}, "invalid_dimensions"),
        ({"inputs": ("a",), "normalize": -2}, "invalid_normalize"),
        ({"inputs": ("a",) * 5000}, "too_large"),
        ({"inputs": ("a",), "pooled": True}, "no_pooling"),
    ],
)
def test_a_request_that_cannot_be_served_is_refused_and_loses_nothing(fields: dict[str, Any], code: str) -> None:
    with loaded("random") as engine:
        assert refused(engine, Embed(request=1, **fields)).code == code
        assert rows_of(engine, "a").shape == (1, 64)


def test_a_model_does_what_its_pooling_is_for() -> None:
    with loaded("bert") as engine:
        assert "--pooling" in str(refused(engine, Rerank(request=1, query="a", documents=("b",))))
    with loaded("rank") as engine:
        assert "rerank" in str(refused(engine, Embed(request=1, inputs=("a",))))


def test_a_number_that_is_taken_is_refused() -> None:
    with loaded("bert") as engine:
        engine.submit(Embed(request=1, inputs=("cat",)))
        with pytest.raises(RequestError, match="running already"):
            engine.submit(Embed(request=1, inputs=("dog",)))
        with pytest.raises(RequestError, match="running already"):
            engine.submit(Generate(request=1, prompt="a"))
        run(engine)


@pytest.mark.parametrize("pooling", ["none", "mean", "last"])
def test_damaged_weights_fail_the_request_and_not_the_engine(tmp_path: Path, pooling: str) -> None:
    path = tmp_path / "nan.gguf"
    write_random_llama(path, blind=True)
    with loaded(path, pooling=pooling) as engine:
        for _ in range(2):
            engine.submit(Embed(request=1, inputs=("cat", "dog")))
            answers = run(engine)
            failed = answers.ends[1]
            assert isinstance(failed, Failed) and (failed.fault, failed.code) == ("model", "bad_embeddings")
            assert not answers.rows


def test_an_output_matrix_that_is_damaged_harms_no_embedding(tmp_path: Path) -> None:
    path = tmp_path / "nan.gguf"
    write_random_llama(path, poison=True, pooling="LAST")
    with loaded(path) as engine:
        assert np.isfinite(embed(engine, "cat")[0]).all()


@pytest.mark.parametrize("model", ["bert", "random-mean"])
def test_an_absurd_physical_batch_is_cut_to_what_can_be_used(model: str) -> None:
    with loaded(model, n_ubatch=2**30, n_batch=2**30) as engine:
        assert embed(engine, "cat")[0].shape == (64,)


def test_no_inputs_are_done_at_once() -> None:
    with loaded("bert") as engine:
        engine.submit(Embed(request=1, inputs=()))
        assert isinstance(run(engine).ends[1], Result)


def test_adapters_change_embeddings_with_their_default_scales() -> None:
    with loaded("random", pooling="mean") as engine:
        plain = embed(engine, "cat")[0]
    with loaded("random", pooling="mean", adapters=(Adapter(path=str(tiny_model("lora"))),)) as engine:
        changed = embed(engine, "cat")[0]
        assert not np.allclose(changed, plain, atol=1e-2)
        engine.set_scales([0.0])
        assert close(embed(engine, "cat")[0], plain)
        engine.set_scales([1.0])
        assert close(embed(engine, "cat")[0], changed)
