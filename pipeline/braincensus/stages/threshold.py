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
from braincensus.labelling import Foreground
from braincensus.planning import LATTICE
from braincensus.stages.intensity import TILE_MEDIAN, tiles_of
from braincensus.stages.segment import PROBABILITY, PROBABILITY_TOP
from braincensus.store import Output
from braincensus.tasks import Context
from braincensus_kernels.boxes import Box, Triple
from braincensus_kernels.filters import blur_radii
from braincensus_kernels.histogram import otsu_threshold, outline_histogram
from braincensus_kernels.morphology import closing

_BINS = 1024


@dataclass(frozen=True)
class _Threshold:
    grid: BlockGrid
    output: Output
    outline_sigma: tuple[float, float, float]
    foreground: Foreground
    tissue_threshold: float


def run(context: Context, *, tissue_threshold: float) -> float:
    """Return the threshold of the outline-smoothed probability, as stored: from 0 to `PROBABILITY_TOP`."""
    plan = context.plan
    labelling = plan.config.labelling
    if labelling.threshold != "otsu":
        return labelling.threshold * PROBABILITY_TOP
    sigma = plan.labeller.outline_sigma
    grid = BlockGrid(plan.volume.shape, plan.label_grid.block_shape, blur_radii(sigma))
    spec = _Threshold(grid, context.output, sigma, plan.foreground, tissue_threshold)
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


def read_foreground(output: Output, box: Box, foreground: Foreground, volume_shape: Triple) -> np.ndarray:
    """Read what is labelled, in `box`: the stored probability (uint16), cut off at a floor, then closed."""
    outer = box.dilate(foreground.reach).clip(volume_shape)
    probability: np.ndarray = output.read_block(PROBABILITY, outer)
    if foreground.floor is not None:
        probability[probability < foreground.floor * PROBABILITY_TOP] = 0
    if foreground.closes:
        probability = closing(
            probability,
            outer=outer,
            inner=box,
            volume_shape=volume_shape,
            radius_voxels=foreground.closing_radius_voxels,
        )
    return probability


def _threshold_block(spec: _Threshold, number: int) -> np.ndarray:
    block = spec.grid[number]
    tissue = _tissue(spec, block.core)
    if not tissue.any():
        return np.zeros(_BINS, np.int64)
    return outline_histogram(
        read_foreground(spec.output, block.outer, spec.foreground, spec.grid.volume_shape),
        outer=block.outer,
        core=block.core,
        volume_shape=spec.grid.volume_shape,
        outline_sigma=spec.outline_sigma,
        minimum=0.0,
        maximum=PROBABILITY_TOP,
        bins=_BINS,
        where=tissue,
    )


def _tissue(spec: _Threshold, core: Box) -> np.ndarray:
    tiles = tiles_of(core)
    # A constant tile is NaN, and no comparison with NaN holds.
    is_tissue = spec.output.read_block(TILE_MEDIAN, tiles) >= np.float32(spec.tissue_threshold)
    for axis in range(3):
        is_tissue = np.repeat(is_tissue, LATTICE, axis=axis)
    origin = tuple(a - b * LATTICE for a, b in zip(core.start, tiles.start, strict=True))
    return is_tissue[tuple(slice(o, o + n) for o, n in zip(origin, core.shape, strict=True))]
