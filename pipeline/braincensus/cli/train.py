"""`train`: WNet3D without labels."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from braincensus.cli.common import explaining, plain, read_triple, stderr, stdout
from braincensus.cli.options import Channel, Level, VoxelSize

_LENGTH, _LOSS, _CROPS, _WATCH = "How long", "Loss and optimiser", "Network and crops", "While it goes on"


def train(
    context: typer.Context,
    inputs: Annotated[list[str], typer.Argument(metavar="INPUT...", help="volumes to learn from; no labels")],
    out: Annotated[Path, typer.Option(metavar="WEIGHTS.safetensors", help="where to write the weights")],
    voxel_size: VoxelSize = None,
    channel: Channel = None,
    level: Level = None,
    published: Annotated[
        bool, typer.Option("--published", help="start from CellSeg3D's values; options given change them")
    ] = False,
    steps: Annotated[
        int | None,
        typer.Option(min=1, help="optimiser steps", show_default="600", rich_help_panel=_LENGTH),
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(min=1, help="epochs instead of steps", show_default=False, rich_help_panel=_LENGTH),
    ] = None,
    steps_per_epoch: Annotated[
        int | None,
        typer.Option(
            min=1, help="default: until as many voxels were drawn as are tissue", rich_help_panel=_LENGTH
        ),
    ] = None,
    channels: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,C,D",
            help="width of the levels; full size: 64,128,256,512",
            show_default="16,32,64,128",
            rich_help_panel=_CROPS,
        ),
    ] = None,
    classes: Annotated[
        int | None,
        typer.Option(min=2, help="of the encoder", show_default="2", rich_help_panel=_CROPS),
    ] = None,
    dropout: Annotated[
        float | None,
        typer.Option(help="share of features dropped", show_default="0.1", rich_help_panel=_CROPS),
    ] = None,
    crop: Annotated[
        int | None,
        typer.Option(
            min=16,
            help="side of a crop, voxels; multiple of 8",
            show_default="48",
            rich_help_panel=_CROPS,
        ),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(min=1, help="crops a step", show_default="2", rich_help_panel=_CROPS),
    ] = None,
    input_range: Annotated[
        str | None,
        typer.Option(
            "--range",
            metavar="tissue|crop",
            help="what becomes 0 to 100: the volume's range of tissue, or each crop's own",
            show_default="tissue",
            rich_help_panel=_CROPS,
        ),
    ] = None,
    variation: Annotated[
        bool | None,
        typer.Option(
            "--vary/--no-vary",
            help="vary gain, gamma, offset and noise of crops",
            show_default="vary",
            rich_help_panel=_CROPS,
        ),
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(help="of Adam", show_default="0.002", rich_help_panel=_LOSS),
    ] = None,
    weight_decay: Annotated[
        float | None, typer.Option(help="of Adam", show_default="0.01", rich_help_panel=_LOSS)
    ] = None,
    warm_up: Annotated[
        int | None,
        typer.Option(
            help="steps of linear rise of the learning rate", show_default="20", rich_help_panel=_LOSS
        ),
    ] = None,
    final_learning_rate: Annotated[
        float | None,
        typer.Option(
            help="factor it falls to; 1 keeps it constant", show_default="0.05", rich_help_panel=_LOSS
        ),
    ] = None,
    ncuts: Annotated[
        str | None,
        typer.Option(
            metavar="class-mean|pairwise",
            help="form of the soft normalised cut",
            show_default="class-mean",
            rich_help_panel=_LOSS,
        ),
    ] = None,
    ncuts_weight: Annotated[
        float | None, typer.Option(help="of the cut", show_default="0.5", rich_help_panel=_LOSS)
    ] = None,
    reconstruction: Annotated[
        str | None,
        typer.Option(
            metavar="mse|bce", help="error of the decoder", show_default="mse", rich_help_panel=_LOSS
        ),
    ] = None,
    reconstruction_weight: Annotated[
        float | None,
        typer.Option(
            help="of that error (the paper: 5e-3 to 5e-1)", show_default="0.005", rich_help_panel=_LOSS
        ),
    ] = None,
    intensity_sigma: Annotated[
        float | None,
        typer.Option(help="of the cut, in [0, 100] (the paper: 1)", show_default="50", rich_help_panel=_LOSS),
    ] = None,
    spatial_sigma: Annotated[
        float | None, typer.Option(help="of the cut, voxels", show_default="4", rich_help_panel=_LOSS)
    ] = None,
    radius: Annotated[
        int | None, typer.Option(help="of the cut, voxels", show_default="2", rich_help_panel=_LOSS)
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="the same seed gives the same weights on the same machine", show_default="0"),
    ] = None,
    device: Annotated[str, typer.Option(metavar="auto|cpu|cuda")] = "auto",
    precision: Annotated[
        str | None, typer.Option(metavar="auto|float32|bfloat16", show_default="auto")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads", show_default="all")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="go on from the checkpoint of an interrupted training")
    ] = False,
    checkpoint_every: Annotated[
        int, typer.Option(min=1, help="steps from one checkpoint to the next", rich_help_panel=_WATCH)
    ] = 100,
    picture_every: Annotated[
        float | None,
        typer.Option(
            min=0,
            metavar="EPOCHS",
            help="draw input, encoder and decoder of examples; 0: never",
            show_default="8 times",
            rich_help_panel=_WATCH,
        ),
    ] = None,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="write TensorBoard's logs too", rich_help_panel=_WATCH)
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace weights that exist")] = False,
) -> None:
    """Train WNet3D on volumes without labels (SoftNCuts and reconstruction).

    Ctrl-C finishes the step and writes a checkpoint; the same command with --resume goes on from it.
    Several GPUs: torchrun --nproc-per-node 2 --no-python braincensus train ...
    """
    first = os.environ.get("RANK", "0") == "0"
    stdout.quiet = not first  # one of several processes talks
    with explaining():
        from braincensus.report.console import ConsoleProgress
        from braincensus.training import Recipe, TrainingInterruptedError, train_from_paths

        recipe = (Recipe.published() if published else Recipe()).changed(**_changes(context.params))
        with ConsoleProgress(stdout) as bars:
            shown = False

            def progress(done: int, total: int) -> None:
                nonlocal shown
                if not shown:
                    shown = True
                    bars.start("train", total)
                bars.advance("train", 1)

            try:
                trained = train_from_paths(
                    inputs,
                    out,
                    voxel_size_um=None if voxel_size is None else read_triple(voxel_size, "--voxel-size"),
                    channel=channel or 0,
                    level=level or 0,
                    recipe=recipe,
                    device=device,
                    threads=threads,
                    overwrite=overwrite,
                    resume=resume,
                    checkpoint_every=checkpoint_every,
                    picture_every=picture_every,
                    tensorboard=tensorboard,
                    progress=progress,
                    message=lambda text: stdout.print(plain(text), highlight=False, soft_wrap=True),
                )
            except TrainingInterruptedError as err:
                if first:
                    stderr.print(plain(str(err)), highlight=False, soft_wrap=True)
                raise typer.Exit(128 + err.signal_number) from None
        stdout.print(f"weights: {out}\n{trained}", highlight=False, soft_wrap=True)


def _changes(options: dict[str, Any]) -> dict[str, Any]:
    """Return the values of the recipe that were given."""
    changes = {field: options[name] for name, field in _FIELDS.items() if options.get(name) is not None}
    if options["channels"] is not None:
        changes["channels"] = _read_channels(options["channels"])
    if options["variation"] is not None:
        from braincensus.training import Recipe

        changes["variation"] = Recipe().variation if options["variation"] else None
    return changes


_FIELDS = {
    "steps": "steps",
    "epochs": "epochs",
    "steps_per_epoch": "steps_per_epoch",
    "classes": "num_classes",
    "dropout": "dropout",
    "crop": "crop_voxels",
    "batch": "batch",
    "input_range": "input_range",
    "learning_rate": "learning_rate",
    "weight_decay": "weight_decay",
    "warm_up": "warm_up_steps",
    "final_learning_rate": "final_learning_rate",
    "ncuts": "ncuts",
    "ncuts_weight": "ncuts_weight",
    "reconstruction": "reconstruction",
    "reconstruction_weight": "reconstruction_weight",
    "intensity_sigma": "intensity_sigma",
    "spatial_sigma": "spatial_sigma_voxels",
    "radius": "radius_voxels",
    "seed": "seed",
    "precision": "precision",
}
"""Option to field of the recipe."""


def _read_channels(text: str) -> tuple[int, ...]:
    from braincensus.errors import ConfigError

    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"--channels {text!r}: expected four whole numbers, such as 16,32,64,128") from None
