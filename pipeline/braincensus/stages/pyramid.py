"""Stage 8: the coarser levels of probability and labels, each from the stored level below."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Literal

from braincensus.blocks import BlockGrid
from braincensus.store import Output, PyramidLevel, chunk_and_shard, downsample_region, plan_pyramid
from braincensus.tasks import Context
from braincensus_kernels.boxes import Triple

_REGION, _SMALL_REGION = 256, 128
_FEW = 64

Method = Literal["mean", "nearest"]


@dataclass(frozen=True)
class _Pyramid:
    grid: BlockGrid
    output: Output
    group: str
    level: int
    method: Method


def run(context: Context) -> tuple[PyramidLevel, ...]:
    """Write every coarser level; returns all levels, full resolution first."""
    volume = context.plan.volume
    levels = plan_pyramid(volume.shape, volume.voxel_size_um)
    images: tuple[tuple[str, Method], ...] = (("", "mean"), ("labels/cells", "nearest"))
    with context.stage("pyramid", len(images) * sum(prod(level.shape) for level in levels[1:])):
        for level, (group, method) in product(range(1, len(levels)), images):
            shape = levels[level].shape
            side = _region(shape)
            grid = BlockGrid(shape, side)
            finest = context.output.array(f"{group}/0".lstrip("/"))
            chunk, shard = chunk_and_shard(side)
            context.output.create_array(
                f"{group}/{level}".lstrip("/"), shape=shape, dtype=finest.dtype.name, chunk=chunk, shard=shard
            )
            spec = _Pyramid(grid, context.output, group, level, method)
            name, after = ("pyramid-labels", "relabel") if group else ("pyramid-image", "segment")
            for _ in context.map("pyramid", _downsample, spec, grid, name=f"{name}-{level}", after=after):
                pass
    return levels


def _region(shape: Triple) -> Triple:
    """Choose what one task makes of a level: a few large regions would leave most workers without one.

    Examples
    --------
    >>> _region((3000, 4000, 2000)), _region((512, 512, 512)), _region((90, 200, 200))
    ((256, 256, 256), (128, 128, 128), (90, 128, 128))
    """
    large, small = (
        (min(side, shape[0]), min(side, shape[1]), min(side, shape[2])) for side in (_REGION, _SMALL_REGION)
    )
    return small if len(BlockGrid(shape, large)) < _FEW else large


def _downsample(spec: _Pyramid, number: int) -> None:
    downsample_region(spec.output, spec.group, spec.level, spec.grid[number].core, method=spec.method)
