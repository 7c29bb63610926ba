"""Slots through the pool: seen without disturbing anyone, saved and restored across the life of a worker."""

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from herding import TRANSPORTS, fake, freeze, reach, run, until
from llamaherd.pool import (
    BadRequest,
    Completion,
    EngineOptions,
    ModelNotLoaded,
    ModelSpec,
    Piece,
    Pool,
    State,
    SyncPool,
    WorkerDied,
    WorkerFailed,
)
from tiny_gguf import tiny_model

ASK: dict[str, Any] = {"temperature": 0, "max_tokens": 8, "ignore_eos": True}
PROMPT = "The quick brown fox jumps over the lazy dog, again and again and again."


def spec(folder: Path | None = None, **options: Any) -> ModelSpec:
    given: dict[str, Any] = {"n_ctx": 512, "n_threads": 1, "n_parallel": 2, "flash_attn": "off", **options}
    return ModelSpec(
        name="m",
        path=tiny_model("random"),
        options=EngineOptions(slot_save_path="" if folder is None else str(folder), **given),
    )


async def ask(pool: Pool, prompt: str = PROMPT, **params: Any) -> Completion:
    return await pool.complete("m", prompt, **{**ASK, **params}).collect()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_what_was_saved_is_there_after_the_worker_has_gone(transport: str, tmp_path: Path) -> None:
    async def main() -> None:
        async with Pool([spec(tmp_path)], transport=transport) as pool:
            first = await ask(pool)
            saved = await pool.save_slot("m", first.slot, "fox.bin")
            await pool.unload("m")
            restored = await pool.restore_slot("m", 1, "fox.bin")
            again = await ask(pool)
            assert restored.slot == 1 and restored.n_tokens == saved.n_tokens == first.usage.prompt_tokens + 7
            assert saved.n_bytes == restored.n_bytes == (tmp_path / "fox.bin").stat().st_size
            assert (again.tokens, again.slot) == (first.tokens, 1)
            assert again.usage.cached_tokens == first.usage.prompt_tokens - 1
            assert (await pool.erase_slot("m", again.slot)).n_tokens == saved.n_tokens
            assert [slot.n_tokens for slot in await pool.slots("m")] == [0, 0]

    run(main())


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_model_that_is_stopped_while_it_is_asked_for_its_slots_is_not_loaded(transport: str) -> None:
    async def main() -> None:
        async with Pool([fake()], transport=transport) as pool:
            await pool.load("m")
            look = asyncio.ensure_future(pool.slots("m"))
            await asyncio.sleep(0)
            pool.start_unload("m")
            with pytest.raises(ModelNotLoaded):
                await look

    run(main())


def test_slots_are_seen_while_all_are_busy_and_others_wait() -> None:
    async def main() -> None:
        async with Pool([fake(n_parallel=1, repeat=10**6, pieces=("x",), step_seconds=0.002)]) as pool:
            works = [pool.complete("m", "a") for _ in range(3)]
            await anext(works[0])
            (slot,) = await pool.slots("m")
            assert slot.busy and slot.request == works[0].request
            assert pool.status("m").queued == 2
            for work in works:
                work.cancel()

    run(main())


def test_a_model_that_is_told_to_sleep_while_it_saves_a_slot_falls_asleep_then(tmp_path: Path) -> None:
    async def main() -> None:
        async with Pool([spec(tmp_path)]) as pool:
            slot = (await ask(pool)).slot
            saving = asyncio.ensure_future(pool.save_slot("m", slot, "fox.bin"))
            await asyncio.sleep(0)
            pool.start_sleep("m")
            assert (await saving).n_tokens > 0
            await reach(pool, "m", State.SLEEPING)
            await ask(pool)
            saving = asyncio.ensure_future(pool.save_slot("m", slot, "fox.bin"))
            await asyncio.sleep(0)
            pool.start_sleep("m")
            await ask(pool)  # it was woken before it slept
            await saving

    run(main())


def test_looking_loads_and_wakes_nothing() -> None:
    async def main() -> None:
        async with Pool([spec()]) as pool:
            with pytest.raises(ModelNotLoaded):
                await pool.slots("m")
            assert pool.status("m").state is State.UNLOADED
            await pool.load("m")
            pool.start_sleep("m")
            with pytest.raises(ModelNotLoaded):
                await pool.slots("m")
            await reach(pool, "m", State.SLEEPING)
            with pytest.raises(ModelNotLoaded):
                await pool.slots("m")
            assert pool.status("m").state is State.SLEEPING

    run(main())


