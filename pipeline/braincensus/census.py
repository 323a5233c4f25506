"""A run, from top to bottom: open, plan, then the stages in the order of the data flow."""

from __future__ import annotations

import platform
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from distributed import Client

from braincensus import cluster, manifest
from braincensus.config import RunConfig, SupervisedForeground, WNet3DForeground
from braincensus.errors import ConfigError, InputError, explain
from braincensus.formats.convert import COPYING
from braincensus.manifest import Continuation
from braincensus.planning import Plan, make_plan
from braincensus.progress import Progress, Silent
from braincensus.result import Result
from braincensus.stages import intensity, label, measure, pyramid, relabel, segment, stitch, threshold
from braincensus.stages.norms import Calibration, set_norms
from braincensus.store import (
    Output,
    check_free,
    create_output,
    open_output,
    reopen_output,
    write_blocks_table,
)
from braincensus.store.lock import locked
from braincensus.store.root import recorded_at
from braincensus.tasks import Context
from braincensus.volume import Volume, open_volume
from braincensus.watch.picture import show_picture
from braincensus.watch.report import check_report, reporting
from braincensus.watch.tell import watching
from braincensus.weights.files import find_weights
from braincensus.weights.supervised import load_for, settled
from braincensus_kernels.models.calibrate import stored_calibration
from braincensus_kernels.models.checkpoints import Weights, load_weights
from braincensus_kernels.models.predict import resolve_precision
from braincensus_kernels.models.supervised.networks import SupervisedWeights
from braincensus_kernels.models.supervised.predict import resolve_supervised_precision

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
    earlier = None if fresh else _earlier(output)
    if earlier is None:
        check_free(output, overwrite=fresh, protect=protect)
    # Everything that can be refused is, before the input is copied (where it must be) or computed on.
    described = _open(input, config, _scratch_for(output), Silent(), copy=False)
    weights = _weights(config)
    resources = cluster.resources_for(config.compute, client, wait_s=config.compute.worker_wait_s)
    plan = _plan(described, _as_before(config, earlier), weights, resources)
    plan.check(free_disk_bytes=_free_disk(output) if earlier is None else None)
    with locked(output.absolute()) as lock, _scratch(output) as scratch:
        how = _continuation(plan, weights, earlier)
        if how.finished:
            progress.message(how.report())
            if performance_report is not None:
                progress.message("no performance report: nothing was left to compute")
            return Result(open_output(output))
        volume = _open(input, config, scratch, progress, copy=True)
        with _connected(plan, client, progress) as (connected, resources):
            plan = replace(plan, volume=volume, resources=resources)
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
    volume = _open(input, config, Path(), Silent(), copy=False)
    return _plan(volume, config, _weights(config), cluster.resources_for(config.compute, client))


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
    progress = progress or Silent()
    weights = _weights(config)
    assert weights is not None, "a network with norms"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".calibration.", dir=folder) as scratch:
        volume = _open(input, config, Path(scratch) / "input", progress, copy=True)
        plan = _plan(volume, config, weights, cluster.resources_for(config.compute, client))
        plan.check()
        with _connected(plan, client, progress) as (connected, resources):
            store = create_output(
                Path(scratch) / "stages.zarr", overwrite=False, voxel_size_um=volume.voxel_size_um
            )
            context = Context(replace(plan, resources=resources), store, connected, progress)
            ranges = intensity.run(context)
            with context.stage("calibrate", 1):
                network = segment.network_of(context, ranges, weights)
                return set_norms(context, network, ranges, stage="calibrate"), volume


def _run_stages(context: Context, weights: Weights | SupervisedWeights | None) -> Result:
    store, plan = context.output, context.plan
    store.update_provenance(_begin(plan))
    ranges = intensity.run(context)
    store.update_provenance({"intensity": ranges.summary()})
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
    return Result(store)


def _earlier(output: Path) -> Output | None:
    """Return what an earlier run left at this path, or None where there is nothing of ours."""
    if not output.exists() or output.is_symlink() or recorded_at(output) is None:
        return None
    return open_output(output, allow_incomplete=True)


