"""OME-Zarr as it is found in the wild: versions, axes, scales that are wrong or missing, damage."""

from __future__ import annotations

import json
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import zarr
from zarr.codecs import BloscCodec, GzipCodec, ZstdCodec

from braincensus.errors import ConfigError, InputError
from braincensus.volume import open_volume
from braincensus_kernels.boxes import Box

BOX = Box((3, 7, 11), (18, 41, 50))


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("axes", ["zyx", "czyx", "tzyx", "tczyx"])
def test_versions_and_axes(tmp_path, voxels, write_image, zarr_format, axes):
    n = {"t": 2, "c": 3, "z": 20, "y": 50, "x": 60}
    data = voxels(tuple(n[a] for a in axes))
    scale = [{"t": 1.0, "c": 1.0, "z": 5.0, "y": 2.5, "x": 2.0}[a] for a in axes]
    path = write_image(tmp_path / "a.zarr", [data], axes=axes, zarr_format=zarr_format, scales=[scale])
    channel, timepoint = 2 if "c" in axes else 0, 1 if "t" in axes else 0

    volume = open_volume(path, channel=channel, timepoint=timepoint)

    expected = data[tuple({"t": timepoint, "c": channel}[a] for a in axes if a in "tc")]
    assert volume.shape == (20, 50, 60)
    assert volume.chunks == (16, 16, 16)
    assert volume.voxel_size_um == (5.0, 2.5, 2.0)
    assert volume.voxel_size_from == "OME metadata"
    assert volume.format == ("OME-Zarr 0.5" if zarr_format == 3 else "OME-Zarr 0.4")
    np.testing.assert_array_equal(volume.read(BOX), expected[BOX.slices])


def test_axes_in_another_order_are_read_as_zyx(tmp_path, voxels, write_image):
    data = voxels()
    path = write_image(tmp_path / "a.zarr", [data.transpose(2, 0, 1)], axes="xzy", scales=[[2, 5, 3]])
    volume = open_volume(path)
    assert (volume.shape, volume.voxel_size_um) == (data.shape, (5.0, 3.0, 2.0))
    read = volume.read(BOX)
    np.testing.assert_array_equal(read, data[BOX.slices])
    assert read.flags.c_contiguous


def test_sharded_reads_are_exact(tmp_path, voxels, write_image):
    data = voxels()
    path = write_image(tmp_path / "a.zarr", [data], scales=[[1, 2, 3]], shards=(32, 32, 32))
    volume = open_volume(path)
    assert volume.chunks == (16, 16, 16)
    np.testing.assert_array_equal(volume.read(volume.box), data)


@pytest.mark.parametrize("dtype", ["u1", "i2", ">u2", "u4", "i8", "f2", ">f4", "f8"])
def test_dtypes_are_kept_in_native_byte_order(tmp_path, voxels, write_image, dtype):
    data = voxels((8, 9, 10), np.dtype(dtype))
    path = write_image(tmp_path / "a.zarr", [data], scales=[[1, 2, 3]], zarr_format=2)
    volume = open_volume(path)
    read = volume.read(volume.box)
    assert volume.dtype == read.dtype == np.dtype(dtype).newbyteorder("=")
    assert read.dtype.isnative
    np.testing.assert_array_equal(read, data)


def test_boolean_voxels_read_as_0_and_1(tmp_path, voxels, write_image):
    data = voxels((8, 9, 10)) % 3 == 0
    volume = open_volume(write_image(tmp_path / "a.zarr", [data], scales=[[1, 2, 3]]))
    assert volume.dtype == np.uint8
    assert any("boolean" in note for note in volume.notes)
    np.testing.assert_array_equal(volume.read(volume.box), data.astype(np.uint8))


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"channel": 3}, "channel from 0 to 2"),
        ({"timepoint": 2}, "timepoint from 0 to 1"),
        ({"level": 1}, "level 0"),
    ],
)
def test_a_selection_out_of_range_names_the_range(tmp_path, voxels, write_image, given, named):
    path = write_image(tmp_path / "a.zarr", [voxels((2, 3, 4, 5, 6))], axes="tczyx", scales=[[1, 1, 1, 2, 3]])
    with pytest.raises(ConfigError, match=named):
        open_volume(path, **given)


