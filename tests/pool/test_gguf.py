"""What a GGUF file tells without being loaded, and that none of its claims is believed further than its bytes go."""

import os
import re
import struct
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine_driver import loaded, smollm2_path
from llamaherd.pool import BadRequest, EngineOptions, GGUFError, LoadFailed, ModelFacts, estimate_bytes, kv_bytes
from llamaherd.pool import read_facts as read
from llamaherd.pool.child import llama_log
from llamaherd.pool.gguf_header import MAX_KEPT_VALUES, MAX_TEXT_BYTES, Array, read_header
from llamaherd.pool.gguf_memory import state_bytes
from tiny_gguf import CHATML, tiny_model

MIB = 1024 * 1024
#: More than a header of a few kilobytes may cost, and far less than any hostile claim below.
BOUND_BYTES = 4 * MIB

U8, U16, U32, I32, F32, BOOL, STRING, ARRAY, U64 = 0, 2, 4, 5, 6, 7, 8, 9, 10
FORMATS = {U8: "B", U16: "H", U32: "I", I32: "i", F32: "f", BOOL: "?", U64: "Q"}

Pair = tuple[str, int, Any]


def text(value: str, order: str = "<") -> bytes:
    return struct.pack(f"{order}Q", len(value.encode())) + value.encode()


def number(kind: int, value: float, order: str = "<") -> bytes:
    return struct.pack(order + FORMATS[kind], value)


def pair(key: str, kind: int, value: Any, order: str = "<") -> bytes:
    start = text(key, order) + number(U32, kind, order)
    if kind == STRING:
        return start + text(value, order)
    if kind == ARRAY:
        inner, values = value
        items = b"".join(text(one, order) if inner == STRING else number(inner, one, order) for one in values)
        return start + number(U32, inner, order) + number(U64, len(values), order) + items
    return start + number(kind, value, order)


def gguf(
    *pairs: Pair,
    tensors: Sequence[tuple[int, ...]] = (),
    version: int = 3,
    order: str = "<",
    n_pairs: int | None = None,
    n_tensors: int | None = None,
    raw: bytes = b"",
) -> bytes:
    """Return a file with this metadata and tensors of these shapes, all of them F32 at offset 0."""
    counts = (len(tensors) if n_tensors is None else n_tensors, len(pairs) if n_pairs is None else n_pairs)
    parts = [b"GGUF", number(U32, version, order), *(number(U64, count, order) for count in counts)]
    parts += [pair(*one, order=order) for one in pairs]
    for index, shape in enumerate(tensors):
        dimensions = b"".join(number(U64, size, order) for size in shape)
        parts += [text(f"t{index}", order), number(U32, len(shape), order), dimensions]
        parts += [number(U32, 0, order), number(U64, 0, order)]
    return b"".join(parts) + raw


def arch(name: str = "llama", **numbers: Any) -> list[Pair]:
    """Return the keys of an architecture; a list becomes an array, ``__`` a dot."""
    found: list[Pair] = [("general.architecture", STRING, name)]
    for key, value in numbers.items():
        full = f"{name}.{key.replace('__', '.')}"
        found.append((full, ARRAY, (U32, value)) if isinstance(value, list) else (full, U32, value))
    return found


SHAPE: dict[str, Any] = {"block_count": 4, "embedding_length": 64, "attention__head_count": 4}


def saved(folder: Path, content: bytes, name: str = "m.gguf") -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def facts_of(folder: Path, *pairs: Pair, **more: Any) -> ModelFacts:
    return read(saved(folder, gguf(*pairs, **more)))


# --- facts ---


