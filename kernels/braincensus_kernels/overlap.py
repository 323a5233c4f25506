"""Stitching by overlap: which cells of two overlapping blocks are one cell, though nobody named them alike.

After label, for labellers that know nothing of a cell's identity (Cellpose, StarDist, anybody's own
function): the same cell is 7 in one block and 3 in the next. What the two blocks have in common is the
voxels that both labelled, so that is where cells are compared:

1. `renumber` gives a block's labels dense numbers, the cells of its core first.
2. `overlaps` counts the voxels of each pair of labels of two blocks; `match_one_to_one` takes a pair
   for one cell if each is the other's best overlap, and they overlap enough. Cells that merely touch
   share no voxel, so they are never a pair.
3. `joinable` looks at all matches at once: no chain of them may fuse two cells of one block.

With labels that are right in every block, each cell's two views are equal on the shared voxels, so all
this gives the right answer exactly; the thresholds decide only where blocks saw different things.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from braincensus_kernels.boxes import Box, Triple
from braincensus_kernels.union_find import connected

_DENSE_ENOUGH = 4
"""A lookup over all label values is used while it has at most so many entries for each voxel."""


def renumber(labels: NDArray[Any], *, core: tuple[slice, slice, slice]) -> tuple[NDArray[np.uint32], int]:
    """Give labels dense numbers in the order in which they occur, those with a voxel in the core first.

    The numbers depend on the partition alone, not on the labels' values, so nothing after this can.

    Parameters
    ----------
    labels : integer, zyx
        0 is background, none is negative; values may be sparse, and as large as the type allows.
    core : three slices
        Where the core lies in `labels`.

    Returns
    -------
    numbers : uint32, zyx
        1..k for the labels of the core, k + 1 and on for those that only the halo shows.
    k : int

    Examples
    --------
    >>> labels = np.array([[[900, 0, 70, 70, 5]]])
    >>> numbers, k = renumber(labels, core=(slice(0, 1), slice(0, 1), slice(2, 5)))
    >>> numbers.tolist(), k
    ([[[3, 0, 1, 1, 2]]], 2)
    """
    if labels.ndim != 3 or labels.dtype.kind not in "iu":
        raise TypeError(f"expected integer labels with axes zyx, got {labels.dtype} {labels.shape}")
    numbers = np.zeros(labels.shape, np.uint32)
    highest = int(labels.max(initial=0))
    if labels.min(initial=0) < 0:
        raise ValueError(f"labels must not be negative, got {labels.min()}")
    if highest == 0:
        return numbers, 0
    if highest > _DENSE_ENOUGH * labels.size:
        values, rank = np.unique(labels, return_inverse=True)
        labels = rank.reshape(labels.shape) + (values[0] != 0)
        highest = len(values)
    bounds = np.array([part.indices(n)[:2] for part, n in zip(core, labels.shape, strict=True)], np.int64)
    dense = np.ascontiguousarray(labels, dtype=np.uint32)
    return numbers, int(_renumber(dense, bounds, np.zeros(highest + 1, np.uint32), numbers))


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _renumber(labels: Any, core: Any, lookup: Any, numbers: Any) -> Any:
    """Fill `lookup` from the core, then from all, then `numbers`; return how many the core has."""
    n = 0
    for z in range(core[0, 0], core[0, 1]):
        for y in range(core[1, 0], core[1, 1]):
            for x in range(core[2, 0], core[2, 1]):
                label = labels[z, y, x]
                if label != 0 and lookup[label] == 0:
                    n += 1
                    lookup[label] = n
    n_core = n
    for z in range(labels.shape[0]):
        for y in range(labels.shape[1]):
            for x in range(labels.shape[2]):
                label = labels[z, y, x]
                if label != 0:
                    if lookup[label] == 0:
                        n += 1
                        lookup[label] = n
                    numbers[z, y, x] = lookup[label]
    return n_core


def first_voxels(
    numbers: NDArray[np.uint32], n_core: int, *, core: Box, volume_shape: Triple
) -> NDArray[np.int64]:
    """Find the smallest raster index, in the volume, of each cell's voxels in the core.

    Parameters
    ----------
    numbers : uint32, zyx, shape of `core`
        As `renumber` gave them, cut to the core.
    n_core : int
        Cells of the core.

    Returns
    -------
    int64, (n_core,)
        Ascending, because `renumber` numbers in this order.

    Examples
    --------
    >>> core = Box((1, 0, 0), (2, 1, 4))
    >>> first_voxels(np.array([[[0, 1, 1, 2]]], np.uint32), 2, core=core, volume_shape=(2, 1, 4)).tolist()
    [5, 7]
    """
    if numbers.shape != core.shape:
        raise ValueError(f"expected numbers of {core.shape}, got {numbers.shape}")
    flat = np.zeros(n_core + 1, np.int64)
    _first(np.ascontiguousarray(numbers), flat)
    position = np.unravel_index(flat[1:], core.shape)
    zyx = tuple(at + start for at, start in zip(position, core.start, strict=True))
    return np.ravel_multi_index(zyx, volume_shape).astype(np.int64)


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _first(numbers: Any, flat: Any) -> None:
    """Note where each next number occurs first; they occur in ascending order."""
    wanted = 1
    i = 0
    for z in range(numbers.shape[0]):
        for y in range(numbers.shape[1]):
            for x in range(numbers.shape[2]):
                if wanted < flat.size and numbers[z, y, x] == wanted:
                    flat[wanted] = i
                    wanted += 1
                i += 1


def overlaps(a: NDArray[np.uint32], b: NDArray[np.uint32]) -> NDArray[np.int64]:
    """Count the voxels of each pair of labels that two blocks gave to the same voxels.

    Parameters
    ----------
    a, b : uint32, zyx, of one shape
        Two blocks' labels of the voxels that both labelled; 0 is background.

    Returns
    -------
    int64, (n, 3)
        Label by `a`, label by `b`, voxels; ascending. Pairs with background are there, background with
        background is not.

    Examples
    --------
    >>> a, b = np.array([[[1, 1, 1, 0, 0]]], np.uint32), np.array([[[4, 4, 0, 0, 9]]], np.uint32)
    >>> overlaps(a, b).tolist()
    [[0, 9, 1], [1, 0, 1], [1, 4, 2]]
    """
    if a.shape != b.shape or a.ndim != 3:
        raise ValueError(f"expected two arrays of one shape, zyx, got {a.shape} and {b.shape}")
    if a.dtype != np.uint32 or b.dtype != np.uint32:
        raise TypeError(f"expected uint32 labels, got {a.dtype} and {b.dtype}")
    a, b = np.ascontiguousarray(a).reshape(-1), np.ascontiguousarray(b).reshape(-1)
    runs = np.empty((_runs(a, b, np.empty((0, 3), np.int64)), 3), np.int64)
    _runs(a, b, runs)
    if len(runs) == 0:
        return runs
    runs = runs[np.lexsort((runs[:, 1], runs[:, 0]))]
    starts = np.flatnonzero((np.diff(runs[:, :2], axis=0, prepend=-1) != 0).any(axis=1))
    return np.column_stack([runs[starts, :2], np.add.reduceat(runs[:, 2], starts)])


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _runs(a: Any, b: Any, rows: Any) -> Any:
    """Count stretches of voxels with one pair of labels; fill `rows` where there is room for them."""
    n = 0
    length = 0
    for i in range(a.size):
        length += 1
        if i + 1 == a.size or a[i + 1] != a[i] or b[i + 1] != b[i]:
            if a[i] != 0 or b[i] != 0:
                if n < rows.shape[0]:
                    rows[n, 0] = a[i]
                    rows[n, 1] = b[i]
                    rows[n, 2] = length
                n += 1
            length = 0
    return n


def match_one_to_one(rows: NDArray[np.int64], *, min_iou: float, min_containment: float) -> NDArray[np.int64]:
    """Find the pairs of labels that are one cell, seen by two blocks.

    A pair is one cell if each is the other's best overlap (ties: the smaller union, then the smaller
    label), and one of these holds on the voxels that both blocks labelled:

    - intersection / union >= `min_iou`: the blocks agree on most of the cell;
    - intersection / the smaller of the two >= `min_containment`: one block saw only a part of it.

    Parameters
    ----------
    rows : int64, (n, 3)
        As `overlaps` gives them.
    min_iou, min_containment : float
        Above 0, up to 1.

    Returns
    -------
    int64, (m, 4)
        Label by a, label by b, intersection, union; ascending. No label occurs twice in a column.

    Examples
    --------
    >>> rows = np.array([[0, 3, 5], [1, 3, 40], [1, 4, 9], [2, 4, 30]])
    >>> match_one_to_one(rows, min_iou=0.5, min_containment=0.8).tolist()
    [[1, 3, 40, 54], [2, 4, 30, 39]]
    """
    for name, value in (("min_iou", min_iou), ("min_containment", min_containment)):
        if not 0 < value <= 1:
            raise ValueError(f"{name} must be above 0 and up to 1, got {value}")
    if len(rows) == 0:
        return np.empty((0, 4), np.int64)
    volume_a, volume_b = _total_of(rows[:, 0], rows[:, 2]), _total_of(rows[:, 1], rows[:, 2])
    both = (rows[:, 0] > 0) & (rows[:, 1] > 0)
    (a, b, common), volume_a, volume_b = rows[both].T, volume_a[both], volume_b[both]
    union = volume_a + volume_b - common
    # The tests are in whole numbers: 1/3 of 3 voxels must not depend on rounding.
    alike = common >= np.ceil(min_iou * union - 1e-9)
    contained = common >= np.ceil(min_containment * np.minimum(volume_a, volume_b) - 1e-9)
    one_cell = _is_best(a, b, common, union) & _is_best(b, a, common, union) & (alike | contained)
    matches: NDArray[np.int64] = np.stack([a, b, common, union], axis=1)[one_cell]
    return matches


def _total_of(labels: NDArray[np.int64], voxels: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each row, the sum of voxels over all rows with its label."""
    unique, inverse = np.unique(labels, return_inverse=True)
    total = np.zeros(unique.size, np.int64)
    np.add.at(total, inverse, voxels)
    return total[inverse]


