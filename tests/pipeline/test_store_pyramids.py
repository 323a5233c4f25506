"""Coarser levels: region by region they are what the whole would be, at odd borders too."""

from __future__ import annotations

import tracemalloc
from fractions import Fraction
from itertools import pairwise, product
from math import floor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from braincensus.store import chunk_and_shard, create_output, downsample_region, plan_pyramid
from braincensus.store.pyramids import mean, nearest
from braincensus_kernels.boxes import Box


def groups(shape, factors):
    """Yield each coarse voxel with the slices of the voxels that it stands for."""
    coarse = tuple(-(-n // f) for n, f in zip(shape, factors, strict=True))
    for index in product(*map(range, coarse)):
        yield index, tuple(slice(i * f, (i + 1) * f) for i, f in zip(index, factors, strict=True))


def reference_mean(values: np.ndarray, factors: tuple[int, int, int]) -> np.ndarray:
    """The mean by exact fractions, one coarse voxel at a time."""
    result = np.zeros([-(-n // f) for n, f in zip(values.shape, factors, strict=True)], values.dtype)
    for index, members in groups(values.shape, factors):
        group = [int(v) for v in values[members].ravel()]
        result[index] = floor(Fraction(sum(group), len(group)) + Fraction(1, 2))
    return result


shapes = st.tuples(*[st.integers(1, 7)] * 3)
some_factors = st.tuples(*[st.sampled_from([1, 2])] * 3)


@given(shapes, some_factors, st.sampled_from(["uint8", "uint16", "uint32"]), st.integers(0, 2**32 - 1))
@settings(deadline=None)
def test_mean_is_exact_and_rounds_half_up(shape, factors, dtype, seed):
    top = np.iinfo(dtype).max
    rng = np.random.default_rng(seed)
    values = np.where(rng.random(shape) < 0.3, top, rng.integers(0, top, shape, endpoint=True)).astype(dtype)
    found = mean(values, factors)
    assert found.dtype == values.dtype
    np.testing.assert_array_equal(found, reference_mean(values, factors))


def test_mean_of_floats_and_what_has_none():
    values = np.random.default_rng(0).random((5, 4, 3)).astype(np.float32)
    found = mean(values, (2, 2, 2))
    assert found.dtype == np.float32
    for index, members in groups(values.shape, (2, 2, 2)):
        assert found[index] == np.float32(values[members].astype(np.float64).mean())
    for dtype in ("int16", "uint64", "complex64", "bool"):
        with pytest.raises(TypeError, match="mean"):
            mean(np.zeros((2, 2, 2), dtype), (2, 2, 2))


@given(shapes, some_factors, st.booleans())
def test_nearest_takes_one_voxel_of_each_group(shape, factors, upper):
    values = np.arange(np.prod(shape), dtype=np.uint64).reshape(shape)
    found = nearest(values, factors, upper=upper)
    for index, members in groups(shape, factors):
        group = values[members]
        assert found[index] == (group[-1, -1, -1] if upper else group[0, 0, 0])


@given(
    st.tuples(*[st.integers(1, 40_000)] * 3),
    st.tuples(*[st.floats(0.1, 20.0)] * 3),
)
@settings(deadline=None)
def test_planned_levels_fit_each_other_and_end_small(shape, voxel_um):
    levels = plan_pyramid(shape, voxel_um)
    assert (levels[0].shape, levels[0].scale_um, levels[0].factors) == (shape, voxel_um, (1, 1, 1))
    assert levels[0].translation_um == (0.0, 0.0, 0.0)
    assert max(levels[-1].shape) <= 128
    for below, level in pairwise(levels):
        assert max(below.shape) > 128
        assert max(level.factors) == 2
        for axis in range(3):
            factor = level.factors[axis]
            assert level.shape[axis] == -(-below.shape[axis] // factor)
            assert level.scale_um[axis] == below.scale_um[axis] * factor
            assert factor == 1 or below.shape[axis] >= 64
            corner = level.translation_um[axis] - level.scale_um[axis] / 2
            assert corner == pytest.approx(-voxel_um[axis] / 2)


def test_levels_tend_to_isotropic_voxels():
    levels = plan_pyramid((1500, 6000, 6000), (8.0, 1.0, 1.0))
    assert [level.factors for level in levels] == [(1, 1, 1), *[(1, 2, 2)] * 3, *[(2, 2, 2)] * 4]
    assert levels[-1].scale_um == (128.0, 128.0, 128.0)
    levels = plan_pyramid((400, 400, 400), (5.0, 5.26, 5.26))
    assert [level.factors for level in levels[1:]] == [(2, 2, 2)] * 2
    assert len(plan_pyramid((128, 128, 128), (5.0, 1.0, 1.0))) == 1
    assert plan_pyramid((3, 300, 300), (1.0, 1.0, 1.0))[-1].shape == (3, 75, 75)


def new_output(path: Path, levels, dtype, side, group=""):
    output = create_output(path, overwrite=False, voxel_size_um=levels[0].scale_um)
    for number, level in enumerate(levels):
        chunk, shard = chunk_and_shard(tuple(min(side, n) for n in level.shape))
        name = f"{group}/{number}".lstrip("/")
        output.create_array(name, shape=level.shape, dtype=dtype, chunk=chunk, shard=shard)
    return output


@pytest.mark.parametrize(
    ("group", "method", "dtype"), [("", "mean", "uint16"), ("labels/cells", "nearest", "uint32")]
)
@pytest.mark.parametrize("side", [25, 48, 1000])
def test_regions_make_the_level_that_the_whole_array_makes(tmp_path, group, method, dtype, side):
    shape = (33, 71, 139)
    levels = plan_pyramid(shape, (8.0, 4.0, 2.0), smallest=9)
    assert len({level.factors for level in levels}) >= 3
    output = new_output(tmp_path / "out.zarr", levels, dtype, side, group)
    below = np.random.default_rng(5).integers(0, 60000, shape).astype(dtype)
    output.write_block(f"{group}/0".lstrip("/"), Box.whole(shape), below)
    for number, level in enumerate(levels[1:], start=1):
        for box in Box.whole(level.shape).tiles((side,) * 3):
            downsample_region(output, group, number, box, method=method)
        if method == "mean":
            below = mean(below, level.factors)
        else:
            below = nearest(below, level.factors, upper=number % 2 == 1)
        np.testing.assert_array_equal(output.array(f"{group}/{number}".lstrip("/"))[...], below)


def test_nearest_does_not_drift_from_level_to_level(tmp_path):
    """After n levels a label lies within a third of a coarse voxel of its centre, not half of one."""
    shape = (1, 1, 4096)
    levels = plan_pyramid(shape, (1.0, 1.0, 1.0), smallest=16)
    output = new_output(tmp_path / "out.zarr", levels, "uint32", 4096)
    output.write_block("0", Box.whole(shape), np.arange(4096, dtype=np.uint32).reshape(shape))
    for number, level in enumerate(levels[1:], start=1):
        downsample_region(output, "", number, Box.whole(level.shape), method="nearest")
        picked = output.array(str(number))[0, 0].astype(float)
        spacing = level.scale_um[2]
        centres = level.translation_um[2] + spacing * np.arange(len(picked))
        assert np.abs(picked - centres).max() <= spacing / 4 + 0.5 * (number == 1)


def test_a_level_of_the_wrong_shape_and_a_cut_shard_are_refused(tmp_path):
    output = create_output(tmp_path / "out.zarr", overwrite=False, voxel_size_um=(1.0, 1.0, 1.0))
    output.create_array("0", shape=(10, 10, 10), dtype="uint16", chunk=(5, 5, 5), shard=(10, 10, 10))
    output.create_array("1", shape=(4, 5, 5), dtype="uint16", chunk=(4, 5, 5), shard=(4, 5, 5))
    with pytest.raises(ValueError, match="halved"):
        downsample_region(output, "", 1, Box.whole((4, 5, 5)), method="mean")
    for level, side in ((0, 10), (1, 5)):
        shape = (side, side, side)
        output.create_array(f"labels/cells/{level}", shape=shape, dtype="u4", chunk=(5, 5, 5), shard=shape)
    with pytest.raises(ValueError, match="whole shards"):
        downsample_region(output, "labels/cells", 1, Box((0, 0, 0), (2, 5, 5)), method="nearest")


def test_memory_follows_the_slab_not_the_region(tmp_path):
    peaks = {}
    for depth in (64, 256):
        levels = plan_pyramid((depth, 128, 128), (1.0, 1.0, 1.0), smallest=40)[:2]
        output = new_output(tmp_path / f"{depth}.zarr", levels, "uint16", 1000)
        values = np.random.default_rng(0).integers(0, 60000, levels[0].shape).astype(np.uint16)
        output.write_block("0", Box.whole(levels[0].shape), values)
        del values
        tracemalloc.start()
        downsample_region(output, "", 1, Box.whole(levels[1].shape), method="mean")
        peaks[depth] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    source_bytes = 256 * 128 * 128 * 2
    assert peaks[256] < peaks[64] + source_bytes
