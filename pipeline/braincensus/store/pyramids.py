"""Coarser levels of an image: planned as values, then made region by region from the level below."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from braincensus.store.ome_metadata import TripleFloat, grid_origin_um
from braincensus_kernels.boxes import Box, Triple

if TYPE_CHECKING:
    from braincensus.store.container import Output

Method = Literal["mean", "nearest"]

_SLAB_PLANES = 32  # planes of the coarser level made at once: bounds memory, and reads whole chunks


@dataclass(frozen=True, slots=True)
class PyramidLevel:
    """One resolution of a multiscale image.

    Attributes
    ----------
    shape
        Voxels, zyx.
    factors
        Voxels of the level below that one voxel covers on each axis: 1 or 2; (1, 1, 1) for level 0.
    scale_um
        Spacing of its voxels.
    translation_um
        Centre of its first voxel; that of level 0 is the origin.
    """

    shape: Triple
    factors: Triple
    scale_um: TripleFloat
    translation_um: TripleFloat


def plan_pyramid(
    shape: Triple, voxel_size_um: TripleFloat, *, smallest: int = 64
) -> tuple[PyramidLevel, ...]:
    """Plan the levels of an image, full resolution first.

    From level to level the axes with the finest voxels are halved (those within a factor of sqrt(2)
    of the finest), so that voxels become isotropic, until no axis has more than twice `smallest`
    voxels. Axes of fewer than `smallest` voxels are left alone.

    Examples
    --------
    >>> [(level.shape, level.scale_um) for level in plan_pyramid((200, 1000, 800), (5.0, 1.0, 1.0))]
    ... # doctest: +NORMALIZE_WHITESPACE
    [((200, 1000, 800), (5.0, 1.0, 1.0)), ((200, 500, 400), (5.0, 2.0, 2.0)),
     ((200, 250, 200), (5.0, 4.0, 4.0)), ((100, 125, 100), (10.0, 8.0, 8.0))]
    """
    levels = [PyramidLevel(shape, (1, 1, 1), voxel_size_um, (0.0, 0.0, 0.0))]
    while any(n > 2 * smallest for n in levels[-1].shape):
        levels.append(_coarser(levels[-1], voxel_size_um, smallest))
    return tuple(levels)


def _coarser(level: PyramidLevel, voxel_size_um: TripleFloat, smallest: int) -> PyramidLevel:
    can_halve = [n >= smallest for n in level.shape]
    finest = min(size for size, can in zip(level.scale_um, can_halve, strict=True) if can)
    z, y, x = (
        2 if can and size <= finest * sqrt(2) else 1
        for size, can in zip(level.scale_um, can_halve, strict=True)
    )
    shape = -(-level.shape[0] // z), -(-level.shape[1] // y), -(-level.shape[2] // x)
    scale = level.scale_um[0] * z, level.scale_um[1] * y, level.scale_um[2] * x
    return PyramidLevel(shape, (z, y, x), scale, grid_origin_um(scale, voxel_size_um))


def downsample_region(output: Output, group: str, level: int, box: Box, *, method: Method) -> None:
    """Make one region of a coarser level from the stored level below it.

    Parameters
    ----------
    output
        The output; both levels must have been created.
    group
        Where the image is: "" for the root, "labels/cells".
    level
        The level to write, 1 or more.
    box
        The region, in voxels of that level: whole shards.
    method
        ``mean``, of the voxels that exist (fewer at an odd border), integers rounded half up;
        ``nearest``, one of the (two, where halved) nearest voxels: the upper on odd levels, the lower on
        even ones, so that the shift of half a voxel does not add up from level to level.

    Raises
    ------
    OutputError
        If the level below cannot be read, or this one cannot be written.
    """
    source_name, target_name = (f"{group}/{n}".lstrip("/") for n in (level - 1, level))
    source, target = output.array(source_name), output.array(target_name)
    factors = _factors(source.shape, target.shape, names=(source_name, target_name))
    result = np.empty(box.shape, dtype=target.dtype)
    for slab in box.tiles((_SLAB_PLANES, box.shape[1], box.shape[2])):
        below = Box(
            (slab.start[0] * factors[0], slab.start[1] * factors[1], slab.start[2] * factors[2]),
            (slab.stop[0] * factors[0], slab.stop[1] * factors[1], slab.stop[2] * factors[2]),
        ).clip((source.shape[0], source.shape[1], source.shape[2]))
        values = output.read_block(source_name, below)
        upper = level % 2 == 1
        coarse = mean(values, factors) if method == "mean" else nearest(values, factors, upper=upper)
        result[slab.slices_in(box)] = coarse
    output.write_block(target_name, box, result)


def _factors(source: tuple[int, ...], target: tuple[int, ...], *, names: tuple[str, str]) -> Triple:
    factors = [1 if a == b else 2 for a, b in zip(source, target, strict=True)]
    if any(-(-a // f) != b for a, b, f in zip(source, target, factors, strict=True)):
        raise ValueError(f"{names[1]} {target} is not {names[0]} {source} halved on some axes (rounding up)")
    return factors[0], factors[1], factors[2]


def mean(values: np.ndarray, factors: Triple) -> np.ndarray:
    """Average groups of `factors` voxels; groups cut by the end average what they have.

    Integers are averaged exactly and rounded half up; floats are summed in float64.

    Examples
    --------
    >>> mean(np.array([[[1, 2, 5]]], dtype=np.uint16), (1, 1, 2))
    array([[[2, 5]]], dtype=uint16)
    """
    kind = values.dtype.kind
    if kind not in "uf":
        raise TypeError(
            f"the mean level of a {values.dtype} image is not defined here: unsigned or float only"
        )
    wide: Any = np.float64 if kind == "f" else np.uint32 if values.dtype.itemsize <= 2 else np.uint64
    if kind == "u" and values.dtype.itemsize == 8:
        raise TypeError("the exact mean of uint64 voxels does not fit in 64 bits")
    total: np.ndarray = values
    count: Any = wide(1)
    for axis, factor in enumerate(factors):
        if factor == 1:
            continue
        extent = total.shape[axis]
        lower = total[_every_second(axis, 0)].astype(wide)
        upper = total[_every_second(axis, 1)]
        lower[_first(axis, upper.shape[axis])] += upper
        total = lower
        members = np.full(lower.shape[axis], 2, dtype=wide)
        if extent % 2:
            members[-1] = 1
        count = count * members.reshape([-1 if i == axis else 1 for i in range(3)])
    if kind == "f":
        return np.asarray(total / count, dtype=values.dtype)
    return np.asarray((total + count // 2) // count, dtype=values.dtype)


def nearest(values: np.ndarray, factors: Triple, *, upper: bool) -> np.ndarray:
    """Take the lower or upper voxel of each pair along the halved axes; a pair cut by the end has its lower.

    Examples
    --------
    >>> nearest(np.array([[[1, 2, 5]]], dtype=np.uint32), (1, 1, 2), upper=True)
    array([[[2, 5]]], dtype=uint32)
    """
    for axis, factor in enumerate(factors):
        if factor == 1:
            continue
        extent = values.shape[axis]
        index = np.minimum(np.arange(int(upper), extent + int(upper), 2), extent - 1)
        values = np.take(values, index, axis=axis)
    return values


def _every_second(axis: int, first: int) -> tuple[slice, ...]:
    return tuple(slice(first, None, 2) if i == axis else slice(None) for i in range(3))


def _first(axis: int, n: int) -> tuple[slice, ...]:
    return tuple(slice(0, n) if i == axis else slice(None) for i in range(3))
