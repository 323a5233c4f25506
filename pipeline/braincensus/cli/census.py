"""`run`, `plan`, `info` and `config`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from braincensus.cli.common import explaining, stdout
from braincensus.cli.options import (
    BlockSize,
    Calibration,
    Channel,
    ClosingRadius,
    Cluster,
    ConfigFile,
    Device,
    Foreground,
    ForegroundThreshold,
    Fresh,
    Input,
    Level,
    MaxIntensity,
    MaxObjectVolume,
    MaxRadius,
    MaxVolume,
    MergeBorder,
    Method,
    MinIntensity,
    MinSphericity,
    MinVolume,
    OnUnreadable,
    OutlineSigma,
    Output,
    PerformanceReport,
    Seeds,
    SeedThreshold,
    SpotSigma,
    Threshold,
    Timepoint,
    TlsCaFile,
    TlsCert,
    TlsKey,
    VoxelSize,
    Weights,
    Workers,
    WorkerWait,
    read_settings,
)


def run(
    context: typer.Context,
    input: Input,
    output: Output,
    config: ConfigFile = None,
    channel: Channel = None,
    timepoint: Timepoint = None,
    level: Level = None,
    voxel_size: VoxelSize = None,
    on_unreadable: OnUnreadable = None,
    block_size: BlockSize = None,
    foreground: Foreground = None,
    weights: Weights = None,
    calibration: Calibration = None,
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
    worker_wait: WorkerWait = None,
    tls_ca_file: TlsCaFile = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    performance_report: PerformanceReport = None,
    fresh: Fresh = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the plan and stop")] = False,
) -> None:
    """Count the cells of a volume: labels, cell table and density map in one OME-Zarr.

    On an output of the same input it goes on where the earlier run stopped; a changed setting redoes only the
    stages that depend on it.
    """
    with explaining():
        import braincensus
        from braincensus.report.console import ConsoleProgress, result_table

        settings = read_settings(context.params)
        if dry_run:
            _show_plan(input, output, settings)
            return
        with ConsoleProgress(stdout) as progress:
            result = braincensus.run(
                input,
                output,
                config=settings,
                fresh=fresh,
                progress=progress,
                performance_report=performance_report,
            )
        stdout.print(result_table(result))


def plan(
    context: typer.Context,
    input: Input,
    output: Annotated[
        Path | None, typer.Argument(metavar="[OUTPUT]", help="where `run` would write", show_default=False)
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="check the workers, time the stages on a part of the volume")
    ] = False,
    price_per_hour: Annotated[
        float | None,
        typer.Option(metavar="PRICE", min=0, help="of all machines: says the cost"),
    ] = None,
    config: ConfigFile = None,
    channel: Channel = None,
    timepoint: Timepoint = None,
    level: Level = None,
    voxel_size: VoxelSize = None,
    on_unreadable: OnUnreadable = None,
    block_size: BlockSize = None,
    foreground: Foreground = None,
    weights: Weights = None,
    calibration: Calibration = None,
    method: Method = None,
    spot_sigma: SpotSigma = None,
    outline_sigma: OutlineSigma = None,
    seeds: Seeds = None,
    max_radius: MaxRadius = None,
    closing_radius: ClosingRadius = None,
    device: Device = None,
    cluster: Cluster = None,
    workers: Workers = None,
    worker_wait: WorkerWait = None,
    tls_ca_file: TlsCaFile = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
) -> None:
    """Print what a run would do: blocks, halo, memory, disk, time. Nothing that is written stays.

    A sample of the input is read. With OUTPUT, it says whether that can be written, and what of an earlier
    run would be kept. With --measure it checks every worker, and times the stages on a part of the volume.
    """
    with explaining():
        _show_plan(input, output, read_settings(context.params), measure=measure, price=price_per_hour)


def info(
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="what `run` wrote", show_default=False)],
    picture: Annotated[
        Path | None, typer.Option(metavar="PNG", help="draw the cells over the volume, and the density map")
    ] = None,
) -> None:
    """Say what a finished output holds: cells, density, seams, timings; draw it if asked."""
    with explaining():
        from braincensus import open_result
        from braincensus.report.console import result_table

        result = open_result(output)
        if picture is not None:
            from braincensus.report.picture import draw_result

            draw_result(picture, result)
        stdout.print(result_table(result))
        about = result.provenance
        stdout.print(f"input     {about['input']['source']}", highlight=False)
        stdout.print(f"versions  {about['versions']}", highlight=False)


def config() -> None:
    """Print the default configuration as commented YAML."""
    from braincensus.config import commented_yaml

    sys.stdout.write(commented_yaml())


def _show_plan(
    input: str, output: Path | None, settings: Any, *, measure: bool = False, price: float | None = None
) -> None:
    import braincensus
    from braincensus.preparing import free_disk
    from braincensus.report.console import ConsoleProgress, plan_table

    with ConsoleProgress(stdout) as progress:
        found = braincensus.preflight(
            input, output, config=settings, measured=measure, progress=progress if measure else None
        )
    stdout.print(plan_table(found, price_per_hour=price))
    anew = output is not None and not found.kept
    found.plan.check(free_disk_bytes=free_disk(output) if output is not None and anew else None)
