"""A check that seams leave no trace: cells must be as dense near the faces between blocks as beyond.

After stitch, or after measure, in the flow; needs positions only. A cell that a seam cuts in two, or
loses, changes the density beside that seam. So along each axis cells are counted by their distance from
the nearest seam, and those nearer than a width are compared with those one to three widths away::

         far    | near  seam  near |    far
      3w ...... w ........|........ w ...... 3w

The two far bands lie evenly on both sides of the near one, so a density that changes smoothly through
the tissue cancels. Counts are integers and add up, so the parts of a large table may be counted anywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from braincensus_kernels.boxes import Triple

_FAR = 3
"""Where the far band ends, in widths."""


@dataclass(frozen=True)
class SeamDensity:
    """What the check found; per axis zyx, None where an axis has no seam.

    Attributes
    ----------
    width_voxels
        Cells nearer to a seam than this are near; up to three times this, far.
    near
        Cells seen near a seam.
    expected
        Cells that the density of the far bands puts there.
    z_scores
        Difference of the two in standard deviations, if cells lay at random (real cells keep a
        distance from one another, so that they scatter less: the score is cautious).
    """

    width_voxels: int
    near: tuple[int | None, int | None, int | None]
    expected: tuple[float | None, float | None, float | None]
    z_scores: tuple[float | None, float | None, float | None]

    @property
    def z_score(self) -> float:
        """The axes' scores in one: of a standard normal deviate where seams leave no trace."""
        scores = [score for score in self.z_scores if score is not None]
        return sum(scores) / sqrt(len(scores))

    def summary(self) -> dict[str, Any]:
        """Give the provenance."""
        return {
            "width_voxels": self.width_voxels,
            "near": list(self.near),
            "expected": [None if n is None else round(n, 1) for n in self.expected],
            "z_scores": [None if z is None else round(z, 2) for z in self.z_scores],
            "z_score": round(self.z_score, 2),
        }


