"""An exact watershed flood, whose result depends on no order of work, with proof of what a block knows.

Between seeds and labels of the watershed. Water comes from the seeds and reaches first what is high (cells
are bright or thick in the middle). When it reaches a voxel is a *time*, the pair (level, steps): the lowest
height passed on the way, and the steps since that level was reached. Of two times, the one of the higher
level is earlier, at one level that of fewer steps. A seed floods from (its height, 0). Going on at time
(level, steps) from a voxel to one of its 26 neighbours in the mask, of height h, the water is there at

    (level, steps + 1)   if h >= level
    (h, 0)               else

which is later in both cases. A voxel takes the label of its earliest neighbour; between neighbours of one
time, of the seed with the smallest raster index. So the labels depend on heights, mask and seeds alone.
Where no two heights are equal these are the labels of scikit-image's ``watershed(-height)``; where some are,
scikit-image lets the order in its queue decide, here positions do.

Going on never reverses two times. Let a = (l, s) be no later than b = (m, t), and both go on to height h.
If l = m, then s <= t: both add one step (h >= l), or both become (h, 0). If l > m: where h >= l, the level of
a stays greater; where l > h > m, h is greater than m; where h = m, (h, 0) is no later than (m, t + 1); where
h < m, both become (h, 0). So a voxel's time is that of its earliest neighbour, gone on; and rounds, level by
level and step by step, meet every voxel at its time: within a round the smallest seed wins, and what an
earlier round has taken is final. A voxel is taken once: work is proportional to the mask.

What a block knows. On sides of the box where the volume continues, voxels of the mask that are no seeds
start at (their height, 0), before which nothing could come from outside, with an UNKNOWN source that wins all
ties. Then a voxel with a seed for source has that source, and its time, in the whole volume too. For, first,
no voxel's time in the box is later than in the volume: it is so at seeds and at those sides, and going on
keeps it so along the way by which water comes in the volume. Second, by induction over times: let v have a
seed for source, and t be the time of its earliest neighbours in the box. Each of those at t has a seed for
source (an UNKNOWN one would have won), so it has time and source in the volume as well. All neighbours of v
are in the box (v is not on one of those sides, unless it is a seed itself), none is earlier than t in the
volume since none is in the box, and one that is at t in the volume is at t in the box, by the same two
bounds. So the neighbours to choose from are the same, with the same sources; and raster order in a box is
raster order in the volume, so the choice is the same.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

Sides = tuple[tuple[bool, bool, bool], tuple[bool, bool, bool]]

UNKNOWN = -1
"""Source of what water from outside the box might reach first."""
DRY = -2
"""Source of what no water reaches, and of what is not in the mask."""
NOWHERE: Sides = ((False, False, False), (False, False, False))
"""For a box that is the whole volume."""

_LEVELS = 2**16

# State of a voxel: 0 if not in the mask; _WAITING while it has no source; then its source + _OFFSET; and
# _OFFERED more than that in the round that takes it, while a smaller source may still come.
_OFFSET = 2
_OFFERED = np.int32(2**30)
_WAITING = np.int32(2**31 - 1)


def flood(
    height: NDArray[np.uint16], mask: NDArray[np.bool_], seeds: NDArray[np.int64], *, continues: Sides
) -> NDArray[np.int32]:
    """Flood a mask from its seeds.

    Parameters
    ----------
    height
        uint16, 3D; higher is flooded first.
    mask
        Boolean, of the same shape: where water goes.
    seeds
        Raster indices in the box, ascending, all in the mask.
    continues
        Whether the volume goes on beyond the box, below and above its start and stop, each per axis.

    Returns
    -------
    int32: which of `seeds` each voxel's water comes from, counted from 0; UNKNOWN where it might come from
    outside the box; DRY where there is none.

    Raises
    ------
    ValueError
        If the arrays do not fit each other, or the seeds are not ascending or not in the mask.

    Examples
    --------
    >>> height = np.array([[[9, 4, 2, 5, 8, 0, 7]]], np.uint16)
    >>> flood(height, height > 0, np.array([0, 4]), continues=NOWHERE)
    array([[[ 0,  0,  1,  1,  1, -2, -2]]], dtype=int32)
    >>> flood(height, height > 0, np.array([0, 4]), continues=((True, False, False), (False,) * 3))
    array([[[ 0, -1, -1, -1,  1, -2, -1]]], dtype=int32)
    """
    if height.ndim != 3 or height.shape != mask.shape:
        raise ValueError(f"heights of shape {height.shape} and a mask of shape {mask.shape} do not fit")
    if height.dtype != np.uint16 or mask.dtype != np.bool_:
        raise ValueError(f"expected uint16 heights and a boolean mask, got {height.dtype}, {mask.dtype}")
    if seeds.size and not (seeds[0] >= 0 and seeds[-1] < mask.size and (np.diff(seeds) > 0).all()):
        raise ValueError(f"seeds must be ascending raster indices in a box of shape {mask.shape}")
    position = np.unravel_index(seeds, mask.shape)
    if not mask[position].all():
        raise ValueError("all seeds must be in the mask")

    # One voxel of margin that is not in the mask: neighbours need no bounds check. Zeroed lazily.
    shape = tuple(n + 2 for n in mask.shape)
    state, padded_height = np.zeros(shape, np.int32), np.zeros(shape, np.uint16)
    counts, border = _fill(
        np.ascontiguousarray(height), np.ascontiguousarray(mask), state, padded_height, *continues
    )
    seed_at = np.ravel_multi_index(tuple(p + 1 for p in position), shape)
    index_dtype = np.int32 if state.size < 2**31 else np.int64
    slots, queue = np.empty((2, int(counts.sum())), index_dtype)
    _flood(
        state.reshape(-1),
        padded_height.reshape(-1),
        counts,
        seed_at,
        border,
        flat_offsets(shape),
        slots,
        queue,
    )
    source = np.empty(mask.shape, np.int32)
    _collect(state, source)
    return source


def flat_offsets(shape: tuple[int, ...]) -> NDArray[np.int64]:
    """Return how far the 26 neighbours of a voxel are in the raster of an array of this shape."""
    _, ny, nx = shape
    neighbours = [o for o in product((-1, 0, 1), repeat=3) if any(o)]
    return np.array([(z * ny + y) * nx + x for z, y, x in neighbours], np.int64)


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _fill(  # pragma: no cover - compiled
    height: Any, mask: Any, state: Any, padded_height: Any, before: Any, after: Any
) -> tuple[Any, Any]:
    """Mark the mask in the padded arrays; return its voxels per height, and those on open sides."""
    nz, ny, nx = mask.shape
    counts = np.zeros(_LEVELS, np.int64)
    border = np.empty(1024, np.int64)
    n = 0
    for z in range(nz):
        open_z = (z == 0 and before[0]) or (z == nz - 1 and after[0])
        for y in range(ny):
            open_y = open_z or (y == 0 and before[1]) or (y == ny - 1 and after[1])
            start = ((z + 1) * (ny + 2) + y + 1) * (nx + 2) + 1
            if n + nx > len(border):  # once a row: a check at every voxel is slow
                border = np.concatenate((border, np.empty(len(border) + nx, np.int64)))
            row = mask[z, y]
            for x in range(nx):
                if row[x]:
                    h = height[z, y, x]
                    state[z + 1, y + 1, x + 1] = _WAITING
                    padded_height[z + 1, y + 1, x + 1] = h
                    counts[h] += 1
                    if open_y or (x == 0 and before[2]) or (x == nx - 1 and after[2]):
                        border[n] = start + x
                        n += 1
    return counts, border[:n].copy()


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _flood(  # pragma: no cover - compiled
    state: Any, height: Any, counts: Any, seed_at: Any, border: Any, offsets: Any, slots: Any, queue: Any
) -> None:
    """Flood in place.

    ``slots`` has room for all voxels of each height: there lie those that were taken from a higher level, and
    wait for theirs. ``queue`` has those taken within the level, round after round.
    """
    start = np.zeros(_LEVELS + 1, np.int64)
    start[1:] = np.cumsum(counts)
    end = start[:-1].copy()
    for k in range(len(seed_at)):
        at = seed_at[k]
        state[at] = k + _OFFSET
        slots[end[height[at]]] = at
        end[height[at]] += 1
    for at in border:
        if state[at] == _WAITING:
            state[at] = UNKNOWN + _OFFSET
            slots[end[height[at]]] = at
            end[height[at]] += 1
    for level in range(_LEVELS - 1, -1, -1):
        if end[level] == start[level]:
            continue
        tail = _offer(state, slots[start[level] : end[level]], queue, 0, offsets)
        first = 0
        while tail > first:
            last = _settle(state, height, queue, first, tail, level, slots, end)
            tail = _offer(state, queue[first:last], queue, last, offsets)
            first = last


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _offer(state: Any, front: Any, queue: Any, tail: int, offsets: Any) -> int:  # pragma: no cover - compiled
    """Offer the sources of one round to all neighbours without one; return where the queue then ends."""
    for at in front:
        offered = state[at] + _OFFERED
        for o in offsets:
            s = state[at + o]
            if s > offered:  # waiting, or offered a larger source in this round
                if s == _WAITING:
                    queue[tail] = at + o
                    tail += 1
                state[at + o] = offered
    return tail


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _settle(  # pragma: no cover - compiled
    state: Any, height: Any, queue: Any, first: int, tail: int, level: int, slots: Any, end: Any
) -> int:
    """Make what a round took final; keep those of this level in the queue, put the lower to their height."""
    last = first
    for q in range(first, tail):
        at = queue[q]
        state[at] -= _OFFERED
        h = height[at]
        if h >= level:
            queue[last] = at
            last += 1
        else:
            slots[end[h]] = at
            end[h] += 1
    return last


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _collect(state: Any, source: Any) -> None:  # pragma: no cover - compiled
    nz, ny, nx = source.shape
    for z in range(nz):
        for y in range(ny):
            row = state[z + 1, y + 1, 1 : nx + 1]
            for x in range(nx):
                s = row[x]
                source[z, y, x] = DRY if s == 0 or s == _WAITING else s - _OFFSET
