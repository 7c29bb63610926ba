"""What a name means: the reference's rules, and names that must not pass."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamaherd.pool import BadRequest
from llamaherd.pool.names import (
    DockerName,
    HubName,
    canonical_section,
    is_loopback,
    model_name,
    parse_docker_name,
    parse_hub_name,
    parse_name,
)
from llamaherd.pool.quants import (
    Split,
    is_model_file,
    listed_names,
    pick_model,
    pick_projector,
    split_files,
    split_of,
)

GEMMA = [
    ".gitattributes",
    "README.md",
    "gemma-3-4b-it-Q4_K_M.gguf",
    "gemma-3-4b-it-Q8_0.gguf",
    "gemma-3-4b-it-f16.gguf",
    "mmproj-model-f16.gguf",
    "mmproj-model-Q8_0.gguf",
]
DIGEST = "sha256:" + "a" * 64
KIMI = [f"UD-IQ1_S/Kimi-UD-IQ1_S-{part:05}-of-00003.gguf" for part in (1, 2, 3)]


def test_a_model_is_called_by_its_repository_then_docker_then_path() -> None:
    assert model_name(hf_repo="a/b:Q8_0", docker_repo="ai/c", path="/d.gguf") == "a/b:Q8_0"
    assert model_name(docker_repo="ai/c", path="/d.gguf") == "ai/c"
    assert model_name(path="/d.gguf") == "/d.gguf"
    assert model_name() == ""


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("ggml-org/gemma-3-4b-it-GGUF", HubName("ggml-org/gemma-3-4b-it-GGUF")),
        ("ggml-org/gemma-3-4b-it-GGUF:Q8_0", HubName("ggml-org/gemma-3-4b-it-GGUF", "Q8_0")),
        ("a_b/c.d:UD-Q4_K_XL", HubName("a_b/c.d", "UD-Q4_K_XL")),
    ],
)
def test_a_name_is_a_repository_and_a_quant(text: str, name: HubName) -> None:
    assert parse_hub_name(text) == name
    assert str(name) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a",
        "a/",
        "/b",
        "a/b/c",
        "a/b:",
        "../b",
        "a/..",
        "./b",
        "a/b:../../x",
        "a/b:x/y",
        "a/b:..",
        "a--b/c",
        "a/b:c:d",
    ]
    + ["-a/b", "a/b-", "a..b/c", "a/b\n", "ä/b", "a/b:ß", "a/" + "b" * 300, "a b/c", "a/b:" + "q" * 300],
)
def test_what_is_no_name_is_refused(text: str) -> None:
    with pytest.raises(BadRequest, match="no model name"):
        parse_hub_name(text)


@given(st.text(max_size=60))
def test_no_name_that_passes_leads_out_of_a_folder(text: str) -> None:
    try:
        name = parse_hub_name(text)
    except BadRequest:
        return
    assert name.repo.count("/") == 1
    assert not set(name.repo.split("/")) & {"", ".", ".."}
    assert "/" not in name.tag and ".." not in name.tag


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("smollm2", "docker.io/ai/smollm2:latest"),
        ("smollm2:135M-Q4_0", "docker.io/ai/smollm2:135M-Q4_0"),
        ("ai/smollm2:135M-Q4_0", "docker.io/ai/smollm2:135M-Q4_0"),
        ("somebody/gemma3", "docker.io/somebody/gemma3:latest"),
        ("docker.io/smollm2", "docker.io/ai/smollm2:latest"),
        ("index.docker.io/ai/smollm2", "docker.io/ai/smollm2:latest"),
        ("GHCR.io/a/b__c/d--e.f:v1", "ghcr.io/a/b__c/d--e.f:v1"),
        ("localhost:5000/m", "localhost:5000/m:latest"),
        ("localhost/m", "localhost:80/m:latest"),
        ("r.example/m:1", "r.example:443/m:1"),
        (f"r.example/a/m@{DIGEST}", f"r.example/a/m@{DIGEST}"),
    ],
)
def test_a_docker_name_is_written_in_one_way(text: str, name: str) -> None:
    found = parse_docker_name(text)

    assert str(found) == name
    assert parse_docker_name(name) == parse_name(name) == found


@pytest.mark.parametrize(
    "text",
    [
        "",
        "/",
        "a/",
        "A/b",
        "a/B",
        "../b",
        "a/..",
        "a//b",
        "a/b:",
        "a/b:.x",
        "a/b:x/y",
        "a/b:" + "t" * 129,
        "a/b@",
        "-a/b",
    ]
    + ["a/b@sha256:0", f"a/b:t@{DIGEST}", f"a/b@{DIGEST.upper()}", "a/b@md5:" + "0" * 32, "a/b:ß", "a/b c", "a/b\n"]
    + [":/b", "x:/b", "x:y/b", "x:99999/b", "x:0/b", "a.:5/b", ".a/b/c", "[::1]:5/b", "r.io/a/" + "b" * 300, "a___b/c"],
)
def test_what_is_no_docker_name_is_refused(text: str) -> None:
    with pytest.raises(BadRequest, match="no model name"):
        parse_docker_name(text)


@given(st.one_of(st.text(max_size=60), st.from_regex(r"[a-z.:]{1,6}/[a-z./:@-]{1,20}", fullmatch=True)))
def test_no_docker_name_that_passes_leads_out_of_a_folder(text: str) -> None:
    try:
        name = parse_docker_name(text)
    except BadRequest:
        return
    assert not set(name.repo.split("/")) & {"", ".", ".."}
    assert not {"/", "+"} & set(name.registry + name.reference) and not name.reference.startswith(".")
    assert parse_docker_name(str(name)) == name


def test_a_name_with_a_registry_is_one_of_docker_and_others_are_not() -> None:
    assert parse_name("docker.io/ai/smollm2:x") == DockerName("docker.io", "ai/smollm2", "x")
    assert parse_name("docker.io/smollm2") == DockerName("docker.io", "ai/smollm2")
    assert parse_name("127.0.0.1:5000/m") == DockerName("127.0.0.1:5000", "m")
    assert parse_name("ai/smollm2:x") == HubName("ai/smollm2", "x")
    assert parse_name("a.b/c.d:Q8_0") == HubName("a.b/c.d", "Q8_0")
    for text in ("smollm2", "a/b/c", "../../x", "r.example/../x"):
        with pytest.raises(BadRequest, match="no model name"):
            parse_name(text)


def test_a_registry_of_this_machine_is_known_by_its_name() -> None:
    assert all(map(is_loopback, ["localhost", "localhost:5000", "127.0.0.1", "127.1.2.3:80"]))
    assert not any(map(is_loopback, ["docker.io", "localhost.example:5000", "10.0.0.1", "127.0.0.1.example"]))


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("model-q4_k_m.gguf", Split("model-q4_k_m", "Q4_K_M")),
        ("x/model.Q8_0.gguf", Split("x/model.Q8_0", "Q8_0")),
        ("m-Q2_K-00002-of-00007.gguf", Split("m-Q2_K", "Q2_K", 2, 7)),
        ("plain.gguf", Split("plain", "")),
        ("README.md", None),
    ],
)
def test_a_file_says_its_tag_and_its_part(path: str, split: Split | None) -> None:
    assert split_of(path) == split


def test_the_default_quant_is_q4_k_m_then_q8_0_then_the_first_file() -> None:
    assert pick_model(GEMMA) == "gemma-3-4b-it-Q4_K_M.gguf"
    assert pick_model([path for path in GEMMA if "Q4_K_M" not in path]) == "gemma-3-4b-it-Q8_0.gguf"
    assert pick_model(["b-Q2_K.gguf", "a-Q3_K.gguf"]) == "b-Q2_K.gguf"
    assert pick_model(["README.md", "mmproj-Q8_0.gguf", "model.imatrix.gguf"]) is None


def test_a_quant_is_found_without_regard_to_case_and_never_replaced() -> None:
    assert pick_model(GEMMA, "F16") == "gemma-3-4b-it-f16.gguf"
    assert pick_model(GEMMA, "Q2_K") is None
    assert pick_model(GEMMA, "Q4_K") is None  # followed by neither - nor .
    assert pick_model(["a-Q4X0.gguf"], "Q4.0") is None  # a quant is no pattern


def test_a_split_model_begins_with_its_first_part_and_has_all_of_them() -> None:
    files = [KIMI[2], KIMI[0], "other-00001-of-00003.gguf", KIMI[1]]

    assert pick_model(files, "UD-IQ1_S") == KIMI[0]
    assert split_files(files, KIMI[0]) == tuple(KIMI)
    assert split_files(GEMMA, GEMMA[2]) == (GEMMA[2],)


def test_the_projector_nearest_in_folder_and_quantization_goes_with_a_model() -> None:
    assert pick_projector(GEMMA, "gemma-3-4b-it-Q4_K_M.gguf") == "mmproj-model-Q8_0.gguf"
    assert pick_projector(GEMMA, "gemma-3-4b-it-f16.gguf") == "mmproj-model-f16.gguf"
    assert pick_projector([*GEMMA, "q8/mmproj-F32.gguf"], "q8/m-Q8_0.gguf") == "q8/mmproj-F32.gguf"
    assert pick_projector(["q8/mmproj-F32.gguf"], "m-Q8_0.gguf") is None


def test_what_accompanies_a_model_is_none() -> None:
    assert is_model_file("q8/model-Q8_0.gguf")
    for name in ("mmproj-F16.gguf", "m.imatrix.gguf", "mtp-m.gguf", "eagle3-m.gguf", "dflash-m.gguf", "dspark-m.gguf"):
        assert not is_model_file(name)


def test_cached_files_are_listed_by_tag_once_each() -> None:
    assert listed_names("o/g", [*GEMMA, "again/gemma-q8_0.gguf", "untagged.gguf", *KIMI]) == {
        "o/g:Q4_K_M": "gemma-3-4b-it-Q4_K_M.gguf",
        "o/g:Q8_0": "gemma-3-4b-it-Q8_0.gguf",
        "o/g:F16": "gemma-3-4b-it-f16.gguf",
        "o/g:IQ1_S": KIMI[0],
    }


def test_a_section_names_its_quant_as_listings_do() -> None:
    assert canonical_section("o/g:q8_0") == "o/g:Q8_0"
    assert canonical_section("o/g:gemma-q4_k_m") == "o/g:Q4_K_M"
    assert canonical_section("custom_model") == "custom_model"
    assert canonical_section("docker.io/ai/smollm2:135M-Q4_0") == "docker.io/ai/smollm2:135M-Q4_0"
