"""dask-image's `label` beside ours: connected components of one volume, cut into more and more blocks.

Wants dask-image (`pip install -c constraints.txt ".[benchmarks]"`). What stitching costs for 1e6 to 1e8
cells, and who needs how much memory, is in scale.py.

    python benchmarks/stitch.py [--side 256] [--blocks 128 64]
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from braincensus import RunConfig, open_volume
from braincensus.cluster import connect, resources_for
from braincensus.planning import make_plan
from braincensus.progress import Silent
from braincensus.stages import label, relabel, stitch
from braincensus.stages.segment import PROBABILITY
from braincensus.store import chunk_and_shard, create_output
from braincensus.tasks import Context
from braincensus_kernels.boxes import Box
from braincensus_kernels.intensity import scale_for


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
    """Print a row for each size of blocks."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--side", type=int, default=256, help="of the volume")
    parser.add_argument("--blocks", type=int, nargs="+", default=[128, 64])
    args = parser.parse_args()
    beside_dask_image(args.side, args.blocks)


if __name__ == "__main__":
    main()
