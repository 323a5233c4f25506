"""The blur: clEsperanto's kernel, and the same bits for a voxel wherever it is computed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from braincensus_kernels import filters
from braincensus_kernels.backend import cuda_available, to_numpy
from braincensus_kernels.boxes import Box
from braincensus_kernels.filters import as_sigmas, blur_radii, blur_radius, gaussian_blur, gaussian_weights

SIGMAS = st.sampled_from([0.0, 0.2, 0.3, 0.5, 0.65, 1.0, 1.3])
DTYPES = st.sampled_from([np.uint8, np.uint16, np.float32, np.float64, np.int16, np.bool_])


def whole_blur(image, sigma):
    box = Box.whole(image.shape)
    return gaussian_blur(image, outer=box, inner=box, volume_shape=image.shape, sigma=sigma)


def some_image(rng, shape, dtype):
    return (rng.random(shape) * (2 if dtype is np.bool_ else 200)).astype(dtype)


@st.composite
def blur_cases(draw):
    shape = tuple(draw(st.integers(1, 14)) for _ in range(3))
    start = tuple(draw(st.integers(0, n - 1)) for n in shape)
    stop = tuple(draw(st.integers(a + 1, n)) for a, n in zip(start, shape, strict=True))
    sigma = tuple(draw(SIGMAS) for _ in range(3))
    image = some_image(np.random.default_rng(draw(st.integers(0, 2**32 - 1))), shape, draw(DTYPES))
    return image, Box(start, stop), sigma


@pytest.mark.parametrize(
    ("sigma", "radius"),
    [(0, 0), (0.1, 0), (0.25, 1), (0.5, 2), (0.65, 2), (1, 4), (1.2, 4), (2, 8), (2.1, 8)],
)
def test_radius_is_that_of_clesperanto(sigma, radius):
    width = int(8 * sigma)
    width += width % 2 == 0
    assert blur_radius(sigma) == radius == (width - 1) // 2
    assert len(gaussian_weights(sigma)) == 2 * radius + 1


def test_sigmas_are_one_or_three():
    assert as_sigmas(2) == (2.0, 2.0, 2.0)
    assert as_sigmas(np.array([1, 2, 3])) == (1.0, 2.0, 3.0)
    for wrong in ((1, 2), (), -1, float("nan"), (1, 1, float("inf"))):
        with pytest.raises(ValueError, match="spot_sigma"):
            as_sigmas(wrong, name="spot_sigma")


@pytest.mark.parametrize("sigma", [0.3, 0.65, (1, 0, 2)])
def test_blur_is_the_gaussian_of_scipy(sigma):
    image = np.random.default_rng(0).random((17, 20, 23)).astype(np.float32)
    expected = image.astype(np.float64)
    for axis, s in enumerate(as_sigmas(sigma)):
        weights = gaussian_weights(s).astype(np.float64)
        expected = ndimage.correlate1d(expected, weights / weights.sum(), axis=axis, mode="nearest")
    np.testing.assert_allclose(whole_blur(image, sigma), expected, rtol=2e-6)


def test_blur_does_what_clesperanto_does_bit_for_bit():
    """A literal rendering of its kernel, one voxel at a time, on axes x, y, z."""
    image = np.random.default_rng(1).random((5, 6, 7)).astype(np.float32)
    expected = image
    for axis in (2, 1, 0):
        lines = np.moveaxis(expected, axis, -1)
        result = np.empty_like(lines)
        for at in np.ndindex(lines.shape):
            total, norm = np.float32(0), np.float32(0)
            for k in range(-2, 3):
                h = np.float32(np.exp(-(k**2) / (2 * 0.65**2)))
                total += h * lines[(*at[:-1], min(max(at[-1] + k, 0), lines.shape[-1] - 1))]
                norm += h
            result[at] = total / norm
        expected = np.moveaxis(result, -1, axis)
    np.testing.assert_array_equal(whole_blur(image, 0.65), expected)


@settings(max_examples=80, deadline=None)
@given(blur_cases())
def test_a_voxel_has_the_same_bits_in_every_block(case):
    image, inner, sigma = case
    outer = inner.dilate(blur_radii(sigma)).clip(image.shape)
    part = gaussian_blur(image[outer.slices], outer=outer, inner=inner, volume_shape=image.shape, sigma=sigma)
    assert part.dtype == np.float32
    np.testing.assert_array_equal(part, whole_blur(image, sigma)[inner.slices])


@settings(max_examples=60, deadline=None)
@given(blur_cases())
def test_array_operations_give_the_bits_of_the_compiled_blur(case):
    image, inner, sigma = case
    with pytest.MonkeyPatch.context() as patch:
        box = Box.whole(image.shape)
        compiled = gaussian_blur(image, outer=box, inner=inner, volume_shape=image.shape, sigma=sigma)
        patch.setattr(filters, "is_cupy", lambda array: True)
        generic = gaussian_blur(image, outer=box, inner=inner, volume_shape=image.shape, sigma=sigma)
    np.testing.assert_array_equal(generic, compiled)


def test_long_rows_have_the_bits_of_short_ones():
    """Vector code handles the bulk of a row and scalar code its rest: they must agree."""
    image = np.random.default_rng(2).random((3, 3, 333)).astype(np.float32)
    whole = whole_blur(image, 1)
    for start, stop in ((0, 333), (1, 332), (7, 41), (100, 101), (64, 128)):
        inner = Box((0, 0, start), (3, 3, stop))
        outer = inner.dilate(4).clip(image.shape)
        part = gaussian_blur(image[outer.slices], outer=outer, inner=inner, volume_shape=image.shape, sigma=1)
        np.testing.assert_array_equal(part, whole[inner.slices])


def test_equal_values_stay_equal():
    """Flat maxima must survive the blur as flat."""
    assert len(np.unique(whole_blur(np.full((9, 9, 40), 0.7, np.float32), 1.3))) == 1


def test_zero_sigma_leaves_the_image():
    image = np.random.default_rng(3).random((4, 5, 6)).astype(np.float32)
    np.testing.assert_array_equal(whole_blur(image, 0), image)


def test_views_are_read_in_their_order():
    image = np.random.default_rng(4).integers(0, 999, (8, 9, 10)).astype(np.uint16)
    turned = image.transpose(2, 0, 1)[::-1]
    np.testing.assert_array_equal(whole_blur(turned, 0.65), whole_blur(turned.copy(), 0.65))


def test_too_little_context_is_refused():
    image = np.zeros((10, 10, 10), np.float32)
    box = Box((5, 0, 0), (15, 10, 10))
    with pytest.raises(ValueError, match="does not hold"):
        gaussian_blur(
            image, outer=box, inner=Box((6, 0, 0), (10, 10, 10)), volume_shape=(20, 10, 10), sigma=0.5
        )
    with pytest.raises(ValueError, match="shape"):
        gaussian_blur(image[1:], outer=box, inner=box, volume_shape=(20, 10, 10), sigma=0.5)


@pytest.mark.gpu
@pytest.mark.skipif(not cuda_available(), reason="needs an NVIDIA GPU with CuPy")
@pytest.mark.parametrize("sigma", [0.65, (2, 0, 1)])
def test_gpu_blur_has_the_bits_of_the_cpu_blur(sigma):
    import cupy

    image = np.random.default_rng(5).integers(0, 65536, (40, 50, 60)).astype(np.uint16)
    np.testing.assert_array_equal(to_numpy(whole_blur(cupy.asarray(image), sigma)), whole_blur(image, sigma))
