"""Labelling: ours, per block and single-shot, against what one would pick instead; on a GPU, too, if any.

Prints markdown tables: Voronoi-Otsu beside scikit-image and pyclesperanto, then connected components and
watershed (seeds by threshold and by distance) beside SciPy and scikit-image. The volume is 256^3: the real
c5image.tif tiled by reflection where ../shared/data holds it, else made cells. pyclesperanto is no
dependency: name a Python that has it, and an OpenCL device, with ``--pyclesperanto PATH``.

    python benchmarks/label.py [--side 256] [--repeats 3] [--pyclesperanto /path/to/python]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from scipy import ndimage
from skimage.filters import gaussian, threshold_otsu
from skimage.measure import label
from skimage.morphology import local_maxima
from skimage.segmentation import watershed

from braincensus.labelling import (
    ComponentsLabeller,
    DistanceWatershedLabeller,
    Labeller,
    VoronoiOtsuLabeller,
    WatershedLabeller,
)
from braincensus.store import chunk_and_shard, create_output
from braincensus_kernels.backend import cuda_available
from braincensus_kernels.block_labels import BlockLabels
from braincensus_kernels.boxes import Box
from braincensus_kernels.components import connected_components
from braincensus_kernels.filters import gaussian_blur
from braincensus_kernels.histogram import count_values, otsu_threshold
from braincensus_kernels.voronoi_otsu import label_block, reach_voxels, voronoi_otsu
from braincensus_kernels.watershed import distance_watershed
from braincensus_kernels.watershed import watershed as watershed_of_ours

C5IMAGE = Path(__file__).resolve().parents[1].parent / "shared" / "data" / "c5image.tif"
SIGMA_PAIRS = [(0.65, 0.65), (2.0, 1.0)]
BLOCK_SIDES = (128, 256)

# Timed on its second run: the first compiles its kernels.
PYCLESPERANTO = """
import json, sys, time
import numpy as np
import pyclesperanto as cle
source, target, spot, outline = sys.argv[1:]
image = np.load(source).astype(np.float32)
sigmas = {"spot_sigma": float(spot), "outline_sigma": float(outline)}
cle.voronoi_otsu_labeling(cle.push(image[:32, :32, :32]), **sigmas)
start = time.perf_counter()
labels = cle.pull(cle.voronoi_otsu_labeling(cle.push(image), **sigmas))
print(json.dumps({"seconds": time.perf_counter() - start, "version": cle.__version__}))
np.save(target, labels)
"""


def cell_volume(side: int) -> tuple[np.ndarray[Any, Any], str]:
    """Return a volume wide enough for any block's halo, as uint16, and what it is."""
    if C5IMAGE.exists():
        image, origin = tifffile.imread(C5IMAGE).astype(np.float32), "c5image.tif tiled by reflection"
    else:
        rng = np.random.default_rng(0)
        image = np.zeros((96, 96, 96), np.float32)
        image[tuple(rng.integers(0, 96, (3, 320)))] = rng.uniform(300, 900, 320)
        image = gaussian(image, 1.8, preserve_range=True) + rng.normal(1, 0.1, image.shape)
        origin = "made cells tiled by reflection"
    margins = [(0, max(0, side - n)) for n in image.shape]
    volume = np.pad(image, margins, mode="reflect")[:side, :side, :side]
    low, high = float(volume.min()), float(volume.max())
    return ((volume - low) / (high - low) * 65535).astype(np.uint16), origin


def best_seconds(repeats: int, work: Callable[[], Any]) -> tuple[float, Any]:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = work()
        times.append(time.perf_counter() - start)
    return min(times), result


def scikit_image_watershed(image: Any, spot_sigma: float, outline_sigma: float) -> Any:
    """Blur, Otsu, maxima, watershed of the inverted blur: how it is commonly written. Not the same labels."""
    spots = gaussian(image, spot_sigma, preserve_range=True)
    outline = gaussian(image, outline_sigma, preserve_range=True)
    mask = outline > threshold_otsu(outline)
    seeds, _ = ndimage.label(local_maxima(spots) & mask, structure=np.ones((3, 3, 3)))
    return watershed(-spots, seeds, mask=mask)


