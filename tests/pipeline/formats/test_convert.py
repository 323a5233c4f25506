"""The chunked copy: bounded, resumed, shared, and never half there."""

from __future__ import annotations

import fcntl
import multiprocessing
import shutil
import subprocess
import sys
import time
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tifffile
import zarr

from braincensus.errors import InputError, OutputError, PlanError
from braincensus.formats import convert
from braincensus.volume import open_volume


class Interrupted(BaseException):
    """Stands for Ctrl-C or a signal."""


@pytest.fixture
def compressed(tmp_path, voxels):
    tifffile.imwrite(tmp_path / "a.tif", voxels(), compression="zlib", metadata=None)
    return tmp_path / "a.tif"


@pytest.fixture
def slabs_of_4(monkeypatch):
    monkeypatch.setattr(convert, "SLAB_BYTES", 4 * 50 * 60 * 2)


def test_planes_stream_in_slabs(tmp_path, voxels, compressed, slabs_of_4, monkeypatch):
    seen = []
    volume = open_volume(
        compressed,
        voxel_size_um=1,
        scratch=tmp_path / "s",
        progress=lambda what, done, total: seen.append(done),
    )
    assert seen == [planes * 50 * 60 for planes in (0, 4, 8, 12, 16, 20)]
    assert volume.chunks == (4, 50, 60)
    np.testing.assert_array_equal(volume.read(volume.box), voxels())


@pytest.mark.parametrize(
    ("shape", "slab", "chunks", "shards"),
    [
        ((20, 50, 60), 20, (20, 50, 60), None),
        ((3000, 6000, 6000), 7, (7, 256, 256), (7, 256, 6144)),
        ((3000, 300, 2000), 64, (64, 256, 256), (64, 256, 1024)),
        ((3, 100_000, 100_000), 1, (1, 256, 256), (1, 256, 65536)),
    ],
)
def test_layout_bounds_memory_and_files(shape, slab, chunks, shards):
    assert convert._layout(shape, np.dtype(np.uint16)) == (slab, chunks, shards)


def test_wide_volumes_are_sharded_exactly(tmp_path, voxels):
    data = voxels((5, 300, 700))
    tifffile.imwrite(tmp_path / "a.tif", data, compression="zlib")
    volume = open_volume(tmp_path / "a.tif", voxel_size_um=1, scratch=tmp_path / "s")
    assert zarr.open_array(volume.reader.root, mode="r").shards == (5, 512, 768)
    np.testing.assert_array_equal(volume.read(volume.box), data)


def test_an_interrupted_copy_is_continued(tmp_path, voxels, compressed, slabs_of_4):
    def interrupt(what, done, total):
        if done == 12 * 50 * 60:
            raise Interrupted

    with pytest.raises(Interrupted):
        open_volume(compressed, voxel_size_um=1, scratch=tmp_path / "s", progress=interrupt)
    assert not list(tmp_path.glob("s/*.zarr"))
    (partial,) = tmp_path.glob("s/*.partial")
    first = zarr.open_array(partial, mode="r+")
    first[0, 0, 0] = 12345  # shows that the first slab is not made again
    seen = []
    volume = open_volume(
        compressed,
        voxel_size_um=1,
        scratch=tmp_path / "s",
        progress=lambda what, done, total: seen.append(done),
    )
    assert seen == [planes * 50 * 60 for planes in (12, 16, 20)]
    expected = voxels()
    expected[0, 0, 0] = 12345
    np.testing.assert_array_equal(volume.read(volume.box), expected)
    assert not list(tmp_path.glob("s/*.partial"))


def test_a_damaged_partial_copy_is_started_again(tmp_path, voxels, compressed, slabs_of_4):
    def interrupt(what, done, total):
        if done:
            raise Interrupted

    with pytest.raises(Interrupted):
        open_volume(compressed, voxel_size_um=1, scratch=tmp_path / "s", progress=interrupt)
    (partial,) = tmp_path.glob("s/*.partial")
    (partial / "zarr.json").write_text("{")
    volume = open_volume(compressed, voxel_size_um=1, scratch=tmp_path / "s")
    np.testing.assert_array_equal(volume.read(volume.box), voxels())


def _open(path, scratch):
    volume = open_volume(path, voxel_size_um=1, scratch=scratch)
    return volume.reader.root, int(volume.read(volume.box).sum(dtype=np.int64))


def test_several_processes_make_one_copy(tmp_path, voxels, compressed):
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        results = pool.starmap(_open, [(compressed, tmp_path / "s")] * 4)
    assert set(results) == {(results[0][0], int(voxels().sum(dtype=np.int64)))}
    assert len(list((tmp_path / "s").glob("*.zarr"))) == 1


