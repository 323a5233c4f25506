"""WNet3D over a volume: what a worker loads once, and how it walks through a region. Part of stage 2.

The network works in patches of one shape at fixed places of a global lattice, so that the probability of
a voxel is the same bits however the volume is cut for labelling.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from braincensus.config import WNet3DForeground
from braincensus.errors import InputError, explain
from braincensus.planning import LATTICE, Segmentation
from braincensus.stages.scaled import ScaledVolume
from braincensus.worker import device_slot, keep
from braincensus_kernels.boxes import Box
from braincensus_kernels.models.calibrate import NormStatistics
from braincensus_kernels.models.checkpoints import Weights, load_weights
from braincensus_kernels.models.predict import Predictor

NORM_STATISTICS = "norm_statistics"
"""Working file of the output in which the workers find the norms' statistics."""


@dataclass(frozen=True)
class Network:
    """A network's place in a run: small, and sent with every task; weights and statistics are not."""

    volume: ScaledVolume
    settings: WNet3DForeground
    segmentation: Segmentation
    weights_source: str
    weights_sha256: str
    device: str
    threads: int

    def foreground(self, core: Box) -> np.ndarray:
        """Return the foreground probability of a region, float32 in [0, 1]."""
        output = self.volume.output
        predictor = keep(
            "predictor",
            output.token,
            lambda: self.predictor(NormStatistics.from_arrays(output.read_work(NORM_STATISTICS))),
        )
        probability = np.empty(core.shape, dtype=np.float32)
        for patch in core.align(LATTICE).tiles(self.segmentation.patch):
            scaled = self.volume.network_input(patch.dilate(self.segmentation.halo))
            with device_slot:
                predicted = predictor.predict(scaled)
            inside = patch.intersect(core)
            probability[inside.slices_in(core)] = predicted[inside.slices_in(patch)]
        return probability

    def predictor(self, statistics: NormStatistics) -> Predictor:
        """Load the network onto this worker's device."""
        return Predictor(
            self.weights(),
            norm=self.settings.norm,
            statistics=statistics,
            halo_voxels=self.segmentation.halo,
            precision=self.segmentation.precision,
            device=self.device,
            threads=self.threads,
        )

    def weights(self) -> Weights:
        """Load the weights on this worker: from the package or a path, never sent with the tasks.

        Raises
        ------
        InputError
            If they are not those that the client saw.
        """
        weights = load_weights(self.weights_source)
        if weights.sha256 != self.weights_sha256:
            raise InputError(
                explain(
                    f"the weights {self.weights_source} differ between the client and a worker",
                    expected=f"SHA-256 {self.weights_sha256}",
                    found=f"SHA-256 {weights.sha256}",
                    cause="another version installed there, or a path that means another file there",
                    remedy="install the same version everywhere, or put the weights on a shared path",
                )
            )
        return weights
