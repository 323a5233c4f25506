"""Local background from the map of tile medians, and the foreground that is what exceeds it.

Between intensity and threshold in the flow, for every foreground model. Background
is slow, so it is smoothed on tiles (512 times fewer than voxels) and interpolated. It is a local
function: what a voxel gets depends on the tiles within `background_reach_tiles` of its own, in the
same order of the same operations wherever the block's borders lie, so it has the same bits for any
blocks. That rules out running sums and Fourier transforms; a truncated direct kernel is cheap here.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray
from scipy.ndimage import minimum_filter

from braincensus_kernels.boxes import Box, Triple
from braincensus_kernels.intensity import LATTICE

_TRUNCATE = 3.0
_CENTRE = (LATTICE - 1) / 2
_SURFACE_WEIGHT = 1e-3  # of a tile of tissue beside one that is not


def background_reach_tiles(sigma_tiles: float | tuple[float, float, float]) -> Triple:
    """Tiles around those of a block that `local_background` looks at, per axis.

    Three sigma of the kernel, one for the interpolation, and one to see which tiles lie at the surface.

    Examples
    --------
    >>> background_reach_tiles((2.5, 2.4, 0))
    (10, 10, 2)
    """
    z, y, x = _radii(sigma_tiles)
    return z + 2, y + 2, x + 2


def _sigmas(sigma_tiles: float | tuple[float, float, float]) -> tuple[float, float, float]:
    z, y, x = (sigma_tiles,) * 3 if isinstance(sigma_tiles, int | float) else sigma_tiles
    if not all(np.isfinite(s) and s >= 0 for s in (z, y, x)):
        raise ValueError(f"sigma must be finite and not negative, got {sigma_tiles}")
    return float(z), float(y), float(x)


def _radii(sigma_tiles: float | tuple[float, float, float]) -> Triple:
    z, y, x = (int(np.ceil(_TRUNCATE * s)) for s in _sigmas(sigma_tiles))
    return z, y, x


def local_background(
    tile_median: NDArray[np.float32],
    *,
    tiles: Box,
    box: Box,
    volume_shape: Triple,
    sigma_tiles: float | tuple[float, float, float],
    tissue_threshold: float | None,
    floor: float,
) -> NDArray[np.float32]:
    """Smooth background of every voxel of a box.

    1. Tiles that are not tissue carry no weight: normalised convolution with a Gaussian, so that the
       dark outside does not pull the background down at the surface of the tissue. Nor do tiles at
       that surface, which may be half dark: they count for next to nothing while any other is in reach.
    2. Between tile centres the result is interpolated linearly along each axis, and beyond the
       outermost centres it is kept. A partial tile at the far border has the centre of a full one.

    Parameters
    ----------
    tile_median : float32, zyx, shape of `tiles`
        Medians of the tiles; NaN marks a tile that is not tissue.
    tiles : Box
        Which tiles the array holds, in tiles of the volume's lattice: at least those of `box` and
        `background_reach_tiles` more, clipped to the volume. More changes nothing.
    box : Box
        The voxels wanted, inside of the volume.
    sigma_tiles : float or triple
        Sigma of the Gaussian, in tiles; cut off at three sigma.
    tissue_threshold : float or None
        Medians below it are not tissue; None: all but NaN are.
    floor : float
        Background where no tile of tissue is in reach.

    Returns
    -------
    float32, shape of `box`

    Raises
    ------
    ValueError
        If the array does not hold the tiles that are needed.
    """
    if tile_median.shape != tiles.shape:
        raise ValueError(f"expected medians of {tiles.shape} tiles, got {tile_median.shape}")
    if not Box.whole(volume_shape).contains(box):
        raise ValueError(f"{box} is not inside of a volume of {volume_shape}")
    if box.size == 0:
        return np.empty(box.shape, np.float32)
    grid = tuple(-(-n // LATTICE) for n in volume_shape)
    radii = _radii(sigma_tiles)
    below, above, fractions, starts, stops = [], [], [], [], []
    for axis in range(3):
        position = (np.arange(box.start[axis], box.stop[axis]) - _CENTRE) / LATTICE
        left = np.floor(position).astype(np.int64)
        fractions.append(position - left)
        below.append(np.clip(left, 0, grid[axis] - 1))
        above.append(np.clip(left + 1, 0, grid[axis] - 1))
        starts.append(int(below[axis][0]))
        stops.append(int(above[axis][-1]) + 1)
    nodes = Box((starts[0], starts[1], starts[2]), (stops[0], stops[1], stops[2]))
    reach = nodes.dilate(radii)
    held = reach.dilate(1).intersect(Box.whole((grid[0], grid[1], grid[2])))
    if not tiles.contains(held):
        raise ValueError(
            f"the background of {box} needs the medians of tiles {held}, got only those of {tiles}"
        )

    median = tile_median[held.slices_in(tiles)].astype(np.float64)
    tissue = np.isfinite(median)
    if tissue_threshold is not None:
        tissue &= np.where(tissue, median, -np.inf) >= tissue_threshold
    # beyond what is held there is the volume's border, which is no surface, or what no weight depends on
    inner = minimum_filter(tissue, size=3, mode="constant", cval=True)
    weights = np.where(inner, 1.0, np.where(tissue, _SURFACE_WEIGHT, 0.0))
    weighted, weight = np.zeros(reach.shape), np.zeros(reach.shape)
    # outside of the volume both are 0, and adding 0 changes no bit
    seen = held.intersect(reach)
    weighted[seen.slices_in(reach)] = (weights * np.where(tissue, median, 0.0))[seen.slices_in(held)]
    weight[seen.slices_in(reach)] = weights[seen.slices_in(held)]
    for axis, (sigma, radius) in enumerate(zip(_sigmas(sigma_tiles), radii, strict=True)):
        kernel = _gaussian(sigma, radius)
        weighted, weight = _correlate(weighted, kernel, axis), _correlate(weight, kernel, axis)
    smooth = np.where(weight > 0, weighted / np.where(weight > 0, weight, 1.0), float(floor))

    background = np.empty(box.shape, np.float32)
    _interpolate(
        smooth,
        *(index - start for index, start in zip(below, nodes.start, strict=True)),
        *(index - start for index, start in zip(above, nodes.start, strict=True)),
        *fractions,
        background,
    )
    return background


def _gaussian(sigma: float, radius: int) -> NDArray[np.float64]:
    steps = np.arange(-radius, radius + 1)
    kernel: NDArray[np.float64] = np.exp(-0.5 * (steps / sigma) ** 2) if radius else np.ones(1)
    return kernel


def _correlate(values: NDArray[np.float64], kernel: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
    """Sum shifted copies, first to last: each output is the same operations in the same order."""
    values = np.moveaxis(values, axis, 0)
    n = values.shape[0] - kernel.size + 1
    total = np.zeros((n, *values.shape[1:]))
    for k, weight in enumerate(kernel):
        total += weight * values[k : k + n]
    return np.moveaxis(total, 0, axis)


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _interpolate(
    nodes: Any,
    z0: Any,
    y0: Any,
    x0: Any,
    z1: Any,
    y1: Any,
    x1: Any,
    fz: Any,
    fy: Any,
    fx: Any,
    background: Any,
) -> None:
    """Interpolate along z, then y, then x; a + f (b - a) is exactly a where b is."""
    row = np.empty(nodes.shape[2])
    for i in range(background.shape[0]):
        for j in range(background.shape[1]):
            for k in range(nodes.shape[2]):
                a = nodes[z0[i], y0[j], k]
                a += fz[i] * (nodes[z1[i], y0[j], k] - a)
                b = nodes[z0[i], y1[j], k]
                b += fz[i] * (nodes[z1[i], y1[j], k] - b)
                row[k] = a + fy[j] * (b - a)
            for k in range(background.shape[2]):
                a = row[x0[k]]
                background[i, j, k] = a + fx[k] * (row[x1[k]] - a)


def foreground_from_intensity(
    values: NDArray[np.float32],
    background: NDArray[np.float32],
    *,
    floor: float,
    median: float,
    high: float,
) -> NDArray[np.float32]:
    """Map intensity to a foreground from 0 to 1 by its contrast to the local background.

    The contrast is ``(value - background) / max(background, floor)``. A ratio, because what varies
    slowly in light-sheet data multiplies: illumination, absorption and clearing scale cell and tissue
    around it alike, and cancel. A difference would find fewer cells in the dark half of a volume.
    Contrast 0 maps to 0 and the contrast of the top of the tissue's range, ``(high - median) /
    median``, to 1, linearly; beyond, it is clipped.

    Parameters
    ----------
    values, background : float32, same shape
        Intensity in ``q`` units, and what `local_background` gives.
    floor : float
        Smallest background to divide by, so that noise in the dark is not blown up.
    median, high : float
        Median of tissue and top of its range (`intensity.tissue_median`, `intensity.tissue_range`).

    Examples
    --------
    >>> values, background = np.array([100, 150, 300], np.float32), np.array([100, 100, 50], np.float32)
    >>> foreground_from_intensity(values, background, floor=80, median=100, high=200).tolist()
    [0.0, 0.5, 1.0]
    """
    if not 0 < median < high:
        raise ValueError(f"expected 0 < median < high, got {median} and {high}")
    if not floor > 0:
        raise ValueError(f"the floor must be positive, got {floor}")
    contrast = (values - background) / np.maximum(background, np.float32(floor))
    contrast *= np.float32(median / (high - median))
    foreground: NDArray[np.float32] = np.clip(contrast, np.float32(0), np.float32(1))
    return foreground
