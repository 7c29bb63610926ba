"""What only a GPU can show, on demand: ``pytest -m gpu -s``, with a llama-cpp-python built for it and ``nvidia-ml-py``.

Needs an NVIDIA GPU with 12 GB free. ``LLAMA_CPP_LIB_PATH`` may name other libraries of llama.cpp than the installed
ones. Where NVML does not tell what a process takes, the figures of the whole GPU stand for it: nothing else may use it.
"""

import asyncio
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from gpu_ballast import ballast
from herding import run, until
from large_gguf import MIDDLE, write_large_llama
from llamaherd.pool import (
    Completion,
    EngineOptions,
    LoadFailed,
    ModelSpec,
    Placement,
    Pool,
    PoolError,
    State,
    WorkerDied,
)
from llamaherd.pool.gpus import Gpu, Gpus, find_gpus
from llamaherd.pool.memory import GPU_PROCESS_BYTES, expected_shares
from prompts import tokens
from tiny_gguf import tiny_model

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(180)]

MIB = 1024 * 1024
PATIENCE = 120.0
#: Greedy, and long enough to differ if anything does.
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 48, "ignore_eos": True}


class Narrow:
    """The GPUs of this machine as if they had less free memory. Implements ``Gpus``."""

    def __init__(self, gpus: Gpus, free: int) -> None:
        self._gpus = gpus
        self._free = free

    def devices(self) -> tuple[Gpu, ...]:
        return tuple(msgspec.structs.replace(gpu, free=self._free) for gpu in self._gpus.devices())

    def used_by(self, pid: int) -> tuple[int, ...] | None:
        return self._gpus.used_by(pid)


@pytest.fixture(scope="module")
def gpus() -> Gpus:
    found = find_gpus()
    assert found.devices(), "these tests need an NVIDIA GPU, its driver, and nvidia-ml-py"
    return found


@pytest.fixture(scope="module")
def middle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("models") / "middle.gguf"
    write_large_llama(path, MIDDLE)
    yield path
    path.unlink()


@pytest.fixture(autouse=True)
def all_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def spec(
    name: str, path: Path, /, *, placements: Sequence[Placement] = (), replicas: int = 1, **options: Any
) -> ModelSpec:
    settings: dict[str, Any] = {"n_ctx": 2048, **options}
    chosen = EngineOptions(**settings)
    return ModelSpec(name=name, path=path, options=chosen, placements=tuple(placements), replicas=replicas)


def used(gpus: Gpus) -> int:
    """Return the bytes of the first GPU that anyone has."""
    first = gpus.devices()[0]
    return first.total - first.free


def log_of(pool: Pool, model: str) -> str:
    return "\n".join(pool.logs(model))


async def freed(gpus: Gpus, before: int) -> None:
    """Wait until the GPU is as it was; the driver takes a moment to clean up after a process."""
    await until(lambda: used(gpus) < before + 64 * MIB, f"{before} bytes are used again", PATIENCE)


# --- devices and layers ---


def test_the_gpus_are_found_and_named(gpus: Gpus) -> None:
    for gpu in gpus.devices():
        assert gpu.name
        assert gpu.uuid.startswith("GPU-")
        assert gpu.total >= gpu.free > 0
    print(gpus.devices())


