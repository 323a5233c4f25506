"""Where the cells of a phantom are: the second step of its making, from how many each tile has.

Cells are placed by random trials no closer than the minimum separation, in an order of corners, edges,
faces and insides of tiles that makes a tile's cells depend on its 26 neighbours and no more. Radius and
brightness are drawn along.
"""

from __future__ import annotations

import numpy as np

from braincensus_kernels.phantom.hashing import hash_of, jit, unit
from braincensus_kernels.phantom.tissue import fourth

_TRIALS = 64  # in a cell's own part of a tile before it moves to the inside
_TRIALS_INSIDE = 200_000


@jit
def _part(u, tile, reach):  # type: ignore[no-untyped-def]
    """Part of a tile: on each axis near the low side (1), near the high side (2) or neither (0)."""
    side = np.zeros(3, np.int64)
    d = np.zeros(3)
    for axis in range(3):
        side[axis] = 1 if u[axis] < tile[axis] - u[axis] else 2
        d[axis] = min(u[axis], tile[axis] - u[axis])
    for kind in (3, 2, 1):  # corner, edge, face: near on this many axes
        near = (d[0] < reach[kind]) + (d[1] < reach[kind]) + (d[2] < reach[kind])
        if near >= kind:
            code = 0
            for axis in range(3):
                code = code * 3 + (side[axis] if d[axis] < reach[kind] else 0)
            return kind, code
    return 0, 0


