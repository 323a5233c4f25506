"""The density check: silent on tissue, whatever its shape, and loud where seams count cells twice."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from braincensus_kernels.seam_density import count_near_seams, seam_density

VOLUME, BLOCK = (200, 150, 180), (64, 64, 48)
OPTIONS = {"block_shape": BLOCK, "volume_shape": VOLUME, "width_voxels": 5}


def cells(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOLUME, (n, 3))


def doubled(zyx: np.ndarray, axis: int, share: float, seed: int = 0) -> np.ndarray:
    """Count some of the cells on either side of an axis' seams twice."""
    beside = (zyx[:, axis] + 2) % BLOCK[axis] < 4
    beside &= (zyx[:, axis] > 4) & (np.random.default_rng(seed).random(len(zyx)) < share)
    return np.concatenate([zyx, zyx[beside]])


def test_uniform_cells_leave_no_trace():
    scores = [seam_density(cells(20_000, seed), **OPTIONS).z_score for seed in range(40)]
    assert np.abs(scores).max() < 4
    assert 0.7 < np.std(scores) < 1.3
    assert abs(np.mean(scores)) < 0.6


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_cells_counted_twice_at_seams_are_noticed_on_their_axis(axis):
    found = seam_density(doubled(cells(20_000, 1), axis, share=1.0), **OPTIONS)
    assert found.z_scores[axis] > 8
    assert found.near[axis] > 1.3 * found.expected[axis]
    assert all(abs(z) < 4 for other, z in enumerate(found.z_scores) if other != axis)
    assert found.z_score > 4


def test_cells_lost_at_seams_are_noticed():
    zyx = cells(20_000, 2)
    lost = zyx[(zyx[:, 2] + 2) % BLOCK[2] >= 4]
    assert seam_density(lost, **OPTIONS).z_scores[2] < -8


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_smooth_gradient_is_no_seam(axis):
    zyx = cells(80_000, 3)
    kept = np.random.default_rng(4).random(len(zyx)) < (zyx[:, axis] + 1) / VOLUME[axis]
    assert abs(seam_density(zyx[kept], **OPTIONS).z_scores[axis]) < 4
    wave = 0.5 + 0.5 * np.sin(zyx[:, axis] / VOLUME[axis] * 5)
    kept = np.random.default_rng(5).random(len(zyx)) < wave
    assert abs(seam_density(zyx[kept], **OPTIONS).z_scores[axis]) < 4


@given(st.integers(0, 2**32), st.integers(1, 5))
def test_parts_add_up_in_any_order(seed, n_parts):
    rng = np.random.default_rng(seed)
    zyx = cells(300, seed)
    options = {"block_shape": BLOCK, "volume_shape": VOLUME}
    whole = count_near_seams(zyx, **options)
    parts = [count_near_seams(part, **options) for part in np.array_split(rng.permutation(zyx), n_parts)]
    total = parts[0]
    for part in parts[1:]:
        total = part + total
    for a, b in zip(whole.cells, total.cells, strict=True):
        np.testing.assert_array_equal(a, b)
    assert whole.check(5) == total.check(5)


@given(st.tuples(*[st.integers(1, 20)] * 3), st.tuples(*[st.integers(1, 30)] * 3), st.integers(1, 4))
def test_a_cell_in_every_voxel_is_expected_exactly(block, volume, width):
    """So the bands hold equally many planes on both sides of every seam that counts."""
    everywhere = np.argwhere(np.ones(volume, bool))
    found = seam_density(everywhere, block_shape=block, volume_shape=volume, width_voxels=width)
    sides = [b for b, n in zip(block, volume, strict=True) if n > b]
    if not sides or min(sides) < 6 * width:
        assert found is None
    elif found is not None:
        for near, expected, z in zip(found.near, found.expected, found.z_scores, strict=True):
            assert (near, z) == ((expected, 0.0) if near is not None else (None, None))


def test_a_last_block_too_thin_for_the_bands_is_left_out():
    options = {"block_shape": (1, 1, 12), "volume_shape": (1, 1, 25), "width_voxels": 2}
    zyx = np.array([[0, 0, 23], [0, 0, 24], [0, 0, 11]])
    assert seam_density(zyx, **options).near == (None, None, 1)
    assert seam_density(zyx, **(options | {"volume_shape": (1, 1, 30)})).near == (None, None, 3)


def test_centroids_count_where_their_voxel_is():
    options = {"block_shape": (1, 1, 12), "volume_shape": (1, 1, 24), "width_voxels": 1}
    assert seam_density(np.array([[0.2, -0.4, 11.49]]), **options).near[2] == 1
    assert seam_density(np.array([[0.0, 0.0, 9.49]]), **options).near[2] == 0


def test_none_where_nothing_can_be_told():
    assert seam_density(cells(10, 0), block_shape=VOLUME, volume_shape=VOLUME, width_voxels=1) is None
    assert seam_density(cells(10, 0), block_shape=(5, 5, 5), volume_shape=VOLUME, width_voxels=1) is None
    none = seam_density(np.empty((0, 3)), **OPTIONS)
    assert (none.near, none.z_score) == ((0, 0, 0), 0.0)
    assert none.summary()["z_scores"] == [0.0, 0.0, 0.0]


def test_what_cannot_be_used_is_refused():
    with pytest.raises(ValueError, match="outside"):
        seam_density(np.array([[0, 0, 180]]), **OPTIONS)
    with pytest.raises(ValueError, match="width_voxels"):
        seam_density(cells(1, 0), **(OPTIONS | {"width_voxels": 0}))
    with pytest.raises(ValueError, match="shape"):
        count_near_seams(np.zeros(3), block_shape=BLOCK, volume_shape=VOLUME)
    a = count_near_seams(cells(1, 0), block_shape=BLOCK, volume_shape=VOLUME)
    b = count_near_seams(cells(1, 0), block_shape=(64, 64, 64), volume_shape=VOLUME)
    with pytest.raises(ValueError, match="do not add up"):
        a + b
