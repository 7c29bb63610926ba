"""A program with a pool in it, for tests that kill it: ``python manager.py TRANSPORT MOMENT MODEL_JSON``.

Brings the pool to a moment (``idle``, ``loading`` or ``generating``), prints the worker's process id, and waits to be
killed.
"""

import asyncio
import sys

import msgspec

from llamaherd.pool import ModelSpec, Pool, State


async def main(transport: str, moment: str, spec: ModelSpec) -> None:
    """Reach the moment and stay there."""
    async with Pool([spec], transport=transport) as pool:
        if moment == "loading":
            pool.start_load(spec.name)
            async for event in pool.events():
                if event.event == "status_change" and pool.status(spec.name).state is State.LOADING:
                    break
        elif moment == "idle":
            await pool.load(spec.name)
        generation = pool.complete(spec.name, "go") if moment == "generating" else None
        if generation is not None:
            await anext(generation)
        print(pool.status(spec.name).pid, flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], msgspec.json.decode(sys.argv[3], type=ModelSpec)))
