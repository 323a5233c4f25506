"""The command line as a person meets it: what works, and one clear message where it does not."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
import yaml
import zarr
from typer.testing import CliRunner, Result

from braincensus import OutputError, RunConfig, open_result
from braincensus.cli import app
from braincensus.cluster import scheduler
from braincensus.formats.phantom import write_phantom_file
from braincensus_kernels.boxes import Box
from braincensus_kernels.phantom import Phantom

SHAPE = (40, 72, 64)


@pytest.fixture(autouse=True)
def any_port(monkeypatch):
    """Leave the dashboard's usual port alone: tests beside this one look for it at the same moment."""
    monkeypatch.setattr("braincensus.cluster.managers.free_port", lambda *_, **__: 0)


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)


def failing(*arguments: object) -> str:
    result = call(*arguments)
    assert result.exit_code == 1, result.output
    assert "Traceback" not in result.output
    assert "error:" in result.output
    return result.output


@pytest.fixture(scope="module")
def phantom() -> np.ndarray:
    return Phantom(shape=SHAPE, n_cells=40, seed=5, tissue="full").render(Box.whole(SHAPE))


@pytest.fixture
def volume(tmp_path: Path, phantom: np.ndarray) -> Path:
    path = tmp_path / "brain.tif"
    tifffile.imwrite(
        path,
        phantom,
        imagej=True,
        metadata={"axes": "ZYX", "spacing": 5.0, "unit": "um"},
        resolution=(1 / 5.26, 1 / 5.26),
    )
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, phantom: np.ndarray) -> Path:
    folder = tmp_path_factory.mktemp("census")
    np.save(folder / "brain.npy", phantom)
    output = folder / "out.zarr"
    result = call(
        "run",
        folder / "brain.npy",
        output,
        "--voxel-size",
        "5,5.26,5.26",
        "--foreground",
        "intensity",
        "--block-size",
        "32",
        "--workers",
        1,
    )
    assert result.exit_code == 0, result.output
    assert "exact" in result.output
    assert "dashboard" in result.output
    return output


def test_run_writes_a_census_and_info_reads_it(finished):
    result = open_result(finished)
    assert 25 <= result.n_cells <= 60
    assert len(result.cells) == result.n_cells
    assert result.seams["exact"]
    assert result.seams["faces"] > 0
    assert set(result.timings) >= {
        "intensity",
        "segment",
        "threshold",
        "label",
        "stitch",
        "relabel",
        "measure",
    }
    shown = call("info", finished, "--picture", finished.parent / "census.png")
    assert (finished.parent / "census.png").read_bytes().startswith(b"\x89PNG")
    assert shown.exit_code == 0
    assert f"{result.n_cells:,}" in shown.output


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of napari, not ours
def test_other_readers_open_a_whole_census(finished):
    import ngio
    from napari_ome_zarr import napari_get_reader
    from ome_zarr.io import parse_url
    from ome_zarr.reader import Reader
    from ome_zarr_models import open_ome_zarr
    from ome_zarr_models.v05 import Image

    result = open_result(finished)
    assert isinstance(open_ome_zarr(zarr.open_group(finished, mode="r")), Image)
    container = ngio.open_ome_zarr_container(finished)
    table = container.get_table("cells").dataframe
    assert list(table.index) == list(range(1, result.n_cells + 1))
    assert np.array_equal(container.get_label("cells").get_as_numpy(), result.labels[:])
    nodes = list(Reader(parse_url(finished))())
    assert nodes[0].data[0].shape == SHAPE
    kinds = [layer[2] for layer in napari_get_reader(str(finished))(str(finished))]
    assert "image" in kinds
    assert "labels" in kinds


def test_a_clusters_address_gives_the_same_cells(finished, tmp_path, phantom):
    from distributed import LocalCluster

    np.save(tmp_path / "brain.npy", phantom)
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address="127.0.0.1:0") as cluster:
        result = call(
            "run", tmp_path / "brain.npy", tmp_path / "out.zarr", "--voxel-size", "5,5.26,5.26",
            "--foreground", "intensity", "--cluster", cluster.scheduler_address,
        )  # fmt: skip
    assert result.exit_code == 0, result.output
    again, first = open_result(tmp_path / "out.zarr"), open_result(finished)
    assert again.cells.to_arrow().equals(first.cells.to_arrow())
    assert np.array_equal(again.labels[:], first.labels[:])