def test_channel_names_are_listed_when_a_channel_is_missing(tmp_path, voxels, write_image):
    path = write_image(tmp_path / "a.zarr", [voxels((2, 4, 5, 6))], axes="czyx", scales=[[1, 1, 2, 3]])
    group = zarr.open_group(path, mode="r+")
    group.attrs["ome"] = group.attrs["ome"] | {"omero": {"channels": [{"label": "NeuN"}, {"label": "cFos"}]}}
    with pytest.raises(ConfigError, match="0 NeuN, 1 cFos"):
        open_volume(path, channel=5)


# -- voxel size -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("unit", "um"), [("nanometer", 1e-3), ("micrometer", 1), ("millimeter", 1e3), ("µm", 1), ("micron", 1)]
)
def test_units_of_length(tmp_path, voxels, write_image, unit, um):
    volume = open_volume(
        write_image(tmp_path / "a.zarr", [voxels((8, 9, 10))], scales=[[5, 2, 3]], unit=unit)
    )
    np.testing.assert_allclose(volume.voxel_size_um, (5 * um, 2 * um, 3 * um))
    assert any("check its unit" in note for note in volume.notes) == (um != 1)


def test_a_scale_without_unit_is_taken_as_um_and_said(tmp_path, voxels, write_image):
    volume = open_volume(
        write_image(tmp_path / "a.zarr", [voxels((8, 9, 10))], scales=[[5, 2, 3]], unit=None)
    )
    assert volume.voxel_size_um == (5, 2, 3)
    assert any("no unit" in note for note in volume.notes)


@pytest.mark.parametrize(
    "described",
    [
        {"scales": [[1, 1, 1]], "unit": None},
        {"scales": None},
        {"scales": [[0, 1, 1]]},
        {"scales": [[-5, 1, 1]]},
        {"scales": [[1, 1]]},
        {"scales": [[5, 2, 2]], "unit": "parsec"},
        {"scales": [["a", 1, 1]]},
    ],
)
def test_a_scale_that_cannot_be_believed_is_asked_for(tmp_path, voxels, write_image, described):
    path = write_image(tmp_path / "a.zarr", [voxels((8, 9, 10))], **described)
    with pytest.raises(InputError, match=r"no voxel size(.|\n)*--voxel-size Z,Y,X or voxel_size_um="):
        open_volume(path)
    assert open_volume(path, voxel_size_um=(5, 2, 2)).voxel_size_um == (5, 2, 2)


def test_a_scale_of_one_um_is_believed_with_a_note(tmp_path, voxels, write_image):
    volume = open_volume(write_image(tmp_path / "a.zarr", [voxels((8, 9, 10))], scales=[[1, 1, 1]]))
    assert volume.voxel_size_um == (1, 1, 1)
    assert any("exactly 1, 1, 1" in note for note in volume.notes)


def test_a_given_voxel_size_wins(tmp_path, voxels, write_image):
    path = write_image(tmp_path / "a.zarr", [voxels((8, 9, 10))], scales=[[5, 2, 3]])
    volume = open_volume(path, voxel_size_um=(7, 8, 9))
    assert (volume.voxel_size_um, volume.voxel_size_from) == ((7, 8, 9), "given")


def test_the_scale_of_the_whole_multiscale_counts_too(tmp_path, voxels, write_image):
    path = write_image(
        tmp_path / "a.zarr",
        [voxels((8, 9, 10))],
        scales=[[1, 1, 1]],
        multiscale={"coordinateTransformations": [{"type": "scale", "scale": [5, 2, 3]}]},
    )
    assert open_volume(path).voxel_size_um == (5, 2, 3)


def test_level_of_a_pyramid(tmp_path, voxels, write_image):
    data = voxels((21, 50, 60))
    half = data[:, ::2, ::2]  # mesoSPIM's early levels shrink x and y only
    path = write_image(tmp_path / "a.zarr", [data, half], scales=[[5, 2, 3], [5, 4, 6]])
    volume = open_volume(path, level=1)
    assert (volume.shape, volume.voxel_size_um) == (half.shape, (5, 4, 6))
    np.testing.assert_array_equal(volume.read(volume.box), half)
    given = open_volume(path, level=1, voxel_size_um=(10, 1, 1))
    assert given.voxel_size_um == (10, 2, 2)  # given at full resolution


# -- BigStitcher ------------------------------------------------------------------------------


