"""Nothing that a caller sends ends a worker, and what a model file does to llama.cpp ends its own, with the reason.

Real workers, the real engine. Every test here would have ended its process if something were not checked in time.
"""

import asyncio
import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest

from herding import reach, run, until
from llamaherd.pool import BadRequest, EngineOptions, LoadFailed, ModelSpec, Pool, PoolError, State, WorkerDied
from tiny_gguf import tiny_model, write_random_llama

SMALL: dict[str, Any] = {"n_ctx": 512, "n_threads": 1, "flash_attn": "off"}


def spec(name: str, path: Path, **options: Any) -> ModelSpec:
    return ModelSpec(name=name, path=path, options=EngineOptions(**{**SMALL, **options}))


def tiny(name: str, **options: Any) -> ModelSpec:
    return spec(name, tiny_model(name), **options)


# --- model files ---


def test_an_assertion_of_llama_cpp_is_the_reason_of_the_failed_load(tmp_path: Path) -> None:
    path = tmp_path / "twice.gguf"
    write_random_llama(path, duplicate=True)

    async def scene() -> None:
        async with Pool([spec("twice", path), tiny("random")]) as pool:
            await pool.load("random")
            with pytest.raises(LoadFailed, match=r"SIGABRT: llama-vocab\.cpp:\d+: GGML_ASSERT\(") as caught:
                await pool.load("twice")
            assert caught.value.exit_code == -signal.SIGABRT
            assert not caught.value.retry
            # Without a debugger's lines, which would take half a second to make.
            assert "GGML_ASSERT" in caught.value.log[-1]
            assert (await pool.complete("random", "a", max_tokens=1).collect()).usage.completion_tokens == 1

    run(scene())


def test_a_file_with_any_bytes_changed_costs_at_most_its_own_worker(tmp_path: Path) -> None:
    source, dice = bytearray(tiny_model("random").read_bytes()), random.Random(7)
    models: list[ModelSpec] = []
    for number in range(16):
        damaged = bytearray(source)
        # The header, the keys and the list of tensors; what follows are numbers.
        for _ in range(dice.choice((1, 3, 30))):
            damaged[dice.randrange(4, 26_000)] = dice.randrange(256)
        path = tmp_path / f"{number}.gguf"
        path.write_bytes(damaged)
        models.append(spec(str(number), path))

    async def outcome(pool: Pool, model: str) -> bool:
        try:
            await pool.load(model)
        except LoadFailed as error:
            assert str(error)
            assert "gave no reason" not in str(error)
            return False
        try:
            await pool.complete(model, "abc", max_tokens=3).collect()
        except PoolError as error:
            assert str(error)
        return True

    async def scene() -> None:
        async with Pool([*models, tiny("random")], models_max=0) as pool:
            await pool.load("random")
            pid = pool.status("random").pid
            loaded = await asyncio.gather(*(outcome(pool, one.name) for one in models))
            assert not all(loaded)
            assert len((await pool.complete("random", "abc", max_tokens=3, ignore_eos=True).collect()).tokens) == 3
            assert pool.status("random").pid == pid

    run(scene(), 50)


def test_a_file_that_is_cut_short_while_it_is_mapped_names_the_cause(tmp_path: Path) -> None:
    path = tmp_path / "mapped.gguf"
    path.write_bytes(tiny_model("random").read_bytes())

    async def scene() -> None:
        async with Pool([spec("mapped", path)]) as pool:
            generation = pool.complete("mapped", "abc", ignore_eos=True, max_tokens=500)
            await anext(generation)
            os.truncate(path, 4096)
            with pytest.raises(WorkerDied, match="SIGBUS.*--no-mmap"):
                await generation.collect()
            with pytest.raises(LoadFailed, match="failed to read"):
                await pool.load("mapped")

    run(scene())


def test_a_file_that_is_replaced_by_renaming_is_no_trouble(tmp_path: Path) -> None:
    path, other = tmp_path / "m.gguf", tmp_path / "new.gguf"
    path.write_bytes(tiny_model("random").read_bytes())
    other.write_bytes(b"something else")

    async def scene() -> None:
        async with Pool([spec("m", path)]) as pool:
            before = await pool.complete("m", "abc", max_tokens=5, temperature=0, ignore_eos=True).collect()
            other.rename(path)
            after = await pool.complete("m", "abd", max_tokens=5, temperature=0, ignore_eos=True).collect()
            assert len(before.tokens) == len(after.tokens) == 5

    run(scene())


# --- settings ---


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("random", {"n_ctx": 2**31 - 512}, "set a smaller n_ctx"),
        ("random", {"n_ctx": -5}, "n_ctx is -5"),
        ("random", {"n_parallel": 257}, "n_parallel is 257"),
        ("random", {"n_cached": 255, "n_parallel": 4}, "n_cached is 255"),
        ("random", {"n_batch": 0}, "n_batch is 0"),
        ("random", {"n_ubatch": 0}, "n_ubatch is 0"),
        ("random", {"n_threads": 100_000}, "n_threads is 100000"),
        ("bert", {"n_ubatch": -1}, "n_ubatch is -1"),
        ("bert", {"n_ctx": 2**32}, "n_ctx is"),
    ],
)
def test_a_setting_out_of_range_fails_the_load_by_its_name(model: str, options: dict[str, Any], message: str) -> None:
    async def scene() -> None:
        async with Pool([tiny(model, **options)]) as pool:
            with pytest.raises(LoadFailed, match=message) as caught:
                await pool.load(model)
            assert caught.value.exit_code == 3, "a failed load is no crash"

    run(scene())


