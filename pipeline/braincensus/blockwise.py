"""Any array, any labeller, block by block: `label_blocks`, one number per cell in the end.

    copy -> label -> match -> join -> relabel
            1 a block  2 a block   3 here  4 a block

1. **label**: a block's core and halo go through the labeller, once. The labels get dense numbers, the
   core's cells first, and are kept in a working folder; a cell is known by the first voxel, in raster
   order, that it has in the core.
2. **match**: a block and each of its upper neighbours (faces, edges and corners: 13) compare their cells
   on the voxels that both labelled. Two are one cell if each is the other's best overlap and they overlap
   enough; never because they touch. Only cells with voxels in both cores need joining. On the voxels
   right beside the seam, both blocks' beliefs are compared for the audit.
3. **join**: the client joins the matches, so that no chain fuses two cells of one block, and numbers the
   cells 1..N in the order of their first voxels. Blocks leave no trace in that order.
4. **relabel**: each core gets its final labels, through a lookup of that block's own cells.

A connected cell (26 neighbours) that has voxels in two cores has two adjacent voxels, one in each, and
both blocks labelled both. So with a labeller that gives every voxel its true cell, the result is the
truth, voxel for voxel, for every block size and every halo of 1 or more.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby, product
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from distributed import Client

from braincensus.blocks import Block, BlockGrid
from braincensus.blockwise_audit import (
    MOST_LISTED,
    Disagreement,
    LabelBlocksAudit,
    UnmatchedCrossing,
)
from braincensus.blockwise_work import (
    Work,
    for_workers,
    leave_labeller,
    read_voxels,
    the_labeller,
    working_folder,
)
from braincensus.errors import BlockError, ConfigError, InputError, explain
from braincensus.tasks import map_blocks
from braincensus_kernels.boxes import Box, Triple
from braincensus_kernels.overlap import first_voxels, joinable, match_one_to_one, overlaps, renumber
from braincensus_kernels.relabel import apply_lookup, number_cells
from braincensus_kernels.seam_density import SeamCounts, SeamDensity, count_near_seams
from braincensus_kernels.union_find import connected

LabelFunction = Callable[[np.ndarray], Any]

_UPPER = [offset for offset in product((-1, 0, 1), repeat=3) if offset > (0, 0, 0)]
_ROWS_AT_ONCE = 2**20


@dataclass(frozen=True)
class _Spec:
    """What every task needs. `labeller` is None where it lies in the working folder."""

    work: Work
    volume: Any
    labeller: LabelFunction | None
    min_iou: float
    min_containment: float


@dataclass(frozen=True, eq=False)
class _Seen:
    """Cells of a core, by their local numbers: first voxel, and whether it reaches the end of the halo."""

    first: np.ndarray
    at_the_end: np.ndarray


@dataclass(frozen=True, eq=False)
class _Compared:
    """What two blocks believe of the voxels that both labelled; cells by their local numbers.

    Attributes
    ----------
    matches
        int64, (m, 4): cell of the lower block, of the upper one, intersection, union.
    beside, crosses
        For each match, its voxels beside the seam, and whether it has voxels on both sides of it, each
        side as its own block labelled it.
    differing
        int64, (n, 3): belief of the lower block, of the upper one (0 is background), voxels beside the seam
        where these are no match.
    unmatched
        int64, (u, 2): 0 or 1 for the lower or upper block, and a cell of its core that it saw reach
        across the seam, without a match.
    seam, low, high
        The voxels beside the seam, and what the two blocks labelled there.
    partner_of_low, partner_of_high
        For each cell of either block its match in the other, 0 without one.
    """

    matches: np.ndarray
    beside: np.ndarray
    crosses: np.ndarray
    differing: np.ndarray
    unmatched: np.ndarray
    seam: Box
    low: np.ndarray
    high: np.ndarray
    partner_of_low: np.ndarray
    partner_of_high: np.ndarray


@dataclass(frozen=True, eq=False)
class _Matched:
    """What a block found together with its upper neighbours; every row starts with two blocks.

    Attributes
    ----------
    matches
        Of cells with voxels in both cores: (lower, upper block, their cells, intersection, union, voxels
        beside the seam, 1 if it crosses a face).
    differing
        (lower, upper block, their beliefs, voxels).
    unmatched
        (block that saw it, the other one, cell).
    """

    matches: np.ndarray
    differing: np.ndarray
    unmatched: np.ndarray
    pairs: int
    faces: int
    voxels_compared: int


@dataclass(frozen=True, eq=False)
class _Joined:
    """Cells of all cores, one block after the other, as cells of the result.

    Attributes
    ----------
    first, final
        Of every cell of every core: its first voxel there, and its label in the result.
    offsets
        Where each block's cells begin.
    cells
        Of every label of the result: its first voxel.
    matches, kept
        All blocks' matches, and which were joined.
    """

    first: np.ndarray
    final: np.ndarray
    offsets: np.ndarray
    cells: np.ndarray
    matches: np.ndarray
    kept: np.ndarray

    def labels_of(self, blocks: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        """Return the final labels of blocks' local numbers; 0 for background and for cells of no core."""
        in_core = (numbers > 0) & (numbers <= self.offsets[blocks + 1] - self.offsets[blocks])
        labels = np.zeros(len(numbers), self.final.dtype)
        labels[in_core] = self.final[(self.offsets[blocks] + numbers - 1)[in_core]]
        return labels


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
        spec = _Spec(
            work=Work(root, grid),
            volume=volume if client is None else for_workers(volume, root, grid),
            labeller=labeller if client is None else None,
            min_iou=min_iou,
            min_containment=min_containment,
        )
        seen = _label(spec, client)
        matched = _match(spec, client)
        joined = _join(spec, seen, matched)
        _relabel(spec, client, joined)
        audit = _audit(spec, seen, matched, joined)
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


