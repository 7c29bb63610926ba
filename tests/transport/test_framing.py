"""Both framings, without a descriptor: any chunking gives the same messages, and no bytes raise anything unexpected."""

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamaherd.transport import BrokenChannel, MessageTooLarge
from llamaherd.transport.framing import Framing, encode_checked, from_child, from_pool
from llamaherd.transport.lines import CHILD_PREFIX, POOL_PREFIX, LineFraming
from llamaherd.transport.messages import (
    CHILD_KINDS,
    MAX_MESSAGE_BYTES,
    POOL_KINDS,
    ChildMessage,
    Delta,
    Exit,
    PoolMessage,
    Result,
    State,
    Stats,
    Threads,
    Tokens,
    Unknown,
)
from llamaherd.transport.pipes import RecordFraming

deterministic = settings(derandomize=True, deadline=None)


def pool_lines(log: list[bytes] | None = None) -> LineFraming[ChildMessage]:
    on_log: Callable[[bytes], None] = (lambda data: None) if log is None else log.append
    return LineFraming(from_child, sends=POOL_PREFIX, receives=CHILD_PREFIX, on_log=on_log)


def child_lines() -> LineFraming[PoolMessage]:
    return LineFraming(from_pool, sends=CHILD_PREFIX, receives=POOL_PREFIX)


def pool_records() -> RecordFraming[ChildMessage]:
    return RecordFraming(from_child)


def feed(framing: Framing[ChildMessage], data: bytes, cuts: list[int]) -> list[ChildMessage]:
    received: list[ChildMessage] = []
    places = sorted(cut % (len(data) + 1) for cut in cuts)
    for start, stop in zip([0, *places], [*places, len(data)], strict=True):
        framing.feed(data[start:stop], received)
    return received


child_messages = st.one_of(
    st.builds(State, state=st.text(max_size=10), payload=st.none() | st.dictionaries(st.text(), st.text())),
    st.builds(Stats, rss_bytes=st.integers(0, 99)),
    st.builds(Result, request=st.integers(0, 9), text=st.text()),
    st.builds(Tokens, deltas=st.tuples(st.builds(Delta, st.integers(0, 9), st.text(), st.just((1, 2))))),
)
cuts = st.lists(st.integers(0, 100_000), max_size=20)
noise_lines = (
    st.binary(max_size=60).filter(lambda b: not b.startswith(CHILD_PREFIX)).map(lambda b: b.replace(b"\n", b""))
)


# --- records ----------------------------------------------------------------------------------------------------------


def test_a_record_is_these_bytes() -> None:
    framing = pool_records()
    assert framing.frame(*encode_checked(Threads(n=2))) == b'\x0f\0\0\0\x07threads{"n":2}'
    assert framing.frame(*encode_checked(Exit())) == b"\x05\0\0\0\x04exit"


@deterministic
@given(st.lists(child_messages, max_size=10), cuts)
def test_records_survive_any_chunking(messages: list[ChildMessage], cuts: list[int]) -> None:
    framing = pool_records()
    data = b"".join(framing.frame(*encode_checked(message)) for message in messages)
    assert feed(framing, data, cuts) == messages
    assert framing.finish() is None


@deterministic
@given(st.binary(), cuts)
def test_arbitrary_bytes_break_a_record_stream_or_are_unknown(data: bytes, cuts: list[int]) -> None:
    framing = pool_records()
    try:
        received = feed(framing, data, cuts)
    except BrokenChannel:
        return
    assert all(isinstance(message, Unknown) for message in received)
    framing.finish()


@pytest.mark.parametrize("kept", [1, 3, 4, 5, 15])
def test_a_stream_that_ends_inside_a_record_is_broken(kept: int) -> None:
    framing = pool_records()
    data = framing.frame(*encode_checked(Threads(n=2)))
    assert feed(framing, data[:kept], []) == []
    torn = framing.finish()
    assert torn is not None and f"{kept} of" in str(torn)


def test_a_record_over_the_cap_is_refused_by_its_length_alone() -> None:
    with pytest.raises(BrokenChannel, match="length 70000000"):
        feed(pool_records(), (70_000_000).to_bytes(4, "little"), [])


@pytest.mark.parametrize("data", [b"\0\0\0\0", b"\x02\0\0\0\x05ab", b"cmd_child_to_router:state:{}\n"])
def test_what_cannot_be_a_record_is_broken(data: bytes) -> None:
    with pytest.raises(BrokenChannel, match="not a record"):
        feed(pool_records(), data, [])


