"""Seeds: local maxima and flat maxima; in a block, exactly the volume's or reported as incomplete."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from braincensus_kernels import seeds as seeds_module
from braincensus_kernels.boxes import Box
from braincensus_kernels.seeds import find_seeds


def whole_seeds(blurred, mask, rule="plateau"):
    box = Box.whole(blurred.shape)
    found = find_seeds(blurred, mask, exact=box, near=box, volume_shape=blurred.shape, rule=rule)
    assert found.complete
    return found.index.tolist()


def literal_seeds(blurred, mask):
    """Plateau by plateau: label the voxels of each value, look at the neighbours of each component."""
    found = []
    ones = np.ones((3, 3, 3), bool)
    for value in np.unique(blurred):
        components, n = ndimage.label(blurred == value, structure=ones)
        for i in range(1, n + 1):
            members = components == i
            around = ndimage.binary_dilation(members, structure=ones)
            first = int(np.flatnonzero(members)[0])
            if not (blurred[around] > value).any() and mask.ravel()[first]:
                found.append(first)
    return sorted(found)


@st.composite
def flat_images(draw):
    """Small images of few values, so that plateaus of every shape occur."""
    shape = tuple(draw(st.integers(1, 9)) for _ in range(3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    image = rng.integers(0, draw(st.integers(1, 5)), shape).astype(np.float32)
    if draw(st.booleans()):
        image = np.round(ndimage.uniform_filter(image, 3), 1).astype(np.float32)
    mask = rng.random(shape) < draw(st.sampled_from([0.3, 0.8, 1.0]))
    return image, mask


@settings(max_examples=100, deadline=None)
@given(flat_images())
def test_each_plateau_gives_its_first_voxel(case):
    image, mask = case
    assert whole_seeds(image, mask) == literal_seeds(image, mask)


@settings(max_examples=50, deadline=None)
@given(flat_images())
def test_strict_seeds_are_greater_than_all_neighbours(case):
    image, mask = case
    footprint = np.ones((3, 3, 3), bool)
    footprint[1, 1, 1] = False
    highest = ndimage.maximum_filter(image, footprint=footprint, mode="constant", cval=-1)
    assert whole_seeds(image, mask, "strict") == np.flatnonzero((image > highest) & mask).tolist()


@st.composite
def blocks(draw):
    image, mask = draw(flat_images())
    shape = image.shape
    start = tuple(draw(st.integers(0, n - 1)) for n in shape)
    near = Box(start, tuple(draw(st.integers(a + 1, n)) for a, n in zip(start, shape, strict=True)))
    exact = near.dilate(draw(st.integers(1, 3))).clip(shape)
    return image, mask, near, exact


@settings(max_examples=200, deadline=None)
@given(blocks(), st.sampled_from(["plateau", "strict"]))
def test_a_complete_block_has_the_seeds_of_the_volume(case, rule):
    image, mask, near, exact = case
    found = find_seeds(
        image[exact.slices], mask[near.slices], exact=exact, near=near, volume_shape=image.shape, rule=rule
    )
    assert found.complete or rule == "plateau"
    if found.complete:
        expected = np.zeros(image.size, bool)
        expected[whole_seeds(image, mask, rule)] = True
        expected = np.flatnonzero(expected.reshape(image.shape)[near.slices])
        np.testing.assert_array_equal(found.index, expected)


@settings(max_examples=150, deadline=None)
@given(blocks(), st.sampled_from(["plateau", "strict"]))
def test_array_operations_find_the_seeds_of_the_compiled_search(case, rule):
    image, mask, near, exact = case
    boxes = {"exact": exact, "near": near, "volume_shape": image.shape, "rule": rule}
    with pytest.MonkeyPatch.context() as patch:
        compiled = find_seeds(image[exact.slices], mask[near.slices], **boxes)
        patch.setattr(seeds_module, "is_cupy", lambda array: True)
        generic = find_seeds(image[exact.slices], mask[near.slices], **boxes)
    np.testing.assert_array_equal(generic.index, compiled.index)
    assert generic.complete == compiled.complete


def test_diagonal_neighbours_are_one_plateau():
    image = np.zeros((2, 2, 2), np.float32)
    image[0, 0, 0] = image[1, 1, 1] = 1
    assert whole_seeds(image, image > 0) == [0]


def test_a_plateau_beside_something_greater_has_no_seed():
    image = np.array([[[2, 2, 2, 2, 3, 1]]], np.float32)
    assert whole_seeds(image, image > 0) == [4]


def test_a_plateau_whose_first_voxel_is_not_foreground_has_no_seed():
    image = np.array([[[2, 2, 2, 1]]], np.float32)
    assert whole_seeds(image, np.array([[[False, True, True, False]]])) == []


LINE = (1, 1, 30)


def line_block(values, mask, exact, near):
    exact, near = (Box((0, 0, a), (1, 1, b)) for a, b in (exact, near))
    found = find_seeds(
        values[exact.slices], mask[near.slices], exact=exact, near=near, volume_shape=LINE, rule="plateau"
    )
    return found.index.tolist(), found.complete


def plateau(start, stop):
    values = np.zeros(LINE, np.float32)
    values[..., start:stop] = 1
    return values


def test_empty_space_is_complete():
    values = np.zeros(LINE, np.float32)
    assert line_block(values, values > 0, (5, 20), (8, 17)) == ([], True)


def test_the_middle_of_a_huge_plateau_is_complete():
    values = plateau(0, 30)
    assert line_block(values, values > 0, (5, 20), (8, 17)) == ([], True)


def test_the_end_of_a_plateau_is_complete_where_its_seed_is_elsewhere():
    values = plateau(2, 12)
    assert line_block(values, values > 0, (5, 20), (8, 17)) == ([], True)


def test_the_start_of_a_plateau_that_leaves_is_incomplete():
    values = plateau(10, 25)
    assert line_block(values, values > 0, (5, 20), (8, 17)) == ([], False)
    assert line_block(values, values > 0, (5, 26), (8, 17)) == ([2], True)


def test_a_seed_that_leaves_but_is_not_foreground_is_complete():
    values = plateau(10, 25)
    mask = values > 0
    mask[..., 10] = False
    assert line_block(values, mask, (5, 20), (8, 17)) == ([], True)


def test_the_border_of_the_volume_is_no_unknown():
    values = plateau(10, 30)
    assert line_block(values, values > 0, (5, 30), (8, 17)) == ([2], True)


def test_large_plateaus_are_searched_once():
    """A saturated volume is one plateau: the search must not start anew at each of its voxels."""
    image = np.ones((40, 40, 40), np.float32)
    assert whole_seeds(image, image > 0) == [0]
    image[0, 0, 0] = 2
    assert whole_seeds(image, image > 0) == [0]


def test_boxes_and_rule_are_checked():
    image = np.zeros((4, 4, 4), np.float32)
    box = Box.whole(image.shape)
    with pytest.raises(ValueError, match="rule"):
        find_seeds(image, image > 0, exact=box, near=box, volume_shape=image.shape, rule="first")
    with pytest.raises(ValueError, match="one voxel more"):
        find_seeds(image, image > 0, exact=box, near=box, volume_shape=(9, 4, 4), rule="strict")
    with pytest.raises(ValueError, match="shape"):
        find_seeds(image[1:], image > 0, exact=box, near=box, volume_shape=image.shape, rule="strict")
