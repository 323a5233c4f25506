"""Intensity: integer statistics that add up exactly, and a tissue that perturbations do not move."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from braincensus_kernels.boxes import Box
from braincensus_kernels.intensity import (
    CONSTANT_ROW,
    Q_MAX,
    IntensityScale,
    JointHistogram,
    Tissue,
    add_histograms,
    bin_start,
    find_tissue,
    finite_extrema,
    joint_histogram,
    scale_for,
    tile_statistics,
    tissue_median,
    tissue_range,
    value_bin,
)

SHARED = Path(__file__).resolve().parents[2].parent / "shared"


# --- scale and extrema -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "low", "high", "offset", "scale"),
    [
        ("uint8", 3, 250, 0, 1),
        ("uint16", 90, 65535, 0, 1),
        ("int16", 5, 300, 0, 1),
        ("int16", -32768, 32767, -32768, 1),
        ("uint32", 0, 2**32 - 1, 0, Q_MAX / (2**32 - 1)),
        ("float32", 0.25, 2.0, 0, Q_MAX / 2.0),
        ("float64", -1.0, 2.0, -1.0, Q_MAX / 3.0),
        ("float32", 0.0, 0.0, 0, 1),
    ],
)
def test_scale_keeps_integers_and_spreads_floats(dtype, low, high, offset, scale):
    assert scale_for(dtype, low, high) == IntensityScale(offset, scale)


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "uint16", "bool"])
def test_small_integers_survive_the_round_trip(dtype):
    info = (0, 1) if dtype == "bool" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
    values = np.linspace(*info, 7).astype(dtype)
    scale = scale_for(dtype, *info)
    assert scale.quantise(values).dtype == np.uint32
    np.testing.assert_array_equal(scale.restore(scale.quantise(values)), values.astype(float))


def test_floats_round_trip_within_half_a_step():
    values = np.random.default_rng(0).normal(300, 90, 5000).astype(np.float32)
    scale = scale_for(values.dtype, values.min(), values.max())
    assert abs(scale.restore(scale.quantise(values)) - values).max() <= 0.5001 / scale.scale
    assert scale.quantise(values).max() == Q_MAX
    assert scale.quantise(np.array([np.nan, -np.inf, np.inf])).tolist() == [0, 0, Q_MAX]


def test_scale_refuses_what_is_not_a_volume():
    with pytest.raises(TypeError, match="complex"):
        scale_for("complex64", 0, 1)
    with pytest.raises(TypeError, match="complex"):
        finite_extrema(np.zeros(3, np.complex64))
    with pytest.raises(ValueError, match="finite"):
        scale_for("float32", np.nan, 1)
    with pytest.raises(ValueError, match="order"):
        scale_for("float32", 2, 1)


def test_extrema_skip_and_locate_what_is_not_finite():
    values = np.full((3, 4, 5), 7.0, np.float32)
    values[0, 0, 0], values[2, 3, 4] = -2, 11
    assert finite_extrema(values) == (-2, 11, 0, None)
    values[1, 2, 3], values[1, 3, 0], values[2, 3, 4] = np.nan, -np.inf, np.inf
    assert finite_extrema(values) == (-2, 7, 3, (1, 2, 3))
    assert finite_extrema(values[::-1, :, ::2])[2:] == (2, (0, 3, 2))
    nothing = finite_extrema(np.full((2, 2), np.nan))
    assert np.isnan(nothing.minimum)
    assert nothing[2:] == (4, (0, 0))
    assert finite_extrema(np.array([[5, -3]], np.int16)) == (-3, 5, 0, None)
    assert finite_extrema(np.array([1, 2], ">f4"))[:2] == (1, 2)


# --- tiles -------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 2**32), shape=st.tuples(*[st.integers(1, 19)] * 3), bits=st.integers(0, 31))
@settings(max_examples=40, deadline=None)
def test_tile_statistics_are_those_of_the_voxels(seed, shape, bits):
    q = np.random.default_rng(seed).integers(0, 2**bits, shape, dtype=np.uint32, endpoint=True)
    found = tile_statistics(q)
    for z, y, x in np.ndindex(found.median.shape):
        tile = q[z * 8 : z * 8 + 8, y * 8 : y * 8 + 8, x * 8 : x * 8 + 8].reshape(-1)
        assert found.median[z, y, x] == np.float32(np.sort(tile)[(tile.size - 1) // 2])
        assert found.top[z, y, x] == np.float32(tile.max())
        assert found.mean[z, y, x] == np.float32(tile.sum(dtype=np.uint64) / tile.size)
        assert found.constant[z, y, x] == (tile.size >= 64 and tile.min() == tile.max())


def test_a_few_equal_voxels_are_not_padding():
    found = tile_statistics(np.full((8, 15, 9), 5, np.uint32))
    assert found.constant.tolist() == [[[True, True], [True, False]]]


# --- bins --------------------------------------------------------------------------------------------


@given(q=st.integers(0, 2**32 - 1), bits=st.integers(2, 8))
def test_bins_are_intervals_in_order(q, bits):
    b = value_bin(q, bits=bits)
    start, stop = bin_start(b, bits=bits), bin_start(b + 1, bits=bits)
    assert start <= q < stop
    assert stop - start == 1 if q < 2 ** (bits + 1) else (stop - start) / start <= 2.0**-bits
    assert value_bin(start, bits=bits) == b


@given(seed=st.integers(0, 2**32), block=st.sampled_from([8, 16, 24, 40]))
@settings(max_examples=25, deadline=None)
def test_blocks_add_up_to_the_whole_in_any_order(seed, block):
    rng = np.random.default_rng(seed)
    q = rng.integers(0, 2 ** rng.integers(1, 24), (37, 22, 41), dtype=np.uint32)
    q[:16, :9, :16] = 3
    whole = joint_histogram(q, tile_statistics(q))
    assert whole.counts.sum() == q.size
    assert (whole.counts[whole.rows == CONSTANT_ROW].sum()) == 16 * 8 * 16
    parts = []
    for box in Box.whole(q.shape).tiles((block, block, block)):
        part = q[box.slices]
        parts.append(joint_histogram(part, tile_statistics(part)))
    rng.shuffle(parts)
    half = len(parts) // 2
    added = add_histograms([add_histograms(parts[:half]), *parts[half:]])
    np.testing.assert_array_equal(added.keys, whole.keys)
    np.testing.assert_array_equal(added.counts, whole.counts)
    assert added.counts.dtype == added.keys.dtype == np.int64


def test_joint_histogram_counts_each_voxel_in_its_bin():
    q = np.random.default_rng(3).integers(0, 2**24, (20, 9, 17), dtype=np.uint32)
    joint = joint_histogram(q, tile_statistics(q))
    bins, counts = np.unique(value_bin(q), return_counts=True)
    found = np.zeros(bins[-1] + 1, np.int64)
    np.add.at(found, joint.value_bins, joint.counts)
    np.testing.assert_array_equal(found[bins], counts)


def test_nothing_adds_up_to_nothing():
    empty = add_histograms([])
    assert empty.keys.size == 0
    assert find_tissue(empty) == Tissue(None, 0.0, 0.0, 0.0, None, None)
    with pytest.raises(ValueError, match="empty"):
        tissue_range(empty, find_tissue(empty), low_percentile=1, high_percentile=99)


# --- tissue and range --------------------------------------------------------------------------------


def census(volume):
    """Scale, histogram, tissue and range of a volume, in stored units."""
    extrema = finite_extrema(volume)
    scale = scale_for(volume.dtype, extrema.minimum, extrema.maximum)
    q = scale.quantise(volume)
    statistics = tile_statistics(q)
    joint = joint_histogram(q, statistics)
    tissue = find_tissue(joint)
    low, high = tissue_range(joint, tissue, low_percentile=1.0, high_percentile=99.9)
    threshold = None if tissue.threshold is None else float(scale.restore(tissue.threshold))
    middle = scale.restore(tissue_median(joint, tissue))
    return threshold, tissue.tiles(statistics), scale.restore(low), scale.restore(high), middle


def camera(shape, rng):
    return rng.normal(110, 8, shape).astype(np.float32)


def append(volume, fraction, axis, make):
    """Append what `make(shape)` gives until it is this fraction of the volume."""
    shape = list(volume.shape)
    shape[axis] = max(1, round(shape[axis] * fraction / (1 - fraction)))
    return np.concatenate([volume, make(shape)], axis)


@pytest.fixture(scope="module")
def c5image():
    path = SHARED / "data" / "c5image.tif"
    if not path.exists():
        pytest.skip("the real volume is not here")
    return pytest.importorskip("tifffile").imread(path)


@pytest.fixture(scope="module")
def unperturbed(c5image):
    return census(c5image)


def same_tissue(volume, original, unperturbed):
    """Tissue is what it was, on all tiles that lie inside of the original; the range moved < 10 %."""
    threshold, tiles, low, high, _ = census(volume)
    full = tuple(slice(0, n // 8) for n in original.shape)
    assert tiles[full].all()
    span = unperturbed[3] - unperturbed[2]
    assert abs(low - unperturbed[2]) < 0.1 * span
    assert abs(high - unperturbed[3]) < 0.1 * span
    assert abs((high - low) - span) < 0.1 * span
    return threshold, tiles


def test_a_volume_of_tissue_is_all_tissue(c5image, unperturbed):
    threshold, tiles, low, high, _ = unperturbed
    assert threshold is None
    assert tiles.all()
    assert low == pytest.approx(np.percentile(c5image, 1), rel=0.01)
    assert high == pytest.approx(np.percentile(c5image, 99.9), rel=0.01)


def test_type_of_the_stored_values_does_not_matter(c5image, unperturbed):
    for dtype in ("uint16", "int16", "int32", "float64"):
        threshold, _, low, high, _ = census(c5image.astype(dtype))
        assert threshold is None
        assert (low, high) == pytest.approx(unperturbed[2:4], rel=0.005)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("fraction", [0.05, 0.2, 0.5, 0.9])
def test_camera_background_is_told_apart(c5image, unperturbed, fraction, axis):
    rng = np.random.default_rng(0)
    volume = append(c5image, fraction, axis, lambda shape: camera(shape, rng))
    threshold, tiles = same_tissue(volume, c5image, unperturbed)
    assert 112 < threshold < 300
    beyond = [slice(None)] * 3
    beyond[axis] = slice(-(-c5image.shape[axis] // 8), None)
    assert not tiles[tuple(beyond)].any()


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("fraction", [0.02, 0.03, 0.05, 0.2, 0.5, 0.9])
def test_zero_padding_is_not_tissue(c5image, unperturbed, fraction, axis):
    volume = append(c5image, fraction, axis, lambda shape: np.zeros(shape, np.float32))
    threshold, tiles = same_tissue(volume, c5image, unperturbed)
    assert threshold is None or 0 < threshold < 305
    beyond = [slice(None)] * 3
    beyond[axis] = slice(-(-c5image.shape[axis] // 8), None)
    assert not tiles[tuple(beyond)].any()


@pytest.mark.parametrize("noise", [0, 100])
def test_bright_tiles_are_artefacts(c5image, unperturbed, noise):
    rng = np.random.default_rng(1)
    volume = c5image.copy()
    full = [n // 8 for n in volume.shape]
    for tile in rng.choice(np.prod(full), 20, replace=False):
        z, y, x = (8 * i for i in np.unravel_index(tile, full))
        volume[z : z + 8, y : y + 8, x : x + 8] = 20000 + noise * rng.normal(size=(8, 8, 8))
    threshold, tiles, low, high, _ = census(volume)
    assert threshold is None
    assert tiles.sum() >= tiles.size - 20
    assert (low, high) == pytest.approx(unperturbed[2:4], rel=0.03)


def test_a_small_artefact_and_a_hot_voxel_change_nothing(c5image, unperturbed):
    artefact, hot = c5image.copy(), c5image.copy()
    artefact[50:56, 40:46, 40:46] = 20000
    hot[60, 40, 40] = 65535
    for volume in (artefact, hot):
        threshold, _ = same_tissue(volume, c5image, unperturbed)
        assert threshold is None


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("background", [False, True])
def test_shading_is_not_background(c5image, unperturbed, axis, background):
    shape = [1, 1, 1]
    shape[axis] = -1
    factor = np.linspace(0.7, 1, c5image.shape[axis], dtype=np.float32).reshape(shape)
    shaded = c5image * factor
    volume = append(shaded, 0.5, 0, lambda s: camera(s, np.random.default_rng(2))) if background else shaded
    threshold, tiles, low, high, middle = census(volume)
    assert (112 < threshold < 215) if background else (threshold is None)
    assert tiles[:15].all()
    # the tissue is darker, so the range is: what must hold is the range over the median
    before = np.array(unperturbed[2:4]) / unperturbed[4]
    after = np.array([low, high]) / middle
    assert abs(after - before).max() < 0.1 * (before[1] - before[0])


def test_background_padding_artefact_and_shading_together(c5image):
    rng = np.random.default_rng(4)
    shaded = c5image * np.linspace(0.7, 1, 86, dtype=np.float32)[None, :, None]
    shaded[40:46, 40:46, 40:46] = 20000
    shaded[60, 40, 40] = 65535
    volume = append(shaded, 0.4, 2, lambda shape: camera(shape, rng))
    volume = append(volume, 0.3, 1, lambda shape: np.zeros(shape, np.float32))
    threshold, tiles, low, high, _ = census(volume)
    assert 112 < threshold < 215
    assert tiles[:15, :10, :11].all()
    assert not tiles[:, 11:].any()
    assert not tiles[:, :, 12:].any()
    assert 150 < low < 300
    assert 1000 < high < 1450


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("spread", [0.02, 0.1, 0.3])
def test_one_mode_is_never_cut(seed, spread):
    rng = np.random.default_rng(seed)
    medians = 400 * np.exp(spread * rng.normal(size=(12, 12, 12))).repeat(8, 0).repeat(8, 1).repeat(8, 2)
    threshold, tiles, *_ = census(rng.poisson(medians).astype(np.uint16))
    assert threshold is None
    assert tiles.all()


def test_small_integers_are_no_comb_of_modes():
    rng = np.random.default_rng(0)
    for mean in (2, 5, 12):
        assert census(rng.poisson(mean, (96, 96, 96)).astype(np.uint8))[0] is None
    dark, tissue = rng.poisson(2, (96, 96, 48)), rng.poisson(20, (96, 96, 48))
    threshold, tiles, *_ = census(np.concatenate([dark, tissue], 2).astype(np.uint8))
    assert 2 < threshold < 19
    np.testing.assert_array_equal(tiles, np.arange(12)[None, None, :] >= np.full((12, 12, 1), 6))


def test_background_subtracted_to_negative_values(c5image):
    rng = np.random.default_rng(5)
    volume = append(c5image, 0.5, 0, lambda shape: camera(shape, rng)) - np.float32(110)
    threshold, tiles, *_ = census(volume)
    assert 2 < threshold < 200
    assert tiles[:15].all()
    assert not tiles[16:].any()


def test_noise_without_cells_is_not_stretched():
    rng = np.random.default_rng(6)
    volume = rng.normal(400, 20, (64, 64, 64)).astype(np.float32)
    _, _, low, high, middle = census(volume)
    assert high == pytest.approx(middle + 10 * 20, rel=0.02)
    assert low == pytest.approx(np.percentile(volume, 1), rel=0.01)


def test_equal_voxels_have_a_range_and_no_tissue():
    for value in (0, 7):
        volume = np.full((16, 16, 16), value, np.uint16)
        threshold, tiles, low, high, _ = census(volume)
        assert threshold is None
        assert not tiles.any()
        assert low < high


def test_a_given_threshold_is_used(c5image):
    scale = scale_for("uint16", 0, 3000)
    q = scale.quantise(c5image.astype(np.uint16))
    statistics = tile_statistics(q)
    tissue = find_tissue(joint_histogram(q, statistics), threshold=400.0)
    assert tissue.threshold == 400.0
    tiles = statistics.median >= 400
    np.testing.assert_array_equal(tissue.tiles(statistics), tiles)
    np.testing.assert_array_equal(np.isnan(tissue.medians(statistics)), ~tiles)
    assert tissue.background_median < 400 < tissue.tissue_median


def test_wrong_arrays_are_refused():
    q = np.zeros((8, 8, 8), np.uint32)
    with pytest.raises(TypeError, match="uint32"):
        tile_statistics(q.astype(np.uint16))
    with pytest.raises(ValueError, match="tiles"):
        joint_histogram(q, tile_statistics(np.zeros((16, 8, 8), np.uint32)))
    joint = JointHistogram(np.array([5]), np.array([3]))
    with pytest.raises(ValueError, match="percentiles"):
        tissue_range(joint, find_tissue(joint), low_percentile=99, high_percentile=1)
