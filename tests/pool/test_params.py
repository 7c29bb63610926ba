"""What callers may say of a request, and the message that it becomes."""

import math
from typing import Any, cast

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamaherd.pool.config import ModelSpec
from llamaherd.pool.errors import BadRequest
from llamaherd.pool.params import GenerateParams, completion_request, with_defaults
from llamaherd.pool.sampling import LIMITS, SAMPLER_NAMES, problem_of, sampler_name
from llamaherd.transport.messages import Generate, Sampling, decode, encode


def sampling(**params: Any) -> Sampling:
    return completion_request(1, "x", cast(GenerateParams, params)).sampling


def with_number(name: str, value: float) -> Sampling:
    fields: dict[str, Any] = {name: value}
    return Sampling(**fields)


def refusal(**params: Any) -> str:
    with pytest.raises(BadRequest) as caught:
        sampling(**params)
    return str(caught.value)


def test_without_parameters_everything_is_llama_servers_default() -> None:
    assert sampling() == Sampling()
    assert problem_of(Sampling()) is None


def test_every_parameter_of_the_message_can_be_said_and_none_means_the_default() -> None:
    names = set(Sampling.__struct_fields__)
    assert names <= set(GenerateParams.__annotations__)
    assert set(LIMITS) == names - {"samplers", "logit_bias", "dry_sequence_breakers", "post_sampling_probs"}
    assert sampling(**dict.fromkeys(names)) == Sampling()


@pytest.mark.parametrize("name", sorted(LIMITS))
def test_the_bounds_of_a_number_are_allowed_and_nothing_beyond(name: str) -> None:
    low, high = LIMITS[name]
    whole = isinstance(getattr(Sampling(), name), int)
    for bound, beyond in ((low, low - 1), (high, high + 1)):
        if math.isinf(bound):
            continue
        value = int(bound) if whole else bound
        if name != "seed":
            assert getattr(sampling(**{name: value}), name) == value
            assert refusal(**{name: int(beyond) if whole else beyond}).startswith(f"{name} must be ")
        assert problem_of(with_number(name, value)) is None
        assert problem_of(with_number(name, beyond)) is not None


@pytest.mark.parametrize("name", sorted(LIMITS))
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, "1", [1], True, 10**400])
def test_what_is_no_finite_number_is_refused(name: str, value: Any) -> None:
    assert refusal(**{name: value}).startswith(f"{name} must be ")


def test_a_seed_of_minus_one_draws_one() -> None:
    assert sampling(seed=-1).seed == Sampling().seed == 2**32 - 1
    assert sampling(seed=7).seed == 7


def test_samplers_keep_their_order_and_are_known_by_all_spellings() -> None:
    said = ["top-k", "TopP", "temp", "typical_p", "nucleus", "min-p", "xtc", "topnsigma", "Adaptive-P"]
    canonical = ("top_k", "top_p", "temperature", "typ_p", "top_p", "min_p", "xtc", "top_n_sigma", "adaptive_p")
    assert sampling(samplers=said).samplers == canonical
    assert sampling(samplers=[]).samplers == ()
    assert all(sampler_name(name) == name for name in SAMPLER_NAMES)


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"samplers": ["top_k", "best"]}, "there is no 'best'; known are adaptive_p, dry"),
        ({"samplers": "top_k"}, "samplers must be a list of texts"),
        ({"samplers": [1]}, "samplers must be a text"),
        ({"samplers": ["xtc"] * 33}, "at most 32"),
        ({"dry_sequence_breakers": ["\n", ""]}, "1 to 40 bytes"),
        ({"dry_sequence_breakers": ["é" * 21]}, "1 to 40 bytes"),
        ({"dry_sequence_breakers": ["a\0"]}, "no NUL"),
        ({"dry_sequence_breakers": ["x"] * 33}, "at most 32"),
        ({"dry_sequence_breakers": ["\ud800"]}, "lone surrogate"),
        ({"logit_bias": 5}, "must be a list of [token, bias] pairs or an object"),
        ({"logit_bias": [[1, 2, 3]]}, "each entry must be a token and its bias"),
        ({"logit_bias": [5]}, "each entry must be a token and its bias"),
        ({"logit_bias": [[-1, 1]]}, "an id, 0 or more, or a text"),
        ({"logit_bias": [[True, 1]]}, "an id, 0 or more, or a text"),
        ({"logit_bias": [[1.5, 1]]}, "an id, 0 or more, or a text"),
        ({"logit_bias": [["", 1]]}, "1 to 256 characters"),
        ({"logit_bias": [["x" * 257, 1]]}, "1 to 256 characters"),
        ({"logit_bias": [[1, True]]}, "a finite number, or false"),
        ({"logit_bias": [[1, None]]}, "a finite number, or false"),
        ({"logit_bias": [[1, math.nan]]}, "a finite number, or false"),
        ({"logit_bias": [[1, -math.inf]]}, "a finite number, or false"),
        ({"logit_bias": [[1, 1]] * 4097}, "at most 4096"),
        ({"topk": 5}, "unknown parameter 'topk'"),
    ],
)
def test_a_wrong_value_is_refused_by_name(params: dict[str, Any], words: str) -> None:
    assert words in refusal(**params)


