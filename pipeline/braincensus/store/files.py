"""Single files of the output, each whole or absent: written beside their place, then moved there.

A worker killed while writing leaves a `.partial` file that nothing reads and that finishing removes.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import uuid
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import IO, Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from braincensus.errors import OutputError, explain

PARTIAL = ".partial"
"""Ending of a file that is being written (zarr uses the same ending for its chunks)."""

_written: ContextVar[list[Path] | None] = ContextVar("braincensus_written", default=None)


@contextmanager
def noting() -> Iterator[list[Path]]:
    """Gather the files of the output that this thread writes meanwhile."""
    files: list[Path] = []
    token = _written.set(files)
    try:
        yield files
    finally:
        _written.reset(token)


def note(*paths: Path) -> None:
    """Say that files were written (or deliberately left out); called by all that write."""
    files = _written.get()
    if files is not None:
        files.extend(paths)


def write_whole(path: Path, write: Callable[[IO[bytes]], Any], *, durable: bool) -> None:
    """Write a file under another name and move it into place.

    Parameters
    ----------
    path
        Where the file shall be; its folder is made if missing.
    write
        Receives the open binary file.
    durable
        Wait until the bytes are on the disk, so that not even a power cut leaves half a file.

    Raises
    ------
    OutputError
        If the disk is full or the place cannot be written.
    """
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}{PARTIAL}")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("wb") as file:
                write(file)
                if durable:
                    file.flush()
                    os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    note(path)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the ways that writing can fail into one clear `OutputError`."""
    try:
        yield
    except OutputError:
        raise
    except OSError as err:
        full = err.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        raise OutputError(
            explain(
                f"cannot write {path}",
                found=(err.strerror or str(err)) + (_free(path) if full else ""),
                cause="the disk, or your share of it, is full"
                if full
                else "no permission, or the disk is gone",
                remedy=(
                    "free some space, then run again: done blocks are kept; or write the output elsewhere"
                    if full
                    else "choose a folder that you can write to"
                ),
            )
        ) from err


def _free(path: Path) -> str:
    """Say how much room there is where a file could not be written."""
    try:
        free = shutil.disk_usage(next(p for p in path.parents if p.exists())).free
    except (OSError, StopIteration):
        return ""
    return f"; {free / 1e6:,.1f} MB are free there, for whoever may use them"


def remove_folder(place: Path, *, ignore_errors: bool = False) -> None:
    """Remove a folder: at once for all who look for it by its name, its files after that.

    File by file, a reader could find half of it.
    """
    doomed = place.with_name(f".{place.name}.{uuid.uuid4().hex}{PARTIAL}")
    try:
        os.replace(place, doomed)
    except OSError:
        if not ignore_errors:
            raise
        return
    shutil.rmtree(doomed, ignore_errors=ignore_errors)


def write_json(path: Path, value: Any) -> None:
    """Write JSON, durably."""
    text = json.dumps(value, indent=2, allow_nan=False)
    write_whole(path, lambda file: file.write(text.encode()), durable=True)


def write_npy(path: Path, values: np.ndarray) -> None:
    """Write one array as ``.npy``.

    NumPy's own writer hands the file to C, which does not tell of what found no room on the disk.

    Raises
    ------
    ValueError
        If the array holds Python objects.
    """
    array = np.ascontiguousarray(values)
    if array.dtype.hasobject:
        raise ValueError("an array of Python objects would be a pickle; refused")

    def write(file: IO[bytes]) -> None:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        file.write(array.reshape(-1).view(np.uint8).data)

    write_whole(path, write, durable=False)


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write named arrays as a safetensors file, int64 ones in the narrowest type that holds them.

    Sums and positions of a block are mostly small: 58 bytes a cell, where deflating takes 69, and sixteen
    times as long to write, five times as long to read. A stitched block reads dozens of such files.

    Raises
    ------
    ValueError
        If an array holds Python objects.
    """
    stored: dict[str, np.ndarray] = {}
    for number, (name, values) in enumerate(arrays.items()):
        array = np.array(values, order="C", copy=None)
        if array.dtype.hasobject:
            raise ValueError(f"{name} holds Python objects, which are written as a pickle only; refused")
        narrow = _narrowest(array) if array.dtype == np.int64 else array
        stored[f"{number:03d}.{_NARROWED if narrow is not array else _PLAIN}.{name}"] = narrow
    stored[_CHECKSUM] = np.array([_checksum(stored)], np.uint32)
    write_whole(path, lambda file: file.write(save(stored)), durable=False)


_PLAIN, _NARROWED, _CHECKSUM = "as-is", "int64", "crc32"
_NARROW = (np.uint8, np.int16, np.uint16, np.int32, np.uint32)


def _narrowest(values: np.ndarray) -> np.ndarray:
    low, high = (int(values.min()), int(values.max())) if values.size else (0, 0)
    for dtype in _NARROW:
        if np.iinfo(dtype).min <= low and high <= np.iinfo(dtype).max:
            return values.astype(dtype)
    return values


def _checksum(arrays: Mapping[str, np.ndarray]) -> int:
    """Sum up names and bytes: a flipped bit would otherwise be another number without a word."""
    total = 0
    for name in sorted(arrays):
        total = zlib.crc32(arrays[name].reshape(-1).view(np.uint8).data, zlib.crc32(name.encode(), total))
    return total


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Read what `write_arrays` wrote.

    Raises
    ------
    OutputError
        If the file is missing or damaged.
    """
    try:
        stored = load(path.read_bytes())
        if int(stored.pop(_CHECKSUM)[0]) != _checksum(stored):
            raise ValueError("its checksum does not fit")
    except (OSError, ValueError, KeyError, IndexError, SafetensorError) as err:
        raise unreadable(path, err) from err
    arrays = {}
    for key in sorted(stored):
        _, how, name = key.split(".", 2)
        arrays[name] = stored[key].astype(np.int64) if how == _NARROWED else stored[key]
    return arrays


def unreadable(path: Path, err: BaseException) -> OutputError:
    """Describe a file of the output that cannot be read."""
    if isinstance(err, FileNotFoundError):
        return OutputError(
            explain(
                f"the output lacks {path}",
                expected="a file that an earlier stage of this run writes",
                cause="the run was interrupted, or files were removed",
                remedy="run again: what is missing is done again",
            )
        )
    size = f"{path.stat().st_size:,} bytes" if path.is_file() else "not a file"
    return OutputError(
        explain(
            f"cannot read {path}",
            found=f"{size}; {_first_line(err)}",
            cause="a damaged disk, or a copy that was interrupted",
            remedy="run again: what is damaged is done again; or restore this file from a copy",
        )
    )


def jsonable(value: Any) -> Any:
    """Return the value as JSON can hold it: NumPy scalars and arrays, tuples, paths; NaN becomes null.

    Raises
    ------
    TypeError
        For a value that has no natural JSON form.

    Examples
    --------
    >>> jsonable({"a": (np.float32(0.5), float("nan")), 3: Path("x")})
    {'a': [0.5, None], '3': 'x'}
    """
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [jsonable(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int | bool):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"provenance cannot hold a {type(value).__name__}: {value!r}")


def _first_line(err: BaseException) -> str:
    return (str(err).strip().splitlines() or [type(err).__name__])[0][:200]
