"""Stitching and numbering of 1e6, 1e7 and 1e8 cells, and dask-image's `label` beside ours as blocks get more.

First table: the working files that the label stage would leave are drawn (27,000 cells to a block of 512^3,
6 % of them cut by a face; no voxel exists), then the run's own stages stitch them, look up the final label of
every block's cells, and write the cell table. Each size runs in a process of its own, so that peaks do not
mix; the time to draw is not counted.

Second table: connected components of one volume, cut into more and more blocks; wants dask-image
(`pip install -c constraints.txt ".[benchmarks]"`).

    python benchmarks/stitch.py [--cells 1e6 1e7 1e8] [--workers 2] [--folder DIR] [--no-dask-image]
"""

from __future__ import annotations

import argparse
import math
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from braincensus import RunConfig, open_volume
from braincensus.blocks import BlockGrid
from braincensus.cluster import connect, resources_for
from braincensus.planning import make_plan
from braincensus.progress import Silent
from braincensus.stages import label, measure, relabel, stitch
from braincensus.stages.identities import ids_name
from braincensus.stages.segment import PROBABILITY
from braincensus.store import Output, chunk_and_shard, create_output
from braincensus.tasks import Context, map_blocks
from braincensus_kernels.boxes import Box
from braincensus_kernels.intensity import scale_for
from braincensus_kernels.measure import PARTIAL_COLUMNS

CELLS_PER_BLOCK = 27_000
CUT_BY_A_FACE = 540  # of each of the three upper faces of a block
VOXELS_AT_A_FACE = 9  # of a cell that it cuts, on either side
SIDE = 512


def peak_mib() -> float:
    """Peak resident memory of this process, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@dataclass(frozen=True)
class Draw:
    """Where to draw working files, and for which blocks."""

    grid: BlockGrid
    output: Output


def seeds_of(grid: BlockGrid, number: int) -> np.ndarray:
    """Draw the seeds that a block owns."""
    core = grid[number].core
    rng = np.random.default_rng(number)
    position = [rng.integers(a, b, CELLS_PER_BLOCK) for a, b in zip(core.start, core.stop, strict=True)]
    return np.unique(np.ravel_multi_index(position, grid.volume_shape)).astype(np.int64)


def measurements(rng: np.random.Generator, seeds: np.ndarray, shape: tuple[int, int, int]) -> dict[str, Any]:
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


def draw_block(spec: Draw, number: int) -> np.ndarray:
    """Write what the label stage writes for one block; returns the owners of the cells in it."""
    grid, block = spec.grid, spec.grid[number]
    rng = np.random.default_rng((1, number))
    own = seeds_of(grid, number)
    foreign, faces, owners = [np.empty(0, np.int64)], {"unanchored": np.empty(0, np.int64)}, [number]
    for axis, name in enumerate("zyx"):
        for side, step in (("low", -1), ("high", 1)):
            index = list(block.index)
            index[axis] += step
            if not 0 <= index[axis] < grid.counts[axis]:
                continue
            other = grid.at((index[0], index[1], index[2])).number
            low = min(number, other)
            of_low = own if low == number else seeds_of(grid, low)
            cut = of_low[axis * CUT_BY_A_FACE : (axis + 1) * CUT_BY_A_FACE]
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
    return np.array(owners, np.int32)


def look_up(spec: tuple[Output, Any], number: int) -> int:
    output, index = spec
    return int(np.count_nonzero(index.labels_of(output.read_work(ids_name(number))["seed"])))


def summary(number: int, grid: BlockGrid, owners: np.ndarray) -> label.BlockSummary:
    return label.BlockSummary(number, grid[number].core, 0, 0, 0, 0, 0, max(grid.halo), True, 0.0, owners)


def measure_cells(n_cells: int, workers: int, folder: Path) -> None:
    """Draw, stitch, number and tabulate; print one row."""
    n_blocks = math.ceil(n_cells / CELLS_PER_BLOCK)
    z = max(1, round(n_blocks ** (1 / 3)))
    y = max(1, round(math.sqrt(n_blocks / z)))
    counts = (z, y, math.ceil(n_blocks / z / y))
    volume = replace(
        open_volume(np.zeros((1, 1, 1), np.uint16), voxel_size_um=(2.0, 2.0, 2.0)),
        shape=(counts[0] * SIDE, counts[1] * SIDE, counts[2] * SIDE),
    )
    config = RunConfig().merged(
        {
            "foreground": {"model": "intensity"},
            "compute": {
                "block_voxels": SIDE,
                "workers": workers,
                "dashboard_port": 0,
                "threads_per_worker": 1,
            },
        }
    )
    with connect(config.compute, resources_for(config.compute)) as (client, resources):
        plan = make_plan(volume, config, resources, channels=None, precision="float32")
        output = create_output(folder / "stitch.zarr", overwrite=True, voxel_size_um=(2.0, 2.0, 2.0))
        grid = plan.label_grid
        drawn = map_blocks(
            draw_block, Draw(grid, output), range(len(grid)), client=client, stage="draw", name="draw"
        )
        blocks = sorted((summary(n, grid, owners) for n, owners in drawn), key=lambda block: block.number)
        context = Context(plan, output, client, Silent())
        scale = scale_for(volume.dtype, 0.0, 0.0)
        began = time.perf_counter()
        index, audit, _ = stitch.run(context, blocks, scale)
        stitched = time.perf_counter()
        cells = map_blocks(
            look_up, (output, index), range(len(grid)), client=client, stage="number", name="number"
        )
        seen = sum(n for _, n in cells)
        numbered = time.perf_counter()
        measure.run(context, index, scale)
        tabulated = time.perf_counter()
        peak = max(client.run(peak_mib).values())
    assert audit.exact
    assert seen >= index.n_cells
    print(
        f"| {index.n_cells:,} | {len(grid):,} | {audit.crossings:,} | {stitched - began:.1f} s "
        f"| {numbered - stitched:.1f} s | {tabulated - numbered:.1f} s "
        f"| {(numbered - began) / index.n_cells * 1e6:.2f} us | {peak_mib():.0f} MiB | {peak:.0f} MiB |",
        flush=True,
    )


def binary_volume(side: int) -> np.ndarray:
    from scipy import ndimage

    noise = ndimage.gaussian_filter(np.random.default_rng(0).random((side,) * 3, dtype=np.float32), 1.5)
    return noise > np.quantile(noise, 0.94)


def ours(image: np.ndarray, block: int, folder: Path) -> tuple[float, int]:
    """Label, stitch and relabel the components of a stored volume with the run's own stages."""
    volume = open_volume(np.zeros(image.shape, np.uint16), voxel_size_um=(1.0, 1.0, 1.0))
    config = RunConfig().merged(
        {
            "foreground": {"model": "intensity"},
            "labelling": {"method": "components", "threshold": 0.5},
            "compute": {"block_voxels": block, "workers": 1, "threads_per_worker": 2, "dashboard_port": 0},
        }
    )
    with connect(config.compute, resources_for(config.compute)) as (client, resources):
        plan = make_plan(volume, config, resources, channels=None, precision="float32")
        output = create_output(folder / "components.zarr", overwrite=True, voxel_size_um=(1.0, 1.0, 1.0))
        chunk, shard = chunk_and_shard((128, 128, 128))
        output.create_array(PROBABILITY, shape=image.shape, dtype="uint16", chunk=chunk, shard=shard)
        for box in Box.whole(image.shape).tiles((128, 128, 128)):
            output.write_block(PROBABILITY, box, image[box.slices].astype(np.uint16) * 65535)
        volume = open_volume(
            str(output.path / PROBABILITY), voxel_size_um=(1.0, 1.0, 1.0), scratch=folder / "scratch"
        )
        context = Context(replace(plan, volume=volume), output, client, Silent())
        scale = scale_for(volume.dtype, 0.0, 0.0)
        began = time.perf_counter()
        index, audit, _ = stitch.run(context, label.run(context, scale=scale, threshold=32767.0), scale)
        relabel.run(context, index)
        assert audit.exact
        return time.perf_counter() - began, index.n_cells


