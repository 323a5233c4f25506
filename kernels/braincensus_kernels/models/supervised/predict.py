"""Foreground probability of one patch by a supervised network, on CPU or CUDA.

    patch = core + halo, in [0, 1] -> network -> sigmoid of its logit -> core

How much of its surroundings a voxel depends on:

- SegResNet with frozen norms is a fixed local function, of positions in multiples of 8. It looks 122 voxels
  far, because most of its convolutions work at an eighth of the resolution; a halo of 128 is exact. What lies
  far off counts little: see docs/foreground.md for the error at smaller halos.
- SwinUNETR divides each patch into windows of attention from the patch's first voxel, at four resolutions,
  and so depends on where the patch lies. Patches of one shape at the places of a global lattice give every
  voxel one answer all the same; with another lattice it is another. Its reach is the patch.
- With norms taken from the patch, both depend on all of the patch.

In each case the result is a rule of the patch alone: not of what else is computed, or in which order.
"""

from __future__ import annotations

from math import prod
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from braincensus_kernels.boxes import Triple
from braincensus_kernels.models.calibrate import NormStatistics
from braincensus_kernels.models.predict import LATTICE, Norm, cpu_threads, resolve_precision
from braincensus_kernels.models.supervised.networks import (
    EXTENT_STEP,
    TITLES,
    Kind,
    SupervisedWeights,
)
from braincensus_kernels.models.supervised.norms import freeze_norms

_BLOCKS_DOWN = (
    1,
    2,
    2,
    4,
)  # residual blocks of SegResNet at each resolution, full first; each looks 2 voxels far
_BLOCKS_UP = (1, 1, 1)


def segresnet_reach() -> int:
    """How many voxels SegResNet with frozen norms looks beyond a core of whole lattice cells.

    Works out which voxels one cell's output needs, level by level, as intervals along one axis.

    Examples
    --------
    >>> segresnet_reach()
    122
    """
    low, high = 0, LATTICE - 1
    needed = []  # of the way down's features at each level, full resolution first
    for blocks in _BLOCKS_UP:
        low, high = low - 2 * blocks, high + 2 * blocks
        needed.append((low, high))
        low, high = (low - 1) // 2, (high + 1) // 2  # linear interpolation between the nearest two
    for level in reversed(range(len(_BLOCKS_DOWN))):
        low, high = low - 2 * _BLOCKS_DOWN[level], high + 2 * _BLOCKS_DOWN[level]
        if level > 0:
            low, high = 2 * low - 1, 2 * high + 1  # a convolution of 3 voxels, stride 2
            low, high = min(low, needed[level - 1][0]), max(high, needed[level - 1][1])
    return max(-(low - 1), high + 1 - (LATTICE - 1))


SEGRESNET_REACH_VOXELS = segresnet_reach()

_ATTENTION_WINDOW = 7
_ATTENTION_HEADS = 3  # at the finest resolution of attention, half of the image's


