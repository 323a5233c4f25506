"""Stage 7: the cell table and the density map, from the stitched measurements; no voxel is read again.

The table is cut by label, a fixed number of cells to a part, so that its files hold the same rows
in the same order whatever the blocks were.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from braincensus.blocks import BlockGrid
from braincensus.stages.stitch import CellIndex, merged_name
from braincensus.store import Output, write_cells_part
from braincensus.tasks import Context
from braincensus_kernels.boxes import Box
from braincensus_kernels.density import (
    bin_volumes_mm3,
    count_in_bins,
    density_grid_shape,
    density_per_mm3,
)
from braincensus_kernels.intensity import IntensityScale
from braincensus_kernels.measure import cells_from_partials

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


def run(context: Context, index: CellIndex, scale: IntensityScale) -> np.ndarray:
    """Write the cell table and the density map; returns the density, cells per mm^3."""
    plan = context.plan
    size, bin_um = plan.volume.voxel_size_um, plan.config.density.bin_um
    bins = density_grid_shape(plan.volume.shape, size, bin_um)
    spec = _Measure(plan.label_grid, context.output, index, scale, size, bin_um, bins)
    parts = max(1, -(-index.n_cells // _CELLS_PER_PART))
    counts = np.zeros(bins, dtype=np.int64)
    with context.stage("measure", parts):
        for _, (position, found) in context.map(
            "measure",
            _measure_part,
            spec,
            BlockGrid((parts, 1, 1), (1, 1, 1)),
            name="measure-part",
        ):
            np.add.at(counts.reshape(-1), position, found)
        density: np.ndarray = density_per_mm3(counts, bin_volumes_mm3(plan.volume.shape, size, bin_um))
        context.output.create_array(DENSITY, shape=bins, dtype="float32", chunk=bins, shard=None)
        context.output.write_block(DENSITY, Box.whole(bins), density)
    return density


def _measure_part(spec: _Measure, part: int) -> tuple[np.ndarray, np.ndarray]:
    """Write the rows of one part; returns its counts as (bin, cells) of the bins that have any."""
    first = part * _CELLS_PER_PART
    seeds = spec.index.seeds()[first : first + _CELLS_PER_PART]
    rows = _rows_of(spec, np.asarray(seeds))
    cells = cells_from_partials(rows, voxel_size_um=spec.voxel_size_um, scale=spec.scale)
    del cells["seed"]  # the label says the same: cells are numbered in the order of their seeds
    label = np.arange(first + 1, first + 1 + len(seeds), dtype=np.int64)
    write_cells_part(spec.output, part, {"label": label, **cells})
    zyx_um = np.stack([cells["z_um"], cells["y_um"], cells["x_um"]], axis=1)
    counts = count_in_bins(zyx_um, spec.bin_um, spec.bins, voxel_size_um=spec.voxel_size_um).reshape(-1)
    position = np.flatnonzero(counts)
    return position, counts[position]


def _rows_of(spec: _Measure, seeds: np.ndarray) -> dict[str, np.ndarray]:
    """Gather the merged measurements of these (sorted) seeds from the blocks that own them.

    Labels follow the raster order of seeds, so a part's cells lie in a slab of planes.
    """
    shape = spec.grid.volume_shape
    if len(seeds) == 0:
        return spec.output.read_work(merged_name(0)) and {
            name: column[:0] for name, column in spec.output.read_work(merged_name(0)).items()
        }
    plane = shape[1] * shape[2]
    slab = Box((int(seeds[0]) // plane, 0, 0), (int(seeds[-1]) // plane + 1, shape[1], shape[2]))
    gathered: dict[str, list[np.ndarray]] = {}
    for number in spec.grid.numbers_in(slab):
        merged = spec.output.read_work(merged_name(number))
        wanted = np.isin(merged["seed"], seeds, assume_unique=True)
        for name, column in merged.items():
            gathered.setdefault(name, []).append(column[wanted])
    columns = {name: np.concatenate(parts) for name, parts in gathered.items()}
    order = np.argsort(columns["seed"])
    return {name: column[order] for name, column in columns.items()}
