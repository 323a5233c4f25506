"""Cells per mm^3 on a coarse grid: counts per bin, divided by the bin's own volume.

After measure in the flow; reads centroids, never voxels. Voxel i covers [i - 0.5, i + 0.5] voxel
sizes, because the centre of voxel 0 is at 0 um. The grid's first bin starts at the volume's corner,
at -0.5 voxel sizes; bins at the far border are cut by the volume, and have the volume that is left.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Triple = tuple[int, int, int]
TripleUm = tuple[float, float, float]

# Shares of a bin below this are rounding: 100 voxels of 5.26 um are one bin of 526 um, not two.
_ROUNDING = 1e-6


def density_grid_shape(shape: Triple, voxel_size_um: TripleUm, bin_um: TripleUm) -> Triple:
    """Bins along each axis that a volume of this shape needs.

    Examples
    --------
    >>> density_grid_shape((100, 60, 60), (5.0, 5.26, 5.26), (100.0, 100.0, 100.0))
    (5, 4, 4)
    """
    _check_lengths(voxel_size_um, bin_um)
    if min(shape) < 1:
        raise ValueError(f"a volume has at least one voxel along each axis, got {shape}")
    z, y, x = (
        max(1, int(np.ceil(n * size / width - _ROUNDING)))
        for n, size, width in zip(shape, voxel_size_um, bin_um, strict=True)
    )
    return z, y, x


def bin_volumes_mm3(shape: Triple, voxel_size_um: TripleUm, bin_um: TripleUm) -> NDArray[np.float64]:
    """Volume of each bin inside the volume, mm^3; they sum to the volume's."""
    grid = density_grid_shape(shape, voxel_size_um, bin_um)
    widths = []
    for n_bins, n, size, width in zip(grid, shape, voxel_size_um, bin_um, strict=True):
        along = np.full(n_bins, float(width))
        along[-1] = n * size - (n_bins - 1) * width
        widths.append(along)
    z, y, x = widths
    volumes: NDArray[np.float64] = z[:, None, None] * y[:, None] * x * 1e-9
    return volumes


def count_in_bins(
    zyx_um: NDArray[np.float64], bin_um: TripleUm, grid_shape: Triple, *, voxel_size_um: TripleUm
) -> NDArray[np.int64]:
    """Count centroids per bin; counts of parts of the cells add up to the count of all.

    Parameters
    ----------
    zyx_um : float64, (n, 3)
        Centroids, the centre of voxel 0 at 0 um (``z_um``, ``y_um``, ``x_um`` of the cell table).
        A centroid on the edge between two bins counts in the upper one.

    Raises
    ------
    ValueError
        If a centroid is not finite, or lies outside of the grid.

    Examples
    --------
    >>> cells = np.array([[0.0, 0.0, 4.4], [0.0, 0.0, 4.5]])
    >>> count_in_bins(cells, (5, 5, 5), (1, 1, 2), voxel_size_um=(1, 1, 1)).tolist()
    [[[1, 1]]]
    """
    counts = np.zeros(grid_shape, np.int64)
    position, cells = count_in_occupied_bins(zyx_um, bin_um, grid_shape, voxel_size_um=voxel_size_um)
    counts.reshape(-1)[position] = cells
    return counts


def count_in_occupied_bins(
    zyx_um: NDArray[np.float64], bin_um: TripleUm, grid_shape: Triple, *, voxel_size_um: TripleUm
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Count as `count_in_bins`, in memory that grows with the cells and not with the grid.

    Returns
    -------
    position, cells
        Raster indices of the bins that have cells, ascending, and how many each has.
    """
    _check_lengths(voxel_size_um, bin_um)
    zyx_um = np.asarray(zyx_um, np.float64)
    if zyx_um.ndim != 2 or zyx_um.shape[1] != 3:
        raise ValueError(f"expected centroids of shape (n, 3), got {zyx_um.shape}")
    place = (zyx_um + 0.5 * np.array(voxel_size_um, np.float64)) / np.array(bin_um, np.float64)
    limits = np.array(grid_shape)
    if not ((place >= -_ROUNDING) & (place <= limits + _ROUNDING)).all():
        raise ValueError(f"centroids must lie inside of the grid of {grid_shape} bins of {tuple(bin_um)} um")
    index = np.clip(np.floor(place).astype(np.int64), 0, limits - 1)
    flat = np.ravel_multi_index((index[:, 0], index[:, 1], index[:, 2]), grid_shape)
    position, cells = np.unique(flat, return_counts=True)
    return position.astype(np.int64), cells.astype(np.int64)


def density_per_mm3(counts: NDArray[Any], volumes_mm3: NDArray[np.float64]) -> NDArray[np.float32]:
    """Cells per mm^3."""
    if counts.shape != volumes_mm3.shape:
        raise ValueError(f"counts and volumes differ in shape: {counts.shape}, {volumes_mm3.shape}")
    density = np.empty(counts.shape, np.float32)
    np.divide(counts, volumes_mm3, out=density, casting="same_kind")  # in float64, then rounded
    return density


def _check_lengths(voxel_size_um: TripleUm, bin_um: TripleUm) -> None:
    for name, triple in (("voxel size", voxel_size_um), ("bin", bin_um)):
        if len(triple) != 3 or not all(np.isfinite(v) and v > 0 for v in triple):
            raise ValueError(f"the {name} must be three positive lengths, got {triple}")
