"""A run, from top to bottom: open, plan, then the stages in the order of the data flow."""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distributed import Client

from braincensus import cluster, manifest
from braincensus import preflight_checks as checks
from braincensus.config import RunConfig
from braincensus.errors import InputError, OutputError
from braincensus.formats.skipping import unreadable_summary, unreadable_warning
from braincensus.planning import Plan, gib
from braincensus.preflight_checks import Preflight
from braincensus.preparing import (
    as_before,
    connect,
    continuation,
    earlier_at,
    free_disk,
    open_input,
    plan_for,
    scratch_beside,
    scratch_for,
    weights_for,
)
from braincensus.progress import Progress, Silent
from braincensus.result import Result
from braincensus.stages import intensity, label, measure, pyramid, relabel, segment, stitch, threshold
from braincensus.store import (
    check_free,
    create_output,
    open_output,
    reopen_output,
    write_blocks_table,
)
from braincensus.store.lock import locked
from braincensus.tasks import Context
from braincensus.volume import Volume
from braincensus.watch.picture import show_picture
from braincensus.watch.report import check_report, reporting
from braincensus.watch.tell import watching

if TYPE_CHECKING:
    from braincensus.stages.norms import Calibration
    from braincensus_kernels.models.checkpoints import Weights
    from braincensus_kernels.models.supervised.networks import SupervisedWeights

_RECORDED = (
    "braincensus",
    "dask",
    "distributed",
    "zarr",
    "numcodecs",
    "torch",
    "numpy",
    "scipy",
    "numba",
    "monai",
)


def run(
    input: Any,
    output: str | Path,
    *,
    config: RunConfig | None = None,
    client: Client | None = None,
    fresh: bool = False,
    progress: Progress | None = None,
    performance_report: str | Path | None = None,
) -> Result:
    """Count every cell of a volume.

    Parameters
    ----------
    input
        Path of an OME-Zarr, TIFF, folder of planes or .npy; or a NumPy or zarr array, zyx.
    output
        Path of the OME-Zarr to write.
    config
        What to do; the defaults of `RunConfig` otherwise.
    client
        A Dask client whose cluster to use. Its workers must reach `input` and `output` at the same
        paths. Without it, ``config.compute`` decides.
    fresh
        Start over: replace an earlier output of braincensus at this path (and nothing else). Otherwise a run
        on an output of the same input goes on where the earlier one stopped; a changed setting redoes the
        stages that depend on it.
    progress
        Told about every stage; silent by default.
    performance_report
        Where to save Dask's report of the run, an HTML page that stands alone: tasks, profile, memory.
        Written when the run ends, and when it fails.

    Returns
    -------
    Result
        Lazy views of the cells, labels, density and the seam audit.

    Raises
    ------
    InputError, ConfigError, OutputError, PlanError, BlockError
        All are `BraincensusError`; an output that was begun stays marked incomplete, and the same call goes
        on with it. An output of another input, or one that another run is writing, is refused.

    Examples
    --------
    >>> import braincensus
    >>> result = braincensus.run("brain.ome.zarr", "brain.census.zarr")     # doctest: +SKIP
    >>> result.n_cells                                                       # doctest: +SKIP
    """
    config = config or RunConfig()
    progress = progress or Silent()
    output = Path(output)
    check_report(performance_report)
    protect = [input] if isinstance(input, str | Path) else []
    earlier = None if fresh else earlier_at(output)
    if earlier is None:
        check_free(output, overwrite=fresh, protect=protect)
    # Everything that can be refused is, before the input is copied (where it must be) or computed on.
    described = open_input(input, config, scratch_for(output), Silent(), copy=False)
    weights = weights_for(config)
    resources = cluster.resources_for(config.compute, client, wait_s=config.compute.worker_wait_s)
    plan = plan_for(described, as_before(config, earlier), weights, resources)
    plan.check(free_disk_bytes=free_disk(output) if earlier is None else None)
    with locked(output.absolute()) as lock, scratch_beside(output) as scratch:
        how = continuation(plan, weights, earlier)
        if how.finished:
            progress.message(how.report())
            if performance_report is not None:
                progress.message("no performance report: nothing was left to compute")
            return Result(open_output(output))
        volume = open_input(input, config, scratch, progress, copy=True)
        with connect(plan, client, progress) as (connected, resources):
            plan = replace(plan, volume=volume, resources=resources)
            if client is not None or config.compute.cluster not in ("local", "cuda"):
                checks.check_workers(connected, volume, output, hung_after_s=config.compute.hung_after_s)
            if connected.dashboard_link:
                progress.message(f"Dask dashboard: {connected.dashboard_link}")
            if earlier is None:
                store = create_output(
                    output, overwrite=fresh, voxel_size_um=volume.voxel_size_um, protect=protect
                )
            else:
                progress.message(how.report())
                store = reopen_output(earlier, voxel_size_um=volume.voxel_size_um)
                manifest.discard(store, how.redone)
            store.update_provenance({"manifest": {"settings": how.settings}})
            with (
                watching(connected, plan, store, progress) as watch,
                reporting(connected, performance_report, progress),
                _saying_what_is_needed(plan, output),
            ):
                context = Context(plan, store, connected, watch, keys=how.keys, guard=lock.check, watch=watch)
                return _run_stages(context, weights)