def test_a_model_tells_its_facts() -> None:
    path = tiny_model("random")
    facts = read(path)

    assert (facts.name, facts.architecture, facts.kind, facts.quantization) == ("tiny", "llama", "model", "F32")
    assert (facts.n_ctx_train, facts.n_vocab, facts.n_layer, facts.n_embd, facts.n_ff) == (4096, 512, 2, 64, 128)
    assert (facts.n_head, facts.n_head_kv) == ((4, 4), (2, 2))
    assert (facts.attention.key_length, facts.attention.value_length) == (16, 16)
    assert (facts.n_params, facts.size_bytes, facts.shards) == (139584, path.stat().st_size, 1)
    assert (facts.chat_template, facts.tokenizer, facts.modalities) == (CHATML, "llama", ("text",))


def test_a_real_model_tells_its_facts() -> None:
    facts = read(smollm2_path())

    assert (facts.architecture, facts.quantization, facts.tokenizer) == ("llama", "Q4_1", "gpt2")
    assert (facts.n_layer, facts.n_head[0], facts.n_head_kv[0], facts.n_vocab) == (30, 9, 3, 49152)
    assert facts.n_params == 134515008


@pytest.mark.parametrize(
    ("name", "kind", "architecture", "modalities"),
    [
        ("random-f16", "model", "llama", ("text",)),
        ("bert", "model", "bert", ("text",)),
        ("lora", "adapter", "llama", ("text",)),
        ("mmproj", "mmproj", "clip", ("vision",)),
    ],
)
def test_kinds_of_files_are_told_apart(name: str, kind: str, architecture: str, modalities: tuple[str, ...]) -> None:
    facts = read(tiny_model(name))

    assert (facts.kind, facts.architecture, facts.modalities) == (kind, architecture, modalities)


def test_a_projector_that_hears_says_so(tmp_path: Path) -> None:
    flags: list[Pair] = [("clip.has_audio_encoder", BOOL, True), ("clip.has_vision_encoder", BOOL, True)]

    assert facts_of(tmp_path, *arch("clip"), *flags).modalities == ("vision", "audio")


@pytest.mark.parametrize(("number_", "name"), [(15, "Q4_K_M"), (1024 + 18, "Q6_K"), (33, "unknown"), (38, "MXFP4_MOE")])
def test_the_quantisation_has_llama_cpps_name(number_: int, name: str, tmp_path: Path) -> None:
    assert facts_of(tmp_path, *arch(), ("general.file_type", U32, number_)).quantization == name


def test_heads_may_differ_from_layer_to_layer(tmp_path: Path) -> None:
    facts = facts_of(tmp_path, *arch(**SHAPE, attention__head_count_kv=[4, 0, 2, 1]))

    assert facts.n_head == (4, 4, 4, 4)
    assert facts.n_head_kv == (4, 0, 2, 1)


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("order", ["<", ">"])
def test_both_versions_and_byte_orders_are_read(version: int, order: str, tmp_path: Path) -> None:
    facts = facts_of(tmp_path, *arch(**SHAPE), tensors=[(64, 32), (64,)], version=version, order=order)

    assert (facts.n_layer, facts.n_embd, facts.n_params) == (4, 64, 64 * 32 + 64)


def test_a_name_shows_nothing_that_a_terminal_obeys(tmp_path: Path) -> None:
    assert facts_of(tmp_path, *arch(), ("general.name", STRING, "a\x1b[2Jb\n")).name == "a [2Jb"


def test_all_parts_of_a_split_model_count(tmp_path: Path) -> None:
    split: list[Pair] = [("split.count", U16, 2), ("split.tensors.count", I32, 2)]
    first = saved(tmp_path, gguf(*arch(**SHAPE), *split, tensors=[(10,)]), "m-00001-of-00002.gguf")
    second = saved(tmp_path, gguf(("split.no", U16, 1), *split, tensors=[(20,)]), "m-00002-of-00002.gguf")

    facts = read(first)
    assert (facts.shards, facts.n_params) == (2, 30)
    assert facts.size_bytes == first.stat().st_size + second.stat().st_size
    with pytest.raises(GGUFError, match="part 2 of a split model"):
        read(second)
    second.unlink()
    with pytest.raises(GGUFError, match=r"00002-of-00002.*No such file"):
        read(first)
    with pytest.raises(GGUFError, match="its name does not say so"):
        read(first.rename(tmp_path / "other.gguf"))


