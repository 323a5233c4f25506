"""What runs say to Prometheus, on the scheduler's own ``/metrics``.

One collector for the process, because the registry is the process's; it asks the plugins of whatever
schedulers live there. A run goes by the path of its output, under the label ``output``.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import prometheus_client
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from braincensus.progress import COUNTED
from braincensus.watch.state import BLOCK_STATES

if TYPE_CHECKING:
    from braincensus.watch.plugin import Seen, WatchPlugin

_PLUGINS: weakref.WeakSet[Any] = weakref.WeakSet()


class _Collector:
    """Reads the latest pictures when it is asked, so that nothing is counted twice or kept."""

    def describe(self) -> list[Metric]:
        """Say nothing beforehand: names are only known to clash with none."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yield every metric of every run."""
        voxels = CounterMetricFamily(
            "braincensus_voxels", "Voxels done, by stage", labels=["output", "stage"]
        )
        seconds = GaugeMetricFamily(
            "braincensus_stage_seconds", "Time that a stage has taken", labels=["output", "stage"]
        )
        retries = CounterMetricFamily(
            "braincensus_retries", "Blocks that were tried again, by stage", labels=["output", "stage"]
        )
        blocks = GaugeMetricFamily(
            "braincensus_blocks",
            "Blocks of the stage under way, by state",
            labels=["output", "stage", "state"],
        )
        cells = GaugeMetricFamily(
            "braincensus_cells", "Cells found so far; at the end, cells", labels=["output"]
        )
        disagreeing = GaugeMetricFamily(
            "braincensus_seam_disagreements", "Voxels at seams that two blocks disagree on", labels=["output"]
        )
        left = GaugeMetricFamily("braincensus_seconds_left", "Estimated time left", labels=["output"])
        for plugin, seen in _newest().values():
            told = seen.snapshot
            output = told["output"]
            for stage in told["stages"]:
                where = [output, stage["name"]]
                if stage["name"] not in COUNTED:
                    voxels.add_metric(where, stage["done"])
                seconds.add_metric(where, stage["seconds"])
                retries.add_metric(where, stage["retries"] + seen.retries.get(stage["name"], 0))
            states = plugin.blocks(seen)
            if states is not None:
                for n, name in enumerate(BLOCK_STATES):
                    blocks.add_metric([output, told["blocks"]["stage"], name], int((states == n).sum()))
            if told["cells"] is not None:
                cells.add_metric([output], told["cells"])
            disagreeing.add_metric([output], told["seams"]["disagreeing"])
            left.add_metric([output], told["left_s"])
        yield from (voxels, blocks, seconds, retries, cells, disagreeing, left)


def publish(plugin: WatchPlugin) -> None:
    """Add a scheduler's runs to what the process tells."""
    _PLUGINS.add(plugin)
    _register_once()


def withdraw(plugin: WatchPlugin) -> None:
    """Let go of a scheduler that closes."""
    _PLUGINS.discard(plugin)


def _newest() -> dict[str, tuple[WatchPlugin, Seen]]:
    """Return the newest run of each output: two series of one name would make a scrape fail."""
    newest: dict[str, tuple[WatchPlugin, Seen]] = {}
    for plugin in list(_PLUGINS):
        for seen in plugin.runs.values():
            output = seen.snapshot["output"]
            if output not in newest or seen.heard > newest[output][1].heard:
                newest[output] = (plugin, seen)
    return newest


_registered = False


def _register_once() -> None:
    global _registered
    if not _registered:
        prometheus_client.REGISTRY.register(_Collector())
        _registered = True
