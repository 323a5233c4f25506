"""Connected components: cells are the 26-connected sets of foreground voxels, however large.

    blur -> foreground by threshold -> components of a block -> joined across faces, in stitching

A component has no bound, so a block knows only its part of it: it labels its core and one voxel around it
(`kept`), and calls each component by the smallest voxel that it sees there. The halo is the blur's radius
and one voxel more, whatever the size of the cells.

Why stitching is exact. Whether a voxel is foreground is the same in every block (see the module `filters`).
Two blocks that both have a foreground voxel in `kept` call it by two voxels of one component: every labelled
voxel is an anchor (see the module `block_labels`). Let u and v be neighbours and foreground. In one core,
they have one label there. In two, those cores meet in a face, an edge or a corner, and each block has both
voxels in its `kept`; so has each block that lies between the two across an edge or a corner. Faces are
compared over the whole cross-section of `kept`, so going from block to block over faces joins all numbers
of u and v: union-find over those pairs joins a whole component, and never two. The smallest number of such a
set is the component's first voxel: that voxel is in some core, and there it is the smallest that is seen.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from braincensus_kernels.backend import array_module, is_cupy, ndimage_module, to_numpy
from braincensus_kernels.block_labels import BlockLabels
from braincensus_kernels.boxes import Box, Triple
from braincensus_kernels.filters import Sigma, as_sigmas, blur_radii, gaussian_blur


def reach_voxels(sigma: Sigma) -> Triple:
    """Return how many voxels around a core its labels depend on, per axis (z, y, x).

    Parameters
    ----------
    sigma
        Standard deviation of the blur in voxels, one or per axis.

    Examples
    --------
    >>> reach_voxels(0)
    (1, 1, 1)
    >>> reach_voxels((0.5, 1, 1))
    (3, 5, 5)
    """
    z, y, x = (radius + 1 for radius in blur_radii(sigma))
    return z, y, x


def label_components(
    image: Any, *, outer: Box, core: Box, volume_shape: Triple, sigma: Sigma, threshold: float
) -> BlockLabels:
    """Label one block of a volume; stitching by its anchors gives the components of that volume.

    Parameters
    ----------
    image
        Voxels of `outer`: real, finite, NumPy or CuPy.
    outer
        Box that holds `core` and :func:`reach_voxels` around it, clipped to the volume; more is allowed,
        and changes nothing.
    core
        Box of this block's own voxels; not empty.
    volume_shape
        Shape of the whole volume: at its border the blur continues the outermost voxels.
    sigma
        Standard deviation of the blur in voxels, one or per axis (z, y, x); 0 for none.
    threshold
        Foreground is where the blur, float32, is greater.

    Returns
    -------
    Labels whose identities are the smallest voxels seen in `kept`, all voxels of them anchors; always
    complete.

    Raises
    ------
    ValueError
        If `outer` is too small or does not fit the image, the core is empty, or the image is not real and
        finite, or an option is out of range.
    """
    sigmas = as_sigmas(sigma)
    check_image(image)
    check_threshold(threshold)
    check_block(core, outer, reach=reach_voxels(sigmas), volume_shape=volume_shape)
    kept = core.dilate(1).clip(volume_shape)
    smooth = gaussian_blur(image, outer=outer, inner=kept, volume_shape=volume_shape, sigma=sigmas)
    mask = smooth > np.float32(threshold)
    del smooth
    labels, first = number_components(mask)
    anchors = to_numpy(mask)
    return BlockLabels(
        labels=labels,
        kept=kept,
        seeds=index_in_volume(first, kept, volume_shape),
        growth_steps=0,
        stopped_by_bound=False,
        foreground_voxels=int(np.count_nonzero(anchors[core.slices_in(kept)])),
        unreached_voxels=0,
        complete=True,
        anchors=anchors,
    )


def connected_components(image: Any, threshold: float, *, sigma: Sigma = 0.0) -> Any:
    """Label the 26-connected components of a whole 3D array.

    Parameters
    ----------
    image
        Intensity or foreground probability, axes zyx: real, finite, not empty, NumPy or CuPy.
    threshold
        Foreground is where the blur is greater. (CellSeg3D's `binary_connected` takes 0.5 of a
        probability from 0 to 1.)
    sigma
        Blur before the threshold, voxels, one number or one per axis (z, y, x); 0, as in CellSeg3D: none.

    Returns
    -------
    uint32 array of the shape of `image`: 1..N in raster order of the first voxel of each component, 0 for
    background.

    Raises
    ------
    ValueError
        If the image is not 3D, is empty, or holds NaN, infinite or complex values, or an option is out of
        range.

    See Also
    --------
    label_components : the same labels, block by block.

    Examples
    --------
    >>> connected_components(np.array([[[9, 9, 0, 7, 0]], [[0, 0, 9, 0, 0]], [[5, 0, 0, 0, 8]]]), 4)[:, 0]
    array([[1, 1, 0, 1, 0],
           [0, 0, 1, 0, 0],
           [2, 0, 0, 0, 3]], dtype=uint32)
    """
    sigmas = as_sigmas(sigma)
    check_image(image)
    check_threshold(threshold)
    shape: Triple = tuple(image.shape)
    whole = Box.whole(shape)
    smooth = gaussian_blur(image, outer=whole, inner=whole, volume_shape=shape, sigma=sigmas)
    return number_components(smooth > np.float32(threshold))[0]


def number_components(mask: Any) -> tuple[Any, NDArray[np.int64]]:
    """Label the 26-connected components of a mask, in raster order of their first voxels.

    Parameters
    ----------
    mask
        Boolean, 3D, not empty; NumPy or CuPy.

    Returns
    -------
    labels
        uint32, 1..n, 0 where the mask is False; of the library of the mask.
    first
        int64 ``(n,)``, host memory, ascending: raster index of the first voxel of label i + 1.
    """
    if is_cupy(mask):
        return number_components_generic(mask)
    labels = np.zeros(mask.shape, np.uint32)  # lazily: costs nothing where no page has foreground
    first = _label_runs(np.ascontiguousarray(mask), labels)
    return labels, first


def number_components_generic(mask: Any) -> tuple[Any, NDArray[np.int64]]:
    """Label with array operations of either library: the same labels as the compiled code's."""
    xp = array_module(mask)
    labels, n = ndimage_module(mask).label(mask, structure=xp.ones((3, 3, 3), xp.int32))
    # The smallest raster index of each component: sorted by component, then index, it comes first.
    members = xp.flatnonzero(labels)
    keys = xp.sort(labels.reshape(-1)[members].astype(xp.int64) * labels.size + members)
    leads = xp.ones(len(keys), xp.bool_)
    leads[1:] = keys[1:] // labels.size != keys[:-1] // labels.size
    component, first = keys[leads] // labels.size, keys[leads] % labels.size
    order = xp.argsort(first)
    number = xp.zeros(int(n) + 1, xp.uint32)
    number[component[order]] = xp.arange(1, len(first) + 1, dtype=xp.uint32)
    return number[labels], to_numpy(first[order]).astype(np.int64, copy=False)