def test_long_tables_are_counted_and_not_kept(tmp_path: Path) -> None:
    words = [f"w{index}" for index in range(1000)]
    scores = [0.5] * (MAX_KEPT_VALUES + 1)
    path = saved(tmp_path, gguf(("t.words", ARRAY, (STRING, words)), ("t.scores", ARRAY, (F32, scores))))

    assert read_header(path).keys == {"t.words": Array(1000), "t.scores": Array(len(scores))}


def test_a_text_beyond_the_limit_is_left_out(tmp_path: Path) -> None:
    template = "x" * (MAX_TEXT_BYTES + 1)

    assert facts_of(tmp_path, *arch(), ("tokenizer.chat_template", STRING, template)).chat_template == ""


# --- what is no sound file ---


def test_it_is_the_models_fault(tmp_path: Path) -> None:
    with pytest.raises(LoadFailed) as failure:
        read(saved(tmp_path, b"GGML"))

    assert (failure.value.fault, failure.value.code, failure.value.retry) == ("model", "bad_gguf", False)
    assert not isinstance(failure.value, BadRequest)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "is not a GGUF file"),
        (b"PK\x03\x04....", "starts with b'PK"),
        (gguf(version=1), "version 1"),
        (gguf(version=4), "version 4"),
        (b"GGUF\x03\x00\x00\x00", "cut short"),
        (gguf(n_pairs=2**63), "claims 9223372036854775808 keys"),
        (gguf(n_tensors=2**64 - 1), "claims 18446744073709551615 tensors"),
        (gguf(n_pairs=60_000), "cut short"),
        (gguf(n_tensors=100_000), "cut short"),
        (gguf(n_pairs=1, raw=number(U64, 2**62)), "bytes for a key"),
        (gguf(n_pairs=1, raw=text("k") + number(U32, STRING) + number(U64, 2**63)), "cut short"),
        (gguf(n_pairs=1, raw=text("k") + number(U32, 99)), "unknown type 99"),
        (gguf(n_pairs=1, raw=text("k") + number(U32, ARRAY) * 2 + number(U64, 1)), "unknown type 9"),
        (gguf(n_pairs=1, raw=text("k") + number(U32, ARRAY) + number(U32, U8) + number(U64, 2**64 - 1)), "cut short"),
        (gguf(n_pairs=1, raw=text("k") + number(U32, ARRAY) + number(U32, STRING) + number(U64, 2**60)), "claims"),
        (gguf(n_pairs=1, raw=text("") + number(U32, U8)), "key without a name"),
        (gguf(*arch(), *arch()), "twice"),
        (gguf(*arch(), tensors=[(1, 1, 1, 1, 1)]), "5 dimensions"),
        (gguf(*arch(), tensors=[(2**40, 2**40)]), "more elements than can be counted"),
        (gguf(*arch(), n_tensors=1, raw=text("t") + number(U32, 0) * 2 + number(U64, 2**40)), "cut short"),
        (gguf(), "without the name of its architecture"),
        (gguf(*arch("a\x1b[2J")), "without the name of its architecture"),
        (gguf(*arch(block_count=2**32 - 1)), "block_count"),
        (gguf(("general.architecture", STRING, "a"), ("a.block_count", F32, 1.5)), "block_count"),
        (gguf(*arch(), ("split.count", U16, 65_535)), "65535 parts"),
    ],
)
def test_what_is_no_sound_file_is_said_with_evidence(content: bytes, complaint: str, tmp_path: Path) -> None:
    path = saved(tmp_path, content)
    tracemalloc.start()
    try:
        with pytest.raises(GGUFError, match=complaint):
            read(path)
        assert tracemalloc.get_traced_memory()[1] < BOUND_BYTES
    finally:
        tracemalloc.stop()


