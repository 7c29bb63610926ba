"""The one codec: what the wire looks like, and that nothing a peer sends can make it raise."""

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamaherd.transport import messages
from llamaherd.transport.messages import (
    CHILD_KINDS,
    POOL_KINDS,
    CallDelta,
    Cancel,
    ChatOptions,
    Delta,
    Detokenize,
    Done,
    Download,
    Embed,
    EngineLoad,
    EngineOptions,
    Exit,
    Failed,
    Generate,
    Load,
    Lora,
    Message,
    Prefetch,
    PromptProgress,
    Rerank,
    Result,
    Sampling,
    Sequence,
    Sleep,
    SlotFile,
    Slots,
    SlotState,
    State,
    Stats,
    Template,
    Threads,
    Timings,
    Tokenize,
    Tokens,
    TypedDelta,
    Unknown,
    Unload,
    Usage,
    Vector,
    Vectors,
    Wake,
    decode,
    encode,
    kind_of,
)

deterministic = settings(derandomize=True, deadline=None)

EXAMPLES: list[Message] = [
    State(state="loading", payload={"stages": ["text_model"], "current": "text_model", "value": 0.5}),
    State(state="ready", payload=None),
    Tokens(deltas=(Delta(1, "Grüße \n🦙", (3, 4)), Delta(2, ""))),
    Tokens(typed=(TypedDelta(3, "a", (5,), (), "Hm.", (CallDelta(0, "{", "call_1", "f"), CallDelta(1, "}"))),)),
    Vectors(vectors=(Vector(1, 0, 0, 1, b"\0\1\xff"), Vector(2, 7, 512, 2, b"12345678"))),
    Done(
        request=1,
        finish_reason="length",
        usage=Usage(prompt_tokens=3, completion_tokens=2, cached_tokens=1),
        timings=Timings(queue_ms=0.5, prompt_ms=1.5, predicted_ms=2.5),
        stopping_word="END",
    ),
    Done(request=2, finish_reason="cancelled"),
    Result(request=1, tokens=(1, 2)),
    Result(request=2, text="a\nb"),
    Result(request=3, usage=Usage(prompt_tokens=4)),
    Failed(message="no such file", fault="model", retry=True, code="load_failed", request=9),
    Failed(message="lost"),
    Stats(rss_bytes=4, load=EngineLoad(decodes=3, cells=256)),
    Tokens(progress=(PromptProgress(1, 100, 10, 50, 2.5),)),
    Slots(request=3),
    Sequence(request=4, action="save", slot=1, name="a.bin"),
    Result(request=3, slots=(SlotState(id=0, n_ctx=256, busy=True, request=2),)),
    Result(request=4, file=SlotFile(slot=1, name="a.bin", n_tokens=3, n_bytes=100, ms=0.5)),
    Exit(),
    Load(model="m", path="/m.gguf", options=EngineOptions(n_ctx=128), aliases=("a",), tags=("t",), script={"x": 1}),
    Prefetch(load=Load(model="m", path="/m.gguf", options=EngineOptions(n_ctx=128))),
    Download(model="d.io/u/r:1", registry="d.io", repo="u/r", tag="1", cache="/c", endpoint="https://d.io"),
    Download(model="u/r:Q8_0", repo="u/r", tag="Q8_0", cache="/c", endpoint="http://h", offline=True, mmproj=False),
    Sleep(),
    Unload(),
    State(state="unloaded"),
    Wake(),
    Generate(request=1, prompt="hi", sampling=Sampling(temperature=0.0, seed=7), max_tokens=5, stop=("\n",)),
    Generate(request=2, prompt=(1, 2, 3), lora=((0, 0.5),)),
    Generate(request=3, messages=({"role": "user", "content": "hi"},), template_kwargs={"k": True}),
    Embed(request=1, inputs=("hi", (1, 2), (1, "mixed", 2)), normalize=-1, dimensions=8, pooled=True),
    Rerank(request=1, query="which?", documents=("this", "that")),
    Tokenize(request=1, text="hi", add_special=True, parse_special=False),
    Detokenize(request=1, tokens=(5, 6)),
    Template(request=1, messages=({"role": "user", "content": "hi"},)),
    Template(
        request=2,
        messages=({"role": "user", "content": "hi"},),
        chat=ChatOptions(tools=({"type": "function", "function": {"name": "f"}},), tool_choice="required"),
    ),
    Cancel(request=4),
    Threads(n=2, batch=4),
    Lora(scales=(1.0, 0.0, -0.5)),
]


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda m: type(m).__name__)
def test_a_message_survives_the_wire(message: Message) -> None:
    kind, body = encode(message)
    assert decode(kind, body) == message
    assert b"\n" not in body


