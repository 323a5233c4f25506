"""The seam audit: what the two blocks of a face believe about the voxels on both sides of it.

Between label and relabel in the flow. A block labels its core and the halo around it, so it has an
opinion on the first layer beyond its own: which cell, known by its seed, each voxel belongs to.

           block a       |      block b
     ... [  a's inside ] | [ a's outside ]      as a labelled them
         [ b's outside ] | [  b's inside ] ...  as b labelled them

If the upper and the lower row are equal, voxel for voxel, then joining the cores by seed gives what
one block would have given there. Where they differ, the two seeds may be one cell seen differently:
that is decided by overlap on the voxels that both labelled, never because cells touch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from braincensus_kernels.boxes import Box

_AXES = "zyx"
_BACKGROUND = -1
MOST_LISTED = 1000
"""Disagreeing voxels that one face lists; all are counted."""

Beliefs = dict[str, NDArray[np.int64]]


def face_beliefs(labels: NDArray[Any], seeds: NDArray[np.int64], *, kept: Box, core: Box) -> Beliefs:
    """Collect what a block believes about both sides of each face that has a neighbour.

    Parameters
    ----------
    labels : unsigned integer, zyx, shape of `kept`
        Local labels 0..n.
    seeds : int64, (n,)
        Global voxel index of the seed of each local label, 1 first.
    kept, core : Box
        `kept` is `core` with one voxel more on each side that has a neighbour; a face without one
        more voxel is a border of the volume.

    Returns
    -------
    dict of str to int64 arrays
        ``z_low_inside_positions``, ``z_low_inside_seeds``, ``z_low_outside_positions``, ... for axes
        z, y, x, sides low, high, and layers inside (the core's own outermost) and outside (the one
        beyond it). Positions are flat raster indices in the face's plane of core voxels; background
        is left out.

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
                index = list(core.slices_in(kept))
                index[axis] = slice(at, at + 1)
                plane = labels[tuple(index)].reshape(-1)
                positions = np.flatnonzero(plane)
                local = plane[positions].astype(np.int64)
                if local.size and local.max() > len(seeds):
                    raise ValueError(f"label {local.max()} has no seed: there are {len(seeds)}")
                beliefs[f"{name}_{side}_{layer}_positions"] = positions.astype(np.int64)
                beliefs[f"{name}_{side}_{layer}_seeds"] = np.asarray(seeds, np.int64)[local - 1]
    return beliefs


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
    low_beliefs: Mapping[str, NDArray[np.int64]],
    high_beliefs: Mapping[str, NDArray[np.int64]],
    *,
    axis: int,
    low: Box,
    high: Box,
) -> FaceAudit:
    """Compare the beliefs of two neighbours about the face between them.

    Parameters
    ----------
    low_beliefs, high_beliefs
        What `face_beliefs` gave for either block.
    axis : int
        0, 1, 2 for z, y, x.
    low, high : Box
        Their cores; `low` ends where `high` starts along `axis`, and they share the whole face.

    Raises
    ------
    ValueError
        If the blocks are no such neighbours, or one holds no beliefs about that face.
    """
    aside = [a for a in range(3) if a != axis]
    if low.stop[axis] != high.start[axis] or any(
        (low.start[a], low.stop[a]) != (high.start[a], high.stop[a]) for a in aside
    ):
        raise ValueError(f"{low} and {high} do not share a face across axis {axis}")
    name = _AXES[axis]
    start, stop = list(low.start), list(high.stop)
    start[axis], stop[axis] = low.stop[axis] - 1, high.start[axis] + 1
    shape = [b - a for a, b in zip(start, stop, strict=True)]
    layer_size = low.size // low.shape[axis]

    # both blocks' view of the two layers, dense: row 0 is the lower block's own, row 1 the upper's
    by_low, by_high = np.full((2, 2, layer_size), _BACKGROUND, np.int64)
    for view, beliefs, side, layers in (
        (by_low, low_beliefs, "high", ("inside", "outside")),
        (by_high, high_beliefs, "low", ("outside", "inside")),
    ):
        for row, layer in enumerate(layers):
            key = f"{name}_{side}_{layer}"
            if f"{key}_positions" not in beliefs:
                raise ValueError(f"no beliefs about {key}: was the block labelled without its neighbour?")
            view[row, beliefs[f"{key}_positions"]] = beliefs[f"{key}_seeds"]

    crossing = np.intersect1d(by_low[0], by_high[1])
    differs = by_low != by_high
    at_layer, at_position = np.nonzero(differs)
    return FaceAudit(
        voxels_compared=2 * layer_size,
        cells_crossing=int((crossing != _BACKGROUND).sum()),
        voxels_disagreeing=at_layer.size,
        disagreements=_listed(by_low, by_high, at_layer, at_position, axis, start, shape),
        overlaps=_overlaps(by_low, by_high, differs),
    )


def _listed(
    by_low: NDArray[np.int64],
    by_high: NDArray[np.int64],
    layer: NDArray[np.int64],
    position: NDArray[np.int64],
    axis: int,
    start: list[int],
    shape: list[int],
) -> tuple[dict[str, Any], ...]:
    plane = [1 if a == axis else n for a, n in enumerate(shape)]
    zyx = np.stack(np.unravel_index(position, plane), axis=1) + start
    zyx[:, axis] += layer
    order = np.lexsort((zyx[:, 2], zyx[:, 1], zyx[:, 0]))[:MOST_LISTED]
    seeds = [
        [None if s == _BACKGROUND else int(s) for s in v[layer, position][order]] for v in (by_low, by_high)
    ]
    return tuple(
        {"position": where, "seed_low": a, "seed_high": b}
        for where, a, b in zip(zyx[order].tolist(), *seeds, strict=True)
    )


def _overlaps(
    by_low: NDArray[np.int64], by_high: NDArray[np.int64], differs: NDArray[np.bool_]
) -> NDArray[np.int64]:
    """Count voxels of each pair of beliefs, for all voxels of the seeds that take part in a disagreement."""
    if not differs.any():
        return np.empty((0, 3), np.int64)
    involved = np.zeros(differs.shape, np.bool_)
    for view in (by_low, by_high):
        seeds = np.unique(view[differs])
        involved |= np.isin(view, seeds[seeds != _BACKGROUND])
    pairs, counts = np.unique(
        np.stack([by_low[involved], by_high[involved]], axis=1), axis=0, return_counts=True
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
