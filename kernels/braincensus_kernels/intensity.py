"""Intensity of the whole volume, from one pass over its blocks: what is tissue, and what is its range.

First in the flow, before any foreground model. A block gives three things: its finite extrema, its
statistics per tile of 8x8x8 voxels, and a sparse joint histogram (tile median, voxel value). Blocks
are added up, then `find_tissue` and `tissue_range` read the sum once.

All that is summed over blocks is integer: stored values are mapped to integers ``q`` by one
`IntensityScale` for the volume, and histograms count in int64. Tiles lie on the volume's own lattice,
so blocks that start on it cut no tile. The answer is then the same bit for bit for any blocks and
any order.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import DTypeLike, NDArray

LATTICE = 8
"""Side of a tile, voxels."""

Q_MAX = 2**24 - 1
"""Largest ``q`` of a scaled volume: every ``q`` up to it is exact in float32."""

VALUE_BITS = 8
MEDIAN_BITS = 5
_ROW_SHIFT = 16
CONSTANT_ROW = 0x7FFF
"""Row of the joint histogram that holds the constant tiles: padding."""


# --- stored values to integers -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class IntensityScale:
    """The map from stored values to integers, ``q = round((value - offset) * scale)``.

    One scale serves the whole volume. `scale_for` chooses it so that ``q`` is proportional to the
    stored value wherever no value is negative: ratios of ``q`` are then ratios of intensity.

    Examples
    --------
    >>> IntensityScale(offset=0.0, scale=2.0).quantise(np.array([0.0, 1.5])).tolist()
    [0, 3]
    """

    offset: float
    scale: float

    def quantise(self, values: NDArray[Any]) -> NDArray[np.uint32]:
        """Map stored values to ``q``, uint32; values outside of the scale's extrema are clipped, NaN is 0."""
        values = np.asarray(values)
        if self.scale == 1.0 and values.dtype.kind in "bui" and values.dtype.itemsize <= 4:
            if self.offset == 0 and values.dtype.kind != "i":
                return values.astype(np.uint32)
            shifted = values.astype(np.int64) - int(self.offset)
            return np.maximum(shifted, 0, out=shifted).astype(np.uint32)
        if values.dtype.kind not in "buif":
            raise TypeError(f"intensity must be a real number, got {values.dtype}")
        if values.dtype not in (np.dtype(np.float32), np.dtype(np.float64)):
            values = values.astype(np.float64)
        q = np.empty(values.shape, np.uint32)
        _quantise(np.ascontiguousarray(values).reshape(-1), self.offset, self.scale, Q_MAX, q.reshape(-1))
        return q

    def restore(self, q: Any) -> Any:
        """Map ``q``, a number or an array, back to stored units, float64."""
        return np.asarray(q, dtype=np.float64) / self.scale + self.offset


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _quantise(flat: Any, offset: float, scale: float, top: int, q: Any) -> None:
    for i in range(flat.size):
        scaled = np.rint((np.float64(flat[i]) - offset) * scale)
        # written so that NaN, which compares false, becomes 0
        q[i] = np.uint32(min(scaled, np.float64(top))) if scaled > 0 else np.uint32(0)


def scale_for(dtype: DTypeLike, minimum: float, maximum: float) -> IntensityScale:
    """Choose the scale of a volume from its stored type and its global finite extrema.

    Integers are kept as they are where they fit in 24 bits. Floats, and integers that do not fit, are
    spread over 24 bits. The offset is 0 unless values are negative (then it is the minimum), so that
    neither the bins nor the ratios depend on the darkest voxel.

    Raises
    ------
    TypeError
        If the type is not a real number.
    ValueError
        If the extrema are not finite, or in the wrong order.

    Examples
    --------
    >>> scale_for("uint16", 90, 40000)
    IntensityScale(offset=0.0, scale=1.0)
    >>> scale_for("int16", -5, 300)
    IntensityScale(offset=-5.0, scale=1.0)
    """
    kind = np.dtype(dtype).kind
    if kind not in "buif":
        raise TypeError(f"intensity must be a real number, got {np.dtype(dtype)}")
    if not (np.isfinite(minimum) and np.isfinite(maximum) and minimum <= maximum):
        raise ValueError(f"extrema must be finite and in order, got {minimum} and {maximum}")
    offset = min(0.0, float(minimum))
    span = float(maximum) - offset
    if not np.isfinite(span):
        raise ValueError(f"extrema {minimum} and {maximum} are too far apart for float64")
    if (kind in "bui" and span <= Q_MAX) or span == 0:
        return IntensityScale(offset, 1.0)
    scale = Q_MAX / span
    if not np.isfinite(scale):
        raise ValueError(f"extrema {minimum} and {maximum} are too close together for float64")
    return IntensityScale(offset, scale)


