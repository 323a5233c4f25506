"""Connected components: SciPy's, and the same for any blocks, however far a component winds."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

import braincensus_kernels
from braincensus_kernels import components, filters
from braincensus_kernels.backend import cuda_available, to_numpy
from braincensus_kernels.boxes import Box
from braincensus_kernels.components import (
    connected_components,
    label_components,
    number_components,
    number_components_generic,
    reach_voxels,
)

needs_gpu = pytest.mark.skipif(not cuda_available(), reason="needs an NVIDIA GPU with CuPy")


def scipy_components(mask):
    """SciPy's components, numbered by their first voxels."""
    labels, n = ndimage.label(mask, structure=np.ones((3, 3, 3)))
    met, first = np.unique(labels, return_index=True)
    number = np.zeros(n + 1, np.int64)
    number[met[met > 0][np.argsort(first[met > 0])]] = np.arange(1, n + 1)
    return number[labels]


def first_voxels(labels):
    """Each voxel's component, known by its first voxel; -1 for background."""
    met, first = np.unique(labels, return_index=True)
    identity = np.zeros(int(labels.max()) + 1, np.int64)
    identity[met] = first
    identity[0] = -1
    return identity[labels]


def label_by_blocks(image, block, **how):
    reach = reach_voxels(how["sigma"])
    for core in Box.whole(image.shape).tiles(block):
        outer = core.dilate(reach).clip(image.shape)
        result = label_components(
            image[outer.slices], outer=outer, core=core, volume_shape=image.shape, **how
        )
        assert result.complete
        assert result.kept == core.dilate(1).clip(image.shape)
        assert result.labels.dtype == np.uint32
        np.testing.assert_array_equal(result.anchors, result.labels > 0)
        assert np.unique(result.labels[result.labels > 0]).tolist() == list(range(1, len(result.seeds) + 1))
        assert (np.diff(result.seeds) > 0).all()
        yield core, result