def test_messages_before_the_broken_record_are_kept() -> None:
    framing = pool_records()
    received: list[ChildMessage] = []
    with pytest.raises(BrokenChannel):
        framing.feed(framing.frame(*encode_checked(Stats(rss_bytes=1))) + b"\0\0\0\0", received)
    assert received == [Stats(rss_bytes=1)]


@pytest.mark.parametrize("cut", [3, 4, 5, 100, 65_536, 199_999])
def test_a_large_record_arrives_whole_and_says_what_it_is_missing(cut: int) -> None:
    framing = pool_records()
    message = Result(request=1, text="x" * 200_000)
    data = framing.frame(*encode_checked(message))
    received: list[ChildMessage] = []
    assert framing.missing == 0
    framing.feed(data[:cut], received)
    assert framing.missing == (1 if cut < 4 else len(data) - cut)
    framing.feed(data[cut:] + data[:cut], received)
    framing.feed(data[cut:], received)
    assert received == [message, message]
    assert framing.missing == 0


@pytest.mark.parametrize("size", [10, 100_000])
def test_a_body_that_is_not_what_its_kind_says_is_unknown_by_its_first_bytes(size: int) -> None:
    framing, body = pool_records(), b"x" * size
    (unknown,) = feed(framing, framing.frame("result", body), [])
    assert isinstance(unknown, Unknown)
    assert (unknown.kind, unknown.body) == ("result", body[:200])
    (line,) = feed(pool_lines(), child_lines().frame("result", body), [size // 2])
    assert line == unknown


# --- lines ------------------------------------------------------------------------------------------------------------


def test_a_worker_s_line_is_llama_cpp_s_byte_for_byte() -> None:
    state = State(state="loading", payload={"stages": ["text_model"], "current": "text_model", "value": 0.0})
    assert child_lines().frame(*encode_checked(state)) == (
        b'\ncmd_child_to_router:state:{"state":"loading",'
        b'"payload":{"stages":["text_model"],"current":"text_model","value":0.0}}\n'
    )


def test_a_pool_s_line_is_llama_cpp_s_byte_for_byte() -> None:
    framing = pool_lines()
    assert framing.frame(*encode_checked(Exit())) == b"cmd_router_to_child:exit\n"
    assert framing.frame(*encode_checked(Threads(n=2))) == b'cmd_router_to_child:threads:{"n":2}\n'


def test_a_worker_reads_commands_and_ignores_other_input() -> None:
    received: list[PoolMessage] = []
    child_lines().feed(b'hello\n\ncmd_router_to_child:threads:{"n":2}\ncmd_router_to_child:exit\n', received)
    assert received == [Threads(n=2), Exit()]


@deterministic
@given(st.lists(child_messages | noise_lines, max_size=10), cuts)
def test_lines_survive_any_chunking_and_any_noise_between_them(
    items: list[ChildMessage | bytes], cuts: list[int]
) -> None:
    log: list[bytes] = []
    framing, sender = pool_lines(log), child_lines()
    data = b"".join(item + b"\n" if isinstance(item, bytes) else sender.frame(*encode_checked(item)) for item in items)
    assert feed(framing, data, cuts) == [item for item in items if not isinstance(item, bytes)]
    assert b"".join(log) == b"".join(item + b"\n" for item in items if isinstance(item, bytes) and item)
    assert framing.finish() is None


@deterministic
@given(
    st.binary() | st.lists(st.sampled_from([CHILD_PREFIX, b"state:", b"{", b"\n", b"\0", b"\xff"])).map(b"".join), cuts
)
def test_no_bytes_break_a_line_stream(data: bytes, cuts: list[int]) -> None:
    framing = pool_lines()
    whole: list[ChildMessage] = []
    pool_lines().feed(data, whole)
    received = feed(framing, data, cuts)
    assert received == whole
    assert all(isinstance(message, Unknown) for message in received)
    framing.finish()


def test_an_open_line_of_progress_dots_loses_no_state() -> None:
    log: list[bytes] = []
    framing = pool_lines(log)
    data = b"loading ....." + child_lines().frame(*encode_checked(State(state="ready", payload={})))
    assert feed(framing, data, [5, 9, 14, 20]) == [State(state="ready", payload={})]
    assert b"".join(log) == b"loading .....\n"


def test_log_bytes_are_passed_on_before_their_line_ends() -> None:
    log: list[bytes] = []
    feed(pool_lines(log), b"50%", [])
    assert log == [b"50%"]


def test_the_prefix_inside_a_line_is_log() -> None:
    log: list[bytes] = []
    line = b'the model wrote: cmd_child_to_router:state:{"state":"ready","payload":{}}\n'
    assert feed(pool_lines(log), line, [3, 30]) == []
    assert b"".join(log) == line


def test_a_noisy_llama_server_stream_gives_its_states_and_its_log() -> None:
    log: list[bytes] = []
    stream = (
        b"main: loading model\n"
        b"\ncmd_child_to_router:state:"
        b'{"payload":{"current":"text_model","stages":["text_model"],"value":0.0},"state":"loading"}\n'
        b"................................"
        b"\ncmd_child_to_router:state:"
        b'{"payload":{"current":"text_model","stages":["text_model"],"value":1.0},"state":"loading"}\n'
        b"srv  init: \x1b[32mgr\xfc\xdfe\x1b[0m \0\n"
        b'\ncmd_child_to_router:state:{"payload":{"id":"m","aliases":[],"object":"model"},"state":"ready"}\n'
        b"\ncmd_child_to_router:telemetry:[1,2]\n"
        b'\ncmd_child_to_router:state:{"payload":{},"state":"hibernating"}\n'
    )
    received = feed(pool_lines(log), stream, list(range(0, len(stream), 7)))
    assert [m.state if isinstance(m, State) else m.kind for m in received if isinstance(m, State | Unknown)] == [
        "loading",
        "loading",
        "ready",
        "telemetry",
        "hibernating",
    ]
    assert b"".join(log) == (
        b"main: loading model\n................................\nsrv  init: \x1b[32mgr\xfc\xdfe\x1b[0m \0\n"
    )


def test_a_line_over_the_cap_is_reported_once_and_the_stream_goes_on() -> None:
    framing = pool_lines()
    received: list[ChildMessage] = []
    chunk = b"x" * (1024 * 1024)
    framing.feed(CHILD_PREFIX + b"result:", received)
    for _ in range(MAX_MESSAGE_BYTES // len(chunk) + 3):
        framing.feed(chunk, received)
    framing.feed(b"\ncmd_child_to_router:stats\n", received)
    (too_long, after) = received
    assert isinstance(too_long, Unknown)
    assert (too_long.kind, too_long.body) == ("result", b"x" * 200)
    assert "over the cap" in too_long.reason
    assert after == Stats()


def test_a_log_line_of_any_length_takes_no_memory() -> None:
    lengths: list[int] = []
    framing = LineFraming(
        from_child, sends=POOL_PREFIX, receives=CHILD_PREFIX, on_log=lambda data: lengths.append(len(data))
    )
    for _ in range(50):
        framing.feed(b"." * 65536, [])
    assert lengths == [65536] * 50


def test_a_stream_that_ends_inside_a_protocol_line_is_broken() -> None:
    framing = pool_lines()
    assert feed(framing, b'cmd_child_to_router:state:{"sta', []) == []
    assert "inside a line" in str(framing.finish())


def test_a_stream_that_ends_inside_a_log_line_is_not_broken() -> None:
    log: list[bytes] = []
    framing = pool_lines(log)
    feed(framing, b"cmd", [])
    assert framing.finish() is None
    assert log == [b"cmd"]


# --- both -------------------------------------------------------------------------------------------------------------


def test_every_kind_is_known_to_the_side_that_receives_it() -> None:
    for kinds, decode in ((CHILD_KINDS, from_child), (POOL_KINDS, from_pool)):
        for kind in kinds:
            message = decode(kind.encode(), b"[]")
            assert isinstance(message, Unknown) and message.reason != "unknown kind"


def test_a_kind_of_the_other_direction_is_unknown() -> None:
    assert from_child(b"exit", b"") == Unknown("exit", "unknown kind")
    assert from_pool(b"state", b"{}") == Unknown("state", "unknown kind", b"{}")


def test_a_message_over_the_cap_is_refused_with_its_size() -> None:
    with pytest.raises(MessageTooLarge, match="a result of 67108"):
        encode_checked(Result(request=1, text="x" * MAX_MESSAGE_BYTES))