class Extrema(NamedTuple):
    """Finite extrema of an array, and what is not finite in it."""

    minimum: float
    """NaN where no value is finite."""
    maximum: float
    n_nonfinite: int
    first_nonfinite: tuple[int, ...] | None
    """Index, in the array's own axes, of the first non-finite value in C order."""


def finite_extrema(values: NDArray[Any]) -> Extrema:
    """Find the extrema of the finite values and count the others, in one pass.

    Raises
    ------
    TypeError
        If the type is not a real number.

    Examples
    --------
    >>> finite_extrema(np.array([[3.0, np.nan], [1.0, np.inf]]))
    Extrema(minimum=1.0, maximum=3.0, n_nonfinite=2, first_nonfinite=(0, 1))
    """
    values = np.asarray(values)
    if values.dtype.kind not in "buif":
        raise TypeError(f"intensity must be a real number, got {values.dtype}")
    if values.size == 0:
        return Extrema(np.nan, np.nan, 0, None)
    if values.dtype.kind != "f":
        return Extrema(float(values.min()), float(values.max()), 0, None)
    if values.dtype.itemsize not in (4, 8):
        values = values.astype(np.float32 if values.dtype.itemsize == 2 else np.float64)
    flat = np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("=")).reshape(-1)
    low, high, bad, first = _finite_extrema(flat)
    if bad == flat.size:
        low = high = np.nan
    index = tuple(int(i) for i in np.unravel_index(first, values.shape)) if bad else None
    return Extrema(float(low), float(high), int(bad), index)


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _finite_extrema(flat: Any) -> Any:
    low, high, bad, first = np.inf, -np.inf, 0, -1
    for i in range(flat.size):
        v = flat[i]
        if np.isfinite(v):
            low = min(low, v)
            high = max(high, v)
        else:
            if bad == 0:
                first = i
            bad += 1
    return low, high, bad, first


# --- tiles -------------------------------------------------------------------------------------------


class TileStatistics(NamedTuple):
    """Statistics of the tiles of an array that starts on the lattice; one element per tile, zyx."""

    median: NDArray[np.float32]
    """Lower median of ``q``: a value that occurs in the tile."""
    mean: NDArray[np.float32]
    constant: NDArray[np.bool_]
    """Tiles of at least ``lattice**2`` voxels, all equal: padding; a camera's noise never gives one."""
    top: NDArray[np.float32]
    """The largest value, as float32: no voxel of the tile is larger once it is float32, too."""


