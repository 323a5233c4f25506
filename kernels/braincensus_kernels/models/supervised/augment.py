"""Crops and their labels, changed as a microscope or a mouse might have changed them. MONAI's transforms.

Between drawing a crop and training on it (`training.py`). Shape changes act on image and labels alike: the
image is interpolated, labels take the nearest voxel and stay 0 or 1. What happens is a function of the seed
alone, so that a crop is one of (seed, step, place in the batch), whoever draws it and whenever.

    flip each axis -> turn by 90 degrees in each plane -> affine, or affine and elastic -> shift intensity

Affine and elastic changes are one resampling: two would blur the image twice, and fray cells of a few voxels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from monai.transforms import (
    Compose,
    Rand3DElasticd,
    RandAffined,
    RandFlipd,
    RandRotate90d,
    RandShiftIntensityd,
)
from torch import Tensor

_IMAGE, _LABELS = "image", "labels"
_BOTH: Any = (_IMAGE, _LABELS)
_PLANES = ((0, 1), (0, 2), (1, 2))
_ELASTIC_SIGMA_VOXELS = (5.0, 8.0)
_SEEDS = 2**32


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """How far crops are changed, and how often. Flips and quarter turns come with each of them."""

    shift: float = 0.1
    """Largest change of all intensities, up or down; they lie in [0, 1], and are clipped to that again."""
    shift_probability: float = 0.5
    degrees: float = 15.0
    """Largest turn about each axis."""
    scale: float = 0.1
    """Largest stretch or shrinkage of each axis."""
    shear: float = 0.05
    affine_probability: float = 0.5
    """Of affine changes alone."""
    elastic: tuple[float, float] = (100.0, 200.0)
    """Range of the strength: voxels move by 0.6 to 1.3 voxels on average at 100, by twice that at 200."""
    elastic_probability: float = 0.25
    """Of affine and elastic changes. They cost most: on a CPU, four times as much as all the others."""

    def __post_init__(self) -> None:
        sizes = (self.shift, self.degrees, self.scale, self.shear, *self.elastic)
        if not all(0 <= value < math.inf for value in sizes) or self.scale >= 1 or self.shear >= 1:
            raise ValueError(f"changes must be finite and not negative, scale and shear below 1, got {sizes}")
        chances = (self.shift_probability, self.affine_probability, self.elastic_probability)
        if not all(0 <= chance <= 1 for chance in chances):
            raise ValueError(f"probabilities must lie in [0, 1], got {chances}")
        if self.affine_probability + self.elastic_probability > 1:
            raise ValueError(
                f"affine and elastic changes exclude each other, got probabilities {chances[1:]}"
            )

    def apply(self, image: Tensor, labels: Tensor, *, seed: int) -> tuple[Tensor, Tensor]:
        """Return changed copies of a crop and its labels.

        Parameters
        ----------
        image, labels
            Float32 cubes (z, y, x) on one device: in [0, 1]; 0 or 1.
        seed
            From 0 to 2^32 - 1. Determines everything.

        Raises
        ------
        ValueError
            If they are not cubes of one size, or the seed is out of range.

        Examples
        --------
        >>> cube = torch.arange(27.0).reshape(3, 3, 3) / 27
        >>> image, labels = Augmentation().apply(cube, (cube > 0.5).float(), seed=1)
        >>> image.shape, labels.unique()
        (torch.Size([3, 3, 3]), tensor([0., 1.]))
        """
        if image.ndim != 3 or len(set(image.shape)) != 1 or labels.shape != image.shape:
            raise ValueError(
                f"expected cubes of one size, got image {tuple(image.shape)}, labels {tuple(labels.shape)}"
            )
        if not 0 <= seed < _SEEDS:
            raise ValueError(f"seed must be from 0 to 2^32 - 1, got {seed}")
        changes = self._changes(float(np.random.default_rng(seed).random()))
        changes.set_random_state(seed=seed)
        changed = changes({_IMAGE: image[None], _LABELS: labels[None]})
        moved, label = (torch.as_tensor(changed[key]).as_subclass(Tensor)[0] for key in _BOTH)
        return moved.clamp(0.0, 1.0).contiguous(), label.contiguous()

    def _changes(self, chance: float) -> Any:
        return Compose(
            [
                *(RandFlipd(_BOTH, prob=0.5, spatial_axis=axis) for axis in range(3)),
                *(RandRotate90d(_BOTH, prob=0.75, max_k=3, spatial_axes=plane) for plane in _PLANES),
                *self._resampling(chance),
                RandShiftIntensityd(_IMAGE, offsets=self.shift, prob=self.shift_probability),
            ]
        )

    def _resampling(self, chance: float) -> list[Any]:
        how: dict[str, Any] = {
            "prob": 1.0,
            "mode": ("bilinear", "nearest"),
            "padding_mode": "reflection",
            "rotate_range": (math.radians(self.degrees),) * 3,
            "scale_range": (self.scale,) * 3,
            "shear_range": (self.shear,) * 6,
        }
        if chance < self.elastic_probability:
            return [Rand3DElasticd(_BOTH, _ELASTIC_SIGMA_VOXELS, self.elastic, **how)]
        if chance < self.elastic_probability + self.affine_probability:
            return [RandAffined(_BOTH, **how)]
        return []
