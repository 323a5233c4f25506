"""Stage 4: instance labels of each block, exact without talking to any other block.

Every rule of a labeller is local, so a block that reads its core and a halo of the labeller's reach
gives each voxel of its core what a single pass over the whole volume would give it, and two blocks that
see the same cell know it by the same voxel, or by voxels that the faces will join (see
`braincensus_kernels.block_labels`). What has no bound and no such joint (a flat maximum; a flood that
comes from outside the halo) the labeller notices; the block is then read again with a larger halo.

For every block this stage stores: the core's labels (block-local ids), the identity of each id, the
partial measurements of the cells that it owns and of those that others own, what it believes about both
sides of its faces, and, where it matters, which cells touch.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from braincensus.blocks import Block, BlockGrid
from braincensus.labelling import Foreground, Labeller
from braincensus.planning import Plan
from braincensus.stages.identities import ids_name, owners_of
from braincensus.stages.segment import PROBABILITY
from braincensus.stages.threshold import read_foreground
from braincensus.store import Output, chunk_and_shard
from braincensus.tasks import Context
from braincensus.volume import Volume
from braincensus_kernels.backend import is_cupy, to_device, to_numpy
from braincensus_kernels.block_labels import BlockLabels
from braincensus_kernels.boxes import Box, Triple
from braincensus_kernels.faces import face_beliefs
from braincensus_kernels.intensity import IntensityScale
from braincensus_kernels.measure import measure_labels
from braincensus_kernels.touching import touching_pairs

_FAR_BELOW = 0.5  # no rounding of a blur comes near to that
LOCAL_LABELS = "braincensus/local_labels"


@dataclass(frozen=True)
class BlockSummary:
    """One row of the block table."""

    number: int
    core: Box
    cells_seen: int
    cells_owned: int
    foreground_voxels: int
    unreached_voxels: int
    growth_steps: int
    halo_voxels: int
    complete: bool
    seconds: float
    owners: np.ndarray = field(repr=False)
    """Numbers of the blocks that own a cell of which this block has a voxel (or, where it matters which
    cells touch, has one beside its core)."""

    def row(self) -> dict[str, Any]:
        """Give the row of ``tables/blocks``."""
        row = {f"{axis}_start": n for axis, n in zip("zyx", self.core.start, strict=True)}
        row |= {f"{axis}_stop": n for axis, n in zip("zyx", self.core.stop, strict=True)}
        fields = {k: v for k, v in self.__dict__.items() if k not in ("number", "core", "owners")}
        return {"block": self.number, **row, **fields}


@dataclass(frozen=True)
class _Label:
    volume: Volume
    grid: BlockGrid
    output: Output
    scale: IntensityScale
    labeller: Labeller
    foreground: Foreground
    threshold: float
    most_outer_voxels: int
    device: str
    touching: bool


def owned_name(number: int) -> str:
    """Name of a block's working file: partial measurements of the cells that it owns."""
    return f"owned/{number:07d}"


def foreign_name(number: int) -> str:
    """Name of a block's working file: partial measurements of cells that other blocks own."""
    return f"foreign/{number:07d}"


def faces_name(number: int) -> str:
    """Name of a block's working file: what it believes about both sides of its faces."""
    return f"faces/{number:07d}"


def touching_name(number: int) -> str:
    """Name of a block's working file: which of its cells touch."""
    return f"touching/{number:07d}"


def run(context: Context, *, scale: IntensityScale, threshold: float) -> list[BlockSummary]:
    """Label every block; returns the block table in order of number."""
    plan: Plan = context.plan
    grid = plan.label_grid
    chunk, shard = chunk_and_shard(grid.block_shape)
    context.output.create_array(
        LOCAL_LABELS, shape=plan.volume.shape, dtype="uint32", chunk=chunk, shard=shard
    )
    spec = _Label(
        volume=plan.volume,
        grid=grid,
        output=context.output,
        scale=scale,
        labeller=plan.labeller,
        foreground=plan.foreground,
        threshold=threshold,
        most_outer_voxels=plan.most_outer_voxels,
        device=plan.resources.device,
        touching=needs_touching(plan),
    )
    with context.stage("label", plan.voxels):
        results = context.map(
            "label",
            _label_block,
            spec,
            grid,
            name="label-block",
            classes=(BlockSummary, Box),
        )
        summaries, cells = [], 0
        for _, summary in results:
            summaries.append(summary)
            cells += summary.cells_owned
            context.watch.cells(cells)
        return sorted(summaries, key=lambda summary: summary.number)


def needs_touching(plan: Plan) -> bool:
    """Whether stitching must know which cells touch.

    To merge or filter by it; and where two labels of one block can turn out to be one cell, whose inner
    border must not count as surface (components that touch are one label from the start).
    """
    return (
        plan.config.labelling.merge_border is not None
        or plan.config.filters.max_object_volume_um3 is not None
        or (plan.labeller.joins_by_anchors and plan.config.labelling.method != "components")
    )


