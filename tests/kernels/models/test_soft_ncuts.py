"""The loss against a direct evaluation, voxel by voxel, of its definition."""

from math import exp

import numpy as np
import pytest
import torch

from braincensus_kernels.models.soft_ncuts import ClassMeanSoftNCuts


def direct(p: np.ndarray, x: np.ndarray, *, sigma_i: float, sigma_x: float, radius: int) -> float:
    """p: (batch, class, z, y, x), x: (batch, z, y, x); plain sums over pairs of voxels."""
    batch, classes = p.shape[:2]
    voxels = list(np.ndindex(x.shape[1:]))
    reach = range(-radius, radius + 1)
    loss = float(classes)
    for k in range(classes):
        ratios = []
        for b in range(batch):
            mean = np.mean(x[b] * p[b, k]) / (np.mean(p[b, k]) + 1e-5)
            assoc = total = 0.0
            for v in voxels:
                for dz in reach:
                    for dy in reach:
                        for dx in reach:
                            u = (v[0] + dz, v[1] + dy, v[2] + dx)
                            if any(i < 0 or i >= n for i, n in zip(u, x.shape[1:], strict=True)):
                                continue
                            near = exp(-(dz * dz + dy * dy + dx * dx) / (2 * sigma_x**2))
                            weight = exp(-(((x[b][u] - mean) ** 2) ** 2) / sigma_i**2)
                            assoc += p[b, k][v] * near * p[b, k][u] * weight
                            total += p[b, k][v] * near * weight
            ratios.append(abs(assoc / (total + 1e-6)))
        loss -= float(np.mean(ratios))
    return loss


@pytest.mark.parametrize(("classes", "radius", "sigma_i"), [(2, 2, 1.0), (3, 1, 2.5), (2, 0, 1.0)])
def test_equals_direct_evaluation(classes: int, radius: int, sigma_i: float) -> None:
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(classes), (2, 4, 5, 3)).transpose(0, 4, 1, 2, 3)
    x = rng.uniform(3, 6, (2, 4, 5, 3))
    loss = ClassMeanSoftNCuts(intensity_sigma=sigma_i, spatial_sigma_voxels=4.0, radius_voxels=radius)
    got = loss(torch.from_numpy(p), torch.from_numpy(x)[:, None])
    assert float(got) == pytest.approx(direct(p, x, sigma_i=sigma_i, sigma_x=4.0, radius=radius), rel=1e-6)


def test_gradient_is_that_of_the_loss() -> None:
    torch.manual_seed(0)
    logits = torch.randn(1, 2, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    image = torch.rand(1, 1, 3, 3, 3, dtype=torch.float64) * 4
    loss = ClassMeanSoftNCuts().double()
    assert torch.autograd.gradcheck(lambda z: loss(torch.softmax(z, 1), image), (logits,))


def test_a_clean_cut_costs_nothing_and_a_blurred_one_does() -> None:
    image = torch.zeros(1, 1, 12, 12, 12)
    image[..., 6:] = 50
    bright = (image > 25).float()
    loss = ClassMeanSoftNCuts()
    clean = float(loss(torch.cat([1 - bright, bright], 1), image))
    swapped = float(loss(torch.cat([bright, 1 - bright], 1), image))
    shifted = float(loss(torch.cat([1 - bright.roll(2, 4), bright.roll(2, 4)], 1), image))
    undecided = float(loss(torch.full((1, 2, 12, 12, 12), 0.5), image))
    assert clean == pytest.approx(0, abs=1e-4)
    assert swapped == pytest.approx(clean)
    assert shifted > 0.1
    assert undecided > 1


def test_refuses_images_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="one channel"):
        ClassMeanSoftNCuts()(torch.zeros(1, 2, 4, 4, 4), torch.zeros(1, 2, 4, 4, 4))
    with pytest.raises(ValueError, match="sigmas"):
        ClassMeanSoftNCuts(intensity_sigma=0)
