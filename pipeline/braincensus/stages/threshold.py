"""Stage 3: one outline threshold for the whole volume.

Otsu belongs to the volume: taken per block, it invents cells in every block that has none. The
histogram is of the smoothed foreground probability over tissue, summed exactly over blocks, on
bins fixed from probability 0 to 1, so that neither the blocks nor empty space can move it. In a
volume without cells Otsu would split noise; so it has a least value, far below that of real cells.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from braincensus.blocks import BlockGrid
from braincensus.planning import LATTICE
from braincensus.stages.intensity import TILE_MEDIAN, tiles_of
from braincensus.stages.segment import PROBABILITY, PROBABILITY_TOP
from braincensus.store import Output
from braincensus.tasks import Context
from braincensus_kernels.boxes import Box
from braincensus_kernels.filters import blur_radii
from braincensus_kernels.histogram import otsu_threshold, outline_histogram

_BINS = 1024


@dataclass(frozen=True)
class _Threshold:
    grid: BlockGrid
    output: Output
    outline_sigma: tuple[float, float, float]
    floor: float | None
    tissue_threshold: float


def run(context: Context, *, tissue_threshold: float) -> float:
    """Return the threshold of the outline-smoothed probability, as stored: from 0 to `PROBABILITY_TOP`."""
    plan = context.plan
    labelling = plan.config.labelling
    if labelling.threshold != "otsu":
        return labelling.threshold * PROBABILITY_TOP
    grid = BlockGrid(plan.volume.shape, plan.label_grid.block_shape, blur_radii(plan.outline_sigma_voxels))
    spec = _Threshold(
        grid, context.output, plan.outline_sigma_voxels, labelling.foreground_threshold, tissue_threshold
    )
    counts = np.zeros(_BINS, dtype=np.int64)
    with context.stage("threshold", plan.voxels):
        for _, block_counts in context.map(
            "threshold",
            _threshold_block,
            spec,
            grid,
            name="threshold-block",
        ):
            counts += block_counts
    least = labelling.least_threshold * PROBABILITY_TOP
    return max(least, otsu_threshold(counts, 0.0, PROBABILITY_TOP)) if counts.any() else least


def read_foreground(output: Output, box: Box, floor: float | None) -> np.ndarray:
    """Read the stored probability (uint16) of `box`; below `floor`, from 0 to 1, it counts as 0."""
    probability: np.ndarray = output.read_block(PROBABILITY, box)
    if floor is not None:
        probability[probability < floor * PROBABILITY_TOP] = 0
    return probability


def _threshold_block(spec: _Threshold, number: int) -> np.ndarray:
    block = spec.grid[number]
    return outline_histogram(
        read_foreground(spec.output, block.outer, spec.floor),
        outer=block.outer,
        core=block.core,
        volume_shape=spec.grid.volume_shape,
        outline_sigma=spec.outline_sigma,
        minimum=0.0,
        maximum=PROBABILITY_TOP,
        bins=_BINS,
        where=_tissue(spec, block.core),
    )


def _tissue(spec: _Threshold, core: Box) -> np.ndarray:
    tiles = tiles_of(core)
    # A constant tile is NaN, and no comparison with NaN holds.
    is_tissue = spec.output.read_block(TILE_MEDIAN, tiles) >= np.float32(spec.tissue_threshold)
    for axis in range(3):
        is_tissue = np.repeat(is_tissue, LATTICE, axis=axis)
    origin = tuple(a - b * LATTICE for a, b in zip(core.start, tiles.start, strict=True))
    return is_tissue[tuple(slice(o, o + n) for o, n in zip(origin, core.shape, strict=True))]
