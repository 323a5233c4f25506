"""Windows for calibration: of a large volume a sample, the same in any order, and no more memory."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from braincensus.blocks import BlockGrid
from braincensus.stages import intensity
from braincensus.stages.intensity import sampled, share_of_windows
from braincensus_kernels.boxes import Box

PLACES = np.stack(np.meshgrid(*[np.arange(0, 512, 32)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)


@given(seed=st.integers(0, 2**32), at_once=st.integers(1, 2000))
def test_the_same_sample_in_any_order(seed: int, at_once: int) -> None:
    order = np.random.default_rng(seed).permutation(len(PLACES))
    kept = np.zeros(len(PLACES), bool)
    for first in range(0, len(order), at_once):
        some = order[first : first + at_once]
        kept[some] = sampled(PLACES[some], 0.25)
    assert np.array_equal(kept, sampled(PLACES, 0.25))
    assert (sampled(PLACES, 0.125) <= kept).all(), "a smaller share is a part of a larger one"


def test_a_sample_has_its_share_from_everywhere() -> None:
    kept = PLACES[sampled(PLACES, 0.25)]
    assert abs(len(kept) - len(PLACES) / 4) < 4 * np.sqrt(len(PLACES) * 0.25 * 0.75)
    for axis in range(3):
        layers = np.bincount(kept[:, axis])[::32]
        assert abs(layers - 64).max() < 4 * np.sqrt(64), "256 windows in a layer"
    pairs = np.bincount(kept[:, 0] // 32 * 16 + kept[:, 2] // 32)
    assert abs(pairs.var() / 3 - 1) < 0.5, "16 windows in each: binomial, no pattern"


def test_windows_do_not_become_more_with_the_volume() -> None:
    small, large = (BlockGrid((side,) * 3, (256,) * 3) for side in (1280, 17_100))
    assert share_of_windows(small) == 1.0
    assert sampled(PLACES, 1.0).all()
    assert 40_000 < share_of_windows(large) * len(large) * 343 < 60_000


def test_a_sampled_window_is_scored_as_it_would_be_among_all() -> None:
    rng = np.random.default_rng(0)
    core = Box((256, 512, 0), (512, 768, 200))
    median = rng.normal(400, 30, (32, 32, 25)).astype(np.float32)
    mean = median + rng.random(median.shape, np.float32)
    every = intensity._candidate_windows(core, median, mean, 1.0)
    some = intensity._candidate_windows(core, median, mean, 0.2)
    assert 0 < len(some) < len(every) == 7 * 7 * 6
    assert set(some) <= set(every)
    assert intensity._candidate_windows(core, median, mean, 1e-9) == []
