"""`phantom` and `demo`: volumes whose cells are known."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from braincensus.cli.common import TRIPLE, explaining, read_triple, read_whole, stdout
from braincensus.cli.options import Output, Overwrite


def demo(
    directory: Annotated[Path, typer.Argument(metavar="[DIR]", help="where to write")] = Path("demo"),
    overwrite: Overwrite = False,
) -> None:
    """Make a phantom brain, census it with WNet3D, compare with the truth, draw the picture."""
    with explaining():
        from braincensus.demo import run_demo
        from braincensus.report.console import ConsoleProgress

        with ConsoleProgress(stdout) as progress:
            tables = run_demo(directory, overwrite=overwrite, progress=progress)
        for table in tables:
            stdout.print(table)


def phantom(
    output: Output,
    size: Annotated[
        str, typer.Option(metavar=TRIPLE, help="voxels", show_default="192,192,192")
    ] = "192,192,192",
    cells: Annotated[int, typer.Option(help="number of cells")] = 2000,
    seed: Annotated[int, typer.Option(help="the same seed gives the same volume")] = 0,
    voxel_size: Annotated[str, typer.Option("--voxel-size", metavar=TRIPLE, help="um")] = "5,5.26,5.26",
    overwrite: Overwrite = False,
) -> None:
    """Write a synthetic volume whose cells are known, block by block, as OME-Zarr.

    An OUTPUT that ends in .phantom.json is a file of a few lines: its voxels are made when they are read, so
    that it may be larger than any disk.
    """
    with explaining():
        from braincensus.errors import OutputError
        from braincensus.formats.phantom import ENDING, write_phantom_file
        from braincensus.phantom import make_phantom, write_phantom
        from braincensus.report.console import ConsoleProgress
        from braincensus.store.files import writing

        shape = read_whole(size, "--size")
        voxel_um = read_triple(voxel_size, "--voxel-size")
        made = make_phantom(shape=shape, n_cells=cells, seed=seed, voxel_size_um=voxel_um)
        if output.name.endswith(ENDING):
            with writing(output):
                if output.exists() and not overwrite:
                    raise OutputError(f"{output} exists; another path, or --overwrite")
                write_phantom_file(output, made)
            stdout.print(f"{output}: {cells:,} cells, made when they are read", highlight=False)
            return
        with ConsoleProgress(stdout) as progress:
            progress.start("phantom", shape[0] * shape[1] * shape[2])
            write_phantom(
                output, made, overwrite=overwrite, progress=lambda voxels: progress.advance("phantom", voxels)
            )
        stdout.print(
            f"{output}: {cells:,} cells; the truth is in {output}/truth/cells.parquet", highlight=False
        )
