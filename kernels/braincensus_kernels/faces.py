"""The seam audit: what the two blocks of a face believe about the voxels on both sides of it.

Between label and relabel in the flow. A block labels its core and the halo around it, so it has an
opinion on the first layer beyond its own: which cell, known by its seed, each voxel belongs to.

           block a       |      block b
     ... [  a's inside ] | [ a's outside ]      as a labelled them
         [ b's outside ] | [  b's inside ] ...  as b labelled them

If the upper and the lower row are equal, voxel for voxel, then joining the cores by seed gives what
one block would have given there. Where they differ, the two seeds may be one cell seen differently:
that is decided by overlap on the voxels that both labelled, never because cells touch.

Things without a bound (connected components) go by two numbers in two blocks; they are joined first, by
the voxels on which both blocks have an anchor of them (see the module `block_labels`). The layers hold
one voxel more than the core on the sides where the volume goes on. So two blocks that meet in an edge or
a corner only are joined too: say u and v are neighbours across an edge between blocks a and d. Block b,
which has faces with both, has both voxels in its layers, as one component; b and a share u, b and d
share v, so a's number and d's become one through b's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from braincensus_kernels.boxes import Box, Triple

_AXES = "zyx"
_BACKGROUND = -1
MOST_LISTED = 1000
"""Disagreeing voxels that one face lists; all are counted."""

Beliefs = dict[str, NDArray[Any]]


def face_beliefs(
    labels: NDArray[Any],
    seeds: NDArray[np.int64],
    *,
    kept: Box,
    core: Box,
    anchors: NDArray[np.bool_] | None = None,
) -> Beliefs:
    """Collect what a block believes about both sides of each face that has a neighbour.

    Parameters
    ----------
    labels : unsigned integer, zyx, shape of `kept`
        Local labels 0..n.
    seeds : int64, (n,)
        Identity of each local label, 1 first.
    kept, core : Box
        `kept` is `core` with one voxel more on each side that has a neighbour; a face without one
        more voxel is a border of the volume.
    anchors : bool, shape of `kept`, optional
        Where identities of two blocks are one by construction; see `block_labels.BlockLabels`.

    Returns
    -------
    dict of str to arrays
        ``z_low_inside_positions``, ``z_low_inside_seeds``, ``z_low_outside_positions``, ... for axes
        z, y, x, sides low, high, and layers inside (the core's own outermost) and outside (the one
        beyond it). Positions are flat raster indices in the face's plane of `kept`; background is
        left out. ``..._anchors`` (bool) only where anchors are given.

    Examples
    --------
    >>> labels = np.array([[[0, 1, 2]]], np.uint32)
    >>> core = Box((0, 0, 0), (1, 1, 2))
    >>> found = face_beliefs(labels, np.array([50, 60]), kept=Box((0, 0, 0), (1, 1, 3)), core=core)
    >>> {name: column.tolist() for name, column in found.items() if name.endswith("seeds")}
    {'x_high_inside_seeds': [50], 'x_high_outside_seeds': [60]}
    """
    if labels.shape != kept.shape:
        raise ValueError(f"expected labels of {kept.shape}, got {labels.shape}")
    if anchors is not None and anchors.shape != kept.shape:
        raise ValueError(f"expected anchors of {kept.shape}, got {anchors.shape}")
    if not (kept.contains(core) and core.dilate(1).contains(kept)):
        raise ValueError(f"kept {kept} must be core {core} with at most one voxel more on each side")
    if core.size == 0:
        raise ValueError(f"the core {core} has no voxels")
    beliefs: Beliefs = {}
    for axis, name in enumerate(_AXES):
        inside_low, inside_high = core.start[axis] - kept.start[axis], core.stop[axis] - kept.start[axis] - 1
        sides = []
        if inside_low > 0:
            sides.append(("low", inside_low, inside_low - 1))
        if inside_high < kept.shape[axis] - 1:
            sides.append(("high", inside_high, inside_high + 1))
        for side, inside, outside in sides:
            for layer, at in (("inside", inside), ("outside", outside)):
                plane = labels.take(at, axis).reshape(-1)
                positions = np.flatnonzero(plane)
                local = plane[positions].astype(np.int64)
                if local.size and local.max() > len(seeds):
                    raise ValueError(f"label {local.max()} has no seed: there are {len(seeds)}")
                key = f"{name}_{side}_{layer}"
                beliefs[f"{key}_positions"] = positions.astype(np.int64)
                beliefs[f"{key}_seeds"] = np.asarray(seeds, np.int64)[local - 1]
                if anchors is not None:
                    beliefs[f"{key}_anchors"] = anchors.take(at, axis).reshape(-1)[positions]
    return beliefs


def joined_by_anchors(
    low_beliefs: Mapping[str, NDArray[Any]],
    high_beliefs: Mapping[str, NDArray[Any]],
    *,
    axis: int,
    low: Box,
    high: Box,
    volume_shape: Triple,
) -> NDArray[np.int64]:
    """Find the identities that are one thing, because both blocks have an anchor of it on one voxel.

    Parameters
    ----------
    low_beliefs, high_beliefs, axis, low, high, volume_shape
        As for `compare_faces`.

    Returns
    -------
    int64, (n, 2)
        Pairs of different identities, each once; for `union_find.connected`.
    """
    _layers(axis, low, high, volume_shape)  # refuses blocks that share no face
    seen = _seen(low_beliefs, high_beliefs, axis, anchors_only=True)
    by_low, by_high = seen.by_low, seen.by_high
    differ = (by_low != _BACKGROUND) & (by_high != _BACKGROUND) & (by_low != by_high)
    return np.unique(np.stack([by_low[differ], by_high[differ]], axis=1), axis=0)


@dataclass(frozen=True, eq=False)
class FaceAudit:
    """What comparing the two blocks of one face gave."""

    voxels_compared: int
    """Voxels of both layers."""
    cells_crossing: int
    """Cells that have voxels on both sides of the face, each side as its own block labelled it."""
    voxels_disagreeing: int
    disagreements: tuple[dict[str, Any], ...]
    """The first `MOST_LISTED`: ``position`` [z, y, x], ``seed_low`` and ``seed_high``, the seed that the
    lower and the upper block gave to that voxel, None for background. In raster order."""
    overlaps: NDArray[np.int64]
    """(n, 3): seed by the lower block, seed by the upper block, voxels; -1 is background. Every pair of
    every seed that takes part in a disagreement; empty where there is none."""


def compare_faces(
    low_beliefs: Mapping[str, NDArray[Any]],
    high_beliefs: Mapping[str, NDArray[Any]],
    *,
    axis: int,
    low: Box,
    high: Box,
    volume_shape: Triple,
) -> FaceAudit:
    """Compare the beliefs of two neighbours about the face between them.

    Parameters
    ----------
    low_beliefs, high_beliefs
        What `face_beliefs` gave for either block; where identities had to be joined, with each replaced
        by its representative.
    axis : int
        0, 1, 2 for z, y, x.
    low, high : Box
        Their cores; `low` ends where `high` starts along `axis`, and they share the whole face.
    volume_shape
        Shape of the whole volume.

    Raises
    ------
    ValueError
        If the blocks are no such neighbours, or one holds no beliefs about that face.
    """
    layers = _layers(axis, low, high, volume_shape)
    seen = _seen(low_beliefs, high_beliefs, axis, anchors_only=False)

    # A cell crosses this face where it crosses it in the cores: margins are other faces' voxels.
    own = _in_the_plane_of(low, axis, layers, seen.position)
    of_low = seen.by_low[own & (seen.layer == 0)]
    of_high = seen.by_high[own & (seen.layer == 1)]
    crossing = np.intersect1d(of_low[of_low != _BACKGROUND], of_high[of_high != _BACKGROUND])
    differs = seen.by_low != seen.by_high
    return FaceAudit(
        voxels_compared=layers.size,
        cells_crossing=len(crossing),
        voxels_disagreeing=int(np.count_nonzero(differs)),
        disagreements=_listed(seen, differs, axis, layers),
        overlaps=_overlaps(seen, differs),
    )


def _layers(axis: int, low: Box, high: Box, volume_shape: Triple) -> Box:
    """Return the voxels of both layers of a face, with the margin that both blocks keep."""
    aside = [a for a in range(3) if a != axis]
    if low.stop[axis] != high.start[axis] or any(
        (low.start[a], low.stop[a]) != (high.start[a], high.stop[a]) for a in aside
    ):
        raise ValueError(f"{low} and {high} do not share a face across axis {axis}")
    return low.dilate(1).clip(volume_shape).intersect(high.dilate(1).clip(volume_shape))


@dataclass(frozen=True, eq=False)
class _Seen:
    """The voxels of both layers that either block holds for part of a cell: most of a face is none."""

    layer: NDArray[np.uint8]
    """0: the lower block's own; 1: the upper one's."""
    position: NDArray[np.int64]
    by_low: NDArray[np.int64]
    """The seed that the lower block gave to each; -1 is background."""
    by_high: NDArray[np.int64]


def _seen(
    low_beliefs: Mapping[str, NDArray[Any]],
    high_beliefs: Mapping[str, NDArray[Any]],
    axis: int,
    *,
    anchors_only: bool,
) -> _Seen:
    """Put both blocks' views of the two layers side by side."""
    parts = []
    for layer, (of_low, of_high) in enumerate((("inside", "outside"), ("outside", "inside"))):
        low = _believed(low_beliefs, f"{_AXES[axis]}_high_{of_low}", anchors_only=anchors_only)
        high = _believed(high_beliefs, f"{_AXES[axis]}_low_{of_high}", anchors_only=anchors_only)
        if np.array_equal(low[0], high[0]):
            positions, by_low, by_high = low[0], low[1], high[1]
        else:
            positions = np.union1d(low[0], high[0])
            by_low, by_high = (np.full(positions.size, _BACKGROUND, np.int64) for _ in range(2))
            by_low[np.searchsorted(positions, low[0])] = low[1]
            by_high[np.searchsorted(positions, high[0])] = high[1]
        parts.append((np.full(positions.size, layer, np.uint8), positions, by_low, by_high))
    return _Seen(*(np.concatenate(both) for both in zip(*parts, strict=True)))


