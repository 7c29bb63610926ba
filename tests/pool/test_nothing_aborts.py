"""What a model file or a setting does to llama.cpp fails its own load, with the reason, and ends no other worker.

Real workers, the real engine, a process for every load. What callers send is in ``test_hostile_requests.py``.
"""

import asyncio
import os
import random
import signal
from pathlib import Path
from typing import Any

import msgspec
import pytest

from herding import reach, run, until
from llamaherd.pool import EngineOptions, LoadFailed, ModelSpec, Pool, PoolError, State, WorkerDied
from llamaherd.transport.messages import Adapter
from tiny_gguf import tiny_model, write_mmproj, write_random_llama

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
        async with Pool([spec("mapped", path, n_ctx=2**16)]) as pool:
            generation = pool.complete("mapped", "abc", ignore_eos=True)
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


def test_every_file_that_is_no_model_says_so_and_crashes_nothing(tmp_path: Path) -> None:
    whole = tiny_model("random").read_bytes()
    files = {
        "empty": b"",
        "text": b"no model\n" * 100,
        "header": whole[:100],
        "tensors": whole[: len(whole) // 2],
        "architecture": whole.replace(b"llama", b"lhama", 1),
    }
    (tmp_path / "folder").mkdir()
    models = [spec("folder", tmp_path / "folder"), spec("missing", tmp_path / "missing")]
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        models.append(spec(name, tmp_path / name))

    async def scene() -> None:
        async with Pool(models, models_max=0) as pool:
            for one in models:
                with pytest.raises(LoadFailed) as caught:
                    await pool.load(one.name)
                assert (one.name, caught.value.exit_code) == (one.name, 3), "a failed load is no crash"
                assert "gave no reason" not in str(caught.value)

    run(scene(), 50)


def test_weights_that_are_no_numbers_fail_the_request_and_not_the_worker(tmp_path: Path) -> None:
    path = tmp_path / "nan.gguf"
    write_random_llama(path, poison=True)

    async def scene() -> None:
        async with Pool([spec("nan", path)]) as pool:
            pid = (await pool.load("nan")).pid
            for temperature in (0.0, 1.0):
                with pytest.raises(PoolError, match="not numbers"):
                    await pool.complete("nan", "abc", temperature=temperature).collect()
            assert pool.status("nan").pid == pid

    run(scene())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mmproj": "missing"}, "missing"),
        ({"mmproj": "random"}, "projector|mmproj"),
        ({"mmproj": "wide"}, "projector|mmproj|width|embd"),
        ({"lora": "missing"}, "missing"),
        ({"lora": "random"}, "adapter"),
        ({"lora": "mmproj"}, "adapter"),
    ],
)
def test_a_file_beside_the_model_that_does_not_fit_fails_the_load(
    fields: dict[str, str], message: str, tmp_path: Path
) -> None:
    ((kind, name),) = fields.items()
    write_mmproj(tmp_path / "wide", output=96)
    path = tmp_path / name if name in ("missing", "wide") else tiny_model(name)
    options = {"adapters": (Adapter(path=str(path)),)} if kind == "lora" else {}
    model = msgspec.structs.replace(tiny("random", **options), mmproj=path if kind == "mmproj" else None)

    async def scene() -> None:
        async with Pool([model]) as pool:
            with pytest.raises(LoadFailed, match=message) as caught:
                await pool.load("random")
            assert caught.value.exit_code == 3

    run(scene())


# --- settings ---


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("random", {"n_ctx": 2**31 - 512}, "set a smaller n_ctx"),
        ("random", {"n_ctx": -5}, "n_ctx is -5"),
        ("random", {"n_parallel": 257}, "n_parallel is 257"),
        ("random", {"n_cached": 255, "n_parallel": 4}, "n_cached is 255"),
        ("random", {"cache_type_v": "q8_0"}, "flash"),
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
