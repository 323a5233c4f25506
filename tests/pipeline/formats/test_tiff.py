"""TIFF in every form that mesoSPIM writes, and in the forms that people make of it."""

from __future__ import annotations

import os
import pickle
import re

import numpy as np
import pytest
import tifffile

from braincensus.errors import ConfigError, InputError
from braincensus.formats.readers import FlatReader, PlanesReader, ZarrReader
from braincensus.volume import open_volume
from braincensus_kernels.boxes import Box

BOX = Box((3, 7, 11), (18, 41, 50))


def imagej(path, data, *, unit="um", axes="ZYX", **metadata):
    tifffile.imwrite(
        path,
        data,
        imagej=True,
        metadata={"spacing": 5.0, "unit": unit, "axes": axes} | metadata,
        resolution=(0.5, 0.25),
    )
    return path


def big(path, data, **options):
    """As mesoSPIM's Big_Tiff_Writer: one image per plane."""
    with tifffile.TiffWriter(path, bigtiff=True) as writer:
        for plane in data:
            writer.write(plane[None], contiguous=False, **options)
    return path


def folder_of(path, data, *, name="plane{}.tif", **options):
    path.mkdir()
    for i, plane in enumerate(data):
        tifffile.imwrite(path / name.format(i), plane, **options)
    return path


def check(volume, data):
    assert volume.shape == data.shape
    read = volume.read(BOX)
    assert read.dtype == volume.dtype == data.dtype.newbyteorder("=")
    assert read.flags.c_contiguous
    np.testing.assert_array_equal(read, data[BOX.slices])
    np.testing.assert_array_equal(volume.read(volume.box), data)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(volume)).read(BOX), data[BOX.slices])


# -- forms ------------------------------------------------------------------------------------


def test_imagej_stack_is_mapped_and_knows_its_voxel_size(tmp_path, voxels):
    volume = open_volume(imagej(tmp_path / "a.tiff", voxels()))
    assert isinstance(volume.reader, FlatReader)
    assert volume.format == "TIFF (ImageJ)"
    assert volume.voxel_size_um == (5.0, 4.0, 2.0)
    assert volume.voxel_size_from == "ImageJ metadata"
    check(volume, voxels())


@pytest.mark.parametrize("channel", [0, 1])
def test_imagej_hyperstack_selects_a_channel(tmp_path, voxels, channel):
    data = np.stack([voxels(), voxels()[::-1]], axis=1)
    volume = open_volume(imagej(tmp_path / "a.tif", data, axes="ZCYX", unit="micron"), channel=channel)
    check(volume, data[:, channel])


@pytest.mark.parametrize("suffix", ["btf", "tf2", "tf8"])
def test_big_tiff_with_an_image_per_plane(tmp_path, voxels, sidecar, suffix):
    path = big(tmp_path / f"a.{suffix}", voxels())
    sidecar(tmp_path / f"a.{suffix}_meta.txt")
    volume = open_volume(path)
    assert isinstance(volume.reader, PlanesReader)
    assert volume.voxel_size_um == (5.0, 5.26, 5.26)
    assert volume.voxel_size_from == f"mesoSPIM sidecar a.{suffix}_meta.txt"
    assert len(pickle.dumps(volume)) < 3000
    check(volume, voxels())


def test_ome_tiff(tmp_path, voxels):
    path = tmp_path / "a.ome.tif"
    metadata = {
        "axes": "CZYX",
        "PhysicalSizeX": 2000.0,
        "PhysicalSizeXUnit": "nm",
        "PhysicalSizeY": 3.0,
        "PhysicalSizeZ": 0.005,
        "PhysicalSizeZUnit": "mm",
    }
    data = np.stack([voxels(), voxels()[::-1]])
    tifffile.imwrite(path, data, metadata=metadata)
    volume = open_volume(path, channel=1)
    assert (volume.format, volume.voxel_size_from) == ("OME-TIFF", "OME metadata")
    np.testing.assert_allclose(volume.voxel_size_um, (5, 3, 2))
    check(volume, data[1])


