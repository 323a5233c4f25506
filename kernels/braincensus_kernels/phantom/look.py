"""What surrounds the cells of a phantom: textured tissue, and bright things that are not cells.

Both are added to the light of a box after its cells; then the picture is taken (`camera`).
"""

from __future__ import annotations

from math import sqrt

import numpy as np
import numpy.typing as npt

from braincensus_kernels.boxes import Box
from braincensus_kernels.phantom.hashing import ARTEFACT, TEXTURE, hash_of, jit, key_of, u64, unit
from braincensus_kernels.phantom.profiles import BlurTable, add_balls, span
from braincensus_kernels.phantom.tissue import fourth

_ARTEFACT_TILE_UM = 300.0
_ARTEFACT_RADIUS_UM = (30.0, 90.0)
# Scales of the texture along z and across, um; the finest are as anisotropic as the blur makes them.
_TEXTURE_UM = ((25.0, 10.0), (50.0, 25.0), (100.0, 100.0), (400.0, 400.0))
# Standard deviation of cubic B-spline noise with uniform [-1, 1] coefficients, averaged over position.
_SPLINE_STD = sqrt((151 / 315) ** 3 / 3)


def add_artefacts(
    light: npt.NDArray[np.float32],
    box: Box,
    *,
    seed: int,
    size_um: npt.NDArray[np.float64],
    end_um: npt.NDArray[np.float64],
    tissue: npt.NDArray[np.float64],
    per_mm3: float,
    brightest: float,
    table: BlurTable,
) -> None:
    """Add the artefacts that reach into a box: large soft balls, and small ones blurred as cells are."""
    if not per_mm3:
        return
    start = np.array(box.start)
    reach = max(_ARTEFACT_RADIUS_UM[1], table.reach_um)
    lo = np.maximum(0, np.floor((start * size_um - reach) / _ARTEFACT_TILE_UM)).astype(np.int64)
    hi = np.floor((np.array(box.stop) * size_um + reach) / _ARTEFACT_TILE_UM).astype(np.int64) + 1
    mean = per_mm3 * (_ARTEFACT_TILE_UM / 1000) ** 3
    found = _artefacts(u64(key_of(seed, ARTEFACT)), lo, hi, end_um, tissue, mean, brightest)
    _add_blobs(light, start, size_um, found[found[:, 4] > 0])
    small = found[found[:, 4] == 0]
    which = np.zeros(len(small), np.int64)
    add_balls(light, start, size_um, small[:, :3].copy(), which, small[:, 3].copy(), *table.arrays)


def add_tissue(
    light: npt.NDArray[np.float32],
    box: Box,
    *,
    seed: int,
    size_um: npt.NDArray[np.float64],
    tissue: npt.NDArray[np.float64],
    texture: float,
    level: float,
) -> None:
    """Add tissue of a mean level (counts above darkness) and a relative deviation, `texture`."""
    scales = [s for s in _TEXTURE_UM if s[1] >= 1.5 * size_um.max()]
    amount = texture / sqrt(len(scales)) / _SPLINE_STD if scales else 0.0
    start = np.array(box.start)
    pattern = np.ones(light.shape, np.float32)
    for number, scale in enumerate(scales if amount else []):
        step = size_um / np.array([scale[0], scale[1], scale[1]])
        _add_texture(pattern, start, step, u64(key_of(seed, TEXTURE, number)), np.float32(amount))
    _add_tissue(light, pattern, start, size_um, tissue, level)


@jit
def _artefacts(key, lo, hi, end, tissue, mean, bright):  # type: ignore[no-untyped-def]
    """Artefacts of a range of their own tiles: z, y, x, brightness, radius (0: a small one)."""
    found = np.zeros((max(hi[0] - lo[0], 0) * max(hi[1] - lo[1], 0) * max(hi[2] - lo[2], 0) * 8, 5))
    n = 0
    p = np.zeros(3)
    for z in range(lo[0], hi[0]):
        for y in range(lo[1], hi[1]):
            for x in range(lo[2], hi[2]):
                tile_key = hash_of(hash_of(hash_of(key, z), y), x)
                for j in range(8):
                    one = hash_of(tile_key, j)
                    if unit(one) >= mean / 8:
                        continue
                    q = 0.0
                    outside = False
                    for axis in range(3):
                        corner = z if axis == 0 else (y if axis == 1 else x)
                        p[axis] = (corner + unit(hash_of(one, axis))) * _ARTEFACT_TILE_UM
                        outside |= p[axis] >= end[axis]
                        q += fourth((p[axis] - tissue[axis]) * tissue[3 + axis])
                    if outside or q > tissue[6]:
                        continue
                    found[n, 0], found[n, 1], found[n, 2] = p[0], p[1], p[2]
                    if unit(hash_of(one, 3)) < 0.5:
                        found[n, 3] = bright * (0.5 + 2.5 * unit(hash_of(one, 4)))
                        radius = unit(hash_of(one, 5))
                        found[n, 4] = _ARTEFACT_RADIUS_UM[0] * (1 - radius) + _ARTEFACT_RADIUS_UM[1] * radius
                    else:
                        found[n, 3] = bright * (10 + 30 * unit(hash_of(one, 4)))
                    n += 1
    return found[:n]


