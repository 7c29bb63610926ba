"""The GPUs of this machine and their memory, as far as a driver tells.

NVIDIA's tells by NVML, which the optional package ``nvidia-ml-py`` (the extra ``gpu``) speaks. It needs no CUDA
context, so the manager takes no memory of a GPU by asking.
"""

import logging
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any, Final, Protocol

import msgspec

__all__ = ["FixedGpus", "Gpu", "Gpus", "NvmlGpus", "find_gpus", "visible"]

_log = logging.getLogger("llamaherd.pool")


class Gpu(msgspec.Struct, frozen=True, kw_only=True):
    """One GPU.

    Attributes:
        index: Its number in the order of the PCI bus, as ``nvidia-smi`` shows it.
        uuid: Its name for good, such as ``GPU-5a3c...``.
        name: What it is, for people.
        total: Its memory, in bytes.
        free: Bytes of it that nobody had taken when this was asked.
    """

    index: int
    uuid: str
    name: str = ""
    total: int
    free: int


class Gpus(Protocol):
    """Who knows the GPUs of this machine."""

    def devices(self) -> tuple[Gpu, ...]:
        """Return them, in the order of their numbers; none where there are none, or nobody tells."""
        ...

    def used_by(self, pid: int) -> tuple[int, ...] | None:
        """Return the bytes that a process has of each, in the same order; None where the driver does not tell, as in
        containers with process ids of their own.
        """
        ...


class FixedGpus:
    """GPUs that are told and not found: for tests, and for machines without any. Implements :class:`Gpus`.

    Args:
        gpus: The devices.
        used: By process id, the bytes of each device.
    """

    def __init__(self, gpus: Sequence[Gpu] = (), used: Mapping[int, tuple[int, ...]] | None = None) -> None:
        self._gpus: Final = tuple(gpus)
        self.used: Final = dict(used or {})

    def devices(self) -> tuple[Gpu, ...]:
        return self._gpus

    def used_by(self, pid: int) -> tuple[int, ...] | None:
        return self.used.get(pid)


class NvmlGpus:
    """NVIDIA's GPUs. Implements :class:`Gpus`.

    Args:
        nvml: The module ``pynvml``, with NVML initialised.
    """

    def __init__(self, nvml: Any) -> None:
        self._nvml: Final = nvml
        self._handles: Final[list[Any]] = [
            nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())
        ]

    def devices(self) -> tuple[Gpu, ...]:
        nvml = self._nvml
        found: list[Gpu] = []
        for index, handle in enumerate(self._handles):
            try:
                memory = nvml.nvmlDeviceGetMemoryInfo(handle)
                uuid, name = _text(nvml.nvmlDeviceGetUUID(handle)), _text(nvml.nvmlDeviceGetName(handle))
            except nvml.NVMLError as error:  # such as one whose memory is the machine's, or that has fallen off the bus
                _log.warning("GPU %d is not counted: %s", index, error)
                continue
            found.append(Gpu(index=index, uuid=uuid, name=name, total=int(memory.total), free=int(memory.free)))
        return tuple(found)

    def used_by(self, pid: int) -> tuple[int, ...] | None:
        used = [self._used_of(handle, pid) for handle in self._handles]
        if all(one is None for one in used):
            return None
        return tuple(one or 0 for one in used)

    def _used_of(self, handle: Any, pid: int) -> int | None:
        try:
            processes = self._nvml.nvmlDeviceGetComputeRunningProcesses(handle)
        except self._nvml.NVMLError:
            return None
        # usedGpuMemory is None where the driver keeps it to itself.
        return next((process.usedGpuMemory for process in processes if process.pid == pid), None)


def find_gpus() -> Gpus:
    """Return this machine's GPUs, as NVML tells; none without the package ``nvidia-ml-py`` or without a driver."""
    try:
        nvml: Any = import_module("pynvml")
    except ImportError:
        return FixedGpus()
    try:
        nvml.nvmlInit()
        return NvmlGpus(nvml)
    except nvml.NVMLError:  # no driver, no device, no permission
        return FixedGpus()


def visible(gpus: Sequence[Gpu], names: Sequence[str] | None) -> tuple[Gpu, ...]:
    """Return those GPUs that ``CUDA_VISIBLE_DEVICES`` with these names shows: numbers, or UUIDs that may be cut short.
    None shows all; as in CUDA, the first name that fits none ends the list.
    """
    if names is None:
        return tuple(gpus)
    found: list[Gpu] = []
    for name in names:
        one = next((gpu for gpu in gpus if name == str(gpu.index) or (name and gpu.uuid.startswith(name))), None)
        if one is None:
            break
        found.append(one)
    return tuple(found)


def _text(value: str | bytes) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value