def test_train_writes_weights_that_run_reads(tmp_path, phantom):
    np.save(tmp_path / "brain.npy", phantom)
    weights = tmp_path / "mine.safetensors"
    voxel = ("--voxel-size", "5,5.26,5.26")
    small = ("--steps", 2, "--crop", 16, "--batch", 1, "--channels", "4,4,4,4")
    trained = call("train", tmp_path / "brain.npy", "--out", weights, *voxel, *small)
    assert trained.exit_code == 0, trained.output
    assert "four whole numbers" in failing("train", "x.npy", "--out", weights, "--channels", "a,b")
    assert "overwrite" in failing("train", tmp_path / "brain.npy", "--out", weights, *voxel, *small)
    planned = call("plan", tmp_path / "brain.npy", *voxel, "--weights", weights)
    assert planned.exit_code == 0, planned.output
    assert "wnet3d 4-4-4-4" in planned.output


def test_the_provenance_says_how_it_was_made(finished):
    about = json.loads((finished / "zarr.json").read_text())["attributes"]["braincensus"]
    assert about["status"] == "complete"
    assert about["input"]["shape"] == list(SHAPE)
    assert about["config"]["foreground"]["model"] == "intensity"
    assert {"braincensus", "torch", "zarr"} <= set(about["versions"])
    assert 0 < about["labelling"]["outline_threshold"] < 1


@pytest.mark.parametrize(
    "method",
    [
        ("--method", "components", "--closing-radius", 6, "--max-volume", 20_000),
        ("--method", "watershed", "--seeds", "distance", "--threshold", "otsu", "--merge-border", "0.9,1"),
    ],
    ids=["components", "watershed"],
)
def test_the_other_labellers_from_the_command_line(tmp_path, phantom, method):
    np.save(tmp_path / "brain.npy", phantom)
    common = (tmp_path / "brain.npy", "--voxel-size", "5,5.26,5.26", "--foreground", "intensity")
    planned = call("plan", *common, *(method[:4]))
    assert f"{method[1]}, reach" in planned.output, planned.output
    out = tmp_path / "out.zarr"
    result = call("run", common[0], out, *common[1:], "--block-size", 32, "--workers", 1, *method)
    assert result.exit_code == 0, result.output
    found = open_result(out)
    assert 15 <= found.n_cells <= 60
    assert found.seams["method"] == method[1]
    assert found.seams["exact"]
    assert found.provenance["labelling"]["labeller"]["outline_sigma"] == [0, 0, 0]
    left = {path.name for path in (out / "braincensus").iterdir()}
    kept = {"tile_median", "tile_top", "dark.npy", "zarr.json", "done"}
    assert left == kept, "what labelling anew needs is kept"
    assert not {"label", "stitch"} & {path.name for path in (out / "braincensus" / "done").iterdir()}
    assert "density beside seams" in call("info", out).output


def test_the_output_of_another_input_is_refused_and_kept(finished, volume):
    before = (finished / "zarr.json").read_bytes()
    output = failing("run", volume, finished)
    assert "census of another input" in output
    assert "--fresh" in output
    assert (finished / "zarr.json").read_bytes() == before


def test_fresh_never_deletes_what_is_not_ours(tmp_path, volume):
    mine = tmp_path / "thesis"
    mine.mkdir()
    (mine / "chapter1.txt").write_text("years of work")
    failing("run", volume, mine, "--fresh")
    assert (mine / "chapter1.txt").read_text() == "years of work"


def test_a_wrong_path_suggests_the_right_one(tmp_path, volume):
    output = failing("run", tmp_path / "brian.tif", tmp_path / "out.zarr")
    assert "brain.tif" in output
    assert not (tmp_path / "out.zarr").exists()


def test_a_2d_file_is_refused(tmp_path):
    tifffile.imwrite(tmp_path / "flat.tif", np.zeros((30, 30), np.uint16))
    output = failing("run", tmp_path / "flat.tif", tmp_path / "out.zarr", "--voxel-size", "5")
    assert "single plane" in output
    assert not (tmp_path / "out.zarr").exists()


def test_a_missing_voxel_size_says_how_to_give_it(tmp_path, phantom):
    np.save(tmp_path / "brain.npy", phantom)
    output = failing("run", tmp_path / "brain.npy", tmp_path / "out.zarr")
    assert "--voxel-size" in output
    assert not (tmp_path / "out.zarr").exists()


def test_a_block_that_does_not_fit_says_which_would(tmp_path, volume):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"compute": {"memory_limit_gib": 1.2}}))
    huge = np.lib.format.open_memmap(tmp_path / "huge.npy", mode="w+", dtype=np.uint16, shape=(600, 600, 600))
    del huge
    output = failing(
        "plan",
        tmp_path / "huge.npy",
        "--voxel-size",
        "5",
        "--foreground",
        "intensity",
        "--config",
        tmp_path / "run.yaml",
        "--block-size",
        "512",
    )
    assert "does not fit" in output
    assert "--block-size" in output


