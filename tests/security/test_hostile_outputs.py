"""Outputs and configurations that someone tampered with: nothing runs, nothing outside is touched."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distributed import Client, LocalCluster

from braincensus import BraincensusError, ConfigError, RunConfig, open_result, run
from braincensus.store import create_output, open_output
from braincensus.store.lock import locked
from braincensus.store.marks import Mark, NotDoneError
from braincensus.store.packing import pack
from braincensus_kernels.boxes import Box
from braincensus_kernels.phantom import Phantom

CONFIG = {"input": {"voxel_size_um": 5.0}, "foreground": {"model": "intensity"}}


@pytest.fixture(scope="module")
def client() -> Any:
    with (
        LocalCluster(
            n_workers=1, threads_per_worker=1, processes=False, dashboard_address="127.0.0.1:0"
        ) as cluster,
        Client(cluster) as connected,
    ):
        yield connected


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, client: Client) -> Path:
    folder = tmp_path_factory.mktemp("made")
    shape = (40, 40, 40)
    np.save(
        folder / "brain.npy",
        Phantom(shape=shape, n_cells=20, seed=1, tissue="full").render(Box.whole(shape)),
    )
    run(folder / "brain.npy", folder / "out.zarr", config=RunConfig().merged(CONFIG), client=client)
    return folder


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.system ['touch {mark}']",
        "input: !!python/object/new:subprocess.Popen [['touch', '{mark}']]",
        "foreground: !!python/name:os.system",
    ],
)
def test_a_configuration_runs_nothing(text: str, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    (tmp_path / "run.yaml").write_text(text.format(mark=mark))
    with pytest.raises(ConfigError, match="not valid YAML"):
        RunConfig.from_yaml(tmp_path / "run.yaml")
    assert not mark.exists()


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../secret", "", 7, None])
def test_a_mark_names_files_of_the_output_only(name: Any, tmp_path: Path) -> None:
    output = create_output(tmp_path / "out.zarr", overwrite=False, voxel_size_um=(1, 1, 1))
    secret = tmp_path / "secret"
    secret.write_bytes(b"x")
    output.write_work("done/label/step/0000003", pack(("key", 5, [(name, 1, 2363233923)])))
    with pytest.raises(NotDoneError):
        Mark(output, "label", "step", 3, "key").result(())
    assert secret.read_bytes() == b"x"


@pytest.mark.parametrize(
    "result", [{"class": "Popen", "fields": {}}, {"class": "os.system", "fields": {}}, 3]
)
def test_a_mark_makes_nothing_but_what_it_may(result: Any, tmp_path: Path) -> None:
    output = create_output(tmp_path / "out.zarr", overwrite=False, voxel_size_um=(1, 1, 1))
    about = np.frombuffer(json.dumps({"tuple": ["key", result, {"list": []}]}).encode(), np.uint8)
    output.write_work("done/label/step/0000003", {"about": about})
    mark = Mark(output, "label", "step", 3, "key")
    if result == 3:
        assert mark.result(()) == 3
        return
    with pytest.raises(NotDoneError):
        mark.result(())


@pytest.mark.parametrize(
    "change",
    [
        {"manifest": 7},
        {"manifest": {"settings": {"threshold": {"block_voxels": [10**30, 10**30, 10**30]}}}},
        {"manifest": {"settings": {"threshold": {"block_voxels": "../../x"}}}},
        {"manifest": {"settings": {"threshold": 7, "intensity": 7}}},
        {"manifest": {"settings": []}},
        {"voxel_size_um": [1e300, -1, "x"]},
        {"token": 7, "layout": "x"},
        {"n_cells": 10**30},
    ],
)
def test_a_manifest_that_lies_is_an_error_or_is_done_again(
    change: dict[str, Any], made: Path, client: Client, tmp_path: Path
) -> None:
    output = tmp_path / "out.zarr"
    shutil.copytree(made / "out.zarr", output)
    root = json.loads((output / "zarr.json").read_text())
    root["attributes"]["braincensus"] |= change
    (output / "zarr.json").write_text(json.dumps(root))
    config = RunConfig().merged(CONFIG | {"labelling": {"spot_sigma": 0.9}})
    try:
        result = run(made / "brain.npy", output, config=config, client=client)
    except BraincensusError:
        return
    assert 0 < result.n_cells < 100


@pytest.mark.parametrize("target", ["file", "nothing"])
def test_a_lock_that_is_a_link(target: str, tmp_path: Path) -> None:
    """It is not followed: what it points to is neither written nor touched."""
    victim = tmp_path / "victim"
    if target == "file":
        victim.write_text("precious")
        os.utime(victim, (1, 1))
    (tmp_path / ".out.zarr.lock").symlink_to(victim)
    with locked(tmp_path / "out.zarr"):
        assert not (tmp_path / ".out.zarr.lock").is_symlink()
    if target == "file":
        assert victim.read_text() == "precious"
        assert victim.stat().st_mtime == 1
    else:
        assert not victim.exists()


@pytest.mark.parametrize(
    "place", ["braincensus", "0", "labels", "labels/cells", "labels/cells/0", "density", "tables"]
)
def test_links_in_an_output_are_not_written_through(
    place: str, made: Path, client: Client, tmp_path: Path
) -> None:
    output, outside = tmp_path / "out.zarr", tmp_path / "outside"
    shutil.copytree(made / "out.zarr", output)
    outside.mkdir()
    shutil.rmtree(output / place)
    (outside / "precious").write_text("x")
    (output / place).symlink_to(outside)
    config = RunConfig().merged(CONFIG | {"labelling": {"spot_sigma": 0.9}})
    with pytest.raises(BraincensusError, match="link"):
        run(made / "brain.npy", output, config=config, client=client)
    assert [p.name for p in outside.iterdir()] == ["precious"]


def test_labels_of_another_name_are_not_followed(made: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.zarr"
    shutil.copytree(made / "out.zarr", output)
    document = json.loads((output / "labels" / "zarr.json").read_text())
    document["attributes"]["ome"]["labels"] = ["../../../etc"]
    (output / "labels" / "zarr.json").write_text(json.dumps(document))
    assert open_result(output).labels.shape == (40, 40, 40)


@pytest.mark.parametrize("name", ["../x", "/x", "a/../../x", ""])
def test_working_files_are_inside(name: str, made: Path) -> None:
    output = open_output(made / "out.zarr")
    with pytest.raises(ValueError, match="inside the output"):
        output.read_work(name)
