"""What a run will do, decided before anything runs: grids, reach, memory, disk, time. Pure, no I/O.

Three grids, because three things decide them:

- the scan grid (intensity statistics) is fixed: its results are exact sums, any grid gives them;
- the segment grid follows the network's patches, which lie on a lattice fixed by the configuration,
  so that probabilities never depend on how labelling is cut up;
- the label grid is the user's `--block-size`, or what fits in a worker; its halo is the labeller's reach.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

from braincensus.blocks import BlockGrid
from braincensus.cluster import GIB, Resources
from braincensus.config import (
    IntensityForeground,
    RunConfig,
    SegResNetForeground,
    SupervisedForeground,
    SwinUNETRForeground,
    WNet3DForeground,
)
from braincensus.errors import PlanError, explain
from braincensus.labelling import Foreground, Labeller, foreground_for, labeller_for
from braincensus.volume import Volume
from braincensus_kernels.boxes import Triple

LATTICE = 8
"""Voxels between the positions at which tiles and network patches may start (the network pools thrice)."""

_SCAN_BLOCK = 256
_BLOCK_SIDES = (512, 384, 256, 192, 128, 96, 64)
_MOST_REGIONS = 20_000
_SHARE_OF_WORKER = 0.8
_PROCESS_BYTES = 700 * 1024**2  # a worker process with torch, numba and zarr loaded, before any block
_WINDOW = 64  # the original plugin's windows: 64 voxels, of which each contributes its middle 48
_WINDOW_HALO = 8

# Rates seen on a phantom of 1 GB, on 2 cores of a server of 2023: an estimate elsewhere, no promise.
_VOXELS_PER_CORE_SECOND = {
    "intensity": 20e6,
    "segment": 6e6,
    "threshold": 15e6,
    "label": 5e6,
    "relabel": 8e6,
    "pyramid": 9e6,
}
_MULTIPLY_ADDS_PER_CORE_SECOND = {"bfloat16": 60e9, "float32": 30e9}


@dataclass(frozen=True)
class Segmentation:
    """How the foreground model walks the volume: patch and halo in voxels, and its arithmetic."""

    patch: Triple
    halo: int
    channels: tuple[int, ...] | None
    precision: str


@dataclass(frozen=True)
class Plan:
    """Everything that is decided before a run starts.

    Attributes
    ----------
    scan_grid, segment_grid, label_grid
        The blocks of each kind of stage.
    scan_tasks
        Scan blocks in groups, each one task: a block itself, but in a large volume.
    labeller, foreground
        How a block is labelled, and how stored probability becomes what is labelled. The label grid's halo
        is the reach of both.
    memory_bytes
        Projected peak of one worker, by stage.
    disk_bytes
        Projected size of what each stage writes, compressed.
    seconds
        Estimated time of each stage.
    """

    volume: Volume
    config: RunConfig
    resources: Resources
    segmentation: Segmentation
    scan_grid: BlockGrid
    scan_tasks: BlockGrid
    segment_grid: BlockGrid
    label_grid: BlockGrid
    labeller: Labeller
    foreground: Foreground
    memory_bytes: dict[str, int]
    disk_bytes: dict[str, int]
    seconds: dict[str, float]

    @property
    def voxels(self) -> int:
        """Voxels of the volume."""
        return prod(self.volume.shape)

    @property
    def most_outer_voxels(self) -> int:
        """Largest block with its halo that one thread can label, where a flat maximum needs more halo."""
        free = self.resources.memory_bytes - _PROCESS_BYTES
        per_voxel = self.labeller.bytes_per_voxel
        return max(0, int(_SHARE_OF_WORKER * free / self.resources.threads / per_voxel))

    def check(self, *, free_disk_bytes: int | None = None) -> None:
        """Refuse a run that cannot fit, before anything is written.

        Raises
        ------
        PlanError
            If a stage needs more memory than a worker has (saying which block size would fit), or the
            output more disk than there is.
        """
        stage, need = max(self.memory_bytes.items(), key=lambda item: item[1])
        have = self.resources.memory_bytes
        if need > have:
            raise PlanError(
                explain(
                    f"{stage} does not fit in the memory of a worker",
                    expected=f"at most {gib(have)} for each of {self.resources.workers} worker(s) "
                    f"with {self.resources.threads} thread(s)",
                    found=f"{gib(need)} with blocks of {_text(self.label_grid.block_shape)} voxels "
                    f"and a halo of {_text(self.label_grid.halo)}",
                    remedy=self._memory_remedy(stage),
                )
            )
        total = sum(self.disk_bytes.values())
        if free_disk_bytes is not None and total > free_disk_bytes:
            raise PlanError(
                explain(
                    "the output does not fit on the disk",
                    expected=f"about {gib(total)} free",
                    found=f"{gib(free_disk_bytes)} free",
                    remedy="free some space, or write the output elsewhere",
                )
            )

    def _memory_remedy(self, stage: str) -> str:
        if stage == "segment":
            fewer = isinstance(self.config.foreground, SupervisedForeground)
            windows = "fewer foreground.calibration_windows, " if fewer else ""
            side = self._largest_patch()
            smaller = (
                f"foreground.patch_voxels: [{side}, {side}, {side}], the largest cube that fits"
                if side
                else "a smaller foreground.patch_voxels"
            )
            return (
                f"{smaller} (it is part of the result, so it is never chosen by free memory), {windows}"
                "fewer --workers, or more memory"
            )
        fits = [
            side
            for side in _BLOCK_SIDES
            if side < max(self.label_grid.block_shape)
            and _label_bytes(self._with_block(side), self.labeller, self.volume, self.resources)
            <= self.resources.memory_bytes
        ]
        if not fits:
            return "fewer threads per worker, a smaller max_radius_um or closing_radius_um, or more memory"
        return f"--block-size {fits[0]},{fits[0]},{fits[0]} fits"

    def _largest_patch(self) -> int | None:
        """Side of the largest cubic patch that fits a worker; None if none does, or the shape is not free."""
        foreground = self.config.foreground
        if isinstance(foreground, SwinUNETRForeground | IntensityForeground) or foreground.norm == "window":
            return None
        for side in range(max(self.segmentation.patch) - LATTICE, 0, -LATTICE):
            segmentation = replace(self.segmentation, patch=(side, side, side))
            grid = _segment_grid(segmentation, self.volume.shape)
            smaller = replace(self, segmentation=segmentation, segment_grid=grid)
            if _memory(smaller)["segment"] <= self.resources.memory_bytes:
                return side
        return None

    def _with_block(self, side: int) -> BlockGrid:
        return BlockGrid(self.volume.shape, _bounded(side, self.volume.shape), self.label_grid.halo)


def make_plan(
    volume: Volume,
    config: RunConfig,
    resources: Resources,
    *,
    channels: tuple[int, ...] | None,
    precision: str,
) -> Plan:
    """Decide the grids and project what they cost.

    Parameters
    ----------
    volume, config, resources
        What to run, how, and on what.
    channels
        Width of the network's levels, from its weights; None for a model without a network.
    precision
        The network's arithmetic, resolved for the device.
    """
    shape, size = volume.shape, volume.voxel_size_um
    labeller = labeller_for(config.labelling, size)
    foreground = foreground_for(config.labelling, size)
    segmentation = _segmentation(config.foreground, shape, channels=channels, precision=precision)
    label_grid = _label_grid(config, volume, resources, labeller, foreground)
    plan = Plan(
        volume=volume,
        config=config,
        resources=resources,
        segmentation=segmentation,
        scan_grid=BlockGrid(shape, _lattice_bounded(_SCAN_BLOCK, shape)),
        scan_tasks=_grouped(_lattice_bounded(_SCAN_BLOCK, shape), shape),
        segment_grid=_segment_grid(segmentation, shape),
        label_grid=label_grid,
        labeller=labeller,
        foreground=foreground,
        memory_bytes={},
        disk_bytes=_disk(volume),
        seconds={},
    )
    plan.memory_bytes.update(_memory(plan))
    plan.seconds.update(_seconds(plan))
    return plan


def _segmentation(
    foreground: WNet3DForeground | SupervisedForeground | IntensityForeground,
    shape: Triple,
    *,
    channels: tuple[int, ...] | None,
    precision: str,
) -> Segmentation:
    if isinstance(foreground, IntensityForeground):
        return Segmentation(_lattice_bounded(_SCAN_BLOCK, shape), 0, None, "float32")
    if isinstance(foreground, SwinUNETRForeground):  # one shape for all volumes: all of a patch counts
        return Segmentation(foreground.patch_voxels, foreground.halo_voxels, channels, precision)
    assert isinstance(foreground, WNet3DForeground | SegResNetForeground)
    if isinstance(foreground, WNet3DForeground) and foreground.norm == "window":
        side = _WINDOW - 2 * _WINDOW_HALO
        return Segmentation((side, side, side), _WINDOW_HALO, channels, precision)
    uneven = [n for n in foreground.patch_voxels if n % LATTICE]
    if uneven:
        raise PlanError(
            explain(
                "foreground.patch_voxels does not fit the network",
                expected=f"multiples of {LATTICE} (the network pools three times)",
                found=_text(foreground.patch_voxels),
                remedy=f"use {_text(tuple(-(-n // LATTICE) * LATTICE for n in foreground.patch_voxels))}",
            )
        )
    patch = tuple(
        min(n, -(-m // LATTICE) * LATTICE) for n, m in zip(foreground.patch_voxels, shape, strict=True)
    )
    return Segmentation((patch[0], patch[1], patch[2]), foreground.halo_voxels, channels, precision)


def _segment_grid(segmentation: Segmentation, shape: Triple) -> BlockGrid:
    """Group patches into regions (one task and one shard each), so that a large volume has few of them."""
    grid = _grouped(segmentation.patch, shape)
    return replace(grid, halo=(segmentation.halo,) * 3)


def _grouped(unit: Triple, shape: Triple) -> BlockGrid:
    """Return blocks of 1, 2 or 4 units along each axis: as few as it takes for a large volume."""
    for side in (1, 2, 4):
        grid = BlockGrid(shape, (unit[0] * side, unit[1] * side, unit[2] * side))
        if len(grid) <= _MOST_REGIONS:
            break
    return grid


def _label_grid(
    config: RunConfig, volume: Volume, resources: Resources, labeller: Labeller, foreground: Foreground
) -> BlockGrid:
    z, y, x = (a + b for a, b in zip(labeller.reach, foreground.reach, strict=True))
    halo = z, y, x
    wanted = config.compute.block_voxels
    if wanted is not None:
        block = tuple(min(n, m) for n, m in zip(wanted, volume.shape, strict=True))
        return BlockGrid(volume.shape, (block[0], block[1], block[2]), halo)
    at_once = resources.workers * resources.threads
    for side in _BLOCK_SIDES:
        grid = BlockGrid(volume.shape, _bounded(side, volume.shape), halo)
        busy = len(grid) >= 2 * at_once or side <= 128
        need = _label_bytes(grid, labeller, volume, resources)
        if busy and need <= _SHARE_OF_WORKER * resources.memory_bytes:
            return grid
    return BlockGrid(volume.shape, _bounded(_BLOCK_SIDES[-1], volume.shape), halo)


def _memory(plan: Plan) -> dict[str, int]:
    volume, threads = plan.volume, plan.resources.threads
    item = volume.dtype.itemsize
    scan = prod(plan.scan_grid.block_shape)
    region = prod(n + 2 * plan.segmentation.halo for n in plan.segment_grid.block_shape)
    segment = threads * region * (item + 4) + threads * prod(plan.segment_grid.block_shape) * 8
    if plan.segmentation.channels is not None:
        segment += _network_bytes(plan)
    return {
        "intensity": _PROCESS_BYTES + threads * scan * (item + 12),
        "segment": _PROCESS_BYTES + segment,
        "label": _label_bytes(plan.label_grid, plan.labeller, volume, plan.resources),
    }


def _network_bytes(plan: Plan) -> int:
    """Project what the network needs for a patch; or for all calibration windows, where they go at once."""
    from braincensus_kernels.models.predict import projected_bytes
    from braincensus_kernels.models.supervised.predict import projected_supervised_bytes

    patch, halo, channels = plan.segmentation.patch, plan.segmentation.halo, plan.segmentation.channels
    assert channels is not None
    foreground, precision = plan.config.foreground, plan.segmentation.precision
    if not isinstance(foreground, SegResNetForeground | SwinUNETRForeground):
        threads = plan.resources.threads
        return projected_bytes(patch, halo, channels, precision, threads=threads)
    kind, size = foreground.model, channels[0]
    z, y, x = (n + 2 * halo for n in patch)
    need = projected_supervised_bytes(kind, size, (z, y, x), precision=precision)
    if foreground.norm == "calibrated":
        window = (_WINDOW,) * 3
        windows = foreground.calibration_windows
        need = max(need, projected_supervised_bytes(kind, size, window, precision="float32", at_once=windows))
    return need


def _label_bytes(grid: BlockGrid, labeller: Labeller, volume: Volume, resources: Resources) -> int:
    """Project what the labeller holds of the outer box, and the raw core, for each thread."""
    outer = prod(
        min(b + 2 * h, n) for b, h, n in zip(grid.block_shape, grid.halo, grid.volume_shape, strict=True)
    )
    core = prod(grid.block_shape)
    return _PROCESS_BYTES + resources.threads * (
        outer * labeller.bytes_per_voxel + core * (volume.dtype.itemsize + 12)
    )


def _disk(volume: Volume) -> dict[str, int]:
    """Compressed: probability about 0.5 of its 2 bytes, labels about 0.15 of their 4, as on phantoms."""
    voxels = prod(volume.shape)
    copy = {"chunked copy of the input": volume.n_bytes} if volume.needs_copy else {}
    return copy | {
        "probability": int(voxels * 2 * 0.5 * 8 / 7),
        "labels": int(voxels * 4 * 0.15 * 8 / 7),
        "working files": int(voxels * 4 * 0.15 + voxels / LATTICE**3 * 8),
    }


def _seconds(plan: Plan) -> dict[str, float]:
    cores = plan.resources.workers * plan.resources.threads
    overlap = prod(
        (b + 2 * h) / b for b, h in zip(plan.label_grid.block_shape, plan.label_grid.halo, strict=True)
    )
    seconds = {name: plan.voxels / (rate * cores) for name, rate in _VOXELS_PER_CORE_SECOND.items()}
    seconds["label"] *= overlap
    if isinstance(plan.config.foreground, SupervisedForeground):
        patches = plan.voxels * prod((p + 2 * plan.segmentation.halo) / p for p in plan.segmentation.patch)
        seconds["segment"] = patches / (_supervised_voxels_per_core_second(plan) * cores)
    elif plan.segmentation.channels is not None:
        per_voxel = 1.009e6 * (plan.segmentation.channels[0] / 64) ** 2
        halo = prod((p + 2 * plan.segmentation.halo) / p for p in plan.segmentation.patch)
        rate = _MULTIPLY_ADDS_PER_CORE_SECOND.get(plan.segmentation.precision, 30e9) * cores
        seconds["segment"] = plan.voxels * per_voxel * min(halo, 2.5) / rate
    return seconds


def _supervised_voxels_per_core_second(plan: Plan) -> float:
    """As measured with the published sizes and the smallest ones."""
    assert plan.segmentation.channels is not None
    size = plan.segmentation.channels[0]
    if isinstance(plan.config.foreground, SegResNetForeground):
        return 0.45e6 * 8 / size
    return 0.1e6 / (1 + size / 24)


def _bounded(side: int, shape: Triple) -> Triple:
    return min(side, shape[0]), min(side, shape[1]), min(side, shape[2])


def _lattice_bounded(side: int, shape: Triple) -> Triple:
    z, y, x = (min(side, -(-n // LATTICE) * LATTICE) for n in shape)
    return z, y, x


def gib(n_bytes: float) -> str:
    """Write a number of bytes for people."""
    return f"{n_bytes / GIB:.1f} GiB" if n_bytes >= GIB / 10 else f"{n_bytes / 1024**2:.0f} MiB"


def _text(triple: tuple[int, ...]) -> str:
    return ",".join(str(n) for n in triple)