# --- requests ---

LONG = "x" * 600
HOSTILE: list[tuple[str, dict[str, Any]]] = [
    ("complete", {"prompt": ""}),
    ("complete", {"prompt": []}),
    ("complete", {"prompt": [512]}),
    ("complete", {"prompt": [2**31 - 1]}),
    ("complete", {"prompt": [-1]}),
    ("complete", {"prompt": ["a", 512]}),
    ("complete", {"prompt": LONG}),
    ("complete", {"prompt": "x" * 5_000_000}),
    ("complete", {"prompt": [1] * 512}),
    ("complete", {"prompt": "a", "n_probs": 10**6}),
    ("complete", {"prompt": "a", "logit_bias": [[512, 1.0]]}),
    ("complete", {"prompt": "a", "logit_bias": [[-1, 1.0]]}),
    ("complete", {"prompt": "a", "max_tokens": -2}),
    ("complete", {"prompt": "a", "temperature": float("nan")}),
    ("complete", {"prompt": "a", "temperature": float("inf")}),
    ("complete", {"prompt": "a", "top_k": 2**40}),
    ("complete", {"prompt": "a", "repeat_last_n": 2**31}),
    ("complete", {"prompt": "a", "dry_multiplier": 1.0, "dry_sequence_breakers": ["\ud800"]}),
    ("complete", {"prompt": "a", "samplers": ["nonsense"]}),
    ("complete", {"prompt": "a", "mirostat": 3}),
    ("complete", {"prompt": "a", "lora": [{"id": 0, "scale": 1.0}]}),
    ("infill", {"prefix": "a", "suffix": "b"}),
    ("embed", {"inputs": [""]}),
    ("embed", {"inputs": [LONG]}),
    ("embed", {"inputs": ["a", [512]]}),
    ("embed", {"inputs": ["a"], "dimensions": 65}),
    ("rerank", {"query": "a", "documents": ["b"]}),
    ("detokenize", {"tokens": [512]}),
    ("tokenize", {"text": [512]}),
]


def test_no_request_ends_a_worker_nor_disturbs_another() -> None:
    async def send(pool: Pool, method: str, arguments: dict[str, Any]) -> None:
        work = getattr(pool, method)("random", **arguments)
        await (work.collect() if method in ("complete", "infill") else work)

    async def scene() -> None:
        async with Pool([tiny("random", pooling="mean")]) as pool:
            question: dict[str, Any] = {"max_tokens": 300, "temperature": 0, "ignore_eos": True}
            expected = await pool.complete("random", "abc", **question).collect()
            pid = pool.status("random").pid
            generation = pool.complete("random", "abc", **question)
            for method, arguments in HOSTILE:
                with pytest.raises(BadRequest):
                    await send(pool, method, arguments)
            assert (await generation.collect()).tokens == expected.tokens
            assert pool.status("random").pid == pid

    run(scene(), 50)


@pytest.mark.parametrize("model", ["bert", "rank", "mamba", "gemma2"])
def test_no_request_ends_a_worker_with_another_kind_of_model(model: str) -> None:
    async def scene() -> None:
        async with Pool([tiny(model, n_ubatch=32)]) as pool:
            await pool.load(model)
            pid = pool.status(model).pid
            works: list[Any] = [
                pool.complete(model, LONG).collect(),
                pool.complete(model, [10**6]).collect(),
                pool.embed(model, ["cat " * 40 if model in ("bert", "rank") else LONG]),
                pool.embed(model, [[10**6]]),
                pool.rerank(model, "cat", ["cat " * 300]),
                pool.infill(model, "a", "b").collect(),
            ]
            results = await asyncio.gather(*works, return_exceptions=True)
            assert [type(result) for result in results] == [BadRequest] * len(works)
            assert len(await pool.tokenize(model, "cat")) > 0
            assert pool.status(model).pid == pid

    run(scene())


# --- the end ---


@pytest.mark.parametrize("work", ["generation", "embeddings"])
def test_a_worker_that_is_stopped_in_the_middle_of_a_decode_leaves_in_order(work: str) -> None:
    async def scene() -> None:
        async with Pool([tiny("random", pooling="mean", n_ubatch=16)]) as pool:
            await pool.load("random")
            if work == "generation":
                task = asyncio.ensure_future(pool.complete("random", "abc", ignore_eos=True).collect())
            else:
                task = asyncio.ensure_future(pool.embed("random", ["cat " * 100] * 1000))  # type: ignore[arg-type] # pyright: ignore
            await until(lambda: pool.status("random").in_flight > 0)
            await pool.unload("random")
            with pytest.raises(PoolError):
                await task
            await reach(pool, "random", State.UNLOADED)
            assert pool.status("random").exit_code == 0

    run(scene())
