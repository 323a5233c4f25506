"""After the joining, on the client: what the blocks found beside their seams becomes the audit.

What two blocks believed is judged by the result: beliefs that came to be one cell by way of other blocks
agree after all, refused matches do not. Only blocks that disagree are read again, for the places.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

import numpy as np

from braincensus.blocks import BlockGrid
from braincensus.blockwise.audit import (
    MOST_LISTED,
    Disagreement,
    LabelBlocksAudit,
    UnmatchedCrossing,
)
from braincensus.blockwise.join import Joined
from braincensus.blockwise.label import Seen
from braincensus.blockwise.match import Matched, compare
from braincensus.blockwise.spec import Spec
from braincensus_kernels.boxes import Box, Triple
from braincensus_kernels.seam_density import SeamCounts, SeamDensity, count_near_seams

_ROWS_AT_ONCE = 2**20


def audit(spec: Spec, seen: list[Seen], matched: list[Matched], joined: Joined) -> LabelBlocksAudit:
    """Count what the blocks disagreed on, and find the places of the first of each kind."""
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


def _still_differing(matched: list[Matched], joined: Joined) -> np.ndarray:
    """Leave out beliefs that came to be one cell by way of other blocks; add refused matches."""
    rows = np.concatenate([found.differing for found in matched])
    low = joined.labels_of(rows[:, 0], rows[:, 2])
    high = joined.labels_of(rows[:, 1], rows[:, 3])
    refused = joined.matches[~joined.kept][:, [0, 1, 2, 3, 6]]
    rows = np.concatenate([rows[(low != high) | (low == 0)], refused[refused[:, 4] > 0]])
    return rows[np.lexsort(rows.T[3::-1])]


def _places(spec: Spec, differing: np.ndarray, joined: Joined) -> list[Disagreement]:
    """Find the first voxels that two blocks gave to different cells, comparing those two again."""
    grid = spec.work.grid
    places: list[Disagreement] = []
    for numbers, rows in groupby(differing.tolist(), key=lambda row: (row[0], row[1])):
        if len(places) >= MOST_LISTED:
            break
        blocks = (grid[numbers[0]], grid[numbers[1]])
        found = compare(spec, *blocks, spec.work.read_tile(blocks[0], blocks[0].outer))
        wanted = np.array([row[2:4] for row in rows]) @ (2**32, 1)
        beliefs = found.low.astype(np.int64) * 2**32 + found.high
        at = np.argwhere(np.isin(beliefs, wanted))[: MOST_LISTED - len(places)]
        for z, y, x in at.tolist():
            zyx = Box((z, y, x), (z, y, x)).shift(found.seam.start).start
            low = _name(int(found.low[z, y, x]), numbers, found.partner_of_low, joined)
            high = _name(int(found.high[z, y, x]), numbers[::-1], found.partner_of_high, joined)
            places.append(Disagreement(zyx, numbers, (low, high)))
    return sorted(places, key=lambda place: (place.zyx, place.blocks))


def _name(number: int, blocks: tuple[int, int], partner: np.ndarray, joined: Joined) -> int | None:
    """Return the label in the result of what the first block sees; a cell of its halo by its match."""
    if number == 0:
        return 0
    for block, local in zip(blocks, (number, int(partner[number])), strict=True):
        label = int(joined.labels_of(np.array([block]), np.array([local]))[0])
        if label:
            return label
    return None


def _still_unmatched(matched: list[Matched], joined: Joined) -> np.ndarray:
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


def _unmatched_places(grid: BlockGrid, rows: np.ndarray, joined: Joined) -> Iterator[UnmatchedCrossing]:
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
