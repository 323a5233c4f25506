"""How blocks become Dask tasks: one task per block, streamed, with a bounded number in flight.

A task reads its block from the chunked store, computes, and writes back; only small summaries
travel. Submitting as results arrive keeps the client's and the scheduler's memory flat however
many blocks there are, and one task per block (instead of a load, a compute and a store task)
leaves nothing that a scheduler could move between workers. Loads and stores still overlap with
the network: a worker has several threads and only one of them holds `worker.device_slot`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, TypeVar

from distributed import Client
from distributed.scheduler import KilledWorker

from braincensus.allocator import giving_back_memory
from braincensus.blocks import BlockGrid
from braincensus.config import HUNG_AFTER_S
from braincensus.errors import BlockError, BraincensusError, explain
from braincensus.flight import IN_FLIGHT_PER_THREAD, Flight, Window
from braincensus.heartbeats import connection_lost, loss
from braincensus.planning import Plan
from braincensus.progress import Progress
from braincensus.store import Output
from braincensus.store.files import noting
from braincensus.store.marks import Mark, NotDoneError
from braincensus.watch.tell import UNWATCHED, Unwatched

T = TypeVar("T")


@dataclass
class Context:
    """What every stage needs: the plan, where to write, the cluster, and whom to tell."""

    plan: Plan
    output: Output
    client: Client
    progress: Progress
    timings_s: dict[str, float] = field(default_factory=dict)
    keys: Mapping[str, str] = field(default_factory=dict)
    """What the blocks of each stage depend on (see `manifest`); done blocks of a stage without a key are
    not marked, and are done again."""
    guard: Callable[[], None] = lambda: None
    """Called as results arrive; raises if the output is no longer this run's."""
    kept: dict[str, int] = field(default_factory=dict)
    """Blocks of each stage that an earlier run had done."""
    watch: Unwatched = UNWATCHED
    """Told about every block, for the page on the dashboard."""

    @contextmanager
    def stage(self, name: str, voxels: int) -> Iterator[None]:
        """Time a stage and tell the progress about it."""
        self.progress.start(name, voxels)
        began = time.perf_counter()
        yield
        self.timings_s[name] = self.timings_s.get(name, 0.0) + time.perf_counter() - began
        if self.kept.get(name):
            blocks = "1 block was" if self.kept[name] == 1 else f"{self.kept[name]:,} blocks were"
            self.progress.message(f"{name}: {blocks} done before")
        self.progress.finish(name, self.timings_s[name])

    def map(
        self,
        stage: str,
        function: Callable[[Any, int], T],
        spec: Any,
        grid: BlockGrid,
        *,
        name: str,
        classes: Sequence[type] = (),
        after: str = "",
    ) -> Iterator[tuple[int, T]]:
        """Run ``function(spec, number)`` for every block of a grid, yielding results as they arrive.

        A block that an earlier run of the same output has done is not done again: its result is read back.

        Parameters
        ----------
        stage
            Whose progress advances.
        function, spec, name
            As for :func:`map_blocks`.
        grid
            The blocks; the progress moves by the voxels of their cores.
        classes
            The dataclasses of which results are made, so that they can be read back.
        after
            The stage on which the blocks depend, if it is not `stage` itself.

        Raises
        ------
        BraincensusError
            As :func:`map_blocks`.
        """
        at_once = IN_FLIGHT_PER_THREAD * self.plan.resources.threads * self.plan.resources.workers
        where = after or stage
        once = _Once(function, spec, self.output, where, name, self.keys.get(where, ""), tuple(classes))
        self.watch.blocks(stage, name, grid)
        tasks = map_blocks(
            _do_once,
            once,
            range(len(grid)),
            client=self.client,
            at_once=at_once,
            stage=stage,
            name=name,
            watch=self.watch,
            hung_after_s=self.plan.config.compute.hung_after_s,
        )
        for number, (kept, result) in tasks:
            self.guard()
            self.kept[stage] = self.kept.get(stage, 0) + kept
            self.progress.advance(stage, grid[number].core.size)
            self.watch.done(stage, number, grid[number].core.size, kept=kept)
            yield number, result


