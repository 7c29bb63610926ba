"""The cores are divided among the busy models, and only those whose share changes are told."""

from collections.abc import Collection

from hypothesis import given, settings
from hypothesis import strategies as st

from llamaherd.pool.threads import ThreadBudget


def update(budget: ThreadBudget[str], busy: Collection[str], was: Collection[str] = ()) -> dict[str, int]:
    """Have these be busy instead of those, and return the news."""
    for worker in was:
        if worker not in busy:
            budget.leave(worker)
    for worker in busy:
        if worker not in was:
            budget.join(worker)
    return budget.news()


def test_one_busy_model_has_all_cores_and_two_have_half_each() -> None:
    budget: ThreadBudget[str] = ThreadBudget(4)
    assert update(budget, "a") == {"a": 4}
    assert update(budget, "ab", "a") == {"a": 2, "b": 2}
    assert update(budget, "b", "ab") == {"b": 4}


def test_what_does_not_divide_goes_to_the_first() -> None:
    assert update(ThreadBudget[str](5), "abc") == {"a": 2, "b": 2, "c": 1}


def test_more_models_than_cores_get_one_thread_each() -> None:
    budget: ThreadBudget[str] = ThreadBudget(2)
    assert update(budget, "abc") == {"a": 1, "b": 1, "c": 1}
    assert update(budget, "abcd", "abc") == {"d": 1}
    assert update(budget, "ab", "abcd") == {}
    assert update(budget, "b", "ab") == {"b": 2}


def test_nobody_is_told_twice() -> None:
    budget: ThreadBudget[str] = ThreadBudget(2)
    assert update(budget, "a") == {"a": 2}
    assert update(budget, "a", "a") == {}
    assert update(budget, "", "a") == {}
    assert update(budget, "a") == {}


def test_who_comes_and_goes_between_two_news_is_not_told() -> None:
    budget: ThreadBudget[str] = ThreadBudget(1)
    update(budget, "ab")
    budget.join("c")
    budget.leave("c")
    assert budget.news() == {}


def test_without_cores_to_divide_nobody_is_told_and_the_busy_are_counted() -> None:
    budget: ThreadBudget[str] = ThreadBudget(0)
    assert update(budget, "ab") == {}
    assert len(budget) == 2


def test_a_new_worker_is_told_even_if_the_old_one_had_the_same() -> None:
    budget: ThreadBudget[str] = ThreadBudget(2)
    update(budget, "a")
    budget.leave("a")
    budget.forget("a")
    assert update(budget, "a") == {"a": 2}


@given(st.integers(1, 8), st.lists(st.lists(st.sampled_from("abcdef"), unique=True), max_size=20))
@settings(deadline=None, derandomize=True)
def test_the_busy_models_always_share_exactly_the_cores(cores: int, history: list[list[str]]) -> None:
    budget: ThreadBudget[str] = ThreadBudget(cores)
    told: dict[str, int] = {}
    was: list[str] = []
    for busy in history:
        told.update(update(budget, busy, was))
        was = busy
        shares = [told[model] for model in busy]
        assert all(share >= 1 for share in shares)
        assert not shares or sum(shares) == max(cores, len(busy))
        assert not shares or max(shares) - min(shares) <= 1
