"""What holds for all tests: property tests draw the same examples every time, and no busy machine fails them."""

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile(
    "llamaherd", derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("llamaherd")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of the soak test."""
    parser.addoption("--soak-minutes", default=30.0, type=float, help="how long `-m soak` goes on")
    parser.addoption("--soak-seed", default=1, type=int, help="the seed of its choices")
    parser.addoption("--soak-transport", default="pipe", choices=("pipe", "zmq", "stdio"), help="its transport")
