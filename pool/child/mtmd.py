"""llama.cpp's library for images and sound (mtmd), as typed functions; imported only where a model has a projector.

As in the ``llama_*`` modules, handles are plain integers, NULL is ``None``, and nothing is checked.
"""

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from llamaherd.pool.child import llama_library, llama_log

__all__ = [
    "ProjectorSettings",
    "bitmap_free",
    "bitmap_load",
    "bitmap_n_x",
    "chunk_file",
    "chunk_is_text",
    "chunk_n_positions",
    "chunk_n_tokens",
    "chunk_positions",
    "chunk_text_tokens",
    "chunks",
    "chunks_free",
    "encode",
    "non_causal",
    "output",
    "projector_free",
    "projector_load",
    "sample_rate",
    "supports_audio",
    "supports_vision",
    "tokenize",
    "uses_mrope",
]

_low: Any = llama_library.import_lowlevel("mtmd_cpp")
# Long calls release the interpreter's lock, short ones keep it; see llama_library.py.
_long: Any = ctypes.CDLL(_low._libmtmd._name)
_short: Any = ctypes.PyDLL(_low._libmtmd._name)

_i32, _ptr, _bool, _str, _size = ctypes.c_int32, ctypes.c_void_p, ctypes.c_bool, ctypes.c_char_p, ctypes.c_size_t
_TEXT: Final = 0


def _bind(library: Any, name: str, result: Any, *arguments: Any) -> Any:
    function = getattr(library, name)
    function.restype, function.argtypes = result, arguments
    return function


@dataclass(frozen=True, kw_only=True)
class ProjectorSettings:
    """What a projector is loaded with.

    Attributes:
        marker: What stands in a prompt for each image or sound.
        flash_attn_type: -1 auto, 0 off, 1 on.
        image_min_tokens, image_max_tokens: Bounds for models that take images of any size; -1 is the model's own.
    """

    marker: bytes
    use_gpu: bool
    n_threads: int
    flash_attn_type: int
    image_min_tokens: int
    image_max_tokens: int


_defaults = _bind(_long, "mtmd_context_params_default", _low.mtmd_context_params)
_init = _bind(_long, "mtmd_init_from_file", _ptr, _str, _ptr, _low.mtmd_context_params)
projector_free: Callable[[int], None] = _bind(_long, "mtmd_free", None, _ptr)
supports_vision: Callable[[int], bool] = _bind(_short, "mtmd_support_vision", _bool, _ptr)
supports_audio: Callable[[int], bool] = _bind(_short, "mtmd_support_audio", _bool, _ptr)
#: Whether the model gives each part of an image several positions (M-RoPE).
uses_mrope: Callable[[int], bool] = _bind(_short, "mtmd_decode_use_mrope", _bool, _ptr)
#: Whether the parts of a chunk see each other, later ones too.
non_causal: Callable[[int, int], bool] = _bind(_short, "mtmd_decode_use_non_causal", _bool, _ptr, _ptr)
#: Samples per second that a sound is resampled to.
sample_rate: Callable[[int], int] = _bind(_short, "mtmd_get_audio_sample_rate", ctypes.c_int, _ptr)
_log_set = _bind(_long, "mtmd_log_set", None, _ptr, _ptr)
_helper_log_set = _bind(_long, "mtmd_helper_log_set", None, _ptr, _ptr)


def projector_load(path: bytes, model: int, settings: ProjectorSettings) -> int | None:
    """Load a projector for a model; ``None`` when it is none, or not of this model."""
    callback = ctypes.cast(llama_log.log_callback(), _ptr)
    _log_set(callback, None)
    _helper_log_set(callback, None)
    params = _defaults()
    params.media_marker = settings.marker
    params.use_gpu = settings.use_gpu
    params.n_threads = settings.n_threads
    params.flash_attn_type = settings.flash_attn_type
    params.image_min_tokens = settings.image_min_tokens
    params.image_max_tokens = settings.image_max_tokens
    params.print_timings = False
    handle: int | None = _init(path, model, params)
    return handle


# --- images and sounds ------------------------------------------------------------------------------------------------

_option_defaults = _bind(_long, "mtmd_helper_init_opt_default", _low.mtmd_helper_init_opt)
_bitmap = _bind(
    _long,
    "mtmd_helper_bitmap_init_from_buf",
    _low.mtmd_helper_bitmap_wrapper,
    _ptr,
    _str,
    _size,
    _bool,
    _low.mtmd_helper_init_opt,
)
_video_free = _bind(_long, "mtmd_helper_video_free", None, _ptr)
bitmap_free: Callable[[int], None] = _bind(_long, "mtmd_bitmap_free", None, _ptr)
#: Width of an image, samples of a sound.
bitmap_n_x: Callable[[int], int] = _bind(_short, "mtmd_bitmap_get_nx", ctypes.c_uint32, _ptr)


