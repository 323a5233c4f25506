"""Watershed: scikit-image's labels where nothing ties, and the same labels for any blocks."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from skimage.measure import label as skimage_label
from skimage.morphology import remove_small_objects
from skimage.segmentation import watershed as skimage_watershed

import braincensus_kernels
from braincensus_kernels import distance as distance_module
from braincensus_kernels import filters
from braincensus_kernels.backend import cuda_available
from braincensus_kernels.boxes import Box
from braincensus_kernels.distance import squared_distance
from braincensus_kernels.watershed import (
    _depth,
    depth_generic,
    distance_reach_voxels,
    distance_watershed,
    label_distance_watershed,
    label_watershed,
    reach_voxels,
    watershed,
)

TOP = 65535
needs_gpu = pytest.mark.skipif(not cuda_available(), reason="needs an NVIDIA GPU with CuPy")


def assert_equal_up_to_numbering(labels, expected):
    np.testing.assert_array_equal(labels > 0, expected > 0)
    pairs = np.unique(labels.ravel().astype(np.int64) << 32 | expected.ravel().astype(np.int64))
    assert len(np.unique(pairs >> 32)) == len(np.unique(pairs & 0xFFFFFFFF)) == len(pairs)


def by_threshold(image, outer, core, **how):
    return label_watershed(image[outer.slices], outer=outer, core=core, volume_shape=image.shape, **how)


def by_distance(image, outer, core, **how):
    return label_distance_watershed(
        image[outer.slices], outer=outer, core=core, volume_shape=image.shape, **how
    )


def least_reach(how):
    """The halo below which a block is refused."""
    steps = {"max_steps": how["max_steps"], "context": 1}
    if "limit" not in how:
        return reach_voxels(how["sigma"], min_seed_voxels=how["min_seed_voxels"], **steps)
    of_distance = {name: how[name] for name in ("seed_sigma", "spacing", "limit")}
    return distance_reach_voxels(how["sigma"], **of_distance, **steps)


def label_by_blocks(image, block, **how):
    """Label each block with the least halo that is allowed, more where it says that it needs more."""
    label = by_distance if "limit" in how else by_threshold
    reach = least_reach(how)
    for core in Box.whole(image.shape).tiles(block):
        margin = reach
        while True:
            outer = core.dilate(margin).clip(image.shape)
            result = label(image, outer, core, **how)
            if result.complete:
                break
            assert outer != Box.whole(image.shape), "nothing is unknown in the whole volume"
            margin = tuple(m + 4 for m in margin)
        yield core, result


def assert_blocks_equal_the_whole(stitch, image, block, **how):
    """Every voxel that a block gives back, its core's neighbours included; and every count."""
    label, single_shot = (by_distance, distance_watershed) if "limit" in how else (by_threshold, watershed)
    box = Box.whole(image.shape)
    whole = label(image, box, box, **how)
    options = {name: value for name, value in how.items() if name != "max_steps"}
    single = single_shot(image, **options, max_radius=how["max_steps"])
    assert single.dtype == np.uint32
    np.testing.assert_array_equal(single, whole.labels)
    results = list(label_by_blocks(image, block, **how))
    for core, result in results:
        assert result.kept == core.dilate(1).clip(image.shape)
        assert result.labels.dtype == np.uint32
        present = np.unique(result.labels[result.labels > 0])
        assert present.tolist() == list(range(1, len(result.seeds) + 1))
        assert (np.diff(result.seeds) > 0).all()
        assert np.isin(result.unanchored, result.seeds).all()
    identity = np.concatenate(([-1], whole.seeds))[whole.labels]
    np.testing.assert_array_equal(stitch(results, image.shape), identity)
    blocks = [result for _, result in results]
    assert max(r.growth_steps for r in blocks) == whole.growth_steps
    assert sum(r.foreground_voxels for r in blocks) == whole.foreground_voxels
    assert sum(r.unreached_voxels for r in blocks) == whole.unreached_voxels
    assert any(r.stopped_by_bound for r in blocks) == whole.stopped_by_bound


