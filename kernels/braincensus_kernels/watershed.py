"""Watershed labelling: of a whole array, and of one block of a volume with the same result.

    by threshold   blur -> foreground, seeds by thresholds -> bound -> flood over the blur
    by distance    blur -> foreground -> distance to background -> blur -> maxima -> bound -> flood over that

By threshold, a cell is a 26-connected set of voxels above a second, higher threshold, and the foreground that
its water reaches first (CellSeg3D's `binary_watershed`). By distance, it is a local maximum of the distance
to the background, smoothed, and the foreground that its water reaches first: this parts cells that touch. For
the order of the water see the module `flood`. Foreground farther than `max_steps` steps (to any of 26
neighbours, through the foreground) from all seeds is in no cell, and is counted.

A block is labelled from the voxels of its `outer` box:

    outer                                              voxels given
      exact     where what is flooded is known         blurs (and distance) reach as far as `outer`
        seeded  where seeds are known                  within `exact`, their rule's own reach
          near  where the bounded foreground is known  within `seeded`, `max_steps`
            kept  core, dilated by 1                   labels given back
              core

All boxes are clipped to the volume. Each of the steps up to the bounded foreground looks no farther than the
margin between two boxes, so in `near` foreground, heights and seeds are those of the whole volume. The flood
runs in `near`, and follows slopes, which have no bound: it tells which voxels water from outside `near` might
reach first. If none of them is in `kept`, the labels there are exactly the volume's, and the block is
complete. If not, it has to be labelled with a larger `outer`: `near` grows with it. How much of `near` is
around `kept` (`context`, at least the one voxel without which nothing is known) is a matter of speed alone:
a wide one makes a second try rare.

A set above a threshold has no bound, so a block may see a part of it. Its identity is the smallest voxel of
it in `exact`, and its voxels in `kept` are anchors (see the module `block_labels`). That joins all parts, as
it does for connected components (see the module `components`): in a block, neighbours in a seed have one
label, and all of its voxels in `kept` are labelled. Cells with no anchor in `kept` are `unanchored`, unless
their seed stays clear of the sides of `exact` that the volume continues beyond: then it is seen whole, and
its identity is the volume's.

Floods run on the CPU: there is no watershed in CuPy or cuCIM. Of CuPy arrays, blurs and distances are
computed on the GPU and copied; labels are NumPy arrays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from braincensus_kernels.backend import array_module, to_numpy
from braincensus_kernels.block_labels import BlockLabels
from braincensus_kernels.boxes import Box, Triple
from braincensus_kernels.components import (
    check_block,
    check_image,
    check_threshold,
    index_in_volume,
    number_components,
)
from braincensus_kernels.distance import distance_radii, squared_distance
from braincensus_kernels.filters import Sigma, as_sigmas, blur_radii, gaussian_blur
from braincensus_kernels.flood import NOWHERE, UNKNOWN, Sides, flat_offsets, flood
from braincensus_kernels.seeds import find_seeds

HIGHEST = 65535
"""Heights, and values of an image that is flooded, are whole numbers from 0 to this."""

# While steps are counted: 0 for background, _WAITING for foreground not reached yet, else the steps + 1.
_WAITING = np.int32(-1)
_MOST_STEPS = 2**31 - 2


def reach_voxels(sigma: Sigma, *, min_seed_voxels: int, max_steps: int, context: int | None = None) -> Triple:
    """Return how many voxels around a core to give to :func:`label_watershed`, per axis (z, y, x).

    The sum of the blur's radius, ``min_seed_voxels - 1``, `max_steps`, `context`, and 1 for `kept`.

    Parameters
    ----------
    sigma
        Standard deviation of the blur in voxels, one or per axis.
    min_seed_voxels
        Voxels of the smallest seed.
    max_steps
        Bound of cells, in steps from their seed.
    context
        Voxels around the labels given back in which floods are followed: at least 1. None: `max_steps`, which
        makes it rare that a block is incomplete.

    Examples
    --------
    >>> reach_voxels(0.65, min_seed_voxels=3, max_steps=10)
    (25, 25, 25)
    >>> reach_voxels(0, min_seed_voxels=1, max_steps=10, context=1)
    (12, 12, 12)
    """
    _check_counts(min_seed_voxels=(min_seed_voxels, 1), max_steps=(max_steps, 0))
    more = min_seed_voxels - 1 + max_steps + _context(context, max_steps) + 1
    z, y, x = (radius + more for radius in blur_radii(sigma))
    return z, y, x


def distance_reach_voxels(
    sigma: Sigma,
    *,
    seed_sigma: Sigma,
    spacing: Triple,
    limit: int,
    max_steps: int,
    context: int | None = None,
) -> Triple:
    """Return how many voxels around a core to give to :func:`label_distance_watershed`, per axis (z, y, x).

    The sum of the radii of the blur, of the distance (`distance.distance_radii`) and of the blur of the
    distance, 1 for its maxima, `max_steps`, `context`, and 1 for `kept`.

    Parameters
    ----------
    sigma, seed_sigma
        Standard deviations in voxels, one or per axis: of the image's blur, of the distance's.
    spacing, limit
        Of the distance; whole numbers of one unit.
    max_steps
        Bound of cells, in steps from their seed.
    context
        As for :func:`reach_voxels`.

    Examples
    --------
    >>> distance_reach_voxels(0, seed_sigma=1, spacing=(1, 1, 1), limit=6, max_steps=10)
    (31, 31, 31)
    """
    _check_counts(max_steps=(max_steps, 0))
    more = 1 + max_steps + _context(context, max_steps) + 1
    radii = zip(blur_radii(sigma), distance_radii(spacing, limit), blur_radii(seed_sigma), strict=True)
    z, y, x = (sum(of_axis) + more for of_axis in radii)
    return z, y, x


def label_watershed(
    image: Any,
    *,
    outer: Box,
    core: Box,
    volume_shape: Triple,
    sigma: Sigma,
    threshold: float,
    seed_threshold: float,
    min_seed_voxels: int,
    max_steps: int,
) -> BlockLabels:
    """Label one block of a volume, with seeds by threshold; stitching by anchors gives that volume's cells.

    Parameters
    ----------
    image
        Voxels of `outer`: whole numbers from 0 to 65535, as a probability is stored, NumPy or CuPy. A
        fraction from 0 to 1 is refused (``np.round(image * 65535).astype(np.uint16)`` will do).
    outer
        Box that holds `core` and :func:`reach_voxels` around it with a context of at least 1, clipped to the
        volume; if the labels are not complete, a larger one may give more.
    core
        Box of this block's own voxels; not empty.
    volume_shape
        Shape of the whole volume: at its border the blur continues the outermost voxels.
    sigma
        Standard deviation of the blur in voxels, one or per axis (z, y, x); 0 for none.
    threshold
        Foreground is where the blur, float32, is greater; as the image, from 0 to 65535.
    seed_threshold
        Seeds are 26-connected sets where it is greater than this; not less than `threshold`.
    min_seed_voxels
        Sets of fewer voxels are no seeds.
    max_steps
        Bound of cells: the steps through the foreground from their nearest seed.

    Returns
    -------
    Labels (NumPy) with anchors. ``growth_steps`` is the largest number of steps from a seed to a voxel of
    the core. Where ``complete`` is False, labels that are not certain are those of the box alone.

    Raises
    ------
    ValueError
        If `outer` is too small or does not fit the image, the core is empty, the image does not hold whole
        numbers from 0 to 65535, or an option is out of range.
    """
    sigmas = as_sigmas(sigma)
    check_image(image)
    _check_stored(image)
    check_threshold(threshold)
    check_threshold(seed_threshold, name="seed_threshold")
    if seed_threshold < threshold:
        raise ValueError(
            f"seeds lie in the foreground: expected a seed_threshold of at least {threshold}, the threshold; "
            f"found {seed_threshold}"
        )
    least = reach_voxels(sigmas, min_seed_voxels=min_seed_voxels, max_steps=max_steps, context=1)
    check_block(core, outer, reach=least, volume_shape=volume_shape)
    exact = _shrink(outer, blur_radii(sigmas), volume_shape)
    seeded = _shrink(exact, min_seed_voxels - 1, volume_shape)
    near = _shrink(seeded, max_steps, volume_shape)
    kept = core.dilate(1).clip(volume_shape)

    smooth = to_numpy(gaussian_blur(image, outer=outer, inner=exact, volume_shape=volume_shape, sigma=sigmas))
    height, foreground, bright = np.empty(smooth.shape, np.uint16), *np.empty((2, *smooth.shape), np.bool_)
    _classify(smooth, np.float32(threshold), np.float32(seed_threshold), height, foreground, bright)
    del smooth

    seed_of, first = number_components(bright)
    n_voxels, leaves = _survey(seed_of, len(first), *_continues(exact, volume_shape))
    is_seed = np.concatenate(([False], n_voxels >= min_seed_voxels))
    flooded = _flood_block(
        height[near.slices_in(exact)],
        foreground[seeded.slices_in(exact)],
        _seed_voxels(seed_of[seeded.slices_in(exact)], is_seed),
        seeded=seeded,
        near=near,
        kept=kept,
        core=core,
        volume_shape=volume_shape,
        max_steps=max_steps,
    )
    position = np.unravel_index(flooded.seeds, near.shape)
    cell_of_seed = seed_of[near.slices_in(exact)][position].astype(np.int64) - 1
    seed_of_kept = seed_of[kept.slices_in(exact)]
    anchors = is_seed[seed_of_kept]
    has_anchor = np.zeros(len(first) + 1, np.bool_)
    has_anchor[seed_of_kept[anchors]] = True
    labels, present = _number_cells(flooded.source, cell_of_seed, len(first))
    return _block_labels(
        flooded,
        labels,
        foreground[core.slices_in(exact)],
        kept=kept,
        core=core,
        seeds=index_in_volume(first[present], exact, volume_shape),
        complete=flooded.complete,
        anchors=anchors,
        unanchored=index_in_volume(first[present & leaves & ~has_anchor[1:]], exact, volume_shape),
    )


def label_distance_watershed(
    image: Any,
    *,
    outer: Box,
    core: Box,
    volume_shape: Triple,
    sigma: Sigma,
    threshold: float,
    seed_sigma: Sigma,
    spacing: Triple,
    limit: int,
    max_steps: int,
) -> BlockLabels:
    """Label one block of a volume, with seeds by distance, as a part of that volume.

    Parameters
    ----------
    image
        Voxels of `outer`: real, finite, NumPy or CuPy.
    outer
        Box that holds `core` and :func:`distance_reach_voxels` around it with a context of at least 1,
        clipped to the volume; if the labels are not complete, a larger one may give more.
    core
        Box of this block's own voxels; not empty.
    volume_shape
        Shape of the whole volume: at its border blurs continue the outermost voxels, and beyond it is no
        background.
    sigma
        Standard deviation of the image's blur in voxels, one or per axis (z, y, x); 0 for none.
    threshold
        Foreground is where the blur, float32, is greater.
    seed_sigma
        Standard deviation of the distance's blur in voxels, likewise; larger: fewer cells.
    spacing, limit
        Distance of neighbouring voxels (z, y, x), and the largest distance that is told apart, whole numbers
        of one unit (nanometres, say). Parts of cells that are thicker than twice the limit are flat.
    max_steps
        Bound of cells: the steps through the foreground from their nearest seed.

    Returns
    -------
    Labels (NumPy), known by the voxels of their seeds; no anchors. ``growth_steps`` is the largest number of
    steps from a seed to a voxel of the core. Where ``complete`` is False, the seeds may not be all (a flat
    maximum leaves what is seen), or the labels that are not certain are those of the box alone.

    Raises
    ------
    ValueError
        If `outer` is too small or does not fit the image, the core is empty, the image is not real and
        finite, or an option is out of range.
    """
    sigmas, seed_sigmas = as_sigmas(sigma), as_sigmas(seed_sigma, name="seed_sigma")
    check_image(image)
    check_threshold(threshold)
    least = distance_reach_voxels(
        sigmas, seed_sigma=seed_sigmas, spacing=spacing, limit=limit, max_steps=max_steps, context=1
    )
    check_block(core, outer, reach=least, volume_shape=volume_shape)
    known = _shrink(outer, blur_radii(sigmas), volume_shape)
    deep = _shrink(known, distance_radii(spacing, limit), volume_shape)
    exact = _shrink(deep, blur_radii(seed_sigmas), volume_shape)
    seeded = _shrink(exact, 1, volume_shape)
    near = _shrink(seeded, max_steps, volume_shape)
    kept = core.dilate(1).clip(volume_shape)

    smooth = gaussian_blur(image, outer=outer, inner=known, volume_shape=volume_shape, sigma=sigmas)
    foreground = smooth > np.float32(threshold)
    del smooth
    squares = squared_distance(foreground, spacing=spacing, limit=limit)[deep.slices_in(known)]
    depth = gaussian_blur(
        _depth(squares, limit), outer=deep, inner=exact, volume_shape=volume_shape, sigma=seed_sigmas
    )
    del squares
    depth = to_numpy(depth)
    np.rint(depth, out=depth)  # whole numbers, as float32: what is compared for seeds is what is flooded
    foreground = np.ascontiguousarray(to_numpy(foreground[seeded.slices_in(known)]))
    found = find_seeds(depth, foreground, exact=exact, near=seeded, volume_shape=volume_shape, rule="plateau")
    height = np.minimum(depth[near.slices_in(exact)], np.float32(HIGHEST)).astype(np.uint16)
    del depth
    flooded = _flood_block(
        height,
        foreground,
        found.index,
        seeded=seeded,
        near=near,
        kept=kept,
        core=core,
        volume_shape=volume_shape,
        max_steps=max_steps,
    )
    labels, present = _number_cells(flooded.source, np.arange(len(flooded.seeds)), len(flooded.seeds))
    return _block_labels(
        flooded,
        labels,
        foreground[core.slices_in(seeded)],
        kept=kept,
        core=core,
        seeds=index_in_volume(flooded.seeds[present], near, volume_shape),
        complete=flooded.complete and found.complete,
    )


def watershed(
    image: Any,
    *,
    threshold: float,
    seed_threshold: float,
    sigma: Sigma = 0.0,
    min_seed_voxels: int = 3,
    max_radius: int | None = None,
) -> NDArray[np.uint32]:
    """Label a whole 3D array by watershed from seeds by threshold.

    Parameters
    ----------
    image
        Foreground probability as stored, axes zyx: whole numbers from 0 to 65535, NumPy or CuPy; not empty.
        A fraction from 0 to 1 is refused (``np.round(image * 65535).astype(np.uint16)`` will do).
    threshold
        Foreground is where the blur is greater. (CellSeg3D's `binary_watershed` takes 0.3 of 1.)
    seed_threshold
        Seeds are 26-connected sets where it is greater than this. (CellSeg3D: 0.9 of 1.)
    sigma
        Blur, voxels, one number or one per axis (z, y, x); 0, as in CellSeg3D: none.
    min_seed_voxels
        Sets of fewer voxels are no seeds; 3, as in CellSeg3D.
    max_radius
        Steps through the foreground from the seed at most; None, as in CellSeg3D: unbounded.

    Returns
    -------
    uint32 NumPy array of the shape of `image`: 1..N in raster order of the seeds' first voxels, 0 for
    background.

    Raises
    ------
    ValueError
        If the image is not 3D, is empty, or does not hold whole numbers from 0 to 65535, or an option is out
        of range.

    See Also
    --------
    label_watershed : the same labels, block by block.

    Notes
    -----
    CellSeg3D calls ``skimage.segmentation.watershed`` with its default, the 6 nearest neighbours; water here
    goes to all 26, as seeds do.

    Examples
    --------
    >>> image = np.array([[[0, 9, 9, 5, 3, 4, 9, 9, 0]]], np.uint16)
    >>> watershed(image, threshold=2, seed_threshold=8, min_seed_voxels=2)
    array([[[0, 1, 1, 1, 1, 2, 2, 2, 0]]], dtype=uint32)
    """
    check_image(image)
    shape: Triple = tuple(image.shape)
    whole = Box.whole(shape)
    labels: NDArray[np.uint32] = label_watershed(
        image,
        outer=whole,
        core=whole,
        volume_shape=shape,
        sigma=sigma,
        threshold=threshold,
        seed_threshold=seed_threshold,
        min_seed_voxels=min_seed_voxels,
        max_steps=_steps(max_radius, whole),
    ).labels
    return labels


def distance_watershed(
    image: Any,
    *,
    threshold: float,
    sigma: Sigma = 0.0,
    seed_sigma: Sigma = 1.0,
    spacing: Triple = (1, 1, 1),
    limit: int,
    max_radius: int | None = None,
) -> NDArray[np.uint32]:
    """Label a whole 3D array by watershed from the maxima of the distance to the background.

    Parameters
    ----------
    image
        Intensity or foreground probability, axes zyx: real, finite, not empty, NumPy or CuPy.
    threshold
        Foreground is where the blur is greater.
    sigma
        Blur before the threshold, voxels, one number or one per axis (z, y, x); 0: none.
    seed_sigma
        Blur of the distance, likewise; larger: fewer cells. 1 takes away what comes from the voxels' grid.
    spacing
        Distance of neighbouring voxels (z, y, x), whole numbers of one unit; by default one, each.
    limit
        Largest distance that is told apart, in the same unit: more than half of a cell's thickness.
    max_radius
        Steps through the foreground from the seed at most; None: unbounded.

    Returns
    -------
    uint32 NumPy array of the shape of `image`: 1..N in raster order of the seeds, 0 for background.

    Raises
    ------
    ValueError
        If the image is not 3D, is empty, or holds NaN, infinite or complex values, or an option is out of
        range.

    See Also
    --------
    label_distance_watershed : the same labels, block by block.

    Examples
    --------
    >>> image = np.zeros((7, 7, 14), np.uint8)
    >>> image[1:6, 1:6, 1:6] = image[3, 3, 6:8] = image[1:6, 1:6, 8:13] = 1  # two cubes, joined by a bridge
    >>> distance_watershed(image, threshold=0.5, limit=4)[3, 3]
    array([0, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 0], dtype=uint32)
    """
    check_image(image)
    shape: Triple = tuple(image.shape)
    whole = Box.whole(shape)
    labels: NDArray[np.uint32] = label_distance_watershed(
        image,
        outer=whole,
        core=whole,
        volume_shape=shape,
        sigma=sigma,
        threshold=threshold,
        seed_sigma=seed_sigma,
        spacing=spacing,
        limit=limit,
        max_steps=_steps(max_radius, whole),
    ).labels
    return labels


def _steps(max_radius: int | None, whole: Box) -> int:
    if max_radius is None:
        return whole.size  # no more steps than voxels
    if max_radius < 0:
        raise ValueError(f"max_radius must not be negative, got {max_radius}")
    return max_radius


def _context(context: int | None, max_steps: int) -> int:
    if context is None:
        return max(1, max_steps)
    _check_counts(context=(context, 1))
    return context


def _check_counts(**counts: tuple[int, int]) -> None:
    for name, (found, least) in counts.items():
        if found < least:
            raise ValueError(f"{name} must be at least {least}, got {found}")


def _check_stored(image: Any) -> None:
    if image.dtype.kind == "f":
        raise ValueError(
            f"a watershed floods whole numbers from 0 to {HIGHEST}, as a probability is stored: found "
            f"{image.dtype}; scale a fraction from 0 to 1 with np.round(image * {HIGHEST}).astype(np.uint16)"
        )
    if image.dtype not in (np.uint8, np.uint16, np.bool_):
        low, high = int(image.min()), int(image.max())
        if low < 0 or high > HIGHEST:
            raise ValueError(f"a watershed floods values from 0 to {HIGHEST}: found {low} to {high}")


def _shrink(box: Box, margin: int | Triple, volume_shape: Triple) -> Box:
    """Leave out a margin, except where the volume ends."""
    margins = (margin,) * 3 if isinstance(margin, int) else margin
    start = [a + m if a > 0 else 0 for a, m in zip(box.start, margins, strict=True)]
    stop = [b - m if b < n else n for b, m, n in zip(box.stop, margins, volume_shape, strict=True)]
    return Box((start[0], start[1], start[2]), (stop[0], stop[1], stop[2]))


def _continues(box: Box, volume_shape: Triple) -> Sides:
    (a, b, c), (d, e, f), (nz, ny, nx) = box.start, box.stop, volume_shape
    return (a > 0, b > 0, c > 0), (d < nz, e < ny, f < nx)


def _depth(squares: Any, limit: int) -> Any:
    """Scale distances to 0..65535: correctly rounded float64 operations, cut off to whole numbers."""
    xp = array_module(squares)
    if xp is np:
        depth = np.empty(squares.shape, np.uint16)
        _scale(squares, depth, limit)
        return depth
    return depth_generic(squares, limit)


def depth_generic(squares: Any, limit: int) -> Any:
    """Scale with array operations of either library: the same numbers as the compiled code's."""
    xp = array_module(squares)
    return (xp.sqrt(squares.astype(xp.float64)) / limit * HIGHEST).astype(xp.uint16)


@dataclass(frozen=True)
class _Flooded:
    """The flood of one block, where both rules for seeds end.

    Attributes
    ----------
    source
        int32 over `kept`: which of `seeds` a voxel's water comes from, negative for none.
    seeds
        int64, raster indices in `near`, ascending.
    complete
        Whether no water from outside `near` could reach `kept` first.
    growth_steps, stopped_by_bound
        As in `BlockLabels`.
    """

    source: NDArray[np.int32]
    seeds: NDArray[np.int64]
    complete: bool
    growth_steps: int
    stopped_by_bound: bool


def _flood_block(
    height: NDArray[np.uint16],
    foreground: NDArray[np.bool_],
    seeds: NDArray[np.int64],
    *,
    seeded: Box,
    near: Box,
    kept: Box,
    core: Box,
    volume_shape: Triple,
    max_steps: int,
) -> _Flooded:
    """Bound the foreground (of `seeded`) by steps from seeds (raster indices there); flood it in `near`."""
    position = np.unravel_index(seeds, seeded.shape)
    steps = np.zeros([n + 2 for n in seeded.shape], np.int32)  # a margin: no bounds checks; zeroed lazily
    waiting = _fill_waiting(np.ascontiguousarray(foreground), steps)
    seed_at = np.ravel_multi_index(tuple(p + 1 for p in position), steps.shape)
    queue = np.empty(waiting, np.int32 if steps.size < 2**31 else np.int64)
    offsets = flat_offsets(steps.shape)
    converged = _step(steps.reshape(-1), seed_at, queue, offsets, min(max_steps, _MOST_STEPS))
    in_core = np.array([core.start, core.stop]) - seeded.start + 1
    growth_steps, stopped = _last_step(steps, offsets, in_core, converged)
    mask = steps[1:-1, 1:-1, 1:-1][near.slices_in(seeded)] > 0
    del steps, queue

    position = tuple(p + a - b for p, a, b in zip(position, seeded.start, near.start, strict=True))
    inside = np.ones(len(seeds), np.bool_)
    for p, n in zip(position, near.shape, strict=True):
        inside &= (p >= 0) & (p < n)
    in_near = np.ravel_multi_index(tuple(p[inside] for p in position), near.shape).astype(np.int64)
    source = flood(height, mask, in_near, continues=_continues(near, volume_shape))[kept.slices_in(near)]
    complete = not bool((source == UNKNOWN).any())
    if not complete:
        # What is certain stays: it is so whatever lies outside, nothing included.
        source = flood(height, mask, in_near, continues=NOWHERE)[kept.slices_in(near)]
    return _Flooded(source, in_near, complete, growth_steps, stopped)


def _block_labels(
    flooded: _Flooded,
    labels: NDArray[np.uint32],
    foreground: NDArray[np.bool_],
    *,
    kept: Box,
    core: Box,
    **more: Any,
) -> BlockLabels:
    unlabelled = labels[core.slices_in(kept)] == 0
    return BlockLabels(
        labels=labels,
        kept=kept,
        growth_steps=flooded.growth_steps,
        stopped_by_bound=flooded.stopped_by_bound,
        foreground_voxels=int(np.count_nonzero(foreground)),
        unreached_voxels=int(np.count_nonzero(unlabelled & foreground)),
        **more,
    )


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _classify(  # pragma: no cover - compiled
    smooth: Any, threshold: Any, seed_threshold: Any, height: Any, foreground: Any, bright: Any
) -> None:
    """Round to heights, and compare with both thresholds."""
    nz, ny, nx = smooth.shape
    for z in range(nz):
        for y in range(ny):
            for x in range(nx):
                v = smooth[z, y, x]
                foreground[z, y, x] = v > threshold
                bright[z, y, x] = v > seed_threshold
                height[z, y, x] = np.uint16(min(np.rint(v), np.float32(HIGHEST)))


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _scale(squares: Any, depth: Any, limit: int) -> None:  # pragma: no cover - compiled
    nz, ny, nx = squares.shape
    for z in range(nz):
        for y in range(ny):
            for x in range(nx):
                d = squares[z, y, x]
                depth[z, y, x] = np.uint16(np.sqrt(np.float64(d)) / limit * HIGHEST) if d > 0 else 0


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _survey(labels: Any, n: int, before: Any, after: Any) -> tuple[Any, Any]:  # pragma: no cover - compiled
    """Count the voxels of each label, and tell whether it touches a side that the volume goes on beyond."""
    voxels = np.zeros(n, np.int64)
    leaves = np.zeros(n, np.bool_)
    nz, ny, nx = labels.shape
    for z in range(nz):
        open_z = (z == 0 and before[0]) or (z == nz - 1 and after[0])
        for y in range(ny):
            open_y = open_z or (y == 0 and before[1]) or (y == ny - 1 and after[1])
            row = labels[z, y]
            for x in range(nx):
                if row[x] != 0:
                    voxels[row[x] - 1] += 1
                    if open_y or (x == 0 and before[2]) or (x == nx - 1 and after[2]):
                        leaves[row[x] - 1] = True
    return voxels, leaves


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _seed_voxels(seed_of: Any, is_seed: Any) -> Any:  # pragma: no cover - compiled
    """Return the raster indices of the voxels of all seeds."""
    found = np.empty(1024, np.int64)
    n = 0
    nz, ny, nx = seed_of.shape
    for z in range(nz):
        for y in range(ny):
            row = seed_of[z, y]
            if n + nx > len(found):  # once a row: a check at every voxel is slow
                found = np.concatenate((found, np.empty(len(found) + nx, np.int64)))
            for x in range(nx):
                if row[x] != 0 and is_seed[row[x]]:
                    found[n] = (z * ny + y) * nx + x
                    n += 1
    return found[:n].copy()


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _fill_waiting(mask: Any, steps: Any) -> int:  # pragma: no cover - compiled
    """Mark the foreground in the padded array; return its number of voxels."""
    nz, ny, nx = mask.shape
    n = 0
    for z in range(nz):
        for y in range(ny):
            for x in range(nx):
                if mask[z, y, x]:
                    steps[z + 1, y + 1, x + 1] = _WAITING
                    n += 1
    return n


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _step(  # pragma: no cover - compiled
    steps: Any, seed_at: Any, queue: Any, offsets: Any, max_steps: int
) -> bool:
    """Count steps through the foreground from all seeds at once; return whether nothing is left to reach."""
    for q in range(len(seed_at)):
        queue[q] = seed_at[q]
        steps[seed_at[q]] = 1
    first, last = 0, len(seed_at)
    step = 0
    while last > first and step < max_steps:
        step += 1
        tail = last
        for q in range(first, last):
            at = queue[q]
            for o in offsets:
                if steps[at + o] == _WAITING:
                    steps[at + o] = step + 1
                    queue[tail] = at + o
                    tail += 1
        first, last = last, tail
    return last == first


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _last_step(  # pragma: no cover - compiled
    steps: Any, offsets: Any, core: Any, converged: bool
) -> tuple[int, bool]:
    """Most steps to a voxel of the core, and whether a voxel there would be reached by one step more."""
    flat = steps.reshape(-1)
    _, ny, nx = steps.shape
    most = 1
    stopped = False
    for z in range(core[0, 0], core[1, 0]):
        for y in range(core[0, 1], core[1, 1]):
            for x in range(core[0, 2], core[1, 2]):
                s = steps[z, y, x]
                most = max(most, s)
                if s == _WAITING and not stopped and not converged:
                    for o in offsets:
                        stopped |= flat[(z * ny + y) * nx + x + o] > 0
    return most - 1, stopped


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _number_cells(source: Any, cell_of_seed: Any, n_cells: int) -> tuple[Any, Any]:  # pragma: no cover
    """Turn sources into labels 1..n of the cells that occur; return which cells those are, too."""
    present = np.zeros(n_cells, np.bool_)
    nz, ny, nx = source.shape
    for z in range(nz):
        for y in range(ny):
            for x in range(nx):
                if source[z, y, x] >= 0:
                    present[cell_of_seed[source[z, y, x]]] = True
    number = np.cumsum(present)
    labels = np.zeros(source.shape, np.uint32)
    for z in range(nz):
        for y in range(ny):
            for x in range(nx):
                if source[z, y, x] >= 0:
                    labels[z, y, x] = number[cell_of_seed[source[z, y, x]]]
    return labels, present
