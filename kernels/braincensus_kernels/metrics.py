"""Scores of a census against known cells, and of one segmentation against another.

Last in the flow: it takes centroids (or labels) that a run found and those that are true, pairs
them one to one, and counts. A pair is found by one rule everywhere: of all candidate pairs, the
best comes first (the nearest; the greatest overlap), ties by position in the input, and each cell
is used once. What is not paired is *extra* (found, not true) or *missed* (true, not found).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
from scipy.spatial import KDTree

_jit: Any = numba.njit(cache=True, nogil=True)


@dataclass(frozen=True)
class Match:
    """Found and true cells, paired one to one.

    Attributes
    ----------
    n_found, n_true : int
        Cells on each side.
    found_index, true_index : 1D arrays of int64
        The pairs, best first: positions in the input (for labels: the labels themselves).
    quality : 1D array of float64
        Distance of each pair in um; for labels, intersection over union.
    extra, missed : 1D arrays of int64
        What has no partner among the found, and among the true; ascending.

    Examples
    --------
    >>> match = match_centroids([[0, 0, 0], [9, 9, 9]], [[0, 1, 0]], max_distance_um=2)
    >>> match.precision, match.recall, round(match.f1, 3), match.count_error
    (0.5, 1.0, 0.667, 1.0)
    """

    n_found: int
    n_true: int
    found_index: npt.NDArray[np.int64]
    true_index: npt.NDArray[np.int64]
    quality: npt.NDArray[np.float64]
    extra: npt.NDArray[np.int64]
    missed: npt.NDArray[np.int64]

    @property
    def n_matched(self) -> int:
        """Number of pairs."""
        return len(self.found_index)

    @property
    def precision(self) -> float:
        """Share of the found cells that are true; 1 if none was found."""
        return self.n_matched / self.n_found if self.n_found else 1.0

    @property
    def recall(self) -> float:
        """Share of the true cells that were found; 1 if there are none."""
        return self.n_matched / self.n_true if self.n_true else 1.0

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall (Dice of the two sets); 1 if both are empty."""
        total = self.n_found + self.n_true
        return 2 * self.n_matched / total if total else 1.0

    @property
    def count_error(self) -> float:
        """Found minus true cells, as a share of the true: +0.1 is 10 % too many; inf if none is true."""
        if self.n_true:
            return (self.n_found - self.n_true) / self.n_true
        return float("inf") if self.n_found else 0.0


def match_centroids(found_zyx_um: npt.ArrayLike, true_zyx_um: npt.ArrayLike, max_distance_um: float) -> Match:
    """Pair found with true centroids, one to one, nearest pairs first.

    Parameters
    ----------
    found_zyx_um, true_zyx_um : (n, 3) arrays
        Centroids in um (in um, so that distance means the same along every axis). May be empty.
    max_distance_um : float
        Two centroids farther apart than this are never a pair. The radius of a cell is a good choice.

    Returns
    -------
    Match
        With `quality` the distance in um.

    Raises
    ------
    ValueError
        If an array is not (n, 3) or not finite, or the distance is negative or not finite.

    Notes
    -----
    Taking the nearest remaining pair again and again is not always the greatest possible number of
    pairs, but it never pairs a cell with a far one while its own is free; the two differ only where
    several cells lie within `max_distance_um` of each other. Memory is that of all pairs within it.
    """
    found, true = _points(found_zyx_um, "found_zyx_um"), _points(true_zyx_um, "true_zyx_um")
    if not (np.isfinite(max_distance_um) and max_distance_um >= 0):
        raise ValueError(f"max_distance_um must be 0 or more, got {max_distance_um}")
    if not len(found) or not len(true):
        none = np.zeros(0, np.int64)
        return _match(none, none, np.zeros(0), np.arange(len(found)), np.arange(len(true)))
    near = KDTree(found).sparse_distance_matrix(KDTree(true), max_distance_um, output_type="ndarray")
    order = np.lexsort((near["j"], near["i"], near["v"]))
    i, j, distance = near["i"][order], near["j"][order], near["v"][order]
    kept = _first_come(i.astype(np.int64), j.astype(np.int64), len(found), len(true))
    return _match(i[kept], j[kept], distance[kept], np.arange(len(found)), np.arange(len(true)))


