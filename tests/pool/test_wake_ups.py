"""Orders of events in which whoever goes on might be woken by nobody."""

import asyncio
import os
import signal

import pytest

from herding import TRANSPORTS, fake, freeze, run, until
from llamaherd.pool import Pool

#: Eight prompts of this length are more than a channel and a pipe take from a pool whose worker does not read.
LONG = 400_000


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_what_waits_for_a_worker_that_stopped_reading_reaches_it_in_order_once_it_reads(transport: str) -> None:
    async def scene() -> None:
        async with Pool([fake("m", n_parallel=16)], transport=transport) as pool:
            pid = (await pool.load("m")).pid
            assert pid is not None
            freeze(pid)
            texts = [f"{number} {'x' * LONG}" for number in range(8)]
            works = [pool.complete("m", text) for text in texts]
            answers = [asyncio.ensure_future(work.collect()) for work in works]
            question = asyncio.ensure_future(pool.tokenize("m", "abc"))
            await asyncio.sleep(0)
            # A worker that heard of the end first would begin what nobody waits for, and nobody would end it.
            answers[6].cancel()
            late = asyncio.ensure_future(pool.complete("m", "and one more").collect())
            await asyncio.sleep(0)
            os.kill(pid, signal.SIGCONT)
            del answers[6], texts[6]
            assert [one.text for one in await asyncio.gather(*answers)] == texts
            assert await question == [97, 98, 99]
            assert (await late).text == "and one more"
            await until(lambda: pool.status("m").in_flight == 0, "the cancelled one has ended too")

    run(scene())
