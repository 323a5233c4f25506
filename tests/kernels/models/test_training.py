"""Training: learns to cut, is repeatable and goes on bit for bit, refuses what cannot work, warns in time."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from braincensus_kernels.models.training import (
    IntensityVariation,
    Trainer,
    TrainingError,
    TrainingSettings,
    TrainingStep,
    crops_from_arrays,
    train,
)
from braincensus_kernels.models.training_signs import WINDOW, figures, signs
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


def test_bfloat16_on_a_cpu_refuses_crops_whose_gradients_would_be_wrong() -> None:
    settings = {"steps": 1, "batch": 1, "learning_rate": 1e-3, "seed": 0, "precision": "bfloat16"}
    with pytest.raises(ValueError, match=r"2 x 2 x 2 voxels.*float32, or crops"):
        train(network(), crops_from_arrays([blobs()], (16, 16, 16)), **settings)
    net = network()
    train(net, crops_from_arrays([blobs()], (24, 24, 24)), **settings)
    assert all(torch.isfinite(value).all() for value in net.state_dict().values())
    net(torch.zeros(1, 1, 16, 16, 16))  # whatever is only predicted may be smaller


def test_stops_when_a_class_is_empty() -> None:
    net = network()
    with torch.no_grad():
        net.encoder.out_b.module[8].bias.copy_(torch.tensor([50.0, -50.0]))
    with pytest.raises(TrainingError, match="all other classes are empty"):
        train(net, crops_from_arrays([blobs()], (16, 16, 16)), steps=60, batch=1, learning_rate=1e-6, seed=0)


def test_refuses_arguments() -> None:
    draw = crops_from_arrays([blobs()], (16, 16, 16))
    with pytest.raises(ValueError, match="must be positive"):
        train(network(), draw, steps=0, batch=1, learning_rate=1e-3, seed=0)
    with pytest.raises(ValueError, match="precision"):
        train(network(), draw, steps=1, batch=1, learning_rate=1e-3, seed=0, precision="float16")
    with pytest.raises(ValueError, match="class-mean or pairwise"):
        train(network(), draw, steps=1, batch=1, learning_rate=1e-3, seed=0, ncuts="triple")
    with pytest.raises(ValueError, match="mse or bce"):
        train(network(), draw, steps=1, batch=1, learning_rate=1e-3, seed=0, reconstruction="l1")
    with pytest.raises(ValueError, match="factor from 0 to 1"):
        train(network(), draw, steps=1, batch=1, learning_rate=1e-3, seed=0, final_learning_rate=2.0)
    with pytest.raises(ValueError, match="must not be negative"):
        train(network(), draw, steps=1, batch=1, learning_rate=1e-3, seed=-1)
    with pytest.raises(ValueError, match="cannot give crops"):
        crops_from_arrays([blobs()], (64, 16, 16))
    with pytest.raises(ValueError, match="no array"):
        crops_from_arrays([], (8, 8, 8))
    with pytest.raises(ValueError, match="not negative"):
        IntensityVariation(gain=-1)


@pytest.mark.parametrize("ncuts", ["class-mean", "pairwise"])
@pytest.mark.parametrize(("reconstruction", "weight"), [("mse", 0.005), ("bce", 0.5)])
def test_three_classes_and_each_form_of_the_loss(ncuts: str, reconstruction: str, weight: float) -> None:
    torch.manual_seed(0)
    net = WNet3D(channels=TINY, num_classes=3, dropout=0.3)
    history = train(
        net,
        crops_from_arrays([blobs()], (16, 16, 16)),
        steps=25,
        batch=1,
        learning_rate=1e-2,
        seed=1,
        ncuts=ncuts,
        reconstruction=reconstruction,
        reconstruction_weight=weight,
        intensity_sigma=20.0,
    )
    assert 0 <= history[0].ncuts <= 3
    assert np.mean([r.loss for r in history[-5:]]) < 0.95 * np.mean([r.loss for r in history[:5]])
    assert history[-1].smallest_class <= 1 / 3 <= history[-1].largest_class


def test_cross_entropy_is_that_of_the_sigmoid_and_the_unit_range() -> None:
    net, crop = network(), blobs((16, 16, 16))
    seen: list[torch.Tensor] = []
    net.decoder.register_forward_hook(lambda *call: seen.append(call[2].detach()))
    (record,) = train(
        net, lambda rng: crop, steps=1, batch=1, learning_rate=1e-3, seed=0, reconstruction="bce"
    )
    # Flips and turns move voxels of crop and output alike, so compare with the crop as the network got it.
    images: list[torch.Tensor] = []
    again = network()
    again.encoder.register_forward_pre_hook(lambda _, inputs: images.append(inputs[0]))
    train(again, lambda rng: crop, steps=1, batch=1, learning_rate=1e-3, seed=0)
    q, x = torch.sigmoid(seen[0]).double().numpy(), images[0].double().numpy() / 100
    expected = -np.mean(x * np.log(q) + (1 - x) * np.log(1 - q))
    assert record.reconstruction == pytest.approx(expected, rel=1e-5)


def trainer(steps: int = 6, **changes: object) -> Trainer:
    torch.manual_seed(0)
    options: dict[str, object] = {"batch": 2, "learning_rate": 1e-2, "seed": 3, "warm_up_steps": 2}
    settings = TrainingSettings(
        steps=steps,
        variation=IntensityVariation(gain=0.2, noise=2),
        **{**options, **changes},  # type: ignore[arg-type]
    )
    draw = crops_from_arrays([blobs(), blobs(seed=1)], (16, 16, 16))
    return Trainer(WNet3D(channels=TINY, dropout=0.4), draw, settings)


@pytest.mark.parametrize("stop", [0, 1, 4])
def test_goes_on_bit_for_bit(stop: int) -> None:
    whole = trainer()
    for _ in range(6):
        whole.step()
    first = trainer()
    for _ in range(stop):
        first.step()
    kept = first.state()
    first.step()  # what is kept does not change with the network
    torch.manual_seed(99)
    second = trainer()
    with torch.no_grad():
        for parameter in second.network.parameters():
            parameter.add_(1)
    second.restore(kept)
    while len(second.history) < 6:
        torch.rand(3)  # nor does it matter what else draws random numbers
        second.step()
    assert second.history == whole.history
    a, b = whole.state(), second.state()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_training_leaves_the_callers_random_numbers() -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    one = trainer()
    torch.manual_seed(7)
    one.step()
    assert torch.equal(torch.rand(3), expected)


def test_refuses_the_state_of_another_training() -> None:
    one = trainer()
    one.step()
    one.step()
    state = one.state()
    with pytest.raises(ValueError, match="of 2 steps, the training is to have 1"):
        trainer(steps=1).restore(state)
    with pytest.raises(ValueError, match="not the state"):
        trainer().restore({key: value for key, value in state.items() if key != "history"})
    with pytest.raises(ValueError, match="not the state"):
        trainer().restore({key: v for key, v in state.items() if not key.startswith("adam.exp_avg.")})
    other = trainer(steps=6)
    other.network = WNet3D(channels=(8, 8, 8, 8))
    with pytest.raises(ValueError, match="not the state"):
        other.restore(state)


GOOD = TrainingStep(0, 1.0, 1.0, 100.0, 1e-3, 0.2, 0.8, 0.7, 0.1)


def history(changes: dict[str, float], steps: int = 3 * WINDOW, fall: float = 0.01) -> list[TrainingStep]:
    return [replace(GOOD, step=i, **{"loss": 1 - fall * i / 2, **changes}) for i in range(steps)]  # type: ignore[arg-type]


def test_signs_of_collapse_say_what_to_change() -> None:
    def seen(records: list[TrainingStep]) -> dict[str, str]:
        return signs(records, ncuts_weight=0.5, reconstruction_weight=0.01)

    assert seen(history({})) == {}
    assert seen(history({"smallest_class": 0.0}, steps=WINDOW - 1)) == {}
    empty = seen(history({"smallest_class": 1e-6}))
    assert empty.keys() == {"empty class"}
    assert "raise the reconstruction weight" in empty["empty class"]
    assert "a reconstruction weight of 0.005 makes them equal" in empty["empty class"]
    copy = seen(history({"likeness": 0.999, "undecided": 0.5}))
    assert copy.keys() == {"copy"}
    assert "lower the reconstruction weight" in copy["copy"]
    assert seen(history({"likeness": 0.999, "undecided": 0.05})) == {}  # a clean image, cleanly cut
    assert seen(history({}, fall=0.0)).keys() == {"flat"}
    assert seen(history({}, steps=3 * WINDOW - 1, fall=0.0)) == {}


def test_each_sign_is_given_once_while_training() -> None:
    torch.manual_seed(0)
    net = WNet3D(channels=TINY, num_classes=3, dropout=0.0)
    with torch.no_grad():
        net.encoder.out_b.module[8].bias.copy_(torch.tensor([0.0, 0.0, -50.0]))
    warned: list[str] = []
    draw = crops_from_arrays([blobs()], (16, 16, 16))
    train(net, draw, steps=WINDOW + 3, batch=1, learning_rate=1e-6, seed=0, warn=warned.append)
    assert len(warned) == 1
    assert "a class is empty" in warned[0]


def test_figures_of_copies_cuts_and_nothing() -> None:
    image = torch.from_numpy(blobs())[None, None].repeat(2, 1, 1, 1, 1)
    share = image / 100
    copied = figures(torch.cat([share, 1 - share], 1), image)
    assert float(copied[0]) == pytest.approx(1, abs=1e-4)
    assert copied[2:].tolist() == pytest.approx([float(share.mean()), 1 - float(share.mean())], rel=1e-4)
    bright = (image > 40).float()
    cut = figures(torch.cat([1 - bright, bright], 1), image)
    assert float(cut[1]) == pytest.approx(0, abs=1e-5)
    nothing = figures(torch.full((2, 4, 32, 32, 32), 0.25), image)
    assert float(nothing[0]) < 0.01
    assert float(nothing[1]) == pytest.approx(1, abs=1e-5)


PROCESSES = """
import sys
import torch
from torch import distributed
from braincensus_kernels.models.training import Trainer, TrainingSettings, crops_from_arrays
from braincensus_kernels.models.wnet3d import WNet3D
import numpy as np

