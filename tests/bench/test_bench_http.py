"""The benchmark of the front end works, in small: every part runs, nothing is lost, and the report shows it."""

import pytest

import bench_http

pytestmark = pytest.mark.timeout(120)


def test_a_request_is_measured_both_ways() -> None:
    figures = bench_http.measure_front(rounds=1, requests=5)["one client"]
    assert all(low <= median <= high for median, low, high in figures.values())
    assert figures["pool p50 ms"][0] > 0
    assert figures["front end p50 ms"][0] > 0


def test_a_crowd_loses_nothing() -> None:
    (figures,) = bench_http.measure_crowd(rounds=1, listeners=5, streams=8, tokens=5).values()
    assert figures["tokens lost"] == [0, 0, 0]


def test_the_limit_is_found_on_every_transport() -> None:
    assert set(bench_http.measure_limit(rounds=1, tokens=20)) == set(bench_http.TRANSPORTS)


def test_the_report_has_every_part_and_its_method() -> None:
    results = {"machine": {"cores": "2"}, "front": {"one client": {"added p50 ms": [0.5, 0.4, 0.61234]}}}
    page = bench_http.report(results)
    assert "Method" not in page.splitlines()[0]
    assert "## front: one client" in page
    assert "| added p50 ms | 0.5 | 0.4 | 0.612 |" in page


def test_figures_leave_the_first_round_out() -> None:
    assert bench_http.middle([{"x": 9.0}, {"x": 1.0}, {"x": 2.0}, {"x": 3.0}]) == {"x": [2.0, 1.0, 3.0]}
