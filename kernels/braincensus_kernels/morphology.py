"""Grey closing of one box of the foreground, before it is blurred and labelled: fills gaps and holes.

A dilation by a ball (each voxel takes the largest value of the ball around it), then an erosion (the
smallest). Values are only picked, never computed, so closing and then thresholding gives the binary closing
of the thresholded foreground, at any threshold, and every block and array library gives the same values.

At the volume's border the ball is cut off: what is outside does not exist, rather than being dark or bright.
So the closing is nowhere below the image, and closing again changes nothing, at the border as elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Any

from braincensus_kernels.backend import array_module, is_cupy
from braincensus_kernels.boxes import Box, Triple

Radii = tuple[float, float, float]

_GPU_SLAB_BYTES = 1 << 26
"""Planes of this size together are widened at once on a GPU; on a CPU one, which stays in cache."""


def closing_reach(radius_voxels: Sequence[float]) -> Triple:
    """Return how far, in voxels, a closing looks on the axes z, y, x.

    Examples
    --------
    >>> closing_reach((1.6, 2, 0))
    (2, 4, 0)
    """
    z, y, x = (math.floor(r) for r in _as_radii(radius_voxels))
    return 2 * z, 2 * y, 2 * x


def closing(
    image: Any, *, outer: Box, inner: Box, volume_shape: Triple, radius_voxels: Sequence[float]
) -> Any:
    """Close the voxels of `inner` by a ball, given those of `outer`.

    Parameters
    ----------
    image
        Voxels of `outer`, real or boolean, without NaN; NumPy or CuPy.
    outer, inner
        The box given and the box wanted, both inside the volume.
    volume_shape
        Shape of the whole volume.
    radius_voxels
        Radius r on the axes z, y, x: the ball holds the offsets d with a sum of ``(d / r)**2`` of at most 1.
        On an axis of radius 0 it holds offset 0 only.

    Returns
    -------
    array of ``inner.shape``, of the type and library of `image`; a copy where every radius is below 1.

    Raises
    ------
    ValueError
        If `image` is not of ``outer.shape``, or `outer` lacks voxels that the closing of `inner` reaches.

    Examples
    --------
    >>> import numpy as np
    >>> row, box = np.array([[[9, 0, 3, 0, 0, 0, 7]]]), Box.whole((1, 1, 7))
    >>> closing(row, outer=box, inner=box, volume_shape=box.shape, radius_voxels=(0, 0, 1))
    array([[[9, 3, 3, 0, 0, 0, 7]]])
    """
    radii = _as_radii(radius_voxels)
    if tuple(image.shape) != outer.shape:
        raise ValueError(f"the image has shape {tuple(image.shape)}, its box {outer.shape}")
    if image.dtype.kind not in "biuf":
        raise TypeError(f"expected an image of real numbers, got {image.dtype}")
    reached = inner.dilate(closing_reach(radii)).clip(volume_shape)
    if inner.size and not outer.contains(reached):
        raise ValueError(f"the closing of {inner} reads {reached}, which {outer} does not hold")
    z, y, x = (math.floor(r) for r in radii)
    if inner.size == 0 or not (z or y or x):
        return image[inner.slices_in(outer)].copy()
    xp = array_module(image)
    between = inner.dilate((z, y, x)).clip(volume_shape)
    dilated = _over_ball(
        xp.maximum, image[reached.slices_in(outer)], given=reached, wanted=between, radii=radii
    )
    return _over_ball(xp.minimum, dilated, given=between, wanted=inner, radii=radii)


def _as_radii(radius_voxels: Sequence[float]) -> Radii:
    radii = tuple(float(r) for r in radius_voxels)
    if len(radii) != 3 or not all(math.isfinite(r) and r >= 0 for r in radii):
        raise ValueError(f"expected three radii (z, y, x), finite and not negative, got {radius_voxels!r}")
    return radii[0], radii[1], radii[2]


@lru_cache(maxsize=16)
def _half_widths(radii: Radii) -> tuple[tuple[int, ...], ...]:
    """Half the ball's extent along x, for each offset from 0 along z and then along y.

    In exact fractions: which offsets lie on the sphere itself is not left to rounding.
    """

    def share(offset: int, axis: int) -> Fraction:
        return (Fraction(offset) / Fraction(radii[axis])) ** 2 if offset else Fraction(0)

    z, y, x = (math.floor(r) for r in radii)
    ball = []
    for dz in range(z + 1):
        rows = []
        for dy in range(y + 1):
            left = 1 - share(dz, 0) - share(dy, 1)
            if left < 0:
                break
            rows.append(max(dx for dx in range(x + 1) if share(dx, 2) <= left))
        ball.append(tuple(rows))
    return tuple(ball)


def _over_ball(pick: Any, image: Any, *, given: Box, wanted: Box, radii: Radii) -> Any:
    """Pick the largest or the smallest value of the ball around each wanted voxel.

    Plane by plane of what is given: rows are widened along x to all half-widths of the ball, then put
    together to its discs, one for each distance along z, each of which serves the planes on both sides.
    """
    ball = _half_widths(radii)
    inside = wanted.slices_in(given)
    result = image[inside].copy()
    z_first, y_first = inside[0].start, inside[1].start
    depth, height, _ = result.shape
    planes = max(1, _GPU_SLAB_BYTES // max(1, image[0].nbytes)) if is_cupy(image) else 1
    for start in range(0, len(image), planes):
        slab = image[start : start + planes]
        widened = _widened(pick, slab, sorted({w for rows in ball for w in rows}), inside[2])
        for dz, rows in enumerate(ball):
            # Where planes of this slab are in the result once they are moved down, or up, by dz.
            moved = [start - z_first + sign * dz for sign in ((-1, 1) if dz else (1,))]
            parts = [(max(at, 0), min(at + len(slab), depth), at) for at in moved]
            parts = [(a, b, at) for a, b, at in parts if a < b]
            if not parts:
                continue
            disc = widened[rows[0]][:, y_first : y_first + height].copy()
            for dy in range(1, len(rows)):
                for shift in (y_first - dy, y_first + dy):
                    a, b = max(0, -shift), min(height, slab.shape[1] - shift)
                    if a < b:
                        pick(disc[:, a:b], widened[rows[dy]][:, a + shift : b + shift], out=disc[:, a:b])
            for a, b, at in parts:
                pick(result[a:b], disc[a - at : b - at], out=result[a:b])
    return result


def _widened(pick: Any, slab: Any, half_widths: Sequence[int], wanted: slice) -> dict[int, Any]:
    """For each half-width, the pick of the window along x around each voxel of the wanted columns."""
    xp = array_module(slab)
    widened = {}
    line = slab
    for width in range(half_widths[-1] + 1):
        if width:
            wider = line.copy()
            pick(wider[..., 1:], line[..., :-1], out=wider[..., 1:])
            pick(wider[..., :-1], line[..., 1:], out=wider[..., :-1])
            line = wider
        if width in half_widths:
            widened[width] = xp.ascontiguousarray(line[..., wanted])
    return widened
