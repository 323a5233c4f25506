"""`label_blocks`: check what is asked, take the steps in their order, give the labels and the audit."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from distributed import Client

from braincensus.blocks import BlockGrid
from braincensus.blockwise import join, label, match, relabel, seams
from braincensus.blockwise.audit import LabelBlocksAudit
from braincensus.blockwise.spec import LabelFunction, Spec, for_workers, leave_labeller
from braincensus.blockwise.work import Work, working_folder
from braincensus.errors import ConfigError, InputError, explain
from braincensus_kernels.boxes import Triple


def label_blocks(
    volume: Any,
    labeller: LabelFunction,
    *,
    block_size: int | Triple,
    halo: int | Triple,
    output: str | os.PathLike[str] | None = None,
    client: Client | None = None,
    min_iou: float = 0.5,
    min_containment: float = 0.8,
) -> tuple[zarr.Array[Any], LabelBlocksAudit]:
    """Label a volume of any size with any labeller, block by block, each cell once.

    Parameters
    ----------
    volume : array, zyx
        NumPy, zarr, dask, h5py, ...: anything with ``shape``, ``dtype`` and slicing.
    labeller
        A function from an array (a block's core and halo, in the volume's dtype; its own copy) to
        instance labels: integers of the same shape, 0 is background, in any numbering. It is called once for
        each block. `braincensus.labellers` has Cellpose and StarDist. It should not look farther than the
        halo, nor at the block as a whole (normalise by fixed intensities, not by a block's percentiles).
        With a client it must be picklable; a worker keeps one copy for all its blocks, and calls it from
        as many threads as the worker has.
    block_size
        Voxels of a block's core, along z, y, x or all three.
    halo
        Voxels read beyond the core; at least 1 along every axis with more than one block. As wide as a
        cell is long is good: then each block sees whole every cell of its core.
    output
        Where to write the labels, as a zarr v3 array; must not exist. None: they stay in memory,
        compressed.
    client
        A Dask cluster, whose workers reach the folder of `output` (or the temporary folder, without
        one). None: blocks run one after the other in this process.
    min_iou, min_containment
        What two blocks' views of a cell must have in common, on the voxels that both labelled: this
        intersection over union, or this share of the smaller view. Half is where two views are more alike
        than not; 0.8 lets a cell that one block saw only in part still be one cell, but leaves room for no
        other neighbour in that part.

    Returns
    -------
    labels : zarr.Array, zyx
        uint32 (uint64 beyond 4,294,967,295 cells); cells are 1..N in the raster order of their first voxels.
    audit : LabelBlocksAudit
        What the blocks disagreed on, with places.

    Raises
    ------
    ConfigError
        If an argument cannot be used, or the labeller gives something that is no label image.
    InputError
        If the volume has no three axes or no voxels, or gives another shape than it says.
    OutputError
        If the output exists or cannot be written.
    BlockError
        If the labeller fails, or a worker dies; names the block and its voxels.

    Notes
    -----
    A task needs memory for a block and its halo; the client for some tens of bytes per cell. The working
    folder, beside the output or in the temporary folder, holds the blocks' labels, compressed, and with
    a client also a copy of a volume that workers cannot open themselves (NumPy, dask). It is removed at
    the end, also after an error. The output appears under its name when it is whole.

    Examples
    --------
    >>> import numpy as np
    >>> from skimage.measure import label
    >>> volume = np.zeros((8, 8, 20), np.uint8)
    >>> volume[2:6, 2:6, 3:17] = 1  # one long cell across the face between two blocks
    >>> labels, audit = label_blocks(volume, label, block_size=10, halo=3)
    >>> labels.shape, labels.dtype.name, np.unique(labels[:]).tolist()
    ((8, 8, 20), 'uint32', [0, 1])
    >>> audit.exact, audit.crossings
    (True, 1)
    """
    grid = _grid(volume, block_size, halo)
    _check_options(labeller, min_iou, min_containment)
    place = None if output is None else Path(output)
    with working_folder(place) as root:
        if client is not None:
            leave_labeller(labeller, root)
        spec = Spec(
            work=Work(root, grid),
            volume=volume if client is None else for_workers(volume, root, grid),
            labeller=labeller if client is None else None,
            min_iou=min_iou,
            min_containment=min_containment,
        )
        seen = label.run(spec, client)
        matched = match.run(spec, client)
        joined = join.run(spec, seen, matched)
        relabel.run(spec, client, joined)
        audit = seams.audit(spec, seen, matched, joined)
        provenance = {"braincensus": {"label_blocks": _provenance(spec, audit)}}
        if place is None:
            return spec.work.into_memory(provenance), audit
        return spec.work.publish(place, provenance), audit


def _grid(volume: Any, block_size: int | Triple, halo: int | Triple) -> BlockGrid:
    missing = [name for name in ("shape", "dtype", "__getitem__") if not hasattr(volume, name)]
    if missing or len(volume.shape) != 3:
        raise InputError(
            explain(
                "the volume cannot be used",
                expected="an array with three axes, zyx, that has a shape, a dtype and slicing",
                found=f"{type(volume).__name__} without {', '.join(missing)}"
                if missing
                else f"the shape {tuple(volume.shape)}",
                cause="" if missing else "channels or time points",
                remedy="np.asarray(volume)" if missing else "choose one channel and time point",
            )
        )
    shape = _triple("the volume's shape", volume.shape, least=0)
    if min(shape) == 0:
        raise InputError(explain("the volume has no voxels", found=f"the shape {shape}"))
    sides = _triple("block_size", block_size, least=1)
    z, y, x = (min(side, extent) for side, extent in zip(sides, shape, strict=True))
    grid = BlockGrid(shape, (z, y, x), _triple("halo", halo, least=0))
    for axis, margin, count in zip("zyx", grid.halo, grid.counts, strict=True):
        if margin == 0 and count > 1:
            raise ConfigError(
                explain(
                    f"a halo of 0 along {axis}, where there are {count} blocks: they would share no voxel",
                    expected="1 or more; as wide as a cell is long is good",
                    found=f"halo {grid.halo}, blocks of {grid.block_shape} in a volume of {shape}",
                    remedy="give a halo, or blocks as large as the volume",
                )
            )
    return grid


def _triple(name: str, value: Any, *, least: int) -> Triple:
    values = tuple(value) if np.ndim(value) == 1 else (value,) * 3
    whole = all(isinstance(n, int | np.integer) and not isinstance(n, bool) for n in values)
    if len(values) != 3 or not whole or min(values) < least:
        raise ConfigError(
            explain(
                f"{name} cannot be used",
                expected=f"voxels along z, y, x, or one number for all, each {least} or more",
                found=repr(value),
            )
        )
    z, y, x = (int(n) for n in values)
    return z, y, x


def _check_options(labeller: Any, min_iou: float, min_containment: float) -> None:
    if not callable(labeller):
        raise ConfigError(
            explain(
                "the labeller cannot be called",
                expected="a function from a block's array to its integer labels",
                found=f"{type(labeller).__name__}: {labeller!r}"[:200],
                remedy="see braincensus.labellers for those of Cellpose and StarDist",
            )
        )
    for name, value in (("min_iou", min_iou), ("min_containment", min_containment)):
        if not 0 < value <= 1:
            raise ConfigError(
                explain(f"{name} cannot be used", expected="above 0, up to 1", found=repr(value))
            )


def _provenance(spec: Spec, audit: LabelBlocksAudit) -> dict[str, Any]:
    """Say how the labels were made, for their attributes: the options, and the audit's counts."""
    grid = spec.work.grid
    lists = ("disagreements", "unmatched", "larger_than_halo_zyx")
    return {
        "block_voxels": list(grid.block_shape),
        "halo_voxels": list(grid.halo),
        "min_iou": spec.min_iou,
        "min_containment": spec.min_containment,
        "audit": {name: value for name, value in audit.summary().items() if name not in lists},
    }
