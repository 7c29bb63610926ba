"""The batcher's books against llama.cpp's own: whatever is asked, cancelled, interrupted, saved or erased, they agree,
everyone is served, and an idle cache can be emptied.
"""

import tempfile
from typing import Any, Literal

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine_driver import Collected, collect, load_command
from llamaherd.pool.child import llama_backend
from llamaherd.pool.child.loaded import Loaded, make_chats
from llamaherd.pool.child.model import Model
from llamaherd.pool.child.resources import Resources
from llamaherd.transport.messages import Adapter, ChildMessage, Failed, Result, Sequence
from prompts import request, tokens
from tiny_gguf import tiny_model

#: Most tokens of a sequence, and slots.
N_CTX, N_SLOTS = 256, 3
#: Commands about slots have numbers from here on.
COMMANDS = 10_000
#: Far more steps than the longest mix of requests needs.
PATIENCE = 5000


class BatcherMachine(RuleBasedStateMachine):
    """Requests come, go and are cancelled in a cache that is too small for them."""

    model_name = "random"
    unified = True

    def __init__(self) -> None:
        super().__init__()
        self.wanted: dict[int, tuple[int, int]] = {}
        self.cancelled: set[int] = set()
        self.got: dict[int, Collected] = {}
        self.commands: set[int] = set()
        self.folder = tempfile.TemporaryDirectory(prefix="slots-")

    @initialize(cache_ram=st.sampled_from([0, 1]), n_cached=st.integers(0, 3), shifts=st.booleans())
    def load(self, cache_ram: int, n_cached: int, shifts: bool) -> None:
        llama_backend.init_backend()
        command = load_command(
            self.model_name,
            n_ctx=N_CTX if self.unified else N_CTX * N_SLOTS,
            n_parallel=N_SLOTS,
            n_cached=n_cached if self.unified else 0,
            kv_unified=self.unified,
            cache_ram=cache_ram,
            context_shift=shifts,
            n_batch=64,
            n_ubatch=64,
            slot_save_path=self.folder.name,
            adapters=(Adapter(path=str(tiny_model("lora")), scale=0.0),) if self.model_name == "random" else (),
        )
        self.shifts = shifts
        model = Model(command.path, command.options, lambda _fraction: True)
        resources = Resources(command, model, (1, 1), llama_backend.AbortFlag())
        self.engine = Loaded(command, resources, make_chats(command, model))

    @rule(
        length=st.integers(1, 200),
        seed=st.integers(1, 3),
        max_tokens=st.integers(0, 120),
        cache_prompt=st.booleans(),
        slot=st.integers(-1, N_SLOTS - 1),
        adapted=st.booleans(),
    )
    def submit(self, length: int, seed: int, max_tokens: int, cache_prompt: bool, slot: int, adapted: bool) -> None:
        number = len(self.wanted)
        self.wanted[number] = length, max_tokens
        prompt = tokens(length, seed)
        fields: dict[str, Any] = {"lora": ((0, 1.0),)} if adapted and self.model_name == "random" else {}
        fields |= {"cache_prompt": cache_prompt, "slot": slot, "n_keep": length // 2}
        self.engine.submit(request(number, prompt, max_tokens=max_tokens, **fields))

    @rule(
        action=st.sampled_from(["save", "restore", "erase"]),
        slot=st.integers(0, N_SLOTS - 1),
        name=st.sampled_from(["one", "two"]),
    )
    def command(self, action: Literal["save", "restore", "erase"], slot: int, name: str) -> None:
        number = COMMANDS + len(self.commands)
        self.commands.add(number)
        self.engine.desk.submit(Sequence(request=number, action=action, slot=slot, name=name))

    @precondition(lambda self: self.engine.busy)
    @rule(count=st.integers(1, 40))
    def step(self, count: int) -> None:
        for _ in range(count):
            if self.engine.busy:
                self.take(self.engine.step())
                self.check_books()

    def take(self, messages: list[ChildMessage]) -> None:
        """Sort what a step said. A command may find its slot or its file missing, and nothing worse."""
        answers = [one for one in messages if isinstance(one, Result | Failed) and (one.request or 0) >= COMMANDS]
        for answer in answers:
            assert answer.request in self.commands
            if isinstance(answer, Failed):
                codes = {"slot_empty", "slot_file_not_found"}
                assert answer.code in codes or answer.retry, answer
        collect([one for one in messages if one not in answers], self.got)

    @precondition(lambda self: bool(self.wanted))
    @rule(data=st.data())
    def cancel(self, data: Any) -> None:
        number = data.draw(st.sampled_from(sorted(self.wanted)))
        self.cancelled.add(number)
        self.engine.cancel(number)

    @invariant()
    def check_books(self) -> None:
        if not hasattr(self, "engine"):
            return
        batcher, context = self.engine.batcher, self.engine.context
        cells = batcher.cache.cells
        held: set[int] = set()
        for slot in batcher.slots:
            sequence = slot.sequence
            if sequence is None:
                continue
            assert sequence.lane == slot.id
            assert sequence.slot not in held, "an id is nobody's or one sequence's"
            held.add(sequence.slot)
            length = cells.held_by([sequence.slot])
            assert length == context.length(sequence.slot) == sequence.computed <= len(sequence.tokens)
        for kept in batcher.cache.kept:
            assert kept.slot not in held
            held.add(kept.slot)
            assert cells.held_by([kept.slot]) == context.length(kept.slot) == kept.computed
        assert all(context.length(other) == 0 for other in range(context.n_sequences) if other not in held)
        assert cells.used == cells.held_by(held) <= context.n_ctx

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        try:
            self.finish()
        finally:
            self.engine.free()
            self.folder.cleanup()

    def finish(self) -> None:
        """Serve everyone, and empty the cache."""
        for _ in range(PATIENCE):
            if not self.engine.busy:
                break
            self.take(self.engine.step())
        assert not self.engine.busy, "somebody starves"
        assert set(self.got) == set(self.wanted)
        for number, (length, max_tokens) in self.wanted.items():
            one = self.got[number]
            assert one.failed is None
            if one.reason != "cancelled":
                most = max_tokens if self.shifts else min(max_tokens, N_CTX - length)
                assert (one.reason, len(one.tokens)) == ("length", most)
            else:
                assert number in self.cancelled
        self.check_books()
        batcher = self.engine.batcher
        assert not any(slot.sequence for slot in batcher.slots)
        while batcher.cache.evict():
            pass
        self.check_books()
        assert batcher.cache.cells.used == 0
        assert batcher.cache.room == self.engine.context.n_ctx


class WindowMachine(BatcherMachine):
    """The same with a sliding window."""

    model_name = "gemma2"


class DividedMachine(BatcherMachine):
    """The same where each sequence has a part of the cache for itself."""

    unified = False


class DividedWindowMachine(WindowMachine):
    """Both."""

    unified = False


TestBatcher = BatcherMachine.TestCase
TestBatcher.settings = settings(max_examples=30, stateful_step_count=25, deadline=None)
TestWindow = WindowMachine.TestCase
TestWindow.settings = settings(max_examples=12, stateful_step_count=25, deadline=None)
TestDivided = DividedMachine.TestCase
TestDivided.settings = settings(max_examples=12, stateful_step_count=25, deadline=None)
TestDividedWindow = DividedWindowMachine.TestCase
TestDividedWindow.settings = settings(max_examples=12, stateful_step_count=25, deadline=None)
