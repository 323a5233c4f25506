"""`weights list`, `info`, `convert`, `calibrate` and `fetch`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from braincensus.cli.common import explaining, stdout
from braincensus.cli.options import (
    Channel,
    ConfigFile,
    Device,
    Input,
    Level,
    Timepoint,
    VoxelSize,
    Workers,
    read_settings,
)

weights_app = typer.Typer(
    help="Weights: which there are, what they hold, fetch, convert, calibrate them.", no_args_is_help=True
)

Source = Annotated[
    str, typer.Argument(metavar="WEIGHTS", help="a name, or a .safetensors or .pth file", show_default=False)
]
Out = Annotated[
    Path, typer.Argument(metavar="OUT.safetensors", help="where to write them", show_default=False)
]
OverwriteFile = Annotated[bool, typer.Option("--overwrite", help="replace a file that exists")]


@weights_app.command("list")
def list_() -> None:
    """Show the weights that have a name, and which of them are on this machine."""
    with explaining():
        from rich.table import Table

        from braincensus.weights.fetching import cached
        from braincensus_kernels.models.registry import REGISTRY

        table = Table("name", "what", "here", title="Weights", title_justify="left")
        for name, entry in REGISTRY.items():
            if entry.published is None:
                here = "shipped"
            else:
                here = "fetched" if cached(name) else f"no ({entry.published.about_mb} MB)"
            table.add_row(name, entry.title, here)
        stdout.print(table)


@weights_app.command()
def info(source: Source) -> None:
    """Say what a file of weights holds: network, calibration, how far it looks, where it is from."""
    with explaining():
        from rich.table import Table

        from braincensus.weights.files import describe_weights

        table = Table(show_header=False, title=source, title_justify="left")
        table.add_column(style="bold")
        table.add_column(overflow="fold")
        for title, text in describe_weights(source).items():
            table.add_row(title, text)
        stdout.print(table)


@weights_app.command()
def convert(
    source: Source,
    out: Out,
    encoder_only: Annotated[
        bool, typer.Option("--encoder-only", help="leave WNet3D's decoder out: half the size")
    ] = False,
    overwrite: OverwriteFile = False,
) -> None:
    """Write weights as safetensors, which cannot hold code; a .pth of CellSeg3D, for example."""
    with explaining():
        from braincensus.weights.files import convert_weights

        sha256 = convert_weights(source, out, encoder_only=encoder_only, overwrite=overwrite)
        stdout.print(
            f"{out}: {out.stat().st_size / 1e6:,.1f} MB, SHA-256 {sha256}", highlight=False, soft_wrap=True
        )


@weights_app.command()
def calibrate(
    context: typer.Context,
    input: Input,
    out: Out,
    weights: Annotated[str, typer.Option(help="a name or a file")] = "compact",
    config: ConfigFile = None,
    channel: Channel = None,
    timepoint: Timepoint = None,
    level: Level = None,
    voxel_size: VoxelSize = None,
    device: Device = None,
    workers: Workers = None,
    overwrite: OverwriteFile = False,
) -> None:
    """Measure the network's norms on a reference volume and keep them with the weights.

    Then `foreground.calibration: stored` in the configuration, or `run --calibration stored`, treats every
    volume of a study alike.
    """
    with explaining():
        from braincensus.report.console import ConsoleProgress
        from braincensus.weights.calibrating import calibrate_weights

        settings = read_settings(context.params)
        with ConsoleProgress(stdout) as progress:
            done = calibrate_weights(input, out, config=settings, overwrite=overwrite, progress=progress)
        stdout.print(
            f"{out}: calibrated on {len(done.windows)} windows; looks {done.reach_voxels} voxels far; "
            f"foreground is class {done.statistics.foreground_class}\n"
            f"use: braincensus run ... --weights {out} --calibration stored",
            highlight=False,
            soft_wrap=True,
        )


@weights_app.command()
def fetch(
    name: Annotated[str, typer.Argument(metavar="NAME", help="see `weights list`", show_default=False)],
    mirror: Annotated[
        str | None, typer.Option(metavar="URL", help="another address of the same archive, https")
    ] = None,
    archive: Annotated[
        Path | None, typer.Option(metavar="FILE.tar.gz", help="the archive, where there is no network")
    ] = None,
    accept_change: Annotated[
        bool, typer.Option("--accept-change", help="take an archive that is not the one first fetched")
    ] = False,
) -> None:
    """Download published weights from their home, once, into this machine's cache."""
    with explaining():
        from rich.progress import Progress

        from braincensus.weights.fetching import fetch as fetch_weights

        with Progress(console=stdout, disable=not stdout.is_terminal) as bars:
            bar = bars.add_task(name, total=None)
            path = fetch_weights(
                name,
                mirror=mirror,
                archive=archive,
                accept_change=accept_change,
                progress=lambda done, total: bars.update(bar, completed=done, total=total or None),
            )
        stdout.print(f"{name}: {path}", highlight=False, soft_wrap=True)
