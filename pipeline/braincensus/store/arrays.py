"""Blocks of voxels in the arrays of the output: one writer per shard, and damage found and named.

Shards are the unit of writing: two tasks that wrote parts of the same shard would silently undo
each other's work, so a write must cover whole shards (or end at the volume's border).
"""

from __future__ import annotations

import os
from itertools import product
from math import log
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec

from braincensus.errors import OutputError, explain
from braincensus.store.files import note, unreadable, writing
from braincensus_kernels.boxes import Box, Triple

_SMALLEST_CHUNK, _LARGEST_CHUNK = 64, 128


def chunk_and_shard(block_shape: Triple) -> tuple[Triple, Triple]:
    """Choose how blocks of this shape are stored: one shard per block, cut into chunks of 64 to 128.

    Chunks are what a reader decompresses at least. The side is the divisor of the block nearest to
    that range (the smallest inside it: less is read in vain for a halo).

    Examples
    --------
    >>> chunk_and_shard((256, 96, 1000))
    ((64, 96, 100), (256, 96, 1000))
    """
    z, y, x = (_chunk_side(n) for n in block_shape)
    return (z, y, x), block_shape


def _chunk_side(block_side: int) -> int:
    def distance(side: int) -> float:
        return max(log(_SMALLEST_CHUNK / side), log(side / _LARGEST_CHUNK), 0.0)

    divisors = [side for side in range(1, block_side + 1) if block_side % side == 0]
    return min(divisors, key=lambda side: (distance(side), side))


def create(
    root: Path, name: str, *, shape: Triple, dtype: Any, chunk: Triple, shard: Triple | None, fill_value: Any
) -> None:
    """Create an array; one of the same kind that is already there is kept."""
    if shard is not None and any(s % c for s, c in zip(shard, chunk, strict=True)):
        raise ValueError(f"chunks of {chunk} do not divide shards of {shard}")
    place = root / name
    if (place / "zarr.json").exists():
        found = open_array(root, name, mode="r")
        same = (
            found.shape == tuple(shape)
            and found.dtype == np.dtype(dtype)
            and np.array_equal(found.fill_value, fill_value, equal_nan=True)
            and (found.chunks, found.shards) == (tuple(chunk), tuple(shard) if shard else None)
        )
        if same:
            return
        raise OutputError(
            explain(
                f"{place} exists and is another array",
                expected=f"{np.dtype(dtype).name} {tuple(shape)}, chunks {tuple(chunk)}, shards {shard}",
                found=f"{found.dtype.name} {found.shape}, chunks {found.chunks}, shards {found.shards}",
                cause="an earlier run with another volume or block size",
                remedy="start over with --fresh (fresh=True)",
            )
        )
    with writing(place):
        zarr.create_array(
            root,
            name=name,
            shape=shape,
            dtype=dtype,
            chunks=chunk,
            shards=shard,
            fill_value=fill_value,
            # The checksum finds a flipped bit, which Blosc would decode to other voxels without a word.
            compressors=[BloscCodec(cname="zstd", clevel=3, shuffle="bitshuffle"), Crc32cCodec()],
            dimension_names=("z", "y", "x"),
            zarr_format=3,
        )


def open_array(root: Path, name: str, *, mode: str) -> zarr.Array[Any]:
    """Open an array of the output, ``r`` or ``r+``."""
    if mode not in ("r", "r+"):
        raise ValueError(f"an array is opened with mode 'r' or 'r+', not {mode!r}")
    try:
        return zarr.open_array(root, path=name, mode=mode, zarr_format=3)
    except (OSError, ValueError, KeyError) as err:
        raise unreadable(root / name / "zarr.json", err) from err


