"""The life of an output: begun, interrupted anywhere, finished, replaced; and what others read from it."""

from __future__ import annotations

import errno
import itertools
import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import zarr

from braincensus.errors import OutputError
from braincensus.store import (
    Output,
    check_free,
    chunk_and_shard,
    create_output,
    downsample_region,
    open_cells,
    open_output,
    plan_pyramid,
    write_blocks_table,
    write_cells_part,
)
from braincensus_kernels.boxes import Box

SHAPE = (20, 45, 150)
VOXEL_UM = (5.0, 5.26, 5.26)
BIN_UM = (50.0, 50.0, 100.0)
LEVELS = plan_pyramid(SHAPE, VOXEL_UM)


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


def voxels() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 40, SHAPE).astype(np.uint32)
    return {"0": rng.integers(0, 65536, SHAPE).astype(np.uint16), "labels/cells/0": labels}


def write_everything(output: Output, block: tuple[int, int, int] = (16, 32, 64)) -> None:
    """Write all that a run writes before it finishes the output."""
    for name, values in voxels().items():
        chunk, shard = chunk_and_shard(block)
        output.create_array(name, shape=SHAPE, dtype=values.dtype, chunk=chunk, shard=shard)
        for box in Box.whole(SHAPE).tiles(block):
            output.write_block(name, box, values[box.slices])
    for number, level in enumerate(LEVELS[1:], start=1):
        for group, method in (("", "mean"), ("labels/cells", "nearest")):
            dtype = "uint16" if group == "" else "uint32"
            chunk, shard = chunk_and_shard(level.shape)
            name = f"{group}/{number}".lstrip("/")
            output.create_array(name, shape=level.shape, dtype=dtype, chunk=chunk, shard=shard)
            downsample_region(output, group, number, Box.whole(level.shape), method=method)  # type: ignore[arg-type]
    bins = (2, 5, 8)
    output.create_array("density/0", shape=bins, dtype="float32", chunk=bins, shard=None)
    output.write_block("density/0", Box.whole(bins), np.arange(80, dtype=np.float64).reshape(bins))
    for part in range(2):
        label = np.arange(1 + 20 * part, 21 + 20 * part)
        write_cells_part(output, part, {"label": label, "volume_um3": label * 2.5})
    write_blocks_table(output, [{"block": n, "cells_owned": 7 * n} for n in range(3)])
    output.update_provenance({"n_cells": 40})


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output just before `finalise`; not to be changed."""
    output = create_output(
        tmp_path_factory.mktemp("written") / "brain.zarr", overwrite=False, voxel_size_um=VOXEL_UM
    )
    write_everything(output)
    return output.path


@pytest.fixture
def unfinished(written: Path, tmp_path: Path) -> Output:
    return open_output(shutil.copytree(written, tmp_path / "brain.zarr"), allow_incomplete=True)


@pytest.fixture
def finished(unfinished: Output) -> Output:
    unfinished.finalise(levels=LEVELS, density_bin_um=BIN_UM)
    return unfinished


def root_attributes(path: Path) -> dict:
    return json.loads((path / "zarr.json").read_text())["attributes"]


def contents(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


# Begun, interrupted, finished


def test_begun_output_is_marked_incomplete_and_is_no_image(tmp_path):
    output = create_output(tmp_path / "a" / "b" / "out.zarr", overwrite=False, voxel_size_um=VOXEL_UM)
    assert output.status == "incomplete"
    assert set(root_attributes(output.path)) == {"braincensus"}
    with pytest.raises(OutputError, match=r"has not finished[\s\S]*recorded nothing so far[\s\S]*run again"):
        open_output(output.path)
    again = open_output(output.path, allow_incomplete=True)
    assert again == output == pickle.loads(pickle.dumps(output))


def test_everything_reads_back_once_finished(finished):
    output = open_output(str(finished.path))
    assert output.status == "complete"
    assert output.voxel_size_um == VOXEL_UM
    assert output.provenance["n_cells"] == 40
    for name, values in voxels().items():
        np.testing.assert_array_equal(output.array(name)[...], values)
    cells = open_cells(output).to_pandas()
    assert cells["label"].tolist() == list(range(1, 41))
    assert list(root_attributes(output.path)) == ["ome", "braincensus"]


@pytest.mark.parametrize("moment", ["before", "after"])
def test_death_at_any_write_of_finishing_leaves_nothing_that_looks_whole(
    written, tmp_path, monkeypatch, moment
):
    real_replace = os.replace
    whole: dict[str, bytes] = {}
    for survives in itertools.count():
        path = tmp_path / str(survives) / "brain.zarr"
        shutil.copytree(written, path)
        output = open_output(path, allow_incomplete=True)
        moves = itertools.count()

        def replace(source, target, moves=moves, survives=survives):
            last = next(moves) == survives
            if last and moment == "before":
                raise Killed
            real_replace(source, target)
            if last:
                raise Killed

        with monkeypatch.context() as patched:
            patched.setattr("braincensus.store.files.os.replace", replace)
            try:
                output.finalise(levels=LEVELS, density_bin_um=BIN_UM)
            except Killed:
                died = True
            else:
                died = False
        attributes = root_attributes(path)
        assert ("ome" in attributes) == (output.status == "complete")
        if "ome" in attributes:
            whole = whole or contents(path)
        else:
            assert died
            with pytest.raises(OutputError, match="has not finished"):
                open_output(path)
            output.finalise(levels=LEVELS, density_bin_um=BIN_UM)
            whole = whole or contents(path)
        assert contents(path) == whole
        if not died:
            break
    assert survives == 7  # six groups, then the root


def test_death_while_replacing_keeps_the_old_output_or_marks_it(finished, monkeypatch):
    real_replace = os.replace
    before = contents(finished.path)

    def die(source, target):
        raise Killed

    def die_after_first(source, target):
        monkeypatch.setattr("braincensus.store.files.os.replace", die)
        real_replace(source, target)

    monkeypatch.setattr("braincensus.store.files.os.replace", die)
    with pytest.raises(Killed):
        create_output(finished.path, overwrite=True, voxel_size_um=VOXEL_UM)
    assert contents(finished.path) == before

    monkeypatch.setattr("braincensus.store.files.os.replace", die_after_first)
    with pytest.raises(Killed):
        create_output(finished.path, overwrite=True, voxel_size_um=VOXEL_UM)
    assert set(root_attributes(finished.path)) == {"braincensus"}
    with pytest.raises(OutputError, match="has not finished"):
        open_output(finished.path)


@pytest.mark.parametrize(
    ("gone", "named"),
    [
        ("1", "brain.zarr/1/zarr.json"),
        ("labels/cells/0", "labels/cells/0/zarr.json"),
        ("density/0", "density/0/zarr.json"),
        ("tables/cells/table.parquet/part-000000.parquet", "part-000000.parquet"),
        ("tables/blocks/table.parquet", "tables/blocks/table.parquet/part-000000.parquet"),
    ],
)
def test_finishing_refuses_an_output_that_lacks_a_part(unfinished, gone, named):
    place = unfinished.path / gone
    if place.is_dir():
        shutil.rmtree(place)
    else:
        place.unlink()
    with pytest.raises(OutputError, match=named):
        unfinished.finalise(levels=LEVELS, density_bin_um=BIN_UM)
    assert unfinished.status == "incomplete"
    assert "ome" not in root_attributes(unfinished.path)


def test_finishing_refuses_levels_of_another_shape(unfinished):
    wrong = plan_pyramid((20, 45, 152), VOXEL_UM)
    with pytest.raises(OutputError, match="planned shape"):
        unfinished.finalise(levels=wrong, density_bin_um=BIN_UM)
    with pytest.raises(ValueError, match="at least one level"):
        unfinished.finalise(levels=(), density_bin_um=BIN_UM)


def test_finishing_removes_what_killed_writers_left(unfinished):
    leftovers = [
        unfinished.path / "0" / "c" / "0" / "0" / "1.0123abc.partial",
        unfinished.path / "tables" / "cells" / "table.parquet" / ".part-000001.parquet.77.partial",
    ]
    for leftover in leftovers:
        leftover.write_bytes(b"half")
    unfinished.finalise(levels=LEVELS, density_bin_um=BIN_UM)
    assert not any(leftover.exists() for leftover in leftovers)


def test_block_size_does_not_show_in_the_voxels(tmp_path):
    outputs = []
    for block in ((16, 32, 64), (20, 45, 150), (7, 11, 50)):
        output = create_output(tmp_path / f"{block[0]}.zarr", overwrite=False, voxel_size_um=VOXEL_UM)
        write_everything(output, block)
        outputs.append(output)
    for name in ("0", "1", "labels/cells/0", "labels/cells/1"):
        first = outputs[0].array(name)[...]
        for other in outputs[1:]:
            np.testing.assert_array_equal(other.array(name)[...], first)


# What may be replaced


def test_finished_and_unfinished_outputs_are_kept_unless_asked(finished, tmp_path):
    before = contents(finished.path)
    with pytest.raises(OutputError, match=r"is a finished output[\s\S]*40 cells[\s\S]*--fresh"):
        create_output(finished.path, overwrite=False, voxel_size_um=VOXEL_UM)
    assert contents(finished.path) == before
    begun = create_output(tmp_path / "begun.zarr", overwrite=False, voxel_size_um=VOXEL_UM)
    begun.update_provenance({"intensity": {}})
    with pytest.raises(OutputError, match=r"is an unfinished output[\s\S]*recorded intensity[\s\S]*--fresh"):
        create_output(begun.path, overwrite=False, voxel_size_um=VOXEL_UM)
    assert begun.provenance["intensity"] == {}


def test_overwrite_replaces_an_output_whole(finished):
    anew = create_output(finished.path, overwrite=True, voxel_size_um=(1.0, 1.0, 1.0))
    fresh = create_output(finished.path.with_name("fresh"), overwrite=False, voxel_size_um=(1.0, 1.0, 1.0))
    assert set(contents(anew.path)) == set(contents(fresh.path))
    assert anew.token != finished.token
    assert anew.voxel_size_um == (1.0, 1.0, 1.0)
    with pytest.raises(OutputError, match="no longer the output of this run"):
        finished.update_provenance({"late": 1})


def test_check_free_changes_nothing(finished, tmp_path):
    before = contents(tmp_path)
    check_free(finished.path, overwrite=True)
    check_free(tmp_path / "x" / "y.zarr", overwrite=False)
    assert contents(tmp_path) == before
    assert not (tmp_path / "x").exists()


def make_folder(path):
    path.mkdir()
    (path / "precious.txt").write_text("x")


def make_file(path):
    path.write_text("x")


def make_zarr(path):
    zarr.create_group(path, attributes={"ome": {"version": "0.5"}, "other": {"status": "complete"}})


def make_link(path):
    target = create_output(path.with_name("target.zarr"), overwrite=False, voxel_size_um=VOXEL_UM)
    path.symlink_to(target.path)


def make_dangling_link(path):
    path.symlink_to(path.with_name("nowhere"))


def make_group_of_an_output(path):
    create_output(path.parent / "of.zarr", overwrite=False, voxel_size_um=VOXEL_UM)
    shutil.copytree(path.parent / "of.zarr" / "labels", path)


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (make_folder, "is not an output of braincensus[\\s\\S]*precious.txt"),
        (make_file, "is a file"),
        (make_zarr, "is not an output of braincensus"),
        (make_link, "is a symbolic link"),
        (make_dangling_link, "is a symbolic link"),
        (make_group_of_an_output, "is not an output of braincensus"),
    ],
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_nothing_else_is_ever_replaced(tmp_path, make, problem, overwrite):
    path = tmp_path / "there"
    make(path)
    before = contents(tmp_path)
    for attempt in (
        lambda: check_free(path, overwrite=overwrite),
        lambda: create_output(path, overwrite=overwrite, voxel_size_um=VOXEL_UM),
    ):
        with pytest.raises(OutputError, match=problem):
            attempt()
    assert contents(tmp_path) == before


@pytest.mark.parametrize("added", ["labels/manual/zarr.json", "tables/regions/zarr.json", "notes.txt"])
def test_an_output_to_which_someone_added_is_not_replaced(finished, added):
    place = finished.path / added
    place.parent.mkdir(exist_ok=True)
    place.write_text("{}")
    before = contents(finished.path)
    with pytest.raises(OutputError, match="holds more than braincensus wrote"):
        create_output(finished.path, overwrite=True, voxel_size_um=VOXEL_UM)
    assert contents(finished.path) == before


def test_an_output_that_holds_the_input_is_not_replaced(finished, tmp_path):
    link = tmp_path / "input"
    link.symlink_to(finished.path / "0")
    for inside in (finished.path, finished.path / "0", link):
        with pytest.raises(OutputError, match="would remove"):
            create_output(finished.path, overwrite=True, voxel_size_um=VOXEL_UM, protect=[inside])
    assert finished.status == "complete"
    create_output(finished.path, overwrite=True, voxel_size_um=VOXEL_UM, protect=[tmp_path / "elsewhere.tif"])


def test_overwriting_does_not_follow_links_out_of_the_output(finished, tmp_path):
    outside = tmp_path / "outside"
    make_folder(outside)
    (finished.work_dir / "link").symlink_to(outside)
    finished.remove_work("link")
    assert not (finished.work_dir / "link").is_symlink()
    (finished.work_dir / "link").symlink_to(outside)
    create_output(finished.path, overwrite=True, voxel_size_um=VOXEL_UM)
    assert (outside / "precious.txt").read_text() == "x"
    assert not (finished.work_dir / "link").is_symlink()


def test_an_empty_folder_and_one_of_a_run_that_died_at_once_are_taken(tmp_path):
    (tmp_path / "empty").mkdir()
    assert create_output(tmp_path / "empty", overwrite=False, voxel_size_um=VOXEL_UM).status == "incomplete"
    (tmp_path / "died").mkdir()
    (tmp_path / "died" / ".zarr.json.12ab.partial").write_text("{")
    output = create_output(tmp_path / "died", overwrite=False, voxel_size_um=VOXEL_UM)
    assert not list(output.path.glob(".*"))


def test_places_that_cannot_be_written_are_refused_clearly(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match=r"cannot make[\s\S]*is a file"):
        create_output(tmp_path / "file" / "out.zarr", overwrite=False, voxel_size_um=VOXEL_UM)
    for url in ("s3://bucket/out.zarr", Path("gs://bucket/out.zarr")):
        with pytest.raises(OutputError, match="not a path of this machine"):
            create_output(url, overwrite=False, voxel_size_um=VOXEL_UM)
    monkeypatch.setattr("braincensus.store.places.os.access", lambda *_: False)
    with pytest.raises(OutputError, match="cannot be written"):
        create_output(tmp_path / "out.zarr", overwrite=False, voxel_size_um=VOXEL_UM)
    assert not (tmp_path / "out.zarr").exists()


def test_a_full_disk_is_said_and_leaves_no_half_file(unfinished, monkeypatch):
    def full(source, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    before = contents(unfinished.path)
    monkeypatch.setattr("braincensus.store.files.os.replace", full)
    for attempt in (
        lambda: unfinished.write_work("partials/0", {"a": np.zeros(3)}),
        lambda: unfinished.update_provenance({"a": 1}),
        lambda: write_cells_part(unfinished, 9, {"label": np.arange(3)}),
    ):
        with pytest.raises(OutputError, match=r"No space left[\s\S]*is full[\s\S]*free some space"):
            attempt()
    assert contents(unfinished.path) == before


def test_opening_what_is_not_an_output_says_so(finished, tmp_path):
    with pytest.raises(OutputError, match="there is no output"):
        open_output(tmp_path / "nothing")
    for other in (finished.path / "labels", finished.path / "zarr.json", tmp_path):
        with pytest.raises(OutputError, match="is not an output of braincensus"):
            open_output(other)


# Provenance and working files


def test_provenance_holds_json_and_nothing_of_the_store_is_lost(unfinished):
    unfinished.update_provenance(
        {
            "a": np.float32(0.5),
            "b": {"deep": (1, np.int64(2)), "nan": float("nan"), 3: Path("/x")},
            "c": np.array([[1.0, np.inf]]),
            "d": True,
        }
    )
    unfinished.update_provenance({"a": "replaced"})
    provenance = unfinished.provenance
    assert provenance["a"] == "replaced"
    assert provenance["b"] == {"deep": [1, 2], "nan": None, "3": "/x"}
    assert provenance["c"] == [[1.0, None]]
    assert provenance["d"] is True
    assert provenance["n_cells"] == 40
    for reserved in ("status", "token", "voxel_size_um"):
        with pytest.raises(ValueError, match=reserved):
            unfinished.update_provenance({reserved: "x"})
    before = contents(unfinished.path)
    with pytest.raises(TypeError, match="cannot hold"):
        unfinished.update_provenance({"x": object()})
    assert contents(unfinished.path) == before


def test_provenance_from_several_threads_keeps_every_entry(unfinished):
    threads = [threading.Thread(target=unfinished.update_provenance, args=({f"k{n}": n},)) for n in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {name: value for name, value in unfinished.provenance.items() if name.startswith("k")} == {
        f"k{n}": n for n in range(12)
    }


def test_working_files_come_back_and_go(unfinished):
    arrays = {
        "seed": np.arange(5, dtype=np.int64),
        "moments": np.random.default_rng(0).random((5, 6)),
        "empty": np.zeros((0, 3), dtype=np.uint16),
        "scalar": np.float32(3),
        "fortran": np.asfortranarray(np.arange(6).reshape(2, 3)),
    }
    unfinished.write_work("partials/0000001", arrays)
    found = unfinished.read_work("partials/0000001")
    assert list(found) == list(arrays)
    for name, values in arrays.items():
        np.testing.assert_array_equal(found[name], values)
        assert found[name].dtype == np.asarray(values).dtype
    unfinished.write_map("seeds", arrays["seed"])
    assert isinstance(unfinished.map_work("seeds"), np.memmap)
    np.testing.assert_array_equal(unfinished.map_work("seeds"), arrays["seed"])
    unfinished.write_map("none", arrays["empty"])
    assert unfinished.map_work("none").shape == (0, 3)
    unfinished.create_array("braincensus/local", shape=(4, 4, 4), dtype="u4", chunk=(4, 4, 4), shard=None)
    unfinished.remove_work("partials", "seeds.npy", "none.npy", "local", "never-there")
    assert [entry.name for entry in unfinished.work_dir.iterdir()] == ["zarr.json"]
    for outside in ("../0", "/etc/passwd", "a/../../x", ""):
        with pytest.raises(ValueError, match="path inside the output"):
            unfinished.remove_work(outside)


def test_a_map_for_which_there_is_no_room_is_an_error(unfinished):
    """In a process of its own, whose files may not grow."""
    code = (
        "import resource, sys, numpy as np; from braincensus.store import open_output\n"
        "output = open_output(sys.argv[1], allow_incomplete=True)\n"
        "output.write_map('small', np.arange(8))\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (600, -1))\n"
        "output.write_map('large', np.arange(1000))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, str(unfinished.path)], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 1
    assert "OutputError: cannot write" in ran.stderr
    assert "File too large" in ran.stderr
    assert unfinished.map_work("small").tolist() == list(range(8))
    assert not list(unfinished.work_dir.glob("*large*"))


def test_missing_and_damaged_working_files_are_named(unfinished):
    with pytest.raises(OutputError, match=r"lacks .*partials/7\.safetensors"):
        unfinished.read_work("partials/7")
    with pytest.raises(OutputError, match=r"lacks .*seeds\.npy"):
        unfinished.map_work("seeds")
    unfinished.write_work("w", {"a": np.arange(1000)})
    unfinished.write_map("m", np.arange(1000))
    for name, read in (("w.safetensors", unfinished.read_work), ("m.npy", unfinished.map_work)):
        file = unfinished.work_dir / name
        good = file.read_bytes()
        for kept in (0, 5, len(good) // 2, len(good) - 1):
            file.write_bytes(good[:kept])
            with pytest.raises(OutputError, match=f"cannot read .*{name}"):
                read(name[0])
    file = unfinished.work_dir / "w.safetensors"
    unfinished.write_work("w", {"a": np.arange(1000)})
    flipped = bytearray(file.read_bytes())
    flipped[-500] ^= 1
    file.write_bytes(flipped)
    with pytest.raises(OutputError, match="checksum"):
        unfinished.read_work("w")
    with pytest.raises(ValueError, match="pickle"):
        unfinished.write_work("objects", {"a": np.array([object()])})
    assert not (unfinished.work_dir / "objects.safetensors").exists()


# What others read


def test_ome_zarr_reads_image_and_labels(finished):
    from ome_zarr.io import parse_url
    from ome_zarr.reader import Reader

    nodes = {str(node.zarr): node for node in Reader(parse_url(finished.path))()}
    image, _, labels = nodes.values()
    assert [type(spec).__name__ for spec in labels.specs] == ["Label", "Multiscales"]
    np.testing.assert_array_equal(image.data[0].compute(), voxels()["0"])
    np.testing.assert_array_equal(labels.data[0].compute(), voxels()["labels/cells/0"])
    assert [data.shape for data in image.data] == [level.shape for level in LEVELS]
    assert image.metadata["contrast_limits"] == [[0.0, 65535.0]]
    assert image.metadata["channel_names"] == ["foreground probability"]
    (density,) = Reader(parse_url(finished.path / "density"))()
    assert density.data[0].shape == (2, 5, 8)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_ngio_reads_images_labels_and_tables_and_changes_nothing(finished):
    import ngio

    before = contents(finished.path)
    container = ngio.open_ome_zarr_container(finished.path)
    assert container.levels == len(LEVELS) == 2
    assert container.list_labels() == ["cells"]
    assert sorted(container.list_tables()) == ["blocks", "cells"]
    size = container.get_image().pixel_size
    assert (size.z, size.y, size.x) == VOXEL_UM
    np.testing.assert_array_equal(container.get_image().get_as_numpy(), voxels()["0"])
    label = container.get_label("cells")
    np.testing.assert_array_equal(label.get_as_numpy(), voxels()["labels/cells/0"])
    table = container.get_table("cells")
    assert table.table_type() == "feature_table"
    assert table.reference_label == "cells"
    assert table.dataframe.index.name == "label"
    assert table.dataframe.index.tolist() == list(range(1, 41))
    assert table.dataframe["volume_um3"].tolist() == [2.5 * n for n in range(1, 41)]
    blocks = container.get_table("blocks")
    assert blocks.table_type() == "generic_table"
    assert blocks.dataframe["cells_owned"].to_dict() == {0: 0, 1: 7, 2: 14}
    density = ngio.open_ome_zarr_container(finished.path / "density").get_image()
    assert (density.pixel_size.z, density.pixel_size.y, density.pixel_size.x) == BIN_UM
    assert contents(finished.path) == before


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_napari_shows_image_and_labels_in_place(finished):
    from napari_ome_zarr import napari_get_reader

    before = contents(finished.path)
    layers = napari_get_reader(str(finished.path))(str(finished.path))
    assert [kind for _, _, kind in layers] == ["image", "labels"]
    for (data, options, _), values in zip(layers, voxels().values(), strict=True):
        assert tuple(options["scale"]) == VOXEL_UM
        np.testing.assert_array_equal(np.asarray(data[0]), values)
    place = str(finished.path / "density")
    ((data, options, kind),) = napari_get_reader(place)(place)
    assert data[0].shape == (2, 5, 8)
    assert kind == "image"
    assert tuple(options["scale"]) == BIN_UM
    assert options["contrast_limits"] == [0.0, 79.0]
    assert contents(finished.path) == before


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_specification_holds(finished):
    from ome_zarr_models import open_ome_zarr
    from ome_zarr_models.v05 import Image, ImageLabel, Labels

    for group, model in (("", Image), ("density", Image), ("labels", Labels), ("labels/cells", ImageLabel)):
        found = open_ome_zarr(zarr.open_group(finished.path / group, mode="r"), version="0.5")
        assert type(found) is model
    for array in (finished.path).rglob("zarr.json"):
        metadata = json.loads(array.read_text())
        if metadata["node_type"] == "array":
            assert metadata["dimension_names"] == ["z", "y", "x"]


def test_grids_share_the_corner_of_the_volume(finished):
    def corners(group: str) -> list[np.ndarray]:
        ome = json.loads((finished.path / group / "zarr.json").read_text())["attributes"]["ome"]
        found = []
        for dataset in ome["multiscales"][0]["datasets"]:
            scale, translation = dataset["coordinateTransformations"]
            found.append(np.array(translation["translation"]) - np.array(scale["scale"]) / 2)
        return found

    for group in ("", "labels/cells", "density"):
        for corner in corners(group):
            np.testing.assert_allclose(corner, -np.array(VOXEL_UM) / 2, atol=1e-9)
