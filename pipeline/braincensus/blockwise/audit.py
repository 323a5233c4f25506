"""What `label_blocks` says about its seams: counts, and the places of the first of each kind."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from braincensus_kernels.boxes import Triple
from braincensus_kernels.seam_density import SeamDensity

MOST_LISTED = 1000
"""Places that each list of the audit holds; all are counted."""


@dataclass(frozen=True)
class Disagreement:
    """A voxel beside a seam that two blocks gave to different cells.

    Attributes
    ----------
    zyx
        The voxel.
    blocks
        Numbers of the two blocks.
    labels
        The cell that each of them put there, by its label in the result: 0 is background, None a cell
        that this block alone saw and that did not come into the result.
    """

    zyx: Triple
    blocks: tuple[int, int]
    labels: tuple[int | None, int | None]


@dataclass(frozen=True)
class UnmatchedCrossing:
    """A cell that, as one block saw it, reaches into another, which has no cell to match it.

    Attributes
    ----------
    zyx
        The first voxel, in raster order, that the cell has in its block.
    label
        Its label in the result.
    blocks
        The block that saw it so, and the other one.
    """

    zyx: Triple
    label: int
    blocks: tuple[int, int]


@dataclass(frozen=True)
class LabelBlocksAudit:
    """What `label_blocks` proved about its seams.

    Attributes
    ----------
    cells
        In the result.
    blocks, faces
        Blocks, and faces between them.
    block_pairs
        Pairs of blocks compared: across faces, edges and corners.
    voxels_compared
        Voxels right beside a seam, once for each pair of blocks that compared them.
    crossings
        Cells found on both sides of a face, once for each face that they cross.
    merges
        Pairs of cells of two blocks that were joined.
    conflicts
        Matches refused because they would have fused two cells of one block.
    disagreeing_voxels, disagreements
        Of the voxels compared, those that the two blocks gave to different cells; the first of them.
    unmatched_crossings, unmatched
        Cells that reach into a block without a match there, once for each such block; the first of them.
    larger_than_halo, larger_than_halo_zyx
        Cells that reach the end of what their block read: the halo is too narrow to show them whole. The
        first voxels of the first of them.
    density_check
        Whether cells are as dense beside the seams as elsewhere; None if blocks are too small to tell.
    """

    cells: int
    blocks: int
    faces: int
    block_pairs: int
    voxels_compared: int
    crossings: int
    merges: int
    conflicts: int
    disagreeing_voxels: int
    disagreements: tuple[Disagreement, ...]
    unmatched_crossings: int
    unmatched: tuple[UnmatchedCrossing, ...]
    larger_than_halo: int
    larger_than_halo_zyx: tuple[Triple, ...]
    density_check: SeamDensity | None

    @property
    def exact(self) -> bool:
        """Whether all blocks agreed on every voxel beside every seam, and no match was refused."""
        return self.disagreeing_voxels == 0 and self.conflicts == 0

    def summary(self) -> dict[str, Any]:
        """Give all of it as JSON can hold it."""
        density = self.density_check.summary() if self.density_check else None
        return {"exact": self.exact, **asdict(self), "density_check": density}
