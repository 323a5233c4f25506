"""The array library is chosen by the array, and CuPy is imported by the backend alone."""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import ndimage

import braincensus_kernels
from braincensus_kernels import backend


class FakeArray:
    def get(self):
        return np.array([1, 2])


class DriverTooOldError(RuntimeError):
    pass


def fake_cupy(is_available):
    runtime = SimpleNamespace(CUDARuntimeError=DriverTooOldError)
    return SimpleNamespace(
        ndarray=FakeArray, cuda=SimpleNamespace(is_available=is_available, runtime=runtime)
    )


def test_numpy_arrays_compute_in_numpy_and_scipy():
    assert backend.array_module(np.zeros(2)) is np
    assert backend.ndimage_module(np.zeros(2)) is ndimage
    assert not backend.is_cupy(np.zeros(2))


def test_to_numpy_does_not_copy_host_arrays():
    array = np.arange(3)
    assert backend.to_numpy(array) is array


def test_cupy_arrays_compute_in_cupy(monkeypatch):
    cupy = fake_cupy(lambda: True)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    assert backend.array_module(FakeArray()) is cupy
    assert backend.array_module(np.zeros(2)) is np
    np.testing.assert_array_equal(backend.to_numpy(FakeArray()), [1, 2])


def test_no_cupy_means_no_cuda(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)  # what makes `import cupy` fail
    assert not backend.cuda_available()


@pytest.mark.parametrize("seen", [True, False])
def test_cuda_is_what_cupy_sees(monkeypatch, seen):
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy(lambda: seen))
    assert backend.cuda_available() is seen


def test_a_driver_too_old_is_no_cuda(monkeypatch):
    def refuse():
        raise DriverTooOldError

    monkeypatch.setitem(sys.modules, "cupy", fake_cupy(refuse))
    assert not backend.cuda_available()


def test_only_the_backend_imports_cupy():
    importers = set()
    for path in Path(braincensus_kernels.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(name.split(".")[0] in ("cupy", "cupyx", "cucim") for name in names):
                importers.add(path.name)
    assert importers == {"backend.py"}


def test_to_device_leaves_arrays_of_the_cpu_alone():
    array = np.zeros(3)
    assert backend.to_device(array, "cpu") is array
