"""Freeze the network's GroupNorm statistics, once for a volume.

GroupNorm takes its statistics from the window it is given, so that a voxel's probability depends
on where the window happened to lie, and noise in empty tissue is stretched to full scale. With
statistics measured once, over windows of typical tissue, the network is a fixed local function.

    windows of the volume -> one joint forward -> NormStatistics -> fold.py
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from braincensus_kernels.models.checkpoints import Weights
from braincensus_kernels.models.wnet3d import UNet

T = TypeVar("T")

CALIBRATION = "calibration"
"""Key of a weights file's metadata under which `NormStatistics.to_json` may stand."""
CALIBRATION_OF = "calibration_of"
"""And under which it says what it was measured on."""


@dataclass(frozen=True)
class NormStatistics:
    """Mean and variance of every group of every norm, and which class is foreground.

    `mean` and `variance` map a norm's name in the encoder (``in_b.module.3``) to float64 (groups,).
    """

    mean: Mapping[str, NDArray[np.float64]]
    variance: Mapping[str, NDArray[np.float64]]
    class_intensity: NDArray[np.float64]
    """Mean input intensity of each class, weighted by its probability."""
    windows: int

    @property
    def foreground_class(self) -> int:
        """The class with the higher mean input intensity: labelled cells are bright."""
        return int(np.argmax(self.class_intensity))

    def to_arrays(self) -> dict[str, NDArray[np.float64]]:
        """Return plain arrays that `from_arrays` reads back exactly."""
        arrays = {f"mean/{name}": value.copy() for name, value in self.mean.items()}
        arrays |= {f"variance/{name}": value.copy() for name, value in self.variance.items()}
        arrays["class_intensity"] = self.class_intensity.copy()
        arrays["windows"] = np.array(float(self.windows))
        return arrays

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[np.float64]]) -> NormStatistics:
        """Read what `to_arrays` gave.

        Raises
        ------
        ValueError
            If an array is missing, or a mean has no variance.
        """
        try:
            mean, variance = (
                {
                    key.removeprefix(prefix): np.asarray(value, dtype=np.float64)
                    for key, value in arrays.items()
                    if key.startswith(prefix)
                }
                for prefix in ("mean/", "variance/")
            )
            if not mean or mean.keys() != variance.keys():
                raise ValueError(f"means of {sorted(mean)} and variances of {sorted(variance)} do not match")
            return cls(
                mean,
                variance,
                np.asarray(arrays["class_intensity"], dtype=np.float64),
                int(np.asarray(arrays["windows"])),
            )
        except KeyError as err:
            raise ValueError(f"these are not norm statistics: no array {err}") from err

    def to_json(self) -> str:
        """Return the statistics as JSON; numbers are kept exactly."""
        return json.dumps({key: value.tolist() for key, value in self.to_arrays().items()})

    @classmethod
    def from_json(cls, text: str) -> NormStatistics:
        """Read what `to_json` gave."""
        return cls.from_arrays(
            {key: np.array(value, dtype=np.float64) for key, value in json.loads(text).items()}
        )


def stored_calibration(weights: Weights) -> NormStatistics | None:
    """Return the statistics that a file of weights brings along, or None if it brings none.

    Raises
    ------
    ValueError
        If they are damaged, or those of another network.
    """
    text = weights.metadata.get(CALIBRATION)
    if text is None:
        return None
    try:
        statistics = NormStatistics.from_json(text)
    except (ValueError, TypeError, AttributeError) as err:
        raise ValueError(f"{weights.source}: the calibration in the file is damaged ({err})") from err
    norms = {
        name: module.num_groups
        for name, module in weights.build_encoder().named_modules()
        if isinstance(module, nn.GroupNorm)
    }
    parts = (*statistics.mean.items(), *statistics.variance.items())
    if (
        statistics.mean.keys() != norms.keys()
        or any(values.shape != (norms[name],) or not np.isfinite(values).all() for name, values in parts)
        or any((values < 0).any() for values in statistics.variance.values())
        or statistics.class_intensity.shape != (weights.num_classes,)
    ):
        raise ValueError(f"{weights.source}: the calibration in the file is not that of its network")
    return statistics


