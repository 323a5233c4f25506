"""How many cells are found, and how many of them are right: phantoms whose cells are known, and real data.

Phantoms of three densities, each with three amounts of noise and once with dim cells, go through the whole
pipeline: by `intensity`, and by WNet3D with norms calibrated on the volume (the default), with those stored
in the weights, and with those of each window (the original's). Centroids are matched one to one within 10 um.
Noise is the standard deviation in bare tissue, in counts; the dimmest cells stand 300 counts above tissue,
before shading, the brightest 2,500; of dim ones 120 and 500.

With `--real`, volumes without truth: cells found by each method, and how far the methods agree.

    python benchmarks/quality.py [--real c5image.tif] [--weights compact] [--cells 300 1000 3000]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from braincensus import RunConfig, run
from braincensus.cluster import connect, resources_for
from braincensus_kernels.boxes import Box
from braincensus_kernels.metrics import match_centroids
from braincensus_kernels.phantom import Phantom

MATCH_UM = 10.0
VOXEL_SIZE_UM = (5.0, 5.26, 5.26)
BRIGHT, DIM = (300.0, 2500.0), (120.0, 500.0)
KINDS = ((1.0, BRIGHT), (4.0, BRIGHT), (16.0, BRIGHT), (1.0, DIM))
"""Counts per photon of the camera (noise of about 18, 36 and 72 counts, by the light of a phantom's tissue),
and how bright cells are."""


def main() -> None:
    """Print the tables as markdown."""
    arguments = parse()
    started = time.perf_counter()
    with pipeline(arguments.weights) as census:
        phantom_table(arguments, census)
        for path in arguments.real:
            real_table(path, census)
    print(f"\n{time.perf_counter() - started:.0f} s, 1 worker of 1 thread; weights: {arguments.weights}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="128,160,160", help="z,y,x of the phantoms, voxels")
    parser.add_argument("--cells", type=int, nargs="+", default=[300, 1000, 3000])
    parser.add_argument("--seed", type=int, default=77)
    parser.add_argument("--weights", default="compact")
    parser.add_argument("--real", type=Path, nargs="*", default=[], help="volumes without truth")
    return parser.parse_args()


class Census:
    """The whole pipeline with its defaults, but for the foreground model."""

    def __init__(self, client: Any, folder: Path, weights: str) -> None:
        self._client, self._output = client, folder / "out.zarr"
        network = {"model": "wnet3d", "weights": weights}
        self.methods: dict[str, dict[str, str]] = {
            "intensity": {"model": "intensity"},
            "wnet3d, calibrated (default)": {**network, "norm": "calibrated"},
            "wnet3d, stored": {**network, "norm": "calibrated", "calibration": "stored"},
            "wnet3d, window": {**network, "norm": "window"},
        }

    def centroids_um(self, image: Any, method: str) -> NDArray[np.float64]:
        """Return z, y, x of the cells that a method finds."""
        config = RunConfig().merged(
            {"foreground": self.methods[method], "input": {"voxel_size_um": VOXEL_SIZE_UM}}
        )
        result = run(image, self._output, config=config, client=self._client, fresh=True)
        cells: NDArray[np.float64] = result.cells.to_pandas()[["z_um", "y_um", "x_um"]].to_numpy()
        return cells


@contextmanager
def pipeline(weights: str) -> Iterator[Census]:
    compute = {"workers": 1, "threads_per_worker": 1, "dashboard_port": 0}
    settings = RunConfig().merged({"compute": compute}).compute
    with (
        tempfile.TemporaryDirectory() as folder,
        connect(settings, resources_for(settings)) as (client, _),
    ):
        yield Census(client, Path(folder), weights)


def phantom_table(arguments: argparse.Namespace, census: Census) -> None:
    z, y, x = (int(n) for n in arguments.shape.split(","))
    print("| cells | per mm^3 of tissue | noise | method | found | precision | recall | F1 |")
    print("|---|---|---|---|---|---|---|---|")
    for n_cells in arguments.cells:
        for counts_per_photon, brightness in KINDS:
            phantom = Phantom(
                shape=(z, y, x),
                voxel_size_um=VOXEL_SIZE_UM,
                n_cells=n_cells,
                seed=arguments.seed,
                counts_per_photon=counts_per_photon,
                brightness=brightness,
            )
            image, truth = phantom.render(Box.whole(phantom.shape)), phantom.cells()
            axes = zip("zyx", phantom.voxel_size_um, strict=True)
            true_um = np.stack([truth[axis] * size for axis, size in axes], axis=1)
            light = phantom.tissue_level - phantom.camera_offset
            noise = (counts_per_photon * light + phantom.read_noise**2) ** 0.5
            density = n_cells / phantom.tissue_mm3
            matches = {
                method: match_centroids(census.centroids_um(image, method), true_um, MATCH_UM)
                for method in census.methods
            }
            best = max(round(match.f1, 3) for match in matches.values())
            for method, match in matches.items():
                f1 = f"**{match.f1:.3f}**" if round(match.f1, 3) == best else f"{match.f1:.3f}"
                kind = f"{noise:.0f}" + (", dim" if brightness == DIM else "")
                print(
                    f"| {n_cells:,} | {density:,.0f} | {kind} | {method} | {match.n_found:,} "
                    f"| {match.precision:.3f} | {match.recall:.3f} | {f1} |",
                    flush=True,
                )


def real_table(path: Path, census: Census) -> None:
    found = {method: census.centroids_um(path, method) for method in census.methods}
    print(
        f"\n{path.name}: " + "; ".join(f"{method}: {len(cells):,} cells" for method, cells in found.items())
    )
    print("\n| methods | cells of both | of the first alone | of the second alone | F1 of the two |")
    print("|---|---|---|---|---|")
    for first, second in combinations(found, 2):
        match = match_centroids(found[first], found[second], MATCH_UM)
        print(
            f"| {first}; {second} | {match.n_matched:,} | {len(match.extra):,} | {len(match.missed):,} "
            f"| {match.f1:.3f} |"
        )


if __name__ == "__main__":
    main()
