"""What every task is given: the working folder, and the caller's volume and labeller in a form that travels.

Without a client they stay as they are. With one, the volume goes as a small handle or is copied into the
working folder, and the labeller is left there, to be loaded once by each worker process.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from distributed.protocol.pickle import dumps

from braincensus.blocks import BlockGrid
from braincensus.blockwise.work import INPUT, LABELLER, Work, create
from braincensus.errors import ConfigError, InputError, explain
from braincensus.store import arrays
from braincensus.store.files import writing
from braincensus.worker import keep
from braincensus_kernels.boxes import Box

LabelFunction = Callable[[np.ndarray], Any]

_LARGEST_HANDLE_BYTES = 2**20


@dataclass(frozen=True)
class Spec:
    """What every task needs. `labeller` is None where it lies in the working folder."""

    work: Work
    volume: Any
    labeller: LabelFunction | None
    min_iou: float
    min_containment: float


def for_workers(volume: Any, root: Path, grid: BlockGrid) -> Any:
    """Return a volume of which a task reads only its block: the volume itself, or a copy on disk.

    A small handle to a store (a zarr array) goes to the workers as it is. Arrays that hold their
    voxels, or a graph that may (dask), are copied once, block by block.
    """
    holds = isinstance(volume, np.ndarray) or hasattr(volume, "__dask_graph__")
    if not holds and _is_small(volume):
        return volume
    first = read_voxels(volume, Box((0, 0, 0), (1, 1, 1)))
    create(root, INPUT, grid, first.dtype.newbyteorder("="))
    for block in grid:
        arrays.write(root, INPUT, block.core, read_voxels(volume, block.core))
    return arrays.open_array(root, INPUT, mode="r")


class _Counting:
    """A file that counts what is written to it and gives up when that is too much."""

    def __init__(self) -> None:
        self.written = 0

    def write(self, data: Any) -> int:
        self.written += memoryview(data).nbytes
        if self.written > _LARGEST_HANDLE_BYTES:
            raise OverflowError("too large to send to every task")
        return memoryview(data).nbytes


def _is_small(volume: Any) -> bool:
    try:
        pickle.Pickler(_Counting()).dump(volume)
    except Exception:  # whatever keeps it from travelling, a copy does
        return False
    return True


def read_voxels(volume: Any, box: Box) -> np.ndarray:
    """Read a box of any array into one of its own."""
    voxels = np.array(volume[box.slices], order="C")
    if voxels.shape != box.shape:
        raise InputError(
            explain(
                f"the volume does not give the voxels that were asked for, {box}",
                expected=f"the shape {box.shape}",
                found=f"{voxels.shape}",
                cause="its shape attribute and its slicing do not agree",
            )
        )
    return voxels


def leave_labeller(labeller: LabelFunction, root: Path) -> None:
    """Put the labeller where each worker process loads it once.

    Raises
    ------
    ConfigError
        If it cannot be pickled.
    """
    try:
        pickled = dumps(labeller)
    except Exception as err:
        raise ConfigError(
            explain(
                "the labeller cannot be sent to the workers of a cluster",
                expected="a function or object that can be pickled",
                found=f"{type(err).__name__}: {err}"[:300],
                cause="it holds a model, a lock or an open file",
                remedy="load those inside the call, once, with braincensus.worker.keep (as "
                "braincensus.labellers does), or run without a client",
            )
        ) from err
    with writing(root / LABELLER):
        (root / LABELLER).write_bytes(pickled)


def the_labeller(root: Path) -> LabelFunction:
    """Return this process' copy of the labeller, loading it the first time."""

    def load() -> Any:
        try:
            return pickle.loads((root / LABELLER).read_bytes())
        except Exception as err:
            raise ConfigError(
                explain(
                    "the labeller cannot be loaded on this worker",
                    expected="a function from a module that workers can import",
                    found=f"{type(err).__name__}: {err}"[:300],
                    cause="its module is missing on the worker",
                    remedy="install that module on the workers, or client.upload_file(...)",
                )
            ) from err

    labeller: LabelFunction = keep("labeller of label_blocks", str(root), load)
    return labeller
