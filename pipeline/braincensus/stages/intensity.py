"""Stage 1: the volume's intensities, once, so that every later stage works in one fixed range.

One pass over the volume writes the statistics of tiles of 8x8x8 voxels (their median and mean: a
map 512 times smaller than the volume) and gathers an exact histogram. From these follow, for the
whole volume alike: where tissue is, the range that the network sees, the local background, and the
windows on which the network's norms are calibrated. Nothing is ever rescaled per block. A second map, of the
tiles' largest values, proves of dark parts of the volume that no model can see anything there.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from braincensus.blocks import BlockGrid
from braincensus.errors import InputError, explain
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
_MOST_WINDOWS = 50_000  # those of about 150 blocks, 2.4e9 voxels; of more, a sample as good


@dataclass(frozen=True)
class Window:
    """A candidate for calibration: where it is, how bright its tissue, how much stands out of it."""

    box: Box
    tissue: float
    excess: float


class Candidates:
    """The windows of a volume, or of a large one a sample that depends on nothing but where windows are.

    Each window has a number drawn from its place; those with the least stay. So whatever the order in which
    they come, and however many blocks there are, the same windows stay, and memory does not grow.
    """

    def __init__(self) -> None:
        self._kept: list[Window] = []

    def add(self, windows: list[Window]) -> None:
        """Take the windows of a block."""
        self._kept.extend(windows)
        if len(self._kept) > 2 * _MOST_WINDOWS:
            self._thin()

    def in_order(self) -> tuple[Window, ...]:
        """Return those that stay, in the order of their places."""
        self._thin()
        return tuple(sorted(self._kept, key=lambda window: window.box))

    def _thin(self) -> None:
        if len(self._kept) > _MOST_WINDOWS:
            self._kept.sort(key=_draw)
            del self._kept[_MOST_WINDOWS:]


def _draw(window: Window) -> bytes:
    place = np.array(window.box.start, "<i8").tobytes()
    return hashlib.blake2b(place, digest_size=8).digest() + place


@dataclass(frozen=True)
class IntensityRange:
    """What the pass found; intensities are in the integer units of `scale`."""

    scale: IntensityScale
    tissue: Tissue
    low: float
    high: float
    median: float
    windows: tuple[Window, ...] = ()

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
        windows = Candidates()
        extrema = (np.inf, -np.inf)
        spec = _Scan(volume, grid, context.output, scale)
        classes = (_Scanned, JointHistogram, Window, Box)
        for _, found in context.map(
            "intensity", _scan_block, spec, grid, name="intensity-block", classes=classes
        ):
            joint = add_histograms([joint, found.joint])
            windows.add(found.windows)
            extrema = min(extrema[0], found.extrema[0]), max(extrema[1], found.extrema[1])
        _refuse_constant(extrema, volume)
        threshold = None
        if settings.tissue_threshold != "auto":
            threshold = (settings.tissue_threshold - scale.offset) * scale.scale
        tissue = find_tissue(joint, threshold=threshold)
        low, high = tissue_range(
            joint, tissue, low_percentile=settings.low_percentile, high_percentile=settings.high_percentile
        )
    median = tissue_median(joint, tissue)
    return IntensityRange(scale, tissue, low, high, median, windows.in_order())


def _scale(context: Context) -> IntensityScale:
    """Find the extrema first where values must be mapped to integers for their sums to be exact."""
    plan = context.plan
    spec = _Scan(plan.volume, plan.scan_grid, context.output, None)
    lowest, highest = np.inf, -np.inf
    for _, (low, high) in context.map(
        "intensity", _extrema_block, spec, plan.scan_grid, name="extrema-block"
    ):
        lowest, highest = min(lowest, low), max(highest, high)
    _refuse_constant((lowest, highest), plan.volume)
    return scale_for(plan.volume.dtype, lowest, highest)


def _extrema_block(spec: _Scan, number: int) -> tuple[float, float]:
    core = spec.grid[number].core
    found = finite_extrema(spec.volume.read(core))
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
    return found.minimum, found.maximum


def _scan_block(spec: _Scan, number: int) -> _Scanned:
    assert spec.scale is not None
    core = spec.grid[number].core
    values = spec.volume.read(core)
    found = finite_extrema(values)
    quantised = spec.scale.quantise(values)
    del values
    tiles = tile_statistics(quantised)
    median = np.where(tiles.constant, np.float32(np.nan), tiles.median)
    spec.output.write_block(TILE_MEDIAN, tiles_of(core), median)
    spec.output.write_block(TILE_TOP, tiles_of(core), tiles.top)
    windows = _candidate_windows(core, np.where(tiles.constant, np.float32(-1), tiles.median), tiles.mean)
    return _Scanned(joint_histogram(quantised, tiles), windows, (found.minimum, found.maximum))


def tiles_of(box: Box) -> Box:
    """Return the tiles, in tile coordinates, that hold a box of voxels."""
    start, stop = box.start, box.stop
    return Box(
        (start[0] // LATTICE, start[1] // LATTICE, start[2] // LATTICE),
        (-(-stop[0] // LATTICE), -(-stop[1] // LATTICE), -(-stop[2] // LATTICE)),
    )


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
