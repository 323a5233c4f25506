"""Stores made to do harm: sizes that no memory holds, chunks that explode, paths that lead outside.

What could take memory is opened in a process that may have only so much, so that a test fails instead of the
machine.
"""

from __future__ import annotations

import gzip
import json
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import zarr
from numcodecs import blosc, lz4, zstd

from braincensus import InputError
from braincensus.volume import open_volume

GIB = 2**30
SHAPE = (16, 32, 32)

_READ = """
import resource, sys
from braincensus.errors import BraincensusError
from braincensus.volume import open_volume
import braincensus.census, zarr.codecs
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with open("/proc/self/statm") as file:
    mapped = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (mapped + int(sys.argv[2]), -1))
try:
    volume = open_volume(sys.argv[1], voxel_size_um=5.0, scratch=sys.argv[3])
    print("read", volume.read(volume.box).sum())
except BraincensusError as err:
    print(f"{type(err).__name__}: {err}")
print("MiB", (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def read_in_little_memory(source: Path, scratch: Path, n_bytes: int = GIB) -> tuple[str, int]:
    """Read a source in a process with so much memory; return what it said, and the MiB that it took."""
    ran = subprocess.run(
        [sys.executable, "-c", _READ, str(source), str(n_bytes), str(scratch)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    said, _, mib = ran.stdout.rpartition("MiB ")
    return said, int(mib)


def write(path: Path, compressor: Any = "auto", zarr_format: Any = 3) -> np.ndarray:
    voxels = np.random.default_rng(0).integers(0, 999, SHAPE).astype(np.uint16)
    zarr.create_array(path, data=voxels, chunks=SHAPE, compressors=compressor, zarr_format=zarr_format)
    return voxels


ZEROS = bytes(GIB + 2**20)


def _zstd_without_size() -> bytes:
    """A frame that does not say its size: 10,000 blocks of 128 KiB, each one byte repeated."""
    block = struct.pack("<I", 1 << 1 | 2**17 << 3)[:3] + b"\0"
    last = struct.pack("<I", 1 | 1 << 1 | 2**17 << 3)[:3] + b"\0"
    return b"\x28\xb5\x2f\xfd\x00\x50" + block * 9_999 + last


BOMBS = {
    "zstd": (zarr.codecs.ZstdCodec(), lambda: bytes(zstd.compress(ZEROS, 1))),
    "zstd, size not said": (zarr.codecs.ZstdCodec(), _zstd_without_size),
    "gzip": (zarr.codecs.GzipCodec(), lambda: gzip.compress(ZEROS, 1)),
    "blosc": (zarr.codecs.BloscCodec(), lambda: bytes(blosc.compress(ZEROS, b"zstd", 1, 1))),
    "crc32c over zstd": (
        [zarr.codecs.ZstdCodec(), zarr.codecs.Crc32cCodec()],
        lambda: bytes(zstd.compress(ZEROS, 1)) + b"\0\0\0\0",
    ),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_chunk_that_explodes(kind: str, tmp_path: Path) -> None:
    codec, bomb = BOMBS[kind]
    path = tmp_path / "bomb.zarr"
    write(path, codec)
    (path / "c" / "0" / "0" / "0").write_bytes(bomb())
    said, mib = read_in_little_memory(path, tmp_path)
    assert "InputError" in said
    assert "c/0/0/0" in said
    assert "would become at least" in said
    assert mib < 200


@pytest.mark.parametrize("codec", ["zlib", "lz4"])
def test_a_chunk_of_version_2_that_explodes(codec: str, tmp_path: Path) -> None:
    import numcodecs

    path = tmp_path / "bomb.zarr"
    write(path, {"zlib": numcodecs.Zlib(), "lz4": numcodecs.LZ4()}[codec], 2)
    (path / "0.0.0").write_bytes(zlib.compress(ZEROS, 1) if codec == "zlib" else lz4.compress(ZEROS))
    said, mib = read_in_little_memory(path, tmp_path)
    assert "InputError" in said
    assert "would become at least" in said
    assert mib < 200


@pytest.mark.parametrize(
    "codec",
    [
        zarr.codecs.ZstdCodec(level=9),
        zarr.codecs.GzipCodec(level=9),
        zarr.codecs.BloscCodec(),
        [zarr.codecs.BloscCodec(), zarr.codecs.Crc32cCodec()],
        [zarr.codecs.ZstdCodec(checksum=True)],
        None,
    ],
)
@pytest.mark.parametrize("fill", [0, 7, None])
def test_honest_chunks_are_read(codec: Any, fill: int | None, tmp_path: Path) -> None:
    """Even those that compress best: all voxels alike."""
    path = tmp_path / "honest.zarr"
    voxels = np.random.default_rng(0).integers(0, 999, (40, 64, 64)).astype(np.uint16)
    if fill is not None:
        voxels[:] = fill
    array: Any = zarr.create_array(
        path, shape=voxels.shape, dtype="uint16", chunks=(40, 64, 64), compressors=codec, fill_value=3
    )
    array[...] = voxels
    volume = open_volume(path, voxel_size_um=5.0)
    np.testing.assert_array_equal(volume.read(volume.box), voxels)


def _edit(path: Path, **changes: Any) -> None:
    document = json.loads((path / "zarr.json").read_text())
    document.update(changes)
    (path / "zarr.json").write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": [10**6, 10**6, 10**6]}, "impossible size"),
        ({"shape": [-4, 32, 32]}, r"impossible size|cannot open"),
        ({"shape": [2**63, 2, 2]}, "impossible size"),
        (
            {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [10**4, 10**4, 10**4]}}},
            "impossible chunks",
        ),
        (
            {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [0, 1, 1]}}},
            "chunks|cannot open",
        ),
        ({"data_type": "r99999999999"}, "cannot open"),
    ],
)
def test_sizes_that_no_memory_holds(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "huge.zarr"
    write(path)
    _edit(path, **changes)
    with pytest.raises(InputError, match=message):
        open_volume(path, voxel_size_um=5.0)


def test_a_huge_npy_header(tmp_path: Path) -> None:
    path = tmp_path / "huge.npy"
    write_voxels = np.zeros((4, 4, 4), np.uint16)
    np.save(path, write_voxels)
    content = path.read_bytes()
    wide = content.replace(b"(4, 4, 4), }" + b" " * 14, b"(4000000, 4000000, 4), }  ")
    assert wide != content
    path.write_bytes(wide)
    with pytest.raises(InputError, match=r"truncated|impossible"):
        open_volume(path, voxel_size_um=5.0)


# TIFF: tags that lie


def tag(path: Path, code: int, value: int, *, page: int = 0) -> None:
    """Overwrite the value of a tag of a little-endian classic TIFF, in place."""
    with tifffile.TiffFile(path) as tif:
        found = tif.pages[page].tags[code]
        offset = found.offset
    with path.open("r+b") as file:
        file.seek(offset + 2)
        file.write(struct.pack("<HII", 4, 1, value % 2**32))


@pytest.mark.parametrize(
    ("code", "value"),
    [
        (257, 2**31),  # ImageLength
        (256, 2**31),  # ImageWidth
        (279, 2**31),  # StripByteCounts beyond the file
        (273, 2**31),  # StripOffsets beyond the file
        (258, 65535),  # BitsPerSample
        (258, 0),
        (278, 2**31),  # RowsPerStrip
        (277, 2**31),  # SamplesPerPixel
        (259, 65000),  # Compression unknown
    ],
)
@pytest.mark.parametrize("compression", [None, "zlib"])
def test_tags_that_lie(code: int, value: int, compression: str | None, tmp_path: Path) -> None:
    path = tmp_path / "lie.tif"
    planes = np.arange(4 * 32 * 32, dtype=np.uint16).reshape(4, 32, 32)
    with tifffile.TiffWriter(path, byteorder="<") as tif:
        for plane in planes:
            tif.write(plane, compression=compression, metadata=None, contiguous=False)
    tag(path, code, value)
    said, mib = read_in_little_memory(path, tmp_path / "scratch")
    # A lie may be seen through; or the page is none of the stack's, which a note says. Never other voxels.
    true = (f"read {planes.sum()}\n", f"read {planes[1:].sum()}\n")
    assert "InputError" in said or said in true
    assert mib < 400


def test_pages_in_a_circle(tmp_path: Path) -> None:
    path = tmp_path / "circle.tif"
    with tifffile.TiffWriter(path, byteorder="<") as tif:
        for _ in range(3):
            tif.write(np.ones((32, 32), np.uint16), metadata=None, contiguous=False)
    with tifffile.TiffFile(path) as tif:
        first, last = tif.pages[0].offset, tif.pages[2]
        end = last.offset + 2 + 12 * len(last.tags)
    with path.open("r+b") as file:
        file.seek(end)
        file.write(struct.pack("<I", first))
    said, mib = read_in_little_memory(path, tmp_path / "scratch")
    assert "InputError" in said or said == f"read {3 * 32 * 32}\n"
    assert mib < 200


def test_a_plane_that_explodes(tmp_path: Path) -> None:
    path = tmp_path / "bomb.tif"
    with tifffile.TiffWriter(path, byteorder="<") as tif:
        for _ in range(3):
            tif.write(np.ones((32, 32), np.uint16), metadata=None, contiguous=False, compression="zlib")
    with tifffile.TiffFile(path) as tif:
        assert len(tif.pages[1].dataoffsets) == 1
    bomb, at = zlib.compress(ZEROS, 1), path.stat().st_size
    with path.open("ab") as file:
        file.write(bomb)
    tag(path, 273, at, page=1)
    tag(path, 279, len(bomb), page=1)
    said, mib = read_in_little_memory(path, tmp_path / "scratch")
    assert "InputError" in said or said.startswith("read ")
    assert mib < 400


# Paths


@pytest.mark.parametrize("name", ["../secret", "/etc", "a/../../secret", "..", "", ".", "a\\..\\b", 7, None])
def test_a_level_is_inside_its_store(name: Any, tmp_path: Path) -> None:
    write(tmp_path / "secret")
    store = tmp_path / "image.zarr"
    zarr.open_group(store, mode="w").attrs["ome"] = {
        "version": "0.5",
        "multiscales": [{"datasets": [{"path": name}], "axes": [{"name": n} for n in "zyx"]}],
    }
    with pytest.raises(InputError, match="names a level outside the store"):
        open_volume(store, voxel_size_um=5.0)


def test_a_level_that_is_a_link_out_of_the_store(tmp_path: Path) -> None:
    write(tmp_path / "secret")
    store = tmp_path / "image.zarr"
    zarr.open_group(store, mode="w").attrs["ome"] = {
        "version": "0.5",
        "multiscales": [{"datasets": [{"path": "0"}], "axes": [{"name": n} for n in "zyx"]}],
    }
    (store / "0").symlink_to(tmp_path / "secret")
    with pytest.raises(InputError, match="outside the store"):
        open_volume(store, voxel_size_um=5.0)


def test_names_of_channels_are_only_shown(tmp_path: Path) -> None:
    """They reach messages, as they are, and no path."""
    store = tmp_path / "image.zarr"
    group: Any = zarr.open_group(store, mode="w")
    group.attrs["ome"] = {
        "version": "0.5",
        "omero": {"channels": [{"label": "../../x"}, {"label": "[bold]y"}]},
        "multiscales": [{"datasets": [{"path": "0"}], "axes": [{"name": n} for n in "czyx"]}],
    }
    group.create_array("0", data=np.ones((2, *SHAPE), np.uint16))
    with pytest.raises(ValueError, match=r"0 \.\./\.\./x, 1 \[bold\]y"):
        open_volume(store, voxel_size_um=5.0, channel=5)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["image.zarr"]
