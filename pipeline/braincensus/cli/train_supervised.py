"""`train-supervised`: SegResNet or SwinUNETR, from labels."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from braincensus.cli.common import explaining, plain, read_triple, stderr, stdout
from braincensus.cli.options import Channel, Level, VoxelSize

_LABELS, _LENGTH, _CROPS = "Labels: one of these", "How long", "Network and crops"


def train_supervised(
    context: typer.Context,
    out: Annotated[Path, typer.Option(metavar="WEIGHTS.safetensors", help="where to write the weights")],
    inputs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[INPUT]...",
            help="volumes to learn from; not needed with --from-census, which says where its volume is",
            show_default=False,
        ),
    ] = None,
    labels: Annotated[
        list[str] | None,
        typer.Option(
            metavar="VOLUME",
            help="labels or a mask: what is not 0 is a cell; once for each INPUT",
            show_default=False,
            rich_help_panel=_LABELS,
        ),
    ] = None,
    from_census: Annotated[
        list[str] | None,
        typer.Option(
            metavar="OUTPUT",
            help="what `braincensus run` found: training from WNet3D's labels; may be given several times",
            show_default=False,
            rich_help_panel=_LABELS,
        ),
    ] = None,
    voxel_size: VoxelSize = None,
    channel: Channel = None,
    level: Level = None,
    kind: Annotated[
        str,
        typer.Option("--network", metavar="segresnet|swinunetr", rich_help_panel=_CROPS),
    ] = "segresnet",
    size: Annotated[
        int | None,
        typer.Option(
            help="features at full resolution", show_default="8 or 48, as published", rich_help_panel=_CROPS
        ),
    ] = None,
    crop: Annotated[
        int,
        typer.Option(
            min=16, help="side, voxels; multiple of 8 (SegResNet) or 32 (SwinUNETR)", rich_help_panel=_CROPS
        ),
    ] = 64,
    batch: Annotated[
        int | None,
        typer.Option(min=1, help="crops a step", show_default="10 or 5", rich_help_panel=_CROPS),
    ] = None,
    augment: Annotated[
        bool,
        typer.Option(
            "--augment/--no-augment",
            help="shift intensities, flip, turn and deform crops",
            rich_help_panel=_CROPS,
        ),
    ] = True,
    validation_share: Annotated[
        float, typer.Option(metavar="SHARE", help="of the regions: held out", rich_help_panel=_CROPS)
    ] = 0.2,
    epochs: Annotated[int, typer.Option(min=1, rich_help_panel=_LENGTH)] = 50,
    steps_per_epoch: Annotated[
        int | None,
        typer.Option(min=1, help="default: until each region was seen once", rich_help_panel=_LENGTH),
    ] = None,
    loss: Annotated[str, typer.Option(metavar="generalized-dice|dice|dice-ce|tversky")] = "generalized-dice",
    learning_rate: Annotated[float, typer.Option(help="of Adam")] = 1e-3,
    seed: Annotated[int, typer.Option(help="the same seed gives the same weights on the same machine")] = 0,
    device: Annotated[str, typer.Option(metavar="auto|cpu|cuda|cuda:N")] = "auto",
    precision: Annotated[str, typer.Option(metavar="auto|float32|bfloat16")] = "auto",
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads", show_default="torch's choice")
    ] = None,
    checkpoint_every: Annotated[int, typer.Option(min=1, help="steps, and after each epoch")] = 50,
    resume: Annotated[bool, typer.Option("--resume", help="go on where a training was interrupted")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace weights that exist")] = False,
) -> None:
    """Train SegResNet or SwinUNETR on labels: drawn by hand, or those of a census (WNet3D's)."""
    options = context.params
    with explaining():
        from braincensus.report.console import ConsoleProgress
        from braincensus.training.supervised import train_supervised_from_paths

        try:
            with ConsoleProgress(stdout) as progress:
                trained = train_supervised_from_paths(
                    inputs or [],
                    out,
                    labels=labels or [],
                    from_census=from_census or [],
                    voxel_size_um=None if voxel_size is None else read_triple(voxel_size, "--voxel-size"),
                    channel=channel or 0,
                    level=level or 0,
                    progress=_Bar(progress),
                    message=lambda text: stdout.print(plain(text), highlight=False, soft_wrap=True),
                    **{field: options[name] for name, field in _FIELDS.items()},
                )
        except KeyboardInterrupt:
            stderr.print("to go on from the last checkpoint: the same command with --resume")
            raise
        stdout.print(f"weights: {out}\n{trained}", highlight=False, soft_wrap=True)


class _Bar:
    """Starts the bar when the number of steps is known."""

    def __init__(self, progress: Any) -> None:
        self._progress, self._started = progress, False

    def __call__(self, done: int, steps: int) -> None:
        if not self._started:
            self._progress.start("train", steps)
            self._started = True
        self._progress.advance("train", 1)


_FIELDS = {
    **{
        name: name
        for name in (
            "kind",
            "size",
            "batch",
            "augment",
            "validation_share",
            "epochs",
            "steps_per_epoch",
            "loss",
            "learning_rate",
            "seed",
            "device",
            "precision",
            "threads",
            "checkpoint_every",
            "resume",
            "overwrite",
        )
    },
    "crop": "crop_voxels",
}
"""Option to argument of `train_supervised`, or field of its recipe."""