@jit
def place_cells(  # type: ignore[no-untyped-def]
    key, look, lo, counts, labels, tile, end, tissue, separation, clustered, spread, radii, brightness, gauss
):
    """Place the cells of a range of tiles; exact for those that are not at the range's border.

    Around corners is within reach[3] of a lattice plane on all three axes, along edges within reach[2]
    on two, on faces within reach[1] on one. With half a separation for faces and 1/sqrt(2) more for each
    next, two parts of one kind are a separation apart, and a part comes near those of an earlier kind
    only if they bound it; a tile of 4.9 separations keeps opposite sides apart as well.
    """
    reach = np.array([0.0, 0.5, 0.5 + np.sqrt(0.5), 0.5 + 2 * np.sqrt(0.5)]) * (separation * 1.0001)
    nz, ny, nx = counts.shape
    total = counts.sum()
    rows = np.zeros((total, 6))
    kind = np.zeros(total, np.int64)
    code = np.zeros(total, np.int64)
    home = np.zeros((total, 3))
    middle = np.zeros((total, 3))  # of the cluster, if any
    keys = np.zeros(total, np.uint64)
    in_cluster = np.zeros(total, np.bool_)
    u, p, size = np.zeros(3), np.zeros(3), np.zeros(3)
    n = 0
    for z in range(nz):
        for y in range(ny):
            for x in range(nx):
                tile_key = hash_of(hash_of(hash_of(key, lo[0] + z), lo[1] + y), lo[2] + x)
                look_key = hash_of(hash_of(hash_of(look, lo[0] + z), lo[1] + y), lo[2] + x)
                corner = ((lo[0] + z) * tile[0], (lo[1] + y) * tile[1], (lo[2] + x) * tile[2])
                for axis in range(3):
                    size[axis] = min(tile[axis], end[axis] - corner[axis])
                for j in range(counts[z, y, x]):
                    cell = hash_of(tile_key, 1 + j)
                    keys[n] = cell
                    in_cluster[n] = unit(hash_of(cell, 0)) < clustered
                    trial = 0
                    while True:  # ends: a tile with cells has a twentieth of its volume or more in tissue
                        trial += 1
                        for axis in range(3):
                            t = unit(hash_of(hash_of(cell, trial), axis))
                            home[n, axis] = corner[axis]
                            if in_cluster[n] and trial < _TRIALS:
                                m = unit(hash_of(hash_of(tile_key, 0), axis)) * size[axis]
                                middle[n, axis] = m
                                t = m + spread * gauss[np.int64(t * 65536)]
                            else:
                                t *= size[axis]
                            u[axis] = t
                            p[axis] = corner[axis] + t
                        if _free(u, p, size, tissue):
                            break
                    kind[n], code[n] = _part(u, tile, reach)
                    rows[n, 0] = labels[z, y, x] + j
                    rows[n, 4] = radii[np.int64(unit(hash_of(hash_of(look_key, j), 0)) * len(radii))]
                    share = 0.5 * (
                        unit(hash_of(hash_of(look_key, j), 1)) + unit(hash_of(hash_of(look_key, j), 2))
                    )
                    rows[n, 5] = brightness[0] * (brightness[1] / brightness[0]) ** share
                    n += 1

    # Buckets of one separation, each a linked list, find what is near.
    origin = np.zeros(3)
    shape = np.zeros(3, np.int64)
    for axis in range(3):
        origin[axis] = lo[axis] * tile[axis]
        shape[axis] = np.int64(counts.shape[axis] * tile[axis] / separation) + 1
    head = np.full((shape[0], shape[1], shape[2]), -1, np.int32)
    after = np.full(total, -1, np.int32)
    lost = 0
    bucket = np.zeros(3, np.int64)
    for stage in (3, 2, 1, 0):
        for i in range(total):
            if kind[i] != stage:
                continue
            for axis in range(3):
                size[axis] = min(tile[axis], end[axis] - home[i, axis])
            done = False
            limit = _TRIALS if stage else _TRIALS_INSIDE
            for trial in range(limit):
                cell = hash_of(keys[i], 1000 + 1000000 * stage + trial)
                rest = code[i]
                for axis in (2, 1, 0):
                    side = rest % 3
                    rest //= 3
                    t = unit(hash_of(cell, axis))
                    if in_cluster[i] and trial < 200:
                        # Wider and wider, so that a full cluster spills over its edge.
                        t = middle[i, axis] + spread * (1 + 0.02 * trial) * gauss[np.int64(t * 65536)]
                    elif side == 1:
                        t *= min(reach[stage], size[axis])
                    elif side == 2:
                        t = tile[axis] - reach[stage] * (1 - t)
                    else:
                        t *= size[axis]
                    u[axis] = t
                    p[axis] = home[i, axis] + t
                if not _free(u, p, size, tissue):
                    continue
                k, c = _part(u, tile, reach)
                if k != stage or c != code[i]:
                    continue
                clash = False
                for axis in range(3):
                    bucket[axis] = np.int64((p[axis] - origin[axis]) / separation)
                for bz in range(max(0, bucket[0] - 1), min(shape[0], bucket[0] + 2)):
                    for by in range(max(0, bucket[1] - 1), min(shape[1], bucket[1] + 2)):
                        for bx in range(max(0, bucket[2] - 1), min(shape[2], bucket[2] + 2)):
                            other = head[bz, by, bx]
                            while other >= 0 and not clash:
                                dz, dy = rows[other, 1] - p[0], rows[other, 2] - p[1]
                                dx = rows[other, 3] - p[2]
                                clash = dz * dz + dy * dy + dx * dx < separation * separation
                                other = after[other]
                if not clash:
                    done = True
                    break
            if done:
                rows[i, 1], rows[i, 2], rows[i, 3] = p[0], p[1], p[2]
                after[i] = head[bucket[0], bucket[1], bucket[2]]
                head[bucket[0], bucket[1], bucket[2]] = i
            elif stage:
                kind[i], code[i] = 0, 0
            else:
                lost += 1
    return rows, lost


@jit
def _free(u, p, size, tissue):  # type: ignore[no-untyped-def]
    """Whether a place is in its tile, the volume and the tissue."""
    q = 0.0
    for axis in range(3):
        if u[axis] < 0 or u[axis] >= size[axis]:
            return False
        q += fourth((p[axis] - tissue[axis]) * tissue[3 + axis])
    return q <= tissue[6]
