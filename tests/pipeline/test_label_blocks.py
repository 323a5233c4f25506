"""Any labeller over any blocks: the truth where the labeller is right, and an account of where it is not."""

from __future__ import annotations

import itertools
import json
import tempfile
import threading
from functools import partial
from pathlib import Path

import dask.array
import numpy as np
import pytest
import zarr
from distributed import Client, LocalCluster
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from skimage.measure import label as label_parts

import braincensus
from braincensus import BlockError, ConfigError, InputError, OutputError, blockwise, label_blocks
from braincensus.blocks import BlockGrid
from braincensus.blockwise import LabelBlocksAudit, label, match, relabel
from braincensus.blockwise.audit import MOST_LISTED, Disagreement
from braincensus.blockwise.spec import for_workers
from braincensus.tasks import map_blocks

CUBE = np.ones((3, 3, 3), bool)


def perfect(block: np.ndarray) -> np.ndarray:
    """Number the true cells of a block anew, in an order of the block's own."""
    cells = np.unique(block[block > 0])
    lookup = np.zeros(int(block.max(initial=0)) + 1, np.int64)
    lookup[cells] = np.random.default_rng(int(block.astype(np.int64).sum())).permutation(len(cells)) + 1
    return lookup[block]


def in_order(truth: np.ndarray) -> np.ndarray:
    """Number the true cells by their first voxels."""
    cells, first, which = np.unique(truth, return_index=True, return_inverse=True)
    numbers = np.zeros(len(cells), np.int64)
    numbers[np.argsort(np.where(cells == 0, -1, first))] = np.arange(len(cells)) + (0 not in cells)
    return numbers[which].reshape(truth.shape)


def ball(radius: int) -> np.ndarray:
    at = np.arange(-radius, radius + 1) ** 2
    return at[:, None, None] + at[:, None] + at <= radius**2


