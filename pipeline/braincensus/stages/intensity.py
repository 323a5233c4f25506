"""Stage 1: the volume's intensities, once, so that every later stage works in one fixed range.

One pass over the volume writes the statistics of tiles of 8x8x8 voxels (their median and mean: a
map 512 times smaller than the volume) and gathers an exact histogram. From these follow, for the
whole volume alike: where tissue is, the range that the network sees, the local background, and the
windows on which the network's norms are calibrated. Nothing is ever rescaled per block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from braincensus_kernels.boxes import Box
from braincensus_kernels.intensity import (
    IntensityScale,
    Tissue,
    add_histograms,
    find_tissue,
    finite_extrema,
    joint_histogram,
    scale_for,
    tile_statistics,
    tissue_range,
)

from braincensus.blocks import BlockGrid
from braincensus.errors import InputError, explain
from braincensus.planning import LATTICE
from braincensus.store import Output
from braincensus.tasks import Context
from braincensus.volume import Volume

TILE_MEDIAN = "braincensus/tile_median"
NOT_TISSUE = -1.0
"""Stored as the median of a constant tile: padding, which no camera makes."""

_WINDOW = 64
_WINDOW_STRIDE = 32


@dataclass(frozen=True)
class Window:
    """A candidate for calibration: where it is, how bright its tissue, how much stands out of it."""

    box: Box
    tissue: float
    excess: float


@dataclass(frozen=True)
class IntensityRange:
    """What the pass found; intensities are in the integer units of `scale`."""

    scale: IntensityScale
    tissue_threshold: float
    tissue: Tissue
    low: float
    high: float
    windows: tuple[Window, ...]

    def summary(self) -> dict[str, Any]:
        """Give the provenance, in the input's own units."""
        return {
            "low": float(self.scale.restore(self.low)),
            "high": float(self.scale.restore(self.high)),
            "tissue_threshold": (
                float(self.scale.restore(self.tissue_threshold)) if self.tissue_threshold > 0 else None
            ),
            "tissue_fraction": self.tissue.tissue_fraction,
        }


@dataclass(frozen=True)
class _Scan:
    volume: Volume
    grid: BlockGrid
    output: Output
    scale: IntensityScale | None