# 1. Label -----------------------------------------------------------------------------------------------


def _label(spec: _Spec, client: Client | None) -> list[_Seen]:
    spec.work.create_tiles()
    blocks = range(len(spec.work.grid))
    seen = dict(map_blocks(_label_block, spec, blocks, client=client, stage="label", name="label-block"))
    in_order = [seen[number] for number in blocks]
    spec.work.write_offsets(np.cumsum([0, *(len(cells.first) for cells in in_order)]))
    return in_order


def _label_block(spec: _Spec, number: int) -> _Seen:
    """Step 1: label a block with its halo, keep all of it, and report the cells of the core."""
    block, grid = spec.work.grid[number], spec.work.grid
    inside = block.core.slices_in(block.outer)
    with spec.work.writing_block():
        labels = _labels_of(spec, block)
        numbers, n_core = renumber(labels, core=inside)
        spec.work.write_tile(block, numbers)
        first = first_voxels(numbers[inside], n_core, core=block.core, volume_shape=grid.volume_shape)
    return _Seen(first, _at_the_end(numbers, n_core, block.outer, grid.volume_shape))


def _labels_of(spec: _Spec, block: Block) -> np.ndarray:
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


# 2. Match -----------------------------------------------------------------------------------------------


def _match(spec: _Spec, client: Client | None) -> list[_Matched]:
    blocks = range(len(spec.work.grid))
    found = dict(map_blocks(_match_block, spec, blocks, client=client, stage="match", name="match-block"))
    return [found[number] for number in blocks]


