"""Voronoi-Otsu: clEsperanto's labels on real data, and the same labels for any blocks."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

import braincensus_kernels
from braincensus_kernels import filters, growth, histogram, seeds
from braincensus_kernels.backend import cuda_available, to_numpy
from braincensus_kernels.boxes import Box
from braincensus_kernels.filters import blur_radii
from braincensus_kernels.histogram import otsu_threshold, outline_histogram, outline_range
from braincensus_kernels.voronoi_otsu import label_block, reach_voxels, voronoi_otsu

SHARED = Path(__file__).resolve().parents[2].parent / "shared"
REFERENCE = SHARED / "reference" / "clesperanto-labels.npz"
SIGMA_PAIRS = [(0.5, 0.5), (0.65, 0.65), (1, 1), (2, 1), (1, 2)]

needs_reference = pytest.mark.skipif(not REFERENCE.exists(), reason="needs the real volumes and their labels")
needs_gpu = pytest.mark.skipif(not cuda_available(), reason="needs an NVIDIA GPU with CuPy")


def read_volume(name):
    return tifffile.imread(SHARED / "data" / f"{name}.tif").astype(np.float32)


def reference_labels(name, spot_sigma, outline_sigma):
    with np.load(REFERENCE) as stored:
        return stored[f"{name}_s{spot_sigma}_o{outline_sigma}"].astype(np.uint32)


def assert_equal_up_to_numbering(labels, expected):
    np.testing.assert_array_equal(labels > 0, expected > 0)
    pairs = np.unique(labels.ravel().astype(np.int64) << 32 | expected.ravel())
    assert len(np.unique(pairs >> 32)) == len(np.unique(pairs & 0xFFFFFFFF)) == len(pairs)


def threshold_by_blocks(image, block, outline_sigma):
    """The global threshold, from the blocks' ranges and histograms."""
    parts = []
    for core in Box.whole(image.shape).tiles(block):
        outer = core.dilate(blur_radii(outline_sigma)).clip(image.shape)
        boxes = {"outer": outer, "core": core, "volume_shape": image.shape, "outline_sigma": outline_sigma}
        parts.append((image[outer.slices], boxes))
    ranges = [outline_range(voxels, **boxes) for voxels, boxes in parts]
    edges = {"minimum": min(r[0] for r in ranges), "maximum": max(r[1] for r in ranges)}
    counts = sum(outline_histogram(voxels, **boxes, **edges, bins=256) for voxels, boxes in parts)
    return otsu_threshold(counts, **edges)


def label_by_blocks(image, block, **how):
    """Label each block with the halo that its reach asks for, more where it says that it needs more."""
    reach = reach_voxels(how["spot_sigma"], how["outline_sigma"], how["max_steps"])
    for core in Box.whole(image.shape).tiles(block):
        margin = reach
        while True:
            outer = core.dilate(margin).clip(image.shape)
            result = label_block(image[outer.slices], outer=outer, core=core, volume_shape=image.shape, **how)
            if result.complete:
                break
            assert outer != Box.whole(image.shape), "nothing is unknown in the whole volume"
            margin = tuple(2 * m for m in margin)
        yield core, result


def assert_blocks_equal_the_whole(image, block, **how):
    """Every voxel that a block gives back, its core's neighbours included; and every count."""
    whole_box = Box.whole(image.shape)
    whole = label_block(image, outer=whole_box, core=whole_box, volume_shape=image.shape, **how)
    single = voronoi_otsu(
        image,
        how["spot_sigma"],
        how["outline_sigma"],
        seeds=how["seeds"],
        threshold=how["threshold"],
        max_radius=how["max_steps"],
    )
    np.testing.assert_array_equal(single, whole.labels)
    identity = np.concatenate(([-1], whole.seeds))[whole.labels]
    results = []
    for core, result in label_by_blocks(image, block, **how):
        assert result.kept == core.dilate(1).clip(image.shape)
        assert result.labels.dtype == np.uint32
        found = np.concatenate(([-1], result.seeds))[result.labels]
        np.testing.assert_array_equal(found, identity[result.kept.slices])
        assert np.unique(found[found >= 0]).tolist() == result.seeds.tolist()  # no id unused, in seed order
        results.append(result)
    assert max(r.growth_steps for r in results) == whole.growth_steps
    assert sum(r.foreground_voxels for r in results) == whole.foreground_voxels
    assert sum(r.unreached_voxels for r in results) == whole.unreached_voxels
    assert any(r.stopped_by_bound for r in results) == whole.stopped_by_bound


