"""Memory is counted per GPU, where a driver tells of any. There need be none here: they are told, or played."""

import types
from importlib import import_module
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from herding import fake, run, until
from llamaherd.pool import BadRequest, EngineOptions, ModelSpec, Placement, Pool, State, find_model
from llamaherd.pool.gpus import FixedGpus, Gpu, NvmlGpus, find_gpus, visible
from llamaherd.pool.memory import GPU_HOST_BYTES, GPU_PROCESS_BYTES, automatic_budget, expected_memory, expected_shares
from tiny_gguf import tiny_model

GIB = 1024**3
SMALL = Gpu(index=0, uuid="GPU-aaaa-1", name="small", total=8 * GIB, free=8 * GIB)
LARGE = Gpu(index=1, uuid="GPU-bbbb-2", name="large", total=24 * GIB, free=20 * GIB)
BOTH = (SMALL, LARGE)


class NVMLError(Exception):
    pass


def played_driver(**functions: Any) -> types.SimpleNamespace:
    """Return what ``pynvml`` is on a machine with two GPUs; handles are the devices' numbers."""
    processes: dict[int, list[Any]] = {
        0: [types.SimpleNamespace(pid=7, usedGpuMemory=3), types.SimpleNamespace(pid=8, usedGpuMemory=None)],
        1: [],
    }
    sizes = {gpu.index: types.SimpleNamespace(total=gpu.total, free=gpu.free) for gpu in BOTH}
    names: dict[str, Any] = {
        "NVMLError": NVMLError,
        "nvmlDeviceGetCount": lambda: 2,
        "nvmlDeviceGetHandleByIndex": int,
        "nvmlDeviceGetMemoryInfo": sizes.__getitem__,
        "nvmlDeviceGetUUID": [gpu.uuid.encode() for gpu in BOTH].__getitem__,
        "nvmlDeviceGetName": [gpu.name for gpu in BOTH].__getitem__,
        "nvmlDeviceGetComputeRunningProcesses": processes.__getitem__,
    }
    return types.SimpleNamespace(**names | functions)


def test_the_driver_tells_the_devices_and_what_a_process_has_of_them() -> None:
    gpus = NvmlGpus(played_driver())
    assert gpus.devices() == BOTH
    assert gpus.used_by(7) == (3, 0)
    assert gpus.used_by(8) is None
    assert gpus.used_by(9) is None


def test_a_driver_that_does_not_tell_of_processes_is_no_error() -> None:
    def refuse(_handle: int) -> list[Any]:
        raise NVMLError

    assert NvmlGpus(played_driver(nvmlDeviceGetComputeRunningProcesses=refuse)).used_by(7) is None


def test_a_device_that_does_not_tell_its_memory_is_not_counted_and_the_others_keep_their_numbers() -> None:
    def tell(handle: int) -> Any:
        if handle == 0:
            raise NVMLError("Not Supported")
        return types.SimpleNamespace(total=BOTH[handle].total, free=BOTH[handle].free)

    assert NvmlGpus(played_driver(nvmlDeviceGetMemoryInfo=tell)).devices() == BOTH[1:]


def test_every_function_of_the_driver_that_is_used_exists() -> None:
    nvml = import_module("pynvml")
    for name in vars(played_driver()):
        assert hasattr(nvml, name)


def test_a_machine_with_or_without_gpus_can_be_asked() -> None:
    assert all(gpu.total >= gpu.free >= 0 for gpu in find_gpus().devices())


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        (None, BOTH),
        ((), ()),
        (("1",), (LARGE,)),
        (("1", "0"), (LARGE, SMALL)),
        (("GPU-bb",), (LARGE,)),
        (("0", "7", "1"), (SMALL,)),
        (("",), ()),
    ],
)
def test_what_a_worker_sees_is_what_cuda_would_show_it(names: tuple[str, ...] | None, shown: tuple[Gpu, ...]) -> None:
    assert visible(BOTH, names) == shown


def test_a_placement_counts_gpus_as_nvidia_smi_does_unless_it_says_otherwise() -> None:
    assert Placement().environment() == {}
    assert Placement(gpus=("1", "0")).environment() == {
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "CUDA_VISIBLE_DEVICES": "1,0",
    }
    order = {"CUDA_DEVICE_ORDER": "FASTEST_FIRST"}
    assert Placement(gpus=(), env=order).environment() == order | {"CUDA_VISIBLE_DEVICES": ""}


def test_an_automatic_budget_is_a_share_of_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    budget = automatic_budget(FixedGpus(BOTH))
    assert budget.gpus == BOTH
    assert budget.gpu_bytes == (int(7.2 * GIB), 18 * GIB)
    assert budget.host > 0
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert automatic_budget(FixedGpus(BOTH)).gpus == (LARGE,)


