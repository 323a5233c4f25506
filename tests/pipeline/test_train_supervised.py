"""Supervised training on volumes: what is held out, what it writes, what it refuses, labels of a census."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed import Client, LocalCluster
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from typer.testing import CliRunner, Result

from braincensus import RunConfig, open_result, run
from braincensus.cli import app
from braincensus.errors import BraincensusError, ConfigError, InputError, OutputError
from braincensus.training.crops import Source, measure
from braincensus.training.pairs import (
    Pair,
    draw_labelled_crops,
    middles,
    pair,
    pair_of_census,
    split_blocks,
)
from braincensus.training.supervised import (
    SupervisedRecipe,
    SupervisedResult,
    train_supervised,
    train_supervised_from_paths,
)
from braincensus.volume import Volume, open_volume
from braincensus_kernels.boxes import Box
from braincensus_kernels.metrics import match_centroids
from braincensus_kernels.models.supervised.networks import load_supervised
from braincensus_kernels.models.supervised.training import SupervisedTrainer
from braincensus_kernels.phantom import Phantom

SHAPE = (32, 40, 52)
SIDE = 16
OPTIONS: dict[str, Any] = {
    "epochs": 2,
    "steps_per_epoch": 2,
    "batch": 1,
    "crop_voxels": SIDE,
    "learning_rate": 1e-2,
    "threads": 1,
}


def phantom(**changes: Any) -> Phantom:
    return Phantom(**{"shape": SHAPE, "cells_per_mm3": 15_000.0, "tissue": "full", "seed": 1, **changes})


def volume(array: np.ndarray) -> Volume:
    return open_volume(array, voxel_size_um=5.0)


@pytest.fixture(scope="module")
def known() -> tuple[np.ndarray, np.ndarray]:
    return phantom().render(Box.whole(SHAPE)), phantom().truth_labels(Box.whole(SHAPE))


@pytest.fixture(scope="module")
def labelled(known: tuple[np.ndarray, np.ndarray]) -> Pair:
    return pair(volume(known[0]), volume(known[1]))


@pytest.fixture(scope="module")
def trained(
    labelled: Pair, tmp_path_factory: pytest.TempPathFactory
) -> tuple[SupervisedResult, list[Any], list[str]]:
    seen: list[Any] = []
    said: list[str] = []
    out = tmp_path_factory.mktemp("supervised") / "mine.safetensors"
    result = train_supervised(
        [labelled], out, progress=lambda *done: seen.append(done), message=said.append, **OPTIONS
    )
    return result, seen, said


# --- what is trained on, what is held out ------------------------------------------------------------


def numbered(shape: tuple[int, int, int], share: float, seed: int) -> Pair:
    """Voxels are numbered, so that a crop says where it was; labels are at random in some regions."""
    rng = np.random.default_rng(seed)
    coarse = rng.random(tuple(-(-n // 8) for n in shape)) < share
    fine = np.kron(coarse, np.ones((8, 8, 8), np.uint8))[: shape[0], : shape[1], : shape[2]]
    return pair(volume(np.arange(np.prod(shape), dtype=np.uint32).reshape(shape)), volume(fine))


@given(
    z=st.integers(16, 40),
    y=st.integers(16, 56),
    x=st.integers(33, 70),
    seed=st.integers(0, 100),
    share=st.sampled_from([0.05, 0.3, 1.0]),
)
def test_no_crop_to_train_on_touches_a_voxel_held_out(
    z: int, y: int, x: int, seed: int, share: float
) -> None:
    pairs = [numbered((z, y, x), share, seed), numbered((32, 32, 32), 1.0, seed)]
    sources = [measure(each.volume, SIDE) for each in pairs]
    split = split_blocks(pairs, side=SIDE, share=0.2, seed=seed)
    covered = [np.zeros(each.volume.shape, np.int8) for each in pairs]
    for block in split.held_out + split.training:
        covered[block.pair][block.box.slices] += 1
        assert all(n >= SIDE for n in block.box.shape)
        assert block.box.contains(block.middle(SIDE))
    assert all((array == 1).all() for array in covered)  # every voxel is in one block
    held_out = {(block.pair, block.box) for block in split.held_out}
    assert any(block.cells for block in split.held_out)
    assert any(block.cells for block in split.training)
    places: list[tuple[int, Box]] = []
    spied = [_Spy(source, number, places) for number, source in enumerate(sources)]
    draw = draw_labelled_crops(pairs, spied, split, SIDE)  # type: ignore[arg-type]
    for place in range(40):
        draw(np.random.default_rng((seed, place)))
    assert len(places) == 40
    for number, box in places:
        assert box.shape == (SIDE, SIDE, SIDE)
        assert all(other.intersect(box).size == 0 for at, other in held_out if at == number)


class _Spy:
    """A source that notes what is read of it."""

    def __init__(self, source: Source, number: int, places: list[tuple[int, Box]]) -> None:
        self._source, self._number, self._places = source, number, places

    def read(self, box: Box) -> np.ndarray:
        self._places.append((self._number, box))
        return self._source.read(box)

    def scaled(self, q: np.ndarray) -> np.ndarray:
        return self._source.scaled(q)


def test_a_share_is_held_out_of_blocks_with_cells_and_of_those_without() -> None:
    cells = np.zeros((160, 160, 32), np.uint8)
    cells[:80, :, :16] = 1  # 50 of 200 blocks
    pairs = [pair(volume(np.arange(cells.size, dtype=np.uint32).reshape(cells.shape)), volume(cells))]
    split = split_blocks(pairs, side=SIDE, share=0.2, seed=0)
    assert [sum(bool(b.cells) for b in part) for part in (split.training, split.held_out)] == [40, 10]
    assert [sum(not b.cells for b in part) for part in (split.training, split.held_out)] == [120, 30]
    assert split_blocks(pairs, side=SIDE, share=0.2, seed=0) == split
    assert split_blocks(pairs, side=SIDE, share=0.2, seed=1) != split
    sources = [measure(pairs[0].volume, SIDE)]
    draw = draw_labelled_crops(pairs, sources, split, SIDE)
    with_cells = [bool(draw(np.random.default_rng(k))[1].any()) for k in range(100)]
    assert 70 <= sum(with_cells) <= 99


def test_of_a_large_volume_few_blocks_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("braincensus.training.pairs._BLOCKS", 12)
    pairs = [numbered((64, 64, 64), 1.0, 0)]
    split = split_blocks(pairs, side=SIDE, share=0.2, seed=0)
    assert len(split.training) + len(split.held_out) == 12
    assert len({block.box.start[0] for block in split.training + split.held_out}) > 1


def test_the_range_is_one_for_the_volume_and_cells_are_what_is_not_0(labelled: Pair) -> None:
    sources = [measure(labelled.volume, SIDE, percentiles=(1.0, 99.0))]
    split = split_blocks([labelled], side=SIDE, share=0.2, seed=0)
    known_cells = phantom().truth_labels(Box.whole(SHAPE)) > 0
    values = phantom().render(Box.whole(SHAPE)).astype(float)
    for block, (image, cells) in zip(
        split.training, middles([labelled], sources, split.training, SIDE), strict=True
    ):
        at = block.middle(SIDE).slices
        low, high = sources[0].low, sources[0].high
        assert np.array_equal(cells, known_cells[at])
        np.testing.assert_allclose(image, np.clip((values[at] - low) / (high - low), 0, 1), atol=1e-5)
    assert sources[0].high < measure(labelled.volume, SIDE).high  # of the 99.9th percentile


# --- what is written ---------------------------------------------------------------------------------


def test_writes_weights_card_losses_and_picture(
    trained: tuple[SupervisedResult, list[Any], list[str]],
) -> None:
    result, seen, said = trained
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert sorted(path.name for path in result.weights.parent.iterdir()) == [
        "mine.csv",
        "mine.md",
        "mine.png",
        "mine.safetensors",
    ]
    rows = list(csv.DictReader(result.losses.read_text().splitlines()))
    assert [row["step"] for row in rows] == ["0", "1", "2", "3"]
    assert [row["epoch"] for row in rows] == ["", "1", "", "2"]
    best = rows[result.best.steps - 1]
    assert float(best["validation_dice"]) == pytest.approx(result.best.validation_dice, rel=1e-5)
    assert max(float(row["validation_dice"] or 0) for row in rows) == float(best["validation_dice"])
    assert result.picture.read_bytes().startswith(b"\x89PNG")
    card = result.card.read_text()
    assert result.sha256 in card
    assert "percentile 1 to 99" in card
    assert f"Threshold: {result.best.threshold:g}" in card
    assert "given labels" in card
    assert "loss: generalized-dice" in card
    assert "4 steps" in str(result)
    assert [text.split(":")[0] for text in said[1:3]] == ["epoch 1 of 2", "epoch 2 of 2"]


def test_the_weights_load_with_their_threshold_and_range(
    trained: tuple[SupervisedResult, list[Any], list[str]],
) -> None:
    result = trained[0]
    weights = load_supervised(result.weights, kind="segresnet")
    assert weights.threshold == result.best.threshold
    assert weights.input_percentiles == (1.0, 99.0)
    assert weights.sha256 == result.sha256
    assert json.loads(weights.metadata["settings"])["batch"] == 1
    assert json.loads(weights.metadata["best_epoch"])["epoch"] == result.best.epoch


def state_of(path: Path) -> dict[str, torch.Tensor]:
    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def test_the_same_seed_gives_the_same_weights_and_another_does_not(
    labelled: Pair, trained: tuple[SupervisedResult, list[Any], list[str]], tmp_path: Path
) -> None:
    again = train_supervised([labelled], tmp_path / "again.safetensors", **OPTIONS)
    other = train_supervised([labelled], tmp_path / "other.safetensors", seed=1, **OPTIONS)
    first, same, different = (state_of(result.weights) for result in (trained[0], again, other))
    assert all(torch.equal(first[key], same[key]) for key in first)
    assert not all(torch.equal(first[key], different[key]) for key in first)


def test_an_interrupted_training_goes_on_to_the_same_weights(
    labelled: Pair,
    trained: tuple[SupervisedResult, list[Any], list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "w.safetensors"
    original = SupervisedTrainer.step

    def step(self: SupervisedTrainer) -> Any:
        if len(self.history) == 3:
            raise KeyboardInterrupt
        return original(self)

    with monkeypatch.context() as patch:
        patch.setattr(SupervisedTrainer, "step", step)
        with pytest.raises(KeyboardInterrupt):
            train_supervised([labelled], out, checkpoint_every=1, **OPTIONS)
    assert not out.exists()
    with pytest.raises(OutputError, match="interrupted"):
        train_supervised([labelled], out, **OPTIONS)
    with pytest.raises(ConfigError, match="batch was 1, is 2"):
        train_supervised([labelled], out, resume=True, **{**OPTIONS, "batch": 2})
    seen: list[Any] = []
    said: list[str] = []
    result = train_supervised(
        [labelled],
        out,
        resume=True,
        progress=lambda *done: seen.append(done),
        message=said.append,
        **OPTIONS,
    )
    assert "after step 3 of 4" in said[0]
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert result.best == trained[0].best
    first, second = state_of(trained[0].weights), state_of(result.weights)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert result.losses.read_bytes() == trained[0].losses.read_bytes()
    assert not list(tmp_path.glob("*.checkpoint.*"))


# --- from paths and from a census --------------------------------------------------------------------


def test_paths_from_the_command_line(known: tuple[np.ndarray, np.ndarray], tmp_path: Path) -> None:
    np.save(tmp_path / "image.npy", known[0])
    np.save(tmp_path / "cells.npy", known[1] > 0)  # a mask
    result = train_supervised_from_paths(
        [tmp_path / "image.npy"],
        tmp_path / "w.safetensors",
        labels=[tmp_path / "cells.npy"],
        from_census=[],
        voxel_size_um=(5.0, 5.0, 5.0),
        channel=0,
        level=0,
        **{**OPTIONS, "epochs": 1, "augment": False, "loss": "dice-ce"},
    )
    assert "image.npy" in result.card.read_text()
    assert "cells.npy" in result.card.read_text()


@pytest.fixture(scope="module")
def census(known: tuple[np.ndarray, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished census of a volume that lies beside it."""
    folder = tmp_path_factory.mktemp("census")
    np.save(folder / "image.npy", known[0])
    config = RunConfig().merged(
        {"input": {"voxel_size_um": (5.0, 5.26, 5.26)}, "foreground": {"model": "intensity"}}
    )
    with (
        LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address="127.0.0.1:0") as cluster,
        Client(cluster) as client,
    ):
        run(folder / "image.npy", folder / "out.zarr", config=config, client=client)
    return folder / "out.zarr"


