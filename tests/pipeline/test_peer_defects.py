"""What other tools get wrong at seams, one test each: `label_blocks` must not.

The cells are given as their true labels; each labeller stands for one that is right about every block.
"""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from braincensus import label_blocks, worker
from braincensus.blocks import BlockGrid
from braincensus.blockwise.work import Work
from braincensus.labellers import CellposeLabeller

SHAPE = (12, 12, 24)


def right(block: np.ndarray) -> np.ndarray:
    return block.astype(np.int32)


def ball(volume: np.ndarray, centre: tuple[int, int, int], radius: int, label: int) -> None:
    z, y, x = (np.arange(n) - c for n, c in zip(volume.shape, centre, strict=True))
    volume[z[:, None, None] ** 2 + y[:, None] ** 2 + x**2 <= radius**2] = label


def cells(*centres: tuple[int, int, int], radius: int = 3, shape: tuple[int, int, int] = SHAPE) -> np.ndarray:
    volume = np.zeros(shape, np.uint16)
    for label, centre in enumerate(centres, 1):
        ball(volume, centre, radius, label)
    return volume


def halves(truth: np.ndarray, labeller=right, halo: int = 4):
    """Label in two blocks, with the face at x = 12."""
    return label_blocks(truth, labeller, block_size=12, halo=halo)


def test_cellseg3d_object_across_a_face_counted_twice():
    """CellSeg3D sliding_window: an object across a patch face gets an id from each patch."""
    labels, audit = halves(cells((6, 6, 12)))
    assert audit.cells == 1
    np.testing.assert_array_equal(labels[:], cells((6, 6, 12)))


def test_cellseg3d_ids_reset_after_an_empty_patch():
    """CellSeg3D max_label_id: after an empty patch ids start again, so that 5 objects got 3 ids."""
    truth = cells((3, 3, 3), (3, 3, 19), (3, 3, 27), (3, 3, 43), (3, 3, 51), radius=1, shape=(6, 6, 56))
    labels, audit = label_blocks(
        truth,
        lambda block: np.unique(block, return_inverse=True)[1].reshape(block.shape),
        block_size=8,
        halo=2,
    )
    assert audit.cells == 5
    np.testing.assert_array_equal(labels[:], truth)


def test_cellpose_ids_of_blocks_collide_in_decimal_packing():
    """Cellpose distributed: block 1's label 100001 and block 11's label 1 become the same id."""
    truth = np.zeros((2, 2, 24), np.uint16)
    truth[0, 0, [3, 23]] = 1, 2

    def labeller(block):
        return np.where(block == 1, 100_001, np.where(block == 2, 1, 0))

    labels, audit = label_blocks(truth, labeller, block_size=2, halo=1)  # voxel 3 in block 1, 23 in block 11
    assert audit.blocks == 12
    np.testing.assert_array_equal(labels[:], truth)


def test_cellpose_more_labels_in_a_block_than_its_packing_has_room_for():
    """Cellpose distributed: 99,999 labels a block, and no check."""
    truth = np.arange(1, 60 * 60 * 60 + 1, dtype=np.uint32).reshape(60, 60, 60)
    labels, audit = label_blocks(truth, right, block_size=(60, 60, 50), halo=1)
    assert audit.cells == truth.size
    np.testing.assert_array_equal(labels[:], truth)


@pytest.mark.parametrize("radius", [3, 4, 5])
@pytest.mark.parametrize("shift", [-2, -1, 0, 1, 2])
def test_cellpose_spheres_across_a_face_counted_other_than_once(radius, shift):
    """Cellpose distributed: 83 of 165 spheres of radius 3 that cross a face were not counted once."""
    truth = cells((6, 6, 12 + shift), radius=radius)
    labels, audit = halves(truth)
    assert audit.cells == 1
    np.testing.assert_array_equal(labels[:], truth)


def test_cellpose_spheres_near_the_corner_of_eight_blocks():
    """Cellpose distributed: 96 of 100 spheres of radius 3 near such corners were not counted once."""
    for shift in ((0, 0, 0), (1, -1, 1), (-2, 2, 0), (2, 2, 2), (-3, 0, 1)):
        truth = cells(tuple(8 + n for n in shift), shape=(16, 16, 16))
        labels, audit = label_blocks(truth, right, block_size=8, halo=3)
        assert audit.cells == 1
        np.testing.assert_array_equal(labels[:], truth)


def test_cellpose_and_patchworks_cells_that_abut_across_a_face_merge():
    """Cellpose distributed and patchworks: whatever touches across a face becomes one cell."""
    truth = np.zeros(SHAPE, np.uint16)
    truth[2:10, 2:10, 4:12] = 1
    truth[2:10, 2:10, 12:20] = 2
    for halo in (1, 4):
        labels, audit = halves(truth, halo=halo)
        assert (audit.cells, audit.merges, audit.exact) == (2, 0, True)
        np.testing.assert_array_equal(labels[:], truth)


def test_cellpose_an_empty_volume_or_a_single_block_raises():
    """Cellpose distributed: both raise."""
    for block_size in (12, 24):
        labels, audit = label_blocks(np.zeros(SHAPE, np.uint8), right, block_size=block_size, halo=2)
        assert not labels[:].any()
        assert (audit.cells, audit.exact) == (0, True)
    labels, audit = label_blocks(cells((6, 6, 12)), right, block_size=24, halo=0)
    assert (audit.cells, audit.faces, audit.exact) == (1, 0, True)


