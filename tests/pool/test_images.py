"""Images through the pool: in the queue with texts, after sleep, and refused without harm."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from herding import TRANSPORTS, reach, run
from llamaherd.pool import BadRequest, EngineOptions, LoadFailed, ModelSpec, Pool, State, SyncPool
from llamaherd.pool.memory import expected_memory
from pictures import BLUE, RED, image_part
from tiny_gguf import tiny_model

ASK: dict[str, Any] = {"temperature": 0, "max_tokens": 8, "ignore_eos": True}
OPTIONS = EngineOptions(n_ctx=1024, n_threads=1, n_parallel=4, flash_attn="off")


def spec(name: str = "m", *, mmproj: Path | None = None, **more: Any) -> ModelSpec:
    return ModelSpec(
        name=name, path=tiny_model("random"), mmproj=mmproj or tiny_model("mmproj"), options=OPTIONS, **more
    )


def show(*images: bytes) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [*map(image_part, images), {"type": "text", "text": "what is this?"}]}]


async def tokens(pool: Pool, messages: list[dict[str, Any]], **params: Any) -> tuple[int, ...]:
    return (await pool.chat("m", messages, **{**ASK, **params}).collect()).tokens


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_images_and_texts_are_answered_side_by_side(transport: str) -> None:
    async def main() -> None:
        text = [{"role": "user", "content": "what is this?"}]
        async with Pool([spec()], transport=transport) as pool:
            expected = [await tokens(pool, chat, cache_prompt=False) for chat in (show(RED), show(BLUE), text)]
            together = await asyncio.gather(*(tokens(pool, chat) for chat in (show(RED), show(BLUE), text)))
            assert list(together) == expected
            assert len(set(expected)) == 3

    run(main())


def test_an_image_that_comes_again_is_counted_as_cached() -> None:
    async def main() -> None:
        async with Pool([spec()]) as pool:
            first, again, other = [await pool.chat("m", show(image), **ASK).collect() for image in (RED, RED, BLUE)]
            assert first.usage.cached_tokens == 0
            assert again.usage.cached_tokens == first.usage.prompt_tokens - 1
            assert other.usage.cached_tokens < 32

    run(main())


def test_a_model_sees_after_sleep_and_after_a_new_load() -> None:
    async def main() -> None:
        async with Pool([spec()]) as pool:
            expected = await tokens(pool, show(RED))
            pool.start_sleep("m")
            await reach(pool, "m", State.SLEEPING)
            assert await tokens(pool, show(RED)) == expected
            await pool.unload("m")
            assert await tokens(pool, show(RED)) == expected

    run(main())


def test_what_a_model_takes_in_is_known_before_it_is_loaded() -> None:
    async def main() -> None:
        blind = ModelSpec(name="blind", path=tiny_model("random"), options=OPTIONS)
        async with Pool([spec(), blind, spec("gone", mmproj=Path("/nowhere.gguf"))]) as pool:
            assert [status.modalities for status in pool.models()] == [("text", "image"), ("text",), ("text",)]
            info = (await pool.load("m")).info or {}
            assert info["architecture"]["input_modalities"] == ["text", "image"]
            with pytest.raises(LoadFailed, match="nowhere.gguf does not exist"):
                await pool.load("gone")

    run(main())


def test_a_projector_that_comes_later_is_noticed(tmp_path: Path) -> None:
    async def main() -> None:
        late = tmp_path / "late.gguf"
        async with Pool([spec(mmproj=late)]) as pool:
            assert pool.status("m").modalities == ("text",)
            late.write_bytes(tiny_model("ear").read_bytes())
            assert pool.status("m").modalities == ("text", "audio")

    run(main())


def test_bad_images_are_their_callers_error_and_harm_nobody() -> None:
    async def main() -> None:
        blind = ModelSpec(name="blind", path=tiny_model("random"), options=OPTIONS)
        async with Pool([spec(), blind]) as pool:
            expected = await tokens(pool, show(RED))
            for bad in (RED[:70], b"nothing"):
                with pytest.raises(BadRequest):
                    await tokens(pool, show(bad))
            with pytest.raises(BadRequest, match="nothing is fetched"):
                url = {"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/x.png"}}
                await tokens(pool, [{"role": "user", "content": [url]}])
            with pytest.raises(BadRequest, match="mmproj"):
                await pool.chat("blind", show(RED), **ASK).collect()
            with pytest.raises(BadRequest, match="is no text"):
                await pool.apply_template("m", show(RED))
            assert await tokens(pool, show(RED)) == expected
            assert pool.status("m").exit_code is None

    run(main())


def test_a_projector_counts_in_what_a_model_is_expected_to_take() -> None:
    blind = ModelSpec(name="blind", path=tiny_model("random"), options=OPTIONS)
    assert expected_memory(spec()) - expected_memory(blind) == tiny_model("mmproj").stat().st_size


def test_the_pool_without_async_takes_images_too() -> None:
    with SyncPool([spec()]) as pool:
        red, blue = (pool.chat("m", show(image), **ASK).collect().tokens for image in (RED, BLUE))
    assert red != blue
