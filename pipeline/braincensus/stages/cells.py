"""Whole cells: the parts that blocks measured are joined, and filters judge the whole.

The owner of a cell joins its parts: its own file, and what the blocks around it measured of cells that
they do not own. Nothing is filtered before: half a cell is small, dim and not round.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod

import numpy as np

from braincensus.blocks import BlockGrid
from braincensus.config import Filters
from braincensus.stages.identities import Aliases, owners_of
from braincensus.stages.label import BlockSummary, foreign_name, owned_name, touching_name
from braincensus.store import Output
from braincensus.tasks import Context
from braincensus_kernels.intensity import IntensityScale
from braincensus_kernels.measure import PARTIAL_COLUMNS, cells_from_partials, merge_partials
from braincensus_kernels.touching import border_within, crossing_correction, merge_touching
from braincensus_kernels.union_find import connected

MERGED_COLUMNS = ("seed", *PARTIAL_COLUMNS)
"""Rows of a merged file, which is one int64 array of shape (columns, cells), cells in order of seed."""

_PARTS, _FIRST_PART = "contributors", "contributors_from"


def merged_name(number: int) -> str:
    """Name of a block's working file: the whole cells that it owns, filtered."""
    return f"merged/{number:07d}"


@dataclass(frozen=True)
class _Cells:
    grid: BlockGrid
    output: Output
    aliases: Aliases
    filters: Filters
    scale: IntensityScale
    voxel_size_um: tuple[float, float, float]
    touching: bool
    columns: bool = False


def write_contributors(context: Context, aliases: Aliases, blocks: list[BlockSummary]) -> None:
    """Write, for every block, which blocks hold parts of its cells; one sorted list, and where each begins.

    A cell that goes by another block's voxel is joined by that block: it hears from whoever the other
    would have heard from.
    """
    grid, output = context.plan.label_grid, context.output
    owner = np.concatenate([block.owners for block in blocks])
    part = np.repeat(np.array([block.number for block in blocks], np.int32), [len(b.owners) for b in blocks])
    order = np.lexsort((part, owner))
    owner, part = owner[order], part[order]
    first = np.searchsorted(owner, np.arange(len(grid) + 1))
    if aliases.size:
        old, new = (owners_of(voxels, grid) for voxels in aliases.pairs())
        moved = np.unique(np.stack([old[old != new], new[old != new]], axis=1), axis=0)
        more = [part[first[a] : first[a + 1]] for a, _ in moved.tolist()]
        owner = np.concatenate([owner, np.repeat(moved[:, 1], [len(m) for m in more]), moved[:, 1]])
        part = np.concatenate([part, *more, moved[:, 0]]).astype(np.int32)
        owner, part = np.unique(np.stack([owner, part]), axis=1)
        first = np.searchsorted(owner, np.arange(len(grid) + 1))
    output.write_map(_PARTS, part)
    output.write_map(_FIRST_PART, first)


@dataclass(frozen=True)
class Merged:
    """Whole cells of a block: how many, in which layer of blocks; which, if that is asked for."""

    layer: int
    n_cells: int
    n_kept: int
    seeds: np.ndarray
    voxels: np.ndarray


def merge(
    context: Context, aliases: Aliases, scale: IntensityScale, *, touching: bool, columns: bool
) -> Iterator[Merged]:
    """Join and filter the cells of every block; with `columns`, tell seeds and voxels, before any filter."""
    spec = replace(_spec(context, aliases, scale, touching=touching), columns=columns)
    for _, found in context.map(
        "stitch", _merge_block, spec, spec.grid, name="merge-cells", classes=(Merged,)
    ):
        yield found


def one_by_border(
    context: Context, aliases: Aliases, scale: IntensityScale, border: tuple[float, float]
) -> np.ndarray:
    """Return pairs of touching cells whose common border's mean probability is in a range: (n, 2)."""
    spec = _spec(context, aliases, scale, touching=True)
    found = [np.empty((0, 2), np.int64)]
    for _, pairs in context.map("stitch", _borders_of_block, (spec, border), spec.grid, name="merge-borders"):
        found.append(pairs)
    return np.concatenate(found)


def in_large_objects(
    context: Context, aliases: Aliases, scale: IntensityScale, seeds: np.ndarray, voxels: np.ndarray
) -> np.ndarray:
    """Tell which cells are part of a too large object: cells that touch, directly or through others.

    Parameters
    ----------
    seeds, voxels
        All cells, before any filter, in order of seed.
    """
    spec = _spec(context, aliases, scale, touching=True)
    most = spec.filters.max_object_volume_um3
    assert most is not None
    pairs = [np.empty((0, 2), np.int64)]
    for _, found in context.map("stitch", _contacts_of_block, spec, spec.grid, name="touching-cells"):
        pairs.append(found)
    touching, objects = connected(np.concatenate(pairs))
    members = np.arange(len(seeds))
    members[np.searchsorted(seeds, touching)] = np.searchsorted(seeds, objects)
    total = np.zeros(len(seeds), np.int64)
    np.add.at(total, members, voxels)
    too_large: np.ndarray = total[members] * prod(spec.voxel_size_um) > most
    return too_large


