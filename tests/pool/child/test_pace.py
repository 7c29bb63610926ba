"""How many prompt tokens go into a step."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamaherd.pool.child.pace import PrefillPace
from llamaherd.pool.child.tiles import attended

LONG = [(0, 1_000_000)]


def test_before_any_measurement_the_first_guess_is_used() -> None:
    assert PrefillPace(2048, 512).tokens(LONG, shared=True) == 512


def test_the_first_guess_is_cut_to_the_batch() -> None:
    assert PrefillPace(64, 512).tokens(LONG, shared=False) == 64


def test_a_slow_machine_gets_small_steps_while_others_wait() -> None:
    pace = PrefillPace(2048, 512)
    pace.note(tokens=512, seconds=1.0)
    assert pace.tokens(LONG, shared=True) == 186
    assert pace.tokens(LONG, shared=False) == 512


def test_a_fast_machine_fills_the_batch() -> None:
    pace = PrefillPace(2048, 512)
    pace.note(tokens=512, seconds=0.001)
    assert pace.tokens(LONG, shared=True) == 2048


def test_a_step_is_never_so_small_that_prompts_stand_still() -> None:
    pace = PrefillPace(2048, 512)
    pace.note(tokens=16, seconds=60.0)
    assert pace.tokens(LONG, shared=True) == 16


def test_steps_too_small_to_tell_teach_nothing() -> None:
    pace = PrefillPace(2048, 512)
    pace.note(tokens=2, seconds=60.0)
    assert pace.tokens(LONG, shared=True) == 512


def test_new_measurements_count_half() -> None:
    pace = PrefillPace(2048, 512)
    pace.note(tokens=100, seconds=0.1)
    pace.note(tokens=100, seconds=0.29)
    assert pace.tokens(LONG, shared=True) == 187


def test_where_tokens_come_fast_a_prompt_does_not_hold_them_up_for_long() -> None:
    pace = PrefillPace(4096, 512)
    pace.note(tokens=1000, seconds=0.1)
    pace.note_plain(4, 0.005)
    assert pace.tokens(LONG, shared=True) == 1400
    assert pace.tokens(LONG, shared=False) == 4096


def test_where_tokens_come_slowly_a_prompt_holds_them_up_no_longer_than_before() -> None:
    pace = PrefillPace(2048, 512)
    pace.note(tokens=512, seconds=1.0)
    pace.note_plain(4, 0.05)
    assert pace.tokens(LONG, shared=True) == 186


def test_all_that_waits_is_computed_at_once_if_there_is_time() -> None:
    pace = PrefillPace(2048, 512)
    pace.note(tokens=512, seconds=1.0)
    assert pace.tokens([(0, 100), (500, 82)], shared=True, beside=4) == 182
    assert pace.tokens([(0, 100), (500, 90)], shared=True, beside=4) == 186


def test_a_step_of_a_given_length_has_what_the_machine_was_measured_to_do() -> None:
    pace = PrefillPace(512, 64)
    assert pace.within(0.05) == 64
    pace.note(tokens=64, seconds=0.128)
    assert [pace.within(seconds) for seconds in (0.001, 0.05, 1.0, 9.0)] == [16, 25, 500, 512]


def test_many_that_come_together_are_not_held_up_by_the_one_that_came_first() -> None:
    pace = PrefillPace(2048, 512)
    pace.note(100, 0.1)
    pace.note_plain(4, 0.005)
    assert pace.tokens([(0, 999)] * 1, shared=True, beside=1) == 138
    assert pace.tokens([(0, 999)] * 2, shared=True, beside=1) == 278
    assert pace.tokens([(0, 999)] * 15, shared=True, beside=1) == 363
    assert pace.tokens([(0, 999)] * 3, shared=True, beside=4) == 135


def test_a_first_step_waits_for_others_for_next_to_nothing_of_its_time() -> None:
    pace = PrefillPace(2048, 512)
    assert pace.pause(64) == 0.0
    pace.note(tokens=100, seconds=0.1)
    assert [round(pace.pause(tokens) * 1e6) for tokens in (0, 10, 64, 1000)] == [0, 200, 1280, 2000]


# --- machines ---


class Machine:
    """Computes prompts, each beside some streams.

    Args:
        token: What each takes, in seconds.
        look: What it takes more for each token that it looks at.
        step: What a step takes beside its prompt tokens.
        heads: Those of an attention in tiles; 0 for another one.
        noise: How much of a step's time comes and goes by chance.

    Attributes:
        steps: Tokens and seconds of each step of the last prompt.
    """

    def __init__(
        self, *, token: float, look: float = 0.0, step: float = 0.0, heads: int = 0, noise: float = 0.0
    ) -> None:
        self.token, self.look, self.step, self.heads, self.noise = token, look, step, heads, noise
        self.random = random.Random(1)
        self.pace = PrefillPace(2048, 512, self.attended, look / token / 2)
        self.steps: list[tuple[int, float]] = []

    def attended(self, rows: int) -> float:
        whole, rest = divmod(rows, 512)
        return whole * attended(512, self.heads, 2) + attended(rest, self.heads, 2) if self.heads else float(rows)

    def compute(self, tokens: int, beside: int, done: int = 0) -> None:
        self.steps = []
        if beside:
            self.pace.note_plain(beside, self.step)
        end = done + tokens
        while done < end:
            prompts = [(done, end - done)]
            taken = min(self.pace.tokens(prompts, shared=beside > 0, beside=beside), end - done)
            rows, seen = taken + beside, taken * (done + taken / 2)
            seconds = self.step + taken * self.token + seen * self.look * self.attended(rows) / rows
            seconds *= 1 + self.random.uniform(-self.noise, self.noise)
            self.pace.note(taken, seconds, beside=beside, seen=seen)
            self.steps.append((taken, seconds))
            done += taken

    @property
    def longest(self) -> float:
        return max(seconds for _, seconds in self.steps)


@pytest.mark.parametrize("step", [0.0, 0.05])
@pytest.mark.parametrize(("token", "look"), [(1e-3, 1e-6), (3e-3, 1e-6), (1e-3, 0.0), (2e-4, 2e-6), (1e-3, 4e-6)])
def test_steps_take_the_time_that_they_may_however_far_a_prompt_has_come(
    token: float, look: float, step: float
) -> None:
    machine = Machine(token=token, look=look, step=step)
    machine.compute(3000, beside=0)
    machine.compute(3000, beside=4)
    for _ in range(3):
        machine.compute(3000, beside=4)
        assert machine.longest < 0.38
        assert all(seconds > 0.345 for _, seconds in machine.steps[1:-1])


def test_a_machine_that_is_busy_by_turns_makes_no_step_much_too_long() -> None:
    machine = Machine(token=1e-3, look=1e-6, step=0.02, noise=0.2)
    machine.compute(2000, beside=0)
    for _ in range(20):
        machine.compute(2000, beside=4)
        assert machine.longest < 0.365 * 1.5


@pytest.mark.parametrize("heads", [0, 9])
def test_a_step_in_which_the_machine_was_suspended_is_soon_forgotten(heads: int) -> None:
    machine = Machine(token=1e-3, look=1e-6, step=0.02, heads=heads)
    for _ in range(3):
        machine.compute(2000, beside=4)
    steps = len(machine.steps)
    machine.pace.note(200, 100.0, beside=4, seen=200 * 1000)
    machine.compute(2000, beside=4)
    assert len(machine.steps) <= steps + 10
    machine.compute(2000, beside=4)
    assert len(machine.steps) <= steps + 1
    assert machine.longest < 0.5


def test_a_long_conversation_that_goes_on_is_no_surprise_after_short_prompts() -> None:
    machine = Machine(token=1e-3, look=1e-6, heads=9)
    for tokens in (100, 300, 200, 150, 250):
        machine.compute(tokens, beside=0)
    machine.compute(1000, beside=2, done=6000)
    assert machine.longest < 2 * 0.365


def test_rows_are_enough_for_a_tile_where_fewer_would_take_as_long() -> None:
    machine = Machine(token=1e-4, look=1e-6, heads=32)
    for _ in range(2):
        machine.compute(1000, beside=2, done=20_000)
    assert {tokens for tokens, _ in machine.steps[:-1]} == {62}


@pytest.mark.parametrize(("look", "rows"), [(1e-6, 128), (1e-9, 203)])
def test_rows_fill_tiles_of_attention_where_that_costs_more_than_further_steps(look: float, rows: int) -> None:
    machine = Machine(token=1.73e-3, look=look, step=0.02, heads=32)
    for _ in range(3):
        machine.compute(1000, beside=4)
    assert machine.steps[2][0] + 4 == rows


@given(
    most=st.integers(1, 4096),
    first=st.integers(1, 4096),
    notes=st.lists(
        st.tuples(st.integers(1, 4096), st.floats(1e-6, 100), st.integers(0, 256), st.integers(0, 100_000)), max_size=8
    ),
    plain=st.floats(0, 10),
    beside=st.integers(0, 256),
    prompts=st.lists(st.tuples(st.integers(0, 100_000), st.integers(1, 100_000)), min_size=1, max_size=5),
    heads=st.sampled_from([0, 1, 9, 32]),
    attention=st.floats(0, 10),
)
def test_whatever_was_measured_a_step_has_some_tokens_and_no_more_than_the_batch(
    most: int,
    first: int,
    notes: list[tuple[int, float, int, int]],
    plain: float,
    beside: int,
    prompts: list[tuple[int, int]],
    heads: int,
    attention: float,
) -> None:
    pace = PrefillPace(most, first, lambda rows: attended(rows, heads, 2) if heads else float(rows), attention)
    pace.note_plain(4, plain)
    for tokens, seconds, rows, looked in notes:
        pace.note(tokens, seconds, beside=rows, seen=float(tokens * looked))
    for shared in (False, True):
        assert 1 <= pace.tokens(prompts, shared=shared, beside=beside) <= most
