"""Step 1: a block's core and halo go through the labeller, once; what it gives is checked and kept.

The labels get dense numbers, the core's cells first, so that k cells of the core are 1..k and a cell that
only the halo holds is above. A cell of the core is known by its first voxel there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from distributed import Client

from braincensus.blocks import Block
from braincensus.blockwise.spec import Spec, read_voxels, the_labeller
from braincensus.errors import BlockError, ConfigError, explain
from braincensus.tasks import map_blocks
from braincensus_kernels.boxes import Box, Triple
from braincensus_kernels.overlap import first_voxels, renumber


@dataclass(frozen=True, eq=False)
class Seen:
    """Cells of a core, by their local numbers: first voxel, and whether it reaches the end of the halo."""

    first: np.ndarray
    at_the_end: np.ndarray


def run(spec: Spec, client: Client | None) -> list[Seen]:
    """Label all blocks; what each saw, in their order."""
    spec.work.create_tiles()
    blocks = range(len(spec.work.grid))
    seen = dict(map_blocks(_label_block, spec, blocks, client=client, stage="label", name="label-block"))
    in_order = [seen[number] for number in blocks]
    spec.work.write_offsets(np.cumsum([0, *(len(cells.first) for cells in in_order)]))
    return in_order


def _label_block(spec: Spec, number: int) -> Seen:
    """Step 1: label a block with its halo, keep all of it, and report the cells of the core."""
    block, grid = spec.work.grid[number], spec.work.grid
    inside = block.core.slices_in(block.outer)
    with spec.work.writing_block():
        labels = _labels_of(spec, block)
        numbers, n_core = renumber(labels, core=inside)
        spec.work.write_tile(block, numbers)
        first = first_voxels(numbers[inside], n_core, core=block.core, volume_shape=grid.volume_shape)
    return Seen(first, _at_the_end(numbers, n_core, block.outer, grid.volume_shape))


def _labels_of(spec: Spec, block: Block) -> np.ndarray:
    """Call the labeller, and refuse what is no label image."""
    labeller = spec.labeller or the_labeller(spec.work.root)
    voxels = read_voxels(spec.volume, block.outer)
    shape = voxels.shape
    where = f"block {block.number}, voxels {_zyx(block.outer)} (with halo)"
    try:
        given = labeller(voxels)
    except Exception as err:
        raise BlockError(
            explain(
                f"the labeller failed on {where}",
                found=f"{type(err).__name__}: {err}",
                remedy=f"try labeller(volume[{_zyx(block.outer)}])",
            )
        ) from err
    found = f"{type(given).__name__} of length {len(given)}" if isinstance(given, tuple | list) else ""
    if not found:
        given = np.asarray(given)
        if given.shape != shape or given.dtype.kind not in "iu":
            found = f"{given.dtype} {given.shape}"
        elif given.min() < 0:
            found = f"{given.dtype} {given.shape} with the label {given.min()}"
    if found:
        raise ConfigError(
            explain(
                f"the labeller gave no label image for {where}",
                expected=f"integers from 0 (background) in the shape {shape}",
                found=found,
                cause=_why_no_labels(given, shape),
                remedy="a function that returns labels alone, in the block's shape",
            )
        )
    labels: np.ndarray = given
    return labels


def _why_no_labels(given: Any, shape: tuple[int, ...]) -> str:
    if isinstance(given, tuple | list):
        return "it returns other things beside the labels"
    if given.dtype.kind == "b":
        return "it returns a mask, in which cells have no numbers (scipy.ndimage.label gives them)"
    if given.shape != shape:
        return "it crops, pads, rescales or squeezes"
    return "it returns probabilities" if given.dtype.kind == "f" else "it marks something by other values"


def _zyx(box: Box) -> str:
    return ", ".join(f"{a}:{b}" for a, b in zip(box.start, box.stop, strict=True))


def _at_the_end(numbers: np.ndarray, n_core: int, outer: Box, volume_shape: Triple) -> np.ndarray:
    """Tell which cells of the core reach a side of the halo beyond which the volume goes on."""
    reached = np.zeros(int(numbers.max(initial=0)) + 1, np.bool_)
    for axis in range(3):
        layers = np.moveaxis(numbers, axis, 0)
        if outer.start[axis] > 0:
            reached[layers[0]] = True
        if outer.stop[axis] < volume_shape[axis]:
            reached[layers[-1]] = True
    return reached[1 : n_core + 1]
