"""A network trained with labels over a volume: SegResNet or SwinUNETR. Part of stage 2.

As `network.Network`, but for what the network takes: [0, 1] instead of [0, 100], and where its result
depends on all of a patch, every patch whole, also at the volume's far border, so that all are of one shape.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from braincensus.config import SupervisedForeground
from braincensus.planning import LATTICE
from braincensus.stages.network import Network, Predicts
from braincensus.worker import device_slot
from braincensus_kernels.boxes import Box
from braincensus_kernels.models.calibrate import NormStatistics
from braincensus_kernels.models.supervised.networks import (
    EXTENT_STEP,
    KINDS,
    SupervisedWeights,
    load_supervised,
)
from braincensus_kernels.models.supervised.norms import calibrate_norms
from braincensus_kernels.models.supervised.predict import SupervisedPredictor


@dataclass(frozen=True)
class SupervisedNetwork(Network):
    """A supervised network's place in a run."""

    model: str

    @property
    def extent_step(self) -> int:
        """Extents of what the network takes are multiples of this."""
        return next(EXTENT_STEP[kind] for kind in KINDS if kind == self.model)

    def patches(self, core: Box) -> Iterator[Box]:
        """Return the patches that cover a region, without their halo; they may leave the volume."""
        if self.model == "segresnet" and self.settings.norm == "calibrated":
            yield from super().patches(core)
            return
        z, y, x = self.segmentation.patch
        for tile in core.align(LATTICE).tiles(self.segmentation.patch):
            a, b, c = tile.start
            yield Box(tile.start, (a + z, b + y, c + x))

    def input(self, box: Box) -> np.ndarray:
        """Return the volume in [0, 1]."""
        scaled = self.volume.network_input(box, top=1.0)
        return np.clip(scaled, 0, 1, out=scaled)  # rounding may have left it by a bit

    def ready(self) -> Predicts:
        """Load the network, with the statistics that were set for the run, if any were."""
        return super().ready() if self.settings.norm == "calibrated" else self._predictor(None)

    def measure(self, windows: Sequence[Box]) -> NormStatistics:
        """Measure the norms' statistics over windows of the volume jointly."""
        batch = self.inputs(windows)
        weights = self._weights()
        with device_slot:
            return calibrate_norms(weights, batch, device=self.device, threads=self.threads)

    def predictor(self, statistics: NormStatistics) -> Predicts:
        """Load the network onto this worker's device."""
        return self._predictor(statistics)

    def _predictor(self, statistics: NormStatistics | None) -> SupervisedPredictor:
        assert isinstance(self.settings, SupervisedForeground)
        return SupervisedPredictor(
            self._weights(),
            norm=self.settings.norm,
            statistics=statistics,
            halo_voxels=self.segmentation.halo,
            precision=self.segmentation.precision,
            device=self.device,
            threads=self.threads,
        )

    def _weights(self) -> SupervisedWeights:
        weights = load_supervised(self.weights_source)
        self.check(weights.sha256)
        return weights