def _match_block(spec: _Spec, number: int) -> _Matched:
    """Step 2: compare a block with its neighbours above, on all voxels that both labelled."""
    work = spec.work
    block = work.grid[number]
    mine, k = work.read_tile(block, block.outer), work.cells_of(number)
    matches, differing, unmatched = ([np.empty((0, n), np.int64)] for n in (8, 5, 3))
    pairs = faces = voxels_compared = 0
    for high in _upper_neighbours(work.grid, block):
        found = _compare(spec, block, high, mine)
        is_face = sum(map(abs, _offset(block, high))) == 1
        both = (found.matches[:, 0] <= k) & (found.matches[:, 1] <= work.cells_of(high.number))
        columns = (found.matches, found.beside, found.crosses & is_face)
        matches.append(_rows((number, high.number), *(column[both] for column in columns)))
        differing.append(_rows((number, high.number), found.differing))
        for side, blocks in enumerate([(number, high.number), (high.number, number)]):
            unmatched.append(_rows(blocks, found.unmatched[found.unmatched[:, 0] == side, 1]))
        pairs += 1
        faces += is_face
        voxels_compared += found.seam.size
    return _Matched(
        matches=np.concatenate(matches),
        differing=np.concatenate(differing),
        unmatched=np.concatenate(unmatched),
        pairs=pairs,
        faces=faces,
        voxels_compared=voxels_compared,
    )


def _upper_neighbours(grid: BlockGrid, block: Block) -> Iterator[Block]:
    """Yield the neighbours across faces, edges and corners that come later in raster order."""
    for offset in _UPPER:
        z, y, x = (i + d for i, d in zip(block.index, offset, strict=True))
        if all(0 <= i < n for i, n in zip((z, y, x), grid.counts, strict=True)):
            yield grid.at((z, y, x))


def _offset(low: Block, high: Block) -> Triple:
    z, y, x = (b - a for a, b in zip(low.index, high.index, strict=True))
    return z, y, x


def _rows(blocks: tuple[int, int], *columns: np.ndarray) -> np.ndarray:
    stacked = np.column_stack(columns).astype(np.int64, copy=False)
    return np.column_stack([np.broadcast_to(np.asarray(blocks, np.int64), (len(stacked), 2)), stacked])


def _compare(spec: _Spec, low: Block, high: Block, low_labels: np.ndarray) -> _Compared:
    """Compare two neighbours: which of their cells are one, and where beside the seam they differ.

    The seam is the layer of either core at the face between them; at an edge the 2 x 2 rows around
    it, at a corner the 2 x 2 x 2 voxels. Every halo holds it.
    """
    shared = low.outer.intersect(high.outer)
    a = low_labels[shared.slices_in(low.outer)]
    b = spec.work.read_tile(high, shared)
    rows = overlaps(a, b)
    matches = match_one_to_one(rows, min_iou=spec.min_iou, min_containment=spec.min_containment)
    partner_of_a, partner_of_b = np.zeros(int(a.max()) + 1, np.int64), np.zeros(int(b.max()) + 1, np.int64)
    partner_of_a[matches[:, 0]], partner_of_b[matches[:, 1]] = matches[:, 1], matches[:, 0]

    z, y, x = (abs(d) for d in _offset(low, high))
    seam = low.core.dilate((z, y, x)).intersect(high.core.dilate((z, y, x)))
    a, b = a[seam.slices_in(shared)], b[seam.slices_in(shared)]
    beliefs = overlaps(a, b)
    agree = (beliefs[:, 1] > 0) & (partner_of_a[beliefs[:, 0]] == beliefs[:, 1])
    beside = np.zeros(len(partner_of_a), np.int64)
    beside[beliefs[agree, 0]] = beliefs[agree, 2]

    sides = [core.intersect(seam).slices_in(seam) for core in (low.core, high.core)]
    (a_low, a_high), (b_low, b_high) = (
        [_present(labels[side], len(partner)) for side in sides]
        for labels, partner in ((a, partner_of_a), (b, partner_of_b))
    )
    lost = [
        np.flatnonzero(on_low & on_high & (partner == 0))
        for on_low, on_high, partner in ((a_low, a_high, partner_of_a), (b_low, b_high, partner_of_b))
    ]
    return _Compared(
        matches=matches,
        beside=beside[matches[:, 0]],
        crosses=a_low[matches[:, 0]] & b_high[matches[:, 1]],
        differing=beliefs[~agree],
        unmatched=np.concatenate([np.column_stack([np.full(len(n), i), n]) for i, n in enumerate(lost)]),
        seam=seam,
        low=a,
        high=b,
        partner_of_low=partner_of_a,
        partner_of_high=partner_of_b,
    )


