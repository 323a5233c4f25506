"""The number of every cell: its place in the raster order of all seeds. Part of stage 5.

Seeds are raster indices, so the cells of a slab of planes come before those of the next slab, and each slab
can be put in order by itself. A slab is as thick as a few million cells are; its sorted seeds are one file.
What any process holds is a slab's seeds, never those of the volume.

    cells of each layer of blocks, counted -> slabs -> sorted seeds of each -> the first label of each
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from braincensus.blocks import BlockGrid
from braincensus.stages.cells import merged_name
from braincensus.stages.identities import Aliases
from braincensus.store import Output
from braincensus.tasks import Context
from braincensus_kernels.boxes import Box

_CELLS_PER_SLAB = 2_000_000
_EXCLUDED = "excluded"


def seeds_name(slab: int) -> str:
    """Name of a working file: the seeds of a slab's cells, in order."""
    return f"seeds/{slab:07d}"


@dataclass(frozen=True)
class CellIndex:
    """All cells in the order of their seeds, so that a seed's rank is its label.

    Attributes
    ----------
    planes
        Where slabs begin along z, and at last where the volume ends.
    before
        Cells before each slab, and at last all cells.
    """

    output: Output
    aliases: Aliases
    volume_shape: tuple[int, int, int]
    planes: tuple[int, ...]
    before: tuple[int, ...]

    @property
    def n_cells(self) -> int:
        """Number of cells."""
        return self.before[-1]

    def seeds(self, first: int, last: int) -> np.ndarray:
        """Return the seeds of the cells with labels ``first + 1`` to `last`, in order."""
        found = [np.empty(0, np.int64)]
        for slab in range(len(self.planes) - 1):
            begin, end = self.before[slab], self.before[slab + 1]
            if begin < last and first < end:
                seeds = self.output.map_work(seeds_name(slab))
                found.append(np.asarray(seeds[max(first - begin, 0) : last - begin]))
        return np.concatenate(found)

    def labels_of(self, seeds: np.ndarray) -> np.ndarray:
        """Return the final label of each seed; 0 where the cell was filtered out."""
        labels = np.zeros(len(seeds), dtype=np.uint64)
        wanted = self.aliases.of(seeds)
        z = wanted // prod(self.volume_shape[1:])
        slabs = np.searchsorted(self.planes, z, side="right") - 1
        for slab in np.unique(slabs).tolist():
            if self.before[slab] == self.before[slab + 1]:
                continue
            here = slabs == slab
            known = self.output.map_work(seeds_name(slab))
            rank = np.minimum(np.searchsorted(known, wanted[here]), len(known) - 1)
            labels[here] = np.where(known[rank] == wanted[here], self.before[slab] + rank + 1, 0)
        return labels


@dataclass(frozen=True)
class _Number:
    grid: BlockGrid
    output: Output
    planes: tuple[int, ...]
    excludes: bool


def number(
    context: Context, aliases: Aliases, cells_in_layers: Sequence[int], excluded: np.ndarray | None
) -> CellIndex:
    """Give every merged cell its number.

    Parameters
    ----------
    context, aliases
        The run, and which seeds stand for the cell of another.
    cells_in_layers
        Merged cells of each layer of blocks along z.
    excluded
        Seeds of merged cells that get no number, in order; None for none.
    """
    grid, output = context.plan.label_grid, context.output
    planes = _planes(grid, cells_in_layers)
    slabs = BlockGrid((len(planes) - 1, 1, 1), (1, 1, 1))
    if excluded is not None:
        output.write_map(_EXCLUDED, excluded)
    spec = _Number(grid, output, planes, excluded is not None)
    counts = np.zeros(len(slabs), np.int64)
    for slab, n in context.map("stitch", _number_slab, spec, slabs, name="number-cells"):
        counts[slab] = n
    before = (0, *np.cumsum(counts).tolist())
    return CellIndex(output, aliases, grid.volume_shape, planes, before)


def _planes(grid: BlockGrid, cells_in_layers: Sequence[int]) -> tuple[int, ...]:
    """Cut the volume along z: full layers together, or one layer in parts, about so many cells to a slab."""
    side, depth = grid.block_shape[0], grid.volume_shape[0]
    planes, gathered = [0], 0
    for layer, cells in enumerate(cells_in_layers):
        begin, end = layer * side, min((layer + 1) * side, depth)
        if gathered and gathered + cells > _CELLS_PER_SLAB:
            planes.append(begin)
            gathered = 0
        gathered += cells
        parts = min(-(-cells // _CELLS_PER_SLAB), end - begin)
        if parts > 1:
            planes += [begin + (end - begin) * part // parts for part in range(1, parts)]
            gathered = cells // parts
    return (*dict.fromkeys(planes), depth)


def _number_slab(spec: _Number, slab: int) -> int:
    """Put the seeds of a slab in order; returns how many there are."""
    _, height, width = spec.grid.volume_shape
    first, last = spec.planes[slab], spec.planes[slab + 1]
    found = [np.empty(0, np.int64)]
    for number in spec.grid.numbers_in(Box((first, 0, 0), (last, height, width))):
        seeds = spec.output.map_work(merged_name(number))[0]
        begin, end = np.searchsorted(seeds, [first * height * width, last * height * width])
        found.append(np.asarray(seeds[begin:end]))
    in_order = np.concatenate(found)
    in_order.sort()
    if spec.excludes:
        in_order = in_order[~_among(in_order, spec.output.map_work(_EXCLUDED))]
    spec.output.write_map(seeds_name(slab), in_order)
    return len(in_order)


def _among(values: np.ndarray, sorted_values: np.ndarray) -> np.ndarray:
    if len(sorted_values) == 0:
        return np.zeros(len(values), bool)
    place = np.minimum(np.searchsorted(sorted_values, values), len(sorted_values) - 1)
    found: np.ndarray = sorted_values[place] == values
    return found
