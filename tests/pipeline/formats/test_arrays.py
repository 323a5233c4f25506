"""Arrays in memory and `.npy` files."""

from __future__ import annotations

import os
import pickle

import numpy as np
import pytest
import zarr
from zarr.storage import MemoryStore, ZipStore

from braincensus.errors import ConfigError, InputError
from braincensus.volume import open_volume
from braincensus_kernels.boxes import Box

BOX = Box((3, 7, 11), (18, 41, 50))


@pytest.mark.parametrize("with_scratch", [True, False])
@pytest.mark.parametrize("kind", ["contiguous", "strided", "big-endian", "fortran"])
def test_numpy_arrays(tmp_path, voxels, kind, with_scratch):
    data = voxels()
    match kind:
        case "strided":
            data = voxels((40, 50, 120))[::2, :, ::-2]
        case "big-endian":
            data = data.astype(">u2")
        case "fortran":
            data = np.asfortranarray(data)
    scratch = tmp_path / "scratch" if with_scratch else None
    volume = open_volume(data, voxel_size_um=(5, 2, 2), scratch=scratch)
    sent = pickle.dumps(volume)
    assert (len(sent) < 3000) == with_scratch
    for v in (volume, pickle.loads(sent)):
        read = v.read(BOX)
        assert read.dtype.isnative
        assert read.flags.c_contiguous
        np.testing.assert_array_equal(read, data[BOX.slices])
    assert volume.source == "array"
    assert volume.voxel_size_um == (5, 2, 2)
    assert volume.identity["fingerprint"] == open_volume(data, voxel_size_um=1).identity["fingerprint"]


def test_identity_of_an_array_is_its_content(voxels):
    data = voxels()
    before = open_volume(data, voxel_size_um=1).identity
    data[7, 8, 9] += 1
    assert open_volume(data, voxel_size_um=1).identity != before


@pytest.mark.parametrize("with_scratch", [True, False])
def test_zarr_array_in_memory_can_travel(tmp_path, voxels, with_scratch):
    data = voxels((2, 20, 50, 60))
    array = zarr.create_array(MemoryStore(), data=data, chunks=(1, 16, 16, 16))
    volume = open_volume(array, channel=1, voxel_size_um=1, scratch=tmp_path / "s" if with_scratch else None)
    arrived = pickle.loads(pickle.dumps(volume))
    np.testing.assert_array_equal(arrived.read(BOX), data[1][BOX.slices])
    assert any("taken as czyx" in note for note in volume.notes)


def test_zarr_array_in_a_zip(tmp_path, voxels):
    with ZipStore(tmp_path / "a.zip", mode="w") as store:
        zarr.create_array(store, data=voxels(), chunks=(16, 16, 16))
    with ZipStore(tmp_path / "a.zip", mode="r") as store:
        volume = open_volume(zarr.open_array(store, mode="r"), voxel_size_um=1)
        np.testing.assert_array_equal(volume.read(BOX), voxels()[BOX.slices])


def test_zarr_array_and_group_on_disk_are_opened_by_path(tmp_path, voxels, write_image):
    path = write_image(tmp_path / "a.zarr", [voxels()], scales=[[5, 2, 2]])
    group = zarr.open_group(path, mode="r")
    for source in (group, group["0"]):
        volume = open_volume(source)
        assert volume.voxel_size_um == (5, 2, 2)
        assert len(pickle.dumps(volume)) < 3000
        np.testing.assert_array_equal(volume.read(BOX), voxels()[BOX.slices])


@pytest.mark.parametrize("fortran", [False, True])
@pytest.mark.parametrize("dtype", ["u2", ">f4", "?"])
def test_npy_is_mapped(tmp_path, voxels, fortran, dtype):
    data = voxels((2, 20, 50, 60)).astype(dtype)
    np.save(tmp_path / "a.npy", np.asfortranarray(data) if fortran else data)
    volume = open_volume(tmp_path / "a.npy", channel=1, voxel_size_um=1)
    read = pickle.loads(pickle.dumps(volume)).read(BOX)
    assert read.dtype == volume.dtype
    np.testing.assert_array_equal(read, data[1][BOX.slices])


def test_truncated_npy(tmp_path, voxels):
    np.save(tmp_path / "a.npy", voxels())
    os.truncate(tmp_path / "a.npy", 10_000)
    with pytest.raises(InputError, match="truncated"):
        open_volume(tmp_path / "a.npy", voxel_size_um=1)
    os.truncate(tmp_path / "a.npy", 20)
    with pytest.raises(InputError, match="header"):
        open_volume(tmp_path / "a.npy", voxel_size_um=1)


def test_pickled_objects_are_not_loaded(tmp_path):
    np.save(tmp_path / "a.npy", np.full((2, 3, 4), None, dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match="Python objects"):
        open_volume(tmp_path / "a.npy", voxel_size_um=1)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((5, 6)), "2D"),
        (np.zeros(5), "1D"),
        (np.zeros((1, 1, 1, 2, 3, 4)), "6D"),
        (np.zeros((2, 3, 4), complex), "complex"),
        (np.full((2, 3, 4), None, dtype=object), "Python objects"),
        (np.full((2, 3, 4), "a"), "not numbers"),
        (np.zeros((0, 3, 4)), "empty"),
        (np.zeros((3, 4, 0)), "empty"),
        (np.zeros((2, 3, 4), "datetime64[s]"), "not numbers"),
    ],
)
def test_what_is_no_volume_is_refused(array, message):
    with pytest.raises(InputError, match=message):
        open_volume(array, voxel_size_um=1)


def test_an_array_needs_a_voxel_size(voxels):
    with pytest.raises(InputError, match="carries no voxel size"):
        open_volume(voxels())


@pytest.mark.parametrize("given", [{"channel": 1}, {"timepoint": 1}, {"level": 1}])
def test_selection_out_of_range(voxels, given):
    with pytest.raises(ConfigError, match=f"no {next(iter(given))} 1"):
        open_volume(voxels(), voxel_size_um=1, **given)
