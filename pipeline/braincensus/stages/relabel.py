"""Stage 6: final labels of every voxel, block by block, in ``labels/cells``.

Each block looks its own seeds up in the sorted seeds of the planes around it (memory-mapped files, of
which it touches a few pages) and writes one shard. No task ever holds a table of all cells.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from braincensus.blocks import BlockGrid
from braincensus.stages.identities import ids_name
from braincensus.stages.label import LOCAL_LABELS
from braincensus.stages.numbering import CellIndex
from braincensus.store import Output, chunk_and_shard
from braincensus.tasks import Context
from braincensus_kernels.relabel import apply_lookup, label_dtype

LABELS = "labels/cells/0"


@dataclass(frozen=True)
class _Relabel:
    grid: BlockGrid
    output: Output
    index: CellIndex


def run(context: Context, index: CellIndex) -> None:
    """Write the labels of all blocks."""
    grid = context.plan.label_grid
    chunk, shard = chunk_and_shard(grid.block_shape)
    dtype = np.dtype(label_dtype(index.n_cells)).name
    context.output.create_array(LABELS, shape=grid.volume_shape, dtype=dtype, chunk=chunk, shard=shard)
    spec = _Relabel(grid, context.output, index)
    with context.stage("relabel", context.plan.voxels):
        for _ in context.map(
            "relabel",
            _relabel_block,
            spec,
            grid,
            name="relabel-block",
        ):
            pass


def _relabel_block(spec: _Relabel, number: int) -> None:
    core = spec.grid[number].core
    seeds = spec.output.read_work(ids_name(number))["seed"]
    labels = spec.output.array(LABELS)
    lookup = np.zeros(len(seeds) + 1, dtype=labels.dtype)
    lookup[1:] = spec.index.labels_of(seeds)
    if lookup.any():
        local = spec.output.read_block(LOCAL_LABELS, core)
        spec.output.write_block(LABELS, core, apply_lookup(local, lookup))