def test_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path, complaint in (
        (tmp_path / "none.gguf", "No such file"),
        (tmp_path / "fifo", "no regular file"),
        (tmp_path, "no regular file"),
        (Path("nu\0ll"), "null"),
    ):
        with pytest.raises(GGUFError, match=complaint):
            read(path)


def test_a_header_beyond_the_limit_is_not_read(tmp_path: Path) -> None:
    path = saved(tmp_path, gguf(*arch(), n_pairs=2, raw=text("k") + number(U32, STRING) + number(U64, 2**30)))
    os.truncate(path, 2**31)  # sparse: it takes no room

    tracemalloc.start()
    try:
        with pytest.raises(GGUFError, match="header of more than"):
            read(path)
        assert tracemalloc.get_traced_memory()[1] < BOUND_BYTES
    finally:
        tracemalloc.stop()


SOUND = {name: tiny_model(name).read_bytes() for name in ("bert", "mmproj", "lora", "mamba")}
SOUND["shapes"] = gguf(
    *arch(**SHAPE, attention__head_count_kv=[4, 0, 2, 1], attention__sliding_window=16, full_attention_interval=2),
    ("split.count", U16, 0),
    tensors=[(64, 32)],
)
edits = st.lists(st.tuples(st.integers(0, 4096), st.integers(0, 255)), max_size=8)


@given(
    name=st.sampled_from(sorted(SOUND)),
    edits=edits,
    cut=st.integers(0, 8192),
    inserted=st.tuples(st.integers(0, 4096), st.binary(max_size=16)),
)
@settings(deadline=None, derandomize=True, max_examples=300)
def test_no_bytes_do_more_than_be_refused(
    name: str,
    edits: list[tuple[int, int]],
    cut: int,
    inserted: tuple[int, bytes],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    content = bytearray(SOUND[name])
    for at, value in edits:
        if at < len(content):
            content[at] = value
    at, more = inserted
    content[at:at] = more
    if cut > 4096:
        del content[cut:]
    path = saved(tmp_path_factory.getbasetemp(), bytes(content), "fuzzed.gguf")

    tracemalloc.start()
    try:
        facts = read(path)
        assert estimate_bytes(facts, EngineOptions()) >= facts.size_bytes
    except GGUFError as error:
        assert str(path) in str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < BOUND_BYTES


# --- memory ---


def measured(model: str | Path, **options: Any) -> dict[str, float]:
    """Return the MiB of each kind of buffer that llama.cpp says it allocated."""
    found: dict[str, float] = {}
    with loaded(model, **options):
        for line in llama_log.info_lines():
            for kind, size in re.findall(r"(KV|RS|compute|output) buffer size =\s*([0-9.]+) MiB", line):
                found[kind] = found.get(kind, 0.0) + float(size)
    return found


def test_the_cache_of_smollm2_has_the_size_that_llama_cpp_says() -> None:
    assert kv_bytes(read(smollm2_path()), 4096) == 90 * MIB


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("random", {"n_ctx": 4096}),
        ("random", {"n_ctx": 300, "n_parallel": 1}),
        ("random", {"n_ctx": 4096, "flash_attn": "auto"}),
        ("gemma2", {"n_ctx": 4096}),
        ("gemma2", {"n_ctx": 4096, "swa_full": False}),
        ("gemma2", {"n_ctx": 4096, "swa_full": False, "n_parallel": 1, "n_ubatch": 32}),
        ("random", {"n_ctx": 4096, "kv_unified": False}),
        ("gemma2", {"n_ctx": 4096, "swa_full": False, "kv_unified": False}),
        ("mamba", {"n_ctx": 1024}),
        (smollm2_path(), {"n_ctx": 1024, "flash_attn": "auto"}),
        (smollm2_path(), {"n_ctx": 2048, "n_parallel": 2}),
    ],
)
def test_estimates_agree_with_llama_cpp(model: str | Path, options: dict[str, Any]) -> None:
    facts = read(model if isinstance(model, Path) else tiny_model(model))
    chosen: dict[str, Any] = {"flash_attn": "off", "n_cached": 4, **options}
    settings_ = EngineOptions(**chosen)
    n_seq = settings_.n_parallel + settings_.n_cached
    real = measured(model, **chosen)

    cache = kv_bytes(
        facts,
        settings_.n_ctx,
        swa_full=settings_.swa_full,
        kv_unified=settings_.kv_unified,
        n_seq=n_seq,
        n_ubatch=settings_.n_ubatch,
    )
    assert cache / MIB == pytest.approx(real.get("KV", 0.0), abs=0.011)
    assert state_bytes(facts, n_seq) / MIB == pytest.approx(real.get("RS", 0.0), abs=0.011)
    context = (estimate_bytes(facts, settings_) - facts.size_bytes) / MIB
    assert sum(real.values()) * 0.9 <= context <= sum(real.values()) * 2 + 16