def test_cellpose_reloads_its_model_for_every_block(monkeypatch):
    """Cellpose distributed: the model is loaded in each block's task."""
    monkeypatch.setattr(worker, "_kept", {})
    loads = []

    class Model:
        def eval(self, x, **options):
            return (np.rint(x).astype(np.int32),)

    monkeypatch.setattr(CellposeLabeller, "_load", lambda self: loads.append(1) or Model())
    truth = cells((6, 6, 12))
    labels, _ = label_blocks(truth, CellposeLabeller("any", 0, 1, False, {}), block_size=6, halo=4)
    np.testing.assert_array_equal(labels[:], truth)
    assert loads == [1]


def test_cellpose_loads_the_whole_lookup_for_every_block(monkeypatch):
    """Cellpose distributed: each block's task loads the table of all labels of the volume (#1482)."""
    lookups = {}
    lookup_of = Work.lookup_of

    def noted(self, number):
        lookups[number] = lookup_of(self, number)
        return lookups[number]

    monkeypatch.setattr(Work, "lookup_of", noted)
    truth = np.zeros((4, 4, 64), np.uint16)
    truth[1, 1, ::2] = np.arange(1, 33)
    _, audit = label_blocks(truth, right, block_size=(4, 4, 8), halo=1)
    assert audit.cells == 32
    assert [len(lookups[n]) for n in range(8)] == [1 + 4] * 8


def test_smartspim_keeps_a_point_on_the_boundary_in_both_blocks():
    """AIND SmartSPIM: the upper bound is inclusive, so a cell on it belongs to two blocks."""
    for x in (11, 12):
        truth = np.zeros(SHAPE, np.uint16)
        truth[6, 6, x] = 1
        labels, audit = halves(truth)
        assert audit.cells == 1
        np.testing.assert_array_equal(labels[:], truth)


def test_clearmap_changes_a_parameter_that_later_blocks_share():
    """ClearMap 2.1: the first block changes the parameters, and later ones stop filtering duplicates."""

    class Labeller:
        def __init__(self):
            self.options = {"least": 2, "nested": {"fill": True}}

        def __call__(self, block):
            kept = np.bincount(block.ravel()) >= self.options["least"]
            block[:] = np.where(kept[block], block, 0)  # works in place
            return block

    truth = cells((6, 6, 12), (6, 6, 4), radius=2)
    speck = truth.copy()
    speck[0, 0, [2, 21]] = 7, 8
    before = speck.copy()
    labeller = Labeller()
    results = [halves(speck, labeller)[0][:] for _ in range(2)]
    np.testing.assert_array_equal(speck, before)
    assert labeller.options == {"least": 2, "nested": {"fill": True}}
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0] > 0, truth > 0)


@pytest.mark.parametrize("step", [-1, 1])
@pytest.mark.parametrize("x", range(8, 17))
def test_stardist_loses_or_doubles_a_cell_at_a_disagreement_of_one_voxel(step, x):
    """StarDist predict_instances_big: each block keeps the cells whose box it is responsible for."""
    truth = cells((6, 6, x))
    truth[0, 0, 0] = 99  # tells the left block

    def labeller(block):
        if block[0, 0, 0] == 99:
            return np.where(block == 99, 0, right(block))
        return ndimage.shift(right(block), (0, 0, step), order=0)

    labels, audit = halves(truth, labeller, halo=7)  # as wide as a cell is long
    assert audit.cells == 1
    assert audit.unmatched_crossings == 0
    assert abs(np.count_nonzero(labels[:]) - np.count_nonzero(truth == 1)) <= np.pi * 4**2


def test_stardist_one_oversized_object_aborts_all():
    """StarDist predict_instances_big: an object larger than the overlap is an error."""
    truth = cells((3, 3, 3), radius=2, shape=(12, 12, 48))
    truth[8:11, 8:11, :] = 2
    labels, audit = label_blocks(truth, right, block_size=12, halo=2)
    np.testing.assert_array_equal(labels[:], truth)
    assert audit.cells == 2
    assert audit.larger_than_halo == 1
    assert audit.larger_than_halo_zyx == ((8, 8, 0),)


@pytest.mark.parametrize("x", [9, 14])
def test_igneous_removes_a_small_fragment_of_a_large_cell(x):
    """Igneous: dust is removed in each block before stitching, also where it is a cell's last voxels."""
    truth = cells((6, 6, x))
    assert 1 in (np.count_nonzero(truth[:, :, 12:]), np.count_nonzero(truth[:, :, :12]))
    labels, audit = halves(truth)
    np.testing.assert_array_equal(labels[:], truth)
    assert (audit.cells, audit.merges) == (1, 1)


def test_cellfinder_drops_trailing_tiles():
    """Cellfinder: the tiles that the volume cuts are always outside the brain."""
    truth = np.zeros((13, 13, 25), np.uint16)
    truth[12, 12, 24], truth[12, 0, 0], truth[0, 0, 24] = 3, 2, 1
    labels, audit = label_blocks(truth, right, block_size=12, halo=1)
    assert audit.cells == 3
    np.testing.assert_array_equal(labels[:], truth)


def test_block_ids_do_not_wrap_in_a_large_grid():
    """Cellpose distributed: 42,950 blocks fill its uint32 ids; ours are rows of a table."""
    grid = BlockGrid((10_000, 10_000, 10_000), (64, 64, 64), (8, 8, 8))
    assert len(grid) > 42_950
    assert grid[len(grid) - 1].core.stop == (10_000,) * 3
