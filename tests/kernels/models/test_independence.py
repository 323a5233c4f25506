"""With calibrated norms a voxel's probability does not depend on the patch that it was computed in.

Two networks whose every level acts: a random one, and one that is trained here for a few steps without weight
decay; and the shipped one. How far a network looks is asked of the plain one, not of what is cropped already.
"""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from braincensus_kernels.boxes import Box
from braincensus_kernels.models.calibrate import NormStatistics, calibrate
from braincensus_kernels.models.checkpoints import Weights, load_weights
from braincensus_kernels.models.fold import freeze
from braincensus_kernels.models.predict import EXACT_HALO_VOXELS, LATTICE, Predictor
from braincensus_kernels.models.training import crops_from_arrays, train
from braincensus_kernels.models.wnet3d import UNet, WNet3D
from braincensus_kernels.phantom import Phantom

CHANNELS = (4, 8, 8, 8)
REGION = Box((0, 0, 0), (32, 40, 32))
"""Where patches are compared; the volume holds the widest halo around it."""
SOME_CORES = (Box((8, 16, 0), (16, 24, 8)), Box((0, 8, 8), (24, 24, 32)))
ROUNDING = 5e-6
"""Convolutions of other shapes may add up in another order. Seen: 1.2e-6."""
BFLOAT16_ROUNDING = 0.004
"""One step of bfloat16 below 1. Seen: 0."""


def phantom_input() -> np.ndarray:
    z, y, x = (n + 2 * EXACT_HALO_VOXELS for n in REGION.shape)
    phantom = Phantom(shape=(z, y, x), cells_per_mm3=6000.0, tissue="full", seed=2)
    counts = phantom.render(Box.whole(phantom.shape)).astype(np.float32)
    scaled: np.ndarray = np.clip((counts - 300) / 8, 0, 100).astype(np.float32)
    return scaled


def random_weights() -> Weights:
    """Norms of both signs and large: far voxels matter more than in a network as it is initialised."""
    torch.manual_seed(3)
    net = UNet(1, 2, channels=CHANNELS, dropout=0.0, softmax=True)
    for layer in net.modules():
        if isinstance(layer, nn.GroupNorm):
            with torch.no_grad():
                layer.weight.uniform_(0.8, 1.6)[::2].neg_()
            nn.init.normal_(layer.bias, std=0.3)
    return Weights(net.state_dict(), CHANNELS, 2, 1, {}, "", "random")


def trained_weights(volume: np.ndarray) -> Weights:
    torch.manual_seed(0)
    network = WNet3D(channels=CHANNELS, dropout=0.0)
    train(
        network,
        crops_from_arrays([volume], (16, 16, 16)),
        steps=10,
        batch=1,
        learning_rate=5e-3,
        weight_decay=0.0,
        seed=0,
        intensity_sigma=50.0,
    )
    return Weights(network.encoder.state_dict(), CHANNELS, 2, 1, {}, "", "trained")


class Setting:
    """A network, the volume, and the region's probability by one patch with the exact halo."""

    def __init__(self, weights: Weights, volume: np.ndarray) -> None:
        self.weights, self.volume = weights, volume
        windows = np.stack([volume[:48, :48, :48], volume[40:88, 48:96, 40:88]])[:, None]
        self.statistics: NormStatistics = calibrate(weights, windows)
        self.exact = self.predict(REGION, EXACT_HALO_VOXELS)

    def predict(self, core: Box, halo: int, precision: str = "float32") -> np.ndarray:
        ready = Predictor(self.weights, statistics=self.statistics, halo_voxels=halo, precision=precision)
        around = core.dilate(halo).shift((EXACT_HALO_VOXELS,) * 3)
        return ready.predict(self.volume[around.slices])

    def error(self, core: Box, halo: int) -> float:
        return float(np.abs(self.predict(core, halo) - self.exact[core.slices]).max())


