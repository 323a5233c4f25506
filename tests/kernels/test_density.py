"""Density: every cell in one bin, every bin with its true volume."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from braincensus_kernels.density import bin_volumes_mm3, count_in_bins, density_grid_shape, density_per_mm3

lengths = st.floats(0.3, 20)


@given(
    shape=st.tuples(*[st.integers(1, 60)] * 3),
    voxel=st.tuples(lengths, lengths, lengths),
    bins=st.tuples(*[st.floats(3, 300)] * 3),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=60, deadline=None)
def test_bins_fill_the_volume_and_hold_every_cell_once(shape, voxel, bins, seed):
    grid = density_grid_shape(shape, voxel_size_um=voxel, bin_um=bins)
    volumes = bin_volumes_mm3(shape, voxel_size_um=voxel, bin_um=bins)
    assert volumes.shape == grid
    assert volumes.min() > 0
    assert volumes.sum() == pytest.approx(np.prod(shape) * np.prod(voxel) * 1e-9)
    rng = np.random.default_rng(seed)
    # every corner of the volume, the centres of the outermost voxels, and cells between
    corners = np.array([[a, b, c] for a in (-0.5, 0) for b in (-0.5, 0) for c in (-0.5, 0)])
    cells = np.concatenate(
        [rng.uniform(-0.5, np.array(shape) - 0.5, (50, 3)), corners, np.array(shape) - 1 - corners]
    )
    cells = cells * voxel
    counts = count_in_bins(cells, voxel_size_um=voxel, bin_um=bins, grid_shape=grid)
    assert counts.dtype == np.int64
    assert counts.sum() == len(cells)
    parts = [
        count_in_bins(part, voxel_size_um=voxel, bin_um=bins, grid_shape=grid)
        for part in np.array_split(rng.permutation(cells), 4)
    ]
    np.testing.assert_array_equal(sum(parts), counts)


def test_an_edge_belongs_to_the_upper_bin():
    voxel, bins = (2.0, 2.0, 2.0), (10.0, 10.0, 10.0)
    grid = density_grid_shape((10, 10, 12), voxel_size_um=voxel, bin_um=bins)
    assert grid == (2, 2, 3)
    # voxels 0..4 fill the first bin, from -1 um to 9 um
    cells = np.array([[0, 0, -1.0], [0, 0, 8.999], [0, 0, 9.0], [0, 0, 19.0], [0, 0, 23.0], [0, 9.0, 0]])
    counts = count_in_bins(cells, voxel_size_um=voxel, bin_um=bins, grid_shape=grid)
    assert counts[0].tolist() == [[2, 1, 2], [1, 0, 0]]
    assert not counts[1].any()


def test_rounding_makes_no_empty_bin():
    for n in range(1, 400):
        assert density_grid_shape((n, n, 1), voxel_size_um=(5.26, 0.1, 1), bin_um=(n * 5.26, 0.1, 1)) == (
            1,
            n,
            1,
        )


def test_density_of_cut_bins_uses_the_volume_that_is_left():
    volumes = bin_volumes_mm3((10, 10, 15), voxel_size_um=(10, 10, 10), bin_um=(100, 100, 100))
    np.testing.assert_allclose(volumes, [[[1e-3, 0.5e-3]]])
    density = density_per_mm3(np.array([[[4, 4]]]), volumes)
    assert density.dtype == np.float32
    np.testing.assert_allclose(density, [[[4000, 8000]]])


def test_what_lies_outside_is_refused():
    for cell in ([0, 0, 25.0], [-2.0, 0, 0], [np.nan, 0, 0]):
        with pytest.raises(ValueError, match="inside of the grid"):
            count_in_bins(
                np.array([cell]), voxel_size_um=(1, 1, 1), bin_um=(10, 10, 10), grid_shape=(2, 2, 2)
            )
    with pytest.raises(ValueError, match="positive"):
        density_grid_shape((4, 4, 4), voxel_size_um=(1, 1, 1), bin_um=(1, 0, 1))
    with pytest.raises(ValueError, match="at least one voxel"):
        density_grid_shape((4, 0, 4), voxel_size_um=(1, 1, 1), bin_um=(1, 1, 1))
    with pytest.raises(ValueError, match="shape"):
        density_per_mm3(np.zeros((1, 1, 1), np.int64), np.ones((1, 1, 2)))
