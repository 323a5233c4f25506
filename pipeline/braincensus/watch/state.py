"""What is known of a run that is under way: stages, rates, time left, one byte for each block.

Pure: every method that needs the time is told it, in seconds of any steady clock, so that each number
on the page can be tested. Memory grows with blocks (a byte each) and with nothing else: lists of
messages and failures keep the last, the history of rates halves its resolution when it is full.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import numpy as np

Triple = tuple[int, int, int]
Status = Literal["running", "finished", "failed", "stopped", "lost"]

BLOCK_STATES = ("waiting", "running", "done", "kept", "retried", "failed")
"""What a block can be. Kept: done by an earlier run. Retried: done, but not at the first try."""
WAITING, RUNNING, DONE, KEPT, RETRIED, FAILED = range(len(BLOCK_STATES))

_NOW_S = 10.0
_LEAST_RESULTS = 4
_APART_S = 0.2
_MOST_SAMPLES = 400
_MOST_LISTED = 50
_UNESTIMATED = 0.02
"""Share of the whole that a stage is taken for of which the plan says nothing."""
_FRACTION_TO_TRUST = 0.05
_DOUBT, _DOUBT_S = 0.1, 10.0
"""What was seen counts against the estimates as if this share of them, and these seconds, had come true:
the first blocks wait for workers that load their libraries."""


@dataclass
class StageState:
    """One stage: how far it is, and how long it took."""

    name: str
    estimate_s: float
    total: int = 0
    done: int = 0
    kept: int = 0
    """Of `done`, what an earlier run had done: it takes no time, so that no rate counts it."""
    status: Literal["waiting", "running", "done", "skipped"] = "waiting"
    seconds: float = 0.0
    retries: int = 0

    @property
    def fraction(self) -> float:
        """How much is done, from 0 to 1."""
        if self.status in ("done", "skipped"):
            return 1.0
        return min(1.0, self.done / self.total) if self.total else 0.0

    @property
    def worked(self) -> int:
        """Voxels done by this run."""
        return self.done - self.kept


@dataclass
class BlockMap:
    """The blocks that are being worked on: a grid, and what has become of each."""

    stage: str
    step: str
    counts: Triple
    extent_voxels: Triple
    grid_shape: Triple
    """What the grid cuts up: voxels of the volume, of a level of its pyramid, or parts of a table."""
    states: np.ndarray
    """uint8, in raster order (z slowest)."""

    def tally(self) -> dict[str, int]:
        """Count the blocks in each state."""
        found = np.bincount(self.states, minlength=len(BLOCK_STATES))
        return {name: int(n) for name, n in zip(BLOCK_STATES, found, strict=True)}


@dataclass
class Seams:
    """What the audit has compared so far."""

    faces: int = 0
    faces_in_all: int = 0
    voxels: int = 0
    crossings: int = 0
    disagreeing: int = 0


class RunState:
    """What is known of one run.

    Parameters
    ----------
    run
        Names the run among all that a scheduler sees.
    input, output
        What the page calls them.
    shape, voxel_size_um
        Of the volume, zyx.
    estimates_s
        The plan's estimate for every stage, in the order in which they will come.
    now
        The time.

    Examples
    --------
    >>> state = RunState("a", "in", "out", (8, 8, 8), (1, 1, 1), {"label": 10.0}, now=0.0)
    >>> state.start("label", 512, now=0.0)
    >>> state.advance("label", 256, now=4.0)
    >>> state.seconds_left(now=4.0)
    4.0
    """

    def __init__(
        self,
        run: str,
        input: str,
        output: str,
        shape: Triple,
        voxel_size_um: tuple[float, float, float],
        estimates_s: dict[str, float],
        *,
        now: float,
    ) -> None:
        self.run = run
        self.input, self.output = input, output
        self.shape, self.voxel_size_um = shape, voxel_size_um
        known = sum(estimates_s.values())
        self.stages = {
            name: StageState(name, seconds or max(_UNESTIMATED * known, 1.0))
            for name, seconds in estimates_s.items()
        }
        self.status: Status = "running"
        self.blocks: BlockMap | None = None
        self.in_flight: dict[str, int] = {}
        """Tasks that were given to the cluster and are not back: key and number of the block."""
        self.seams = Seams()
        self.cells: int | None = None
        self.retries = 0
        self.failures: deque[str] = deque(maxlen=_MOST_LISTED)
        self.messages: deque[str] = deque(maxlen=_MOST_LISTED)
        self.history: list[tuple[float, float, str]] = []
        self._history_every_s = 1.0
        self._began, self._stage_began = now, now
        self._ended: float | None = None
        self._results: deque[tuple[float, int]] = deque(maxlen=256)
        self._tried_again: set[int] = set()
        self._current: str | None = None

    # What happens

    def start(self, stage: str, voxels: int, *, now: float) -> None:
        """Begin a stage; those before it that never began are not needed."""
        if stage not in self.stages:
            self.stages[stage] = StageState(stage, 1.0)
        for name, earlier in self.stages.items():
            if name == stage:
                break
            if earlier.status == "waiting":
                earlier.status = "skipped"
        begun = self.stages[stage]
        begun.total += voxels
        begun.status = "running"
        self._current, self._stage_began = stage, now - begun.seconds
        self._results.clear()
        self._results.append((now, begun.worked))

    def advance(self, stage: str, voxels: int, *, now: float, kept: bool = False) -> None:
        """Count voxels that are done."""
        found = self.stages[stage]
        found.done += voxels
        found.kept += voxels if kept else 0
        found.seconds = max(found.seconds, now - self._stage_began)
        if self._results and now - self._results[-1][0] < _APART_S and len(self._results) > 1:
            self._results[-1] = (self._results[-1][0], found.worked)
        else:
            self._results.append((now, found.worked))

    def finish(self, stage: str, seconds: float) -> None:
        """End a stage."""
        found = self.stages[stage]
        found.status, found.seconds, found.done = "done", seconds, found.total
        self._current = None

    def end(self, status: Status, *, now: float, failure: str = "") -> None:
        """End the run; blocks that were under way were not done."""
        self.status, self._ended = status, now
        self.in_flight.clear()
        if failure and failure not in self.failures:
            self.failures.append(failure)
        if self.blocks is not None:
            self.blocks.states[self.blocks.states == RUNNING] = WAITING

    def begin_blocks(
        self, stage: str, step: str, counts: Triple, extent_voxels: Triple, grid_shape: Triple
    ) -> None:
        """Begin a walk through a grid of blocks."""
        states = np.zeros(prod(counts), np.uint8)
        self.blocks = BlockMap(stage, step, counts, extent_voxels, grid_shape, states)
        self.in_flight.clear()
        self._tried_again.clear()

    def submitted(self, number: int, key: str) -> None:
        """Give a block to the cluster."""
        self.in_flight[key] = number
        self._set(number, RUNNING)

    def returned(self, key: str) -> None:
        """Take a task back from the cluster, whatever became of it."""
        self.in_flight.pop(key, None)

    def block_done(self, number: int, *, kept: bool) -> None:
        """Count a block as done."""
        self._set(number, KEPT if kept else RETRIED if number in self._tried_again else DONE)

    def block_retried(self, stage: str, number: int, why: str) -> None:
        """Try a block again, now or later."""
        self.retries += 1
        if stage in self.stages:
            self.stages[stage].retries += 1
        self._tried_again.add(number)
        self._set(number, WAITING)
        self.failures.append(f"{stage}, block {number}: {why}; tried again")

    def block_failed(self, number: int, why: str) -> None:
        """Give a block up."""
        self._set(number, FAILED)
        self.failures.append(why)

    def _set(self, number: int, state: int) -> None:
        if self.blocks is not None and 0 <= number < len(self.blocks.states):
            self.blocks.states[number] = state

    # What follows from it

    def elapsed_s(self, *, now: float) -> float:
        """How long the run has lasted."""
        return (now if self._ended is None else self._ended) - self._began

    def rate_now(self, *, now: float) -> float:
        """Voxels per second over the last 10 s, or the last few results where they are rarer."""
        if self._current is None or self.status != "running" or not self._results:
            return 0.0
        samples = list(self._results)
        since = max((i for i, (t, _) in enumerate(samples) if t <= now - _NOW_S), default=0)
        first = samples[max(0, min(since, len(samples) - 1 - _LEAST_RESULTS))]
        seconds = now - first[0]
        return (self.stages[self._current].worked - first[1]) / seconds if seconds > 0 else 0.0

    def seconds_of(self, stage: str, *, now: float) -> float:
        """How long a stage has lasted, or lasted."""
        found = self.stages[stage]
        if stage == self._current and self.status == "running":
            return now - self._stage_began
        return found.seconds

    def fraction(self) -> float:
        """How much of the run is done, each stage counting as long as it was estimated to take."""
        stages = [stage for stage in self.stages.values() if stage.status != "skipped"]
        whole = sum(stage.estimate_s for stage in stages)
        if self.status == "finished":
            return 1.0
        return sum(stage.estimate_s * stage.fraction for stage in stages) / whole if whole else 0.0

    def slowness(self, *, now: float) -> float:
        """How many times longer than estimated things take; about 1 while there is little to go by."""
        seen = expected = 0.0
        for name, stage in self.stages.items():
            if stage.total and stage.status in ("running", "done"):
                seen += self.seconds_of(name, now=now)
                expected += stage.estimate_s * max(0, stage.worked) / stage.total
        doubt = _DOUBT_S + _DOUBT * sum(stage.estimate_s for stage in self.stages.values())
        return (seen + doubt) / (expected + doubt)

    def seconds_left(self, *, now: float) -> float:
        """How long the rest will take: the current stage at its own pace, the others as estimated, scaled."""
        slowness = self.slowness(now=now)
        left = 0.0
        for name, stage in self.stages.items():
            if stage.status == "waiting":
                left += stage.estimate_s * slowness
            elif stage.status == "running":
                seconds = self.seconds_of(name, now=now)
                rest = max(0, stage.total - stage.done)
                if stage.total and stage.worked >= _FRACTION_TO_TRUST * stage.total and seconds > 0:
                    left += rest * seconds / stage.worked
                elif stage.total:
                    left += stage.estimate_s * slowness * rest / stage.total
        return left

    def tick(self, *, now: float) -> None:
        """Note the rate for the plot; called about once a second, more often does no harm."""
        if self._current is None or self.status != "running":
            return
        elapsed = now - self._began
        if self.history and elapsed - self.history[-1][0] < self._history_every_s:
            return
        self.history.append((elapsed, self.rate_now(now=now), self._current))
        if len(self.history) > _MOST_SAMPLES:
            self.history = self.history[::2]
            self._history_every_s *= 2

    # How it travels

    def snapshot(self, *, now: float) -> dict[str, Any]:
        """Say everything in types that travel; all of it each time, so that a lost one does no harm."""
        self.tick(now=now)
        running = self.status == "running"
        blocks = self.blocks
        return {
            "run": self.run,
            "input": self.input,
            "output": self.output,
            "shape": list(self.shape),
            "voxel_size_um": list(self.voxel_size_um),
            "status": self.status,
            "elapsed_s": self.elapsed_s(now=now),
            "left_s": self.seconds_left(now=now) if running else 0.0,
            "fraction": self.fraction(),
            "rate_now": self.rate_now(now=now),
            "stages": [
                {
                    "name": name,
                    "status": stage.status,
                    "total": stage.total,
                    "done": stage.done,
                    "kept": stage.kept,
                    "fraction": stage.fraction,
                    "seconds": self.seconds_of(name, now=now),
                    "rate": stage.worked / max(self.seconds_of(name, now=now), 1e-9),
                    "estimate_s": stage.estimate_s,
                    "retries": stage.retries,
                }
                for name, stage in self.stages.items()
            ],
            "blocks": None
            if blocks is None
            else {
                "stage": blocks.stage,
                "step": blocks.step,
                "counts": list(blocks.counts),
                "extent_voxels": list(blocks.extent_voxels),
                "grid_shape": list(blocks.grid_shape),
                "states": zlib.compress(blocks.states.tobytes(), 1),
            },
            "in_flight": dict(self.in_flight),
            "seams": dict(vars(self.seams)),
            "cells": self.cells,
            "retries": self.retries,
            "failures": list(self.failures),
            "messages": list(self.messages),
            "history": [list(sample) for sample in self.history],
        }


def unpack_states(packed: bytes) -> np.ndarray:
    """Return the states of blocks that a snapshot carries."""
    return np.frombuffer(zlib.decompress(packed), np.uint8).copy()


def shares(states: np.ndarray, counts: Triple, *, axis: int) -> dict[str, np.ndarray]:
    """Look at a grid of blocks along an axis: for each column, how many blocks are in each state.

    Examples
    --------
    >>> states = np.array([DONE, WAITING, DONE, RUNNING], np.uint8)
    >>> shares(states, (2, 1, 2), axis=0)["done"]
    array([[2, 0]])
    """
    grid = states.reshape(counts)
    return {name: np.count_nonzero(grid == n, axis=axis) for n, name in enumerate(BLOCK_STATES)}


def share_of(names: Iterable[str], found: dict[str, np.ndarray]) -> np.ndarray:
    """Return the share of each column that is in any of these states."""
    whole = sum(found.values())
    share: np.ndarray = sum(found[name] for name in names) / np.maximum(whole, 1)
    return share