def test_a_census_is_labels_for_the_volume_that_it_counted(census: Path, tmp_path: Path) -> None:
    found = pair_of_census(census)
    whole = found.volume.box
    result = open_result(census)
    assert result.n_cells > 10
    assert np.array_equal(found.volume.read(whole), np.load(census.parent / "image.npy"))
    assert np.array_equal(found.cells(whole), result.labels[:] > 0)
    assert found.labels.read(whole).max() == result.n_cells
    trained = train_supervised_from_paths(
        [],
        tmp_path / "w.safetensors",
        labels=[],
        from_census=[census],
        voxel_size_um=None,
        channel=0,
        level=0,
        **{**OPTIONS, "epochs": 1},
    )
    labelled_by = f"out.zarr, a census (intensity, voronoi-otsu) that found {result.n_cells:,} cells"
    assert labelled_by in trained.card.read_text()
    assert json.loads(load_supervised(trained.weights).metadata["volumes"])[0]["name"] == "image.npy"


def test_a_volume_that_is_not_what_the_census_counted_is_refused(census: Path, tmp_path: Path) -> None:
    source, moved = census.parent / "image.npy", tmp_path / "elsewhere.npy"
    array = np.load(source)
    source.rename(moved)
    try:
        with pytest.raises(InputError, match="not where it was"):
            pair_of_census(census)
        assert pair_of_census(census, volume=volume(array)).volume.shape == SHAPE
        with pytest.raises(ConfigError, match="do not fit"):
            pair_of_census(census, volume=volume(array[1:]))
        np.save(source, array)
        with pytest.raises(InputError, match="another mtime"):
            pair_of_census(census)
    finally:
        moved.replace(source)
    assert pair_of_census(census).volume.shape == SHAPE
    with pytest.raises(OutputError):
        pair_of_census(tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_from_a_census_to_a_network_that_counts_another_volume_about_as_well(tmp_path: Path) -> None:
    shape = (64, 72, 80)
    known = [Phantom(shape=shape, cells_per_mm3=4000.0, tissue="full", seed=seed) for seed in (1, 2)]
    for name, each in zip(("taught.npy", "asked.npy"), known, strict=True):
        np.save(tmp_path / name, each.render(Box.whole(shape)))
    base = RunConfig().merged({"input": {"voxel_size_um": known[0].voxel_size_um}})
    with (
        LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address="127.0.0.1:0") as cluster,
        Client(cluster) as client,
    ):
        run(tmp_path / "taught.npy", tmp_path / "taught.zarr", config=base, client=client)  # WNet3D
        trained = train_supervised(
            [pair_of_census(tmp_path / "taught.zarr")],
            tmp_path / "w.safetensors",
            **{**OPTIONS, "epochs": 4, "steps_per_epoch": 20, "batch": 2},
        )
        changes = {"foreground": {"model": "segresnet", "weights": str(trained.weights)}}
        student = run(tmp_path / "asked.npy", tmp_path / "s.zarr", config=base.merged(changes), client=client)
        teacher = run(tmp_path / "asked.npy", tmp_path / "t.zarr", config=base, client=client)
    truth = known[1].cells()
    true_um = np.stack([truth[a] * s for a, s in zip("zyx", known[1].voxel_size_um, strict=True)], axis=1)
    f1 = [
        match_centroids(r.cells.to_pandas()[["z_um", "y_um", "x_um"]].to_numpy(), true_um, 10.0).f1
        for r in (student, teacher)
    ]
    assert trained.best.validation_dice > 0.6
    assert f1[0] > 0.85
    assert f1[0] > f1[1] - 0.06