def match_labels(found: npt.ArrayLike, true: npt.ArrayLike, iou: float = 0.5) -> Match:
    """Pair the labels of two segmentations, one to one, greatest overlap first.

    Parameters
    ----------
    found, true : arrays of integers, of one shape
        Instance labels, 0 is background. Labels need not be dense.
    iou : float
        Least intersection over union of a pair; above 0, up to 1. Above one half no label has two
        candidates; at one half or below, the greatest overlap wins, ties by label.

    Returns
    -------
    Match
        With labels for indices, and `quality` the intersection over union.

    Raises
    ------
    ValueError
        If the shapes differ, a label is negative, or `iou` is out of range.
    TypeError
        If an array does not hold integers.
    """
    a, b = _labels(found, "found"), _labels(true, "true")
    if a.shape != b.shape:
        raise ValueError(f"the segmentations differ in shape: {a.shape} and {b.shape}")
    if not 0 < iou <= 1:
        raise ValueError(f"iou must be above 0 and up to 1, got {iou}")
    a, b = a.ravel(), b.ravel()
    some = (a != 0) | (b != 0)
    # Dense numbers, background first where it occurs, make one sortable key of a pair.
    names_a, a, volume_a = np.unique(np.append(a[some], 0), return_inverse=True, return_counts=True)
    names_b, b, volume_b = np.unique(np.append(b[some], 0), return_inverse=True, return_counts=True)
    key, common = np.unique(a.astype(np.int64) * len(names_b) + b, return_counts=True)
    i, j = np.divmod(key, len(names_b))
    both = (i > 0) & (j > 0)
    i, j, common = i[both], j[both], common[both]
    overlap = common / (volume_a[i] + volume_b[j] - common)
    # The test is in whole numbers: 1/3 of 3 voxels must not depend on rounding.
    enough = common >= np.ceil(iou * (volume_a[i] + volume_b[j] - common) - 1e-9)
    i, j, overlap = i[enough], j[enough], overlap[enough]
    order = np.lexsort((j, i, -overlap))
    i, j, overlap = i[order], j[order], overlap[order]
    kept = _first_come(i, j, len(names_a), len(names_b))
    names_a, names_b = names_a.astype(np.int64), names_b.astype(np.int64)
    return _match(names_a[i[kept]], names_b[j[kept]], overlap[kept], names_a[1:], names_b[1:])


def f1_of_labels(found: npt.ArrayLike, true: npt.ArrayLike, iou: float = 0.5) -> float:
    """Return the F1 of two segmentations: cells paired at this overlap; see `match_labels`.

    Examples
    --------
    >>> f1_of_labels([1, 1, 1, 0, 2, 2], [7, 7, 7, 0, 0, 3])
    1.0
    >>> f1_of_labels([1, 1, 1, 0, 2, 2], [7, 7, 7, 0, 0, 3], iou=0.75)
    0.5
    """
    return match_labels(found, true, iou).f1


def _points(points: npt.ArrayLike, name: str) -> npt.NDArray[np.float64]:
    array = np.asarray(points, dtype=np.float64)
    if array.size == 0:
        return np.zeros((0, 3))
    if array.ndim != 2 or array.shape[1] != 3:
        raise ValueError(f"{name} must be (n, 3), z, y, x in um; got {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(
            f"{name} holds {int((~np.isfinite(array)).any(axis=1).sum())} points that are not finite"
        )
    return array


def _labels(labels: npt.ArrayLike, name: str) -> npt.NDArray[np.integer[Any]]:
    array = np.asarray(labels)
    if array.size == 0:
        return np.zeros(array.shape, np.int64)
    if not np.issubdtype(array.dtype, np.integer):
        raise TypeError(f"{name} must hold integer labels, got {array.dtype}")
    if array.min() < 0:
        raise ValueError(f"{name} holds a negative label: {array.min()}")
    return array


def _match(
    i: npt.NDArray[np.int64],
    j: npt.NDArray[np.int64],
    quality: npt.NDArray[np.float64],
    all_found: npt.NDArray[np.int64],
    all_true: npt.NDArray[np.int64],
) -> Match:
    i, j = i.astype(np.int64), j.astype(np.int64)
    extra = np.setdiff1d(all_found, i, assume_unique=True)
    missed = np.setdiff1d(all_true, j, assume_unique=True)
    return Match(len(all_found), len(all_true), i, j, quality, extra, missed)


@_jit
def _first_come(i, j, n_i, n_j):  # type: ignore[no-untyped-def]
    """Keep a pair if neither of its cells is in a pair kept before it."""
    used_i, used_j = np.zeros(n_i, np.bool_), np.zeros(n_j, np.bool_)
    kept = np.zeros(len(i), np.bool_)
    for k in range(len(i)):
        if not used_i[i[k]] and not used_j[j[k]]:
            used_i[i[k]] = used_j[j[k]] = kept[k] = True
    return kept
