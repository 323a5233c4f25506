"""Phantoms on disk: an OME-Zarr volume written block by block, with its true cells beside it.

Before the flow: what is written here is opened like any other volume. The store is::

    PATH/zarr.json              OME metadata 0.5, and how the phantom was made
    PATH/0/                     voxels, uint16; a block is one shard, written once
    PATH/truth/cells.parquet    the true cells, in order of label

It is written beside PATH and renamed when it is whole, so that an interrupted write is never
taken for a phantom.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import zarr

from braincensus.blocks import BlockGrid
from braincensus.errors import ConfigError, InputError, OutputError, explain
from braincensus.store import arrays, ome_metadata
from braincensus.store.files import writing
from braincensus_kernels.boxes import Triple
from braincensus_kernels.phantom import Cells, Phantom

ATTRIBUTE = "braincensus_phantom"
_TRUTH = Path("truth") / "cells.parquet"
_PARTIAL = ".partial"
_MAX_THREADS = 4
_ROWS = 1 << 17

_TRUTH_SCHEMA = pa.schema(
    [
        ("label", pa.int64()),
        ("z", pa.float64()),
        ("y", pa.float64()),
        ("x", pa.float64()),
        ("z_um", pa.float64()),
        ("y_um", pa.float64()),
        ("x_um", pa.float64()),
        ("radius_um", pa.float64()),
        ("brightness", pa.float64()),
        ("volume_um3", pa.float64()),
    ]
)


def make_phantom(**parameters: Any) -> Phantom:
    """Make a `Phantom`; what it refuses is a `ConfigError`.

    Parameters
    ----------
    **parameters
        Of `braincensus_kernels.phantom.Phantom`.

    Raises
    ------
    ConfigError
        If a parameter is out of range, or more cells are asked for than fit.

    Examples
    --------
    >>> make_phantom(shape=(64, 64, 64), n_cells=30).count
    30
    """
    try:
        return Phantom(**parameters)
    except (TypeError, ValueError) as err:
        raise ConfigError(explain("not a phantom that can be made", found=str(err))) from err


def write_phantom(
    path: str | Path,
    phantom: Phantom,
    *,
    block_voxels: Triple = (256, 256, 256),
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
    client: Any = None,
) -> None:
    """Write a phantom as OME-Zarr 0.5, block by block, and its true cells as Parquet.

    Parameters
    ----------
    path
        Where; a folder that does not exist yet.
    phantom
        What.
    block_voxels
        What is rendered and written at once, zyx; memory is a few times a block for each thread.
    overwrite
        Replace what is at `path`, if a phantom is. Nothing else is ever deleted.
    progress
        Called with a number of voxels whenever so many more are written.
    client
        A Dask client whose workers write the blocks (they must reach `path`); default: threads here.

    Raises
    ------
    ConfigError
        If `block_voxels` is not three positive numbers.
    OutputError
        If `path` exists and is not to be (or must not be) overwritten, or cannot be written.
    """
    try:
        grid = BlockGrid(phantom.shape, _cut(block_voxels, phantom.shape))
    except (TypeError, ValueError) as err:
        raise ConfigError(
            explain("not a block", expected="three positive numbers of voxels", found=repr(block_voxels))
        ) from err
    final = Path(path)
    partial = final.with_name(final.name + _PARTIAL)
    with writing(final):
        _clear(final, overwrite=overwrite)
        _clear(partial, overwrite=True)
        try:
            _create(partial, phantom, grid)
            _write_truth(partial / _TRUTH, phantom)
            for number in _write_blocks(partial, phantom, grid, client):
                if progress is not None:
                    progress(grid[number].core.size)
            _write_metadata(partial, phantom, name=final.stem.removesuffix(".ome"))
            partial.rename(final)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def read_truth(path: str | Path) -> Any:
    """Read the true cells of a phantom.

    Parameters
    ----------
    path
        Of the phantom.

    Returns
    -------
    pandas.DataFrame
        One row per cell, in order of `label` (1 to the number of cells): `z`, `y`, `x` of the centre in
        voxels, `z_um`, `y_um`, `x_um` (the centre of voxel 0 is at 0 um), `radius_um`, `brightness` (peak
        above tissue, before shading) and `volume_um3`.

    Raises
    ------
    InputError
        If there is no phantom, or its table is damaged.
    """
    file = Path(path) / _TRUTH
    if not file.is_file():
        raise InputError(
            explain(
                f"no true cells for {path}",
                expected=f"a phantom, with its cells in {_TRUTH}",
                found="an image without them" if Path(path).exists() else "nothing",
                remedy="only phantoms know their cells: braincensus phantom OUTPUT",
            )
        )
    try:
        return pq.ParquetFile(file).read().to_pandas()
    except (pa.ArrowInvalid, OSError) as err:
        raise InputError(
            explain(f"the true cells {file} cannot be read", found=str(err), remedy="write the phantom again")
        ) from err


def _cut(block_voxels: Triple, shape: Triple) -> Triple:
    """Blocks no larger than the volume, so that a small volume is not one chunk of mostly nothing."""
    z, y, x = (min(int(b), n) for b, n in zip(block_voxels, shape, strict=True))
    return z, y, x


def _clear(path: Path, *, overwrite: bool) -> None:
    """Make room for a phantom, deleting nothing but one."""
    if not (path.exists() or path.is_symlink()):
        return
    if not overwrite:
        raise OutputError(
            explain(f"{path} exists", expected="a path that is free", remedy="another path, or --overwrite")
        )
    if not _is_phantom(path):
        raise OutputError(
            explain(
                f"{path} is not overwritten",
                expected="a phantom (only phantoms are replaced by one)",
                found="something else",
                remedy="another path, or delete it yourself",
            )
        )
    shutil.rmtree(path)


def _is_phantom(path: Path) -> bool:
    try:
        document = json.loads((path / "zarr.json").read_text(encoding="utf-8"))
        return not path.is_symlink() and ATTRIBUTE in document["attributes"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _create(path: Path, phantom: Phantom, grid: BlockGrid) -> None:
    """Create the group, marked as ours from the first, and its array without a chunk in it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    described = {"phantom": asdict(phantom), "n_cells": phantom.count, "truth": _TRUTH.as_posix()}
    zarr.create_group(path, zarr_format=3, attributes={ATTRIBUTE: described})
    chunk, shard = arrays.chunk_and_shard(grid.block_shape)
    arrays.create(path, "0", shape=phantom.shape, dtype="uint16", chunk=chunk, shard=shard, fill_value=0)


