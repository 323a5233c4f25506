"""Self-supervised training of WNet3D on crops: arrays in, a trained network and its history out.

    draw crop -> flip, turn, vary intensity -> encoder -> soft normalised cut  ┐
                                               decoder -> reconstruction error ┴-> one backward pass

Crops come in [0, 100] from the caller, who knows where the voxels are and what their range is.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from braincensus_kernels.boxes import Triple
from braincensus_kernels.models.soft_ncuts import ClassMeanSoftNCuts
from braincensus_kernels.models.wnet3d import WNet3D

INPUT_TOP = 100.0
"""Intensities lie in [0, INPUT_TOP]."""

DrawCrop = Callable[[np.random.Generator], NDArray[np.float32]]

_COLLAPSE_WINDOW = 40
_COLLAPSE_FRACTION = 1e-4


class TrainingError(ValueError):
    """Training that cannot go on: values that are not finite, or a class that nothing belongs to."""


@dataclass(frozen=True)
class IntensityVariation:
    """How far the intensities of a crop are varied, so that the network does not depend on one exposure.

    Each number is a half-width: gain is drawn from ``exp(-gain .. gain)``, gamma likewise, the
    offset from ``-offset .. offset`` and the noise's standard deviation from ``0 .. noise``, in
    units of the input range [0, 100]. Results are clipped to that range again.
    """

    gain: float = 0.0
    gamma: float = 0.0
    offset: float = 0.0
    noise: float = 0.0

    def __post_init__(self) -> None:
        values = (self.gain, self.gamma, self.offset, self.noise)
        if not all(math.isfinite(v) and v >= 0 for v in values):
            raise ValueError(f"variations must be finite and not negative, got {values}")

    def apply(self, crop: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
        """Return a varied copy of `crop`."""
        unit = np.clip(crop / INPUT_TOP, 0.0, 1.0)
        unit = unit ** math.exp(rng.uniform(-self.gamma, self.gamma))
        values = unit * (INPUT_TOP * math.exp(rng.uniform(-self.gain, self.gain)))
        values += rng.uniform(-self.offset, self.offset)
        if self.noise:
            values += rng.standard_normal(crop.shape, dtype=np.float32) * rng.uniform(0.0, self.noise)
        varied: NDArray[np.float32] = np.clip(values, 0.0, INPUT_TOP).astype(np.float32)
        return varied


@dataclass(frozen=True)
class TrainingStep:
    """What one step of training gave."""

    step: int
    loss: float
    ncuts: float
    reconstruction: float
    learning_rate: float
    smallest_class: float
    """Mean probability of the class that has least."""


def crops_from_arrays(arrays: Sequence[NDArray[np.float32]], crop_voxels: Triple) -> DrawCrop:
    """Return a function that draws crops at random from arrays in memory.

    Arrays are chosen in proportion to their number of voxels.

    Raises
    ------
    ValueError
        If there is no array, or one is smaller than a crop.
    """
    if not arrays:
        raise ValueError("no array to draw crops from")
    for array in arrays:
        if array.ndim != 3 or any(n < c for n, c in zip(array.shape, crop_voxels, strict=True)):
            raise ValueError(f"an array of shape {array.shape} cannot give crops of {crop_voxels}")
    share = np.array([a.size for a in arrays], dtype=np.float64)
    share /= share.sum()

    def draw(rng: np.random.Generator) -> NDArray[np.float32]:
        array = arrays[int(rng.choice(len(arrays), p=share))]
        start = [int(rng.integers(n - c + 1)) for n, c in zip(array.shape, crop_voxels, strict=True)]
        return array[tuple(slice(s, s + c) for s, c in zip(start, crop_voxels, strict=True))]

    return draw


def train(
    network: WNet3D,
    draw: DrawCrop,
    *,
    steps: int,
    batch: int,
    learning_rate: float,
    seed: int,
    weight_decay: float = 0.01,
    ncuts_weight: float = 0.5,
    reconstruction_weight: float = 0.005,
    intensity_sigma: float = 1.0,
    spatial_sigma_voxels: float = 4.0,
    radius_voxels: int = 2,
    warm_up_steps: int = 20,
    final_learning_rate: float = 0.05,
    variation: IntensityVariation | None = None,
    device: str = "cpu",
    precision: str = "float32",
    progress: Callable[[TrainingStep], None] | None = None,
) -> list[TrainingStep]:
    """Train `network` in place, without labels.

    Parameters
    ----------
    network
        Trained in place, and left in evaluation mode.
    draw
        Gives one crop for a random generator: float32 (z, y, x), extents in multiples of 8, values in
        [0, 100]. All crops of a batch must have one shape.
    steps, batch
        Number of optimiser steps, and crops in each.
    learning_rate
        Of Adam, after `warm_up_steps` steps of linear rise; falls as half a cosine to
        `final_learning_rate` times itself.
    seed
        Determines crops, flips, turns, variation and dropout.
    weight_decay
        Of Adam.
    ncuts_weight, reconstruction_weight
        Of the two parts of the loss, which share one backward pass.
    intensity_sigma, spatial_sigma_voxels, radius_voxels
        Of the soft normalised cut.
    variation
        Random change of intensities; None for none.
    precision
        ``float32`` or ``bfloat16`` (convolutions in bfloat16, the loss and the weights in float32).
    progress
        Called after every step.

    Returns
    -------
    list of TrainingStep
        One for each step.

    Raises
    ------
    ValueError
        On an argument that cannot be used, or a crop of a wrong shape, dtype or range.
    TrainingError
        If a value is not finite, or if one class has stayed empty.

    Notes
    -----
    The original steps the encoder and the whole network in the same manner: a weighted sum of the
    soft normalised cut and the reconstruction error (CellSeg3D; Adam, weight decay 0.01).
    """
    if steps < 1 or batch < 1 or not learning_rate > 0:
        raise ValueError(
            f"steps, batch and learning rate must be positive, got {steps}, {batch}, {learning_rate}"
        )
    if precision not in ("float32", "bfloat16"):
        raise ValueError(f"precision must be float32 or bfloat16, got {precision!r}")
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    cut = ClassMeanSoftNCuts(
        intensity_sigma=intensity_sigma,
        spatial_sigma_voxels=spatial_sigma_voxels,
        radius_voxels=radius_voxels,
    ).to(device)
    network.to(device).train()
    optimiser = torch.optim.Adam(network.parameters(), lr=learning_rate, weight_decay=weight_decay)
    history: list[TrainingStep] = []
    recent: deque[float] = deque(maxlen=_COLLAPSE_WINDOW)
    try:
        for step in range(steps):
            rate = learning_rate * _schedule(step, steps, warm_up_steps, final_learning_rate)
            for group in optimiser.param_groups:
                group["lr"] = rate
            image = _draw_batch(draw, rng, batch=batch, variation=variation).to(device)
            with _arithmetic(device, precision):
                probabilities, reconstruction = network(image)
            probabilities, reconstruction = probabilities.float(), reconstruction.float()
            ncuts = cut(probabilities, image)
            error = functional.mse_loss(reconstruction, image)
            loss = ncuts_weight * ncuts + reconstruction_weight * error
            if not bool(torch.isfinite(loss)):
                raise TrainingError(
                    f"step {step}: the loss is not finite (cut {ncuts.item()}, error {error.item()}); "
                    "use a smaller learning rate, or float32"
                )
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            smallest = float(probabilities.detach().mean((0, 2, 3, 4)).min())
            recent.append(smallest)
            record = TrainingStep(step, loss.item(), ncuts.item(), error.item(), rate, smallest)
            history.append(record)
            if len(recent) == _COLLAPSE_WINDOW and max(recent) < _COLLAPSE_FRACTION:
                raise TrainingError(
                    f"step {step}: one class is empty since {_COLLAPSE_WINDOW} steps (mean probability "
                    f"{max(recent):.1e}): nothing is told apart. Use another seed, a smaller learning "
                    "rate, or crops with more contrast"
                )
            if progress is not None:
                progress(record)
    finally:
        network.eval()
    return history


def _schedule(step: int, steps: int, warm_up: int, final: float) -> float:
    """Return the learning rate's factor: linear rise, then half a cosine down to `final`."""
    if step < warm_up:
        return (step + 1) / (warm_up + 1)
    done = (step - warm_up) / max(1, steps - warm_up)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * done))