def fused(tmp_path, voxels, write_image, **described):
    data = voxels((1, 2, 20, 50, 61))
    levels = [data, data[..., ::2, ::2], data[..., ::2, ::4, ::4]]
    factors = [[1, 1, 1, 1, 1], [2, 2, 1, 1, 1], [4, 4, 2, 1, 1]]  # x, y, z, 1, 1
    return levels, write_image(
        tmp_path / "fused.ome.zarr",
        levels,
        axes="tczyx",
        zarr_format=2,
        chunks=(1, 1, 16, 16, 16),
        chunk_key_encoding={"name": "v2", "separator": "/"},
        level_attributes=[{"downsamplingFactors": f} for f in factors],
        **described,
    )


def test_bigstitcher_fused_without_scale_takes_factors_from_the_levels(tmp_path, voxels, write_image):
    levels, path = fused(tmp_path, voxels, write_image, scales=[[1] * 5] * 3, unit=None)
    with pytest.raises(InputError, match="nobody filled in"):
        open_volume(path, level=2)
    volume = open_volume(path, level=2, channel=1, voxel_size_um=(5, 2, 2))
    assert volume.voxel_size_um == (10, 8, 8)
    assert "times 2, 4, 4" in volume.voxel_size_from
    assert not any("from the shapes" in note for note in volume.notes)
    np.testing.assert_array_equal(volume.read(volume.box), levels[2][0, 1])


def test_levels_without_any_factor_take_it_from_the_shapes(tmp_path, voxels, write_image):
    data = voxels((20, 50, 61))
    path = write_image(tmp_path / "a.zarr", [data, data[::2, ::4, ::4]], scales=None)
    volume = open_volume(path, level=1, voxel_size_um=(5, 2, 2))
    assert volume.voxel_size_um == (10, 8, 8)
    assert any("taken from the shapes" in note for note in volume.notes)


def test_level_scales_that_contradict_the_shapes_are_not_believed(tmp_path, voxels, write_image):
    data = voxels((20, 50, 60))
    path = write_image(tmp_path / "a.zarr", [data, data[::2, ::2, ::2]], scales=[[5, 2, 2], [5, 2, 2]])
    volume = open_volume(path, level=1)
    assert volume.voxel_size_um == (10, 4, 4)
    assert any("not from the scales" in note for note in volume.notes)


# -- which image ------------------------------------------------------------------------------

TILE = "Mag5x_Tile{}_Ch488_Flt525_Sh0_Rot0.ome.zarr"


def test_bare_group_with_one_tile_opens_it(tmp_path, voxels, write_image, sidecar):
    group = tmp_path / "brain.ome.zarr"
    zarr.open_group(group, mode="w")
    write_image(group / TILE.format(0), [voxels((18, 50, 60))], scales=[[5, 5.26, 5.26]])
    sidecar(tmp_path / f"brain.ome.zarr_{TILE.format(0)}_meta.txt", planes=20)
    volume = open_volume(group)
    assert volume.voxel_size_um == (5, 5.26, 5.26)
    assert any(TILE.format(0) in note for note in volume.notes)
    assert any("2 trailing planes missing: 18 of 20" in note for note in volume.notes)


def test_bare_group_with_several_tiles_lists_them(tmp_path, voxels, write_image):
    group = tmp_path / "brain.ome.zarr"
    zarr.open_group(group, mode="w")
    for i in (0, 1):
        write_image(group / TILE.format(i), [voxels((8, 9, 10)) + i], scales=[[5, 2, 2]])
    with pytest.raises(InputError, match=r"Tile0_(.|\n)*Tile1_"):
        open_volume(group)
    second = open_volume(group / TILE.format(1))
    np.testing.assert_array_equal(second.read(second.box), voxels((8, 9, 10)) + 1)


def test_the_sidecar_gives_the_voxel_size_that_a_tile_lacks(tmp_path, voxels, write_image, sidecar):
    group = tmp_path / "brain.ome.zarr"
    zarr.open_group(group, mode="w")
    tile = write_image(group / TILE.format(0), [voxels((8, 50, 60))], scales=None)
    sidecar(tmp_path / f"brain.ome.zarr_{TILE.format(0)[: -len('.ome.zarr')]}_meta.txt", planes=8)
    volume = open_volume(tile)
    assert volume.voxel_size_um == (5, 5.26, 5.26)
    assert volume.voxel_size_from.startswith("mesoSPIM sidecar")
    assert not volume.notes