@pytest.fixture(scope="module")
def volume() -> Iterator[np.ndarray]:
    """The phantom; and one thread from here on, for the fixtures of the module too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield phantom_input()
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def random(volume: np.ndarray) -> Setting:
    return Setting(random_weights(), volume)


@pytest.fixture(scope="module")
def trained(volume: np.ndarray) -> Setting:
    return Setting(trained_weights(volume), volume)


@pytest.fixture(scope="module")
def shipped(volume: np.ndarray) -> Setting:
    return Setting(load_weights("compact"), volume)


@st.composite
def cores(draw: st.DrawFn) -> Box:
    """Draw a box of the region on the lattice, of 8 to 24 voxels along each axis."""
    start, stop = [], []
    for n in REGION.shape:
        size = draw(st.integers(1, 3))
        first = draw(st.integers(0, n // LATTICE - size))
        start.append(first * LATTICE)
        stop.append((first + size) * LATTICE)
    return Box((start[0], start[1], start[2]), (stop[0], stop[1], stop[2]))


def test_the_settings_can_tell_right_from_wrong(random: Setting, trained: Setting) -> None:
    for setting in (random, trained):
        ready = Predictor(setting.weights, statistics=setting.statistics, halo_voxels=48, precision="float32")
        assert ready.reach_voxels == 46
        assert setting.exact.std() > 0.02
        assert setting.error(SOME_CORES[0], 16) > 20 * ROUNDING


@settings(max_examples=8)
@given(core=cores())
def test_any_size_and_origin_on_the_lattice(random: Setting, core: Box) -> None:
    assert random.error(core, EXACT_HALO_VOXELS) <= ROUNDING


@pytest.mark.parametrize("core", SOME_CORES)
def test_any_patch_of_a_trained_network(trained: Setting, core: Box) -> None:
    assert trained.error(core, EXACT_HALO_VOXELS) <= ROUNDING
    assert trained.error(core, 32) <= 5e-3  # after ten steps of training: the shipped network is held to 1e-5


@pytest.mark.parametrize("core", SOME_CORES[:1])
def test_the_shipped_network_needs_a_halo_of_32(shipped: Setting, core: Box) -> None:
    assert 0.01 < (shipped.exact > 0.5).mean() < 0.5
    assert shipped.error(core, EXACT_HALO_VOXELS) <= ROUNDING
    assert shipped.error(core, 32) <= 1e-5


def test_off_the_lattice_pooling_falls_elsewhere(random: Setting) -> None:
    """Why origins keep to the lattice: the same voxels, four further on, have other probabilities."""
    assert random.error(Box((4, 4, 4), (20, 20, 20)), EXACT_HALO_VOXELS) > 1e-3


def test_bfloat16_is_as_independent(random: Setting) -> None:
    """Rounding differs from float32 by far more than patches do from one another."""
    core = Box((8, 16, 8), (24, 32, 24))
    one = random.predict(core, EXACT_HALO_VOXELS, "bfloat16")
    other = random.predict(Box((0, 8, 8), (24, 32, 24)), EXACT_HALO_VOXELS, "bfloat16")[8:, 8:]
    assert np.abs(one - other).max() <= BFLOAT16_ROUNDING
    assert np.abs(one - random.exact[core.slices]).max() > 2 * BFLOAT16_ROUNDING


def positive_weights(silenced: str | None) -> tuple[Weights, NormStatistics]:
    """A network that gives 0 for 0, and more wherever anything that it sees is more: nothing cancels."""
    torch.manual_seed(1)
    channels = (4, 4, 4, 4)
    net = UNet(1, 2, channels=channels, dropout=0.0, softmax=True)
    statistics: dict[str, np.ndarray] = {}
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            parameter.fill_(0.0) if name.endswith("bias") else parameter.uniform_(0.1, 1.0)
        for name, layer in net.named_modules():
            if isinstance(layer, nn.GroupNorm):
                statistics[name] = np.zeros(layer.num_groups)
        if silenced is not None:
            net.get_parameter(f"{silenced}.module.6.weight").fill_(0.0)
    ones = {name: np.ones_like(zero) for name, zero in statistics.items()}
    weights = Weights(net.state_dict(), channels, 2, 1, {}, "", "positive")
    return weights, NormStatistics(statistics, ones, np.array([0.0, 1.0]), 1)


@pytest.mark.parametrize(("silenced", "exact"), [(None, 46), ("bot", 30), ("deconv2", 12), ("deconv3", 4)])
@pytest.mark.parametrize("axis", range(3))
@pytest.mark.parametrize("end", [False, True])
def test_the_reach_is_what_the_table_says(silenced: str | None, exact: int, axis: int, end: bool) -> None:
    """One bright plane in darkness: at the reach it is seen, one voxel farther it is not, on every side."""
    weights, statistics = positive_weights(silenced)
    stated = Predictor(weights, statistics=statistics, halo_voxels=8).reach_voxels
    assert exact <= stated <= exact + 2  # of two levels 14 is stated: two on the safe side
    network = freeze(weights.build_encoder(), statistics)
    core = slice(EXACT_HALO_VOXELS, EXACT_HALO_VOXELS + LATTICE)

    def seen(distance: int) -> bool:
        shape = [2 * LATTICE] * 3
        shape[axis] = 2 * EXACT_HALO_VOXELS + LATTICE
        volume = torch.zeros(1, 1, *shape)
        plane = core.stop - 1 + distance if end else core.start - distance
        volume.select(2 + axis, plane).fill_(100.0)
        with torch.inference_mode():
            out = network.logits(volume).narrow(2 + axis, core.start, LATTICE)
        return bool((out > 0).any())

    assert seen(1)
    assert seen(exact)
    assert not seen(exact + 1)