def projected_supervised_bytes(
    kind: Kind, size: int, patch: Triple, *, precision: str, at_once: int = 1
) -> int:
    """Project the peak memory of a prediction or a calibration, weights included, in bytes.

    Parameters
    ----------
    kind, size
        Of the network.
    patch
        What it takes, halo included.
    precision
        ``float32`` or ``bfloat16``.
    at_once
        Patches that pass through it together: the windows of a calibration, 1 in a prediction.

    Notes
    -----
    The factors are measured ones, rounded up. SegResNet holds about six arrays of its features at full
    resolution. SwinUNETR does, too, but with few features it needs more for its attention: for each
    voxel of a window and head a bias against all voxels of the window.
    """
    voxels = prod(patch) * at_once
    half = precision == "bfloat16"
    if kind == "segresnet":
        parameters = 18_400 * size**2
        need = voxels * size * (16 if half else 32) * (5 if at_once > 1 else 4) // 4
    else:
        parameters = 33_000 * size**2
        tokens = at_once * prod(-(-n // (2 * _ATTENTION_WINDOW)) * _ATTENTION_WINDOW for n in patch)
        attention = tokens * _ATTENTION_WINDOW**3 * (_ATTENTION_HEADS + 1) * 4
        need = max(attention * (7 if half else 5) // 4, voxels * size * 32)
    return need + voxels * 8 + parameters * 12  # read, built, and copied when norms are frozen


def resolve_supervised_precision(precision: str, device: str) -> str:
    """Return ``float32`` or ``bfloat16``; ``auto`` is float32 on a CPU, where bfloat16 gained nothing.

    Raises
    ------
    ValueError
        If `precision` is none of the three.
    """
    if precision == "auto" and torch.device(device).type == "cpu":
        return "float32"
    return resolve_precision(precision, device)


class SupervisedPredictor:
    """Foreground probability, patch by patch.

    Parameters
    ----------
    weights
        Of either network.
    norm
        ``calibrated``: frozen statistics. ``window``: statistics of each patch, as in training.
    statistics
        From `calibrate_norms`; not needed with ``window``.
    halo_voxels
        Context on each side of the core, a multiple of 8.
    precision
        ``auto``, ``float32`` or ``bfloat16``; see `resolve_supervised_precision`.
    device
        As torch names it.
    threads
        CPU threads of one prediction; None for torch's current setting.

    Raises
    ------
    ValueError
        On an argument that cannot be used, or statistics of another network.

    Notes
    -----
    One prediction at a time in a process: the number of threads is torch's, and shared.

    Examples
    --------
    >>> import numpy as np, tempfile
    >>> from braincensus_kernels.models.supervised.networks import (
    ...     build_network, load_supervised, network_metadata, save_supervised)
    >>> path = tempfile.mkdtemp() + "/segresnet.safetensors"
    >>> _ = save_supervised(path, build_network("segresnet"), network_metadata("segresnet"))
    >>> ready = SupervisedPredictor(load_supervised(path), norm="window", statistics=None, halo_voxels=8)
    >>> ready.predict(np.zeros((32, 32, 32), np.float32)).shape
    (16, 16, 16)
    """

    def __init__(
        self,
        weights: SupervisedWeights,
        *,
        norm: Norm = "calibrated",
        statistics: NormStatistics | None,
        halo_voxels: int,
        precision: str = "auto",
        device: str = "cpu",
        threads: int | None = None,
    ) -> None:
        if norm not in ("calibrated", "window"):
            raise ValueError(f"norm must be calibrated or window, got {norm!r}")
        if halo_voxels < 0 or halo_voxels % LATTICE:
            raise ValueError(f"the halo must be a multiple of {LATTICE} voxels, got {halo_voxels}")
        if norm == "calibrated" and statistics is None:
            raise ValueError("no norm statistics: calibrate_norms() gives them")
        self.kind = weights.kind
        self.norm = norm
        self.halo_voxels = halo_voxels
        self.precision = resolve_supervised_precision(precision, device)
        self.device = device
        self.threads = threads
        network = weights.build()
        if norm == "calibrated":
            assert statistics is not None
            network = freeze_norms(network, statistics)
        if self.kind == "segresnet":  # 1.2 times as fast; SwinUNETR goes from one layout to another anyway
            network = cast(nn.Module, network.to(memory_format=torch.channels_last_3d))  # type: ignore[call-overload]
        self._network: nn.Module = network.to(device)

    def economise(self) -> None:
        """Give back nothing: it keeps nothing between patches."""

    @property
    def reach_voxels(self) -> int | None:
        """How far the network looks: a halo of as much is exact. None: as far as the patch goes."""
        return SEGRESNET_REACH_VOXELS if self.kind == "segresnet" and self.norm == "calibrated" else None

    def predict(self, patch: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the foreground probability of the core.

        Parameters
        ----------
        patch
            float32 (z, y, x) in [0, 1], core plus halo on both sides, extents in multiples of 8 (SegResNet)
            or 32 (SwinUNETR), starting at a place of the volume's lattice.

        Returns
        -------
        float32 (z, y, x)
            In [0, 1].

        Raises
        ------
        ValueError
            On a patch of a wrong shape or dtype.
        """
        core = self._core_shape(patch)
        h = self.halo_voxels
        inner = tuple(slice(h, h + n) for n in core)
        kind = torch.device(self.device).type
        with cpu_threads(self.threads), torch.inference_mode():
            x = torch.from_numpy(np.ascontiguousarray(patch))[None, None]
            if kind == "cuda":
                x = x.pin_memory().to(self.device, non_blocking=True)
            with torch.autocast(kind, torch.bfloat16, enabled=self.precision == "bfloat16"):
                logits = self._network(x)
            result: NDArray[np.float32] = torch.sigmoid(logits[0, 0][inner].float()).cpu().numpy()
        return np.ascontiguousarray(result)

    def _core_shape(self, patch: NDArray[np.float32]) -> Triple:
        h, step = self.halo_voxels, EXTENT_STEP[self.kind]
        if patch.dtype != np.float32 or patch.ndim != 3:
            raise ValueError(f"expected a float32 patch (z, y, x), got {patch.dtype} of shape {patch.shape}")
        core = (patch.shape[0] - 2 * h, patch.shape[1] - 2 * h, patch.shape[2] - 2 * h)
        if any(n <= 0 or n % LATTICE for n in core):
            raise ValueError(
                f"expected core + 2 * {h} voxels, the core a multiple of {LATTICE}, got {patch.shape}: "
                f"a core of {core}"
            )
        if any(n % step for n in patch.shape):
            raise ValueError(
                f"{TITLES[self.kind]} takes patches of multiples of {step} voxels, halo included, "
                f"got {patch.shape}"
            )
        if self.norm == "window" and prod(patch.shape) <= 32**3 and self.kind == "swinunetr":
            raise ValueError(
                "SwinUNETR's norms need more than one voxel at a 32nd of the resolution: a larger patch than "
                f"{patch.shape}"
            )
        return core
