"""Union-find: the sets of a graph library, whatever the order of the pairs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from braincensus_kernels.union_find import connected


@given(
    pairs=st.lists(st.tuples(st.integers(-3, 40), st.integers(-3, 40)), max_size=60),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=100, deadline=None)
def test_sets_are_connected_components(pairs, seed):
    pairs = np.array(pairs, np.int64).reshape(-1, 2)
    ids, representative = connected(pairs)
    assert ids.tolist() == sorted(set(pairs.ravel().tolist()))
    graph = coo_array((np.ones(len(pairs)), (pairs + 3).T), shape=(44, 44))
    _, component = connected_components(graph, directed=False)
    for i, r in zip(ids, representative, strict=True):
        assert r == min(j for j in ids if component[j + 3] == component[i + 3])
    rng = np.random.default_rng(seed)
    shuffled = rng.permuted(rng.permutation(pairs), axis=1)
    np.testing.assert_array_equal(connected(shuffled)[1], representative)


def test_long_chains_of_large_ids():
    ids = np.arange(10**6, dtype=np.int64) * 10**12
    chain = np.stack([ids[1:], ids[:-1]], 1)
    for pairs in (chain, chain[::-1], np.random.default_rng(0).permutation(chain)):
        found, representative = connected(pairs)
        np.testing.assert_array_equal(found, ids)
        assert not representative.any()


def test_no_pairs_are_no_sets():
    ids, representative = connected(np.empty((0, 2), np.int64))
    assert ids.size == representative.size == 0


def test_wrong_pairs_are_refused():
    with pytest.raises(ValueError, match="shape"):
        connected(np.zeros(4, np.int64))
    with pytest.raises(TypeError, match="int64"):
        connected(np.zeros((4, 2)))