def literal_voronoi_otsu(image, spot_sigma, outline_sigma, threshold):
    """The rules one by one, with SciPy on whole images; float64 blur (so for images that are not flat)."""

    def blur(sigma):
        result = image.astype(np.float64)
        for axis in (2, 1, 0):
            weights = np.exp(
                -(np.arange(-blur_radii(sigma)[0], blur_radii(sigma)[0] + 1) ** 2) / (2 * sigma**2)
            )
            result = ndimage.correlate1d(result, weights / weights.sum(), axis=axis, mode="nearest")
        return result

    spots, mask = blur(spot_sigma), blur(outline_sigma) > threshold
    box = np.ones((3, 3, 3), bool)
    neighbours = box.copy()
    neighbours[1, 1, 1] = False
    peaks = spots > ndimage.maximum_filter(spots, footprint=neighbours, mode="constant", cval=-np.inf)
    labels = np.zeros(image.shape, np.int64)
    labels[peaks & mask] = np.arange(1, (peaks & mask).sum() + 1)
    step = 0
    while True:
        footprint = box if step % 2 == 0 else ndimage.generate_binary_structure(3, 1)
        largest = ndimage.maximum_filter(labels, footprint=footprint, mode="constant")
        grown = np.where(mask & (labels == 0), largest, labels)
        if step % 2 == 0 and (grown == labels).all():
            return labels
        labels, step = grown, step + 1


@needs_reference
@pytest.mark.parametrize("rule", ["strict", "plateau"])
@pytest.mark.parametrize(("spot_sigma", "outline_sigma"), SIGMA_PAIRS)
@pytest.mark.parametrize("name", ["c5image", "test_very_small"])
def test_labels_are_those_of_clesperanto(name, spot_sigma, outline_sigma, rule):
    labels = voronoi_otsu(read_volume(name), spot_sigma, outline_sigma, seeds=rule)
    expected = reference_labels(name, spot_sigma, outline_sigma)
    assert_equal_up_to_numbering(labels, expected)
    np.testing.assert_array_equal(labels, expected)  # on these volumes the numbers agree, too


@needs_reference
@pytest.mark.parametrize("block", [40, 64])
@pytest.mark.parametrize(("spot_sigma", "outline_sigma"), SIGMA_PAIRS)
@pytest.mark.parametrize("name", ["c5image", "test_very_small"])
def test_blocks_give_the_labels_of_clesperanto(name, spot_sigma, outline_sigma, block):
    image = read_volume(name)
    box = Box.whole(image.shape)
    threshold = threshold_by_blocks(image, (block,) * 3, outline_sigma)
    how = {
        "spot_sigma": spot_sigma,
        "outline_sigma": outline_sigma,
        "threshold": threshold,
        "seeds": "strict",
        "max_steps": image.size,
    }
    whole = label_block(image, outer=box, core=box, volume_shape=image.shape, **how)
    assert not whole.stopped_by_bound
    stitched = np.full(image.shape, -1, np.int64)
    for core, result in label_by_blocks(image, (block,) * 3, **(how | {"max_steps": whole.growth_steps})):
        assert not result.stopped_by_bound
        identity = np.concatenate(([-1], result.seeds))[result.labels]
        stitched[core.slices] = identity[core.slices_in(result.kept)]
    assert_equal_up_to_numbering(stitched + 1, reference_labels(name, spot_sigma, outline_sigma))


def noise(seed, shape):
    return np.random.default_rng(seed).random(shape).astype(np.float32)


