"""Distance of foreground voxels to the background, exact in whole numbers and with a limit.

Before the watershed by distance: the middle of a cell is far from the background. The spacing of voxels is
in whole numbers (nanometres, say), so a squared distance is a whole number, too, and no rounding depends on
where an array starts. The squared distance is a sum over axes, so its minimum is found one axis after the
other, each within a window: no farther than the limit. Hence the result of a voxel depends on what is within
:func:`distance_radii` of it, and is the same in every block that holds so much.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from braincensus_kernels.backend import array_module, is_cupy
from braincensus_kernels.boxes import Triple


def distance_radii(spacing: Triple, limit: int) -> Triple:
    """Return how many voxels around a voxel its distance depends on, per axis (z, y, x).

    Background at the limit or beyond changes nothing.

    Examples
    --------
    >>> distance_radii((1, 1, 1), 5)
    (4, 4, 4)
    >>> distance_radii((5000, 5260, 5260), 20_000)
    (3, 3, 3)
    """
    _check(spacing, limit)
    z, y, x = ((limit - 1) // step for step in spacing)
    return z, y, x


def squared_distance(mask: Any, *, spacing: Triple, limit: int) -> Any:
    """Return the squared distance of each True voxel to the nearest False voxel of the array.

    Parameters
    ----------
    mask
        Boolean, 3D; NumPy or CuPy. Beyond the array is nothing: no background either.
    spacing
        Distance of neighbouring voxels per axis (z, y, x), whole numbers of any one unit.
    limit
        In the same unit: distances are at most this, also where there is no False voxel.

    Returns
    -------
    int32 if it surely holds what is added, else int64; 0 where the mask is False.

    Raises
    ------
    ValueError
        If the mask is not boolean and 3D, or a length is not a whole number of at least 1.

    Examples
    --------
    >>> mask = np.array([[[0, 1, 1, 1, 1, 1, 1, 1]]], bool)
    >>> squared_distance(mask, spacing=(7, 3, 2), limit=9)
    array([[[ 0,  4, 16, 36, 64, 81, 81, 81]]], dtype=int32)
    """
    _check(spacing, limit)
    if mask.ndim != 3 or mask.dtype != np.bool_:
        raise ValueError(f"expected a boolean 3D mask, got {mask.dtype}, shape {tuple(mask.shape)}")
    if is_cupy(mask):
        return squared_distance_generic(mask, spacing=spacing, limit=limit)
    dtype = _dtype(limit)
    along_x, along_y = np.zeros(mask.shape, dtype), np.zeros(mask.shape, dtype)
    cap = dtype.type(limit * limit)
    _nearest_in_rows(np.ascontiguousarray(mask), along_x, spacing[2], cap)
    _nearest_along_y(along_x, along_y, spacing[1])
    _nearest_along_z(along_y, along_x, spacing[0])
    return along_x


def squared_distance_generic(mask: Any, *, spacing: Triple, limit: int) -> Any:
    """Compute with whole-array operations of either library: the same numbers as the compiled code's."""
    xp = array_module(mask)
    nearest = xp.where(mask, limit * limit, 0).astype(_dtype(limit))
    for axis, (step, radius) in enumerate(zip(spacing, distance_radii(spacing, limit), strict=True)):
        before = xp.moveaxis(nearest, axis, 0)
        after = before.copy()
        for k in range(1, min(radius, before.shape[0] - 1) + 1):
            xp.minimum(after[k:], before[:-k] + (k * step) ** 2, out=after[k:])
            xp.minimum(after[:-k], before[k:] + (k * step) ** 2, out=after[:-k])
        nearest = xp.moveaxis(after, 0, axis)
    return xp.ascontiguousarray(nearest)


def _check(spacing: Triple, limit: int) -> None:
    lengths = (*spacing, limit)
    if len(lengths) != 4 or not all(isinstance(n, int | np.integer) and n >= 1 for n in lengths):
        raise ValueError(
            f"spacing (z, y, x) and limit must be whole numbers of at least 1: got {spacing}, {limit}"
        )
    if max(lengths) > 2**31:
        raise ValueError(
            f"spacing and limit must be at most 2**31: got {spacing}, {limit}; use a coarser unit"
        )


def _dtype(limit: int) -> np.dtype[Any]:
    """Return a dtype that holds two squares of the limit."""
    return np.dtype(np.int32 if 2 * limit * limit < 2**31 else np.int64)


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _nearest_in_rows(mask: Any, out: Any, step: int, cap: Any) -> None:  # pragma: no cover - compiled
    """Write the squared distance within rows, run by run of the foreground."""
    nz, ny, nx = mask.shape
    farthest = (np.sqrt(np.float64(cap)) + 0.5) // step  # more steps than this reach the cap
    for z in range(nz):
        for y in range(ny):
            row = mask[z, y]
            x = 0
            while x < nx:
                if not row[x]:
                    x += 1
                    continue
                start = x
                while x < nx and row[x]:
                    x += 1
                for i in range(start, x):
                    left = i - start + 1 if start > 0 else nx + 1
                    right = x - i if x < nx else nx + 1
                    k = min(left, right)
                    out[z, y, i] = min(cap, (k * step) ** 2) if k <= min(farthest, nx) else cap


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _nearest_along_y(before: Any, after: Any, step: int) -> None:  # pragma: no cover - compiled
    nz, ny, nx = before.shape
    for z in range(nz):
        for y in range(ny):
            for x in range(nx):
                best = before[z, y, x]
                k = 1
                square = step * step
                while square < best:
                    if y >= k:
                        best = min(best, before[z, y - k, x] + square)
                    if y + k < ny:
                        best = min(best, before[z, y + k, x] + square)
                    if k > y and y + k >= ny:
                        break
                    k += 1
                    square = (k * step) ** 2
                if best > 0:
                    after[z, y, x] = best


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _nearest_along_z(before: Any, after: Any, step: int) -> None:  # pragma: no cover - compiled
    nz, ny, nx = before.shape
    for z in range(nz):
        for y in range(ny):
            for x in range(nx):
                best = before[z, y, x]
                k = 1
                square = step * step
                while square < best:
                    if z >= k:
                        best = min(best, before[z - k, y, x] + square)
                    if z + k < nz:
                        best = min(best, before[z + k, y, x] + square)
                    if k > z and z + k >= nz:
                        break
                    k += 1
                    square = (k * step) ** 2
                if best > 0:
                    after[z, y, x] = best