# --- the command line --------------------------------------------------------------------------------


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)


def test_the_command(known: tuple[np.ndarray, np.ndarray], tmp_path: Path) -> None:
    np.save(tmp_path / "image.npy", known[0])
    np.save(tmp_path / "cells.npy", known[1])
    arguments = ("train-supervised", tmp_path / "image.npy", "--voxel-size", "5", "--crop", "16")
    shorter = ("--epochs", "1", "--steps-per-epoch", "1", "--batch", "1", "--threads", "1", "--no-augment")
    out = tmp_path / "mine.safetensors"
    done = call(
        *arguments,
        *shorter,
        "--labels",
        tmp_path / "cells.npy",
        "--loss",
        "tversky",
        "--seed",
        3,
        "--out",
        out,
    )
    assert done.exit_code == 0, done.output
    assert "epoch 1 of 1" in done.output
    assert "1 steps in" in done.output
    settings = json.loads(load_supervised(out).metadata["settings"])
    assert (settings["loss"], settings["seed"], settings["augment"]) == ("tversky", 3, False)
    refused = call(*arguments, "--labels", tmp_path / "cells.npy", "--out", out)
    assert refused.exit_code == 1
    assert "the output exists" in refused.output
    refused = call(*arguments, "--out", out)
    assert refused.exit_code == 1
    assert "--from-census OUTPUT" in refused.output
    assert "Traceback" not in refused.output