def _present(labels: np.ndarray, n: int) -> np.ndarray:
    present = np.zeros(n, np.bool_)
    present[labels] = True
    present[0] = False
    return present


# 3. Join ------------------------------------------------------------------------------------------------


def _join(spec: _Spec, seen: list[_Seen], matched: list[_Matched]) -> _Joined:
    """Step 3: join matches to cells, known by their first voxel, and number them in that order."""
    first = np.concatenate([cells.first for cells in seen])
    offsets = np.cumsum([0, *(len(cells.first) for cells in seen)])
    matches = np.concatenate([found.matches for found in matched])
    blocks = matches[:, :2]
    pairs = offsets[blocks] + matches[:, 2:4] - 1
    kept = joinable(pairs, intersection=matches[:, 4], union=matches[:, 5], blocks=blocks)
    ids, representative = connected(pairs[kept])
    sets, of_set = np.unique(representative, return_inverse=True)
    lowest = np.full(len(sets), np.iinfo(np.int64).max)
    np.minimum.at(lowest, of_set, first[ids])
    identity = first.copy()
    identity[ids] = lowest[of_set]
    cells = np.unique(identity)
    final = number_cells(cells)[np.searchsorted(cells, identity)]
    spec.work.write_final(final)
    return _Joined(first, final, offsets, cells, matches, kept)


# 4. Relabel ---------------------------------------------------------------------------------------------


def _relabel(spec: _Spec, client: Client | None, joined: _Joined) -> None:
    spec.work.create_labels(joined.final.dtype)
    blocks = range(len(spec.work.grid))
    for _ in map_blocks(_relabel_block, spec, blocks, client=client, stage="relabel", name="relabel-block"):
        pass


def _relabel_block(spec: _Spec, number: int) -> None:
    """Step 4: write the final labels of a core; its own cells' lookup is all that it reads of them."""
    block = spec.work.grid[number]
    with spec.work.writing_block():
        lookup = spec.work.lookup_of(number)
        spec.work.write_labels(block.core, apply_lookup(spec.work.read_tile(block, block.core), lookup))


# Audit --------------------------------------------------------------------------------------------------


def _audit(spec: _Spec, seen: list[_Seen], matched: list[_Matched], joined: _Joined) -> LabelBlocksAudit:
    grid = spec.work.grid
    differing = _still_differing(matched, joined)
    unmatched = _still_unmatched(matched, joined)
    cut = np.unique(joined.final[np.concatenate([cells.at_the_end for cells in seen])])
    return LabelBlocksAudit(
        cells=len(joined.cells),
        blocks=len(grid),
        faces=sum(found.faces for found in matched),
        block_pairs=sum(found.pairs for found in matched),
        voxels_compared=sum(found.voxels_compared for found in matched),
        crossings=int(joined.matches[joined.kept, 7].sum()),
        merges=int(joined.kept.sum()),
        conflicts=int((~joined.kept).sum()),
        disagreeing_voxels=int(differing[:, 4].sum()),
        disagreements=tuple(_places(spec, differing, joined)),
        unmatched_crossings=len(unmatched),
        unmatched=tuple(_unmatched_places(grid, unmatched, joined)),
        larger_than_halo=len(cut),
        larger_than_halo_zyx=tuple(_position(joined.cells[n - 1], grid) for n in cut[:MOST_LISTED]),
        density_check=_density_check(joined.cells, grid),
    )


def _still_differing(matched: list[_Matched], joined: _Joined) -> np.ndarray:
    """Leave out beliefs that came to be one cell by way of other blocks; add refused matches."""
    rows = np.concatenate([found.differing for found in matched])
    low = joined.labels_of(rows[:, 0], rows[:, 2])
    high = joined.labels_of(rows[:, 1], rows[:, 3])
    refused = joined.matches[~joined.kept][:, [0, 1, 2, 3, 6]]
    rows = np.concatenate([rows[(low != high) | (low == 0)], refused[refused[:, 4] > 0]])
    return rows[np.lexsort(rows.T[3::-1])]


