"""Seeds of cells: the local maxima of the spot blur that lie in the foreground.

Two rules. ``strict``: a voxel greater than all its 26 neighbours (clEsperanto's rule). ``plateau``: a
26-connected set of equal voxels none of which has a greater neighbour gives one seed, its voxel of
smallest raster index. A single maximum is a plateau of one voxel, so the rules differ on flat maxima only
(saturated or quantised values), where ``strict`` gives none.

Exactness in a block. The blur is known in the box `exact`; seeds matter in the box `near` inside it. Let P be
a plateau of the whole volume whose seed s matters: s is in `near`, in the foreground, and no voxel of P has
a greater neighbour. Let C be the part of P that is connected to s inside `exact`. Then s is the smallest
voxel of C. Either C stays clear of the sides of `exact` that the volume continues beyond; then C = P, all its
neighbours are seen, and s is found. Or C touches such a side; then the block is reported incomplete. The
other way round, a voxel taken as a seed belongs to a C that stays clear, so C = P and the seed is true. Hence
where `complete` is true, the seeds in `near` are exactly those of the whole volume. A plateau that leaves
`exact`, but whose smallest voxel in C is outside `near` or not in the foreground, has no seed in C that
matters, and does not make a block incomplete: so neither empty space nor the middle of a huge plateau does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numba import njit

from braincensus_kernels.backend import array_module, is_cupy, ndimage_module
from braincensus_kernels.boxes import Box, Triple

SeedRule = Literal["plateau", "strict"]


@dataclass(frozen=True)
class Seeds:
    """Seeds of one block.

    Attributes
    ----------
    index
        int64, raster index in the box `near`, ascending; in host memory or on the GPU, as the blur was.
    complete
        Whether these are exactly the volume's seeds in `near`; see the module's account.
    """

    index: Any
    complete: bool


def find_seeds(
    blurred: Any, mask: Any, *, exact: Box, near: Box, volume_shape: Triple, rule: SeedRule
) -> Seeds:
    """Find the seeds of a block.

    Parameters
    ----------
    blurred
        float32, spot blur of the voxels of `exact`, without NaN.
    mask
        Boolean, foreground of the voxels of `near`.
    exact, near
        `exact` holds `near` and one voxel around it, as far as the volume goes.
    volume_shape
        Shape of the whole volume.
    rule
        ``"plateau"`` or ``"strict"``.

    Raises
    ------
    ValueError
        If the boxes do not fit each other or the arrays, or the rule is neither.

    Examples
    --------
    >>> flat_top = np.float32([[[0, 3, 3, 0, 2, 0]]])
    >>> box = Box.whole((1, 1, 6))
    >>> boxes = {"exact": box, "near": box, "volume_shape": (1, 1, 6)}
    >>> find_seeds(flat_top, flat_top > 1, **boxes, rule="plateau").index
    array([1, 4])
    >>> find_seeds(flat_top, flat_top > 1, **boxes, rule="strict").index
    array([4])
    """
    if rule not in ("plateau", "strict"):
        raise ValueError(f"the seed rule is 'plateau' or 'strict', not {rule!r}")
    if tuple(blurred.shape) != exact.shape or tuple(mask.shape) != near.shape:
        raise ValueError(
            f"the blur has shape {tuple(blurred.shape)} for {exact}, the mask {tuple(mask.shape)} for {near}"
        )
    if not exact.contains(near.dilate(1).clip(volume_shape)):
        raise ValueError(f"seeds in {near} need one voxel more on every side than {exact} holds")
    continues = (
        tuple(start > 0 for start in exact.start),
        tuple(stop < end for stop, end in zip(exact.stop, volume_shape, strict=True)),
    )
    if is_cupy(blurred):
        return find_seeds_generic(blurred, mask, exact=exact, near=near, continues=continues, rule=rule)
    # Zeroed lazily by the operating system: costs nothing where no plateau is visited.
    visited = np.zeros(exact.shape if rule == "plateau" else (0, 0, 0), np.bool_)
    offset = tuple(a - b for a, b in zip(near.start, exact.start, strict=True))
    index, complete = _find(
        np.ascontiguousarray(blurred),
        np.ascontiguousarray(mask),
        offset,
        *continues,
        visited,
        rule == "strict",
    )
    return Seeds(index=index, complete=complete)


def find_seeds_generic(
    blurred: Any,
    mask: Any,
    *,
    exact: Box,
    near: Box,
    continues: tuple[tuple[bool, ...], tuple[bool, ...]],
    rule: SeedRule,
) -> Seeds:
    """Find the seeds with whole-array operations of either library: the same seeds as the compiled search."""
    xp = array_module(blurred)
    inside = near.slices_in(exact)
    highest = box_maximum(blurred, include_centre=rule == "plateau")
    if rule == "strict":
        return Seeds(index=xp.flatnonzero((blurred > highest)[inside] & mask), complete=True)

    # A voxel without greater neighbour is part of a seed's plateau unless its connected set of such voxels
    # has an equal neighbour that is not one of them (that one has a greater neighbour).
    top = blurred == highest
    beside_lower_end = top & (box_maximum(xp.where(top, -xp.inf, blurred), include_centre=True) == blurred)
    leaves = xp.zeros(exact.shape, xp.bool_)
    for axis in range(3):
        for side, end in ((0, 0), (1, -1)):
            if continues[side][axis]:
                xp.moveaxis(leaves, axis, 0)[end] = True
    plateaus, n = ndimage_module(blurred).label(top, structure=xp.ones((3, 3, 3), xp.int32))
    refused = xp.zeros(n + 1, xp.bool_)
    refused[plateaus[beside_lower_end]] = True
    unseen = xp.zeros(n + 1, xp.bool_)
    unseen[plateaus[top & leaves]] = True

    # The smallest raster index of each plateau: sorted by plateau, then index, it comes first.
    members = xp.flatnonzero(top)
    keys = xp.sort(plateaus.reshape(-1)[members].astype(xp.int64) * exact.size + members)
    plateau, first = keys // exact.size, keys % exact.size
    leads = xp.ones(len(keys), xp.bool_)
    leads[1:] = plateau[1:] != plateau[:-1]
    plateau, first = plateau[leads], first[leads]

    state = xp.zeros(exact.size, xp.int8)  # 1: a seed; 2: may be one
    state[first] = xp.where(refused[plateau], 0, xp.where(unseen[plateau], 2, 1)).astype(xp.int8)
    state = xp.where(mask, state.reshape(exact.shape)[inside], 0)
    return Seeds(index=xp.flatnonzero(state == 1), complete=not bool((state == 2).any()))


def box_maximum(image: Any, *, include_centre: bool) -> Any:
    """Return the maximum over the 26 neighbours inside the array, and the voxel itself if wanted."""
    xp = array_module(image)
    if include_centre:  # the box is separable
        result = image
        for axis in range(3):
            line = xp.moveaxis(result, axis, 0)
            wider = line.copy()
            xp.maximum(wider[1:], line[:-1], out=wider[1:])
            xp.maximum(wider[:-1], line[1:], out=wider[:-1])
            result = xp.moveaxis(wider, 0, axis)
        return result
    padded = xp.full([s + 2 for s in image.shape], -xp.inf, xp.float32)
    padded[1:-1, 1:-1, 1:-1] = image
    result = xp.full(image.shape, -xp.inf, xp.float32)
    nz, ny, nx = image.shape
    for z in range(3):
        for y in range(3):
            for x in range(3):
                if (z, y, x) != (1, 1, 1):
                    xp.maximum(result, padded[z : z + nz, y : y + ny, x : x + nx], out=result)
    return result


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _find(  # pragma: no cover - compiled
    blurred: Any, mask: Any, offset: Any, before: Any, after: Any, visited: Any, strict: bool
) -> tuple[Any, bool]:
    found = np.empty(1024, np.int64)
    n = 0
    complete = True
    stack = np.empty(1024, np.int64)
    ez, ey, ex = blurred.shape
    nz, ny, nx = mask.shape
    for iz in range(nz):
        z = iz + offset[0]
        z0, z1 = max(z - 1, 0), min(z + 2, ez)
        for iy in range(ny):
            y = iy + offset[1]
            y0, y1 = max(y - 1, 0), min(y + 2, ey)
            for ix in range(nx):
                if not mask[iz, iy, ix]:
                    continue
                x = ix + offset[2]
                v = blurred[z, y, x]
                # The six nearest voxels refuse almost everything.
                if (x > 0 and blurred[z, y, x - 1] > v) or (x + 1 < ex and blurred[z, y, x + 1] > v):
                    continue
                if (y > 0 and blurred[z, y - 1, x] > v) or (y + 1 < ey and blurred[z, y + 1, x] > v):
                    continue
                if (z > 0 and blurred[z - 1, y, x] > v) or (z + 1 < ez and blurred[z + 1, y, x] > v):
                    continue
                x0, x1 = max(x - 1, 0), min(x + 2, ex)
                equals = -1  # the voxel itself
                greater = False
                for a in range(z0, z1):
                    for b in range(y0, y1):
                        for c in range(x0, x1):
                            w = blurred[a, b, c]
                            greater |= w > v
                            equals += w == v
                if greater:
                    continue
                if equals > 0:
                    if strict or visited[z, y, x]:
                        continue
                    stack, refused, unseen = _visit_plateau(blurred, visited, stack, z, y, x, before, after)
                    if refused:
                        continue
                    if unseen:
                        complete = False
                        continue
                if n == len(found):
                    found = np.concatenate((found, np.empty_like(found)))
                found[n] = (iz * ny + iy) * nx + ix
                n += 1
    return found[:n].copy(), complete


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _visit_plateau(  # pragma: no cover - compiled
    blurred: Any, visited: Any, stack: Any, z: int, y: int, x: int, before: Any, after: Any
) -> tuple[Any, bool, bool]:
    """Visit the plateau of a voxel, the first of it to be met in raster order among those that matter.

    It is refused if a member has a greater neighbour, or precedes the voxel (the seed is then elsewhere); it
    is unseen in part if it touches a side that the volume continues beyond.
    """
    ez, ey, ex = blurred.shape
    v = blurred[z, y, x]
    start = (z * ey + y) * ex + x
    refused, unseen = False, False
    visited[z, y, x] = True
    stack[0] = start
    n = 1
    while n > 0:
        n -= 1
        at = stack[n]
        refused |= at < start
        pz, py, px = at // (ey * ex), at // ex % ey, at % ex
        unseen |= (pz == 0 and before[0]) or (py == 0 and before[1]) or (px == 0 and before[2])
        unseen |= (pz == ez - 1 and after[0]) or (py == ey - 1 and after[1]) or (px == ex - 1 and after[2])
        if n + 26 > len(stack):
            stack = np.concatenate((stack, np.empty_like(stack)))
        for a in range(max(pz - 1, 0), min(pz + 2, ez)):
            for b in range(max(py - 1, 0), min(py + 2, ey)):
                for c in range(max(px - 1, 0), min(px + 2, ex)):
                    w = blurred[a, b, c]
                    refused |= w > v
                    if w == v and not visited[a, b, c]:
                        visited[a, b, c] = True
                        stack[n] = (a * ey + b) * ex + c
                        n += 1
    return stack, refused, unseen