def plan(input: Any, *, config: RunConfig | None = None, client: Client | None = None) -> Plan:
    """Say what a run would do: blocks, halo, memory, disk and time; nothing is computed or written.

    Raises
    ------
    InputError, ConfigError
        As `run`. Whether it fits is asked with ``plan(...).check()``.
    """
    config = config or RunConfig()
    # A run has a scratch folder, so that arrays in memory are copied too; here it stays unused.
    volume = open_input(input, config, Path(), Silent(), copy=False)
    return plan_for(volume, config, weights_for(config), cluster.resources_for(config.compute, client))


def preflight(
    input: Any,
    output: str | Path | None = None,
    *,
    config: RunConfig | None = None,
    client: Client | None = None,
    measured: bool = True,
    progress: Progress | None = None,
) -> Preflight:
    """Check what a long run needs, and time its stages on a part of the volume; nothing of it stays.

    Parameters
    ----------
    input, config, client, progress
        As `run`.
    output
        Where the run would write: whether it may, and what it would keep of an earlier run, is checked too.
    measured
        Start or use the cluster: check every worker, and measure. False: only what needs no worker.

    Returns
    -------
    Preflight
        The plan, what was found, what would be kept, and how long the run would take here.

    Raises
    ------
    BraincensusError
        What would end the run, as it would: a damaged input, an output that cannot be written or is another
        input's, workers with other versions or without the files. Whether it fits is asked with
        ``preflight(...).plan.check(...)``.
    """
    config, progress = config or RunConfig(), progress or Silent()
    output = None if output is None else Path(output)
    earlier = None if output is None else earlier_at(output)
    if output is not None and earlier is None:
        check_free(output, overwrite=False, protect=[input] if isinstance(input, str | Path) else [])
    volume = open_input(input, config, Path(), Silent(), copy=False)
    weights = weights_for(config)
    resources = cluster.resources_for(config.compute, client)
    plan = plan_for(volume, as_before(config, earlier), weights, resources)
    findings = [] if output is None else [checks.check_output(output)]
    findings.append(checks.check_input(volume))
    kept = "" if earlier is None else continuation(plan, weights, earlier).report()
    if not measured:
        return Preflight(plan, tuple(findings), kept, None)
    beside = checks.nearest_folder(output or Path("any"))
    with (
        connect(plan, client, progress) as (connected, resources),
        tempfile.TemporaryDirectory(prefix=".preflight.", dir=beside) as scratch,
    ):
        plan = replace(plan, resources=resources)
        findings += checks.check_workers(connected, volume, output, hung_after_s=config.compute.hung_after_s)
        findings += checks.check_gpus(connected, plan)
        if volume.needs_copy:
            findings.append(checks.Finding("time", False, "not measured: the input must be copied first"))
            return Preflight(plan, tuple(findings), kept, None)

        def on_part(part: Volume, name: str) -> tuple[Plan, dict[str, float]]:
            blocks = {"compute": {"block_voxels": plan.label_grid.block_shape}}
            small = plan_for(part, plan.config.merged(blocks), weights, resources)
            store = create_output(
                Path(scratch) / f"{name}.zarr", overwrite=False, voxel_size_um=volume.voxel_size_um
            )
            context = Context(small, store, connected, Silent())
            _run_stages(context, weights)
            return small, context.timings_s

        part = checks.part_of(plan)
        progress.message(f"timing the stages on {' x '.join(map(str, part.shape))} voxels: a minute or two")
        try:
            found = checks.measure(plan, part, on_part)
        except InputError as err:  # a part may be empty where the whole is not
            first, *_ = str(err).splitlines()
            findings.append(checks.Finding("time", False, f"not measured: {first}"))
            return Preflight(plan, tuple(findings), kept, None)
    return Preflight(plan, tuple(findings), kept, found)


