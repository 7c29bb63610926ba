"""Huge pages under what a model computes in: which memory, when, and that nothing else changes."""

import ctypes
import json
import mmap
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from llamaherd.pool.child import huge_pages
from llamaherd.pool.child.huge_pages import PIECE, HugePages, collapse, pieces
from tiny_gguf import tiny_model

#: Generates with a model in a process of its own until some of it lies in a huge page, if this kernel moves anything.
PROGRAM = """
import ctypes, json, mmap, sys
from pathlib import Path
from llamaherd.pool.child import huge_pages
from llamaherd.pool.child.llama_engine import LlamaEngine
from llamaherd.transport.messages import EngineOptions, Generate, Load, Sampling

def in_huge_pages():
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("AnonHugePages:"))

def moves():
    size = 2 * huge_pages.PIECE
    memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    first = ctypes.c_char.from_buffer(memory)
    start = -(-ctypes.addressof(first) // huge_pages.PIECE) * huge_pages.PIECE
    memory.write(bytes(size))
    moved = huge_pages.allowed() and huge_pages.collapse(start)
    del first
    memory.close()
    return moved

engine, able = LlamaEngine(), moves()
options = EngineOptions(n_ctx=131_072, n_threads=1, n_batch=64, n_ubatch=64, n_gpu_layers=0)
engine.load(Load(model="m", path=sys.argv[1], options=options), lambda _: True)
number = 0
while number < 3 or (able and not in_huge_pages() and number < 20_000):
    number += 1
    engine.submit(Generate(request=number, prompt=(1, 2, 3), max_tokens=8, sampling=Sampling(temperature=0)))
    while engine.busy:
        engine.step()
print(json.dumps({"able": able, "bytes": in_huge_pages()}))
"""

MAPS = b"""\
00400000-00c00000 rw-p 00000000 08:01 42                        /usr/lib/libllama.so
00e00000-01000000 rw-p 00000000 00:00 0                         [heap]
01300000-01900000 rw-p 00000000 00:00 0
02000000-02800000 r--p 00000000 00:00 0
03000000-03800000 rw-s 00000000 00:01 7                         /dev/shm/of someone
04000000-04200000 rw-p 00000000 00:00 0                         [anon:glibc: malloc]
05000000-05800000 rw-p 00000000 00:00 0                         [stack]
05800000-05a00000 r-xp 00000000 08:01 43                        /a/path\xff with\x0cany\xc2\x85bytes.so
06000000-061ff000 rw-p 00000000 00:00 0
"""


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Mover:
    """Takes its time for each piece, and refuses those it is told to."""

    def __init__(self, clock: Clock, seconds: float, refused: frozenset[int] = frozenset()) -> None:
        self.clock, self.seconds, self.refused = clock, seconds, refused
        self.moved: list[int] = []

    def __call__(self, address: int) -> bool:
        self.clock.now += self.seconds
        self.moved.append(address)
        return address not in self.refused


def tended(mover: Mover, count: int) -> HugePages:
    return HugePages(listed=lambda: iter(range(count)), move=mover, clock=mover.clock, allowed=True)


def test_private_memory_that_belongs_to_no_file_is_listed_and_the_heap_last(tmp_path: Path) -> None:
    maps = tmp_path / "maps"
    maps.write_bytes(MAPS)
    assert list(pieces(maps)) == [0x1400000, 0x1600000, 0x4000000, 0xE00000]


def test_where_nothing_is_told_of_the_memory_nothing_is_listed(tmp_path: Path) -> None:
    assert list(pieces(tmp_path / "nothing")) == []


@given(seconds=st.floats(1e-5, 0.049), step=st.floats(1e-2, 0.2), count=st.integers(1, 40))
def test_each_piece_is_moved_once_and_that_takes_a_fiftieth_of_the_time(
    seconds: float, step: float, count: int
) -> None:
    clock = Clock()
    mover = Mover(clock, seconds)
    pages = tended(mover, count)
    pages.tend()
    clock.now += 1
    began, last = clock.now, clock.now
    while len(mover.moved) < count:
        if mover.moved:
            last = clock.now
        clock.now += step
        pages.tend()
    # The last one is not to be paid for yet.
    assert seconds * (count - 1) <= 0.0201 * (last - began) + seconds
    clock.now += 1_000
    pages.tend()
    pages.tend()
    assert mover.moved == list(range(count))


