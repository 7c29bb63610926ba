"""Greedy answers through the pool do not depend on the company: alone, in a batch, with a shared or a resident prefix,
preempted and resumed, a request gets the same tokens.

Weights and cache are of 32-bit floats and flash attention is off: everything else rounds by the shape of a batch.
"""

import asyncio
from typing import Any

import pytest

from herding import run, until
from llamaherd.pool import Completion, EngineOptions, ModelSpec, Pool
from tiny_gguf import tiny_model

PREFIX = "the quick brown fox jumps over the lazy dog and "
PROMPTS = [PREFIX * 2 + end for end in ("runs", "sleeps", "eats a mouse", "is")]


def spec(model: str, **options: Any) -> ModelSpec:
    plain: dict[str, Any] = {"n_threads": 1, "flash_attn": "off", "cache_type_k": "f32", "cache_type_v": "f32"}
    return ModelSpec(name="m", path=tiny_model(model), options=EngineOptions(**{**plain, **options}))


async def ask(pool: Pool, prompt: str, **params: Any) -> Completion:
    return await pool.complete("m", prompt, temperature=0, ignore_eos=True, **params).collect()


async def together(pool: Pool, **params: Any) -> list[Completion]:
    return await asyncio.gather(*(ask(pool, prompt, **params) for prompt in PROMPTS))


async def alone(model: str, **params: Any) -> list[Completion]:
    """Return what each prompt gets from a worker that does nothing else and reuses nothing."""
    async with Pool([spec(model, n_ctx=4096, n_parallel=1)]) as pool:
        return [await ask(pool, prompt, cache_prompt=False, **params) for prompt in PROMPTS]


def tokens(answers: list[Completion]) -> list[tuple[int, ...]]:
    return [answer.tokens for answer in answers]


@pytest.mark.parametrize("model", ["random", "gemma2", "mamba"])
def test_company_and_shared_prefixes_change_no_token(model: str) -> None:
    params: dict[str, Any] = {"max_tokens": 40}

    async def scene() -> None:
        expected = tokens(await alone(model, **params))
        assert len(set(expected)) == len(PROMPTS)
        async with Pool([spec(model, n_ctx=4096, n_parallel=4)]) as pool:
            batched = await together(pool, cache_prompt=False, **params)
            assert tokens(batched) == expected
            assert all(answer.usage.cached_tokens == 0 for answer in batched)
            shared = await together(pool, **params)
            assert tokens(shared) == expected
            resident = await together(pool, **params)
            assert tokens(resident) == expected
            # A running state cannot be cut back, to the end of a prompt or to that of a prefix which it has passed by
            # the time that another request comes.
            if model != "mamba":
                assert sum(answer.usage.cached_tokens > len(PREFIX) for answer in shared) >= len(PROMPTS) - 1
                assert all(answer.usage.cached_tokens > len(PREFIX) for answer in resident)

    run(scene(), 50)


@pytest.mark.parametrize("cache_ram", [0, 64])
def test_a_request_that_was_preempted_goes_on_as_if_it_had_not_been(cache_ram: int) -> None:
    params: dict[str, Any] = {"max_tokens": 700}

    async def scene() -> None:
        answers = await alone("random", **params)
        async with Pool([spec("random", n_ctx=1024, n_parallel=4, cache_ram=cache_ram)]) as pool:
            crowd = await together(pool, cache_prompt=False, **params)
            assert tokens(crowd) == tokens(answers)
            # Each fits alone and no two fit together. The last token of an answer is not computed; one is at the load.
            once = 1 + sum(answer.usage.prompt_tokens + 699 for answer in crowd)

            def decoded() -> int:
                load = pool.status("m").replicas[0].load
                return load.decoded if load is not None else 0

            if cache_ram:
                await until(lambda: decoded() == once, "what comes back from RAM is not computed twice")
            else:
                await until(lambda: decoded() > once, "what was given up is computed again")

    run(scene(), 50)
