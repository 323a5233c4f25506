"""Sets of ids that are one cell: union-find over the pairs that stitching finds.

After the faces of all blocks were compared, before relabel. Voronoi-Otsu needs it only for what the
seam audit finds; methods that stitch by equivalences (components, instance models) need it for all.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray


def connected(pairs: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Join ids that are connected through pairs; each set is known by its smallest id.

    The answer does not depend on the order of the pairs or of the two ids in one.

    Parameters
    ----------
    pairs : int64, (n, 2)

    Returns
    -------
    ids : int64, ascending
        Every id that occurs, once.
    representative : int64
        For each of them, the smallest id of its set.

    Examples
    --------
    >>> ids, representative = connected(np.array([[7, 3], [9, 7], [4, 5]]))
    >>> ids.tolist(), representative.tolist()
    ([3, 4, 5, 7, 9], [3, 4, 4, 3, 3])
    """
    pairs = np.asarray(pairs)
    if pairs.ndim != 2 or pairs.shape[1] != 2:
        raise ValueError(f"expected pairs of shape (n, 2), got {pairs.shape}")
    if pairs.dtype.kind not in "iu" or pairs.dtype == np.uint64:
        raise TypeError(f"expected int64 ids, got {pairs.dtype}")
    ids, compact = np.unique(pairs.astype(np.int64, copy=False), return_inverse=True)
    parent = np.arange(ids.size)
    _join(compact.reshape(-1, 2), parent)
    return ids, ids[parent]


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _join(pairs: Any, parent: Any) -> None:
    """Link larger roots to smaller ones, halving paths on the way; then point every element at its root."""
    for i in range(pairs.shape[0]):
        a, b = pairs[i, 0], pairs[i, 1]
        while parent[a] != a:
            parent[a] = parent[parent[a]]
            a = parent[a]
        while parent[b] != b:
            parent[b] = parent[parent[b]]
            b = parent[b]
        if a < b:
            parent[b] = a
        elif b < a:
            parent[a] = b
    # parents are never larger than their children, so one ascending pass settles all
    for i in range(parent.size):
        parent[i] = parent[parent[i]]
