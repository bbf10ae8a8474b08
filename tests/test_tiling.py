"""Windows against what they promise."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from deeplab_kernels.models.tiling import windows


@pytest.mark.parametrize("length", [1, 99, 100, 101, 169, 1000, 20000])
@pytest.mark.parametrize(("side", "margin"), [(100, 16), (100, 0), (33, 16)])
def test_kept_parts_cover_the_length_once(length, side, margin):
    spans = [(w.columns, w.seen_columns) for w in windows(1, length, side, margin)]
    assert spans[0][0].start == 0
    assert spans[-1][0].stop == length
    for (kept, _), (following, _) in itertools.pairwise(spans):
        assert kept.stop == following.start
    for kept, seen in spans:
        assert 0 <= seen.start <= kept.start < kept.stop <= seen.stop <= length
        assert seen.stop - seen.start == min(side, length)
        assert kept.start - seen.start >= margin or kept.start == 0
        assert seen.stop - kept.stop >= margin or kept.stop == length


@pytest.mark.parametrize("side", [20, None])
def test_two_axes(side):
    image = np.arange(45 * 70).reshape(45, 70)
    out = np.full_like(image, -1)
    for window in windows(45, 70, side, 4):
        assert (out[window.rows, window.columns] == -1).all()
        out[window.rows, window.columns] = image[window.seen_rows, window.seen_columns][window.kept]
    assert np.array_equal(out, image)
    assert len(windows(45, 70, side, 4)) == (1 if side is None else 4 * 6)


@pytest.mark.parametrize(("side", "margin"), [(10, 5), (10, -1), (None, -1)])
def test_wrong_arguments(side, margin):
    with pytest.raises(ValueError, match="must exceed twice its margin"):
        windows(9, 9, side, margin)
