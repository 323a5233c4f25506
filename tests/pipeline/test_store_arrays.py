"""Blocks of voxels: one writer per shard, at once from anywhere; damage named, never read as voxels."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from braincensus.errors import OutputError
from braincensus.store import Output, arrays, chunk_and_shard, create_output
from braincensus_kernels.boxes import Box

SHAPE, SHARD, CHUNK = (20, 50, 70), (8, 32, 64), (4, 32, 16)


@pytest.fixture
def output(tmp_path: Path) -> Output:
    output = create_output(tmp_path / "out.zarr", overwrite=False, voxel_size_um=(5.0, 1.0, 1.0))
    output.create_array("0", shape=SHAPE, dtype="uint16", chunk=CHUNK, shard=SHARD)
    return output


def some_voxels(dtype: str = "uint16", shape: tuple[int, int, int] = SHAPE) -> np.ndarray:
    return np.random.default_rng(1).integers(1, 60000, shape).astype(dtype)


@given(st.tuples(*[st.integers(1, 1100)] * 3))
def test_chunks_divide_the_block_and_lie_near_the_wanted_range(block):
    chunk, shard = chunk_and_shard(block)
    assert shard == block
    for side, whole in zip(chunk, block, strict=True):
        assert whole % side == 0
        in_range = [n for n in range(64, 129) if whole % n == 0]
        if in_range:
            assert side == in_range[0]


@pytest.mark.parametrize(
    ("block", "side"), [(48, 48), (96, 96), (128, 64), (512, 64), (131, 131), (1, 1), (254, 127)]
)
def test_chunk_side(block, side):
    assert chunk_and_shard((block,) * 3)[0] == (side,) * 3


def test_what_is_written_block_by_block_comes_back_in_any_box(output):
    values = some_voxels()
    assert not output.read_block("0", Box.whole(SHAPE)).any()
    for box in Box.whole(SHAPE).tiles(SHARD):
        output.write_block("0", box, values[box.slices])
    np.testing.assert_array_equal(output.read_block("0", Box.whole(SHAPE)), values)
    odd = Box((7, 31, 3), (9, 50, 66))
    np.testing.assert_array_equal(output.read_block("0", odd), values[odd.slices])
    assert output.read_block("0", Box((3, 3, 3), (3, 5, 5))).shape == (0, 2, 2)
    several = Box((0, 32, 0), (16, 50, 70))
    output.write_block("0", several, values[several.slices] + 1)
    np.testing.assert_array_equal(output.array("0")[several.slices], values[several.slices] + 1)


@pytest.mark.parametrize(
    "box",
    [
        Box((0, 0, 0), (4, 32, 64)),
        Box((4, 0, 0), (8, 32, 64)),
        Box((0, 0, 0), (8, 32, 70 - 1)),
        Box((0, 31, 0), (8, 50, 70)),
        Box((0, 0, 0), (8, 32, 16)),
    ],
)
def test_a_box_that_cuts_a_shard_is_refused_and_changes_nothing(output, box):
    before = some_voxels()
    output.write_block("0", Box.whole(SHAPE), before)
    with pytest.raises(ValueError, match="whole shards"):
        output.write_block("0", box, np.zeros(box.shape, np.uint16))
    np.testing.assert_array_equal(output.array("0")[...], before)


def test_boxes_outside_and_values_that_do_not_fit_are_refused(output):
    outside = Box((16, 32, 64), (24, 64, 128))
    with pytest.raises(ValueError, match="not inside"):
        output.write_block("0", outside, np.zeros(outside.shape, np.uint16))
    with pytest.raises(ValueError, match="not inside"):
        output.read_block("0", outside)
    box = Box((0, 0, 0), SHARD)
    with pytest.raises(ValueError, match="values of shape"):
        output.write_block("0", box, np.zeros((1, 1, 1), np.uint16))
    for dtype in ("uint32", "int16", "float32", "int64"):
        with pytest.raises(TypeError, match="would lose"):
            output.write_block("0", box, np.zeros(box.shape, dtype))
    output.write_block("0", box, np.full(box.shape, 7, np.uint8))
    assert (output.read_block("0", box) == 7).all()
    with pytest.raises(ValueError, match="mode"):
        output.array("0", "w")
    with pytest.raises(OutputError, match=r"lacks .*nothing/zarr\.json"):
        output.read_block("nothing", box)


def test_float_maps_may_be_rounded_and_labels_may_not(output):
    output.create_array("density/0", shape=(2, 2, 2), dtype="float32", chunk=(2, 2, 2), shard=None)
    output.write_block("density/0", Box.whole((2, 2, 2)), np.full((2, 2, 2), 0.1))
    assert output.array("density/0")[0, 0, 0] == np.float32(0.1)
    output.create_array("labels/cells/0", shape=(2, 2, 2), dtype="uint32", chunk=(2, 2, 2), shard=(2, 2, 2))
    with pytest.raises(TypeError, match="would lose"):
        output.write_block("labels/cells/0", Box.whole((2, 2, 2)), np.ones((2, 2, 2), np.uint64))


def test_an_array_that_exists_is_kept_or_refused(output):
    values = some_voxels()
    output.write_block("0", Box.whole(SHAPE), values)
    same = {"shape": SHAPE, "dtype": "uint16", "chunk": CHUNK, "shard": SHARD}
    output.create_array("0", **same)
    np.testing.assert_array_equal(output.array("0")[...], values)
    changes = (
        {"dtype": "uint32"},
        {"shape": (20, 50, 71)},
        {"shard": (4, 32, 64)},
        {"shard": None},
        {"fill_value": 1},
    )
    for change in changes:
        with pytest.raises(OutputError, match="is another array"):
            output.create_array("0", **(same | change))
    with pytest.raises(ValueError, match="do not divide"):
        output.create_array("1", shape=SHAPE, dtype="u1", chunk=(3, 3, 3), shard=(8, 8, 8))
    assert output.status == "incomplete"  # making arrays leaves the root's attributes alone


def test_stored_sharded_compressed_and_checked(output):
    codecs = output.array("0").metadata.to_dict()["codecs"]
    assert [codec["name"] for codec in codecs] == ["sharding_indexed"]
    inner = codecs[0]["configuration"]["codecs"]
    assert [codec["name"] for codec in inner] == ["bytes", "blosc", "crc32c"]
    blosc = inner[1]["configuration"]
    assert (blosc["cname"], blosc["clevel"], blosc["shuffle"]) == ("zstd", 3, "bitshuffle")
    output.write_block("0", Box.whole(SHAPE), np.zeros(SHAPE, np.uint16))
    assert not list((output.path / "0").glob("c/**/*")), "empty shards are not stored"


def test_threads_and_processes_write_their_shards_at_once(output):
    values = some_voxels(shape=(64, 64, 64))
    boxes = list(Box.whole((64, 64, 64)).tiles((16, 16, 16)))
    spawn = multiprocessing.get_context("spawn")
    for name, pool in (
        ("threads", ThreadPoolExecutor(8)),
        ("processes", ProcessPoolExecutor(2, mp_context=spawn)),
    ):
        output.create_array(name, shape=(64, 64, 64), dtype="uint16", chunk=(8, 8, 8), shard=(16, 16, 16))
        with pool:
            waiting = [pool.submit(output.write_block, name, box, values[box.slices]) for box in boxes]
            for task in waiting:
                task.result()
        np.testing.assert_array_equal(output.read_block(name, Box.whole((64, 64, 64))), values)


def damaged(good: bytes) -> dict[str, bytes]:
    flipped = {
        f"bit {at} flipped": good[:at] + bytes([good[at] ^ 4]) + good[at + 1 :] for at in range(0, 700, 97)
    }
    cut = {f"cut to {n}": good[:n] for n in (0, 1, 20, len(good) // 2, len(good) - 1)}
    return {**flipped, **cut, "zeroed": bytes(len(good)), "longer": good + b"\0" * 8}


@pytest.mark.parametrize("shard", [SHARD, None])
@pytest.mark.parametrize(
    ("position", "beside"),
    [("0/0/0", Box((16, 32, 64), (20, 50, 70))), ("1/1/1", Box((0, 0, 0), (4, 32, 16)))],
)
def test_damage_is_found_and_its_file_named(output, shard, position, beside):
    values = some_voxels()
    output.create_array("a", shape=SHAPE, dtype="uint16", chunk=CHUNK, shard=shard)
    output.write_block("a", Box.whole(SHAPE), values)
    file = output.path / "a" / "c" / position
    good = file.read_bytes()
    for what, bad in damaged(good).items():
        file.write_bytes(bad)
        with pytest.raises(OutputError) as caught:
            output.read_block("a", Box.whole(SHAPE))
        message = str(caught.value)
        assert message.startswith(f"cannot read {file}\n"), what
        assert f"{len(bad):,} bytes" in message, what
        assert "remedy: " in message, what
        np.testing.assert_array_equal(output.read_block("a", beside), values[beside.slices])
    file.unlink()
    file.mkdir()
    with pytest.raises(OutputError, match="not a file"):
        output.read_block("a", Box.whole(SHAPE))
    file.rmdir()
    file.write_bytes(good)
    np.testing.assert_array_equal(output.read_block("a", Box.whole(SHAPE)), values)


def test_a_full_disk_while_writing_voxels_is_said(output, monkeypatch):
    import errno

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("zarr.storage._local._put", full)
    with pytest.raises(OutputError, match=r"cannot write .*out.zarr/0[\s\S]*No space left"):
        output.write_block("0", Box.whole(SHAPE), some_voxels())


@pytest.mark.parametrize("and_made_anew", [False, True])
def test_what_is_removed_while_it_is_read_is_not_taken_for_empty(
    output: Output, monkeypatch: pytest.MonkeyPatch, and_made_anew: bool
) -> None:
    """A worker that hung in the middle of this reads on when the run has long been finished."""
    name = "braincensus/local"

    def make() -> None:
        output.create_array(name, shape=SHAPE, dtype="uint16", chunk=CHUNK, shard=SHARD)

    make()
    output.write_block(name, Box.whole(SHAPE), some_voxels())
    plain = arrays.open_array

    def open_then_hang(root: Path, name: str, *, mode: str) -> object:
        opened = plain(root, name, mode=mode)
        output.remove_work("local")
        if and_made_anew:
            make()
        return opened

    monkeypatch.setattr(arrays, "open_array", open_then_hang)
    with pytest.raises(OutputError, match=r"zarr\.json|replaced by another"):
        output.read_block(name, Box.whole(SHAPE))
    assert not list(output.work_dir.rglob("*.partial"))
