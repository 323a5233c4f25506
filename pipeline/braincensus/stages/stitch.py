"""Stage 5: from block-local cells to global instance labels, and the audit that proves the seams.

1. Join: names of one thing that several blocks see a part of (`seams`).
2. Audit: at every face, what both blocks believe is compared, voxel by voxel (`seams`).
3. Merge: cells that touch may be one by their border (if asked for); the owner of each cell joins what
   all blocks measured of it, and whole cells are filtered (`cells`).
4. Number: cells are numbered 1..N in the raster order of their seeds, so that labels depend on the
   volume alone (`numbering`).
"""

from __future__ import annotations

import numpy as np

from braincensus.stages import cells, numbering, seams
from braincensus.stages.cells import Merged
from braincensus.stages.identities import Aliases, write_aliases
from braincensus.stages.label import BlockSummary, needs_touching
from braincensus.stages.numbering import CellIndex
from braincensus.stages.seams import SeamAudit
from braincensus.tasks import Context
from braincensus_kernels.intensity import IntensityScale


def run(
    context: Context, blocks: list[BlockSummary], scale: IntensityScale
) -> tuple[CellIndex, SeamAudit, dict[str, int]]:
    """Stitch all blocks; returns the numbering, the audit, and how many cells were merged and removed."""
    plan, output = context.plan, context.output
    border, largest = plan.config.labelling.merge_border, plan.config.filters.max_object_volume_um3
    touching = needs_touching(plan)
    passes = 2 + plan.labeller.joins_by_anchors + (border is not None) + (largest is not None)
    same: list[np.ndarray] = []

    with context.stage("stitch", passes * plan.voxels):
        aliases = write_aliases(output, "aliases_none", same)
        if plan.labeller.joins_by_anchors:
            same.append(seams.join(context, aliases))
            aliases = write_aliases(output, "aliases_joined", same)
        disagreed, finish = seams.audit(context, aliases, blocks)
        if len(disagreed):
            same.append(disagreed)
            aliases = write_aliases(output, "aliases_audited", same)
        cells.write_contributors(context, aliases, blocks)
        by_border = 0
        if border is not None:
            before = aliases.size
            same.append(cells.one_by_border(context, aliases, scale, border))
            aliases = write_aliases(output, "aliases_merged", same)
            by_border = aliases.size - before
            cells.write_contributors(context, aliases, blocks)
        whole = cells.merge(context, aliases, scale, touching=touching, columns=largest is not None)
        in_layers = np.zeros(plan.label_grid.counts[0], np.int64)
        held: list[Merged] = []
        seen = 0
        for found in whole:
            in_layers[found.layer] += found.n_kept
            seen += found.n_cells
            if largest is not None:
                held.append(found)
        excluded = None if largest is None else _of_large_objects(context, aliases, scale, held)
        index = numbering.number(context, aliases, in_layers.tolist(), excluded)
        context.watch.cells(index.n_cells)
    counts = {"merged_by_border": by_border, "removed_by_filters": seen - index.n_cells}
    return index, finish(len(disagreed)), counts


def _of_large_objects(
    context: Context, aliases: Aliases, scale: IntensityScale, whole: list[Merged]
) -> np.ndarray:
    """Return the seeds of cells in too large objects, in order. Wants all cells at once: 16 bytes a cell."""
    seeds = np.concatenate([found.seeds for found in whole])
    voxels = np.concatenate([found.voxels for found in whole])
    order = np.argsort(seeds)
    seeds, voxels = seeds[order], voxels[order]
    large: np.ndarray = seeds[cells.in_large_objects(context, aliases, scale, seeds, voxels)]
    return large
