"""The GPUs that a model is given, and how it is divided among them."""

import math
from collections.abc import Sequence
from typing import Final

from llamaherd.pool.child import llama_backend
from llamaherd.pool.child.engine import EngineError
from llamaherd.pool.child.llama_model import Division
from llamaherd.transport.messages import EngineOptions

__all__ = ["division", "on_device"]

#: llama.cpp's numbers (include/llama.h, ``llama_split_mode``).
_SPLIT_MODES: Final = {"none": 0, "layer": 1, "row": 2}
#: What the reference calls the absence of devices.
NO_DEVICE: Final = ("none",)
_MOST_LAYERS: Final = 2**31 - 1


def on_device(options: EngineOptions) -> bool:
    """Whether these options give a GPU anything of a model, in this process."""
    return options.n_gpu_layers != 0 and options.devices != NO_DEVICE and llama_backend.supports_gpu()


def division(options: EngineOptions) -> Division:
    """Return how llama.cpp is to divide a model.

    Raises:
        EngineError: a device is not there, or a number is out of its range (``invalid_option``).
    """
    shares = options.tensor_split
    most = llama_backend.max_devices()
    if len(shares) > most:
        raise EngineError(f"tensor_split has {len(shares)} parts; it may have {most}", code="invalid_option")
    if any(not math.isfinite(share) or share < 0 for share in shares) or (shares and not any(shares)):
        raise EngineError("the parts of tensor_split must be 0 or more, and one above 0", code="invalid_option")
    # ctypes cuts numbers down to 32 bits, and what is left may mean something else.
    for name, value, low, high in (
        ("main_gpu", options.main_gpu, 0, most - 1),
        ("n_gpu_layers", options.n_gpu_layers, -_MOST_LAYERS, _MOST_LAYERS),
    ):
        if not low <= value <= high:
            raise EngineError(f"{name} is {value}; it must be {low} to {high}", code="invalid_option")
    return Division(
        devices=_devices(options.devices) if options.devices else None,
        split_mode=_SPLIT_MODES[options.split_mode],
        main_gpu=options.main_gpu,
        tensor_split=tuple(shares),
    )


def _devices(names: Sequence[str]) -> tuple[int, ...]:
    """Return the handles of devices by llama.cpp's names for them."""
    if tuple(names) == NO_DEVICE:
        return ()
    known = llama_backend.gpu_devices()
    missing = [name for name in names if name not in known]
    if missing:
        raise EngineError(
            f"there is no device {missing[0]!r}; known are {', '.join([*known, *NO_DEVICE])}", code="invalid_option"
        )
    if len(set(names)) != len(names):
        raise EngineError("devices names one twice", code="invalid_option")
    return tuple(known[name] for name in names)
