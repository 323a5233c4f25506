"""Windows for calibration: of a large volume a sample, the same in any order, and no more memory."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from braincensus.blocks import BlockGrid
from braincensus.stages.intensity import Window, sample, share_of_windows
from braincensus_kernels.boxes import Box

WINDOWS = [
    Window(Box((z, y, x), (z + 64, y + 64, x + 64)), tissue=float(z), excess=float(x))
    for z in range(0, 512, 32)
    for y in range(0, 512, 32)
    for x in range(0, 512, 32)
]


@given(seed=st.integers(0, 2**32), at_once=st.integers(1, 2000))
def test_the_same_sample_in_any_order(seed: int, at_once: int) -> None:
    order = np.random.default_rng(seed).permutation(len(WINDOWS))
    kept: list[Window] = []
    for first in range(0, len(order), at_once):
        kept += sample([WINDOWS[i] for i in order[first : first + at_once]], 0.25)
    assert sorted(kept, key=lambda window: window.box) == sample(WINDOWS, 0.25)


def test_a_sample_has_its_share_from_everywhere() -> None:
    kept = sample(WINDOWS, 0.25)
    assert abs(len(kept) - len(WINDOWS) / 4) < 4 * np.sqrt(len(WINDOWS) * 0.25 * 0.75)
    for axis in range(3):
        layers = np.bincount([window.box.start[axis] for window in kept])[::32]
        assert abs(layers - 64).max() < 4 * np.sqrt(64), "256 windows in a layer"


def test_windows_do_not_become_more_with_the_volume() -> None:
    small, large = (BlockGrid((side,) * 3, (256,) * 3) for side in (1280, 17_100))
    assert share_of_windows(small) == 1.0
    assert sample(WINDOWS, 1.0) is WINDOWS
    assert 40_000 < share_of_windows(large) * len(large) * 343 < 60_000
