"""Axis-aligned boxes of voxels: the one way that positions are passed around.

A box is half-open, in voxels of the whole volume, axes ``zyx``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from math import prod

Triple = tuple[int, int, int]


@dataclass(frozen=True, slots=True, order=True)
class Box:
    """The voxels ``start <= index < stop`` on each of the axes ``zyx``.

    Examples
    --------
    >>> core = Box((0, 0, 64), (64, 64, 128))
    >>> core.shape
    (64, 64, 64)
    >>> core.dilate(8).clip((100, 100, 100))
    Box(start=(0, 0, 56), stop=(72, 72, 100))
    """

    start: Triple
    stop: Triple

    def __post_init__(self) -> None:
        if any(b < a for a, b in zip(self.start, self.stop, strict=True)):
            raise ValueError(f"a box must not end before it starts: start {self.start}, stop {self.stop}")

    @classmethod
    def whole(cls, shape: Triple) -> Box:
        """Return the box of a whole volume of this shape."""
        return cls((0, 0, 0), shape)

    @property
    def shape(self) -> Triple:
        """Extent in voxels."""
        (a, b, c), (d, e, f) = self.start, self.stop
        return d - a, e - b, f - c

    @property
    def size(self) -> int:
        """Number of voxels."""
        return prod(self.shape)

    @property
    def slices(self) -> tuple[slice, slice, slice]:
        """Index of this box in an array of the whole volume."""
        (a, b, c), (d, e, f) = self.start, self.stop
        return slice(a, d), slice(b, e), slice(c, f)

    def slices_in(self, outer: Box) -> tuple[slice, slice, slice]:
        """Index of this box in an array that holds the voxels of `outer`.

        Raises
        ------
        ValueError
            If this box is not inside `outer`.
        """
        if not outer.contains(self):
            raise ValueError(f"{self} is not inside {outer}")
        return self.shift((-outer.start[0], -outer.start[1], -outer.start[2])).slices

    def contains(self, other: Box) -> bool:
        """Whether every voxel of `other` is in this box."""
        return all(a <= b for a, b in zip(self.start, other.start, strict=True)) and all(
            a >= b for a, b in zip(self.stop, other.stop, strict=True)
        )

    def shift(self, offset: Triple) -> Box:
        """Move the box by an offset in voxels."""
        (a, b, c), (d, e, f), (i, j, k) = self.start, self.stop, offset
        return Box((a + i, b + j, c + k), (d + i, e + j, f + k))

    def dilate(self, margin: int | Triple) -> Box:
        """Grow by `margin` voxels on both sides of each axis; may leave the volume (see `clip`)."""
        i, j, k = (margin, margin, margin) if isinstance(margin, int) else margin
        (a, b, c), (d, e, f) = self.start, self.stop
        return Box((a - i, b - j, c - k), (d + i, e + j, f + k))

    def clip(self, shape: Triple) -> Box:
        """Keep the part inside a volume of this shape; empty where there is none."""
        return self.intersect(Box.whole(shape))

    def intersect(self, other: Box) -> Box:
        """Return the common voxels; a box of size 0 where there are none."""
        start = [max(a, b) for a, b in zip(self.start, other.start, strict=True)]
        stop = [max(s, min(a, b)) for s, a, b in zip(start, self.stop, other.stop, strict=True)]
        return Box((start[0], start[1], start[2]), (stop[0], stop[1], stop[2]))

    def align(self, lattice: int) -> Box:
        """Grow outwards to multiples of `lattice`; may leave the volume (see `clip`)."""
        lo = [a // lattice * lattice for a in self.start]
        hi = [-(-b // lattice) * lattice for b in self.stop]
        return Box((lo[0], lo[1], lo[2]), (hi[0], hi[1], hi[2]))

    def tiles(self, shape: Triple) -> Iterator[Box]:
        """Cut into boxes of at most this shape, from `start`, in raster order (z slowest)."""
        steps = [range(a, b, s) for a, b, s in zip(self.start, self.stop, shape, strict=True)]
        for z, y, x in product(*steps):
            yield Box((z, y, x), (z + shape[0], y + shape[1], x + shape[2])).intersect(self)
