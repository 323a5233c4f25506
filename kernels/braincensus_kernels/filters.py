"""Gaussian blur of one box of a volume: the first step of Voronoi-Otsu labelling.

The arithmetic is that of clEsperanto's kernel: float32, weighted voxels summed in order of position, the sum
divided by the sum of the weights, axes x, y, z. No operation is fused with another, and weights come from the
host, so the blur of a voxel is the same bits in whichever block it is computed, and on either array library.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numba import njit

from braincensus_kernels.backend import array_module, is_cupy
from braincensus_kernels.boxes import Box, Triple

Sigma = float | Sequence[float]

# Read without conversion by the compiled blur; other dtypes are first converted to float32.
_READ_DIRECTLY = (np.dtype(np.uint8), np.dtype(np.uint16), np.dtype(np.float32))


def as_sigmas(sigma: Sigma, *, name: str = "sigma") -> tuple[float, float, float]:
    """Return one standard deviation per axis (z, y, x), in voxels.

    Raises
    ------
    ValueError
        If there are not one or three of them, or one is negative, infinite or NaN.

    Examples
    --------
    >>> as_sigmas(0.65)
    (0.65, 0.65, 0.65)
    """
    values = [float(s) for s in np.atleast_1d(np.asarray(sigma, dtype=np.float64))]
    if len(values) == 1:
        values *= 3
    if len(values) != 3 or not all(math.isfinite(s) and s >= 0 for s in values):
        raise ValueError(
            f"{name} must be one number or three (z, y, x), finite and not negative: got {sigma!r}"
        )
    return values[0], values[1], values[2]


def blur_radius(sigma: float) -> int:
    """Return the half-width in voxels of the Gaussian kernel that clEsperanto uses.

    The kernel is ``int(8 sigma)`` voxels wide, one more if that is even.

    Examples
    --------
    >>> [blur_radius(s) for s in (0.0, 0.5, 0.65, 1.0, 2.0)]
    [0, 2, 2, 4, 8]
    """
    return int(8 * sigma) // 2


def blur_radii(sigma: Sigma) -> Triple:
    """Return :func:`blur_radius` per axis (z, y, x)."""
    z, y, x = (blur_radius(s) for s in as_sigmas(sigma))
    return z, y, x


def gaussian_weights(sigma: float) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return the kernel's float32 weights; the centre's is 1, so they are to be divided by their sum."""
    radius = blur_radius(sigma)
    # Each is rounded from float64: a float32 exponential differs between processors.
    weights = [math.exp(-(k * k) / (2 * sigma * sigma)) if k else 1.0 for k in range(-radius, radius + 1)]
    return np.array(weights, dtype=np.float32)


def _sum_in_order(weights: np.ndarray[Any, np.dtype[np.float32]]) -> np.float32:
    total = np.float32(0)
    for weight in weights:
        total += weight
    return np.float32(total)


def gaussian_blur(image: Any, *, outer: Box, inner: Box, volume_shape: Triple, sigma: Sigma) -> Any:
    """Blur the voxels of `inner`, given those of `outer`.

    The volume continues beyond its own border with its outermost voxels (clamped); `outer` must hold
    everything else that the kernel reaches, so no voxel of the result depends on where `outer` ends.

    Parameters
    ----------
    image
        Voxels of `outer`, real, NumPy or CuPy.
    outer, inner
        The box given and the box wanted, both inside the volume.
    volume_shape
        Shape of the whole volume.
    sigma
        Standard deviation in voxels, one or per axis (z, y, x).

    Returns
    -------
    float32 array of ``inner.shape``, of the same library as `image`.

    Raises
    ------
    ValueError
        If `image` is not of ``outer.shape``, or `outer` lacks voxels that the blur of `inner` reaches.

    Notes
    -----
    Matches ``clEsperanto.gaussian_blur`` (its OpenCL compiler may fuse multiplications and additions, which
    changes last bits).
    """
    sigmas = as_sigmas(sigma)
    if tuple(image.shape) != outer.shape:
        raise ValueError(f"the image has shape {tuple(image.shape)}, its box {outer.shape}")
    reached = inner.dilate(blur_radii(sigmas)).clip(volume_shape)
    if inner.size and not outer.contains(reached):
        raise ValueError(f"the blur of {inner} reads {reached}, which {outer} does not hold")
    sources = [
        np.clip(np.arange(start - radius, stop + radius), 0, end - 1) - origin
        for start, stop, radius, end, origin in zip(
            inner.start, inner.stop, blur_radii(sigmas), volume_shape, outer.start, strict=True
        )
    ]
    weights = [gaussian_weights(s) for s in sigmas]
    if is_cupy(image):
        return blur_generic(image, sources=sources, weights=weights)
    if image.dtype not in _READ_DIRECTLY:
        image = image.astype(np.float32)
    blurred = np.empty(inner.shape, np.float32)
    if inner.size:
        norms = [_sum_in_order(w) for w in weights]
        # Read-only, as arrays from other processes are: one compiled version serves all.
        voxels = np.ascontiguousarray(image).view()
        voxels.flags.writeable = False
        _blur_planes(voxels, blurred, *sources, *weights, *norms)
    return blurred


