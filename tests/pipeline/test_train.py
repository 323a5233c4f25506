"""Training on volumes: what it writes, what it refuses, and that a run can use it."""

import csv
import json
import os
import signal
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from braincensus.errors import BraincensusError, ConfigError, InputError, OutputError
from braincensus.training import (
    Recipe,
    TrainingInterruptedError,
    TrainingResult,
    TrainingWarning,
    train_from_paths,
    train_wnet3d,
)
from braincensus.training.crops import _spread, draw_crops, measure
from braincensus.volume import Volume, open_volume
from braincensus_kernels.boxes import Box
from braincensus_kernels.models.calibrate import NormStatistics
from braincensus_kernels.models.checkpoints import load_weights
from braincensus_kernels.models.predict import Predictor
from braincensus_kernels.models.training import Trainer
from braincensus_kernels.phantom import Phantom

OPTIONS: dict[str, Any] = {
    "channels": (4, 4, 4, 4),
    "steps": 3,
    "crop_voxels": 16,
    "batch": 1,
    "precision": "float32",
    "threads": 1,
}
SHAPE = (32, 40, 48)


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return Phantom(shape=SHAPE, cells_per_mm3=8000.0, tissue="full", seed=1).render(Box.whole(SHAPE))


def volume(image: np.ndarray) -> Volume:
    return open_volume(image, voxel_size_um=5.0)


@pytest.fixture(scope="module")
def trained(image: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainingResult, list[Any]]:
    seen: list[Any] = []
    out = tmp_path_factory.mktemp("train") / "mine.safetensors"
    result = train_wnet3d([volume(image)], out, progress=lambda *done: seen.append(done), **OPTIONS)
    return result, seen


def test_writes_weights_card_losses_and_their_picture(trained: tuple[TrainingResult, list[Any]]) -> None:
    result, seen = trained
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert sorted(path.name for path in result.weights.parent.iterdir()) == [
        "mine.csv",
        "mine.md",
        "mine.pictures",
        "mine.png",
        "mine.safetensors",
    ]
    rows = list(csv.DictReader(result.losses.read_text().splitlines()))
    assert [int(row["step"]) for row in rows] == [0, 1, 2]
    assert float(rows[-1]["loss"]) == pytest.approx(result.final_loss, rel=1e-4)
    assert result.picture.read_bytes().startswith(b"\x89PNG")
    card = result.card.read_text()
    assert "32, 40, 48" in card
    assert "intensity_sigma: 50.0" in card
    assert "3 steps" in str(result)


def test_the_weights_load_with_their_settings(trained: tuple[TrainingResult, list[Any]]) -> None:
    weights = load_weights(trained[0].weights)
    assert weights.channels == (4, 4, 4, 4)
    assert weights.sha256 == trained[0].sha256
    assert json.loads(weights.metadata["settings"])["steps"] == 3


def test_the_same_seed_gives_the_same_weights(
    image: np.ndarray, trained: tuple[TrainingResult, list[Any]], tmp_path: Path
) -> None:
    again = train_wnet3d([volume(image)], tmp_path / "again.safetensors", **OPTIONS)
    other = train_wnet3d([volume(image)], tmp_path / "other.safetensors", **{**OPTIONS, "seed": 1})
    first, same, different = (
        load_weights(result.weights).encoder["in_b.module.0.weight"] for result in (trained[0], again, other)
    )
    assert torch.equal(first, same)
    assert not torch.equal(first, different)


def test_the_brightness_of_the_volume_does_not_matter(
    image: np.ndarray, trained: tuple[TrainingResult, list[Any]], tmp_path: Path
) -> None:
    brighter = train_wnet3d([volume(image * 4)], tmp_path / "brighter.safetensors", **OPTIONS)
    assert brighter.final_loss == pytest.approx(trained[0].final_loss, rel=0.05)


