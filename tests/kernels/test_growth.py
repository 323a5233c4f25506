"""Growth: alternating steps, ties to the larger label, counts that blocks can add up."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from braincensus_kernels import growth
from braincensus_kernels.boxes import Box
from braincensus_kernels.growth import grow

BOX = np.ones((3, 3, 3), bool)
DIAMOND = ndimage.generate_binary_structure(3, 1)


def whole_growth(mask, seeds, max_steps=10**6):
    box = Box.whole(mask.shape)
    return grow(mask, np.asarray(seeds, np.int64), near=box, kept=box, core=box, max_steps=max_steps)


def literal_growth(mask, seeds, max_steps):
    """Whole-image maximum filters, until a box step changes nothing."""
    labels = np.zeros(mask.shape, np.int64)
    labels.reshape(-1)[seeds] = np.arange(1, len(seeds) + 1)
    steps = 0
    for step in range(1, max_steps + 1):
        footprint = BOX if step % 2 else DIAMOND
        largest = ndimage.maximum_filter(labels, footprint=footprint, mode="constant")
        grown = np.where(mask & (labels == 0), largest, labels)
        if (grown != labels).any():
            steps = step
        elif step % 2:
            break
        labels = grown
    return labels, steps


@st.composite
def grown_images(draw):
    shape = tuple(draw(st.integers(1, 10)) for _ in range(3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    mask = rng.random(shape) < draw(st.sampled_from([0.1, 0.3, 0.6, 1.0]))
    inside = np.flatnonzero(mask)
    n = min(len(inside), draw(st.integers(0, 6)))
    seeds = np.sort(rng.choice(inside, n, replace=False)) if n else np.empty(0, np.int64)
    return mask, seeds, draw(st.integers(0, 12))


@settings(max_examples=150, deadline=None)
@given(grown_images())
def test_growth_is_that_of_maximum_filters(case):
    mask, seeds, max_steps = case
    grown = whole_growth(mask, seeds, max_steps)
    labels, steps = literal_growth(mask, seeds, max_steps)
    np.testing.assert_array_equal(grown.labels, labels)
    assert grown.labels.dtype == np.uint32
    assert grown.steps == steps
    assert grown.foreground_voxels == mask.sum()
    assert grown.unreached_voxels == (mask & (labels == 0)).sum()
    further = ndimage.maximum_filter(labels, footprint=BOX, mode="constant")
    assert grown.stopped_by_bound == bool((mask & (labels == 0) & (further > 0)).any())


@settings(max_examples=100, deadline=None)
@given(grown_images(), st.data())
def test_array_operations_grow_as_the_compiled_loop(case, data):
    mask, seeds, max_steps = case
    start = tuple(data.draw(st.integers(0, n - 1)) for n in mask.shape)
    stop = tuple(data.draw(st.integers(a + 1, n)) for a, n in zip(start, mask.shape, strict=True))
    core = Box(start, stop)
    boxes = {"near": Box.whole(mask.shape), "kept": core.dilate(1).clip(mask.shape), "core": core}
    with pytest.MonkeyPatch.context() as patch:
        compiled = grow(mask, seeds, **boxes, max_steps=max_steps)
        patch.setattr(growth, "is_cupy", lambda array: True)
        generic = grow(mask, seeds, **boxes, max_steps=max_steps)
    for name in (field.name for field in fields(compiled)):
        np.testing.assert_array_equal(getattr(generic, name), getattr(compiled, name), err_msg=name)


@settings(max_examples=100, deadline=None)
@given(grown_images(), st.data())
def test_a_block_grows_as_the_volume(case, data):
    mask, seeds, max_steps = case
    start = tuple(data.draw(st.integers(0, n - 1)) for n in mask.shape)
    core = Box(start, tuple(data.draw(st.integers(a + 1, n)) for a, n in zip(start, mask.shape, strict=True)))
    kept = core.dilate(1).clip(mask.shape)
    near = kept.dilate(max_steps).clip(mask.shape)
    index = np.zeros(mask.shape, np.int64)
    index.reshape(-1)[seeds] = np.arange(1, len(seeds) + 1)
    local = index[near.slices].ravel()
    part = grow(
        mask[near.slices], np.flatnonzero(local), near=near, kept=kept, core=core, max_steps=max_steps
    )
    ids = np.concatenate(([0], local[local > 0][part.seeds]))
    np.testing.assert_array_equal(ids[part.labels], whole_growth(mask, seeds, max_steps).labels[kept.slices])
    assert np.unique(part.labels[part.labels > 0]).tolist() == list(range(1, len(part.seeds) + 1))


def test_ties_go_to_the_larger_label():
    mask = np.ones((1, 1, 5), bool)
    np.testing.assert_array_equal(whole_growth(mask, [0, 4]).labels, [[[1, 1, 2, 2, 2]]])


def test_steps_alternate_and_the_box_comes_first():
    mask = np.ones((9, 9, 9), bool)
    centre = [4 * 81 + 4 * 9 + 4]
    sizes = [int((whole_growth(mask, centre, n).labels > 0).sum()) for n in range(3)]
    assert sizes == [1, 27, 27 + 6 * 9]


def test_a_diagonal_chain_is_followed_past_a_step_that_changes_nothing():
    """The 6 nearest neighbours never lead along a diagonal: growth pauses every other step, and goes on."""
    mask = np.zeros((6, 6, 6), bool)
    mask[np.arange(6), np.arange(6), np.arange(6)] = True
    grown = whole_growth(mask, [0])
    assert grown.unreached_voxels == 0
    assert grown.steps == 9
    assert not grown.stopped_by_bound


def test_the_bound_is_reported_only_where_it_matters():
    mask = np.ones((1, 1, 10), bool)
    mask[..., 8] = False
    short = whole_growth(mask, [0], 3)
    assert (short.steps, short.stopped_by_bound, short.unreached_voxels) == (3, True, 5)
    enough = whole_growth(mask, [0], 7)  # the last voxel is behind a gap: no number of steps reaches it
    assert (enough.steps, enough.stopped_by_bound, enough.unreached_voxels) == (7, False, 1)
    assert whole_growth(mask, [0], 0).labels.sum() == 1


def test_long_growth():
    """More steps than the first allocation holds."""
    mask = np.ones((1, 1, 500), bool)
    assert whole_growth(mask, [0]).steps == 499


def test_no_foreground_and_no_seeds():
    empty = whole_growth(np.zeros((3, 4, 5), bool), [])
    assert (empty.labels.any(), empty.foreground_voxels, empty.steps) == (False, 0, 0)
    seedless = whole_growth(np.ones((3, 4, 5), bool), [])
    assert (seedless.unreached_voxels, seedless.stopped_by_bound) == (60, False)


def test_arguments_are_checked():
    mask = np.ones((2, 2, 2), bool)
    box = Box.whole(mask.shape)
    with pytest.raises(ValueError, match="negative"):
        whole_growth(mask, [0], -1)
    with pytest.raises(ValueError, match="do not fit"):
        grow(mask, np.array([0]), near=box, kept=box, core=box.dilate(1), max_steps=1)
