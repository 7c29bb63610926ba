"""Loading and unloading the real engine: progress, facts, refusals with evidence, and nothing left behind."""

import json
import os
import re
import resource
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from engine_driver import ask, load_command, loaded
from llamaherd.pool.child import llama_backend, llama_log
from llamaherd.pool.child.context import Context, settings_for
from llamaherd.pool.child.engine import EngineError
from llamaherd.pool.child.fit import check_memory, estimate
from llamaherd.pool.child.llama_backend import AbortFlag
from llamaherd.pool.child.llama_context import ContextSettings
from llamaherd.pool.child.llama_engine import LlamaEngine
from llamaherd.pool.child.model import Model
from llamaherd.pool.child.refusal import refusal as why_refused
from llamaherd.transport.messages import EngineOptions, Load
from patience import holds_within
from tiny_gguf import SCRIPT_TEXT, tiny_model

#: ggml's level of errors.
_GGML_ERROR = 4


def load(engine: LlamaEngine, path: Path | str, **options: Any) -> None:
    engine.load(Load(model="x", path=str(path), options=EngineOptions(**options)), lambda _fraction: True)


def refusal(path: Path | str, **options: Any) -> EngineError:
    engine = LlamaEngine()
    with pytest.raises(EngineError) as caught:
        load(engine, path, **options)
    assert not engine.busy
    # The engine holds nothing and may be asked again.
    load(engine, tiny_model("random"), n_ctx=256, n_threads=1)
    engine.unload()
    return caught.value


def test_the_facts_of_a_model_are_reported() -> None:
    engine = LlamaEngine()
    info = engine.load(load_command("random", n_ctx=1000), lambda _fraction: True)
    engine.unload()
    assert (info.n_vocab, info.n_ctx, info.n_ctx_train, info.n_embd, info.ftype) == (512, 1024, 4096, 64, "all F32")
    assert info.n_params * 4 == info.size
    assert info.vocab_type == 1


def test_zero_context_takes_the_models_own_length() -> None:
    engine = LlamaEngine()
    assert engine.load(load_command("random", n_ctx=0), lambda _fraction: True).n_ctx == 4096
    engine.unload()


def test_progress_rises_and_ends_at_one() -> None:
    seen: list[float] = []

    def note(fraction: float) -> bool:
        seen.append(fraction)
        return True

    engine = LlamaEngine()
    engine.load(load_command("random"), note)
    engine.unload()
    assert seen == sorted(set(seen))
    assert len(seen) > 2
    assert all(0.0 < fraction <= 1.0 for fraction in seen)
    assert seen[-1] == 1.0 and 1.0 not in seen[:-1]


def test_a_no_from_the_progress_function_abandons_the_load() -> None:
    calls: list[float] = []

    def refuse(fraction: float) -> bool:
        calls.append(fraction)
        return False

    engine = LlamaEngine()
    with pytest.raises(EngineError) as caught:
        engine.load(load_command("random"), refuse)
    assert caught.value.code == "load_abandoned"
    assert len(calls) == 1
    load(engine, tiny_model("random"), n_ctx=256)
    engine.unload()


def test_what_the_progress_function_raises_comes_out_of_the_load() -> None:
    def broken(_fraction: float) -> bool:
        raise OSError("the channel is gone")

    with pytest.raises(OSError, match="the channel is gone"):
        LlamaEngine().load(load_command("random"), broken)


def test_an_interrupted_engine_loads_no_more() -> None:
    engine = LlamaEngine()
    engine.interrupt()
    with pytest.raises(EngineError) as caught:
        engine.load(load_command("random"), lambda _fraction: True)
    assert caught.value.code == "load_abandoned"


def test_an_engine_can_be_unloaded_and_loaded_again() -> None:
    engine = LlamaEngine()
    for model in ("scripted", "random", "scripted"):
        load(engine, tiny_model(model), n_ctx=256, n_threads=1)
        text = ask(engine, "x\n", max_tokens=20).text
        engine.unload()
        engine.unload()
        assert (text == SCRIPT_TEXT) == (model == "scripted")


def test_a_second_load_is_refused() -> None:
    with loaded("random") as engine, pytest.raises(EngineError, match="loaded already"):
        load(engine, tiny_model("random"))


