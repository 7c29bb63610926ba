"""Llama models of any size with random weights in Q8_0: what weighs on a GPU as a real one does, and knows nothing.

A matrix of each shape is drawn once and stored for every layer, so that eight gigabytes are written as fast as the disk
takes them.
"""

import functools
import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

__all__ = ["LARGE", "MIDDLE", "LlamaShape", "write_large_llama"]

gguf: Any = importlib.import_module("gguf")

_BLOCK: Final = 32
#: Standard deviation of the whole numbers in a block; few are cut off at 127.
_SPREAD: Final = 40
_BOS, _EOS = 1, 2


@dataclass(frozen=True)
class LlamaShape:
    """The sizes of a llama; widths are multiples of 32, and of the heads."""

    layers: int
    width: int
    hidden: int
    heads: int
    kv_heads: int
    vocabulary: int = 32_000
    context: int = 131_072


#: 0.8 GB.
MIDDLE: Final = LlamaShape(layers=16, width=2048, hidden=5632, heads=16, kv_heads=4)
#: 8.5 GB, the shape of Llama 3 8B.
LARGE: Final = LlamaShape(layers=32, width=4096, hidden=14_336, heads=32, kv_heads=8, vocabulary=128_256)


def write_large_llama(path: Path, shape: LlamaShape, *, seed: int = 0) -> None:
    """Write a llama of that shape. Every id from 300 on is an ordinary token of a few letters."""
    keys = gguf.GGUFWriter(str(path), "llama")
    keys.add_name("random")
    keys.add_context_length(shape.context)
    keys.add_embedding_length(shape.width)
    keys.add_block_count(shape.layers)
    keys.add_feed_forward_length(shape.hidden)
    keys.add_head_count(shape.heads)
    keys.add_head_count_kv(shape.kv_heads)
    keys.add_layer_norm_rms_eps(1e-5)
    keys.add_rope_dimension_count(shape.width // shape.heads)
    keys.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    _add_vocabulary(keys, shape.vocabulary)
    _add_tensors(keys, shape, np.random.default_rng(seed))
    keys.write_header_to_file()
    keys.write_kv_data_to_file()
    keys.write_tensors_to_file()
    keys.close()


def _add_vocabulary(keys: Any, size: int) -> None:
    kinds = gguf.TokenType
    texts = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    types = [kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL, *[kinds.BYTE] * 256, kinds.NORMAL]
    texts += [f"▁w{number}" for number in range(len(texts), size)]
    types += [kinds.NORMAL] * (size - len(types))
    keys.add_tokenizer_model("llama")
    keys.add_tokenizer_pre("default")
    keys.add_token_list([text.encode() for text in texts])
    keys.add_token_scores([-float(number) for number in range(size)])
    keys.add_token_types([int(kind) for kind in types])
    keys.add_bos_token_id(_BOS)
    keys.add_eos_token_id(_EOS)
    keys.add_unk_token_id(0)
    keys.add_add_bos_token(False)
    keys.add_add_space_prefix(False)
    keys.add_vocab_size(size)


def _add_tensors(keys: Any, shape: LlamaShape, random: np.random.Generator) -> None:
    @functools.cache
    def matrix(rows: int, columns: int) -> npt.NDArray[np.uint8]:
        """Return blocks of a scale and 32 whole numbers, scaled so that a product keeps the variance of its vector."""
        blocks = np.zeros((rows, columns // _BLOCK, 2 + _BLOCK), np.uint8)
        drawn = random.standard_normal((rows, columns // _BLOCK, _BLOCK), np.float32)
        numbers = (drawn * _SPREAD).clip(-127, 127).astype(np.int8)
        blocks[..., :2] = np.array([1 / (_SPREAD * np.sqrt(columns))], np.float16).view(np.uint8)
        blocks[..., 2:] = numbers.view(np.uint8)
        return blocks.reshape(rows, -1)

    def add(name: str, rows: int, columns: int) -> None:
        keys.add_tensor(name, matrix(rows, columns), raw_dtype=gguf.GGMLQuantizationType.Q8_0)

    width, hidden = shape.width, shape.hidden
    kv_width = width // shape.heads * shape.kv_heads
    ones = np.ones(width, np.float32)
    add("token_embd.weight", shape.vocabulary, width)
    add("output.weight", shape.vocabulary, width)
    keys.add_tensor("output_norm.weight", ones)
    for layer in range(shape.layers):
        at = f"blk.{layer}."
        keys.add_tensor(at + "attn_norm.weight", ones)
        keys.add_tensor(at + "ffn_norm.weight", ones)
        add(at + "attn_q.weight", width, width)
        add(at + "attn_k.weight", kv_width, width)
        add(at + "attn_v.weight", kv_width, width)
        add(at + "attn_output.weight", width, width)
        add(at + "ffn_gate.weight", hidden, width)
        add(at + "ffn_up.weight", hidden, width)
        add(at + "ffn_down.weight", width, hidden)