def test_binning_is_seen_at_any_level(tmp_path, voxels, write_image, sidecar):
    data = voxels((20, 51, 61))
    path = write_image(tmp_path / "a.ome.zarr", [data, data[:, 1::2, 1::2]], scales=None)
    sidecar(tmp_path / "a.ome.zarr_meta.txt", pixel=2, x_pixels=122, y_pixels=102)
    assert open_volume(path).voxel_size_um == (5, 4, 4)
    assert open_volume(path, level=1).voxel_size_um == (5, 8, 8)


def test_a_sidecar_that_disagrees_is_mentioned(tmp_path, voxels, write_image, sidecar):
    path = write_image(tmp_path / "a.ome.zarr", [voxels()], scales=[[5, 2, 2]])
    sidecar(tmp_path / "a.ome.zarr_meta.txt", step=3)
    volume = open_volume(path)
    assert volume.voxel_size_um == (5, 2, 2)
    assert any("says 3, 5.26, 5.26 um instead" in note for note in volume.notes)


def test_path_of_a_level_finds_the_image_around_it(tmp_path, voxels, write_image):
    data = voxels()
    path = write_image(tmp_path / "a.zarr", [data, data[:, ::2, ::2]], scales=[[5, 2, 3], [5, 4, 6]])
    volume = open_volume(path / "1")
    assert (volume.shape, volume.voxel_size_um) == ((20, 25, 30), (5, 4, 6))
    assert open_volume(path / "1", voxel_size_um=(7, 7, 7)).voxel_size_um == (7, 7, 7)  # of this very array
    with pytest.raises(ConfigError, match="one level already"):
        open_volume(path / "0", level=1)


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_plain_array_needs_a_voxel_size(tmp_path, voxels, zarr_format):
    data = voxels()
    zarr.save_array(tmp_path / "a.zarr", data, zarr_format=zarr_format)
    with pytest.raises(InputError, match="without OME metadata"):
        open_volume(tmp_path / "a.zarr")
    volume = open_volume(tmp_path / "a.zarr", voxel_size_um=2)
    assert volume.voxel_size_um == (2, 2, 2)
    np.testing.assert_array_equal(volume.read(BOX), data[BOX.slices])


def test_group_of_levels_without_metadata(tmp_path, voxels):
    data = voxels()
    group = zarr.open_group(tmp_path / "a.zarr", mode="w")
    for i, level in enumerate([data, data[::2, ::2, ::2]]):
        group.create_array(f"s{i}", data=level, chunks=(16, 16, 16))
    volume = open_volume(tmp_path / "a.zarr", level=1, voxel_size_um=1)
    assert (volume.shape, volume.voxel_size_um) == ((10, 25, 30), (2, 2, 2))
    group.create_array("mask", data=data, chunks=(16, 16, 16))
    with pytest.raises(InputError, match=r"mask \[20, 50, 60\]"):
        open_volume(tmp_path / "a.zarr", voxel_size_um=1)


def test_missing_axes_are_assumed_and_said(tmp_path, voxels, write_image):
    path = write_image(
        tmp_path / "a.zarr",
        [voxels((2, 8, 9, 10))],
        axes="czyx",
        scales=[[1, 5, 2, 3]],
        multiscale={"axes": None},
    )
    volume = open_volume(path, channel=1)
    assert (volume.shape, volume.voxel_size_um) == ((8, 9, 10), (5, 2, 3))
    assert any("taken as czyx" in note for note in volume.notes)


@pytest.mark.filterwarnings("ignore")  # of the writer
@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_an_image_that_ome_zarr_writes(tmp_path, voxels, version):
    from ome_zarr.format import FormatV04, FormatV05
    from ome_zarr.writer import write_image as write

    data = voxels((2, 20, 50, 60))
    write(
        data,
        str(tmp_path / "a.ome.zarr"),
        axes=[
            {"name": "c", "type": "channel"},
            *({"name": n, "type": "space", "unit": "micrometer"} for n in "zyx"),
        ],
        fmt=FormatV04() if version == "0.4" else FormatV05(),
        scale={"c": 1.0, "z": 5.0, "y": 2.0, "x": 2.0},
    )
    volume = open_volume(tmp_path / "a.ome.zarr", channel=1)
    assert (volume.format, volume.voxel_size_um) == (f"OME-Zarr {version}", (5, 2, 2))
    np.testing.assert_array_equal(volume.read(volume.box), data[1])