def run(context: Context) -> IntensityRange:
    """Scan the volume.

    Raises
    ------
    InputError
        If the volume holds NaN or infinity, or one value only.
    """
    plan = context.plan
    volume, grid, settings = plan.volume, plan.scan_grid, plan.config.intensity
    floats = volume.dtype.kind == "f"
    with context.stage("intensity", plan.voxels * (2 if floats else 1)):
        scale = scale_for(volume.dtype, 0.0, 0.0)
        if floats:
            scale = _float_scale(context)
        tile_shape = tuple(-(-n // LATTICE) for n in volume.shape)
        chunk = tuple(n // LATTICE for n in grid.block_shape)
        context.output.create_array(
            TILE_MEDIAN, shape=tile_shape, dtype="float32", chunk=chunk, shard=None, fill_value=NOT_TISSUE
        )
        joint: Any = None
        windows: list[Window] = []
        lowest, highest = np.inf, -np.inf
        spec = _Scan(volume, grid, context.output, scale)
        for _, found in context.map(
            "intensity",
            _scan_block,
            spec,
            grid,
            name="intensity-block",
        ):
            block_joint, block_windows, low, high = found
            joint = block_joint if joint is None else add_histograms(joint, block_joint)
            windows.extend(block_windows)
            lowest, highest = min(lowest, low), max(highest, high)
        _refuse_constant(lowest, highest, volume)
        tissue = find_tissue(joint)
        threshold = tissue.threshold or 0.0
        if settings.tissue_threshold != "auto":
            threshold = float(scale.quantise(np.asarray([settings.tissue_threshold], dtype=volume.dtype))[0])
            tissue = find_tissue(joint, threshold=threshold)
        low, high = tissue_range(joint, tissue, settings.low_percentile, settings.high_percentile)
    windows.sort(key=lambda window: window.box)
    return IntensityRange(scale, threshold, tissue, low, high, tuple(windows))


def _float_scale(context: Context) -> IntensityScale:
    """Find the range of a floating-point volume first, so that its sums can be exact integers."""
    plan = context.plan
    spec = _Scan(plan.volume, plan.scan_grid, context.output, None)
    lowest, highest = np.inf, -np.inf
    for _, (low, high) in context.map(
        "intensity",
        _extrema_block,
        spec,
        plan.scan_grid,
        name="extrema-block",
    ):
        lowest, highest = min(lowest, low), max(highest, high)
    _refuse_constant(lowest, highest, plan.volume)
    return scale_for(plan.volume.dtype, lowest, highest)


def _extrema_block(spec: _Scan, number: int) -> tuple[float, float]:
    core = spec.grid[number].core
    low, high, bad, first = finite_extrema(spec.volume.read(core))
    if bad:
        where = np.unravel_index(int(first), core.shape)
        position = tuple(int(a) + int(b) for a, b in zip(where, core.start, strict=True))
        raise InputError(
            explain(
                f"{spec.volume.source} holds voxels that are not numbers",
                expected="finite intensities",
                found=f"{bad} NaN or infinite voxels in one block, the first at z,y,x = {position}",
                cause="a fusion or a division that left gaps",
                remedy="replace them with 0 (for example numpy.nan_to_num) and run again",
            )
        )
    return float(low), float(high)


def _scan_block(spec: _Scan, number: int) -> tuple[Any, list[Window], float, float]:
    assert spec.scale is not None
    core = spec.grid[number].core
    values = spec.volume.read(core)
    low, high, _, _ = finite_extrema(values)
    quantised = spec.scale.quantise(values)
    del values
    tiles = tile_statistics(quantised)
    median = np.where(tiles.constant, np.float32(NOT_TISSUE), tiles.median)
    tile_box = Box(
        (core.start[0] // LATTICE, core.start[1] // LATTICE, core.start[2] // LATTICE),
        (-(-core.stop[0] // LATTICE), -(-core.stop[1] // LATTICE), -(-core.stop[2] // LATTICE)),
    )
    spec.output.write_block(TILE_MEDIAN, tile_box, median)
    windows = _candidate_windows(core, median, tiles.mean)
    return joint_histogram(quantised, tiles), windows, float(low), float(high)


def _candidate_windows(core: Box, median: np.ndarray, mean: np.ndarray) -> list[Window]:
    """Score windows inside a block by what stands out of their tissue.

    A tile's mean exceeds its median where something bright and sparse lies in it: cells. The upper
    quartile over the window's tiles ignores a few tiles with an artefact.
    """
    windows = []
    shape = tuple(min(_WINDOW, n) for n in core.shape)
    origins = []
    for extent, side in zip(core.shape, shape, strict=True):
        last = (extent - side) // LATTICE * LATTICE
        origins.append(sorted({*range(0, last + 1, _WINDOW_STRIDE), last}))
    for z in origins[0]:
        for y in origins[1]:
            for x in origins[2]:
                box = Box((z, y, x), (z + shape[0], y + shape[1], x + shape[2]))
                tile = tuple(
                    slice(a // LATTICE, -(-b // LATTICE)) for a, b in zip(box.start, box.stop, strict=True)
                )
                level, excess = median[tile], mean[tile] - median[tile]
                windows.append(
                    Window(
                        box.shift(core.start),
                        tissue=float(np.percentile(level, 10)),
                        excess=float(np.percentile(excess, 75)),
                    )
                )
    return windows


def _refuse_constant(lowest: float, highest: float, volume: Volume) -> None:
    if lowest == highest:
        raise InputError(
            explain(
                f"{volume.source}: every voxel is {lowest:g}",
                expected="a volume with structure in it",
                cause="the wrong --channel, --timepoint or --level, or a store whose chunks were never written",
                remedy="look at the volume in a viewer; choose another channel or level",
            )
        )
