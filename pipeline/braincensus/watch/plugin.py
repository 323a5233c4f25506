"""The scheduler's side: keeps the latest picture of each run, and adds the page and the metrics.

A client brings the plugin with its run (a second one finds it there). It imports little: a scheduler of
its own needs braincensus installed, but loads neither torch nor zarr for this.
"""

from __future__ import annotations

import logging
import time
import weakref
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from distributed import Scheduler, SchedulerPlugin

from braincensus.watch.state import DONE, KEPT, RETRIED, RUNNING, WAITING, unpack_states

NAME = "braincensus-watch"
_MOST_ENDED = 5
_log = logging.getLogger(__name__)


@dataclass
class Seen:
    """A run, as its client last told, and what the scheduler alone can see of it."""

    client: str
    snapshot: dict[str, Any]
    heard: float
    picture: dict[str, Any] | None = None
    lost: dict[str, int] = field(default_factory=dict)
    """Tasks that a lost worker was at, by key, and how often."""
    retries: dict[str, int] = field(default_factory=dict)
    """Tasks of each stage that were given to another worker."""
    again: dict[tuple[str, str], set[int]] = field(default_factory=dict)
    """Blocks of each stage and step that were."""
    failures: list[str] = field(default_factory=list)

    @property
    def running(self) -> bool:
        """Whether it is under way."""
        return bool(self.snapshot["status"] == "running")

    def silent_s(self) -> float:
        """How long ago the client told last."""
        return time.monotonic() - self.heard


class WatchPlugin(SchedulerPlugin):  # type: ignore[misc]
    """Receives pictures of runs on a scheduler."""

    name = NAME
    idempotent = True

    def __init__(self) -> None:
        self.runs: dict[str, Seen] = {}
        self.page = False
        self.why = ""
        self._metrics: Any = None

    async def start(self, scheduler: Scheduler) -> None:
        """Take up work on a scheduler; a page or metrics that cannot be are done without."""
        self.scheduler = weakref.proxy(scheduler)
        scheduler.handlers["braincensus_watch"] = self.receive
        try:
            from braincensus.watch.page import add_page

            add_page(scheduler, self)
            self.page = True
        except Exception as err:
            self.why = f"{type(err).__name__}: {err}"
            _log.debug("no page", exc_info=True)
        try:
            from braincensus.watch import metrics
        except ImportError:  # prometheus_client: Dask does without it, too
            return
        metrics.publish(self)
        self._metrics = metrics

    async def close(self) -> None:
        """Let go of the scheduler."""
        if self._metrics is not None:
            self._metrics.withdraw(self)

    async def receive(self, client: str, snapshot: dict[str, Any], picture: Any = None) -> dict[str, Any]:
        """Take the latest picture of a run; says whether a page shows it."""
        run = snapshot["run"]
        seen = self.runs.get(run)
        if seen is None:
            seen = self.runs[run] = Seen(client, snapshot, time.monotonic())
            self._forget(snapshot["output"], but=run)
        seen.snapshot, seen.heard = snapshot, time.monotonic()
        seen.picture = picture or seen.picture
        self._note_lost(seen)
        return {"page": self.page, "why": self.why}

    def remove_client(self, scheduler: Scheduler, client: str) -> None:
        """Mark the runs of a client that is gone."""
        for seen in self.runs.values():
            if seen.client == client and seen.running:
                seen.snapshot = {**seen.snapshot, "status": "lost", "in_flight": {}}

    def remove_worker(self, scheduler: Scheduler, worker: str, **_: Any) -> None:
        """Note which blocks a lost worker was at, before another has done them."""
        for seen in self.runs.values():
            if seen.running:
                self._note_lost(seen, worker)

    def blocks(self, seen: Seen) -> np.ndarray | None:
        """Return the state of each block, as of now: what no worker has begun is waiting."""
        about = seen.snapshot["blocks"]
        if about is None:
            return None
        states = unpack_states(about["states"])
        for key, number in seen.snapshot["in_flight"].items():
            task = self.scheduler.tasks.get(key)
            if task is not None and task.state in ("queued", "no-worker", "waiting", "released"):
                states[number] = WAITING
            elif task is not None and task.state == "memory":
                states[number] = DONE
        if not seen.running:
            states[states == RUNNING] = WAITING
        for number in seen.again.get((about["stage"], about["step"]), ()):
            if states[number] in (DONE, KEPT):
                states[number] = RETRIED
        return states

    def _note_lost(self, seen: Seen, worker: str = "") -> None:
        about = seen.snapshot["blocks"]
        if about is None:
            return
        for key, number in seen.snapshot["in_flight"].items():
            task = self.scheduler.tasks.get(key)
            times = task.suspicious if task is not None else 0
            if times > seen.lost.get(key, 0):
                seen.lost[key] = times
                stage = about["stage"]
                seen.retries[stage] = seen.retries.get(stage, 0) + 1
                seen.again.setdefault((stage, about["step"]), set()).add(number)
                where = f" ({worker})" if worker else ""
                seen.failures.append(f"{stage}, block {number}: its worker{where} was lost; tried again")
                del seen.failures[:-50]

    def _forget(self, output: str, *, but: str) -> None:
        """Let go of what ended: all but the last few, and earlier runs of the same output."""
        for run, seen in list(self.runs.items()):
            if run != but and not seen.running and seen.snapshot["output"] == output:
                del self.runs[run]
        ended = [run for run, seen in self.runs.items() if run != but and not seen.running]
        for run in ended[:-_MOST_ENDED]:
            del self.runs[run]
