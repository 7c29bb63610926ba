"""Memory that is made ready for the cache: it becomes the cache, or goes back."""

import json
import mmap
import subprocess
import sys
from typing import Any

import pytest

from llamaherd.pool.child import heap
from llamaherd.pool.child.heap import Reserve, trim
from llamaherd.pool.gguf import kv_bytes, read_facts
from llamaherd.pool.machine import resident_bytes
from tiny_gguf import tiny_model

CELLS = 131_072
#: Loads a model in a fresh process, whose heap is as a worker's is, and prints what that took.
PROGRAM = """
import json, resource, sys, threading
from llamaherd.pool.child import heap
from llamaherd.pool.child.llama_engine import LlamaEngine
from llamaherd.pool.machine import resident_bytes
from llamaherd.transport.messages import EngineOptions, Load

path, cells, cache = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
heap.use_one_arena()
told = {}
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt

class Reserve(heap.Reserve):
    def lent(self):
        if self._thread is not None:
            self._thread.wait()  # a tiny model is read before the reserve is ready
        told["ready"] = self.ready
        told["faults"] = faults()
        return super().lent()

import llamaherd.pool.child.llama_engine as module
module.Reserve = Reserve

def run():
    engine = LlamaEngine()
    import llamaherd.pool.child.loaded
    options = EngineOptions(n_ctx=cells, n_threads=1, n_batch=64, n_ubatch=64)
    for turn in ("first", "second"):
        before = resident_bytes()
        engine.load(Load(model="m", path=path, options=options, cache_bytes=cache), lambda _: True)
        told[turn + " taken"] = faults() - told["faults"]
        told[turn + " ready"] = told["ready"]
        told[turn] = resident_bytes() - before
        engine.unload()
        told[turn + " kept"] = resident_bytes() - before
thread = threading.Thread(target=run)
thread.start()
thread.join()
print(json.dumps(told))
"""


def load_twice(cache: int) -> dict[str, Any]:
    command = [sys.executable, "-P", "-c", PROGRAM, str(tiny_model("random")), str(CELLS), str(cache)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def test_what_is_made_ready_becomes_the_cache_and_goes_with_it() -> None:
    cache = kv_bytes(read_facts(tiny_model("random")), CELLS)
    plain, readied = load_twice(0), load_twice(cache)
    assert plain["ready"] == 0
    assert readied["second ready"] == readied["first ready"]
    # Nothing is held twice, nor for longer than the model, nor more at a second load.
    for turn in ("first", "second"):
        # Where the kernel and the allocator allow it at all, the pages are there before the cache is filled.
        saved = (plain[turn + " taken"] - readied[turn + " taken"]) * mmap.PAGESIZE
        assert saved > readied[turn + " ready"] // 2 or readied[turn + " ready"] == 0
        assert abs(readied[turn] - plain[turn]) < cache // 4
        assert readied[turn + " kept"] < cache // 2


def test_what_nobody_was_lent_goes_back() -> None:
    size = 16 * 1024 * 1024
    before = resident_bytes()
    reserve = Reserve(size)
    reserve.drop()
    reserve.drop()
    with reserve.lent():
        trim()
        assert resident_bytes() - before < size // 4


@pytest.mark.parametrize("size", [0, 1, 2**50])
def test_too_little_and_too_much_is_not_reserved(size: int) -> None:
    reserve = Reserve(size)
    reserve.drop()
    assert reserve.ready == 0


def test_gaps_are_not_kept_shut_for_a_piece_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    size, ends, held = 16 * 1024 * 1024, iter((False, True)), set[int]()

    def malloc(wanted: int) -> int:
        address = 0 if wanted > size else 0x1000 + len(held)
        held.update({address} - {0})
        return address

    def ends_heap(_address: int) -> bool:
        return next(ends)

    monkeypatch.setattr(heap, "_malloc", malloc)
    monkeypatch.setattr(heap, "_free", held.remove)
    monkeypatch.setattr(heap, "_ends_heap", ends_heap)
    with Reserve(size).lent():
        assert not held
    assert next(ends, None) is None, "it was tried"
