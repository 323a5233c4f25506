"""Training: learns to cut, is repeatable, refuses what cannot work."""

import numpy as np
import pytest
import torch

from braincensus_kernels.models.training import (
    IntensityVariation,
    TrainingError,
    TrainingStep,
    crops_from_arrays,
    train,
)
from braincensus_kernels.models.wnet3d import WNet3D

TINY = (4, 4, 4, 4)


def blobs(shape: tuple[int, int, int] = (32, 32, 32), seed: int = 0) -> np.ndarray:
    """Bright balls on a noisy floor, in [0, 100]."""
    rng = np.random.default_rng(seed)
    grid = np.indices(shape)
    image = rng.normal(10, 2, shape)
    for centre in rng.integers(3, 29, (12, 3)):
        distance = np.sqrt(((grid - centre[:, None, None, None]) ** 2).sum(0))
        image = np.maximum(image, 70 * (distance < 2.5))
    return np.clip(image, 0, 100).astype(np.float32)


def network(seed: int = 0) -> WNet3D:
    torch.manual_seed(seed)
    return WNet3D(channels=TINY, dropout=0.0)


def test_learns_to_tell_blobs_from_floor_without_labels() -> None:
    image = blobs()
    torch.manual_seed(0)
    net = WNet3D(channels=(8, 8, 8, 8), dropout=0.0)
    options = {"learning_rate": 1e-2, "intensity_sigma": 50.0, "reconstruction_weight": 0.05}
    draw = crops_from_arrays([image], (24, 24, 24))
    history = train(net, draw, steps=50, batch=1, seed=1, **options)  # type: ignore[arg-type]
    with torch.inference_mode():
        probability = net.encoder(torch.from_numpy(image)[None, None])[0].numpy()
    bright, floor = image > 40, image < 20
    separation = abs(float(probability[0][bright].mean() - probability[0][floor].mean()))
    assert separation > 0.6
    assert np.mean([r.loss for r in history[-10:]]) < 0.7 * np.mean([r.loss for r in history[:5]])
    assert not net.training


def test_the_same_seed_gives_the_same_weights_and_another_does_not() -> None:
    def run(seed: int) -> torch.Tensor:
        net = network()
        variation = IntensityVariation(gain=0.2, gamma=0.2, offset=2, noise=2)
        draw = crops_from_arrays([blobs(), blobs(seed=1)], (16, 16, 16))
        train(net, draw, steps=3, batch=1, learning_rate=1e-3, seed=seed, variation=variation)
        return net.encoder.in_b.module[0].weight.detach().clone()

    assert torch.equal(run(5), run(5))
    assert not torch.equal(run(5), run(6))


def test_one_backward_pass_reaches_both_halves_and_both_losses() -> None:
    net = network()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    seen: list[TrainingStep] = []
    train(
        net,
        crops_from_arrays([blobs()], (16, 16, 16)),
        steps=1,
        batch=1,
        learning_rate=1e-3,
        seed=0,
        ncuts_weight=0.5,
        reconstruction_weight=0.25,
        progress=seen.append,
    )
    changed = {key for key, value in net.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == set(before)
    assert seen[0].loss == pytest.approx(0.5 * seen[0].ncuts + 0.25 * seen[0].reconstruction, rel=1e-5)


def test_learning_rate_rises_then_falls() -> None:
    history = train(
        network(),
        crops_from_arrays([blobs()], (16, 16, 16)),
        steps=8,
        batch=1,
        learning_rate=1e-3,
        seed=0,
        warm_up_steps=3,
        final_learning_rate=0.1,
    )
    rates = [r.learning_rate for r in history]
    assert rates[0] < rates[1] < rates[2] < rates[3] == pytest.approx(1e-3)
    assert rates[3] > rates[5] > rates[7] > 1e-4


def test_crops_are_flipped_and_turned_but_never_mixed() -> None:
    crop = np.zeros((8, 8, 16), np.float32)
    crop[0, 1, 2] = 100
    seen = []

    class Spy(WNet3D):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            seen.append(x.detach().clone())
            return super().forward(x)

    torch.manual_seed(0)
    net = Spy(channels=TINY, dropout=0.0)
    train(net, lambda rng: crop, steps=12, batch=1, learning_rate=1e-4, seed=0)
    places = {tuple(int(i) for i in torch.nonzero(x[0, 0])[0]) for x in seen}
    assert all(x.shape == (1, 1, 8, 8, 16) and float(x.sum()) == 100 for x in seen)
    # z and y may change places, x may only be mirrored: its extent differs.
    assert len(places) > 4
    assert {sorted((min(z, 7 - z), min(y, 7 - y)))[1] for z, y, _ in places} == {1}
    assert {min(x, 15 - x) for _, _, x in places} == {2}


def test_variation_stays_in_range_and_changes_values() -> None:
    rng = np.random.default_rng(0)
    image = blobs()
    varied = IntensityVariation(gain=0.5, gamma=0.5, offset=20, noise=10).apply(image, rng)
    assert varied.dtype == np.float32
    assert varied.min() >= 0
    assert varied.max() <= 100
    assert np.abs(varied - image).mean() > 1
    np.testing.assert_allclose(IntensityVariation().apply(image, rng), image, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("crop", "error", "match"),
    [
        (np.full((16, 16, 16), np.nan, np.float32), TrainingError, "not finite"),
        (np.full((16, 16, 16), 900, np.float32), ValueError, r"mapped to \[0, 100\]"),
        (np.full((16, 16, 12), 1, np.float32), ValueError, "multiples of 8"),
        (np.full((16, 16, 16), 1, np.float64), ValueError, "float32"),
    ],
)
def test_refuses_crops(crop: np.ndarray, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        train(network(), lambda rng: crop, steps=1, batch=1, learning_rate=1e-3, seed=0)


def test_stops_when_the_loss_is_not_finite() -> None:
    net = network()
    with torch.no_grad():
        net.decoder.out_b.module[8].bias.fill_(torch.inf)
    with pytest.raises(TrainingError, match="loss is not finite"):
        train(net, crops_from_arrays([blobs()], (16, 16, 16)), steps=1, batch=1, learning_rate=1e-3, seed=0)


def test_stops_when_a_class_is_empty() -> None:
    net = network()
    with torch.no_grad():
        net.encoder.out_b.module[8].bias.copy_(torch.tensor([50.0, -50.0]))
    with pytest.raises(TrainingError, match="one class is empty"):
        train(net, crops_from_arrays([blobs()], (16, 16, 16)), steps=60, batch=1, learning_rate=1e-6, seed=0)


def test_refuses_arguments() -> None:
    draw = crops_from_arrays([blobs()], (16, 16, 16))
    with pytest.raises(ValueError, match="must be positive"):
        train(network(), draw, steps=0, batch=1, learning_rate=1e-3, seed=0)
    with pytest.raises(ValueError, match="precision"):
        train(network(), draw, steps=1, batch=1, learning_rate=1e-3, seed=0, precision="float16")
    with pytest.raises(ValueError, match="cannot give crops"):
        crops_from_arrays([blobs()], (64, 16, 16))
    with pytest.raises(ValueError, match="no array"):
        crops_from_arrays([], (8, 8, 8))
    with pytest.raises(ValueError, match="not negative"):
        IntensityVariation(gain=-1)
