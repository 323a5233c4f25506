"""Peak memory of a worker against the size of the volume: it must follow the block, not the volume.

Writes phantoms of 1 GB and of 8 GB (uint16, block by block), counts the cells of each with the
`intensity` model and the same block size, each in a fresh local cluster, and prints the peak
resident memory of the workers and of the client. `--as-dask` leaves freed memory to what Dask tells
glibc, where braincensus keeps it while a block is at work: less memory, more time.

    python benchmarks/memory.py [--sizes-gb 1 8] [--block 256] [--workers 1] [--foreground intensity]
                                [--as-dask] [--folder DIR]
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from braincensus import RunConfig, run
from braincensus.cluster import connect, resources_for
from braincensus.phantom import write_phantom
from braincensus_kernels.phantom import Phantom

MIB = 1024**2
CELLS_PER_GB = 100_000
# Dask says 64 KiB; just that would be taken for Dask's own word, and not for the user's wish. The others
# are glibc's own.
AS_DASK = {
    "MALLOC_TRIM_THRESHOLD_": "65537",
    "MALLOC_MMAP_THRESHOLD_": "131072",
    "MALLOC_ARENA_MAX": "0",
}


def peak_mib() -> float:
    """Peak resident memory of this process, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def side_of(gigabytes: float) -> tuple[int, int, int]:
    """Shape of about this many GB of uint16: a slab that grows along z only, whole blocks across."""
    across = 768
    return round(gigabytes * 1e9 / 2 / across**2), across, across


def measure(gigabytes: float, block: int, workers: int, foreground: str, folder: Path) -> None:
    """Write, run and print one row; runs in a process of its own, so that peaks do not mix."""
    shape = side_of(gigabytes)
    source, output = folder / f"phantom_{gigabytes:g}.zarr", folder / f"census_{gigabytes:g}.zarr"
    phantom = Phantom(shape=shape, n_cells=int(CELLS_PER_GB * gigabytes), seed=1)
    began = time.perf_counter()
    write_phantom(source, phantom, block_voxels=(block, block, block), overwrite=True)
    written = time.perf_counter() - began
    config = RunConfig().merged(
        {
            "foreground": {"model": foreground},
            "compute": {"block_voxels": (block, block, block), "workers": workers, "dashboard_port": 0},
        }
    )
    began = time.perf_counter()
    with connect(config.compute, resources_for(config.compute)) as (client, resources):
        result = run(source, output, config=config, client=client, fresh=True)
        seconds = time.perf_counter() - began
        peaks = client.run(peak_mib)
        threads = resources.threads
    voxels = shape[0] * shape[1] * shape[2]
    print(
        f"| {2 * voxels / 1e9:.2f} GB | {shape[0]}x{shape[1]}x{shape[2]} | {block} | {workers} x {threads} "
        f"| {max(peaks.values()):.0f} MiB | {peak_mib():.0f} MiB | {result.n_cells:,} of {phantom.n_cells:,} "
        f"| {result.seams['exact']} | {written:.0f} s | {seconds:.0f} s | {voxels / seconds / 1e6:.2f} |",
        flush=True,
    )


def main() -> None:
    """Run one process for each size."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes-gb", type=float, nargs="+", default=[1.0, 8.0])
    parser.add_argument("--block", type=int, default=256)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--foreground", default="intensity")
    parser.add_argument("--as-dask", action="store_true", help="do not keep freed memory")
    parser.add_argument(
        "--folder", type=Path, help="where to write (needs about twice the size); default: temporary"
    )
    parser.add_argument("--one", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one is not None:
        if args.as_dask:
            os.environ.update(AS_DASK)
        measure(args.one, args.block, args.workers, args.foreground, args.folder)
        return
    print(
        "| volume | shape zyx | block | workers x threads | worker peak | client peak | cells | seams exact "
        "| write phantom | run | Mvoxel/s |\n|---|---|---|---|---|---|---|---|---|---|---|",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for size in args.sizes_gb:
            command = [sys.executable, __file__, "--one", str(size), "--block", str(args.block)]
            command += ["--workers", str(args.workers), "--foreground", args.foreground]
            command += ["--folder", str(folder), *(["--as-dask"] * args.as_dask)]
            subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