def _continuation(
    plan: Plan, weights: Weights | SupervisedWeights | None, earlier: Output | None
) -> Continuation:
    settings = manifest.settings_of(plan, weights_sha256=weights.sha256 if weights else "")
    return manifest.begin(settings) if earlier is None else manifest.continue_from(earlier, settings)


def _as_before(config: RunConfig, earlier: Output | None) -> RunConfig:
    """Keep the blocks of the earlier run where none are asked for: free memory may have chosen others now."""
    if earlier is None or config.compute.block_voxels is not None:
        return config
    recorded = earlier.provenance.get("manifest", {}).get("settings", {}).get("threshold", {})
    block = recorded.get("block_voxels")
    return config if block is None else config.merged({"compute": {"block_voxels": block}})


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


def _open(input: Any, config: RunConfig, scratch: Path, progress: Progress, *, copy: bool) -> Volume:
    volume = open_volume(
        input,
        channel=config.input.channel,
        timepoint=config.input.timepoint,
        level=config.input.level,
        voxel_size_um=config.input.voxel_size_um,
        scratch=scratch,
        progress=_ConvertStage(progress),
        copy=copy,
    )
    for note in volume.notes:
        progress.message(note)
    return volume


class _ConvertStage:
    """Shows the chunked copy of the input as a stage of the run, `convert`."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._began: float | None = None
        self._done = 0

    def __call__(self, what: str, done: int, total: int) -> None:
        """Take what `open_volume` tells: voxels done so far, first before any is copied."""
        if what != COPYING:
            return
        if self._began is None:
            self._began, self._done = time.perf_counter(), done
            self._progress.start("convert", total - done)  # an interrupted copy is continued
        self._progress.advance("convert", done - self._done)
        self._done = done
        if done == total:
            self._progress.finish("convert", time.perf_counter() - self._began)


def _weights(config: RunConfig) -> Weights | SupervisedWeights | None:
    """Load the weights on the client first, so that a wrong file is refused before anything runs."""
    foreground = config.foreground
    if isinstance(foreground, SupervisedForeground):
        return load_for(foreground)
    if not isinstance(foreground, WNet3DForeground):
        return None
    found = find_weights(foreground.weights)
    try:
        weights = load_weights(found)
        stored = stored_calibration(weights) if foreground.calibration == "stored" else None
    except ValueError as err:
        raise InputError(f"the weights {foreground.weights} cannot be used: {err}") from err
    if foreground.calibration == "stored" and stored is None:
        raise ConfigError(
            explain(
                f"the weights {foreground.weights} bring no calibration",
                expected="norm statistics in the file, for foreground.calibration: stored",
                remedy="`braincensus weights calibrate` measures and stores them; or leave "
                "foreground.calibration out",
            )
        )
    return weights


def _plan(
    volume: Volume,
    config: RunConfig,
    weights: Weights | SupervisedWeights | None,
    resources: cluster.Resources,
) -> Plan:
    precision = "float32"
    if isinstance(config.foreground, WNet3DForeground):
        precision = resolve_precision(config.foreground.precision, resources.device)
    elif isinstance(weights, SupervisedWeights):
        assert isinstance(config.foreground, SupervisedForeground)
        precision = resolve_supervised_precision(config.foreground.precision, resources.device)
        config = settled(config, weights)
    return make_plan(
        volume, config, resources, channels=weights.channels if weights else None, precision=precision
    )


@contextmanager
def _connected(
    plan: Plan, client: Client | None, progress: Progress
) -> Iterator[tuple[Client, cluster.Resources]]:
    if client is not None:
        yield client, plan.resources
    else:
        with cluster.connect(plan.config.compute, plan.resources, progress) as connected:
            yield connected


def _scratch_for(output: Path) -> Path:
    """Where a converted copy of the input may be."""
    return output.absolute().parent / f".{output.name}.input"


@contextmanager
def _scratch(output: Path) -> Iterator[Path]:
    """Give a place beside the output for a converted copy of the input; removed when the run succeeds."""
    scratch = _scratch_for(output)
    yield scratch
    shutil.rmtree(scratch, ignore_errors=True)


def _free_disk(output: Path) -> int | None:
    place = output.absolute().parent
    while not place.exists() and place != place.parent:
        place = place.parent
    return shutil.disk_usage(place).free
