"""Which cells touch, along which directions, and how probable foreground is on their border.

After measure in the flow, for the rules that make one cell of two labels: each block counts the pairs of
neighbouring voxels that have two labels, `merge_touching` adds the blocks up by cell, `border_within` finds
the pairs whose border is as bright as a cell's inside.

A contact is two 26-neighbours u, v with two labels. It is counted twice, once seen from either voxel, by
the block whose core holds that voxel: exactly where `measure.measure_labels` counts a crossing. All counts
and sums are int64.

Why the counts are kept by direction, and by view: a cell's surface comes from its crossings, how often it
ends at a step along each direction. When two labels turn out to be one cell, it does not end between them:
the crossings of the whole cell are the sum of both labels' less their contacts. Of two blocks that hold u
and v, one may know a cell by two labels and the other by one (it sees where they meet): then only the first
counted a crossing, and only it counts a contact. See `crossing_correction`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from braincensus_kernels.boxes import Box
from braincensus_kernels.measure import DIRECTIONS, PROBABILITY_MAX, Columns

_CONTACTS = tuple(f"contacts_{k:02d}" for k in range(len(DIRECTIONS)))
_ACROSS_FACE = np.abs(DIRECTIONS).sum(axis=1) == 1

TOUCHING_COLUMNS: tuple[str, ...] = ("a", "b", *_CONTACTS, "face_contacts", "sum_probability")
"""Columns of `touching_pairs`, all int64."""


def touching_pairs(
    labels: NDArray[Any], *, kept: Box, core: Box, n_labels: int, probability: NDArray[np.uint16]
) -> Columns:
    """Count the contacts between local labels 1..n, as seen from the voxels of the core.

    Parameters
    ----------
    labels : unsigned integer, zyx, shape of `kept`
        Local labels, 0 is background; host memory.
    kept, core : Box
        `kept` is `core` with one voxel more on each side that is not a border of the volume.
    n_labels : int
        Largest local label that may occur.
    probability : uint16, shape of `kept`
        Foreground probability, 65535 is 1.

    Returns
    -------
    dict of str to int64 arrays
        One row for each two labels ``a`` < ``b`` that touch, sorted by them. ``contacts_00`` ...
        ``contacts_12``: how often a core's voxel of one label has a voxel of the other one step along each
        of `DIRECTIONS`, forwards or backwards. ``face_contacts``: those of them that share a face of a
        voxel; ``sum_probability``: the probabilities of both voxels, added up over these.

    Raises
    ------
    ValueError
        If shapes and boxes do not fit, or a label is larger than `n_labels`.

    Examples
    --------
    >>> box = Box.whole((1, 1, 4))
    >>> labels, p = np.array([[[1, 1, 2, 0]]], np.uint32), np.array([[[9, 8, 6, 1]]], np.uint16)
    >>> rows = touching_pairs(labels, kept=box, core=box, n_labels=2, probability=p)
    >>> [int(rows[name][0]) for name in ("a", "b", "contacts_00", "face_contacts", "sum_probability")]
    [1, 2, 2, 2, 28]
    """
    if labels.shape != kept.shape or probability.shape != kept.shape:
        raise ValueError(
            f"expected labels and probability of {kept.shape}, got {labels.shape}, {probability.shape}"
        )
    if not (kept.contains(core) and core.dilate(1).contains(kept)):
        raise ValueError(f"kept {kept} must be core {core} with at most one voxel more on each side")
    if labels.dtype.kind != "u" or probability.dtype != np.uint16:
        raise TypeError(f"expected unsigned labels and uint16, got {labels.dtype} and {probability.dtype}")
    if not 0 <= n_labels < 2**31:
        raise ValueError(f"expected from 0 to 2**31 - 1 labels in a block, got {n_labels}")
    inner = core.slices_in(kept)
    keys, sums, largest = _touch(
        np.ascontiguousarray(labels),
        np.ascontiguousarray(probability),
        np.array([(s.start, s.stop) for s in inner]),
        DIRECTIONS,
        _ACROSS_FACE,
        n_labels,
    )
    if largest > n_labels:
        raise ValueError(f"label {largest} is larger than n_labels {n_labels}")
    order = np.argsort(keys)
    keys, sums = keys[order], sums[order]
    columns = [keys // (n_labels + 1), keys % (n_labels + 1), *sums.T]
    return {
        name: np.ascontiguousarray(column) for name, column in zip(TOUCHING_COLUMNS, columns, strict=True)
    }


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _touch(  # pragma: no cover - compiled
    labels: Any, probability: Any, inner: Any, directions: Any, across_face: Any, n_labels: int
) -> tuple[Any, Any, Any]:
    """Return keys ``a * (n_labels + 1) + b``, their sums, and the first label larger than `n_labels`, or 0.

    Rows are found through a hash table: `slots` holds the row of a key at the first free place from where
    the key is hashed to, and is never more than half full.
    """
    nz, ny, nx = labels.shape
    n_directions = len(directions)
    flat, likely = labels.reshape(-1), probability.reshape(-1)
    offsets = (directions[:, 0] * ny + directions[:, 1]) * nx + directions[:, 2]
    slots = np.full(256, -1, np.int64)
    keys = np.empty(128, np.int64)
    sums = np.zeros((128, n_directions + 2), np.int64)
    n = 0
    last_key, row = np.int64(-1), np.int64(0)
    for z in range(inner[0, 0], inner[0, 1]):
        for y in range(inner[1, 0], inner[1, 1]):
            for x in range(inner[2, 0], inner[2, 1]):
                at = (z * ny + y) * nx + x
                label = flat[at]
                if label == 0:
                    continue
                if label > n_labels:
                    return keys[:n], sums[:n], np.int64(label)
                at_side = z == 0 or z == nz - 1 or y == 0 or y == ny - 1 or x == 0 or x == nx - 1
                for d in range(n_directions):
                    for sign in (1, -1):
                        if at_side and not (
                            0 <= z + sign * directions[d, 0] < nz
                            and 0 <= y + sign * directions[d, 1] < ny
                            and 0 <= x + sign * directions[d, 2] < nx
                        ):
                            continue
                        beside = at + sign * offsets[d]
                        other = flat[beside]
                        if other == label or other == 0:
                            continue
                        if other > n_labels:
                            return keys[:n], sums[:n], np.int64(other)
                        key = np.int64(min(label, other)) * (n_labels + 1) + np.int64(max(label, other))
                        if key != last_key:
                            if n == len(keys):
                                keys = np.concatenate((keys, np.empty_like(keys)))
                                sums = np.concatenate((sums, np.zeros_like(sums)))
                                slots = np.full(2 * len(slots), -1, np.int64)
                                for r in range(n):
                                    slots[_place(keys[r], slots, keys)] = r
                            place = _place(key, slots, keys)
                            if slots[place] < 0:
                                slots[place] = n
                                keys[n] = key
                                n += 1
                            row = slots[place]
                            last_key = key
                        sums[row, d] += 1
                        if across_face[d]:
                            sums[row, n_directions] += 1
                            both = np.int64(likely[at]) + np.int64(likely[beside])
                            sums[row, n_directions + 1] += both
    return keys[:n], sums[:n], np.int64(0)


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _place(key: Any, slots: Any, keys: Any) -> Any:  # pragma: no cover - compiled
    """Place of a key in `slots`, or the free one where it belongs."""
    last = len(slots) - 1
    # multiplied by 2**64 over the golden ratio (as int64), whose upper half depends on all bits of the key
    place = ((key * np.int64(-7046029254386353131)) >> 32) & last
    while slots[place] >= 0 and keys[slots[place]] != key:
        place = (place + 1) & last
    return place


def merge_touching(parts: Iterable[Mapping[str, NDArray[Any]]]) -> Columns:
    """Add up the rows of blocks that belong to one pair of cells.

    Parameters
    ----------
    parts
        Tables with the columns of `touching_pairs`, where ``a`` and ``b`` are the ids that cells have in
        the whole volume, different and in any order.

    Returns
    -------
    dict of str to int64 arrays
        The same columns, ``a`` < ``b``, one row per pair, sorted by them.

    Raises
    ------
    ValueError
        If a part has other columns, or a row pairs an id with itself.
    TypeError
        If a column is not int64.
    """
    listed = [dict(part) for part in parts]
    for part in listed:
        if set(part) != set(TOUCHING_COLUMNS):
            raise ValueError(f"expected the columns {list(TOUCHING_COLUMNS)}, got {list(part)}")
        wrong = [name for name, column in part.items() if column.dtype != np.int64]
        if wrong:
            raise TypeError(f"expected int64 columns, these are not: {wrong}")
    none = np.empty(0, np.int64)
    joined = {name: np.concatenate([none, *(part[name] for part in listed)]) for name in TOUCHING_COLUMNS}
    a, b = joined.pop("a"), joined.pop("b")
    if (a == b).any():
        raise ValueError(f"expected pairs of different cells, got {a[a == b][0]} with itself")
    a, b = np.minimum(a, b), np.maximum(a, b)
    order = np.lexsort((b, a))
    a, b = a[order], b[order]
    leads = np.ones(a.size, np.bool_)
    leads[1:] = (a[1:] != a[:-1]) | (b[1:] != b[:-1])
    first = np.flatnonzero(leads)
    merged: Columns = {"a": a[first], "b": b[first]}
    for name, column in joined.items():
        merged[name] = np.add.reduceat(column[order], first) if first.size else none.copy()
    return merged


def border_within(merged: Mapping[str, NDArray[Any]], low: float, high: float) -> NDArray[np.int64]:
    """Find the pairs whose mean border probability lies within a range.

    The border of two cells is every pair of voxels, one of either cell, that share a face; such a pair
    counts with the mean of its two voxels. This is the border intensity of clEsperanto's
    ``merge_labels_with_border_intensity_within_range``.

    Parameters
    ----------
    merged
        Of `merge_touching`.
    low, high : float
        Probabilities, where the stored 65535 is 1; both ends are within.

    Returns
    -------
    int64, (n, 2)
        ``a`` and ``b``, in the order of `merged`; for `union_find.connected`. Cells that touch along edges
        and corners only have no border and are never among them.
    """
    if not low <= high:
        raise ValueError(f"expected a lower end that is not above the upper one, got {low} and {high}")
    has_border = merged["face_contacts"] > 0
    pairs = np.stack([merged["a"], merged["b"]], axis=1)[has_border]
    voxels = 2 * merged["face_contacts"][has_border]
    mean = merged["sum_probability"][has_border] / (voxels * PROBABILITY_MAX)
    within: NDArray[np.int64] = pairs[(low <= mean) & (mean <= high)]
    return within


def crossing_correction(cell_of_pair: NDArray[np.int64], pairs: Mapping[str, NDArray[Any]]) -> Columns:
    """Return what the crossings of cells hold too much, where several labels are one cell.

    Parameters
    ----------
    cell_of_pair : int64, one for each row of `pairs`
        The cell that both labels of the row turned out to be; negative where they are two cells.
    pairs
        Of `touching_pairs` or `merge_touching`.

    Returns
    -------
    dict of str to int64 arrays
        ``seed``: the cells, ascending, once each. ``crossings_00`` ... ``crossings_12``: to be subtracted
        from the sum of the labels' columns of this name (`measure.merge_partials`).
    """
    cell_of_pair = np.asarray(cell_of_pair)
    if cell_of_pair.shape != pairs["a"].shape or cell_of_pair.dtype != np.int64:
        raise ValueError(
            f"expected one int64 cell for each of {pairs['a'].size} pairs, "
            f"got {cell_of_pair.dtype} {cell_of_pair.shape}"
        )
    inside = cell_of_pair >= 0
    seeds, of_row = np.unique(cell_of_pair[inside], return_inverse=True)
    correction: Columns = {"seed": seeds}
    for k, name in enumerate(_CONTACTS):
        total = np.zeros(seeds.size, np.int64)
        np.add.at(total, of_row, pairs[name][inside])
        correction[f"crossings_{k:02d}"] = total
    return correction
