"""How many cells are found, and how many of them are right: phantoms whose cells are known.

For phantoms of several densities, the default (wnet3d, calibrated norms), `norm="window"` (the original's)
and the `intensity` model are run through the whole pipeline, and centroids are matched one to one
within 10 um.

    python benchmarks/quality.py [--shape 128,160,160] [--cells 300 1000 3000]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np

from braincensus import RunConfig, run
from braincensus.cluster import connect, resources_for
from braincensus_kernels.boxes import Box
from braincensus_kernels.metrics import match_centroids
from braincensus_kernels.phantom import Phantom

MATCH_UM = 10.0
METHODS = {
    "wnet3d": {"foreground": {"model": "wnet3d"}},
    "wnet3d, window norms": {"foreground": {"model": "wnet3d", "norm": "window"}},
    "intensity": {"foreground": {"model": "intensity"}},
}


def main() -> None:
    """Print the table as markdown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="128,160,160", help="z,y,x in voxels")
    parser.add_argument("--cells", type=int, nargs="+", default=[300, 1000, 3000])
    parser.add_argument("--seed", type=int, default=77)
    args = parser.parse_args()
    z, y, x = (int(n) for n in args.shape.split(","))
    compute = RunConfig().merged({"compute": {"workers": 1, "dashboard_port": 0}}).compute
    print("| cells | per mm^3 of tissue | method | found | precision | recall | F1 | segment, s |")
    print("|---|---|---|---|---|---|---|---|")
    with (
        tempfile.TemporaryDirectory() as folder,
        connect(compute, resources_for(compute)) as (client, _),
    ):
        for n_cells in args.cells:
            phantom = Phantom(shape=(z, y, x), n_cells=n_cells, seed=args.seed)
            image, truth = phantom.render(Box.whole(phantom.shape)), phantom.cells()
            axes = zip("zyx", phantom.voxel_size_um, strict=True)
            true_um = np.stack([truth[axis] * size for axis, size in axes], axis=1)
            for name, changes in METHODS.items():
                config = RunConfig().merged({"input": {"voxel_size_um": phantom.voxel_size_um}, **changes})
                result = run(image, Path(folder) / "out.zarr", config=config, client=client, overwrite=True)
                cells = result.cells.to_pandas()
                match = match_centroids(cells[["z_um", "y_um", "x_um"]].to_numpy(), true_um, MATCH_UM)
                print(
                    f"| {n_cells:,} | {n_cells / phantom.tissue_mm3:,.0f} | {name} | {len(cells):,} "
                    f"| {match.precision:.3f} | {match.recall:.3f} | {match.f1:.3f} "
                    f"| {result.timings['segment']:.1f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
