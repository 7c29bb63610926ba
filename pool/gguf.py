"""What a model is, read from its GGUF file without loading it."""

import functools
from pathlib import Path
from typing import Final

import msgspec

from llamaherd.pool.catalog import model_parts
from llamaherd.pool.gguf_header import Array, GGUFError, Header, read_header
from llamaherd.pool.gguf_memory import Attention, RecurrentState, estimate_bytes, kv_bytes

__all__ = ["GGUFError", "ModelFacts", "estimate_bytes", "kv_bytes", "modalities_of", "read_facts"]

#: llama.cpp's LLAMA_MAX_LAYERS.
MAX_LAYERS: Final = 512
MAX_SHARDS: Final = 1000
MAX_NAME_LENGTH: Final = 256
_INT32_MAX: Final = 2**31 - 1
_UNKNOWN: Final = "unknown"
#: llama.cpp's mark on a ``llama_ftype`` that was not in the file.
_GUESSED: Final = 1024

#: llama.cpp's ``llama_ftype`` (include/llama.h), by the names that its tools use.
_QUANTIZATIONS: Final = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K", 11: "Q3_K_S", 12: "Q3_K_M",
    13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K", 19: "IQ2_XXS", 20: "IQ2_XS",
    21: "Q2_K_S", 22: "IQ3_XS", 23: "IQ3_XXS", 24: "IQ1_S", 25: "IQ4_NL", 26: "IQ3_S", 27: "IQ3_M", 28: "IQ2_S",
    29: "IQ2_M", 30: "IQ4_XS", 31: "IQ1_M", 32: "BF16", 36: "TQ1_0", 37: "TQ2_0", 38: "MXFP4_MOE", 39: "NVFP4",
    40: "Q1_0", 41: "Q2_0",
}  # fmt: skip

#: Architectures whose sliding window has a default pattern in llama.cpp (src/models): one layer in so many sees
#: everything, and whether that is the first of them or the last.
_WINDOW_PATTERNS: Final = {
    "afmoe": (4, False),
    "cohere2": (4, False),
    "exaone4": (4, False),
    "gemma2": (2, False),
    "gemma3": (6, False),
    "gemma3n": (5, False),
    "gpt-oss": (2, False),
    "olmo2": (4, False),
    "plamo3": (8, False),
    "smallthinker": (4, True),
}
#: Architectures to which llama.cpp gives no cache: encoders, and those that decode by diffusion.
_UNCACHED: Final = frozenset(
    {"bert", "dream", "eurobert", "gemma-embedding", "jina-bert-v2", "jina-bert-v3", "llada", "llada-moe"}
    | {"modern-bert", "neo-bert", "nomic-bert", "nomic-bert-moe", "rnd1", "wavtokenizer-dec"}
)
#: Architectures without any attention.
_RECURRENT: Final = frozenset({"arwkv7", "mamba", "mamba2", "rwkv6", "rwkv6qwen2", "rwkv7"})
#: Every layer has attention and a running state.
_BOTH: Final = frozenset({"falcon-h1"})
#: Layers of gemma3n with a cache of their own; the others share it.
_GEMMA3N_CACHED: Final = 20


class ModelFacts(msgspec.Struct, frozen=True, kw_only=True):
    """A model's facts. Numbers that the file does not tell are 0, texts are empty.

    Attributes:
        name: ``general.name``, for people.
        kind: ``model``, ``mmproj`` (a projector that goes with a model), ``adapter`` (LoRA) and so on.
        n_params: Elements of all tensors.
        size_bytes: Size of the file, or of all parts of a split one.
        quantization: llama.cpp's name for it: ``Q4_K_M``, ``F16``; ``unknown`` if the file does not tell.
        n_ctx_train: Tokens of the context that it was trained on.
        n_vocab: Entries of the vocabulary.
        n_embd: Width of the embeddings.
        n_ff: Width of the widest feed-forward layer.
        n_head: Attention heads of each layer.
        attention: What each layer keeps of a token.
        state: What recurrent layers keep of a sequence.
        sliding_window: Tokens that layers with a window see; 0 if none has one.
        chat_template: Jinja source. Untrusted.
        tokenizer: Kind of the tokenizer: ``gpt2`` (BPE), ``llama`` (SentencePiece), ``bert`` and so on.
        modalities: What it takes in: ``text``; for a projector ``vision`` and ``audio``.
        shards: Files that the model consists of.
    """

    name: str
    architecture: str
    kind: str
    n_params: int
    size_bytes: int
    quantization: str
    n_ctx_train: int
    n_vocab: int
    n_layer: int
    n_embd: int
    n_ff: int
    n_head: tuple[int, ...]
    attention: Attention
    state: RecurrentState
    sliding_window: int
    chat_template: str
    tokenizer: str
    modalities: tuple[str, ...]
    shards: int

    @property
    def n_head_kv(self) -> tuple[int, ...]:
        """Key and value heads of each layer; 0 for one without attention."""
        return self.attention.n_head_kv


