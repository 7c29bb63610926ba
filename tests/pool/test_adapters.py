"""LoRA adapters through the pool: listed, scaled for everyone or for one request, and never forgotten."""

import asyncio
import inspect
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from herding import TRANSPORTS, reach, run, until
from llamaherd.pool import (
    Adapter,
    AdapterStatus,
    BadRequest,
    EngineOptions,
    LoadFailed,
    ModelNotFound,
    ModelSpec,
    Pool,
    State,
    SyncPool,
)
from llamaherd.pool.memory import expected_memory
from tiny_gguf import tiny_model

LORA = str(tiny_model("lora"))
ASK: dict[str, Any] = {"temperature": 0, "max_tokens": 8, "ignore_eos": True}
ON = [{"id": 0, "scale": 1.0}]
OFF = [{"id": 0, "scale": 0.0}]


def spec(*adapters: Adapter, name: str = "m", **more: Any) -> ModelSpec:
    options = EngineOptions(n_ctx=512, n_threads=1, n_parallel=2, flash_attn="off", adapters=adapters)
    return ModelSpec(name=name, path=tiny_model("random"), options=options, **more)


async def tokens(pool: Pool, **params: Any) -> tuple[int, ...]:
    return (await pool.complete("m", "hello there", **{**ASK, **params}).collect()).tokens


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_request_chooses_its_adapters(transport: str) -> None:
    async def main() -> None:
        async with Pool([spec(Adapter(path=LORA))], transport=transport) as pool:
            on, off, half = [await tokens(pool, lora=lora) for lora in (ON, OFF, [{"id": 0, "scale": 0.5}])]
            together = await asyncio.gather(*(tokens(pool, lora=lora) for lora in (ON, OFF)))
            assert len({on, off, half}) == 3
            assert together == [on, off]
            assert await tokens(pool) == await tokens(pool, lora=[]) == on, "the adapter's own scale is 1"

    run(main())


def test_the_adapters_of_a_model_are_listed_without_loading_it() -> None:
    async def main() -> None:
        async with Pool([spec(Adapter(path=LORA), Adapter(path=LORA, scale=0.0)), spec(name="bare")]) as pool:
            assert await pool.adapters("m") == [
                AdapterStatus(id=0, path=LORA, scale=1.0, task_name="nonsense"),
                AdapterStatus(id=1, path=LORA, scale=0.0, task_name="nonsense"),
            ]
            assert await pool.adapters("bare") == []
            assert pool.status("m").state is State.UNLOADED
            with pytest.raises(ModelNotFound):
                await pool.adapters("nobody")

    run(main())


def test_scales_hold_for_everyone_and_outlive_sleep_and_unloading() -> None:
    async def main() -> None:
        async with Pool([spec(Adapter(path=LORA, scale=0.0))]) as pool:
            pool.set_adapters("m", ON)
            on, off = await tokens(pool), await tokens(pool, lora=OFF)
            assert on != off
            pool.set_adapters("m", [])
            assert await tokens(pool) == off, "what is not named is off"
            pool.set_adapters("m", ON)
            pool.start_sleep("m")
            await reach(pool, "m", State.SLEEPING)
            assert await tokens(pool) == on
            await pool.unload("m")
            assert await tokens(pool) == on
            assert [adapter.scale for adapter in await pool.adapters("m")] == [1.0]

    run(main())


def test_scales_that_are_set_in_its_sleep_or_while_it_loads_hold_too() -> None:
    async def main() -> None:
        async with Pool([spec(Adapter(path=LORA, scale=0.0))]) as pool:
            pool.start_load("m")
            pool.set_adapters("m", ON)
            on = await tokens(pool)
            assert on != await tokens(pool, lora=OFF)
            pool.start_sleep("m")
            await reach(pool, "m", State.SLEEPING)
            pool.set_adapters("m", OFF)
            assert await tokens(pool) == await tokens(pool, lora=OFF) != on

    run(main())


def test_a_worker_that_dies_forgets_no_scale() -> None:
    async def main() -> None:
        async with Pool([spec(Adapter(path=LORA, scale=0.0))]) as pool:
            pool.set_adapters("m", ON)
            on = await tokens(pool)
            pid = pool.status("m").pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            await until(lambda: pool.status("m").state is State.UNLOADED)
            assert await tokens(pool) == on

    run(main())


@pytest.mark.parametrize(
    ("lora", "reason"),
    [
        ("on", "must be a list of objects"),
        ([1], "must be a list of objects"),
        ({"id": 0, "scale": 1}, "must be a list of objects"),
        ([{"scale": 1}], "id must be an integer"),
        ([{"id": -1, "scale": 1}], "id must be an integer"),
        ([{"id": True, "scale": 1}], "id must be an integer"),
        ([{"id": 2**40, "scale": 1}], "id must be an integer"),
        ([{"id": 0}], "scale must be a number"),
        ([{"id": 0, "scale": "1"}], "scale must be a number"),
        ([{"id": 0, "scale": float("nan")}], "scale must be a number"),
        ([{"id": 0, "scale": 10**400}], "scale must be a number"),
        ([{"id": 1, "scale": 1}], "there is no adapter 1, the model has 1"),
    ],
)
def test_a_wish_that_cannot_be_had_is_refused(lora: Any, reason: str) -> None:
    async def main() -> None:
        async with Pool([spec(Adapter(path=LORA))]) as pool:
            with pytest.raises(BadRequest, match=reason):
                pool.set_adapters("m", lora)
            with pytest.raises(BadRequest, match=reason):
                await tokens(pool, lora=lora)
            assert [adapter.scale for adapter in await pool.adapters("m")] == [1.0]

    run(main())


def test_a_missing_adapter_fails_the_load_and_says_so(tmp_path: Path) -> None:
    async def main() -> None:
        async with Pool([spec(Adapter(path=str(tmp_path / "gone.gguf")))]) as pool:
            with pytest.raises(LoadFailed, match="gone.gguf does not exist"):
                await pool.load("m")
            assert (await pool.adapters("m"))[0].task_name == ""

    run(main())


def test_a_spec_with_an_impossible_scale_is_refused() -> None:
    with pytest.raises(BadRequest, match="scale of x.gguf must be"):
        Pool([spec(Adapter(path="x.gguf", scale=float("nan")))])


def test_what_adapters_take_counts_before_the_load() -> None:
    size = Path(LORA).stat().st_size
    assert expected_memory(spec(Adapter(path=LORA))) - expected_memory(spec()) == size


def test_the_pool_without_async_has_the_same() -> None:
    with SyncPool([spec(Adapter(path=LORA, scale=0.0))]) as pool:
        off = pool.complete("m", "hello there", **ASK).collect().tokens
        pool.set_adapters("m", ON)
        assert pool.complete("m", "hello there", **ASK).collect().tokens != off
        assert [adapter.scale for adapter in pool.adapters("m")] == [1.0]
    assert not inspect.iscoroutinefunction(SyncPool.adapters)