def test_ome_tiff_pyramid_level(tmp_path, voxels):
    path = tmp_path / "a.ome.tif"
    metadata = {"axes": "ZYX", "PhysicalSizeX": 2.0, "PhysicalSizeY": 2.0, "PhysicalSizeZ": 5.0}
    with tifffile.TiffWriter(path) as writer:
        writer.write(voxels(), subifds=1, metadata=metadata)
        writer.write(voxels()[:, ::2, ::2], subfiletype=1)
    volume = open_volume(path, level=1)
    assert volume.voxel_size_um == (5, 4, 4)
    np.testing.assert_array_equal(volume.read(volume.box), voxels()[:, ::2, ::2])
    with pytest.raises(ConfigError, match="level from 0 to 1"):
        open_volume(path, level=2)


@pytest.mark.parametrize(
    "options",
    [
        {"byteorder": ">"},
        {"metadata": None},
        {"metadata": None, "rowsperstrip": 7},
        {"bigtiff": True},
        {"photometric": "minisblack", "dtype": "float32"},
        {"dtype": "float16"},
        {"dtype": "uint8"},
        {"dtype": "float64"},
    ],
)
def test_uncompressed_tiff_is_mapped(tmp_path, voxels, options):
    options = dict(options)
    data = voxels(dtype=options.pop("dtype", "uint16"))
    tifffile.imwrite(tmp_path / "a.tif", data, **options)
    volume = open_volume(tmp_path / "a.tif", voxel_size_um=(5, 2, 2), scratch=tmp_path / "scratch")
    check(volume, data)
    assert isinstance(volume.reader, FlatReader | PlanesReader)
    assert not (tmp_path / "scratch").exists()


@pytest.mark.parametrize(
    "options",
    [
        {"compression": "zlib"},
        {"compression": "lzw", "predictor": True, "metadata": None},
        {"compression": "zstd", "byteorder": ">"},
        {"tile": (16, 16)},
    ],
)
def test_tiff_that_cannot_be_mapped_is_copied_once(tmp_path, voxels, options):
    tifffile.imwrite(tmp_path / "a.tif", voxels(), **options)
    seen = []
    open_it = {"voxel_size_um": 1, "scratch": tmp_path / "scratch", "progress": lambda *a: seen.append(a)}
    volume = open_volume(tmp_path / "a.tif", **open_it)
    assert isinstance(volume.reader, ZarrReader)
    check(volume, voxels())
    assert seen[-1] == ("converting to a chunked copy", 60_000, 60_000)
    seen.clear()
    assert open_volume(tmp_path / "a.tif", **open_it) == volume
    assert not seen  # not again
    assert sorted(p.suffix for p in (tmp_path / "scratch").iterdir()) == [".lock", ".zarr"]


def test_compressed_big_tiff_with_an_image_per_plane(tmp_path, voxels):
    path = big(tmp_path / "a.btf", voxels(), compression="zstd")
    check(open_volume(path, voxel_size_um=1, scratch=tmp_path / "s"), voxels())


def test_a_changed_file_is_copied_again(tmp_path, voxels):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, voxels(), compression="zlib")
    first = open_volume(path, voxel_size_um=1, scratch=tmp_path / "s")
    tifffile.imwrite(path, voxels()[::-1], compression="zlib")
    os.utime(path, ns=(1, 1))
    second = open_volume(path, voxel_size_um=1, scratch=tmp_path / "s")
    assert second.identity != first.identity
    check(second, voxels()[::-1])


def test_boolean_tiff(tmp_path, voxels):
    data = voxels() % 3 == 0
    tifffile.imwrite(tmp_path / "a.tif", data)
    volume = open_volume(tmp_path / "a.tif", voxel_size_um=1, scratch=tmp_path / "s")
    check(volume, data.astype(np.uint8))


def test_unnamed_axes_are_assumed_and_said(tmp_path, voxels):
    data = np.stack([voxels(), voxels()[::-1]])
    tifffile.imwrite(tmp_path / "a.tif", data)
    volume = open_volume(tmp_path / "a.tif", channel=1, voxel_size_um=1)
    check(volume, data[1])
    assert any("taken as czyx" in note for note in volume.notes)


def test_planes_called_time_points_are_z(tmp_path, voxels):
    volume = open_volume(imagej(tmp_path / "a.tif", voxels(), axes="TYX"))
    check(volume, voxels())
    assert any("time points" in note for note in volume.notes)