def spheres(shape, radius: int, wanted: int, seed: int, allowed: np.ndarray | None = None) -> np.ndarray:
    """Place spheres at random where they share no voxel; they may touch, and reach out of the volume."""
    rng, r, shape = np.random.default_rng(seed), radius, np.asarray(shape)
    clash = ndimage.binary_dilation(np.pad(ball(r), r), ball(r))
    free, labels = np.ones(shape + 4 * r, bool), np.zeros(shape + 2 * r, np.uint32)
    centres = np.flatnonzero(np.ones(shape, bool) if allowed is None else allowed)
    centres = np.stack(np.unravel_index(rng.permutation(centres), shape), axis=1)
    placed = 0
    for part in np.array_split(centres, len(centres) // 20_000 + 1):
        for z, y, x in part[free[tuple((part + 2 * r).T)]].tolist():
            if free[z + 2 * r, y + 2 * r, x + 2 * r]:
                free[z : z + 4 * r + 1, y : y + 4 * r + 1, x : x + 4 * r + 1] &= ~clash
                placed += 1
                box = labels[z : z + 2 * r + 1, y : y + 2 * r + 1, x : x + 2 * r + 1]
                box[ball(r)] = placed
                if placed == wanted:
                    return labels[r:-r, r:-r, r:-r]
    raise AssertionError(f"only {placed} of {wanted} spheres found room")


def joined_by_touch(truth: np.ndarray, side: int) -> np.ndarray:
    """Label blocks perfectly, then join whatever touches across a face: what others do."""
    parts = np.zeros(truth.shape, np.int64)
    blocks = [np.arange(n) // side for n in truth.shape]
    block = (blocks[0][:, None, None] * 1000 + blocks[1][:, None]) * 1000 + blocks[2]
    foreground = truth > 0
    keys, which = np.unique(
        truth[foreground].astype(np.int64) * 10**9 + block[foreground], return_inverse=True
    )
    parts[foreground] = which + 1
    pairs = []
    for axis in range(3):
        for at in range(side, truth.shape[axis], side):
            low, high = parts.take(at - 1, axis), parts.take(at, axis)
            touching = (low > 0) & (high > 0)
            pairs.append(np.stack([low[touching], high[touching]], axis=1))
    graph = np.concatenate(pairs)
    home = np.arange(len(keys) + 1)
    while True:
        lower = np.minimum(home[graph[:, 0]], home[graph[:, 1]])
        before = home.copy()
        np.minimum.at(home, graph[:, 0], lower)
        np.minimum.at(home, graph[:, 1], lower)
        home = home[home]
        if (home == before).all():
            return home[parts]


def errors(found: np.ndarray, truth: np.ndarray, side: int) -> tuple[int, int]:
    """Count true cells that no found one equals, those at seams and those inside blocks."""
    pairs = np.stack(np.divmod(np.unique(truth.ravel().astype(np.int64) * 2**32 + found.ravel()), 2**32))
    pairs = pairs[:, pairs.any(axis=0)].astype(np.int64)
    times_true, times_found = (np.bincount(row) for row in pairs)
    wrong = (times_true[pairs[0]] > 1) | (times_found[pairs[1]] > 1) | (pairs == 0).any(axis=0)
    wrong = np.setdiff1d(pairs[0][wrong], 0)
    at_seam = set()
    for axis in range(3):
        for at in range(side, truth.shape[axis], side):
            at_seam |= set(np.unique(truth.take([at - 1, at], axis)).tolist())
    crossing = sum(cell in at_seam for cell in wrong.tolist())
    return crossing, len(wrong) - crossing


# The dense-tissue test ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("radius", "n_cells"), [(3, 6000), (4, 3000), (5, 1600)])
def test_dense_tissue_is_exact_where_joining_by_touch_fuses_cells(radius, n_cells):
    truth = spheres((128, 128, 128), radius, n_cells, seed=1)
    labels, audit = label_blocks(truth, perfect, block_size=64, halo=radius)
    at_seams, inside = errors(labels[:], truth, 64)
    assert (at_seams, inside) == (0, 0)
    np.testing.assert_array_equal(labels[:], in_order(truth))
    assert audit.cells == n_cells
    assert audit.exact
    assert (audit.conflicts, audit.unmatched_crossings, audit.blocks, audit.faces) == (0, 0, 8, 12)
    assert audit.block_pairs == 12 + 12 + 4
    assert abs(audit.density_check.z_score) < 4

    by_touch = joined_by_touch(truth, 64)
    at_seams, inside = errors(by_touch, truth, 64)
    assert len(np.unique(by_touch)) - 1 < n_cells
    assert at_seams > 20
    assert inside < at_seams


@pytest.mark.parametrize(("radius", "n_cells"), [(3, 165), (4, 186), (5, 178)])
def test_spheres_across_a_face_are_counted_once(radius, n_cells):
    beside = np.zeros((128, 160, 160), bool)
    beside[64 - radius + 1 : 64 + radius - 1] = True
    truth = spheres(beside.shape, radius, n_cells, seed=2, allowed=beside)
    labels, audit = label_blocks(truth, perfect, block_size=(64, 160, 160), halo=2)
    np.testing.assert_array_equal(labels[:], in_order(truth))
    assert audit.cells == audit.crossings == n_cells


def test_spheres_near_corners_of_eight_blocks_are_counted_once():
    for seed in range(3):  # 20 spheres near 8 corners, each time
        near = np.zeros((60, 60, 60), bool)
        for corner in itertools.product((20, 40), repeat=3):
            near[tuple(slice(at - 5, at + 5) for at in corner)] = True
        truth = spheres(near.shape, 3, 20, seed=seed, allowed=near)
        labels, audit = label_blocks(truth, perfect, block_size=20, halo=2)
        np.testing.assert_array_equal(labels[:], in_order(truth))
        assert audit.exact


@pytest.mark.parametrize("offset", [(0, 0, 1), (0, 1, 1), (1, 1, 1), (0, 1, -1), (1, -1, 1), (1, -1, -1)])
def test_a_cell_that_crosses_only_an_edge_or_a_corner_is_one(offset):
    truth = np.zeros((8, 8, 8), np.uint8)
    start = np.where(np.array(offset) < 0, 4, 3)
    truth[tuple(start)] = truth[tuple(start + offset)] = 1
    labels, audit = label_blocks(truth, perfect, block_size=4, halo=1)
    np.testing.assert_array_equal(labels[:], truth)
    assert (audit.cells, audit.merges) == (1, 1)


# One answer, whatever the blocks ------------------------------------------------------------------------


@st.composite
def tissues(draw):
    """Connected cells that fill most of a small volume, touching everywhere."""
    shape = tuple(draw(st.tuples(*[st.integers(1, 10)] * 3)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    coarse = rng.integers(0, draw(st.integers(2, 6)), shape)
    coarse = ndimage.zoom(coarse, draw(st.sampled_from([1, 2])), order=0)[tuple(map(slice, shape))]
    truth = np.zeros(shape, np.uint16)
    for value in range(1, int(coarse.max()) + 1):
        parts, _ = ndimage.label(coarse == value, CUBE)
        truth[parts > 0] = parts[parts > 0] + truth.max()
    return truth


def shuffled_and_repeated(seed: int):
    """Tasks in any order, some of them again."""

    def run(function, spec, numbers, **options):
        order = np.random.default_rng(seed).permutation(
            np.repeat(list(numbers), 2)[: len(numbers) * 3 // 2 + 1]
        )
        done = dict(map_blocks(function, spec, [*order.tolist(), *numbers], **options))
        yield from ((int(n), done[n]) for n in np.random.default_rng(seed).permutation(list(numbers)))

    return run


@given(
    tissues(),
    st.tuples(*[st.integers(3, 8)] * 3),
    st.tuples(*[st.integers(1, 9)] * 3),
    st.integers(0, 2**32),
)
@settings(max_examples=20)
def test_any_blocks_halo_and_order_give_the_truth(truth, block_size, halo, seed):
    with pytest.MonkeyPatch.context() as patch:
        for step in (label, match, relabel):
            patch.setattr(step, "map_blocks", shuffled_and_repeated(seed))
        labels, audit = label_blocks(truth, perfect, block_size=block_size, halo=halo)
    np.testing.assert_array_equal(labels[:], in_order(truth))
    assert audit.exact
    assert (audit.unmatched_crossings, audit.conflicts) == (0, 0)


def test_trailing_slabs_of_one_voxel_and_a_halo_wider_than_a_block():
    truth = spheres((9, 17, 17), 3, 8, seed=5)
    for block_size, halo in ((16, 1), ((4, 5, 17), 8), ((9, 1, 17), 3), (100, 0), ((9, 17, 4), (0, 0, 1))):
        labels, audit = label_blocks(truth, perfect, block_size=block_size, halo=halo)
        np.testing.assert_array_equal(labels[:], in_order(truth))
        assert audit.exact


@pytest.mark.parametrize("kind", ["zarr", "dask", "list of planes"])
def test_any_array_will_do(kind, tmp_path):
    truth = spheres((20, 20, 20), 3, 15, seed=6)

    class Planes:
        shape, dtype = truth.shape, truth.dtype

        def __getitem__(self, index):
            return truth[index].tolist()

    volume = {
        "zarr": lambda: zarr.create_array(tmp_path / "v.zarr", data=truth, chunks=(8, 8, 8)),
        "dask": lambda: dask.array.from_array(truth, chunks=7),
        "list of planes": Planes,
    }[kind]()
    labels, _ = label_blocks(volume, perfect, block_size=9, halo=2)
    np.testing.assert_array_equal(labels[:], in_order(truth))


# Labellers that are not perfect -------------------------------------------------------------------------


def on_left(block: np.ndarray) -> bool:
    """Whether this is the left of the two blocks of `bars` (its halo ends where the right core goes on)."""
    return bool((block[:, :, 0] == 9).all())


def bars(*rows: slice) -> np.ndarray:
    """Cells along x, across the face at 10 between two blocks of 10; the left border is marked by 9."""
    volume = np.zeros((3, 12, 20), np.uint8)
    for n, row in enumerate(rows, 1):
        volume[1, row, 5:15] = n
    volume[:, :, 0] = 9
    return volume


def label_bars(volume, left, right, **options):
    """Label with one function in the left block and another in the right one."""

    def labeller(block):
        cells = np.where(block == 9, 0, block).astype(np.int32)
        return left(cells) if on_left(block) else right(cells)

    return label_blocks(volume, labeller, block_size=(3, 12, 10), halo=(1, 1, 4), **options)


def same(cells):
    return cells


def one_voxel_larger(cells):
    return np.where(cells == 0, np.roll(cells, 1, axis=1), cells)


def test_a_cell_seen_one_voxel_larger_is_one_and_the_difference_is_listed():
    labels, audit = label_bars(bars(slice(3, 6)), same, one_voxel_larger)
    assert audit.cells == audit.merges == audit.crossings == 1
    assert not audit.exact
    assert audit.disagreeing_voxels == 2
    assert audit.disagreements == (
        Disagreement((1, 6, 9), (0, 1), (0, 1)),
        Disagreement((1, 6, 10), (0, 1), (0, 1)),
    )
    assert (labels[1, 6, 5:15] == [0] * 5 + [1] * 5).all()


def test_a_cell_seen_shifted_is_one():
    _, audit = label_bars(bars(slice(3, 7)), same, partial(np.roll, shift=1, axis=1))
    assert (audit.cells, audit.disagreeing_voxels, audit.unmatched_crossings) == (1, 4, 0)


def split(cells):
    return np.where((cells > 0) & (np.arange(12)[:, None] < 5), cells + 100, cells)


def test_a_cell_split_on_one_side_is_listed():
    labels, audit = label_bars(bars(slice(3, 9)), same, split)
    assert (audit.cells, audit.merges, audit.crossings, audit.unmatched_crossings) == (2, 1, 1, 1)
    (lost,) = audit.unmatched
    assert (lost.zyx, lost.label, lost.blocks) == ((1, 3, 10), 2, (1, 0))
    assert labels[lost.zyx] == 2
    assert audit.disagreeing_voxels == 4
    assert {place.labels for place in audit.disagreements} == {(1, 2)}


def test_a_part_that_only_one_halo_shows_has_no_label():
    def ghost(cells):
        cells = cells.copy()
        cells[1, 1, :4] = 77  # the right block's halo
        return cells

    _, audit = label_bars(bars(slice(3, 6)), same, ghost)
    assert [place.labels for place in audit.disagreements] == [(0, None)]
    assert audit.cells == 1


def test_the_thresholds_are_the_callers():
    def thin(cells):
        return np.where(np.arange(12)[:, None] == 3, cells, 0)

    assert label_bars(bars(slice(3, 9)), same, thin)[1].cells == 1  # a sixth, contained
    volume = bars(slice(3, 9))
    shifted = partial(np.roll, shift=2, axis=1)
    assert label_bars(volume, same, shifted)[1].cells == 1
    assert label_bars(volume, same, shifted, min_iou=0.6)[1].cells == 2


def test_a_chain_that_would_fuse_two_cells_of_a_block_is_a_conflict():
    # A ring around the edge of four blocks, open in the first one, which cannot see that its ends meet.
    ring = np.zeros((1, 8, 8), np.uint8)
    ring[0, 1, 3:7] = ring[0, 1:7, 6] = ring[0, 6, 1:7] = ring[0, 3:7, 1] = 1
    labels, audit = label_blocks(ring, label_parts, block_size=(1, 4, 4), halo=(0, 2, 2))
    assert (audit.cells, audit.conflicts, audit.merges) == (2, 1, 3)
    assert labels[0, 1, 3] != labels[0, 3, 1]
    assert not audit.exact
    assert audit.unmatched_crossings == 2  # either side of the refused match
    assert (
        audit.disagreeing_voxels
        == 2
        == sum(place.labels in ((1, 2), (2, 1)) for place in audit.disagreements)
    )
    again, _ = label_blocks(ring, label_parts, block_size=(1, 4, 4), halo=(0, 2, 2))
    np.testing.assert_array_equal(again[:], labels[:])


def test_an_object_across_all_blocks_is_one_cell_and_told():
    truth = spheres((24, 24, 24), 2, 30, seed=8)
    truth[12] = truth[:, 12] = truth[:, :, 12] = 999
    truth = in_order(truth).astype(np.uint16)
    whole = truth[12, 0, 0]
    labels, audit = label_blocks(truth, perfect, block_size=8, halo=2)
    assert audit.exact
    assert len(np.unique(labels[:][truth == whole])) == 1
    assert audit.larger_than_halo >= 1
    assert (0, 0, 12) in audit.larger_than_halo_zyx


def test_lists_end_and_counts_do_not():
    # Each block numbers its voxels one by one, but for the left ones, which see nothing.
    volume = np.ones((60, 60, 4), np.uint8)
    volume[:, :, 0] = 9

    def labeller(block):
        return (
            np.zeros(block.shape, int)
            if on_left(block)
            else np.arange(1, block.size + 1).reshape(block.shape)
        )

    _, audit = label_blocks(volume, labeller, block_size=(60, 60, 2), halo=1)
    assert audit.disagreeing_voxels == 2 * 60 * 60
    assert len(audit.disagreements) == MOST_LISTED
    assert audit.disagreements[0].zyx == (0, 0, 1)


# Where it is written, and what is refused ---------------------------------------------------------------


def test_the_output_is_a_zarr_array_and_says_how_it_was_made(tmp_path):
    truth = spheres((20, 20, 20), 3, 15, seed=6)
    place = tmp_path / "new" / "labels.zarr"
    labels, audit = label_blocks(truth, perfect, block_size=10, halo=3, output=place)
    opened = zarr.open_array(place, mode="r", zarr_format=3)
    np.testing.assert_array_equal(opened[:], labels[:])
    assert opened.dtype == np.uint32
    told = opened.attrs["braincensus"]["label_blocks"]
    assert told["halo_voxels"] == [3, 3, 3]
    assert told["audit"]["cells"] == audit.cells == 15
    assert [path.name for path in place.parent.iterdir()] == ["labels.zarr"]


def test_an_output_that_exists_is_refused_and_left_alone(tmp_path):
    place = tmp_path / "mine.txt"
    place.write_text("mine")
    with pytest.raises(OutputError, match="exists"):
        label_blocks(np.zeros((4, 4, 4), int), perfect, block_size=4, halo=0, output=place)
    assert place.read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_labeller_that_fails_names_block_and_voxels_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def labeller(block):
        if block[0, 0, 0] == 7:
            raise ZeroDivisionError("no cells")
        return block

    volume = np.zeros((4, 4, 8), np.uint8)
    volume[:, :, 3] = 7
    for output in (None, tmp_path / "out.zarr"):
        with pytest.raises(BlockError, match=r"block 1, voxels 0:4, 0:4, 3:8") as caught:
            label_blocks(volume, labeller, block_size=4, halo=1, output=output)
        assert "ZeroDivisionError: no cells" in str(caught.value)
        assert "while: label, block 1" in str(caught.value)
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("labeller", "words"),
    [
        (lambda block: block[:, :, 1:], r"found: uint8 \(4, 4, 4\)"),
        (lambda block: block > 0, "found: bool"),
        (lambda block: block * 0.5, "probabilities"),
        (lambda block: block.astype(int) - 1, "label -1"),
        (lambda block: (block, 3), "tuple of length 2"),
        (lambda block: None, "found: object"),
    ],
)
def test_what_is_no_label_image_is_refused(labeller, words):
    with pytest.raises(ConfigError, match=words) as caught:
        label_blocks(np.zeros((4, 4, 8), np.uint8), labeller, block_size=4, halo=1)
    for part in ("block 0", "0:4, 0:4, 0:5", "expected", "likely cause", "remedy"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"halo": 0}, ConfigError, "halo of 0 along x"),
        ({"halo": (0, 0, 0)}, ConfigError, "share no voxel"),
        ({"halo": -1}, ConfigError, "halo"),
        ({"halo": 1.5}, ConfigError, "halo"),
        ({"block_size": 0}, ConfigError, "block_size"),
        ({"block_size": True}, ConfigError, "block_size"),
        ({"block_size": (4, 4)}, ConfigError, "block_size"),
        ({"labeller": "cellpose"}, ConfigError, "labeller"),
        ({"min_iou": 0}, ConfigError, "min_iou"),
        ({"min_containment": 1.1}, ConfigError, "min_containment"),
        ({"volume": np.zeros((2, 4, 4, 8))}, InputError, "three axes"),
        ({"volume": [[[1]]]}, InputError, "list without shape"),
        ({"volume": np.zeros((0, 4, 8))}, InputError, "no voxels"),
    ],
)
def test_arguments_that_cannot_be_used_are_refused(change, error, words):
    options = {"volume": np.zeros((4, 4, 8), int), "labeller": perfect, "block_size": 4, "halo": 1} | change
    with pytest.raises(error, match=words):
        label_blocks(options.pop("volume"), options.pop("labeller"), **options)


def test_the_volume_is_not_the_labellers_to_change():
    truth = spheres((12, 12, 12), 2, 10, seed=9)
    before = truth.copy()

    def labeller(block):
        labels = perfect(block)
        block[:] = 0
        return labels

    labels, _ = label_blocks(truth, labeller, block_size=6, halo=2)
    np.testing.assert_array_equal(truth, before)
    np.testing.assert_array_equal(labels[:], in_order(truth))


def test_a_summary_is_json_and_the_name_is_exported():
    _, audit = label_bars(bars(slice(3, 9)), same, split)
    told = json.loads(json.dumps(audit.summary()))
    assert told["exact"] is False
    assert told["unmatched"][0]["zyx"] == [1, 3, 10]
    assert braincensus.label_blocks is blockwise.label_blocks
    assert isinstance(audit, LabelBlocksAudit)
    assert "label_blocks" in dir(braincensus)


# On a cluster -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def client():
    with (
        LocalCluster(
            n_workers=2, threads_per_worker=1, dashboard_address="127.0.0.1:0", memory_limit="2GiB"
        ) as cluster,
        Client(cluster) as client,
    ):
        yield client


def test_a_cluster_gives_the_same(client, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    truth = spheres((40, 40, 40), 3, 120, seed=7)
    labeller = partial(label_parts, connectivity=3)  # of a module that workers can import
    alone, _ = label_blocks(truth, labeller, block_size=20, halo=6)
    np.testing.assert_array_equal(alone[:], in_order(truth))
    stored = zarr.create_array(tmp_path / "in.zarr", data=truth, chunks=(16, 16, 16))
    for volume in (truth, stored, dask.array.from_array(truth, chunks=20)):
        together, audit = label_blocks(volume, labeller, block_size=20, halo=6, client=client)
        np.testing.assert_array_equal(together[:], alone[:])
        assert audit.exact
    assert [path.name for path in tmp_path.iterdir()] == ["in.zarr"]


def test_a_cluster_that_fails_leaves_nothing(client, tmp_path):
    for labeller, words in (
        (partial(np.add, 0.5), "probabilities"),
        (partial(np.reshape, shape=(3, 3)), "cannot reshape"),
    ):
        with pytest.raises(braincensus.BraincensusError, match=words):
            label_blocks(
                np.zeros((8, 8, 8), int), labeller, block_size=4, halo=1, client=client, output=tmp_path / "o"
            )
        assert list(tmp_path.iterdir()) == []


def test_a_labeller_that_cannot_travel_is_refused(client):
    lock = threading.Lock()

    def labeller(block):
        with lock:
            return block

    with pytest.raises(ConfigError, match="cannot be sent"):
        label_blocks(np.zeros((4, 4, 4), int), labeller, block_size=4, halo=0, client=client)


def test_a_small_handle_travels_and_voxels_do_not(tmp_path):
    truth = np.random.default_rng(0).integers(0, 60000, (128, 128, 128)).astype(">u2")
    grid = BlockGrid(truth.shape, (64, 64, 64), (2, 2, 2))
    stored = zarr.create_array(tmp_path / "in.zarr", data=truth, chunks=(64, 64, 64))
    assert for_workers(stored, tmp_path, grid) is stored
    for n, volume in enumerate([truth, zarr.create_array({}, data=truth), dask.array.from_array(truth)]):
        (tmp_path / str(n)).mkdir()
        copy = for_workers(volume, tmp_path / str(n), grid)
        assert Path(tmp_path / str(n) / "input" / "zarr.json").exists()
        np.testing.assert_array_equal(copy[:], truth)
