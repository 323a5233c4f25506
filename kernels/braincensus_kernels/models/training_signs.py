"""What each step of training gave, and the signs that it goes wrong. Beside `training.py`, which asks.

WNet3D has no labels to be corrected by: it can settle on one class for everything, on a copy of the
image, or nowhere. The figures of a step are enough to tell, early, which of them it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

WINDOW = 40
"""Steps over which a sign must last."""

_EMPTY = 1e-4
_COPY_LIKENESS = 0.98
_COPY_UNDECIDED = 0.2
_FLAT = 0.01
_CONSTANT = 1e-4
"""What varies less than this is the same everywhere, and like nothing."""


class TrainingError(ValueError):
    """Training that cannot go on: values that are not finite, or a class that takes everything."""


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
    largest_class: float
    """Mean probability of the class that has most."""
    likeness: float
    """Largest correlation, either way, of a class's probability with the intensity."""
    undecided: float
    """From 0 (every voxel is in one class) to 1 (all classes are as probable, everywhere)."""


def figures(probabilities: Tensor, image: Tensor) -> Tensor:
    """Return likeness, undecided and the mean probability of each class, in one vector.

    Parameters
    ----------
    probabilities
        (batch, class, z, y, x), without gradients.
    image
        (batch, 1, z, y, x).
    """
    classes = probabilities.shape[1]
    p = probabilities.transpose(0, 1).reshape(classes, -1)
    x = image.reshape(-1)
    means = p.mean(1)
    x, centred = x - x.mean(), p - means[:, None]
    of_x, of_p = x.square().mean().sqrt(), centred.square().mean(1).sqrt()
    correlation = (centred @ x) / x.numel() / (of_x * of_p).clamp_min(1e-12)
    varies = (of_p > _CONSTANT) & (of_x > _CONSTANT)
    likeness = torch.where(varies, correlation.abs(), 0.0).max()
    undecided = (1 - p.square().sum(0).mean()) / (1 - 1 / classes)
    return torch.cat([torch.stack([likeness, undecided]), means])


def everything_is_one_class(history: Sequence[TrainingStep]) -> bool:
    """Whether one class has taken every voxel for so long that no gradient brings another back."""
    recent = history[-WINDOW:]
    return len(recent) == WINDOW and min(r.largest_class for r in recent) > 1 - _EMPTY


def signs(
    history: Sequence[TrainingStep], *, ncuts_weight: float, reconstruction_weight: float
) -> dict[str, str]:
    """Return the signs that training goes wrong at its last step: kind to message, with what to change.

    Kinds are ``empty class``, ``copy`` and ``flat``.
    """
    recent, first = history[-WINDOW:], history[:WINDOW]
    if len(recent) < WINDOW:
        return {}
    found = {}
    cut = ncuts_weight * _mean([r.ncuts for r in recent])
    error = reconstruction_weight * _mean([r.reconstruction for r in recent])
    balance = f"the cut contributes {cut:.3g} to the loss, the reconstruction {error:.3g}"
    if error > 0:
        equal = reconstruction_weight * cut / error
        balance += f"; a reconstruction weight of {equal:.2g} makes them equal, which is where to start"
    if max(r.smallest_class for r in recent) < _EMPTY:
        found["empty class"] = (
            f"a class is empty since {WINDOW} steps: raise the reconstruction weight, which needs every "
            f"class, or ask for fewer classes ({balance})"
        )
    if (
        min(r.likeness for r in recent) > _COPY_LIKENESS
        and min(r.undecided for r in recent) > _COPY_UNDECIDED
    ):
        found["copy"] = (
            f"the output is the intensity, rescaled (correlation {recent[-1].likeness:.3f}), not a "
            f"segmentation: lower the reconstruction weight ({balance})"
        )
    if len(history) >= 3 * WINDOW:
        before, now = _mean([r.loss for r in first]), _mean([r.loss for r in recent])
        if now > (1 - _FLAT) * before:
            found["flat"] = (
                f"the loss has not fallen: {before:.4g} over the first {WINDOW} steps, {now:.4g} over the "
                f"last: change the learning rate (2e-5 to 2e-3) or the reconstruction weight ({balance})"
            )
    return found


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