def _write_metadata(path: Path, phantom: Phantom, *, name: str) -> None:
    full = [(phantom.voxel_size_um, (0.0, 0.0, 0.0))]
    top = phantom.tissue_level + phantom.brightness[1]
    described = ome_metadata.image(name, full, how="phantom", label="phantom", color="FFFFFF", top=top)
    zarr.open_group(path, mode="r+").attrs["ome"] = described


def _write_truth(file: Path, phantom: Phantom) -> None:
    """Write the cells in groups of many rows, however few each row of tiles has."""
    file.parent.mkdir()
    with pq.ParquetWriter(file, _TRUTH_SCHEMA) as writer:
        held: list[pa.Table] = []
        for cells in phantom.cell_parts():
            held.append(_truth_table(cells, phantom))
            if sum(len(part) for part in held) >= _ROWS:
                writer.write_table(pa.concat_tables(held).combine_chunks())
                held.clear()
        if held:
            writer.write_table(pa.concat_tables(held).combine_chunks())


def _truth_table(cells: Cells, phantom: Phantom) -> pa.Table:
    in_um = {f"{a}_um": cells[a] * size for a, size in zip("zyx", phantom.voxel_size_um, strict=True)}
    return pa.table({**cells, **in_um}).select(_TRUTH_SCHEMA.names)


def _write_block(path: str, phantom: Phantom, grid: BlockGrid, number: int) -> int:
    """Render one block and write its shard; safe to run twice."""
    core = grid[number].core
    arrays.write(Path(path), "0", core, phantom.render(core))
    return number


def _write_blocks(path: Path, phantom: Phantom, grid: BlockGrid, client: Any) -> Iterator[int]:
    """Write all blocks, a bounded number at a time; yield the number of each that is done."""
    arguments = (str(path.resolve()), phantom, grid)
    numbers = iter(range(len(grid)))
    if client is not None:
        from distributed import as_completed

        def submit(number: int) -> Any:
            return client.submit(_write_block, *arguments, number, pure=False)

        limit = 2 * max(1, sum(client.nthreads().values()))
        running = as_completed([submit(number) for number in islice(numbers, limit)])
        try:
            for future in running:
                yield future.result()
                future.release()
                for number in islice(numbers, 1):
                    running.add(submit(number))
        finally:
            client.cancel(list(running.futures))
        return
    threads = min(_MAX_THREADS, os.cpu_count() or 1)
    with ThreadPoolExecutor(threads, thread_name_prefix="phantom") as pool:
        pending: set[Future[int]] = set()
        try:
            while True:
                for number in islice(numbers, threads - len(pending)):
                    pending.add(pool.submit(_write_block, *arguments, number))
                if not pending:
                    return
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)
