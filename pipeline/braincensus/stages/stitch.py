"""Stage 5: from block-local cells to global instance labels, and the audit that proves the seams.

1. Join: names of one thing that several blocks see a part of (`seams`).
2. Audit: at every face, what both blocks believe is compared, voxel by voxel (`seams`).
3. Merge: cells that touch may be one by their border (if asked for); the owner of each cell joins what
   all blocks measured of it, and whole cells are filtered (`cells`).
4. Number: cells are numbered 1..N in the raster order of their seeds, so that labels depend on the
   volume alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from braincensus.stages import cells, seams
from braincensus.stages.identities import Aliases, write_aliases
from braincensus.stages.label import BlockSummary, needs_touching
from braincensus.stages.seams import SeamAudit
from braincensus.store import Output
from braincensus.tasks import Context
from braincensus_kernels.intensity import IntensityScale

_SEEDS = "seeds"


@dataclass(frozen=True)
class CellIndex:
    """All cells' seeds in order (a file that workers map), so that a seed's rank is its label."""

    output: Output
    n_cells: int
    aliases: Aliases

    def seeds(self) -> np.ndarray:
        """Return the sorted seeds, memory-mapped; cell ``label`` has seed ``seeds()[label - 1]``."""
        return self.output.map_work(_SEEDS)

    def labels_of(self, seeds: np.ndarray) -> np.ndarray:
        """Return the final label of each seed; 0 where the cell was filtered out."""
        known = self.seeds()
        if len(known) == 0:
            return np.zeros(len(seeds), dtype=np.uint64)
        wanted = self.aliases.of(seeds)
        rank = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
        return np.where(known[rank] == wanted, rank + 1, 0).astype(np.uint64)


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
        whole = cells.merge(context, aliases, scale, touching=touching)
        if largest is None:
            in_order, removed = _kept_seeds(whole)
        else:
            in_order, removed = _without_large_objects(context, aliases, scale, whole)
        output.write_map(_SEEDS, in_order)
    counts = {"merged_by_border": by_border, "removed_by_filters": removed}
    return CellIndex(output, len(in_order), aliases), finish(len(disagreed)), counts


def _kept_seeds(
    whole: Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]],
) -> tuple[np.ndarray, int]:
    """Gather what is kept: 8 bytes a cell, all that any process holds of all cells."""
    seeds, removed = [np.zeros(0, np.int64)], 0
    for seed, _, kept in whole:
        seeds.append(seed[kept])
        removed += len(seed) - len(seeds[-1])
    in_order = np.concatenate(seeds)
    in_order.sort()
    return in_order, removed


def _without_large_objects(
    context: Context,
    aliases: Aliases,
    scale: IntensityScale,
    whole: Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]],
) -> tuple[np.ndarray, int]:
    columns = [np.concatenate(column) for column in zip(*whole, strict=True)]
    order = np.argsort(columns[0])
    seeds, voxels, kept = (column[order] for column in columns)
    kept &= ~cells.in_large_objects(context, aliases, scale, seeds, voxels)
    return seeds[kept], int((~kept).sum())
