"""The one place that touches llama-cpp-python: its low-level module, ctypes signatures and C callbacks.

Everything above works with the typed functions of this module; handles are plain integers and NULL is always ``None``.
Calls that run for long (load, context, decode) release the GIL. The short ones are bound through ``PyDLL`` and keep it:
each release would be a chance to lose the GIL for a whole switch interval to another thread.

Nothing here checks arguments. A wrong id or a batch that is too large makes llama.cpp abort the process, so the callers
validate first.
"""

import atexit
import contextlib
import ctypes
import importlib
import importlib.util
import os
import sys
import types
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

import msgspec

from llamaherd.pool.child.lean import without_typing_extensions

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = [
    "CACHE_TYPES",
    "FILL_IN_THE_MIDDLE",
    "MOST_THREADS",
    "AbortFlag",
    "ContextSettings",
    "Division",
    "DryRecipe",
    "adapter_free",
    "adapter_is_activated",
    "adapter_load",
    "all_error_lines",
    "batch_struct",
    "context_create",
    "context_free",
    "context_memory",
    "decode",
    "embeddings",
    "embeddings_of",
    "embedding_struct",
    "error_lines",
    "float_rows",
    "forget_errors",
    "forget_log",
    "gpu_devices",
    "info_lines",
    "import_lowlevel",
    "init_backend",
    "log_callback",
    "logits",
    "max_devices",
    "memory_can_shift",
    "memory_clear",
    "memory_seq_add",
    "memory_seq_cp",
    "memory_seq_pos_max",
    "memory_seq_pos_min",
    "memory_seq_rm",
    "model_chat_template",
    "model_free",
    "model_ftype_name",
    "model_has_decoder",
    "model_has_encoder",
    "model_is_diffusion",
    "model_is_hybrid",
    "model_is_recurrent",
    "model_load",
    "model_meta",
    "model_n_ctx_train",
    "model_n_embd",
    "model_n_embd_out",
    "model_n_head",
    "model_n_head_kv",
    "model_n_labels",
    "model_n_layer",
    "model_n_params",
    "model_n_swa",
    "model_size",
    "model_vocab",
    "n_batch",
    "n_ctx",
    "n_ctx_seq",
    "quantize",
    "quieten",
    "sampler_accept",
    "sampler_adaptive_p",
    "sampler_apply",
    "sampler_chain",
    "sampler_chain_add",
    "sampler_clone",
    "sampler_dist",
    "sampler_dry",
    "sampler_free",
    "sampler_logit_bias",
    "sampler_min_p",
    "sampler_mirostat",
    "sampler_mirostat_v2",
    "sampler_penalties",
    "sampler_reset",
    "sampler_sample",
    "sampler_temp",
    "sampler_temp_ext",
    "sampler_top_k",
    "sampler_top_n_sigma",
    "sampler_top_p",
    "sampler_typical",
    "sampler_xtc",
    "set_adapters",
    "set_causal_attn",
    "set_embeddings",
    "set_n_threads",
    "state_seq_get_data",
    "state_seq_get_size",
    "state_seq_set_data",
    "supports_gpu",
    "synchronize",
    "token_to_piece",
    "tokenize",
    "vocab_add_bos",
    "vocab_add_eos",
    "vocab_add_sep",
    "vocab_bos",
    "vocab_eos",
    "vocab_fim",
    "vocab_is_eog",
    "vocab_n_tokens",
    "vocab_sep",
    "vocab_suppressed",
    "vocab_text_length",
    "vocab_type",
]

#: ggml's limit; more abort the process.
MOST_THREADS: Final = 512
#: Element types that a KV cache can have: ggml's number, the elements of a block, and the bytes of one.
CACHE_TYPES: Final = {
    "f32": (0, 1, 4),
    "f16": (1, 1, 2),
    "bf16": (30, 1, 2),
    "q8_0": (8, 32, 34),
    "q5_1": (7, 32, 24),
    "q5_0": (6, 32, 22),
    "q4_1": (3, 32, 20),
    "q4_0": (2, 32, 18),
    "iq4_nl": (20, 32, 18),
}

_i32, _u32, _u64, _f32, _ptr, _bool, _str, _size = (
    ctypes.c_int32,
    ctypes.c_uint32,
    ctypes.c_uint64,
    ctypes.c_float,
    ctypes.c_void_p,
    ctypes.c_bool,
    ctypes.c_char_p,
    ctypes.c_size_t,
)


