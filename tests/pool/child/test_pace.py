"""How many prompt tokens go into a step."""

from llamaherd.pool.child.pace import PrefillPace


def test_before_any_measurement_the_first_guess_is_used() -> None:
    assert PrefillPace(2048, 512).tokens(shared=True) == 512


def test_the_first_guess_is_cut_to_the_batch() -> None:
    assert PrefillPace(64, 512).tokens(shared=False) == 64


def test_a_slow_machine_gets_small_steps_while_others_wait() -> None:
    pace = PrefillPace(2048, 512)
    pace.note(rows=512, seconds=1.024)
    assert pace.tokens(shared=True) == 100
    assert pace.tokens(shared=False) == 500


def test_a_fast_machine_fills_the_batch() -> None:
    pace = PrefillPace(2048, 512)
    pace.note(rows=512, seconds=0.001)
    assert pace.tokens(shared=True) == 2048


def test_a_step_is_never_so_small_that_prompts_stand_still() -> None:
    pace = PrefillPace(2048, 512)
    pace.note(rows=16, seconds=60.0)
    assert pace.tokens(shared=True) == 16


def test_steps_too_small_to_tell_teach_nothing() -> None:
    pace = PrefillPace(2048, 512)
    pace.note(rows=2, seconds=60.0)
    assert pace.tokens(shared=True) == 512


def test_new_measurements_count_half() -> None:
    pace = PrefillPace(2048, 512)
    pace.note(rows=100, seconds=0.1)
    pace.note(rows=100, seconds=0.3)
    assert pace.tokens(shared=True) == 100
