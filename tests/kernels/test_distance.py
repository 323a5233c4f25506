"""Distances to the background: SciPy's, in whole numbers, and the same in a crop with margin."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from braincensus_kernels.distance import distance_radii, squared_distance, squared_distance_generic


def nearest_background(mask, spacing, limit):
    """SciPy's nearest background voxel, its squared distance in whole numbers, cut off at the limit."""
    if mask.all():
        return np.full(mask.shape, limit**2, np.int64)
    nearest = ndimage.distance_transform_edt(
        mask, sampling=spacing, return_distances=False, return_indices=True
    )
    away = np.abs(nearest - np.indices(mask.shape))
    square = sum((a.astype(np.int64) * s) ** 2 for a, s in zip(away, spacing, strict=True))
    return np.minimum(square, limit**2)


@st.composite
def cases(draw):
    shape = tuple(draw(st.integers(1, 18)) for _ in range(3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    mask = rng.random(shape) > draw(st.sampled_from([0.0, 0.002, 0.02, 0.2, 0.7, 1.0]))
    spacing = draw(st.sampled_from([(1, 1, 1), (2, 1, 1), (5000, 5260, 5260), (7, 3, 2), (50_000, 4, 9)]))
    limit = int(max(spacing) * draw(st.sampled_from([0.3, 1, 2, 2.5, 4, 40])))
    return mask, spacing, max(limit, 1)


@settings(max_examples=120)
@given(cases())
def test_distances_are_those_of_scipy(case):
    mask, spacing, limit = case
    found = squared_distance(mask, spacing=spacing, limit=limit)
    np.testing.assert_array_equal(found, nearest_background(mask, spacing, limit))
    generic = squared_distance_generic(mask, spacing=spacing, limit=limit)
    assert generic.dtype == found.dtype == (np.int32 if 2 * limit**2 < 2**31 else np.int64)
    np.testing.assert_array_equal(generic, found)


def test_radii_are_not_wider_than_needed_nor_less():
    spacing, limit = (5, 3, 2), 11
    for axis, radius in enumerate(distance_radii(spacing, limit)):
        for away in (radius, radius + 1):
            shape = [1, 1, 1]
            shape[axis] = away + 1
            mask = np.ones(shape, bool)
            mask.flat[-1] = False
            distance = squared_distance(mask, spacing=spacing, limit=limit).flat[0]
            assert (distance < limit**2) == (away == radius)


@settings(max_examples=60)
@given(cases(), st.integers(0, 2**32 - 1))
def test_a_crop_with_margin_has_the_distances_of_the_whole(case, seed):
    mask, spacing, limit = case
    rng = np.random.default_rng(seed)
    whole = squared_distance(mask, spacing=spacing, limit=limit)
    start = [int(rng.integers(n)) for n in mask.shape]
    stop = [int(rng.integers(a, n)) + 1 for a, n in zip(start, mask.shape, strict=True)]
    lower = [max(a - r, 0) for a, r in zip(start, distance_radii(spacing, limit), strict=True)]
    upper = [b + r for b, r in zip(stop, distance_radii(spacing, limit), strict=True)]
    crop = mask[tuple(slice(a, b) for a, b in zip(lower, upper, strict=True))]
    inside = tuple(slice(a - c, b - c) for a, b, c in zip(start, stop, lower, strict=True))
    expected = whole[tuple(slice(a, b) for a, b in zip(start, stop, strict=True))]
    np.testing.assert_array_equal(squared_distance(crop, spacing=spacing, limit=limit)[inside], expected)


def test_beyond_the_array_is_no_background():
    assert (squared_distance(np.ones((3, 4, 5), bool), spacing=(1, 1, 1), limit=9) == 81).all()
    assert not squared_distance(np.zeros((3, 4, 5), bool), spacing=(1, 1, 1), limit=9).any()


@pytest.mark.parametrize(
    ("spacing", "limit"),
    [((1, 1, 0), 5), ((1, 1, 1), 0), ((1, 1, 1.5), 5), ((1, 1, 1), 2.0), ((1, 1), 2), ((1, 1, 1), 2**40)],
)
def test_lengths_that_are_not_whole_are_refused(spacing, limit):
    with pytest.raises(ValueError, match="spacing"):
        squared_distance(np.ones((2, 2, 2), bool), spacing=spacing, limit=limit)


def test_a_mask_that_is_none_is_refused():
    with pytest.raises(ValueError, match="boolean"):
        squared_distance(np.ones((2, 2, 2)), spacing=(1, 1, 1), limit=3)
