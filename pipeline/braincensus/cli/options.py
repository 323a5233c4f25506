"""The options of `run` and `plan`, and the configuration that they make."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from braincensus.cli.common import TRIPLE, read_range, read_threshold, read_triple, read_whole

_INPUT, _FOREGROUND = "Input", "Foreground"
_LABELLING, _FILTERS = "Telling cells apart", "Which cells are kept"
_COMPUTE = "Where and how"

Input = Annotated[
    str, typer.Argument(metavar="INPUT", help="OME-Zarr, TIFF, folder of planes, or .npy", show_default=False)
]
Output = Annotated[Path, typer.Argument(metavar="OUTPUT", help="the OME-Zarr to write", show_default=False)]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="YAML; `braincensus config` prints one")
]
Channel = Annotated[
    int | None, typer.Option(help="channel, from 0", show_default="0", rich_help_panel=_INPUT)
]
Timepoint = Annotated[
    int | None, typer.Option(help="time point, from 0", show_default="0", rich_help_panel=_INPUT)
]
Level = Annotated[
    int | None,
    typer.Option(help="pyramid level, 0 is full resolution", show_default="0", rich_help_panel=_INPUT),
]
VoxelSize = Annotated[
    str | None,
    typer.Option(
        "--voxel-size", metavar=TRIPLE, help="um; needed where the metadata has none", rich_help_panel=_INPUT
    ),
]
OnUnreadable = Annotated[
    str | None,
    typer.Option(
        metavar="fail|skip",
        help="damaged chunks and planes: stop, or count their voxels as 0 and list them",
        show_default="fail",
        rich_help_panel=_INPUT,
    ),
]
BlockSize = Annotated[
    str | None,
    typer.Option(
        "--block-size", metavar=TRIPLE, help="voxels; default: what fits in memory", rich_help_panel=_COMPUTE
    ),
]
Foreground = Annotated[
    str | None,
    typer.Option(
        metavar="wnet3d|segresnet|swinunetr|intensity",
        help="foreground model; segresnet and swinunetr learnt from labels, and need --weights",
        show_default="wnet3d",
        rich_help_panel=_FOREGROUND,
    ),
]
Weights = Annotated[
    str | None,
    typer.Option(
        metavar="NAME|FILE",
        help="weights of the network; `weights list` shows names",
        show_default="compact",
        rich_help_panel=_FOREGROUND,
    ),
]
Calibration = Annotated[
    str | None,
    typer.Option(
        metavar="volume|stored",
        help="norms of the network: measured on this volume, or those stored with the weights",
        show_default="volume",
        rich_help_panel=_FOREGROUND,
    ),
]
Method = Annotated[
    str | None,
    typer.Option(
        metavar="voronoi-otsu|components|watershed",
        help="how cells are told apart",
        show_default="voronoi-otsu",
        rich_help_panel=_LABELLING,
    ),
]
SpotSigma = Annotated[
    str | None,
    typer.Option(
        metavar="S|Z,Y,X", help="blur before seeds; larger: fewer cells", rich_help_panel=_LABELLING
    ),
]
OutlineSigma = Annotated[
    str | None, typer.Option(metavar="S|Z,Y,X", help="blur before the outline", rich_help_panel=_LABELLING)
]
ForegroundThreshold = Annotated[
    float | None,
    typer.Option(
        metavar="P",
        help="probability below this counts as 0 (the paper: 0.6, 0.65)",
        rich_help_panel=_FOREGROUND,
    ),
]
Threshold = Annotated[
    str | None,
    typer.Option(
        metavar="otsu|FLOAT", help="outline threshold", show_default="otsu", rich_help_panel=_LABELLING
    ),
]
Seeds = Annotated[
    str | None,
    typer.Option(
        metavar="RULE",
        help="voronoi-otsu: plateau or strict; watershed: threshold or distance",
        show_default="plateau; threshold",
        rich_help_panel=_LABELLING,
    ),
]
SeedThreshold = Annotated[
    float | None,
    typer.Option(
        metavar="P", help="watershed: seeds are above it", show_default="0.9", rich_help_panel=_LABELLING
    ),
]
MaxRadius = Annotated[
    float | None,
    typer.Option(
        metavar="UM",
        help="how far cells reach from their seed; sets the halo",
        show_default="50",
        rich_help_panel=_LABELLING,
    ),
]
ClosingRadius = Annotated[
    float | None,
    typer.Option(
        metavar="UM", help="close small holes of the foreground first, by a ball", rich_help_panel=_FOREGROUND
    ),
]
MergeBorder = Annotated[
    str | None,
    typer.Option(
        metavar="LOW,HIGH",
        help="merge touching cells whose border's mean probability is in this range (the paper: 0.35,1)",
        rich_help_panel=_LABELLING,
    ),
]
MinVolume = Annotated[
    float | None, typer.Option(metavar="UM3", help="remove smaller cells", rich_help_panel=_FILTERS)
]
MaxVolume = Annotated[
    float | None, typer.Option(metavar="UM3", help="remove larger cells", rich_help_panel=_FILTERS)
]
MaxObjectVolume = Annotated[
    float | None,
    typer.Option(
        metavar="UM3",
        help="remove artefacts: objects of touching cells that are larger",
        rich_help_panel=_FILTERS,
    ),
]
MinSphericity = Annotated[
    float | None,
    typer.Option(metavar="S", help="remove less round cells; a ball has 1", rich_help_panel=_FILTERS),
]
MinIntensity = Annotated[
    float | None,
    typer.Option(metavar="I", help="remove cells with a lower mean intensity", rich_help_panel=_FILTERS),
]
MaxIntensity = Annotated[
    float | None,
    typer.Option(metavar="I", help="remove cells with a higher mean intensity", rich_help_panel=_FILTERS),
]
Device = Annotated[
    str | None, typer.Option(metavar="auto|cpu|cuda", show_default="auto", rich_help_panel=_COMPUTE)
]
Cluster = Annotated[
    str | None,
    typer.Option(
        metavar="local|cuda|slurm:FILE|kubernetes:FILE|tcp://HOST:PORT|tls://HOST:PORT",
        help="this machine, its GPUs, a cluster that the file describes, or a running Dask scheduler",
        show_default="local",
        rich_help_panel=_COMPUTE,
    ),
]
WorkerWait = Annotated[
    float | None,
    typer.Option(
        metavar="SECONDS",
        help="how long a cluster's first worker may take to come",
        show_default="1800",
        rich_help_panel=_COMPUTE,
    ),
]
TlsCaFile = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="tls://: certificate of the cluster's CA", rich_help_panel=_COMPUTE),
]
TlsCert = Annotated[
    str | None, typer.Option(metavar="FILE", help="tls://: our certificate", rich_help_panel=_COMPUTE)
]
TlsKey = Annotated[
    str | None, typer.Option(metavar="FILE", help="tls://: our certificate's key", rich_help_panel=_COMPUTE)
]
Workers = Annotated[
    int | None, typer.Option(help="worker processes of a local cluster", rich_help_panel=_COMPUTE)
]
PerformanceReport = Annotated[
    Path | None,
    typer.Option(
        metavar="HTML", help="save Dask's report of the run: tasks, profile, memory", rich_help_panel=_COMPUTE
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace an earlier output of braincensus")]
Fresh = Annotated[
    bool,
    typer.Option("--fresh", help="start over: replace an earlier output of braincensus, instead of going on"),
]


def read_settings(options: dict[str, Any]) -> Any:
    """Merge the options that were given into the configuration file, or into the defaults."""
    from braincensus.config import RunConfig
    from braincensus.errors import ConfigError

    model = options.get("foreground")
    if options.get("weights") is not None and model == "intensity":
        raise ConfigError("--weights has no meaning with --foreground intensity: it uses no network")
    if options.get("calibration") is not None and model not in (None, "wnet3d"):
        raise ConfigError(f"--calibration has no meaning with --foreground {model}: it is WNet3D's")
    base = RunConfig() if options["config"] is None else RunConfig.from_yaml(options["config"])
    changes: dict[str, dict[str, Any]] = {}
    for name, (section, field, read) in FIELDS.items():
        given = options.get(name)
        if given is not None:
            option = "--" + name.replace("_", "-")
            changes.setdefault(section, {})[field] = read(given, option) if read else given
    return base.merged(changes, source="the options")


FIELDS: dict[str, tuple[str, str, Callable[[str, str], Any] | None]] = {
    "channel": ("input", "channel", None),
    "timepoint": ("input", "timepoint", None),
    "level": ("input", "level", None),
    "voxel_size": ("input", "voxel_size_um", read_triple),
    "on_unreadable": ("input", "on_unreadable", None),
    "foreground": ("foreground", "model", None),
    "weights": ("foreground", "weights", None),
    "calibration": ("foreground", "calibration", None),
    "method": ("labelling", "method", None),
    "spot_sigma": ("labelling", "spot_sigma", read_triple),
    "outline_sigma": ("labelling", "outline_sigma", read_triple),
    "foreground_threshold": ("labelling", "foreground_threshold", None),
    "threshold": ("labelling", "threshold", read_threshold),
    "seeds": ("labelling", "seeds", None),
    "seed_threshold": ("labelling", "seed_threshold", None),
    "max_radius": ("labelling", "max_radius_um", None),
    "closing_radius": ("labelling", "closing_radius_um", None),
    "merge_border": ("labelling", "merge_border", read_range),
    "min_volume": ("filters", "min_volume_um3", None),
    "max_volume": ("filters", "max_volume_um3", None),
    "max_object_volume": ("filters", "max_object_volume_um3", None),
    "min_sphericity": ("filters", "min_sphericity", None),
    "min_intensity": ("filters", "min_mean_intensity", None),
    "max_intensity": ("filters", "max_mean_intensity", None),
    "block_size": ("compute", "block_voxels", read_whole),
    "device": ("compute", "device", None),
    "cluster": ("compute", "cluster", None),
    "workers": ("compute", "workers", None),
    "worker_wait": ("compute", "worker_wait_s", None),
    "tls_ca_file": ("compute", "tls_ca_file", None),
    "tls_cert": ("compute", "tls_cert", None),
    "tls_key": ("compute", "tls_key", None),
}
"""Where each option of `run` and `plan` is in the configuration, and how its text is read."""
