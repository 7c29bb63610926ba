"""The benchmark of where models come from works, in small: every part runs, and the report shows it."""

import pytest

import bench_models

pytestmark = pytest.mark.timeout(120)


def test_a_catalogue_is_measured_and_stays_as_it_is() -> None:
    figures = bench_models.measure_catalogue(presets=8, files=6, rounds=2)["milliseconds"]

    assert set(figures) == {"start_wall", "reload_wall", "reload_cpu", "stamps_wall", "stamps_cpu"}
    assert all(row["n"] == 2 and 0 <= row["q1"] <= row["median"] <= row["q3"] for row in figures.values())


def test_a_download_is_measured_beside_the_other() -> None:
    part = bench_models.measure_download(megabytes=2, rounds=1)

    assert part["speed_over_plain"] > 0
    assert part["figures"]["manager_percent_of_a_core"]["median"] > 0
    assert part["figures"]["progress_messages_per_second"]["median"] > 0


def test_the_report_has_every_part_and_its_method() -> None:
    row = {"median": 1.25, "q1": 1.0, "q3": 2.0, "p99": 3.0, "n": 4}
    results = {
        "machine": "two cores",
        "catalogue": {"presets": 7, "files": 6, "milliseconds": {"reload_wall": row}},
        "download": {"megabytes": 5, "speed_over_plain": 1.5, "figures": {"seconds": row}},
    }

    page = bench_models.report(results)

    assert "## Catalogue: 7 presets, 6 files" in page and "| reload wall | 1.2 | 1.0 to 2.0 | 4 |" in page
    assert "Speed over plain huggingface_hub: **1.50**" in page
    assert "The catalogue is a preset file" in page