@pytest.mark.parametrize(("spot_sigma", "outline_sigma"), SIGMA_PAIRS)
def test_labels_follow_the_rules_one_by_one(spot_sigma, outline_sigma):
    image = noise(7, (21, 18, 25))
    labels = voronoi_otsu(image, spot_sigma, outline_sigma, threshold=0.5)
    np.testing.assert_array_equal(labels, literal_voronoi_otsu(image, spot_sigma, outline_sigma, 0.5))
    assert labels.max() > 5


@st.composite
def volumes(draw):
    """Noise, blobs, quantised and saturated values, flat volumes, with slabs of nothing."""
    shape = tuple(draw(st.integers(1, 22)) for _ in range(3))
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
    dtype = draw(st.sampled_from([np.float32, np.uint16, np.float64, np.uint8]))
    top = np.iinfo(dtype).max if np.issubdtype(dtype, np.integer) else 1
    return (image * top).astype(dtype), top


SIGMA = st.sampled_from([0.0, 0.3, 0.5, 0.65, 1.0])
SIGMAS = st.one_of(SIGMA, st.tuples(SIGMA, SIGMA, SIGMA))


@st.composite
def labellings(draw):
    image, top = draw(volumes())
    spot_sigma = draw(SIGMAS)
    return image, {
        "spot_sigma": spot_sigma,
        "outline_sigma": draw(st.one_of(st.just(spot_sigma), SIGMAS)),
        "threshold": draw(st.sampled_from([0.0, 0.3, 0.6, 0.95])) * top,
        "seeds": draw(st.sampled_from(["plateau", "plateau", "strict"])),
        "max_steps": draw(st.sampled_from([0, 1, 2, 3, 6, 11])),
    }


