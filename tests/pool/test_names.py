"""What a name means: the reference's rules, and names that must not pass."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamaherd.pool import BadRequest
from llamaherd.pool.names import HubName, canonical_section, model_name, parse_hub_name
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
