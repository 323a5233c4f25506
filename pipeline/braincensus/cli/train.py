"""`train`: WNet3D without labels."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from braincensus.cli.common import explaining, read_triple, stdout
from braincensus.cli.options import Channel, Level, VoxelSize


def train(
    inputs: Annotated[list[str], typer.Argument(metavar="INPUT...", help="volumes to learn from; no labels")],
    out: Annotated[Path, typer.Option(metavar="WEIGHTS.safetensors", help="where to write the weights")],
    voxel_size: VoxelSize = None,
    channel: Channel = None,
    level: Level = None,
    channels: Annotated[
        str, typer.Option(metavar="A,B,C,D", help="width of the levels; full size: 64,128,256,512")
    ] = "16,32,64,128",
    steps: Annotated[int, typer.Option(min=1, help="optimiser steps")] = 500,
    crop: Annotated[int, typer.Option(min=16, help="side of a training crop, voxels; multiple of 8")] = 64,
    batch: Annotated[int, typer.Option(min=1, help="crops a step")] = 2,
    learning_rate: Annotated[float, typer.Option(min=1e-8, help="of Adam")] = 2e-3,
    seed: Annotated[int, typer.Option(help="the same seed gives the same weights on the same machine")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace weights that exist")] = False,
) -> None:
    """Train WNet3D on volumes without labels (SoftNCuts and reconstruction)."""
    with explaining():
        from braincensus.report.console import ConsoleProgress
        from braincensus.train import train_from_paths

        with ConsoleProgress(stdout) as progress:
            progress.start("train", steps)
            trained = train_from_paths(
                inputs,
                out,
                voxel_size_um=None if voxel_size is None else read_triple(voxel_size, "--voxel-size"),
                channel=channel or 0,
                level=level or 0,
                channels=_read_channels(channels),
                steps=steps,
                crop_voxels=crop,
                batch=batch,
                learning_rate=learning_rate,
                seed=seed,
                overwrite=overwrite,
                progress=lambda done, total: progress.advance("train", 1),
            )
        stdout.print(f"weights: {out}\n{trained}", highlight=False)


def _read_channels(text: str) -> tuple[int, ...]:
    from braincensus.errors import ConfigError

    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"--channels {text!r}: expected four whole numbers, such as 16,32,64,128") from None
