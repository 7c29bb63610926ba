"""What holds for all tests: property tests draw the same examples every time, and no busy machine fails them."""

from hypothesis import HealthCheck, settings

settings.register_profile(
    "llamaherd", derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("llamaherd")
