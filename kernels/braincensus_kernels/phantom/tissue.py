"""Where a phantom has tissue: a rounded block, or everywhere.

Before any cell: how many cells a place gets and can hold goes by its tissue. An outline is eight
numbers: the centre (um), the inverse semi-axes, and q = sum |u|^4 where tissue is whole and where it ends.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from braincensus_kernels.boxes import Triple
from braincensus_kernels.phantom.hashing import jit

_SAMPLES = 6  # sample points along each axis of a tile that the tissue's surface cuts


def outline(
    kind: Literal["blob", "full"], *, shape: Triple, voxel_size_um: tuple[float, float, float]
) -> npt.NDArray[np.float64]:
    """Return the outline of the tissue of a volume."""
    size = np.array(shape) * np.array(voxel_size_um, np.float64)
    semi = 0.48 * size
    edge = min(3 * max(voxel_size_um), 0.2 * float(semi.min()))
    whole = (1 - edge / float(semi.min())) ** 4
    if kind == "full":
        return np.concatenate([size / 2, np.zeros(3), [1.0, 2.0]])
    return np.concatenate([size / 2, 1 / semi, [whole, 1.0]])


@jit
def fourth(u):  # type: ignore[no-untyped-def]
    """Fourth power, always in the same order of multiplication."""
    return (u * u) * (u * u)


@jit
def tissue_voxels(z, y0, y1, nx, side, shape, size, tissue):  # type: ignore[no-untyped-def]
    """Voxels of tissue in the tiles of some rows of one plane; counted at sample points where cut."""
    out = np.zeros((y1 - y0, nx), np.int64)
    # The least and the greatest |u|^4 of an axis over a tile; sums of them decide most tiles.
    low, high = np.zeros((3, max(y1 - y0, nx))), np.zeros((3, max(y1 - y0, nx)))
    for axis in range(3):
        first = z if axis == 0 else (y0 if axis == 1 else 0)
        n = 1 if axis == 0 else (y1 - y0 if axis == 1 else nx)
        for i in range(n):
            a = ((first + i) * side[axis] * size[axis] - tissue[axis]) * tissue[3 + axis]
            b = (min((first + i + 1) * side[axis], shape[axis]) * size[axis] - tissue[axis]) * tissue[
                3 + axis
            ]
            high[axis, i] = max(fourth(a), fourth(b))
            low[axis, i] = 0.0 if a <= 0 <= b else min(fourth(a), fourth(b))
    for y in range(y1 - y0):
        for x in range(nx):
            if low[0, 0] + low[1, y] + low[2, x] > tissue[6]:
                continue
            start = (z * side[0], (y0 + y) * side[1], x * side[2])
            ez = min(side[0], shape[0] - start[0])
            ey = min(side[1], shape[1] - start[1])
            ex = min(side[2], shape[2] - start[2])
            if high[0, 0] + high[1, y] + high[2, x] <= tissue[6]:
                out[y, x] = ez * ey * ex
                continue
            hits = 0
            for i in range(_SAMPLES):
                qz = fourth(((start[0] + (i + 0.5) / _SAMPLES * ez) * size[0] - tissue[0]) * tissue[3])
                for j in range(_SAMPLES):
                    qy = fourth(((start[1] + (j + 0.5) / _SAMPLES * ey) * size[1] - tissue[1]) * tissue[4])
                    for k in range(_SAMPLES):
                        qx = fourth(
                            ((start[2] + (k + 0.5) / _SAMPLES * ex) * size[2] - tissue[2]) * tissue[5]
                        )
                        hits += qz + qy + qx <= tissue[6]
            # A sliver that few points hit has a volume too uncertain to promise cells room in it.
            if hits >= 12:
                out[y, x] = ez * ey * ex * hits // _SAMPLES**3
    return out