def test_biases_are_taken_as_pairs_and_as_openais_object() -> None:
    pairs = ((5, 1.5), ("word", None), (7, -100.0))
    assert sampling(logit_bias=[[5, 1.5], ("word", False), [7, -100]]).logit_bias == pairs
    assert sampling(logit_bias={"5": 1.5, "word": False, 7: -100}).logit_bias == pairs
    assert sampling(logit_bias={"5": 10**400}).logit_bias == ((5, 1e9),)


NUMBERS: dict[str, st.SearchStrategy[float]] = {
    name: st.integers(int(low), int(high))
    if isinstance(getattr(Sampling(), name), int)
    else st.floats(max(low, -1e30), min(high, 1e30))
    for name, (low, high) in LIMITS.items()
}
BIASES = st.lists(st.tuples(st.integers(0, 500) | st.text("abc", min_size=1), st.floats(-1e9, 1e9) | st.none()))


@given(st.fixed_dictionaries({}, optional={**NUMBERS, "logit_bias": BIASES.map(tuple)}))
def test_what_is_allowed_survives_the_wire(values: dict[str, Any]) -> None:
    command = Generate(request=1, prompt="x", sampling=Sampling(**values))
    assert problem_of(command.sampling) is None
    assert decode(*encode(command)) == command


def test_a_plain_request_stays_short_on_the_wire() -> None:
    body = msgspec.json.decode(encode(completion_request(1, "x", {"temperature": 0}))[1])
    assert body == {"request": 1, "prompt": "x", "sampling": {"temperature": 0.0}}


def test_a_number_too_long_to_be_a_token_is_refused_and_not_computed() -> None:
    with pytest.raises(BadRequest, match="logit_bias"):
        completion_request(1, "hello", {"logit_bias": {"9" * 5000: 1.0}})


# --- a model's defaults ---


def test_a_request_has_the_models_defaults_where_it_says_nothing() -> None:
    given: dict[str, Any] = {"temperature": 0.0, "top_k": None, "stop": ["x"]}

    found = with_defaults(cast(GenerateParams, given), {"temperature": 0.5, "top_k": 9, "seed": 3})

    assert found == {"temperature": 0.0, "top_k": 9, "seed": 3, "stop": ["x"]}


OWN_FORMS: list[dict[str, Any]] = [
    {"grammar": "root ::= [a-z]"},
    {"json_schema": {}},
    {"response_format": {"type": "text"}},
    {"tools": [{}]},
]
DEFAULT_FORMS: list[dict[str, Any]] = [
    {"grammar": 'root ::= "yes" | "no"'},
    {"json_schema": {}},
    {"response_format": {"type": "json_object"}},
]


@pytest.mark.parametrize("own", OWN_FORMS)
@pytest.mark.parametrize("default", DEFAULT_FORMS)
def test_a_default_form_is_for_requests_that_have_none_of_their_own(
    default: dict[str, Any], own: dict[str, Any]
) -> None:
    assert with_defaults(cast(GenerateParams, {}), default) == default
    assert with_defaults(cast(GenerateParams, own), default) == own


@pytest.mark.parametrize(
    ("defaults", "words"),
    [
        ({"id_slot": 1}, "'id_slot' cannot be a default"),
        ({"warmth": 1}, "'warmth' cannot be a default"),
        ({"top_p": 2}, "top_p"),
        ({"grammar": "root"}, "grammar"),
    ],
)
def test_defaults_that_no_request_could_have_are_refused_with_the_model(defaults: dict[str, Any], words: str) -> None:
    with pytest.raises(BadRequest, match=r"^model 'm': ") as caught:
        ModelSpec(name="m", engine="fake", defaults=defaults).check()
    assert words in str(caught.value)
