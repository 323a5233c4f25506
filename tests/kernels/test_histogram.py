"""One Otsu threshold for a volume, from ranges and histograms of its blocks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from braincensus_kernels import histogram
from braincensus_kernels.boxes import Box
from braincensus_kernels.filters import blur_radii, gaussian_blur
from braincensus_kernels.histogram import count_values, otsu_threshold, outline_histogram, outline_range

SIGMA = (1, 0.65, 0.5)


@pytest.fixture(scope="module")
def image():
    rng = np.random.default_rng(0)
    return (rng.random((23, 19, 31)) ** 4 * 3000).astype(np.uint16)


def blocks_of(image):
    for core in Box.whole(image.shape).tiles((8, 19, 11)):
        outer = core.dilate(blur_radii(SIGMA)).clip(image.shape)
        yield (
            core,
            image[outer.slices],
            {
                "outer": outer,
                "core": core,
                "volume_shape": image.shape,
                "outline_sigma": SIGMA,
            },
        )


def blurred(image):
    box = Box.whole(image.shape)
    return gaussian_blur(image, outer=box, inner=box, volume_shape=image.shape, sigma=SIGMA)


def test_blocks_add_up_to_the_volume(image):
    blur = blurred(image)
    ranges = [outline_range(voxels, **boxes) for _, voxels, boxes in blocks_of(image)]
    low, high = min(r[0] for r in ranges), max(r[1] for r in ranges)
    assert (low, high) == (blur.min(), blur.max())
    edges = {"minimum": low, "maximum": high, "bins": 256}
    total = sum(outline_histogram(voxels, **boxes, **edges) for _, voxels, boxes in blocks_of(image))
    np.testing.assert_array_equal(total, count_values(blur, **edges))
    assert total.sum() == image.size


def test_only_selected_voxels_count(image):
    where = blurred(image) > 500
    chosen = blurred(image)[where]
    edges = {"minimum": 0.0, "maximum": 3000.0, "bins": 32}
    total, ranges = 0, []
    for core, voxels, boxes in blocks_of(image):
        total = total + outline_histogram(voxels, **boxes, **edges, where=where[core.slices])
        ranges.append(outline_range(voxels, **boxes, where=where[core.slices]))
    np.testing.assert_array_equal(total, count_values(chosen, **edges))
    assert min(r[0] for r in ranges if r) == chosen.min()
    _, voxels, boxes = next(iter(blocks_of(image)))
    assert outline_range(voxels, **boxes, where=np.zeros(boxes["core"].shape, bool)) is None
    with pytest.raises(ValueError, match="selection"):
        outline_range(voxels, **boxes, where=where)


def test_nan_is_refused():
    image = np.ones((5, 5, 5), np.float32)
    image[2, 2, 2] = np.nan
    box = Box.whole(image.shape)
    with pytest.raises(ValueError, match="NaN"):
        outline_range(image, outer=box, core=box, volume_shape=image.shape, outline_sigma=0.65)


def test_bins_are_those_of_clesperanto():
    values = np.random.default_rng(1).random(5000).astype(np.float32) * 7 - 2
    low, high = float(values.min()), float(values.max())
    expected = np.zeros(256, int)
    for v in values:
        expected[int((float(v) - low) * 255 / (high - low) + 0.5)] += 1
    np.testing.assert_array_equal(count_values(values, minimum=low, maximum=high, bins=256), expected)


def test_values_beyond_the_range_count_in_the_end_bins():
    values = np.array([-5, 0, 1, 2, 3, 99], np.float32)
    np.testing.assert_array_equal(count_values(values, minimum=0, maximum=2, bins=3), [2, 1, 3])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=60), st.integers(2, 300))
def test_array_operations_count_as_the_compiled_loop(values, bins):
    array = np.array(values, np.float32)
    edges = {"minimum": float(array.min()), "maximum": float(np.median(array)) + 1, "bins": bins}
    with pytest.MonkeyPatch.context() as patch:
        compiled = count_values(array, **edges)
        patch.setattr(histogram, "is_cupy", lambda a: True)
        np.testing.assert_array_equal(count_values(array, **edges), compiled)
    assert compiled.sum() == len(values)


def literal_otsu(counts, low, high):
    """Largest between-class variance by trying every bin, empty ones passed over, the first best one kept."""
    centres = [low + i * ((high - low) / (len(counts) - 1)) for i in range(len(counts))]
    best, threshold = -1.0, -1.0
    for i in range(len(counts)):
        below, above = sum(counts[: i + 1]), sum(counts[i + 1 :])
        if counts[i] == 0 or above == 0:
            continue
        mean_below = sum(c * n for c, n in zip(centres[: i + 1], counts[: i + 1], strict=True)) / below
        mean_above = sum(c * n for c, n in zip(centres[i + 1 :], counts[i + 1 :], strict=True)) / above
        variance = below * above * (mean_below - mean_above) ** 2
        if variance > best * (1 + 1e-9):
            best, threshold = variance, centres[i]
    return threshold


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 50), min_size=2, max_size=40).filter(lambda n: sum(map(bool, n)) > 1))
def test_threshold_has_the_largest_variance(counts):
    found, expected = otsu_threshold(counts, -1.0, 3.0), literal_otsu(counts, -1.0, 3.0)
    if found != pytest.approx(expected, abs=1e-9):  # only where two splits are equally good

        def variance(threshold):
            centres = np.linspace(-1, 3, len(counts))
            low, n = centres <= threshold + 1e-9, np.array(counts)
            means = [(centres[m] * n[m]).sum() / n[m].sum() for m in (low, ~low)]
            return n[low].sum() * n[~low].sum() * (means[0] - means[1]) ** 2

        assert variance(found) == pytest.approx(variance(expected), rel=1e-8)


def test_otsu_of_large_counts_is_not_rounded():
    """Beyond 2**24 a float32 sum forgets single counts; the scale of the counts must not matter."""
    counts = np.array([900, 50, 3, 1, 1, 20, 70, 10])
    assert otsu_threshold(counts * 10**9, 0, 1) == otsu_threshold(counts, 0, 1)


def test_one_value_has_no_foreground():
    counts = count_values(np.full(10, 4, np.float32), minimum=4, maximum=4, bins=256)
    assert otsu_threshold(counts, 4, 4) == 4


def test_no_counts_is_an_error():
    with pytest.raises(ValueError, match="no voxel"):
        otsu_threshold(np.zeros(256), 0, 1)
    with pytest.raises(ValueError, match="no histogram"):
        count_values(np.zeros(3, np.float32), minimum=1, maximum=0, bins=4)