def theirs(image: np.ndarray, block: int) -> tuple[float, float, int, int]:
    """Label with dask-image: seconds to build the graph, seconds to compute, cells, tasks."""
    import dask
    import dask.array as da
    from dask_image import ndmeasure

    source = da.from_array(image, chunks=(block,) * 3)
    began = time.perf_counter()
    labels, n = ndmeasure.label(source, structure=np.ones((3, 3, 3)))
    graph = time.perf_counter()
    tasks = len(dict(labels.__dask_graph__()))
    with dask.config.set(scheduler="threads", num_workers=2):
        cells = int(dask.compute(labels, n)[1])
    return graph - began, time.perf_counter() - graph, cells, tasks


def beside_dask_image(side: int, blocks: list[int]) -> None:
    image = binary_volume(side)
    print(
        f"\n{side}^3 voxels, 26-connected components, 2 threads. dask-image holds input and result in "
        "memory; ours reads\nand writes compressed shards, measures every cell and audits every seam.\n"
    )
    print("| block | blocks | dask-image: graph | compute | tasks | cells | ours: all | cells |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for block in blocks:
        graph, compute, their_cells, tasks = theirs(image, block)
        with tempfile.TemporaryDirectory() as folder:
            seconds, our_cells = ours(image, block, Path(folder))
        print(
            f"| {block}^3 | {math.ceil(side / block) ** 3} | {graph:.1f} s | {compute:.1f} s | {tasks:,} "
            f"| {their_cells:,} | {seconds:.1f} s | {our_cells:,} |",
            flush=True,
        )


def main() -> None:
    """Run one process for each size."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cells", type=float, nargs="*", default=[1e6, 1e7, 1e8])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument(
        "--folder", type=Path, help="where to write (about 400 bytes a cell); default: temporary"
    )
    parser.add_argument("--no-dask-image", action="store_true")
    parser.add_argument("--side", type=int, default=256, help="of the volume that dask-image labels, too")
    parser.add_argument("--blocks", type=int, nargs="+", default=[128, 64, 32, 16])
    parser.add_argument("--one", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one is not None:
        measure_cells(int(args.one), args.workers, args.folder)
        return
    if args.cells:
        print(
            "| cells | blocks | cut by a face | stitch | look up labels | cell table | stitch + look up, "
            "per cell | client peak | worker peak |\n|---|---|---|---|---|---|---|---|---|",
            flush=True,
        )
    for cells in args.cells:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            command = [sys.executable, __file__, "--one", str(cells), "--workers", str(args.workers)]
            subprocess.run([*command, "--folder", folder], check=True)
    if not args.no_dask_image:
        beside_dask_image(args.side, args.blocks)


if __name__ == "__main__":
    main()