def import_lowlevel(name: str = "llama_cpp") -> Any:
    """Import a module of llama-cpp-python without ``llama_cpp/__init__``, which would load five times as much."""
    if "llama_cpp" in sys.modules:
        return importlib.import_module(f"llama_cpp.{name}")
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.submodule_search_locations is None:
        raise ModuleNotFoundError("llama-cpp-python is not installed", name="llama_cpp")
    package = types.ModuleType("llama_cpp")
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules["llama_cpp"] = package
    try:
        with without_typing_extensions():
            return importlib.import_module(f"llama_cpp.{name}")
    finally:
        # A later `import llama_cpp` elsewhere must find the real package.
        del sys.modules["llama_cpp"]


# ggml_abort would otherwise fork a debugger, which costs half a second and prints nothing useful.
os.environ.setdefault("GGML_NO_BACKTRACE", "1")
_low: Any = import_lowlevel()
_long: Any = ctypes.CDLL(_low._lib._name)
_short: Any = ctypes.PyDLL(_low._lib._name)


def _bind(library: Any, name: str, result: Any, *arguments: Any) -> Any:
    function = getattr(library, name)
    function.restype, function.argtypes = result, arguments
    return function


# --- log and abort ----------------------------------------------------------------------------------------------------

_DEBUG, _INFO, _ERROR, _CONTINUED = 1, 2, 4, 5
_KEPT_LINES: Final = 40
#: Longest stored line; llama.cpp quotes parts of damaged files.
_LINE_LIMIT: Final = 500
_errors: Final[deque[str]] = deque(maxlen=_KEPT_LINES)
_infos: Final[deque[str]] = deque(maxlen=400)
_last_level = _INFO
_quiet = False


def _to_stderr(text: bytes) -> None:
    # Past Python's buffers, and past a parent that has gone.
    with contextlib.suppress(OSError):
        os.write(2, text)


@_low.llama_log_callback  # type: ignore[untyped-decorator]
def _on_log(level: int, text: bytes, _data: object) -> None:
    """Forward a line to stderr, which the parent collects; keep the errors as evidence. Runs on any native thread."""
    global _last_level
    if level == _CONTINUED:
        level = _last_level
    else:
        _last_level = level
    if level == _DEBUG or (_quiet and level == _INFO):
        return
    _to_stderr(text)
    line = text[:_LINE_LIMIT].decode("utf-8", "replace").strip()
    if line:
        (_errors if level == _ERROR else _infos).append(line)


def log_callback() -> Any:
    """Return the function that takes log lines, for libraries that have a setter of their own."""
    return _on_log


_abort_type: Any = ctypes.CFUNCTYPE(None, ctypes.c_char_p)


@_abort_type  # type: ignore[untyped-decorator]
def _on_abort(message: bytes) -> None:
    """Leave the assertion's text on stderr: it is all that remains of the process."""
    _to_stderr(message + b"\n")


def forget_log() -> None:
    """Forget the log lines kept so far, so that the next ones belong to the call that follows."""
    _errors.clear()
    _infos.clear()


def forget_errors() -> None:
    """Forget the ERROR lines only: what was said of the load is still asked for after the first batch."""
    _errors.clear()


def quieten(quiet: bool) -> None:
    """Drop INFO lines, or show them again. A loaded model prints some at every change of adapters."""
    global _quiet
    _quiet = quiet


def error_lines(most: int = 5) -> str:
    """Return the last ERROR lines, joined, since :func:`forget_log` or :func:`forget_errors`; empty when there was
    none.
    """
    return "; ".join(list(_errors)[-most:])


def all_error_lines() -> tuple[str, ...]:
    """Return the ERROR lines since :func:`forget_log`, the newest 40 at most."""
    return tuple(_errors)


def info_lines() -> tuple[str, ...]:
    """Return the INFO and WARN lines since :func:`forget_log`, the newest 400 at most."""
    return tuple(_infos)


_backend_ready = False


def init_backend() -> None:
    """Start llama.cpp in this process. Idempotent."""
    global _backend_ready
    if _backend_ready:
        return
    _bind(_long, "llama_log_set", None, _low.llama_log_callback, _ptr)(_on_log, None)
    _bind(_long, "ggml_set_abort_callback", _ptr, _abort_type)(_on_abort)
    _bind(_long, "llama_backend_init", None)()
    # C destructors may still log when Python is gone.
    atexit.register(_long.llama_log_set, _low.llama_log_callback(), None)
    atexit.register(_long.ggml_set_abort_callback, _abort_type())
    _backend_ready = True


