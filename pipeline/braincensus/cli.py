"""The command line: arguments to the Python API, errors to one message; nothing else."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

app = typer.Typer(
    name="braincensus",
    help="Every labelled cell of a cleared brain, counted once.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_out = Console()
_err = Console(stderr=True)

_TRIPLE = "Z,Y,X"
Input = Annotated[
    str, typer.Argument(metavar="INPUT", help="OME-Zarr, TIFF, folder of planes, or .npy", show_default=False)
]
Output = Annotated[Path, typer.Argument(metavar="OUTPUT", help="the OME-Zarr to write", show_default=False)]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="YAML; `braincensus config` prints one")
]
Channel = Annotated[int | None, typer.Option(help="channel, from 0", show_default="0")]
Timepoint = Annotated[int | None, typer.Option(help="time point, from 0", show_default="0")]
Level = Annotated[int | None, typer.Option(help="pyramid level, 0 is full resolution", show_default="0")]
VoxelSize = Annotated[
    str | None, typer.Option("--voxel-size", metavar=_TRIPLE, help="um; needed where the metadata has none")
]
BlockSize = Annotated[
    str | None, typer.Option("--block-size", metavar=_TRIPLE, help="voxels; default: what fits in memory")
]
Foreground = Annotated[
    str | None, typer.Option(metavar="wnet3d|intensity", help="foreground model", show_default="wnet3d")
]
Weights = Annotated[
    str | None, typer.Option(help="weights of WNet3D: compact, or a path", show_default="compact")
]
Method = Annotated[
    str | None,
    typer.Option(
        metavar="voronoi-otsu|components|watershed",
        help="how cells are told apart",
        show_default="voronoi-otsu",
    ),
]
SpotSigma = Annotated[
    str | None, typer.Option(metavar="S|Z,Y,X", help="blur before seeds; larger: fewer cells")
]
OutlineSigma = Annotated[str | None, typer.Option(metavar="S|Z,Y,X", help="blur before the outline")]
ForegroundThreshold = Annotated[
    float | None, typer.Option(metavar="P", help="probability below this counts as 0 (the paper: 0.6, 0.65)")
]
Threshold = Annotated[
    str | None, typer.Option(metavar="otsu|FLOAT", help="outline threshold", show_default="otsu")
]
Seeds = Annotated[
    str | None,
    typer.Option(
        metavar="RULE",
        help="voronoi-otsu: plateau or strict; watershed: threshold or distance",
        show_default="plateau; threshold",
    ),
]
SeedThreshold = Annotated[
    float | None, typer.Option(metavar="P", help="watershed: seeds are above it", show_default="0.9")
]
MaxRadius = Annotated[
    float | None,
    typer.Option(metavar="UM", help="how far cells reach from their seed; sets the halo", show_default="50"),
]
ClosingRadius = Annotated[
    float | None, typer.Option(metavar="UM", help="close small holes of the foreground first, by a ball")
]
MergeBorder = Annotated[
    str | None,
    typer.Option(
        metavar="LOW,HIGH",
        help="merge touching cells whose border's mean probability is in this range (the paper: 0.35,1)",
    ),
]
MinVolume = Annotated[float | None, typer.Option(metavar="UM3", help="remove smaller cells")]
MaxVolume = Annotated[float | None, typer.Option(metavar="UM3", help="remove larger cells")]
MaxObjectVolume = Annotated[
    float | None,
    typer.Option(metavar="UM3", help="remove artefacts: objects of touching cells that are larger"),
]
MinSphericity = Annotated[
    float | None, typer.Option(metavar="S", help="remove less round cells; a ball has 1")
]
MinIntensity = Annotated[
    float | None, typer.Option(metavar="I", help="remove cells with a lower mean intensity")
]
MaxIntensity = Annotated[
    float | None, typer.Option(metavar="I", help="remove cells with a higher mean intensity")
]
Device = Annotated[str | None, typer.Option(metavar="auto|cpu|cuda", show_default="auto")]
Cluster = Annotated[
    str | None, typer.Option(metavar="local|ADDRESS", help="Dask scheduler to use", show_default="local")
]
Workers = Annotated[int | None, typer.Option(help="worker processes of a local cluster")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace an earlier output of braincensus")]


@app.command()
def run(
    context: typer.Context,
    input: Input,
    output: Output,
    config: ConfigFile = None,
    channel: Channel = None,
    timepoint: Timepoint = None,
    level: Level = None,
    voxel_size: VoxelSize = None,
    block_size: BlockSize = None,
    foreground: Foreground = None,
    weights: Weights = None,
    method: Method = None,
    spot_sigma: SpotSigma = None,
    outline_sigma: OutlineSigma = None,
    foreground_threshold: ForegroundThreshold = None,
    threshold: Threshold = None,
    seeds: Seeds = None,
    seed_threshold: SeedThreshold = None,
    max_radius: MaxRadius = None,
    closing_radius: ClosingRadius = None,
    merge_border: MergeBorder = None,
    min_volume: MinVolume = None,
    max_volume: MaxVolume = None,
    max_object_volume: MaxObjectVolume = None,
    min_sphericity: MinSphericity = None,
    min_intensity: MinIntensity = None,
    max_intensity: MaxIntensity = None,
    device: Device = None,
    cluster: Cluster = None,
    workers: Workers = None,
    overwrite: Overwrite = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the plan and stop")] = False,
) -> None:
    """Count the cells of a volume: labels, cell table and density map in one OME-Zarr."""
    with _explaining():
        import braincensus
        from braincensus.report.console import ConsoleProgress, result_table

        settings = _settings(context.params)
        if dry_run:
            _show_plan(input, settings)
            return
        with ConsoleProgress(_out) as progress:
            result = braincensus.run(input, output, config=settings, overwrite=overwrite, progress=progress)
        _out.print(result_table(result))


@app.command()
def plan(
    context: typer.Context,
    input: Input,
    config: ConfigFile = None,
    channel: Channel = None,
    timepoint: Timepoint = None,
    level: Level = None,
    voxel_size: VoxelSize = None,
    block_size: BlockSize = None,
    foreground: Foreground = None,
    weights: Weights = None,
    method: Method = None,
    spot_sigma: SpotSigma = None,
    outline_sigma: OutlineSigma = None,
    seeds: Seeds = None,
    max_radius: MaxRadius = None,
    closing_radius: ClosingRadius = None,
    device: Device = None,
    cluster: Cluster = None,
    workers: Workers = None,
) -> None:
    """Print what a run would do: blocks, halo, memory, disk, time. Nothing is computed or written."""
    with _explaining():
        _show_plan(input, _settings(context.params))


@app.command()
def info(
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="what `run` wrote", show_default=False)],
    picture: Annotated[
        Path | None, typer.Option(metavar="PNG", help="draw the cells over the volume, and the density map")
    ] = None,
) -> None:
    """Say what a finished output holds: cells, density, seams, timings; draw it if asked."""
    with _explaining():
        from braincensus import open_result
        from braincensus.report.console import result_table

        result = open_result(output)
        if picture is not None:
            from braincensus.report.picture import draw_result

            draw_result(picture, result)
        _out.print(result_table(result))
        about = result.provenance
        _out.print(f"input     {about['input']['source']}", highlight=False)
        _out.print(f"versions  {about['versions']}", highlight=False)


@app.command()
def config() -> None:
    """Print the default configuration as commented YAML."""
    from braincensus.config import commented_yaml

    sys.stdout.write(commented_yaml())


@app.command()
def demo(
    directory: Annotated[Path, typer.Argument(metavar="[DIR]", help="where to write")] = Path("demo"),
    overwrite: Overwrite = False,
) -> None:
    """Make a phantom brain, census it with WNet3D, compare with the truth, draw the picture."""
    with _explaining():
        from braincensus.demo import run_demo
        from braincensus.report.console import ConsoleProgress

        with ConsoleProgress(_out) as progress:
            tables = run_demo(directory, overwrite=overwrite, progress=progress)
        for table in tables:
            _out.print(table)


@app.command()
def phantom(
    output: Output,
    size: Annotated[
        str, typer.Option(metavar=_TRIPLE, help="voxels", show_default="192,192,192")
    ] = "192,192,192",
    cells: Annotated[int, typer.Option(help="number of cells")] = 2000,
    seed: Annotated[int, typer.Option(help="the same seed gives the same volume")] = 0,
    voxel_size: Annotated[str, typer.Option("--voxel-size", metavar=_TRIPLE, help="um")] = "5,5.26,5.26",
    overwrite: Overwrite = False,
) -> None:
    """Write a synthetic volume whose cells are known, block by block, as OME-Zarr."""
    with _explaining():
        from braincensus.phantom import make_phantom, write_phantom
        from braincensus.report.console import ConsoleProgress

        shape = _whole(size, "--size")
        voxel_um = _triple(voxel_size, "--voxel-size")
        made = make_phantom(shape=shape, n_cells=cells, seed=seed, voxel_size_um=voxel_um)
        with ConsoleProgress(_out) as progress:
            progress.start("phantom", shape[0] * shape[1] * shape[2])
            write_phantom(
                output, made, overwrite=overwrite, progress=lambda voxels: progress.advance("phantom", voxels)
            )
        _out.print(
            f"{output}: {cells:,} cells; the truth is in {output}/truth/cells.parquet", highlight=False
        )


@app.command()
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
    with _explaining():
        from braincensus.report.console import ConsoleProgress
        from braincensus.train import train_from_paths

        with ConsoleProgress(_out) as progress:
            progress.start("train", steps)
            trained = train_from_paths(
                inputs,
                out,
                voxel_size_um=None if voxel_size is None else _triple(voxel_size, "--voxel-size"),
                channel=channel or 0,
                level=level or 0,
                channels=_channels(channels),
                steps=steps,
                crop_voxels=crop,
                batch=batch,
                learning_rate=learning_rate,
                seed=seed,
                overwrite=overwrite,
                progress=lambda done, total: progress.advance("train", 1),
            )
        _out.print(f"weights: {out}\n{trained}", highlight=False)


@app.callback(invoke_without_command=True)
def main(
    version: Annotated[
        bool, typer.Option("--version", help="print the version and stop", is_eager=True)
    ] = False,
) -> None:
    """Every labelled cell of a cleared brain, counted once."""
    if version:
        from importlib.metadata import version as installed

        typer.echo(f"braincensus {installed('braincensus')}")
        raise typer.Exit


def _show_plan(input: str, settings: Any) -> None:
    import braincensus
    from braincensus.report.console import plan_table

    planned = braincensus.plan(input, config=settings)
    _out.print(plan_table(planned))
    planned.check()


@contextmanager
def _explaining() -> Iterator[None]:
    """Turn the family of errors into one message, without a traceback."""
    from braincensus.errors import BraincensusError

    logging.getLogger("distributed").setLevel(logging.ERROR)
    try:
        yield
    except BraincensusError as err:
        first, _, rest = str(err).partition("\n")
        _err.print(f"[bold red]error:[/bold red] {_plain(first)}", highlight=False, soft_wrap=True)
        if rest:
            _err.print(_plain(rest), highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        _err.print("[bold red]stopped[/bold red]; an output that was begun is marked incomplete")
        raise typer.Exit(130) from None


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _settings(options: dict[str, Any]) -> Any:
    """Merge the options that were given into the configuration file, or into the defaults."""
    from braincensus.config import RunConfig
    from braincensus.errors import ConfigError

    if options.get("weights") is not None and options.get("foreground") == "intensity":
        raise ConfigError("--weights has no meaning with --foreground intensity: it uses no network")
    base = RunConfig() if options["config"] is None else RunConfig.from_yaml(options["config"])
    changes: dict[str, dict[str, Any]] = {}
    for name, (section, field, read) in _FIELDS.items():
        given = options.get(name)
        if given is not None:
            option = "--" + name.replace("_", "-")
            changes.setdefault(section, {})[field] = read(given, option) if read else given
    return base.merged(changes, source="the options")


def _triple(text: str, option: str) -> tuple[float, float, float]:
    from braincensus.errors import ConfigError, explain

    try:
        numbers = [float(part) for part in text.replace("x", ",").split(",")]
    except ValueError:
        numbers = []
    if len(numbers) == 1:
        numbers *= 3
    if len(numbers) != 3:
        raise ConfigError(
            explain(
                f"{option} {text!r} is not understood", expected="one number, or three as Z,Y,X", found=text
            )
        )
    return numbers[0], numbers[1], numbers[2]


def _whole(text: str, option: str) -> tuple[int, int, int]:
    from braincensus.errors import ConfigError

    numbers = _triple(text, option)
    if any(n != int(n) or n < 1 for n in numbers):
        raise ConfigError(f"{option} needs whole numbers of voxels, at least 1: got {text}")
    return int(numbers[0]), int(numbers[1]), int(numbers[2])


def _channels(text: str) -> tuple[int, ...]:
    from braincensus.errors import ConfigError

    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"--channels {text!r}: expected four whole numbers, such as 16,32,64,128") from None


def _threshold(text: str, option: str) -> str | float:
    from braincensus.errors import ConfigError

    if text == "otsu":
        return text
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"{option} {text!r}: expected `otsu` or a number from 0 to 1") from None


def _range(text: str, option: str) -> tuple[float, float]:
    from braincensus.errors import ConfigError

    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"{option} {text!r}: expected two numbers as LOW,HIGH, such as 0.35,1") from None
    return low, high


_FIELDS: dict[str, tuple[str, str, Callable[[str, str], Any] | None]] = {
    "channel": ("input", "channel", None),
    "timepoint": ("input", "timepoint", None),
    "level": ("input", "level", None),
    "voxel_size": ("input", "voxel_size_um", _triple),
    "foreground": ("foreground", "model", None),
    "weights": ("foreground", "weights", None),
    "method": ("labelling", "method", None),
    "spot_sigma": ("labelling", "spot_sigma", _triple),
    "outline_sigma": ("labelling", "outline_sigma", _triple),
    "foreground_threshold": ("labelling", "foreground_threshold", None),
    "threshold": ("labelling", "threshold", _threshold),
    "seeds": ("labelling", "seeds", None),
    "seed_threshold": ("labelling", "seed_threshold", None),
    "max_radius": ("labelling", "max_radius_um", None),
    "closing_radius": ("labelling", "closing_radius_um", None),
    "merge_border": ("labelling", "merge_border", _range),
    "min_volume": ("filters", "min_volume_um3", None),
    "max_volume": ("filters", "max_volume_um3", None),
    "max_object_volume": ("filters", "max_object_volume_um3", None),
    "min_sphericity": ("filters", "min_sphericity", None),
    "min_intensity": ("filters", "min_mean_intensity", None),
    "max_intensity": ("filters", "max_mean_intensity", None),
    "block_size": ("compute", "block_voxels", _whole),
    "device": ("compute", "device", None),
    "cluster": ("compute", "cluster", None),
    "workers": ("compute", "workers", None),
}
"""Where each option of `run` and `plan` is in the configuration, and how its text is read."""