def test_quantised_caches_are_smaller() -> None:
    facts = read(smollm2_path())

    assert kv_bytes(facts, 4096, "q8_0", "q8_0") == 90 * MIB * 34 // 64
    assert kv_bytes(facts, 4096, "q4_0", "f16") == 45 * MIB * 18 // 64 + 45 * MIB
    with pytest.raises(BadRequest, match="unknown cache type 'q2'"):
        kv_bytes(facts, 4096, "q2")
    with pytest.raises(BadRequest, match="n_ctx"):
        kv_bytes(facts, -1)


@pytest.mark.parametrize(
    ("name", "numbers", "rows"),
    [
        ("llama", {}, 4 * 4 * 32),
        ("llama", {"attention__head_count_kv": [4, 0, 2, 1]}, 7 * 32),
        ("llama", {"attention__key_length": 32, "attention__value_length": 8}, 4 * 4 * 40),
        ("deepseek2", {"attention__head_count_kv": 1, "attention__key_length": 576, "attention__key_length_mla": 192,
                       "attention__value_length": 512}, 4 * 576),
        ("qwen3next", {"full_attention_interval": 4}, 4 * 32),
        ("minimax", {"attention__recurrent_layers": [1, 1, 0, 1]}, 4 * 32),
        ("gemma4", {"attention__shared_kv_layers": 3}, 4 * 32),
        ("bert", {}, 0),
        ("mamba", {}, 0),
    ],
)  # fmt: skip
def test_only_layers_with_a_cache_count(name: str, numbers: dict[str, Any], rows: int, tmp_path: Path) -> None:
    facts = facts_of(tmp_path, *arch(name, **SHAPE, **numbers))

    assert kv_bytes(facts, 256) == rows * 256 * 2


@pytest.mark.parametrize(
    ("name", "pattern", "windowed"),
    [
        ("gemma2", {}, (True, False, True, False)),
        ("smallthinker", {}, (False, True, True, True)),
        ("gemma2", {"attention__sliding_window_pattern": 4}, (True, True, True, False)),
        ("llama", {"attention__sliding_window_pattern": [0, 1, 1, 0]}, (False, True, True, False)),
        ("llama", {}, (False, False, False, False)),
    ],
)
def test_windows_follow_the_file_and_else_the_architecture(
    name: str, pattern: dict[str, Any], windowed: tuple[bool, ...], tmp_path: Path
) -> None:
    facts = facts_of(tmp_path, *arch(name, **SHAPE, **pattern, attention__sliding_window=100))

    assert facts.attention.windowed == windowed
    layer = 4 * 32 * 2  # bytes of one cell
    assert kv_bytes(facts, 4096, swa_full=False, n_seq=2, n_ubatch=10) == sum(
        layer * (256 if one else 4096) for one in windowed
    )