def _believed(
    beliefs: Mapping[str, NDArray[Any]], key: str, *, anchors_only: bool
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    if f"{key}_positions" not in beliefs:
        raise ValueError(f"no beliefs about {key}: was the block labelled without its neighbour?")
    positions, seeds = beliefs[f"{key}_positions"], beliefs[f"{key}_seeds"]
    if anchors_only:
        is_anchor = beliefs[f"{key}_anchors"]
        return positions[is_anchor], seeds[is_anchor]
    return positions, seeds


def _in_the_plane_of(core: Box, axis: int, layers: Box, position: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Tell which positions of a face lie on a core, not on the margin around it."""
    rows, columns = (a for a in range(3) if a != axis)
    row, column = np.divmod(position, layers.shape[columns])
    row, column = row + layers.start[rows], column + layers.start[columns]
    on_core: NDArray[np.bool_] = (
        (core.start[rows] <= row)
        & (row < core.stop[rows])
        & (core.start[columns] <= column)
        & (column < core.stop[columns])
    )
    return on_core


def _listed(seen: _Seen, differs: NDArray[np.bool_], axis: int, layers: Box) -> tuple[dict[str, Any], ...]:
    plane = [1 if a == axis else n for a, n in enumerate(layers.shape)]
    zyx = np.stack(np.unravel_index(seen.position[differs], plane), axis=1) + layers.start
    zyx[:, axis] += seen.layer[differs]
    order = np.lexsort((zyx[:, 2], zyx[:, 1], zyx[:, 0]))[:MOST_LISTED]
    seeds = [
        [None if s == _BACKGROUND else int(s) for s in view[differs][order]]
        for view in (seen.by_low, seen.by_high)
    ]
    return tuple(
        {"position": where, "seed_low": a, "seed_high": b}
        for where, a, b in zip(zyx[order].tolist(), *seeds, strict=True)
    )


def _overlaps(seen: _Seen, differs: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Count voxels of each pair of beliefs, for all voxels of the seeds that take part in a disagreement."""
    if not differs.any():
        return np.empty((0, 3), np.int64)
    involved = np.zeros(differs.shape, np.bool_)
    for view in (seen.by_low, seen.by_high):
        seeds = np.unique(view[differs])
        involved |= np.isin(view, seeds[seeds != _BACKGROUND])
    pairs, counts = np.unique(
        np.stack([seen.by_low[involved], seen.by_high[involved]], axis=1), axis=0, return_counts=True
    )
    return np.concatenate([pairs, counts[:, None]], axis=1)


def resolve_disagreements(audits: Iterable[FaceAudit]) -> NDArray[np.int64]:
    """Find the pairs of seeds that are one cell, seen with different seeds by two blocks.

    Overlaps are added over all faces. Two seeds are one cell where each is the other's best overlap
    (ties: the smaller seed), and their intersection is at least half of their union, over the voxels
    that both blocks labelled. One-to-one, and never by touch: cells that merely abut have no overlap.

    Returns
    -------
    int64, (n, 2)
        Ascending; for `union_find.connected`.
    """
    rows = [audit.overlaps for audit in audits if len(audit.overlaps)]
    if not rows:
        return np.empty((0, 2), np.int64)
    stacked = np.concatenate(rows)
    pairs, inverse = np.unique(stacked[:, :2], axis=0, return_inverse=True)
    overlap = np.zeros(len(pairs), np.int64)
    np.add.at(overlap, inverse.reshape(-1), stacked[:, 2])
    union = _total_of(pairs[:, 0], overlap) + _total_of(pairs[:, 1], overlap) - overlap
    cells = (pairs != _BACKGROUND).all(axis=1)
    pairs, overlap, union = pairs[cells], overlap[cells], union[cells]
    best = _is_best(pairs[:, 0], pairs[:, 1], overlap) & _is_best(pairs[:, 1], pairs[:, 0], overlap)
    one_cell = best & (2 * overlap >= union) & (pairs[:, 0] != pairs[:, 1])
    return np.ascontiguousarray(pairs[one_cell])


def _total_of(seeds: NDArray[np.int64], overlap: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each row, the sum of overlaps over all rows with its seed."""
    unique, inverse = np.unique(seeds, return_inverse=True)
    total = np.zeros(unique.size, np.int64)
    np.add.at(total, inverse, overlap)
    return total[inverse]


def _is_best(
    seeds: NDArray[np.int64], others: NDArray[np.int64], overlap: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Whether a row is the largest overlap of its seed; among equals the smallest other seed."""
    order = np.lexsort((others, -overlap, seeds))
    best = np.zeros(seeds.size, np.bool_)
    best[order[np.diff(seeds[order], prepend=-2) != 0]] = True
    return best