@pytest.mark.filterwarnings("ignore")  # of the writer
def test_an_image_that_ngio_writes(tmp_path, voxels):
    import ngio

    ngio.create_ome_zarr_from_array(tmp_path / "a.zarr", voxels(), pixelsize=2.0, z_spacing=5.0, levels=2)
    volume = open_volume(tmp_path / "a.zarr")
    assert volume.voxel_size_um == (5, 2, 2)
    np.testing.assert_array_equal(volume.read(volume.box), voxels())
    assert open_volume(tmp_path / "a.zarr", level=1).voxel_size_um == (5, 4, 4)


# -- damage -----------------------------------------------------------------------------------

CODECS = {
    "none": {"compressors": None},
    "blosc": {"compressors": BloscCodec(cname="zstd")},
    "zstd": {"compressors": ZstdCodec()},
    "gzip": {"compressors": GzipCodec()},
    "sharded": {"compressors": BloscCodec(cname="zstd"), "shards": (32, 32, 32)},
    "sharded index first": {
        "compressors": None,
        "shards": {"shape": (32, 32, 32), "index_location": "start"},
    },
}


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("left", [0, 1, 0.5, 0.98])
def test_a_chunk_cut_short_is_found_and_named(tmp_path, voxels, write_image, codec, left):
    data = voxels((32, 32, 64))
    path = write_image(tmp_path / "a.zarr", [data], scales=[[1, 2, 3]], **CODECS[codec])
    volume = open_volume(path)
    np.testing.assert_array_equal(volume.read(volume.box), data)
    chunk = path / "0" / "c" / "0" / "0" / "1"
    whole = chunk.read_bytes()
    chunk.write_bytes(whole[: 1 if left == 1 else int(len(whole) * left)])
    with pytest.raises(InputError, match="c/0/0/1") as caught:
        volume.read(volume.box)
    assert str(path / "0") in str(caught.value)
    assert "z 0:32, y 0:32, x 0:64" in str(caught.value)
    untouched = (
        Box((0, 0, 32), (32, 32, 64)) if "shards" not in CODECS[codec] else Box((0, 0, 0), (32, 32, 32))
    )
    if "shards" in CODECS[codec]:
        np.testing.assert_array_equal(volume.read(untouched), data[untouched.slices])


def test_scrambled_chunk_is_found(tmp_path, voxels, write_image):
    path = write_image(tmp_path / "a.zarr", [voxels((32, 32, 32))], scales=[[1, 2, 3]], zarr_format=2)
    chunk = path / "0" / "1.0.1"
    chunk.write_bytes(bytes(range(256)) * 4)
    volume = open_volume(path)
    with pytest.raises(InputError, match=r"1\.0\.1(.|\n)*remedy: copy that file again"):
        volume.read(volume.box)


def test_a_missing_chunk_is_the_fill_value(tmp_path, voxels, write_image):
    data = voxels((32, 32, 32))
    path = write_image(tmp_path / "a.zarr", [data], scales=[[1, 2, 3]], zarr_format=2, fill_value=7)
    (path / "0" / "1.0.1").unlink()
    data[16:, :16, 16:] = 7
    volume = open_volume(path)
    np.testing.assert_array_equal(volume.read(volume.box), data)


@pytest.mark.parametrize("name", ["../outside", "/etc", "0/../../outside", "..", "", 7, None])
def test_a_level_outside_the_store_is_refused(tmp_path, voxels, write_image, name):
    zarr.save_array(tmp_path / "outside", voxels())
    path = write_image(
        tmp_path / "a.zarr",
        [voxels()],
        multiscale={"datasets": [{"path": name, "coordinateTransformations": []}]},
    )
    with pytest.raises(InputError, match="outside the store"):
        open_volume(path, voxel_size_um=1)


def _edit(path, **changes):
    document = json.loads(path.read_text())
    document.update(changes)
    path.write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ([10**6, 10**6, 10**5], "impossible size"),
        ([-4, 10, 10], "impossible size"),
        ([0, 10, 10], "is empty"),
        ("many", "cannot open"),
    ],
)
def test_absurd_sizes_are_refused(tmp_path, voxels, write_image, shape, message):
    path = write_image(tmp_path / "a.zarr", [voxels()], scales=[[1, 2, 3]])
    _edit(path / "0" / "zarr.json", shape=shape)
    with pytest.raises(InputError, match=message):
        open_volume(path)


