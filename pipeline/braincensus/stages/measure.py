"""Stage 7: the cell table and the density map, from the stitched measurements; no voxel is read again.

Last of the proofs about seams, too: cells must be as dense beside them as anywhere else.

The table is cut by label, a fixed number of cells to a part, so that its files hold the same rows
in the same order whatever the blocks were.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from braincensus.blocks import BlockGrid
from braincensus.stages.cells import MERGED_COLUMNS, merged_name
from braincensus.stages.numbering import CellIndex
from braincensus.store import Output, write_cells_part
from braincensus.tasks import Context
from braincensus_kernels.boxes import Box
from braincensus_kernels.density import (
    bin_volumes_mm3,
    count_in_occupied_bins,
    density_grid_shape,
    density_per_mm3,
)
from braincensus_kernels.intensity import IntensityScale
from braincensus_kernels.measure import cells_from_partials
from braincensus_kernels.seam_density import SeamCounts, SeamDensity, count_near_seams

DENSITY = "density/0"
_CELLS_PER_PART = 500_000


@dataclass(frozen=True)
class _Measure:
    grid: BlockGrid
    output: Output
    index: CellIndex
    scale: IntensityScale
    voxel_size_um: tuple[float, float, float]
    bin_um: tuple[float, float, float]
    bins: tuple[int, int, int]


def run(context: Context, index: CellIndex, scale: IntensityScale) -> SeamDensity | None:
    """Write the cell table and the density map; returns the check of the density beside seams."""
    plan = context.plan
    size, bin_um = plan.volume.voxel_size_um, plan.config.density.bin_um
    bins = density_grid_shape(plan.volume.shape, size, bin_um)
    spec = _Measure(plan.label_grid, context.output, index, scale, size, bin_um, bins)
    parts = max(1, -(-index.n_cells // _CELLS_PER_PART))
    counts = np.zeros(bins, dtype=np.uint32)
    beside_seams = _beside_seams(spec.grid, np.empty((0, 3)))
    voxels = 0
    with context.stage("measure", parts):
        for _, part in context.map(
            "measure",
            _measure_part,
            spec,
            BlockGrid((parts, 1, 1), (1, 1, 1)),
            name="measure-part",
            classes=(_Part, SeamCounts),
        ):
            counts.reshape(-1)[part.bins] += part.cells_in_bins.astype(np.uint32)  # no bin is there twice
            beside_seams += part.beside_seams
            voxels += part.voxels
        density: np.ndarray = density_per_mm3(counts, bin_volumes_mm3(plan.volume.shape, size, bin_um))
        context.output.create_array(DENSITY, shape=bins, dtype="float32", chunk=bins, shard=None)
        context.output.write_block(DENSITY, Box.whole(bins), density)
    # What a seam cuts in two lies within a cell's radius of it.
    radius = np.cbrt(3 * voxels / max(index.n_cells, 1) / (4 * np.pi))
    return beside_seams.check(max(1, min(int(np.ceil(radius)), beside_seams.widest)))


def _beside_seams(grid: BlockGrid, zyx: np.ndarray) -> SeamCounts:
    return count_near_seams(zyx, block_shape=grid.block_shape, volume_shape=grid.volume_shape)


@dataclass(frozen=True)
class _Part:
    """What a part of the table adds to the density map (bins that have cells), and to the check of seams."""

    bins: np.ndarray
    cells_in_bins: np.ndarray
    beside_seams: SeamCounts
    voxels: int


def _measure_part(spec: _Measure, part: int) -> _Part:
    """Write the rows of one part."""
    first = part * _CELLS_PER_PART
    seeds = spec.index.seeds(first, first + _CELLS_PER_PART)
    rows = _rows_of(spec, seeds)
    cells = cells_from_partials(rows, voxel_size_um=spec.voxel_size_um, scale=spec.scale)
    del cells["seed"]  # the label says the same: cells are numbered in the order of their seeds
    label = np.arange(first + 1, first + 1 + len(seeds), dtype=np.int64)
    write_cells_part(spec.output, part, {"label": label, **cells})
    zyx_um = np.stack([cells["z_um"], cells["y_um"], cells["x_um"]], axis=1)
    size = spec.voxel_size_um
    position, counts = count_in_occupied_bins(zyx_um, spec.bin_um, spec.bins, voxel_size_um=size)
    zyx = np.stack([cells["z"], cells["y"], cells["x"]], axis=1)
    return _Part(position, counts, _beside_seams(spec.grid, zyx), int(cells["volume_voxels"].sum()))


def _rows_of(spec: _Measure, seeds: np.ndarray) -> dict[str, np.ndarray]:
    """Gather the merged measurements of these (sorted) seeds from the blocks that own them.

    Labels follow the raster order of seeds, so a part's cells lie in a slab of planes, and in each
    block's file in one range, which alone is read.
    """
    gathered = [np.empty((len(MERGED_COLUMNS), 0), np.int64)]
    if len(seeds):
        shape = spec.grid.volume_shape
        plane = shape[1] * shape[2]
        slab = Box((int(seeds[0]) // plane, 0, 0), (int(seeds[-1]) // plane + 1, shape[1], shape[2]))
        for number in spec.grid.numbers_in(slab):
            merged = spec.output.map_work(merged_name(number))
            first, last = np.searchsorted(merged[0], [seeds[0], seeds[-1] + 1])
            rows = np.asarray(merged[:, first:last])
            gathered.append(rows[:, np.isin(rows[0], seeds, assume_unique=True)])
    columns = np.concatenate(gathered, axis=1)
    columns = columns[:, np.argsort(columns[0])]
    return dict(zip(MERGED_COLUMNS, columns, strict=True))