def test_the_layers_that_are_asked_for_lie_on_the_gpu(gpus: Gpus, middle: Path) -> None:
    size = middle.stat().st_size
    before, found = used(gpus), dict[int, tuple[int, int]]()

    async def scene(layers: int) -> tuple[int, ...]:
        async with Pool([spec("m", middle, n_gpu_layers=layers)], memory_budget="auto") as pool:
            status = await pool.load("m")
            answer = await pool.complete("m", tokens(64), **GREEDY).collect()
            assert status.pid is not None
            one = gpus.used_by(status.pid)
            told = -1 if one is None else one[0]
            found[layers] = (used(gpus) - before, told)
            assert (
                f"offloaded {min(layers % (MIDDLE.layers + 2), MIDDLE.layers + 1)}/{MIDDLE.layers + 1} layers"
                in log_of(pool, "m")
            )
            return answer.tokens

    for layers in (0, MIDDLE.layers // 2, -1):
        run(scene(layers), PATIENCE)
        run(freed(gpus, before), PATIENCE)
    print({layers: [value // MIB for value in values] for layers, values in found.items()})
    none, half, whole = (found[layers][0] for layers in (0, MIDDLE.layers // 2, -1))
    assert none < GPU_PROCESS_BYTES + 200 * MIB
    assert 0.35 * size < half - none < 0.75 * size
    assert 0.9 * size - 64 * MIB < whole - none < 1.5 * size


@pytest.mark.parametrize(
    ("options", "there"),
    [
        ({"devices": ("CUDA0",)}, True),
        ({"devices": ("none",)}, False),
        ({"split_mode": "none", "main_gpu": 0}, True),
        ({"tensor_split": (1.0,)}, True),
    ],
)
def test_devices_are_named_and_models_divided_as_llama_cpp_does(
    gpus: Gpus, middle: Path, options: dict[str, Any], there: bool
) -> None:
    async def scene() -> None:
        before, size = used(gpus), middle.stat().st_size
        async with Pool([spec("m", middle, **options)], memory_budget="auto") as pool:
            status = await pool.load("m")
            assert len((await pool.complete("m", tokens(64), **GREEDY).collect()).tokens) == 48
            taken = used(gpus) - before
            print(f"{options}: {taken // MIB} MiB of the GPU, counted in all {status.memory // MIB}")
            assert taken > size if there else taken < GPU_PROCESS_BYTES

    run(scene(), PATIENCE)


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"devices": ("CUDA1",)}, "there is no device 'CUDA1'; known are CUDA0, none"),
        ({"split_mode": "none", "main_gpu": 1}, "invalid value for main_gpu: 1"),
        ({"split_mode": "row"}, "CUDA0 does not support split buffers"),  # as of llama.cpp's ggml 0.25
    ],
)
def test_a_device_that_is_not_there_is_refused(middle: Path, options: dict[str, Any], found: str) -> None:
    async def scene() -> None:
        one_gpu = Placement(gpus=("0",))
        async with Pool([spec("m", middle, placements=[one_gpu], **options)]) as pool:
            with pytest.raises(LoadFailed, match=found):
                await pool.load("m")

    run(scene(), PATIENCE)


def test_a_placement_without_gpus_computes_on_the_processor_beside_one_with(gpus: Gpus, middle: Path) -> None:
    before = used(gpus)

    async def scene() -> None:
        places = [Placement(gpus=("0",)), Placement(gpus=())]
        model = spec("m", middle, placements=places, replicas=2, n_parallel=1)
        async with Pool([model], memory_budget="auto") as pool:
            first, second = await asyncio.gather(
                *(pool.complete("m", tokens(32, number), **GREEDY).collect() for number in (1, 2))
            )
            assert len(first.tokens) == len(second.tokens) == 48
            await until(lambda: all(one.pid for one in pool.status("m").replicas), "both run", PATIENCE)
            await until(lambda: all(one.state is State.LOADED for one in pool.status("m").replicas), "both", PATIENCE)
            pids = [one.pid or 0 for one in pool.status("m").replicas]
            shown = [psutil.Process(pid).environ()["CUDA_VISIBLE_DEVICES"] for pid in pids]
            assert shown == ["0", ""]
            lone = [gpus.used_by(pid) for pid in pids]
            print("by process:", lone, "in all:", (used(gpus) - before) // MIB)
            assert lone[1] is None or sum(lone[1]) == 0
            # One model's worth, not two.
            size = middle.stat().st_size
            assert 0.9 * size < used(gpus) - before < 2 * size

    run(scene(), PATIENCE)


# --- answers ---


@pytest.mark.parametrize(
    "options", [{}, {"flash_attn": "off"}, {"flash_attn": "on", "cache_type_k": "q8_0", "cache_type_v": "q8_0"}]
)
def test_flash_attention_and_types_of_the_cache_work_there(middle: Path, options: dict[str, Any]) -> None:
    async def scene() -> None:
        async with Pool([spec("m", middle, **options)]) as pool:
            answers = await asyncio.gather(
                *(pool.complete("m", tokens(300, number), **GREEDY).collect() for number in range(4))
            )
            assert all(len(answer.tokens) == 48 for answer in answers)
            print([line for line in pool.logs("m") if "flash_attn" in line or "Flash" in line or "KV buffer" in line])

    run(scene(), PATIENCE)


def gap(one: Completion, other: Completion) -> float:
    """Return how much less likely the other's token was to the first one where they part, in nats; 0 if they do not."""
    for probs, token in zip(one.probs, other.tokens, strict=True):
        if probs.chosen.token != token:
            told = {entry.token: entry.logprob for entry in probs.top}
            assert token in told, f"token {token} is none of the likely ones: {told}"
            return probs.chosen.logprob - told[token]
    return 0.0


def test_a_greedy_answer_depends_on_its_company_only_where_tokens_are_as_good_as_equal() -> None:
    """In F32 throughout. Other numbers of rows have other kernels, some of which round to TF32, so with random weights,
    where many tokens are about as likely, an answer depends on who is beside it.
    """
    asked: dict[str, Any] = {**GREEDY, "n_probs": 5}

    async def scene() -> None:
        shared = tokens(200)
        prompts = [shared + tokens(20, number) for number in range(2, 8)]
        settings: dict[str, Any] = {"flash_attn": "off", "cache_type_k": "f32", "cache_type_v": "f32", "n_parallel": 8}
        on_gpu = spec("gpu", tiny_model("random"), **settings)
        on_cpu = spec("cpu", tiny_model("random"), placements=(Placement(gpus=()),), **settings)
        async with Pool([on_gpu, on_cpu]) as pool:

            async def answer(model: str, prompt: tuple[int, ...], **more: Any) -> Completion:
                return await pool.complete(model, prompt, **asked, **more).collect()

            alone = [await answer("gpu", one, cache_prompt=False) for one in prompts]
            again = [await answer("gpu", one, cache_prompt=False) for one in prompts]
            crowd = await asyncio.gather(*(answer("gpu", one, cache_prompt=False) for one in prompts))
            await answer("gpu", shared)
            behind = await asyncio.gather(*(answer("gpu", one) for one in prompts))
            host = [await answer("cpu", one, cache_prompt=False) for one in prompts]
        assert [one.tokens for one in again] == [one.tokens for one in alone]
        assert all(one.usage.cached_tokens >= 199 for one in behind)
        for name, others in {"crowd": crowd, "behind": behind, "processor": host}.items():
            gaps = list(map(gap, alone, others))
            print(f"{name}: {gaps.count(0.0)} of {len(gaps)} answers are the same, the others part at {max(gaps):.4f}")
            assert max(gaps) < 0.05

    run(scene(), PATIENCE)


# --- memory ---


def test_the_estimate_covers_what_a_model_takes_and_is_replaced_by_it(gpus: Gpus, middle: Path) -> None:
    async def scene() -> None:
        model = spec("m", middle, n_ctx=16384)
        before = used(gpus)
        host, ((on_gpu, *_),) = expected_shares(model, gpus.devices())
        async with Pool([model], memory_budget="auto") as pool:
            status = await pool.load("m")
            await pool.complete("m", tokens(1000), **GREEDY).collect()
            taken = used(gpus) - before
            assert status.pid is not None
            rss = psutil.Process(status.pid).memory_info().rss
            told = gpus.used_by(status.pid)
            print(f"expected {on_gpu // MIB} MiB of the GPU, taken {taken // MIB}, told {told}")
            print(f"expected {host // MIB} MiB of memory, resident {rss // MIB}, counted in all {status.memory // MIB}")
            assert 0.6 * on_gpu < taken < 1.1 * on_gpu
            assert 0.6 * host < rss < 1.1 * host
            if told is not None:
                assert abs(told[0] - taken) < 128 * MIB
                assert status.memory < rss + told[0] + 64 * MIB

    run(scene(), PATIENCE)


def test_under_a_budget_for_one_the_other_makes_way(gpus: Gpus, middle: Path) -> None:
    async def scene() -> None:
        # What one is expected to take, and half of that again.
        _, ((one, *_),) = expected_shares(spec("a", middle), gpus.devices())
        narrow = Narrow(gpus, int(1.5 * one / 0.9))
        before = used(gpus)
        async with Pool([spec(name, middle) for name in "ab"], memory_budget="auto", gpus=narrow) as pool:
            most = 0
            for name in "abab":
                answer = await pool.complete(name, tokens(32), **GREEDY).collect()
                assert len(answer.tokens) == 48
                most = max(most, used(gpus) - before)
                assert [status.state for status in pool.models()].count(State.LOADED) == 1
            assert pool.counts().evictions == {"a": 2, "b": 1}
            assert not any(status.failed for status in pool.models())
            assert most < 1.6 * one
        await freed(gpus, before)

    run(scene(), PATIENCE)


def test_a_full_gpu_stops_what_is_idle_and_then_loads(gpus: Gpus, middle: Path) -> None:
    async def scene() -> None:
        async with Pool([spec(name, middle) for name in "ab"]) as pool:
            await pool.load("a")
            with ballast(200 * MIB):
                answer = await pool.complete("b", tokens(32), **GREEDY).collect()
                assert len(answer.tokens) == 48
                assert pool.status("a").state is State.UNLOADED
                assert pool.counts().evictions == {"a": 1}

    run(scene(), PATIENCE)


@pytest.mark.parametrize(
    ("options", "left", "found"),
    [
        ({}, 700 * MIB, "cannot be loaded: .*fewer n_gpu_layers"),  # its weights do not fit beside CUDA's own
        ({"n_ctx": 131_072, "n_parallel": 1}, 2000 * MIB, "no context of 131072 tokens: .*smaller n_ctx"),
    ],
)
def test_what_does_not_fit_the_gpu_says_so_and_fits_when_there_is_room(
    gpus: Gpus, middle: Path, options: dict[str, Any], left: int, found: str
) -> None:
    async def scene() -> None:
        before = used(gpus)
        async with Pool([spec("m", middle, **options), spec("other", tiny_model("random"))]) as pool:
            with ballast(left):
                with pytest.raises(LoadFailed, match=found) as caught:
                    await pool.load("m")
                print(caught.value)
                assert (caught.value.code, caught.value.retry) == ("out_of_memory", True)
                assert any("out of memory" in line for line in caught.value.log)
                with pytest.raises(LoadFailed, match="not tried again for"):
                    await pool.complete("m", tokens(32), **GREEDY).collect()
                answer = await pool.complete("other", tokens(32), **GREEDY).collect()
                assert len(answer.tokens) == 48
            await freed(gpus, before + 700 * MIB)
            assert (await pool.load("m")).state is State.LOADED

    run(scene(), PATIENCE)


def test_a_gpu_that_is_full_in_a_step_costs_a_worker_and_nothing_else(gpus: Gpus, middle: Path) -> None:
    async def scene() -> None:
        async with Pool([spec("m", middle, n_ctx=8192, n_ubatch=2048), spec("other", tiny_model("random"))]) as pool:
            await pool.load("m")
            await pool.load("other")
            with ballast(0) as left:
                outcome: object
                try:
                    answer = await pool.complete("m", tokens(6000), **GREEDY).collect()
                    outcome = f"{len(answer.tokens)} tokens"
                except PoolError as error:
                    outcome = repr(error)
                    assert isinstance(error, WorkerDied | LoadFailed)
                    assert error.code == "out_of_memory"
                print(f"with {left // MIB} MiB left: {outcome}")
                assert len((await pool.complete("other", tokens(32), **GREEDY).collect()).tokens) == 48
            await asyncio.sleep(0)
            await pool.load("m")
            assert len((await pool.complete("m", tokens(6000), **GREEDY).collect()).tokens) == 48

    run(scene(), PATIENCE)


def test_sleep_gives_the_memory_back_and_waking_takes_it_again(gpus: Gpus, middle: Path) -> None:
    async def scene() -> None:
        before, size = used(gpus), middle.stat().st_size
        async with Pool([spec("m", middle)], memory_budget="auto") as pool:
            first = await pool.complete("m", tokens(64), **GREEDY).collect()
            awake = used(gpus) - before
            pid = pool.status("m").pid
            pool.start_sleep("m")
            await until(lambda: pool.status("m").state is State.SLEEPING, "it sleeps", PATIENCE)
            await until(lambda: used(gpus) - before < awake - 0.9 * size, "the memory is back", PATIENCE)
            asleep = used(gpus) - before
            assert asleep < GPU_PROCESS_BYTES + 200 * MIB
            again = await pool.complete("m", tokens(64), **GREEDY).collect()
            assert again.tokens == first.tokens
            assert pool.status("m").pid == pid
            print("awake", awake // MIB, "asleep", asleep // MIB, "again", (used(gpus) - before) // MIB)
            assert abs(used(gpus) - before - awake) < 64 * MIB
        await freed(gpus, before)

    run(scene(), PATIENCE)


def test_a_killed_worker_leaves_nothing_on_the_gpu(gpus: Gpus, middle: Path) -> None:
    async def scene() -> None:
        before = used(gpus)
        async with Pool([spec("m", middle)]) as pool:
            status = await pool.load("m")
            assert status.pid is not None
            assert used(gpus) > before + 700 * MIB
            os.kill(status.pid, signal.SIGKILL)
            await until(lambda: pool.status("m").state is State.UNLOADED, "it is gone", PATIENCE)
            await freed(gpus, before)
            assert len((await pool.complete("m", tokens(32), **GREEDY).collect()).tokens) == 48

    run(scene(), PATIENCE)


def test_a_spare_takes_nothing_of_the_gpu(gpus: Gpus) -> None:
    async def scene() -> None:
        before = used(gpus)
        async with Pool([], spare=True):
            children: Callable[[], list[psutil.Process]] = psutil.Process().children
            await until(lambda: any("libllama" in _maps(child) for child in children()), "it has the engine", PATIENCE)
            assert used(gpus) - before < 16 * MIB

    run(scene(), PATIENCE)


def test_a_spare_loads_ahead_where_the_gpu_has_room_for_both(gpus: Gpus, middle: Path) -> None:
    async def scene() -> None:
        before = used(gpus)
        models = [spec("a", middle), spec("b", middle)]
        async with Pool(models, models_max=1, memory_budget="auto", spare=True) as pool:
            first = await pool.complete("a", tokens(64), **GREEDY).collect()
            alone = used(gpus) - before
            began = time.monotonic()
            await pool.complete("b", tokens(64), **GREEDY).collect()
            swap = time.monotonic() - began
            await until(lambda: pool.counts().ahead == "a", "a is loaded ahead", PATIENCE)
            both = used(gpus) - before
            assert 1.5 * alone < both < 2.5 * alone
            known = pool.status("b").pid
            (spare,) = (child.pid for child in psutil.Process().children() if child.pid != known)
            began = time.monotonic()
            again = await pool.complete("a", tokens(64), **GREEDY).collect()
            print(f"a swap and 48 tokens: {swap:.2f} s, of what was loaded ahead {time.monotonic() - began:.2f} s")
            assert again.tokens == first.tokens
            assert pool.status("a").pid == spare
            print(f"loaded ahead: {both // MIB} MiB of the GPU instead of {alone // MIB}")
        await freed(gpus, before)

    run(scene(), PATIENCE)


def _maps(process: psutil.Process) -> str:
    try:
        return Path(f"/proc/{process.pid}/maps").read_text()
    except OSError:
        return ""