class AbortFlag:
    """A flag that a decode polls without running Python.

    The abort callback is C's ``strlen`` on a two-byte buffer: the empty string is False, one byte is True. It is called
    after every graph node, where a Python callback would cost half a millisecond per step. CPU backend only.
    """

    def __init__(self) -> None:
        self._buffer = ctypes.create_string_buffer(2)
        self.function: Any = ctypes.cast(ctypes.CDLL(None).strlen, _low.ggml_abort_callback)
        self.address = ctypes.addressof(self._buffer)

    def set(self) -> None:
        """Raise the flag, from any thread, for good."""
        self._buffer.raw = b"\1\0"

    def __bool__(self) -> bool:
        return self._buffer.raw[0] != 0


# --- model ------------------------------------------------------------------------------------------------------------

_model_defaults = _bind(_long, "llama_model_default_params", _low.llama_model_params)
_model_load = _bind(_long, "llama_model_load_from_file", _ptr, _str, _low.llama_model_params)
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

max_devices: Callable[[], int] = _bind(_long, "llama_max_devices", _size)
_device_count = _bind(_long, "ggml_backend_dev_count", _size)
_device = _bind(_long, "ggml_backend_dev_get", _ptr, _size)
_device_name = _bind(_long, "ggml_backend_dev_name", _str, _ptr)
_device_type = _bind(_long, "ggml_backend_dev_type", ctypes.c_int, _ptr)
#: ggml's numbers for GPUs with memory of their own, and with the machine's.
_GPU_TYPES: Final = (1, 2)


def gpu_devices() -> dict[str, int]:
    """Return the handles of the GPUs that llama.cpp has a backend for, by their names."""
    handles = [_device(index) for index in range(_device_count())]
    return {_device_name(one).decode("utf-8", "replace"): one for one in handles if _device_type(one) in _GPU_TYPES}


