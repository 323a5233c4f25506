"""Crops of volumes of any size, read where they lie, more often from tissue. Second step of a training.

    blocks spread over the volume -> range of tissue, and how much of it is where -> crops, one read each

Never is a volume loaded: at most `_BLOCKS` blocks are read to know it, then one crop at a time. Which crop
a random generator gives depends on the volume alone, so that a training that was interrupted, or that
several processes share, sees what it would have seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from braincensus.errors import ConfigError, InputError, explain
from braincensus.training.recipe import InputRange
from braincensus.volume import Volume
from braincensus_kernels.boxes import Box, Triple
from braincensus_kernels.intensity import (
    LATTICE,
    IntensityScale,
    add_histograms,
    find_tissue,
    finite_extrema,
    joint_histogram,
    scale_for,
    tile_statistics,
    tissue_range,
)
from braincensus_kernels.models.training import INPUT_TOP, DrawCrop

LOW_PERCENTILE, HIGH_PERCENTILE = 1.0, 99.9
"""Of tissue: what becomes 0 and 100."""

_BLOCK = 128
_BLOCKS = 128
_TRIES = 50
_TISSUE_SHARE = 0.6
_CONTRAST = 15.0  # of the input's 100: what stands out of tissue by this much may be a cell
_CONTRAST_SHARE = 0.001
_LEAST_WEIGHT = 0.02  # of a region without tissue as far as is known: nothing is quite left out
_CANDIDATES = 4  # for each calibration window


@dataclass(frozen=True)
class Source:
    """A volume, the range of its tissue, and where the tissue is."""

    volume: Volume
    scale: IntensityScale
    low: float
    high: float
    tissue_share: float
    """Of the volume's voxels, as far as was read."""
    cumulative: NDArray[np.float64] = field(repr=False)
    """Of the chance of each region of `_BLOCK` voxels in which a crop can start, in raster order."""
    starts: Triple
    """How many positions a crop can start at, along z, y, x."""

    @property
    def name(self) -> str:
        """For people."""
        return Path(self.volume.source).name

    @property
    def tissue_voxels(self) -> int:
        """How many voxels of tissue there are, about."""
        z, y, x = self.volume.shape
        return max(1, round(self.tissue_share * z * y * x))

    def about(self) -> dict[str, Any]:
        """Return what describes the volume, as JSON holds it; the range in the volume's own units."""
        return {
            "name": self.name,
            "shape": list(self.volume.shape),
            "voxel_size_um": list(self.volume.voxel_size_um),
            "range": [float(self.scale.restore(self.low)), float(self.scale.restore(self.high))],
            "tissue_share": round(self.tissue_share, 4),
        }

    def place(self, side: int, rng: np.random.Generator) -> Box:
        """Choose where a crop lies: a region by its tissue, then anywhere in it."""
        grid = tuple(-(-n // _BLOCK) for n in self.starts)
        chosen = int(np.searchsorted(self.cumulative, rng.random() * self.cumulative[-1], side="right"))
        region = [int(at) for at in np.unravel_index(min(chosen, len(self.cumulative) - 1), grid)]
        start = [
            int(rng.integers(at * _BLOCK, min((at + 1) * _BLOCK, n)))
            for at, n in zip(region, self.starts, strict=True)
        ]
        return Box(
            (start[0], start[1], start[2]),
            (start[0] + side, start[1] + side, start[2] + side),
        )

    def read(self, box: Box) -> NDArray[np.float32]:
        """Return a box's intensities in the units of `scale`."""
        values = self.volume.read(box)
        _refuse_nonfinite(values, self.volume, box)
        return self.scale.quantise(values).astype(np.float32)

    def scaled(self, q: NDArray[np.float32]) -> NDArray[np.float32]:
        """Map what `read` gave to [0, 100] by the range of tissue."""
        clipped = np.clip(q, self.low, self.high) - np.float32(self.low)
        scaled: NDArray[np.float32] = (clipped * np.float32(INPUT_TOP / (self.high - self.low))).astype(
            np.float32
        )
        return scaled


def measure(
    volume: Volume, crop_voxels: int, *, percentiles: tuple[float, float] = (LOW_PERCENTILE, HIGH_PERCENTILE)
) -> Source:
    """Read blocks spread over a volume: the range of its tissue, and where it is.

    Raises
    ------
    ConfigError
        If the volume is smaller than a crop.
    InputError
        If it holds NaN, or one value only, as far as it is read.
    """
    if any(n < crop_voxels for n in volume.shape):
        raise ConfigError(
            explain(
                f"{volume.source} is smaller than a crop",
                expected=f"{crop_voxels} voxels or more on each axis",
                found=" x ".join(map(str, volume.shape)),
                remedy="use smaller crops",
            )
        )
    boxes = _spread(volume.shape)
    scale = _scale(volume, boxes)
    joint, statistics = add_histograms([]), []
    lowest, highest = np.inf, -np.inf
    for box in boxes:
        values = volume.read(box)
        _refuse_nonfinite(values, volume, box)
        lowest, highest = min(lowest, float(values.min())), max(highest, float(values.max()))
        q = scale.quantise(values)
        tiles = tile_statistics(q)
        joint = add_histograms([joint, joint_histogram(q, tiles)])
        statistics.append(tiles)
    if lowest == highest:
        raise InputError(
            explain(
                f"{volume.source} is constant",
                found=f"{lowest:g} everywhere that was looked at",
                remedy="check channel and level",
            )
        )
    tissue = find_tissue(joint)
    low, high = tissue_range(joint, tissue, low_percentile=percentiles[0], high_percentile=percentiles[1])
    share = np.array([float(tissue.tiles(tiles).mean()) for tiles in statistics])
    starts = tuple(n - crop_voxels + 1 for n in volume.shape)
    source = Source(
        volume,
        scale,
        low,
        high,
        tissue.tissue_fraction,
        np.ones(1),
        (starts[0], starts[1], starts[2]),
    )
    return replace(source, cumulative=np.cumsum(_weights(source.starts, crop_voxels, boxes, share)))


def draw_crops(sources: Sequence[Source], side: int, input_range: InputRange) -> DrawCrop:
    """Return the function that draws crops: from each volume as often as from any other.

    A crop that is mostly not tissue, or that nothing stands out of, is drawn again; after many tries the best
    is taken.
    """

    def draw(rng: np.random.Generator) -> NDArray[np.float32]:
        _, _, q, scaled = _draw(sources, side, rng)
        if input_range == "tissue":
            return scaled
        low, high = float(q.min()), float(q.max())
        own: NDArray[np.float32] = (q - np.float32(low)) * np.float32(INPUT_TOP / max(high - low, 1.0))
        return own

    return draw


def calibration_windows(
    sources: Sequence[Source], *, side: int, count: int, seed: int
) -> tuple[NDArray[np.float32], list[dict[str, Any]]]:
    """Return windows to calibrate the norms on, and where they lie: those with most standing out of tissue.

    Parameters
    ----------
    sources
        Windows come from each as often as from any other.
    side
        Of a window, at most that of the crops that the sources were measured for.
    count
        How many; fewer where the volumes have no more.
    seed
        Of the candidates, four for each window.

    Returns
    -------
    float32 (count, 1, z, y, x), list of dict
        In the range of tissue, which is what a run gives the network, whatever the training saw.
    """
    rng = np.random.default_rng((seed, 7))
    found: dict[tuple[int, Box], tuple[float, NDArray[np.float32]]] = {}
    for _ in range(_CANDIDATES * count):
        number, box, q, scaled = _draw(sources, side, rng)
        tiles = tile_statistics(q.astype(np.uint32))
        excess = float(np.percentile(tiles.mean - tiles.median, 75)) / (
            sources[number].high - sources[number].low
        )
        found[number, box] = (excess, scaled)
    best = sorted(found, key=lambda key: (-found[key][0], key))[:count]
    windows = np.stack([found[key][1] for key in sorted(best)])[:, None]
    return windows, [
        {"volume": sources[number].name, "start": list(box.start), "shape": list(box.shape)}
        for number, box in sorted(best)
    ]


def _draw(
    sources: Sequence[Source], side: int, rng: np.random.Generator
) -> tuple[int, Box, NDArray[np.float32], NDArray[np.float32]]:
    """Draw a crop that is mostly tissue and that something stands out of, or after many tries the best."""
    best, best_score = None, -1.0
    for _ in range(_TRIES):
        number = int(rng.integers(len(sources)))
        source = sources[number]
        box = source.place(side, rng)
        q = source.read(box)
        scaled = source.scaled(q)
        tissue = float((scaled > 0).mean())
        standing_out = float((scaled > np.median(scaled) + _CONTRAST).mean())
        if tissue >= _TISSUE_SHARE and standing_out >= _CONTRAST_SHARE:
            return number, box, q, scaled
        if tissue + standing_out > best_score:
            best, best_score = (number, box, q, scaled), tissue + standing_out
    assert best is not None
    return best


def _spread(shape: Triple) -> list[Box]:
    """Return blocks all over the volume: all of them, or one from each run of as many as are too many.

    Which one of a run is drawn at random, with a fixed seed: equal steps could fall on one column.
    """
    boxes_z, boxes_y, boxes_x = (-(-n // _BLOCK) for n in shape)
    total = boxes_z * boxes_y * boxes_x
    numbers = np.arange(total)
    if total > _BLOCKS:
        edges = np.linspace(0, total, _BLOCKS + 1).astype(np.int64)
        numbers = np.random.default_rng(0).integers(edges[:-1], edges[1:])
    boxes = []
    for number in numbers:
        z, y, x = np.unravel_index(int(number), (boxes_z, boxes_y, boxes_x))
        start = (int(z) * _BLOCK, int(y) * _BLOCK, int(x) * _BLOCK)
        stop = [min(s + _BLOCK, n) for s, n in zip(start, shape, strict=True)]
        boxes.append(Box(start, (stop[0], stop[1], stop[2])))
    return boxes


def _scale(volume: Volume, boxes: Sequence[Box]) -> IntensityScale:
    """Choose the map to integers; where values are none, from the extrema of the blocks."""
    if volume.dtype.kind in "bu" and volume.dtype.itemsize <= 2:
        return scale_for(volume.dtype, 0.0, 0.0)
    low, high = np.inf, -np.inf
    for box in boxes:
        values = volume.read(box)
        _refuse_nonfinite(values, volume, box)
        found = finite_extrema(values)
        low, high = min(low, found.minimum), max(high, found.maximum)
    return scale_for(volume.dtype, low, high)


def _weights(
    starts: Triple, side: int, boxes: Sequence[Box], share: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return how likely a crop starts in each region: its tissue, by the blocks that were read around it.

    Blocks count by the inverse fourth power of their distance, so that the nearest decide.
    """
    axes = [np.arange(0, n, _BLOCK) for n in starts]
    extents = [np.minimum(axis + _BLOCK, n) - axis for axis, n in zip(axes, starts, strict=True)]
    centres = [axis + extent / 2 + side / 2 for axis, extent in zip(axes, extents, strict=True)]
    known = np.array([[(a + b) / 2 for a, b in zip(box.start, box.stop, strict=True)] for box in boxes])
    weights = np.empty([len(axis) for axis in axes])
    for i, z in enumerate(centres[0]):  # a plane at a time: a terabyte has a quarter of a million regions
        distance = (
            ((z - known[:, 0]) ** 2)[:, None, None]
            + ((centres[1][:, None] - known[:, 1]) ** 2).T[:, :, None]
            + ((centres[2][:, None] - known[:, 2]) ** 2).T[:, None, :]
        )
        near = 1.0 / (distance + LATTICE**2) ** 2
        tissue = np.tensordot(share, near, axes=1) / near.sum(0)
        weights[i] = np.maximum(tissue, _LEAST_WEIGHT) * extents[0][i]
    weights *= extents[1][:, None] * extents[2]
    return weights.ravel()


def _refuse_nonfinite(values: NDArray[Any], volume: Volume, box: Box) -> None:
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise InputError(
            explain(
                f"{volume.source} holds values that are not finite",
                found=f"NaN or infinity in voxels {box.start} to {box.stop}",
                remedy="replace them, or crop the volume",
            )
        )
