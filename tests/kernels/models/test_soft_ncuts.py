"""Both forms of the loss against a direct evaluation of their definitions, over all pairs of voxels."""

from math import exp

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from braincensus_kernels.models.soft_ncuts import ClassMeanSoftNCuts, PairwiseSoftNCuts, soft_ncuts


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


def direct_pairwise(p: np.ndarray, x: np.ndarray, *, sigma_i: float, sigma_x: float, radius: int) -> float:
    """Equations (1) and (2) with the whole matrix of weights: cut(A, V - A) / cut(A, V), summed."""
    where = np.stack(np.meshgrid(*map(np.arange, x.shape[1:]), indexing="ij"), -1).reshape(-1, 3)
    distance = np.linalg.norm(where[:, None] - where[None], axis=-1)
    loss = 0.0
    for probabilities, image in zip(p.reshape(*p.shape[:2], -1), x.reshape(len(x), -1), strict=True):
        difference = image[:, None] - image[None]
        w = np.exp(-(difference**2) / sigma_i**2) * np.exp(-(distance**2) / sigma_x**2)
        w[distance >= radius] = 0
        for a in probabilities:
            loss += (a @ w @ (1 - a)) / (a @ w @ np.ones_like(a)) / len(p)
    return loss


@given(
    classes=st.integers(2, 4),
    radius=st.integers(1, 4),
    sigma_i=st.floats(0.5, 5),
    sigma_x=st.floats(1, 6),
    shape=st.tuples(*[st.integers(1, 5)] * 3),
    batch=st.integers(1, 2),
    seed=st.integers(0, 99),
)
def test_pairwise_equals_direct_evaluation(
    classes: int,
    radius: int,
    sigma_i: float,
    sigma_x: float,
    shape: tuple[int, int, int],
    batch: int,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    p = np.moveaxis(rng.dirichlet(np.ones(classes), (batch, *shape)), -1, 1)
    x = rng.uniform(3, 9, (batch, *shape))
    loss = PairwiseSoftNCuts(intensity_sigma=sigma_i, spatial_sigma_voxels=sigma_x, radius_voxels=radius)
    got = loss(torch.from_numpy(p), torch.from_numpy(x)[:, None])
    expected = direct_pairwise(p, x, sigma_i=sigma_i, sigma_x=sigma_x, radius=radius)
    assert float(got) == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_pairwise_gradient_is_that_of_the_loss() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    image = torch.rand(2, 1, 2, 3, 4, dtype=torch.float64) * 4
    loss = PairwiseSoftNCuts(radius_voxels=3, intensity_sigma=2.0)
    assert torch.autograd.gradcheck(lambda z: loss(torch.softmax(z, 1), image), (logits,))


def test_pairwise_keeps_no_copy_of_the_neighbourhood() -> None:
    def kept(side: int, radius: int) -> int:
        voxels = 0

        def count(x: torch.Tensor) -> torch.Tensor:
            nonlocal voxels
            voxels += x.numel()
            return x

        p = torch.full((1, 2, side, side, side), 0.5, requires_grad=True)
        image = torch.rand(1, 1, side, side, side)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            PairwiseSoftNCuts(radius_voxels=radius)(p, image)
        return voxels

    assert kept(12, 2) == kept(12, 5)
    assert kept(12, 3) < 8 * 12**3
    assert kept(16, 3) == pytest.approx(kept(8, 3) * 8, rel=0.01)


def test_pairwise_cuts_where_the_image_changes() -> None:
    image = torch.zeros(1, 1, 12, 12, 12)
    image[..., 6:] = 50
    bright = (image > 25).float()
    loss = PairwiseSoftNCuts()
    assert float(loss(torch.cat([1 - bright, bright], 1), image)) == pytest.approx(0, abs=1e-4)
    assert float(loss(torch.cat([1 - bright.roll(2, 4), bright.roll(2, 4)], 1), image)) > 0.05
    assert float(loss(torch.full((1, 3, 12, 12, 12), 1 / 3), image)) == pytest.approx(2, abs=1e-4)
    assert float(loss(torch.cat([torch.ones_like(image), torch.zeros_like(image)], 1), image)) == 1


def test_a_form_by_its_name() -> None:
    options = {"intensity_sigma": 2.0, "spatial_sigma_voxels": 3.0, "radius_voxels": 1}
    assert isinstance(soft_ncuts("pairwise", **options), PairwiseSoftNCuts)  # type: ignore[arg-type]
    assert isinstance(soft_ncuts("class-mean", **options), ClassMeanSoftNCuts)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="class-mean or pairwise"):
        soft_ncuts("mean", **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="one channel"):
        PairwiseSoftNCuts()(torch.zeros(1, 2, 4, 4, 4), torch.zeros(1, 2, 4, 4, 4))
    with pytest.raises(ValueError, match="radius 1 or more"):
        PairwiseSoftNCuts(radius_voxels=0)