@dataclass(frozen=True, eq=False)
class SeamCounts:
    """Cells by their distance from the nearest seam; parts of one volume add up.

    Attributes
    ----------
    block_shape, volume_shape
        Voxels of a block's core, and of the volume; seams lie at the multiples of the block's side.
    cells
        For each axis int64, (2, half a side). ``cells[axis][0, d]``: cells at a distance of d voxels (0:
        in a voxel beside it) from any seam but the axis' last one; ``cells[axis][1, d]``: from the last,
        beyond which the volume may end before the bands do.
    """

    block_shape: Triple
    volume_shape: Triple
    cells: tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]

    def __add__(self, other: SeamCounts) -> SeamCounts:
        if (self.block_shape, self.volume_shape) != (other.block_shape, other.volume_shape):
            raise ValueError(
                f"counts of blocks {self.block_shape} in {self.volume_shape} and of {other.block_shape} in "
                f"{other.volume_shape} do not add up"
            )
        z, y, x = (a + b for a, b in zip(self.cells, other.cells, strict=True))
        return SeamCounts(self.block_shape, self.volume_shape, (z, y, x))

    @property
    def widest(self) -> int:
        """The largest width for which both bands fit between seams; 0 where none does."""
        sides = [b for b, n in zip(self.block_shape, self.volume_shape, strict=True) if n > b]
        return min(sides, default=0) // (2 * _FAR)

    def check(self, width_voxels: int) -> SeamDensity | None:
        """Compare the cells near the seams with those farther away.

        Parameters
        ----------
        width_voxels
            At most `widest`; about the size of a cell is good.

        Returns
        -------
        SeamDensity or None
            None if there is no seam, or no room for the bands.
        """
        if width_voxels < 1:
            raise ValueError(f"width_voxels must be 1 or more, got {width_voxels}")
        if width_voxels > self.widest:
            return None
        z, y, x = (self._along(axis, width_voxels) for axis in range(3))
        if z is y is x is None:
            return None
        near, expected, score = zip(*(axis or (None, None, None) for axis in (z, y, x)), strict=True)
        return SeamDensity(width_voxels, near, expected, score)

    def _along(self, axis: int, width: int) -> tuple[int, float, float] | None:
        """Near, expected and score of an axis; None without a seam whose bands are whole."""
        side, extent = self.block_shape[axis], self.volume_shape[axis]
        seams = -(-extent // side) - 1
        beyond_last = extent - seams * side
        if seams < 1:
            return None
        whole = self.cells[axis][0].copy()
        if beyond_last >= _FAR * width:
            whole += self.cells[axis][1]
        elif seams == 1:
            return None
        near, far = int(whole[:width].sum()), int(whole[width : _FAR * width].sum())
        share = 1 / (_FAR - 1)
        # Of Poisson counts with one density: var(near - share * far) = share * (near + far), expected.
        deviation = sqrt(share * (near + far))
        return near, share * far, (near - share * far) / deviation if deviation else 0.0


def count_near_seams(zyx_voxels: NDArray[Any], *, block_shape: Triple, volume_shape: Triple) -> SeamCounts:
    """Count cells by their distance from the nearest seam, along each axis.

    Parameters
    ----------
    zyx_voxels : (n, 3)
        Positions: voxel indices, or centroids in voxels (voxel i reaches from i - 0.5 to i + 0.5).
    block_shape, volume_shape
        Voxels of a block's core, and of the volume.

    Returns
    -------
    SeamCounts

    Examples
    --------
    >>> part = count_near_seams(np.array([[0, 0, 11]]), block_shape=(12, 12, 12), volume_shape=(12, 12, 24))
    >>> (part + part).cells[2][1].tolist()
    [2, 0, 0, 0, 0, 0]
    """
    positions = np.asarray(zyx_voxels)
    if positions.ndim != 2 or positions.shape[1] != 3:
        raise ValueError(f"expected positions of shape (n, 3), got {positions.shape}")
    if min(block_shape) < 1 or min(volume_shape) < 1:
        raise ValueError(f"shapes must be positive, got block {block_shape}, volume {volume_shape}")
    if positions.dtype.kind not in "iu":
        positions = np.floor(positions + 0.5)
    positions = positions.astype(np.int64)
    if len(positions) and not ((positions >= 0) & (positions < volume_shape)).all():
        raise ValueError(f"some positions lie outside the volume of {volume_shape}")
    z, y, x = (_histogram(positions[:, axis], block_shape[axis], volume_shape[axis]) for axis in range(3))
    return SeamCounts(block_shape, volume_shape, (z, y, x))


def _histogram(position: NDArray[np.int64], side: int, extent: int) -> NDArray[np.int64]:
    longest = side // 2
    counts = np.zeros((2, longest), np.int64)
    seams = -(-extent // side) - 1
    if seams < 1 or longest < 1:
        return counts
    nearest = np.clip((position + side // 2) // side, 1, seams)
    offset = position - nearest * side
    distance = np.where(offset >= 0, offset, -1 - offset)
    within = distance < longest
    np.add.at(counts, ((nearest == seams)[within].astype(np.int64), distance[within]), 1)
    return counts


def seam_density(
    zyx_voxels: NDArray[Any], *, block_shape: Triple, volume_shape: Triple, width_voxels: int
) -> SeamDensity | None:
    """Compare the density of cells near the seams with that farther away.

    Parameters
    ----------
    zyx_voxels : (n, 3)
        Positions of all cells, in voxels.
    block_shape, volume_shape
        Voxels of a block's core, and of the volume.
    width_voxels
        Cells nearer to a seam than this are near; up to three times this, far.

    Returns
    -------
    SeamDensity or None
        None if there is no seam, or no room for the bands between seams.

    Examples
    --------
    >>> everywhere = np.argwhere(np.ones((6, 6, 24)))
    >>> found = seam_density(everywhere, block_shape=(6, 6, 12), volume_shape=(6, 6, 24), width_voxels=2)
    >>> found.near[2], found.expected[2], found.z_score
    (144, 144.0, 0.0)
    """
    counts = count_near_seams(zyx_voxels, block_shape=block_shape, volume_shape=volume_shape)
    return counts.check(width_voxels)
