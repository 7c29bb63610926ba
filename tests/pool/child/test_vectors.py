"""The arithmetic of embeddings, against plain definitions."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamaherd.pool.child.vectors import Pooled, normalized, slices, to_bytes

components = st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=20)


def vector(values: list[float]) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    return np.array(values, np.float32)


@given(components, st.sampled_from([1, 2, 3, 7]))
def test_a_p_norm_is_one_afterwards_or_zero(values: list[float], p: int) -> None:
    scaled = normalized(vector(values), p).astype(float)
    norm = float((np.abs(scaled) ** p).sum() ** (1 / p))
    assert norm == pytest.approx(1.0 if any(vector(values)) else 0.0, abs=1e-4)


@given(components)
def test_zero_scales_the_largest_component_to_the_range_of_16_bits(values: list[float]) -> None:
    largest = float(np.abs(normalized(vector(values), 0)).max())
    assert largest == pytest.approx(32760 if any(vector(values)) else 0, rel=1e-5)


@given(components)
def test_minus_one_changes_nothing(values: list[float]) -> None:
    assert (normalized(vector(values), -1) == vector(values)).all()


def test_no_power_overflows() -> None:
    assert normalized(vector([1e30, -1e30]), 100) == pytest.approx([0.5**0.01, -(0.5**0.01)], rel=1e-5)
    assert normalized(vector([3e38, 4e38 / 3]), 2**31 - 1)[0] == pytest.approx(1.0)


@given(st.lists(st.lists(components, min_size=1, max_size=4), min_size=1, max_size=1))
def test_chunks_make_the_mean_of_all_their_tokens(lists: list[list[list[float]]]) -> None:
    width = 3
    chunks = [np.resize(vector(values), (len(values), width)) for values in lists[0]]
    pooled = Pooled("mean")
    for chunk in chunks:
        pooled.add(chunk.mean(axis=0, dtype=np.float32), len(chunk))
    expected = np.concatenate(chunks).astype(float).mean(axis=0)
    scale = max(1.0, float(np.abs(np.concatenate(chunks)).max()))
    assert np.abs(pooled.value - expected).max() <= 1e-5 * scale


@pytest.mark.parametrize(("how", "expected"), [("cls", 1.0), ("last", 3.0), ("rank", 3.0)])
def test_the_first_or_the_last_chunk_decides(how: str, expected: float) -> None:
    pooled = Pooled(how)  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    for value in (1.0, 2.0, 3.0):
        pooled.add(vector([value]), 4)
    assert pooled.value.tolist() == [expected]


def test_a_chunk_is_copied_as_its_memory_is_soon_used_again() -> None:
    chunk, pooled = vector([1.0]), Pooled("last")
    pooled.add(chunk, 1)
    chunk[0] = math.nan
    assert pooled.value.tolist() == [1.0]


def test_rows_are_split_by_size_and_never_torn() -> None:
    rows = np.arange(20, dtype=np.float32).reshape(5, 4)
    split = list(slices(rows, 2 * 4 * 4))
    assert [(start, len(part)) for start, part in split] == [(0, 2), (2, 2), (4, 1)]
    assert [len(part) for _, part in slices(rows, 1)] == [1] * 5
    assert b"".join(to_bytes(part) for _, part in split) == rows.astype("<f4").tobytes()
