"""Stage 5: from block-local cells to global instance labels, and the audit that proves the seams.

1. Audit: at every face, what each block believed about both sides is compared, voxel by voxel.
   No disagreement proves the seams exact. Any disagreement is listed, and the two seeds are taken
   for one cell only where each is the other's best overlap, never because cells touch.
2. Merge: the block that owns a cell (its core holds the seed) joins the partial measurements of
   the blocks around, which saw the rest of it; whole cells are then filtered.
3. Number: cells are numbered 1..N in the raster order of their seeds, so that labels depend on the
   volume alone.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import prod
from typing import Any

import numpy as np

from braincensus.blocks import Block, BlockGrid
from braincensus.config import Filters
from braincensus.stages.label import BlockSummary, faces_name, owned_by, partial_name
from braincensus.store import Output
from braincensus.tasks import Context
from braincensus_kernels.boxes import Triple
from braincensus_kernels.faces import FaceAudit, compare_faces, resolve_disagreements
from braincensus_kernels.measure import merge_partials
from braincensus_kernels.union_find import connected

_MOST_LISTED = 1000


@dataclass(frozen=True)
class CellIndex:
    """All cells' seeds in order (a file that workers map), so that a seed's rank is its label."""

    output: Output
    n_cells: int
    aliases: tuple[tuple[int, int], ...] = ()

    def seeds(self) -> np.ndarray:
        """Return the sorted seeds, memory-mapped; cell ``label`` has seed ``seeds()[label - 1]``."""
        return self.output.map_work(_SEEDS)

    def labels_of(self, seeds: np.ndarray) -> np.ndarray:
        """Return the final label of each seed; 0 where the cell was filtered out."""
        known = self.seeds()
        if len(known) == 0:
            return np.zeros(len(seeds), dtype=np.uint64)
        wanted = representative(seeds, self.aliases)
        rank = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
        return np.where(known[rank] == wanted, rank + 1, 0).astype(np.uint64)


@dataclass(frozen=True)
class SeamAudit:
    """What the run proved about its seams.

    Attributes
    ----------
    faces, voxels_compared, crossings
        Faces between blocks, voxels on both sides of them that were compared, and cells seen to
        cross a face (once for each face that they cross).
    disagreeing_voxels, disagreements
        Voxels that the two blocks of a face gave to different cells; the first of them, with
        their position and both beliefs. 0 proves the seams exact.
    merged
        Pairs of seeds that were taken for one cell because of a disagreement.
    blocks_with_larger_halo, incomplete_blocks
        Blocks that needed more than the planned halo (flat maxima), and blocks for which memory
        did not allow enough of it.
    unreached_voxels
        Foreground voxels in no cell: farther from any seed than the growth bound, or in a
        component without a seed.
    """

    faces: int
    voxels_compared: int
    crossings: int
    disagreeing_voxels: int
    disagreements: tuple[dict[str, Any], ...]
    merged: int
    blocks_with_larger_halo: int
    incomplete_blocks: int
    unreached_voxels: int
    foreground_voxels: int

    @property
    def exact(self) -> bool:
        """Whether every face agreed, voxel for voxel."""
        return self.disagreeing_voxels == 0

    def summary(self) -> dict[str, Any]:
        """Give the provenance."""
        return {"exact": self.exact, **asdict(self), "disagreements": list(self.disagreements)}


@dataclass(frozen=True)
class _Stitch:
    grid: BlockGrid
    output: Output
    max_steps: int
    filters: Filters
    voxel_um3: float
    aliases: tuple[tuple[int, int], ...] = ()


_SEEDS = "seeds"


def merged_name(number: int) -> str:
    """Name of a block's working file: whole cells that the block owns, filtered."""
    return f"merged/{number:07d}"


def run(context: Context, blocks: list[BlockSummary]) -> tuple[CellIndex, SeamAudit]:
    """Stitch all blocks; returns the numbering and the audit."""
    plan = context.plan
    grid = plan.label_grid
    spec = _Stitch(grid, context.output, plan.max_steps, plan.config.filters, prod(plan.volume.voxel_size_um))

    with context.stage("stitch", 2 * plan.voxels):
        audits: list[FaceAudit] = []
        for _, found in context.map("stitch", _audit_block, spec, grid, name="audit-seams"):
            audits.extend(found)
        aliases = _aliases(audits)
        spec = _Stitch(grid, context.output, plan.max_steps, plan.config.filters, spec.voxel_um3, aliases)
        seeds = [np.zeros(0, dtype=np.int64)]
        for _, kept in context.map("stitch", _merge_block, spec, grid, name="merge-cells"):
            seeds.append(kept)
        in_order = np.sort(np.concatenate(seeds))
        context.output.write_map(_SEEDS, in_order)
    return CellIndex(context.output, len(in_order), aliases), _seam_audit(audits, aliases, blocks, grid)


