"""Single files of the output, each whole or absent: written beside their place, then moved there.

A worker killed while writing leaves a `.partial` file that nothing reads and that finishing removes.
"""

from __future__ import annotations

import errno
import json
import math
import os
import uuid
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from braincensus.errors import OutputError, explain

PARTIAL = ".partial"
"""Ending of a file that is being written (zarr uses the same ending for its chunks)."""


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


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the ways that writing can fail into one clear `OutputError`."""
    try:
        yield
    except OutputError:
        raise
    except OSError as err:
        full = err.errno in (errno.ENOSPC, errno.EDQUOT)
        raise OutputError(
            explain(
                f"cannot write {path}",
                found=err.strerror or str(err),
                cause="the disk, or your share of it, is full"
                if full
                else "no permission, or the disk is gone",
                remedy=(
                    "free some space, or write the output elsewhere"
                    if full
                    else "choose a folder that you can write to"
                ),
            )
        ) from err


def write_json(path: Path, value: Any) -> None:
    """Write JSON, durably."""
    text = json.dumps(value, indent=2, allow_nan=False)
    write_whole(path, lambda file: file.write(text.encode()), durable=True)


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write named arrays as an .npz, int64 ones in the narrowest type that holds them.

    Sums and positions of a block are mostly small: this takes less space than deflating them (58 bytes a
    cell for 69), and a twentieth of the time.
    """

    def write(file: IO[bytes]) -> None:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            for name, values in arrays.items():
                stored, ending = np.asanyarray(values), ".npy"
                if stored.dtype == np.int64:
                    stored, ending = _narrowest(stored), _NARROWED
                with archive.open(name + ending, "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, stored, allow_pickle=False)

    write_whole(path, write, durable=False)


_NARROWED = ".int64.npy"
_NARROW = (np.uint8, np.int16, np.uint16, np.int32, np.uint32)


def _narrowest(values: np.ndarray) -> np.ndarray:
    low, high = (int(values.min()), int(values.max())) if values.size else (0, 0)
    for dtype in _NARROW:
        if np.iinfo(dtype).min <= low and high <= np.iinfo(dtype).max:
            return values.astype(dtype)
    return values


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Read what `write_arrays` wrote.

    Raises
    ------
    OutputError
        If the file is missing or damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return dict(_member(archive, name) for name in archive.namelist())
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as err:
        raise unreadable(path, err) from err


def _member(archive: zipfile.ZipFile, name: str) -> tuple[str, np.ndarray]:
    with archive.open(name) as member:
        values: np.ndarray = np.lib.format.read_array(member, allow_pickle=False)
    if name.endswith(_NARROWED):
        return name.removesuffix(_NARROWED), values.astype(np.int64)
    return name.removesuffix(".npy"), values


def unreadable(path: Path, err: BaseException) -> OutputError:
    """Describe a file of the output that cannot be read."""
    if isinstance(err, FileNotFoundError):
        return OutputError(
            explain(
                f"the output lacks {path}",
                expected="a file that an earlier stage of this run writes",
                cause="the run was interrupted, or files were removed",
                remedy="run again with --overwrite",
            )
        )
    size = f"{path.stat().st_size:,} bytes" if path.is_file() else "not a file"
    return OutputError(
        explain(
            f"cannot read {path}",
            found=f"{size}; {_first_line(err)}",
            cause="a damaged disk, or a copy that was interrupted",
            remedy="restore this file from a copy, or run again with --overwrite",
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