@jit
def _add_blobs(light, start, size, blobs):  # type: ignore[no-untyped-def]
    for i in range(len(blobs)):
        r = blobs[i, 4]
        z0, z1 = span(blobs[i, 0], r, size[0], start[0], light.shape[0])
        y0, y1 = span(blobs[i, 1], r, size[1], start[1], light.shape[1])
        x0, x1 = span(blobs[i, 2], r, size[2], start[2], light.shape[2])
        for z in range(z0, z1):
            dz = (z + start[0] + 0.5) * size[0] - blobs[i, 0]
            for y in range(y0, y1):
                dy = (y + start[1] + 0.5) * size[1] - blobs[i, 1]
                for x in range(x0, x1):
                    dx = (x + start[2] + 0.5) * size[2] - blobs[i, 2]
                    s = 1 - (dz * dz + dy * dy + dx * dx) / (r * r)
                    if s > 0:
                        light[z, y, x] += np.float32(blobs[i, 3] * s * s)


@jit
def _spline(start, n, step):  # type: ignore[no-untyped-def]
    """Node before each voxel centre, and the cubic B-spline weights of the four around it."""
    node = np.zeros(n, np.int64)
    weight = np.zeros((n, 4), np.float32)
    for i in range(n):
        t = (start + i + 0.5) * step
        node[i] = int(np.floor(t))
        t -= node[i]
        weight[i, 0] = (1 - t) ** 3 / 6
        weight[i, 1] = (4 - 6 * t * t + 3 * t * t * t) / 6
        weight[i, 2] = (1 + 3 * t + 3 * t * t - 3 * t * t * t) / 6
        weight[i, 3] = t * t * t / 6
    return node, weight


@jit
def _add_texture(texture, start, step, key, amount):  # type: ignore[no-untyped-def]
    """Add smooth noise of one scale: a cubic B-spline with hashed coefficients."""
    nz, ny, nx = texture.shape
    node_z, wz = _spline(start[0], nz, step[0])
    node_y, wy = _spline(start[1], ny, step[1])
    node_x, wx = _spline(start[2], nx, step[2])
    my, mx = node_y[-1] - node_y[0] + 4, node_x[-1] - node_x[0] + 4
    ring = np.zeros((4, my, mx), np.float32)
    plane = np.zeros((my, mx), np.float32)
    line = np.zeros(mx, np.float32)
    held = node_z[0] - 2
    for z in range(nz):
        while held < node_z[z] + 2:
            held += 1
            plane_key = hash_of(key, held)
            for j in range(my):
                line_key = hash_of(plane_key, node_y[0] - 1 + j)
                for i in range(mx):
                    value = hash_of(line_key, node_x[0] - 1 + i)
                    ring[held & 3, j, i] = np.float32(2 * unit(value) - 1) * amount
        a, b, c, d = (held + 1) & 3, (held + 2) & 3, (held + 3) & 3, held & 3
        for j in range(my):
            for i in range(mx):
                plane[j, i] = (wz[z, 0] * ring[a, j, i] + wz[z, 1] * ring[b, j, i]) + (
                    wz[z, 2] * ring[c, j, i] + wz[z, 3] * ring[d, j, i]
                )
        for y in range(ny):
            j = node_y[y] - node_y[0]
            for i in range(mx):
                line[i] = (wy[y, 0] * plane[j, i] + wy[y, 1] * plane[j + 1, i]) + (
                    wy[y, 2] * plane[j + 2, i] + wy[y, 3] * plane[j + 3, i]
                )
            for x in range(nx):
                i = node_x[x] - node_x[0]
                texture[z, y, x] += (wx[x, 0] * line[i] + wx[x, 1] * line[i + 1]) + (
                    wx[x, 2] * line[i + 2] + wx[x, 3] * line[i + 3]
                )


@jit
def _add_tissue(light, texture, start, size, tissue, level):  # type: ignore[no-untyped-def]
    nz, ny, nx = light.shape
    qx = np.zeros(nx)
    for x in range(nx):
        qx[x] = fourth(((start[2] + x + 0.5) * size[2] - tissue[2]) * tissue[5])
    slope = 1 / (tissue[7] - tissue[6])
    for z in range(nz):
        qz = fourth(((start[0] + z + 0.5) * size[0] - tissue[0]) * tissue[3])
        for y in range(ny):
            qy = fourth(((start[1] + y + 0.5) * size[1] - tissue[1]) * tissue[4])
            for x in range(nx):
                s = min(max((tissue[7] - (qz + qy + qx[x])) * slope, 0.0), 1.0)
                light[z, y, x] += np.float32(level * (s * s * (3 - 2 * s))) * max(
                    texture[z, y, x], np.float32(0)
                )
