"""The engine's benchmark: its parts that need no second server, run at their shortest, and its report."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench_engine import PARTS, ratios, report
from samples import summary
from tiny_gguf import tiny_model

INSIDE = Path(__file__).parents[2] / "bench" / "engine_inside.py"


def run_inside(*arguments: str) -> dict[str, float]:
    done = subprocess.run([sys.executable, str(INSIDE), *arguments], capture_output=True, text=True, check=True)
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def test_a_step_is_decode_and_samplers_and_python() -> None:
    figures = run_inside("overhead", str(tiny_model("random")), "4", "20")
    parts = sum(figures[f"{part}_us"] for part in ("decode", "sampler", "pages", "python"))
    assert abs(parts - figures["step_us"]) < 1
    assert all(value > 0 for name, value in figures.items() if name != "pages_us")


def test_loads_and_requests_leave_no_thread_and_no_descriptor_behind() -> None:
    figures = run_inside("leaks", str(tiny_model("random")), "5", "200")
    assert {name: value for name, value in figures.items() if not name.endswith("bytes")} == {
        "loads_threads": 0,
        "loads_descriptors": 0,
        "requests_threads": 0,
        "requests_descriptors": 0,
    }


def test_quartiles_lie_within_what_was_measured() -> None:
    assert summary([1.0, 10.0], 1.0) == {"median": 5.5, "q1": 1.0, "q3": 10.0, "p99": 10.0, "n": 2}


def test_a_target_is_a_ratio_of_medians_and_stands_above_the_figures() -> None:
    rates = {
        "llamaherd": [30.0, 20.0, 10.0],
        "llamaherd -no-kvu": [40.0],
        "llama-server": [5.0, 10.0, 12.0],
        "llama-server -kvu": [5.0],
    }
    streams = {f"Q4_0, 8 streams, {side}": summary(values, 1.0) for side, values in rates.items()}
    results: dict[str, dict[str, Any]] = {"streams": streams, "sittings": {"streams Q4_0": "one afternoon, 3 rounds"}}
    assert ratios(results) == [
        ("tokens per second, Q4_0, 8 streams, divided", 4.0, ">= 1.0"),
        ("tokens per second, Q4_0, 8 streams, unified", 4.0, ">= 1.0"),
        ("tokens per second, Q4_0, 8 streams, defaults", 2.0, ">= 1.0"),
    ]
    text = report({"machine": "here", **results})
    assert "* streams Q4_0: one afternoon, 3 rounds\n" in text
    assert text.index("every request generates") < text.index("Machine: here") < text.index("| 2.00 | >= 1.0 |")


def test_every_part_is_explained() -> None:
    text = report({"machine": "here"})
    assert all(f"* {part}" in text for part in PARTS)