def index_in_volume(index: NDArray[np.int64], box: Box, volume_shape: Triple) -> NDArray[np.int64]:
    """Return the raster indices in the volume of voxels given by raster indices in a box."""
    position = np.unravel_index(index, box.shape)
    in_volume = tuple(p + o for p, o in zip(position, box.start, strict=True))
    return np.ravel_multi_index(in_volume, volume_shape).astype(np.int64, copy=False)


def check_image(image: Any) -> None:
    """Refuse what cannot be labelled: arrays not 3D, empty, not real, not finite in float32."""
    if image.ndim != 3:
        raise ValueError(
            f"only 3D arrays are labelled, axes zyx: got {image.ndim} axes, shape {tuple(image.shape)}"
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


def check_threshold(threshold: float, *, name: str = "threshold") -> None:
    """Refuse a threshold that is NaN or infinite."""
    if not np.isfinite(threshold):
        raise ValueError(f"the {name} must be finite, got {threshold}")


def check_block(core: Box, outer: Box, *, reach: Triple, volume_shape: Triple) -> None:
    """Refuse an empty core, and an outer box without the voxels that labels of the core depend on."""
    if core.size == 0 or not Box.whole(volume_shape).contains(core):
        raise ValueError(f"the core must hold voxels of the volume of shape {volume_shape}: got {core}")
    needed = core.dilate(reach).clip(volume_shape)
    if not (outer.contains(needed) and Box.whole(volume_shape).contains(outer)):
        raise ValueError(
            f"labels of {core} depend on {needed}\n  expected: an outer box that holds it, in the volume "
            f"of shape {volume_shape}\n  found: {outer}"
        )


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _label_runs(mask: Any, labels: Any) -> Any:  # pragma: no cover - compiled
    """Join the runs of foreground in rows; write labels in raster order; return their first voxels.

    A run is known by its number in raster order, and a set of runs by its smallest: its first voxel is the
    component's.
    """
    nz, ny, nx = mask.shape
    begin, end, parent = np.empty(1024, np.int64), np.empty(1024, np.int64), np.empty(1024, np.int64)
    row_at = np.zeros(nz * ny + 1, np.int64)  # number of the first run of each row
    n = 0
    for z in range(nz):
        for y in range(ny):
            row = mask[z, y]
            if n + nx // 2 + 1 > len(begin):
                more = len(begin) + nx
                begin = np.concatenate((begin, np.empty(more, np.int64)))
                end = np.concatenate((end, np.empty(more, np.int64)))
                parent = np.concatenate((parent, np.empty(more, np.int64)))
            here = n
            x = 0
            while x < nx:
                if row[x]:
                    begin[n] = x
                    while x < nx and row[x]:
                        x += 1
                    end[n] = x
                    parent[n] = n
                    n += 1
                x += 1
            line = z * ny + y
            row_at[line + 1] = n
            if n == here:
                continue
            if y > 0:
                _join_rows(begin, end, parent, row_at[line - 1], here, here, n)
            if z > 0:
                for b in range(max(y - 1, 0), min(y + 2, ny)):
                    above = line - ny - y + b
                    _join_rows(begin, end, parent, row_at[above], row_at[above + 1], here, n)

    number = np.empty(n, np.uint32)
    first = np.empty(n, np.int64)
    met = 0
    for line in range(nz * ny):
        for run in range(row_at[line], row_at[line + 1]):
            if parent[run] == run:
                first[met] = line * nx + begin[run]
                met += 1
                number[run] = met
            else:
                # Parents precede their children, so what the parent has is final.
                number[run] = number[parent[run]]
            labels[line // ny, line % ny, begin[run] : end[run]] = number[run]
    return first[:met].copy()


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _join_rows(  # pragma: no cover - compiled
    begin: Any, end: Any, parent: Any, above: int, above_stop: int, here: int, here_stop: int
) -> None:
    """Join the runs of two neighbouring rows that touch, over corners, too."""
    while above < above_stop and here < here_stop:
        if begin[above] <= end[here] and begin[here] <= end[above]:
            a, b = above, here
            while parent[a] != a:
                parent[a] = parent[parent[a]]
                a = parent[a]
            while parent[b] != b:
                parent[b] = parent[parent[b]]
                b = parent[b]
            if a < b:
                parent[b] = a
            else:
                parent[a] = b
        if end[above] < end[here]:
            above += 1
        else:
            here += 1