def test_real_volume(c5image_path, tmp_path):
    volume = open_volume(c5image_path, voxel_size_um=(5, 5.26, 5.26), scratch=tmp_path)
    np.testing.assert_array_equal(volume.read(volume.box), tifffile.imread(c5image_path))


# -- folders of planes ------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"compression": "zlib"}, {"byteorder": ">"}, {"metadata": None}])
def test_folder_of_planes_in_natural_order(tmp_path, voxels, options):
    path = folder_of(tmp_path / "planes", voxels(), **options)  # plane2 comes before plane10
    tifffile.imwrite(path / "MAX_plane.tif", voxels()[0])
    (path / "notes.txt").write_text("mounted upside down")
    volume = open_volume(path, voxel_size_um=1, scratch=tmp_path / "s")
    assert volume.format.startswith("folder of 20 TIFF planes")
    check(volume, voxels())
    assert not volume.notes or "compression" in options


def test_folder_of_planes_takes_the_voxel_size_from_a_sidecar_in_it(tmp_path, voxels, sidecar):
    path = folder_of(tmp_path / "planes", voxels())
    sidecar(path / "brain_meta.txt", planes=22)
    volume = open_volume(path)
    assert volume.voxel_size_um == (5, 5.26, 5.26)
    assert any("2 trailing planes missing: 20 of 22" in note for note in volume.notes)


def test_folder_with_unlike_planes_is_refused(tmp_path, voxels):
    path = folder_of(tmp_path / "planes", voxels())
    tifffile.imwrite(path / "plane20.tif", voxels()[0][:, :40])
    with pytest.raises(InputError, match=r"planes in .* differ(.|\n)*plane20\.tif"):
        open_volume(path, voxel_size_um=1)
    tifffile.imwrite(path / "plane20.tif", voxels()[0].astype(np.uint8))
    with pytest.raises(InputError, match=r"uint8 in plane20\.tif"):
        open_volume(path, voxel_size_um=1)


@pytest.mark.parametrize("names", ["x_C0{}_Z{:04}.tif", "b_Mag2x_Tile{}_Ch488_Sh0_Rot0_{:04}.tif"])
def test_folder_of_several_channels_or_tiles_is_refused(tmp_path, voxels, names):
    (tmp_path / "planes").mkdir()
    for c in (0, 1):
        for i, plane in enumerate(voxels()):
            tifffile.imwrite(tmp_path / "planes" / names.format(c, i), plane)
    with pytest.raises(InputError, match="speak of several"):
        open_volume(tmp_path / "planes", voxel_size_um=1)


def test_missing_plane_numbers_are_said(tmp_path, voxels):
    path = folder_of(tmp_path / "planes", voxels())
    (path / "plane7.tif").unlink()
    volume = open_volume(path, voxel_size_um=1)
    assert volume.shape[0] == 19
    assert any("plane numbers missing: 1 (7)" in note for note in volume.notes)


def test_folder_of_stacks_is_refused_and_of_one_is_opened(tmp_path, voxels):
    imagej(tmp_path / "a.tif", voxels())
    volume = open_volume(tmp_path)
    check(volume, voxels())
    imagej(tmp_path / "b.tif", voxels())
    with pytest.raises(InputError, match=r"a\.tif has 20 planes"):
        open_volume(tmp_path)


def test_folder_of_ome_planes_that_each_describe_the_whole(tmp_path, voxels):
    path = folder_of(
        tmp_path / "planes",
        voxels(),
        name="Z{}.ome.tif",
        ome=True,
        metadata={"axes": "YX", "PhysicalSizeX": 2.0, "PhysicalSizeY": 3.0, "PhysicalSizeZ": 5.0},
    )
    for file in path.iterdir():
        xml = tifffile.tiffcomment(file).replace('SizeZ="1"', 'SizeZ="20"')
        tifffile.tiffcomment(file, xml.encode())
    volume = open_volume(path)
    assert volume.voxel_size_um == (5, 3, 2)
    check(volume, voxels())


# -- voxel size -------------------------------------------------------------------------------


