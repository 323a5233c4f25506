"""Terabytes: what planning, scheduling, stitching and the tables cost, and who needs how much memory.

The input is a phantom of that size, made when it is read: no disk holds it. The run's own stages go over it,
with their own loops, marks, graphs and files, on a scheduler and workers in processes of their own; only what
a block computes from voxels is replaced by drawn results of the kind and size that the real ones have
(statistics and candidate windows; labelled cells with their measurements and what is believed at the faces).
So the figures are those of everything but voxels.

    python benchmarks/scale.py [--terabytes 1 10] [--cells 1e7 1e7] [--workers 2] [--folder DIR]
    python benchmarks/scale.py --peers          # dask-image's label and map_overlap with as many blocks

`--peers` wants `pip install -c constraints.txt ".[benchmarks]"`.
"""

from __future__ import annotations

import argparse
import math
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from distributed import Client

import braincensus
from braincensus import RunConfig
from braincensus.blocks import BlockGrid
from braincensus.manifest import keys_of, settings_of
from braincensus.progress import Silent
from braincensus.stages import intensity, label, measure, relabel, stitch, threshold
from braincensus.stages.identities import ids_name
from braincensus.store import create_output
from braincensus.tasks import Context, map_blocks
from braincensus_kernels.intensity import joint_histogram, scale_for, tile_statistics
from braincensus_kernels.measure import PARTIAL_COLUMNS
from braincensus_kernels.phantom import Phantom

SIDE = 512
CUT_BY_A_FACE = 0.02  # of a block's cells, by each of its three upper faces
VOXELS_AT_A_FACE = 9  # of a cell that it cuts, on either side
BRAIN_UM = 16_000.0  # a mouse's: more voxels are smaller ones
CELLS = "cells-in-a-block"


def peak_mib(process: int) -> float:
    """Peak resident memory of a process, MiB."""
    text = Path(f"/proc/{process}/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", text)
    return int(found[1]) / 1024 if found else math.nan


# --- what is drawn in place of voxels ------------------------------------------------------------------


