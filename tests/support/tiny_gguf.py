"""Tiny GGUF models made on the spot: real files for the real engine, written in milliseconds and the same every time.

===============  ============================================================================================
``random``       llama, F32, random weights: output depends on the whole context; for caches and batches
``random-f16``   the same in F16
``random-bos``   the same weights, and tokenising puts ``<s>`` first
``random-mean``  the same weights, and embeddings are the mean of the tokens'
``random-last``  the same weights, and embeddings are the last token's
``random-infill``  the same weights, ``<s>`` first, and a vocabulary with :data:`INFILL_TOKENS`
``scripted``     llama whose greedy output is exactly :data:`SCRIPT_TEXT`, then the end; for streams and stops
``bert``         embedding model, mean pooling
``rank``         reranker: BERT with a classifier head
``lora``         adapter for ``random``
``mmproj``       image projector for ``random``: 32 x 32 pixels become 16 tokens
``gemma3-eye``   the same, whose parts see each other in the model
``qwen2vl``      ``random`` with positions of four parts (M-RoPE)
``qwen2vl-eye``  projector for it: images of any size, 16 x 16 pixels a token
``ear``          projector for sounds
``mamba``        recurrent model
``gemma2``       sliding-window attention, 16 tokens wide
===============  ============================================================================================

:func:`tiny_model` writes one of these once per process into a temporary directory that goes with the process.
"""

import atexit
import functools
import importlib
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

__all__ = [
    "CHATML",
    "INFILL_TOKENS",
    "SCRIPT",
    "SCRIPT_TEXT",
    "tiny_model",
    "write_audio_mmproj",
    "write_bert",
    "write_gemma2",
    "write_lora",
    "write_mamba",
    "write_mmproj",
    "write_random_llama",
    "write_scripted_llama",
]

gguf: Any = importlib.import_module("gguf")
Array = npt.NDArray[Any]

CHATML: Final = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
#: What the scripted model says after a prompt that ends with a newline, one token each. Pieces must be unique.
SCRIPT: Final = ("Hello", "▁from", "▁a", "▁tiny", "▁GGUF", "▁né", "▁😀", "!")
SCRIPT_TEXT: Final = "Hello from a tiny GGUF né 😀!"

#: What llama.cpp knows by these names: before the gap, after it, the gap, a repository, a file.
INFILL_TOKENS: Final = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|repo_name|>", "<|file_sep|>")

_WIDTH: Final = 64
_LAYERS: Final = 2
_VOCABULARY: Final = 512
_BOS, _EOS = 1, 2


def tiny_model(name: str) -> Path:
    """Return the path of a model from this module's table."""
    return _written(name)


@functools.cache
def _written(name: str) -> Path:
    path = _directory() / f"{name}.gguf"
    _MODELS[name](path)
    return path