def _label_block(spec: _Label, number: int) -> BlockSummary:
    began = time.perf_counter()
    block = spec.grid[number]
    found, halo = _label_with_enough_halo(spec, block)
    measured = _measure(spec, block, found)
    found = replace(found, labels=to_numpy(found.labels))
    inside = block.core.slices_in(found.kept)
    labels = np.ascontiguousarray(found.labels[inside])
    spec.output.write_block(LOCAL_LABELS, block.core, labels)
    partials = {"seed": found.seeds, **measured}
    owners = owners_of(found.seeds, spec.grid)
    mine, seen = owners == number, partials["voxels"] > 0
    spec.output.write_work(ids_name(number), {"seed": found.seeds})
    for name, chosen in ((owned_name(number), mine & seen), (foreign_name(number), ~mine & seen)):
        spec.output.write_work(name, {column: values[chosen] for column, values in partials.items()})
    beliefs = face_beliefs(found.labels, found.seeds, kept=found.kept, core=block.core, anchors=found.anchors)
    spec.output.write_work(faces_name(number), {"unanchored": found.unanchored, **beliefs})
    if spec.touching:
        spec.output.write_work(touching_name(number), _touching(spec, block, found))
    return BlockSummary(
        number=number,
        core=block.core,
        cells_seen=int(np.count_nonzero(seen)),
        cells_owned=int(np.count_nonzero(mine)),
        foreground_voxels=found.foreground_voxels,
        unreached_voxels=found.unreached_voxels,
        growth_steps=found.growth_steps,
        halo_voxels=halo,
        complete=found.complete,
        seconds=time.perf_counter() - began,
        owners=np.unique(owners if spec.touching else owners[seen]).astype(np.int32),
    )


def _label_with_enough_halo(spec: _Label, block: Block) -> tuple[BlockLabels, int]:
    """Label a block, reading more around it while something that matters leaves what was read."""
    for halo in _halos(spec, block):
        found, widest = _label(spec, block.core, halo), max(halo)
        if found.complete:
            break
    return found, widest


def _label(spec: _Label, core: Box, halo: Triple) -> BlockLabels:
    shape = spec.grid.volume_shape
    z, y, x = (a - b for a, b in zip(halo, spec.foreground.reach, strict=True))
    outer = core.dilate((z, y, x)).clip(shape)
    probability = read_foreground(spec.output, outer, spec.foreground, shape)
    if probability.max() < _FAR_BELOW * spec.threshold:
        return _nothing(spec, core)
    return spec.labeller.label(
        to_device(probability, spec.device),
        outer=outer,
        core=core,
        volume_shape=shape,
        threshold=spec.threshold,
    )


def _nothing(spec: _Label, core: Box) -> BlockLabels:
    """Return what any labeller gives where all is below the threshold: a blur makes nothing brighter."""
    kept = core.dilate(1).clip(spec.grid.volume_shape)
    return BlockLabels(
        labels=np.zeros(kept.shape, np.uint32),
        kept=kept,
        seeds=np.empty(0, np.int64),
        growth_steps=0,
        stopped_by_bound=False,
        foreground_voxels=0,
        unreached_voxels=0,
        complete=True,
        anchors=np.zeros(kept.shape, np.bool_) if spec.labeller.joins_by_anchors else None,
    )


def _halos(spec: _Label, block: Block) -> Iterator[Triple]:
    """Yield the planned halo, then larger ones, up to the whole volume or what memory holds.

    Where even that is not enough the block is marked incomplete, and the seam audit decides.
    """
    shape = spec.grid.volume_shape
    halo, outer = spec.grid.halo, block.outer
    yield halo
    while outer != Box.whole(shape):
        halo = (halo[0] * 3 // 2 + 1, halo[1] * 3 // 2 + 1, halo[2] * 3 // 2 + 1)
        outer = block.core.dilate(halo).clip(shape)
        if outer.size > spec.most_outer_voxels:
            return
        yield halo


def _touching(spec: _Label, block: Block, found: BlockLabels) -> dict[str, np.ndarray]:
    """Tell which cells touch, by identity, and what lies between them."""
    probability = (
        spec.output.read_block(PROBABILITY, found.kept)
        if found.labels.any()
        else np.zeros(found.kept.shape, np.uint16)
    )
    pairs = touching_pairs(
        found.labels, kept=found.kept, core=block.core, n_labels=len(found.seeds), probability=probability
    )
    return {**pairs, "a": found.seeds[pairs["a"] - 1], "b": found.seeds[pairs["b"] - 1]}


def _measure(spec: _Label, block: Block, found: BlockLabels) -> dict[str, Any]:
    if not found.labels.any():
        empty = np.zeros(block.core.shape, dtype=np.uint32)
        intensity, probability = empty, empty.astype(np.uint16)
    else:
        intensity = spec.scale.quantise(spec.volume.read(block.core))
        probability = spec.output.read_block(PROBABILITY, block.core)
    where = "cuda" if is_cupy(found.labels) else "cpu"  # some labellers give their labels on the host
    return measure_labels(
        found.labels,
        kept=found.kept,
        core=block.core,
        n_labels=len(found.seeds),
        intensity_q=to_device(intensity, where),
        probability=to_device(probability, where),
    )
