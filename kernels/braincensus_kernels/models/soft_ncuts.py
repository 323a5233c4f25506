"""The soft normalised cut: how well a soft segmentation cuts an image where it changes.

It is the label-free half of WNet3D's training loss, and it comes in two forms:

    class-mean   of the published code: a voxel's affinity to a class is that to the class's mean intensity
    pairwise     of the paper, equations (1) and (2): the affinity of every two voxels within the radius

The first asks how well each class gathers round one brightness of the whole crop, the second only whether
neighbours alike in brightness are in one class. Both need memory for a few copies of the crop, whatever
the radius. The pairwise form is exact, no sampling: its affinity is a symmetric linear map of the
probabilities, so that its gradient is what the forward pass has summed up already.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from math import exp
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

_EMPTY_CLASS = 1e-5
_EMPTY_CUT = 1e-6

SoftNCutsForm = Literal["class-mean", "pairwise"]


def soft_ncuts(
    form: SoftNCutsForm, *, intensity_sigma: float, spatial_sigma_voxels: float, radius_voxels: int
) -> ClassMeanSoftNCuts | PairwiseSoftNCuts:
    """Return the loss of that form.

    Raises
    ------
    ValueError
        If there is no such form, or a number cannot be used.

    Examples
    --------
    >>> soft_ncuts("pairwise", intensity_sigma=1.0, spatial_sigma_voxels=4.0, radius_voxels=2)
    PairwiseSoftNCuts()
    """
    forms: dict[str, type[ClassMeanSoftNCuts] | type[PairwiseSoftNCuts]] = {
        "class-mean": ClassMeanSoftNCuts,
        "pairwise": PairwiseSoftNCuts,
    }
    if form not in forms:
        raise ValueError(f"the soft normalised cut must be class-mean or pairwise, got {form!r}")
    return forms[form](
        intensity_sigma=intensity_sigma,
        spatial_sigma_voxels=spatial_sigma_voxels,
        radius_voxels=radius_voxels,
    )


class ClassMeanSoftNCuts(nn.Module):
    """Soft normalised cut, class-mean form.

    For class ``k`` of ``K``, with intensities ``x`` and probabilities ``p_k``::

        m_k   = mean(x p_k) / (mean(p_k) + 1e-5)         per image
        w_k   = exp(-((x - m_k)^2)^2 / sigma_I^2)
        assoc = sum_v p_k (G * (p_k w_k))                 G: exp(-d^2 / (2 sigma_X^2)) within the cube
        total = sum_v p_k (G * w_k)                       of (2 radius + 1)^3 voxels, zeros outside
        loss  = K - sum_k mean_batch |assoc / (total + 1e-6)|

    Parameters
    ----------
    intensity_sigma
        Scale of intensity differences; 1 suits intensities in [0, 100].
    spatial_sigma_voxels
        Width of the spatial Gaussian, in voxels.
    radius_voxels
        Reach of the spatial Gaussian on each axis.

    Notes
    -----
    ``G`` is a product of three one-dimensional kernels, so it is applied one axis at a time:
    3 (2r + 1) instead of (2r + 1)^3 multiplications, and no copy of the neighbourhood.
    Source: CellSeg3D's published implementation (MIT).
    """

    kernel: Tensor

    def __init__(
        self, *, intensity_sigma: float = 1.0, spatial_sigma_voxels: float = 4.0, radius_voxels: int = 2
    ) -> None:
        super().__init__()
        if intensity_sigma <= 0 or spatial_sigma_voxels <= 0 or radius_voxels < 0:
            raise ValueError(
                "sigmas must be positive and the radius not negative, got "
                f"{intensity_sigma}, {spatial_sigma_voxels}, {radius_voxels}"
            )
        self.intensity_sigma = intensity_sigma
        self.radius_voxels = radius_voxels
        offsets = torch.arange(-radius_voxels, radius_voxels + 1, dtype=torch.float32)
        self.register_buffer(
            "kernel", torch.exp(-(offsets**2) / (2 * spatial_sigma_voxels**2)), persistent=False
        )

    def forward(self, probabilities: Tensor, image: Tensor) -> Tensor:
        """Return the loss, a scalar from 0 (clean cut) to K.

        Parameters
        ----------
        probabilities
            (batch, K, z, y, x), summing to 1 over the classes.
        image
            (batch, 1, z, y, x), intensities in [0, 100].
        """
        _check_shapes(probabilities, image)
        space = (2, 3, 4)
        mean = (image * probabilities).mean(space, keepdim=True) / (
            probabilities.mean(space, keepdim=True) + _EMPTY_CLASS
        )
        weight = torch.exp(-((image - mean) ** 4) / self.intensity_sigma**2)
        assoc = (probabilities * self._spread(probabilities * weight)).sum(space)
        total = (probabilities * self._spread(weight)).sum(space)
        per_class = (assoc / (total + _EMPTY_CUT)).abs().mean(0)
        return probabilities.shape[1] - per_class.sum()

    def _spread(self, x: Tensor) -> Tensor:
        """Convolve every channel with the spatial Gaussian, zeros outside."""
        batch, classes = x.shape[:2]
        radius, taps = self.radius_voxels, 2 * self.radius_voxels + 1
        out = x.reshape(batch * classes, 1, *x.shape[2:])
        for axis in range(3):
            shape, padding = [1, 1, 1, 1, 1], [0, 0, 0]
            shape[2 + axis], padding[axis] = taps, radius
            out = functional.conv3d(out, self.kernel.to(x.dtype).view(shape), padding=padding)
        return out.reshape(x.shape)


class PairwiseSoftNCuts(nn.Module):
    """Soft normalised cut, pairwise form: the paper's equations (1) and (2), with soft classes.

    For class ``k`` of ``K``, with intensities ``x`` and probabilities ``p_k``, over all pairs of voxels
    ``u, v`` less than `radius_voxels` apart, ``u = v`` among them::

        w(u, v) = exp(-(x_u - x_v)^2 / sigma_I^2) exp(-|u - v|^2 / sigma_X^2)
        cut(A_k, V - A_k) = sum_uv p_k(u) (1 - p_k(v)) w(u, v)
        cut(A_k, V)       = sum_uv p_k(u) w(u, v)
        loss = sum_k mean_batch cut(A_k, V - A_k) / cut(A_k, V)

    The paper's constant ``c`` divides both cuts, and is left out.

    Parameters
    ----------
    intensity_sigma
        Scale of intensity differences; 1 suits intensities in [0, 100].
    spatial_sigma_voxels
        Scale of distances.
    radius_voxels
        Pairs this far apart, or farther, are left out: with 1 only ``u = v`` is left, with 2 a voxel has
        its 26 neighbours.

    Notes
    -----
    Every offset of the ball is one pass over two views of the crop, and serves both directions of its
    pairs. No gradient flows to the image.
    Source: equations (1) and (2) of the CellSeg3D paper, after Shi and Malik (2000); evaluation is ours.
    """

    def __init__(
        self, *, intensity_sigma: float = 1.0, spatial_sigma_voxels: float = 4.0, radius_voxels: int = 2
    ) -> None:
        super().__init__()
        if intensity_sigma <= 0 or spatial_sigma_voxels <= 0 or radius_voxels < 1:
            raise ValueError(
                "sigmas must be positive and the radius 1 or more, got "
                f"{intensity_sigma}, {spatial_sigma_voxels}, {radius_voxels}"
            )
        self.intensity_sigma = intensity_sigma
        self.spatial_sigma_voxels = spatial_sigma_voxels
        self.radius_voxels = radius_voxels

    def forward(self, probabilities: Tensor, image: Tensor) -> Tensor:
        """Return the loss, a scalar from 0 (clean cut) to K.

        Parameters
        ----------
        probabilities
            (batch, K, z, y, x), summing to 1 over the classes.
        image
            (batch, 1, z, y, x), intensities in [0, 100].
        """
        _check_shapes(probabilities, image)
        with torch.no_grad():
            alike, neighbours = self._gather(probabilities, image)
        assoc: Tensor = _Association.apply(probabilities, alike)  # type: ignore[no-untyped-call]
        total = (probabilities * neighbours).sum((2, 3, 4))
        per_class = (assoc / (total + _EMPTY_CUT)).mean(0)
        return probabilities.shape[1] - per_class.sum()

    def _gather(self, probabilities: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``sum_v w(u, v) p_k(v)`` and ``sum_v w(u, v)`` at every voxel u."""
        alike, neighbours = probabilities.clone(), torch.ones_like(image)  # u = v: its weight is 1
        for offset in _half_ball(self.radius_voxels):
            if any(abs(o) >= n for o, n in zip(offset, image.shape[2:], strict=True)):
                continue
            near = exp(-sum(o * o for o in offset) / self.spatial_sigma_voxels**2)
            here, there = _pairs(offset)
            weight = image[here] - image[there]
            weight.square_().mul_(-1 / self.intensity_sigma**2).exp_().mul_(near)
            alike[here].addcmul_(probabilities[there], weight)
            alike[there].addcmul_(probabilities[here], weight)
            neighbours[here] += weight
            neighbours[there] += weight
        return alike, neighbours


