"""Supervised training: learns cells, repeats and goes on bit for bit, chooses threshold and best epoch."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from braincensus_kernels.boxes import Box
from braincensus_kernels.models.supervised.augment import Augmentation
from braincensus_kernels.models.supervised.networks import build_network
from braincensus_kernels.models.supervised.training import (
    THRESHOLDS,
    DrawLabelledCrop,
    LabelledCrop,
    ProbabilityCounts,
    SupervisedSettings,
    SupervisedTrainer,
)
from braincensus_kernels.models.training_signs import TrainingError
from braincensus_kernels.phantom import Phantom

SIDE = 16
HELD_OUT = 48  # along x: training crops end before it


@pytest.fixture(scope="module")
def phantom() -> LabelledCrop:
    """Cells in 4 % of the voxels; the best threshold of the intensity has a Dice of 0.61."""
    whole = Box.whole((48, 64, 64))
    known = Phantom(shape=whole.shape, cells_per_mm3=20_000.0, tissue="full", seed=1)
    image = known.render(whole).astype(np.float32)
    low, high = np.percentile(image, [1, 99])
    return np.clip((image - low) / (high - low), 0, 1).astype(np.float32), known.truth_labels(whole) > 0


def draw_from(volume: LabelledCrop) -> DrawLabelledCrop:
    image, cells = volume

    def draw(rng: np.random.Generator) -> LabelledCrop:
        z, y, x = (int(rng.integers(n - SIDE + 1)) for n in (*image.shape[:2], HELD_OUT))
        box = (slice(z, z + SIDE), slice(y, y + SIDE), slice(x, x + SIDE))
        return image[box], cells[box]

    return draw


def parts(volume: LabelledCrop) -> tuple[LabelledCrop, LabelledCrop]:
    image, cells = volume
    return (image[..., :HELD_OUT], cells[..., :HELD_OUT]), (image[..., HELD_OUT:], cells[..., HELD_OUT:])


def small(seed: int = 0) -> nn.Module:
    """As quick as networks get, with dropout as the real ones have it."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.ReLU(), nn.Dropout(0.3), nn.Conv3d(4, 1, 1))


def settings(**changes: Any) -> SupervisedSettings:
    chosen = SupervisedSettings(
        steps=6, batch=2, learning_rate=1e-2, seed=3, augmentation=Augmentation(elastic_probability=0.1)
    )
    return replace(chosen, **changes)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_a_small_segresnet_learns_cells_and_not_brightness_alone(phantom: LabelledCrop) -> None:
    torch.manual_seed(0)
    trainer = SupervisedTrainer(
        build_network("segresnet", size=8, patch_voxels=SIDE),
        draw_from(phantom),
        SupervisedSettings(steps=30, batch=2, learning_rate=1e-2, seed=0, augmentation=None, warm_up_steps=5),
    )
    for _ in range(30):
        trainer.step()
    trained_on, held_out = parts(phantom)
    epoch = trainer.end_epoch([trained_on], [held_out])
    image, cells = held_out
    of_brightness = max(
        2 * (cells & (image > t)).sum() / (cells.sum() + (image > t).sum()) for t in THRESHOLDS
    )
    assert epoch.chance_dice < 0.1
    assert of_brightness < 0.64
    assert epoch.validation_dice > 0.66


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["dice", "dice-ce", "generalized-dice", "tversky"])
def test_every_loss_learns_with_augmentation(phantom: LabelledCrop, loss: Any) -> None:
    torch.manual_seed(0)
    trainer = SupervisedTrainer(
        build_network("segresnet", size=8, patch_voxels=SIDE),
        draw_from(phantom),
        SupervisedSettings(steps=60, batch=2, learning_rate=1e-2, seed=0, loss=loss),
    )
    for _ in range(60):
        trainer.step()
    assert trainer.end_epoch(*([part] for part in parts(phantom))).validation_dice > 0.62


