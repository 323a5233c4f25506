"""How the picture of a phantom is taken: shading of the light, and the noise of the camera.

The last step of a box, after cells, artefacts and tissue have added their light.
"""

from __future__ import annotations

from math import exp

import numpy as np
import numpy.typing as npt

from braincensus_kernels.boxes import Box, Triple
from braincensus_kernels.phantom.hashing import hash_of, jit, u64


def shades(
    box: Box, *, shape: Triple, falloff: float, shading: float
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Return the share of the light that is left, along z and along x of a box."""
    z = (np.arange(box.start[0], box.stop[0]) + 0.5) / shape[0]
    x = (np.arange(box.start[2], box.stop[2]) + 0.5) / shape[2]
    # math.exp one by one: the vectorised one may round differently by position in the array.
    shade_z = np.array([exp(-falloff * v) for v in z], np.float32)
    return shade_z, (1 - shading * (2 * x - 1) ** 2).astype(np.float32)


@jit
def expose(light, out, start, shape, shade_z, shade_x, offset, gain, read, key, gauss):  # type: ignore[no-untyped-def]
    """Shade, and take the picture: photon noise with the skewness of Poisson, read noise, 16 bits."""
    nz, ny, nx = light.shape
    for z in range(nz):
        for y in range(ny):
            row = u64(start[0] + z) * u64(shape[1]) + u64(start[1] + y)
            row_key = hash_of(key, row)
            for x in range(nx):
                signal = light[z, y, x] * shade_z[z] * shade_x[x]
                bits = hash_of(row_key, start[2] + x)
                g = gauss[bits & u64(0xFFFF)]
                e = gauss[(bits >> u64(16)) & u64(0xFFFF)]
                shot = np.sqrt(gain * signal) * g + gain * (g * g - 1) / 6
                value = offset + signal + shot + np.sqrt(read) * e
                out[z, y, x] = np.uint16(min(max(np.floor(value + 0.5), 0.0), 65535.0))
