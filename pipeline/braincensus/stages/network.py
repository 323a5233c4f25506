"""A network over a volume: what a worker loads once, and how it walks through a region. Part of stage 2.

The network works in patches of one shape at fixed places of a global lattice, so that the probability of
a voxel is the same bits however the volume is cut for labelling. `Network` is WNet3D; what differs for the
networks trained with labels is in supervised.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from dask.system import CPU_COUNT

from braincensus.config import SupervisedForeground, WNet3DForeground
from braincensus.errors import InputError, explain
from braincensus.planning import LATTICE, Segmentation
from braincensus.stages.scaled import ScaledVolume
from braincensus.stages.spared import Spared
from braincensus.worker import device_slot, keep
from braincensus_kernels.boxes import Box
from braincensus_kernels.models.calibrate import NormStatistics, calibrate
from braincensus_kernels.models.checkpoints import Weights, load_weights
from braincensus_kernels.models.predict import Predictor
from braincensus_kernels.models.sparing import ELSEWHERE, SPARING, predict_sparing
from braincensus_kernels.models.stream import predict_ahead

NORM_STATISTICS = "norm_statistics"
"""Working file of the output in which the workers find the norms' statistics."""


class Predicts(Protocol):
    """A network on a device."""

    halo_voxels: int
    """Context that it takes around a patch."""

    @property
    def reach_voxels(self) -> int | None:
        """How far it looks; None: as far as the patch goes."""

    def predict(self, patch: np.ndarray) -> np.ndarray:
        """Return the foreground probability of a patch without its halo."""

    def economise(self) -> None:
        """Give back the memory that only makes it faster, from now on."""


