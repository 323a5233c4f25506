"""What every labeller gives for one block: local labels, each with an identity that needs no other block.

A labeller reads a block's core and the halo around it (`outer`), and gives labels of the core and one
voxel more on each side (`kept`). A local label is known by the raster index, in the volume, of one voxel:

- a seed, which every block that sees the cell derives alike (Voronoi-Otsu; watershed from maxima): two
  blocks name one cell by one number, and stitching has nothing to find out;
- or the smallest voxel *that the block sees* of something without a bound (a connected component; a seed
  that is one): then two blocks may name one cell by two of its voxels. The voxels that prove it are its
  `anchors`: where two blocks both have an anchor on one voxel, their two numbers are one cell. Since every
  number is a voxel of the thing itself, the smallest of all is the same for any blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from braincensus_kernels.boxes import Box


def _none() -> NDArray[np.int64]:
    return np.empty(0, np.int64)


@dataclass(frozen=True)
class BlockLabels:
    """Labels of one block.

    Attributes
    ----------
    labels
        uint32 over `kept`, local ids 1..n, 0 for background; of the array library of the image.
    kept
        The core and one voxel around it, clipped to the volume.
    seeds
        int64 ``(n,)``, host memory, ascending: identity of local id i + 1, a raster index in the volume.
    growth_steps
        The last step that labelled a voxel of the core; the largest of all blocks is the volume's. 0 for
        labellers that do not grow by steps.
    stopped_by_bound
        Whether foreground of the core was left out that more steps would have reached.
    foreground_voxels
        Foreground voxels of the core.
    unreached_voxels
        Those of them that are in no cell: no seed reaches them, or none within the bound.
    complete
        True: the labels are those of the whole volume. False: they may not be, because something that
        matters here continues beyond what was given; label again with a larger `outer`.
    anchors
        Boolean over `kept`, host memory: the voxels on which two blocks' identities are equal by
        construction; None where identities are the volume's from the start.
    unanchored
        int64, ascending, host memory: those of `seeds` that may be incomplete and have no anchor in
        `kept`. The block whose core holds the voxel of that index has one there.
    """

    labels: Any
    kept: Box
    seeds: NDArray[np.int64]
    growth_steps: int
    stopped_by_bound: bool
    foreground_voxels: int
    unreached_voxels: int
    complete: bool
    anchors: NDArray[np.bool_] | None = None
    unanchored: NDArray[np.int64] = field(default_factory=_none)
