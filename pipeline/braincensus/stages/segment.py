"""Stage 2: foreground probability of every voxel, uint16 in the output's root array.

The network works in patches of one shape at fixed places of a global lattice, so that the
probability of a voxel is the same bits however the volume is cut for labelling. At the volume's
true border the input is mirrored; that, too, depends on nothing but the volume.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from braincensus.blocks import BlockGrid
from braincensus.config import IntensityForeground, WNet3DForeground
from braincensus.errors import InputError, explain
from braincensus.planning import LATTICE, Segmentation
from braincensus.stages.intensity import TILE_MEDIAN, IntensityRange, Window, tiles_of
from braincensus.store import Output, chunk_and_shard
from braincensus.tasks import Context
from braincensus.volume import Volume
from braincensus.worker import device_slot, keep
from braincensus_kernels.background import (
    background_reach_tiles,
    foreground_from_intensity,
    local_background,
)
from braincensus_kernels.boxes import Box, Triple
from braincensus_kernels.models.calibrate import NormStatistics, calibrate
from braincensus_kernels.models.checkpoints import Weights, load_weights
from braincensus_kernels.models.predict import Predictor

PROBABILITY = "0"
PROBABILITY_TOP = 65535
"""The stored value of probability 1."""
NORM_STATISTICS = "norm_statistics"

_INPUT_TOP = np.float32(100.0)  # the paper's input range, chosen to suit SoftNCuts' intensity sigma


@dataclass(frozen=True)
class _Segment:
    volume: Volume
    grid: BlockGrid
    output: Output
    segmentation: Segmentation
    intensity: IntensityRange
    foreground: WNet3DForeground | IntensityForeground
    background_um: float | None
    weights_source: str
    weights_sha256: str
    device: str
    threads: int


def run(context: Context, intensity: IntensityRange, weights: Weights | None) -> dict[str, Any]:
    """Segment the volume; returns what belongs in the provenance."""
    plan = context.plan
    grid, foreground = plan.segment_grid, plan.config.foreground
    spec = _Segment(
        volume=plan.volume,
        grid=grid,
        output=context.output,
        segmentation=plan.segmentation,
        intensity=replace(intensity, windows=()),
        foreground=foreground,
        background_um=plan.config.intensity.background_um,
        weights_source=weights.source if weights else "",
        weights_sha256=weights.sha256 if weights else "",
        device=plan.resources.device,
        threads=plan.resources.threads,
    )
    chunk, shard = chunk_and_shard(grid.block_shape)
    context.output.create_array(
        PROBABILITY, shape=plan.volume.shape, dtype="uint16", chunk=chunk, shard=shard
    )
    about: dict[str, Any] = {"model": foreground.model}
    with context.stage("segment", plan.voxels):
        if isinstance(foreground, WNet3DForeground):
            assert weights is not None
            chosen = _choose_windows(intensity, foreground)
            one = BlockGrid((1, 1, 1), (1, 1, 1))
            ((_, (statistics, reach)),) = context.map(
                "segment", _calibrate, (spec, tuple(chosen)), one, name="calibrate-norms"
            )
            context.output.write_work(NORM_STATISTICS, statistics.to_arrays())
            about |= {
                "norm": foreground.norm,
                "weights": weights.source,
                "weights_sha256": weights.sha256,
                "precision": plan.segmentation.precision,
                "patch_voxels": list(plan.segmentation.patch),
                "halo_voxels": plan.segmentation.halo,
                "reach_voxels": reach,
                "calibration_windows": [list(window.start) for window in chosen],
                "foreground_class": int(statistics.foreground_class),
            }
            if reach is not None and reach > plan.segmentation.halo:
                context.progress.message(
                    f"these weights look {reach} voxels far, foreground.halo_voxels is "
                    f"{plan.segmentation.halo}: the same for any blocks, but not quite what one endless "
                    "patch would give"
                )
        for _ in context.map(
            "segment",
            _segment_region,
            spec,
            grid,
            name="segment-region",
        ):
            pass
    return about


def _choose_windows(intensity: IntensityRange, foreground: WNet3DForeground) -> list[Box]:
    """Choose calibration windows: seeded, among the quarter with most standing out of bright tissue.

    Norms calibrated on windows from anywhere would see mostly empty tissue and find cells in it.
    """
    usable = [w for w in intensity.windows if w.tissue >= max(intensity.tissue_threshold, 0.0)]
    if not usable:  # tissue in patches smaller than a window: the windows with most of it
        usable = sorted(intensity.windows, key=lambda w: (-w.tissue, w.box))[: foreground.calibration_windows]
    ranked: list[Window] = sorted(usable, key=lambda w: (-w.excess, w.box))
    best = ranked[: max(foreground.calibration_windows, len(ranked) // 4)]
    if len(best) <= foreground.calibration_windows:
        return sorted(w.box for w in best)
    rng = np.random.default_rng(foreground.calibration_seed)
    picked = rng.choice(len(best), size=foreground.calibration_windows, replace=False)
    return sorted(best[i].box for i in picked)


def _calibrate(task: tuple[_Segment, tuple[Box, ...]], _: int) -> tuple[NormStatistics, int | None]:
    """Return the norms' statistics over all windows, and how far the network then looks (None: all of it)."""
    spec, windows = task
    assert isinstance(spec.foreground, WNet3DForeground)
    side = tuple(-(-n // LATTICE) * LATTICE for n in windows[0].shape)
    batch = [
        _network_input(spec, Box(w.start, (w.start[0] + side[0], w.start[1] + side[1], w.start[2] + side[2])))
        for w in windows
    ]
    weights = _weights(spec)
    with device_slot:
        statistics = calibrate(weights, np.stack(batch)[:, None], device=spec.device, threads=spec.threads)
    if spec.foreground.norm == "window":
        return statistics, None
    return statistics, _predictor(spec, weights, statistics).reach_voxels


def _segment_region(spec: _Segment, number: int) -> None:
    core = spec.grid[number].core
    if isinstance(spec.foreground, IntensityForeground):
        probability = _intensity_foreground(spec, core)
    else:
        probability = _network_foreground(spec, core)
    stored = np.rint(probability * np.float32(PROBABILITY_TOP)).astype(np.uint16)
    spec.output.write_block(PROBABILITY, core, stored)


def _network_foreground(spec: _Segment, core: Box) -> np.ndarray:
    predictor = keep("predictor", spec.output.token, lambda: _load_predictor(spec))
    halo = spec.segmentation.halo
    probability = np.empty(core.shape, dtype=np.float32)
    for patch in core.align(LATTICE).tiles(spec.segmentation.patch):
        scaled = _network_input(spec, patch.dilate(halo))
        with device_slot:
            predicted = predictor.predict(scaled)
        inside = patch.intersect(core)
        probability[inside.slices_in(core)] = predicted[inside.slices_in(patch)]
    return probability


def _load_predictor(spec: _Segment) -> Predictor:
    statistics = NormStatistics.from_arrays(spec.output.read_work(NORM_STATISTICS))
    return _predictor(spec, _weights(spec), statistics)


def _predictor(spec: _Segment, weights: Weights, statistics: NormStatistics) -> Predictor:
    assert isinstance(spec.foreground, WNet3DForeground)
    return Predictor(
        weights,
        norm=spec.foreground.norm,
        statistics=statistics,
        halo_voxels=spec.segmentation.halo,
        precision=spec.segmentation.precision,
        device=spec.device,
        threads=spec.threads,
    )


def _weights(spec: _Segment) -> Weights:
    """Load the weights on this worker: from the package or a path, never sent with the tasks."""
    weights = load_weights(spec.weights_source)
    if weights.sha256 != spec.weights_sha256:
        raise InputError(
            explain(
                f"the weights {spec.weights_source} differ between the client and a worker",
                expected=f"SHA-256 {spec.weights_sha256}",
                found=f"SHA-256 {weights.sha256}",
                cause="another version installed there, or a path that means another file there",
                remedy="install the same version everywhere, or put the weights on a shared path",
            )
        )
    return weights


def _network_input(spec: _Segment, box: Box) -> np.ndarray:
    """Read `box`, which may leave the volume (mirrored there), as float32 in [0, 100]."""
    inside, index = _mirrored_box(box, spec.volume.shape)
    intensity = spec.intensity
    low, high = np.float32(intensity.low), np.float32(intensity.high)
    scaled = intensity.scale.quantise(spec.volume.read(inside)).astype(np.float32)
    if spec.background_um is not None:
        scaled *= np.float32(intensity.median) / np.maximum(_background(spec, inside), _floor(intensity))
    np.clip(scaled, low, high, out=scaled)
    scaled -= low
    scaled *= _INPUT_TOP / (high - low)
    return np.ascontiguousarray(scaled[np.ix_(*index)])


def _mirrored_box(box: Box, shape: Triple) -> tuple[Box, list[np.ndarray]]:
    """Return the voxels that `box` needs and, for each axis, which of them to take (mirrored outside)."""
    positions = [_mirrored(np.arange(a, b), n) for a, b, n in zip(box.start, box.stop, shape, strict=True)]
    start = [int(p.min()) for p in positions]
    stop = [int(p.max()) + 1 for p in positions]
    inside = Box((start[0], start[1], start[2]), (stop[0], stop[1], stop[2]))
    return inside, [p - s for p, s in zip(positions, start, strict=True)]


def _mirrored(position: np.ndarray, extent: int) -> np.ndarray:
    """Reflect positions outside ``0..extent-1`` back inside, without repeating the border voxel."""
    if extent == 1:
        return np.zeros_like(position)
    period = 2 * (extent - 1)
    folded = np.abs(position) % period
    mirrored: np.ndarray = np.minimum(folded, period - folded)
    return mirrored


def _intensity_foreground(spec: _Segment, core: Box) -> np.ndarray:
    intensity = spec.intensity
    if spec.background_um is None:
        background = np.full(core.shape, intensity.median, dtype=np.float32)
    else:
        background = _background(spec, core)
    return foreground_from_intensity(
        intensity.scale.quantise(spec.volume.read(core)).astype(np.float32),
        background,
        floor=_floor(intensity),
        median=intensity.median,
        high=intensity.high,
    )


def _background(spec: _Segment, box: Box) -> np.ndarray:
    """Local background of tissue at every voxel of `box`, from the tile medians of the first stage."""
    assert spec.background_um is not None
    z, y, x = (spec.background_um / (LATTICE * size) for size in spec.volume.voxel_size_um)
    margin = background_reach_tiles((z, y, x))
    tiles = tiles_of(box).dilate(margin).clip(tiles_of(spec.volume.box).shape)
    return local_background(
        spec.output.read_block(TILE_MEDIAN, tiles),
        tiles=tiles,
        box=box,
        volume_shape=spec.volume.shape,
        sigma_tiles=(z, y, x),
        tissue_threshold=spec.intensity.tissue.threshold,
        floor=spec.intensity.median,
    )


def _floor(intensity: IntensityRange) -> float:
    """Return the least background to divide by: what tissue at its darkest may have."""
    return max(intensity.tissue_threshold, intensity.low, 1.0)
