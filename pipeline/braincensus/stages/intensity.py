"""Stage 1: the volume's intensities, once, so that every later stage works in one fixed range.

One pass over the volume writes the statistics of tiles of 8x8x8 voxels (their median and mean: a
map 512 times smaller than the volume) and gathers an exact histogram. From these follow, for the
whole volume alike: where tissue is, the range that the network sees, the local background, and the
windows on which the network's norms are calibrated. Nothing is ever rescaled per block. A second map, of the
tiles' largest values, proves of dark parts of the volume that no model can see anything there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import product
from math import prod
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from braincensus.blocks import BlockGrid
from braincensus.errors import InputError, explain
from braincensus.formats.skipping import Unreadable, meet, n_voxels
from braincensus.planning import LATTICE
from braincensus.store import Output
from braincensus.tasks import Context
from braincensus.volume import Volume
from braincensus_kernels.boxes import Box
from braincensus_kernels.intensity import (
    IntensityScale,
    JointHistogram,
    Tissue,
    add_histograms,
    find_tissue,
    finite_extrema,
    joint_histogram,
    scale_for,
    tile_statistics,
    tissue_median,
    tissue_range,
)

TILE_MEDIAN = "braincensus/tile_median"
"""Array of tile medians in the integer units of the range's scale; NaN for a constant tile: padding,
which no camera makes."""

TILE_TOP = "braincensus/tile_top"
"""Array of the largest values of tiles, in the same units: proves where nothing bright can be."""

_WINDOW = 64
_WINDOW_STRIDE = 32
_MOST_WINDOWS = 50_000  # about those of 2.4e9 voxels; of a larger volume, a sample of about as many

_ODD = (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9)
_MIX = (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53)


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
    tissue: Tissue
    low: float
    high: float
    median: float
    windows: tuple[Window, ...] = ()
    unreadable: tuple[Unreadable, ...] = ()
    """What of the input counts as 0."""

    @property
    def tissue_threshold(self) -> float:
        """Tiles with a median from here on are tissue; 0 where all but constant tiles are."""
        return self.tissue.threshold or 0.0

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
class _Scanned:
    joint: JointHistogram
    windows: list[Window]
    extrema: tuple[float, float]
    unreadable: tuple[Unreadable, ...]


@dataclass(frozen=True)
class _Scan:
    volume: Volume
    grid: BlockGrid
    tasks: BlockGrid
    output: Output
    scale: IntensityScale | None


def run(context: Context) -> IntensityRange:
    """Scan the volume; from here on the plan's volume knows what of it cannot be read.

    Raises
    ------
    InputError
        If the volume holds NaN or infinity, or one value only; or cannot be read.
    """
    plan = context.plan
    volume, grid, settings = plan.volume, plan.scan_grid, plan.config.intensity
    plain = volume.dtype.kind in "bu" and volume.dtype.itemsize <= 2  # integer as it is: one pass will do
    with context.stage("intensity", plan.voxels * (1 if plain else 2)):
        scale = scale_for(volume.dtype, 0.0, 0.0) if plain else _scale(context)
        for name in (TILE_MEDIAN, TILE_TOP):
            context.output.create_array(
                name,
                shape=tiles_of(volume.box).shape,
                dtype="float32",
                chunk=tiles_of(grid[0].core).shape,
                shard=None,
                fill_value=np.nan,
            )
        joint = add_histograms([])
        windows: list[Window] = []
        extrema = (np.inf, -np.inf)
        unreadable: dict[int, tuple[Unreadable, ...]] = {}
        spec = _Scan(context.plan.volume, grid, plan.scan_tasks, context.output, scale)
        classes = (_Scanned, JointHistogram, Window, Box, Unreadable)
        for number, found in context.map(
            "intensity", _scan_blocks, spec, spec.tasks, name="intensity-block", classes=classes
        ):
            joint = add_histograms([joint, found.joint])
            windows.extend(found.windows)
            extrema = min(extrema[0], found.extrema[0]), max(extrema[1], found.extrema[1])
            unreadable[number] = found.unreadable
        every = _settle(context, unreadable)
        _refuse_constant(extrema, volume)
        threshold = None
        if settings.tissue_threshold != "auto":
            threshold = (settings.tissue_threshold - scale.offset) * scale.scale
        tissue = find_tissue(joint, threshold=threshold)
        low, high = tissue_range(
            joint, tissue, low_percentile=settings.low_percentile, high_percentile=settings.high_percentile
        )
    median = tissue_median(joint, tissue)
    windows.sort(key=lambda window: window.box)
    return IntensityRange(scale, tissue, low, high, median, tuple(windows), every)


def _scale(context: Context) -> IntensityScale:
    """Find the extrema first where values must be mapped to integers for their sums to be exact."""
    plan = context.plan
    spec = _Scan(plan.volume, plan.scan_grid, plan.scan_tasks, context.output, None)
    lowest, highest = np.inf, -np.inf
    unreadable: dict[int, tuple[Unreadable, ...]] = {}
    for number, (low, high, bad) in context.map(
        "intensity", _extrema_blocks, spec, spec.tasks, name="extrema-block", classes=(Unreadable, Box)
    ):
        lowest, highest = min(lowest, low), max(highest, high)
        unreadable[number] = bad
    _settle(context, unreadable)
    _refuse_constant((lowest, highest), plan.volume)
    return scale_for(plan.volume.dtype, lowest, highest)


def _extrema_blocks(spec: _Scan, task: int) -> tuple[float, float, tuple[Unreadable, ...]]:
    found = [_extrema_block(spec, number) for number in spec.grid.numbers_in(spec.tasks[task].core)]
    unreadable = _once_each(bad for _, _, several in found for bad in several)
    return min(low for low, _, _ in found), max(high for _, high, _ in found), unreadable


def _once_each(unreadable: Iterable[Unreadable]) -> tuple[Unreadable, ...]:
    """Drop what several blocks of a task found."""
    return tuple({bad.box: bad for bad in unreadable}.values())


def _settle(context: Context, unreadable: Mapping[int, tuple[Unreadable, ...]]) -> tuple[Unreadable, ...]:
    """Let all that follows read the same: what some block could not read counts as 0 for every block.

    Raises
    ------
    InputError
        If some blocks could read what others could not, or hardly anything can be read.
    """
    plan = context.plan
    reasons = {bad.box: bad for number in sorted(unreadable) for bad in unreadable[number]}
    for number, found in unreadable.items():
        core, seen = plan.scan_tasks[number].core, {bad.box for bad in found}
        for box, bad in reasons.items():
            if box not in seen and meet(box, core):
                raise InputError(
                    explain(
                        f"{plan.volume.source}: a part could be read once and not another time",
                        found=bad.reason,
                        cause="a file system that comes and goes, or a file that was changed meanwhile",
                        remedy="look after it, then run again with --fresh (fresh=True)",
                    )
                )
    if 2 * n_voxels(reasons.values()) > plan.voxels:
        raise InputError(
            explain(
                f"{plan.volume.source}: most of it cannot be read",
                found=f"{n_voxels(reasons.values()):,} of {plan.voxels:,} voxels; "
                + min(reasons.items())[1].reason,
                cause="a file system that is away, or a copy that was interrupted",
                remedy="copy the volume again from the original, then run again with --fresh (fresh=True)",
            )
        )
    every = tuple(reasons[box] for box in sorted(reasons))
    context.plan = replace(plan, volume=plan.volume.settled(every))
    return every


def _extrema_block(spec: _Scan, number: int) -> tuple[float, float, tuple[Unreadable, ...]]:
    core = spec.grid[number].core
    values, unreadable = spec.volume.read_noting(core)
    found = finite_extrema(values)
    if found.first_nonfinite is not None:
        position = tuple(a + b for a, b in zip(found.first_nonfinite, core.start, strict=True))
        raise InputError(
            explain(
                f"{spec.volume.source} holds voxels that are not numbers",
                expected="finite intensities",
                found=f"{found.n_nonfinite} NaN or infinite voxels in one block, "
                f"the first at z,y,x = {position}",
                cause="a fusion or a division that left gaps",
                remedy="replace them with 0 (for example numpy.nan_to_num) and run again",
            )
        )
    return found.minimum, found.maximum, unreadable


def _scan_blocks(spec: _Scan, task: int) -> _Scanned:
    """Scan the blocks of a task, one after the other."""
    parts = [_scan_block(spec, number) for number in spec.grid.numbers_in(spec.tasks[task].core)]
    return _Scanned(
        add_histograms([part.joint for part in parts]),
        [window for part in parts for window in part.windows],
        (min(part.extrema[0] for part in parts), max(part.extrema[1] for part in parts)),
        _once_each(bad for part in parts for bad in part.unreadable),
    )


def _scan_block(spec: _Scan, number: int) -> _Scanned:
    assert spec.scale is not None
    core = spec.grid[number].core
    values, unreadable = spec.volume.read_noting(core)
    found = finite_extrema(values)
    quantised = spec.scale.quantise(values)
    del values
    tiles = tile_statistics(quantised)
    median = np.where(tiles.constant, np.float32(np.nan), tiles.median)
    spec.output.write_block(TILE_MEDIAN, tiles_of(core), median)
    spec.output.write_block(TILE_TOP, tiles_of(core), tiles.top)
    level = np.where(tiles.constant, np.float32(-1), tiles.median)
    windows = _candidate_windows(core, level, tiles.mean, share_of_windows(spec.grid))
    extrema = (found.minimum, found.maximum)
    return _Scanned(joint_histogram(quantised, tiles), windows, extrema, unreadable)


def tiles_of(box: Box) -> Box:
    """Return the tiles, in tile coordinates, that hold a box of voxels."""
    start, stop = box.start, box.stop
    return Box(
        (start[0] // LATTICE, start[1] // LATTICE, start[2] // LATTICE),
        (-(-stop[0] // LATTICE), -(-stop[1] // LATTICE), -(-stop[2] // LATTICE)),
    )


def _candidate_windows(core: Box, median: np.ndarray, mean: np.ndarray, share: float) -> list[Window]:
    """Score windows inside a block by what stands out of their tissue.

    A tile's mean exceeds its median where something bright and sparse lies in it: cells. The upper
    quartile over the window's tiles ignores a few tiles with an artefact.
    """
    shape = tuple(min(_WINDOW, n) for n in core.shape)
    tiles = tuple(-(-n // LATTICE) for n in shape)
    origins = []
    for extent, side in zip(core.shape, shape, strict=True):
        last = (extent - side) // LATTICE * LATTICE
        origins.append(sorted({*range(0, last + 1, _WINDOW_STRIDE), last}))
    places = np.array(list(product(*origins)))
    places = places[sampled(places + core.start, share)]
    if not len(places):
        return []
    z, y, x = (places // LATTICE).T

    def percentile(values: np.ndarray, q: int) -> list[float]:
        windows = sliding_window_view(values, tiles)[z, y, x].reshape(len(places), -1)
        found: list[float] = np.percentile(windows, q, axis=1, overwrite_input=True).tolist()
        return found

    scores = zip(percentile(median, 10), percentile(mean - median, 75), strict=True)
    whole = Box((0, 0, 0), (shape[0], shape[1], shape[2])).shift(core.start)
    return [
        Window(whole.shift((z, y, x)), tissue, excess)
        for (z, y, x), (tissue, excess) in zip(places.tolist(), scores, strict=True)
    ]


def share_of_windows(grid: BlockGrid) -> float:
    """Return which part of a volume's windows are candidates, so that a large one has not too many."""
    side_by_side = [max(1, (n - _WINDOW) // _WINDOW_STRIDE + 1) for n in grid.block_shape]
    return min(1.0, _MOST_WINDOWS / (len(grid) * prod(side_by_side)))


def sampled(places: np.ndarray, share: float) -> np.ndarray:
    """Tell of each place, ``(n, 3)``, whether it is among about this part of all, as a hash of it decides.

    So it depends neither on blocks nor on order which windows are candidates.
    """
    if share >= 1:
        return np.ones(len(places), bool)
    mixed = places.astype(np.uint64) @ np.array(_ODD, np.uint64)
    for multiplier in _MIX:  # the finaliser of MurmurHash3
        mixed = (mixed ^ (mixed >> np.uint64(33))) * np.uint64(multiplier)
    mixed ^= mixed >> np.uint64(33)
    chosen: np.ndarray = mixed < np.uint64(share * 2**64)
    return chosen


def _refuse_constant(extrema: tuple[float, float], volume: Volume) -> None:
    lowest, highest = extrema
    if lowest == highest:
        raise InputError(
            explain(
                f"{volume.source}: every voxel is {lowest:g}",
                expected="a volume with structure in it",
                cause="the wrong --channel or --level, or a store whose chunks were never written",
                remedy="look at the volume in a viewer; choose another channel or level",
            )
        )
