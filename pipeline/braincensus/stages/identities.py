"""Who a cell is, and which block it belongs to: what the label and the stitch stage share.

A cell is known by one voxel of it (the raster index in the volume). Its owner is the block whose core
holds that voxel: the block that joins its parts. Where two voxels turn out to stand for one cell, one
is an alias of the other, the smaller; the list of aliases is a sorted file that workers map.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from braincensus.blocks import BlockGrid
from braincensus.store import Output
from braincensus.worker import keep
from braincensus_kernels.union_find import connected


def ids_name(number: int) -> str:
    """Name of a block's working file: the identity of each of its local labels."""
    return f"ids/{number:07d}"


def owners_of(seeds: np.ndarray, grid: BlockGrid) -> np.ndarray:
    """Return the number of the block whose core holds each voxel (raster index in the volume)."""
    _, ny, nx = grid.counts
    z, y, x = (
        axis // side
        for axis, side in zip(np.unravel_index(seeds, grid.volume_shape), grid.block_shape, strict=True)
    )
    owners: np.ndarray = (z * ny + y) * nx + x
    return owners


@dataclass(frozen=True)
class Aliases:
    """Voxels that stand for the cell of another voxel; all others stand for themselves."""

    output: Output
    name: str
    size: int

    def of(self, seeds: np.ndarray) -> np.ndarray:
        """Return the one voxel that each cell is known by."""
        if self.size == 0:
            return seeds
        old, new = self.pairs()
        place = np.minimum(np.searchsorted(old, seeds), len(old) - 1)
        return np.where(old[place] == seeds, new[place], seeds)

    def pairs(self) -> np.ndarray:
        """Return aliases and what they stand for: int64, (2, size), the first row ascending; mapped once."""
        return keep("aliases", (self.output.token, self.name), lambda: self.output.map_work(self.name))


def write_aliases(output: Output, name: str, same: list[np.ndarray]) -> Aliases:
    """Join pairs of voxels that stand for one cell, and write every alias as a file.

    Parameters
    ----------
    output, name
        Where.
    same
        int64 arrays of shape (n, 2).
    """
    seeds, smallest = connected(np.concatenate([np.empty((0, 2), np.int64), *same]))
    changed = seeds != smallest
    output.write_map(name, np.stack([seeds[changed], smallest[changed]]))
    return Aliases(output, name, int(changed.sum()))
