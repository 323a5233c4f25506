"""How much of the machine a run uses: more workers, more volume, and what is lost beside the blocks.

1. One and two real workers of one thread, the same volume (strong) and twice the volume (weak).
2. The same with 8 to 64 workers whose tasks only wait, about as long as blocks do: what the submission of
   tasks, the scheduler and the client make of it. They are threads of four processes.
3. A whole run: its time beside the time of its tasks, divided by workers; and where two workers lose it.
4. Two runs of one worker each that know nothing of each other, at once: what two workers can do at the most.

    python benchmarks/scaling.py [--side 320] [--foreground wnet3d] [--seconds 1.0] [--simulated 8 16 32 64]
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from distributed import Client, LocalCluster, get_task_stream

from braincensus import RunConfig, run
from braincensus.cluster import connect, resources_for
from braincensus.phantom import write_phantom
from braincensus.tasks import map_blocks
from braincensus_kernels.phantom import Phantom

_PROCESSES = 4  # of simulated workers; more would fight for two cores before any task has begun


@dataclass(frozen=True)
class Ran:
    """One run: its seconds, and of each step the number of tasks, their seconds, and from first to last."""

    seconds: float
    steps: dict[str, tuple[int, float, float]]
    cells: int

    @property
    def in_tasks(self) -> float:
        """Seconds of all tasks together."""
        return sum(busy for _, busy, _ in self.steps.values())


def census(source: Path, output: Path, workers: int, foreground: str, side: int) -> Ran:
    """Run on a cluster that is warm: a small part of the volume has been counted before."""
    config = RunConfig().merged(
        {
            "foreground": {"model": foreground},
            "compute": {
                "workers": workers,
                "threads_per_worker": 1,
                "block_voxels": side,
                "dashboard_port": 0,
            },
        }
    )
    small = Phantom(shape=(128, 128, 128), n_cells=300, seed=9)
    with connect(config.compute, resources_for(config.compute)) as (client, _):
        run(small, output.with_name("warm.zarr"), config=config, client=client, fresh=True)
        began = time.perf_counter()
        with get_task_stream(client) as tasks:
            result = run(source, output, config=config, client=client, fresh=True)
        seconds = time.perf_counter() - began
    spans: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for task in tasks.data:
        step = str(task["key"]).rsplit("-", 2)[0]  # name-number-unique
        spans[step] += [(s["start"], s["stop"]) for s in task["startstops"] if s["action"] == "compute"]
    steps = {}
    for step, found in spans.items():
        begun, ended = zip(*found, strict=True)
        steps[step] = len(found), sum(ended) - sum(begun), max(ended) - min(begun)
    return Ran(seconds, steps, result.n_cells)


def real(side: int, block: int, foreground: str, folder: Path) -> None:
    """Print the rows of one and two workers."""
    print(f"Real workers of one thread, {foreground}, blocks of {block}^3:\n")
    print("| volume | workers | run | in tasks / workers | run beside that | efficiency |")
    print("|---|---|---|---|---|---|", flush=True)
    sources = {}
    for name, depth in (("one", side), ("two", 2 * side)):
        sources[name] = folder / f"{name}.zarr"
        write_phantom(sources[name], Phantom(shape=(depth, side, side), n_cells=depth * 12, seed=1))
    took: dict[tuple[str, int], Ran] = {}
    for name, workers in (("one", 1), ("one", 2), ("two", 2)):
        took[name, workers] = found = census(sources[name], folder / "out.zarr", workers, foreground, block)
        alone = took["one", 1].seconds
        ideal = {("one", 1): alone, ("one", 2): alone / 2, ("two", 2): alone}[name, workers]
        kind = {("one", 1): "1", ("one", 2): "strong", ("two", 2): "weak"}[name, workers]
        shape = f"{side if name == 'one' else 2 * side}x{side}x{side}"
        print(
            f"| {shape} | {workers} | {found.seconds:.1f} s | {found.in_tasks / workers:.1f} s "
            f"| {found.seconds / (found.in_tasks / workers):.3f} "
            f"| {100 * ideal / found.seconds:.0f} % ({kind}) |",
            flush=True,
        )
    side_by_side(took["one", 1], sources["one"], folder, foreground, block)
    two = took["one", 2]
    print(f"\nWhere two workers lose time, {side}^3:\n")
    print("| step | tasks | first to last | in tasks / 2 | lost |\n|---|---|---|---|---|")
    for step, (n, busy, span) in two.steps.items():
        print(f"| {step} | {n} | {span:.2f} s | {busy / 2:.2f} s | {span - busy / 2:.2f} s |")
    between = two.seconds - sum(span for _, _, span in two.steps.values())
    print(f"| between steps | | {between:.2f} s | | {between:.2f} s |", flush=True)


def side_by_side(alone: Ran, source: Path, folder: Path, foreground: str, block: int) -> None:
    """Print how much longer a run takes beside another that shares nothing with it but the machine."""
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as processes:
        outputs = [folder / name / "out.zarr" for name in ("left", "right")]
        for output in outputs:
            output.parent.mkdir()
        runs = [processes.submit(census, source, output, 1, foreground, block) for output in outputs]
        both = [run.result() for run in runs]
    seconds = sum(run.seconds for run in both) / 2
    tasks = sum(run.in_tasks for run in both) / 2
    print(
        f"\nTwo runs of one worker at once, each by itself: {seconds:.1f} s ({tasks:.1f} s in tasks); "
        f"alone {alone.seconds:.1f} s ({alone.in_tasks:.1f} s). "
        f"So two workers can be {100 * alone.seconds / seconds:.0f} % efficient on this machine.",
        flush=True,
    )


def wait(seconds: float, number: int) -> float:
    """Take about as long as a block, more or less."""
    spread = 0.3
    duration = seconds * float(np.random.default_rng(number).lognormal(-(spread**2) / 2, spread))
    time.sleep(duration)
    return duration


def simulated(counts: list[int], seconds: float) -> None:
    """Print the rows of workers that only wait."""
    print(f"\nWorkers whose tasks wait {seconds:g} s, give or take 30 %:\n")
    print("| workers | tasks | run | ideal | efficiency | kind |\n|---|---|---|---|---|---|", flush=True)
    for kind, tasks_of in (("weak", lambda n: 20 * n), ("strong", lambda _: 20 * max(counts))):
        for workers in counts:
            n = tasks_of(workers)
            processes = min(workers, _PROCESSES)
            with (
                LocalCluster(
                    n_workers=processes,
                    threads_per_worker=workers // processes,
                    dashboard_address="127.0.0.1:0",
                ) as cluster,
                Client(cluster) as client,
            ):
                began = time.perf_counter()
                done = map_blocks(wait, seconds, range(n), client=client, stage="wait", name="wait")
                total = sum(duration for _, duration in done)
                took = time.perf_counter() - began
            ideal = total / workers
            print(
                f"| {workers} | {n:,} | {took:.1f} s | {ideal:.1f} s | {100 * ideal / took:.1f} % | {kind} |",
                flush=True,
            )


def main() -> None:
    """Print all rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--side", type=int, default=320)
    parser.add_argument("--block", type=int, default=128)
    parser.add_argument("--foreground", default="wnet3d")
    parser.add_argument("--seconds", type=float, default=1.0, help="of a simulated task")
    parser.add_argument("--simulated", type=int, nargs="*", default=[8, 16, 32, 64], help="workers")
    parser.add_argument("--no-real", action="store_true")
    args = parser.parse_args()
    if not args.no_real:
        with tempfile.TemporaryDirectory() as folder:
            real(args.side, args.block, args.foreground, Path(folder))
    if args.simulated:
        simulated(args.simulated, args.seconds)


if __name__ == "__main__":
    main()
