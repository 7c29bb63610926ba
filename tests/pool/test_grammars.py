"""Answers under a grammar, through the pool and real workers."""

import asyncio
import re
from typing import Any

import pytest

from herding import run
from llamaherd.pool import BadRequest, EngineOptions, ModelSpec, Pool
from tiny_gguf import SCRIPT_TEXT, tiny_model


def pool() -> Pool:
    options = EngineOptions(n_ctx=512, n_threads=1, flash_attn="off")
    return Pool([ModelSpec(name=name, path=tiny_model(name), options=options) for name in ("scripted", "random")])


async def said(pool: Pool, model: str, **params: Any) -> str:
    fields = {"temperature": 0, "max_tokens": 60, **params}
    return (await pool.complete(model, "\n", **fields).collect()).text


def test_an_answer_follows_its_grammar() -> None:
    async def main() -> None:
        async with pool() as herd:
            assert await said(herd, "random", grammar='root ::= "yes" | "no"') in ("yes", "no")
            assert await said(herd, "scripted", grammar='root ::= [^!]* "!?"') == SCRIPT_TEXT + "?"
            assert await said(herd, "scripted", grammar="") == SCRIPT_TEXT

    run(main())


@pytest.mark.parametrize("grammar", ["root ::= other", 'root ::= root "a"', "x" * 70_000, 7, "root ::= [" + "a" * 5000])
def test_a_bad_grammar_costs_its_caller_an_error_and_nothing_else(grammar: Any) -> None:
    async def main() -> None:
        async with pool() as herd:
            with pytest.raises(BadRequest) as caught:
                await said(herd, "scripted", grammar=grammar)
            assert "grammar" in str(caught.value)
            assert await said(herd, "scripted") == SCRIPT_TEXT

    run(main())


def test_answers_with_and_without_a_grammar_run_side_by_side() -> None:
    async def main() -> None:
        async with pool() as herd:
            bound = [
                said(herd, "random", temperature=1, seed=n, grammar='root ::= "[" [0-9]{1,5} "]"') for n in range(6)
            ]
            free = said(herd, "random", temperature=1, seed=1, ignore_eos=True)
            *texts, other = await asyncio.gather(*bound, free)
            assert all(re.fullmatch(r"\[[0-9]{1,5}\]", text) for text in texts)
            assert other == await said(herd, "random", temperature=1, seed=1, ignore_eos=True)

    run(main())


#: Each kept llama.cpp's own sampler busy for minutes, or ended its process.
HOSTILE = [
    'root ::= ("a"?){300} "x"',
    "root ::= r0\n" + "".join(f"r{i} ::= r{i + 1} | r{i + 1} [x]\n" for i in range(22)) + "r22 ::= [y]",
    'root ::= (([ ]+)*)* "x"',
    "root ::= ws root ws | [x]\nws ::= [ ]*",
    'root ::= "a"{5,2}',
    'root ::= (("x"{2000}){2000}){2000}',
    "root ::= " + "(" * 30_000,
    "root ::= r0\n" + "".join(f"r{i} ::= r{i + 1}\n" for i in range(2500)) + "r2500 ::= [y]",
    "root ::= <|im_end|> | <s>",
    'root ::= "\\U0010FFFF" .*',
    "root ::= [\\x00] root2\nroot2 ::= .",
    "root ::= !<[5]>*",
]


@pytest.mark.parametrize("grammar", HOSTILE, ids=range(len(HOSTILE)))
def test_a_worker_survives_every_grammar(grammar: str) -> None:
    async def main() -> None:
        async with pool() as herd:
            several: list[dict[str, Any]] = [{}, {"temperature": 1.5, "seed": 3, "top_k": 0}, {"ignore_eos": True}]
            for params in several:
                try:
                    await said(herd, "random", grammar=grammar, **params)
                except BadRequest as error:
                    assert error.code in ("invalid_grammar", "grammar_too_complex", "grammar_dead_end")
            assert await said(herd, "random", grammar='root ::= "fine"') == "fine"
            assert herd.status("random").exit_code is None

    run(main())
