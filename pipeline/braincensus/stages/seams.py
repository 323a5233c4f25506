"""Faces between blocks: first joining what both sides know under two names, then the audit.

1. Join (labellers of things without a bound only): identities that two blocks have anchors of on one
   voxel are one cell. Nothing is guessed here.
2. Audit: what both blocks of every face believe about the voxels at it is compared, one by one. No
   disagreement proves the seams exact. Any is listed, and two cells are taken for one only where each
   is the other's best overlap, never because they touch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np

from braincensus.blocks import BlockGrid
from braincensus.stages.identities import Aliases, ids_name, owners_of
from braincensus.stages.label import LOCAL_LABELS, BlockSummary, faces_name
from braincensus.store import Output
from braincensus.tasks import Context
from braincensus_kernels.boxes import Box
from braincensus_kernels.faces import FaceAudit, compare_faces, joined_by_anchors, resolve_disagreements

_MOST_LISTED = 1000


@dataclass(frozen=True)
class SeamAudit:
    """What the run proved about its seams.

    Attributes
    ----------
    method
        The labeller.
    faces, voxels_compared, crossings
        Faces between blocks, voxels on both sides of them that were compared, and cells seen to
        cross a face (once for each face that they cross).
    joined
        Identities that were other names of a cell, by construction (things without a bound).
    disagreeing_voxels, disagreements
        Voxels that the two blocks of a face gave to different cells; the first of them, with
        their position and both beliefs. 0 proves the seams exact.
    merged
        Pairs of seeds that were taken for one cell because of a disagreement.
    blocks_with_larger_halo, incomplete
        Blocks that needed more than the planned halo, and those for which memory did not allow enough of
        it, with the voxels of their cores.
    unreached_voxels
        Foreground voxels in no cell: farther from any seed than the growth bound, or in a
        component without a seed.
    """

    method: str
    faces: int
    voxels_compared: int
    crossings: int
    joined: int
    disagreeing_voxels: int
    disagreements: tuple[dict[str, Any], ...]
    merged: int
    blocks_with_larger_halo: int
    incomplete: tuple[dict[str, Any], ...]
    unreached_voxels: int
    foreground_voxels: int

    @property
    def exact(self) -> bool:
        """Whether every face agreed, voxel for voxel."""
        return self.disagreeing_voxels == 0

    def summary(self) -> dict[str, Any]:
        """Give the provenance."""
        return {
            "exact": self.exact,
            **asdict(self),
            "incomplete_blocks": len(self.incomplete),
        }


@dataclass(frozen=True)
class _Seams:
    grid: BlockGrid
    output: Output
    aliases: Aliases


class _Tally:
    """Adds up what the faces gave; its memory does not grow with their number."""

    def __init__(self) -> None:
        self.faces = self.voxels = self.crossings = self.disagreeing = 0
        self.disagreements: list[dict[str, Any]] = []
        self.unlike: list[FaceAudit] = []

    def add(self, audit: FaceAudit) -> None:
        self.faces += 1
        self.voxels += audit.voxels_compared
        self.crossings += audit.cells_crossing
        if not audit.voxels_disagreeing:
            return
        self.disagreeing += audit.voxels_disagreeing
        self.unlike.append(audit)
        listed = sorted([*self.disagreements, *audit.disagreements], key=lambda found: found["position"])
        self.disagreements = listed[:_MOST_LISTED]


def join(context: Context, aliases: Aliases) -> np.ndarray:
    """Step 1: return pairs of identities that are one cell by construction: int64, (n, 2)."""
    spec = _Seams(context.plan.label_grid, context.output, aliases)
    found = [np.empty((0, 2), np.int64)]
    found += [pairs for _, pairs in context.map("stitch", _join_block, spec, spec.grid, name="join-parts")]
    return np.concatenate(found)


def audit(
    context: Context, aliases: Aliases, blocks: list[BlockSummary]
) -> tuple[np.ndarray, Callable[[int], SeamAudit]]:
    """Step 2: compare all faces.

    Returns
    -------
    same, finish
        Pairs of cells that disagreements showed to be one, int64, (n, 2); and what makes the audit, told
        how many of them that merged.
    """
    grid = context.plan.label_grid
    tally = _Tally()
    spec = _Seams(grid, context.output, aliases)
    for _, found in context.map("stitch", _audit_block, spec, grid, name="audit-seams", classes=(FaceAudit,)):
        for face in found:
            tally.add(face)
        context.watch.seams(
            in_all=grid.n_faces,
            faces=tally.faces,
            voxels=tally.voxels,
            crossings=tally.crossings,
            disagreeing=tally.disagreeing,
        )
    same = resolve_disagreements(tally.unlike)
    finish = partial(_seam_audit, context.plan.config.labelling.method, tally, aliases.size, blocks, grid)
    return same, finish


def _join_block(spec: _Seams, number: int) -> np.ndarray:
    block = spec.grid[number]
    mine = spec.output.read_work(faces_name(number))
    pairs = [
        joined_by_anchors(
            mine,
            spec.output.read_work(faces_name(face.high)),
            axis=face.axis,
            low=block.core,
            high=spec.grid[face.high].core,
            volume_shape=spec.grid.volume_shape,
        )
        for face in spec.grid.upper_faces(block)
    ]
    # No anchor at the faces: the block in whose core the voxel lies has one on that very voxel.
    for seed in mine["unanchored"].tolist():
        owner = int(owners_of(np.asarray([seed]), spec.grid)[0])
        if (there := _identity_at(spec, owner, seed)) is not None and there != seed:
            pairs.append(np.asarray([[seed, there]], np.int64))
    return np.concatenate([np.empty((0, 2), np.int64), *pairs])


def _identity_at(spec: _Seams, owner: int, seed: int) -> int | None:
    z, y, x = (int(n) for n in np.unravel_index(seed, spec.grid.volume_shape))
    voxel = Box((z, y, x), (z + 1, y + 1, x + 1))
    local = int(spec.output.read_block(LOCAL_LABELS, voxel)[0, 0, 0])
    return int(spec.output.read_work(ids_name(owner))["seed"][local - 1]) if local else None


def _audit_block(spec: _Seams, number: int) -> list[FaceAudit]:
    """Compare this block's upper faces with its neighbours' lower faces."""
    block = spec.grid[number]
    mine = _beliefs(spec, number)
    return [
        compare_faces(
            mine,
            _beliefs(spec, face.high),
            axis=face.axis,
            low=block.core,
            high=spec.grid[face.high].core,
            volume_shape=spec.grid.volume_shape,
        )
        for face in spec.grid.upper_faces(block)
    ]


def _beliefs(spec: _Seams, number: int) -> dict[str, np.ndarray]:
    beliefs = spec.output.read_work(faces_name(number))
    return {
        name: spec.aliases.of(values) if name.endswith("_seeds") else values
        for name, values in beliefs.items()
    }


def _seam_audit(
    method: str, tally: _Tally, joined: int, blocks: list[BlockSummary], grid: BlockGrid, merged: int
) -> SeamAudit:
    return SeamAudit(
        method=method,
        faces=tally.faces,
        voxels_compared=tally.voxels,
        crossings=tally.crossings,
        joined=joined,
        disagreeing_voxels=tally.disagreeing,
        disagreements=tuple(tally.disagreements),
        merged=merged,
        blocks_with_larger_halo=sum(block.halo_voxels > max(grid.halo) for block in blocks),
        incomplete=tuple(
            {"block": block.number, "start": list(block.core.start), "stop": list(block.core.stop)}
            for block in blocks
            if not block.complete
        ),
        unreached_voxels=sum(block.unreached_voxels for block in blocks),
        foreground_voxels=sum(block.foreground_voxels for block in blocks),
    )