def test_reads_only_blocks_and_crops(
    image: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Box] = []
    monkeypatch.setattr("braincensus.training.crops._BLOCK", 16)
    monkeypatch.setattr("braincensus.training.crops._BLOCKS", 4)
    original = Volume.read

    def spy(self: Volume, box: Box) -> np.ndarray:
        read.append(box)
        return original(self, box)

    monkeypatch.setattr(Volume, "read", spy)
    train_wnet3d([volume(image)], tmp_path / "w.safetensors", **OPTIONS)
    assert max(box.size for box in read) == 16**3
    tiles = set(Box.whole(SHAPE).tiles((16, 16, 16)))
    assert len(set(read[:4]) & tiles) == 4
    assert not set(read[4:]) <= tiles


def test_paths_from_the_command_line(image: np.ndarray, tmp_path: Path) -> None:
    np.save(tmp_path / "volume.npy", image)
    result = train_from_paths(
        [tmp_path / "volume.npy"],
        tmp_path / "w.safetensors",
        voxel_size_um=(5.0, 5.0, 5.0),
        channel=0,
        level=0,
        **{**OPTIONS, "steps": 1},
    )
    assert "volume.npy" in result.card.read_text()


def test_an_existing_output_is_kept(image: np.ndarray, tmp_path: Path) -> None:
    (tmp_path / "w.md").write_text("notes")
    with pytest.raises(OutputError, match=r"w\.md"):
        train_wnet3d([volume(image)], tmp_path / "w.safetensors", **OPTIONS)
    assert (tmp_path / "w.md").read_text() == "notes"
    train_wnet3d([volume(image)], tmp_path / "w.safetensors", overwrite=True, **{**OPTIONS, "steps": 1})
    assert "WNet3D" in (tmp_path / "w.md").read_text()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"crop_voxels": 20}, "multiple of 8"),
        ({"crop_voxels": 64}, "smaller than a crop"),
        ({"channels": (4, 4, 4)}, "four multiples of 4"),
        ({"steps": 0}, "must be positive"),
        ({"epochs": 2}, "3 steps, 2 epochs"),
        ({"steps": None}, "neither"),
        ({"precision": "float8"}, "precision"),
        ({"precision": "bfloat16", "crop_voxels": 16}, r"24 voxels or more[\s\S]*found: 16"),
        ({"num_classes": 1}, "num_classes"),
        ({"dropout": 1.0}, "dropout"),
        ({"ncuts": "none"}, "class-mean or pairwise"),
        ({"reconstruction": "l1"}, "mse or bce"),
        ({"input_range": "volume"}, "tissue or crop"),
        ({"device": "tpu"}, "no such device"),
        ({"device": "cuda:99"}, "CUDA devices or more"),
        ({"threads": 0}, "threads"),
        ({"checkpoint_every": 0}, "checkpoint_every"),
        ({"picture_every": -1}, "picture_every"),
    ],
)
def test_options_that_cannot_be_used(
    image: np.ndarray, tmp_path: Path, changes: dict[str, Any], match: str
) -> None:
    with pytest.raises(ConfigError, match=match):
        train_wnet3d([volume(image)], tmp_path / "w.safetensors", **{**OPTIONS, **changes})
    assert not list(tmp_path.iterdir())


def test_names_and_inputs_that_cannot_be_used(image: np.ndarray, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"NAME\.safetensors"):
        train_wnet3d([volume(image)], tmp_path / "w.pth", **OPTIONS)
    with pytest.raises(ConfigError, match="no volume"):
        train_wnet3d([], tmp_path / "w.safetensors", **OPTIONS)
    with pytest.raises(InputError, match="constant"):
        train_wnet3d([volume(np.full(SHAPE, 7, np.uint16))], tmp_path / "w.safetensors", **OPTIONS)
    holed = image.astype(np.float32)
    holed[3, 4, 5] = np.nan
    with pytest.raises(InputError, match="not finite"):
        train_wnet3d([volume(holed)], tmp_path / "w.safetensors", **OPTIONS)


