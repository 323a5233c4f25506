"""Damaged inputs: a run names the file, or counts its voxels as 0 in every stage, for any blocks."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import zarr
from distributed import Client

from braincensus import InputError, OutputError, Result, RunConfig, run
from braincensus.volume import open_volume
from braincensus_kernels.boxes import Box

from .injection import Config, configuration, result_bytes
from .test_resume import Told

CHUNK = 24


@pytest.fixture
def phantom(brain: Path) -> np.ndarray:
    return np.load(brain)


@pytest.fixture(params=["plain", "sharded", "v2"])
def store(request: pytest.FixtureRequest, phantom: np.ndarray, tmp_path: Path) -> Path:
    path = tmp_path / "brain.zarr"
    if request.param == "sharded":
        zarr.create_array(path, data=phantom, chunks=(24, 24, 24), shards=(72, 24, 24))
    else:
        version: Any = 2 if request.param == "v2" else 3
        zarr.create_array(path, data=phantom, chunks=(24, 24, 24), zarr_format=version)
    return path


def cut(store: Path) -> tuple[np.ndarray, Path]:
    """Cut a file of the middle short; return the voxels that were in it, and the file."""
    v2 = (store / ".zarray").exists()
    file = store / "1.1.2" if v2 else store / "c" / "1" / "1" / "2"
    sharded = not file.exists()
    if sharded:
        file = store / "c" / "0" / "1" / "2"
    with file.open("r+b") as handle:
        handle.truncate(file.stat().st_size - 20)
    lost = np.zeros((72, 72, 72), bool)
    lost[slice(None) if sharded else slice(24, 48), 24:48, 48:72] = True
    return lost, file


def config(policy: str, block: int = 24, **sections: Any) -> RunConfig:
    changes: Config = configuration(**sections)
    changes["input"]["on_unreadable"] = policy
    changes["compute"]["block_voxels"] = block
    return RunConfig().merged(changes)


def voxels_of(result: Result) -> tuple[np.ndarray, np.ndarray]:
    return np.asarray(result.probability[:]), np.asarray(result.labels[:])


def test_the_file_is_named(store: Path, client: Client, tmp_path: Path) -> None:
    _, file = cut(store)
    message = rf"(?s)voxels z .*{'.' if file.name == '1.1.2' else '/'}.*found:.*--on-unreadable skip"
    with pytest.raises(InputError, match=message) as caught:
        run(store, tmp_path / "out.zarr", config=config("fail"), client=client)
    assert str(file.relative_to(store)) in str(caught.value)


def test_skipped_voxels_are_0_for_any_blocks(
    store: Path, phantom: np.ndarray, client: Client, tmp_path: Path
) -> None:
    lost, file = cut(store)
    zeroed = tmp_path / "zeroed.npy"
    np.save(zeroed, np.where(lost, 0, phantom).astype(phantom.dtype))
    expected = voxels_of(
        run(zeroed, tmp_path / "expected" / "out.zarr", config=config("fail"), client=client)
    )
    for block in (24, 40):
        told = Told()
        output = tmp_path / str(block) / "out.zarr"
        found = run(store, output, config=config("skip", block), client=client, progress=told)
        for a, b in zip(voxels_of(found), expected, strict=True):
            np.testing.assert_array_equal(a, b)
        about = found.provenance["input"]
        assert about["unreadable_voxels"] == lost.sum()
        assert all(str(file.relative_to(store)) in bad["reason"] for bad in about["unreadable"])
        assert told.said[-1].startswith("WARNING: ")
        assert f"{lost.sum():,} voxels counted as 0" in told.said[-1]


def test_the_policy_is_part_of_what_a_run_depends_on(
    phantom: np.ndarray, client: Client, tmp_path: Path
) -> None:
    store, output = tmp_path / "brain.zarr", tmp_path / "out.zarr"
    zarr.create_array(store, data=phantom, chunks=(24, 24, 24))
    whole = tmp_path / "whole"
    shutil.copytree(store, whole)
    _, file = cut(store)
    skipped = result_bytes(run(store, output, config=config("skip"), client=client).path)
    told = Told()
    run(store, output, config=config("skip"), client=client, progress=told)
    assert told.said == ["everything is there already: the same input, the same settings"]
    with pytest.raises(InputError, match=r"c/1/1/2"):
        run(store, output, config=config("fail"), client=client, progress=told)
    assert any("on_unreadable: skip -> fail" in text for text in told.said), told.said
    shutil.copy2(whole / file.relative_to(store), file)
    with pytest.raises(OutputError, match=r"(?s)another input.*changed since.*--fresh"):
        run(store, output, config=config("skip"), client=client)
    found = run(store, output, config=config("skip"), client=client, fresh=True)
    assert found.provenance["input"]["unreadable"] == []
    anew = run(whole, tmp_path / "anew" / "out.zarr", config=config("fail"), client=client)
    assert result_bytes(found.path) == result_bytes(anew.path) != skipped


@pytest.mark.parametrize(
    ("compression", "damage"), [(None, "cut"), ("zlib", "scrambled"), (None, "scrambled"), ("zlib", "cut")]
)
def test_planes_of_a_folder(
    compression: str | None, damage: str, phantom: np.ndarray, client: Client, tmp_path: Path
) -> None:
    folder = tmp_path / "planes"
    folder.mkdir()
    for z, plane in enumerate(phantom):
        tifffile.imwrite(folder / f"z{z:03d}.tif", plane, compression=compression)
    bad = folder / "z030.tif"
    content = bad.read_bytes()
    bad.write_bytes(content[: len(content) // 2] if damage == "cut" else b"\0" * len(content))
    with pytest.raises(InputError, match=r"z030\.tif"):
        run(folder, tmp_path / "out.zarr", config=config("fail"), client=client)
    found = run(folder, tmp_path / "skip" / "out.zarr", config=config("skip"), client=client)
    (unreadable,) = found.provenance["input"]["unreadable"]
    assert (unreadable["start"], unreadable["stop"]) == ([30, 0, 0], [31, 72, 72])
    assert "z030.tif" in unreadable["reason"]
    zeroed = phantom.copy()
    zeroed[30] = 0
    np.save(tmp_path / "zeroed.npy", zeroed)
    expected = run(tmp_path / "zeroed.npy", tmp_path / "0" / "out.zarr", config=config("fail"), client=client)
    for a, b in zip(voxels_of(found), voxels_of(expected), strict=True):
        np.testing.assert_array_equal(a, b)


def test_floats_are_scanned_twice_and_skipped_alike(
    phantom: np.ndarray, client: Client, tmp_path: Path
) -> None:
    store = tmp_path / "brain.zarr"
    zarr.create_array(store, data=phantom.astype(np.float32), chunks=(24, 24, 24))
    lost, _ = cut(store)
    found = run(store, tmp_path / "out.zarr", config=config("skip"), client=client)
    assert found.provenance["input"]["unreadable_voxels"] == lost.sum()
    zeroed = tmp_path / "zeroed.npy"
    np.save(zeroed, np.where(lost, 0, phantom).astype(np.float32))
    expected = run(zeroed, tmp_path / "expected" / "out.zarr", config=config("fail"), client=client)
    for a, b in zip(voxels_of(found), voxels_of(expected), strict=True):
        np.testing.assert_array_equal(a, b)


def test_what_is_settled_stays(phantom: np.ndarray, tmp_path: Path) -> None:
    """A unit that can be read again is 0 still; one that cannot be read any more is an error."""
    store = tmp_path / "brain.zarr"
    zarr.create_array(store, data=phantom, chunks=(24, 24, 24))
    shutil.copytree(store, tmp_path / "whole")
    lost, file = cut(store)
    volume = open_volume(store, voxel_size_um=5.0, on_unreadable="skip")
    voxels, unreadable = volume.read_noting(Box((20, 20, 20), (60, 60, 60)))
    box = (slice(20, 60),) * 3
    np.testing.assert_array_equal(voxels, np.where(lost, 0, phantom)[box])
    assert [bad.box for bad in unreadable] == [Box((24, 24, 48), (48, 48, 72))]
    settled = volume.settled(unreadable)
    shutil.copy2(tmp_path / "whole" / file.relative_to(store), file)
    np.testing.assert_array_equal(settled.read(volume.box), np.where(lost, 0, phantom))
    with (store / "c" / "0" / "0" / "0").open("r+b") as handle:
        handle.truncate(9)
    with pytest.raises(InputError, match=r"c/0/0/0"):
        settled.read(volume.box)


def test_most_of_it_unreadable_is_no_volume(phantom: np.ndarray, client: Client, tmp_path: Path) -> None:
    store = tmp_path / "brain.zarr"
    zarr.create_array(store, data=phantom, chunks=(24, 24, 24))
    for number, chunk in enumerate(sorted(p for p in (store / "c").rglob("*") if p.is_file())):
        if number % 5:
            chunk.write_bytes(b"")
    with pytest.raises(InputError, match="most of it cannot be read"):
        run(store, tmp_path / "out.zarr", config=config("skip"), client=client)


def test_one_run_of_bytes_has_no_parts_to_skip(brain: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copy(brain, tmp_path / "brain.npy"))
    volume = open_volume(copy, voxel_size_um=5.0, on_unreadable="skip")
    with copy.open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(InputError, match="truncated"):
        volume.read(volume.box)
