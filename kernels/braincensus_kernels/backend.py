"""NumPy or CuPy: the only module that imports CuPy, and only when an array of it, or a GPU, turns up.

Kernels ask :func:`array_module` which library their input belongs to and compute there.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import numpy as np


def is_cupy(array: Any) -> bool:
    """Whether an array lives in CuPy; never imports CuPy to find out."""
    cupy = sys.modules.get("cupy")
    return cupy is not None and isinstance(array, cupy.ndarray)


def array_module(array: Any) -> ModuleType:
    """Return the library that computes on an array: CuPy for its arrays, NumPy for all else.

    Examples
    --------
    >>> array_module(np.zeros(3)).__name__
    'numpy'
    """
    return sys.modules["cupy"] if is_cupy(array) else np


def ndimage_module(array: Any) -> ModuleType:
    """Return the `ndimage` (SciPy's or CuPy's) that computes on an array."""
    if is_cupy(array):
        from cupyx.scipy import ndimage
    else:
        from scipy import ndimage
    module: ModuleType = ndimage
    return module


def to_numpy(array: Any) -> np.ndarray[Any, Any]:
    """Copy a CuPy array to host memory; return a NumPy array as it is."""
    host: np.ndarray[Any, Any] = array.get() if is_cupy(array) else np.asarray(array)
    return host


def to_device(array: np.ndarray[Any, Any], device: str) -> Any:
    """Move an array to where it is computed on: CuPy on ``cuda``, as it is on ``cpu``."""
    if device != "cuda":
        return array
    import cupy

    return cupy.asarray(array)


def cuda_available() -> bool:
    """Whether CuPy is installed and sees a GPU that it can use.

    CuPy imports without a GPU, and ``cucim.is_available()`` is true without one: neither proves a device.
    """
    try:
        import cupy
    except ImportError:
        return False
    try:
        return bool(cupy.cuda.is_available())
    except cupy.cuda.runtime.CUDARuntimeError:  # a driver too old for this CuPy raises
        return False