def test_bad_commands_are_their_callers_error(tmp_path: Path) -> None:
    async def main() -> None:
        async with Pool([spec(tmp_path)]) as pool:
            with pytest.raises(ModelNotLoaded):
                await pool.save_slot("m", 0, "x")
            await pool.load("m")
            for slot, name, code in (
                (2, "x", "invalid_slot"),
                (-1, "x", "invalid_slot"),
                (0, "../x", "invalid_filename"),
                (0, "gone", "slot_file_not_found"),
                (0, "a\0b", "invalid_filename"),
            ):
                with pytest.raises(BadRequest) as caught:
                    await pool.restore_slot("m", slot, name)
                assert caught.value.code == code
            with pytest.raises(BadRequest, match="is empty"):
                await pool.save_slot("m", 0, "x")
            assert (await ask(pool)).text

    run(main())


def test_without_a_folder_nothing_is_saved() -> None:
    async def main() -> None:
        async with Pool([spec()]) as pool:
            await ask(pool)
            with pytest.raises(BadRequest, match="slot_save_path") as caught:
                await pool.save_slot("m", 0, "x")
            assert caught.value.code == "not_supported"

    run(main())


def test_replicas_have_slots_of_their_own(tmp_path: Path) -> None:
    async def main() -> None:
        one = ModelSpec(
            name="m",
            path=tiny_model("random"),
            replicas=2,
            options=EngineOptions(n_ctx=512, n_threads=1, n_parallel=2, slot_save_path=str(tmp_path)),
        )
        async with Pool([one]) as pool:
            answers: list[Completion] = []
            while not any(answer.slot >= 2 for answer in answers):  # until the second one has come and had its share
                prompts = [f"{number} {PROMPT}" for number in range(8)]
                answers = await asyncio.gather(*(ask(pool, prompt, max_tokens=40) for prompt in prompts))
            # The second one may have been quicker to load than the first.
            await until(lambda: all(one.state is State.LOADED for one in pool.status("m").replicas))
            slots = {slot.id: slot for slot in await pool.slots("m")}
            assert sorted(slots) == [0, 1, 2, 3]
            last = next(answer for answer in reversed(answers) if answer.slot >= 2)
            assert slots[last.slot].n_tokens == (await pool.save_slot("m", last.slot, "x")).n_tokens > 40

    run(main())


def test_a_question_to_a_worker_that_dies_fails_and_is_not_asked_again() -> None:
    async def main() -> None:
        async with Pool([spec()]) as pool:
            await pool.load("m")
            pid = pool.status("m").pid
            assert pid is not None
            freeze(pid)
            question = asyncio.ensure_future(pool.slots("m"))
            await asyncio.sleep(0)
            os.kill(pid, signal.SIGKILL)
            with pytest.raises((WorkerDied, WorkerFailed)):
                await question

    run(main())


def test_progress_comes_in_pieces_of_its_own_before_the_answer() -> None:
    async def main() -> None:
        async with Pool([spec(n_batch=32, n_ubatch=32)]) as pool:
            pieces = [piece async for piece in pool.complete("m", PROMPT * 4, return_progress=True, **ASK)]
            told = [piece.progress for piece in pieces if piece.progress is not None]
            assert told and told[-1].processed == told[-1].total
            assert [one.processed for one in told] == sorted(one.processed for one in told)
            assert all(piece == Piece(progress=piece.progress) for piece in pieces if piece.progress is not None)
            first_text = next(index for index, piece in enumerate(pieces) if piece.tokens)
            assert all(piece.progress is None for piece in pieces[first_text:])
            assert len(Completion.join(pieces).tokens) == 8

    run(main())


def test_the_figures_of_a_worker_arrive_and_go_with_it() -> None:
    async def main() -> None:
        async with Pool([spec()]) as pool:
            await ask(pool)

            def figures() -> Any:
                return pool.status("m").replicas[0].load

            await until(lambda: figures() is not None and figures().slots_busy == 0 and figures().decodes >= 8)
            assert figures().cells == 512 and figures().cached == 1
            await pool.unload("m")
            assert figures() is None

    run(main())


def test_the_pool_without_async_has_slots_too(tmp_path: Path) -> None:
    with SyncPool([spec(tmp_path)]) as pool:
        answer = pool.complete("m", PROMPT, **ASK).collect()
        assert pool.save_slot("m", answer.slot, "x").n_tokens == pool.slots("m")[answer.slot].n_tokens
        assert pool.erase_slot("m", answer.slot).n_tokens > 0
        assert pool.restore_slot("m", answer.slot, "x").n_tokens > 0
