"""Step 3, on the client: join the matches to cells, and number these 1..N by their first voxels.

No chain of matches fuses two cells of one block: where one would, its strongest matches are joined first and
those that would fuse them are refused. Blocks leave no trace in the order of the numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from braincensus.blockwise.label import Seen
from braincensus.blockwise.match import Matched
from braincensus.blockwise.spec import Spec
from braincensus_kernels.overlap import joinable
from braincensus_kernels.relabel import number_cells
from braincensus_kernels.union_find import connected


@dataclass(frozen=True, eq=False)
class Joined:
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


def run(spec: Spec, seen: list[Seen], matched: list[Matched]) -> Joined:
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
    return Joined(first, final, offsets, cells, matches, kept)