def _arithmetic(device: str, precision: str) -> AbstractContextManager[object]:
    if precision == "float32":
        return nullcontext()
    return torch.autocast(torch.device(device).type, torch.bfloat16)


def _draw_batch(
    draw: DrawCrop, rng: np.random.Generator, *, batch: int, variation: IntensityVariation | None
) -> Tensor:
    crops = []
    for _ in range(batch):
        crop = draw(rng)
        _check(crop)
        crop = _turn(crop, rng)
        if variation is not None:
            crop = variation.apply(crop, rng)
        crops.append(np.ascontiguousarray(crop))
    if len({c.shape for c in crops}) != 1:
        raise ValueError(f"crops of one batch differ in shape: {sorted({c.shape for c in crops})}")
    return torch.from_numpy(np.stack(crops)[:, None])


def _check(crop: NDArray[np.float32]) -> None:
    if crop.dtype != np.float32 or crop.ndim != 3 or any(n % 8 for n in crop.shape):
        raise ValueError(f"expected float32 (z, y, x) in multiples of 8, got {crop.dtype} {crop.shape}")
    low, high = float(crop.min()), float(crop.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise TrainingError("a crop holds values that are not finite (NaN or infinity)")
    if low < -0.01 * INPUT_TOP or high > 1.01 * INPUT_TOP:
        raise ValueError(f"intensities must be mapped to [0, {INPUT_TOP:g}] first, got {low:g} to {high:g}")


def _turn(crop: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
    """Flip any axes, and turn by 90 degrees in each plane whose two extents are the same."""
    for axis in range(3):
        if rng.random() < 0.5:
            crop = np.flip(crop, axis)
    for plane in ((0, 1), (0, 2), (1, 2)):
        quarter_turns = int(rng.integers(4))
        if crop.shape[plane[0]] == crop.shape[plane[1]]:
            crop = np.rot90(crop, quarter_turns, plane)
    return crop