def _spec(context: Context, aliases: Aliases, scale: IntensityScale, *, touching: bool) -> _Cells:
    plan = context.plan
    return _Cells(
        grid=plan.label_grid,
        output=context.output,
        aliases=aliases,
        filters=plan.config.filters,
        scale=scale,
        voxel_size_um=plan.volume.voxel_size_um,
        touching=touching,
    )


def _contributors(spec: _Cells, number: int) -> list[int]:
    first = spec.output.map_work(_FIRST_PART)
    parts: list[int] = spec.output.map_work(_PARTS)[first[number] : first[number + 1]].tolist()
    return parts


def _merge_block(spec: _Cells, number: int) -> Merged:
    parts = []
    for other in sorted({number, *_contributors(spec, number)}):
        # A cell of another block can be this one's only under an alias.
        own = other == number or spec.aliases.size > 0
        foreign = other != number or spec.aliases.size > 0
        for name in [owned_name(other)] * own + [foreign_name(other)] * foreign:
            rows = spec.output.read_work(name)
            rows["seed"] = spec.aliases.of(rows["seed"])
            mine = owners_of(rows["seed"], spec.grid) == number
            parts.append({column: values[mine] for column, values in rows.items()})
    cells = merge_partials(parts)
    if spec.touching and spec.aliases.size:
        _remove_inner_borders(spec, number, cells)
    kept = _passes(spec, cells)
    merged = np.stack([cells[column][kept] for column in MERGED_COLUMNS])
    spec.output.write_map(merged_name(number), merged)
    told = slice(None) if spec.columns else slice(0)
    return Merged(
        layer=spec.grid[number].index[0],
        n_cells=len(kept),
        n_kept=int(np.count_nonzero(kept)),
        seeds=cells["seed"][told],
        voxels=cells["voxels"][told],
    )


def _remove_inner_borders(spec: _Cells, number: int, cells: dict[str, np.ndarray]) -> None:
    """Take back the surface between labels of a block that turned out to be one cell."""
    for pairs in _touching_of(spec, number):
        one = pairs["a"] == pairs["b"]
        inner = {column: values[one] for column, values in pairs.items()}
        correction = crossing_correction(inner["a"], inner)
        place = np.searchsorted(cells["seed"], correction["seed"])
        for column, values in correction.items():
            if column != "seed":
                cells[column][place] -= values


def _borders_of_block(spec_and_range: tuple[_Cells, tuple[float, float]], number: int) -> np.ndarray:
    spec, (low, high) = spec_and_range
    return border_within(_touching_cells(spec, number), low, high)


def _contacts_of_block(spec: _Cells, number: int) -> np.ndarray:
    touching = _touching_cells(spec, number)
    return np.stack([touching["a"], touching["b"]], axis=1)


def _touching_cells(spec: _Cells, number: int) -> dict[str, np.ndarray]:
    """Add up what all blocks saw between two cells, for the pairs whose smaller one is this block's."""
    parts = []
    for pairs in _touching_of(spec, number):
        two = pairs["a"] != pairs["b"]
        parts.append({column: values[two] for column, values in pairs.items()})
    return merge_touching(parts)


def _touching_of(spec: _Cells, number: int) -> Iterator[dict[str, np.ndarray]]:
    """Yield which cells touch, by final identity, where the smaller of the two is this block's."""
    for other in _contributors(spec, number):
        pairs = spec.output.read_work(touching_name(other))
        pairs["a"], pairs["b"] = spec.aliases.of(pairs["a"]), spec.aliases.of(pairs["b"])
        mine = owners_of(np.minimum(pairs["a"], pairs["b"]), spec.grid) == number
        yield {column: values[mine] for column, values in pairs.items()}


def _passes(spec: _Cells, cells: dict[str, np.ndarray]) -> np.ndarray:
    """Judge whole cells."""
    given = spec.filters
    rules = (
        ("volume_um3", given.min_volume_um3, given.max_volume_um3),
        ("sphericity", given.min_sphericity, None),
        ("mean_intensity", given.min_mean_intensity, given.max_mean_intensity),
    )
    keep = np.ones(len(cells["seed"]), dtype=bool)
    if all(least is None and most is None for _, least, most in rules):
        return keep
    measured = cells_from_partials(cells, voxel_size_um=spec.voxel_size_um, scale=spec.scale)
    for column, least, most in rules:
        if least is not None:
            keep &= measured[column] >= least
        if most is not None:
            keep &= measured[column] <= most
    return keep
