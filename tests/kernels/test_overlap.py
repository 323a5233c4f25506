"""Stitching by overlap: pairs are found where they are, one to one, and chains never fuse a block's cells."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from braincensus_kernels.boxes import Box
from braincensus_kernels.overlap import first_voxels, joinable, match_one_to_one, overlaps, renumber

WHOLE = (slice(None),) * 3
THRESHOLDS = {"min_iou": 0.5, "min_containment": 0.8}
seeds = st.integers(0, 2**32)


def matched(a, b, **thresholds):
    rows = overlaps(np.asarray(a, np.uint32)[None, None], np.asarray(b, np.uint32)[None, None])
    return match_one_to_one(rows, **(THRESHOLDS | thresholds))[:, :2].tolist()


@given(seeds, st.sampled_from([np.uint8, np.int16, np.int64, np.uint64]))
def test_numbers_tell_the_partition_and_nothing_of_the_values(seed, dtype):
    rng = np.random.default_rng(seed)
    shape = tuple(rng.integers(1, 7, 3))
    labels = rng.integers(0, 6, shape)
    highest = int(np.iinfo(dtype).max)
    some = [1, 2, highest // 3, highest - 1, highest]
    values = np.array([0, *(some[i] for i in rng.permutation(5))], dtype)
    start = [int(rng.integers(0, n)) for n in shape]
    core = tuple(slice(a, int(rng.integers(a, n)) + 1) for a, n in zip(start, shape, strict=True))
    numbers, k = renumber(values[labels], core=core)
    assert numbers.dtype == np.uint32
    again, same_k = renumber(labels, core=core)
    np.testing.assert_array_equal(numbers, again)
    pairs = np.unique(np.stack([labels.ravel(), numbers.ravel()]), axis=1)
    assert len(np.unique(pairs[0])) == len(np.unique(pairs[1])) == pairs.shape[1]
    assert sorted(set(numbers.ravel().tolist()) - {0}) == list(range(1, numbers.max() + 1))
    assert set(numbers[core].ravel().tolist()) - {0} == set(range(1, k + 1))
    assert k == same_k


@given(seeds)
def test_first_voxels_are_the_smallest_raster_indices(seed):
    rng = np.random.default_rng(seed)
    volume = np.zeros((8, 9, 10), np.int64)
    core = Box((2, 3, 4), (6, 8, 9))
    volume[core.slices] = rng.integers(0, 9, core.shape)
    numbers, k = renumber(volume[core.slices], core=WHOLE)
    volume[core.slices] = numbers
    first = first_voxels(numbers, k, core=core, volume_shape=volume.shape)
    assert first.tolist() == [np.flatnonzero(volume.ravel() == n)[0] for n in range(1, k + 1)]
    assert (np.diff(first) > 0).all()


@given(seeds)
def test_overlaps_are_the_counts_of_pairs(seed):
    rng = np.random.default_rng(seed)
    a, b = rng.integers(0, 4, (2, *rng.integers(0, 6, 3))).astype(np.uint32)
    counted = {}
    for pair in zip(a.ravel().tolist(), b.ravel().tolist(), strict=True):
        counted[pair] = counted.get(pair, 0) + 1
    counted.pop((0, 0), None)
    assert overlaps(a, b).tolist() == [[*pair, counted[pair]] for pair in sorted(counted)]


def test_cells_that_touch_share_nothing():
    assert matched([1, 1, 0, 0], [0, 0, 2, 2], min_iou=0.01, min_containment=0.01) == []


def test_a_cell_seen_alike_is_one_and_seen_otherwise_is_not():
    assert matched([1] * 10, [0] * 5 + [1] * 5, min_containment=1) == [[1, 1]]  # half in common, contained
    assert matched([0] * 6 + [1] * 9, [1] * 11 + [0] * 4) == []  # 5 of 15, of 9
    assert matched([1] * 12 + [0] * 3, [0] * 4 + [1] * 11) == [[1, 1]]  # 8 of 15
    assert matched([1] * 12 + [0] * 3, [0] * 4 + [1] * 11, min_iou=0.6) == []


def test_a_part_of_a_cell_is_the_cell():
    whole, part = [1] * 30, [0] * 24 + [1] * 5 + [0]
    assert matched(whole, part) == [[1, 1]]
    assert matched(whole, part, min_containment=1) == [[1, 1]]
    assert matched([1] * 28 + [0] * 2, [0] * 24 + [1] * 6) == []  # 4 of 6: less than 0.8


def test_one_to_one_the_larger_part_wins():
    assert matched([1] * 10, [1] * 4 + [2] * 6) == [[1, 2]]
    assert matched([1] * 4 + [2] * 6, [1] * 10) == [[2, 1]]


def test_ties_go_to_the_smaller_union_then_the_smaller_label():
    assert matched([1] * 8, [2] * 4 + [1] * 4) == [[1, 1]]
    assert matched([0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 2, 2, 2]) == [[1, 2]]


@given(seeds)
def test_matches_are_one_to_one_and_do_not_depend_on_which_block_is_first(seed):
    rng = np.random.default_rng(seed)
    a = rng.integers(0, 5, (3, 4, 5)).astype(np.uint32)
    b = np.where(rng.random(a.shape) < 0.4, rng.integers(0, 5, a.shape), a * 2 % 5).astype(np.uint32)
    found = match_one_to_one(overlaps(a, b), min_iou=0.2, min_containment=0.5)
    other = match_one_to_one(overlaps(b, a), min_iou=0.2, min_containment=0.5)
    assert len(set(found[:, 0])) == len(set(found[:, 1])) == len(found)
    for label_a, label_b, common, union in found.tolist():
        assert common == ((a == label_a) & (b == label_b)).sum()
        assert union == ((a == label_a) | (b == label_b)).sum()
    voxels = overlaps(a, b)[:, 2]
    if len(set(voxels)) == len(voxels):  # ties may fall otherwise
        assert sorted(map(tuple, found[:, [1, 0, 2, 3]])) == sorted(map(tuple, other))


def join(matches):
    """Join rows of (cell, cell, intersection, block, block)."""
    rows = np.array(matches)
    return joinable(
        rows[:, :2], intersection=rows[:, 2], union=np.full(len(rows), 100), blocks=rows[:, 3:]
    ).tolist()


def test_chains_without_a_conflict_are_joined_whole():
    assert join([(1, 5, 60, 0, 1), (5, 9, 50, 1, 2), (1, 9, 50, 0, 2)]) == [True] * 3


def test_the_weakest_match_of_a_conflict_is_refused():
    chain = [(1, 5, 60, 0, 1), (5, 9, 50, 1, 2), (2, 9, 70, 0, 2), (3, 6, 51, 0, 1)]
    assert join(chain) == [True, False, True, True]
    assert join(chain[::-1]) == [True, True, False, True]


@given(seeds)
def test_no_set_holds_two_cells_of_a_block_and_order_does_not_matter(seed):
    rng = np.random.default_rng(seed)
    n_blocks, per_block = 5, 3
    pairs = set()
    for _ in range(int(rng.integers(1, 25))):
        low, high = sorted(rng.choice(n_blocks, 2, replace=False).tolist())
        a, b = (block * per_block + int(rng.integers(per_block)) for block in (low, high))
        pairs.add((a, b))
    pairs = np.array(sorted(pairs))
    intersection = rng.integers(50, 54, len(pairs))
    options = {"union": np.full(len(pairs), 100), "blocks": pairs // per_block}
    kept = joinable(pairs, intersection=intersection, **options)
    order = rng.permutation(len(pairs))
    shuffled = joinable(
        pairs[order],
        intersection=intersection[order],
        union=options["union"],
        blocks=options["blocks"][order],
    )
    np.testing.assert_array_equal(shuffled, kept[order])
    home = list(range(n_blocks * per_block))
    for a, b in pairs[kept].tolist():
        home = [home[a] if h == home[b] else h for h in home]
    together = {(h, cell // per_block) for cell, h in enumerate(home)}
    assert len(together) == len(home)
    for a, b in pairs[~kept].tolist():  # each refused one would fuse
        blocks_a = {c // per_block for c, h in enumerate(home) if h == home[a]}
        blocks_b = {c // per_block for c, h in enumerate(home) if h == home[b]}
        assert home[a] != home[b]
        assert blocks_a & blocks_b


def test_what_cannot_be_used_is_refused():
    with pytest.raises(ValueError, match="negative"):
        renumber(np.array([[[-1]]]), core=WHOLE)
    with pytest.raises(TypeError, match="bool"):
        renumber(np.ones((1, 1, 1), bool), core=WHOLE)
    with pytest.raises(ValueError, match="one shape"):
        overlaps(np.zeros((1, 1, 2), np.uint32), np.zeros((1, 2, 1), np.uint32))
    with pytest.raises(TypeError, match="int64"):
        overlaps(np.zeros((1, 1, 2), np.int64), np.zeros((1, 1, 2), np.uint32))
    with pytest.raises(ValueError, match="min_iou"):
        match_one_to_one(np.empty((0, 3), np.int64), min_iou=0, min_containment=0.5)
    with pytest.raises(ValueError, match="numbers of"):
        first_voxels(np.zeros((1, 1, 1), np.uint32), 0, core=Box.whole((2, 1, 1)), volume_shape=(2, 1, 1))