@pytest.mark.parametrize("metadata", [{"unit": "pixel"}, {"unit": None}, {"spacing": None}, {"spacing": 0}])
def test_imagej_metadata_that_says_no_size(tmp_path, voxels, metadata):
    path = tmp_path / "a.tif"
    given = {k: v for k, v in ({"spacing": 5.0, "unit": "um"} | metadata).items() if v is not None}
    tifffile.imwrite(path, voxels(), imagej=True, metadata={"axes": "ZYX"} | given, resolution=(0.5, 0.5))
    with pytest.raises(InputError, match=r"no voxel size(.|\n)*ImageJ metadata(.|\n)*--voxel-size Z,Y,X"):
        open_volume(path)


def test_ome_tiff_without_z_size(tmp_path, voxels):
    tifffile.imwrite(
        tmp_path / "a.ome.tif", voxels(), metadata={"axes": "ZYX", "PhysicalSizeX": 2.0, "PhysicalSizeY": 2.0}
    )
    with pytest.raises(InputError, match="OME metadata without PhysicalSizeZ"):
        open_volume(tmp_path / "a.ome.tif")


def test_plain_tiff_asks_for_its_voxel_size(tmp_path, voxels):
    tifffile.imwrite(tmp_path / "a.tif", voxels(), resolution=(72, 72))
    with pytest.raises(InputError, match="a TIFF without OME or ImageJ metadata"):
        open_volume(tmp_path / "a.tif")


def test_binning_shows_against_the_camera(tmp_path, voxels, sidecar):
    path = big(tmp_path / "a.btf", voxels())
    sidecar(tmp_path / "a.btf_meta.txt", x_pixels=120, y_pixels=100)
    volume = open_volume(path)
    assert volume.voxel_size_um == (5, 10.52, 10.52)
    assert any("binned 2x2" in note for note in volume.notes)


# -- bad input --------------------------------------------------------------------------------


@pytest.mark.parametrize("left", [0, 0.01, 0.5, 0.9, 0.97])
@pytest.mark.parametrize("form", ["imagej", "big", "compressed", "ome", "plain"])
def test_truncated_files_are_refused(tmp_path, voxels, form, left):
    path = tmp_path / "a.tif"
    match form:
        case "imagej":
            imagej(path, voxels())
        case "big":
            big(path, voxels())
        case "compressed":
            big(path, voxels(), compression="zlib")
        case "ome":
            tifffile.imwrite(path, voxels(), ome=True, metadata={"axes": "ZYX"})
        case "plain":
            tifffile.imwrite(path, voxels(), metadata=None)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * left)])
    with pytest.raises(InputError, match=r"a\.tif(.|\n)*remedy: copy the file again"):
        open_volume(path, voxel_size_um=1, scratch=tmp_path / "s")
    assert not list(tmp_path.glob("s/*.zarr"))


def test_a_file_that_shrinks_later_is_an_error_not_a_crash(tmp_path, voxels):
    for path in (imagej(tmp_path / "a.tif", voxels()), big(tmp_path / "b.btf", voxels())):
        volume = open_volume(path, voxel_size_um=1)
        volume.read(volume.box)
        os.truncate(path, path.stat().st_size // 2)
        with pytest.raises(InputError, match="truncated"):
            volume.read(volume.box)


def test_truncated_plane_in_a_folder(tmp_path, voxels):
    path = folder_of(tmp_path / "planes", voxels())
    os.truncate(path / "plane7.tif", 1000)
    with pytest.raises(InputError, match=r"plane7\.tif"):
        open_volume(path, voxel_size_um=1)


def test_damaged_compressed_plane_is_named_and_leaves_no_copy(tmp_path, voxels):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, voxels(), compression="zlib", metadata=None)
    with tifffile.TiffFile(path) as tif:
        offset, n = tif.pages[13].dataoffsets[0], tif.pages[13].databytecounts[0]
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(b"\xff" * n)
    with pytest.raises(InputError, match="plane 13"):
        open_volume(path, voxel_size_um=1, scratch=tmp_path / "s")
    assert not list(tmp_path.glob("s/*.zarr"))


def test_no_tiff_at_all(tmp_path):
    (tmp_path / "a.tif").write_text("hello")
    with pytest.raises(InputError, match="not a TIFF"):
        open_volume(tmp_path / "a.tif")