@st.composite
def labyrinths(draw):
    """A path that turns at random through the volume, with its neighbours left empty where that goes."""
    shape = tuple(draw(st.integers(3, 20)) for _ in range(3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    image = np.zeros(shape, np.float32)
    at = rng.integers(0, shape)
    for _ in range(draw(st.integers(10, 120))):
        image[tuple(at)] = 1
        step = rng.integers(-1, 2, 3) if draw(st.booleans()) else np.eye(3, dtype=int)[rng.integers(3)]
        at = np.clip(at + step, 0, np.array(shape) - 1)
    return image


@st.composite
def noises(draw):
    shape = tuple(draw(st.integers(1, 20)) for _ in range(3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    image = rng.random(shape) ** draw(st.sampled_from([0.3, 1, 3, 6]))
    return image.astype(draw(st.sampled_from([np.float32, np.float64])))


def comb(shape):
    """Teeth along z joined at the end alone: one component that most blocks see as many."""
    image = np.zeros(shape, np.float32)
    image[:, ::2, ::2] = 1
    image[-1] = 1
    return image


def spiral(n):
    """A square spiral one voxel wide, and the same two planes below, joined at its outer end."""
    plane = np.zeros((n, n), np.float32)
    y, x, dy, dx = 0, 0, 0, 1
    plane[y, x] = 1
    for length in [n - 1, *(k for k in range(n - 1, 1, -2) for _ in range(2))]:
        for _ in range(length):
            y, x = y + dy, x + dx
            plane[y, x] = 1
        dy, dx = dx, -dy
    image = np.stack([plane, np.zeros_like(plane), plane])
    image[1, 0, 0] = 1
    return image


def assert_blocks_equal_the_whole(stitch, image, block, order=None, **how):
    results = list(label_by_blocks(image, block, **how))
    if order is not None:
        results = [results[i] for i in np.random.default_rng(order).permutation(len(results))]
    whole = connected_components(image, how["threshold"], sigma=how["sigma"])
    np.testing.assert_array_equal(stitch(results, image.shape), first_voxels(whole))
    assert sum(r.foreground_voxels for _, r in results) == np.count_nonzero(whole)
    assert sum(r.unreached_voxels for _, r in results) == 0


@settings(max_examples=80)
@given(noises(), st.sampled_from([0.2, 0.5, 0.8]))
def test_components_are_those_of_scipy(image, threshold):
    labels = connected_components(image, threshold)
    assert labels.dtype == np.uint32
    np.testing.assert_array_equal(labels, scipy_components(image > np.float32(threshold)))


@settings(max_examples=80)
@given(
    st.one_of(noises(), labyrinths()),
    st.tuples(*[st.integers(1, 12)] * 3),
    st.sampled_from([0.0, 0.3, (0.5, 0.0, 0.65)]),
    st.sampled_from([0.2, 0.5, 0.8]),
    st.integers(0, 1000),
)
def test_blocks_equal_the_whole(stitch, image, block, sigma, threshold, order):
    """Blocks of any size in any order, with last ones as thin as one voxel."""
    block = tuple(max(b, -(-n // 4)) for b, n in zip(block, image.shape, strict=True))
    assert_blocks_equal_the_whole(stitch, image, block, order, sigma=sigma, threshold=threshold)


@pytest.mark.parametrize("block", [(3, 4, 4), (16, 2, 3), (5, 5, 1), (1, 7, 7)])
@pytest.mark.parametrize("image", [comb((17, 9, 9)), spiral(13)], ids=["comb", "spiral"])
def test_what_winds_through_many_blocks_is_one(stitch, image, block):
    assert connected_components(image, 0.5).max() == 1
    assert image.mean() < 0.6
    assert_blocks_equal_the_whole(stitch, image, block, sigma=0, threshold=0.5)


def test_neighbours_across_a_corner_of_eight_blocks_are_one(stitch):
    image = np.zeros((8, 8, 8), np.float32)
    image[3, 3, 3] = image[4, 4, 4] = 1
    results = list(label_by_blocks(image, (4, 4, 4), sigma=0, threshold=0.5))
    assert len(results) == 8
    assert np.unique(stitch(results, image.shape)).tolist() == [-1, (3 * 8 + 3) * 8 + 3]


@settings(max_examples=60)
@given(noises(), st.sampled_from([0.2, 0.5, 0.8]))
def test_array_operations_give_the_labels_of_the_compiled_code(image, threshold):
    mask = image > threshold
    for found, expected in zip(number_components_generic(mask), number_components(mask), strict=True):
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)


def test_a_block_on_the_generic_path_is_the_compiled_one(monkeypatch):
    image = np.random.default_rng(0).random((14, 15, 16)).astype(np.float32)
    compiled = list(label_by_blocks(image, (8, 8, 8), sigma=0.5, threshold=0.55))
    for module in (filters, components):
        monkeypatch.setattr(module, "is_cupy", lambda array: True)
    generic = list(label_by_blocks(image, (8, 8, 8), sigma=0.5, threshold=0.55))
    for (_, a), (_, b) in zip(compiled, generic, strict=True):
        for field in fields(a):
            np.testing.assert_array_equal(getattr(a, field.name), getattr(b, field.name), field.name)


@pytest.mark.gpu
@needs_gpu
def test_gpu_components_are_the_cpu_components():
    import cupy

    image = ndimage.gaussian_filter(np.random.default_rng(5).random((70, 80, 90)), 1).astype(np.float32)
    labels = connected_components(cupy.asarray(image), 0.52, sigma=0.65)
    assert isinstance(labels, cupy.ndarray)
    np.testing.assert_array_equal(to_numpy(labels), connected_components(image, 0.52, sigma=0.65))


def test_what_cannot_be_labelled_is_refused():
    image = np.zeros((8, 8, 8), np.float32)
    core = Box((2, 2, 2), (5, 5, 5))
    with pytest.raises(ValueError, match="3D"):
        connected_components(image[0], 0.5)
    with pytest.raises(ValueError, match="empty"):
        connected_components(image[:0], 0.5)
    with pytest.raises(ValueError, match="NaN"):
        connected_components(image * np.nan, 0.5)
    with pytest.raises(ValueError, match="threshold"):
        connected_components(image, np.nan)
    how = {"volume_shape": image.shape, "sigma": 0.3, "threshold": 0.5}
    outer = core.dilate(reach_voxels(0.3))
    label_components(image[outer.slices], outer=outer, core=core, **how)
    less = Box(outer.start, (outer.stop[0], outer.stop[1], outer.stop[2] - 1))
    with pytest.raises(ValueError, match="depend on"):
        label_components(image[less.slices], outer=less, core=core, **how)
    with pytest.raises(ValueError, match="core"):
        label_components(image, outer=Box.whole(image.shape), core=Box((0, 0, 0), (0, 8, 8)), **how)


def test_the_public_function_is_at_the_top():
    assert braincensus_kernels.connected_components is connected_components


def test_an_image_that_may_not_be_written_is_left_as_it_was():
    image = np.random.default_rng(0).random((9, 9, 9))
    image.setflags(write=False)
    copy = image.copy()
    assert connected_components(image, 0.5).max() > 0
    np.testing.assert_array_equal(image, copy)
