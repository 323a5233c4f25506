"""Seam audit: silent when blocks agree, exact when they do not."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from braincensus_kernels.boxes import Box
from braincensus_kernels.faces import (
    MOST_LISTED,
    FaceAudit,
    compare_faces,
    face_beliefs,
    joined_by_anchors,
    resolve_disagreements,
)
from braincensus_kernels.union_find import connected


def beliefs_of(seed_map, core):
    """Beliefs of a block whose labels come from a map of seeds (-1 is background) of the whole volume."""
    kept = core.dilate(1).clip(seed_map.shape)
    seeds, local = np.unique(seed_map[kept.slices], return_inverse=True)
    local = local.reshape(kept.shape).astype(np.uint32)
    if seeds[0] == -1:
        seeds = seeds[1:]
    else:
        local = local + np.uint32(1)
    return face_beliefs(local, seeds, kept=kept, core=core)


def halves(shape, axis, at):
    stop, start = list(shape), [0, 0, 0]
    stop[axis] = start[axis] = at
    return Box((0, 0, 0), tuple(stop)), Box(tuple(start), shape)


def compare(map_low, map_high, axis, at):
    low, high = halves(map_low.shape, axis, at)
    boxes = {"axis": axis, "low": low, "high": high, "volume_shape": map_low.shape}
    return compare_faces(beliefs_of(map_low, low), beliefs_of(map_high, high), **boxes)


@given(seed=st.integers(0, 2**32), axis=st.integers(0, 2), n_wrong=st.integers(0, 6))
@settings(max_examples=60, deadline=None)
def test_every_disagreement_is_found_where_it_is(seed, axis, n_wrong):
    rng = np.random.default_rng(seed)
    shape = tuple(int(n) for n in rng.integers(2, 9, 3))
    at = int(rng.integers(1, shape[axis]))
    by_low = rng.integers(-1, 4, shape) * 10
    by_low[by_low < 0] = -1
    by_high = by_low.copy()
    layers = [slice(None)] * 3
    layers[axis] = slice(at - 1, at + 1)
    view = by_high[tuple(layers)]
    for _ in range(n_wrong):
        view[tuple(rng.integers(0, view.shape))] = rng.integers(-1, 3)
    audit = compare(by_low, by_high, axis, at)
    assert audit.voxels_compared == view.size
    wrong = np.argwhere(by_low != by_high)
    assert audit.voxels_disagreeing == len(wrong)
    assert [d["position"] for d in audit.disagreements] == wrong.tolist()
    for d in audit.disagreements:
        for key, seeds in (("seed_low", by_low), ("seed_high", by_high)):
            found = seeds[tuple(d["position"])]
            assert d[key] == (None if found == -1 else found)
    own_low = by_low.take(at - 1, axis)
    own_high = by_high.take(at, axis)
    assert audit.cells_crossing == len(set(own_low.ravel()) & set(own_high.ravel()) - {-1})
    if not len(wrong):
        assert audit.overlaps.shape == (0, 3)
        assert len(resolve_disagreements([audit])) == 0


def test_only_faces_with_a_neighbour_have_beliefs():
    seeds = np.zeros((8, 8, 8), np.int64)
    corner = beliefs_of(seeds, Box((0, 0, 0), (4, 4, 4)))
    assert {name.rsplit("_", 2)[0] for name in corner} == {"z_high", "y_high", "x_high"}
    assert len(beliefs_of(seeds, Box((2, 2, 2), (6, 6, 6)))) == 24
    assert beliefs_of(seeds, Box.whole((8, 8, 8))) == {}


def test_seed_zero_is_a_cell():
    seeds = np.full((4, 4, 4), -1)
    seeds[1:3, 1, 1] = 0
    other = seeds.copy()
    other[2, 1, 1] = -1
    assert compare(seeds, seeds, 0, 2).cells_crossing == 1
    audit = compare(seeds, other, 0, 2)
    assert audit.disagreements == ({"position": [2, 1, 1], "seed_low": 0, "seed_high": None},)


def cube(*cells):
    """Map of seeds with a cell of given seed over given x range, on the two layers of a face at z = 2."""
    seeds = np.full((4, 6, 20), -1)
    for seed, start, stop in cells:
        seeds[1:3, 1:5, start:stop] = seed
    return seeds


def resolved(map_low, map_high):
    return resolve_disagreements([compare(map_low, map_high, 0, 2)]).tolist()


def test_one_cell_with_two_seeds_is_one_cell():
    assert resolved(cube((5, 2, 8)), cube((9, 2, 8))) == [[5, 9]]
    assert resolved(cube((5, 2, 8)), cube((9, 4, 8))) == [[5, 9]]


def test_a_small_overlap_is_not_one_cell():
    assert resolved(cube((5, 2, 8)), cube((9, 6, 12))) == []


def test_cells_that_touch_are_never_joined():
    # both blocks see both cells, and differ by one column of voxels on where one ends
    assert resolved(cube((5, 2, 8), (9, 8, 14)), cube((5, 2, 7), (9, 7, 14))) == []
    assert resolved(cube((5, 2, 8)), cube((9, 8, 14))) == []


def test_a_fused_pair_joins_with_its_better_half_only():
    fused, split = cube((5, 2, 12)), cube((7, 2, 8), (9, 8, 12))
    assert resolved(fused, split) == [[5, 7]]
    assert resolved(split, fused) == [[7, 5]]
    halves_equal = cube((7, 2, 7), (9, 7, 12))
    assert resolved(fused, halves_equal) == [[5, 7]]


def test_overlaps_add_over_faces():
    def audit(*rows):
        return FaceAudit(0, 0, 1, (), np.array(rows, np.int64))

    # on the first face alone 9 is the best of 5, and on the second 7 is: the sum decides
    first, second = audit([5, 9, 6], [5, 7, 1]), audit([5, 7, 20], [5, -1, 2])
    assert resolve_disagreements([first]).tolist() == [[5, 9]]
    for order in ([first, second], [second, first]):
        assert resolve_disagreements(order).tolist() == [[5, 7]]
    assert resolve_disagreements([]).shape == (0, 2)


def test_listing_is_bounded_and_counting_is_not():
    shape = (2, 40, 40)
    audit = compare(np.full(shape, 3), np.full(shape, 4), 0, 1)
    assert audit.voxels_disagreeing == audit.voxels_compared == 3200
    assert len(audit.disagreements) == MOST_LISTED


def test_what_does_not_fit_is_refused():
    seeds = np.zeros((8, 8, 8), np.int64)
    low, high = halves((8, 8, 8), 0, 4)
    a, b = beliefs_of(seeds, low), beliefs_of(seeds, high)
    with pytest.raises(ValueError, match="do not share a face"):
        compare_faces(a, b, axis=1, low=low, high=high, volume_shape=(8, 8, 8))
    with pytest.raises(ValueError, match="no beliefs"):
        compare_faces(a, {}, axis=0, low=low, high=high, volume_shape=(8, 8, 8))
    box = Box.whole((2, 2, 2))
    ones = np.ones(box.shape, np.uint32)
    with pytest.raises(ValueError, match="has no seed"):
        face_beliefs(ones, np.empty(0, np.int64), kept=box, core=Box((0, 0, 0), (1, 2, 2)))
    with pytest.raises(ValueError, match="expected labels"):
        face_beliefs(ones[1:], np.array([1]), kept=box, core=box)
    with pytest.raises(ValueError, match="one voxel more"):
        face_beliefs(np.ones((4, 2, 2), np.uint32), np.array([1]), kept=Box.whole((4, 2, 2)), core=box)


def grid_of(shape, side):
    """Cores in raster order, and every pair of them that shares a face, with the axis."""
    cores = list(Box.whole(shape).tiles(side))
    pairs = []
    for low in cores:
        for axis in range(3):
            start = list(low.start)
            start[axis] = low.stop[axis]
            pairs += [(axis, low, high) for high in cores if list(high.start) == start]
    return cores, pairs


@given(seed=st.integers(0, 2**32), side=st.tuples(*[st.integers(1, 4)] * 3))
@settings(max_examples=60, deadline=None)
def test_anchors_join_components_over_faces_edges_and_corners(seed, side):
    """Labelled block by block over core and margin, joined by faces alone: the components of the whole."""
    rng = np.random.default_rng(seed)
    shape = tuple(int(n) for n in rng.integers(2, 9, 3))
    image = rng.random(shape) < rng.choice([0.1, 0.25, 0.5])
    index = np.arange(image.size).reshape(shape)
    cores, pairs = grid_of(shape, side)
    beliefs, named = {}, np.full(shape, -1)
    for core in cores:
        kept = core.dilate(1).clip(shape)
        labels, n = ndimage.label(image[kept.slices], structure=np.ones((3, 3, 3)))
        seeds = ndimage.minimum(index[kept.slices], labels, range(1, n + 1)).astype(np.int64)
        anchors = labels > 0
        beliefs[core] = face_beliefs(labels.astype(np.uint32), seeds, kept=kept, core=core, anchors=anchors)
        inside = labels[core.slices_in(kept)]
        named[core.slices] = np.concatenate([[-1], seeds])[inside]
    same = [np.empty((0, 2), np.int64)]
    for axis, low, high in pairs:
        found = joined_by_anchors(
            beliefs[low], beliefs[high], axis=axis, low=low, high=high, volume_shape=shape
        )
        assert (found[:, 0] != found[:, 1]).all()
        same.append(found)
    ids, smallest = connected(np.concatenate(same))
    representative = dict(zip(ids.tolist(), smallest.tolist(), strict=True))
    joined = np.vectorize(lambda seed: representative.get(seed, seed))(named)
    whole, n = ndimage.label(image, structure=np.ones((3, 3, 3)))
    first = np.concatenate([[-1], ndimage.minimum(index, whole, range(1, n + 1))])[whole]
    np.testing.assert_array_equal(joined, first)


def test_without_an_anchor_nothing_is_joined():
    labels, core = np.array([[[1, 1]]], np.uint32), Box((0, 0, 0), (1, 1, 1))
    kept, other = Box.whole((1, 1, 2)), Box((0, 0, 1), (1, 1, 2))
    where = {"axis": 2, "low": core, "high": other, "volume_shape": (1, 1, 2)}
    for anchor, expected in ((True, [[4, 9]]), (False, [])):
        low = face_beliefs(labels, np.array([4]), kept=kept, core=core, anchors=np.full(kept.shape, anchor))
        high = face_beliefs(labels, np.array([9]), kept=kept, core=other, anchors=np.ones(kept.shape, bool))
        assert joined_by_anchors(low, high, **where).tolist() == expected
    with pytest.raises(ValueError, match="anchors"):
        face_beliefs(labels, np.array([4]), kept=kept, core=core, anchors=np.ones((1, 1, 1), bool))


def test_margins_are_compared_but_cross_no_face_of_theirs():
    """A cell beside the cores' common face: both blocks see it in their margins, neither has it crossing."""
    seeds = np.full((4, 6, 4), -1)
    seeds[1:3, 3, 1] = 5
    low, high = Box((0, 0, 0), (2, 3, 4)), Box((2, 0, 0), (4, 3, 4))
    where = {"axis": 0, "low": low, "high": high, "volume_shape": seeds.shape}
    other = seeds.copy()
    other[2, 3, 1] = -1
    audit = compare_faces(beliefs_of(seeds, low), beliefs_of(other, high), **where)
    assert (audit.cells_crossing, audit.voxels_compared, audit.voxels_disagreeing) == (0, 2 * 4 * 4, 1)
    assert audit.disagreements == ({"position": [2, 3, 1], "seed_low": 5, "seed_high": None},)
