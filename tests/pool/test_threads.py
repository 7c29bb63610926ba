"""The cores are divided among the busy models, and only those whose share changes are told."""

from hypothesis import given, settings
from hypothesis import strategies as st

from llamaherd.pool.threads import ThreadBudget


def test_one_busy_model_has_all_cores_and_two_have_half_each() -> None:
    budget: ThreadBudget[str] = ThreadBudget(4)
    assert budget.update(["a"]) == {"a": 4}
    assert budget.update(["a", "b"]) == {"a": 2, "b": 2}
    assert budget.update(["b"]) == {"b": 4}


def test_what_does_not_divide_goes_to_the_first() -> None:
    assert ThreadBudget[str](5).update(["a", "b", "c"]) == {"a": 2, "b": 2, "c": 1}


def test_more_models_than_cores_get_one_thread_each() -> None:
    assert ThreadBudget[str](2).update(["a", "b", "c"]) == {"a": 1, "b": 1, "c": 1}


def test_nobody_is_told_twice() -> None:
    budget: ThreadBudget[str] = ThreadBudget(2)
    assert budget.update(["a"]) == {"a": 2}
    assert budget.update(["a"]) == {}
    assert budget.update([]) == {}
    assert budget.update(["a"]) == {}


def test_a_new_worker_is_told_even_if_the_old_one_had_the_same() -> None:
    budget: ThreadBudget[str] = ThreadBudget(2)
    budget.update(["a"])
    budget.forget("a")
    assert budget.update(["a"]) == {"a": 2}


@given(st.integers(1, 64), st.lists(st.lists(st.sampled_from("abcdef"), unique=True), max_size=20))
@settings(deadline=None, derandomize=True)
def test_the_busy_models_always_share_exactly_the_cores(cores: int, history: list[list[str]]) -> None:
    budget: ThreadBudget[str] = ThreadBudget(cores)
    told: dict[str, int] = {}
    for busy in history:
        told.update(budget.update(busy))
        shares = [told[model] for model in busy]
        assert all(share >= 1 for share in shares)
        assert not shares or sum(shares) == max(cores, len(busy))
        assert not shares or max(shares) - min(shares) <= 1
