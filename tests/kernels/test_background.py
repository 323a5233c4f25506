"""Local background: the same bits for any blocks, blind to what is not tissue."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from scipy.interpolate import RegularGridInterpolator

from braincensus_kernels.background import background_reach_tiles, foreground_from_intensity, local_background
from braincensus_kernels.boxes import Box


def grid_of(shape):
    return tuple(-(-n // 8) for n in shape)


def tiles_for(box, shape, reach, extra=0):
    return (
        Box(tuple(a // 8 for a in box.start), tuple(-(-b // 8) for b in box.stop))
        .dilate(tuple(r + extra for r in reach))
        .clip(grid_of(shape))
    )


def whole(median, shape, **options):
    return local_background(
        median, tiles=Box.whole(median.shape), box=Box.whole(shape), volume_shape=shape, **options
    )


@given(
    seed=st.integers(0, 2**32),
    shape=st.tuples(*[st.integers(1, 60)] * 3),
    sigma=st.tuples(*[st.sampled_from([0, 0.4, 1.0, 1.7])] * 3),
    extra=st.integers(0, 2),
)
@settings(max_examples=60, deadline=None)
def test_same_bits_for_any_box_and_margin(seed, shape, sigma, extra):
    rng = np.random.default_rng(seed)
    median = rng.uniform(50, 900, grid_of(shape)).astype(np.float32)
    median[rng.random(median.shape) < 0.2] = np.nan
    options = {"sigma_tiles": sigma, "tissue_threshold": 200.0, "floor": 77.7}
    expected = whole(median, shape, **options)
    start = [int(rng.integers(0, n)) for n in shape]
    box = Box(tuple(start), tuple(int(rng.integers(a + 1, n + 1)) for a, n in zip(start, shape, strict=True)))
    tiles = tiles_for(box, shape, background_reach_tiles(sigma), extra)
    found = local_background(
        np.ascontiguousarray(median[tiles.slices]), tiles=tiles, box=box, volume_shape=shape, **options
    )
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found.view(np.uint32), expected[box.slices].view(np.uint32))


def test_agrees_with_scipy():
    shape = (64, 80, 96)
    rng = np.random.default_rng(0)
    median = rng.uniform(100, 500, grid_of(shape)).astype(np.float32)
    sigma = (1.0, 1.5, 0.8)
    median[5:, :, :] = 30.0  # dark from there on: the layer before it is surface
    tissue = median >= 200
    dark_beside = ndimage.binary_dilation(~tissue, np.ones((3, 3, 3)))
    weight = np.where(tissue, np.where(dark_beside, 1e-3, 1.0), 0.0)
    smooth = [
        ndimage.gaussian_filter(part, sigma, mode="constant", radius=[3, 5, 3])
        for part in (weight * median, weight)
    ]
    centres = [np.arange(n) * 8 + 3.5 for n in median.shape]
    voxels = np.meshgrid(
        *[np.clip(np.arange(n), c[0], c[-1]) for n, c in zip(shape, centres, strict=True)], indexing="ij"
    )
    reached = smooth[1] > 0
    nodes = np.where(reached, smooth[0] / np.where(reached, smooth[1], 1.0), 1.0)
    expected = RegularGridInterpolator(centres, nodes)(np.stack(voxels, -1))
    found = whole(median, shape, sigma_tiles=sigma, tissue_threshold=200.0, floor=1.0)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_what_is_not_tissue_does_not_count():
    shape = (48, 48, 48)
    median = np.full((6, 6, 6), 400, np.float32)
    median[:, :, 3:] = 100
    found = whole(median, shape, sigma_tiles=1.0, tissue_threshold=200.0, floor=5.0)
    # within reach of tissue (3 tiles from the last one, at 5.99), the background is that of tissue
    np.testing.assert_allclose(found, 400, rtol=1e-6)
    median[:, :, 3:] = np.nan
    np.testing.assert_array_equal(
        found, whole(median, shape, sigma_tiles=1.0, tissue_threshold=None, floor=5.0)
    )
    median[:] = 100
    assert (whole(median, shape, sigma_tiles=1.0, tissue_threshold=200.0, floor=5.0) == 5).all()


def test_without_smoothing_tile_centres_keep_their_median():
    median = np.arange(27, dtype=np.float32).reshape(3, 3, 3) + 1
    found = whole(median, (24, 24, 24), sigma_tiles=0, tissue_threshold=None, floor=1.0)
    around = [found[3 + a :: 8, 3 + b :: 8, 3 + c :: 8] for a in (0, 1) for b in (0, 1) for c in (0, 1)]
    # a ramp inside; at the border it stops at the outermost centre
    assert (sum(around) / 8)[1, 1, 1] == pytest.approx(median[1, 1, 1], rel=1e-6)
    assert found[0, 0, 0] == median[0, 0, 0]
    assert found[-1, -1, -1] == median[-1, -1, -1]


def test_too_few_tiles_are_refused():
    shape = (80, 80, 80)
    box = Box((40, 40, 40), (48, 48, 48))
    reach = background_reach_tiles(1.0)
    tiles = tiles_for(box, shape, tuple(r - 1 for r in reach))
    options = {"box": box, "volume_shape": shape, "sigma_tiles": 1.0, "tissue_threshold": None, "floor": 1.0}
    with pytest.raises(ValueError, match="needs the medians"):
        local_background(np.ones(tiles.shape, np.float32), tiles=tiles, **options)
    with pytest.raises(ValueError, match="expected medians"):
        local_background(np.ones((2, 2, 2), np.float32), tiles=tiles, **options)
    with pytest.raises(ValueError, match="not inside"):
        local_background(
            np.ones(tiles.shape, np.float32), tiles=tiles, **{**options, "box": Box((0, 0, 0), (81, 1, 1))}
        )
    with pytest.raises(ValueError, match="sigma"):
        background_reach_tiles((1.0, -1.0, 1.0))


def test_shading_cancels_in_the_contrast():
    rng = np.random.default_rng(1)
    volume = rng.normal(400, 10, (64, 64, 64)).astype(np.float32)
    volume[::16, ::16, ::16] = 1400
    shading = np.linspace(0.5, 1, 64, dtype=np.float32)

    def foreground(v):
        median = np.median(v.reshape(8, 8, 8, 8, 8, 8).transpose(0, 2, 4, 1, 3, 5).reshape(8, 8, 8, 512), -1)
        background = whole(median, v.shape, sigma_tiles=1.0, tissue_threshold=None, floor=1.0)
        return foreground_from_intensity(v, background, floor=50.0, median=400.0, high=1600.0)

    flat, shaded = foreground(volume), foreground(volume * shading)
    assert flat.dtype == np.float32
    assert flat.min() == 0
    # away from the borders, where the background is extrapolated, what is left is its slope over a tile
    inner = (slice(8, -8),) * 3
    assert abs(flat - shaded)[inner].max() < 0.06
    assert flat[16, 16, 16] == pytest.approx(1000 / 400 / 3, rel=0.02)


def test_contrast_is_clipped_and_checked():
    values = np.array([0, 100, 5000], np.float32)
    background = np.full(3, 100, np.float32)
    assert foreground_from_intensity(values, background, floor=1, median=100, high=200).tolist() == [0, 0, 1]
    with pytest.raises(ValueError, match="median < high"):
        foreground_from_intensity(values, background, floor=1, median=100, high=100)
    with pytest.raises(ValueError, match="floor"):
        foreground_from_intensity(values, background, floor=0, median=100, high=200)
