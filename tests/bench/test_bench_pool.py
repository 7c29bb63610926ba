"""The herd part of the pool's benchmark, on a herd of two."""

from pool_herd import LOADS, herd_tables, measure_herd


def test_each_load_tells_what_its_time_depends_on() -> None:
    row = measure_herd(2, 30)

    assert [load["at_once"] for load in row["loads"]] == [at_once for at_once, _ in LOADS]
    for load in row["loads"]:
        assert load["reads"] > 0
        assert load["messages"] > 0
        assert load["cpu_us"] > 0


def test_the_report_has_a_line_for_each_herd_and_one_for_each_load() -> None:
    row = measure_herd(1, 10)
    lines = herd_tables([row])

    assert sum(line.startswith("| 1 |") for line in lines) == 1 + len(LOADS)
    assert any("user_us | system_us | turns | reads | messages" in line for line in lines)
