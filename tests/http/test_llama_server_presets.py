"""A preset file as people wrote it for llama-server, with long, short and environment keys, loads unchanged."""

import os
from pathlib import Path

import pytest

from hub_cache import write_repo
from llamaherd.http.presets import PresetOptions
from llamaherd.pool import Catalog, Origin, Sources, gather

FILE = """
version = 1

; shared by all
[*]
ctx-size = 16384
LLAMA_ARG_N_GPU_LAYERS = 99
fa = on
ctk = q8_0
cache-type-v = q8_0
b = 1024
ub = 512
t = 4
threads-batch = 8
LLAMA_ARG_N_PARALLEL = 2
cont-batching = true
metrics = 1
no-webui = true
log-timestamps = on
prio = 2
no-mmap = false
kv-unified = true
cache-reuse = 256
slots = 1
host = 0.0.0.0
port = 9000
api-key = secret
models-max = 2
sleep-idle-seconds = 300
warmup = off
mlock = off
jinja = on
dedup-cache-models = true

[qwen3-coder]
model = {folder}/model.gguf
alias = coder, code
tags = code,large
temp = 0.7
top-p = 0.8
LLAMA_ARG_TOP_K = 20
min-p = 0.01
repeat-penalty = 1.05
n-predict = 4096
chat-template-kwargs = {{"enable_thinking": false}}
reasoning-format = deepseek
reasoning-budget = 0
n-cpu-moe = 12
override-tensor = .ffn_.*_exps.=CPU
rope-scaling = yarn
rope-scale = 4
yarn-orig-ctx = 32768
spec-draft-model = /models/draft.gguf
draft-max = 16
ctkd = q8_0
load-on-startup = true
stop-timeout = 30

[gemma-vision]
m = {folder}/model.gguf
mm = {folder}/mmproj.gguf
no-mmproj-offload = true
image-max-tokens = 512
ngl = auto
split-mode = row
tensor-split = 3,1
main-gpu = 0
LLAMA_ARG_FLASH_ATTN = auto
swa-full = on
numa = distribute
rpc = 10.0.0.2:50052
lora = {folder}/style.gguf
slot-save-path = /tmp
grammar-file = {folder}/g.gbnf

[embedder]
m = {folder}/model.gguf
embeddings = true
pooling = mean
LLAMA_ARG_EMBEDDINGS = 1
embd-normalize = 2
ub = 2048
c = 0

[reranker]
model = {folder}/model.gguf
reranking = on

[ggml-org/g:q8_0]
c = 4096
seed = 42
samplers = top_k

[from-hub]
hf-repo = ggml-org/absent:Q4_K_M
hft = hf_secret
hf-file = a.gguf
offline = true

[from-address]
mu = https://example.org/models/x-00001-of-00002.gguf
"""

#: What has no effect on a model here, because it is the server's as a whole.
OF_THE_SERVER = {"host", "port", "api-key", "models-max", "metrics", "slots", "webui", "log-timestamps", "mlock"}
#: And what the engine has nothing for.
NOT_HERE = {
    *("cont-batching", "prio", "cache-reuse", "warmup", "n-cpu-moe", "override-tensor", "model-draft", "draft-max"),
    *("cache-type-k-draft", "numa", "rpc"),
}


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Settings come from the file alone."""
    for name in os.environ:
        if name.startswith(("LLAMA_ARG_", "HF_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("LLAMA_CACHE", str(tmp_path / "cache"))


def read(tmp_path: Path) -> tuple[Catalog, list[str]]:
    """Return the catalogue of the file, and its warnings."""
    for name in ("model.gguf", "mmproj.gguf", "style.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    (tmp_path / "g.gbnf").write_text("root ::= [a-z]+")
    write_repo(tmp_path / "cache", "ggml-org/g", ["g-Q8_0.gguf"])
    (tmp_path / "p.ini").write_text(FILE.format(folder=tmp_path))
    options = PresetOptions()
    catalog = gather(Sources(presets=tmp_path / "p.ini", cache=tmp_path / "cache"), options.configure)
    return catalog, options.warnings


def test_every_model_of_it_is_there(tmp_path: Path) -> None:
    catalog, _ = read(tmp_path)

    assert catalog.broken == () and catalog.problems == ()
    assert [spec.name for spec in catalog.models] == [
        "qwen3-coder",
        "gemma-vision",
        "embedder",
        "reranker",
        "ggml-org/g:Q8_0",
        "from-hub",
        "from-address",
    ]


def test_what_has_no_effect_is_named_once_each(tmp_path: Path) -> None:
    _, warnings = read(tmp_path)

    assert len(warnings) == len(set(warnings))
    named = {warning.partition(": ")[2].partition(" is known")[0] for warning in warnings}
    assert OF_THE_SERVER <= named <= OF_THE_SERVER | NOT_HERE
    assert all(warning.startswith(f"{tmp_path}/p.ini:") for warning in warnings)


def test_what_has_an_effect_has_it(tmp_path: Path) -> None:
    coder, vision, embedder, reranker, cached, hub, address = read(tmp_path)[0].models

    assert (coder.aliases, coder.tags, coder.load_on_startup, coder.stop_timeout) == (
        ("coder", "code"),
        ("code", "large"),
        True,
        30.0,
    )
    assert (coder.options.n_ctx, coder.options.n_gpu_layers, coder.options.n_parallel) == (16384, 99, 2)
    assert (coder.options.cache_type_k, coder.options.cache_type_v) == ("q8_0", "q8_0")
    assert (coder.options.n_batch, coder.options.n_ubatch, coder.options.use_mmap) == (1024, 512, True)
    assert coder.sleep_idle_seconds == 300.0
    assert (coder.defaults["temperature"], coder.defaults["top_k"], coder.defaults["max_tokens"]) == (0.7, 20, 4096)
    assert vision.defaults == {"grammar": "root ::= [a-z]+"}
    assert (vision.options.split_mode, vision.options.tensor_split) == ("row", (3.0, 1.0))
    assert (vision.mmproj, vision.options.n_gpu_layers, vision.options.flash_attn) == (
        tmp_path / "mmproj.gguf",
        -1,
        "auto",
    )
    assert [adapter.path for adapter in vision.options.adapters] == [f"{tmp_path}/style.gguf"]
    assert (embedder.options.n_ctx, embedder.options.n_ubatch, embedder.options.pooling) == (0, 2048, "mean")
    assert reranker.options.pooling == "rank"
    assert (cached.options.n_ctx, cached.path is not None, cached.source) == (4096, True, "preset")
    assert (hub.path, hub.missing()) == (
        None,
        Origin(repo="ggml-org/absent:Q4_K_M", file="a.gguf", offline=True, token="hf_secret", cache=tmp_path / "cache"),
    )
    assert address.missing() == Origin(url="https://example.org/models/x-00001-of-00002.gguf")