def scikit_image_nearest(image: Any, spot_sigma: float, outline_sigma: float) -> Any:
    """Blur, Otsu, maxima, nearest seed by distance transform. Not the same labels, either."""
    spots = gaussian(image, spot_sigma, preserve_range=True)
    outline = gaussian(image, outline_sigma, preserve_range=True)
    mask = outline > threshold_otsu(outline)
    seeds, _ = ndimage.label(local_maxima(spots) & mask, structure=np.ones((3, 3, 3)))
    nearest = ndimage.distance_transform_edt(seeds == 0, return_distances=False, return_indices=True)
    return np.where(mask, seeds[tuple(nearest)], 0)


def global_threshold(image: Any, sigma: float) -> float:
    box = Box.whole(image.shape)
    outline = gaussian_blur(image, outer=box, inner=box, volume_shape=image.shape, sigma=sigma)
    low, high = float(outline.min()), float(outline.max())
    return otsu_threshold(count_values(outline, minimum=low, maximum=high, bins=256), low, high)


def label_blocks(volume: Any, inner: Box, side: int, **how: Any) -> list[Any]:
    """Label `inner` in blocks, each with its halo from the volume around."""
    reach = reach_voxels(how["spot_sigma"], how["outline_sigma"], how["max_steps"])
    results = []
    for core in inner.tiles((side, side, side)):
        outer = core.dilate(reach).clip(volume.shape)
        block = np.ascontiguousarray(volume[outer.slices])
        results.append((core, label_block(block, outer=outer, core=core, volume_shape=volume.shape, **how)))
    return results


def differing_voxels(results: list[Any], whole: Any) -> int:
    """Count voxels whose cell, known by its seed, is another one than in the single shot."""
    identity = np.concatenate(([-1], whole.seeds))
    differing = 0
    for core, result in results:
        found = np.concatenate(([-1], result.seeds))[result.labels][core.slices_in(result.kept)]
        differing += int((found != identity[whole.labels[core.slices]]).sum())
    return differing


def pyclesperanto_seconds(
    python: str, image: Any, spot_sigma: float, outline_sigma: float
) -> tuple[float, Any, str] | None:
    with tempfile.TemporaryDirectory() as folder:
        source, target = str(Path(folder) / "image.npy"), str(Path(folder) / "labels.npy")
        np.save(source, image)
        options = [source, target, str(spot_sigma), str(outline_sigma)]
        run = subprocess.run(
            [python, "-c", PYCLESPERANTO, *options], capture_output=True, text=True, check=False, timeout=600
        )
        if run.returncode != 0:
            return None
        said = json.loads(run.stdout.strip().splitlines()[-1])
        return said["seconds"], np.load(target), said["version"]


def measure(side: int, repeats: int, python: str, spot: float, outline: float) -> None:
    """Print the rows of one pair of sigmas."""
    cores = os.cpu_count() or 1
    image, origin = cell_volume(side)
    box = Box.whole(image.shape)
    ours, labels = best_seconds(repeats, lambda: voronoi_otsu(image, spot, outline))

    def row(method: str, seconds: float, cells: int, note: str, cores: int = 1) -> None:
        rate = side**3 / seconds / cores / 1e6
        cost = seconds * cores / ours
        print(
            f"| {spot}, {outline} | {method} | {seconds:.2f} | {rate:.1f} | {cost:.1f} | {cells} | {note} |"
        )

    row("ours, single-shot", ours, int(labels.max()), f"Otsu included; {origin}")

    how: dict[str, Any] = {"spot_sigma": spot, "outline_sigma": outline, "seeds": "plateau"}
    how["threshold"] = global_threshold(image, outline)
    whole = label_block(image, outer=box, core=box, volume_shape=image.shape, max_steps=image.size, **how)
    how["max_steps"] = whole.growth_steps

    # The same tissue with more of it around, so that the outermost blocks have their halo, too.
    reach = reach_voxels(spot, outline, whole.growth_steps)[0]
    wide, _ = cell_volume(side + 2 * reach)
    inner = Box((reach,) * 3, (reach + side,) * 3)
    for block in BLOCK_SIDES:
        seconds, results = best_seconds(repeats, lambda: label_blocks(wide, inner, block, **how))  # noqa: B023
        cells = sum(len(r.seeds) for _, r in results)
        row(f"ours, {block}^3 blocks", seconds, cells, f"halo {reach}; counted in every block they touch")
    wrong = differing_voxels(label_blocks(image, box, BLOCK_SIDES[0], **how), whole)
    note = f"voxels unlike the single shot: {wrong}"
    print(f"| {spot}, {outline} | ours, {BLOCK_SIDES[0]}^3 blocks | | | | | {note} |")

    seconds, other = best_seconds(1, lambda: scikit_image_watershed(image, spot, outline))
    row("scikit-image, watershed", seconds, int(other.max()), "other labels; one run")
    seconds, other = best_seconds(1, lambda: scikit_image_nearest(image, spot, outline))
    row("scikit-image, distance transform", seconds, int(other.max()), "other labels; one run")
    cle = pyclesperanto_seconds(python, image, spot, outline)
    if cle is None:
        print(f"| {spot}, {outline} | pyclesperanto | | | | | not installed there, or no OpenCL device |")
        return
    seconds, theirs, version = cle
    unlike = int((theirs != voronoi_otsu(image, spot, outline, seeds="strict")).sum())
    row(
        f"pyclesperanto {version}",
        seconds,
        int(theirs.max()),
        f"voxels unlike ours (strict): {unlike}",
        cores,
    )


