"""Prompts of token ids for the tiny models, and requests that continue them greedily and to their full length."""

from typing import Any

from engine_driver import GREEDY, Collected, drain
from llamaherd.pool.child.llama_engine import LlamaEngine
from llamaherd.transport.messages import Generate

__all__ = ["alone", "cached", "request", "run", "tokens"]

#: Token ids of plain letters in the tiny vocabularies.
LETTERS = range(263, 320)


def tokens(length: int, seed: int = 1) -> tuple[int, ...]:
    """Return a prompt without repetition that would be the same by chance."""
    return tuple(LETTERS[(index * index * 7 + index * seed + seed) % len(LETTERS)] for index in range(length))


def request(number: int, prompt: tuple[int, ...], *, max_tokens: int = 8, **fields: Any) -> Generate:
    """Return a request that does not end before ``max_tokens``."""
    fields = {"sampling": GREEDY, **fields}
    return Generate(request=number, prompt=prompt, max_tokens=max_tokens, ignore_eos=True, **fields)


def run(engine: LlamaEngine, prompt: tuple[int, ...], **fields: Any) -> Collected:
    """Run one request with nobody else."""
    engine.submit(request(1, prompt, **fields))
    return drain(engine)[1]


def alone(engine: LlamaEngine, prompt: tuple[int, ...], **fields: Any) -> list[int]:
    """Return the answer that a request gets from scratch."""
    return run(engine, prompt, cache_prompt=False, **fields).tokens


def cached(got: Collected) -> int:
    """Return how many tokens of the prompt were not computed."""
    assert got.done is not None
    return got.done.usage.cached_tokens
