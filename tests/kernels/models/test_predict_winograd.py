"""Convolution with fewer multiplications against torch's own in float64, and in the whole network."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from braincensus_kernels.models import winograd
from braincensus_kernels.models.calibrate import calibrate
from braincensus_kernels.models.checkpoints import Weights
from braincensus_kernels.models.fold import fold, freeze
from braincensus_kernels.models.predict import Predictor
from braincensus_kernels.models.winograd import Winograd
from braincensus_kernels.models.wnet3d import UNet


def features(channels: int, z: int, y: int, x: int) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(1, channels, z, y, x).contiguous(memory_format=torch.channels_last_3d)


def layer(inputs: int, outputs: int) -> tuple[Tensor, np.ndarray]:
    torch.manual_seed(1)
    weight = torch.randn(outputs, inputs, 3, 3, 3) / (27 * inputs) ** 0.5
    return weight, torch.randn(outputs).numpy()


def unclamped(weight: Tensor, bias: np.ndarray) -> Winograd:
    ends = np.full((2, len(bias)), np.inf, np.float32)
    return Winograd(winograd.transform(weight), bias, -ends[0], ends[1])


def direct(x: Tensor, weight: Tensor, bias: np.ndarray) -> Tensor:
    return nn.functional.conv3d(x.double(), weight.double(), torch.from_numpy(bias).double())


# Extents that fill tiles and planes, leave some over, and are smaller than one of either.
@pytest.mark.parametrize("shape", [(10, 10, 10), (13, 9, 12), (3, 3, 3), (4, 41, 43)])
@pytest.mark.parametrize(("inputs", "outputs"), [(16, 32), (48, 16)])
def test_the_convolution(inputs: int, outputs: int, shape: tuple[int, int, int]) -> None:
    x, (weight, bias) = features(inputs, *shape), layer(inputs, outputs)
    got = unclamped(weight, bias)(x)
    assert got.is_contiguous(memory_format=torch.channels_last_3d)
    np.testing.assert_allclose(got.numpy(), direct(x, weight, bias).numpy(), atol=5e-5)


def test_a_crop_and_other_layouts() -> None:
    whole, (weight, bias) = features(16, 14, 15, 16), layer(16, 16)
    crop = whole[:, :, 2:-3, 1:-1, 3:-2]
    expected = direct(crop, weight, bias).numpy()
    for x in (crop, crop.contiguous()):
        np.testing.assert_allclose(unclamped(weight, bias)(x).numpy(), expected, atol=5e-5)


def test_clamps_per_channel() -> None:
    x, (weight, bias) = features(16, 6, 7, 8), layer(16, 16)
    low = np.where(np.arange(16) % 2, -np.inf, 0).astype(np.float32)
    high = np.where(np.arange(16) % 2, 0, np.inf).astype(np.float32)
    plain = unclamped(weight, bias)(x).numpy()
    expected = np.clip(plain, low.reshape(-1, 1, 1, 1), high.reshape(-1, 1, 1, 1))
    got = Winograd(winograd.transform(weight), bias, low, high)(x).numpy()
    np.testing.assert_array_equal(got, expected)
    assert (got != plain).mean() > 0.2


def test_the_same_bits_for_any_number_of_threads() -> None:
    x, (weight, bias) = features(32, 20, 50, 60), layer(32, 32)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(unclamped(weight, bias)(x).numpy())
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        np.testing.assert_array_equal(other, found[0])


def test_the_same_bits_wherever_the_patch_begins_on_the_lattice() -> None:
    x, (weight, bias) = features(32, 14, 46, 50), layer(32, 32)
    whole = unclamped(weight, bias)(x)
    part = unclamped(weight, bias)(x[:, :, 3:, 8:, 4:])
    np.testing.assert_array_equal(part.numpy(), whole[:, :, 3:, 8:, 4:].numpy())


def test_where_it_pays() -> None:
    expected = {(16, 16): False, (32, 32): True, (64, 32): True, (40, 32): False, (512, 512): False}
    for (outputs, inputs), answer in expected.items():
        assert winograd.pays(torch.empty(outputs, inputs, 3, 3, 3)) is answer
    assert not winograd.pays(torch.empty(64, 64, 1, 1, 1))
    assert not winograd.pays(torch.empty(64, 64, 2, 2, 2))


def test_in_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the plain network with frozen norms, 1e-5; without it, no less is needed."""
    torch.manual_seed(0)
    channels = (32, 32, 32, 32)
    net = UNet(1, 2, channels=channels, dropout=0.0, softmax=True)
    for module in net.modules():
        if isinstance(module, nn.GroupNorm):
            with torch.no_grad():
                module.weight.uniform_(0.5, 1.5)[::2].neg_()
    weights = Weights(net.state_dict(), channels, 2, 1, {}, "", "random")
    volume = np.random.default_rng(0).uniform(0, 100, (104, 104, 104)).astype(np.float32)
    statistics = calibrate(weights, volume[None, None, :32, :32, :32].copy())
    with torch.inference_mode():
        plain = freeze(weights.build_encoder(), statistics)(torch.from_numpy(volume)[None, None])
    expected = plain[0, statistics.foreground_class, 48:-48, 48:-48, 48:-48].numpy()
    folded = fold(weights.build_encoder(), statistics)
    used = [conv.fast is not None for conv in folded.to("cpu", torch.float32).down[0]]
    assert used == [False, True]
    assert folded.to("cpu", torch.bfloat16).down[0][1].fast is None

    def predict() -> np.ndarray:
        ready = Predictor(weights, statistics=statistics, halo_voxels=48, precision="float32")
        return ready.predict(volume)

    fast = predict()
    monkeypatch.setattr(winograd, "pays", lambda weight: False)
    slow = predict()
    assert np.abs(fast - slow).max() > 0
    np.testing.assert_allclose(fast, expected, atol=1e-5)
    np.testing.assert_allclose(slow, expected, atol=1e-5)
