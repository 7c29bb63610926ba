"""Embeddings and scores through the pool: real workers, over every transport, and nothing lost when something fails."""

import asyncio
import math
from typing import Any

import numpy as np
import pytest

from herding import TRANSPORTS, fake, run, until
from llamaherd.pool import BadRequest, EngineOptions, ModelNotFound, ModelSpec, Pool, SyncPool, WorkerDied, embeddings
from llamaherd.pool.embeddings import BATCH_INPUTS, BATCH_SIZE, Embedding, batches, pipelined
from llamaherd.pool.machine import available_memory
from tiny_gguf import tiny_model


def tiny(name: str, **options: Any) -> ModelSpec:
    settings: dict[str, Any] = {"n_ctx": 1024, "n_threads": 1, "flash_attn": "off", **options}
    return ModelSpec(name=name, path=tiny_model(name), options=EngineOptions(**settings))


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_model_embeds_over_every_transport(transport: str) -> None:
    async def scene() -> None:
        async with Pool([tiny("bert")], transport=transport) as pool:
            result = await pool.embed("bert", ["hello world", "cat", "hello world"])
            assert (result.model, len(result), len(result[0]), result[0].rows) == ("bert", 3, 64, 1)
            assert math.dist(result[0].values, result[2].values) < 1e-5 < math.dist(result[0].values, result[1].values)
            assert math.dist(result[0].values, [0.0] * 64) == pytest.approx(1.0, abs=1e-5)
            counts = [len(await pool.tokenize("bert", text, add_special=True)) for text in ("hello world", "cat")]
            assert result.usage.prompt_tokens == 2 * counts[0] + counts[1]
            assert pool.status("bert").in_flight == 0

    run(scene())


def test_token_vectors_come_row_by_row() -> None:
    async def scene() -> None:
        async with Pool([tiny("random")]) as pool:
            (item,) = await pool.embed("random", ["cat"])
            assert (item.rows, len(item), len(item.values)) == (3, 64, 192)
            assert np.frombuffer(item.data, "<f4").reshape(3, 64).tolist() == item.vectors
            with pytest.raises(BadRequest, match="--pooling"):
                await pool.embed("random", ["cat"], pooled=True)

    run(scene())


def test_the_vectors_of_all_tokens_take_no_more_than_a_part_of_the_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    # As much as if the machine had little memory: some 200 vectors of 64 numbers.
    monkeypatch.setattr(embeddings, "ROWS_SHARE", 200 * 64 * 4 / (available_memory() or 1))

    async def scene() -> None:
        async with Pool([tiny("random"), tiny("bert")]) as pool:
            assert [item.rows for item in await pool.embed("random", ["catcat", "dogdog"])] == [6, 6]
            with pytest.raises(BadRequest, match="pooling none") as caught:
                await pool.embed("random", ["cat" * 300] * 3)
            assert caught.value.code == "too_large"
            await until(lambda: pool.status("random").in_flight == 0)
            assert len(await pool.embed("random", ["catcat"])) == 1
            assert len(await pool.embed("bert", ["cat"] * 100)) == 100, "one for each input counts as nothing"

    run(scene())


def test_documents_are_ranked() -> None:
    async def scene() -> None:
        async with Pool([tiny("rank")]) as pool:
            ranking = await pool.rerank("rank", "cat", ["dog", "cat", "king dog"])
            assert ranking.order == sorted(range(3), key=lambda index: -ranking.scores[index])
            assert len(set(ranking.scores)) == 3
            assert ranking.usage.prompt_tokens == 6 + 6 + 7
            with pytest.raises(BadRequest, match="rerank"):
                await pool.embed("rank", ["cat"])

    run(scene())


def test_thousands_of_inputs_keep_their_order() -> None:
    async def scene() -> None:
        async with Pool([fake("m")]) as pool:
            texts = [chr(33 + index % 90) * (1 + index % 700) for index in range(3000)]
            result = await pool.embed("m", texts)
            assert [item.values for item in result] == [[len(t), ord(t[0]), ord(t[0])] for t in texts]
            assert result.usage.prompt_tokens == 3000
            ranking = await pool.rerank("m", "q", texts)
            assert list(ranking.scores) == [len(text) for text in texts]

    run(scene())


def test_many_callers_at_once_each_get_their_own() -> None:
    async def scene() -> None:
        async with Pool([tiny("bert")]) as pool:
            words = ["cat", "dog", "king", "queen", "hello", "world"]
            alone = {word: (await pool.embed("bert", [word]))[0].values for word in words}
            results = await asyncio.gather(*(pool.embed("bert", [word] * 100) for word in words * 4))
            for word, result in zip(words * 4, results, strict=True):
                assert all(math.dist(item.values, alone[word]) < 1e-4 for item in result)

    run(scene(), 40)


def test_a_generation_goes_on_beside_embeddings() -> None:
    async def scene() -> None:
        async with Pool([tiny("random", pooling="mean")]) as pool:
            question: dict[str, Any] = {"max_tokens": 200, "temperature": 0, "ignore_eos": True}
            alone = await pool.complete("random", "abc", **question).collect()
            generation = pool.complete("random", "abc", **question)
            work = asyncio.gather(*(pool.embed("random", ["cat " * 50] * 20) for _ in range(4)))
            beside = await generation.collect()
            assert beside.tokens == alone.tokens
            assert [len(result) for result in await work] == [20] * 4

    run(scene(), 40)


