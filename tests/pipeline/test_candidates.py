"""Windows for calibration: of a large volume a sample, the same in any order, and no more memory."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from braincensus.stages import intensity
from braincensus.stages.intensity import Candidates, Window
from braincensus_kernels.boxes import Box

WINDOWS = [
    Window(Box((z, y, x), (z + 64, y + 64, x + 64)), tissue=float(z), excess=float(x))
    for z in range(0, 256, 32)
    for y in range(0, 256, 32)
    for x in range(0, 256, 32)
]


@pytest.fixture(scope="module", autouse=True)
def few():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(intensity, "_MOST_WINDOWS", 100)
        yield


@given(seed=st.integers(0, 2**32), at_once=st.integers(1, 600))
def test_the_same_sample_in_any_order(seed: int, at_once: int) -> None:
    order = np.random.default_rng(seed).permutation(len(WINDOWS))
    candidates = Candidates()
    for first in range(0, len(order), at_once):
        candidates.add([WINDOWS[i] for i in order[first : first + at_once]])
        assert len(candidates._kept) <= 200
    whole = Candidates()
    whole.add(WINDOWS)
    assert candidates.in_order() == whole.in_order()
    assert len(whole.in_order()) == 100


def test_a_sample_is_from_everywhere() -> None:
    candidates = Candidates()
    candidates.add(WINDOWS)
    layers = [window.box.start[0] for window in candidates.in_order()]
    assert min(np.bincount(layers)[::32]) >= 4


def test_a_few_are_all_kept_in_order() -> None:
    candidates = Candidates()
    candidates.add(WINDOWS[40:80][::-1])
    assert candidates.in_order() == tuple(WINDOWS[40:80])