def test_layers_are_divided_among_the_gpus_that_a_placement_shows() -> None:
    spec = ModelSpec(name="m", path=Path("/nowhere"), memory=4 * GIB)
    assert expected_shares(spec, ()) == (4 * GIB, ((),))
    own = GPU_PROCESS_BYTES
    assert expected_shares(spec, BOTH) == (0, ((1 * GIB + own, 3 * GIB + own),))
    places = msgspec.structs.replace(spec, placements=(Placement(gpus=("1",)), Placement(gpus=())))
    assert expected_shares(places, BOTH) == (0, ((0, 4 * GIB + own), (0, 0)))
    on_cpu = msgspec.structs.replace(spec, options=EngineOptions(n_gpu_layers=0))
    assert expected_shares(on_cpu, BOTH) == (4 * GIB, ((own, own),))
    unknown = msgspec.structs.replace(places, memory=None)
    assert expected_shares(unknown, BOTH) == (0, ((0, 0), (0, 0)))


@pytest.mark.parametrize(
    ("options", "shares"),
    [
        ({"devices": ("CUDA1",)}, (None, 4)),
        ({"devices": ("CUDA1", "CUDA0"), "tensor_split": (3.0, 1.0)}, (1, 3)),
        ({"devices": ("CUDA7",)}, (None, None)),
        ({"devices": ("none",)}, (None, None)),
        ({"split_mode": "none"}, (4, None)),
        ({"split_mode": "none", "main_gpu": 1}, (None, 4)),
        ({"split_mode": "none", "main_gpu": 2}, (None, None)),
        ({"tensor_split": (1.0,)}, (4, 0)),
        ({"split_mode": "row", "tensor_split": (2.0, 2.0, 9.0)}, (2, 2)),
    ],
)
def test_what_a_model_is_given_is_counted_where_it_lies(
    options: dict[str, Any], shares: tuple[int | None, int | None]
) -> None:
    spec = ModelSpec(name="m", path=Path("/nowhere"), memory=4 * GIB, options=EngineOptions(**options))
    host, (found,) = expected_shares(spec, BOTH)
    assert found == tuple(0 if share is None else share * GIB + GPU_PROCESS_BYTES for share in shares)
    assert host == (4 * GIB if options.get("devices") == ("none",) else 0)


def test_some_layers_on_a_gpu_take_their_part_of_it() -> None:
    spec = msgspec.structs.replace(find_model("demo"), options=EngineOptions(n_gpu_layers=10))
    host, ((small, large),) = expected_shares(spec, BOTH)
    embeddings = 49152 * 576 * 20 // 32  # Q4_1
    beside = GPU_HOST_BYTES + embeddings * 10 // 31
    assert host + small + large - 2 * GPU_PROCESS_BYTES - beside == pytest.approx(expected_memory(spec), abs=2 * 2**20)
    assert small + large - 2 * GPU_PROCESS_BYTES == pytest.approx(expected_memory(spec) * 10 / 31, rel=0.01)


def on_gpu(name: str, gpu: str, memory: int) -> ModelSpec:
    place = (Placement(gpus=(gpu,)),)
    return msgspec.structs.replace(fake(name), path=Path("/nowhere"), memory=memory, placements=place)


def test_models_make_way_on_the_gpu_that_is_wanted_and_not_on_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    models = [on_gpu("a", "0", 4 * GIB), on_gpu("b", "1", 15 * GIB), on_gpu("c", "0", 5 * GIB)]

    async def scene() -> None:
        async with Pool(models, memory_budget="auto", gpus=FixedGpus(BOTH)) as pool:
            for name in "bac":
                await pool.complete(name, "hello").collect()
            assert [status.state for status in pool.models()] == [State.UNLOADED, State.LOADED, State.LOADED]

    run(scene())


def test_what_is_too_large_for_an_automatic_budget_runs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    models = [on_gpu("a", "0", 4 * GIB), on_gpu("huge", "0", 400 * GIB)]

    async def scene() -> None:
        async with Pool(models, memory_budget="auto", gpus=FixedGpus(BOTH)) as pool:
            for name in ("a", "huge"):
                await pool.complete(name, "hello").collect()
            assert [status.state for status in pool.models()] == [State.UNLOADED, State.LOADED]

    run(scene())


def test_what_a_worker_has_of_a_gpu_is_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    gate = tmp_path / "gate"

    async def scene() -> None:
        spec = msgspec.structs.replace(fake("m", load_gate=str(gate)), path=Path(__file__))
        gpus = FixedGpus((SMALL,))
        async with Pool([spec], memory_budget="auto", gpus=gpus) as pool:
            pool.start_load("m")
            await until(lambda: pool.status("m").pid is not None)
            gpus.used[pool.status("m").pid or 0] = (3 * GIB,)
            gate.touch()
            memory = (await pool.load("m")).memory
            assert 3 * GIB < memory < 4 * GIB

    run(scene())


def test_a_worker_that_has_no_gpu_takes_nothing_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as that of a llama.cpp without a backend for it: its layers are in this machine's memory after all."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    async def scene() -> None:
        model = ModelSpec(name="m", path=tiny_model("random"), options=EngineOptions(n_ctx=256))
        async with Pool([model], memory_budget="auto", gpus=FixedGpus((SMALL,))) as pool:
            status = await pool.load("m")
            assert status.pid is not None
            assert status.memory < 2 * psutil.Process(status.pid).memory_info().rss < GPU_PROCESS_BYTES

    run(scene())


def test_a_budget_is_a_number_or_automatic() -> None:
    wrong: Any = "plenty"
    with pytest.raises(BadRequest, match="memory_budget"):
        Pool(memory_budget=wrong)