def _places(spec: _Spec, differing: np.ndarray, joined: _Joined) -> list[Disagreement]:
    """Find the first voxels that two blocks gave to different cells, comparing those two again."""
    grid = spec.work.grid
    places: list[Disagreement] = []
    for numbers, rows in groupby(differing.tolist(), key=lambda row: (row[0], row[1])):
        if len(places) >= MOST_LISTED:
            break
        blocks = (grid[numbers[0]], grid[numbers[1]])
        found = _compare(spec, *blocks, spec.work.read_tile(blocks[0], blocks[0].outer))
        wanted = np.array([row[2:4] for row in rows]) @ (2**32, 1)
        beliefs = found.low.astype(np.int64) * 2**32 + found.high
        at = np.argwhere(np.isin(beliefs, wanted))[: MOST_LISTED - len(places)]
        for z, y, x in at.tolist():
            zyx = Box((z, y, x), (z, y, x)).shift(found.seam.start).start
            low = _name(int(found.low[z, y, x]), numbers, found.partner_of_low, joined)
            high = _name(int(found.high[z, y, x]), numbers[::-1], found.partner_of_high, joined)
            places.append(Disagreement(zyx, numbers, (low, high)))
    return sorted(places, key=lambda place: (place.zyx, place.blocks))


def _name(number: int, blocks: tuple[int, int], partner: np.ndarray, joined: _Joined) -> int | None:
    """Return the label in the result of what the first block sees; a cell of its halo by its match."""
    if number == 0:
        return 0
    for block, local in zip(blocks, (number, int(partner[number])), strict=True):
        label = int(joined.labels_of(np.array([block]), np.array([local]))[0])
        if label:
            return label
    return None


def _still_unmatched(matched: list[_Matched], joined: _Joined) -> np.ndarray:
    """Leave out cells that came to have a part in the other block by way of others; add refused matches."""
    rows = np.concatenate([found.unmatched for found in matched])
    labels = joined.labels_of(rows[:, 0], rows[:, 2]).astype(np.int64)
    kept = joined.matches[joined.kept]
    parts = np.concatenate([kept[:, [0, 2]], kept[:, [1, 3]]])
    n_blocks = len(joined.offsets) - 1
    present = joined.labels_of(parts[:, 0], parts[:, 1]).astype(np.int64) * n_blocks + parts[:, 0]
    rows = rows[~np.isin(labels * n_blocks + rows[:, 1], present)]
    refused = joined.matches[~joined.kept]
    rows = np.unique(np.concatenate([rows, refused[:, [0, 1, 2]], refused[:, [1, 0, 3]]]), axis=0)
    return rows


def _unmatched_places(grid: BlockGrid, rows: np.ndarray, joined: _Joined) -> Iterator[UnmatchedCrossing]:
    for block, other, number in rows[:MOST_LISTED].tolist():
        row = joined.offsets[block] + number - 1
        yield UnmatchedCrossing(_position(joined.first[row], grid), int(joined.final[row]), (block, other))


def _position(index: int, grid: BlockGrid) -> Triple:
    z, y, x = np.unravel_index(index, grid.volume_shape)
    return int(z), int(y), int(x)


def _density_check(cells: np.ndarray, grid: BlockGrid) -> SeamDensity | None:
    """Compare the density of cells, each at its first voxel, beside the seams and farther away."""
    counts: SeamCounts | None = None
    for start in range(0, max(len(cells), 1), _ROWS_AT_ONCE):
        zyx = np.stack(np.unravel_index(cells[start : start + _ROWS_AT_ONCE], grid.volume_shape), axis=1)
        part = count_near_seams(zyx, block_shape=grid.block_shape, volume_shape=grid.volume_shape)
        counts = part if counts is None else counts + part
    if counts is None or counts.widest == 0:
        return None
    return counts.check(min(max(grid.halo), counts.widest))


def _provenance(spec: _Spec, audit: LabelBlocksAudit) -> dict[str, Any]:
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
