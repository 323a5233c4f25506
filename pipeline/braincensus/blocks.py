"""A volume cut into blocks: pure values, no I/O.

A block is a core (the voxels that it alone writes) and, around it, a halo (voxels that it only
reads). Cores tile the volume without gap or overlap; halos overlap their neighbours::

        |<------------- outer ------------->|
        |  halo  |      core       |  halo  |
        .........###################.........
                                   ^ face shared with the next block

Everything derives from the position in the grid, so that a grid of a million blocks costs as
much memory as a grid of one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from math import prod

from braincensus_kernels.boxes import Box, Triple


@dataclass(frozen=True, slots=True)
class Block:
    """One unit of compute: what it writes (`core`) and what it reads (`outer`, clipped to the volume)."""

    number: int
    index: Triple
    core: Box
    outer: Box


@dataclass(frozen=True, slots=True)
class Face:
    """The face between two neighbouring blocks: `low` ends where `high` starts, along `axis`."""

    axis: int
    low: int
    high: int


@dataclass(frozen=True, slots=True)
class BlockGrid:
    """All blocks of a volume, in raster order (z slowest).

    Parameters
    ----------
    volume_shape
        Voxels of the volume, zyx.
    block_shape
        Voxels of a core; trailing blocks are cut by the volume, down to one voxel.
    halo
        Voxels read beyond the core on each side of each axis.

    Examples
    --------
    >>> grid = BlockGrid((100, 64, 64), (64, 64, 64), (8, 8, 8))
    >>> len(grid), grid[1].core, grid[1].outer.start
    (2, Box(start=(64, 0, 0), stop=(100, 64, 64)), (56, 0, 0))
    """

    volume_shape: Triple
    block_shape: Triple
    halo: Triple = (0, 0, 0)

    def __post_init__(self) -> None:
        if min(self.volume_shape) < 1 or min(self.block_shape) < 1 or min(self.halo) < 0:
            raise ValueError(
                f"a grid needs positive shapes and a halo of 0 or more: volume {self.volume_shape}, "
                f"block {self.block_shape}, halo {self.halo}"
            )

    @property
    def counts(self) -> Triple:
        """Number of blocks along each axis."""
        z, y, x = (-(-n // b) for n, b in zip(self.volume_shape, self.block_shape, strict=True))
        return z, y, x

    def __len__(self) -> int:
        return prod(self.counts)

    def __iter__(self) -> Iterator[Block]:
        return (self[number] for number in range(len(self)))

    def __getitem__(self, number: int) -> Block:
        if not 0 <= number < len(self):
            raise IndexError(f"block {number} of {len(self)}")
        _, ny, nx = self.counts
        index = (number // (ny * nx), number // nx % ny, number % nx)
        return self.at(index)

    def at(self, index: Triple) -> Block:
        """Return the block at a position in the grid."""
        start = (
            index[0] * self.block_shape[0],
            index[1] * self.block_shape[1],
            index[2] * self.block_shape[2],
        )
        core = Box((0, 0, 0), self.block_shape).shift(start).clip(self.volume_shape)
        _, ny, nx = self.counts
        number = (index[0] * ny + index[1]) * nx + index[2]
        return Block(number, index, core, core.dilate(self.halo).clip(self.volume_shape))

    @property
    def n_faces(self) -> int:
        """Number of faces between neighbouring blocks."""
        z, y, x = self.counts
        return (z - 1) * y * x + z * (y - 1) * x + z * y * (x - 1)

    def faces(self) -> Iterator[Face]:
        """Every face between two neighbouring blocks, once, by the number of its lower block."""
        for block in self:
            yield from self.upper_faces(block)

    def upper_faces(self, block: Block) -> list[Face]:
        """Return the faces (at most three) between a block and its next neighbour along each axis."""
        faces = []
        for axis in range(3):
            index = list(block.index)
            index[axis] += 1
            if index[axis] < self.counts[axis]:
                faces.append(Face(axis, block.number, self.at((index[0], index[1], index[2])).number))
        return faces

    def neighbours(self, block: Block, distance_voxels: int) -> list[int]:
        """Return the numbers of the blocks within a distance of this block's core, itself included."""
        near = block.core.dilate(distance_voxels).clip(self.volume_shape)
        return self.numbers_in(near)

    def numbers_in(self, box: Box) -> list[int]:
        """Return the numbers of the blocks whose core meets `box`, in raster order."""
        if box.size == 0:
            return []
        ranges = [
            range(lo // b, -(-hi // b))
            for lo, hi, b in zip(box.start, box.stop, self.block_shape, strict=True)
        ]
        _, ny, nx = self.counts
        return [(z * ny + y) * nx + x for z, y, x in product(*ranges)]