WATERSHED = {"threshold": 0.136, "seed_threshold": 0.25}
"""Of the stretched values, as fractions of 65535: Otsu's threshold of the real volume, and brighter seeds."""


def scikit_image_by_threshold(image: Any) -> Any:
    """Do what the plugin's `binary_watershed` does, without its removal of small seeds."""
    seeds = label(image > WATERSHED["seed_threshold"] * 65535)
    return watershed(-image.astype(np.float64), seeds, mask=image > WATERSHED["threshold"] * 65535)


def scikit_image_by_distance(image: Any) -> Any:
    mask = image > WATERSHED["threshold"] * 65535
    depth = gaussian(ndimage.distance_transform_edt(mask), 1, preserve_range=True)
    seeds, _ = ndimage.label(local_maxima(depth) & mask, structure=np.ones((3, 3, 3)))
    return watershed(-depth, seeds, mask=mask)


def by_blocks(volume: Any, inner: Box, side: int, labeller: Labeller, threshold: float) -> list[BlockLabels]:
    """Label `inner` in blocks, each with its halo from the volume around."""
    found = []
    for core in inner.tiles((side, side, side)):
        outer = core.dilate(labeller.reach).clip(volume.shape)
        block = np.ascontiguousarray(volume[outer.slices])
        found.append(
            labeller.label(block, outer=outer, core=core, volume_shape=volume.shape, threshold=threshold)
        )
    return found


def measure_others(side: int, repeats: int) -> None:
    """Print the table of the labellers that are not Voronoi-Otsu."""
    image, origin = cell_volume(side)
    threshold, seed_threshold = (WATERSHED[name] * 65535 for name in ("threshold", "seed_threshold"))
    mask = image > threshold
    plain, zero = (0.65, 0.65, 0.65), (0.0, 0.0, 0.0)
    ones = np.ones((3, 3, 3))
    contenders: list[tuple[str, str, Callable[[], Any]]] = [
        ("components", "ours, single-shot", lambda: connected_components(image, threshold)),
        ("components", "scipy.ndimage.label", lambda: ndimage.label(image > threshold, structure=ones)[0]),
        ("components", "scikit-image label", lambda: label(image > threshold, connectivity=3)),
        (
            "watershed, threshold",
            "ours, single-shot",
            lambda: watershed_of_ours(image, threshold=threshold, seed_threshold=seed_threshold),
        ),
        ("watershed, threshold", "scikit-image watershed", lambda: scikit_image_by_threshold(image)),
        (
            "watershed, distance",
            "ours, single-shot",
            lambda: distance_watershed(image, threshold=threshold, limit=10),
        ),
        ("watershed, distance", "scikit-image watershed", lambda: scikit_image_by_distance(image)),
    ]
    steps = 10
    labellers: list[tuple[str, Labeller]] = [
        ("components", ComponentsLabeller(zero)),
        ("watershed, threshold", WatershedLabeller(zero, seed_threshold, 3, steps)),
        ("watershed, distance", DistanceWatershedLabeller(zero, (1.0,) * 3, (1, 1, 1), 10, steps)),
        ("voronoi-otsu", VoronoiOtsuLabeller(plain, plain, "plateau", steps)),
    ]
    print(f"\n{side}^3 voxels, uint16, {100 * mask.mean():.1f} % foreground ({origin}), one thread each.\n")
    print("| labeller | method | seconds | Mvoxel/s per core | cells | note |\n|---|---|---|---|---|---|")
    for name, method, work in contenders:
        work()  # compile before the clock starts
        seconds, found = best_seconds(repeats if "ours" in method else 1, work)
        print(f"| {name} | {method} | {seconds:.2f} | {side**3 / seconds / 1e6:.1f} | {int(found.max())} | |")
    for name, labeller in labellers:
        reach = labeller.reach[0]
        wide, _ = cell_volume(side + 2 * reach)
        inner = Box((reach,) * 3, (reach + side,) * 3)
        for block in BLOCK_SIDES:
            run = partial(by_blocks, wide, inner, block, labeller, threshold)
            seconds, found = best_seconds(repeats, run)
            again = sum(not part.complete for part in found)
            note = f"halo {reach}, growth up to {steps} steps; {again} of {len(found)} need a larger halo"
            rate = side**3 / seconds / 1e6
            print(f"| {name} | ours, {block}^3 blocks | {seconds:.2f} | {rate:.1f} | | {note} |")


