"""Train the compact WNet3D that is shipped in the package: the whole recipe, runnable.

    python benchmarks/train_compact.py --real c5image.tif test_very_small.tif --out weights.safetensors

The loss sees no labels. Crops come from real volumes and from phantoms that differ in density,
brightness, noise, shading and artefacts; each volume is divided by its local background and mapped to
[0, 100] by the range of its tissue, as a run does it. Every `--check-every` steps the encoder is frozen,
segments phantoms that it is not trained on, and is scored against their known cells; this is the only use
of truth: to choose which step to keep. The best one is written.

The soft normalised cut's intensity scale is wider than the published 1: at 1, a class's weight falls to
nothing within about 1 of its mean, so that every threshold between noise and the brightest cells costs
the same, and texture of sparse tissue becomes foreground; at 50 the cut is cheapest above the noise. The
reconstruction's weight decides the first steps: at 0.001 two arbitrary regions can become the classes.

The file also brings reference statistics of the norms, for `--calibration stored`: of windows of the
training volumes, chosen as a run chooses them, all tissue and most standing out of it. To add them to weights
that are there, without training:

    python benchmarks/train_compact.py --real ... --calibrate old.safetensors --out new.safetensors
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
import torch
from numpy.typing import NDArray
from scipy import ndimage

from braincensus_kernels import intensity
from braincensus_kernels.background import local_background
from braincensus_kernels.boxes import Box, Triple
from braincensus_kernels.metrics import match_centroids
from braincensus_kernels.models.calibrate import CALIBRATION, CALIBRATION_OF, calibrate
from braincensus_kernels.models.checkpoints import Weights, load_weights, save_weights
from braincensus_kernels.models.predict import Predictor
from braincensus_kernels.models.training import DrawCrop, IntensityVariation, TrainingStep, train
from braincensus_kernels.models.wnet3d import COMPACT_CHANNELS, WNet3D
from braincensus_kernels.phantom import Phantom
from braincensus_kernels.voronoi_otsu import voronoi_otsu

TRAINING: tuple[dict[str, Any], ...] = (
    {"cells_per_mm3": 300, "seed": 101, "tissue": "full"},
    {"cells_per_mm3": 700, "seed": 102},
    {"cells_per_mm3": 1500, "seed": 103},
    {"cells_per_mm3": 1500, "seed": 104, "brightness": (150.0, 500.0), "tissue": "full"},
    {"cells_per_mm3": 3000, "seed": 105, "brightness": (150.0, 600.0)},
    {"cells_per_mm3": 5000, "seed": 106, "falloff": 0.5, "shading": 0.3},
    {"cells_per_mm3": 8000, "seed": 107, "tissue": "full", "texture": 0.1},
    {"cells_per_mm3": 12000, "seed": 108, "brightness": (120.0, 500.0)},
    {"cells_per_mm3": 20000, "seed": 109, "radius_um": (6.0, 0.8)},
    {"cells_per_mm3": 4000, "seed": 110, "cluster_fraction": 0.4, "artefacts_per_mm3": 6.0},
    {"cells_per_mm3": 2500, "seed": 111, "radius_um": (9.0, 1.2), "counts_per_photon": 3.0},
)
CALIBRATING: tuple[dict[str, Any], ...] = (
    *TRAINING,
    {"cells_per_mm3": 6000, "seed": 112, "brightness": (120.0, 400.0)},
    {"cells_per_mm3": 15000, "seed": 113, "brightness": (120.0, 400.0), "tissue": "full"},
    {
        "cells_per_mm3": 6000,
        "seed": 114,
        "brightness": (150.0, 1000.0),
        "counts_per_photon": 4.0,
        "read_noise": 8.0,
    },
    {"cells_per_mm3": 15000, "seed": 115},
)
"""The phantoms of training, and dim, noisy and dense ones."""
CHECKING: tuple[dict[str, Any], ...] = (
    {"cells_per_mm3": 1000, "seed": 13},
    {"cells_per_mm3": 3000, "seed": 11},
    {"cells_per_mm3": 8000, "seed": 12},
    {"cells_per_mm3": 15000, "seed": 14, "brightness": (120.0, 500.0)},
)
TRAINING_SHAPE: Triple = (112, 128, 128)
CHECKING_SHAPE: Triple = (88, 88, 88)
VOXEL_SIZE_UM = (5.0, 5.26, 5.26)
BACKGROUND_UM = 100.0
VARIATION = IntensityVariation(gain=0.25, gamma=0.15, offset=3.0, noise=2.0)
SIGMA = 0.65
HALO = 16
MATCH_UM = 10.0
CONTRAST = 15.0
CONTRAST_SHARE = 0.001
TISSUE_SHARE = 0.6
REFERENCE_SIDE = 48
REFERENCE_WINDOWS = 2
"""Of each volume, the best of four times as many."""
REFERENCE_TISSUE = 0.95
REFERENCE_TRIES = 400


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    real = [to_input(tifffile.imread(path)) for path in arguments.real]
    calibrating = [rendered(TRAINING_SHAPE, p) for p in CALIBRATING]
    windows = reference_windows([*real, *calibrating])
    if arguments.calibrate is not None:
        weights = load_weights(arguments.calibrate)
        write(arguments, weights.encoder, dict(weights.metadata), windows)
        return
    phantoms = calibrating[: len(TRAINING)]
    checks = [Check(p) for p in CHECKING]
    draw = crops(real, phantoms, side=arguments.crop, real_share=arguments.real_share if real else 0.0)

    torch.manual_seed(arguments.seed)
    network = WNet3D(channels=COMPACT_CHANNELS, dropout=arguments.dropout)
    started = time.monotonic()
    best = -1.0
    log = open(arguments.out.with_suffix(".csv"), "w")  # noqa: SIM115
    log.write("step,loss,ncuts,reconstruction,learning_rate,smallest_class,seconds\n")

    def progress(s: TrainingStep) -> None:
        nonlocal best
        values = (s.step, s.loss, s.ncuts, s.reconstruction, s.learning_rate, s.smallest_class)
        log.write(",".join(f"{v:.6g}" for v in values) + f",{time.monotonic() - started:.0f}\n")
        log.flush()
        done = s.step + 1
        if done % arguments.check_every and done != arguments.steps:
            return
        encoder = {k: v.detach().clone() for k, v in network.encoder.state_dict().items()}
        weights = Weights(encoder, COMPACT_CHANNELS, 2, 1, {}, "", "in training")
        f1 = [check.f1(weights, arguments.threads) for check in checks]
        score = float(np.mean(f1))
        print(
            f"step {done}: F1 {np.round(f1, 3)} mean {score:.4f}, {time.monotonic() - started:.0f} s",
            flush=True,
        )
        if score > best:
            best = score
            write(arguments, encoder, about(arguments, done, f1, time.monotonic() - started), windows)

    train(
        network,
        draw,
        steps=arguments.steps,
        batch=arguments.batch,
        learning_rate=arguments.learning_rate,
        weight_decay=arguments.weight_decay,
        seed=arguments.seed,
        reconstruction_weight=arguments.reconstruction_weight,
        intensity_sigma=arguments.intensity_sigma,
        variation=VARIATION,
        precision="bfloat16",
        progress=progress,
    )
    log.close()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--real", type=Path, nargs="*", default=[], help="TIFF volumes without labels")
    parser.add_argument("--out", type=Path, default=Path("wnet3d-compact.safetensors"))
    parser.add_argument(
        "--calibrate", type=Path, help="no training: these weights, with reference statistics"
    )
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--crop", type=int, default=40)
    parser.add_argument("--real-share", type=float, default=0.35)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--weight-decay", type=float, default=0.01)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--reconstruction-weight", type=float, default=0.005)
    parser.add_argument("--intensity-sigma", type=float, default=50.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--check-every", type=int, default=50)
    arguments = parser.parse_args()
    return arguments


def rendered(shape: Triple, parameters: dict[str, Any]) -> NDArray[np.float32]:
    return to_input(Phantom(shape=shape, **parameters).render(Box.whole(shape)))


def to_input(stored: NDArray[Any]) -> NDArray[np.float32]:
    """Divide by the local background and map to [0, 100] by the range of tissue, as a run does it."""
    extrema = intensity.finite_extrema(stored)
    q = intensity.scale_for(stored.dtype, extrema.minimum, extrema.maximum).quantise(stored)
    tiles = intensity.tile_statistics(q)
    joint = intensity.joint_histogram(q, tiles)
    tissue = intensity.find_tissue(joint)
    low, high = intensity.tissue_range(joint, tissue, low_percentile=1.0, high_percentile=99.9)
    median = intensity.tissue_median(joint, tissue)
    box = Box.whole((q.shape[0], q.shape[1], q.shape[2]))
    z, y, x = (BACKGROUND_UM / (intensity.LATTICE * size) for size in VOXEL_SIZE_UM)
    background = local_background(
        np.where(tiles.constant, np.float32(np.nan), tiles.median).astype(np.float32),
        tiles=Box.whole(tiles.median.shape),
        box=box,
        volume_shape=box.shape,
        sigma_tiles=(z, y, x),
        tissue_threshold=tissue.threshold,
        floor=median,
    )
    flat = q * (np.float32(median) / np.maximum(background, max(tissue.threshold or 0.0, low, 1.0)))
    scaled = (np.clip(flat, low, high) - low) * (100 / (high - low))
    return scaled.astype(np.float32)


def reference_windows(volumes: list[NDArray[np.float32]]) -> NDArray[np.float32]:
    """Choose windows of tissue in which most stands out of it, (window, 1, z, y, x)."""
    rng = np.random.default_rng(0)
    chosen: list[NDArray[np.float32]] = []
    for volume in volumes:
        found: list[NDArray[np.float32]] = []
        for _ in range(REFERENCE_TRIES):
            start = [int(rng.integers(n - REFERENCE_SIDE + 1)) for n in volume.shape]
            window = volume[tuple(slice(a, a + REFERENCE_SIDE) for a in start)]
            if (window > 0).mean() >= REFERENCE_TISSUE:
                found.append(window)
            if len(found) == 4 * REFERENCE_WINDOWS:
                break
        found.sort(key=lambda w: float(np.median(w) - np.percentile(w, 99)))
        chosen += found[:REFERENCE_WINDOWS]
    return np.stack(chosen)[:, None]


def crops(
    real: list[NDArray[np.float32]], phantoms: list[NDArray[np.float32]], *, side: int, real_share: float
) -> DrawCrop:
    """Draw crops that are mostly tissue and hold something brighter than it."""

    def draw(rng: np.random.Generator) -> NDArray[np.float32]:
        for _ in range(50):
            kind = real if rng.random() < real_share else phantoms
            volume = kind[int(rng.integers(len(kind)))]
            start = [int(rng.integers(n - side + 1)) for n in volume.shape]
            crop = volume[tuple(slice(a, a + side) for a in start)]
            tissue = crop > 0
            bright = (crop > np.median(crop) + CONTRAST).mean()
            if tissue.mean() >= TISSUE_SHARE and bright >= CONTRAST_SHARE:
                break
        return crop

    return draw


class Check:
    """A phantom with known cells, and what the encoder finds in it."""

    def __init__(self, parameters: dict[str, Any]) -> None:
        phantom = Phantom(shape=CHECKING_SHAPE, **parameters)
        self.size = np.array(phantom.voxel_size_um)
        cells = phantom.cells()
        self.true = np.stack([cells["z"], cells["y"], cells["x"]], axis=1) * self.size
        self.volume = to_input(phantom.render(Box.whole(CHECKING_SHAPE)))

    def f1(self, weights: Weights, threads: int) -> float:
        """F1 of matched centroids: calibrated norms, Voronoi-Otsu."""
        side = 48
        starts = [(z, y, x) for z in (0, 40) for y in (0, 40) for x in (0, 40)]
        windows = [self.volume[z : z + side, y : y + side, x : x + side] for z, y, x in starts]
        windows.sort(key=lambda w: float(np.median(w) - np.percentile(w, 99)))
        statistics = calibrate(weights, np.stack(windows[:4])[:, None])
        predictor = Predictor(weights, statistics=statistics, halo_voxels=HALO, threads=threads)
        probability = predictor.predict(np.pad(self.volume, HALO, mode="reflect"))
        labels = voronoi_otsu(probability, SIGMA, SIGMA)
        n = int(labels.max())
        found = np.array(ndimage.center_of_mass(labels > 0, labels, np.arange(1, n + 1))).reshape(n, 3)
        return match_centroids(found * self.size, self.true, MATCH_UM).f1


def about(arguments: argparse.Namespace, step: int, f1: list[float], seconds: float) -> dict[str, str]:
    recipe = {k: v for k, v in vars(arguments).items() if isinstance(v, int | float)}
    return {
        "name": "WNet3D compact",
        "channels": json.dumps(COMPACT_CHANNELS),
        "step": str(step),
        "seconds": f"{seconds:.0f}",
        "recipe": json.dumps(recipe, sort_keys=True),
        "real_volumes": json.dumps([path.name for path in arguments.real]),
        "check_f1": json.dumps([round(v, 4) for v in f1]),
        "licence": "MIT",
    }


def write(
    arguments: argparse.Namespace,
    encoder: Mapping[str, torch.Tensor],
    metadata: dict[str, str],
    windows: NDArray[np.float32],
) -> None:
    """Write the encoder with the norms' statistics on the reference windows."""
    weights = Weights(encoder, COMPACT_CHANNELS, 2, 1, {}, "", "to be calibrated")
    metadata[CALIBRATION] = calibrate(weights, windows, threads=arguments.threads).to_json()
    metadata[CALIBRATION_OF] = json.dumps(
        {
            "volumes": f"{len(arguments.real)} real, {len(CALIBRATING)} phantoms",
            "windows": f"{len(windows)} of {REFERENCE_SIDE}^3 voxels",
        }
    )
    save_weights(arguments.out, {f"encoder.{key}": value for key, value in encoder.items()}, metadata)


if __name__ == "__main__":
    main()