@dataclass(frozen=True)
class _Once:
    """A function of blocks whose done blocks are kept."""

    function: Callable[[Any, int], Any]
    spec: Any
    output: Output
    stage: str
    step: str
    key: str
    classes: tuple[type, ...]


def _do_once(once: _Once, number: int) -> tuple[bool, Any]:
    """Return whether the block was done before, and its result."""
    if not once.key:
        return False, once.function(once.spec, number)
    mark = Mark(once.output, once.stage, once.step, number, once.key)
    try:
        return True, mark.result(once.classes)
    except NotDoneError:
        pass
    with giving_back_memory(), noting() as files:
        result = once.function(once.spec, number)
    mark.write(result, files)
    return False, result


def map_blocks(
    function: Callable[[Any, int], T],
    spec: Any,
    numbers: Iterable[int],
    *,
    client: Client | None,
    at_once: int | None = None,
    stage: str,
    name: str,
    watch: Unwatched = UNWATCHED,
    hung_after_s: float = HUNG_AFTER_S,
) -> Iterator[tuple[int, T]]:
    """Run ``function(spec, number)`` for every number, yielding results as they arrive, in any order.

    A block that kills its workers or finds no memory is tried again at the end, with nothing beside it.
    Workers that hang are restarted, and their blocks go to others; a block that takes far longer than those
    before it is given to another worker, too, and counts once.

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
        cluster. As many for workers that come later are added.
    stage
        What errors call it.
    name
        What the Dask dashboard shows.
    watch
        Told what becomes of every block.
    hung_after_s
        How long a worker or the scheduler may be silent.

    Raises
    ------
    BraincensusError
        As the task raised it, with the stage and block added.
    BlockError
        If a task failed in another way, or killed its workers even alone; or the cluster is lost, hangs, or
        has no workers left.
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
        at_once = IN_FLIGHT_PER_THREAD * max(1, sum(client.nthreads().values()))
    waiting = iter(numbers)
    window = Window(client, at_once)
    flight = Flight(client, function, spec, stage=stage, name=name, watch=watch, hung_after_s=hung_after_s)

    def give_up(number: int, err: Exception) -> BraincensusError:
        explained = _explained(err, stage, number)
        watch.failed(number, str(explained))
        return explained

    too_large: list[int] = []
    try:
        flight.submit(list(islice(waiting, at_once)))
        for number, answer in flight.answers():
            failed = False
            try:
                result = answer()
            except (KilledWorker, MemoryError) as err:
                failed = True
                too_large.append(number)  # too large beside others, perhaps not alone
                watch.retried(stage, number, _in_short(err))
            except Exception as err:
                raise give_up(number, err) from err
            free = window.free(len(flight))
            if flight.idle or free > at_once // IN_FLIGHT_PER_THREAD:  # else with the next that has come back
                flight.submit(list(islice(waiting, free)))
            if not failed:
                yield number, result
        for number in too_large:
            flight.submit([number])
            for _, answer in flight.answers():
                try:
                    result = answer()
                except Exception as err:
                    raise give_up(number, err) from err
                yield number, result
    finally:
        flight.close()


def _in_short(err: Exception) -> str:
    return "not enough memory" if isinstance(err, MemoryError) else "its workers died each time"


def _explained(err: Exception, stage: str, number: int) -> BraincensusError:
    if isinstance(err, BraincensusError):
        return type(err)(f"{err}\n  while: {stage}, block {number}")
    if isinstance(err, KilledWorker | MemoryError):
        died = isinstance(err, KilledWorker)
        return BlockError(
            explain(
                f"{stage}, block {number}: "
                + ("the worker died each time it worked on this block" if died else "not enough memory"),
                found="with nothing beside it, too",
                cause="out of memory",
                remedy="smaller blocks (--block-size), fewer threads or workers on a machine, or more memory",
            )
        )
    if connection_lost(err):
        return loss(f"{stage}, block {number}")
    if isinstance(err, OSError):
        return BlockError(
            explain(
                f"{stage}, block {number}: {type(err).__name__}: {err}",
                cause="a full disk or an unreachable file system",
                remedy="free some space or reconnect, then run again: done blocks are kept",
            )
        )
    return BlockError(f"{stage}, block {number}: {type(err).__name__}: {err}")