@st.composite
def volumes(draw):
    """Noise, blobs, quantised and saturated values, flat volumes, with slabs of nothing."""
    shape = tuple(draw(st.integers(1, 20)) for _ in range(3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    image = rng.random(shape)
    if draw(st.booleans()):
        image = ndimage.gaussian_filter(image, draw(st.sampled_from([0.7, 1.5, 3])))
        image = (image - image.min()) / max(float(np.ptp(image)), 1e-9)
    kind = draw(st.sampled_from(["plain", "levels", "saturated", "binary", "flat"]))
    if kind == "levels":
        image = np.round(image * 4) / 4
    elif kind == "saturated":
        image = np.clip(image * 6 - 2, 0, 1)
    elif kind == "binary":
        image = (image > draw(st.sampled_from([0.2, 0.5, 0.8]))).astype(float)
    elif kind == "flat":
        image[:] = draw(st.sampled_from([0.0, 1.0]))
    axis = draw(st.integers(0, 2))
    if draw(st.booleans()):
        np.moveaxis(image, axis, 0)[shape[axis] // 2 :] = draw(st.sampled_from([0.0, 1.0]))
    return np.round(image * TOP).astype(np.uint16)


SIGMA = st.sampled_from([0.0, 0.3, 0.5, 0.65])
SIGMAS = st.one_of(SIGMA, st.tuples(SIGMA, SIGMA, SIGMA))
BLOCKS = st.tuples(*[st.integers(1, 20)] * 3)
STEPS = st.sampled_from([0, 1, 2, 3, 6, 11])


def at_most_three(block, shape):
    return tuple(max(b, -(-n // 3)) for b, n in zip(block, shape, strict=True))


@settings(max_examples=120)
@given(
    volumes(),
    BLOCKS,
    SIGMAS,
    st.sampled_from([(0.0, 0.0), (0.3, 0.6), (0.3, 0.9), (0.5, 0.55), (0.6, 0.8)]),
    st.sampled_from([1, 2, 3, 5]),
    STEPS,
)
def test_blocks_with_seeds_by_threshold_equal_the_whole(
    stitch, image, block, sigma, thresholds, min_seed_voxels, max_steps
):
    """Blocks of any size, down to less than the halo, with last ones as thin as one voxel."""
    assert_blocks_equal_the_whole(
        stitch,
        image,
        at_most_three(block, image.shape),
        sigma=sigma,
        threshold=thresholds[0] * TOP,
        seed_threshold=thresholds[1] * TOP,
        min_seed_voxels=min_seed_voxels,
        max_steps=max_steps,
    )


@settings(max_examples=100)
@given(
    volumes(),
    BLOCKS,
    SIGMAS,
    SIGMAS,
    st.sampled_from([0.0, 0.3, 0.6]),
    st.sampled_from([((1, 1, 1), 1), ((1, 1, 1), 3), ((2, 1, 1), 5), ((5000, 5260, 5260), 16_000)]),
    STEPS,
)
def test_blocks_with_seeds_by_distance_equal_the_whole(
    stitch, image, block, sigma, seed_sigma, threshold, lengths, max_steps
):
    assert_blocks_equal_the_whole(
        stitch,
        image,
        at_most_three(block, image.shape),
        sigma=sigma,
        threshold=threshold * TOP,
        seed_sigma=seed_sigma,
        spacing=lengths[0],
        limit=lengths[1],
        max_steps=max_steps,
    )


def noise(seed, shape):
    return np.round(np.random.default_rng(seed).random(shape) * TOP).astype(np.uint16)


BY_THRESHOLD = {
    "sigma": 0,
    "threshold": 0.3 * TOP,
    "seed_threshold": 0.9 * TOP,
    "min_seed_voxels": 3,
    "max_steps": 4,
}
BY_DISTANCE = {
    "sigma": 0,
    "threshold": 0.5 * TOP,
    "seed_sigma": 0.5,
    "spacing": (1, 1, 1),
    "limit": 4,
    "max_steps": 4,
}


@pytest.mark.parametrize("how", [BY_THRESHOLD, BY_DISTANCE], ids=["threshold", "distance"])
@pytest.mark.parametrize(
    ("shape", "block"),
    [((33, 17, 17), (8, 16, 16)), ((9, 33, 33), (4, 16, 8)), ((25, 25, 25), (12, 12, 12))],
)
def test_thin_last_blocks_equal_the_whole(stitch, shape, block, how):
    assert_blocks_equal_the_whole(stitch, noise(3, shape), block, **(how | {"sigma": (0.3, 0.5, 0.3)}))


def bar(shape, *where):
    image = np.zeros(shape, np.uint16)
    for part in where:
        image[part] = TOP
    return image


def test_a_bar_through_many_blocks_is_one_cell(stitch):
    """Its seed is as long as itself: much longer than any halo."""
    image = bar((96, 12, 12), np.s_[3:93, 4:8, 4:8])
    image[1:95, 3:9, 3:9] = np.maximum(image[1:95, 3:9, 3:9], TOP // 2)
    results = list(label_by_blocks(image, (8, 12, 12), **BY_THRESHOLD))
    assert len(results) == 12
    assert len({int(r.seeds[0]) for _, r in results}) > 6  # most blocks know it by a voxel of their own
    identities = np.unique(stitch(results, image.shape))
    assert identities.tolist() == [-1, (3 * 12 + 4) * 12 + 4]
    assert_blocks_equal_the_whole(stitch, image, (8, 12, 12), **BY_THRESHOLD)


def test_a_cell_whose_seed_is_elsewhere_is_unanchored_where_its_seed_is_seen_in_part(stitch):
    """A long seed beside a block that holds only the slope of its cell."""
    image = bar((60, 24, 24), np.s_[2:58, 10, 10])
    image[2:58, 10, 11:14] = [TOP // 2, TOP // 2 - 9, TOP // 2 - 19]
    how = BY_THRESHOLD | {"max_steps": 3}
    results = dict(label_by_blocks(image, (12, 24, 12), **how))
    aside = [r for core, r in results.items() if core.start[2] == 12]
    assert sum(len(r.unanchored) for r in aside) == len(aside) == 5
    assert all(not r.anchors.any() for r in aside)
    assert not any(len(r.unanchored) for core, r in results.items() if core.start[2] == 0)
    assert_blocks_equal_the_whole(stitch, image, (12, 24, 12), **how)


def test_what_comes_from_outside_is_detected():
    """A long plateau between two seeds: a block at the one cannot know where the other's water arrives."""
    image = bar((1, 1, 80), np.s_[0, 0, 20:23], np.s_[0, 0, 50:53])
    image[0, 0, 20:53] = np.maximum(image[0, 0, 20:53], TOP // 2)
    how = BY_THRESHOLD | {"max_steps": 20}
    core = Box((0, 0, 25), (1, 1, 35))
    least = reach_voxels(0, min_seed_voxels=3, max_steps=20, context=1)
    outer = core.dilate(least).clip(image.shape)
    incomplete = by_threshold(image, outer, core, **how)
    assert not incomplete.complete
    assert not incomplete.labels.any()  # neither seed is in the box of the flood
    outer = core.dilate(least[0] + 3).clip(image.shape)
    incomplete = by_threshold(image, outer, core, **how)
    assert not incomplete.complete
    assert (incomplete.labels == 1).all()  # labels all the same, from the one seed that is
    outer = core.dilate(reach_voxels(0, min_seed_voxels=3, max_steps=20)).clip(image.shape)
    assert by_threshold(image, outer, core, **how).complete


def test_a_small_seed_seen_in_part_is_not_taken_for_none():
    """Of the second seed's three voxels the block sees two; its water comes as far as the block's own."""
    image = bar((1, 1, 60), np.s_[0, 0, 15:18], np.s_[0, 0, 26:29])
    image[0, 0, 18:26] = [TOP * 2 // 5, *[TOP // 2] * 7]
    box, core = Box.whole(image.shape), Box((0, 0, 11), (1, 1, 20))
    whole = by_threshold(image, box, box, **BY_THRESHOLD)
    assert whole.labels[0, 0, 18:21].tolist() == [1, 2, 2]
    outer = core.dilate(least_reach(BY_THRESHOLD)).clip(image.shape)
    assert outer.stop[2] == 28
    assert not by_threshold(image, outer, core, **BY_THRESHOLD).complete
    outer = core.dilate(reach_voxels(0, min_seed_voxels=3, max_steps=4, context=8)).clip(image.shape)
    found = by_threshold(image, outer, core, **BY_THRESHOLD)
    assert found.complete
    assert found.labels[0, 0, 8:11].tolist() == [1, 2, 2]


def test_a_flat_depth_that_leaves_is_detected():
    """A block thicker than twice the limit is flat inside: its one seed may be anywhere."""
    image = bar((60, 12, 12), np.s_[5:, 1:11, 1:11])
    how = BY_DISTANCE | {"limit": 3, "max_steps": 6}
    complete = {}
    for core in Box.whole(image.shape).tiles((10, 12, 12)):
        outer = core.dilate(least_reach(how)).clip(image.shape)
        complete[core.start[0]] = by_distance(image, outer, core, **how).complete
    assert not complete[0]


def test_foreground_beyond_the_bound_is_left_out_and_counted():
    image = bar((1, 1, 20), np.s_[0, 0, 2:5])
    image[0, 0, 5:18] = TOP // 2
    box = Box.whole(image.shape)
    result = by_threshold(image, box, box, **(BY_THRESHOLD | {"max_steps": 6}))
    assert np.flatnonzero(result.labels).tolist() == list(range(2, 11))
    assert (result.foreground_voxels, result.unreached_voxels, result.growth_steps) == (16, 7, 6)
    assert result.stopped_by_bound
    image[0, 0, 11] = 0  # now more steps would reach nothing more
    result = by_threshold(image, box, box, **(BY_THRESHOLD | {"max_steps": 6}))
    assert (result.unreached_voxels, result.stopped_by_bound) == (6, False)


def test_small_seeds_are_dropped():
    image = bar((3, 3, 12), np.s_[1, 1, 1:3], np.s_[1, 1, 6:9])
    for least, cells in ((2, 2), (3, 1), (4, 0)):
        assert watershed(image, threshold=9, seed_threshold=99, min_seed_voxels=least).max() == cells


def cellseg3d_watershed(image, threshold, seed_threshold, min_seed_voxels):
    """The recipe of CellSeg3D's `binary_watershed`, over all 26 neighbours."""
    seeds = skimage_label(image > seed_threshold)
    seeds = remove_small_objects(seeds, max_size=min_seed_voxels - 1)
    return skimage_watershed(
        -image.astype(np.int32), seeds, mask=image > threshold, connectivity=np.ones((3, 3, 3))
    )


@pytest.mark.parametrize("smooth", [0, 1, 2])
def test_without_ties_labels_are_those_of_scikit_image(smooth):
    values = np.random.default_rng(smooth).random((40, 36, 44))
    if smooth:
        values = ndimage.gaussian_filter(values, smooth)
    image = np.empty(values.shape, np.uint16)
    image.flat[np.argsort(values, axis=None)] = np.arange(values.size)  # 63,360 values, all different
    options = {"threshold": 30_000, "seed_threshold": 60_000}
    labels = watershed(image, **options)
    expected = cellseg3d_watershed(image, **options, min_seed_voxels=3)
    assert_equal_up_to_numbering(labels, expected)
    assert labels.max() > 10


def test_real_cells_are_hardly_other_than_those_of_scikit_image(c5image_path):
    """Ties are rare where a volume is smooth, and common in whole numbers of few counts."""
    image = tifffile.imread(c5image_path).astype(np.float64)
    image = np.round((image - image.min()) / np.ptp(image) * TOP).astype(np.uint16)
    options = {"threshold": np.quantile(image, 0.9), "seed_threshold": np.quantile(image, 0.97)}
    labels = watershed(image, **options)
    expected = cellseg3d_watershed(image, **options, min_seed_voxels=3)
    np.testing.assert_array_equal(labels > 0, expected > 0)
    assert labels.max() == len(np.unique(expected)) - 1 > 100
    # Both number seeds by their first voxels; scikit-image leaves the numbers of small seeds unused.
    renumbered = np.unique(expected, return_inverse=True)[1].reshape(expected.shape)
    share = (labels == renumbered)[labels > 0].mean()
    assert share > 0.98


def test_touching_balls_are_parted_by_distance(stitch):
    z, y, x = np.indices((30, 30, 44))
    image = np.zeros((30, 30, 44), np.uint16)
    for centre in (14, 29):
        image[(z - 15) ** 2 + (y - 15) ** 2 + (x - centre) ** 2 < 81] = TOP
    labels = distance_watershed(image, threshold=1, limit=12)
    assert labels.max() == 2
    assert labels[15, 15, 14] != labels[15, 15, 29]
    assert abs(int((labels == 1).sum()) - int((labels == 2).sum())) < 0.1 * (labels > 0).sum()
    how = BY_DISTANCE | {"seed_sigma": 1, "limit": 12, "max_steps": 12}
    assert_blocks_equal_the_whole(stitch, image, (15, 16, 11), **how)


@settings(max_examples=60)
@given(volumes(), st.sampled_from([1, 3, 20, 1000]))
def test_depth_by_array_operations_is_that_of_the_compiled_code(image, limit):
    squares = squared_distance(image > TOP // 2, spacing=(1, 2, 2), limit=limit)
    compiled, generic = _depth(squares, limit), depth_generic(squares, limit)
    assert compiled.dtype == generic.dtype == np.uint16
    np.testing.assert_array_equal(generic, compiled)


@pytest.mark.parametrize("how", [BY_THRESHOLD, BY_DISTANCE], ids=["threshold", "distance"])
def test_a_block_on_the_generic_path_is_the_compiled_one(monkeypatch, how):
    image, core = noise(1, (20, 21, 22)), Box((4, 4, 4), (16, 16, 16))
    label = by_distance if "limit" in how else by_threshold
    how = how | {"sigma": 0.5, "threshold": 0.5 * TOP, "max_steps": 1}
    outer = core.dilate(least_reach(how)).clip(image.shape)
    compiled = label(image, outer, core, **how)
    for module in (filters, distance_module):
        monkeypatch.setattr(module, "is_cupy", lambda array: True)
    generic = label(image, outer, core, **how)
    for field in fields(compiled):
        np.testing.assert_array_equal(getattr(generic, field.name), getattr(compiled, field.name), field.name)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("how", [BY_THRESHOLD, BY_DISTANCE], ids=["threshold", "distance"])
def test_gpu_labels_are_the_cpu_labels(how):
    import cupy

    image = noise(5, (50, 60, 70))
    options = {name: value for name, value in how.items() if name != "max_steps"} | {"sigma": 0.65}
    single_shot = distance_watershed if "limit" in how else watershed
    options |= {} if "limit" in how else {"seed_threshold": 0.6 * TOP}
    labels = single_shot(cupy.asarray(image), **options)
    assert isinstance(labels, np.ndarray)
    np.testing.assert_array_equal(labels, single_shot(image, **options))


@pytest.mark.parametrize("how", [BY_THRESHOLD, BY_DISTANCE], ids=["threshold", "distance"])
def test_one_voxel_less_than_the_least_halo_is_refused(how):
    image, core = noise(0, (60, 60, 60)), Box((28, 28, 28), (30, 30, 30))
    label = by_distance if "limit" in how else by_threshold
    outer = core.dilate(least_reach(how))
    label(image, outer, core, **how)
    for axis in range(3):
        start = list(outer.start)
        start[axis] += 1
        with pytest.raises(ValueError, match="depend on"):
            label(image, Box(tuple(start), outer.stop), core, **how)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (noise(0, (5, 5, 5)).astype(np.float32) / TOP, "scale a fraction"),
        (noise(0, (5, 5, 5)).astype(np.int32) - 1 - TOP, "from 0 to 65535"),
        (noise(0, (5, 5, 5)).astype(np.int32) + TOP, "from 0 to 65535"),
        (noise(0, (5, 5)), "3D"),
    ],
)
def test_images_that_cannot_be_flooded_are_refused(image, message):
    with pytest.raises(ValueError, match=message):
        watershed(image, threshold=1, seed_threshold=2)


def test_options_out_of_range_are_refused():
    image = noise(0, (5, 5, 5))
    for options, message in (
        ({"seed_threshold": 1}, "seed_threshold"),
        ({"threshold": np.nan}, "threshold"),
        ({"seed_threshold": np.inf}, "seed_threshold"),
        ({"sigma": -1}, "sigma"),
        ({"min_seed_voxels": 0}, "min_seed_voxels"),
        ({"max_radius": -1}, "max_radius"),
    ):
        with pytest.raises(ValueError, match=message):
            watershed(image, **({"threshold": 2, "seed_threshold": 3} | options))
    for options, message in (
        ({"limit": 0}, "limit"),
        ({"spacing": (1, 0, 1)}, "spacing"),
        ({"seed_sigma": (1, 2)}, "seed_sigma"),
    ):
        with pytest.raises(ValueError, match=message):
            distance_watershed(image, **({"threshold": 2, "limit": 3} | options))
    for wrong in ({"max_steps": -1}, {"max_steps": 3, "context": 0}):
        with pytest.raises(ValueError, match="must be at least"):
            reach_voxels(0, min_seed_voxels=1, **wrong)


def test_an_image_without_cells_has_none():
    for value in (0, TOP // 2):
        image = np.full((5, 6, 7), value, np.uint16)
        assert not watershed(image, threshold=9, seed_threshold=TOP - 1).any()
    assert not distance_watershed(np.zeros((5, 6, 7), np.uint16), threshold=9, limit=3).any()
    assert distance_watershed(np.ones((5, 6, 7), np.uint16), threshold=0, limit=3).max() == 1


def test_the_public_functions_are_at_the_top():
    assert braincensus_kernels.watershed is watershed
    assert braincensus_kernels.distance_watershed is distance_watershed
