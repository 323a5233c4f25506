"""The soft normalised cut: how well a soft segmentation cuts an image where it changes.

It is the label-free half of WNet3D's training loss. This is the class-mean form, which the
published code uses: each class's affinity is measured against the class's own mean intensity,
so that the cost is linear in the voxels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

_EMPTY_CLASS = 1e-5
_EMPTY_CUT = 1e-6


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
    Source: CellSeg3D's published implementation (MIT); the pairwise form of its paper differs.
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
        if (
            image.shape[1] != 1
            or image.shape[0] != probabilities.shape[0]
            or image.shape[2:] != probabilities.shape[2:]
        ):
            raise ValueError(
                f"expected an image of one channel for probabilities {tuple(probabilities.shape)}, "
                f"got {tuple(image.shape)}"
            )
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