@settings(max_examples=150, deadline=None)
@given(labellings(), st.tuples(*[st.integers(1, 24)] * 3))
def test_blocks_equal_the_whole(case, block):
    """Blocks of any size, down to less than the halo, with last ones as thin as one voxel."""
    image, how = case
    block = tuple(max(b, n // 3) for b, n in zip(block, image.shape, strict=True))
    assert_blocks_equal_the_whole(image, block, **how)


@pytest.mark.parametrize(
    ("shape", "block"),
    [((33, 17, 17), (8, 16, 16)), ((9, 33, 33), (4, 16, 8)), ((25, 25, 25), (12, 12, 12))],
)
@pytest.mark.parametrize("spot_sigma", [0.65, (0.3, 1, 0.65)])
def test_thin_last_blocks_equal_the_whole(shape, block, spot_sigma):
    how = {"spot_sigma": spot_sigma, "outline_sigma": 0.65, "seeds": "plateau", "max_steps": 4}
    assert_blocks_equal_the_whole(noise(3, shape), block, threshold=0.45, **how)


SATURATED = {"spot_sigma": 0.65, "outline_sigma": 0.65, "threshold": 0.5, "seeds": "plateau", "max_steps": 2}


def slab(shape, *where):
    image = np.zeros(shape, np.float32)
    for part in where:
        image[part] = 1
    return image


@pytest.mark.parametrize(
    "image",
    [
        np.ones((40, 20, 20), np.float32),
        slab((40, 20, 20), np.s_[:, 4:16, 4:16]),
        slab((40, 20, 20), np.s_[3:, 9:12, 9:12], np.s_[3:5, 2:18, 2:18]),
        slab((40, 20, 20), np.s_[5:36, 2:5, 2:5], np.s_[33:36, 2:18, 2:5], np.s_[2:36, 15:18, 2:5]),
    ],
    ids=["everything", "column", "mushroom", "staple"],
)
def test_plateaus_across_many_blocks_equal_the_whole(image):
    assert_blocks_equal_the_whole(image, (8, 8, 8), **SATURATED)


def test_a_plateau_that_leaves_is_reported_where_its_seed_may_be_and_nowhere_else():
    """A flat column through blocks of 8: only the block of its first voxel must see the rest of it."""
    image = slab((64, 24, 24), np.s_[10:60, 10:14, 10:14])
    reach = reach_voxels(0.65, 0.65, 2)
    complete = {}
    for core in Box.whole(image.shape).tiles((8, 24, 24)):
        outer = core.dilate(reach).clip(image.shape)
        result = label_block(
            image[outer.slices], outer=outer, core=core, volume_shape=image.shape, **SATURATED
        )
        complete[core.start[0]] = result.complete
    assert complete == {z: z != 8 for z in range(0, 64, 8)}


def test_empty_blocks_are_complete():
    image = slab((48, 16, 16), np.s_[20:23, 5:8, 5:8])
    for core in Box.whole(image.shape).tiles((8, 8, 8)):
        outer = core.dilate(reach_voxels(0.65, 0.65, 2)).clip(image.shape)
        result = label_block(
            image[outer.slices], outer=outer, core=core, volume_shape=image.shape, **SATURATED
        )
        assert result.complete
        holds_cell = core.dilate(1).intersect(Box((20, 5, 5), (23, 8, 8))).size > 0
        assert len(result.seeds) == holds_cell == result.labels.any()


def test_one_voxel_less_than_the_reach_is_refused():
    image = noise(0, (40, 40, 40))
    core = Box((15, 15, 15), (20, 20, 20))
    outer = core.dilate(reach_voxels(1, 0.5, 3))
    options = {
        "spot_sigma": 1,
        "outline_sigma": 0.5,
        "threshold": 0.5,
        "seeds": "plateau",
        "max_steps": 3,
        "volume_shape": image.shape,
        "core": core,
    }
    label_block(image[outer.slices], outer=outer, **options)
    for axis in range(3):
        start = list(outer.start)
        start[axis] += 1
        less = Box(tuple(start), outer.stop)
        with pytest.raises(ValueError, match="depend on"):
            label_block(image[less.slices], outer=less, **options)


@settings(max_examples=60, deadline=None)
@given(labellings(), st.tuples(*[st.integers(4, 24)] * 3))
def test_array_operations_give_the_labels_of_the_compiled_code(case, block):
    """What runs on a GPU, run on NumPy: every field of every block."""
    image, how = case
    whole = Box.whole(image.shape)
    reach = reach_voxels(how["spot_sigma"], how["outline_sigma"], how["max_steps"])
    for core in list(whole.tiles(block))[:2]:
        outer = core.dilate(reach).clip(image.shape)
        boxes = {"outer": outer, "core": core, "volume_shape": image.shape}
        compiled = label_block(image[outer.slices], **boxes, **how)
        with pytest.MonkeyPatch.context() as patch:
            for module in (filters, seeds, growth, histogram):
                patch.setattr(module, "is_cupy", lambda array: True)
            generic = label_block(image[outer.slices], **boxes, **how)
        for field in fields(compiled):
            np.testing.assert_array_equal(
                getattr(generic, field.name), getattr(compiled, field.name), err_msg=field.name
            )


def test_the_public_function_is_at_the_top():
    assert braincensus_kernels.voronoi_otsu is voronoi_otsu


def test_saturated_cells_are_lost_by_the_strict_rule_alone():
    image = slab((10, 10, 20), np.s_[4:7, 4:7, 3:7], np.s_[4:7, 4:7, 12:16])
    assert voronoi_otsu(image, 0.5, 0.5, seeds="plateau").max() == 2
    assert voronoi_otsu(image, 0.5, 0.5, seeds="strict").max() == 0


def test_a_constant_image_has_no_cells():
    for value in (0, 7):
        assert not voronoi_otsu(np.full((6, 7, 8), value, np.uint16), 0.65, 1).any()


def test_the_radius_is_bounded():
    image = slab((3, 3, 30), np.s_[1, 1, :])
    image[1, 1, 5] = 2
    labels = voronoi_otsu(image, 0, 0, threshold=0.5, max_radius=4)
    np.testing.assert_array_equal(np.flatnonzero(labels[1, 1]), np.arange(1, 10))
    assert voronoi_otsu(image, 0, 0, threshold=0.5).astype(bool).sum() == 30


def with_value(value):
    image = noise(1, (5, 5, 5))
    image[1, 2, 3] = value
    return image


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((5, 5), np.float32), "3D"),
        (np.zeros((1, 5, 5, 5), np.float32), "3D"),
        (np.zeros((5, 0, 5), np.float32), "empty"),
        (np.zeros((5, 5, 5), np.complex64), "real"),
        (with_value(np.nan), "NaN"),
        (with_value(np.inf), "beyond float32"),
        (np.full((5, 5, 5), 1e300), "beyond float32"),
    ],
)
def test_images_that_cannot_be_labelled_are_refused(image, message):
    with pytest.raises(ValueError, match=message):
        voronoi_otsu(image, 0.65, 0.65)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"spot_sigma": -1}, "spot_sigma"),
        ({"outline_sigma": (1, 2)}, "outline_sigma"),
        ({"seeds": "first"}, "rule"),
        ({"threshold": float("nan")}, "threshold"),
        ({"max_radius": -1}, "max_radius"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        voronoi_otsu(noise(0, (5, 5, 5)), **({"spot_sigma": 1, "outline_sigma": 1} | options))


def test_blocks_that_make_no_sense_are_refused():
    image = noise(0, (8, 8, 8))
    box = Box.whole(image.shape)
    options = {"spot_sigma": 0.5, "outline_sigma": 0.5, "threshold": 0.5, "seeds": "plateau", "max_steps": 2}
    with pytest.raises(ValueError, match="core"):
        label_block(image, outer=box, core=Box((0, 0, 0), (0, 8, 8)), volume_shape=image.shape, **options)
    with pytest.raises(ValueError, match="core"):
        label_block(image, outer=box, core=box.dilate(1), volume_shape=image.shape, **options)
    with pytest.raises(ValueError, match="shape"):
        label_block(image[1:], outer=box, core=box, volume_shape=image.shape, **options)
    with pytest.raises(ValueError, match="max_steps"):
        label_block(image, outer=box, core=box, volume_shape=image.shape, **(options | {"max_steps": -1}))
    with pytest.raises(ValueError, match="threshold"):
        label_block(image, outer=box, core=box, volume_shape=image.shape, **(options | {"threshold": np.inf}))


def test_the_image_is_left_as_it_was():
    image = noise(0, (9, 9, 9))
    image.setflags(write=False)
    copy = image.copy()
    voronoi_otsu(image, 0.65, 1)
    np.testing.assert_array_equal(image, copy)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("rule", ["strict", "plateau"])
@pytest.mark.parametrize(("spot_sigma", "outline_sigma"), SIGMA_PAIRS)
def test_gpu_labels_are_the_cpu_labels(spot_sigma, outline_sigma, rule):
    import cupy

    image = ndimage.gaussian_filter(noise(5, (70, 80, 90)), 1)
    image = (np.clip((image - 0.45) * 8, 0, 1) * 65535).astype(np.uint16)
    labels = voronoi_otsu(cupy.asarray(image), spot_sigma, outline_sigma, seeds=rule)
    assert isinstance(labels, cupy.ndarray)
    np.testing.assert_array_equal(
        to_numpy(labels), voronoi_otsu(image, spot_sigma, outline_sigma, seeds=rule)
    )


@pytest.mark.gpu
@needs_gpu
def test_gpu_blocks_are_the_cpu_blocks():
    import cupy

    image = np.clip(ndimage.gaussian_filter(noise(6, (60, 60, 60)), 1) * 6 - 2.5, 0, 1).astype(np.float32)
    core = Box((20, 20, 20), (44, 44, 44))
    outer = core.dilate(reach_voxels(0.65, 1, 6)).clip(image.shape)
    how = {"spot_sigma": 0.65, "outline_sigma": 1, "threshold": 0.4, "seeds": "plateau", "max_steps": 6}
    boxes = {"outer": outer, "core": core, "volume_shape": image.shape}
    on_cpu = label_block(image[outer.slices], **boxes, **how)
    on_gpu = label_block(cupy.asarray(image[outer.slices]), **boxes, **how)
    for field in fields(on_cpu):
        found = getattr(on_gpu, field.name)
        found = to_numpy(found) if field.name == "labels" else found
        np.testing.assert_array_equal(found, getattr(on_cpu, field.name), err_msg=field.name)
