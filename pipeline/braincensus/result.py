"""What a finished run gives back: lazy views of its output, also from `open_result` later."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from braincensus.stages.measure import DENSITY
from braincensus.stages.relabel import LABELS
from braincensus.stages.segment import DARK, PROBABILITY
from braincensus.store import CellTable, Output, open_cells, open_output


@dataclass(frozen=True)
class Result:
    """A finished census.

    Examples
    --------
    >>> result = open_result("brain.census.zarr")            # doctest: +SKIP
    >>> result.n_cells, result.seams["exact"]                # doctest: +SKIP
    (4217, True)
    >>> result.cells.to_pandas().nlargest(3, "volume_um3")   # doctest: +SKIP
    """

    output: Output

    @property
    def path(self) -> Path:
        """Where the OME-Zarr is."""
        return Path(self.output.path)

    @property
    def provenance(self) -> dict[str, Any]:
        """Versions, configuration, input, weights, thresholds, timings, seam audit."""
        return self.output.provenance

    @property
    def n_cells(self) -> int:
        """Number of cells; labels are 1..n_cells."""
        return int(self.provenance["n_cells"])

    @property
    def cells(self) -> CellTable:
        """The cell table, one row per label in order; read lazily from Parquet."""
        return open_cells(self.output)

    @property
    def labels(self) -> zarr.Array[Any]:
        """Instance labels, zyx, 0 is background; uint32 (uint64 beyond 4e9 cells)."""
        return self.output.array(LABELS)

    @property
    def probability(self) -> zarr.Array[Any]:
        """Foreground probability, zyx, uint16: 65535 is 1."""
        return self.output.array(PROBABILITY)

    @property
    def density(self) -> zarr.Array[Any]:
        """Cells per mm^3 on the density grid, zyx, float32."""
        return self.output.array(DENSITY)

    @property
    def dark(self) -> np.ndarray:
        """Boxes that the foreground model skipped, for nothing in them is bright enough to be seen.

        int64, shape (n, 6): first voxel along z, y, x, and where they end. The result is the same, bit for
        bit, as if they had not been skipped.
        """
        return np.asarray(self.output.map_work(DARK))

    @property
    def seams(self) -> dict[str, Any]:
        """The seam audit: ``exact``, faces checked, cells crossing, disagreements."""
        seams: dict[str, Any] = self.provenance["seams"]
        return seams

    @property
    def timings(self) -> dict[str, float]:
        """Seconds of each stage."""
        timings: dict[str, float] = self.provenance["timings_s"]
        return timings


def open_result(path: str | Path) -> Result:
    """Open a finished output.

    Raises
    ------
    OutputError
        If there is none at `path`, or the run that wrote it did not finish.
    """
    return Result(open_output(path))
