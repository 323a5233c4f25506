"""Voronoi-Otsu labelling: of a whole array, and of one block of a volume with the same result.

    blur (spots, outlines) -> foreground by threshold -> seeds -> growth through the foreground

A block is labelled from the voxels of its `outer` box, and keeps its core and one voxel around it:

    outer                                          voxels given
      exact   outer less the spot blur's radius    where the spot blur is known
        near  kept, dilated by the growth bound    where seeds and foreground matter
          kept    core, dilated by 1               labels given back: exact
            core                                   labels that are this block's own

All boxes are clipped to the volume. Growth moves one voxel a step, so seeds and foreground matter within
`max_steps` of `kept`; finding them needs the blurs there, and one voxel more of the spot blur:
:func:`reach_voxels` is the sum. Ties go to the larger label, and seeds are numbered in raster order, which
within a block is the raster order of the volume: local numbers break ties as the volume's do. So the labels
of `kept` are those of the whole volume, if the seeds are (see the module `seeds`).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from braincensus_kernels.backend import to_numpy
from braincensus_kernels.block_labels import BlockLabels
from braincensus_kernels.boxes import Box, Triple
from braincensus_kernels.filters import Sigma, as_sigmas, blur_radii, gaussian_blur
from braincensus_kernels.growth import Growth, grow
from braincensus_kernels.histogram import OTSU_BINS, count_values, otsu_threshold
from braincensus_kernels.seeds import SeedRule, Seeds, find_seeds


def reach_voxels(spot_sigma: Sigma, outline_sigma: Sigma, max_steps: int) -> Triple:
    """Return how many voxels around a core its labels depend on, per axis (z, y, x).

    Parameters
    ----------
    spot_sigma, outline_sigma
        Standard deviations in voxels, one or per axis.
    max_steps
        Bound of growth.

    Examples
    --------
    >>> reach_voxels(0.65, 0.65, 10)
    (14, 14, 14)
    >>> reach_voxels((0.5, 2, 2), 1, 10)
    (15, 20, 20)
    """
    spot, outline = blur_radii(spot_sigma), blur_radii(outline_sigma)
    z, y, x = (max_steps + max(s + 1, o) + 1 for s, o in zip(spot, outline, strict=True))
    return z, y, x


def label_block(
    image: Any,
    *,
    outer: Box,
    core: Box,
    volume_shape: Triple,
    spot_sigma: Sigma,
    outline_sigma: Sigma,
    threshold: float,
    seeds: SeedRule,
    max_steps: int,
) -> BlockLabels:
    """Label one block of a volume as a part of that volume.

    Parameters
    ----------
    image
        Voxels of `outer`: real, finite, NumPy or CuPy (uint8, uint16 and float32 are read as they are).
    outer
        Box that holds `core` and :func:`reach_voxels` around it, clipped to the volume; more is allowed.
    core
        Box of this block's own voxels; not empty.
    volume_shape
        Shape of the whole volume: at its border the blur continues the outermost voxels.
    spot_sigma, outline_sigma
        Standard deviations in voxels, one or per axis (z, y, x).
    threshold
        Foreground is where the outline blur, float32, is greater.
    seeds
        ``"plateau"``: one seed per flat maximum; ``"strict"``: flat maxima give none.
    max_steps
        Bound of growth; each step is one voxel.

    Raises
    ------
    ValueError
        If `outer` is too small or does not fit the image, the core is empty, or the image is not real and
        finite, or an option is out of range.
    """
    spot_sigmas = as_sigmas(spot_sigma, name="spot_sigma")
    outline_sigmas = as_sigmas(outline_sigma, name="outline_sigma")
    _check_image(image)
    if not np.isfinite(threshold):
        raise ValueError(f"the threshold must be finite, got {threshold}")
    if max_steps < 0:
        raise ValueError(f"max_steps must not be negative, got {max_steps}")
    if core.size == 0 or not Box.whole(volume_shape).contains(core):
        raise ValueError(f"the core must hold voxels of the volume of shape {volume_shape}: got {core}")
    needed = core.dilate(reach_voxels(spot_sigmas, outline_sigmas, max_steps)).clip(volume_shape)
    if not (outer.contains(needed) and Box.whole(volume_shape).contains(outer)):
        raise ValueError(
            f"labels of {core} depend on {needed}\n  expected: an outer box that holds it, in the volume "
            f"of shape {volume_shape}\n  found: {outer}"
        )

    kept = core.dilate(1).clip(volume_shape)
    near = kept.dilate(max_steps).clip(volume_shape)
    exact = _where_exact(outer, blur_radii(spot_sigmas), volume_shape)
    spots = gaussian_blur(image, outer=outer, inner=exact, volume_shape=volume_shape, sigma=spot_sigmas)
    if spot_sigmas == outline_sigmas:
        outline = spots[near.slices_in(exact)]
    else:
        outline = gaussian_blur(
            image, outer=outer, inner=near, volume_shape=volume_shape, sigma=outline_sigmas
        )
    mask = outline > np.float32(threshold)
    del outline
    found = find_seeds(spots, mask, exact=exact, near=near, volume_shape=volume_shape, rule=seeds)
    del spots
    grown = grow(mask, found.index, near=near, kept=kept, core=core, max_steps=max_steps)
    return _block_labels(grown, found, near=near, kept=kept, volume_shape=volume_shape)


def voronoi_otsu(
    image: Any,
    spot_sigma: Sigma,
    outline_sigma: Sigma,
    *,
    seeds: SeedRule = "plateau",
    threshold: float | None = None,
    max_radius: int | None = None,
) -> Any:
    """Label the cells of a whole 3D array.

    Parameters
    ----------
    image
        Intensity or foreground probability, axes zyx: real, finite, not empty, NumPy or CuPy.
    spot_sigma
        Blur before seeds are found, voxels, one number or one per axis (z, y, x); larger: fewer cells.
    outline_sigma
        Blur before the outline is thresholded, likewise.
    seeds
        ``"plateau"``: one seed per flat maximum, its voxel of smallest raster index; ``"strict"``: only
        voxels greater than all their 26 neighbours, as clEsperanto has it (saturated cells are lost).
    threshold
        Foreground is where the outline blur is greater; None: Otsu's threshold of the outline blur.
    max_radius
        Growth steps at most: cells extend no farther than this many voxels from their seed; None: unbounded.

    Returns
    -------
    uint32 array of the shape of `image`: 1..N in raster order of the seeds, 0 for background.

    Raises
    ------
    ValueError
        If the image is not 3D, is empty, or holds NaN, infinite or complex values, or an option is out of
        range.

    See Also
    --------
    label_block : the same labels, block by block.

    Notes
    -----
    Matches ``pyclesperanto.voronoi_otsu_labeling`` (0.25.1) voxel for voxel, up to numbering, with
    ``seeds="strict"``. A constant image has no cells.

    Examples
    --------
    >>> image = np.zeros((5, 5, 12), np.float32)
    >>> image[2, 2, 3] = image[2, 2, 8] = 1
    >>> labels = voronoi_otsu(image, 0.65, 0.65)
    >>> int(labels.max()), int(labels[2, 2, 3]), int(labels[2, 2, 8])
    (2, 1, 2)
    """
    spot_sigmas = as_sigmas(spot_sigma, name="spot_sigma")
    outline_sigmas = as_sigmas(outline_sigma, name="outline_sigma")
    _check_image(image)
    if threshold is not None and not np.isfinite(threshold):
        raise ValueError(f"the threshold must be finite, got {threshold}")
    if max_radius is not None and max_radius < 0:
        raise ValueError(f"max_radius must not be negative, got {max_radius}")

    shape: Triple = tuple(image.shape)
    whole = Box.whole(shape)
    outline = gaussian_blur(image, outer=whole, inner=whole, volume_shape=shape, sigma=outline_sigmas)
    if threshold is None:
        low, high = float(outline.min()), float(outline.max())
        threshold = otsu_threshold(
            count_values(outline, minimum=low, maximum=high, bins=OTSU_BINS), low, high
        )
    if spot_sigmas == outline_sigmas:
        spots = outline
    else:
        spots = gaussian_blur(image, outer=whole, inner=whole, volume_shape=shape, sigma=spot_sigmas)
    mask = outline > np.float32(threshold)
    found = find_seeds(spots, mask, exact=whole, near=whole, volume_shape=shape, rule=seeds)
    del outline, spots
    steps = whole.size if max_radius is None else max_radius  # no more steps than voxels
    return grow(mask, found.index, near=whole, kept=whole, core=whole, max_steps=steps).labels


def _check_image(image: Any) -> None:
    if image.ndim != 3:
        raise ValueError(
            f"Voronoi-Otsu labels 3D arrays, axes zyx: got {image.ndim} axes, shape {tuple(image.shape)}"
        )
    if image.size == 0:
        raise ValueError(f"the image is empty: shape {tuple(image.shape)}")
    if image.dtype.kind not in "buif":
        raise ValueError(f"the image must be real, got {image.dtype}")
    if image.dtype.kind == "f":
        # The extremes tell of NaN too, without an array of flags.
        low, high = float(image.min()), float(image.max())
        limit = float(np.finfo(np.float32).max)
        if not (-limit <= low <= high <= limit):
            raise ValueError(f"the image holds NaN or values beyond float32: from {low} to {high}")


def _where_exact(outer: Box, radii: Triple, volume_shape: Triple) -> Box:
    """Shrink by the blur radius, except where the volume ends."""
    start = [a + r if a > 0 else 0 for a, r in zip(outer.start, radii, strict=True)]
    stop = [b - r if b < n else n for b, r, n in zip(outer.stop, radii, volume_shape, strict=True)]
    return Box((start[0], start[1], start[2]), (stop[0], stop[1], stop[2]))


def _block_labels(grown: Growth, found: Seeds, *, near: Box, kept: Box, volume_shape: Triple) -> BlockLabels:
    local = to_numpy(found.index)[grown.seeds]
    position = np.unravel_index(local, near.shape)
    seeds = np.ravel_multi_index(
        tuple(p + o for p, o in zip(position, near.start, strict=True)), volume_shape
    ).astype(np.int64)
    return BlockLabels(
        labels=grown.labels,
        kept=kept,
        seeds=seeds,
        growth_steps=grown.steps,
        stopped_by_bound=grown.stopped_by_bound,
        foreground_voxels=grown.foreground_voxels,
        unreached_voxels=grown.unreached_voxels,
        complete=found.complete,
    )
