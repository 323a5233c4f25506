"""Training on volumes: what it writes, what it refuses, and that a run can use it."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from braincensus.errors import BraincensusError, ConfigError, InputError, OutputError
from braincensus.train import TrainingResult, train_from_paths, train_wnet3d
from braincensus.volume import Volume, open_volume
from braincensus_kernels.boxes import Box
from braincensus_kernels.models.checkpoints import load_weights
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
    monkeypatch.setattr("braincensus.train._BLOCK", 16)
    monkeypatch.setattr("braincensus.train._BLOCKS_FOR_RANGE", 4)
    original = Volume.read

    def spy(self: Volume, box: Box) -> np.ndarray:
        read.append(box)
        return original(self, box)

    monkeypatch.setattr(Volume, "read", spy)
    train_wnet3d([volume(image)], tmp_path / "w.safetensors", **OPTIONS)
    assert max(box.size for box in read) == 16**3
    assert len(set(read[:8])) == 4


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
        ({"precision": "float8"}, "precision"),
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


def test_training_that_gets_nowhere_writes_nothing(image: np.ndarray, tmp_path: Path) -> None:
    with pytest.raises(BraincensusError, match="training was stopped"):
        train_wnet3d(
            [volume(image)], tmp_path / "w.safetensors", **{**OPTIONS, "steps": 30, "learning_rate": 1e30}
        )
    assert not list(tmp_path.iterdir())