@pytest.mark.slow
def test_a_small_swinunetr_learns() -> None:
    whole = Box.whole((64, 64, 32))  # its coarsest level, of 1/32, must have two voxels to be normalised
    known = Phantom(shape=whole.shape, cells_per_mm3=20_000.0, tissue="full", seed=1)
    image, cells = known.render(whole).astype(np.float32), known.truth_labels(whole) > 0
    low, high = np.percentile(image, [1, 99])
    image = np.clip((image - low) / (high - low), 0, 1).astype(np.float32)
    trained_on, held_out = ((image[:, half], cells[:, half]) for half in (slice(32), slice(32, 64)))
    torch.manual_seed(0)
    trainer = SupervisedTrainer(
        build_network("swinunetr", size=12),
        lambda rng: trained_on,
        SupervisedSettings(steps=6, batch=1, learning_rate=3e-3, seed=0, augmentation=None, warm_up_steps=0),
    )
    for _ in range(6):
        trainer.step()
    epoch = trainer.end_epoch([trained_on], [held_out])
    assert epoch.validation_dice > 4 * epoch.chance_dice


def test_the_same_seed_gives_the_same_weights_and_another_does_not(phantom: LabelledCrop) -> None:
    def run(seed: int, disturb: bool = False) -> dict[str, Tensor]:
        trainer = SupervisedTrainer(small(), draw_from(phantom), settings(seed=seed))
        for _ in range(4):
            if disturb:
                torch.rand(7)
            trainer.step()
        return trainer.state()

    assert same(run(5), run(5, disturb=True))
    assert not same(run(5), run(6))


def test_goes_on_bit_for_bit_after_an_interruption(phantom: LabelledCrop) -> None:
    trained_on, held_out = parts(phantom)

    def run(trainer: SupervisedTrainer, until: int) -> None:
        while len(trainer.history) < until:
            trainer.step()
            if len(trainer.history) % 2 == 0:
                trainer.end_epoch([trained_on], [held_out])

    straight = SupervisedTrainer(small(), draw_from(phantom), settings())
    run(straight, 6)
    interrupted = SupervisedTrainer(small(), draw_from(phantom), settings())
    run(interrupted, 3)
    resumed = SupervisedTrainer(small(seed=9), draw_from(phantom), settings())
    resumed.restore(interrupted.state())
    assert resumed.epochs == interrupted.epochs
    run(resumed, 6)
    assert same(resumed.state(), straight.state())
    assert resumed.best == straight.best
    resumed.take_best()
    straight.take_best()
    assert same(dict(resumed.network.state_dict()), dict(straight.network.state_dict()))


def test_a_crop_depends_on_seed_step_and_place_alone(phantom: LabelledCrop) -> None:
    drawn: list[tuple[int, ...]] = []
    draw = draw_from(phantom)

    def spy(rng: np.random.Generator) -> LabelledCrop:
        crop = draw(rng)
        drawn.append((round(float(crop[0].sum()) * 1000), int(crop[1].sum())))
        return crop

    trainer = SupervisedTrainer(small(), spy, settings(batch=3))
    trainer.step()
    first, rest = drawn[:3], drawn[3:]
    assert len(set(first)) == 3
    assert not rest
    trainer.step()
    assert not set(drawn[3:]) & set(first)
    drawn.clear()
    SupervisedTrainer(small(), spy, settings(batch=2, augmentation=None)).step()
    assert drawn == first[:2]


