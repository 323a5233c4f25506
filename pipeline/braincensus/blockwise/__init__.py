"""Any array, any labeller, block by block: `label_blocks`, one number per cell in the end.

    copy -> label -> match -> join -> relabel
            1 a block  2 a block   3 here  4 a block

1. **label**: a block's core and halo go through the labeller, once. The labels get dense numbers, the
   core's cells first, and are kept in a working folder; a cell is known by the first voxel, in raster
   order, that it has in the core.
2. **match**: a block and each of its upper neighbours (faces, edges and corners: 13) compare their cells
   on the voxels that both labelled. Two are one cell if each is the other's best overlap and they overlap
   enough; never because they touch. Only cells with voxels in both cores need joining. On the voxels
   right beside the seam, both blocks' beliefs are compared for the audit.
3. **join**: the client joins the matches, so that no chain fuses two cells of one block, and numbers the
   cells 1..N in the order of their first voxels. Blocks leave no trace in that order.
4. **relabel**: each core gets its final labels, through a lookup of that block's own cells.

A connected cell (26 neighbours) that has voxels in two cores has two adjacent voxels, one in each, and
both blocks labelled both. So with a labeller that gives every voxel its true cell, the result is the
truth, voxel for voxel, for every block size and every halo of 1 or more.

`run` takes the steps, one module each, then `seams` puts the `audit` together. `work` is the working folder,
`spec` what every task is given.
"""

from braincensus.blockwise.audit import LabelBlocksAudit
from braincensus.blockwise.run import label_blocks

__all__ = ["LabelBlocksAudit", "label_blocks"]
