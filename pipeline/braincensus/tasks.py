"""How blocks become Dask tasks: one task per block, streamed, with a bounded number in flight.

A task reads its block from the chunked store, computes, and writes back; only small summaries
travel. Submitting as results arrive keeps the client's and the scheduler's memory flat however
many blocks there are, and one task per block (instead of a load, a compute and a store task)
leaves nothing that a scheduler could move between workers. Loads and stores still overlap with
the network: a worker has several threads and only one of them holds `worker.device_slot`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, TypeVar
from uuid import uuid4

from distributed import Client, as_completed
from distributed.client import FutureCancelledError
from distributed.scheduler import KilledWorker

from braincensus.blocks import BlockGrid
from braincensus.errors import BlockError, BraincensusError, explain
from braincensus.planning import Plan
from braincensus.progress import Progress
from braincensus.store import Output

T = TypeVar("T")
_IN_FLIGHT_PER_THREAD = 3


@dataclass
class Context:
    """What every stage needs: the plan, where to write, the cluster, and whom to tell."""

    plan: Plan
    output: Output
    client: Client
    progress: Progress
    timings_s: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str, voxels: int) -> Iterator[None]:
        """Time a stage and tell the progress about it."""
        self.progress.start(name, voxels)
        began = time.perf_counter()
        yield
        self.timings_s[name] = self.timings_s.get(name, 0.0) + time.perf_counter() - began
        self.progress.finish(name, self.timings_s[name])

    def map(
        self,
        stage: str,
        function: Callable[[Any, int], T],
        spec: Any,
        grid: BlockGrid,
        *,
        name: str,
    ) -> Iterator[tuple[int, T]]:
        """Run ``function(spec, number)`` for every block of a grid, yielding results as they arrive.

        Parameters
        ----------
        stage
            Whose progress advances.
        function, spec, name
            As for :func:`map_blocks`.
        grid
            The blocks; the progress moves by the voxels of their cores.

        Raises
        ------
        BraincensusError
            As :func:`map_blocks`.
        """
        at_once = _IN_FLIGHT_PER_THREAD * self.plan.resources.threads * self.plan.resources.workers
        tasks = map_blocks(
            function, spec, range(len(grid)), client=self.client, at_once=at_once, stage=stage, name=name
        )
        for number, result in tasks:
            self.progress.advance(stage, grid[number].core.size)
            yield number, result


def map_blocks(
    function: Callable[[Any, int], T],
    spec: Any,
    numbers: Iterable[int],
    *,
    client: Client | None,
    at_once: int | None = None,
    stage: str,
    name: str,
) -> Iterator[tuple[int, T]]:
    """Run ``function(spec, number)`` for every number, yielding results as they arrive, in any order.

    Parameters
    ----------
    function
        A module-level function; it must be safe to run twice (a lost worker's blocks are redone).
    spec
        A small frozen value that every task gets.
    numbers
        Of blocks; drawn as results arrive.
    client
        Whose cluster to use; None: one after the other, in this process.
    at_once
        Tasks in flight at most, so that client and scheduler stay small; None: three for each thread of the
        cluster.
    stage
        What errors call it.
    name
        What the Dask dashboard shows.

    Raises
    ------
    BraincensusError
        As the task raised it, with the stage and block added.
    BlockError
        If a task failed in another way, or killed its workers.
    """
    if client is None:
        for number in numbers:
            try:
                result = function(spec, number)
            except Exception as err:
                raise _explained(err, stage, number) from err
            yield number, result
        return
    if at_once is None:
        at_once = _IN_FLIGHT_PER_THREAD * max(1, sum(client.nthreads().values()))
    token = uuid4().hex[:12]
    waiting = iter(numbers)
    submitted = {}

    def submit(number: int) -> Any:
        future = client.submit(function, spec, number, key=f"{name}-{token}-{number}", pure=False)
        submitted[future.key] = number
        return future

    pending = as_completed([submit(number) for number in islice(waiting, at_once)])
    try:
        for future in pending:
            number = submitted.pop(future.key)
            try:
                result = future.result()
            except Exception as err:
                raise _explained(err, stage, number) from err
            future.release()
            for following in islice(waiting, 1):
                pending.add(submit(following))
            yield number, result
    finally:
        remaining = list(pending.futures)
        if remaining:
            client.cancel(remaining)


def _explained(err: Exception, stage: str, number: int) -> BraincensusError:
    if isinstance(err, BraincensusError):
        return type(err)(f"{err}\n  while: {stage}, block {number}")
    if isinstance(err, KilledWorker):
        return BlockError(
            explain(
                f"{stage}, block {number}: the worker died each time it worked on this block",
                cause="out of memory",
                remedy="a smaller --block-size, fewer --workers, or more memory for each",
            )
        )
    if isinstance(err, FutureCancelledError):
        return BlockError(f"{stage}, block {number}: cancelled; the connection to the cluster was lost")
    if isinstance(err, OSError):
        return BlockError(
            explain(
                f"{stage}, block {number}: {type(err).__name__}: {err}",
                cause="a full disk or an unreachable file system",
                remedy="free some space or reconnect, then run again",
            )
        )
    return BlockError(f"{stage}, block {number}: {type(err).__name__}: {err}")
