"""Models of llama.cpp: loading and freeing one, what it says of itself, and the LoRA adapters that go with it."""

import ctypes
from collections.abc import Callable
from typing import Final

import msgspec

from llamaherd.pool.child.llama_backend import max_devices
from llamaherd.pool.child.llama_library import BOOL, F32, I32, LONG, LOW, PTR, SHORT, SIZE, STR, U32, U64, bind

__all__ = [
    "Division",
    "adapter_free",
    "adapter_is_activated",
    "adapter_load",
    "chat_template",
    "free",
    "ftype_name",
    "has_decoder",
    "has_encoder",
    "is_diffusion",
    "is_hybrid",
    "is_recurrent",
    "load",
    "meta",
    "n_ctx_train",
    "n_embd",
    "n_embd_out",
    "n_head",
    "n_head_kv",
    "n_labels",
    "n_layer",
    "n_params",
    "n_swa",
    "quantize",
    "size",
    "vocab",
]

_model_defaults = bind(LONG, "llama_model_default_params", LOW.llama_model_params)
_model_load = bind(LONG, "llama_model_load_from_file", PTR, STR, LOW.llama_model_params)
_LOAD_READ, _LOAD_MMAP = 0, 1


class Division(msgspec.Struct, frozen=True, kw_only=True):
    """How a model is divided among GPUs. The defaults are llama.cpp's.

    Attributes:
        devices: Handles of the only ones to use; all for None.
        split_mode: llama.cpp's number of the way.
        main_gpu: Index among the devices.
        tensor_split: Proportions, at most :func:`max_devices` of them.
    """

    devices: tuple[int, ...] | None = None
    split_mode: int = 1
    main_gpu: int = 0
    tensor_split: tuple[float, ...] = ()


#: llama.cpp's own way.
_UNDIVIDED: Final = Division()


def load(
    path: bytes,
    *,
    n_gpu_layers: int,
    use_mmap: bool,
    progress: Callable[[float], bool],
    no_alloc: bool = False,
    division: Division = _UNDIVIDED,
) -> int | None:
    """Load a model; ``None`` when it failed or ``progress`` returned False. ``progress`` must not raise.

    ``n_gpu_layers`` < 0 means all, as in llama.cpp. ``no_alloc`` reads metadata only and simulates every allocation.
    """

    def report(fraction: float, _data: object) -> bool:
        return progress(fraction)

    params = _model_defaults()
    params.n_gpu_layers = n_gpu_layers
    params.split_mode = division.split_mode
    params.main_gpu = division.main_gpu
    # Both arrays must live as long as the call.
    devices = None if division.devices is None else (PTR * (len(division.devices) + 1))(*division.devices)
    if devices is not None:
        params.devices = ctypes.cast(devices, PTR)
    shares = (F32 * max_devices())(*division.tensor_split)
    if division.tensor_split:
        params.tensor_split = ctypes.cast(shares, ctypes.POINTER(F32))
    params.load_mode = _LOAD_MMAP if use_mmap and not no_alloc else _LOAD_READ
    params.no_alloc = no_alloc
    # The reference keeps the callback alive for the length of the call.
    callback = LOW.llama_progress_callback(report)
    params.progress_callback = callback
    handle: int | None = _model_load(path, params)
    return handle


free: Callable[[int], None] = bind(LONG, "llama_model_free", None, PTR)
vocab: Callable[[int], int] = bind(SHORT, "llama_model_get_vocab", PTR, PTR)
n_ctx_train: Callable[[int], int] = bind(SHORT, "llama_model_n_ctx_train", I32, PTR)
n_embd: Callable[[int], int] = bind(SHORT, "llama_model_n_embd_inp", I32, PTR)
n_embd_out: Callable[[int], int] = bind(SHORT, "llama_model_n_embd_out", I32, PTR)
#: How many scores a reranker gives.
n_labels: Callable[[int], int] = bind(SHORT, "llama_model_n_cls_out", U32, PTR)
n_layer: Callable[[int], int] = bind(SHORT, "llama_model_n_layer", I32, PTR)
n_head: Callable[[int], int] = bind(SHORT, "llama_model_n_head", I32, PTR)
n_head_kv: Callable[[int], int] = bind(SHORT, "llama_model_n_head_kv", I32, PTR)
n_params: Callable[[int], int] = bind(SHORT, "llama_model_n_params", U64, PTR)
size: Callable[[int], int] = bind(SHORT, "llama_model_size", U64, PTR)
has_encoder: Callable[[int], bool] = bind(SHORT, "llama_model_has_encoder", BOOL, PTR)
has_decoder: Callable[[int], bool] = bind(SHORT, "llama_model_has_decoder", BOOL, PTR)
is_diffusion: Callable[[int], bool] = bind(SHORT, "llama_model_is_diffusion", BOOL, PTR)
is_recurrent: Callable[[int], bool] = bind(SHORT, "llama_model_is_recurrent", BOOL, PTR)
is_hybrid: Callable[[int], bool] = bind(SHORT, "llama_model_is_hybrid", BOOL, PTR)
#: Tokens that its narrowest attention sees; 0 when all layers see everything.
n_swa: Callable[[int], int] = bind(SHORT, "llama_model_n_swa", I32, PTR)

_chat_template = bind(SHORT, "llama_model_chat_template", STR, PTR, STR)
_ftype = bind(SHORT, "llama_model_ftype", I32, PTR)
_ftype_name = bind(SHORT, "llama_ftype_name", STR, I32)
_meta = bind(SHORT, "llama_model_meta_val_str", I32, PTR, STR, STR, SIZE)


def chat_template(model: int, name: str = "") -> str:
    """Return the source of the model's default template or of the one with that name; empty when there is none."""
    source: bytes | None = _chat_template(model, name.encode() or None)
    return "" if source is None else source.decode("utf-8", "replace")


def ftype_name(model: int) -> str:
    """Return the quantisation's name, such as ``Q4_1`` or ``all F32``."""
    name: bytes = _ftype_name(_ftype(model))
    return name.decode()


def meta(model: int, key: str) -> str:
    """Return one metadata value as text; empty when absent or an array."""
    buffer = ctypes.create_string_buffer(256)
    length: int = _meta(model, key.encode(), buffer, len(buffer))
    return "" if length < 0 else buffer.value.decode("utf-8", "replace")


_quantize_defaults = bind(LONG, "llama_model_quantize_default_params", LOW.llama_model_quantize_params)
_quantize = bind(LONG, "llama_model_quantize", U32, STR, STR, ctypes.POINTER(LOW.llama_model_quantize_params))


def quantize(source: bytes, target: bytes, ftype: int) -> bool:
    """Write ``source`` again in another quantisation (llama.cpp's ``ftype`` number). Return whether it worked."""
    params = _quantize_defaults()
    params.ftype, params.allow_requantize = ftype, True
    return bool(_quantize(source, target, ctypes.byref(params)) == 0)


_adapter_load = bind(LONG, "llama_adapter_lora_init", PTR, PTR, STR)
_invocation_tokens = bind(SHORT, "llama_adapter_get_alora_n_invocation_tokens", U64, PTR)
adapter_free: Callable[[int], None] = bind(LONG, "llama_adapter_lora_free", None, PTR)


def adapter_load(model: int, path: bytes) -> int | None:
    """Load a LoRA adapter for a model; ``None`` when it is no adapter, or not of this model."""
    handle: int | None = _adapter_load(model, path)
    return handle


def adapter_is_activated(adapter: int) -> bool:
    """Whether an adapter is to be switched on within a prompt (aLoRA), by the tokens that invoke it."""
    return bool(_invocation_tokens(adapter))
