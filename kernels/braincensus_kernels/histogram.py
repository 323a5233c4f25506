"""Otsu's threshold of a whole volume, from the blocks' ranges and histograms.

The blocks give their minimum and maximum, those give the bins, the blocks give their counts, and the
sum of the counts gives one threshold for all blocks.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from braincensus_kernels.backend import array_module, is_cupy, to_numpy
from braincensus_kernels.boxes import Box, Triple
from braincensus_kernels.filters import Sigma, gaussian_blur

OTSU_BINS = 256


def outline_range(
    image: Any, *, outer: Box, core: Box, volume_shape: Triple, outline_sigma: Sigma, where: Any = None
) -> tuple[float, float] | None:
    """Return minimum and maximum of the outline blur over a core.

    Parameters
    ----------
    image
        Voxels of `outer`, real, NumPy or CuPy.
    outer, core, volume_shape
        See :func:`braincensus_kernels.filters.gaussian_blur`; `outer` holds the blur radius around `core`.
    outline_sigma
        Standard deviation in voxels, one or per axis (z, y, x).
    where
        Boolean, shape of `core`: the voxels that count (tissue); None: all.

    Returns
    -------
    Minimum and maximum, or None where no voxel counts.

    Raises
    ------
    ValueError
        If `outer` is too small for `core`, `where` has another shape, or a value is not finite.
    """
    values = _core_values(image, outer, core, volume_shape, outline_sigma, where)
    if values.size == 0:
        return None
    minimum, maximum = float(values.min()), float(values.max())
    if not (np.isfinite(minimum) and np.isfinite(maximum)):
        raise ValueError(f"the voxels of {core} hold NaN or infinite values")
    return minimum, maximum


def outline_histogram(
    image: Any,
    *,
    outer: Box,
    core: Box,
    volume_shape: Triple,
    outline_sigma: Sigma,
    minimum: float,
    maximum: float,
    bins: int,
    where: Any = None,
) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Count the outline blur of a core in bins over a given range.

    Parameters
    ----------
    image, outer, core, volume_shape, outline_sigma, where
        As for :func:`outline_range`.
    minimum, maximum
        Centres of the first and the last bin; values beyond them count in those bins.
    bins
        Number of bins.

    Returns
    -------
    int64 counts of shape ``(bins,)``, in host memory; the counts of a volume are the sum over its cores.
    """
    values = _core_values(image, outer, core, volume_shape, outline_sigma, where)
    return count_values(values, minimum=minimum, maximum=maximum, bins=bins)


def count_values(
    values: Any, *, minimum: float, maximum: float, bins: int
) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Count float32 values as clEsperanto does: bin ``int((v - min) (bins - 1) / (max - min) + 0.5)``.

    Examples
    --------
    >>> count_values(np.float32([0, 0.4, 0.6, 2, 9]), minimum=0, maximum=2, bins=3)
    array([2, 1, 2])
    """
    if bins < 2 or not (np.isfinite(minimum) and np.isfinite(maximum) and minimum <= maximum):
        raise ValueError(f"no histogram of {bins} bins from {minimum} to {maximum}")
    if minimum == maximum:
        counts = np.zeros(bins, np.int64)
        counts[0] = values.size
        return counts
    if is_cupy(values):
        return count_generic(values, minimum=minimum, maximum=maximum, bins=bins)
    counts = np.zeros(bins, np.int64)
    _count(np.ascontiguousarray(values).reshape(-1), float(minimum), float(maximum), counts)
    return counts


def count_generic(
    values: Any, *, minimum: float, maximum: float, bins: int
) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Count with array operations of either library: the same counts as the compiled loop."""
    xp = array_module(values)
    scaled = values.reshape(-1).astype(xp.float64)
    scaled = (xp.clip(scaled, minimum, maximum) - minimum) * (bins - 1) / (maximum - minimum) + 0.5
    return to_numpy(xp.bincount(scaled.astype(xp.int64), minlength=bins)).astype(np.int64)


def otsu_threshold(counts: Any, minimum: float, maximum: float) -> float:
    """Return the threshold that separates a histogram best (largest between-class variance).

    Parameters
    ----------
    counts
        Counts in bins centred from `minimum` to `maximum`.
    minimum, maximum
        Centres of the first and the last bin.

    Returns
    -------
    The centre of a bin: foreground is what is greater. Where there is nothing to separate (one value),
    that value, so that nothing is foreground.

    Raises
    ------
    ValueError
        If there are no counts.

    Notes
    -----
    Otsu (1979), as in ``clEsperanto.threshold_otsu`` (the first best bin, empty bins passed over), in
    float64: its float32 sums lose counts beyond 2**24 voxels. For a constant image it returns -1,
    which makes everything foreground; here nothing is.

    Examples
    --------
    >>> otsu_threshold([5, 1, 0, 0, 4], 0.0, 1.0)
    0.25
    """
    n = np.asarray(counts, dtype=np.float64)
    if n.ndim != 1 or len(n) < 2 or n.sum() <= 0:
        raise ValueError("a threshold needs counts in two bins or more: there is no voxel to take one from")
    centres = minimum + np.arange(len(n)) * ((maximum - minimum) / (len(n) - 1))
    below = np.cumsum(n)
    above = n.sum() - below
    split = (n > 0) & (above > 0)
    if not split.any():
        return float(centres[int(np.argmax(n))])
    sums = np.cumsum(n * centres)
    mean_below = sums[split] / below[split]
    mean_above = (sums[-1] - sums[split]) / above[split]
    variance = below[split] * above[split] * (mean_below - mean_above) ** 2
    return float(centres[split][int(np.argmax(variance))])


def _core_values(
    image: Any, outer: Box, core: Box, volume_shape: Triple, outline_sigma: Sigma, where: Any
) -> Any:
    values = gaussian_blur(image, outer=outer, inner=core, volume_shape=volume_shape, sigma=outline_sigma)
    if where is None:
        return values
    if tuple(where.shape) != core.shape:
        raise ValueError(f"the selection has shape {tuple(where.shape)}, the core {core.shape}")
    return values[where]


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _count(values: Any, minimum: float, maximum: float, counts: Any) -> None:  # pragma: no cover - compiled
    last = len(counts) - 1
    for i in range(len(values)):
        v = min(max(np.float64(values[i]), minimum), maximum)
        counts[int((v - minimum) * last / (maximum - minimum) + 0.5)] += 1