def test_a_caller_that_leaves_frees_the_worker() -> None:
    async def scene() -> None:
        async with Pool([tiny("random", pooling="mean", n_ubatch=16)]) as pool:
            await pool.load("random")
            work = asyncio.ensure_future(pool.embed("random", ["cat " * 200] * 500))
            await until(lambda: pool.status("random").in_flight > 0)
            work.cancel()
            await asyncio.wait([work])
            assert work.cancelled()
            await until(lambda: pool.status("random").in_flight == 0)
            assert len(await pool.embed("random", ["cat"])) == 1

    run(scene())


@pytest.mark.parametrize(
    ("inputs", "fields", "message"),
    [
        ([], {}, "non-empty"),
        ("cat", {}, "non-empty"),
        ([1], {}, "an input must be"),
        ([[1.5]], {}, "token ids"),
        ([[-1]], {}, "token ids"),
        (["\ud800"], {}, "surrogate"),
        (["a"], {"dimensions": 0}, "dimensions"),
        (["a"], {"dimensions": 65}, "have 64"),
        (["a"], {"dimensions": True}, "dimensions"),
        (["a"], {"normalize": -2}, "normalize"),
        (["a"], {"normalize": 2**31}, "normalize"),
        (["a"], {"keep_alive": math.nan}, "keep_alive"),
        (["a", "cat " * 600], {}, "too large"),
        ([""] * 3 + ["a" * 70_000_000], {}, "bytes"),
        ([[10**6]], {}, "vocabulary"),
    ],
)
def test_bad_input_is_its_callers_error_and_nobody_elses(inputs: Any, fields: dict[str, Any], message: str) -> None:
    async def scene() -> None:
        async with Pool([tiny("bert")]) as pool:
            with pytest.raises(BadRequest, match=message):
                await pool.embed("bert", inputs, **fields)
            pid = pool.status("bert").pid
            assert len(await pool.embed("bert", ["cat"])) == 1
            assert pid in (None, pool.status("bert").pid)

    run(scene())


def test_bad_documents_are_refused() -> None:
    async def scene() -> None:
        async with Pool([tiny("rank")]) as pool:
            for documents in ([], "cat", [1], None):
                with pytest.raises(BadRequest):
                    await pool.rerank("rank", "cat", documents)  # type: ignore[arg-type] # pyright: ignore
            with pytest.raises(BadRequest, match="document 1"):
                await pool.rerank("rank", "cat", ["dog", "cat " * 600])
            with pytest.raises(ModelNotFound):
                await pool.rerank("other", "cat", ["dog"])

    run(scene())


def test_a_worker_that_dies_gives_the_work_to_a_second_one_and_then_up() -> None:
    async def scene() -> None:
        async with Pool([fake("m", crash_at=0, crash="kill")]) as pool:
            await pool.load("m")
            doomed = pool.complete("m", "a b c")
            with pytest.raises(WorkerDied):
                await asyncio.gather(doomed.collect(), pool.embed("m", ["x"] * 10))
            assert (await pool.embed("m", ["xyz"]))[0].values[0] == 3

    run(scene())


def test_the_pool_without_async_does_the_same() -> None:
    with SyncPool([tiny("bert"), tiny("rank")]) as pool:
        assert len(pool.embed("bert", ["cat", "dog"], dimensions=8)[1]) == 8
        assert len(pool.rerank("rank", "cat", ["dog", "king"]).scores) == 2


# --- pieces ---


def test_batches_are_bounded_in_number_and_in_size() -> None:
    assert [len(batch) for batch in batches(["a"] * 150, len)] == [BATCH_INPUTS, BATCH_INPUTS, 22]
    sizes = [BATCH_SIZE - 1, 1, 1, 5 * BATCH_SIZE, 2]
    assert list(batches(sizes, lambda size: size)) == [(BATCH_SIZE - 1, 1), (1,), (5 * BATCH_SIZE,), (2,)]
    assert list(batches([], len)) == []


def test_a_pipeline_runs_two_at_a_time_and_a_failure_cancels_the_rest() -> None:
    async def scene() -> None:
        running: set[int] = set()
        most = 0

        async def work(item: int) -> int:
            nonlocal most
            running.add(item)
            most = max(most, len(running))
            try:
                await asyncio.sleep(0)
                if item == 5:
                    raise ValueError("five")
                return item * item
            finally:
                running.discard(item)

        assert await pipelined(range(5), work) == [0, 1, 4, 9, 16]
        assert most == 2
        with pytest.raises(ValueError, match="five"):
            await pipelined(range(10), work)
        assert not running

    run(scene())


def test_an_embedding_reads_as_numbers() -> None:
    item = Embedding(data=np.arange(6, dtype="<f4").tobytes(), rows=2)
    assert (len(item), item.values, item.vectors) == (3, [0, 1, 2, 3, 4, 5], [[0, 1, 2], [3, 4, 5]])
