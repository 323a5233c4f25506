"""The flood: its rules one by one, scikit-image's where nothing ties, and certainty about the volume."""

from __future__ import annotations

import heapq
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from skimage.segmentation import watershed

from braincensus_kernels.flood import DRY, NOWHERE, UNKNOWN, flood

NEIGHBOURS = [o for o in product((-1, 0, 1), repeat=3) if any(o)]


def literal_flood(height, mask, seeds):
    """Voxel by voxel in order of (time of the neighbour, source): the rule itself."""
    source = np.full(height.shape, DRY)
    offers = []

    def settle(at, level, steps, of):
        source[at] = of
        for o in NEIGHBOURS:
            to = tuple(a + b for a, b in zip(at, o, strict=True))
            inside = all(0 <= a < n for a, n in zip(to, height.shape, strict=True))
            if inside and mask[to] and source[to] == DRY:
                heapq.heappush(offers, (-level, steps, of, to))

    seed_at = [tuple(int(p) for p in np.unravel_index(s, height.shape)) for s in seeds]
    for number, at in enumerate(seed_at):
        source[at] = number
    for number, at in enumerate(seed_at):
        settle(at, int(height[at]), 0, number)
    while offers:
        level, steps, of, at = heapq.heappop(offers)
        if source[at] == DRY:
            h = int(height[at])
            settle(at, *((-level, steps + 1) if h >= -level else (h, 0)), of)
    return source


@st.composite
def tanks(draw, largest=9):
    """Heights with few values, so that almost everything ties; masks with holes; some seeds."""
    shape = tuple(draw(st.integers(1, largest)) for _ in range(3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    height = rng.random(shape)
    if draw(st.booleans()):
        height = ndimage.gaussian_filter(height, draw(st.sampled_from([0.7, 1.5])))
        height = (height - height.min()) / max(float(np.ptp(height)), 1e-9)
    values = draw(st.sampled_from([1, 2, 3, 5, 20, 65535]))
    height = np.floor(height * values).astype(np.uint16) + np.uint16(draw(st.sampled_from([0, 7])))
    if values == 65535:
        height = np.where(height < 7, 65535, height).astype(np.uint16)
    mask = rng.random(shape) < draw(st.sampled_from([0.5, 0.8, 1.0]))
    inside = np.flatnonzero(mask)
    n = min(draw(st.integers(0, 9)), len(inside))
    return height, mask, np.sort(rng.choice(inside, n, replace=False)).astype(np.int64)


@settings(max_examples=120)
@given(tanks())
def test_sources_follow_the_rules_one_by_one(tank):
    height, mask, seeds = tank
    found = flood(height, mask, seeds, continues=NOWHERE)
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, literal_flood(height, mask, seeds))


@settings(max_examples=200)
@given(tanks(largest=14), st.integers(0, 2**32 - 1))
def test_what_a_box_is_certain_of_is_so_in_the_volume(tank, seed):
    height, mask, seeds = tank
    whole = flood(height, mask, seeds, continues=NOWHERE)
    rng = np.random.default_rng(seed)
    start = [int(rng.integers(n)) for n in height.shape]
    stop = [int(rng.integers(a, n)) + 1 for a, n in zip(start, height.shape, strict=True)]
    box = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
    continues = (
        tuple(a > 0 for a in start),
        tuple(b < n for b, n in zip(stop, height.shape, strict=True)),
    )
    is_seed = np.zeros(height.shape, bool)
    is_seed.flat[seeds] = True
    number = (np.cumsum(is_seed.reshape(-1)) - 1).reshape(height.shape)
    found = flood(height[box], mask[box], np.flatnonzero(is_seed[box]), continues=continues)
    certain = found != UNKNOWN
    in_volume = np.append(number[box][is_seed[box]], [DRY, UNKNOWN])[found]  # -2 and -1 count from the end
    np.testing.assert_array_equal(in_volume[certain], whole[box][certain])

    # Whatever lies outside: without it, what is certain is the same.
    alone = flood(height[box], mask[box], np.flatnonzero(is_seed[box]), continues=NOWHERE)
    np.testing.assert_array_equal(alone[certain], found[certain])


def test_a_box_inside_a_tank_is_certain_of_what_its_seeds_reach_first():
    """Not all is UNKNOWN: of a hill with its seed, only what slopes down from the cut is uncertain."""
    z, y, x = np.indices((21, 21, 21)) - 10
    height = (1000 - z * z - y * y - x * x).astype(np.uint16)
    mask = height > 900
    seeds = np.array([np.ravel_multi_index((10, 10, 10), height.shape)])
    found = flood(height[:, :, 3:], mask[:, :, 3:], np.array([(10 * 21 + 10) * 18 + 7]), continues=NOWHERE)
    assert (found[mask[:, :, 3:]] == 0).all()
    certain = flood(
        height[:, :, 3:],
        mask[:, :, 3:],
        np.array([(10 * 21 + 10) * 18 + 7]),
        continues=((False, False, True), (False, False, False)),
    )
    assert 0.9 < (certain == 0).sum() / (flood(height, mask, seeds, continues=NOWHERE) == 0).sum() < 1


@pytest.mark.parametrize("smooth", [0, 1, 2])
def test_without_ties_sources_are_those_of_scikit_image(smooth):
    rng = np.random.default_rng(smooth)
    values = rng.random((40, 36, 44))
    if smooth:
        values = ndimage.gaussian_filter(values, smooth)
    height = np.empty(values.shape, np.uint16)
    height.flat[np.argsort(values, axis=None)] = np.arange(values.size)  # 63,360 values, all different
    mask = ndimage.gaussian_filter(rng.random(values.shape), 1) > 0.48
    seeds = np.sort(rng.choice(np.flatnonzero(mask), 300, replace=False))
    markers = np.zeros(values.shape, np.int32)
    markers.flat[seeds] = np.arange(1, 301)
    expected = watershed(-height.astype(np.int32), markers, mask=mask, connectivity=np.ones((3, 3, 3)))
    found = flood(height, mask, seeds, continues=NOWHERE)
    np.testing.assert_array_equal(np.where(found == DRY, 0, found + 1), expected)
    assert len(np.unique(expected)) == 301


def test_of_two_seeds_at_one_distance_the_first_wins():
    height, mask = np.full((1, 1, 5), 9, np.uint16), np.ones((1, 1, 5), bool)
    assert flood(height, mask, np.array([0, 4]), continues=NOWHERE).tolist() == [[[0, 0, 0, 1, 1]]]


def test_what_does_not_fit_is_refused():
    height, mask = np.zeros((2, 3, 4), np.uint16), np.ones((2, 3, 4), bool)
    mask[0, 0, 1] = False
    for wrong in ([1], [3, 2], [2, 2], [-1], [24]):
        with pytest.raises(ValueError, match="seeds"):
            flood(height, mask, np.array(wrong), continues=NOWHERE)
    with pytest.raises(ValueError, match="fit"):
        flood(height, mask[1:], np.array([0]), continues=NOWHERE)
    with pytest.raises(ValueError, match="uint16"):
        flood(height.astype(float), mask, np.array([0]), continues=NOWHERE)
