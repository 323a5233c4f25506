"""The segment stage's network work against the published way, with the same weights, in one run.

- published: MONAI `sliding_window_inference` as CellSeg3D's plugin calls it (64^3 windows, overlap 0.25,
  gaussian weights with sigma_scale 0.01, batch 1, float32), on the encoder as it is
- ours: `Predictor.predict_all` on patches (frozen norms, folded, cropped level by level), float32 and
  bfloat16; with `--direct` also float32 without the convolutions that save multiplications

Rates are what an endless volume would see, net of halos and overlaps. A published window then brings 48^3 new
voxels (2.37 voxels computed for each), a patch of ours its core. So a row of `--windows` windows, and some
patches, are enough to measure: no volume is too small for it, where whole ones flatter us (at 128^3 the
published windows overlap 3.4 times).

Given by the clock, and by the CPU time used, which counts the work alone where the machine is shared. The
machine's peak is measured in the same run, as a large product of matrices. "net": the share of it that the
published network's arithmetic takes for the new voxels alone (2.018 MFLOP each at full size), whatever is
executed. "executed": with what is computed of halos, less what is folded; as if all convolutions were
direct, so that it can pass 100 % where multiplications are saved.

The full-size network has random weights, as no trained ones are shipped. Of the shipped compact weights only
the full resolution acts, which our prediction exploits; a second compact network, random, uses every level.

    python benchmarks/segment.py [--core 128] [--halo 32] [--threads 2] [--only full]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from monai.inferers import sliding_window_inference
from numpy.typing import NDArray
from torch.utils.flop_counter import FlopCounterMode

from braincensus_kernels.boxes import Box
from braincensus_kernels.models import winograd
from braincensus_kernels.models.calibrate import calibrate
from braincensus_kernels.models.checkpoints import Weights, load_weights
from braincensus_kernels.models.fold import fold
from braincensus_kernels.models.predict import Predictor, _run, resolve_precision
from braincensus_kernels.models.wnet3d import COMPACT_CHANNELS, FULL_CHANNELS, UNet
from braincensus_kernels.phantom import Phantom

WINDOW, STRIDE = 64, 48


@dataclass(frozen=True)
class Measured:
    """Seconds by the clock and of CPU time."""

    wall: float
    cpu: float


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    peaks = {name: peak(name, arguments.device) for name in ("float32", "bfloat16")}
    print(f"torch {torch.__version__}, {arguments.threads} threads, {arguments.device}; ", end="")
    print(f"patches of {arguments.core} + 2 x {arguments.halo} voxels; precision auto is ", end="")
    print(resolve_precision("auto", arguments.device))
    for name, (clock, cpu) in peaks.items():
        print(
            f"peak {name}: {clock / 1e9:,.0f} GFLOP/s by the clock, {cpu / 1e9:,.0f} in a second of CPU time"
        )
    unit = "CPU s" if arguments.device == "cpu" else "s"
    print(
        f"\n| network | how | voxels/s | ratio | voxels/{unit} | ratio | net | executed | difference of p |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for name, weights in networks(arguments.only):
        compare(name, weights, peaks, arguments)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--windows", type=int, default=4, help="of the published way, at full size")
    parser.add_argument("--patches", type=int, default=1, help="of ours")
    parser.add_argument("--direct", action="store_true", help="float32 without fewer multiplications, too")
    parser.add_argument("--auto", action="store_true", help="no bfloat16 where auto is float32")
    parser.add_argument("--core", type=int, default=128)
    parser.add_argument("--halo", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", default="", help="networks whose name contains this")
    return parser.parse_args()


def networks(only: str) -> Iterator[tuple[str, Weights]]:
    if only in "compact":
        yield "compact", load_weights("compact")
    if only in "compact, every level":
        yield "compact, every level", random_weights(COMPACT_CHANNELS)
    if only in "full size":
        yield "full size", random_weights(FULL_CHANNELS)


def random_weights(channels: tuple[int, int, int, int]) -> Weights:
    torch.manual_seed(0)
    encoder = UNet(1, 2, channels=channels, dropout=0.0, softmax=True)
    return Weights(encoder.state_dict(), channels, 2, 1, {}, "", "random")


def peak(precision: str, device: str) -> tuple[float, float]:
    """FLOP per second of a large product of matrices, by the clock and by CPU time: the best of some."""
    dtype, n = getattr(torch, precision), 2048 if device == "cpu" else 16384
    a, b = torch.randn(n, n, device=device).to(dtype), torch.randn(n, n, device=device).to(dtype)
    taken = [measure(lambda: a @ b, device)[0] for _ in range(6)][1:]
    work = 2 * n**3
    return work / min(t.wall for t in taken), work / min(t.cpu if device == "cpu" else t.wall for t in taken)


def compare(
    name: str, weights: Weights, peaks: dict[str, tuple[float, float]], arguments: argparse.Namespace
) -> None:
    device, core, halo = arguments.device, arguments.core, arguments.halo
    volume = phantom_input(core + 2 * halo)
    statistics = calibrate(weights, volume[None, None, :WINDOW, :WINDOW, :WINDOW].copy(), device=device)
    encoder = weights.build_encoder().to(device)
    windows = arguments.windows * (1 if weights.channels == FULL_CHANNELS else 8)
    length = STRIDE * (windows - 1) + WINDOW
    row_of_windows = np.resize(volume[:WINDOW, :WINDOW], (WINDOW, WINDOW, length))

    def published(length: int) -> None:
        with torch.inference_mode():
            image = torch.from_numpy(row_of_windows[..., :length])[None, None].to(device)
            sliding_window_inference(
                image, (WINDOW,) * 3, 1, encoder, overlap=0.25, mode="gaussian", sigma_scale=0.01
            ).cpu()

    def ours(precision: str) -> tuple[Measured, list[NDArray[np.float32]]]:
        predictor = Predictor(
            weights,
            statistics=statistics,
            halo_voxels=halo,
            precision=precision,
            device=device,
            threads=arguments.threads,
        )
        first = volume if device != "cpu" else volume[(slice(0, 16 + 2 * halo),) * 3].copy()
        predictor.predict(first)  # compiles, captures, chooses
        cores = predictor.predict_all(volume for _ in range(arguments.patches))
        return measure(lambda: list(cores), device)

    described = weights.build_encoder().to("meta")
    net = flops(described.logits, WINDOW) / WINDOW**3
    folded = fold(weights.build_encoder(), statistics).to("meta", torch.float32)
    executed = flops(lambda x: _run(folded, x, halo, torch.float32), core + 2 * halo) / core**3
    reference: list[float] = []

    def row(how: str, taken: Measured, voxels: int, precision: str, executed: float, difference: str) -> None:
        rates = voxels / taken.wall, voxels / (taken.cpu if device == "cpu" else taken.wall)
        reference.extend(rates if not reference else ())
        wall, cpu = (f"{r:,.0f} | {r / base:.1f}" for r, base in zip(rates, reference, strict=True))
        top = peaks[precision][1]
        shares = f"{rates[1] * net / top:.0%} | {rates[1] * executed / top:.0%}"
        print(f"| {name} | {how} | {wall} | {cpu} | {shares} | {difference} |", flush=True)

    published(WINDOW)
    taken, _ = measure(lambda: published(length), device)
    row("published", taken, windows * STRIDE**3, "float32", net * (WINDOW / STRIDE) ** 3, "")
    voxels = arguments.patches * core**3
    if arguments.direct:
        with only_direct():
            taken, exact = ours("float32")
        row("ours, float32, direct", taken, voxels, "float32", executed, "")
    taken, found = ours("float32")
    exact = exact if arguments.direct else found
    row("ours, float32", taken, voxels, "float32", executed, f"{np.abs(found[0] - exact[0]).max():.1g}")
    if arguments.auto and resolve_precision("auto", device) == "float32":
        return
    taken, found = ours("bfloat16")
    row("ours, bfloat16", taken, voxels, "bfloat16", executed, f"{np.abs(found[0] - exact[0]).max():.1g}")


def phantom_input(side: int) -> NDArray[np.float32]:
    phantom = Phantom(shape=(side, side, side), cells_per_mm3=5000.0, tissue="full", seed=1)
    values = phantom.render(Box.whole(phantom.shape)).astype(np.float32)
    low, high = np.percentile(values, [1, 99.9])
    scaled: NDArray[np.float32] = (np.clip((values - low) / (high - low), 0, 1) * 100).astype(np.float32)
    return scaled


def flops(compute: Callable[[torch.Tensor], torch.Tensor], side: int) -> int:
    """Floating point operations of convolutions and products on a cube, without doing them."""
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        compute(torch.empty((1, 1, side, side, side), device="meta"))
    return int(counter.get_total_flops())


@contextmanager
def only_direct() -> Iterator[None]:
    """Make networks, meanwhile, without the convolutions that save multiplications."""
    pays = winograd.pays
    winograd.pays = lambda weight: False
    try:
        yield
    finally:
        winograd.pays = pays


T = TypeVar("T")


def measure(compute: Callable[[], T], device: str) -> tuple[Measured, T]:
    """Time it, with all that is under way on a GPU."""
    if device != "cpu":
        torch.cuda.synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    result = compute()
    if device != "cpu":
        torch.cuda.synchronize()
    return Measured(time.perf_counter() - wall, time.process_time() - cpu), result


if __name__ == "__main__":
    main()
