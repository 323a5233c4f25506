"""The output: one OME-Zarr 0.5 container, written shard by shard, whole only when it is finished.

    <output>/                 foreground probability, multiscale image: 0, 1, ... (uint16, zyx)
      labels/cells/           instance labels, multiscale: 0, 1, ... (uint32 or uint64, zyx)
      density/                cells per mm^3: 0 (float32, zyx)
      tables/cells/           one row per cell: Parquet parts, an ngio feature table
      tables/blocks/          one row per block: Parquet, an ngio generic table
      braincensus/            working files of the run: intermediate arrays, per-block files

`places` says whether an output may be begun at a path; `container` holds the handle and the life of an
output (begun, written, finished); `root` its root attributes; `arrays` reads and writes blocks of voxels;
`pyramids` makes the coarser levels; `tables` the Parquet parts; `ome_metadata` says, as pure values, what
the attributes of a finished output are; `files` writes single files, each whole or absent; `marks` says which
blocks are done, with what they gave (`packing`); `lock` keeps a second run away.
"""

from braincensus.store.arrays import chunk_and_shard
from braincensus.store.container import Output, create_output, open_output, reopen_output
from braincensus.store.places import check_free
from braincensus.store.pyramids import PyramidLevel, downsample_region, plan_pyramid
from braincensus.store.tables import CellTable, open_cells, write_blocks_table, write_cells_part

__all__ = [
    "CellTable",
    "Output",
    "PyramidLevel",
    "check_free",
    "chunk_and_shard",
    "create_output",
    "downsample_region",
    "open_cells",
    "open_output",
    "plan_pyramid",
    "reopen_output",
    "write_blocks_table",
    "write_cells_part",
]