# --- what is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "error", "match"),
    [
        (np.zeros(SHAPE, np.uint8), ConfigError, "labels are empty"),
        (np.ones((32, 40, 50), np.uint8), ConfigError, "32 x 40 x 50"),
        (np.ones(SHAPE, np.float32), InputError, "whole numbers"),
    ],
)
def test_labels_that_cannot_be_used(
    known: tuple[np.ndarray, np.ndarray], tmp_path: Path, labels: np.ndarray, error: Any, match: str
) -> None:
    with pytest.raises(error, match=match):
        train_supervised([pair(volume(known[0]), volume(labels))], tmp_path / "w.safetensors", **OPTIONS)
    assert not list(tmp_path.iterdir())


def test_cells_in_one_block_only_cannot_be_held_out(
    known: tuple[np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    cells = np.zeros(SHAPE, np.uint8)
    cells[2, 2, 2] = 1
    with pytest.raises(ConfigError, match="one block only"):
        train_supervised([pair(volume(known[0]), volume(cells))], tmp_path / "w.safetensors", **OPTIONS)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"kind": "unet"}, "segresnet or swinunetr"),
        ({"size": 5}, "multiple of 8"),
        ({"crop_voxels": 20}, "multiple of 8, 16 or more, for SegResNet"),
        ({"kind": "swinunetr"}, "multiple of 32, 64 or more, for SwinUNETR"),
        ({"crop_voxels": 64}, "smaller than a crop"),
        ({"epochs": 0}, "epochs"),
        ({"batch": 0}, "must be positive"),
        ({"loss": "focal"}, "expected a loss"),
        ({"validation_share": 0.9}, "up to 0.5"),
        ({"precision": "float8"}, "auto, float32 or bfloat16"),
        ({"precision": "bfloat16", "crop_voxels": 16}, r"24 voxels or more[\s\S]*found: 16"),
        ({"momentum": 1}, "no training option 'momentum'"),
        ({"threads": 0}, "1 or more"),
        ({"checkpoint_every": 0}, "1 or more"),
        ({"device": "abacus"}, "no such device"),
    ],
)
def test_options_that_cannot_be_used(
    labelled: Pair, tmp_path: Path, changes: dict[str, Any], match: str
) -> None:
    with pytest.raises(ConfigError, match=match):
        train_supervised([labelled], tmp_path / "w.safetensors", **{**OPTIONS, **changes})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("inputs", "labels", "from_census", "match"),
    [
        ([], [], [], "neither"),
        (["a.npy"], ["b.npy"], ["c.zarr"], "both"),
        (["a.npy"], [], [], "neither"),
        ([], ["b.npy"], [], "0 volumes, 1 labels"),
    ],
)
def test_volumes_and_labels_that_do_not_pair_up(
    tmp_path: Path, inputs: list[str], labels: list[str], from_census: list[str], match: str
) -> None:
    with pytest.raises(ConfigError, match=match):
        train_supervised_from_paths(
            inputs,
            tmp_path / "w.safetensors",
            labels=labels,
            from_census=from_census,
            voxel_size_um=(5.0, 5.0, 5.0),
            channel=0,
            level=0,
        )


def test_training_that_gets_nowhere_writes_no_weights(labelled: Pair, tmp_path: Path) -> None:
    with pytest.raises(BraincensusError, match="training was stopped"):
        train_supervised([labelled], tmp_path / "w.safetensors", **{**OPTIONS, "learning_rate": 1e20})
    assert not (tmp_path / "w.safetensors").exists()


def test_what_is_left_open_is_as_published() -> None:
    for kind, batch in (("segresnet", 10), ("swinunetr", 5)):
        recipe = SupervisedRecipe(kind=kind).settled(21, "cpu")  # type: ignore[arg-type]
        assert (recipe.batch, recipe.steps_per_epoch, recipe.precision) == (batch, -(-21 // batch), "float32")
        assert (recipe.epochs, recipe.learning_rate, recipe.loss) == (50, 1e-3, "generalized-dice")
