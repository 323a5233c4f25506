"""The segment stage's network work against the published way, with the same weights, in one run.

- published: MONAI `sliding_window_inference` as CellSeg3D's plugin calls it (64^3 windows, overlap 0.25,
  gaussian weights with sigma_scale 0.01, batch 1, float32), on the encoder as it is
- ours: `Predictor` patch by patch (frozen norms, folded, cropped level by level), float32 and bfloat16

Rates are in voxels of the volume, net of halos and overlaps: by the clock, and by the CPU time used, which
counts the work alone where the machine is shared. Choose sides that are multiples of the core. The
full-size network has random weights, as no trained ones are shipped. Of the shipped compact weights only the
full resolution acts, which our prediction exploits; a second compact network, random, uses every level.

    python benchmarks/segment.py [--side 256] [--full-side 128] [--core 128] [--halo 32] [--threads 2]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
from monai.inferers import sliding_window_inference
from numpy.typing import NDArray

from braincensus_kernels.boxes import Box
from braincensus_kernels.models.calibrate import calibrate
from braincensus_kernels.models.checkpoints import Weights, load_weights
from braincensus_kernels.models.predict import Predictor, resolve_precision
from braincensus_kernels.models.wnet3d import COMPACT_CHANNELS, FULL_CHANNELS, UNet
from braincensus_kernels.phantom import Phantom

Rates = tuple[float, float]


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    print(f"torch {torch.__version__}, {arguments.threads} threads, {arguments.device}; ", end="")
    print(f"patches of {arguments.core} + 2 x {arguments.halo} voxels\n")
    print("| network | volume | how | voxels/s | ratio | voxels/CPU s | ratio | max difference of p |")
    print("|---|---|---|---|---|---|---|---|")
    compare("compact", load_weights("compact"), arguments.side, arguments)
    compare("compact, every level", random_weights(COMPACT_CHANNELS), arguments.side, arguments)
    if arguments.full_side:
        compare("full size", random_weights(FULL_CHANNELS), arguments.full_side, arguments)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--side", type=int, default=256, help="of the volume for the compact network")
    parser.add_argument(
        "--full-side", type=int, default=128, help="and for the full-size one; 0: leave it out"
    )
    parser.add_argument("--core", type=int, default=128)
    parser.add_argument("--halo", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


def random_weights(channels: tuple[int, int, int, int]) -> Weights:
    torch.manual_seed(0)
    encoder = UNet(1, 2, channels=channels, dropout=0.0, softmax=True)
    return Weights(encoder.state_dict(), channels, 2, 1, {}, "", "random")


def compare(name: str, weights: Weights, side: int, arguments: argparse.Namespace) -> None:
    volume = phantom_input(side)
    windows = np.stack([volume[:64, :64, :64], volume[-64:, -64:, -64:]])[:, None]
    statistics = calibrate(weights, windows.copy(), device=arguments.device)
    encoder = weights.build_encoder().to(arguments.device)

    def published() -> NDArray[np.float32]:
        with torch.inference_mode():
            image = torch.from_numpy(volume)[None, None].to(arguments.device)
            out = sliding_window_inference(
                image, (64, 64, 64), 1, encoder, overlap=0.25, mode="gaussian", sigma_scale=0.01
            )
        found: NDArray[np.float32] = out[0, statistics.foreground_class].cpu().numpy()
        return found

    def ours(precision: str) -> Callable[[], NDArray[np.float32]]:
        predictor = Predictor(
            weights,
            statistics=statistics,
            halo_voxels=arguments.halo,
            precision=precision,
            device=arguments.device,
            threads=arguments.threads,
        )
        return lambda: whole(predictor, volume, arguments.core)

    def row(how: str, rates: Rates, difference: str = "") -> None:
        wall, cpu = rates
        ratios = f"{wall:,.0f} | {wall / reference[0]:.1f} | {cpu:,.0f} | {cpu / reference[1]:.1f}"
        print(f"| {name} | {side}^3 | {how} | {ratios} | {difference} |", flush=True)

    reference, _ = measure(published, volume)
    row("published", reference)
    rates, exact = measure(ours("float32"), volume)
    row("ours, float32", rates)
    fast = resolve_precision("auto", arguments.device)
    if fast != "float32":
        rates, probability = measure(ours(fast), volume)
        row(f"ours, {fast}", rates, f"{np.abs(probability - exact).max():.2g}")


def phantom_input(side: int) -> NDArray[np.float32]:
    phantom = Phantom(shape=(side, side, side), cells_per_mm3=5000.0, tissue="full", seed=1)
    values = phantom.render(Box.whole(phantom.shape)).astype(np.float32)
    low, high = np.percentile(values, [1, 99.9])
    scaled: NDArray[np.float32] = (np.clip((values - low) / (high - low), 0, 1) * 100).astype(np.float32)
    return scaled


def whole(predictor: Predictor, volume: NDArray[np.float32], core: int) -> NDArray[np.float32]:
    halo = predictor.halo_voxels
    box = Box.whole((volume.shape[0], volume.shape[1], volume.shape[2]))
    padding = [(halo, halo + -n % core) for n in volume.shape]
    padded = np.pad(volume, padding, mode="reflect")
    result = np.empty_like(volume)
    for tile in box.tiles((min(core, box.shape[0]),) * 3):
        patch = Box(tile.start, tuple(a + min(core, box.shape[0]) for a in tile.start)).shift((halo,) * 3)  # type: ignore[arg-type]
        predicted = predictor.predict(padded[patch.dilate(halo).slices])
        result[tile.slices] = predicted[tuple(slice(0, n) for n in tile.shape)]
    return result


def measure(
    compute: Callable[[], NDArray[np.float32]], volume: NDArray[np.float32]
) -> tuple[Rates, NDArray[np.float32]]:
    """Voxels per second, by the clock and by CPU time, of one pass over the whole volume."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = compute()
    return (volume.size / (time.perf_counter() - wall), volume.size / (time.process_time() - cpu)), result


if __name__ == "__main__":
    main()