def draw_scan(spec: intensity._Scan, task: int) -> intensity._Scanned:
    """Give statistics of one small rendered cube, and as many candidate windows as the blocks have."""
    rng = np.random.default_rng(task)
    q = rng.normal(400, 30, (32, 32, 32)).clip(0).astype(np.uint32)
    tiles = tile_statistics(q)
    windows = []
    for number in spec.grid.numbers_in(spec.tasks[task].core):
        core = spec.grid[number].core
        level = np.broadcast_to(np.float32(task % 40 + 380), tuple(-(-n // 8) for n in core.shape))
        windows += intensity._candidate_windows(core, level, level + 9, intensity.share_of_windows(spec.grid))
    extrema = float(q.min()), float(q.max())
    return intensity._Scanned(joint_histogram(q, tiles), windows, extrema, ())


def draw_threshold(spec: threshold._Threshold, number: int) -> np.ndarray:
    """Give a histogram of two humps."""
    counts = np.zeros(1024, np.int64)
    counts[20:60], counts[700:800] = 1000, 40 + number % 7
    return counts


def seeds_of(grid: BlockGrid, number: int, cells: int) -> np.ndarray:
    """Draw the seeds that a block owns."""
    core = grid[number].core
    rng = np.random.default_rng(number)
    position = [rng.integers(a, b, cells) for a, b in zip(core.start, core.stop, strict=True)]
    return np.unique(np.ravel_multi_index(position, grid.volume_shape)).astype(np.int64)


def measurements(rng: np.random.Generator, seeds: np.ndarray, shape: tuple[int, int, int]) -> dict[str, Any]:
    """Draw what is measured of cells around their seeds."""
    voxels = rng.integers(20, 200, len(seeds))
    zyx = np.unravel_index(seeds, shape)
    columns = {"seed": seeds, "voxels": voxels}
    columns |= {f"sum_{axis}": voxels * at for axis, at in zip("zyx", zyx, strict=True)}
    columns |= {f"{m}_{axis}": at for m in ("min", "max") for axis, at in zip("zyx", zyx, strict=True)}
    columns |= {
        "sum_intensity": voxels * 900,
        "max_intensity": voxels + 2000,
        "sum_probability": voxels * 50_000,
    }
    for name in PARTIAL_COLUMNS:
        columns.setdefault(name, rng.integers(10, 90, len(seeds)))
    return columns


def beliefs(seeds: np.ndarray, axis: int, low: int) -> dict[str, np.ndarray]:
    """Draw what both blocks of a face believe of the cells that it cuts: the same."""
    rng = np.random.default_rng((axis, low))
    positions = np.unique(rng.integers(0, SIDE * SIDE, len(seeds) * VOXELS_AT_A_FACE))
    return {"positions": positions, "seeds": np.resize(np.repeat(seeds, VOXELS_AT_A_FACE), len(positions))}


@dataclass(frozen=True)
class Drawn:
    """The specification of a stage, and how many cells a block has."""

    spec: Any
    cells: int


def draw_block(drawn: Drawn, number: int) -> label.BlockSummary:
    """Write what the label stage writes for one block, but for its voxels."""
    spec, cells = drawn.spec, drawn.cells
    grid, block = spec.grid, spec.grid[number]
    rng = np.random.default_rng((1, number))
    own = seeds_of(grid, number, cells)
    cut_by_a_face = int(CUT_BY_A_FACE * cells)
    foreign, faces, owners = [np.empty(0, np.int64)], {"unanchored": np.empty(0, np.int64)}, [number]
    for axis, name in enumerate("zyx"):
        for side, step in (("low", -1), ("high", 1)):
            index = list(block.index)
            index[axis] += step
            if not 0 <= index[axis] < grid.counts[axis]:
                continue
            other = grid.at((index[0], index[1], index[2])).number
            low = min(number, other)
            of_low = own if low == number else seeds_of(grid, low, cells)
            cut = of_low[axis * cut_by_a_face : (axis + 1) * cut_by_a_face]
            if low != number:
                foreign.append(cut)
                owners.append(low)
            for layer in ("inside", "outside"):
                for column, values in beliefs(cut, axis, low).items():
                    faces[f"{name}_{side}_{layer}_{column}"] = values
    seen = np.concatenate(foreign)
    spec.output.write_work(label.owned_name(number), measurements(rng, own, grid.volume_shape))
    spec.output.write_work(label.foreign_name(number), measurements(rng, seen, grid.volume_shape))
    spec.output.write_work(label.faces_name(number), faces)
    spec.output.write_work(ids_name(number), {"seed": np.sort(np.concatenate([own, seen]))})

    both, owning = len(own) + len(seen), np.array(owners, np.int32)
    return label.BlockSummary(number, block.core, both, len(own), 0, 0, 9, max(grid.halo), True, 0.0, owning)


def look_up(spec: relabel._Relabel, number: int) -> None:
    """Find the final labels of a block, and write no voxel of them."""
    seeds = spec.output.read_work(ids_name(number))["seed"]
    assert spec.index.labels_of(seeds).all(), "every cell has a label"


DRAWS: dict[str, Callable[[Any, int], Any]] = {
    "intensity-block": draw_scan,
    "threshold-block": draw_threshold,
    "label-block": draw_block,
    "relabel-block": look_up,
}


@dataclass
class DrawnContext(Context):
    """The run's own context, but that voxels are drawn; it notes how many tasks there were, and how long."""

    cells: int = 0
    tasks: dict[str, int] = field(default_factory=dict)

    def map(
        self, stage: str, function: Any, spec: Any, grid: BlockGrid, *, name: str, **options: Any
    ) -> Iterator[tuple[int, Any]]:
        """Replace what computes on voxels."""
        self.tasks[stage] = self.tasks.get(stage, 0) + len(grid)
        if name == "label-block":
            spec = Drawn(spec, self.cells)
        return super().map(stage, DRAWS.get(name, function), spec, grid, name=name, **options)


# --- one size ------------------------------------------------------------------------------------------


@contextmanager
def cluster(workers: int, folder: Path) -> Iterator[tuple[Client, int, list[int]]]:
    """Start a scheduler and workers as processes; yields the client and their process numbers."""
    file = folder / "scheduler.json"
    dask = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", "0"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    scheduler = subprocess.Popen(
        [*dask, "--dashboard-address", "127.0.0.1:0", "--scheduler-file", str(file)], **quiet
    )
    worker = [
        sys.executable,
        "-m",
        "distributed.cli.dask_worker",
        "--scheduler-file",
        str(file),
        "--no-nanny",
    ]
    limit = ["--nthreads", "1", "--memory-limit", "4GiB", "--local-directory", str(folder), "--no-dashboard"]
    started = [subprocess.Popen([*worker, *limit], **quiet) for _ in range(workers)]
    try:
        while not file.exists():
            time.sleep(0.1)
        with Client(scheduler_file=str(file)) as client:
            client.wait_for_workers(workers)
            yield client, scheduler.pid, [process.pid for process in started]
    finally:
        for process in (*started, scheduler):
            process.terminate()
            process.wait()


def nothing(_: None, number: int) -> int:
    return number


def measure_size(terabytes: float, cells: int, workers: int, folder: Path) -> None:
    """Plan and run one size; print one row."""
    side = round((terabytes * 1e12 / 2) ** (1 / 3) / SIDE) * SIDE
    voxel_size_um = (BRAIN_UM / side,) * 3
    phantom = Phantom(shape=(side,) * 3, voxel_size_um=voxel_size_um, n_cells=cells, seed=1)
    config = RunConfig().merged(
        {
            "foreground": {"model": "intensity"},
            "labelling": {"max_radius_um": 20.0},
            "compute": {"block_voxels": SIDE, "workers": workers, "threads_per_worker": 1},
        }
    )
    with cluster(workers, folder) as (client, scheduler, started):
        before = {"client": peak_mib(psutil.Process().pid), "scheduler": peak_mib(scheduler)}
        began = time.perf_counter()
        plan = braincensus.plan(phantom, config=config, client=client)
        keys = keys_of(settings_of(plan, weights_sha256=""))
        planned = time.perf_counter() - began
        grid = plan.label_grid
        began = time.perf_counter()
        done = map_blocks(nothing, None, range(len(grid)), client=client, stage="none", name="nothing")
        n = sum(1 for _ in done)
        bare = (time.perf_counter() - began) / n
        output = create_output(folder / "census.zarr", overwrite=True, voxel_size_um=voxel_size_um)
        context = DrawnContext(plan, output, client, Silent(), keys=keys, cells=round(cells / len(grid)))
        ranges = intensity.run(context)
        scale = scale_for(np.dtype(np.uint16), 0.0, 0.0)
        outline = threshold.run(context, tissue_threshold=ranges.tissue_threshold)
        blocks = label.run(context, scale=scale, threshold=outline)
        index, audit, _ = stitch.run(context, blocks, scale)
        relabel.run(context, index)
        measure.run(context, index, scale)
        peaks = [peak_mib(psutil.Process().pid), peak_mib(scheduler), max(peak_mib(pid) for pid in started)]
    assert audit.exact
    seconds = context.timings_s
    print(
        f"| {terabytes:g} TB | {side}^3 | {len(grid):,} | {index.n_cells:,} "
        f"| {sum(context.tasks.values()):,} "
        f"| {planned:.2f} s | {1e3 * bare:.2f} ms "
        f"| {seconds['intensity']:.0f} s | {seconds['threshold']:.0f} s | {seconds['label']:.0f} s "
        f"| {seconds['stitch']:.0f} s | {seconds['relabel']:.0f} s | {seconds['measure']:.0f} s "
        f"| {before['client']:.0f}, then {peaks[0]:.0f} | {before['scheduler']:.0f}, then {peaks[1]:.0f} "
        f"| {peaks[2]:.0f} |",
        flush=True,
    )


# --- what else there is --------------------------------------------------------------------------------


def peer(which: str, blocks: int, compute: bool) -> None:
    """Build (and, if asked for, compute) the graph of a peer for so many tiny blocks; print one row."""
    import dask
    import dask.array as da

    side, chunk = round(blocks ** (1 / 3)), 8
    image = da.zeros((side * chunk,) * 3, chunks=(chunk,) * 3, dtype=np.uint8)
    began = time.perf_counter()
    if which == "label":
        from dask_image import ndmeasure

        result = ndmeasure.label(image, structure=np.ones((3, 3, 3)))[0]
    else:
        result = da.map_overlap(np.copy, image, depth=2, boundary="none", dtype=np.uint8)
    with dask.config.set(scheduler="threads", num_workers=2):
        graph = dask.optimize(result)[0].__dask_graph__()
        tasks = len(dict(graph))
        built = time.perf_counter() - began
        computed = math.nan
        if compute:
            began = time.perf_counter()
            dask.compute(result.sum())
            computed = time.perf_counter() - began
    print(
        f"| {which} | {side**3:,} | {tasks:,} | {built:.1f} s | {computed:.1f} s "
        f"| {peak_mib(psutil.Process().pid):.0f} MiB |",
        flush=True,
    )


def peers(blocks: list[int], limit_s: int) -> None:
    """Run each size in a process of its own, and stop where one does not end in time."""
    print("| peer | blocks of 8^3 | tasks | build the graph | compute | peak of the client |")
    print("|---|---|---|---|---|---|", flush=True)
    for which in ("map_overlap", "label"):
        for n in blocks:
            command = [sys.executable, __file__, "--peer", which, "--blocks", str(n)]
            try:
                subprocess.run(command, check=True, timeout=limit_s)
            except subprocess.TimeoutExpired:
                print(f"| {which} | {n:,} | | not finished in {limit_s} s | | |", flush=True)
                break
            except subprocess.CalledProcessError as err:
                print(f"| {which} | {n:,} | | ended with {err.returncode} | | |", flush=True)
                break


def main() -> None:
    """Run one process for each size."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--terabytes", type=float, nargs="+", default=[1.0, 10.0])
    parser.add_argument("--cells", type=float, nargs="+", default=[1e7, 1e7], help="one for each size")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where to write (400 bytes a cell); default: temporary")
    parser.add_argument("--peers", action="store_true", help="dask-image's label and map_overlap instead")
    parser.add_argument("--blocks", type=int, nargs="+", default=[64, 512, 4096, 32768])
    parser.add_argument("--limit-s", type=int, default=600)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--peer", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peer:
        peer(args.peer, args.blocks[0], compute=True)
        return
    if args.peers:
        peers(args.blocks, args.limit_s)
        return
    if args.one:
        measure_size(args.terabytes[0], int(args.cells[0]), args.workers, args.folder)
        return
    print(
        "| size | voxels | blocks | cells | tasks | plan | a task that does nothing | intensity | threshold "
        "| label (drawing) | stitch | look up labels | tables | client MiB | scheduler MiB | worker MiB |"
    )
    print("|" + "---|" * 16, flush=True)
    for terabytes, cells in zip(args.terabytes, args.cells, strict=True):
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            command = [
                sys.executable,
                __file__,
                "--one",
                "--terabytes",
                str(terabytes),
                "--cells",
                str(cells),
            ]
            command += ["--workers", str(args.workers), "--folder", folder]
            subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