def read_facts(path: Path) -> ModelFacts:
    """Return a model's facts from its file, or from all parts of a split one by the path of the first.

    Reads the headers only, usually some megabytes; a tokenizer's tables are walked over and not built.

    Raises:
        GGUFError: a file cannot be read, is no sound GGUF file, has impossible numbers, or is a later part of a split
            model.
    """
    header = read_header(path)
    keys = _Keys(path, header)
    parts = _parts(path, keys)
    further = [read_header(part) for part in parts[1:]]
    layers = keys.number("block_count", most=MAX_LAYERS)
    n_head = keys.per_layer("attention.head_count", layers)
    attention = _attention(keys, layers, n_head)
    return ModelFacts(
        name=_clean(keys.text("general.name")),
        architecture=keys.architecture,
        kind=_clean(keys.text("general.type")) or ("mmproj" if keys.architecture == "clip" else "model"),
        n_params=sum(part.n_elements for part in (header, *further)),
        size_bytes=sum(part.file_bytes for part in (header, *further)),
        quantization=_quantization(keys),
        n_ctx_train=keys.number("context_length"),
        n_vocab=keys.number("vocab_size") or keys.length("tokenizer.ggml.tokens"),
        n_layer=layers,
        n_embd=keys.number("embedding_length"),
        n_ff=max(keys.per_layer("feed_forward_length", layers), default=0),
        n_head=n_head,
        attention=attention,
        state=_state(keys, layers, attention),
        sliding_window=keys.number("attention.sliding_window"),
        chat_template=keys.text("tokenizer.chat_template"),
        tokenizer=_clean(keys.text("tokenizer.ggml.model")),
        modalities=_modalities(keys),
        shards=len(parts),
    )


def modalities_of(projector: Path | None) -> tuple[str, ...]:
    """Return what a model with this projector takes in: ``text``, and ``image`` and ``audio`` as the file says.

    One that cannot be read adds nothing; its load will fail, and say why.
    """
    if projector is None:
        return ("text",)
    try:
        told = _projector_takes(projector)
    except GGUFError:
        told = ()
    return ("text", *(name for name, word in (("image", "vision"), ("audio", "audio")) if word in told))


@functools.lru_cache(maxsize=4096)
def _projector_takes(path: Path) -> tuple[str, ...]:
    # Lists of models ask again and again. What cannot be read is not remembered: it may come yet.
    return read_facts(path).modalities


class _Keys:
    """A header's metadata, with what is of the wrong type or size refused."""

    def __init__(self, path: Path, header: Header) -> None:
        self.path = path
        self._keys = header.keys
        self.architecture = ""
        if self.plain("split.no"):
            raise self.error(f"part {self.plain('split.no') + 1} of a split model: name the first part")
        self.architecture = self.text("general.architecture")
        if not self.architecture or self.architecture != _clean(self.architecture)[:64]:
            raise self.error("a model without the name of its architecture")

    def error(self, what: str) -> GGUFError:
        return GGUFError(f"{self.path} is {what}", code="bad_gguf")

    def text(self, key: str) -> str:
        value = self._keys.get(key, "")
        return value if isinstance(value, str) else ""

    def plain(self, key: str, most: int = _INT32_MAX) -> int:
        """Return a whole number, 0 if there is none."""
        return self._checked(key, self._keys.get(key, 0), most)

    def flag(self, key: str) -> bool:
        return self._keys.get(key) is True

    def length(self, key: str) -> int:
        value = self._keys.get(key)
        return value.length if isinstance(value, Array) else 0

    def tells(self, key: str) -> bool:
        return key in self._keys

    def has(self, key: str) -> bool:
        """Whether there is such a key of the architecture's."""
        return self.tells(f"{self.architecture}.{key}")

    def number(self, key: str, most: int = _INT32_MAX) -> int:
        """Return a whole number of the architecture's, 0 if there is none."""
        return self.plain(f"{self.architecture}.{key}", most)

    def per_layer(self, key: str, layers: int) -> tuple[int, ...]:
        """Return one whole number for each layer, from an array or from a number for all; 0 for those not told."""
        full = f"{self.architecture}.{key}"
        value = self._keys.get(full, 0)
        if not isinstance(value, Array):
            return (self._checked(full, value, _INT32_MAX),) * layers
        told = tuple(self._checked(full, one, _INT32_MAX) for one in value.values[:layers])
        return told + (0,) * (layers - len(told))

    def _checked(self, key: str, value: object, most: int) -> int:
        if isinstance(value, Array):  # some keys are arrays for a few models; their largest stands for them
            return max((self._checked(key, one, most) for one in value.values), default=0)
        if not isinstance(value, int) or not 0 <= value <= most:
            shown = value if isinstance(value, int | float) else "no number"
            raise self.error(f"a model with {key[:64]!r} {shown}, which is not from 0 to {most}")
        return int(value)


