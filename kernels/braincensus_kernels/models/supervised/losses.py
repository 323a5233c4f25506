"""Losses of supervised training: how far a predicted foreground is from labels. MONAI's, named once.

Asked by `training.py` at every step, with logits (n, 1, z, y, x) and labels of the same shape, 0 or 1.

Overlap is summed over the whole batch before it is divided. A crop without any cell then counts by its
false positives; on its own it would have no overlap to speak of, and teach nothing.

The generalised Dice weighs each class by the inverse square of its volume. With one class that weight
cancels, so it gets two: the foreground and the rest of the volume.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from monai.losses import DiceCELoss, DiceLoss, GeneralizedDiceLoss, TverskyLoss
from torch import Tensor, nn

LossName = Literal["dice", "dice-ce", "generalized-dice", "tversky"]
LOSSES: tuple[LossName, ...] = get_args(LossName)

FALSE_POSITIVES, FALSE_NEGATIVES = 0.3, 0.7
"""Weights of the Tversky loss: missed voxels cost more, for they are the rare ones."""

_SMOOTH = 1e-5
_TINY = 1e-12
"""The generalised Dice's sums are near 1 / volume: what smooths the others would drown them."""


def loss(name: LossName) -> nn.Module:
    """Return a loss of logits and labels, both (n, 1, z, y, x).

    Parameters
    ----------
    name
        ``dice``: 1 - Dice. ``dice-ce``: that plus the mean binary cross-entropy. ``generalized-dice``: Dice
        over foreground and background, each weighed by 1 / volume^2 (the paper's choice). ``tversky``: Dice
        whose false positives weigh 0.3 and whose false negatives 0.7.

    Raises
    ------
    ValueError
        If there is no such loss.

    Examples
    --------
    >>> certain = torch.tensor([-20.0, 20.0]).reshape(1, 1, 1, 1, 2)
    >>> round(loss("dice")(certain, torch.tensor([0.0, 1.0]).reshape(1, 1, 1, 1, 2)).item(), 5)
    0.0
    """
    makers: dict[str, Callable[[], nn.Module]] = {
        "dice": lambda: DiceLoss(sigmoid=True, batch=True, smooth_nr=_SMOOTH, smooth_dr=_SMOOTH),
        "dice-ce": lambda: DiceCELoss(sigmoid=True, batch=True, smooth_nr=_SMOOTH, smooth_dr=_SMOOTH),
        "generalized-dice": _GeneralizedDice,
        "tversky": lambda: TverskyLoss(
            sigmoid=True,
            batch=True,
            alpha=FALSE_POSITIVES,
            beta=FALSE_NEGATIVES,
            smooth_nr=_SMOOTH,
            smooth_dr=_SMOOTH,
        ),
    }
    if name not in makers:
        raise ValueError(f"expected a loss of {', '.join(LOSSES)}, got {name!r}")
    return makers[name]()


class _GeneralizedDice(nn.Module):
    """MONAI's generalised Dice, of the foreground and of what is not foreground."""

    def __init__(self) -> None:
        super().__init__()
        self.of_classes = GeneralizedDiceLoss(batch=True, smooth_nr=_TINY, smooth_dr=_TINY)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        # the sigmoid of -x is 1 - sigmoid(x) without its rounding to 0
        both = torch.cat([torch.sigmoid(-logits), torch.sigmoid(logits)], 1)
        found: Tensor = self.of_classes(both, torch.cat([1 - labels, labels], 1))
        return found
