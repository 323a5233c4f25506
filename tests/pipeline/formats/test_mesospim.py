"""Names and sidecars of mesoSPIM-control, this year's and older ones."""

from __future__ import annotations

import pytest

from braincensus.formats.mesospim import Sidecar, parse_name, sidecar_of


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "brain_Mag5x_Tile3_Ch488_Flt525-50_Sh1_Rot90.ome.zarr",
            {
                "magnification": "5x",
                "tile": "3",
                "channel": "488",
                "filter": "525-50",
                "shutter": "1",
                "rotation": "90",
            },
        ),
        (
            "a b_Mag1.25x_Tile0_Ch561_Sh0_Rot0.tiff",
            {"magnification": "1.25x", "channel": "561", "shutter": "0"},
        ),
        ("x_Mag4 x_Tile12_Ch647_Sh0_Rot-45.btf", {"magnification": "4 x", "tile": "12", "rotation": "-45"}),
        ("plain.tif", {}),
    ],
)
def test_names(name, expected):
    found = parse_name(name)
    assert {k: found[k] for k in expected} == expected
    assert bool(found) == bool(expected)


def test_keys_are_kept_by_section(tmp_path, sidecar):
    sidecar(tmp_path / "a_meta.txt", step=5, planes=20)
    read = Sidecar.read(tmp_path / "a_meta.txt")
    assert read.number("z_stepsize", section="POSITION") == 5  # the head of the file says 9
    assert read.number("z_planes", section="POSITION") == 20
    assert read.sections["CFG"]["laser"] == "488 nm"
    assert read.number("nothing", section="CFG") is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[Pixelsize in um] 5,26\n[z_stepsize] -5", (5, 5.26, 5.26)),
        ("CFG\n[Pixelsize in um] 5.26 um\nPOSITION\n[z_stepsize] 2.0e0", (2, 5.26, 5.26)),
        ("[CFG]\n\n[Pixelsize in um]5.26\r\n[z_stepsize]5\r\n", (5, 5.26, 5.26)),
        ("[Pixelsize in um] \n[z_stepsize] 5", None),
        ("[Pixelsize in um] 0\n[z_stepsize] 5", None),
        ("", None),
        ("\x00\xff rubbish [", None),
    ],
)
def test_tolerance(tmp_path, text, expected):
    (tmp_path / "a_meta.txt").write_bytes(text.encode("latin-1"))
    size, _ = Sidecar.read(tmp_path / "a_meta.txt").voxel_size((50, 60))
    assert (size.um if size else None) == expected


@pytest.mark.parametrize(
    ("camera", "factor"), [((60, 50), 1), ((120, 100), 2), ((200, 240), 4), ((180, 150), 1), ((70, 50), 1)]
)
def test_binning(tmp_path, sidecar, camera, factor):
    sidecar(tmp_path / "a_meta.txt", pixel=3, x_pixels=camera[0], y_pixels=camera[1])
    size, notes = Sidecar.read(tmp_path / "a_meta.txt").voxel_size((50, 60))
    assert size.um == (5, 3 * factor, 3 * factor)
    assert bool(notes) == (factor > 1)


@pytest.mark.parametrize("name", ["a.tif_meta.txt", "a_meta.txt"])
def test_where_sidecars_lie(tmp_path, sidecar, name):
    assert sidecar_of(tmp_path / "a.tif") is None
    sidecar(tmp_path / name)
    assert sidecar_of(tmp_path / "a.tif").path.name == name


@pytest.mark.parametrize(
    ("stored", "said"), [(20, None), (21, None), (19, "1 trailing plane"), (12, "8 trailing planes")]
)
def test_missing_planes(tmp_path, sidecar, stored, said):
    sidecar(tmp_path / "a_meta.txt", planes=20)
    note = Sidecar.read(tmp_path / "a_meta.txt").missing_planes(stored)
    assert note is None if said is None else note.startswith(said)