def measure_reading(side: int, repeats: int) -> None:
    """Print how fast blocks come from an output's store: labelling should not be slower."""
    image, _ = cell_volume(side)
    with tempfile.TemporaryDirectory() as folder:
        output = create_output(Path(folder) / "o.zarr", overwrite=True, voxel_size_um=(1.0, 1.0, 1.0))
        whole = Box.whole(image.shape)
        for block in BLOCK_SIDES:
            chunk, shard = chunk_and_shard((block,) * 3)
            output.create_array(str(block), shape=image.shape, dtype="uint16", chunk=chunk, shard=shard)
            cores = list(whole.tiles((block,) * 3))
            for core in cores:
                output.write_block(str(block), core, image[core.slices])
            outers = [core.dilate(14).clip(image.shape) for core in cores]
            seconds, _ = best_seconds(repeats, lambda: [output.read_block(str(block), o) for o in outers])  # noqa: B023
            rate = side**3 / seconds / 1e6
            print(
                f"| - | reading {block}^3 blocks, halo 14 | {seconds:.2f} | {rate:.1f} | | zstd, checksums |"
            )


def measure_gpu(side: int, repeats: int) -> None:
    """Print the table of what runs on a GPU, beside the CPU's on the same data, and whether both agree."""
    import cupy

    image, _ = cell_volume(side)
    threshold = WATERSHED["threshold"] * 65535
    on_gpu = cupy.asarray(image)

    def timed(work: Callable[[], Any]) -> tuple[float, Any]:
        def finished() -> Any:
            found = work()
            cupy.cuda.Device().synchronize()
            return found

        finished()
        return best_seconds(repeats, finished)

    name = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
    print(f"\nOn {name}, {side}^3 voxels already there.\n")
    print("| labeller | seconds | Mvoxel/s | voxels unlike the CPU's |\n|---|---|---|---|")
    for labeller, work in (
        ("voronoi-otsu 0.65, 0.65", lambda image: voronoi_otsu(image, 0.65, 0.65)),
        ("voronoi-otsu 2, 1", lambda image: voronoi_otsu(image, 2.0, 1.0)),
        ("components", lambda image: connected_components(image, threshold)),
    ):
        seconds, found = timed(partial(work, on_gpu))
        unlike = int((cupy.asnumpy(found) != work(image)).sum())
        print(f"| {labeller} | {seconds:.4f} | {side**3 / seconds / 1e6:.0f} | {unlike} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", type=int, default=256, help="side of the volume, voxels")
    parser.add_argument("--repeats", type=int, default=3, help="the best of so many runs is given")
    parser.add_argument("--pyclesperanto", default=sys.executable, help="a Python that has pyclesperanto")
    options = parser.parse_args()

    voronoi_otsu(np.eye(8, dtype=np.uint16)[None].repeat(8, 0), 0.65, 1)  # compile before the clock starts
    print(
        f"\n{options.side}^3 voxels, uint16, best of {options.repeats}. One thread each; pyclesperanto uses"
    )
    print(f"all {os.cpu_count()} cores: its rate is per core, its cost (relative to ours) in core seconds.\n")
    print("| sigmas | method | seconds | Mvoxel/s per core | cost | cells | note |")
    print("|---|---|---|---|---|---|---|")
    for spot, outline in SIGMA_PAIRS:
        measure(options.side, options.repeats, options.pyclesperanto, spot, outline)
    measure_others(options.side, options.repeats)
    measure_reading(options.side, options.repeats)
    if cuda_available():
        measure_gpu(options.side, options.repeats)
    else:
        print("\nNo GPU that CuPy can use: nothing measured on one.")


if __name__ == "__main__":
    main()
