"""Opening: what is asked of every source, whatever its format."""

from __future__ import annotations

import numpy as np
import pytest
from dask.base import tokenize

from braincensus.errors import ConfigError, InputError
from braincensus.volume import open_volume
from braincensus_kernels.boxes import Box


@pytest.fixture
def npy(tmp_path):
    np.save(tmp_path / "brain.npy", np.arange(60, dtype=np.uint16).reshape(3, 4, 5))
    return tmp_path / "brain.npy"


def test_a_missing_path_suggests_what_is_there(npy):
    with pytest.raises(InputError, match=r"does not exist(.|\n)*did you mean 'brain\.npy'"):
        open_volume(npy.with_name("Brian.npy"))
    with pytest.raises(InputError, match=r"no 'nowhere' in"):
        open_volume(npy.parent / "nowhere" / "deep" / "brain.npy")


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("a.xyz", "extension '.xyz'"),
        ("a", "extension ''"),
        ("a_bdv.h5", "HDF5 .mesoSPIM"),
        ("a.raw", "raw bytes"),
        ("a.czi", "CZI"),
    ],
)
def test_unknown_formats_say_what_is_supported(tmp_path, name, found):
    (tmp_path / name).write_bytes(b"voxels")
    with pytest.raises(InputError, match=rf"OME-Zarr or zarr(.|\n)*\.btf(.|\n)*{found}"):
        open_volume(tmp_path / name)


def test_a_folder_without_volume_lists_its_stores(tmp_path, npy):
    with pytest.raises(InputError, match=r"no volume in the folder(.|\n)*brain\.npy"):
        open_volume(tmp_path)
    (tmp_path / "a.zarr").mkdir()
    with pytest.raises(InputError, match="metadata file was not copied"):
        open_volume(tmp_path / "a.zarr")
    (tmp_path / "a.zarr" / ".zgroup").write_text('{"zarr_format": 2}')
    with pytest.raises(InputError, match=r"give one of them, for example .*a\.zarr"):
        open_volume(tmp_path)


@pytest.mark.parametrize("source", [None, 7, [1, 2], b"path"])
def test_other_sources_are_refused(source):
    with pytest.raises(ConfigError, match="not a source of voxels"):
        open_volume(source)


def test_dask_arrays_are_sent_to_zarr():
    import dask.array

    with pytest.raises(ConfigError, match="store Dask arrays as zarr first"):
        open_volume(dask.array.zeros((2, 3, 4)))


def test_addresses_are_refused():
    with pytest.raises(InputError, match=r"s3://bucket/a\.zarr is an address"):
        open_volume("s3://bucket/a.zarr")


@pytest.mark.parametrize(
    "size",
    [0, -1, (1, 2), (1, 2, 0), (1, 2, np.nan), (1, 2, np.inf), "5,2,2", (1, 2, 3, 4), (1, "a", 2)],
)
def test_bad_voxel_sizes_are_refused(npy, size):
    with pytest.raises(ConfigError, match=r"not a voxel size(.|\n)*--voxel-size"):
        open_volume(npy, voxel_size_um=size)


@pytest.mark.parametrize("size", [2, 2.0, np.float32(2), (2, 2, 2), [2, 2, 2], np.array([2, 2, 2])])
def test_good_voxel_sizes(npy, size):
    volume = open_volume(npy, voxel_size_um=size)
    assert volume.voxel_size_um == (2.0, 2.0, 2.0)
    assert all(type(v) is float for v in volume.voxel_size_um)


@pytest.mark.parametrize(("size", "unusual"), [(5, False), (5e-9, True), ((5000, 2000, 2000), True)])
def test_a_mistaken_unit_is_mentioned(npy, size, unusual):
    assert any("check its unit" in note for note in open_volume(npy, voxel_size_um=size).notes) == unusual


@pytest.mark.parametrize("given", [{"channel": -1}, {"level": 1.5}, {"timepoint": True}, {"channel": "red"}])
def test_selections_are_numbers_from_0(npy, given):
    with pytest.raises(ConfigError, match="a number from 0"):
        open_volume(npy, voxel_size_um=1, **given)


def test_boxes(npy):
    volume = open_volume(npy, voxel_size_um=1)
    assert volume.n_bytes == 120
    assert volume.box == Box((0, 0, 0), (3, 4, 5))
    empty = volume.read(Box((1, 2, 3), (1, 4, 5)))
    assert (empty.shape, empty.dtype) == ((0, 2, 2), np.uint16)
    for outside in (Box((0, 0, 0), (4, 4, 5)), Box((-1, 0, 0), (1, 1, 1))):
        with pytest.raises(ValueError, match="outside the volume"):
            volume.read(outside)


def test_reads_can_be_written_to(npy):
    volume = open_volume(npy, voxel_size_um=1)
    block = volume.read(volume.box)
    block += 1
    assert (volume.read(volume.box) == block - 1).all()


def test_an_array_is_not_changed_through_what_is_read():
    data = np.zeros((3, 4, 5))
    volume = open_volume(data, voxel_size_um=1)
    volume.read(volume.box)[:] = 7
    assert (data == 0).all()


def test_dask_knows_equal_volumes(npy):
    assert tokenize(open_volume(npy, voxel_size_um=1)) == tokenize(open_volume(npy, voxel_size_um=1))
    other = open_volume(np.ones((3, 4, 5)), voxel_size_um=1)
    assert tokenize(other) != tokenize(open_volume(npy, voxel_size_um=1))