def write(root: Path, name: str, box: Box, values: np.ndarray) -> None:
    """Write whole shards."""
    array = open_array(root, name, mode="r+")
    _check_inside(array, name, box)
    unit = array.shards or array.chunks
    for start, stop, side, extent in zip(box.start, box.stop, unit, array.shape, strict=True):
        if start % side or (stop % side and stop != extent):
            raise ValueError(
                f"{box} does not cover whole shards of {name} (shards {unit}, array {array.shape}): "
                "two tasks that write one shard undo each other's work"
            )
    if values.shape != box.shape:
        raise ValueError(f"values of shape {values.shape} for {box} of shape {box.shape} in {name}")
    rounds = array.dtype.kind == values.dtype.kind == "f"
    if not np.can_cast(values.dtype, array.dtype, casting="same_kind" if rounds else "safe"):
        raise TypeError(f"{values.dtype} values would lose something in {name}, which is {array.dtype}")
    stored, files = values.astype(array.dtype, copy=False), _shard_files(array, root / name, box)
    with writing(root / name):
        try:
            array[box.slices] = stored
        except ValueError:
            # zarr reads a shard that the border cuts before it replaces it: a damaged one is in the way.
            for file in files:
                file.unlink(missing_ok=True)
            array[box.slices] = stored
    note(*files)


def read(root: Path, name: str, box: Box) -> np.ndarray:
    """Read a box; parts that were never written are the fill value.

    Raises
    ------
    OutputError
        If something is damaged, or the array was removed meanwhile: a worker that hung reads on when the run
        has long been finished and tidied, and would take what is gone for what was never written.
    """
    as_it_was = _identity(root / name)
    array = open_array(root, name, mode="r")
    _check_inside(array, name, box)
    for file in _shard_files(array, root / name, box):
        # zarr takes an empty shard, and a folder in its place, for one that was never written.
        if file.exists() and (not file.is_file() or file.stat().st_size == 0):
            raise unreadable(file, EOFError("nothing in it"))
    try:
        values = np.asarray(array[box.slices])
    except MemoryError:
        raise
    except Exception as err:
        raise _damage(array, root / name, box, err) from err
    if _identity(root / name) != as_it_was:
        raise unreadable(root / name, EOFError("replaced by another while it was read"))
    return values


def _identity(place: Path) -> tuple[int, int]:
    """Tell an array from one that took its place. Opened: network file systems answer `stat` from memory."""
    try:
        with (place / "zarr.json").open("rb") as file:
            found = os.fstat(file.fileno())
    except OSError as err:
        raise unreadable(place / "zarr.json", err) from err
    return found.st_ino, found.st_mtime_ns


def _check_inside(array: zarr.Array[Any], name: str, box: Box) -> None:
    z, y, x = array.shape
    if not Box.whole((z, y, x)).contains(box):
        raise ValueError(f"{box} is not inside {name}, which has the shape {array.shape}")


def _shard_boxes(array: zarr.Array[Any], box: Box) -> list[tuple[Triple, Box]]:
    """Return grid position and voxels of every shard that meets a box."""
    if box.size == 0:
        return []
    unit: tuple[int, ...] = array.shards or array.chunks
    ranges = [range(a // n, -(-b // n)) for a, b, n in zip(box.start, box.stop, unit, strict=True)]
    z_side, y_side, x_side = unit
    return [
        (
            (z, y, x),
            Box(
                (z * z_side, y * y_side, x * x_side),
                ((z + 1) * z_side, (y + 1) * y_side, (x + 1) * x_side),
            ).intersect(box),
        )
        for z, y, x in product(*ranges)
    ]


def _shard_files(array: zarr.Array[Any], place: Path, box: Box) -> list[Path]:
    return [place.joinpath("c", *map(str, position)) for position, _ in _shard_boxes(array, box)]


def _damage(array: zarr.Array[Any], place: Path, box: Box, err: Exception) -> OutputError:
    """Find which shard cannot be read, by reading one after the other."""
    for file, (_, part) in zip(_shard_files(array, place, box), _shard_boxes(array, box), strict=True):
        try:
            array[part.slices]
        except Exception as found:
            return unreadable(file, found)
    return unreadable(place, err)