def test_training_that_gets_nowhere_leaves_its_losses_alone(image: np.ndarray, tmp_path: Path) -> None:
    out = tmp_path / "w.safetensors"
    options = {**OPTIONS, "steps": 30, "learning_rate": 1e30, "checkpoint_every": 1, "picture_every": 0}
    with pytest.raises(BraincensusError, match=r"training was stopped[^~]*w\.csv"):
        train_wnet3d([volume(image)], out, **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["w.csv", "w.png"]


# --- what the weights and the card say ----------------------------------------------------------------


def test_the_calibration_is_in_the_weights_and_predicts(trained: tuple[TrainingResult, list[Any]]) -> None:
    result = trained[0]
    weights = load_weights(result.weights)
    statistics = NormStatistics.from_json(weights.metadata["calibration"])
    assert statistics.foreground_class == result.foreground_class
    assert "windows of 16^3 voxels of tissue of array" in weights.metadata["calibration_of"]
    assert statistics.windows == len(json.loads(weights.metadata["calibration_windows"])) == 8
    predictor = Predictor(weights, statistics=statistics, halo_voxels=8, threads=1)
    crop = np.random.default_rng(0).uniform(0, 100, (32, 32, 32)).astype(np.float32)
    assert predictor.predict(crop).shape == (16, 16, 16)
    card = result.card.read_text()
    for text in (
        result.sha256,
        f"Foreground: class {result.foreground_class} of 2",
        weights.metadata["calibration_of"],
        "No warnings",
        f"torch {torch.__version__}",
        "threads: 1",
    ):
        assert text in card


def test_warnings_are_told_and_kept(
    image: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trainer, "signs", lambda self: {"flat": "the loss has not fallen: change something"})
    out = tmp_path / "w.safetensors"
    said: list[str] = []
    result = train_wnet3d([volume(image)], out, message=said.append, **OPTIONS)
    assert [text for text in said if "warning" in text] == [
        "warning: step 1: the loss has not fallen: change something"
    ]
    assert result.warnings == ("step 1: the loss has not fallen: change something",)
    assert "step 1: the loss has not fallen" in result.card.read_text()
    with pytest.warns(TrainingWarning, match="has not fallen"):
        train_wnet3d([volume(image)], out, overwrite=True, **OPTIONS)


def test_examples_are_drawn_at_the_epochs_asked_for(image: np.ndarray, tmp_path: Path) -> None:
    options = {**OPTIONS, "steps": None, "epochs": 3, "steps_per_epoch": 2, "num_classes": 3}
    result = train_wnet3d([volume(image)], tmp_path / "w.safetensors", picture_every=1, **options)
    assert result.steps == 6
    drawn = sorted((tmp_path / "w.pictures").iterdir())
    assert [path.name for path in drawn] == ["step-000002.png", "step-000004.png", "step-000006.png"]
    pixels = imread(drawn[-1])
    assert pixels.shape[1] > pixels.shape[0]  # input, three classes, decoder; three examples below each other
    assert len(np.unique(pixels)) > 50


def test_an_epoch_draws_as_many_voxels_as_are_tissue(image: np.ndarray) -> None:
    source = measure(volume(image), 16)
    recipe = Recipe(steps=None, epochs=2, crop_voxels=16, batch=3).settled(source.tissue_voxels, "cpu")
    assert recipe.steps_per_epoch == -(-source.tissue_voxels // (3 * 16**3))
    assert recipe.steps == 2 * recipe.steps_per_epoch
    assert 0.9 * image.size < source.tissue_voxels <= image.size


def test_the_published_recipe_is_changed_by_what_is_given() -> None:
    published = Recipe.published()
    assert (published.channels, published.crop_voxels, published.batch) == ((64, 128, 256, 512), 64, 2)
    assert (published.epochs, published.steps, published.seed) == (50, None, 34936339)
    assert (published.dropout, published.weight_decay, published.variation) == (0.65, 0.01, None)
    assert (published.intensity_sigma, published.spatial_sigma_voxels, published.radius_voxels) == (1, 4, 2)
    assert (published.input_range, published.ncuts, published.reconstruction) == ("crop", "class-mean", "mse")
    assert (published.warm_up_steps, published.final_learning_rate) == (0, 1)
    changed = published.changed(steps=10, learning_rate=2e-3)
    assert (changed.steps, changed.epochs, changed.learning_rate) == (10, None, 2e-3)
    assert changed.changed(epochs=4).steps is None
    with pytest.raises(ConfigError, match=r"sttteps.*\n.*one of batch"):
        published.changed(sttteps=3)
    with pytest.raises(ConfigError, match="10 steps, 4 epochs"):
        published.changed(steps=10, epochs=4)


# --- crops --------------------------------------------------------------------------------------------


def test_crops_come_from_where_the_tissue_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("braincensus.training.crops._BLOCK", 16)
    rng = np.random.default_rng(0)
    dark = rng.normal(100, 3, (32, 32, 160))
    dark[:, :, 48:80] = rng.normal(400, 20, (32, 32, 32))
    dark[8:12, 8:12, 60:64] = 900
    source = measure(volume(dark.astype(np.uint16)), 16)
    assert source.tissue_share == pytest.approx(0.2, abs=0.01)
    starts = np.array([source.place(16, rng).start for _ in range(300)])
    assert (starts.min(0) >= 0).all()
    assert (starts.max(0) <= np.array([16, 16, 144])).all()
    near = (starts[:, 2] > 32) & (starts[:, 2] < 80)
    assert near.mean() > 0.8


def test_each_crop_in_its_own_range_as_published(image: np.ndarray) -> None:
    source = measure(volume(image), 16)
    tissue, own = (draw_crops([source], 16, kind) for kind in ("tissue", "crop"))
    rescaled = own(np.random.default_rng(3))
    assert (rescaled.min(), rescaled.max()) == (0, pytest.approx(100))
    raw = tissue(np.random.default_rng(3))
    inside = (raw > 0) & (raw < 99.9)
    assert np.corrcoef(raw[inside], rescaled[inside])[0, 1] > 0.9999
    assert abs(float(raw[inside].mean() - rescaled[inside].mean())) > 1


def test_blocks_spread_over_a_volume_are_few_and_everywhere() -> None:
    boxes = _spread((12_800, 6_400, 6_400))
    assert len(boxes) == 128
    starts = np.array([box.start for box in boxes])
    assert len(np.unique(starts[:, 0])) > 60
    assert len(np.unique(starts[:, 2])) > 25


class Sky:
    """A terabyte's worth of regions that is stored nowhere: tissue in a slab, noise elsewhere."""

    def __init__(self) -> None:
        self.largest, self.reads = 0, 0

    def read(self, box: Box) -> np.ndarray:
        self.largest, self.reads = max(self.largest, box.size), self.reads + 1
        rng = np.random.default_rng(box.start)
        values = rng.normal(100, 3, box.shape)
        z = np.arange(box.start[0], box.stop[0])
        values[(z >= 800) & (z < 1600)] *= 4
        values[rng.random(box.shape) < 0.01] *= 3
        return values.astype(np.uint16)


def test_a_volume_of_any_size_is_known_from_a_few_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("braincensus.training.crops._BLOCK", 32)  # as many regions as a terabyte has of 128^3
    sky = Sky()
    small = volume(np.arange(8**3, dtype=np.uint16).reshape(8, 8, 8))
    huge = replace(small, shape=(3200, 1600, 1600), reader=sky)  # type: ignore[arg-type]
    source = measure(huge, 16)
    assert (sky.reads, sky.largest) == (128, 32**3)
    assert source.tissue_share == pytest.approx(0.25, abs=0.02)
    rng = np.random.default_rng(0)
    z = np.array([source.place(16, rng).start[0] for _ in range(200)])
    assert ((z > 700) & (z < 1700)).mean() > 0.8
    draw = draw_crops([source], 16, "tissue")
    for _ in range(20):
        assert draw(rng).shape == (16, 16, 16)
    assert sky.reads < 128 + 20 * 3


# --- interruption -------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stops_when_told_and_goes_on_to_the_same_bits(
    image: np.ndarray, tmp_path: Path, number: signal.Signals
) -> None:
    options = {**OPTIONS, "steps": 5, "dropout": 0.3, "picture_every": 0}
    straight = train_wnet3d([volume(image)], tmp_path / "straight.safetensors", **options)
    out = tmp_path / "w.safetensors"
    before = signal.getsignal(number)

    def interrupt(done: int, _: int) -> None:
        if done == 2:
            os.kill(os.getpid(), number)

    with pytest.raises(TrainingInterruptedError, match=r"step 2 of 5.*\n.*checkpoint.*\n.*--resume") as stop:
        train_wnet3d([volume(image)], out, progress=interrupt, **options)
    assert stop.value.signal_number == number
    assert signal.getsignal(number) == before
    assert not out.exists()
    with out.with_suffix(".csv").open("a") as file:
        file.write("2,steps,that,were,not,saved\n")
    with pytest.raises(OutputError, match=r"interrupted.*\n.*w\.checkpoint.*\n.*--resume"):
        train_wnet3d([volume(image)], out, **options)
    seen: list[int] = []
    resumed = train_wnet3d(
        [volume(image)], out, resume=True, progress=lambda done, _: seen.append(done), **options
    )
    assert seen == [1, 2, 3, 4, 5]
    assert resumed.losses.read_text() == straight.losses.read_text()
    assert resumed.final_loss == straight.final_loss
    one, other = (load_weights(result.weights) for result in (straight, resumed))
    assert all(torch.equal(one.encoder[key], other.encoder[key]) for key in one.encoder)
    assert not out.with_suffix(".checkpoint.safetensors").exists()


@pytest.fixture(scope="module")
def interrupted(image: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    np.save(tmp_path_factory.getbasetemp() / "volume.npy", image)
    out = tmp_path_factory.mktemp("interrupted") / "w.safetensors"

    def interrupt(done: int, _: int) -> None:
        if done == 1:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(TrainingInterruptedError):
        train_wnet3d([volume(image)], out, progress=interrupt, picture_every=0, **OPTIONS)
    return out


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"learning_rate": 1e-4}, r"learning_rate was 0\.002, is 0\.0001"),
        ({"steps": 7}, r"steps was 3, is 7"),
        ({"channels": (4, 4, 4, 8)}, r"channels was"),
        ({"image": 2}, r"volume 0 was"),
        ({"overwrite": True}, r"exclude each other"),
    ],
)
def test_does_not_go_on_with_another_training(
    image: np.ndarray, interrupted: Path, changes: dict[str, Any], match: str
) -> None:
    options = {**OPTIONS, "resume": True, **changes}
    with pytest.raises(ConfigError, match=match):
        train_wnet3d([volume(image * options.pop("image", 1))], interrupted, **options)
    assert interrupted.with_suffix(".checkpoint.safetensors").exists()