def _audit_block(spec: _Stitch, number: int) -> list[FaceAudit]:
    """Step 1: compare this block's upper faces with its neighbours' lower faces."""
    block = spec.grid[number]
    mine = spec.output.read_work(faces_name(number))
    return [
        compare_faces(
            mine,
            spec.output.read_work(faces_name(face.high)),
            axis=face.axis,
            low=block.core,
            high=spec.grid[face.high].core,
        )
        for face in spec.grid.upper_faces(block)
    ]


def _merge_block(spec: _Stitch, number: int) -> np.ndarray:
    """Step 2: join what all blocks around measured of the cells that this block owns."""
    block = spec.grid[number]
    shape = spec.grid.volume_shape
    parts = []
    for other in _contributors(spec, block):
        rows = spec.output.read_work(partial_name(other))
        rows["seed"] = representative(rows["seed"], spec.aliases)
        mine = owned_by(rows["seed"], block.core, shape) & (rows["voxels"] > 0)
        parts.append({name: column[mine] for name, column in rows.items()})
    cells = merge_partials(parts)
    volume_um3 = cells["voxels"] * spec.voxel_um3
    keep = np.ones(len(volume_um3), dtype=bool)
    if spec.filters.min_volume_um3 is not None:
        keep &= volume_um3 >= spec.filters.min_volume_um3
    if spec.filters.max_volume_um3 is not None:
        keep &= volume_um3 <= spec.filters.max_volume_um3
    cells = {name: column[keep] for name, column in cells.items()}
    spec.output.write_work(merged_name(number), cells)
    return cells["seed"]


def _contributors(spec: _Stitch, block: Block) -> list[int]:
    """Return the blocks that may hold voxels of this block's cells: those within the growth bound."""
    numbers = set(spec.grid.neighbours(block, spec.max_steps))
    for seed, kept in spec.aliases:
        if owned_by(np.asarray([kept]), block.core, spec.grid.volume_shape)[0]:
            owner = spec.grid[_owner(seed, spec.grid)]
            numbers.update(spec.grid.neighbours(owner, spec.max_steps))
    return sorted(numbers)


def _owner(seed: int, grid: BlockGrid) -> int:
    position = np.unravel_index(seed, grid.volume_shape)
    index: Triple = (
        int(position[0]) // grid.block_shape[0],
        int(position[1]) // grid.block_shape[1],
        int(position[2]) // grid.block_shape[2],
    )
    return grid.at(index).number


def representative(seeds: np.ndarray, aliases: tuple[tuple[int, int], ...]) -> np.ndarray:
    """Replace seeds that were found to be another seed's cell; all others stay."""
    if not aliases:
        return seeds
    old, new = np.asarray(aliases, dtype=np.int64).T
    place = np.minimum(np.searchsorted(old, seeds), len(old) - 1)
    return np.where(old[place] == seeds, new[place], seeds)


def _aliases(audits: list[FaceAudit]) -> tuple[tuple[int, int], ...]:
    """Return sorted ``(seed, representative)`` of the seeds that disagreements showed to be one cell."""
    pairs = resolve_disagreements(audits)
    if len(pairs) == 0:
        return ()
    seeds, smallest = connected(pairs)
    changed = seeds != smallest
    return tuple(zip(seeds[changed].tolist(), smallest[changed].tolist(), strict=True))


def _seam_audit(
    audits: list[FaceAudit],
    aliases: tuple[tuple[int, int], ...],
    blocks: list[BlockSummary],
    grid: BlockGrid,
) -> SeamAudit:
    listed = [d for audit in audits for d in audit.disagreements]
    listed.sort(key=lambda d: d["position"])
    return SeamAudit(
        faces=len(audits),
        voxels_compared=sum(audit.voxels_compared for audit in audits),
        crossings=sum(audit.cells_crossing for audit in audits),
        disagreeing_voxels=sum(audit.voxels_disagreeing for audit in audits),
        disagreements=tuple(listed[:_MOST_LISTED]),
        merged=len(aliases),
        blocks_with_larger_halo=sum(block.halo_voxels > max(grid.halo) for block in blocks),
        incomplete_blocks=sum(not block.complete for block in blocks),
        unreached_voxels=sum(block.unreached_voxels for block in blocks),
        foreground_voxels=sum(block.foreground_voxels for block in blocks),
    )
