"""How many prompt tokens go into a step."""

import pytest

from llamaherd.pool.child.pace import PrefillPace


def test_before_any_measurement_the_first_guess_is_used() -> None:
    assert PrefillPace(2048, 512).tokens(shared=True) == 512


def test_the_first_guess_is_cut_to_the_batch() -> None:
    assert PrefillPace(64, 512).tokens(shared=False) == 64


def test_a_slow_machine_gets_small_steps_while_others_wait() -> None:
    pace = PrefillPace(2048, 512)
    pace.note(rows=512, seconds=1.024)
    assert pace.tokens(shared=True) == 165
    assert pace.tokens(shared=False) == 448, "500 in whole tiles"


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
    assert pace.tokens(shared=True) == 165


def test_where_tokens_come_fast_a_prompt_does_not_hold_them_up_for_long() -> None:
    pace = PrefillPace(4096, 512)
    pace.note(rows=1000, seconds=0.1)
    pace.note_plain(0.005)
    assert pace.tokens(shared=True) == 960
    assert pace.tokens(shared=False) == 4096


@pytest.mark.parametrize(
    ("wanted", "beside", "tokens"),
    [
        (142, 4, 124),  # two tiles with the rows that are there already
        (128, 0, 128),
        (124, 4, 124),
        (130, 0, 128),
        (165, 0, 165),  # 128 would be too few
        (100, 4, 100),
        (64, 2, 62),
        (40, 4, 40),
        (16, 60, 16),
    ],
)
def test_a_last_tile_that_would_be_nearly_empty_is_dropped(wanted: int, beside: int, tokens: int) -> None:
    pace = PrefillPace(2048, 512)
    pace.note(rows=100, seconds=0.33 * 100 / (wanted + 0.5))
    assert pace.tokens(shared=True, beside=beside) == tokens


def test_where_tokens_come_slowly_a_prompt_holds_them_up_no_longer_than_before() -> None:
    pace = PrefillPace(2048, 512)
    pace.note(rows=512, seconds=1.024)
    pace.note_plain(0.05)
    assert pace.tokens(shared=True) == 165


def test_a_step_of_a_given_length_has_what_the_machine_was_measured_to_do() -> None:
    pace = PrefillPace(512, 64)
    assert pace.within(0.05) == 64
    pace.note(rows=64, seconds=0.128)
    assert [pace.within(seconds) for seconds in (0.001, 0.05, 1.0, 9.0)] == [16, 25, 500, 512]


def test_many_that_come_together_are_not_held_up_by_the_one_that_came_first() -> None:
    pace = PrefillPace(2048, 512)
    pace.note(100, 0.1)
    pace.note_plain(0.005)
    assert pace.tokens(shared=True, beside=1, prompts=1) == 100
    assert pace.tokens(shared=True, beside=1, prompts=3) == 255
    assert pace.tokens(shared=True, beside=1, prompts=15) == 319
    assert pace.tokens(shared=True, beside=4, prompts=3) == 100


def test_a_first_step_waits_for_others_for_next_to_nothing_of_its_time() -> None:
    pace = PrefillPace(2048, 512)
    assert pace.pause(64) == 0.0
    pace.note(rows=100, seconds=0.1)
    assert [round(pace.pause(tokens) * 1e6) for tokens in (0, 10, 64, 1000)] == [0, 200, 1280, 2000]
