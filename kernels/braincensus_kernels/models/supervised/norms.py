"""Freeze the norms of a supervised network: its GroupNorms or InstanceNorms, measured once on windows.

`calibrate.py` does this for WNet3D and says why. Here any network goes: each norm is replaced, by name, first
by one that measures, then by what it measured.

    windows -> one joint forward, each norm over all windows -> NormStatistics -> freeze_norms -> network

A supervised network has one output, so that no class has to be found out; what the statistics keep of the
classes, background and foreground, tells whether the foreground came out brighter.
"""

from __future__ import annotations

import copy
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.instancenorm import _InstanceNorm

from braincensus_kernels.models.calibrate import NormStatistics
from braincensus_kernels.models.supervised.networks import EXTENT_STEP, SupervisedWeights


def calibrate_norms(
    weights: SupervisedWeights,
    windows: NDArray[np.float32],
    *,
    device: str = "cpu",
    threads: int | None = None,
) -> NormStatistics:
    """Measure the statistics of every norm over all windows jointly, in float32.

    Parameters
    ----------
    weights
        Of either network.
    windows
        (K, 1, z, y, x) float32 in [0, 1], extents in multiples of 8 (SegResNet) or 32; tissue that has cells.
        All pass through the network at once: see `predict.projected_supervised_bytes`.
    device
        Where to compute.
    threads
        CPU threads; None for torch's current setting.

    Returns
    -------
    NormStatistics
        Later norms were measured on what the earlier, already calibrated ones gave. The same windows in the
        same order give the same statistics. Classes are background and foreground.

    Raises
    ------
    ValueError
        On windows of a wrong shape, dtype or range, or that are constant.
    """
    step = EXTENT_STEP[weights.kind]
    if (
        windows.ndim != 5
        or windows.shape[0] < 1
        or windows.shape[1] != 1
        or any(n < 1 or n % step for n in windows.shape[2:])
    ):
        raise ValueError(f"expected windows (K, 1, z, y, x) in multiples of {step}, got {windows.shape}")
    if windows.dtype != np.float32 or not np.isfinite(windows).all():
        raise ValueError(f"expected finite float32 windows, got {windows.dtype}")
    if windows.min() < 0 or windows.max() > 1:
        raise ValueError(f"expected windows in [0, 1], got {windows.min():g} to {windows.max():g}")
    if windows.min() == windows.max():
        raise ValueError("all windows are constant: there is nothing to calibrate on")
    network = weights.build()
    norms = {name: _Measuring(module) for name, module in _norms(network)}
    for name, norm in norms.items():
        network.set_submodule(name, norm)
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            image = torch.from_numpy(windows).to(device)
            foreground = torch.sigmoid(network.to(device)(image)).double()
            classes = torch.stack([1 - foreground, foreground])
            share = classes.sum((1, 2, 3, 4, 5))
            total = (classes * image.double()).sum((1, 2, 3, 4, 5))
    finally:
        torch.set_num_threads(before)
    return NormStatistics(
        {name: norm.mean for name, norm in norms.items()},
        {name: norm.variance for name, norm in norms.items()},
        (total / share.clamp_min(1e-12)).cpu().numpy(),
        len(windows),
    )


def freeze_norms(network: nn.Module, statistics: NormStatistics) -> nn.Module:
    """Return a copy whose norms are what `statistics` say: scale and shift of each channel, fixed.

    Raises
    ------
    ValueError
        If the statistics are those of another network.
    """
    network = copy.deepcopy(network)
    norms = dict(_norms(network))
    found = {name: len(mean) for name, mean in statistics.mean.items()}
    expected = {name: _groups(norm) for name, norm in norms.items()}
    if found != expected or any(len(statistics.variance[name]) != n for name, n in expected.items()):
        raise ValueError(
            f"the norm statistics are those of another network: {len(found)} norms, expected {len(expected)}"
            + "".join(f", {name}" for name in sorted(set(found) ^ set(expected))[:3])
        )
    for name, norm in norms.items():
        network.set_submodule(name, _Frozen(*_affine(norm, statistics.mean[name], statistics.variance[name])))
    return network


class _Frozen(nn.Module):
    """``scale * x + shift``, for each channel."""

    scale: Tensor
    shift: Tensor

    def __init__(self, scale: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale.float().view(1, -1, 1, 1, 1))
        self.register_buffer("shift", shift.float().view(1, -1, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Return a new tensor of the kind of `x`."""
        return torch.addcmul(self.shift.to(x.dtype), x, self.scale.to(x.dtype))


class _Measuring(nn.Module):
    """Measures its input over the batch and all voxels, then does what a norm frozen there would do."""

    mean: NDArray[np.float64]
    variance: NDArray[np.float64]

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        """Return `x`, normalised over all windows."""
        groups = _groups(self.norm)
        # Window by window: a copy of all in double precision would be the largest array of all.
        parts = [window.reshape(groups, -1) for window in x]
        count = sum(part.shape[1] for part in parts)
        mean = torch.stack([part.sum(1, dtype=torch.float64) for part in parts]).sum(0) / count
        squares = [(part.double() - mean[:, None]).square_().sum(1) for part in parts]
        variance = torch.stack(squares).sum(0) / count
        self.mean, self.variance = mean.cpu().numpy(), variance.cpu().numpy()
        frozen: Tensor = _Frozen(*_affine(self.norm, self.mean, self.variance)).to(x.device)(x)
        return frozen


def _norms(network: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the norms whose statistics come from the patch, by name."""
    return [
        (name, module)
        for name, module in network.named_modules()
        if isinstance(module, nn.GroupNorm | _InstanceNorm)
    ]


def _groups(norm: nn.Module) -> int:
    return norm.num_groups if isinstance(norm, nn.GroupNorm) else cast(_InstanceNorm, norm).num_features


def _affine(
    norm: nn.Module, mean: NDArray[np.float64], variance: NDArray[np.float64]
) -> tuple[Tensor, Tensor]:
    """Return scale and shift of each channel, float64."""
    assert isinstance(norm, nn.GroupNorm | _InstanceNorm)
    channels = norm.num_channels if isinstance(norm, nn.GroupNorm) else norm.num_features
    each = channels // len(mean)
    scale = torch.from_numpy(1.0 / np.sqrt(variance + norm.eps)).repeat_interleave(each)
    centre = torch.from_numpy(mean).repeat_interleave(each)
    if norm.affine:
        scale = norm.weight.detach().double().cpu() * scale
        return scale, norm.bias.detach().double().cpu() - centre * scale
    return scale, -centre * scale
