"""Step 2: a block and each of its upper neighbours (13) compare their cells on what both labelled.

Two cells are one if each is the other's best overlap and they overlap enough; never because they touch.
Only cells with voxels in both cores need joining. On the voxels right beside the seam, what the two blocks
believe is compared for the audit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np
from distributed import Client

from braincensus.blocks import Block, BlockGrid
from braincensus.blockwise.spec import Spec
from braincensus.tasks import map_blocks
from braincensus_kernels.boxes import Box, Triple
from braincensus_kernels.overlap import match_one_to_one, overlaps

_UPPER = [offset for offset in product((-1, 0, 1), repeat=3) if offset > (0, 0, 0)]


@dataclass(frozen=True, eq=False)
class Compared:
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
class Matched:
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


def run(spec: Spec, client: Client | None) -> list[Matched]:
    """Compare all blocks with their upper neighbours; what each found, in their order."""
    blocks = range(len(spec.work.grid))
    found = dict(map_blocks(_match_block, spec, blocks, client=client, stage="match", name="match-block"))
    return [found[number] for number in blocks]


def _match_block(spec: Spec, number: int) -> Matched:
    """Step 2: compare a block with its neighbours above, on all voxels that both labelled."""
    work = spec.work
    block = work.grid[number]
    mine, k = work.read_tile(block, block.outer), work.cells_of(number)
    matches, differing, unmatched = ([np.empty((0, n), np.int64)] for n in (8, 5, 3))
    pairs = faces = voxels_compared = 0
    for high in _upper_neighbours(work.grid, block):
        found = compare(spec, block, high, mine)
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
    return Matched(
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


def compare(spec: Spec, low: Block, high: Block, low_labels: np.ndarray) -> Compared:
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
    return Compared(
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
