"""A chunked copy of what cannot be read block-wise: made once, reused, safe to interrupt.

Planes stream through in slabs, so that memory stays bounded however many there are. One slab is
one row of shards, each written once. The copy grows under a `.partial` name and takes its own
name only when it is complete; an interrupted one is continued. A lock lets several processes
ask for the same copy, of which one makes it.

A format only says what the copy is to be made from (`ToCopy`). `open_volume` settles everything
else first and then has the copy made (`make_copy`) or only described (`describe_copy`).
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.codecs import BloscCodec

from braincensus.errors import InputError, OutputError, PlanError, explain
from braincensus.formats.readers import (
    ZYX,
    Found,
    Reader,
    ReadPlanes,
    ToCopy,
    UncopiedReader,
    Voxels,
    ZarrReader,
    open_zarr_array,
)
from braincensus.formats.skipping import SkippingReader, Unreadable, in_one_line
from braincensus_kernels.boxes import Box, Triple

Progress = Callable[[str, int, int], None]

COPYING = "converting to a chunked copy"  # what `progress` is told; it counts voxels
SCRATCH_VARIABLE = "BRAINCENSUS_SCRATCH"
SLAB_BYTES = 512 * 2**20
_SHARD_BYTES = 32 * 2**20  # several are in memory at once while they are compressed
_MOST_PLANES = 64
_CHUNK_YX = 256
_DONE = "planes-done"
_UNREADABLE = "unreadable-planes.json"


def make_copy(
    found: Found, source: ToCopy, *, scratch: Path | None, progress: Progress | None, skip: bool = False
) -> Found:
    """Copy what was found into chunks, and read it from there; with `skip`, unreadable planes as 0.

    Raises
    ------
    OutputError, PlanError, InputError
        As `scratch_folder` and `chunked_copy`.
    """
    folder = scratch_folder(scratch, beside=source.beside)
    with source.open_planes() as read_planes:
        copied, chunks = chunked_copy(
            name=source.name,
            identity=found.identity | ({"on_unreadable": "skip"} if skip else {}),
            shape=found.shape,
            dtype=found.dtype,
            read_planes=read_planes,
            folder=folder,
            progress=progress,
            skip=skip,
        )
    reader: Reader = copied
    if skip:  # what the copy lacks is settled; damage of the copy itself is not skipped, it can be made again
        planes = _unreadable_planes(Path(copied.root))
        known = tuple(
            Unreadable(Box((z, 0, 0), (z + 1, *found.shape[1:])), planes[z]) for z in sorted(planes)
        )
        reader = SkippingReader(copied, found.shape, found.dtype.str, known=known, settled=True)
    note = f"{source.why}; read from a chunked copy, made once: {copied.root}"
    return replace(found, reader=reader, chunks=chunks, notes=(*found.notes, note), to_copy=None)


def describe_copy(found: Found, source: ToCopy) -> Found:
    """Say what `make_copy` would do; touches no file."""
    n_bytes = prod(found.shape) * found.dtype.itemsize
    size = f"{n_bytes / 1e9:,.1f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:,.1f} MB"
    return replace(
        found,
        reader=UncopiedReader(found.identity["path"]),
        chunks=_layout(found.shape, found.dtype)[1],
        notes=(*found.notes, f"{source.why}; a run first makes a chunked copy of up to {size}"),
    )


def scratch_folder(scratch: Path | None, *, beside: Path | None) -> Path:
    """Choose where copies go: as given, `$BRAINCENSUS_SCRATCH`, or beside the source.

    Beside the source, because that file system holds such volumes and every worker sees it; a
    home folder or `/tmp` often has neither property.

    Raises
    ------
    OutputError
        If the folder cannot be written.
    """
    named = os.environ.get(SCRATCH_VARIABLE)
    folder = (
        scratch or (Path(named) if named else None) or (beside / ".braincensus-scratch" if beside else None)
    )
    if folder is None:
        raise OutputError(
            explain("nowhere to put a chunked copy", remedy=f"give scratch=, or set {SCRATCH_VARIABLE}")
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(f"not writable: {folder}")
    except OSError as err:
        raise OutputError(
            explain(
                "cannot write the chunked copy that reading block by block needs",
                found=f"{type(err).__name__}: {err}",
                remedy=f"give a scratch folder that every worker can reach, or set {SCRATCH_VARIABLE}",
            )
        ) from err
    return folder


def chunked_copy(
    *,
    name: str,
    identity: Mapping[str, Any],
    shape: Triple,
    dtype: np.dtype[Any],
    read_planes: ReadPlanes,
    folder: Path,
    progress: Progress | None,
    skip: bool,
) -> tuple[ZarrReader, Triple]:
    """Copy planes into a chunked zarr array, unless that was done before; return its reader and chunks.

    Raises
    ------
    PlanError
        If the disk has too little room.
    OutputError
        If the copy cannot be written.
    InputError
        If `read_planes` finds the source damaged, and damaged planes are not to be skipped.
    """
    key = hashlib.sha256(json.dumps(dict(identity), sort_keys=True).encode()).hexdigest()[:16]
    final = folder / f"{name}-{key}.zarr"
    partial = final.with_suffix(".partial")
    slab, chunks, shards = _layout(shape, dtype)
    try:
        with _locked(final.with_suffix(".lock")):
            if not _is_complete(final, shape, dtype):
                done = _planes_done(partial, slab)
                _check_room(folder, prod(shape) * dtype.itemsize * (shape[0] - done) // shape[0], final)
                if done == 0:
                    shutil.rmtree(partial, ignore_errors=True)
                    zarr.create_array(
                        partial,
                        shape=shape,
                        dtype=dtype,
                        chunks=chunks,
                        shards=shards,
                        compressors=BloscCodec(cname="lz4", clevel=5, shuffle="bitshuffle"),
                        fill_value=0,
                        dimension_names=["z", "y", "x"],
                        attributes={"braincensus_source": dict(identity)},
                    )
                if skip:
                    read_planes = _around(read_planes, partial, shape, dtype)
                _copy(partial, done=done, slab=slab, read_planes=read_planes, progress=progress)
                (partial / _DONE).unlink()
                shutil.rmtree(final, ignore_errors=True)
                partial.rename(final)
    except OSError as err:
        if isinstance(err, OutputError):
            raise
        raise OutputError(
            explain(
                f"cannot write the chunked copy {final}",
                found=f"{type(err).__name__}: {err}",
                cause="a full disk" if err.errno == 28 else "",
                remedy="free some space, or give another scratch folder; the copy continues where it stopped",
            )
        ) from err
    reader = ZarrReader(
        root=str(final.resolve()), array="", axes=ZYX, zarr_format=3, stamp=key, all_chunks=True
    )
    return reader, chunks


def _layout(shape: Triple, dtype: np.dtype[Any]) -> tuple[int, Triple, Triple | None]:
    """Return the planes of a slab, the chunks, and the shards (None where chunks are few)."""
    plane_bytes = shape[1] * shape[2] * dtype.itemsize
    slab = max(1, min(_MOST_PLANES, shape[0], SLAB_BYTES // plane_bytes))
    chunk = (slab, min(_CHUNK_YX, shape[1]), min(_CHUNK_YX, shape[2]))
    grid = [-(-n // c) for n, c in zip(shape[1:], chunk[1:], strict=True)]
    fit = max(1, _SHARD_BYTES // (prod(chunk) * dtype.itemsize))
    x = min(grid[1], fit)
    y = min(grid[0], max(1, fit // x))
    return slab, chunk, (slab, chunk[1] * y, chunk[2] * x) if x * y > 1 else None


def _copy(target: Path, *, done: int, slab: int, read_planes: ReadPlanes, progress: Progress | None) -> None:
    array: Any = zarr.open_array(target, mode="r+", zarr_format=3)
    array = array.with_config({"write_empty_chunks": True})  # so that an absent chunk is a lost one
    total, plane = array.shape[0], prod(array.shape[1:])
    if progress:
        progress(COPYING, done * plane, total * plane)
    for start in range(done, total, slab):
        stop = min(start + slab, total)
        planes = read_planes(start, stop)
        array[start:stop] = planes
        del planes  # before the next slab is read
        mark = target / f"{_DONE}.new"
        mark.write_text(str(stop))
        mark.replace(target / _DONE)
        if progress:
            progress(COPYING, stop * plane, total * plane)


def _around(read_planes: ReadPlanes, partial: Path, shape: Triple, dtype: np.dtype[Any]) -> ReadPlanes:
    """Read planes as 0 that cannot be read, and note them before they are marked as done."""

    def read(start: int, stop: int) -> Voxels:
        try:
            return read_planes(start, stop)
        except InputError:
            pass
        planes = np.zeros((stop - start, *shape[1:]), dtype)
        noted = _unreadable_planes(partial)
        for z in range(start, stop):
            try:
                planes[z - start : z - start + 1] = read_planes(z, z + 1)
            except InputError as err:
                noted[z] = in_one_line(err)
        new = partial / f"{_UNREADABLE}.new"
        new.write_text(json.dumps({str(z): reason for z, reason in noted.items()}))
        new.replace(partial / _UNREADABLE)
        return planes

    return read


def _unreadable_planes(copy: Path) -> dict[int, str]:
    """Return the planes that a copy could not read, each with the reason."""
    try:
        noted = json.loads((copy / _UNREADABLE).read_text())
    except FileNotFoundError:
        return {}
    return {int(z): str(reason) for z, reason in noted.items()}


def _planes_done(partial: Path, slab: int) -> int:
    """Return how many planes an interrupted copy holds; the mark is written after the data."""
    try:
        done = int((partial / _DONE).read_text())
        array: Any = open_zarr_array(str(partial), "", 3)
    except Exception:
        return 0
    return done if array.chunks[0] == slab else 0


def _is_complete(final: Path, shape: Triple, dtype: np.dtype[Any]) -> bool:
    try:
        array: Any = open_zarr_array(str(final), "", 3)
    except Exception:
        return False
    # Scratch disks are swept of old files one by one: count them.
    stored = array.shards or array.chunks
    files = prod(-(-n // c) for n, c in zip(shape, stored, strict=True))
    there = sum(len(names) for _, _, names in os.walk(final / "c"))
    return bool(array.shape == shape and array.dtype == dtype and there == files)


def _check_room(folder: Path, n_bytes: int, final: Path) -> None:
    free = shutil.disk_usage(folder).free
    if free < n_bytes:
        raise PlanError(
            explain(
                f"too little disk space for the chunked copy {final}",
                expected=f"{n_bytes / 1e9:,.1f} GB free (its size before compression)",
                found=f"{free / 1e9:,.1f} GB free",
                remedy=f"give a scratch folder on a larger disk, or set {SCRATCH_VARIABLE}",
            )
        )


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock that ends with the process, however it ends."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
