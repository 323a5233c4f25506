"""What a run, a plan and a calibration share: from what the caller gave to what the stages need.

Looks at the input, the weights, the cluster and what an earlier run left, and refuses early what cannot be.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distributed import Client

from braincensus import cluster, manifest
from braincensus.config import IntensityForeground, RunConfig
from braincensus.formats.convert import COPYING
from braincensus.heartbeats import telling_of_loss
from braincensus.manifest import Continuation
from braincensus.planning import Plan, make_plan
from braincensus.progress import Progress
from braincensus.store import Output, open_output
from braincensus.store.root import recorded_at
from braincensus.volume import Volume, open_volume

if TYPE_CHECKING:
    from braincensus_kernels.models.checkpoints import Weights
    from braincensus_kernels.models.supervised.networks import SupervisedWeights


def earlier_at(output: Path) -> Output | None:
    """Return what an earlier run left at this path, or None where there is nothing of ours."""
    if not output.exists() or output.is_symlink() or recorded_at(output) is None:
        return None
    return open_output(output, allow_incomplete=True)


def continuation(
    plan: Plan, weights: Weights | SupervisedWeights | None, earlier: Output | None
) -> Continuation:
    """Say what a run would keep of an earlier one, and redo."""
    settings = manifest.settings_of(plan, weights_sha256=weights.sha256 if weights else "")
    return manifest.begin(settings) if earlier is None else manifest.continue_from(earlier, settings)


def as_before(config: RunConfig, earlier: Output | None) -> RunConfig:
    """Keep the blocks of the earlier run where none are asked for: free memory may have chosen others now."""
    if earlier is None or config.compute.block_voxels is not None:
        return config
    block = manifest.recorded_settings(earlier).get("threshold", {}).get("block_voxels")
    if block is None:
        return config
    return config.merged({"compute": {"block_voxels": block}}, source=f"what {earlier.path} records")


def open_input(input: Any, config: RunConfig, scratch: Path, progress: Progress, *, copy: bool) -> Volume:
    """Open the input as the configuration says, and tell what was assumed."""
    volume = open_volume(
        input,
        channel=config.input.channel,
        timepoint=config.input.timepoint,
        level=config.input.level,
        voxel_size_um=config.input.voxel_size_um,
        scratch=scratch,
        progress=_ConvertStage(progress),
        copy=copy,
        on_unreadable=config.input.on_unreadable,
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


def weights_for(config: RunConfig) -> Weights | SupervisedWeights | None:
    """Load the weights on the client first, so that a wrong file is refused before anything runs.

    Without a network nothing is loaded, not even torch.
    """
    if isinstance(config.foreground, IntensityForeground):
        return None
    from braincensus.weights.of_run import load

    return load(config.foreground)


def plan_for(
    volume: Volume,
    config: RunConfig,
    weights: Weights | SupervisedWeights | None,
    resources: cluster.Resources,
) -> Plan:
    """Plan a run over a volume, with what follows from the weights."""
    channels, precision = None, "float32"
    if weights is not None:
        from braincensus.weights.of_run import settle

        channels = weights.channels
        config, precision = settle(config, weights, resources.device)
    return make_plan(volume, config, resources, channels=channels, precision=precision)


@contextmanager
def connect(
    plan: Plan, client: Client | None, progress: Progress
) -> Iterator[tuple[Client, cluster.Resources]]:
    """Use the caller's cluster, or start what the configuration says.

    Raises
    ------
    BlockError
        If the cluster is lost while it is used.
    ConfigError
        If it cannot be started or reached.
    """
    with telling_of_loss("asking the cluster"):
        if client is not None:
            yield client, plan.resources
        else:
            with cluster.connect(plan.config.compute, plan.resources, progress) as connected:
                yield connected


def scratch_for(output: Path) -> Path:
    """Where a converted copy of the input may be."""
    return output.absolute().parent / f".{output.name}.input"


@contextmanager
def scratch_beside(output: Path) -> Iterator[Path]:
    """Give a place beside the output for a converted copy of the input; removed when the run succeeds."""
    scratch = scratch_for(output)
    yield scratch
    shutil.rmtree(scratch, ignore_errors=True)


def free_disk(output: Path) -> int:
    """Return the free bytes where the output would be."""
    place = output.absolute().parent
    while not place.exists() and place != place.parent:
        place = place.parent
    return shutil.disk_usage(place).free