def test_a_corrupted_chunk_is_named_and_nothing_looks_finished(tmp_path, phantom):
    source = tmp_path / "brain.zarr"
    array = zarr.create_array(source, shape=SHAPE, chunks=(40, 36, 64), dtype="uint16")
    array[:] = phantom
    chunk = source / "c" / "0" / "1" / "0"
    chunk.write_bytes(chunk.read_bytes()[: chunk.stat().st_size // 2])
    out = tmp_path / "out.zarr"
    output = failing("run", source, out, "--voxel-size", "5", "--foreground", "intensity", "--workers", 1)
    assert "intensity" in output
    assert str(source) in output.replace("\n", "")
    with pytest.raises(OutputError, match=r"has not finished"):
        open_result(out)
    assert "ome" not in json.loads((out / "zarr.json").read_text())["attributes"]


@pytest.mark.parametrize(
    ("value", "message"),
    [(np.float32(np.nan), "not numbers"), (np.float32(np.inf), "not numbers")],
)
def test_nan_and_infinity_are_found_before_anything_else(tmp_path, phantom, value, message):
    broken = phantom.astype(np.float32)
    broken[3, 4, 5] = value
    np.save(tmp_path / "brain.npy", broken)
    output = failing(
        "run", tmp_path / "brain.npy", tmp_path / "out.zarr", "--voxel-size", "5", "--workers", 1
    )
    assert message in output
    assert "(3, 4, 5)" in output


def test_a_constant_volume_has_no_answer(tmp_path):
    np.save(tmp_path / "flat.npy", np.full(SHAPE, 100, np.uint16))
    output = failing("run", tmp_path / "flat.npy", tmp_path / "out.zarr", "--voxel-size", "5", "--workers", 1)
    assert "every voxel is 100" in output


def test_dry_run_and_plan_compute_and_write_nothing(tmp_path, volume):
    for arguments in (("plan", volume), ("run", volume, tmp_path / "out.zarr", "--dry-run")):
        shown = call(*arguments)
        assert shown.exit_code == 0, shown.output
        assert "halo" in shown.output
        assert "memory per worker" in shown.output
    assert not (tmp_path / "out.zarr").exists()


def test_plan_measures_on_a_part_and_says_the_cost(tmp_path):
    write_phantom_file(tmp_path / "b.phantom.json", Phantom(shape=(64, 96, 96), n_cells=80, seed=1))
    out = tmp_path / "out.zarr"
    arguments = [tmp_path / "b.phantom.json", out, "--foreground", "intensity", "--workers", 1]
    result = call("plan", *arguments, "--measure", "--price-per-hour", 3600)
    assert result.exit_code == 0, result.output
    said = " ".join(result.output.split())
    for expected in ("measured on 64 x 96 x 96", "at 3600 per hour", "1 on 1 machine(s)", "chunks read"):
        assert expected in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.phantom.json"], "nothing stays"
    assert call("run", *arguments).exit_code == 0
    again = call("plan", *arguments, "--spot-sigma", 2)
    assert again.exit_code == 0, again.output
    said = " ".join(again.output.replace("│", " ").split())
    assert "done blocks of intensity, segment, threshold are kept" in said
    assert "--measure would time it here" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--voxel-size", "5,5"], "--voxel-size"),
        (["--block-size", "64.5"], "whole numbers"),
        (["--threshold", "high"], "otsu"),
        (["--foreground", "cellpose"], "foreground"),
        (["--foreground", "intensity", "--weights", "x.safetensors"], "no network"),
        (["--weights", "missing.safetensors"], "no weights"),
        (["--foreground-threshold", "1.5"], "foreground_threshold"),
        (["--cluster", "tcp://127.0.0.1:1"], "no Dask scheduler"),
        (("--foreground", "intensity", "--calibration", "stored"), "no meaning"),
        (["--channel", "3"], "channel"),
    ],
)
@pytest.mark.timeout(60)
def test_a_mistyped_option_is_explained(tmp_path, volume, arguments, message, monkeypatch):
    monkeypatch.setattr(scheduler, "_ANSWER_S", 2)
    output = failing("run", volume, tmp_path / "out.zarr", *arguments)
    assert message in output
    assert not (tmp_path / "out.zarr").exists()


def test_config_prints_what_run_reads(tmp_path):
    printed = call("config")
    path = tmp_path / "run.yaml"
    path.write_text(printed.output)
    assert RunConfig.from_yaml(path) == RunConfig()


def test_help_and_version():
    assert "run" in call("--help").output
    assert call("--version").output.startswith("braincensus ")