def test_threads_set_before_the_load_are_kept() -> None:
    engine = LlamaEngine()
    engine.set_threads(1, 1)
    load(engine, tiny_model("scripted"), n_ctx=256)
    assert ask(engine, "x\n").text == SCRIPT_TEXT
    engine.unload()


@pytest.mark.parametrize(
    "options",
    [
        {"use_mmap": False},
        {"flash_attn": "off"},
        {"flash_attn": "on"},
        {"n_gpu_layers": 0},
        {"devices": ("none",)},
        {"split_mode": "none"},
        {"split_mode": "row", "tensor_split": (3.0, 1.0), "main_gpu": 1},
    ],
)
def test_every_way_to_load_gives_the_same_model(options: dict[str, Any]) -> None:
    with loaded("scripted", **options) as engine:
        assert ask(engine, "x\n").text == SCRIPT_TEXT


# --- refusals ---


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    error = refusal(tmp_path / "nowhere.gguf")
    assert error.code == "model_not_found"
    assert "nowhere.gguf does not exist" in str(error)


@pytest.mark.parametrize("path", ["", "a\0b"])
def test_a_path_that_is_none_is_refused(path: str) -> None:
    assert refusal(path).code == "model_not_found"


def test_a_directory_is_refused(tmp_path: Path) -> None:
    assert "is a directory" in str(refusal(tmp_path))


@pytest.mark.parametrize(
    ("content", "found"), [(b"", "it is empty"), (b"PK\x03\x04zip", "it starts with b'PK"), (b"GG", "b'GG'")]
)
def test_a_file_that_is_no_gguf_says_what_it_is(tmp_path: Path, content: bytes, found: str) -> None:
    (tmp_path / "x.gguf").write_bytes(content)
    error = refusal(tmp_path / "x.gguf")
    assert error.code == "model_invalid"
    assert found in str(error)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"n_ctx": -1}, "n_ctx"),
        ({"n_ctx": 2**31}, "n_ctx"),
        ({"n_parallel": 0}, "n_parallel"),
        ({"n_parallel": 257}, "n_parallel"),
        ({"n_cached": -2}, "n_cached"),
        ({"n_parallel": 200, "n_cached": 57}, "n_cached"),
        ({"n_batch": 0}, "n_batch"),
        ({"n_ubatch": -5}, "n_ubatch"),
        ({"n_threads": 513}, "n_threads"),
        ({"n_threads_batch": 10**6}, "n_threads_batch"),
        ({"main_gpu": -1}, "main_gpu"),
        ({"main_gpu": 2**31}, "main_gpu"),
        ({"n_gpu_layers": 2**32}, "n_gpu_layers"),
        ({"tensor_split": (1.0,) * 17}, "tensor_split"),
        ({"tensor_split": (0.0, 0.0)}, "tensor_split"),
        ({"tensor_split": (float("nan"),)}, "tensor_split"),
        ({"devices": ("TPU7",)}, "there is no device 'TPU7'; known are .*none"),
    ],
)
def test_an_option_out_of_range_is_named(options: dict[str, Any], name: str) -> None:
    error = refusal(tiny_model("random"), **options)
    assert error.code == "invalid_option"
    assert re.search(name, str(error))


def test_a_context_beyond_the_memory_is_refused_with_both_figures() -> None:
    error = refusal(tiny_model("random"), n_ctx=2_000_000_000)
    assert error.code == "out_of_memory"
    assert "needs 6" in str(error) and "MiB are free; set a smaller n_ctx" in str(error)


def test_memory_that_ends_while_llama_cpp_allocates_is_told_from_other_refusals() -> None:
    """As on a GPU, whose allocator is the first to know. Here the limit is one to the process's addresses."""
    cells = 2**20
    cache = cells * 2 * 2 * 16 * 2 * 2
    before = resource.getrlimit(resource.RLIMIT_AS)
    model = Model(str(tiny_model("random")), EngineOptions(), lambda _fraction: True)
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + cache // 2, before[1]))
        with pytest.raises(
            EngineError, match="failed to allocate .* set a smaller n_ctx or fewer n_gpu_layers"
        ) as caught:
            Context(model, EngineOptions(n_ctx=cells), (1, 1), AbortFlag())
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
        model.free()
    assert caught.value.code == "out_of_memory"