def calibrate(
    input: Any,
    *,
    folder: Path,
    config: RunConfig,
    client: Client | None = None,
    progress: Progress | None = None,
) -> tuple[Calibration, Volume]:
    """Measure what a run would set the network's norms to; nothing but the result is kept.

    Parameters
    ----------
    input, config, client, progress
        As `run`.
    folder
        Where working files may be meanwhile; workers must reach it at the same path.

    Raises
    ------
    BraincensusError
        As `run`.
    """
    from braincensus.stages import norms

    progress = progress or Silent()
    weights = weights_for(config)
    assert weights is not None, "a network with norms"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".calibration.", dir=folder) as scratch:
        volume = open_input(input, config, Path(scratch) / "input", progress, copy=True)
        plan = plan_for(volume, config, weights, cluster.resources_for(config.compute, client))
        plan.check()
        with connect(plan, client, progress) as (connected, resources):
            store = create_output(
                Path(scratch) / "stages.zarr", overwrite=False, voxel_size_um=volume.voxel_size_um
            )
            context = Context(replace(plan, resources=resources), store, connected, progress)
            ranges = intensity.run(context)
            with context.stage("calibrate", 1):
                network = norms.network_of(context, ranges, weights)
                return norms.set_norms(context, network, ranges, stage="calibrate"), volume


def _run_stages(context: Context, weights: Weights | SupervisedWeights | None) -> Result:
    store, plan = context.output, context.plan
    begun = _begin(plan)
    store.update_provenance(begun)
    ranges = intensity.run(context)
    plan = context.plan  # what of the input cannot be read is known from here on
    store.update_provenance(
        {"intensity": ranges.summary(), "input": begun["input"] | unreadable_summary(ranges.unreadable)}
    )
    show_picture(context.watch, context.client, store)
    foreground = segment.run(context, ranges, weights)
    store.update_provenance({"foreground": foreground})
    outline = threshold.run(context, tissue_threshold=ranges.tissue_threshold)
    blocks = label.run(context, scale=ranges.scale, threshold=outline)
    index, seams, counts = stitch.run(context, blocks, ranges.scale)
    relabel.run(context, index)
    beside_seams = measure.run(context, index, ranges.scale)
    levels = pyramid.run(context)
    write_blocks_table(store, [block.row() for block in blocks])
    store.update_provenance(
        {
            "n_cells": index.n_cells,
            "labelling": {
                "method": plan.config.labelling.method,
                "outline_threshold": outline / segment.PROBABILITY_TOP,
                "labeller": asdict(plan.labeller),
                "reach_voxels": list(plan.labeller.reach),
                "growth_steps_seen": max(block.growth_steps for block in blocks),
                "halo_voxels": list(plan.label_grid.halo),
                "block_voxels": list(plan.label_grid.block_shape),
                **counts,
            },
            "seams": {
                **seams.summary(),
                "density_check": beside_seams.summary() if beside_seams else None,
            },
            "timings_s": context.timings_s,
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        }
    )
    store.finalise(levels=levels, density_bin_um=plan.config.density.bin_um)
    manifest.tidy(store)
    if ranges.unreadable:
        context.progress.message(unreadable_warning(store.provenance["input"]))
    return Result(store)


def _begin(plan: Plan) -> dict[str, Any]:
    return {
        "versions": {"python": platform.python_version(), **{name: version(name) for name in _RECORDED}},
        "config": plan.config.model_dump(mode="json"),
        "input": {
            "source": plan.volume.source,
            "format": plan.volume.format,
            "shape": list(plan.volume.shape),
            "dtype": plan.volume.dtype.name,
            "voxel_size_um": list(plan.volume.voxel_size_um),
            "voxel_size_from": plan.volume.voxel_size_from,
            "notes": list(plan.volume.notes),
            "identity": plan.volume.identity,
        },
        "resources": {
            "workers": plan.resources.workers,
            "threads": plan.resources.threads,
            "device": plan.resources.device,
        },
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


@contextmanager
def _saying_what_is_needed(plan: Plan, output: Path) -> Iterator[None]:
    """Add to the error of a full disk how much room the whole output may take."""
    try:
        yield
    except OutputError as err:
        if "is full" not in str(err):
            raise
        need, parts = sum(plan.disk_bytes.values()), ", ".join(plan.disk_bytes)
        raise OutputError(f"{err}\n  needed: {gib(need)} in all ({parts}), at the most") from err