torch.set_num_threads(1)
together = len(sys.argv) > 2
if together:
    distributed.init_process_group("gloo")
torch.manual_seed(0)
net = WNet3D(channels=(4, 4, 4, 4), dropout=0.0)
image = np.random.default_rng(0).uniform(0, 100, (24, 24, 24)).astype(np.float32)
settings = TrainingSettings(steps=4, batch=4, learning_rate=1e-3, seed=0)
trainer = Trainer(net, crops_from_arrays([image], (16, 16, 16)), settings)
for _ in range(4):
    trainer.step()
if not together or distributed.get_rank() == 0:
    torch.save(trainer.state(), sys.argv[1])
if together:
    distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_train_what_one_does(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(PROCESSES)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, script, tmp_path / "one.pt"], check=True, env=environment)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([*launch, script, tmp_path / "two.pt", "together"], check=True, env=environment)
    one, two = (torch.load(tmp_path / name, weights_only=True) for name in ("one.pt", "two.pt"))
    assert one.keys() == two.keys()
    torch.testing.assert_close(two["history"][:, 1:7], one["history"][:, 1:7], rtol=1e-3, atol=1e-4)
    weights = {key: value for key, value in one.items() if key.startswith("network.")}
    for key, value in weights.items():
        torch.testing.assert_close(two[key], value, rtol=0, atol=5e-4)