def test_a_batch_that_is_refused_is_not_explained_with_what_was_said_before_it() -> None:
    llama_backend.init_backend()
    model = Model(str(tiny_model("random")), EngineOptions(n_ctx=64), lambda _fraction: True)
    context = Context(model, EngineOptions(n_ctx=64), (1, 1), AbortFlag())
    try:
        llama_log.log_callback()(_GGML_ERROR, b"cudaMalloc failed: out of memory\n", None)
        context.batch.clear()
        context.batch.add(1, 0, 0)
        assert context.batch.decode(context.handle) == 0
        context.batch.clear()
        context.batch.add(1, 9, 0)  # there is nothing at the places before it

        assert context.batch.decode(context.handle) not in (0, 1)

        why = why_refused("decode_failed")
        assert why.code == "decode_failed" and "cudaMalloc" not in why.reason and "sequence" in why.reason
    finally:
        context.free()
        model.free()


def test_a_close_call_is_decided_by_llama_cpps_own_figures() -> None:
    options = EngineOptions(n_ctx=65536)
    model = Model(str(tiny_model("random")), options, lambda _fraction: True)
    settings = settings_for(model, options, (1, 1))
    cache = 65536 * 2 * 2 * 16 * 2 * 2
    try:
        check_memory(model, settings, None)
        check_memory(model, settings, 100 * cache)
        assert estimate(model, settings) * 2 > 2 * cache
        check_memory(model, settings, 2 * cache)
        with pytest.raises(EngineError, match="65536 tokens needs .* MiB and 16 MiB are free"):
            check_memory(model, settings, cache)
    finally:
        model.free()


@pytest.mark.parametrize("model", ["lora", "mmproj"])
def test_a_gguf_that_is_no_model_gives_llama_cpps_reason(model: str) -> None:
    error = refusal(tiny_model(model))
    assert error.code == "model_invalid"
    assert "llama.cpp gave no reason" not in str(error)


def test_the_quick_estimate_is_close_to_what_llama_cpp_allocates() -> None:
    options = EngineOptions(n_ctx=4096)
    model = Model(str(tiny_model("random")), options, lambda _fraction: True)
    settings = settings_for(model, options, (1, 1))
    try:
        # 2 layers of 2 heads of 16 values, as keys and as values, two bytes each.
        cache = 4096 * 2 * 2 * 16 * 2 * 2
        assert cache <= estimate(model, settings) <= cache + 4 * 2**20
    finally:
        model.free()


def test_a_batch_has_a_row_for_every_slot_and_fits_the_context() -> None:
    model = Model(str(tiny_model("random")), EngineOptions(), lambda _fraction: True)
    try:
        narrow = settings_for(model, EngineOptions(n_batch=2, n_parallel=8), (1, 2))
        short = settings_for(model, EngineOptions(n_ctx=1, n_parallel=256), (1, 2))
    finally:
        model.free()
    assert (narrow.n_batch, narrow.n_ubatch, narrow.n_outputs_max) == (8, 8, 32)
    assert (short.n_ctx, short.n_batch) == (256, 256)
    assert isinstance(short, ContextSettings) and (short.n_threads, short.n_threads_batch) == (1, 2)


@pytest.mark.parametrize("model", ["random", "mamba", "gemma2", "bert"])
def test_finished_sequences_get_ids_of_their_own_where_they_cost_little(model: str) -> None:
    opened = Model(str(tiny_model(model)), EngineOptions(), lambda _fraction: True)
    try:
        usual = settings_for(opened, EngineOptions(n_parallel=4), (1, 1)).n_seq_max
        most = settings_for(opened, EngineOptions(n_parallel=100), (1, 1)).n_seq_max
        none = settings_for(opened, EngineOptions(n_parallel=4, n_cached=0), (1, 1)).n_seq_max
    finally:
        opened.free()
    assert (usual, most, none) == ((8, 200, 4) if model == "mamba" else (16, 256, 4))


# --- in a process of their own, because llama.cpp might abort it ---