def test_a_model_answers_for_a_second_before_anything_is_moved() -> None:
    clock = Clock()
    mover = Mover(clock, 0.001)
    pages = tended(mover, 3)
    clock.now += 1_000  # it was loaded ahead
    pages.tend()
    clock.now += 0.9
    pages.tend()
    assert not mover.moved
    clock.now += 0.1
    pages.tend()
    assert mover.moved == [0]


def test_a_kernel_that_refuses_again_and_again_is_not_asked_any_more() -> None:
    clock = Clock()
    mover = Mover(clock, 0.001, frozenset(range(10, 1_000)))
    pages = tended(mover, 1_000)
    for _ in range(1_001):
        clock.now += 1.01
        pages.tend()
    assert mover.moved == list(range(26))


def test_single_refusals_keep_nothing_from_being_moved() -> None:
    clock = Clock()
    mover = Mover(clock, 0.001, frozenset(range(0, 100, 2)))
    pages = tended(mover, 100)
    for _ in range(201):
        clock.now += 1.01
        pages.tend()
    assert mover.moved == list(range(100))


def test_a_machine_that_has_to_search_for_huge_pages_is_left_alone() -> None:
    clock = Clock()
    mover = Mover(clock, 0.06)
    pages = tended(mover, 100)
    for _ in range(101):
        clock.now += 100
        pages.tend()
    assert mover.moved == list(range(16))


def test_an_operator_who_wants_no_huge_pages_gets_none(tmp_path: Path) -> None:
    (tmp_path / "hpage_pmd_size").write_text(f"{PIECE}\n")
    for told, verdict in (
        ("always [madvise] never", True),
        ("[always] madvise never", True),
        ("always madvise [never]", False),
    ):
        (tmp_path / "enabled").write_text(told + "\n")
        assert huge_pages.allowed(tmp_path) is verdict
    own = tmp_path / "hugepages-2048kB"
    own.mkdir()
    (tmp_path / "enabled").write_text("[always] madvise never\n")
    for told, verdict in (("always [inherit] madvise never", True), ("always inherit madvise [never]", False)):
        (own / "enabled").write_text(told + "\n")
        assert huge_pages.allowed(tmp_path) is verdict
    (own / "enabled").unlink()
    (tmp_path / "hpage_pmd_size").write_text("536870912\n")
    (tmp_path / "enabled").write_text("[always] madvise never\n")
    assert not huge_pages.allowed(tmp_path)
    assert not huge_pages.allowed(tmp_path / "nothing")


def in_huge_pages(address: int) -> int:
    """Return how many bytes of the mapping that an address lies in are in huge pages."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= address < int(found[2], 16)
        elif inside and line.startswith("AnonHugePages:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"nothing is mapped at {address:x}")


def resident(address: int) -> int:
    """Return how many small pages of a piece are resident."""
    told = ctypes.create_string_buffer(PIECE // mmap.PAGESIZE)
    assert ctypes.CDLL(None).mincore(ctypes.c_void_p(address), ctypes.c_size_t(PIECE), told) == 0
    return sum(page & 1 for page in told.raw)


def pieces_of(memory: mmap.mmap) -> Iterator[int]:
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    yield from range(-(-start // PIECE) * PIECE, start + len(memory) - PIECE + 1, PIECE)


def test_what_is_resident_is_moved_and_keeps_its_content_and_what_is_not_stays_untouched() -> None:
    memory = mmap.mmap(-1, 4 * PIECE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    first, second, *_ = pieces_of(memory)
    content = bytes(range(256)) * (PIECE // 256)
    ctypes.memmove(first, content, PIECE)
    ctypes.memmove(second, content[: PIECE // 2], PIECE // 2)
    before = resident(first), resident(second)
    moved = [collapse(first), collapse(second)]
    assert ctypes.string_at(first, PIECE) == content
    assert (resident(first), resident(second)) == before
    # A kernel without it, or without such a page at hand, says so.
    assert in_huge_pages(first) >= (PIECE if moved[0] else 0)
    assert moved[1]


def test_a_model_that_computes_comes_to_lie_in_huge_pages() -> None:
    command = [sys.executable, "-P", "-c", PROGRAM, str(tiny_model("random"))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout)
    assert bool(told["bytes"]) == told["able"]
