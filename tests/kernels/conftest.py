"""What the tests of several labellers share: stitching, as simply as can be."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from braincensus_kernels.block_labels import BlockLabels
from braincensus_kernels.boxes import Box, Triple
from braincensus_kernels.union_find import connected

Stitch = Callable[[Sequence[tuple[Box, BlockLabels]], Triple], NDArray[np.int64]]


@pytest.fixture(scope="session")
def stitch() -> Stitch:
    """Join blocks by their anchors; give each voxel's cell, by its identity (-1: none)."""
    return _stitch


def _stitch(results: Sequence[tuple[Box, BlockLabels]], volume_shape: Triple) -> NDArray[np.int64]:
    """Join the identities of blocks; every voxel that any block kept must then be of one cell."""
    pairs = [np.empty((0, 2), np.int64)]
    identities = [np.concatenate(([-1], r.seeds))[r.labels] for _, r in results]
    for i, (core, result) in enumerate(results):
        for j, (other_core, other) in enumerate(results):
            if not _share_a_face(core, other_core):
                continue
            common = result.kept.intersect(other.kept)
            here, there = common.slices_in(result.kept), common.slices_in(other.kept)
            if result.anchors is not None and other.anchors is not None:
                both = result.anchors[here] & other.anchors[there]
                pairs.append(np.stack([identities[i][here][both], identities[j][there][both]], axis=1))
    for _, result in results:
        for identity in result.unanchored:
            at = np.unravel_index(identity, volume_shape)
            for owner, (owner_core, owner_result) in enumerate(results):
                local = tuple(int(a) - o for a, o in zip(at, owner_result.kept.start, strict=True))
                if all(a <= p < b for a, p, b in zip(owner_core.start, at, owner_core.stop, strict=True)):
                    assert owner_result.anchors is not None
                    assert owner_result.anchors[local]
                    pairs.append(np.array([[identity, identities[owner][local]]]))
    ids, representative = connected(np.concatenate(pairs))
    stitched = np.full(volume_shape, -1, np.int64)
    for (core, result), identity in zip(results, identities, strict=True):
        stitched[core.slices] = _representatives(identity, ids, representative)[core.slices_in(result.kept)]
    for (_, result), identity in zip(results, identities, strict=True):
        joined = _representatives(identity, ids, representative)
        np.testing.assert_array_equal(joined, stitched[result.kept.slices])
    return stitched


def _share_a_face(a: Box, b: Box) -> bool:
    return any(
        a.stop[axis] == b.start[axis]
        and all((a.start[o], a.stop[o]) == (b.start[o], b.stop[o]) for o in range(3) if o != axis)
        for axis in range(3)
    )


def _representatives(
    identity: NDArray[np.int64], ids: NDArray[np.int64], representative: NDArray[np.int64]
) -> NDArray[np.int64]:
    at = np.minimum(np.searchsorted(ids, identity), max(len(ids) - 1, 0))
    if not len(ids):
        return identity
    return np.where(ids[at] == identity, representative[at], identity)