def calibrate(
    encoder: Weights | UNet,
    windows: NDArray[np.float32],
    *,
    device: str = "cpu",
    threads: int | None = None,
) -> NormStatistics:
    """Measure the statistics of every GroupNorm over all windows jointly.

    Parameters
    ----------
    encoder
        Weights, or an encoder.
    windows
        (K, 1, z, y, x) float32 in [0, 100], extents in multiples of 8; tissue that has cells.
    device
        Where to compute, in float32.
    threads
        CPU threads, each of which has windows of its own; None for torch's current setting.

    Returns
    -------
    NormStatistics
        Later norms were measured on what the earlier, already calibrated ones gave. The same windows
        in the same order give the same statistics, on a CPU with any number of threads.

    Raises
    ------
    ValueError
        On windows of a wrong shape or dtype, values that are not finite, or windows that are constant.
    """
    if (
        windows.ndim != 5
        or windows.shape[0] < 1
        or windows.shape[1] != 1
        or any(n % 8 for n in windows.shape[2:])
    ):
        raise ValueError(f"expected windows (K, 1, z, y, x) in multiples of 8, got {windows.shape}")
    if windows.dtype != np.float32 or not np.isfinite(windows).all():
        raise ValueError(f"expected finite float32 windows, got {windows.dtype}")
    if windows.min() == windows.max():
        raise ValueError("all windows are constant: there is nothing to calibrate on")
    network = encoder.build_encoder() if isinstance(encoder, Weights) else encoder
    before = torch.get_num_threads()
    at_once = min(threads or before, len(windows)) if device == "cpu" else 1
    torch.set_num_threads(1)  # for a window: how torch cuts one up for several threads shows in the last bits
    try:
        with ThreadPoolExecutor(at_once) as pool, torch.inference_mode():
            return _calibrate(
                network.to(device).eval(),
                [torch.from_numpy(w[None]).to(device) for w in windows],
                _Each(pool),
            )
    finally:
        torch.set_num_threads(before)


class _Each:
    """Does something to every window, several at once."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._pool = pool

    def __call__(self, function: Callable[..., T], *windows: list[Tensor]) -> list[T]:
        """Call the function with one of each list."""
        return list(self._pool.map(partial(_inferring, function), *windows))


def _inferring(function: Callable[..., T], *values: Tensor) -> T:
    with torch.inference_mode():  # a thread does not inherit it
        return function(*values)


def _calibrate(network: UNet, images: list[Tensor], each: _Each) -> NormStatistics:
    """Run the windows side by side, layer by layer: each norm waits for all of them."""
    mean: dict[str, NDArray[np.float64]] = {}
    variance: dict[str, NDArray[np.float64]] = {}

    def run(block: str, xs: list[Tensor]) -> list[Tensor]:
        layers: nn.Sequential = getattr(network, block).module
        for index, layer in enumerate(layers):
            if isinstance(layer, nn.GroupNorm):
                name = f"{block}.module.{index}"
                mean[name], variance[name] = _pooled_moments(xs, layer.num_groups, each)
                scale, shift = affine_of_norm(layer, mean[name], variance[name])
                xs = each(partial(_scale_, scale, shift), xs)
            elif isinstance(layer, nn.ReLU):
                xs = each(torch.relu_, xs)
            else:
                xs = each(layer, xs)
        return xs

    def join(skips: list[Tensor], ups: list[Tensor], transposed: nn.Module) -> list[Tensor]:
        return each(lambda skip, up: torch.cat([skip, transposed(up)], dim=1), skips, ups)

    full = run("in_b", images)
    half = run("conv1", each(network.pool, full))
    quarter = run("conv2", each(network.pool, half))
    eighth = run("bot", each(network.pool, quarter))
    quarter = run("deconv2", join(quarter, eighth, network.conv_trans2))
    half = run("deconv3", join(half, quarter, network.conv_trans3))
    logits = run("out_b", join(full, half, network.conv_trans_out))

    share = np.zeros(logits[0].shape[1])
    total = np.zeros(logits[0].shape[1])
    for image, out in zip(images, logits, strict=True):
        probability = torch.softmax(out, dim=1).double()
        share += probability.sum((0, 2, 3, 4)).cpu().numpy()
        total += (probability * image.double()).sum((0, 2, 3, 4)).cpu().numpy()
    return NormStatistics(mean, variance, total / np.maximum(share, 1e-12), len(images))


def _pooled_moments(
    xs: list[Tensor], groups: int, each: _Each
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and variance (of the population, as GroupNorm) of each group over all windows and voxels."""
    flat = [x.reshape(groups, -1) for x in xs]  # a window is a batch of one
    count = sum(x.shape[1] for x in flat)
    mean = torch.stack(each(lambda x: x.sum(1, dtype=torch.float64), flat)).sum(0) / count
    squares = each(lambda x: (x.double() - mean[:, None]).square_().sum(1), flat)
    variance = torch.stack(squares).sum(0) / count
    return mean.cpu().numpy(), variance.cpu().numpy()


def affine_of_norm(
    norm: nn.GroupNorm, mean: NDArray[np.float64], variance: NDArray[np.float64]
) -> tuple[Tensor, Tensor]:
    """Return the frozen norm as ``scale * x + shift`` per channel, float64 on the CPU."""
    each = norm.num_channels // norm.num_groups
    inverse = torch.from_numpy(1.0 / np.sqrt(variance + norm.eps)).repeat_interleave(each)
    scale = norm.weight.detach().double().cpu() * inverse
    shift = norm.bias.detach().double().cpu() - torch.from_numpy(mean).repeat_interleave(each) * scale
    return scale, shift


def _scale_(scale: Tensor, shift: Tensor, x: Tensor) -> Tensor:
    return x.mul_(_per_channel(scale, x)).add_(_per_channel(shift, x))


def _per_channel(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like.device, like.dtype).view(1, -1, 1, 1, 1)
