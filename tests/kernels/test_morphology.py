"""The closing: SciPy's with a ball cut off at the border, at every threshold, in every block."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from braincensus_kernels import morphology
from braincensus_kernels.backend import cuda_available, to_numpy
from braincensus_kernels.boxes import Box
from braincensus_kernels.morphology import closing, closing_reach

RADII = st.sampled_from([0, 0.7, 1, 1.5, 2, 2.9, 3, 5])
DTYPES = st.sampled_from([np.uint8, np.uint16, np.int16, np.float32, np.bool_])


def whole_closing(image, radii):
    box = Box.whole(image.shape)
    return closing(image, outer=box, inner=box, volume_shape=image.shape, radius_voxels=radii)


def ball(radii):
    reach = [int(r) for r in radii]
    offsets = np.meshgrid(*[np.arange(-n, n + 1) for n in reach], indexing="ij")
    # a little more than 1: of integer radii, the offsets on the sphere belong to it
    return sum((d / r) ** 2 for d, r in zip(offsets, radii, strict=True) if r) + 0 * offsets[0] <= 1 + 1e-9


def literal_closing(image, radii):
    footprint = ball(radii)
    high = ndimage.maximum_filter(
        image.astype(np.float64), footprint=footprint, mode="constant", cval=-np.inf
    )
    return ndimage.minimum_filter(high, footprint=footprint, mode="constant", cval=np.inf)


def some_image(rng, shape, dtype):
    values = rng.random(shape) * (2 if dtype is np.bool_ else 250)
    # few bright voxels and dark ones, so that the closing has gaps to fill
    return np.where(rng.random(shape) < 0.7, 0, values).astype(dtype)


@st.composite
def images(draw):
    shape = tuple(draw(st.integers(1, 13)) for _ in range(3))
    image = some_image(np.random.default_rng(draw(st.integers(0, 2**32 - 1))), shape, draw(DTYPES))
    return image, tuple(draw(RADII) for _ in range(3))


@settings(max_examples=100, deadline=None)
@given(images())
def test_closing_is_that_of_scipy_with_the_ball_cut_off_at_the_border(case):
    image, radii = case
    before = image.copy()
    closed = whole_closing(image, radii)
    assert closed.dtype == image.dtype
    np.testing.assert_array_equal(closed, literal_closing(image, radii))
    np.testing.assert_array_equal(image, before)


@settings(max_examples=60, deadline=None)
@given(images(), st.data())
def test_blocks_are_closed_as_the_volume_is(case, data):
    image, radii = case
    start = tuple(data.draw(st.integers(0, n - 1)) for n in image.shape)
    stop = tuple(data.draw(st.integers(a + 1, n)) for a, n in zip(start, image.shape, strict=True))
    inner = Box(start, stop)
    outer = inner.dilate(closing_reach(radii)).clip(image.shape)
    part = closing(
        image[outer.slices], outer=outer, inner=inner, volume_shape=image.shape, radius_voxels=radii
    )
    np.testing.assert_array_equal(part, whole_closing(image, radii)[inner.slices])


@settings(max_examples=40, deadline=None)
@given(images())
def test_nothing_gets_darker_and_closing_again_changes_nothing(case):
    image, radii = case
    closed = whole_closing(image, radii)
    assert (closed >= image).all()
    np.testing.assert_array_equal(whole_closing(closed, radii), closed)


@settings(max_examples=40, deadline=None)
@given(images(), st.integers(0, 250))
def test_thresholding_and_closing_can_change_places(case, threshold):
    image, radii = case
    mask, footprint = image > threshold, ball(radii)
    widened = ndimage.binary_dilation(mask, footprint, border_value=0)
    expected = ndimage.binary_erosion(widened, footprint, border_value=1)
    np.testing.assert_array_equal(whole_closing(image, radii) > threshold, expected)
    np.testing.assert_array_equal(whole_closing(mask, radii), expected)


@settings(max_examples=40, deadline=None)
@given(images(), st.sampled_from([1, 300, 10**6]))
def test_planes_together_give_what_planes_one_by_one_give(case, slab_bytes):
    """What runs on a GPU, with NumPy."""
    image, radii = case
    with pytest.MonkeyPatch.context() as patch:
        one_by_one = whole_closing(image, radii)
        patch.setattr(morphology, "is_cupy", lambda array: True)
        patch.setattr(morphology, "_GPU_SLAB_BYTES", slab_bytes)
        np.testing.assert_array_equal(whole_closing(image, radii), one_by_one)


def test_the_radius_of_the_paper():
    image = some_image(np.random.default_rng(1), (24, 20, 40), np.uint16)
    image[4:20, 4:16, 4:36] = 0
    np.testing.assert_array_equal(whole_closing(image, (8, 8, 8)), literal_closing(image, (8, 8, 8)))


def test_the_ball_holds_the_offsets_on_its_sphere():
    """Offsets such as (0, 3, 4) at radius 5: rounding must not decide about them."""
    image = np.zeros((11, 11, 11), np.uint8)
    image[5, 5, 5] = 1
    box = Box.whole(image.shape)
    high = morphology._over_ball(np.maximum, image, given=box, wanted=box, radii=(5.0, 5.0, 5.0))
    z, y, x = np.indices(image.shape) - 5
    np.testing.assert_array_equal(high, z * z + y * y + x * x <= 25)


def test_a_radius_of_zero_gives_a_copy_of_the_crop():
    image = np.arange(60).reshape(3, 4, 5)
    box, inner = Box.whole(image.shape), Box((1, 0, 2), (3, 4, 4))
    crop = closing(image, outer=box, inner=inner, volume_shape=image.shape, radius_voxels=(0, 0.9, 0))
    np.testing.assert_array_equal(crop, image[inner.slices])
    assert not np.shares_memory(crop, image)
    empty = Box((1, 1, 1), (1, 2, 2))
    assert (
        closing(image, outer=box, inner=empty, volume_shape=image.shape, radius_voxels=(2, 2, 2)).shape
        == empty.shape
    )


def test_views_are_read_in_their_order():
    image = some_image(np.random.default_rng(4), (8, 9, 10), np.uint16)
    turned = image.transpose(2, 0, 1)[::-1]
    np.testing.assert_array_equal(whole_closing(turned, (1, 2, 3)), whole_closing(turned.copy(), (1, 2, 3)))


def test_what_does_not_fit_is_refused():
    image = np.zeros((10, 10, 10), np.uint16)
    outer, inner = Box((5, 0, 0), (15, 10, 10)), Box((8, 0, 0), (10, 10, 10))
    boxes = {"outer": outer, "inner": inner, "volume_shape": (20, 10, 10)}
    assert closing(image, **boxes, radius_voxels=(1.9, 3, 3)).shape == inner.shape
    with pytest.raises(ValueError, match="does not hold"):
        closing(image, **boxes, radius_voxels=(2, 3, 3))
    with pytest.raises(ValueError, match="shape"):
        closing(image[1:], **boxes, radius_voxels=(1, 1, 1))
    with pytest.raises(TypeError, match="complex"):
        closing(image.astype(complex), **boxes, radius_voxels=(1, 1, 1))
    for wrong in ((1, 1), (1, -1, 1), (1, 1, float("nan"))):
        with pytest.raises(ValueError, match="three radii"):
            closing_reach(wrong)


@pytest.mark.gpu
@pytest.mark.skipif(not cuda_available(), reason="needs an NVIDIA GPU with CuPy")
@pytest.mark.parametrize("radii", [(2, 2, 2), (3, 0, 5.5)])
def test_gpu_closing_is_the_cpu_closing(radii):
    import cupy

    image = some_image(np.random.default_rng(5), (40, 50, 60), np.uint16)
    np.testing.assert_array_equal(
        to_numpy(whole_closing(cupy.asarray(image), radii)), whole_closing(image, radii)
    )
