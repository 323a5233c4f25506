"""Growth of cells from their seeds through the foreground, one voxel a step.

Steps alternate between the 26 neighbours (the first step) and the 6 nearest. In a step, every foreground
voxel that has no label takes the largest label among its neighbours of before the step; labels never change.
Growth ends when nothing more can be reached, or at a bound. So after T steps a voxel's label depends on
what is within T voxels of it, and no farther.

clEsperanto ends at the first step of either kind that changes nothing anywhere in the image; voxels that
only a step over the 26 neighbours could still reach then stay unlabelled. That depends on the image as a
whole, so it cannot hold block by block; here growth ends once a step over the 26 neighbours changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numba import njit

from braincensus_kernels.backend import array_module, is_cupy, to_numpy
from braincensus_kernels.boxes import Box

_BOX = tuple(o for o in product((-1, 0, 1), repeat=3) if any(o))
_DIAMOND = tuple(o for o in _BOX if sum(map(abs, o)) == 1)

# State of a voxel while cells grow: its label; 0 if it is not foreground; _WAITING if it has no label yet;
# and in the step that labels it, _WAITING + label, so that this label is not yet passed on.
_WAITING = np.int32(np.iinfo(np.int32).min)


@dataclass(frozen=True)
class Growth:
    """Labels grown in one block.

    Attributes
    ----------
    labels
        uint32 over the box `kept`: 1..n, the ids that occur there, in the order of their seeds; 0 elsewhere.
    seeds
        int64 ``(n,)``, in host memory: which of the seeds given is id i + 1.
    steps
        The last step that labelled a voxel of the core.
    stopped_by_bound
        Whether a foreground voxel of the core was left out that more steps would have reached.
    foreground_voxels, unreached_voxels
        Foreground voxels of the core, and those of them without label.
    """

    labels: Any
    seeds: np.ndarray[Any, np.dtype[np.int64]]
    steps: int
    stopped_by_bound: bool
    foreground_voxels: int
    unreached_voxels: int


def grow(mask: Any, seeds: Any, *, near: Box, kept: Box, core: Box, max_steps: int) -> Growth:
    """Grow cells from seeds through a mask.

    Parameters
    ----------
    mask
        Boolean, the foreground of the voxels of `near`; NumPy or CuPy.
    seeds
        int64 raster indices in `near`, ascending, all in the mask; they get labels in this order.
    near, kept, core
        Boxes, each inside the one before; `kept` holds `core` and one voxel around it, as far as the volume
        goes.
    max_steps
        Number of steps at most. The labels of `kept` are exact if `near` holds `max_steps` voxels around it.

    Examples
    --------
    >>> box = Box.whole((1, 1, 7))
    >>> mask = np.array([[[1, 1, 1, 1, 1, 0, 1]]], bool)
    >>> grown = grow(mask, np.array([0, 4]), near=box, kept=box, core=box, max_steps=9)
    >>> grown.labels  # the voxel halfway takes the larger label
    array([[[1, 1, 2, 2, 2, 0, 0]]], dtype=uint32)
    >>> grown.unreached_voxels
    1
    """
    if tuple(mask.shape) != near.shape or not (near.contains(kept) and kept.contains(core)):
        raise ValueError(
            f"mask of shape {tuple(mask.shape)}, near {near}, kept {kept}, core {core} do not fit"
        )
    if max_steps < 0:
        raise ValueError(f"the number of growth steps must not be negative, got {max_steps}")
    if is_cupy(mask):
        return grow_generic(mask, seeds, near=near, kept=kept, core=core, max_steps=max_steps)

    # One voxel of margin that is not foreground: neighbours need no bounds check. Zeroed lazily, and in huge
    # pages where the system has them: allocated here, not in compiled code.
    shape = (near.shape[0] + 2, near.shape[1] + 2, near.shape[2] + 2)
    state = np.zeros(shape, np.int32)
    foreground = _fill_waiting(np.ascontiguousarray(mask), state)
    seed_at = _padded_index(seeds, near)
    flat = state.reshape(-1)
    flat[seed_at] = np.arange(1, len(seed_at) + 1, dtype=np.int32)
    # A voxel enters the queue once, when it is labelled.
    queue = np.empty(foreground, np.int32 if state.size < 2**31 else np.int64)
    queue[: len(seed_at)] = seed_at
    box, diamond = _flat_offsets(_BOX, shape), _flat_offsets(_DIAMOND, shape)
    starts, converged = _grow(flat, queue, len(seed_at), max_steps, box, diamond)

    core_in_padded = _in_padded(core, near)
    labels = np.empty(kept.shape, np.uint32)
    present = _collect(state, labels, np.array(_in_padded(kept, near)), len(seed_at))
    core_foreground, unreached = _count_core(state, np.array(core_in_padded))
    return Growth(
        labels=labels,
        seeds=np.flatnonzero(present[1:]).astype(np.int64),
        steps=_last_step_in(queue, starts, shape, *core_in_padded),
        stopped_by_bound=unreached > 0
        and not converged
        and bool(_any_reachable(state, box, *core_in_padded)),
        foreground_voxels=core_foreground,
        unreached_voxels=unreached,
    )


def grow_generic(mask: Any, seeds: Any, *, near: Box, kept: Box, core: Box, max_steps: int) -> Growth:
    """Grow with array operations of either library: the same labels as the compiled growth.

    Only foreground voxels without label are visited.
    """
    xp = array_module(mask)
    in_mask = xp.pad(xp.asarray(mask), 1)
    labels = xp.zeros(in_mask.shape, xp.uint32)
    flat = labels.reshape(-1)
    seed_at = _padded_index(seeds, near)
    flat[seed_at] = xp.arange(1, len(seed_at) + 1, dtype=xp.uint32)
    in_core = xp.zeros(in_mask.shape, xp.bool_)
    core_slices = tuple(slice(a, b) for a, b in zip(*_in_padded(core, near), strict=True))
    in_core[core_slices] = True

    waiting = xp.flatnonzero(in_mask.reshape(-1) & (flat == 0))
    waits_in_core = in_core.reshape(-1)[waiting]
    box, diamond = _flat_offsets(_BOX, in_mask.shape), _flat_offsets(_DIAMOND, in_mask.shape)
    steps, step = 0, 0
    while step < max_steps:
        step += 1
        largest = _largest_neighbour(xp, flat, waiting, diamond if step % 2 == 0 else box)
        reached = largest > 0
        if not bool(reached.any()):
            if step % 2 == 1:
                break
            continue
        flat[waiting[reached]] = largest[reached]
        if bool((reached & waits_in_core).any()):
            steps = step
        waiting, waits_in_core = waiting[~reached], waits_in_core[~reached]

    left = waiting[waits_in_core]
    reachable = bool((_largest_neighbour(xp, flat, left, box) > 0).any())
    kept_labels = labels[tuple(slice(a, b) for a, b in zip(*_in_padded(kept, near), strict=True))]
    present = xp.zeros(len(seed_at) + 1, xp.bool_)
    present[kept_labels.reshape(-1)] = True
    present[0] = False
    renumber = xp.where(present, xp.cumsum(present), 0).astype(xp.uint32)
    return Growth(
        labels=renumber[kept_labels],
        seeds=to_numpy(xp.flatnonzero(present[1:])),
        steps=steps,
        stopped_by_bound=reachable,
        foreground_voxels=int(in_mask[core_slices].sum()),
        unreached_voxels=len(left),
    )


def _largest_neighbour(xp: Any, flat: Any, at: Any, offsets: Any) -> Any:
    largest = xp.zeros(len(at), flat.dtype)
    for offset in offsets.tolist():
        xp.maximum(largest, flat[at + offset], out=largest)
    return largest


def _flat_offsets(neighbours: Any, shape: tuple[int, ...]) -> np.ndarray[Any, np.dtype[np.int64]]:
    _, ny, nx = shape
    return np.array([(z * ny + y) * nx + x for z, y, x in neighbours], dtype=np.int64)


def _padded_index(index: Any, near: Box) -> Any:
    """Raster index in the array with one voxel of margin, from the one in `near`."""
    _, ny, nx = near.shape
    plane = ny * nx
    return (index // plane + 1) * (ny + 2) * (nx + 2) + (index % plane // nx + 1) * (nx + 2) + index % nx + 1


def _in_padded(box: Box, near: Box) -> tuple[tuple[int, ...], tuple[int, ...]]:
    starts = tuple(a - o + 1 for a, o in zip(box.start, near.start, strict=True))
    stops = tuple(b - o + 1 for b, o in zip(box.stop, near.start, strict=True))
    return starts, stops


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _fill_waiting(mask: Any, state: Any) -> int:  # pragma: no cover - compiled
    """Mark the foreground in the padded state; return its number of voxels."""
    nz, ny, nx = mask.shape
    n = 0
    for z in range(nz):
        for y in range(ny):
            for x in range(nx):
                if mask[z, y, x]:
                    state[z + 1, y + 1, x + 1] = _WAITING
                    n += 1
    return n


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _grow(  # pragma: no cover - compiled
    state: Any, queue: Any, n_seeds: int, max_steps: int, box: Any, diamond: Any
) -> tuple[Any, bool]:
    """Grow in place; step k labelled ``queue[starts[k]:starts[k + 1]]`` (step 0: the seeds).

    Only voxels labelled since the last step of the same or the larger kind can have waiting neighbours of
    that kind: those of the last step for the 6 nearest, of the last two for the 26.
    """
    starts = np.zeros(64, np.int64)
    starts[1] = n_seeds
    step = 0
    converged = False
    while step < max_steps and not converged:
        step += 1
        if step + 2 > len(starts):
            starts = np.concatenate((starts, np.zeros_like(starts)))
        end = starts[step]
        tail = end
        if step % 2 == 1:
            begin, offsets = starts[max(step - 2, 0)], box
        else:
            begin, offsets = starts[step - 1], diamond
        for q in range(begin, end):
            at = queue[q]
            offered = _WAITING + state[at]
            for o in offsets:
                s = state[at + o]
                if s < offered:  # waiting, or offered a smaller label in this step
                    if s == _WAITING:
                        queue[tail] = at + o
                        tail += 1
                    state[at + o] = offered
        for q in range(end, tail):
            state[queue[q]] -= _WAITING
        starts[step + 1] = tail
        converged = tail == end and step % 2 == 1
    return starts[: step + 2].copy(), converged


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _inside(at: int, shape: Any, start: Any, stop: Any) -> Any:  # pragma: no cover - compiled
    _, ny, nx = shape
    line = at // nx
    z, y, x = line // ny, line % ny, at - line * nx
    return start[0] <= z < stop[0] and start[1] <= y < stop[1] and start[2] <= x < stop[2]


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _last_step_in(  # pragma: no cover - compiled
    queue: Any, starts: Any, shape: Any, core_start: Any, core_stop: Any
) -> int:
    """Last step, not counting the seeds, that labelled a voxel of the core."""
    for step in range(len(starts) - 2, 0, -1):
        for q in range(starts[step], starts[step + 1]):
            if _inside(queue[q], shape, core_start, core_stop):
                return step
    return 0


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _collect(state: Any, labels: Any, kept: Any, n_seeds: int) -> Any:  # pragma: no cover - compiled
    """Write the labels of the kept box, numbered anew without gaps; return which labels occur there."""
    number = np.zeros(n_seeds + 1, np.uint32)
    nz, ny, nx = labels.shape
    for z in range(nz):
        for y in range(ny):
            row = state[kept[0, 0] + z, kept[0, 1] + y, kept[0, 2] : kept[1, 2]]
            out = labels[z, y]
            for x in range(nx):
                s = max(row[x], np.int32(0))
                out[x] = s
                if s > 0:
                    number[s] = 1
    n = 0
    for i in range(1, n_seeds + 1):
        if number[i]:
            n += 1
            number[i] = n
    if n < n_seeds:
        for z in range(nz):
            for y in range(ny):
                out = labels[z, y]
                for x in range(nx):
                    if out[x]:
                        out[x] = number[out[x]]
    return number


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _count_core(state: Any, core: Any) -> tuple[int, int]:  # pragma: no cover - compiled
    """Count the foreground voxels of the core, and those without label."""
    foreground, waiting = 0, 0
    for z in range(core[0, 0], core[1, 0]):
        for y in range(core[0, 1], core[1, 1]):
            row = state[z, y, core[0, 2] : core[1, 2]]
            for x in range(len(row)):
                foreground += row[x] != 0
                waiting += row[x] == _WAITING
    return foreground, waiting


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _any_reachable(
    state: Any, box: Any, core_start: Any, core_stop: Any
) -> bool:  # pragma: no cover - compiled
    """Whether a waiting voxel of the core has a labelled neighbour."""
    flat = state.reshape(-1)
    _, ny, nx = state.shape
    for z in range(core_start[0], core_stop[0]):
        for y in range(core_start[1], core_stop[1]):
            for x in range(core_start[2], core_stop[2]):
                if state[z, y, x] == _WAITING:
                    for o in box:
                        if flat[(z * ny + y) * nx + x + o] > 0:
                            return True
    return False
