"""The working folder of `label_blocks`: each block's labels with halo, and what tasks share, until the end.

    tiles/           one shard for each block: labels of its core and halo, block-local numbers
    offsets.npy      where each block's cells begin among all cells
    final.npy        the final label of every cell; a task maps it and reads its block's part
    labels/          the result, until it is whole and moves to its place
    input/           copy of a volume that workers cannot open themselves
    labeller.pickle  loaded once by each worker process
    alive            absent once the folder is being removed

The tiles lie side by side in one array, so that two blocks that overlap keep different labels of the
same voxels, and a neighbour reads only the chunks of what it shares.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import zarr
from zarr.buffer.cpu import Buffer
from zarr.storage import MemoryStore

from braincensus.blocks import Block, BlockGrid
from braincensus.errors import OutputError, explain
from braincensus.store import arrays
from braincensus.store.files import PARTIAL, writing
from braincensus_kernels.boxes import Box, Triple

INPUT, LABELLER = "input", "labeller.pickle"
_TILES, _LABELS = "tiles", "labels"
_OFFSETS, _FINAL, _ALIVE = "offsets.npy", "final.npy", "alive"
_LARGEST_CHUNK = 64


@dataclass(frozen=True)
class Work:
    """A working folder and the blocks that it is for; travels with every task."""

    root: Path
    grid: BlockGrid

    @contextmanager
    def writing_block(self) -> Iterator[None]:
        """Surround what a task does: refuse a folder that is not there, leave none that was removed.

        A task may outlive its run (its worker was cut off, or another block failed). What it writes
        then would bring the folder back.
        """
        if not (self.root / _ALIVE).exists():
            raise OutputError(
                explain(
                    f"the working folder {self.root} is not there",
                    cause="this worker is on another machine, or the run was ended",
                    remedy="give an output on a file system that all workers share",
                )
            )
        try:
            yield
        finally:
            if not (self.root / _ALIVE).exists():
                _remove(self.root)

    # The blocks' labels with halo

    def create_tiles(self) -> None:
        """Make room for all blocks."""
        chunk, tile = self._tile()
        nz, ny, nx = self.grid.counts
        shape = (nz * tile[0], ny * tile[1], nx * tile[2])
        arrays.create(self.root, _TILES, shape=shape, dtype="uint32", chunk=chunk, shard=tile, fill_value=0)

    def write_tile(self, block: Block, numbers: np.ndarray) -> None:
        """Keep a block's labels of its core and halo."""
        _, tile = self._tile()
        padded = np.zeros(tile, np.uint32)
        padded[tuple(slice(0, n) for n in numbers.shape)] = numbers
        origin = self._origin(block, tile)
        arrays.write(self.root, _TILES, Box((0, 0, 0), tile).shift(origin), padded)

    def read_tile(self, block: Block, box: Box) -> np.ndarray:
        """Read the part of a block's labels that lies in a box of the volume."""
        origin = self._origin(block, self._tile()[1])
        z, y, x = (a - b for a, b in zip(origin, block.outer.start, strict=True))
        return arrays.read(self.root, _TILES, box.shift((z, y, x)))

    def _tile(self) -> tuple[Triple, Triple]:
        """Return the chunks and the tile: the largest core with halo, made a multiple of the chunk."""
        chunk, tile = [], []
        for core, halo, extent in zip(
            self.grid.block_shape, self.grid.halo, self.grid.volume_shape, strict=True
        ):
            widest = min(core + 2 * halo, extent)
            parts = -(-widest // _LARGEST_CHUNK)
            chunk.append(-(-widest // parts))
            tile.append(parts * chunk[-1])
        return (chunk[0], chunk[1], chunk[2]), (tile[0], tile[1], tile[2])

    @staticmethod
    def _origin(block: Block, tile: Triple) -> Triple:
        z, y, x = (i * n for i, n in zip(block.index, tile, strict=True))
        return z, y, x

    # What tasks share

    def write_offsets(self, offsets: np.ndarray) -> None:
        """Keep where each block's cells begin; one more entry than blocks."""
        with writing(self.root / _OFFSETS):
            np.save(self.root / _OFFSETS, offsets)

    def cells_of(self, number: int) -> int:
        """Return how many cells have voxels in a block's core."""
        offsets = np.load(self.root / _OFFSETS, mmap_mode="r")
        return int(offsets[number + 1] - offsets[number])

    def write_final(self, final: np.ndarray) -> None:
        """Keep the final label of every cell of every core."""
        with writing(self.root / _FINAL):
            np.save(self.root / _FINAL, final)

    def lookup_of(self, number: int) -> np.ndarray:
        """Return the final label of a block's numbers 0..k; of this block alone, whatever others hold."""
        offsets = np.load(self.root / _OFFSETS, mmap_mode="r")
        final = np.load(self.root / _FINAL, mmap_mode="r")
        mine = final[offsets[number] : offsets[number + 1]]
        return np.concatenate([np.zeros(1, final.dtype), mine])

    # The result

    def create_labels(self, dtype: np.dtype[Any]) -> None:
        """Make the result, empty."""
        create(self.root, _LABELS, self.grid, dtype)

    def write_labels(self, core: Box, labels: np.ndarray) -> None:
        """Write a block's part of the result."""
        arrays.write(self.root, _LABELS, core, labels)

    def publish(self, place: Path, provenance: dict[str, Any]) -> zarr.Array[Any]:
        """Move the result, which is whole now, to its place."""
        with writing(place):
            arrays.open_array(self.root, _LABELS, mode="r+").update_attributes(provenance)
            refuse_existing(place)
            os.rename(self.root / _LABELS, place)
        return zarr.open_array(place, mode="r", zarr_format=3)

    def into_memory(self, provenance: dict[str, Any]) -> zarr.Array[Any]:
        """Take the result into memory, as compressed as it is."""
        arrays.open_array(self.root, _LABELS, mode="r+").update_attributes(provenance)
        folder = self.root / _LABELS
        files = (path for path in folder.rglob("*") if path.is_file())
        held: dict[str, Any] = {
            path.relative_to(folder).as_posix(): Buffer.from_bytes(path.read_bytes()) for path in files
        }
        return zarr.open_array(MemoryStore(held), mode="r", zarr_format=3)


@contextmanager
def working_folder(place: Path | None) -> Iterator[Path]:
    """Make a folder beside the output (or a temporary one) that is gone at the end, also after an error."""
    if place is None:
        root = Path(tempfile.mkdtemp(prefix="braincensus-"))
    else:
        refuse_existing(place)
        root = place.absolute().with_name(f".{place.name}.{uuid4().hex[:12]}{PARTIAL}")
    try:
        with writing(root):
            root.mkdir(parents=True, exist_ok=True)
            (root / _ALIVE).touch()
        yield root
    finally:
        (root / _ALIVE).unlink(missing_ok=True)
        _remove(root)


def refuse_existing(place: Path) -> None:
    """Raise `OutputError` if there is something at this path."""
    if place.exists() or place.is_symlink():
        raise OutputError(
            explain(
                f"{place} exists",
                expected="a path where there is nothing yet",
                cause="an earlier run",
                remedy="remove it, or choose another output",
            )
        )


def _remove(folder: Path) -> None:
    for _ in range(5):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.1)  # a task that was under way wrote into it meanwhile


def create(root: Path, name: str, grid: BlockGrid, dtype: np.dtype[Any]) -> None:
    """Make an empty array of the volume's shape, in shards that no two blocks' cores share."""
    chunk, shard = arrays.chunk_and_shard(grid.block_shape)
    arrays.create(root, name, shape=grid.volume_shape, dtype=dtype, chunk=chunk, shard=shard, fill_value=0)