class _Says(nn.Module):
    """A network that gives a probability for each intensity, whatever its weight is."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, image: Tensor) -> Tensor:
        return torch.logit(image.clamp(1e-6, 1 - 1e-6)) + 0 * self.weight


def test_the_threshold_comes_from_what_is_trained_on_and_the_best_epoch_from_what_is_held_out() -> None:
    image = np.zeros((8, 8, 8), np.float32)
    image[0], image[1], image[2] = 0.32, 0.42, 0.62
    above = {t: (image, image > t) for t in (0.3, 0.4, 0.6)}
    trainer = SupervisedTrainer(_Says(), lambda rng: above[0.4], settings(augmentation=None))
    with pytest.raises(ValueError, match="needs a step"):
        trainer.end_epoch([above[0.4]], [above[0.4]])
    with pytest.raises(ValueError, match="no epoch"):
        trainer.take_best()
    results = []
    for held_out in (0.6, 0.3, 0.6, 0.3):
        trainer.step()
        with torch.no_grad():
            trainer.network.weight.fill_(float(len(trainer.epochs)))  # type: ignore[operator,union-attr]
        results.append(trainer.end_epoch([above[0.4]], [above[held_out]]))
    assert [r.threshold for r in results] == [0.4] * 4
    assert [r.training_dice for r in results] == [1.0] * 4
    assert [r.validation_dice for r in results] == pytest.approx([2 / 3, 4 / 5] * 2)
    assert results[1].chance_dice == pytest.approx(2 * 192 / (512 + 192))
    assert trainer.best == results[1]
    trainer.take_best()
    assert float(trainer.network.state_dict()["weight"]) == 1.0
    assert not trainer.network.training


@given(seed=st.integers(0, 1000), share=st.sampled_from([0.0, 0.1, 1.0]), parts=st.integers(1, 3))
def test_counts_give_the_dice_of_every_threshold(seed: int, share: float, parts: int) -> None:
    rng = np.random.default_rng(seed)
    p = rng.choice(np.array([0.0, 0.3, 0.31, 0.5, 0.95, 1.0], np.float32), (60,))
    cells = rng.random(60) < share
    counted = ProbabilityCounts.none()
    for some_p, some_cells in zip(np.array_split(p, parts), np.array_split(cells, parts), strict=True):
        counted += ProbabilityCounts.of(torch.from_numpy(some_p), torch.from_numpy(some_cells))
    expected = {}
    for threshold in THRESHOLDS:
        found = p >= np.float32(threshold)
        total = int(found.sum() + cells.sum())
        expected[threshold] = 2 * int((found & cells).sum()) / total if total else 1.0
        assert counted.dice(threshold) == expected[threshold]
    assert counted.dice(counted.best_threshold()) == max(expected.values())
    assert counted.cells == cells.sum()


def test_convolutions_in_bfloat16_train_too(phantom: LabelledCrop) -> None:
    trainer = SupervisedTrainer(small(), draw_from(phantom), settings(), precision="bfloat16")
    losses = [trainer.step().loss for _ in range(3)]
    assert np.isfinite(losses).all()
    assert all(value.dtype == torch.float32 for value in trainer.network.state_dict().values())


def test_a_loss_that_is_not_finite_stops_training(phantom: LabelledCrop) -> None:
    trainer = SupervisedTrainer(small(), draw_from(phantom), settings())
    with torch.no_grad():
        next(iter(trainer.network.parameters())).fill_(float("nan"))
    with pytest.raises(TrainingError, match="step 0: the loss is not finite"):
        trainer.step()


CROP = np.zeros((8, 8, 8), np.float32)
NO_CELLS = np.zeros((8, 8, 8), np.bool_)


@pytest.mark.parametrize(
    ("crop", "match"),
    [
        ((CROP.astype(np.float64), NO_CELLS), "expected float32"),
        ((CROP[0], NO_CELLS[0]), r"\(z, y, x\)"),
        ((CROP, CROP), "expected boolean labels"),
        ((CROP, NO_CELLS[:4]), "expected boolean labels"),
        ((CROP + 1.5, NO_CELLS), r"mapped to \[0, 1\]"),
        ((CROP * np.nan, NO_CELLS), "finite"),
    ],
)
def test_crops_that_cannot_be_used(crop: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        SupervisedTrainer(small(), lambda rng: crop, settings()).step()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"steps": 0}, "must be positive"),
        ({"learning_rate": float("nan")}, "must be positive"),
        ({"seed": -1}, "not be negative"),
        ({"final_learning_rate": 2.0}, "0 to 1"),
        ({"loss": "focal"}, "expected a loss"),
    ],
)
def test_settings_that_cannot_be_used(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        settings(**changes)


def test_states_and_precisions_that_cannot_be_used(phantom: LabelledCrop) -> None:
    draw = draw_from(phantom)
    with pytest.raises(ValueError, match="precision"):
        SupervisedTrainer(small(), draw, settings(), precision="float16")
    trainer = SupervisedTrainer(small(), draw, settings(steps=2))
    trainer.step()
    trainer.step()
    state = trainer.state()
    with pytest.raises(ValueError, match="2 steps, the training is to have 1"):
        SupervisedTrainer(small(), draw, settings(steps=1)).restore(state)
    with pytest.raises(ValueError, match="not the state"):
        SupervisedTrainer(nn.Conv3d(1, 1, 1), draw, settings()).restore(state)
    del state["epochs"]
    with pytest.raises(ValueError, match="not the state"):
        SupervisedTrainer(small(), draw, settings()).restore(state)
