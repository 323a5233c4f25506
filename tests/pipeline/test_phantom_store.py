"""A phantom on disk is whole or absent, opens like any volume, and knows its cells."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import zarr

import braincensus.phantom as stored
from braincensus.errors import ConfigError, InputError, OutputError
from braincensus.phantom import make_phantom, read_truth, write_phantom
from braincensus.volume import open_volume
from braincensus_kernels.boxes import Box
from braincensus_kernels.phantom import Phantom

PHANTOM = Phantom(shape=(50, 70, 60), n_cells=60, seed=4, voxel_size_um=(5, 4, 4))


@pytest.mark.parametrize("block", [(32, 32, 32), (50, 70, 60), (7, 64, 300)])
def test_what_is_read_is_what_was_rendered(tmp_path: Path, block: tuple[int, int, int]) -> None:
    path = tmp_path / "a" / "phantom.ome.zarr"
    told: list[int] = []
    write_phantom(path, PHANTOM, block_voxels=block, progress=told.append)
    assert sum(told) == 50 * 70 * 60
    volume = open_volume(path)
    assert volume.format == "OME-Zarr 0.5"
    assert volume.voxel_size_um == (5, 4, 4)
    assert np.array_equal(volume.read(volume.box), PHANTOM.render(Box.whole(PHANTOM.shape)))
    array = zarr.open_array(path, path="0", mode="r")
    assert array.shards == tuple(min(b, n) for b, n in zip(block, PHANTOM.shape, strict=True))
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["phantom.ome.zarr"]


def test_the_metadata_are_valid_and_say_how_it_was_made(tmp_path: Path) -> None:
    from ome_zarr_models import open_ome_zarr

    path = tmp_path / "phantom.ome.zarr"
    write_phantom(path, PHANTOM)
    image = open_ome_zarr(zarr.open_group(path, mode="r"))
    multiscale = image.attributes.ome.multiscales[0]
    assert [axis.unit for axis in multiscale.axes] == ["micrometer"] * 3
    assert multiscale.name == "phantom"
    recorded = json.loads((path / "zarr.json").read_text())["attributes"][stored.ATTRIBUTE]
    assert make_phantom(**recorded["phantom"]) == PHANTOM
    assert recorded["n_cells"] == 60


def test_the_truth_is_the_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "_ROWS", 10)
    path = tmp_path / "phantom.ome.zarr"
    write_phantom(path, PHANTOM)
    truth, cells = read_truth(path), PHANTOM.cells()
    assert truth["label"].tolist() == list(range(1, 61))
    for name, column in cells.items():
        assert np.array_equal(truth[name], column)
    for axis, size in zip("zyx", PHANTOM.voxel_size_um, strict=True):
        assert np.array_equal(truth[f"{axis}_um"], cells[axis] * size)


def test_no_cells_no_rows(tmp_path: Path) -> None:
    write_phantom(tmp_path / "p.zarr", Phantom(shape=(20, 20, 20), n_cells=0))
    assert len(read_truth(tmp_path / "p.zarr")) == 0


def test_an_existing_path_is_refused_and_only_a_phantom_replaced(tmp_path: Path) -> None:
    path = tmp_path / "phantom.ome.zarr"
    write_phantom(path, PHANTOM)
    with pytest.raises(OutputError, match="exists"):
        write_phantom(path, PHANTOM)
    other = Phantom(shape=(20, 30, 20), n_cells=5)
    write_phantom(path, other, overwrite=True)
    assert open_volume(path).shape == (20, 30, 20)
    assert len(read_truth(path)) == 5

    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "notes.txt").write_text("keep")
    image = tmp_path / "image.zarr"
    zarr.create_array(image, shape=(4, 4, 4), dtype="uint8")
    for place in (precious, image, precious / "notes.txt"):
        with pytest.raises(OutputError, match="not overwritten"):
            write_phantom(place, PHANTOM, overwrite=True)
    assert (precious / "notes.txt").read_text() == "keep"
    assert (image / "zarr.json").exists()


def test_an_interrupted_write_leaves_nothing_and_keeps_its_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "phantom.ome.zarr"
    render = Phantom.render
    calls: list[Box] = []

    def fail_at_third(self: Phantom, box: Box) -> np.ndarray:
        calls.append(box)
        if len(calls) >= 3:
            raise OSError(28, "No space left on device")
        return render(self, box)

    monkeypatch.setattr(Phantom, "render", fail_at_third)
    with pytest.raises(OutputError, match="full"):
        write_phantom(path, PHANTOM, block_voxels=(16, 32, 32))
    assert list(tmp_path.iterdir()) == []
    # Not all blocks were tried after the first that failed.
    assert len(calls) < 16


def test_a_killed_write_is_not_a_phantom_and_is_cleared_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "phantom.ome.zarr"
    monkeypatch.setattr(Phantom, "render", lambda self, box: (_ for _ in ()).throw(KeyboardInterrupt))
    monkeypatch.setattr(stored.shutil, "rmtree", lambda *args, **kwargs: None)
    with pytest.raises(KeyboardInterrupt):
        write_phantom(path, PHANTOM)
    monkeypatch.undo()
    left = [entry.name for entry in tmp_path.iterdir()]
    assert left == ["phantom.ome.zarr.partial"]
    assert "ome" not in json.loads((tmp_path / left[0] / "zarr.json").read_text())["attributes"]
    write_phantom(path, PHANTOM)
    assert [entry.name for entry in tmp_path.iterdir()] == ["phantom.ome.zarr"]


def test_dask_workers_write_the_same(tmp_path: Path) -> None:
    from distributed import Client

    with Client(
        processes=False, n_workers=1, threads_per_worker=2, dashboard_address="127.0.0.1:0"
    ) as client:
        write_phantom(tmp_path / "dask.zarr", PHANTOM, block_voxels=(32, 32, 32), client=client)
    voxels = zarr.open_array(tmp_path / "dask.zarr", path="0", mode="r")[:]
    assert np.array_equal(voxels, PHANTOM.render(Box.whole(PHANTOM.shape)))


def test_clear_messages(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at most"):
        make_phantom(shape=(32, 32, 32), n_cells=10**6)
    with pytest.raises(ConfigError, match="three positive numbers"):
        write_phantom(tmp_path / "p", PHANTOM, block_voxels=(0, 4, 4))
    with pytest.raises(InputError, match="no true cells"):
        read_truth(tmp_path / "absent")
    write_phantom(tmp_path / "p", PHANTOM)
    (tmp_path / "p" / "truth" / "cells.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(InputError, match="cannot be read"):
        read_truth(tmp_path / "p")