def test_there_is_an_example_of_every_kind() -> None:
    assert {kind_of(message) for message in EXAMPLES} == CHILD_KINDS | POOL_KINDS
    assert not CHILD_KINDS & POOL_KINDS


@pytest.mark.parametrize(
    ("message", "kind", "body"),
    [
        (
            State(state="loading", payload={"value": 0.5}),
            "state",
            b'{"state":"loading","payload":{"value":0.5}}',
        ),
        (State(state="ready", payload={}), "state", b'{"state":"ready","payload":{}}'),
        (Exit(), "exit", b""),
        (Sleep(), "sleep", b""),
        (Wake(), "wake", b""),
        (Tokens(deltas=(Delta(1, "a", (2,)),)), "tokens", b'{"deltas":[[1,"a",[2],[]]]}'),
        (Threads(n=2), "threads", b'{"n":2}'),
    ],
)
def test_the_bytes_are_these(message: Message, kind: str, body: bytes) -> None:
    assert encode(message) == (kind, body)


def test_fields_of_a_newer_peer_are_ignored() -> None:
    assert decode("stats", b'{"rss_bytes":1,"mood":"fine"}') == Stats(rss_bytes=1)
    assert decode("exit", b'{"when":"soon"}') == Exit()


def test_what_is_unknown_says_why_and_shows_its_start() -> None:
    assert decode("k" * 100, b"x" * 300) == Unknown("k" * 64, "unknown kind", b"x" * 200)
    missing = decode("state", b"{}")
    assert isinstance(missing, Unknown) and "state" in missing.reason
    deep = decode("state", b'{"state":"a","payload":' + b'{"a":' * 100_000)
    assert isinstance(deep, Unknown)


@pytest.mark.parametrize(
    ("kind", "body", "request_number"),
    [
        ("done", b'{"request":7,"finish_reason":12}', 7),
        ("failed", b'{"message":"a","fault":"nobody","request":8}', 8),
        ("done", b'{"request":9,"finish_reason":"\xff"}', 9),
        ("result", b'{"request":10,"text":' + b"[" * 100_000, 10),
        ("done", b'{"finish_reason":12}', None),
        ("done", b'{"request":"7"}', None),
        ("done", b"7,", None),
        ("done", b"", None),
        ("tokens", b'{"deltas":[[1,2]]}', None),
    ],
)
def test_what_cannot_be_read_still_names_its_request_where_it_says_one(
    kind: str, body: bytes, request_number: int | None
) -> None:
    damaged = decode(kind, body)
    assert isinstance(damaged, Unknown) and damaged.request == request_number


def test_unknown_is_received_and_never_sent() -> None:
    with pytest.raises(TypeError, match="Unknown"):
        encode(Unknown("k", "why"))


def test_messages_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        Stats().rss_bytes = 1  # type: ignore[misc] # pyright: ignore[reportAttributeAccessIssue]


def test_everything_that_the_module_lists_is_there() -> None:
    assert all(hasattr(messages, name) for name in messages.__all__)


@deterministic
@given(st.text(max_size=80) | st.sampled_from(sorted(CHILD_KINDS | POOL_KINDS)), st.binary())
def test_no_bytes_make_decode_raise(kind: str, body: bytes) -> None:
    assert isinstance(decode(kind, body), Unknown) or kind in CHILD_KINDS | POOL_KINDS


json_values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@deterministic
@given(
    st.sampled_from(sorted(CHILD_KINDS | POOL_KINDS)), st.dictionaries(st.text(max_size=12), json_values, max_size=4)
)
def test_no_json_makes_decode_raise(kind: str, fields: dict[str, Any]) -> None:
    message = decode(kind, msgspec.json.encode(fields))
    if not isinstance(message, Unknown):
        assert decode(*encode(message)) == message


@deterministic
@given(st.text(max_size=20), st.none() | st.dictionaries(st.text(), st.text() | st.integers(0, 9)))
def test_any_state_crosses_and_stays_on_one_line(state: str, payload: dict[str, Any] | None) -> None:
    message = State(state=state, payload=payload)
    kind, body = encode(message)
    assert decode(kind, body) == message
    assert b"\n" not in body