@pytest.mark.parametrize("shape", [(50, 60, 3), (5, 50, 60, 3)])
def test_colour_is_refused(tmp_path, voxels, shape):
    tifffile.imwrite(tmp_path / "a.tif", voxels(shape, np.uint8), photometric="rgb")
    with pytest.raises(InputError, match="RGB"):
        open_volume(tmp_path / "a.tif", voxel_size_um=1)


@pytest.mark.parametrize(
    ("shape", "dtype", "message"), [((50, 60), "u2", "not a volume"), ((20, 50, 60), "c8", "complex")]
)
def test_what_is_no_volume_is_refused(tmp_path, voxels, shape, dtype, message):
    tifffile.imwrite(tmp_path / "a.tif", voxels(shape, np.dtype(dtype)))
    with pytest.raises(InputError, match=message):
        open_volume(tmp_path / "a.tif", voxel_size_um=1)


def test_axes_of_length_1_do_not_count(tmp_path, voxels):
    data = voxels((1, 1, 2, 1, 20, 50, 60))
    tifffile.imwrite(tmp_path / "a.tif", data, metadata={"axes": "QQQQQYX"})
    check(open_volume(tmp_path / "a.tif", voxel_size_um=1, channel=1), data[0, 0, 1, 0])
    data = voxels((2, 2, 2, 2, 20, 50, 60))
    tifffile.imwrite(tmp_path / "b.tif", data, metadata={"axes": "QQQQQYX"})
    with pytest.raises(InputError, match="not a volume"):
        open_volume(tmp_path / "b.tif", voxel_size_um=1)


def test_given_voxel_size_is_of_full_resolution(tmp_path, voxels):
    with tifffile.TiffWriter(tmp_path / "a.ome.tif") as writer:
        writer.write(voxels(), subifds=1, metadata={"axes": "ZYX"})
        writer.write(voxels()[:, ::2, ::2], subfiletype=1)
    assert open_volume(tmp_path / "a.ome.tif", level=1, voxel_size_um=(5, 2, 2)).voxel_size_um == (5, 4, 4)


def test_several_stacks_in_one_file_are_listed(tmp_path, voxels):
    with tifffile.TiffWriter(tmp_path / "a.tif") as writer:
        writer.write(voxels((5, 20, 30)), metadata={"axes": "ZYX"})
        writer.write(voxels((6, 30, 20)), metadata={"axes": "ZYX"})
    with pytest.raises(InputError, match=r"holds 2 images(.|\n)*\(5, 20, 30\)"):
        open_volume(tmp_path / "a.tif", voxel_size_um=1)


def test_an_image_spread_over_files_is_refused(tmp_path, voxels):
    # Both files are there; the first describes planes of the second as its own.
    parts = [tmp_path / "a.ome.tif", tmp_path / "b.ome.tif"]
    for path in parts:
        tifffile.imwrite(path, voxels(), ome=True, metadata={"axes": "ZYX"})
    xml = re.sub(r"<TiffData.*?/>|<TiffData.*?</TiffData>", "", tifffile.tiffcomment(parts[0]))
    data = "".join(
        f'<TiffData FirstZ="{20 * i}" PlaneCount="20">'
        f'<UUID FileName="{path.name}">urn:uuid:{i}</UUID></TiffData>'
        for i, path in enumerate(parts)
    )
    xml = xml.replace('SizeZ="20"', 'SizeZ="40"').replace("</Pixels>", f"{data}</Pixels>")
    assert 'SizeZ="40"' in xml
    assert data in xml
    for path in parts:
        tifffile.tiffcomment(path, xml.encode())
    with pytest.raises(InputError, match=r"a\.ome\.tif holds only part(.|\n)*40 planes(.|\n)*20 planes"):
        open_volume(parts[0], voxel_size_um=1)


@pytest.mark.parametrize("given", [{"channel": 1}, {"timepoint": 1}, {"level": 1}])
def test_selection_out_of_range(tmp_path, voxels, given):
    paths = imagej(tmp_path / "a.tif", voxels()), folder_of(tmp_path / "planes", voxels())
    for path in paths:
        with pytest.raises(ConfigError, match=f"no {next(iter(given))} 1"):
            open_volume(path, voxel_size_um=1, **given)