def test_a_damaged_checkpoint_is_refused(image: np.ndarray, interrupted: Path, tmp_path: Path) -> None:
    whole = interrupted.with_suffix(".checkpoint.safetensors").read_bytes()
    (tmp_path / "w.checkpoint.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(OutputError, match="cannot go on from"):
        train_wnet3d([volume(image)], tmp_path / "w.safetensors", resume=True, **OPTIONS)


def test_resuming_without_a_checkpoint_starts_and_says_so(image: np.ndarray, tmp_path: Path) -> None:
    said: list[str] = []
    options = {**OPTIONS, "steps": 1, "picture_every": 0}
    train_wnet3d([volume(image)], tmp_path / "w.safetensors", resume=True, message=said.append, **options)
    assert "no checkpoint at" in said[0]


def test_a_crop_that_cannot_be_read_loses_nothing(
    image: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, broken = Volume.read, False

    def read(self: Volume, box: Box) -> np.ndarray:
        if broken:
            raise InputError("the disk is gone")
        return original(self, box)

    def break_it(done: int, _: int) -> None:
        nonlocal broken
        broken = done >= 2

    monkeypatch.setattr(Volume, "read", read)
    out = tmp_path / "w.safetensors"
    options = {**OPTIONS, "steps": 6, "picture_every": 0}
    with pytest.raises(InputError, match=r"disk is gone\n.*--resume"):
        train_wnet3d([volume(image)], out, progress=break_it, **options)
    broken = False
    assert train_wnet3d([volume(image)], out, resume=True, **options).steps == 6


# --- TensorBoard --------------------------------------------------------------------------------------


def test_tensorboard_has_every_step(image: np.ndarray, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    train_wnet3d([volume(image)], tmp_path / "w.safetensors", tensorboard=True, **OPTIONS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(tmp_path / "w.tensorboard")).Reload()
    rows = list(csv.DictReader((tmp_path / "w.csv").read_text().splitlines()))
    logged = [event.value for event in events.Scalars("training/loss")]
    assert logged == pytest.approx([float(row["loss"]) for row in rows], rel=1e-5)
    assert len(events.Images("examples")) == 3


def test_tensorboard_that_is_missing_is_said_before_anything_is_written(
    image: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match=r"braincensus\[tensorboard\]"):
        train_wnet3d([volume(image)], tmp_path / "w.safetensors", tensorboard=True, **OPTIONS)
    assert not list(tmp_path.iterdir())


# --- several processes --------------------------------------------------------------------------------


def test_a_group_without_its_others_is_refused(
    image: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ConfigError, match=r"WORLD_SIZE is 2[^~]*torchrun"):
        train_wnet3d([volume(image)], tmp_path / "w.safetensors", **OPTIONS)


def test_a_copy_elsewhere_is_the_same_volume(image: np.ndarray, tmp_path: Path) -> None:
    paths = [tmp_path / name / "volume.npy" for name in ("disk", "scratch")]
    for number, path in enumerate(paths):
        path.parent.mkdir()
        np.save(path, image)
        os.utime(path, (1e9 + number, 1e9 + number))
    options = {"voxel_size_um": (5.0, 5.0, 5.0), "channel": 0, "level": 0, "picture_every": 0, **OPTIONS}

    def interrupt(done: int, _: int) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(TrainingInterruptedError):
        train_from_paths([paths[0]], tmp_path / "w.safetensors", progress=interrupt, **options)
    assert train_from_paths([paths[1]], tmp_path / "w.safetensors", resume=True, **options).steps == 3


@pytest.mark.slow
def test_two_processes_train_what_one_does(image: np.ndarray, tmp_path: Path) -> None:
    np.save(tmp_path / "volume.npy", image)
    command = Path(sys.executable).with_name("braincensus")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    options = [
        *("--channels", "4,4,4,4", "--crop", "16", "--batch", "2", "--steps", "4", "--dropout", "0"),
        *("--precision", "float32", "--threads", "1", "--device", "cpu", "--voxel-size", "5"),
        *("--picture-every", "0"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for name, prefix in (("one", []), ("two", [*launch, "--no-python"])):
        subprocess.run(
            [*prefix, command, "train", tmp_path / "volume.npy", "--out", tmp_path / f"{name}.safetensors",
             *options],
            check=True, env=environment, timeout=200, capture_output=True,
        )  # fmt: skip
    one, two = (np.loadtxt(tmp_path / f"{name}.csv", delimiter=",", skiprows=1) for name in ("one", "two"))
    assert len(two) == 4
    np.testing.assert_allclose(two[:, :4], one[:, :4], rtol=1e-3, atol=1e-4)
    assert "2 processes" in (tmp_path / "two.md").read_text()
    assert sorted(path.name for path in tmp_path.glob("two.*")) == [
        "two.csv",
        "two.md",
        "two.png",
        "two.safetensors",
    ]
