"""Frozen norm statistics: pooled over windows, layer after layer."""

import numpy as np
import pytest
import torch
from torch import nn

from braincensus_kernels.models.calibrate import NormStatistics, calibrate
from braincensus_kernels.models.fold import freeze
from braincensus_kernels.models.wnet3d import UNet


def encoder(seed: int = 0, channels: tuple[int, ...] = (4, 8, 8, 12)) -> UNet:
    torch.manual_seed(seed)
    net = UNet(1, 2, channels=channels, dropout=0.5, softmax=True)
    for module in net.modules():
        if isinstance(module, nn.GroupNorm):
            nn.init.normal_(module.weight, 1.0, 0.5)
            nn.init.normal_(module.bias, 0.0, 0.3)
    return net


def windows(count: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    scale = rng.uniform(5, 100, (count, 1, 1, 1, 1))
    return (rng.random((count, 1, 16, 24, 16)) * scale).astype(np.float32)


def test_one_window_gives_what_group_norm_computes_itself() -> None:
    net, image = encoder(), windows(1)
    statistics = calibrate(net, image)
    with torch.inference_mode():
        expected = net.eval()(torch.from_numpy(image))
        frozen = freeze(net, statistics)(torch.from_numpy(image))
    torch.testing.assert_close(frozen, expected, rtol=1e-4, atol=1e-5)


def test_statistics_are_pooled_over_windows_after_calibrated_earlier_layers() -> None:
    net, batch = encoder(), windows(3)
    statistics = calibrate(net, batch)
    seen: dict[str, torch.Tensor] = {}
    frozen = freeze(net, statistics)
    for name, module in net.named_modules():
        if isinstance(module, nn.GroupNorm):
            block, _, index = name.split(".")
            target = getattr(frozen, block).module[int(index)]
            target.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0].clone()}))
    with torch.inference_mode():
        frozen(torch.from_numpy(batch))
    assert set(seen) == set(statistics.mean) == set(statistics.variance)
    assert len(seen) == 14
    for name, features in seen.items():
        grouped = features.double().numpy().reshape(3, 4, -1).transpose(1, 0, 2).reshape(4, -1)
        np.testing.assert_allclose(statistics.mean[name], grouped.mean(1), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(statistics.variance[name], grouped.var(1), rtol=1e-3, atol=1e-7)


def test_repeatable_and_the_order_of_windows_matters_only_by_rounding() -> None:
    net, batch = encoder(), windows(3)
    once, twice, reversed_ = calibrate(net, batch), calibrate(net, batch), calibrate(net, batch[::-1].copy())
    for name in once.mean:
        np.testing.assert_array_equal(once.mean[name], twice.mean[name])
        np.testing.assert_array_equal(once.variance[name], twice.variance[name])
        np.testing.assert_allclose(once.variance[name], reversed_.variance[name], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("threads", [2, 3, 7])
def test_any_number_of_threads_gives_the_same_bits(threads: int) -> None:
    net, batch = encoder(channels=(8, 16, 16, 16)), windows(4)
    before = torch.get_num_threads()
    one, several = (calibrate(net, batch, threads=n).to_arrays() for n in (1, threads))
    assert torch.get_num_threads() == before
    for name, values in one.items():
        np.testing.assert_array_equal(values, several[name], err_msg=name)


def test_foreground_is_the_brighter_class_whichever_it_is() -> None:
    net, batch = encoder(), windows(2)
    first = calibrate(net, batch)
    with torch.no_grad():
        for parameter in (net.out_b.module[8].weight, net.out_b.module[8].bias):
            parameter.copy_(parameter.flip(0))
    second = calibrate(net, batch)
    assert first.foreground_class != second.foreground_class
    np.testing.assert_allclose(first.class_intensity, second.class_intensity[::-1], rtol=1e-6)
    probability = freeze(net, second)(torch.from_numpy(batch)).detach().double().numpy()
    expected = (probability * batch).sum((0, 2, 3, 4)) / probability.sum((0, 2, 3, 4))
    np.testing.assert_allclose(second.class_intensity, expected, rtol=1e-5)


@pytest.mark.parametrize("form", ["arrays", "json"])
def test_kept_exactly(form: str) -> None:
    statistics = calibrate(encoder(), windows(2))
    if form == "arrays":
        kept = NormStatistics.from_arrays(statistics.to_arrays())
    else:
        kept = NormStatistics.from_json(statistics.to_json())
    assert kept.windows == statistics.windows == 2
    np.testing.assert_array_equal(kept.class_intensity, statistics.class_intensity)
    for name in statistics.mean:
        np.testing.assert_array_equal(kept.mean[name], statistics.mean[name])
        np.testing.assert_array_equal(kept.variance[name], statistics.variance[name])


def test_arrays_of_something_else_are_refused() -> None:
    arrays = calibrate(encoder(), windows(1)).to_arrays()
    del arrays["variance/bot.module.4"]
    with pytest.raises(ValueError, match="do not match"):
        NormStatistics.from_arrays(arrays)
    arrays = calibrate(encoder(), windows(1)).to_arrays()
    del arrays["windows"]
    with pytest.raises(ValueError, match="not norm statistics"):
        NormStatistics.from_arrays(arrays)


def test_the_input_is_left_as_it_was() -> None:
    batch = windows(2)
    before = batch.copy()
    calibrate(encoder(), batch)
    np.testing.assert_array_equal(batch, before)


@pytest.mark.parametrize(
    ("batch", "match"),
    [
        (np.zeros((1, 16, 16, 16), np.float32), "expected windows"),
        (np.zeros((1, 1, 16, 16, 12), np.float32), "multiples of 8"),
        (np.zeros((1, 1, 16, 16, 16)), "float32"),
        (np.full((1, 1, 16, 16, 16), np.nan, np.float32), "finite"),
        (np.full((1, 1, 16, 16, 16), 7, np.float32), "constant"),
    ],
)
def test_windows_that_cannot_be_used(batch: np.ndarray, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        calibrate(encoder(), batch)
