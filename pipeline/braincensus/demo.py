"""The demo: a phantom brain whose cells are known, a census of it, and how well the two agree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from braincensus.census import run
from braincensus.config import RunConfig
from braincensus.phantom import read_truth, write_phantom
from braincensus.progress import Progress
from braincensus.report.console import result_table
from braincensus.report.picture import draw_census
from braincensus_kernels.metrics import Match, match_centroids
from braincensus_kernels.phantom import Phantom

SHAPE = (160, 224, 224)
N_CELLS = 1500
SEED = 2026
MATCH_UM = 10.0
"""A detected and a true cell may match if their centroids are this close: about a cell's radius."""


def run_demo(
    directory: Path, *, overwrite: bool, progress: Progress, config: RunConfig | None = None
) -> list[Table]:
    """Write a phantom of 8 million voxels, census it, compare with the truth and draw the picture.

    Returns
    -------
    list of Table
        What to show: the census, the comparison, and where to look.
    """
    source, output, picture = (
        directory / name for name in ("phantom.ome.zarr", "phantom.census.zarr", "census.png")
    )
    phantom = Phantom(shape=SHAPE, n_cells=N_CELLS, seed=SEED)
    directory.mkdir(parents=True, exist_ok=True)
    progress.message(f"phantom: {N_CELLS:,} known cells in {' x '.join(map(str, SHAPE))} voxels")
    write_phantom(source, phantom, block_voxels=(128, 128, 128), overwrite=overwrite)
    result = run(source, output, config=config, fresh=overwrite, progress=progress)
    truth = read_truth(source)
    cells = result.cells.to_pandas()
    match = compare(cells, truth)
    draw_census(
        picture,
        image=source,
        cells=cells,
        density=np.asarray(result.density[:]),
        density_bin_um=(config or RunConfig()).density.bin_um,
        truth=truth,
        match=match,
        title="braincensus demo",
    )
    return [
        result_table(result),
        _comparison(match, len(cells), len(truth)),
        _places(source, output, picture),
    ]


def compare(cells: Any, truth: Any) -> Match:
    """Match detected with true cells by their centroids (tables with z_um, y_um, x_um)."""
    columns = ["z_um", "y_um", "x_um"]
    return match_centroids(cells[columns].to_numpy(), truth[columns].to_numpy(), max_distance_um=MATCH_UM)


def _comparison(match: Match, n_found: int, n_true: int) -> Table:
    table = Table(title="Against the truth", show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_row("true cells", f"{n_true:,}")
    table.add_row("found", f"{n_found:,} ({100 * (n_found - n_true) / n_true:+.1f} %)")
    table.add_row("precision", f"{match.precision:.3f}")
    table.add_row("recall", f"{match.recall:.3f}")
    table.add_row("F1", f"{match.f1:.3f}")
    return table


def _places(source: Path, output: Path, picture: Path) -> Table:
    table = Table(title="Where to look", show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column()
    table.add_row("picture", str(picture))
    table.add_row("volume", str(source))
    table.add_row("census", str(output))
    table.add_row("in napari", f"napari --plugin napari-ome-zarr {output}")
    table.add_row(
        "the table",
        f"python -c \"import braincensus as b; print(b.open_result('{output}').cells.to_pandas())\"",
    )
    return table
