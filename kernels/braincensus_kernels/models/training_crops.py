"""Crops for training: drawn, flipped, turned, varied in intensity. First step of `training.py`.

A crop is a pure function of the seed, the step and its place in the batch. So nothing has to be remembered
of the random generators to go on after an interruption, and several processes share a batch without
drawing one another's crops.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from braincensus_kernels.boxes import Triple
from braincensus_kernels.models.training_signs import TrainingError

INPUT_TOP = 100.0
"""Intensities lie in [0, INPUT_TOP]."""

DrawCrop = Callable[[np.random.Generator], NDArray[np.float32]]


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


def draw_batch(
    draw: DrawCrop, *, seed: int, step: int, places: Iterable[int], variation: IntensityVariation | None
) -> Tensor:
    """Return the crops at those places of a step's batch, (places, 1, z, y, x).

    Raises
    ------
    ValueError
        On a crop of a wrong shape, dtype or range, or crops of different shapes.
    TrainingError
        On values that are not finite.
    """
    crops = []
    for place in places:
        rng = np.random.default_rng((seed, step, place))
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