def model_load(
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
    devices = None if division.devices is None else (_ptr * (len(division.devices) + 1))(*division.devices)
    if devices is not None:
        params.devices = ctypes.cast(devices, _ptr)
    shares = (_f32 * max_devices())(*division.tensor_split)
    if division.tensor_split:
        params.tensor_split = ctypes.cast(shares, ctypes.POINTER(_f32))
    params.load_mode = _LOAD_MMAP if use_mmap and not no_alloc else _LOAD_READ
    params.no_alloc = no_alloc
    # The reference keeps the callback alive for the length of the call.
    callback = _low.llama_progress_callback(report)
    params.progress_callback = callback
    handle: int | None = _model_load(path, params)
    return handle


model_free: Callable[[int], None] = _bind(_long, "llama_model_free", None, _ptr)
model_vocab: Callable[[int], int] = _bind(_short, "llama_model_get_vocab", _ptr, _ptr)
model_n_ctx_train: Callable[[int], int] = _bind(_short, "llama_model_n_ctx_train", _i32, _ptr)
model_n_embd: Callable[[int], int] = _bind(_short, "llama_model_n_embd_inp", _i32, _ptr)
model_n_embd_out: Callable[[int], int] = _bind(_short, "llama_model_n_embd_out", _i32, _ptr)
#: How many scores a reranker gives.
model_n_labels: Callable[[int], int] = _bind(_short, "llama_model_n_cls_out", _u32, _ptr)
model_n_layer: Callable[[int], int] = _bind(_short, "llama_model_n_layer", _i32, _ptr)
model_n_head: Callable[[int], int] = _bind(_short, "llama_model_n_head", _i32, _ptr)
model_n_head_kv: Callable[[int], int] = _bind(_short, "llama_model_n_head_kv", _i32, _ptr)
model_n_params: Callable[[int], int] = _bind(_short, "llama_model_n_params", _u64, _ptr)
model_size: Callable[[int], int] = _bind(_short, "llama_model_size", _u64, _ptr)
model_has_encoder: Callable[[int], bool] = _bind(_short, "llama_model_has_encoder", _bool, _ptr)
model_has_decoder: Callable[[int], bool] = _bind(_short, "llama_model_has_decoder", _bool, _ptr)
model_is_diffusion: Callable[[int], bool] = _bind(_short, "llama_model_is_diffusion", _bool, _ptr)
model_is_recurrent: Callable[[int], bool] = _bind(_short, "llama_model_is_recurrent", _bool, _ptr)
model_is_hybrid: Callable[[int], bool] = _bind(_short, "llama_model_is_hybrid", _bool, _ptr)
#: Tokens that its narrowest attention sees; 0 when all layers see everything.
model_n_swa: Callable[[int], int] = _bind(_short, "llama_model_n_swa", _i32, _ptr)
supports_gpu: Callable[[], bool] = _bind(_long, "llama_supports_gpu_offload", _bool)

_chat_template = _bind(_short, "llama_model_chat_template", _str, _ptr, _str)
_ftype = _bind(_short, "llama_model_ftype", _i32, _ptr)
_ftype_name = _bind(_short, "llama_ftype_name", _str, _i32)
_meta = _bind(_short, "llama_model_meta_val_str", _i32, _ptr, _str, _str, _size)


def model_chat_template(model: int, name: str = "") -> str:
    """Return the source of the model's default template or of the one with that name; empty when there is none."""
    source: bytes | None = _chat_template(model, name.encode() or None)
    return "" if source is None else source.decode("utf-8", "replace")


def model_ftype_name(model: int) -> str:
    """Return the quantisation's name, such as ``Q4_1`` or ``all F32``."""
    name: bytes = _ftype_name(_ftype(model))
    return name.decode()


def model_meta(model: int, key: str) -> str:
    """Return one metadata value as text; empty when absent or an array."""
    buffer = ctypes.create_string_buffer(256)
    length: int = _meta(model, key.encode(), buffer, len(buffer))
    return "" if length < 0 else buffer.value.decode("utf-8", "replace")


_quantize_defaults = _bind(_long, "llama_model_quantize_default_params", _low.llama_model_quantize_params)
_quantize = _bind(_long, "llama_model_quantize", _u32, _str, _str, ctypes.POINTER(_low.llama_model_quantize_params))


def quantize(source: bytes, target: bytes, ftype: int) -> bool:
    """Write ``source`` again in another quantisation (llama.cpp's ``ftype`` number). Return whether it worked."""
    params = _quantize_defaults()
    params.ftype, params.allow_requantize = ftype, True
    return bool(_quantize(source, target, ctypes.byref(params)) == 0)


# --- vocabulary -------------------------------------------------------------------------------------------------------

vocab_type: Callable[[int], int] = _bind(_short, "llama_vocab_type", _i32, _ptr)
vocab_n_tokens: Callable[[int], int] = _bind(_short, "llama_vocab_n_tokens", _i32, _ptr)
vocab_is_eog: Callable[[int, int], bool] = _bind(_short, "llama_vocab_is_eog", _bool, _ptr, _i32)
vocab_bos: Callable[[int], int] = _bind(_short, "llama_vocab_bos", _i32, _ptr)
vocab_eos: Callable[[int], int] = _bind(_short, "llama_vocab_eos", _i32, _ptr)
vocab_add_bos: Callable[[int], bool] = _bind(_short, "llama_vocab_get_add_bos", _bool, _ptr)
vocab_add_eos: Callable[[int], bool] = _bind(_short, "llama_vocab_get_add_eos", _bool, _ptr)
vocab_sep: Callable[[int], int] = _bind(_short, "llama_vocab_sep", _i32, _ptr)
vocab_add_sep: Callable[[int], bool] = _bind(_short, "llama_vocab_get_add_sep", _bool, _ptr)

#: What llama.cpp calls the tokens for infilling: what is before and after the gap, the gap, a repository, a file.
FILL_IN_THE_MIDDLE: Final = ("pre", "suf", "mid", "rep", "sep")
_fim = {name: _bind(_short, f"llama_vocab_fim_{name}", _i32, _ptr) for name in FILL_IN_THE_MIDDLE}


def vocab_fim(vocab: int, name: str) -> int:
    """Return one of the tokens for infilling, -1 where the vocabulary has none; ``name`` is of the list above."""
    token: int = _fim[name](vocab)
    return token


_suppressed = _bind(
    _short, "llama_vocab_get_suppress_tokens", ctypes.POINTER(_i32), _ptr, ctypes.POINTER(ctypes.c_int32)
)
_text_of = _bind(_short, "llama_vocab_get_text", _str, _ptr, _i32)
# Long texts take long: without the GIL.
_tokenize = _bind(_long, "llama_tokenize", _i32, _ptr, _str, _i32, _ptr, _i32, _bool, _bool)
_to_piece = _bind(_short, "llama_token_to_piece", _i32, _ptr, _i32, _str, _i32, _i32, _bool)
_piece_buffer = ctypes.create_string_buffer(256)


def vocab_suppressed(vocab: int) -> tuple[int, ...]:
    """Return the tokens that the model's maker wants never to be generated."""
    count = ctypes.c_int32()
    tokens = _suppressed(vocab, ctypes.byref(count))
    return tuple(tokens[: count.value]) if tokens else ()


def vocab_text_length(vocab: int, token: int) -> int:
    """Return the bytes of a token's entry in the vocabulary, as stored."""
    text: bytes | None = _text_of(vocab, token)
    return len(text or b"")


def tokenize(vocab: int, text: bytes, address: int, room: int, *, add_special: bool, parse_special: bool) -> int:
    """Write at most ``room`` int32 ids to ``address``; return their number, negative: how many there would be."""
    count: int = _tokenize(vocab, text, len(text), address, room, add_special, parse_special)
    return count


def token_to_piece(vocab: int, token: int, *, special: bool) -> bytes:
    """Return the bytes of one token; control tokens are empty unless ``special``."""
    length: int = _to_piece(vocab, token, _piece_buffer, len(_piece_buffer), 0, special)
    if length >= 0:
        return _piece_buffer.raw[:length]
    larger = ctypes.create_string_buffer(-length)
    length = _to_piece(vocab, token, larger, len(larger), 0, special)
    return larger.raw[: max(length, 0)]


# --- context ----------------------------------------------------------------------------------------------------------


class ContextSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What a context is created with, in tokens, sequences and threads.

    Field names are those of llama.cpp's ``llama_context_params``; ``flash_attn_type`` is -1 auto, 0 off, 1 on;
    ``kv_unified`` lets all sequences use all cells, else each has its part of them; ``swa_full`` keeps what has left
    the window of a sliding-window model; ``type_k`` and ``type_v`` are ggml's numbers
    (:data:`CACHE_TYPES`). Of ``rope_*`` and ``yarn_*`` the defaults mean what the model says. ``embeddings``
    makes every token an output; ``pooling_type`` -1 is the model's own.
    """

    n_ctx: int
    n_batch: int
    n_ubatch: int
    n_seq_max: int
    n_outputs_max: int
    n_threads: int
    n_threads_batch: int
    flash_attn_type: int = -1
    kv_unified: bool = True
    swa_full: bool = True
    type_k: int = 1
    type_v: int = 1
    rope_scaling_type: int = -1
    rope_freq_base: float = 0.0
    rope_freq_scale: float = 0.0
    yarn_ext_factor: float = -1.0
    yarn_attn_factor: float = -1.0
    yarn_beta_fast: float = -1.0
    yarn_beta_slow: float = -1.0
    yarn_orig_ctx: int = 0
    embeddings: bool = False
    pooling_type: int = -1


_context_defaults = _bind(_long, "llama_context_default_params", _low.llama_context_params)
_context_create = _bind(_long, "llama_init_from_model", _ptr, _ptr, _low.llama_context_params)


def context_create(model: int, settings: ContextSettings, abort: AbortFlag) -> int | None:
    """Create a context; ``None`` when it failed. ``abort`` must outlive it."""
    params = _context_defaults()
    for name in settings.__struct_fields__:
        setattr(params, name, getattr(settings, name))
    params.no_perf = True
    params.abort_callback = abort.function
    params.abort_callback_data = abort.address
    handle: int | None = _context_create(model, params)
    return handle


context_free: Callable[[int], None] = _bind(_long, "llama_free", None, _ptr)
context_memory: Callable[[int], int | None] = _bind(_short, "llama_get_memory", _ptr, _ptr)
n_ctx: Callable[[int], int] = _bind(_short, "llama_n_ctx", _u32, _ptr)
n_ctx_seq: Callable[[int], int] = _bind(_short, "llama_n_ctx_seq", _u32, _ptr)
n_batch: Callable[[int], int] = _bind(_short, "llama_n_batch", _u32, _ptr)
set_n_threads: Callable[[int, int, int], None] = _bind(_short, "llama_set_n_threads", None, _ptr, _i32, _i32)
memory_clear: Callable[[int, bool], None] = _bind(_short, "llama_memory_clear", None, _ptr, _bool)
memory_seq_rm: Callable[[int, int, int, int], bool] = _bind(
    _short, "llama_memory_seq_rm", _bool, _ptr, _i32, _i32, _i32
)
#: Lets a sequence hold positions ``p0`` to ``p1`` - 1 of another one too. Ids of 256 and more abort the process.
memory_seq_cp: Callable[[int, int, int, int, int], None] = _bind(
    _short, "llama_memory_seq_cp", None, _ptr, _i32, _i32, _i32, _i32
)
memory_seq_pos_min: Callable[[int, int], int] = _bind(_short, "llama_memory_seq_pos_min", _i32, _ptr, _i32)
memory_seq_pos_max: Callable[[int, int], int] = _bind(_short, "llama_memory_seq_pos_max", _i32, _ptr, _i32)
#: Moves positions ``p0`` to ``p1`` - 1 of a sequence by an offset. A cell has one position for all its sequences, so
#: this moves it for those too that merely share it. Aborts the process where :data:`memory_can_shift` says no.
memory_seq_add: Callable[[int, int, int, int, int], None] = _bind(
    _short, "llama_memory_seq_add", None, _ptr, _i32, _i32, _i32, _i32
)
memory_can_shift: Callable[[int], bool] = _bind(_short, "llama_memory_can_shift", _bool, _ptr)
#: Bytes of a sequence's state.
state_seq_get_size: Callable[[int, int], int] = _bind(_short, "llama_state_seq_get_size", _size, _ptr, _i32)
#: Writes a sequence's state to an address with room for ``size`` bytes; returns the bytes written, 0 on failure.
state_seq_get_data: Callable[[int, int, int, int], int] = _bind(
    _long, "llama_state_seq_get_data", _size, _ptr, _ptr, _size, _i32
)
#: Replaces a sequence by a state of ``size`` bytes at an address; returns the bytes read, 0 on failure, and then
#: the sequence is empty.
state_seq_set_data: Callable[[int, int, int, int], int] = _bind(
    _long, "llama_state_seq_set_data", _size, _ptr, _ptr, _size, _i32
)
#: Waits for a device that computes asynchronously. The getters of results wait too, but with the GIL held.
synchronize: Callable[[int], None] = _bind(_long, "llama_synchronize", None, _ptr)
logits: Callable[[int], int | None] = _bind(_short, "llama_get_logits", _ptr, _ptr)
#: Whether the next decodes give embeddings, and then of every token.
set_embeddings: Callable[[int, bool], None] = _bind(_short, "llama_set_embeddings", None, _ptr, _bool)
#: The embeddings of the last batch's outputs, in batch order; None with pooling.
embeddings: Callable[[int], int | None] = _bind(_short, "llama_get_embeddings", _ptr, _ptr)
#: The pooled embedding of a sequence of the last batch, or its scores; None without pooling.
embeddings_of: Callable[[int, int], int | None] = _bind(_short, "llama_get_embeddings_seq", _ptr, _ptr, _i32)


def float_rows(address: int, rows: int, columns: int) -> "npt.NDArray[np.float32]":
    """Return a view of C memory as a float32 array; valid as long as the memory is."""
    import numpy as np  # here and not above: the model is read before numpy is there

    memory: Any = (_f32 * (rows * columns)).from_address(address)
    view: npt.NDArray[np.float32] = np.frombuffer(memory, np.float32).reshape(rows, columns)
    return view


_decode = _bind(_long, "llama_decode", _i32, _ptr, _low.llama_batch)


def batch_struct(token: int, pos: int, n_seq_id: int, seq_id: int, output: int) -> Any:
    """Return a ``llama_batch`` over memory that the caller owns and keeps; the arguments are addresses."""
    int_pointer = ctypes.POINTER(ctypes.c_int32)
    return _low.llama_batch(
        0,
        ctypes.cast(token, int_pointer),
        None,
        ctypes.cast(pos, int_pointer),
        ctypes.cast(n_seq_id, int_pointer),
        ctypes.cast(seq_id, ctypes.POINTER(int_pointer)),
        ctypes.cast(output, ctypes.POINTER(ctypes.c_int8)),
    )


def embedding_struct(like: Any, rows: int, pos: int) -> Any:
    """Return a ``llama_batch`` of embeddings instead of tokens, with all but their positions as another one has it.

    The arguments are addresses. With M-RoPE there are four positions of each: first the first of all, and so on.
    """
    struct = _low.llama_batch()
    ctypes.pointer(struct)[0] = like
    struct.token = None
    struct.embd = ctypes.cast(rows, ctypes.POINTER(_f32))
    struct.pos = ctypes.cast(pos, ctypes.POINTER(ctypes.c_int32))
    return struct


#: Whether tokens see only what is before them; off for images whose parts see each other.
set_causal_attn: Callable[[int, bool], None] = _bind(_short, "llama_set_causal_attn", None, _ptr, _bool)


def decode(context: int, batch: Any, n_tokens: int) -> int:
    """Compute a batch. 0: done, 1: no KV room (nothing changed), 2: aborted, -1: bad batch, below: broken."""
    batch.n_tokens = n_tokens
    code: int = _decode(context, batch)
    return code


# --- adapters ---------------------------------------------------------------------------------------------------------

_adapter_load = _bind(_long, "llama_adapter_lora_init", _ptr, _ptr, _str)
_invocation_tokens = _bind(_short, "llama_adapter_get_alora_n_invocation_tokens", _u64, _ptr)
adapter_free: Callable[[int], None] = _bind(_long, "llama_adapter_lora_free", None, _ptr)
_set_adapters = _bind(_short, "llama_set_adapters_lora", _i32, _ptr, ctypes.POINTER(_ptr), _size, ctypes.POINTER(_f32))


def adapter_load(model: int, path: bytes) -> int | None:
    """Load a LoRA adapter for a model; ``None`` when it is no adapter, or not of this model."""
    handle: int | None = _adapter_load(model, path)
    return handle


def adapter_is_activated(adapter: int) -> bool:
    """Whether an adapter is to be switched on within a prompt (aLoRA), by the tokens that invoke it."""
    return bool(_invocation_tokens(adapter))


def set_adapters(context: int, adapters: Sequence[tuple[int, float]]) -> bool:
    """Compute the next batches with these ``(adapter, scale)`` and no others. Return whether llama.cpp took them."""
    count = len(adapters)
    handles = (_ptr * count)(*(adapter for adapter, _ in adapters))
    scales = (_f32 * count)(*(scale for _, scale in adapters))
    return bool(_set_adapters(context, handles, count, scales) == 0)


# --- samplers ---------------------------------------------------------------------------------------------------------

_chain_create = _bind(_short, "llama_sampler_chain_init", _ptr, _low.llama_sampler_chain_params)
sampler_chain_add: Callable[[int, int], None] = _bind(_short, "llama_sampler_chain_add", None, _ptr, _ptr)
sampler_free: Callable[[int], None] = _bind(_short, "llama_sampler_free", None, _ptr)
sampler_top_k: Callable[[int], int] = _bind(_short, "llama_sampler_init_top_k", _ptr, _i32)
sampler_top_p: Callable[[float, int], int] = _bind(_short, "llama_sampler_init_top_p", _ptr, _f32, _size)
sampler_min_p: Callable[[float, int], int] = _bind(_short, "llama_sampler_init_min_p", _ptr, _f32, _size)
sampler_typical: Callable[[float, int], int] = _bind(_short, "llama_sampler_init_typical", _ptr, _f32, _size)
sampler_top_n_sigma: Callable[[float], int] = _bind(_short, "llama_sampler_init_top_n_sigma", _ptr, _f32)
#: Probability, threshold, min_keep, seed.
sampler_xtc: Callable[[float, float, int, int], int] = _bind(
    _short, "llama_sampler_init_xtc", _ptr, _f32, _f32, _size, _u32
)
sampler_temp: Callable[[float], int] = _bind(_short, "llama_sampler_init_temp", _ptr, _f32)
#: Temperature, range, exponent.
sampler_temp_ext: Callable[[float, float, float], int] = _bind(
    _short, "llama_sampler_init_temp_ext", _ptr, _f32, _f32, _f32
)
#: n_vocab, last_n, repeat, frequency, presence. It allocates ``last_n`` entries at once.
sampler_penalties: Callable[[int, int, float, float, float], int] = _bind(
    _short, "llama_sampler_init_penalties", _ptr, _i32, _i32, _f32, _f32, _f32
)
#: n_vocab, seed, tau, eta, m.
sampler_mirostat: Callable[[int, int, float, float, int], int] = _bind(
    _short, "llama_sampler_init_mirostat", _ptr, _i32, _u32, _f32, _f32, _i32
)
#: Seed, tau, eta.
sampler_mirostat_v2: Callable[[int, float, float], int] = _bind(
    _short, "llama_sampler_init_mirostat_v2", _ptr, _u32, _f32, _f32
)
#: Target, decay, seed.
sampler_adaptive_p: Callable[[float, float, int], int] = _bind(
    _short, "llama_sampler_init_adaptive_p", _ptr, _f32, _f32, _u32
)
sampler_dist: Callable[[int], int] = _bind(_short, "llama_sampler_init_dist", _ptr, _u32)
sampler_clone: Callable[[int], int] = _bind(_short, "llama_sampler_clone", _ptr, _ptr)
#: Tells a sampler of a token that it did not choose itself.
sampler_accept: Callable[[int, int], None] = _bind(_short, "llama_sampler_accept", None, _ptr, _i32)
#: Makes a sampler forget what it was told, and what it has drawn.
sampler_reset: Callable[[int], None] = _bind(_short, "llama_sampler_reset", None, _ptr)
#: Samples from a row of the last batch and accepts the token. The row must have been an output, or the process aborts.
sampler_sample: Callable[[int, int, int], int] = _bind(_short, "llama_sampler_sample", _i32, _ptr, _ptr, _i32)


_apply = _bind(_short, "llama_sampler_apply", None, _ptr, ctypes.POINTER(_low.llama_token_data_array))
_pointer_to: Any = ctypes.POINTER
_token_data: Any = _pointer_to(_low.llama_token_data)
_TOKEN_DATA_BYTES: Final = ctypes.sizeof(_low.llama_token_data)


def sampler_apply(chain: int, address: int, count: int) -> tuple[int, range]:
    """Have a chain choose among candidates without telling it that they were accepted; return the index of its choice,
    and those of the candidates that it has left.

    Args:
        address: Where ``count`` >= 1 candidates lie, each an int32 id and two float32, its logit and a probability
            to be written. They are reordered, so the indices are those of the order afterwards. What is left need
            not be at the front: XTC drops the likeliest.
    """
    array = _low.llama_token_data_array(ctypes.cast(address, _token_data), count, -1, False)
    _apply(chain, ctypes.byref(array))
    left: Any = ctypes.cast(array.data, _ptr).value
    first = (left - address) // _TOKEN_DATA_BYTES
    return first + int(array.selected), range(first, first + int(array.size))


_dry = _bind(_short, "llama_sampler_init_dry", _ptr, _ptr, _f32, _f32, _i32, _i32, ctypes.POINTER(_str), _size)
_logit_bias = _bind(_short, "llama_sampler_init_logit_bias", _ptr, _i32, _i32, ctypes.POINTER(_low.llama_logit_bias))


class DryRecipe(msgspec.Struct, frozen=True, kw_only=True):
    """The arguments of a DRY sampler. ``last_n`` entries are allocated at once."""

    multiplier: float
    base: float
    allowed_length: int
    last_n: int
    breakers: tuple[bytes, ...]


def sampler_dry(vocab: int, recipe: DryRecipe) -> int:
    """Return a DRY sampler. It searches the whole vocabulary for each breaker: 10 ms and more with a large one."""
    texts = (ctypes.c_char_p * len(recipe.breakers))(*recipe.breakers)
    numbers = (recipe.multiplier, recipe.base, recipe.allowed_length, recipe.last_n)
    handle: int = _dry(vocab, *numbers, texts, len(recipe.breakers))
    return handle


def sampler_logit_bias(n_vocab: int, biases: Sequence[tuple[int, float]]) -> int:
    """Return a sampler that adds a bias to the logits of tokens, whose ids must be of the vocabulary."""
    array = (_low.llama_logit_bias * len(biases))(*biases)
    handle: int = _logit_bias(n_vocab, len(biases), array)
    return handle


def sampler_chain() -> int:
    """Return a new empty chain; freeing it frees what was added."""
    handle: int = _chain_create(_low.llama_sampler_chain_params(no_perf=True))
    return handle
