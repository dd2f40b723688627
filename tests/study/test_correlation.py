from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dynaconv.study import CorrelationTally, Thresholds, pearson


@given(st.integers(1, 3), st.integers(2, 6), st.integers(3, 20), st.integers(0, 1000))
def test_pearson_is_numpys(images: int, rows: int, positions: int, seed: int) -> None:
    x = torch.randn(images, rows, positions, generator=torch.Generator().manual_seed(seed))
    r, varies = pearson(x)
    assert varies.all()
    for image in range(images):
        np.testing.assert_allclose(r[image], np.corrcoef(x[image].double().numpy()), atol=1e-12)


def test_pearson_does_not_see_scale_and_shift() -> None:
    x = torch.randn(2, 5, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    r, _ = pearson(x)
    moved, _ = pearson(x * torch.tensor([1e-2, 1.0, 3.0, 1e4, 2.0])[:, None] + 100)
    torch.testing.assert_close(r, moved, atol=1e-6, rtol=0)


def test_constant_rows_are_dropped_and_counted() -> None:
    x = torch.randn(1, 4, 50, generator=torch.Generator().manual_seed(0))
    x[0, 1] = 0
    x[0, 2] = 0.1
    _, varies = pearson(x)
    assert varies.tolist() == [[True, False, False, True]]
    tally = CorrelationTally()
    tally.add(x)
    found = tally.result()
    assert (found.rows, found.dropped, found.images) == (4, 2.0, 1)
    assert sum(found.histogram) == pytest.approx(1)


def test_buckets_by_hand() -> None:
    """Rows at known angles: r = cos."""
    angles = torch.tensor([0.0, np.arccos(0.8), np.arccos(0.4), np.arccos(0.2), np.pi / 2])
    base = torch.tensor([[1.0, -1.0, 0.0, 0.0], [0.0, 0.0, 1.0, -1.0]], dtype=torch.float64)
    rows = angles.cos()[:, None] * base[0] + angles.sin()[:, None] * base[1]
    r, _ = pearson(rows[None])
    pairs = [float(r[0, i, j]) for i in range(5) for j in range(i + 1, 5)]
    tally = CorrelationTally()
    tally.add(rows[None])
    found = tally.result()
    shares = [
        sum(lo <= abs(v) < hi for v in pairs) / 10 for lo, hi in ((0.5, 2), (0.3, 0.5), (0.1, 0.3), (0, 0.1))
    ]
    assert list(found.buckets.values()) == pytest.approx(shares)
    assert found.inside == pytest.approx(sum(-0.1 <= v <= 0.2 for v in pairs) / 10)
    assert found.mean == pytest.approx(sum(pairs) / 10)


def test_images_are_averaged_not_pooled() -> None:
    """An image with more live channels has more pairs, and no more weight."""
    generator = torch.Generator().manual_seed(0)
    same = torch.randn(1, 1, 40, generator=generator).repeat(1, 6, 1)
    other = torch.randn(1, 6, 40, generator=generator)
    other[0, 2:] = 1.0
    tally = CorrelationTally()
    tally.add(torch.cat([same, other]))
    one = CorrelationTally()
    one.add(other)
    strong = one.result().buckets["S"]
    assert tally.result().buckets["S"] == pytest.approx((1 + strong) / 2)
    assert tally.result().dropped == 2.0


def test_images_without_pairs_are_skipped() -> None:
    tally = CorrelationTally()
    tally.add(torch.zeros(3, 4, 9))
    with pytest.raises(ValueError, match="none of 3 images"):
        tally.result()
    tally.add(torch.randn(1, 4, 9, generator=torch.Generator().manual_seed(0)))
    assert (tally.result().images, tally.result().skipped) == (1, 3)


@pytest.mark.parametrize("values", [(0.3, 0.5, 0.1), (1.2, 0.5, 0.1), (0.5, 0.3, 0.0), (0.5, 0.5, 0.1)])
def test_thresholds_fall(values: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="falling"):
        Thresholds(*values)
