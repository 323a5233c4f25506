"""Statistics of the network's norms, set once for the whole volume. Part of stage 2, before any region.

    candidate windows of stage 1 -> a seeded choice -> one joint forward pass -> statistics for all workers

Or those that the weights bring along: the same for every volume of a study, whatever is in it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from braincensus.blocks import BlockGrid
from braincensus.config import SupervisedForeground, WNet3DForeground
from braincensus.stages.intensity import IntensityRange, Window
from braincensus.stages.network import NORM_STATISTICS, Network
from braincensus.stages.scaled import ScaledVolume
from braincensus.stages.supervised import SupervisedNetwork
from braincensus.tasks import Context
from braincensus_kernels.boxes import Box
from braincensus_kernels.models.calibrate import NormStatistics, stored_calibration
from braincensus_kernels.models.checkpoints import Weights
from braincensus_kernels.models.sparing import let_go, out_of_memory
from braincensus_kernels.models.supervised.networks import SupervisedWeights


@dataclass(frozen=True)
class Calibration:
    """What the norms were set to, on which windows (none: stored), and how far the network then looks."""

    statistics: NormStatistics
    windows: tuple[Box, ...]
    reach_voxels: int | None
    """None: norms are taken per window, of which a voxel sees all."""
    on_cpu: bool = False
    """Whether the GPU had too little memory for it."""

    def summary(self) -> dict[str, Any]:
        """Give what belongs in the provenance."""
        return {
            "calibration": "volume" if self.windows else "stored",
            "calibration_windows": [list(window.start) for window in self.windows],
            "reach_voxels": self.reach_voxels,
            **({"calibrated_on_cpu": True} if self.on_cpu else {}),
            "foreground_class": int(self.statistics.foreground_class),
        }


def network_of(context: Context, intensity: IntensityRange, weights: Weights | SupervisedWeights) -> Network:
    """Put together what the workers need of the network."""
    plan, settings = context.plan, context.plan.config.foreground
    assert isinstance(settings, WNet3DForeground | SupervisedForeground)
    place: dict[str, Any] = {
        "volume": ScaledVolume.of(context, intensity),
        "settings": settings,
        "segmentation": plan.segmentation,
        "weights_source": weights.source,
        "weights_sha256": weights.sha256,
        "device": plan.resources.device,
        "threads": plan.resources.threads,
        "may_use_cpu": plan.resources.device != "cpu" and plan.config.compute.device == "auto",
    }
    if isinstance(settings, SupervisedForeground):
        return SupervisedNetwork(**place, model=settings.model)
    return Network(**place)


def set_and_tell(context: Context, network: Network, intensity: IntensityRange) -> dict[str, Any]:
    """Set the norms before any region; returns what belongs in the provenance, and says what looks odd."""
    halo = network.segmentation.halo
    about = {
        "norm": network.settings.norm,
        "weights": network.weights_source,
        "weights_sha256": network.weights_sha256,
        "precision": network.segmentation.precision,
        "patch_voxels": list(network.segmentation.patch),
        "halo_voxels": halo,
    }
    if isinstance(network, SupervisedNetwork) and network.settings.norm == "window":
        return about | {"reach_voxels": None}
    calibration = set_norms(context, network, intensity)
    reach = calibration.reach_voxels
    if reach is not None and reach > halo:
        context.progress.message(
            f"these weights look {reach} voxels far, foreground.halo_voxels is {halo}: the same for any "
            "blocks, but not quite what one endless patch would give"
        )
    if isinstance(network, SupervisedNetwork) and calibration.statistics.foreground_class == 0:
        context.progress.message(
            "on the calibration windows the network's foreground is darker than the rest: are these weights "
            "for such volumes?"
        )
    return about | calibration.summary()


def set_norms(
    context: Context, network: Network, intensity: IntensityRange, *, stage: str = "segment"
) -> Calibration:
    """Calibrate on one worker, or take what the weights bring; leave the statistics for all of them."""
    settings = network.settings
    stored = isinstance(settings, WNet3DForeground) and settings.calibration == "stored"
    windows = () if stored else tuple(_choose(intensity, settings))
    one = BlockGrid((1, 1, 1), (1, 1, 1))
    classes = (Calibration, NormStatistics, Box)
    ((_, calibration),) = context.map(
        stage, _calibrate, (network, windows), one, name="calibrate-norms", classes=classes
    )
    context.output.write_work(NORM_STATISTICS, calibration.statistics.to_arrays())
    return calibration


def _choose(intensity: IntensityRange, foreground: WNet3DForeground | SupervisedForeground) -> list[Box]:
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


def _calibrate(task: tuple[Network, tuple[Box, ...]], _: int) -> Calibration:
    network, windows = task
    on_cpu = False
    if windows:
        step = network.extent_step
        z, y, x = (-(-n // step) * step for n in windows[0].shape)
        boxes = [Box(w.start, (w.start[0] + z, w.start[1] + y, w.start[2] + x)) for w in windows]
        statistics, on_cpu = _measure(network, boxes)
    else:
        stored = stored_calibration(network.weights())
        assert stored is not None, "the client has looked"
        statistics = stored
    calibrated = network.settings.norm == "calibrated"
    reach = network.predictor(statistics).reach_voxels if calibrated else None
    return Calibration(statistics, windows, reach, on_cpu)


def _measure(network: Network, windows: list[Box]) -> tuple[NormStatistics, bool]:
    """Measure on the worker's device, or on the CPU where that has too little memory; say whether."""
    try:
        return network.measure(windows), False
    except RuntimeError as err:
        if not out_of_memory(err):
            raise
    if not network.may_use_cpu:
        raise MemoryError("not enough memory for the calibration windows together")
    let_go()
    return replace(network, device="cpu").measure(windows), True