class _Association(torch.autograd.Function):
    """``sum_u p_k(u) alike_k(u)``, where alike is a symmetric map of p: the gradient is twice it."""

    @staticmethod
    def forward(ctx: Any, probabilities: Tensor, alike: Tensor) -> Tensor:
        ctx.save_for_backward(alike)
        return (probabilities * alike).sum((2, 3, 4))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (alike,) = ctx.saved_tensors
        return alike * (2 * gradients[0][:, :, None, None, None]), None


def _half_ball(radius: int) -> Iterator[tuple[int, int, int]]:
    """Offsets shorter than the radius, one of each pair of opposites, without zero."""
    reach = range(1 - radius, radius)
    for z, y, x in product(reach, reach, reach):
        if (z, y, x) > (0, 0, 0) and z * z + y * y + x * x < radius * radius:
            yield z, y, x


def _pairs(offset: tuple[int, int, int]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Slices of a batch that put voxel ``u`` beside ``u + offset``, wherever both exist."""
    here = tuple(slice(max(0, -o), -o if o > 0 else None) for o in offset)
    there = tuple(slice(max(0, o), o if o < 0 else None) for o in offset)
    every = (slice(None), slice(None))
    return every + here, every + there


def _check_shapes(probabilities: Tensor, image: Tensor) -> None:
    if (
        image.shape[1] != 1
        or image.shape[0] != probabilities.shape[0]
        or image.shape[2:] != probabilities.shape[2:]
    ):
        raise ValueError(
            f"expected an image of one channel for probabilities {tuple(probabilities.shape)}, "
            f"got {tuple(image.shape)}"
        )