def bitmap_load(projector: int, data: bytes) -> int | None:
    """Decode an image or sound file; ``None`` when it is damaged."""
    options = _option_defaults()
    # What is no picture would be tried as a film, by a program that nobody is to start.
    options.video_params.ffmpeg_bin_dir = b"/nonexistent"
    wrapper = _bitmap(projector, data, len(data), False, options)
    if not wrapper.video_ctx:
        bitmap: int | None = wrapper.bitmap
        return bitmap
    if wrapper.bitmap:
        bitmap_free(wrapper.bitmap)
    _video_free(wrapper.video_ctx)
    return None


# --- prompts ----------------------------------------------------------------------------------------------------------

_chunks_init = _bind(_short, "mtmd_input_chunks_init", _ptr)
_chunks_size = _bind(_short, "mtmd_input_chunks_size", _size, _ptr)
_chunks_get = _bind(_short, "mtmd_input_chunks_get", _ptr, _ptr, _size)
chunks_free: Callable[[int], None] = _bind(_long, "mtmd_input_chunks_free", None, _ptr)
# It resizes the images: long.
_tokenize = _bind(
    _long, "mtmd_tokenize", _i32, _ptr, _ptr, ctypes.POINTER(_low.mtmd_input_text), ctypes.POINTER(_ptr), _size
)
_chunk_type = _bind(_short, "mtmd_input_chunk_get_type", _i32, _ptr)
_chunk_tokens = _bind(_short, "mtmd_input_chunk_get_tokens_text", ctypes.POINTER(_i32), _ptr, ctypes.POINTER(_size))
chunk_n_tokens: Callable[[int], int] = _bind(_short, "mtmd_input_chunk_get_n_tokens", _size, _ptr)
#: Positions that a chunk takes; as many as it has tokens, except with M-RoPE.
chunk_n_positions: Callable[[int], int] = _bind(_short, "mtmd_input_chunk_get_n_pos", _i32, _ptr)
_chunk_image = _bind(_short, "mtmd_input_chunk_get_tokens_image", _ptr, _ptr)
_image_positions = _bind(
    _short, "mtmd_helper_image_get_decoder_pos", None, _ptr, _i32, ctypes.POINTER(_low.mtmd_decoder_pos)
)
_chunk_id = _bind(_short, "mtmd_input_chunk_get_id", _str, _ptr)


def tokenize(projector: int, text: bytes, bitmaps: Sequence[int]) -> int | None:
    """Return the chunks of a text, each marker of which stands for the next bitmap; ``None`` when that fails."""
    handle: int = _chunks_init()
    array = (_ptr * len(bitmaps))(*bitmaps)
    wanted = _low.mtmd_input_text(text, len(text), True, True)
    if _tokenize(projector, handle, ctypes.byref(wanted), array, len(bitmaps)):
        chunks_free(handle)
        return None
    return handle


def chunks(handle: int) -> tuple[int, ...]:
    """Return the single chunks; they live as long as all of them."""
    return tuple(_chunks_get(handle, index) for index in range(_chunks_size(handle)))


def chunk_is_text(chunk: int) -> bool:
    """Whether a chunk is of tokens."""
    return bool(_chunk_type(chunk) == _TEXT)


def chunk_file(chunk: int) -> bytes:
    """Return what tells the file of a chunk that is no text: its SHA-256, in hexadecimal."""
    digest: bytes | None = _chunk_id(chunk)
    return digest or b""


def chunk_positions(chunk: int, first: int) -> list[tuple[int, int, int, int]] | None:
    """Return the four positions of each token of an image under M-RoPE, if it begins at ``first``; None for a sound."""
    image: int | None = _chunk_image(chunk)
    if image is None:
        return None
    array = (_low.mtmd_decoder_pos * chunk_n_tokens(chunk))()
    _image_positions(image, first, array)
    return [(place.t, place.y, place.x, place.z) for place in array]


def chunk_text_tokens(chunk: int) -> list[int]:
    """Return the tokens of a chunk of text."""
    count = _size()
    tokens = _chunk_tokens(chunk, ctypes.byref(count))
    return list(tokens[: count.value]) if count.value else []


# --- embeddings -------------------------------------------------------------------------------------------------------

_encode = _bind(_long, "mtmd_encode_chunk", _i32, _ptr, _ptr)
_output = _bind(_short, "mtmd_get_output_embd", _ptr, _ptr)


def encode(projector: int, chunk: int) -> bool:
    """Compute the embeddings of a chunk that is no text; False on failure."""
    return bool(_encode(projector, chunk) == 0)


def output(projector: int) -> int | None:
    """Return the address of the last encoded chunk's embeddings; valid until the next one."""
    address: int | None = _output(projector)
    return address
