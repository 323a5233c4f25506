"""Arrays: NumPy and zarr arrays in memory, and `.npy` files."""

from __future__ import annotations

import hashlib
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.storage import LocalStore, MemoryStore

from braincensus.errors import InputError, explain
from braincensus.formats.checks import USUAL_AXES, check_index, check_volume, choose_axes
from braincensus.formats.readers import (
    Axes,
    FlatReader,
    Found,
    MemoryReader,
    ToCopy,
    Voxels,
    as_read,
    dtype_as_read,
    need_bytes,
)
from braincensus_kernels.boxes import Box

_NO_SCALE = "an array, which carries no voxel size"


def open_npy(path: Path, *, channel: int, timepoint: int, level: int) -> Found:
    """Map a `.npy` file.

    Raises
    ------
    InputError
        If it is not a volume of numbers, or is truncated.
    """
    try:
        with path.open("rb") as file:
            version = np.lib.format.read_magic(file)
            read = (
                np.lib.format.read_array_header_1_0
                if version == (1, 0)
                else np.lib.format.read_array_header_2_0
            )
            shape, fortran, dtype = read(file)
            offset = file.tell()
    except (OSError, ValueError) as err:
        raise InputError(
            explain(
                f"cannot read the header of {path}", found=str(err), cause="a file that is damaged or no .npy"
            )
        ) from err
    axes, notes = _usual_axes(shape, dtype, channel=channel, timepoint=timepoint, level=level, what=str(path))
    need_bytes(path, offset + int(np.prod(shape)) * dtype.itemsize)
    status = path.stat()
    identity = {
        "path": str(path.resolve()),
        "channel": channel,
        "timepoint": timepoint,
        "level": level,
        "shape": list(axes.zyx(shape)),
        "dtype": dtype.str,
        "bytes": status.st_size,
        "mtime_ns": status.st_mtime_ns,
    }
    return Found(
        format="NumPy file",
        reader=FlatReader(
            path=str(path.resolve()),
            offset=offset,
            shape=shape,
            dtype=dtype.str,
            axes=axes,
            fortran=fortran,
            stamp=str(status.st_mtime_ns),
        ),
        shape=axes.zyx(shape),
        dtype=dtype_as_read(dtype),
        chunks=(1, 1, axes.zyx(shape)[2]),
        voxel_size=None,
        identity=identity,
        notes=notes,
        missing_scale=_NO_SCALE,
        is_one_level=True,
    )


def path_of(array: Any) -> Path | None:
    """Return where a zarr array or group lies on disk, if it does."""
    store = array.store
    return Path(store.root) / array.path if isinstance(store, LocalStore) else None


def open_array(array: Any, *, channel: int, timepoint: int, level: int, with_copy: bool) -> Found:
    """Take a NumPy array, or a zarr array that is not on disk.

    With a copy in chunks of what is in memory, workers read blocks of it; without, each worker
    process receives all of it.
    """
    axes, notes = _usual_axes(
        array.shape, array.dtype, channel=channel, timepoint=timepoint, level=level, what="the array"
    )
    shape, dtype = axes.zyx(array.shape), dtype_as_read(array.dtype)
    in_memory = isinstance(array, np.ndarray) or isinstance(array.store, MemoryStore)
    if isinstance(array, zarr.Array) and in_memory and not with_copy:
        array = np.asarray(array[...])  # a store in memory cannot be sent to another process
    content = _digest(array, axes, shape[0]) if in_memory else repr(array.store_path)
    identity = {
        "path": "array",
        "channel": channel,
        "timepoint": timepoint,
        "level": level,
        "shape": list(shape),
        "dtype": dtype.str,
        "bytes": int(np.prod(shape)) * dtype.itemsize,
        "fingerprint": content,
    }
    found = Found(
        format="NumPy array"
        if isinstance(array, np.ndarray)
        else f"zarr array in {type(array.store).__name__}",
        reader=MemoryReader(array=array, axes=axes, stamp=content),
        shape=shape,
        dtype=dtype,
        chunks=(1, 1, shape[2]) if isinstance(array, np.ndarray) else axes.zyx(array.chunks),
        voxel_size=None,
        identity=identity,
        notes=notes,
        missing_scale=_NO_SCALE,
        is_one_level=True,
    )
    if not in_memory:
        return found
    if not with_copy:
        return replace(found, notes=(*notes, "held in memory; each worker process receives a copy"))
    memory = found.reader

    def read_planes(start: int, stop: int) -> Voxels:
        return memory.read(Box((start, 0, 0), (stop, *shape[1:])))

    return replace(
        found,
        to_copy=ToCopy(
            name="array", beside=None, why="held in memory", open_planes=lambda: nullcontext(read_planes)
        ),
    )


def _usual_axes(
    shape: tuple[int, ...], dtype: np.dtype[Any], *, channel: int, timepoint: int, level: int, what: str
) -> tuple[Axes, tuple[str, ...]]:
    check_volume(shape, dtype, what=what)
    check_index(level, 1, word="level", what=what)
    usual = USUAL_AXES.get(len(shape))
    if usual is None:
        raise InputError(
            explain(
                f"{what} is not a volume",
                expected="3 axes zyx, 4 axes czyx, or 5 axes tczyx",
                found=f"{len(shape)}D, shape {shape}",
                cause="a single plane or a projection" if len(shape) == 2 else "",
            )
        )
    notes = (f"axes taken as {usual}",) if len(shape) > 3 else ()
    return choose_axes(usual, shape, channel=channel, timepoint=timepoint, what=what), notes


def _digest(array: Any, axes: Axes, planes: int) -> str:
    digest = hashlib.sha256()
    y, x = axes.zyx(array.shape)[1:]
    step = max(1, 2**26 // max(1, y * x))
    for start in range(0, planes, step):
        box = Box((start, 0, 0), (min(start + step, planes), y, x))
        voxels: Voxels = as_read(axes.take(array, box))
        digest.update(voxels.data)
    return digest.hexdigest()[:32]