def _predict_all(predictor: Predicts, inputs: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """Predict patch after patch; the next is read meanwhile, and the device is held only while it works."""
    if isinstance(predictor, Predictor):
        return predictor.predict_all(inputs, slot=device_slot)
    return predict_ahead(predictor.predict, inputs, slot=device_slot)


def _paste(predicted: np.ndarray, patch: Box, probability: np.ndarray, core: Box) -> None:
    """Copy what of a patch lies in the region."""
    inside = patch.intersect(core)
    probability[inside.slices_in(core)] = predicted[inside.slices_in(patch)]


def _always(patch: np.ndarray) -> Callable[[int], np.ndarray]:
    return lambda _: patch


@dataclass(frozen=True)
class Network:
    """A network's place in a run: small, and sent with every task; weights and statistics are not."""

    volume: ScaledVolume
    settings: WNet3DForeground | SupervisedForeground
    segmentation: Segmentation
    weights_source: str
    weights_sha256: str
    device: str
    threads: int
    may_use_cpu: bool
    """Whether a patch may go to the CPU for which the GPU has too little memory (compute.device: auto)."""

    def foreground(self, core: Box) -> tuple[np.ndarray, list[Box], Spared]:
        """Return the foreground probability of a region, its dark patches, and those short of memory.

        Probability is float32 in [0, 1].
        A dark patch is known to be 0 everywhere before it is read. What the network makes of such a patch is
        found out once for each shape: the bits are those that it would have given here.
        """
        predictor = keep("predictor", self.volume.output.token, self.ready)
        of_dark = keep("of_dark", self.volume.output.token, dict)
        probability = np.empty(core.shape, dtype=np.float32)
        bright: list[Box] = []
        dark: list[Box] = []
        for patch in self.patches(core):
            (dark if self.volume.is_dark(patch.dilate(predictor.halo_voxels)) else bright).append(patch)
        ways: Counter[str] = Counter()
        for patch in dark:
            if patch.shape not in of_dark:
                nothing = np.zeros(patch.dilate(predictor.halo_voxels).shape, np.float32)
                ((of_dark[patch.shape], how),) = self._predicted(predictor, 1, _always(nothing))
                ways[how] += 1
            _paste(of_dark[patch.shape], patch, probability, core)
        found = self._predicted(
            predictor,
            len(bright),
            lambda number: self.input(bright[number].dilate(predictor.halo_voxels)),
        )
        for patch, (predicted, how) in zip(bright, found, strict=True):
            _paste(predicted, patch, probability, core)
            ways[how] += 1
        return probability, dark, Spared(ways[SPARING], ways[ELSEWHERE])

    def _predicted(
        self, predictor: Predicts, patches: int, read: Callable[[int], np.ndarray]
    ) -> Iterator[tuple[np.ndarray, str]]:
        return predict_sparing(
            predictor,
            patches,
            read,
            predict_all=lambda inputs: _predict_all(predictor, inputs),
            elsewhere=self._on_cpu if self.may_use_cpu else None,
        )

    def _on_cpu(self) -> Callable[[np.ndarray], np.ndarray]:
        """Load the network on the CPU beside the one on the GPU."""
        predictor = keep("predictor on cpu", self.volume.output.token, replace(self, device="cpu").ready)

        def predict(patch: np.ndarray) -> np.ndarray:
            with device_slot:
                return predictor.predict(patch)

        return predict

    @property
    def extent_step(self) -> int:
        """Extents of what the network takes are multiples of this."""
        return LATTICE

    def patches(self, core: Box) -> Iterator[Box]:
        """Return the patches that cover a region, without their halo."""
        return core.align(LATTICE).tiles(self.segmentation.patch)

    def input(self, box: Box) -> np.ndarray:
        """Return the volume as the network takes it."""
        return self.volume.network_input(box)

    def ready(self) -> Predicts:
        """Load the network, with the statistics that were set for the run."""
        return self.predictor(NormStatistics.from_arrays(self.volume.output.read_work(NORM_STATISTICS)))

    def measure(self, windows: Sequence[Box]) -> NormStatistics:
        """Measure the norms' statistics over windows of the volume jointly."""
        batch = self.inputs(windows)
        weights = self.weights()
        with device_slot:
            return calibrate(weights, batch, device=self.device, threads=self.threads_alone)

    def inputs(self, windows: Sequence[Box]) -> np.ndarray:
        """Return windows of one shape as the network takes them: float32, (K, 1, z, y, x)."""
        with ThreadPoolExecutor(min(len(windows), self.threads_alone)) as threads:
            return np.stack(list(threads.map(self.input, windows)))[:, None]

    @property
    def threads_alone(self) -> int:
        """CPU threads for what all workers wait for: those of the machine, or as many as its limits allow."""
        return max(self.threads, int(CPU_COUNT))

    def predictor(self, statistics: NormStatistics) -> Predicts:
        """Load the network onto this worker's device.

        It takes no more context than it looks at. That gives the same bits: a patch is cropped to it first.
        """
        assert isinstance(self.settings, WNet3DForeground)
        halo, weights = self.segmentation.halo, self.weights()
        while True:
            predictor = Predictor(
                weights,
                norm=self.settings.norm,
                statistics=statistics,
                halo_voxels=halo,
                precision=self.segmentation.precision,
                device=self.device,
                threads=self.threads,
            )
            enough = -(-predictor.reach_voxels // LATTICE) * LATTICE
            if self.settings.norm == "window" or enough >= halo:
                return predictor
            halo = enough

    def weights(self) -> Weights:
        """Load the weights on this worker: from the package or a path, never sent with the tasks.

        Raises
        ------
        InputError
            If they are not those that the client saw.
        """
        weights = load_weights(self.weights_source)
        self.check(weights.sha256)
        return weights

    def check(self, sha256: str) -> None:
        """Compare the weights found here with those that the client saw.

        Raises
        ------
        InputError
            If they differ.
        """
        if sha256 != self.weights_sha256:
            raise InputError(
                explain(
                    f"the weights {self.weights_source} differ between the client and a worker",
                    expected=f"SHA-256 {self.weights_sha256}",
                    found=f"SHA-256 {sha256}",
                    cause="another version installed there, or a path that means another file there",
                    remedy="install the same version everywhere, or put the weights on a shared path",
                )
            )
