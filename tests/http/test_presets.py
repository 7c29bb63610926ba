"""Preset files in use: what a setting does to a model, which of several wins, and what a mistake costs."""

import itertools
import os
from collections.abc import Sequence
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from hub_cache import write_repo
from llamaherd.http.catalog_options import CatalogSettings, catalog_options
from llamaherd.http.options import engine_options
from llamaherd.http.presets import PresetOptions
from llamaherd.pool import BadRequest, Catalog, EngineOptions, ModelSpec, Origin, Placement, Setting, Sources


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings come from files alone unless a test says otherwise."""
    for name in os.environ:
        if name.startswith(("LLAMA_ARG_", "LLAMA_CACHE", "HF_")):
            monkeypatch.delenv(name)


def gguf(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"GGUF\x03\x00\x00\x00")
    return path


def settings(*lines: str) -> list[Setting]:
    split = [line.partition("=") for line in lines]
    return [Setting(key, value, f"p.ini:{number}") for number, (key, _, value) in enumerate(split, 1)]


def spec_of(*lines: str) -> ModelSpec:
    return PresetOptions().configure("m", settings(*lines)).spec


def read(tmp_path: Path, text: str, arguments: Sequence[str] = (), **sources: Path) -> Catalog:
    """Return the catalogue of a preset file, with what the command line says beside it."""
    (tmp_path / "p.ini").write_text(text)
    catalogs: list[Catalog] = []

    @click.command()
    @catalog_options
    @engine_options
    def command(wanted: CatalogSettings, options: EngineOptions) -> None:
        found = wanted.sources(options, tuple)
        where = Sources(given=found.given, models_dir=wanted.models_dir, presets=wanted.models_preset, **sources)
        catalogs.append(wanted.read(where))

    line = ["--models-preset", str(tmp_path / "p.ini"), "--no-models-cache", *arguments]
    done = CliRunner().invoke(command, line, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return catalogs[0]


# --- one setting ---


@pytest.mark.parametrize(
    ("line", "field", "value"),
    [
        ("c=77", "n_ctx", 77),
        ("ctx-size=77", "n_ctx", 77),
        ("LLAMA_ARG_CTX_SIZE=77", "n_ctx", 77),
        ("ngl=all", "n_gpu_layers", -1),
        ("fa=enabled", "flash_attn", "on"),
        ("mmap=off", "use_mmap", False),
        ("no-mmap=on", "use_mmap", False),
        ("no-mmap=off", "use_mmap", True),
        ("LLAMA_ARG_NO_MMAP=1", "use_mmap", False),
        ("np=2", "n_parallel", 2),
        ("chat-template={{ x }}", "chat_template", "{{ x }}"),
    ],
)
def test_an_engine_setting_is_the_flag_of_the_command_line(line: str, field: str, value: object) -> None:
    assert getattr(spec_of(line).options, field) == value


@pytest.mark.parametrize(
    ("line", "field", "value"),
    [
        ("alias=a, b,,a", "aliases", ("a", "b")),
        ("tags=x,y", "tags", ("x", "y")),
        ("load-on-startup=true", "load_on_startup", True),
        ("stop-timeout=3", "stop_timeout", 3.0),
        ("replicas=2", "replicas", 2),
        ("pinned=1", "pinned", True),
        ("priority=-2", "priority", -2),
        ("memory=2", "memory", 2 * 1024 * 1024),
        ("sleep-idle-seconds=5", "sleep_idle_seconds", 5.0),
        ("sleep-idle-seconds=-1", "sleep_idle_seconds", None),
        ("unload-idle-seconds=6", "unload_idle_seconds", 6.0),
        ("load-stall-seconds=7", "load_stall_seconds", 7.0),
        ("queue-max-per-model=8", "queue_max", 8),
        ("queue-timeout=9", "queue_timeout", 9.0),
        ("gpus=0,1", "placements", (Placement(gpus=("0", "1")),)),
        ("gpus=none", "placements", (Placement(gpus=()),)),
        ("gpus=GPU-1a2b | 1", "placements", (Placement(gpus=("GPU-1a2b",)), Placement(gpus=("1",)))),
        ("cores=0-2,5", "placements", (Placement(cores=(0, 1, 2, 5)),)),
        ("temp=0.6", "defaults", {"temperature": 0.6}),
        ("LLAMA_ARG_TOP_K=20", "defaults", {"top_k": 20}),
        ("n=64", "defaults", {"max_tokens": 64}),
        ("samplers=top_k; temperature", "defaults", {"samplers": ("top_k", "temperature")}),
        ("samplers=", "defaults", {"samplers": ()}),
        ("sampler-seq=kt", "defaults", {"samplers": ("top_k", "temperature")}),
        ("ignore-eos=1", "defaults", {"ignore_eos": True}),
        ("dry-sequence-breaker=none", "defaults", {"dry_sequence_breakers": ()}),
        ("logit-bias=15-0.5", "defaults", {"logit_bias": ((15, -0.5),)}),
        ("l=15-inf", "defaults", {"logit_bias": ((15, False),)}),
    ],
)
def test_a_setting_of_the_pool_is_a_field_of_the_spec(line: str, field: str, value: object) -> None:
    assert getattr(spec_of(line), field) == value


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("c=many", "p.ini:1: c: 'many' is not a whole number"),
        ("mmap=maybe", "p.ini:1: mmap: 'maybe' is not one of on"),
        ("np=0", "p.ini:1: '-np' / '--parallel': 0 slots"),
        ("chat-template=hello", "p.ini:1: '--chat-template': 'hello' is no Jinja source"),
        ("chat-template-file=/missing", "p.ini:1: '--chat-template-file': /missing cannot be read"),
        ("stop-timeout=-3", "p.ini:1: stop-timeout: -3.0 is not in the range"),
        ("queue-max-per-model=-1", "p.ini:1: queue-max-per-model: -1 is not in the range"),
        ("gpus=0,,1", "p.ini:1: gpus: '0,,1' is not a list of GPUs"),
        ("cores=3-1", "p.ini:1: cores: '3-1' is not a list of cores"),
        ("cores=all", "p.ini:1: cores: 'all' is not a list of cores"),
        ("unheard-of=1", "p.ini:1: 'unheard-of' is no setting of a model"),
        ("temp=warm", "p.ini:1: temp: 'warm' is not a valid float"),
        ("top-p=2", "p.ini:1: top_p must be a number"),
        ("samplers=top_k;psychic", "p.ini:1: samplers: there is no 'psychic'"),
        ("sampler-seq=kz", "p.ini:1: sampler-seq: no sampler is called 'z'"),
        ("logit-bias=fifteen", "p.ini:1: logit-bias: 'fifteen' is not a token's id and a bias"),
    ],
)
def test_a_wrong_setting_is_told_with_its_place_and_the_reason(line: str, message: str) -> None:
    with pytest.raises(BadRequest) as caught:
        spec_of(line)

    assert message in str(caught.value)


def test_cores_and_gpus_of_replicas_go_together() -> None:
    spec = spec_of("replicas=3", "gpus=0 | 1", "cores=0-1 | 2-3 | 4-5")

    assert spec.placements == (
        Placement(gpus=("0",), cores=(0, 1)),
        Placement(gpus=("1",), cores=(2, 3)),
        Placement(gpus=("0",), cores=(4, 5)),
    )


def test_every_field_of_a_model_that_a_user_would_set_is_a_key() -> None:
    set_otherwise = {"preset", "name", "path", "options", "mmproj", "origin", "repo", "source", "engine", "script"}
    keys = {
        "aliases": "alias=a",
        "tags": "tags=a",
        "stop_timeout": "stop-timeout=1",
        "pinned": "pinned=1",
        "priority": "priority=1",
        "load_on_startup": "load-on-startup=1",
        "sleep_idle_seconds": "sleep-idle-seconds=1",
        "unload_idle_seconds": "unload-idle-seconds=1",
        "memory": "memory=1",
        "queue_max": "queue-max-per-model=1",
        "queue_timeout": "queue-timeout=1",
        "load_stall_seconds": "load-stall-seconds=1",
        "replicas": "replicas=2",
        "placements": "gpus=1",
        "defaults": "temp=0",
    }
    plain = spec_of()

    assert set(ModelSpec.__struct_fields__) - set_otherwise == set(keys)
    for field, line in keys.items():
        assert getattr(spec_of(line), field) != getattr(plain, field)


def test_where_a_model_comes_from_is_its_origin(tmp_path: Path) -> None:
    def origin_of(*lines: str) -> Origin | None:
        return PresetOptions().configure("m", settings(*lines)).origin

    assert origin_of("m=/a.gguf") is None
    assert origin_of("hf=o/g:Q8_0", "hft=hf_x", "offline=on") == Origin(repo="o/g:Q8_0", token="hf_x", offline=True)
    assert origin_of("LLAMA_ARG_MODEL_URL=http://h/a.gguf") == Origin(url="http://h/a.gguf")
    assert origin_of("mu=http://h/a.gguf", "hf=o/g") == Origin(repo="o/g")


def test_a_model_of_an_address_goes_where_its_model_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_CACHE", str(tmp_path / "cache"))
    gguf(tmp_path / "b.gguf")
    text = f"""
        [there]
        model-url = http://h/a.gguf
        model = {tmp_path}/b.gguf
        [absent]
        model-url = http://h/a.gguf
        [wrong]
        model-url = file:///a.gguf
    """

    catalog = read(tmp_path, text)

    there, absent = catalog.models
    assert there.path == tmp_path / "b.gguf"
    assert (absent.path, absent.missing()) == (None, Origin(url="http://h/a.gguf"))
    assert "no http or https address" in catalog.broken[0].reason


def test_a_cache_of_a_user_who_is_not_known_costs_the_models_that_need_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMA_CACHE", "~no-such-user/models")
    gguf(tmp_path / "b.gguf")
    text = f"""
        [here]
        model = {tmp_path}/b.gguf
        [there]
        model-url = http://h/a.gguf
        [hub]
        hf = o/g
    """

    catalog = read(tmp_path, text)

    assert [model.name for model in catalog.models] == ["here"]
    assert [model.name for model in catalog.broken] == ["there", "hub"]
    assert all("a user who is not known here" in model.reason for model in catalog.broken)


def test_the_environment_says_how_requests_are_sampled_where_nothing_else_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_ARG_TOP_K", "7")
    monkeypatch.setenv("LLAMA_ARG_N_PREDICT", "50")

    assert spec_of().defaults == {"top_k": 7, "max_tokens": 50}
    assert spec_of("top-k=9", "temp=0.5").defaults == {"top_k": 9, "max_tokens": 50, "temperature": 0.5}


def test_two_addresses_of_one_file_name_are_not_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_CACHE", str(tmp_path / "cache"))
    text = f"""
        [a]
        model-url = http://h/a/m.gguf
        [a again]
        model-url = http://h/a/m.gguf?token=other
        [b]
        model-url = http://h/b/m.gguf
        [c]
        model-url = http://h/b/m.gguf
        model = {tmp_path}/c.gguf
    """

    catalog = read(tmp_path, text)

    assert [model.name for model in catalog.models] == ["a", "a again", "c"]
    assert catalog.broken[0].reason == (
        f"its file {tmp_path}/cache/m.gguf is that of model 'a', which comes from another address: "
        "set model to where it shall lie"
    )


def test_an_address_that_is_none_is_told_without_its_secrets(tmp_path: Path) -> None:
    catalog = read(tmp_path, "[m]\nmodel-url = https://user:pass@h/api/models/123?token=secret\n")

    (reason,) = [model.reason for model in catalog.broken]
    assert reason == "'https://h/api/models/123' does not end in the name of a .gguf file"


def test_a_file_that_cannot_be_looked_for_costs_its_model_alone(tmp_path: Path) -> None:
    text = f"""
        [no file has such a name]
        model-url = http://h/a.gguf
        model = {tmp_path}/{"x" * 300}.gguf
        [no file has such a name in bytes]
        model-url = http://h/{"%E9%95%BF" * 90}.gguf
        [sound]
        model = {gguf(tmp_path / "m.gguf")}
    """

    catalog = read(tmp_path, text)

    assert [model.name for model in catalog.models] == ["sound"]
    assert ["name too long" in catalog.broken[0].reason, ".gguf file" in catalog.broken[1].reason] == [True, True]


def test_what_only_llama_server_knows_is_one_warning_per_flag() -> None:
    presets = PresetOptions()
    for _ in range(2):
        presets.configure("m", settings("rpc=h:1", "port=1", "chat-template=vicuna"))
    presets.configure("n", [Setting("rpc", "h:1", "p.ini:9")])

    assert presets.warnings == [
        "p.ini:1 and 1 more: rpc is known to llama-server and has no effect on a model here",
        "p.ini:2: port is known to llama-server and has no effect on a model here",
        "p.ini:3: chat-template = vicuna is known to llama-server and has no effect on a model here",
    ]


def test_chatml_is_a_template_by_its_name() -> None:
    assert "<|im_start|>" in spec_of("chat-template=chatml").options.chat_template


def test_the_later_of_two_ways_to_give_a_template_counts(tmp_path: Path) -> None:
    path = tmp_path / "t.jinja"
    path.write_text("{{ file }}")

    assert spec_of("chat-template={{ a }}", f"chat-template-file={path}").options.chat_template == "{{ file }}"
    assert spec_of(f"chat-template-file={path}", "chat-template={{ a }}").options.chat_template == "{{ a }}"


def test_a_models_settings_are_shown_as_a_section_without_names_and_secrets() -> None:
    spec = spec_of("c=77", "temp=0.5", "c=88", "alias=a", "hft=hf_secret", "tags=x")

    assert spec.preset == "[m]\nc = 88\ntemp = 0.5\n\n"
    assert spec_of().preset == ""
    address = spec_of("mu=https://user:word@h/m.gguf?token=t").preset
    assert address == "[m]\nmu = https://h/m.gguf\n\n"


# --- which wins ---


def test_the_later_of_several_ways_to_give_a_form_or_samplers_counts(tmp_path: Path) -> None:
    (tmp_path / "g").write_text('root ::= "file"')
    schema = ('json-schema={"type": "object"}', {"json_schema": {"type": "object"}})
    grammar = ('grammar=root ::= "own"', {"grammar": 'root ::= "own"'})
    file = (f"grammar-file={tmp_path}/g", {"grammar": 'root ::= "file"'})

    for (first, _), (second, defaults) in itertools.permutations((schema, grammar, file), 2):
        assert spec_of(first, second).defaults == defaults
    assert spec_of("samplers=top_k", "sampler-seq=t").defaults == {"samplers": ("temperature",)}
    assert spec_of("sampler-seq=t", "samplers=top_k").defaults == {"samplers": ("top_k",)}
    assert spec_of("sampler-seq=t", "samplers=").defaults == {"samplers": ()}


def test_the_command_line_wins_over_the_section_and_that_over_all_and_that_over_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMA_ARG_CTX_SIZE", "1")
    monkeypatch.setenv("LLAMA_ARG_UBATCH", "16")
    text = f"[*]\nc = 2\nb = 32\nngl = 3\n[m]\nmodel = {gguf(tmp_path / 'm.gguf')}\nc = 4\nngl = 5\n"

    (spec,) = read(tmp_path, text, ["-ngl", "6"]).models

    options = spec.options
    assert (options.n_ubatch, options.n_batch, options.n_ctx, options.n_gpu_layers) == (16, 32, 4, 6)


def test_a_preset_file_of_llama_servers_manual_loads_unchanged(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    write_repo(cache, "ggml-org/MY-MODEL-GGUF", ["MY-MODEL-Q8_0.gguf"])
    text = f"""\
