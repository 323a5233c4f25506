"""Stage 2: foreground probability of every voxel, uint16 in the output's root array.

the volume in one range (scaled.py) -> norms set once (norms.py) -> the network, patch by patch (network.py,
                                                                supervised.py)
                                    -> or contrast to the local background
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from braincensus.blocks import BlockGrid
from braincensus.config import IntensityForeground
from braincensus.errors import InputError, explain
from braincensus.stages.intensity import IntensityRange
from braincensus.stages.scaled import ScaledVolume
from braincensus.stages.spared import Spared
from braincensus.store import Output, chunk_and_shard
from braincensus.tasks import Context
from braincensus_kernels.background import foreground_from_intensity
from braincensus_kernels.boxes import Box

if TYPE_CHECKING:
    from braincensus.stages.network import Network
    from braincensus_kernels.models.checkpoints import Weights
    from braincensus_kernels.models.supervised.networks import SupervisedWeights

PROBABILITY = "0"
DARK = "dark"
"""Working file: boxes that the foreground model skipped, for they are darker than anything that it sees;
int64, ``(n, 6)``: first voxel along z, y, x, and where they end."""
_CONTRAST_AT_ONCE = (128, 128, 128)
PROBABILITY_TOP = 65535
"""The stored value of probability 1."""


@dataclass(frozen=True)
class _Contrast:
    """The model without a network."""

    volume: ScaledVolume

    def foreground(self, core: Box) -> tuple[np.ndarray, list[Box], Spared]:
        """Return contrast to the local background as a probability, float32 in [0, 1], and dark parts."""
        probability = np.zeros(core.shape, np.float32)
        dark = []
        for part in core.tiles(_CONTRAST_AT_ONCE):
            if self.volume.is_below_background(part):
                dark.append(part)
                continue
            probability[part.slices_in(core)] = foreground_from_intensity(
                self.volume.read(part),
                self.volume.background(part),
                floor=self.volume.floor,
                median=self.volume.intensity.median,
                high=self.volume.intensity.high,
            )
        return probability, dark, Spared()


@dataclass(frozen=True)
class _Segment:
    grid: BlockGrid
    output: Output
    name: str
    model: Network | _Contrast


def run(
    context: Context, intensity: IntensityRange, weights: Weights | SupervisedWeights | None
) -> dict[str, Any]:
    """Segment the volume; returns what belongs in the provenance."""
    plan, output = context.plan, context.output
    chunk, shard = chunk_and_shard(plan.segment_grid.block_shape)
    output.create_array(PROBABILITY, shape=plan.volume.shape, dtype="uint16", chunk=chunk, shard=shard)
    about: dict[str, Any] = {"model": plan.config.foreground.model}
    with context.stage("segment", plan.voxels):
        model: Network | _Contrast
        if not isinstance(plan.config.foreground, IntensityForeground):
            from braincensus.stages import norms  # and with it torch, which no other run waits for

            assert weights is not None
            model = norms.network_of(context, intensity, weights)
            about |= norms.set_and_tell(context, model, intensity)
        else:
            model = _Contrast(ScaledVolume.of(context, intensity))
        spec = _Segment(plan.segment_grid, output, plan.config.foreground.model, model)
        dark = [np.empty((0, 6), np.int64)]
        spared = Spared()
        for _, (boxes, more) in context.map(
            "segment", _segment_region, spec, plan.segment_grid, name="segment-region", classes=(Spared,)
        ):
            dark.append(boxes)
            spared += more
        about["dark"] = _list_dark(output, np.concatenate(dark))
    if spared != Spared():
        about["gpu_out_of_memory"] = asdict(spared)
        context.progress.message(
            f"the GPU had too little memory for {spared.sparing + spared.on_cpu:,} patches: "
            f"{spared.sparing:,} were done more slowly, {spared.on_cpu:,} on the CPU; smaller ones need less "
            "(foreground.patch_voxels, which is part of the result)"
        )
    return about


def _list_dark(output: Output, boxes: np.ndarray) -> dict[str, Any]:
    """Keep where nothing was to be seen; returns how much that is."""
    boxes = boxes[np.lexsort(boxes.T[::-1])]
    output.write_map(DARK, boxes)
    return {"parts": len(boxes), "voxels": int(np.prod(boxes[:, 3:] - boxes[:, :3], axis=1).sum())}


def _segment_region(spec: _Segment, number: int) -> tuple[np.ndarray, Spared]:
    core = spec.grid[number].core
    probability, dark, spared = spec.model.foreground(core)
    bad = np.count_nonzero(~np.isfinite(probability))
    if bad:  # as integers they would look like any other probability
        raise InputError(
            explain(
                f"the foreground model {spec.name} gave probabilities that are not numbers",
                expected="0 to 1",
                found=f"{bad:,} of {probability.size:,} in one region",
                cause="weights of a training that went wrong, or an arithmetic that they do not stand",
                remedy="other weights, or foreground.precision: float32",
            )
        )
    stored = np.rint(probability * np.float32(PROBABILITY_TOP)).astype(np.uint16)
    spec.output.write_block(PROBABILITY, core, stored)
    boxes = [box.intersect(core) for box in dark]
    return np.array([[*box.start, *box.stop] for box in boxes], np.int64).reshape(-1, 6), spared
