"""When the chunked copy is made: last, or not at all."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import tifffile
import zarr
from zarr.storage import MemoryStore

from braincensus import RunConfig, plan, preparing
from braincensus.errors import BraincensusError, InputError
from braincensus.formats import convert
from braincensus.formats.convert import SCRATCH_VARIABLE
from braincensus.volume import open_volume
from braincensus_kernels.boxes import Box

SHAPE = (20, 50, 60)


@pytest.fixture(autouse=True)
def no_scratch_of_the_user(monkeypatch):
    monkeypatch.delenv(SCRATCH_VARIABLE, raising=False)


@pytest.fixture
def data():
    return np.arange(np.prod(SHAPE), dtype=np.uint16).reshape(SHAPE)


@pytest.fixture(params=["one file", "a page per image", "folder", "folder of one", "array", "zarr in memory"])
def source(request, tmp_path, data):
    """Everything that is read from a chunked copy."""
    place = tmp_path / "in"
    place.mkdir()
    match request.param:
        case "one file":
            tifffile.imwrite(place / "a.tif", data, compression="zlib")
            return place / "a.tif"
        case "a page per image":
            with tifffile.TiffWriter(place / "a.btf", bigtiff=True) as writer:
                for plane in data:
                    writer.write(plane[None], contiguous=False, tile=(16, 16))
            return place / "a.btf"
        case "folder":
            for i, plane in enumerate(data):
                tifffile.imwrite(place / f"{i}.tif", plane, compression="zlib")
            return place
        case "folder of one":
            tifffile.imwrite(place / "a.tif", data, compression="zlib")
            return place
        case "array":
            return data
    return zarr.create_array(MemoryStore(), data=data, chunks=(16, 16, 16))


def everything_under(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


def test_without_copy_all_is_said_and_nothing_is_written(tmp_path, source, data):
    before = everything_under(tmp_path)
    seen = open_volume(source, voxel_size_um=(5, 2, 2), scratch=tmp_path / "s", copy=False)
    assert everything_under(tmp_path) == before
    assert seen.needs_copy
    assert "a run first makes a chunked copy of up to 0.1 MB" in seen.notes[-1]
    assert len(pickle.dumps(seen)) < 3000
    for volume in (seen, pickle.loads(pickle.dumps(seen))):
        with pytest.raises(InputError, match=r"cannot read voxels z 0:1(.|\n)*open it with copy=True"):
            volume.read(Box((0, 0, 0), (1, 2, 3)))

    copied = open_volume(source, voxel_size_um=(5, 2, 2), scratch=tmp_path / "s")
    assert not copied.needs_copy
    assert copied.notes[:-1] == seen.notes[:-1]
    assert copied.reader.root in copied.notes[-1]
    for same in ("source", "format", "shape", "dtype", "chunks", "voxel_size_um", "identity", "n_bytes"):
        assert getattr(copied, same) == getattr(seen, same), same
    np.testing.assert_array_equal(copied.read(copied.box), data)


@pytest.mark.parametrize(
    ("options", "scratch"),
    [({}, None), ({}, "s"), ({"compression": "zlib"}, None), ({"tile": (16, 16)}, "s")],
)
@pytest.mark.parametrize("copy", [True, False])
def test_only_what_cannot_be_read_where_it_lies_needs_a_copy(tmp_path, data, options, scratch, copy):
    tifffile.imwrite(tmp_path / "a.tif", data, **options)
    scratch = tmp_path / scratch if scratch else None
    volume = open_volume(tmp_path / "a.tif", voxel_size_um=1, scratch=scratch, copy=copy)
    assert volume.needs_copy == (bool(options) and not copy)
    if not volume.needs_copy:
        np.testing.assert_array_equal(volume.read(volume.box), data)


def test_an_array_without_scratch_is_not_copied_and_can_be_read(data):
    volume = open_volume(data, voxel_size_um=1, copy=False)
    assert not volume.needs_copy
    np.testing.assert_array_equal(volume.read(volume.box), data)


def test_sizes_are_written_for_people(tmp_path, monkeypatch):
    def size(shape):
        array = np.broadcast_to(np.uint8(0), shape)
        monkeypatch.setattr("braincensus.formats.arrays._digest", lambda *_: "not read")
        return open_volume(array, voxel_size_um=1, scratch=tmp_path / "s", copy=False).notes[-1]

    assert size((100, 1000, 1230)).endswith("up to 123.0 MB")
    assert size((10_000, 1000, 1230)).endswith("up to 12.3 GB")


@pytest.mark.parametrize("copy", [True, False])
def test_a_missing_voxel_size_is_noticed_before_the_copy(tmp_path, source, copy, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = everything_under(tmp_path)
    for scratch in (tmp_path / "s", None):
        with pytest.raises(InputError, match="no voxel size"):
            open_volume(source, scratch=scratch, copy=copy)
    assert everything_under(tmp_path) == before


def test_the_voxel_size_of_a_sidecar_is_in_time(tmp_path, data):
    tifffile.imwrite(tmp_path / "a.tif", data, compression="zlib")
    (tmp_path / "a.tif_meta.txt").write_text(
        "CFG\n[Pixelsize in um] 2.0\n\nPOSITION\n[z_stepsize] 5.0\n[z_planes] 20\n"
    )
    seen = open_volume(tmp_path / "a.tif", copy=False)
    assert seen.voxel_size_um == (5, 2, 2)
    assert open_volume(tmp_path / "a.tif").voxel_size_um == (5, 2, 2)


def test_a_source_that_vanishes_before_it_is_copied(tmp_path, data, monkeypatch):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, data, compression="zlib")

    def vanish(*args, **kwargs):
        path.unlink()
        return folder(*args, **kwargs)

    folder = convert.scratch_folder
    monkeypatch.setattr(convert, "scratch_folder", vanish)
    with pytest.raises(InputError, match=r"cannot read the TIFF file(.|\n)*a\.tif"):
        open_volume(path, voxel_size_um=1, scratch=tmp_path / "s")
    assert not everything_under(tmp_path / "s")


# -- in a census ------------------------------------------------------------------------------


def config(**given) -> RunConfig:
    return RunConfig.model_validate({"foreground": {"model": "intensity"}, "input": given})


def test_a_plan_writes_nothing_and_knows_that_a_copy_is_needed(tmp_path, source, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = everything_under(tmp_path)
    planned = plan(source, config=config(voxel_size_um=(5, 2, 2)))
    assert planned.volume.needs_copy
    assert planned.volume.n_bytes == 120_000
    with pytest.raises(BraincensusError, match="no voxel size"):
        plan(source, config=config())
    assert everything_under(tmp_path) == before


class Recorder:
    def __init__(self):
        self.calls = []

    def message(self, text):
        self.calls.append(("message", text))

    def start(self, stage, voxels):
        self.calls.append(("start", stage, voxels))

    def advance(self, stage, voxels):
        self.calls.append(("advance", stage, voxels))

    def finish(self, stage, seconds):
        self.calls.append(("finish", stage))
        assert seconds > 0


def test_a_run_shows_the_copy_as_a_stage(tmp_path, source, monkeypatch):
    monkeypatch.setattr(convert, "SLAB_BYTES", 8 * 50 * 60 * 2)
    recorder = Recorder()
    volume = preparing.open_input(source, config(voxel_size_um=1), tmp_path / "s", recorder, copy=True)
    assert recorder.calls == [
        ("start", "convert", 60_000),
        ("advance", "convert", 0),
        ("advance", "convert", 24_000),
        ("advance", "convert", 24_000),
        ("advance", "convert", 12_000),
        ("finish", "convert"),
        *[("message", note) for note in volume.notes],
    ]


def test_a_copy_that_is_continued_counts_what_is_left(tmp_path, data, monkeypatch):
    class Interrupted(BaseException):
        pass

    def interrupt(what, done, total):
        if done:
            raise Interrupted

    monkeypatch.setattr(convert, "SLAB_BYTES", 8 * 50 * 60 * 2)
    with pytest.raises(Interrupted):
        open_volume(data, voxel_size_um=1, scratch=tmp_path / "s", progress=interrupt)
    recorder = Recorder()
    preparing.open_input(data, config(voxel_size_um=1), tmp_path / "s", recorder, copy=True)
    stage = [call for call in recorder.calls if call[0] != "message"]
    assert stage[0] == ("start", "convert", 36_000)
    assert sum(call[2] for call in stage if call[0] == "advance") == 36_000
    assert stage[-1] == ("finish", "convert")
