"""Stage 4: instance labels of each block, exact without talking to any other block.

A cell's identity is the global index of its seed voxel. Every rule of Voronoi-Otsu is local and
growth is bounded, so a block that reads its core and a halo of the reach gives each voxel of its
core the seed that a single pass over the whole volume would give it, and two blocks that see the
same cell know it by the same seed. The one thing without a bound is a flat maximum (saturated
probability): where one leaves the halo, the block says so and is read again with a larger halo.

For every block this stage stores: the core's labels (block-local ids), the seed of each id, the
partial measurements of each cell, and what the block believes about both sides of its faces.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from braincensus.blocks import Block, BlockGrid
from braincensus.planning import Plan
from braincensus.stages.segment import PROBABILITY
from braincensus.stages.threshold import read_foreground
from braincensus.store import Output, chunk_and_shard
from braincensus.tasks import Context
from braincensus.volume import Volume
from braincensus_kernels.backend import to_device, to_numpy
from braincensus_kernels.block_labels import BlockLabels
from braincensus_kernels.boxes import Box
from braincensus_kernels.faces import face_beliefs
from braincensus_kernels.intensity import IntensityScale
from braincensus_kernels.measure import measure_labels
from braincensus_kernels.seeds import SeedRule
from braincensus_kernels.voronoi_otsu import label_block

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

    def row(self) -> dict[str, Any]:
        """Give the row of ``tables/blocks``."""
        row = {f"{axis}_start": n for axis, n in zip("zyx", self.core.start, strict=True)}
        row |= {f"{axis}_stop": n for axis, n in zip("zyx", self.core.stop, strict=True)}
        fields = {k: v for k, v in self.__dict__.items() if k not in ("number", "core")}
        return {"block": self.number, **row, **fields}


@dataclass(frozen=True)
class _Label:
    volume: Volume
    grid: BlockGrid
    output: Output
    scale: IntensityScale
    spot_sigma: tuple[float, float, float]
    outline_sigma: tuple[float, float, float]
    seeds: SeedRule
    floor: float | None
    threshold: float
    max_steps: int
    most_outer_voxels: int
    device: str


def partial_name(number: int) -> str:
    """Name of a block's working file: seeds and partial measurements of the cells it sees."""
    return f"partials/{number:07d}"


def faces_name(number: int) -> str:
    """Name of a block's working file: what it believes about both sides of its faces."""
    return f"faces/{number:07d}"


def run(context: Context, *, scale: IntensityScale, threshold: float) -> list[BlockSummary]:
    """Label every block; returns the block table in order of number."""
    plan: Plan = context.plan
    grid, labelling = plan.label_grid, plan.config.labelling
    chunk, shard = chunk_and_shard(grid.block_shape)
    context.output.create_array(
        LOCAL_LABELS, shape=plan.volume.shape, dtype="uint32", chunk=chunk, shard=shard
    )
    spec = _Label(
        volume=plan.volume,
        grid=grid,
        output=context.output,
        scale=scale,
        spot_sigma=plan.spot_sigma_voxels,
        outline_sigma=plan.outline_sigma_voxels,
        seeds=labelling.seeds,
        floor=labelling.foreground_threshold,
        threshold=threshold,
        max_steps=plan.max_steps,
        most_outer_voxels=plan.most_outer_voxels,
        device=plan.resources.device,
    )
    with context.stage("label", plan.voxels):
        results = context.map(
            "label",
            _label_block,
            spec,
            grid,
            name="label-block",
        )
        return sorted((summary for _, summary in results), key=lambda summary: summary.number)


def _label_block(spec: _Label, number: int) -> BlockSummary:
    began = time.perf_counter()
    block = spec.grid[number]
    found, halo = _label_with_enough_halo(spec, block)
    inside = block.core.slices_in(found.kept)
    labels = np.ascontiguousarray(found.labels[inside])
    spec.output.write_block(LOCAL_LABELS, block.core, labels)
    partials = _measure(spec, block, found)
    spec.output.write_work(partial_name(number), {"seed": found.seeds, **partials})
    spec.output.write_work(
        faces_name(number), face_beliefs(found.labels, found.seeds, kept=found.kept, core=block.core)
    )
    return BlockSummary(
        number=number,
        core=block.core,
        cells_seen=int(np.count_nonzero(partials["voxels"])),
        cells_owned=int(np.count_nonzero(owned_by(found.seeds, block.core, spec.grid.volume_shape))),
        foreground_voxels=found.foreground_voxels,
        unreached_voxels=found.unreached_voxels,
        growth_steps=found.growth_steps,
        halo_voxels=halo,
        complete=found.complete,
        seconds=time.perf_counter() - began,
    )


def _label_with_enough_halo(spec: _Label, block: Block) -> tuple[BlockLabels, int]:
    """Label a block, reading more around it while a flat maximum leaves what was read."""
    for halo, outer in _halos(block, spec.grid, spec.most_outer_voxels):
        found, widest = _label(spec, outer, block.core), max(halo)
        if found.complete:
            break
    return found, widest


def _label(spec: _Label, outer: Box, core: Box) -> BlockLabels:
    found = label_block(
        to_device(read_foreground(spec.output, outer, spec.floor), spec.device),
        outer=outer,
        core=core,
        volume_shape=spec.grid.volume_shape,
        spot_sigma=spec.spot_sigma,
        outline_sigma=spec.outline_sigma,
        threshold=spec.threshold,
        seeds=spec.seeds,
        max_steps=spec.max_steps,
    )
    return replace(found, labels=to_numpy(found.labels))


def _halos(block: Block, grid: BlockGrid, most_voxels: int) -> Iterator[tuple[tuple[int, int, int], Box]]:
    """Yield the planned halo, then larger ones, up to the whole volume or what memory holds.

    Where even that is not enough the block is marked incomplete, and the seam audit decides.
    """
    halo, outer = grid.halo, block.outer
    yield halo, outer
    whole = Box.whole(grid.volume_shape)
    while outer != whole:
        halo = (halo[0] * 3 // 2 + 1, halo[1] * 3 // 2 + 1, halo[2] * 3 // 2 + 1)
        outer = block.core.dilate(halo).clip(grid.volume_shape)
        if outer.size > most_voxels:
            return
        yield halo, outer


def _measure(spec: _Label, block: Block, found: BlockLabels) -> dict[str, Any]:
    if not found.labels.any():
        empty = np.zeros(block.core.shape, dtype=np.uint32)
        intensity, probability = empty, empty.astype(np.uint16)
    else:
        intensity = spec.scale.quantise(spec.volume.read(block.core))
        probability = spec.output.read_block(PROBABILITY, block.core)
    return measure_labels(
        found.labels,
        kept=found.kept,
        core=block.core,
        n_labels=len(found.seeds),
        intensity_q=intensity,
        probability=probability,
    )


def owned_by(seeds: np.ndarray, core: Box, volume_shape: tuple[int, int, int]) -> np.ndarray:
    """Tell which seeds (global raster indices) lie in `core`: a cell's owner is the block with its seed."""
    position = np.unravel_index(seeds, volume_shape)
    inside = np.ones(len(seeds), dtype=bool)
    for axis in range(3):
        inside &= (position[axis] >= core.start[axis]) & (position[axis] < core.stop[axis])
    return inside
