"""Relabel: numbers follow the seeds, lookups are total."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from braincensus_kernels import relabel
from braincensus_kernels.backend import cuda_available, to_numpy
from braincensus_kernels.relabel import apply_lookup, label_dtype, number_cells


@given(seed=st.integers(0, 2**32), n=st.integers(0, 300), dtype=st.sampled_from(["uint32", "uint64"]))
@settings(max_examples=30, deadline=None)
def test_lookup_is_indexing(seed, n, dtype):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, n + 1, (5, 6, 7), dtype=np.uint32)
    lookup = np.append(0, rng.integers(0, 2**32 if dtype == "uint32" else 2**63, n)).astype(dtype)
    for view in (labels, labels[::2, :, 1:], labels.T):
        final = apply_lookup(view, lookup)
        assert final.dtype == dtype
        np.testing.assert_array_equal(final, lookup[view])


def test_labels_beyond_the_lookup_are_refused():
    lookup = np.array([0, 5], np.uint32)
    with pytest.raises(ValueError, match="label 2 is beyond"):
        apply_lookup(np.array([0, 1, 2], np.uint32), lookup)
    with pytest.raises(ValueError, match="starts with 0"):
        apply_lookup(np.array([0], np.uint32), lookup[1:])
    with pytest.raises(TypeError, match="unsigned"):
        apply_lookup(np.array([0, 1]), lookup)


@given(
    seed=st.integers(0, 2**32),
    n=st.integers(0, 200),
    dtype=st.sampled_from(["uint8", "uint32", "uint64"]),
    final=st.sampled_from(["uint32", "uint64"]),
)
@settings(max_examples=30, deadline=None)
def test_array_operations_look_up_as_the_compiled_loop(seed, n, dtype, final):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, n + 1, (5, 0 if n == 7 else 6, 7)).astype(dtype)
    lookup = np.append(0, rng.integers(0, 2**32, n)).astype(final)
    with pytest.MonkeyPatch.context() as patch:
        compiled = apply_lookup(labels, lookup)
        patch.setattr(relabel, "is_cupy", lambda array: True)
        generic = apply_lookup(labels, lookup)
        with pytest.raises(ValueError, match=f"label {n + 1} is beyond"):
            apply_lookup(np.array([0, n + 1], dtype), lookup)
    assert generic.dtype == compiled.dtype
    np.testing.assert_array_equal(generic, compiled)


def test_cells_are_numbered_without_gaps_in_seed_order():
    seeds = np.array([0, 17, 10**14], np.int64)
    assert number_cells(seeds).tolist() == [1, 2, 3]
    assert number_cells(seeds, kept=np.array([False, True, True])).tolist() == [0, 1, 2]
    assert number_cells(seeds[:0], kept=np.empty(0, bool)).size == number_cells(seeds[:0]).size == 0
    assert number_cells(seeds).dtype == np.uint32
    for wrong in (seeds[::-1], np.array([3, 3])):
        with pytest.raises(ValueError, match="ascending"):
            number_cells(wrong)
    with pytest.raises(ValueError, match="one bool per seed"):
        number_cells(seeds, kept=np.array([True]))


def test_label_type_grows_when_it_must():
    assert label_dtype(0) == label_dtype(2**32 - 1) == np.uint32
    assert label_dtype(2**32) == np.uint64
    with pytest.raises(ValueError, match="negative"):
        label_dtype(-1)


@pytest.mark.gpu
@pytest.mark.skipif(not cuda_available(), reason="needs an NVIDIA GPU with CuPy")
def test_gpu_lookup_is_the_cpu_lookup():
    import cupy

    labels = np.random.default_rng(7).integers(0, 100, (20, 30, 40), dtype=np.uint32)
    lookup = np.append(0, np.arange(99, dtype=np.uint64) + 2**40).astype(np.uint64)
    final = apply_lookup(cupy.asarray(labels), lookup)
    np.testing.assert_array_equal(to_numpy(final), apply_lookup(labels, lookup))
