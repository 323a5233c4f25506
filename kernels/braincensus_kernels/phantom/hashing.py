"""Random numbers of a phantom: hashes of the seed and of where they are used (splitmix64's mixing).

Below everything else in a phantom: how many cells, where, and what they look like all start here.

numba compiles these functions into their callers and caches the result by the caller's file alone:
after a change here, of `tissue.fourth` or of `profiles.span`, delete the caches (``__pycache__/*.nb*``)
or callers keep the old code.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
from scipy.special import ndtri

# What a hash is for, so that no two uses share one.
COUNT, PLACE, LOOK, ARTEFACT, TEXTURE, NOISE = range(1, 7)

jit: Any = numba.njit(cache=True, nogil=True)
u64 = np.uint64

_MASK = (1 << 64) - 1


def key_of(seed: int, *where: int) -> int:
    """Derive the key of one use of the seed: `hash_of`, chained, in Python."""
    key = seed
    for part in where:
        key = (key ^ ((part + 0x9E3779B97F4A7C15) * 0xD1342543DE82EF95)) & _MASK
        key = ((key ^ (key >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        key = ((key ^ (key >> 27)) * 0x94D049BB133111EB) & _MASK
        key ^= key >> 31
    return key


@jit
def hash_of(key, part):  # type: ignore[no-untyped-def]
    """Derive a key from a key and a whole number: `key_of`, compiled."""
    key = key ^ ((u64(part) + u64(0x9E3779B97F4A7C15)) * u64(0xD1342543DE82EF95))
    key = (key ^ (key >> u64(30))) * u64(0xBF58476D1CE4E5B9)
    key = (key ^ (key >> u64(27))) * u64(0x94D049BB133111EB)
    return key ^ (key >> u64(31))


@jit
def unit(key):  # type: ignore[no-untyped-def]
    """Turn a key into a number from 0 to below 1."""
    return np.float64(key >> u64(11)) * (1.0 / 9007199254740992.0)


@cache
def gaussians() -> npt.NDArray[np.float32]:
    """Tabulate the quantiles of the normal distribution: 16 random bits to one normal number."""
    return np.asarray(ndtri((np.arange(65536) + 0.5) / 65536), dtype=np.float32)