version = 1

; settings shared by all
[*]
c = 8192
n-gpu-layers = 8

; the settings of a model that exists
[ggml-org/MY-MODEL-GGUF:Q8_0]
chat-template = chatml
n-gpu-layers = 123
jinja = true
c = 4096
LLAMA_ARG_CACHE_RAM = 0
model-draft = ./my-models/draft.gguf
model-draft = /somewhere/draft.gguf

[custom_model]
model = {gguf(tmp_path / "my-awesome-model-Q4_K_M.gguf")}
load-on-startup = true
stop-timeout = 5
"""
    catalog = read(tmp_path, text, cache=cache)

    first, second = catalog.models
    assert (first.name, first.source, first.path is not None) == ("ggml-org/MY-MODEL-GGUF:Q8_0", "preset", True)
    assert (first.options.n_ctx, first.options.n_gpu_layers) == (4096, 123)
    assert (second.name, second.options.n_ctx, second.load_on_startup, second.stop_timeout) == (
        "custom_model",
        8192,
        True,
        5.0,
    )
    assert all("has no effect" in problem for problem in catalog.problems)
    named = {problem.partition(": ")[2].partition(" ")[0] for problem in catalog.problems}
    assert named == {"model-draft"}


def test_a_mistake_costs_its_model_alone(tmp_path: Path) -> None:
    model = gguf(tmp_path / "m.gguf")
    text = f"[a]\nmodel = {model}\nc = x\n[b]\nmodel = {model}\n[c]\nc = 1\n[d]\nmodel = {model}\nnonsense\n"

    catalog = read(tmp_path, text)

    place = tmp_path / "p.ini"
    assert [(model.name, model.reason.partition(": ")[0]) for model in catalog.broken] == [
        ("a", f"{place}:3"),
        ("c", f"{place}:6"),
        ("d", f"{place}:10"),
    ]
    assert [spec.name for spec in catalog.models] == ["b"]
    assert catalog.problems == (
        f"model 'a' cannot be used: {place}:3: c: 'x' is not a whole number.",
        f"model 'c' cannot be used: {place}:6: it names no file and no repository: "
        "set model, hf-repo, docker-repo or model-url",
        f"model 'd' cannot be used: {place}:10: 'nonsense' is no [section] and no key = value",
    )


def test_settings_for_all_reach_the_models_of_every_source(tmp_path: Path) -> None:
    cache, folder = tmp_path / "cache", tmp_path / "models"
    write_repo(cache, "o/g", ["g-Q8_0.gguf"])
    gguf(folder / "single.gguf")
    gguf(folder / "seeing" / "seeing.gguf")
    gguf(folder / "seeing" / "mmproj-F16.gguf")

    catalog = read(tmp_path, "[*]\nc = 9\n[seeing]\ntags = eyes\n", ["--models-dir", str(folder)], cache=cache)

    assert {spec.name: (spec.source, spec.options.n_ctx, spec.tags) for spec in catalog.models} == {
        "o/g:Q8_0": ("cache", 9, ()),
        "single": ("models_dir", 9, ()),
        "seeing": ("preset", 9, ("eyes",)),
    }
    assert [spec.mmproj and spec.mmproj.name for spec in catalog.models if spec.name == "seeing"] == ["mmproj-F16.gguf"]


# --- repositories ---


def test_a_preset_finds_the_file_of_its_repository(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    write_repo(cache, "o/g", ["g-Q4_K_M.gguf", "g-Q8_0.gguf", "mmproj-f16.gguf"])

    def path_of(*lines: str) -> str | None:
        (spec,) = [spec for spec in read(tmp_path, "\n".join(["[m]", *lines]), cache=cache).models if spec.name == "m"]
        assert spec.repo.startswith("o/g")
        return spec.path.name if spec.path is not None else None

    assert path_of("hf-repo = o/g") == "g-Q4_K_M.gguf"
    assert path_of("hf = o/g:q8_0") == "g-Q8_0.gguf"
    assert path_of("hf = o/g", "hff = g-Q8_0.gguf") == "g-Q8_0.gguf"
    assert path_of("hf = o/g:Q2_K") is None


def test_a_preset_hides_the_cached_model_of_its_file_if_it_says_so(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    write_repo(cache, "o/g", ["g-Q4_K_M.gguf", "g-Q8_0.gguf"])
    text = "[m]\nhf-repo = o/g:Q8_0\n"

    shown = read(tmp_path, text, cache=cache).models
    hidden = read(tmp_path, f"[*]\ndedup-cache-models = true\n{text}", cache=cache).models

    assert [spec.name for spec in shown] == ["m", "o/g:Q4_K_M", "o/g:Q8_0"]
    assert [spec.name for spec in hidden] == ["m", "o/g:Q4_K_M"]
    assert hidden[0].aliases == ("o/g:Q8_0",)  # not listed, and still a name that can be used


def test_settings_that_are_objects_are_settings_like_others() -> None:
    presets = PresetOptions()

    first, second = (
        presets.configure("m", settings(f'chat-template-kwargs={{"enable_thinking": {value}}}')).spec.options
        for value in ("true", "false")
    )

    assert (first.template_kwargs, second.template_kwargs) == (
        {"enable_thinking": True},
        {"enable_thinking": False},
    )


def test_a_repositorys_name_alone_is_an_alias_of_its_default_model_if_it_is_free(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    write_repo(cache, "o/g", ["g-Q4_K_M.gguf", "g-Q8_0.gguf"])

    (free, _) = read(tmp_path, "", cache=cache).models
    taken = read(tmp_path, "[m]\nhf-repo = o/g:Q8_0\nalias = o/g\n", cache=cache).models

    assert (free.name, free.aliases) == ("o/g:Q4_K_M", ("o/g",))
    assert [(spec.name, spec.aliases) for spec in taken] == [("m", ("o/g",)), ("o/g:Q4_K_M", ()), ("o/g:Q8_0", ())]


def test_an_alias_that_is_taken_is_left_out_and_told(tmp_path: Path) -> None:
    model = gguf(tmp_path / "m.gguf")
    catalog = read(tmp_path, f"[a]\nmodel = {model}\nalias = b, x\n[b]\nmodel = {model}\nalias = x\n")

    assert [(spec.name, spec.aliases) for spec in catalog.models] == [("a", ("x",)), ("b", ())]
    assert catalog.problems == (
        "model 'a' is not called 'b' too: 'b' is",
        "model 'b' is not called 'x' too: 'a' is",
    )


def test_embeddings_are_a_models_own_affair(tmp_path: Path) -> None:
    model = gguf(tmp_path / "m.gguf")
    keys = {"a": "embeddings = true\npooling = last", "b": "reranking = on", "c": "pooling = mean\nembd-normalize = 0"}
    text = "".join(f"[{name}]\nmodel = {model}\n{lines}\n" for name, lines in keys.items())
    options = [spec.options for spec in read(tmp_path, text).models]
    assert [(one.embedding, one.pooling, one.embd_normalize) for one in options] == [
        (True, "last", 2),
        (True, "rank", 2),
        (False, "mean", 0),
    ]