def tile_statistics(q: NDArray[np.uint32], *, lattice: int = LATTICE) -> TileStatistics:
    """Median, mean, constancy and largest value of every tile.

    Parameters
    ----------
    q : uint32, zyx
        Quantised values; voxel 0 lies on the lattice. Tiles at the far border may be partial: they
        use the voxels that they have, and are called constant only if they have ``lattice**2``.

    Examples
    --------
    >>> tile_statistics(np.arange(12, dtype=np.uint32).reshape(1, 1, 12)).median
    array([[[3., 9.]]], dtype=float32)
    """
    if q.ndim != 3 or q.dtype != np.uint32:
        raise TypeError(f"q must be a 3D uint32 array, got {q.ndim}D {q.dtype}")
    if not 1 <= lattice <= 64:
        raise ValueError(f"the lattice must be from 1 to 64 voxels, got {lattice}")
    shape = tuple(-(-n // lattice) for n in q.shape)
    median, mean, top = (np.empty(shape, np.float32) for _ in range(3))
    constant = np.empty(shape, np.bool_)
    _tile_statistics(np.ascontiguousarray(q), lattice, median, mean, constant, top)
    return TileStatistics(median, mean, constant, top)


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _lower_median(values: Any, n: int, low: Any, high: Any) -> Any:
    """Bisect on the value: each step is one count over the tile, which compiles to vector code."""
    wanted = np.int32((n + 1) // 2)
    while low < high:
        middle = low + (high - low) // np.uint32(2)
        count = np.int32(0)
        for i in range(n):
            count += np.int32(values[i] <= middle)
        if count >= wanted:
            high = middle
        else:
            low = middle + np.uint32(1)
    return low


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _tile_statistics(q: Any, lattice: int, median: Any, mean: Any, constant: Any, top: Any) -> None:
    values = np.empty(lattice**3, np.uint32)
    for i in range(median.shape[0]):
        for j in range(median.shape[1]):
            for k in range(median.shape[2]):
                n = 0
                x0, x1 = k * lattice, min((k + 1) * lattice, q.shape[2])
                for z in range(i * lattice, min((i + 1) * lattice, q.shape[0])):
                    for y in range(j * lattice, min((j + 1) * lattice, q.shape[1])):
                        for x in range(x0, x1):
                            values[n] = q[z, y, x]
                            n += 1
                low, high, total = values[0], values[0], np.uint64(0)
                for m in range(n):
                    low = min(low, values[m])
                    high = max(high, values[m])
                    total += np.uint64(values[m])
                median[i, j, k] = _lower_median(values, n, low, high)
                mean[i, j, k] = total / n
                constant[i, j, k] = low == high and n >= lattice**2
                top[i, j, k] = high


# --- bins and histograms -----------------------------------------------------------------------------


def value_bin(q: Any, *, bits: int = VALUE_BITS) -> NDArray[np.int64]:
    """Bin of ``q``: its own below ``2**(bits + 1)``, above that ``2**bits`` bins per octave.

    Examples
    --------
    >>> value_bin(np.array([0, 511, 512, 513, 514, 1024])).tolist()
    [0, 511, 512, 512, 513, 768]
    """
    q = np.asarray(q).astype(np.int64)
    exponent = np.maximum(np.frexp(q.astype(np.float64))[1].astype(np.int64) - (bits + 1), 0)
    bins: NDArray[np.int64] = (exponent << bits) + (q >> exponent)
    return bins


def bin_start(b: Any, *, bits: int = VALUE_BITS) -> NDArray[np.int64]:
    """Smallest ``q`` of a bin: the inverse of `value_bin`.

    Examples
    --------
    >>> bin_start(np.array([511, 512, 513, 768])).tolist()
    [511, 512, 514, 1024]
    """
    b = np.asarray(b).astype(np.int64)
    exponent = np.maximum((b >> bits) - 1, 0)
    starts: NDArray[np.int64] = (b - (exponent << bits)) << exponent
    return starts


class JointHistogram(NamedTuple):
    """Sparse counts of voxels over (row of the tile median, bin of the value); see `joint_histogram`."""

    keys: NDArray[np.int64]
    """Row times 65536 plus value bin; ascending, without repeats."""
    counts: NDArray[np.int64]

    @property
    def rows(self) -> NDArray[np.int64]:
        """Row of each key: bin of the tile's median (32 per octave), or `CONSTANT_ROW`."""
        return self.keys >> _ROW_SHIFT

    @property
    def value_bins(self) -> NDArray[np.int64]:
        """Value bin of each key (256 per octave)."""
        return self.keys & ((1 << _ROW_SHIFT) - 1)


def joint_histogram(
    q: NDArray[np.uint32], statistics: TileStatistics, *, lattice: int = LATTICE
) -> JointHistogram:
    """Count voxels by (bin of their tile's median, bin of their value).

    The rows let background be told from tissue after the volume has been seen, without a second
    pass. Constant tiles have a row of their own.

    Parameters
    ----------
    q, statistics
        An array that starts on the lattice, and what `tile_statistics` gives for it.
    """
    shape = tuple(-(-n // lattice) for n in q.shape)
    if statistics.median.shape != shape:
        raise ValueError(f"expected statistics of {shape} tiles for {q.shape}, got {statistics.median.shape}")
    if q.size == 0:
        return JointHistogram(np.empty(0, np.int64), np.empty(0, np.int64))
    rows = value_bin(statistics.median, bits=MEDIAN_BITS)
    rows[statistics.constant] = CONSTANT_ROW
    used, compact = np.unique(rows, return_inverse=True)
    n_bins = int(value_bin(q.max())) + 1
    dense = np.zeros((used.size, n_bins), np.int64)
    _count_joint(np.ascontiguousarray(q), compact.reshape(shape), lattice, VALUE_BITS, dense)
    row, column = np.nonzero(dense)
    return JointHistogram((used[row] << _ROW_SHIFT) + column, dense[row, column])


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _count_joint(q: Any, rows: Any, lattice: int, bits: int, dense: Any) -> None:
    exponent = 0
    linear = np.uint32(1 << (bits + 1))
    for z in range(q.shape[0]):
        for y in range(q.shape[1]):
            for k in range(rows.shape[2]):
                row = rows[z // lattice, y // lattice, k]
                for x in range(k * lattice, min((k + 1) * lattice, q.shape[2])):
                    v = q[z, y, x]
                    # neighbours are of one magnitude: start from the last exponent
                    while (v >> exponent) >= linear:
                        exponent += 1
                    while exponent > 0 and (v >> (exponent - 1)) < linear:
                        exponent -= 1
                    dense[row, (exponent << bits) + np.int64(v >> exponent)] += 1


def add_histograms(parts: Iterable[JointHistogram]) -> JointHistogram:
    """Add the histograms of blocks; exact, and the same in any order or grouping."""
    listed = list(parts)
    if not listed:
        return JointHistogram(np.empty(0, np.int64), np.empty(0, np.int64))
    keys = np.concatenate([np.asarray(part.keys, np.int64) for part in listed])
    counts = np.concatenate([np.asarray(part.counts, np.int64) for part in listed])
    order = np.argsort(keys, kind="stable")
    keys, counts = keys[order], counts[order]
    first = np.flatnonzero(np.diff(keys, prepend=-1))
    if first.size == 0:
        return JointHistogram(keys, counts)
    return JointHistogram(keys[first], np.add.reduceat(counts, first))


# --- tissue ------------------------------------------------------------------------------------------

MIN_FRACTION = 0.02
"""Background and tissue must each hold this share of the voxels outside padding: fewer bright tiles
than that are artefacts, and fewer dark ones do no harm as tissue."""
MIN_VOXELS = 32 * LATTICE**3
MIN_SEPARATION = 3.0
"""Ashman's D with medians and robust spreads: halves of one Gaussian have 2.2, of a uniform 2.9."""
MIN_RATIO = 1.25
MAX_VALLEY = 0.25
"""Density between the modes, relative to the lower of the two peaks."""

_STEPS_PER_OCTAVE = 32
_SMOOTHING_STEPS = 2.0
_ONE_SIGMA = (0.1586552539314571, 0.5, 0.8413447460685429)


@dataclass(frozen=True, slots=True)
class Tissue:
    """What is tissue in the volume; thresholds and medians in ``q`` units."""

    threshold: float | None
    """Tiles with a median at or above this are tissue; None: all but constant tiles are."""
    separation: float
    """Ashman's D (robust) of background and tissue on log median; 0 where no valley was found or needed."""
    tissue_fraction: float
    """Share of the volume's voxels that lie in tissue tiles."""
    padding_fraction: float
    """Share of the volume's voxels that lie in constant tiles."""
    background_median: float | None
    """Median of the tile medians below the threshold."""
    tissue_median: float | None
    """Median of the tile medians of tissue; None where there is no tissue."""

    def tiles(self, statistics: TileStatistics) -> NDArray[np.bool_]:
        """Say which tiles are tissue."""
        tissue = ~statistics.constant
        if self.threshold is not None:
            tissue &= statistics.median >= self.threshold
        return tissue

    def medians(self, statistics: TileStatistics) -> NDArray[np.float32]:
        """Tile medians with NaN where a tile is not tissue (what `background.local_background` reads)."""
        return np.where(self.tiles(statistics), statistics.median, np.float32(np.nan))


def find_tissue(joint: JointHistogram, *, threshold: float | None = None) -> Tissue:
    """Tell tissue from background by the histogram of tile medians, if it has two separate modes.

    Medians of 512 voxels have little noise, ignore hot voxels and cells, and keep what is slow:
    camera background is a narrow mode, tissue a wide one above it. A cut is accepted where

    1. the density of log medians has a valley, at most `MAX_VALLEY` of the lower peak;
    2. either side holds at least `MIN_FRACTION` of the voxels, and `MIN_VOXELS`;
    3. the medians of the sides differ by a factor of `MIN_RATIO`, and Ashman's D, with medians and
       half the central 68 % in place of mean and standard deviation, is at least `MIN_SEPARATION`.

    The lowest such valley is the threshold (its middle, at the start of a histogram row): two modes
    of tissue are both kept. Otsu's criterion alone cannot serve: it always finds a cut, and a few
    artefacts outweigh a small background.

    Constant tiles are padding and take no part. Tiles whose median is the padding's value, where
    nothing is darker, are half padding: they are background too (the threshold lies above them),
    unless hardly anything else is left.

    Parameters
    ----------
    joint : JointHistogram
        Of the whole volume.
    threshold : float, optional
        In ``q`` units: use this instead of looking for one.

    Notes
    -----
    Ashman, Bird, Zepf (1994), AJ 108, 2348, for D.
    """
    rows, weights = _sum_by(joint.rows, joint.counts)
    padding = int(weights[rows == CONSTANT_ROW].sum())
    total = int(weights.sum())
    open_rows, open_weights = rows[rows != CONSTANT_ROW], weights[rows != CONSTANT_ROW]
    separation = 0.0
    if threshold is None:
        first = _first_row_above_padding(joint, open_rows, open_weights)
        cut, separation = _lowest_valley(open_rows[first:], open_weights[first:])
        if cut is not None:
            threshold = float(cut)
        elif first > 0:
            stop, start = bin_start(np.array([open_rows[0] + 1, open_rows[first]]), bits=MEDIAN_BITS)
            threshold = float(bin_start(value_bin((stop + start) // 2, bits=MEDIAN_BITS), bits=MEDIAN_BITS))
    above = _rows_of_tissue(open_rows, threshold)
    tissue_voxels = int(open_weights[above].sum())
    return Tissue(
        threshold=threshold,
        separation=separation,
        tissue_fraction=tissue_voxels / total if total else 0.0,
        padding_fraction=padding / total if total else 0.0,
        background_median=_median_of_rows(open_rows[~above], open_weights[~above]),
        tissue_median=_median_of_rows(open_rows[above], open_weights[above]),
    )


def _sum_by(
    keys: NDArray[np.int64], counts: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Sum counts of equal keys; keys come out ascending."""
    unique, inverse = np.unique(keys, return_inverse=True)
    sums = np.zeros(unique.size, np.int64)
    np.add.at(sums, inverse, counts)
    return unique, sums


def _rows_of_tissue(rows: NDArray[np.int64], threshold: float | None) -> NDArray[np.bool_]:
    """Rows of the histogram that are tissue; a given threshold inside a row keeps the whole row."""
    if threshold is None:
        return np.ones(rows.shape, np.bool_)
    kept: NDArray[np.bool_] = bin_start(rows + 1, bits=MEDIAN_BITS) > threshold
    return kept


def _median_of_rows(rows: NDArray[np.int64], weights: NDArray[np.int64]) -> float | None:
    if rows.size == 0:
        return None
    edges = np.append(bin_start(rows, bits=MEDIAN_BITS), bin_start(rows[-1] + 1, bits=MEDIAN_BITS))
    at = int(np.searchsorted(np.cumsum(weights), weights.sum() / 2))
    return float((edges[at] + bin_start(rows[at] + 1, bits=MEDIAN_BITS) - 1) / 2)


def _first_row_above_padding(
    joint: JointHistogram, rows: NDArray[np.int64], weights: NDArray[np.int64]
) -> int:
    """Index of the first row that is not half padding; 0 where padding is absent, or is all there is."""
    padding_bins = joint.value_bins[joint.rows == CONSTANT_ROW]
    if padding_bins.size == 0 or rows.size == 0:
        return 0
    padding_row = value_bin(bin_start(padding_bins.min()), bits=MEDIAN_BITS)
    if rows[0] != padding_row:
        return 0
    return 1 if weights[1:].sum() >= max(MIN_FRACTION * weights.sum(), 1) else 0


def _lowest_valley(rows: NDArray[np.int64], weights: NDArray[np.int64]) -> tuple[int | None, float]:
    """Return the cut of `find_tissue` in ``q`` units and its separation; (None, 0) where there is none."""
    total = int(weights.sum())
    if total < 2 * MIN_VOXELS:
        return None, 0.0
    # Cumulative share of voxels over log2 median. A row's mass is spread over its width, so that small
    # integers do not read as a comb of modes. What is dark beyond 10 octaves below the bulk is one value.
    share = np.concatenate([[0.0], np.cumsum(weights) / total])
    bright = float(bin_start(rows[np.searchsorted(share[1:], 1 - MIN_FRACTION)], bits=MEDIAN_BITS))
    darkest = max(0.5, bright / 1024)
    starts = np.maximum(bin_start(rows, bits=MEDIAN_BITS) - 0.5, darkest)
    stops = np.maximum(bin_start(rows + 1, bits=MEDIAN_BITS) - 0.5, darkest * 2 ** (1 / _STEPS_PER_OCTAVE))
    knots = np.log2(np.stack([starts, stops], axis=1)).reshape(-1)
    shares = np.stack([share[:-1], share[1:]], axis=1).reshape(-1)
    margin = int(np.ceil(4 * _SMOOTHING_STEPS))
    low = int(np.floor(knots[0] * _STEPS_PER_OCTAVE)) - margin
    high = int(np.ceil(knots[-1] * _STEPS_PER_OCTAVE)) + margin
    edges = np.arange(low, high + 1) / _STEPS_PER_OCTAVE
    below = np.interp(edges, knots, shares)

    steps = np.arange(-margin, margin + 1)
    kernel = np.exp(-0.5 * (steps / _SMOOTHING_STEPS) ** 2)
    density = np.convolve(np.diff(below), kernel / kernel.sum(), mode="same")
    inner, left, right = below[1:-1], density[:-1], density[1:]
    peak = np.minimum(np.maximum.accumulate(left), np.maximum.accumulate(right[::-1])[::-1])
    valley = (left + right) / 2

    smallest = max(MIN_FRACTION, MIN_VOXELS / total)
    accepted = (inner >= smallest) & (1 - inner >= smallest) & (valley <= MAX_VALLEY * peak)
    separation = np.zeros(inner.size)
    for i in np.flatnonzero(accepted):
        lower = np.interp(inner[i] * np.array(_ONE_SIGMA), below, edges)
        upper = np.interp(inner[i] + (1 - inner[i]) * np.array(_ONE_SIGMA), below, edges)
        spread = np.hypot(lower[2] - lower[0], upper[2] - upper[0]) / 2
        separation[i] = np.sqrt(2) * (upper[1] - lower[1]) / spread
        accepted[i] = separation[i] >= MIN_SEPARATION and upper[1] - lower[1] >= np.log2(MIN_RATIO)
    candidates = np.flatnonzero(accepted)
    if candidates.size == 0:
        return None, 0.0
    ends = np.flatnonzero(np.diff(candidates) > 1)
    run = candidates[: ends[0] + 1] if ends.size else candidates
    deepest = run[valley[run] <= valley[run].min() * (1 + 1e-9)]
    at = int(deepest[deepest.size // 2])
    cut_row = value_bin(np.ceil(2.0 ** edges[1 + at]), bits=MEDIAN_BITS)
    return int(bin_start(cut_row, bits=MEDIAN_BITS)), float(separation[at])


# --- range -------------------------------------------------------------------------------------------

ARTEFACT_RATIO = 4.0
ARTEFACT_FRACTION = 0.02
LOW_SIGMAS = 3.0
HIGH_SIGMAS = 10.0


def tissue_range(
    joint: JointHistogram, tissue: Tissue, *, low_percentile: float, high_percentile: float
) -> tuple[float, float]:
    """Intensity range of the tissue's voxels, ``q`` units: what maps to the bottom and top of the scale.

    The percentiles of the voxels in tissue tiles, guarded by the median m and the noise s of those
    voxels, s = m - (their 15.9th percentile): one sigma on the dark side, where there are no cells.

    - high is at least m + 10 s, so that few or no cells do not stretch noise to full scale;
    - low is at least m - 3 s, so that a little padding inside of tissue tiles does not pull it to 0;
    - tiles with a median above 4 m (and above m + 10 s) are left out if they are at most 2 % of tissue:
      artefacts; they are clipped like everything above high.

    Artefacts within tiles of ordinary median are ignored up to the share above `high_percentile`.

    Returns
    -------
    low, high : float
        With low < high, also where all voxels are equal. The whole volume serves where nothing is tissue.
    """
    if not 0 <= low_percentile < high_percentile <= 100:
        raise ValueError(f"percentiles must ascend within 0..100, got {low_percentile}, {high_percentile}")
    if joint.keys.size == 0:
        raise ValueError("an empty histogram has no range")
    edges, share = _tissue_distribution(joint, tissue)
    median, sigma = _median_and_sigma(edges, share)
    low = float(np.interp(low_percentile / 100, share, edges))
    high = float(np.interp(high_percentile / 100, share, edges))
    low = max(low, median - LOW_SIGMAS * sigma, 0.0)
    return low, max(high, median + HIGH_SIGMAS * sigma, low + 1.0)


def tissue_median(joint: JointHistogram, tissue: Tissue) -> float:
    """Median of the voxels that `tissue_range` looks at, ``q`` units."""
    if joint.keys.size == 0:
        raise ValueError("an empty histogram has no median")
    return _median_and_sigma(*_tissue_distribution(joint, tissue))[0]


def _median_and_sigma(edges: NDArray[np.float64], share: NDArray[np.float64]) -> tuple[float, float]:
    median = float(np.interp(0.5, share, edges))
    return median, median - float(np.interp(_ONE_SIGMA[0], share, edges))


def _tissue_distribution(
    joint: JointHistogram, tissue: Tissue
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Cumulative distribution of tissue voxels without artefact tiles: edges in ``q``, share below."""
    rows, bins, counts = joint.rows, joint.value_bins, joint.counts
    kept = (rows != CONSTANT_ROW) & _rows_of_tissue(rows, tissue.threshold)
    if not kept.any():
        kept = np.ones(rows.shape, np.bool_)
    edges, share = _cumulative(bins[kept], counts[kept])
    median, sigma = _median_and_sigma(edges, share)
    bound = max(ARTEFACT_RATIO * median, median + HIGH_SIGMAS * sigma)
    artefact = kept & (rows != CONSTANT_ROW) & (bin_start(rows, bits=MEDIAN_BITS) > bound)
    if 0 < counts[artefact].sum() <= ARTEFACT_FRACTION * counts[kept].sum():
        edges, share = _cumulative(bins[kept & ~artefact], counts[kept & ~artefact])
    return edges, share


def _cumulative(
    bins: NDArray[np.int64], counts: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Bins become intervals from start - 0.5 to the next start - 0.5, mass even within."""
    unique, sums = _sum_by(bins, counts)
    edges = np.stack([bin_start(unique), bin_start(unique + 1)], axis=1).reshape(-1) - 0.5
    share = np.concatenate([[0], np.cumsum(sums)]) / sums.sum()
    return edges.astype(np.float64), np.stack([share[:-1], share[1:]], axis=1).reshape(-1).astype(np.float64)