DAMAGED = """
import json, sys
from pathlib import Path
from llamaherd.pool.child.engine import EngineError
from llamaherd.pool.child.llama_engine import LlamaEngine
from llamaherd.transport.messages import EngineOptions, Load

source, folder = Path(sys.argv[1]).read_bytes(), Path(sys.argv[2])
outcomes = {}
for name, content in (
    ("header only", source[:24]),
    ("in the keys", source[:2000]),
    ("in the vocabulary", source[:9000]),
    ("in the tensor list", source[:22000]),
    ("in the first tensor", source[:40000]),
    ("one byte short", source[:-1]),
    ("garbage after the magic", b"GGUF" + bytes(range(256)) * 40),
    ("another version", b"GGUF" + b"\\xff" * 4 + source[8:]),
    ("absurd counts", source[:8] + b"\\xff" * 16 + source[24:]),
    ("zeros instead of tensors", source[:26000] + bytes(8)),
):
    path = folder / "damaged.gguf"
    path.write_bytes(content)
    engine = LlamaEngine()
    try:
        engine.load(Load(model="x", path=str(path), options=EngineOptions(n_ctx=256, n_threads=1)), lambda _: True)
    except EngineError as error:
        outcomes[name] = [error.code, str(error)]
    else:
        outcomes[name] = ["loaded", ""]
        engine.unload()
print(json.dumps(outcomes))
"""


def in_a_process(script: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-c", script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_damaged_file_is_refused_with_evidence_and_the_process_lives(tmp_path: Path) -> None:
    done = in_a_process(DAMAGED, tiny_model("random"), tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    for name, (code, message) in json.loads(done.stdout).items():
        assert code == "model_invalid", f"{name}: {code} {message}"
        assert "llama.cpp gave no reason" not in message, name


ABORT = """
import os, sys
from llamaherd.pool.child import llama_backend, llama_log, llama_sampler
from llamaherd.pool.child.llama_engine import LlamaEngine
from llamaherd.transport.messages import EngineOptions, Load

engine = LlamaEngine()
engine.load(Load(model="x", path=sys.argv[1], options=EngineOptions(n_ctx=256, n_threads=1)), lambda _: True)
context = engine._loaded.context
llama_sampler.sample(llama_sampler.chain(), context.handle, 0)
"""


def test_an_assertion_of_llama_cpp_leaves_its_words_on_stderr() -> None:
    done = in_a_process(ABORT, tiny_model("random"))
    assert done.returncode == -6
    assert "GGML_ASSERT" in done.stderr[-1000:]


NARROW = """
import sys
from llamaherd.pool.child.llama_engine import LlamaEngine
from llamaherd.transport.messages import EngineOptions, Load

for path in sys.argv[1:]:
    for options in (
        EngineOptions(n_ctx=256, n_parallel=8, n_batch=1, n_ubatch=1),
        EngineOptions(n_ctx=256, n_parallel=256),
        EngineOptions(n_ctx=256, n_parallel=1, n_cached=255, n_batch=1),
        EngineOptions(n_ctx=256, n_parallel=8, n_cached=0, swa_full=False),
    ):
        engine = LlamaEngine()
        engine.load(Load(model="x", path=path, options=options), lambda _: True)
        engine.unload()
print("all loaded")
"""


def test_extreme_counts_of_slots_and_rows_load_with_every_kind_of_model() -> None:
    done = in_a_process(NARROW, *(tiny_model(name) for name in ("random", "mamba", "gemma2", "bert", "rank")))
    assert done.stdout == "all loaded\n", done.stderr[-1000:]


LIGHT = """
import sys
import llamaherd.pool.child.llama_engine
heavy = {"diskcache", "llama_cpp", "huggingface_hub", "starlette", "zmq", "asyncio"} & set(sys.modules)
assert not heavy, heavy
assert "llama_cpp.llama_cpp" in sys.modules
"""


def test_importing_the_engine_pulls_in_the_bindings_and_nothing_heavy() -> None:
    done = in_a_process(LIGHT)
    assert done.returncode == 0, done.stderr


def test_loading_and_unloading_leaves_no_threads_files_or_memory_behind() -> None:
    def held() -> set[str]:
        return {f"{kind} {number}" for kind in ("fd", "task") for number in os.listdir(f"/proc/self/{kind}")}

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def cycle() -> None:
        with loaded("random", n_ctx=4096) as engine:
            ask(engine, "abc", max_tokens=5)

    for _ in range(3):
        cycle()
    before, memory = held(), resident()
    for _ in range(20):
        cycle()
    # A thread that was joined goes a moment later, and those of other tests may go meanwhile.
    assert holds_within(10.0, lambda: held() <= before)
    assert resident() - memory < 8 * 2**20
    assert threading.active_count() >= 1