def blur_generic(image: Any, *, sources: Sequence[Any], weights: Sequence[Any]) -> Any:
    """Blur with whole-array operations of either library: the same bits as the compiled blur.

    Parameters
    ----------
    image
        Real array.
    sources
        Per axis, where the voxels of the result widened by the radius are in `image`.
    weights
        Per axis, the weights of the kernel.
    """
    xp = array_module(image)
    blurred = image.astype(xp.float32)
    for axis in (2, 1, 0):
        blurred = _blur_axis(xp, blurred, axis=axis, source=sources[axis], weights=weights[axis])
    return blurred


def _blur_axis(xp: Any, image: Any, *, axis: int, source: Any, weights: Any) -> Any:
    n = len(source) - len(weights) + 1
    widened = xp.moveaxis(xp.take(image, xp.asarray(source), axis=axis), axis, 0)
    total = widened[:n] * weights[0]
    for k in range(1, len(weights)):
        total += widened[k : k + n] * weights[k]
    total /= _sum_in_order(weights)
    return xp.ascontiguousarray(xp.moveaxis(total, 0, axis))


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _blur_planes(  # pragma: no cover - compiled
    image: Any,
    blurred: Any,
    z_from: Any,
    y_from: Any,
    x_from: Any,
    z_weights: Any,
    y_weights: Any,
    x_weights: Any,
    z_norm: Any,
    y_norm: Any,
    x_norm: Any,
) -> None:
    """Blur plane by plane: x and y into a ring of planes, from which z is summed.

    The image is read once and the result written once; the ring stays in cache.
    """
    nz, ny, nx = blurred.shape
    depth = len(z_weights)
    first_row = y_from[0]
    rows = y_from[-1] - first_row + 1
    ring = np.empty((depth, ny, nx), np.float32)
    along_x = np.empty((rows, nx), np.float32)
    row = np.empty(len(x_from), np.float32)
    total = np.empty(nx, np.float32)
    # x_from repeats its first value, then counts up, then repeats its last: the middle is copied as a block.
    left = 0
    while left + 1 < len(x_from) and x_from[left + 1] == x_from[0]:
        left += 1
    inside = x_from[-1] - x_from[0] + 1
    next_plane = z_from[0]
    for z in range(nz):
        while next_plane <= z_from[z + depth - 1]:
            for r in range(rows):
                source = image[next_plane, first_row + r]
                row[:left] = source[x_from[0]]
                for i in range(inside):
                    row[left + i] = source[x_from[0] + i]
                row[left + inside :] = source[x_from[-1]]
                out = along_x[r]
                if len(x_weights) == 1:
                    out[:] = row
                else:
                    _first_three(out, total, row, row[1:], row[2:], x_weights, x_norm)
                    for k in range(3, len(x_weights), 2):
                        _next_two(out, total, row[k:], row[k + 1 :], x_weights, k, x_norm)
            for y in range(ny):
                out = ring[next_plane % depth, y]
                a = along_x[y_from[y] - first_row]
                if len(y_weights) == 1:
                    out[:] = a
                else:
                    b, c = along_x[y_from[y + 1] - first_row], along_x[y_from[y + 2] - first_row]
                    _first_three(out, total, a, b, c, y_weights, y_norm)
                    for k in range(3, len(y_weights), 2):
                        a, b = along_x[y_from[y + k] - first_row], along_x[y_from[y + k + 1] - first_row]
                        _next_two(out, total, a, b, y_weights, k, y_norm)
            next_plane += 1
        for y in range(ny):
            out = blurred[z, y]
            a = ring[z_from[z] % depth, y]
            if len(z_weights) == 1:
                out[:] = a
            else:
                b, c = ring[z_from[z + 1] % depth, y], ring[z_from[z + 2] % depth, y]
                _first_three(out, total, a, b, c, z_weights, z_norm)
                for k in range(3, len(z_weights), 2):
                    a, b = ring[z_from[z + k] % depth, y], ring[z_from[z + k + 1] % depth, y]
                    _next_two(out, total, a, b, z_weights, k, z_norm)


# Weights come two more at a time, so that a row of sums is loaded and stored half as often.


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _first_three(  # pragma: no cover - compiled
    out: Any, total: Any, a: Any, b: Any, c: Any, weights: Any, norm: Any
) -> None:
    """Weigh the first three rows; give the result if there are no more."""
    u, v, w = weights[0], weights[1], weights[2]
    if len(weights) == 3:
        for i in range(len(out)):
            out[i] = (a[i] * u + b[i] * v + c[i] * w) / norm
    else:
        for i in range(len(out)):
            total[i] = a[i] * u + b[i] * v + c[i] * w


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _next_two(
    out: Any, total: Any, a: Any, b: Any, weights: Any, k: int, norm: Any
) -> None:  # pragma: no cover
    """Add the rows k and k + 1, weighted; give the result if they are the last."""
    u, v = weights[k], weights[k + 1]
    if k + 2 == len(weights):
        for i in range(len(out)):
            out[i] = (total[i] + a[i] * u + b[i] * v) / norm
    else:
        for i in range(len(out)):
            total[i] = total[i] + a[i] * u + b[i] * v