@pytest.mark.parametrize(
    ("shape", "message"),
    [((5, 6), "not a volume"), ((7,), "not a volume"), ((1, 1, 1, 4, 5, 6), "not a volume")],
)
def test_other_dimensions_are_refused(tmp_path, voxels, shape, message):
    zarr.save_array(tmp_path / "a.zarr", voxels(shape))
    with pytest.raises(InputError, match=message):
        open_volume(tmp_path / "a.zarr", voxel_size_um=1)


def test_an_image_without_z_is_refused(tmp_path, voxels, write_image):
    path = write_image(tmp_path / "a.zarr", [voxels((3, 8, 9))], axes="cyx")
    with pytest.raises(InputError, match=r"not a volume(.|\n)*axes cyx"):
        open_volume(path)


def test_complex_voxels_are_refused(tmp_path, voxels):
    zarr.save_array(tmp_path / "a.zarr", voxels().astype(np.complex64))
    with pytest.raises(InputError, match="complex"):
        open_volume(tmp_path / "a.zarr", voxel_size_um=1)


def test_metadata_cut_short_is_named(tmp_path, voxels, write_image):
    path = write_image(tmp_path / "a.zarr", [voxels()], scales=[[1, 2, 3]])
    document = path / "zarr.json"
    document.write_text(document.read_text()[:50])
    with pytest.raises(InputError, match=r"cannot read the metadata .*zarr\.json"):
        open_volume(path)


def test_an_unknown_codec_is_an_input_error(tmp_path, voxels, write_image):
    path = write_image(tmp_path / "a.zarr", [voxels()], scales=[[1, 2, 3]])
    _edit(path / "0" / "zarr.json", codecs=[{"name": "jpegxl-3000"}])
    with pytest.raises(InputError, match="jpegxl-3000"):
        open_volume(path)


def test_a_level_that_was_not_copied_is_named(tmp_path, voxels, write_image):
    path = write_image(tmp_path / "a.zarr", [voxels(), voxels()], scales=[[1, 2, 3]] * 2)
    shutil.rmtree(path / "0")
    with pytest.raises(InputError, match="0 is missing"):
        open_volume(path)


def test_an_empty_group_is_refused(tmp_path):
    zarr.open_group(tmp_path / "a.zarr", mode="w")
    with pytest.raises(InputError, match="without an image"):
        open_volume(tmp_path / "a.zarr")


def test_a_plate_is_refused(tmp_path):
    zarr.open_group(tmp_path / "a.zarr", mode="w").attrs["ome"] = {"version": "0.5", "plate": {}}
    with pytest.raises(InputError, match="plate"):
        open_volume(tmp_path / "a.zarr")


# -- travelling -------------------------------------------------------------------------------


def test_a_volume_is_small_and_travels(tmp_path, voxels, write_image):
    data = voxels()
    volume = open_volume(write_image(tmp_path / "a.zarr", [data], scales=[[1, 2, 3]]))
    sent = pickle.dumps(volume)
    assert len(sent) < 3000
    arrived = pickle.loads(sent)
    assert arrived == volume
    assert hash(arrived) == hash(volume)
    np.testing.assert_array_equal(arrived.read(BOX), data[BOX.slices])


def test_threads_share_a_volume(tmp_path, voxels, write_image):
    data = voxels()
    volume = open_volume(write_image(tmp_path / "a.zarr", [data], scales=[[1, 2, 3]]))
    boxes = list(volume.box.tiles((7, 11, 13)))
    with ThreadPoolExecutor(8) as pool:
        for box, read in zip(boxes, pool.map(volume.read, boxes), strict=True):
            np.testing.assert_array_equal(read, data[box.slices])


def test_identity_follows_content_and_selection(tmp_path, voxels, write_image):
    path = write_image(tmp_path / "a.zarr", [voxels((2, 20, 30, 40))], axes="czyx", scales=[[1, 1, 2, 3]])
    first = open_volume(path)
    assert json.loads(json.dumps(first.identity)) == first.identity
    assert open_volume(path).identity == first.identity
    assert open_volume(path, voxel_size_um=9).identity == first.identity  # voxels do not depend on it
    assert open_volume(path, channel=1).identity != first.identity
    zarr.open_array(path / "0", mode="r+")[:] = 5
    changed = open_volume(path)
    assert changed.identity != first.identity
    assert (changed.read(changed.box) == 5).all()