def _is_best(
    labels: NDArray[np.int64], others: NDArray[np.int64], common: NDArray[np.int64], union: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Whether a row is the best of its label."""
    order = np.lexsort((others, union, -common, labels))
    best = np.zeros(labels.size, np.bool_)
    best[order[np.diff(labels[order], prepend=0) != 0]] = True
    return best


def joinable(
    pairs: NDArray[np.int64],
    *,
    intersection: NDArray[np.int64],
    union: NDArray[np.int64],
    blocks: NDArray[np.int64],
) -> NDArray[np.bool_]:
    """Tell which matches may be joined so that no set of them holds two cells of one block.

    Matches of three and more blocks form chains, and a chain may lead from one cell of a block to
    another one of the same block, which that block saw apart. There the matches are joined strongest
    first (intersection over union, then intersection, then ids), and one that would fuse two cells of
    a block is refused. Chains without such a conflict are joined whole, in any order.

    Parameters
    ----------
    pairs : int64, (n, 2)
        Matched cells, by ids that are unique over all blocks.
    intersection, union : int64, (n,)
        Of each pair.
    blocks : int64, (n, 2)
        The block that each of the two belongs to.

    Returns
    -------
    bool, (n,)
        False for the matches that are refused.

    Examples
    --------
    >>> pairs = np.array([[1, 5], [5, 9], [2, 9]])  # 1 and 2 are cells of block 0
    >>> blocks = np.array([[0, 1], [1, 2], [0, 2]])
    >>> joinable(pairs, intersection=np.array([9, 8, 5]), union=np.array([9, 9, 9]), blocks=blocks).tolist()
    [True, True, False]
    """
    kept = np.ones(len(pairs), np.bool_)
    ids, at = np.unique(pairs, return_index=True)
    _, chain = connected(pairs)
    block = blocks.reshape(-1)[at]
    order = np.lexsort((block, chain))
    twice = (np.diff(chain[order]) == 0) & (np.diff(block[order]) == 0)
    in_doubt = np.isin(chain[np.searchsorted(ids, pairs[:, 0])], chain[order][1:][twice])
    rows = np.flatnonzero(in_doubt)
    strength = intersection[rows] / union[rows]
    rows = rows[np.lexsort((pairs[rows, 1], pairs[rows, 0], -intersection[rows], -strength))]
    # Few chains come this far, so plain sets do: for each set of cells its members and their blocks.
    members: dict[int, list[int]] = {}
    present: dict[int, set[int]] = {}
    home: dict[int, int] = {}
    for row, (a, b), (block_a, block_b) in zip(
        rows.tolist(), pairs[rows].tolist(), blocks[rows].tolist(), strict=True
    ):
        for one, where in ((a, block_a), (b, block_b)):
            if one not in home:
                home[one], members[one], present[one] = one, [one], {where}
        into, out_of = sorted((home[a], home[b]), key=lambda root: -len(members[root]))
        if into == out_of:
            continue
        if not present[into].isdisjoint(present[out_of]):
            kept[row] = False
            continue
        for one in members[out_of]:
            home[one] = into
        members[into] += members.pop(out_of)
        present[into] |= present.pop(out_of)
    return kept
