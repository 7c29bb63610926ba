"""Whatever a caller sends, the worker lives, and its other requests do not notice.

Each family of requests has a worker process of its own, as a process per request would take minutes. After every
request a short one shows that the worker is still the same; if it is not, the request is named with the worker's end,
and the next one gets a new worker. So one run names all that kill, and not the first alone.
"""

import os
import signal
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest

from herding import run
from llamaherd.pool import BadRequest, EngineOptions, ModelSpec, Pool, PoolError, WorkerDied
from llamaherd.transport.messages import Adapter
from pictures import RED, data_url, image_part, png, wave
from tiny_gguf import tiny_model

SMALL: Final[dict[str, Any]] = {"n_ctx": 512, "n_threads": 1, "flash_attn": "off"}
LONG: Final = "x" * 600
REFUSED, SERVED = "refused", "served"
Case = tuple[str, dict[str, Any]]


def spec(model: str, *, mmproj: str = "", **options: Any) -> ModelSpec:
    return ModelSpec(
        name="m",
        path=tiny_model(model),
        mmproj=tiny_model(mmproj) if mmproj else None,
        options=EngineOptions(**{**SMALL, **options}),
    )


def named(method: str, arguments: Mapping[str, Any]) -> str:
    return f"{method} {arguments!r}"[:100]


async def send(pool: Pool, method: str, arguments: Mapping[str, Any]) -> None:
    work = getattr(pool, method)("m", **arguments)
    await (work.collect() if method in ("complete", "infill", "chat") else work)


async def outcome(work: Awaitable[None]) -> str:
    """Return ``refused`` or ``served``, or how the request ended else."""
    try:
        await work
    except BadRequest:
        return REFUSED
    except PoolError as error:
        return f"{type(error).__name__}: {error}"
    return SERVED


async def survives(pool: Pool, pid: int | None) -> str:
    """Return what became of the worker that had this process; nothing if it serves."""
    try:
        await pool.tokenize("m", "a")
    except PoolError as error:
        return f"the worker is gone: {error}"
    status = pool.status("m")
    return "" if status.pid == pid else f"the worker is gone: {status.error or 'another one serves'}"


async def trial(pool: Pool, cases: Sequence[tuple[str, Callable[[], Awaitable[None]]]]) -> dict[str, str]:
    """Send the requests one after the other; return what came of each."""
    told: dict[str, str] = {}
    for name, case in cases:
        pid = (await pool.load("m")).pid
        told[name] = await outcome(case())
        told[name] = await survives(pool, pid) or told[name]
    return told


def judge(model: ModelSpec, cases: Sequence[Case], *, company: bool = True) -> dict[str, str]:
    """Return what came of each request of a family, beside a generation that must not notice any."""
    question: dict[str, Any] = {"max_tokens": 300, "temperature": 0, "ignore_eos": True}

    async def scene() -> dict[str, str]:
        async with Pool([model]) as pool:
            expected = await pool.complete("m", "abc", **question).collect() if company else None
            generation = pool.complete("m", "abc", **question) if company else None
            told = await trial(pool, [(named(*case), partial(send, pool, *case)) for case in cases])
            if generation is not None and expected is not None and {*told.values()} <= {REFUSED, SERVED}:
                assert (await generation.collect()).tokens == expected.tokens
            return told

    return run(scene(), 50)


def sampled(**fields: Any) -> Case:
    return ("complete", {"prompt": "a", "max_tokens": 3, **fields})


def schema(value: Any, **fields: Any) -> Case:
    return sampled(json_schema=value, **fields)


def chat(*content: Any, **fields: Any) -> Case:
    messages = [{"role": "user", "content": one} for one in content]
    return ("chat", {"messages": messages, "max_tokens": 3, **fields})


