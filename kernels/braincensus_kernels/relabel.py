"""Final numbers: cells are 1..N in the order of their seeds, and each block has its own small lookup.

After stitch in the flow. The numbers depend on the seeds alone, so any blocks give the same ones.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from braincensus_kernels.backend import array_module, is_cupy


def label_dtype(n_cells: int) -> np.dtype[Any]:
    """Type that holds the labels 0..n: uint32 while it fits, else uint64.

    Examples
    --------
    >>> label_dtype(2**32 - 1), label_dtype(2**32)
    (dtype('uint32'), dtype('uint64'))
    """
    if n_cells < 0:
        raise ValueError(f"the number of cells cannot be negative, got {n_cells}")
    return np.dtype(np.uint32 if n_cells <= np.iinfo(np.uint32).max else np.uint64)


def number_cells(seeds: NDArray[np.int64], *, kept: NDArray[np.bool_] | None = None) -> NDArray[Any]:
    """Give cells the numbers 1..N in seed order; those that are not kept get 0.

    Parameters
    ----------
    seeds : int64, strictly ascending
        Global voxel index of each cell's seed.
    kept : bool, same length, optional
        Cells that pass the filters; all where it is not given.

    Returns
    -------
    Final label of each seed, of `label_dtype`.

    Examples
    --------
    >>> number_cells(np.array([3, 40, 41]), kept=np.array([True, False, True])).tolist()
    [1, 0, 2]
    """
    seeds = np.asarray(seeds)
    if seeds.ndim != 1 or (np.diff(seeds) <= 0).any():
        raise ValueError("seeds must be a 1D array, strictly ascending")
    if kept is None:
        return np.arange(1, seeds.size + 1, dtype=label_dtype(seeds.size))
    if kept.shape != seeds.shape or kept.dtype != np.bool_:
        raise ValueError(f"expected one bool per seed, {seeds.size}, got {kept.dtype} {kept.shape}")
    numbers = np.cumsum(kept, dtype=np.int64)
    dtype = label_dtype(int(numbers[-1]) if numbers.size else 0)
    return np.where(kept, numbers, 0).astype(dtype)


def apply_lookup(labels: Any, lookup: Any) -> Any:
    """Replace each local label by its final one.

    Parameters
    ----------
    labels : unsigned integer, any shape
        Local labels, 0..n; NumPy or CuPy.
    lookup : uint32 or uint64, (n + 1,)
        Final label of each; background stays background, so ``lookup[0]`` is 0.

    Returns
    -------
    array of the labels' shape and library and the lookup's type

    Raises
    ------
    ValueError
        If a label has no entry, or background would become a cell.

    Examples
    --------
    >>> apply_lookup(np.array([[0, 2], [1, 2]], np.uint32), np.array([0, 7, 9], np.uint32)).tolist()
    [[0, 9], [7, 9]]
    """
    if labels.dtype.kind != "u" or lookup.dtype not in (np.dtype(np.uint32), np.dtype(np.uint64)):
        raise TypeError(f"expected unsigned labels and lookup, got {labels.dtype} and {lookup.dtype}")
    if lookup.ndim != 1 or lookup.size == 0 or lookup[0] != 0:
        raise ValueError("a lookup is 1D and starts with 0 for the background")
    if is_cupy(labels):
        return apply_generic(labels, lookup)
    final = np.empty(labels.shape, lookup.dtype)
    largest = _apply(np.ascontiguousarray(labels).reshape(-1), lookup, final.reshape(-1))
    if largest >= lookup.size:
        raise ValueError(f"label {largest} is beyond the lookup, which ends at {lookup.size - 1}")
    return final


def apply_generic(labels: Any, lookup: Any) -> Any:
    """Replace labels with whole-array operations of either library: the same as the compiled loop."""
    xp = array_module(labels)
    largest = int(labels.max()) if labels.size else 0
    if largest >= lookup.size:
        raise ValueError(f"label {largest} is beyond the lookup, which ends at {lookup.size - 1}")
    return xp.asarray(lookup)[labels.astype(xp.int64)]


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _apply(labels: Any, lookup: Any, final: Any) -> Any:
    """Fill `final`; stop at a label beyond the lookup and return it, else return 0."""
    for i in range(labels.size):
        label = np.uint64(labels[i])
        if label >= np.uint64(lookup.size):
            return label
        final[i] = lookup[label]
    return np.uint64(0)
