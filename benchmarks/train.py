"""Training steps of ours against a plain loop that does what CellSeg3D's plugin does, in one run.

- plain: the published network and loss written straight down: crops in memory, each in its own range,
  float32, flips and quarter turns, the cut's Gaussian as one dense convolution, one Adam on the weighted sum
- ours: `Trainer` with the same recipe, crops read from a file; float32, bfloat16, and with the pairwise cut

All start from the same weights and take turns, step by step, so that what else the machine does slows them
alike. Times are medians, after one step to warm up: by the clock, and of the CPU, which counts the work alone
where the machine is shared. Memory is the peak of a process of its own, above what it has before its first
step.

    python benchmarks/train.py [--side 64] [--steps 5] [--full-side 64] [--full-steps 2] [--threads 2]
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from braincensus.training.crops import draw_crops, measure
from braincensus.training.recipe import Recipe
from braincensus.volume import open_volume
from braincensus_kernels.boxes import Box
from braincensus_kernels.models.training import Trainer
from braincensus_kernels.models.wnet3d import COMPACT_CHANNELS, FULL_CHANNELS, WNet3D
from braincensus_kernels.phantom import Phantom

Step = Callable[[], object]
WAYS = ("plain", "ours, float32", "ours, bfloat16", "ours, float32, pairwise cut")
NETWORKS = {"compact": COMPACT_CHANNELS, "full size": FULL_CHANNELS}


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    if arguments.memory_of is not None:
        network, way = arguments.memory_of
        print(memory(make(way, network, arguments.side, arguments), arguments.device))
        return
    print(f"torch {torch.__version__}, {arguments.threads} threads, {arguments.device}, ", end="")
    print(f"batch {arguments.batch}\n")
    print("| network | crop | how | s/step | ratio | CPU s/step | ratio | peak memory |")
    print("|---|---|---|---|---|---|---|---|")
    for network, side, steps in (
        ("compact", arguments.side, arguments.steps),
        ("full size", arguments.full_side, arguments.full_steps),
    ):
        if side and steps:
            compare(network, side, steps, arguments)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--side", type=int, default=64, help="of the crops, compact network")
    parser.add_argument("--steps", type=int, default=5, help="of each way that are timed; 0: leave it out")
    parser.add_argument("--full-side", type=int, default=64, help="of the crops, full-size network")
    parser.add_argument("--full-steps", type=int, default=2, help="0: leave it out")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--memory-of", nargs=2, metavar=("NETWORK", "WAY"), help="print its peak and stop")
    return parser.parse_args()


def compare(network: str, side: int, steps: int, arguments: argparse.Namespace) -> None:
    """Let all ways take turns."""
    chosen = WAYS[: 3 if network == "full size" else 4]  # each holds a network and its moments: 0.8 GB
    clocks: dict[str, list[float]] = {way: [] for way in chosen}
    works: dict[str, list[float]] = {way: [] for way in chosen}
    ways = {way: make(way, network, side, arguments) for way in chosen}
    for _ in range(steps + 1):
        for way, step in ways.items():
            clock, work = time.perf_counter(), time.process_time()
            step()
            if torch.device(arguments.device).type == "cuda":
                torch.cuda.synchronize(arguments.device)
            clocks[way].append(time.perf_counter() - clock)
            works[way].append(time.process_time() - work)
    del ways
    for way in chosen:
        (clock, first_clock), (work, first_work) = (
            (float(np.median(of[way][1:])), float(np.median(of[chosen[0]][1:]))) for of in (clocks, works)
        )
        peak = measured_apart(network, way, side, arguments)
        print(
            f"| {network} | {side}^3 | {way} | {clock:.2f} | {first_clock / clock:.2f} | {work:.2f} | "
            f"{first_work / work:.2f} | {peak:,.0f} MiB |",
            flush=True,
        )


def make(way: str, network: str, side: int, arguments: argparse.Namespace) -> Step:
    """Return a function that does one step."""
    shape = (max(96, side + 16),) * 3
    image = Phantom(shape=shape, cells_per_mm3=5000.0, tissue="full", seed=3).render(Box.whole(shape))
    torch.manual_seed(0)
    net = WNet3D(channels=NETWORKS[network])
    if way == "plain":
        return plain_loop(net, image, side, arguments)
    recipe = Recipe.published().changed(
        channels=NETWORKS[network],
        crop_voxels=side,
        batch=arguments.batch,
        steps=1000,
        ncuts="pairwise" if "pairwise" in way else "class-mean",
    )
    folder = tempfile.mkdtemp()
    np.save(Path(folder) / "volume.npy", image)
    source = measure(open_volume(Path(folder) / "volume.npy", voxel_size_um=5.0), side)
    return Trainer(
        net,
        draw_crops([source], side, "crop"),
        recipe.settings(1000),
        device=arguments.device,
        precision="bfloat16" if "bfloat16" in way else "float32",
    ).step


def plain_loop(network: WNet3D, image: NDArray[np.uint16], side: int, arguments: argparse.Namespace) -> Step:
    """Return one step as the plugin does it."""
    device, rng = arguments.device, np.random.default_rng(0)
    network.to(device).train()
    optimiser = torch.optim.Adam(network.parameters(), lr=2e-5, weight_decay=0.01)
    cut = PlainSoftNCuts().to(device)

    def crop() -> NDArray[np.float32]:
        start = [int(rng.integers(n - side + 1)) for n in image.shape]
        values = image[tuple(slice(a, a + side) for a in start)].astype(np.float32)
        values = (values - values.min()) / (values.max() - values.min()) * np.float32(100)
        for axis in range(3):
            if rng.random() < 0.5:
                values = np.flip(values, axis)
        return np.rot90(values, int(rng.integers(4)), (1, 2)).copy()

    def step() -> float:
        x = torch.from_numpy(np.stack([crop() for _ in range(arguments.batch)])[:, None]).to(device)
        optimiser.zero_grad()
        classes = network.encoder(x)
        rebuilt = network.decoder(classes)
        loss = 0.5 * cut(classes, x) + 0.005 * functional.mse_loss(rebuilt, x)
        loss.backward()
        optimiser.step()
        return loss.item()

    return step


class PlainSoftNCuts(nn.Module):
    """Class-mean form, a class at a time, the Gaussian of 5^3 voxels as it stands."""

    kernel: Tensor

    def __init__(self) -> None:
        super().__init__()
        offsets = torch.arange(-2.0, 3.0)
        z, y, x = torch.meshgrid(offsets, offsets, offsets, indexing="ij")
        self.register_buffer("kernel", torch.exp(-(z**2 + y**2 + x**2) / (2 * 4.0**2))[None, None])

    def forward(self, classes: Tensor, image: Tensor) -> Tensor:
        """Return the loss."""
        loss = torch.tensor(float(classes.shape[1]), device=image.device)
        for k in range(classes.shape[1]):
            p = classes[:, k : k + 1]
            mean = (image * p).mean((2, 3, 4), keepdim=True) / (p.mean((2, 3, 4), keepdim=True) + 1e-5)
            weight = torch.exp(-(((image - mean) ** 2) ** 2))
            assoc = (p * functional.conv3d(p * weight, self.kernel, padding=2)).sum((1, 2, 3, 4))
            total = (p * functional.conv3d(weight, self.kernel, padding=2)).sum((1, 2, 3, 4))
            loss = loss - (assoc / (total + 1e-6)).abs().mean()
        return loss


def memory(step: Step, device: str) -> float:
    """Return the peak of two steps, MiB."""
    if torch.device(device).type == "cuda":
        step(), step()
        return torch.cuda.max_memory_allocated(device) / 2**20
    before = psutil.Process().memory_info().rss
    step(), step()
    return (_peak() - before) / 2**20


def _peak() -> int:
    """Return this process's peak of resident memory, bytes; `getrusage` would give its parent's on Linux."""
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def measured_apart(network: str, way: str, side: int, arguments: argparse.Namespace) -> float:
    """Return the peak of a way in a process of its own, MiB."""
    options = ("--side", side, "--batch", arguments.batch, "--threads", arguments.threads)
    command = [sys.executable, __file__, *options, "--device", arguments.device, "--memory-of", network, way]
    done = subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True)
    return float(done.stdout)


if __name__ == "__main__":
    main()
