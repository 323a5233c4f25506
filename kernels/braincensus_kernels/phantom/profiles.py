"""What one cell of a phantom looks like: a ball blurred by the point-spread function.

After cells are placed: a table of blurred balls is made once, and balls are added to the light of a box,
or painted whole into its true labels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import ceil, pi, sqrt
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import erf, ndtri

from braincensus_kernels.phantom.hashing import jit

_RADII = 33  # distinct radii; a table of blurred balls holds each


def radii(mean: float, spread: float) -> npt.NDArray[np.float64]:
    """Return the distinct radii, at equal steps of probability of a normal cut at two deviations."""
    low, high = 0.022750131948179195, 0.9772498680518208
    levels = low + (high - low) * (np.arange(_RADII) + 0.5) / _RADII
    return np.asarray(mean + spread * ndtri(levels), dtype=np.float64)


@dataclass(frozen=True)
class BlurTable:
    """Blurred balls of each radius, 1 at their centre, by distance across z and along it."""

    values: npt.NDArray[np.float32]  # radius, across, along
    step_um: float
    across_um: float
    along_um: float

    @property
    def reach_um(self) -> float:
        """How far from its centre a ball of the largest radius is seen."""
        return max(self.across_um, self.along_um)

    @property
    def arrays(self) -> tuple[npt.NDArray[np.float32], float, float, float]:
        """What `add_balls` takes."""
        return self.values, self.step_um, self.across_um, self.along_um


@lru_cache(maxsize=8)
def blur_table(
    radii: tuple[float, ...], sigma_z: float, sigma: float, tail: float, factor: float
) -> BlurTable:
    """Blur evenly, which has a closed form for a ball; the rest, along z, is a weighted sum of that."""
    step = sigma / 4
    across = float(radii[-1]) + 4 * sigma
    widest = sigma_z * (factor if tail else 1.0)
    along = float(radii[-1]) + 3.5 * widest
    rho = np.arange(ceil(across / step) + 2) * step
    z = np.arange(ceil(along / step) + 2) * step
    shift = np.arange(-ceil(3.5 * widest / step), ceil(3.5 * widest / step) + 1) * step
    kernel = (1 - tail) * _normal(shift, sqrt(sigma_z**2 - sigma**2), step)
    kernel += tail * _normal(shift, sqrt((sigma_z * factor) ** 2 - sigma**2), step)
    reach = z[-1] + shift[-1]
    line = np.arange(-round(reach / step), round(reach / step) + 1) * step
    distance = np.sqrt(rho[:, None] ** 2 + line**2)
    values = np.zeros((len(radii), len(rho), len(z)), np.float32)
    windows = np.lib.stride_tricks.sliding_window_view(np.arange(len(line)), len(kernel))
    middle = len(line) // 2 - len(kernel) // 2
    for i, radius in enumerate(radii):
        even = _blurred_ball(distance, float(radius), sigma)
        blurred = even[:, windows[middle : middle + len(z)]] @ kernel
        # Down to exactly 0 at the table's end, so that no cell stops in a visible step.
        fade = np.minimum(1, (across - rho) / sigma).clip(0)[:, None] * np.minimum(
            1, (along - z) / sigma_z
        ).clip(0)
        values[i] = blurred / blurred[0, 0] * fade
    return BlurTable(values, step, across, along)


def _normal(x: npt.NDArray[Any], sigma: float, step: float) -> npt.NDArray[np.float64]:
    if sigma < step / 2:
        return np.asarray(x == 0, dtype=np.float64)
    w = np.exp(-0.5 * (x / sigma) ** 2)
    return np.asarray(w / w.sum(), dtype=np.float64)


def _blurred_ball(d: npt.NDArray[np.float64], radius: float, sigma: float) -> npt.NDArray[np.float64]:
    """Return a ball of brightness 1 blurred by an isotropic Gaussian, at distance `d` from its centre."""
    d = np.maximum(d, 1e-3 * sigma)
    a, b = (radius - d) / (sqrt(2) * sigma), (radius + d) / (sqrt(2) * sigma)
    wave = sigma / (sqrt(2 * pi) * d) * (np.exp(-(a**2)) - np.exp(-(b**2)))
    return np.asarray(0.5 * (erf(a) + erf(b)) - wave, dtype=np.float64)


@jit
def span(centre, reach, size, start, n):  # type: ignore[no-untyped-def]
    """First and last voxel of a box, along one axis, whose centre is within reach of a place in um."""
    a = int(np.ceil((centre - reach) / size - 0.5)) - start
    b = int(np.floor((centre + reach) / size - 0.5)) - start + 1
    return max(a, 0), min(b, n)


@jit
def add_balls(light, start, size, centres, which, peaks, table, step, across, along):  # type: ignore[no-untyped-def]
    """Add blurred balls to the light of a box: of which radius, and how bright their peaks are."""
    for i in range(len(centres)):
        z0, z1 = span(centres[i, 0], along, size[0], start[0], light.shape[0])
        y0, y1 = span(centres[i, 1], across, size[1], start[1], light.shape[1])
        x0, x1 = span(centres[i, 2], across, size[2], start[2], light.shape[2])
        ball = table[which[i]]
        for z in range(z0, z1):
            t = abs((z + start[0] + 0.5) * size[0] - centres[i, 0]) / step
            k = int(t)
            t -= k
            for y in range(y0, y1):
                dy = (y + start[1] + 0.5) * size[1] - centres[i, 1]
                for x in range(x0, x1):
                    dx = (x + start[2] + 0.5) * size[2] - centres[i, 2]
                    s = np.sqrt(dy * dy + dx * dx)
                    if s >= across:
                        continue
                    s /= step
                    j = int(s)
                    s -= j
                    near = ball[j, k] * (1 - t) + ball[j, k + 1] * t
                    far = ball[j + 1, k] * (1 - t) + ball[j + 1, k + 1] * t
                    light[z, y, x] += np.float32(peaks[i] * (near * (1 - s) + far * s))


@jit
def paint_labels(out, start, size, cells):  # type: ignore[no-untyped-def]
    """Write the label of each cell into the voxels whose centre its ball holds."""
    nz, ny, nx = out.shape
    for i in range(len(cells)):
        r = cells[i, 4]
        cz, cy, cx = cells[i, 1] / size[0] - 0.5, cells[i, 2] / size[1] - 0.5, cells[i, 3] / size[2] - 0.5
        for z in range(max(0, int(np.ceil(cz - r / size[0])) - start[0]), nz):
            dz = ((z + start[0]) - cz) * size[0]
            if dz > r:
                break
            for y in range(max(0, int(np.ceil(cy - r / size[1])) - start[1]), ny):
                dy = ((y + start[1]) - cy) * size[1]
                if dy > r:
                    break
                for x in range(max(0, int(np.ceil(cx - r / size[2])) - start[2]), nx):
                    dx = ((x + start[2]) - cx) * size[2]
                    if dx > r:
                        break
                    if dz * dz + dy * dy + dx * dx <= r * r:
                        out[z, y, x] = np.uint32(cells[i, 0])