PROMPTS: list[Case] = [
    ("complete", {"prompt": prompt})
    for prompt in ("", [], [512], [2**31 - 1], [-1], ["a", 512], LONG, "x" * 5_000_000, [1] * 512)
] + [
    ("detokenize", {"tokens": [512]}),
    ("detokenize", {"tokens": [-1]}),
    ("tokenize", {"text": [512]}),
    ("infill", {"prefix": "a", "suffix": "b"}),
]
SAMPLING: list[Case] = [
    sampled(**fields)
    for fields in (
        {"n_probs": 10**6},
        {"logit_bias": [[512, 1.0]]},
        {"logit_bias": [[-1, 1.0]]},
        {"max_tokens": -2},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_k": 2**40},
        {"repeat_last_n": 2**31},
        {"repeat_penalty": 0.0},
        {"dry_multiplier": 1.0, "dry_sequence_breakers": ["\ud800"]},
        {"dry_multiplier": 1.0, "dry_sequence_breakers": ["x" * 41]},
        {"samplers": ["nonsense"]},
        {"mirostat": 3},
        {"mirostat_tau": float("inf"), "mirostat": 2},
        {"seed": 2**32},
        {"lora": [{"id": 0, "scale": 1.0}]},
        {"id_slot": 99},
        {"n_keep": -2},
        {"n_indent": -1},
    )
]
GRAMMARS: list[Case] = [
    *(
        sampled(grammar=grammar)
        for grammar in (
            "root ::= (",
            "rule ::= [a]",
            "root ::= root [a]",
            "root ::= nobody",
            'root ::= "a"{1,3000}',
            "root ::= <[99999]>",
            "root ::= <nobody>",
            "root ::= [z-a]",
            "(" * 20_000,
            "root ::= " + "(" * 5_000 + '"a"' + ")" * 5_000,
        )
    ),
    *(
        schema(value)
        for value in (
            {"type": "nonsense"},
            {"$ref": "#/nowhere"},
            {"$ref": "http://example.org/schema"},
            {"pattern": "(", "type": "string"},
            {"pattern": "(?=a)", "type": "string"},
            {"type": "string", "minLength": 10**12},
            {"type": "number", "multipleOf": 1e-300},
            {"uniqueItems": True},
        )
    ),
]
CHATS: list[Case] = [
    chat(),
    chat(3),
    chat([{"type": "nonsense"}]),
    chat("a", template_kwargs={"enable_thinking": "no"}),
    chat("a", tools=[{"type": "function", "function": {"name": "no good"}}]),
    chat("a", tool_choice="required"),
    chat("a", reasoning_budget_tokens=-2),
    chat("a", continue_final_message=True),
    chat(LONG),
    chat([image_part(RED)]),
]
VECTORS: list[Case] = [
    ("embed", {"inputs": [""]}),
    ("embed", {"inputs": [LONG]}),
    ("embed", {"inputs": ["a", [512]]}),
    ("embed", {"inputs": ["a"], "dimensions": 65}),
    ("embed", {"inputs": ["a"], "normalize": -2}),
    ("rerank", {"query": "a", "documents": ["b"]}),
]
FAMILIES: Final[Mapping[str, tuple[ModelSpec, list[Case]]]] = {
    "prompts": (spec("random"), PROMPTS),
    "sampling": (spec("random"), SAMPLING),
    "grammars": (spec("random"), GRAMMARS),
    "chats": (spec("random"), CHATS),
    "vectors": (spec("random", pooling="mean"), VECTORS),
    "adapters": (
        spec("random", adapters=(Adapter(path=str(tiny_model("lora"))),)),
        [
            sampled(lora=lora)
            for lora in (
                [{"id": 1, "scale": 1.0}],
                [{"id": -1, "scale": 1.0}],
                [{"id": 0, "scale": float("nan")}],
                [{"id": 0, "scale": 1e9}],
                [{"id": 0}],
            )
        ],
    ),
    "pictures": (
        spec("random", mmproj="mmproj"),
        [
            chat([image_part(data)])
            for data in (
                b"",
                b"\x89PNG",
                RED[:40],
                b"\xff\xd8\xff" + b"x" * 100,
                png((1, 2, 3), claimed=(60_000, 60_000)),
            )
        ]
        + [
            chat([{"type": "image_url", "image_url": {"url": url}}])
            for url in ("http://127.0.0.1:1/x.png", "file:///etc/passwd", "data:image/png;base64,!!", "")
        ]
        + [
            chat([{"type": "input_audio", "input_audio": {"data": data_url(wave()).split(",")[1], "format": "wav"}}]),
            chat([image_part(RED)] * 40),
        ],
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_no_request_of_a_family_ends_a_worker_nor_disturbs_another(family: str) -> None:
    model, cases = FAMILIES[family]
    assert judge(model, cases) == {named(*case): REFUSED for case in cases}


#: What looks as if it must go wrong and does not.
EXTREMES: list[Case] = [
    ("complete", {"prompt": list(range(512))[:500], "max_tokens": 3}),
    ("complete", {"prompt": [0, 1, 2], "max_tokens": 3}),
    ("complete", {"prompt": "a", "max_tokens": 0}),
    ("complete", {"prompt": "a" * 300, "ignore_eos": True}),
    sampled(samplers=[]),
    sampled(samplers=["adaptive_p", "top_k", "adaptive_p"], adaptive_target=0.5),
    sampled(temperature=1e300, top_k=0),
    sampled(temperature=1e-300),
    sampled(n_probs=100, post_sampling_probs=True),
    sampled(min_keep=2**31 - 1, top_p=0.0, min_p=1.0),
    sampled(repeat_last_n=2**31 - 1, repeat_penalty=1e6, dry_multiplier=1e6, dry_penalty_last_n=-1),
    sampled(logit_bias=[[token, False] for token in range(511)]),
    sampled(logit_bias=[[5, 1e300], [6, -1e300]]),
    sampled(mirostat=1, mirostat_tau=0.0, mirostat_eta=1e6),
    sampled(stop=["a" * 1024] * 64),
    schema({"type": "array", "items": {"$ref": "#"}}),
    schema({"type": "string", "pattern": "^(a+)+$"}),
    ("tokenize", {"text": "\0" * 100}),
    ("chat", {"messages": [{"role": "\0", "content": "<|im_end|>" * 10}], "max_tokens": 3}),
    ("embed", {"inputs": ["a"] * 200}),
]


def test_no_extreme_ends_a_worker() -> None:
    model = spec("random", n_batch=16, n_ubatch=8, n_parallel=2, pooling="mean")
    assert judge(model, EXTREMES) == {named(*case): SERVED for case in EXTREMES}


@pytest.mark.parametrize("model", ["bert", "rank", "mamba", "gemma2"])
def test_no_request_ends_a_worker_with_another_kind_of_model(model: str) -> None:
    cases: list[Case] = [
        ("complete", {"prompt": LONG}),
        ("complete", {"prompt": [10**6]}),
        ("embed", {"inputs": ["cat " * 40 if model in ("bert", "rank") else LONG]}),
        ("embed", {"inputs": [[10**6]]}),
        ("rerank", {"query": "cat", "documents": ["cat " * 300]}),
        ("infill", {"prefix": "a", "suffix": "b"}),
    ]
    told = judge(spec(model, n_ubatch=32), cases, company=model in ("mamba", "gemma2"))
    assert told == {named(*case): REFUSED for case in cases}


def test_a_damaged_slot_file_ends_nothing(tmp_path: Path) -> None:
    async def scene() -> dict[str, str]:
        async with Pool([spec("random", slot_save_path=str(tmp_path))]) as pool:
            await pool.complete("m", "abc", max_tokens=5, id_slot=0).collect()
            await pool.save_slot("m", 0, "good")
            good = (tmp_path / "good").read_bytes()
            damaged = {"empty": b"", "cut": good[: len(good) // 2], "junk": b"\0" * len(good)}
            damaged |= {f"bit{at}": good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :] for at in (8, 60, len(good) - 1)}
            for name, data in damaged.items():
                (tmp_path / name).write_bytes(data)
            cases = [(name, partial(send, pool, "restore_slot", {"slot": 0, "name": name})) for name in damaged]
            cases += [
                (repr(name), partial(send, pool, "restore_slot", {"slot": 0, "name": name}))
                for name in ("../good", "nobody", "", "a\0b", "x" * 300)
            ]
            return await trial(pool, cases)

    told = run(scene(), 50)
    assert set(told.values()) == {REFUSED}, told


def test_what_ends_a_worker_is_named_with_its_end_and_nothing_else_is() -> None:
    """The trial itself: a request that comes with the death of its worker is told from its neighbours."""

    async def scene() -> dict[str, str]:
        async with Pool([spec("random")]) as pool:

            async def deadly() -> None:
                generation = pool.complete("m", "a", ignore_eos=True)
                await anext(generation)
                pid = pool.status("m").pid
                assert pid is not None
                os.kill(pid, signal.SIGABRT)
                with pytest.raises(WorkerDied):
                    await generation.collect()
                raise BadRequest("as if it had been refused")

            def harmless() -> Awaitable[None]:
                return send(pool, "complete", {"prompt": [512]})

            return await trial(pool, [("before", harmless), ("deadly", deadly), ("after", harmless)])

    told = run(scene(), 50)
    assert (told["before"], told["after"]) == (REFUSED, REFUSED)
    assert "the worker is gone" in told["deadly"]
