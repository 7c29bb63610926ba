"""The server that ``bench_http.py`` measures: a pool with its front end in one process, which takes orders on its
standard input, one JSON object a line, and answers each with one on its standard output.

``{"do": "pool", ...}`` puts requests through the pool itself, without HTTP, so that both ways are measured in one
process; ``{"do": "usage"}`` tells the resident bytes and the processor seconds of this process.
"""

import asyncio
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import uvloop

from llamaherd.http.limits import Limits
from llamaherd.http.server import serve
from llamaherd.pool import EngineOptions, ModelSpec, Pool

__all__ = ["main"]

#: Above what any part opens.
_CONNECTIONS = 8192


def specs_of(settings: dict[str, Any]) -> list[ModelSpec]:
    """Return the models that the settings ask for: fake ones of one script, or one of a file."""
    options = EngineOptions(n_ctx=4096, n_parallel=settings["slots"])
    if "file" in settings:
        return [ModelSpec(name="m0", path=Path(settings["file"]), options=options)]
    return [
        ModelSpec(name=f"m{number}", engine="fake", script=settings["script"], options=options)
        for number in range(settings["models"])
    ]


async def through_pool(pool: Pool, order: dict[str, Any]) -> dict[str, Any]:
    """Put requests through the pool and return their durations in nanoseconds, and how long all took."""
    durations: list[int] = []
    tokens = 0

    async def client(number: int) -> None:
        nonlocal tokens
        model = f"m{number % order['models']}"
        for _ in range(order["requests"]):
            began = time.perf_counter_ns()
            async for piece in pool.complete(model, order["prompt"], max_tokens=order["max_tokens"], temperature=0.0):
                tokens += len(piece.tokens)
            durations.append(time.perf_counter_ns() - began)

    cpu, began = time.process_time(), time.perf_counter()
    await asyncio.gather(*(client(number) for number in range(order["clients"])))
    seconds = time.perf_counter() - began
    return {"durations": durations, "seconds": seconds, "tokens": tokens, "cpu": time.process_time() - cpu}


async def obey(pool: Pool, order: dict[str, Any]) -> dict[str, Any]:
    """Carry out one order."""
    match order["do"]:
        case "pool":
            return await through_pool(pool, order)
        case "usage":
            return {"rss": psutil.Process().memory_info().rss, "cpu": time.process_time()}
        case unknown:
            raise ValueError(f"unknown order {unknown!r}")


async def run(settings: dict[str, Any]) -> None:
    """Serve until standard input ends."""
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    ready: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    async with Pool(specs_of(settings), transport=settings["transport"], models_max=0, queue_max=0) as pool:
        for status in pool.models():
            await pool.load(status.name)
        serving = asyncio.create_task(
            serve(pool, port=0, on_ready=ready.set_result, limits=Limits(max_connections=_CONNECTIONS))
        )
        print(json.dumps({"url": await ready}), flush=True)
        while line := await reader.readline():
            print(json.dumps(await obey(pool, json.loads(line))), flush=True)
        serving.cancel()
        await asyncio.wait([serving])


def main() -> None:
    """Run the subject of these settings, a JSON object in the first argument."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    uvloop.run(run(json.loads(sys.argv[1])))


if __name__ == "__main__":
    main()