def _parts(path: Path, keys: _Keys) -> tuple[Path, ...]:
    count = keys.plain("split.count", 65_535)
    if count <= 1:
        return (path,)
    if count > MAX_SHARDS:
        raise keys.error(f"one of {count} parts, and at most {MAX_SHARDS} are read")
    parts = model_parts(path) if path.stem.endswith(f"-of-{count:05}") else ()
    if len(parts) != count:
        raise keys.error(f"one of {count} parts of a model, and its name does not say so")
    return parts


def _attention(keys: _Keys, layers: int, n_head: tuple[int, ...]) -> Attention:
    n_head_kv = keys.per_layer("attention.head_count_kv", layers) if keys.has("attention.head_count_kv") else n_head
    width = keys.number("embedding_length") // n_head[0] if n_head and n_head[0] else 0
    key = keys.number("attention.key_length") or width
    value = keys.number("attention.value_length") or width
    cached = _cached_layers(keys, layers)
    return Attention(
        n_head_kv=tuple(heads if kept else 0 for heads, kept in zip(n_head_kv, cached, strict=True)),
        key_length=key,
        # Compressed attention (MLA) keeps one row for keys and values together.
        value_length=0 if keys.has("attention.key_length_mla") else value,
        windowed=_windowed_layers(keys, layers),
        window=keys.number("attention.sliding_window"),
        key_length_windowed=keys.number("attention.key_length_swa") or key,
        value_length_windowed=keys.number("attention.value_length_swa") or value,
    )


def _cached_layers(keys: _Keys, layers: int) -> tuple[bool, ...]:
    """Return which layers have a cache of their own, as far as their heads do not tell."""
    architecture = keys.architecture
    if architecture in _UNCACHED or architecture in _RECURRENT:
        return (False,) * layers
    if keys.has("attention.recurrent_layers"):
        return tuple(not recurrent for recurrent in keys.per_layer("attention.recurrent_layers", layers))
    interval = keys.number("full_attention_interval")
    if interval:
        return tuple((layer + 1) % interval == 0 for layer in range(layers))
    own = layers - min(layers, keys.number("attention.shared_kv_layers"))
    if architecture == "gemma3n":
        own = min(own, _GEMMA3N_CACHED)
    return tuple(layer < own for layer in range(layers))


def _windowed_layers(keys: _Keys, layers: int) -> tuple[bool, ...]:
    """Return which layers have a sliding window. Where nothing tells, none: the estimate is then too large."""
    if not keys.number("attention.sliding_window"):
        return (False,) * layers
    name = "attention.sliding_window_pattern"
    if keys.length(f"{keys.architecture}.{name}"):
        return tuple(bool(one) for one in keys.per_layer(name, layers))
    period, dense_first = _WINDOW_PATTERNS.get(keys.architecture, (0, False))
    if not period:
        return (False,) * layers
    period = keys.number(name) or period
    dense = 0 if dense_first else period - 1
    return tuple(layer % period != dense for layer in range(layers))


def _state(keys: _Keys, layers: int, attention: Attention) -> RecurrentState:
    recurrent = layers if keys.architecture in _BOTH else sum(heads == 0 for heads in attention.n_head_kv)
    return RecurrentState(
        n_layer=recurrent if keys.has("ssm.inner_size") else 0,
        convolution=keys.number("ssm.conv_kernel"),
        inner=keys.number("ssm.inner_size"),
        state=keys.number("ssm.state_size"),
        groups=keys.number("ssm.group_count"),
    )


def _quantization(keys: _Keys) -> str:
    if not keys.tells("general.file_type"):
        return _UNKNOWN
    return _QUANTIZATIONS.get(keys.plain("general.file_type") & ~_GUESSED, _UNKNOWN)


def _modalities(keys: _Keys) -> tuple[str, ...]:
    if keys.architecture != "clip":
        return ("text",)
    return tuple(kind for kind in ("vision", "audio") if keys.flag(f"clip.has_{kind}_encoder"))


def _clean(text: str) -> str:
    """Return a text for people without what a terminal would obey."""
    return "".join(character if character.isprintable() else " " for character in text[:MAX_NAME_LENGTH]).strip()