@functools.cache
def _directory() -> Path:
    folder = tempfile.mkdtemp(prefix="tiny-gguf-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


# --- pieces of a file -------------------------------------------------------------------------------------------------


class _File:
    """A GGUF file being written: random tensors of a seed, and the keys every architecture needs."""

    def __init__(self, path: Path, architecture: str, seed: int) -> None:
        self.keys: Any = gguf.GGUFWriter(str(path), architecture)
        self._random = np.random.default_rng(seed)

    def normal(self, *shape: int, gain: float = 1.0) -> Array:
        """Return random values scaled so that a product with a unit-variance vector has variance ``gain`` squared."""
        values: Array = self._random.standard_normal(shape) * gain / np.sqrt(shape[-1])
        return values

    def add(self, name: str, values: Array, *, half: bool = False) -> None:
        """Store a tensor as F32, or with ``half`` as F16 (vectors stay F32: llama.cpp wants them so)."""
        kind = np.float16 if half and values.ndim > 1 else np.float32
        self.keys.add_tensor(name, np.ascontiguousarray(values, dtype=kind))

    def add_ones(self, *names: str, size: int = _WIDTH) -> None:
        """Store vectors of ones, which is what a norm starts as."""
        for name in names:
            self.add(name, np.ones(size))

    def close(self) -> None:
        """Write everything."""
        self.keys.write_header_to_file()
        self.keys.write_kv_data_to_file()
        self.keys.write_tensors_to_file()
        self.keys.close()


@dataclass
class _Vocabulary:
    """A SentencePiece vocabulary that can spell every byte, so that any text tokenises."""

    texts: list[bytes] = field(default_factory=list[bytes])
    scores: list[float] = field(default_factory=list[float])
    kinds: list[int] = field(default_factory=list[int])

    @classmethod
    def spelling(cls, words: Iterable[str] = (), controls: Iterable[str] = ()) -> "_Vocabulary":
        """Make a vocabulary of control tokens, those of ``controls`` among them, bytes, single characters and
        ``words``.
        """
        vocabulary, kinds = cls(), gguf.TokenType
        vocabulary._add("<unk>", kinds.UNKNOWN)
        vocabulary._add("<s>", kinds.CONTROL)
        vocabulary._add("</s>", kinds.CONTROL)
        for byte in range(256):
            vocabulary._add(f"<0x{byte:02X}>", kinds.BYTE)
        for text in ("<|im_start|>", "<|im_end|>", *controls):
            vocabulary._add(text, kinds.CONTROL)
        for text in ("<tool_call>", "</tool_call>"):
            if text.encode() not in vocabulary.texts:
                vocabulary._add(text, kinds.USER_DEFINED)
        letters = "abcdefghijklmnopqrstuvwxyz"
        characters = f"▁{letters}{letters.upper()}0123456789.,:;!?'\"{{}}[]()-_/\\\n"
        for rank, text in enumerate((*characters, *words), start=1):
            # llama.cpp aborts the process over a duplicate.
            if text.encode() not in vocabulary.texts:
                vocabulary._add(text, kinds.NORMAL, -float(rank))
        while len(vocabulary.texts) < _VOCABULARY:
            vocabulary._add(f"<pad{len(vocabulary.texts)}>", kinds.UNUSED, -1e4)
        return vocabulary

    def _add(self, text: str, kind: Any, score: float = 0.0) -> None:
        self.texts.append(text.encode())
        self.scores.append(score)
        self.kinds.append(int(kind))

    def __len__(self) -> int:
        return len(self.texts)

    def index(self, text: str) -> int:
        return self.texts.index(text.encode())

    def store(self, file: _File, *, add_bos: bool = False) -> None:
        """Write the tokenizer's keys."""
        keys = file.keys
        keys.add_tokenizer_model("llama")
        keys.add_tokenizer_pre("default")
        keys.add_token_list(self.texts)
        keys.add_token_scores(self.scores)
        keys.add_token_types(self.kinds)
        keys.add_bos_token_id(_BOS)
        keys.add_eos_token_id(_EOS)
        keys.add_eot_token_id(self.index("<|im_end|>"))
        keys.add_unk_token_id(0)
        keys.add_add_bos_token(add_bos)
        keys.add_add_space_prefix(False)
        keys.add_vocab_size(len(self))


# --- llama ------------------------------------------------------------------------------------------------------------


def _llama_keys(file: _File, *, context: int, heads: int, kv_heads: int, hidden: int, half: bool) -> None:
    keys = file.keys
    keys.add_name("tiny")
    keys.add_context_length(context)
    keys.add_embedding_length(_WIDTH)
    keys.add_block_count(_LAYERS)
    keys.add_feed_forward_length(hidden)
    keys.add_head_count(heads)
    keys.add_head_count_kv(kv_heads)
    keys.add_layer_norm_rms_eps(1e-5)
    keys.add_rope_dimension_count(_WIDTH // heads)
    keys.add_file_type(gguf.LlamaFileType.MOSTLY_F16 if half else gguf.LlamaFileType.ALL_F32)


def _llama_tensors(file: _File, embedding: Array, output: Array, *, gain: float, half: bool) -> None:
    """Write embedding, layers and output. ``gain`` 0 silences the layers: the last token alone decides."""
    heads, kv_heads, hidden = 4, 2, 128
    kv_width = kv_heads * _WIDTH // heads
    file.add("token_embd.weight", embedding, half=half)
    file.add("output.weight", output, half=half)
    file.add_ones("output_norm.weight")
    for layer in range(_LAYERS):
        at = f"blk.{layer}."
        file.add_ones(at + "attn_norm.weight", at + "ffn_norm.weight")
        file.add(at + "attn_q.weight", file.normal(_WIDTH, _WIDTH, gain=2), half=half)
        file.add(at + "attn_k.weight", file.normal(kv_width, _WIDTH, gain=2), half=half)
        file.add(at + "attn_v.weight", file.normal(kv_width, _WIDTH), half=half)
        file.add(at + "attn_output.weight", file.normal(_WIDTH, _WIDTH, gain=gain), half=half)
        file.add(at + "ffn_gate.weight", file.normal(hidden, _WIDTH), half=half)
        file.add(at + "ffn_up.weight", file.normal(hidden, _WIDTH), half=half)
        file.add(at + "ffn_down.weight", file.normal(_WIDTH, hidden, gain=gain), half=half)


def _unit_rows(values: Array) -> Array:
    rows: Array = values / np.linalg.norm(values, axis=1, keepdims=True)
    return rows


def write_random_llama(
    path: Path,
    *,
    seed: int = 0,
    half: bool = False,
    context: int = 4096,
    add_bos: bool = False,
    template: str | None = CHATML,
    poison: bool = False,
    duplicate: bool = False,
    blind: bool = False,
    pooling: str = "",
    controls: Sequence[str] = (),
    architecture: str = "llama",
) -> None:
    """Write a llama with random weights, 572 KB. ``template`` None leaves it out. ``poison`` makes its logits NaN, and
    ``blind`` its embeddings too; ``duplicate`` has a token twice, over which llama.cpp aborts.

    ``pooling`` is one of gguf's names, such as ``MEAN``; without it the file names none. ``controls`` are further
    control tokens. With the ``architecture`` ``qwen2vl`` its positions are of four parts (M-RoPE).
    """
    file, vocabulary = _File(path, architecture, seed), _Vocabulary.spelling(controls=controls)
    if architecture == "qwen2vl":
        file.keys.add_rope_dimension_sections([2, 3, 3, 0])
    if duplicate:
        vocabulary.texts[-1] = vocabulary.texts[-2]
    _llama_keys(file, context=context, heads=4, kv_heads=2, hidden=128, half=half)
    vocabulary.store(file, add_bos=add_bos)
    if template is not None:
        file.keys.add_chat_template(template)
    if pooling:
        file.keys.add_pooling_type(gguf.PoolingType[pooling])
    output = file.normal(len(vocabulary), _WIDTH, gain=6)
    if poison:
        output[:] = np.nan
    embedding = _unit_rows(file.normal(len(vocabulary), _WIDTH))
    if blind:
        embedding[:] = np.nan
    _llama_tensors(file, embedding, output, gain=2, half=half)
    file.close()


def write_scripted_llama(
    path: Path,
    *,
    script: Sequence[str] = SCRIPT,
    seed: int = 0,
    template: str = CHATML,
    context: int = 4096,
    controls: Sequence[str] = (),
    after: Sequence[str] = (),
    tool_template: str = "",
    recommends: Mapping[str, int | float | str] | None = None,
) -> None:
    """Write a llama that says ``script`` after a newline, one piece per token, and then ends. Greedy only.

    ``controls`` are control tokens, which may be pieces too; ``after`` are further tokens that the script begins after.
    ``recommends`` are its ``general.sampling`` keys.

    Its layers are silent, so the hidden state is the last token's embedding; the output matrix answers each embedding
    with the token that follows. A token outside the script repeats itself. Pieces start with ``▁`` for a space and are
    unique.
    """
    file, vocabulary = _File(path, "llama", seed), _Vocabulary.spelling(script, controls)
    _llama_keys(file, context=context, heads=4, kv_heads=2, hidden=128, half=False)
    vocabulary.store(file)
    file.keys.add_chat_template(template)
    if tool_template:
        file.keys.add_string("tokenizer.chat_template.tool_use", tool_template)
    for name, value in (recommends or {}).items():
        key = f"general.sampling.{name}"
        if isinstance(value, str):
            file.keys.add_string(key, value)
        elif isinstance(value, int):
            file.keys.add_int32(key, value)
        else:
            file.keys.add_float32(key, value)
    ids = [vocabulary.index(piece) for piece in script]
    following = {token: token for token in range(len(vocabulary))}
    following.update(zip(ids, [*ids[1:], _EOS], strict=True))
    for start in ("\n", "<0x0A>", *after):
        following[vocabulary.index(start)] = ids[0]
    embedding = _unit_rows(file.normal(len(vocabulary), _WIDTH))
    output = np.zeros_like(embedding)
    for token, successor in following.items():
        output[successor] += 20 * embedding[token]
    _llama_tensors(file, embedding, output, gain=0, half=False)
    file.close()


# --- others -----------------------------------------------------------------------------------------------------------


def write_bert(path: Path, *, rank: bool = False, seed: int = 0, context: int = 512) -> None:
    """Write a BERT with mean pooling, or with ``rank`` one that scores pairs."""
    file, hidden = _File(path, "bert", seed), 128
    size = _bert_keys(file, rank=rank, hidden=hidden, context=context)
    file.add("token_embd.weight", file.normal(size, _WIDTH, gain=8))
    file.add("token_types.weight", file.normal(2, _WIDTH, gain=0.8))
    file.add("position_embd.weight", file.normal(context, _WIDTH, gain=0.8))
    _bert_norm(file, "token_embd_norm")
    for layer in range(_LAYERS):
        at = f"blk.{layer}."
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            _bert_linear(file, at + name, _WIDTH, _WIDTH)
        _bert_linear(file, at + "ffn_up", hidden, _WIDTH)
        _bert_linear(file, at + "ffn_down", _WIDTH, hidden)
        _bert_norm(file, at + "attn_output_norm")
        _bert_norm(file, at + "layer_output_norm")
    if rank:
        _bert_linear(file, "cls", _WIDTH, _WIDTH)
        _bert_linear(file, "cls.output", 1, _WIDTH)
    file.close()


def _bert_linear(file: _File, name: str, rows: int, columns: int) -> None:
    file.add(name + ".weight", file.normal(rows, columns))
    file.add(name + ".bias", np.zeros(rows))


def _bert_norm(file: _File, name: str) -> None:
    file.add_ones(name + ".weight")
    file.add(name + ".bias", np.zeros(_WIDTH))


def _bert_keys(file: _File, *, rank: bool, hidden: int, context: int) -> int:
    """Write the keys of a BERT with a WordPiece vocabulary; return the vocabulary's size."""
    keys, kinds = file.keys, gguf.TokenType
    special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    characters = "abcdefghijklmnopqrstuvwxyz0123456789.,!?'-"
    words = ("hello", "world", "cat", "dog", "king", "queen", "paris", "france")
    # In a GGUF the pieces that begin a word carry the mark, and those that continue one are bare.
    pieces = [f"▁{text}" for text in (*characters, *words)] + [*characters, "ing"]
    texts = [text.encode() for text in (*special, *pieces)]
    keys.add_name("tiny-bert")
    keys.add_context_length(context)
    keys.add_embedding_length(_WIDTH)
    keys.add_block_count(_LAYERS)
    keys.add_feed_forward_length(hidden)
    keys.add_head_count(4)
    keys.add_layer_norm_eps(1e-12)
    keys.add_causal_attention(False)
    keys.add_file_type(gguf.LlamaFileType.ALL_F32)
    keys.add_pooling_type(gguf.PoolingType.RANK if rank else gguf.PoolingType.MEAN)
    keys.add_token_type_count(2)
    keys.add_vocab_size(len(texts))
    keys.add_tokenizer_model("bert")
    keys.add_tokenizer_pre("default")
    keys.add_token_list(texts)
    control = [kinds.UNUSED, kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL, kinds.CONTROL]
    keys.add_token_types([int(kind) for kind in (*control, *[kinds.NORMAL] * len(pieces))])
    keys.add_pad_token_id(0)
    keys.add_unk_token_id(1)
    keys.add_bos_token_id(2)
    keys.add_eos_token_id(3)
    keys.add_sep_token_id(3)
    keys.add_mask_token_id(4)
    keys.add_add_bos_token(True)
    keys.add_add_eos_token(True)
    if rank:
        keys.add_classifier_output_labels(["score"])
    return len(texts)


def write_lora(
    path: Path,
    *,
    seed: int = 5,
    rank: int = 4,
    alpha: float = 8.0,
    architecture: str = "llama",
    width: int = _WIDTH,
    layers: int = _LAYERS,
    invocation: Sequence[int] = (),
    half: bool = False,
) -> None:
    """Write an adapter for :func:`write_random_llama` that changes its output.

    Another ``architecture``, ``width`` or number of ``layers`` makes one that does not fit; ``invocation`` tokens make
    an activated one; ``half`` leaves out every second tensor.
    """
    file = _File(path, architecture, seed)
    file.keys.add_type("adapter")
    file.keys.add_string("adapter.type", "lora")
    file.keys.add_string("adapter.lora.task_name", "nonsense")
    file.keys.add_float32("adapter.lora.alpha", alpha)
    if invocation:
        key, tokens = "adapter.alora.invocation_tokens", list(invocation)
        file.keys.add_key_value(key, tokens, gguf.GGUFValueType.ARRAY, sub_type=gguf.GGUFValueType.UINT32)
    for layer in range(layers):
        for name, columns in (("attn_q", width), ("ffn_down", 128)):
            file.add(f"blk.{layer}.{name}.weight.lora_a", file.normal(rank, columns, gain=8))
            if not half:
                file.add(f"blk.{layer}.{name}.weight.lora_b", file.normal(width, rank, gain=2))
    file.close()


def write_mmproj(
    path: Path, *, kind: str = "mlp", seed: int = 0, image: int = 32, patch: int = 8, output: int = _WIDTH
) -> None:
    """Write a vision projector whose output fits the llamas of this module, unless another ``output`` width is given.

    ``kind`` is the projector's type: ``mlp``; ``gemma3``, the parts of whose images see each other in the model; or
    ``qwen2vl_merger``, whose parts have two-dimensional positions.
    """
    file, width, hidden = _File(path, "clip", seed), 32, 64
    keys = file.keys
    keys.add_type("mmproj")
    keys.add_bool("clip.has_vision_encoder", True)
    keys.add_bool("clip.use_gelu", True)
    keys.add_string("clip.projector_type", kind)
    keys.add_file_type(gguf.LlamaFileType.ALL_F32)
    for name, value in (
        ("embedding_length", width),
        ("attention.head_count", 2),
        ("feed_forward_length", hidden),
        ("block_count", _LAYERS),
        ("projection_dim", output),
        ("image_size", image),
        ("patch_size", patch),
        ("projector.scale_factor", 1),
    ):
        keys.add_uint32(f"clip.vision.{name}", value)
    keys.add_float32("clip.vision.attention.layer_norm_epsilon", 1e-5)
    keys.add_array("clip.vision.image_mean", [0.5] * 3)
    keys.add_array("clip.vision.image_std", [0.5] * 3)
    file.add("v.patch_embd.weight", file.normal(width, 3, patch, patch))
    patches = (image // patch) ** 2
    if kind == "qwen2vl_merger":
        keys.add_uint32("clip.vision.spatial_merge_size", 2)
        file.add("v.patch_embd.weight.1", file.normal(width, 3, patch, patch))
        _clip_layers(file, width, hidden, "v.post_ln")
        for name, rows in (("mm.0", 4 * width), ("mm.2", output)):
            file.add(name + ".weight", file.normal(rows, 4 * width))
            file.add(name + ".bias", np.zeros(rows))
    elif kind == "gemma3":
        file.add("v.position_embd.weight", file.normal(patches, width))
        _clip_layers(file, width, hidden, "v.post_ln")
        file.add_ones("mm.soft_emb_norm.weight", size=width)
        file.add("mm.input_projection.weight", file.normal(width, output))
    else:
        file.add("v.class_embd", file.normal(width))
        file.add("v.position_embd.weight", file.normal(patches + 1, width))
        _clip_layers(file, width, hidden, "v.pre_ln")
        for name, columns in (("mm.0", width), ("mm.2", output)):
            file.add(name + ".weight", file.normal(output, columns))
            file.add(name + ".bias", np.zeros(output))
    file.close()


def write_audio_mmproj(path: Path, *, seed: int = 0) -> None:
    """Write a sound projector for the llamas of this module: 30 seconds become 75 tokens."""
    file, width, hidden, mel_bins, stacked, frames = _File(path, "clip", seed), 32, 64, 80, 20, 1500
    keys = file.keys
    keys.add_type("mmproj")
    keys.add_bool("clip.has_audio_encoder", True)
    keys.add_bool("clip.use_gelu", True)
    keys.add_string("clip.projector_type", "ultravox")
    keys.add_file_type(gguf.LlamaFileType.ALL_F32)
    for name, value in (
        ("embedding_length", width),
        ("attention.head_count", 2),
        ("feed_forward_length", hidden),
        ("block_count", _LAYERS),
        ("projection_dim", _WIDTH),
        ("num_mel_bins", mel_bins),
        ("projector.stack_factor", stacked),
    ):
        keys.add_uint32(f"clip.audio.{name}", value)
    keys.add_float32("clip.audio.attention.layer_norm_epsilon", 1e-5)
    file.add("a.position_embd.weight", file.normal(frames, width))
    for number, inputs in ((1, mel_bins), (2, width)):
        file.add(f"a.conv1d.{number}.weight", file.normal(width, inputs, 3), half=True)
        file.add(f"a.conv1d.{number}.bias", np.zeros((width, 1)))
    _clip_layers(file, width, hidden, "a.post_ln", part="a")
    file.add_ones("mm.a.norm_pre.weight", size=width * stacked)
    file.add_ones("mm.a.norm_mid.weight", size=hidden)
    file.add("mm.a.mlp.1.weight", file.normal(2 * hidden, width * stacked))
    file.add("mm.a.mlp.2.weight", file.normal(_WIDTH, hidden))
    file.close()


def _clip_layers(file: _File, width: int, hidden: int, norm: str, part: str = "v") -> None:
    norms, linears = [norm], list[tuple[str, int, int]]()
    for layer in range(_LAYERS):
        at = f"{part}.blk.{layer}."
        norms += [at + "ln1", at + "ln2"]
        linears += [(at + name, width, width) for name in ("attn_q", "attn_k", "attn_v", "attn_out")]
        linears += [(at + "ffn_up", hidden, width), (at + "ffn_down", width, hidden)]
    for name in norms:
        file.add_ones(name + ".weight", size=width)
        file.add(name + ".bias", np.zeros(width))
    for name, rows, columns in linears:
        file.add(name + ".weight", file.normal(rows, columns))
        if part == "v" or not name.endswith("attn_k"):  # Whisper's keys have no bias
            file.add(name + ".bias", np.zeros(rows))


def write_mamba(path: Path, *, seed: int = 0) -> None:
    """Write a recurrent model: its sequences cannot be cut at an arbitrary token."""
    file, vocabulary = _File(path, "mamba", seed), _Vocabulary.spelling()
    inner, state, rank, convolution = 128, 16, 4, 4
    keys = file.keys
    vocabulary.store(file)
    keys.add_context_length(4096)
    keys.add_embedding_length(_WIDTH)
    keys.add_block_count(_LAYERS)
    keys.add_feed_forward_length(0)
    keys.add_head_count(0)
    keys.add_ssm_conv_kernel(convolution)
    keys.add_ssm_inner_size(inner)
    keys.add_ssm_state_size(state)
    keys.add_ssm_time_step_rank(rank)
    keys.add_layer_norm_rms_eps(1e-5)
    keys.add_file_type(gguf.LlamaFileType.ALL_F32)
    file.add("token_embd.weight", file.normal(len(vocabulary), _WIDTH, gain=8))
    file.add("output.weight", file.normal(len(vocabulary), _WIDTH, gain=4))
    file.add_ones("output_norm.weight")
    for layer in range(_LAYERS):
        at = f"blk.{layer}."
        file.add_ones(at + "attn_norm.weight")
        file.add_ones(at + "ssm_d", size=inner)
        file.add(at + "ssm_in.weight", file.normal(2 * inner, _WIDTH))
        file.add(at + "ssm_conv1d.weight", file.normal(inner, convolution))
        file.add(at + "ssm_conv1d.bias", np.zeros(inner))
        file.add(at + "ssm_x.weight", file.normal(rank + 2 * state, inner))
        file.add(at + "ssm_dt.weight", file.normal(inner, rank))
        file.add(at + "ssm_dt.bias", np.zeros(inner))
        file.add(at + "ssm_a", -np.abs(file.normal(inner, state, gain=4)))
        file.add(at + "ssm_out.weight", file.normal(_WIDTH, inner))
    file.close()


def write_gemma2(path: Path, *, seed: int = 0, window: int = 16) -> None:
    """Write a model with sliding-window attention in every other layer."""
    file, vocabulary = _File(path, "gemma2", seed), _Vocabulary.spelling()
    heads, kv_heads, head, hidden = 4, 2, 16, 128
    keys = file.keys
    vocabulary.store(file)
    keys.add_context_length(4096)
    keys.add_embedding_length(_WIDTH)
    keys.add_block_count(_LAYERS)
    keys.add_feed_forward_length(hidden)
    keys.add_head_count(heads)
    keys.add_head_count_kv(kv_heads)
    keys.add_key_length(head)
    keys.add_value_length(head)
    keys.add_layer_norm_rms_eps(1e-6)
    keys.add_attn_logit_softcapping(50.0)
    keys.add_final_logit_softcapping(30.0)
    keys.add_sliding_window(window)
    keys.add_file_type(gguf.LlamaFileType.ALL_F32)
    # Also the output matrix; larger values would only repeat the last token.
    file.add("token_embd.weight", file.normal(len(vocabulary), _WIDTH, gain=0.5))
    file.add_ones("output_norm.weight")
    for layer in range(_LAYERS):
        at = f"blk.{layer}."
        file.add_ones(*(at + f"{name}.weight" for name in ("attn_norm", "post_attention_norm")))
        file.add_ones(*(at + f"{name}.weight" for name in ("ffn_norm", "post_ffw_norm")))
        file.add(at + "attn_q.weight", file.normal(heads * head, _WIDTH))
        file.add(at + "attn_k.weight", file.normal(kv_heads * head, _WIDTH))
        file.add(at + "attn_v.weight", file.normal(kv_heads * head, _WIDTH))
        file.add(at + "attn_output.weight", file.normal(_WIDTH, heads * head))
        file.add(at + "ffn_gate.weight", file.normal(hidden, _WIDTH))
        file.add(at + "ffn_up.weight", file.normal(hidden, _WIDTH))
        file.add(at + "ffn_down.weight", file.normal(_WIDTH, hidden))
    file.close()


_MODELS: Final[dict[str, Callable[[Path], None]]] = {
    "random": write_random_llama,
    "random-f16": functools.partial(write_random_llama, half=True),
    "random-bos": functools.partial(write_random_llama, add_bos=True),
    "random-mean": functools.partial(write_random_llama, pooling="MEAN"),
    "random-last": functools.partial(write_random_llama, pooling="LAST"),
    "random-infill": functools.partial(write_random_llama, add_bos=True, controls=INFILL_TOKENS),
    "scripted": write_scripted_llama,
    "bert": write_bert,
    "rank": functools.partial(write_bert, rank=True),
    "lora": write_lora,
    "mmproj": write_mmproj,
    "qwen2vl": functools.partial(write_random_llama, architecture="qwen2vl"),
    "qwen2vl-eye": functools.partial(write_mmproj, kind="qwen2vl_merger"),
    "gemma3-eye": functools.partial(write_mmproj, kind="gemma3"),
    "ear": write_audio_mmproj,
    "mamba": write_mamba,
    "gemma2": write_gemma2,
}
