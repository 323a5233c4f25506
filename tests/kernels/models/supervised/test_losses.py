"""Losses: each against its formula, evaluated voxel by voxel; what empty crops teach; gradients."""

import math
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from braincensus_kernels.models.supervised.losses import LOSSES, LossName, loss


def evaluated(name: str, logits: np.ndarray, labels: np.ndarray) -> float:
    """The formulas, in plain sums over voxels of all crops."""
    p = 1 / (1 + np.exp(-logits.astype(np.float64)))
    both = seen = known = 0.0
    entropy = []
    for predicted, label in zip(p.ravel(), labels.ravel(), strict=True):
        both += predicted * label
        seen += predicted
        known += label
        entropy.append(-math.log(predicted if label else 1 - predicted))
    dice = 1 - (2 * both + 1e-5) / (seen + known + 1e-5)
    if name == "dice":
        return dice
    if name == "dice-ce":
        return dice + sum(entropy) / len(entropy)
    if name == "tversky":
        return 1 - (both + 1e-5) / (both + 0.3 * (seen - both) + 0.7 * (known - both) + 1e-5)
    n = p.size
    volumes = [n - known, known]  # of background and foreground
    overlaps = [n - known - seen + both, both]
    extents = [n - seen + n - known, seen + known]
    weights = [1 / v**2 if v else 0.0 for v in volumes]
    weights = [w or max(weights) for w in weights]  # an absent class weighs as much as the other
    top = 2 * sum(w * o for w, o in zip(weights, overlaps, strict=True))
    return 1 - top / sum(w * e for w, e in zip(weights, extents, strict=True))


@pytest.mark.parametrize("name", LOSSES)
@given(seed=st.integers(0, 1000), share=st.sampled_from([0.0, 0.02, 0.3, 1.0]), crops=st.integers(1, 3))
def test_is_its_formula(name: LossName, seed: int, share: float, crops: int) -> None:
    rng = np.random.default_rng(seed)
    shape = (crops, 1, 3, 4, 5)
    logits = rng.normal(0, 2, shape).astype(np.float32)
    labels = (rng.random(shape) < share).astype(np.float32)
    found = float(loss(name)(torch.from_numpy(logits), torch.from_numpy(labels)))
    assert found == pytest.approx(evaluated(name, logits, labels), abs=2e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_nothing_is_lost_when_all_is_right_and_most_when_all_is_wrong(name: LossName) -> None:
    labels = torch.zeros(2, 1, 4, 4, 4)
    labels[0, 0, :2] = 1
    certain = 40 * (labels - 0.5)
    assert float(loss(name)(certain, labels)) == pytest.approx(0.0, abs=1e-4)
    assert float(loss(name)(-certain, labels)) > 0.99


@pytest.mark.parametrize("name", LOSSES)
def test_an_empty_crop_beside_one_with_cells_teaches_not_to_see_any(name: LossName) -> None:
    labels = torch.zeros(2, 1, 4, 4, 4)
    labels[0, 0, 1, 1, 1] = 1
    logits = torch.zeros_like(labels, requires_grad=True)
    loss(name)(logits, labels).backward()
    assert logits.grad is not None
    assert (logits.grad[1] > 0).all()  # fewer of them, please
    assert logits.grad[0, 0, 1, 1, 1] < 0


def test_missed_voxels_cost_more_than_false_ones_in_tversky() -> None:
    labels = torch.zeros(1, 1, 1, 1, 8)
    labels[..., 2:4] = 1
    missed, false = (torch.full_like(labels, -30.0) for _ in range(2))
    missed[..., 2] = 30.0
    false[..., 1:4] = 30.0
    assert float(loss("tversky")(missed, labels)) > 1.5 * float(loss("tversky")(false, labels))


def test_names() -> None:
    assert get_args(LossName) == LOSSES
    with pytest.raises(ValueError, match=r"generalized-dice.*'focal'"):
        loss("focal")  # type: ignore[arg-type]
