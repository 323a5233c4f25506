"""How many cells each place of a phantom has: the first step of its making, once tissue is known.

A lattice of tiles covers the volume; the number of cells is split over planes, rows and tiles by
repeated halving. Next come the places of the cells of each tile (`placement`).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, pi, prod

import numpy as np
import numpy.typing as npt

from braincensus_kernels.boxes import Triple
from braincensus_kernels.phantom.hashing import COUNT, hash_of, jit, key_of, u64, unit
from braincensus_kernels.phantom.tissue import tissue_voxels

# Largest share of tissue that spheres of the minimum separation's diameter may fill. Random trials jam
# at 0.38; at half of that every cell finds room in practice.
_MAX_PACKING = 0.19
_TILE_VOXELS = 48  # least side of a tile of the cell lattice


@dataclass(frozen=True)
class Tiles:
    """The lattice of tiles: how much tissue each row of tiles has, and how many cells fit there."""

    voxels: Triple
    grid: Triple
    row_voxels: npt.NDArray[np.int64]
    row_capacity: npt.NDArray[np.int64]
    ground: _Ground

    @classmethod
    def plan(
        cls,
        *,
        shape: Triple,
        voxel_size_um: tuple[float, float, float],
        tissue: npt.NDArray[np.float64],
        separation_um: float,
    ) -> Tiles:
        """Lay the lattice over a volume, and count tissue and room in it."""
        # Five separations: enough for the parts around corners, edges and faces to lie apart (see
        # `placement.place_cells`).
        z, y, x = (max(ceil(5 * separation_um / v), _TILE_VOXELS) for v in voxel_size_um)
        nz, ny, nx = (-(-n // s) for n, s in zip(shape, (z, y, x), strict=True))
        ball_um3 = pi / 6 * separation_um**3
        ground = _Ground(
            side=(z, y, x),
            row_tiles=nx,
            shape=shape,
            size_um=np.array(voxel_size_um, np.float64),
            tissue=tissue,
            cells_per_voxel=_MAX_PACKING * prod(voxel_size_um) / ball_um3,
        )
        voxels, capacity = np.zeros((2, nz, ny), np.int64)
        for plane in range(nz):
            row_voxels, row_capacity = ground.rows(plane, 0, ny)
            voxels[plane], capacity[plane] = row_voxels.sum(axis=1), row_capacity.sum(axis=1)
        return cls((z, y, x), (nz, ny, nx), voxels, capacity, ground)

    def counts(
        self, *, seed: int, total: int, lo: list[int], hi: list[int]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Cells of each tile of a range, and the label of the first one of each."""
        key = key_of(seed, COUNT)
        out, first = np.zeros((2, *(b - a for a, b in zip(lo, hi, strict=True))), np.int64)
        planes = _split(u64(key), total, self.row_voxels.sum(axis=1), self.row_capacity.sum(axis=1))
        plane_first = np.cumsum(planes) - planes
        for z in range(lo[0], hi[0]):
            rows = _split(u64(key_of(key, 1, z)), planes[z], self.row_voxels[z], self.row_capacity[z])
            row_first = np.cumsum(rows) - rows
            voxels, capacity = self.ground.rows(z, lo[1], hi[1])
            for y in range(lo[1], hi[1]):
                tiles = _split(u64(key_of(key, 2, z, y)), rows[y], voxels[y - lo[1]], capacity[y - lo[1]])
                out[z - lo[0], y - lo[1]] = tiles[lo[2] : hi[2]]
                tile_first = np.cumsum(tiles) - tiles + (1 + plane_first[z] + row_first[y])
                first[z - lo[0], y - lo[1]] = tile_first[lo[2] : hi[2]]
        return out, first


@dataclass(frozen=True, kw_only=True)
class _Ground:
    """What decides how many cells fit in a tile."""

    side: Triple
    row_tiles: int
    shape: Triple
    size_um: npt.NDArray[np.float64]
    tissue: npt.NDArray[np.float64]
    cells_per_voxel: float

    def rows(self, z: int, y0: int, y1: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Voxels of tissue of each tile of some rows of a plane, and the cells that fit there."""
        voxels: npt.NDArray[np.int64] = tissue_voxels(
            z, y0, y1, self.row_tiles, np.array(self.side), np.array(self.shape), self.size_um, self.tissue
        )
        return voxels, np.floor(voxels * self.cells_per_voxel).astype(np.int64)


@jit
def _binomial(key, n, p):  # type: ignore[no-untyped-def]
    """Binomial for small n; for large n a rounded normal of the same mean and variance."""
    if n <= 64:
        hits = 0
        for i in range(n):
            hits += unit(hash_of(key, i)) < p
        return np.int64(hits)
    g = -6.0
    for i in range(12):
        g += unit(hash_of(key, i))
    return np.int64(np.floor(n * p + np.sqrt(n * p * (1 - p)) * g + 0.5))


@jit
def _split(key, total, weights, capacity):  # type: ignore[no-untyped-def]
    """Split a number over places by halving; never more than a place's capacity."""
    n = len(weights)
    out = np.zeros(n, np.int64)
    sum_w, sum_c = np.zeros(n + 1, np.int64), np.zeros(n + 1, np.int64)
    for i in range(n):
        sum_w[i + 1], sum_c[i + 1] = sum_w[i] + weights[i], sum_c[i] + capacity[i]
    stack = np.zeros((128, 3), np.int64)
    stack[0, 1], stack[0, 2] = n, total
    depth = 1
    while depth:
        depth -= 1
        a, b, count = stack[depth, 0], stack[depth, 1], stack[depth, 2]
        if count == 0:
            continue
        if b - a == 1:
            out[a] = count
            continue
        mid = (a + b) // 2
        whole = sum_w[b] - sum_w[a]
        left = _binomial(hash_of(hash_of(key, a), b), count, (sum_w[mid] - sum_w[a]) / whole)
        left = max(left, count - (sum_c[b] - sum_c[mid]), 0)
        left = min(left, sum_c[mid] - sum_c[a], count)
        stack[depth, 0], stack[depth, 1], stack[depth, 2] = a, mid, left
        stack[depth + 1, 0], stack[depth + 1, 1], stack[depth + 1, 2] = mid, b, count - left
        depth += 2
    return out