def test_a_copy_that_lost_a_chunk_is_an_error_and_is_made_again(tmp_path, voxels):
    data = voxels((6, 300, 300))
    data[:] = 0  # as the fill value: written all the same
    tifffile.imwrite(tmp_path / "a.tif", data, compression="zlib", metadata=None)
    volume = open_volume(tmp_path / "a.tif", voxel_size_um=1, scratch=tmp_path / "s")
    np.testing.assert_array_equal(volume.read(volume.box), data)
    (tmp_path / "s" / volume.reader.root / "c" / "0" / "0" / "0").unlink()
    with pytest.raises(InputError, match=r"c/0/0/0 is missing(.|\n)*will be made again"):
        volume.read(volume.box)
    again = open_volume(tmp_path / "a.tif", voxel_size_um=1, scratch=tmp_path / "s")
    np.testing.assert_array_equal(again.read(again.box), data)


PEAKS = """
import sys, tracemalloc
from pathlib import Path
import numpy as np
import tifffile
from braincensus.formats import convert
from braincensus.volume import open_volume

folder = Path(sys.argv[1])
convert.SLAB_BYTES = 4 * 512 * 512 * 2
for number, planes in enumerate((16, 16, 64)):  # the first one warms caches up
    path = folder / f"{number}.tif"
    tifffile.imwrite(path, np.ones((planes, 512, 512), np.uint16), compression="zlib", metadata=None)
    tracemalloc.start()
    open_volume(path, voxel_size_um=1, scratch=folder / "s")
    print(tracemalloc.get_traced_memory()[1])
    tracemalloc.stop()
"""


def test_memory_follows_the_slab_not_the_stack(tmp_path):
    """In a process of its own: what other tests' threads allocate meanwhile would count, too."""
    run = subprocess.run([sys.executable, "-c", PEAKS, tmp_path], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    peaks = [int(peak) for peak in run.stdout.split()]
    assert peaks[2] < 1.25 * peaks[1]
    assert peaks[2] < 64 * 512 * 512 * 2 / 2


def test_a_copy_in_the_making_is_waited_for(tmp_path, voxels, compressed):
    scratch = tmp_path / "s"
    root = Path(open_volume(compressed, voxel_size_um=1, scratch=scratch).reader.root)
    shutil.rmtree(root)
    with root.with_suffix(".lock").open("w") as lock, ThreadPoolExecutor(1) as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)
        waiting = pool.submit(open_volume, compressed, voxel_size_um=1, scratch=scratch)
        time.sleep(0.5)
        assert not waiting.done()
        assert not root.exists()
        fcntl.flock(lock, fcntl.LOCK_UN)
        volume = waiting.result(timeout=60)
    np.testing.assert_array_equal(volume.read(volume.box), voxels())


def test_where_copies_go(tmp_path, compressed, monkeypatch):
    monkeypatch.delenv(convert.SCRATCH_VARIABLE, raising=False)
    assert open_volume(compressed, voxel_size_um=1).reader.root.startswith(
        str(tmp_path / ".braincensus-scratch")
    )
    monkeypatch.setenv(convert.SCRATCH_VARIABLE, str(tmp_path / "elsewhere"))
    assert open_volume(compressed, voxel_size_um=1).reader.root.startswith(str(tmp_path / "elsewhere"))
    volume = open_volume(compressed, voxel_size_um=1, scratch=tmp_path / "given")
    assert volume.reader.root.startswith(str(tmp_path / "given"))
    assert any(volume.reader.root in note for note in volume.notes)


def test_a_full_disk_is_refused_before_anything_is_written(tmp_path, compressed, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(convert.shutil, "disk_usage", lambda path: usage(10**6, 10**6 - 1000, 1000))
    with pytest.raises(PlanError, match=r"too little disk space(.|\n)*BRAINCENSUS_SCRATCH"):
        open_volume(compressed, voxel_size_um=1, scratch=tmp_path / "s")
    assert not list(tmp_path.glob("s/*.partial"))


def test_a_disk_that_fills_up_is_an_output_error(tmp_path, compressed, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(convert.zarr, "create_array", full)
    with pytest.raises(OutputError, match="a full disk"):
        open_volume(compressed, voxel_size_um=1, scratch=tmp_path / "s")


def test_a_scratch_that_cannot_be_a_folder(tmp_path, compressed):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="scratch folder"):
        open_volume(compressed, voxel_size_um=1, scratch=tmp_path / "file")
