"""Does a voxel's probability depend on where patches and windows lie? Three measurements, as markdown.

1. **Halo.** With calibrated norms, the probability of patches of several sizes and origins (on the lattice
   of 8) and of every halo, against one large patch with a halo of 48: largest difference, and voxels whose
   foreground (0.5) flips. In float32 and bfloat16, each against its own large patch.
2. **Moves.** How far foreground and cells change when the grid of patches moves: with the norms of each
   window (`norm="window"`: windows of 64^3 that contribute their middle 48^3), and with calibrated ones
   (cores of 64^3, halo 32).
3. **Empty space.** The volume in one stack with 96 planes of tissue without cells and 96 of camera
   background: cells found in each, by the ways that norms and ranges can be taken.

Volumes: the given one, mirrored at its border, and a phantom of the same size. Networks: the shipped compact
one, and a compact and a full-size one trained here, as the shipped one is (`train_compact.py`) but for fewer
steps and **without weight decay**, so that every level stays in use. Random weights are smooth and tell
little: one row is there to show it. `--save FOLDER` keeps what was trained, and finds it there next time.

    python benchmarks/independence.py --real c5image.tif --save /tmp/trained [--parts halo moves empty]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path

import numpy as np
import tifffile
import torch
from monai.inferers import sliding_window_inference
from numpy.typing import NDArray

from braincensus_kernels import intensity, voronoi_otsu
from braincensus_kernels.boxes import Box, Triple
from braincensus_kernels.metrics import f1_of_labels
from braincensus_kernels.models.calibrate import NormStatistics, calibrate
from braincensus_kernels.models.checkpoints import Weights, load_weights, save_weights
from braincensus_kernels.models.predict import EXACT_HALO_VOXELS, LATTICE, Norm, Predictor
from braincensus_kernels.models.training import IntensityVariation, train
from braincensus_kernels.models.wnet3d import COMPACT_CHANNELS, FULL_CHANNELS, UNet, WNet3D
from braincensus_kernels.phantom import Phantom

Volume = NDArray[np.float32]
VOXEL_SIZE_UM = (5.0, 5.26, 5.26)
HALOS = (8, 16, 24, 32, 40, 48)
PRECISIONS = ("float32", "bfloat16")
SIGMA = 0.65
SLAB = 96
WINDOW = 64
CALIBRATION_WINDOWS = 4


@dataclass(frozen=True)
class Network:
    """Weights, and how much of a volume is affordable with them."""

    name: str
    weights: Weights
    region: Triple
    """What the large patch covers: the whole volume, or the part of it with most bright voxels."""
    sizes: tuple[int, ...]
    origins: int
    """Patches of each size, the one at the region's corner included."""
    volumes: int = 2
    """How many of the volumes."""


def main() -> None:
    arguments = parse()
    torch.set_num_threads(1)
    volumes = {"phantom": phantom()}
    if arguments.real:
        volumes = {"real": tifffile.imread(arguments.real).astype(np.float32), **volumes}
    chosen = list(networks(arguments, [to_input(v) for v in volumes.values()]))
    started = time.perf_counter()
    if "halo" in arguments.parts:
        halo_table(chosen, volumes)
    compact = [n for n in chosen if n.weights.channels == COMPACT_CHANNELS and "random" not in n.name]
    if "moves" in arguments.parts:
        move_table(chosen if arguments.move_full_size else compact, volumes)
    if "empty" in arguments.parts:
        empty_table(compact, next(iter(volumes.values())))
    print(f"\n{time.perf_counter() - started:.0f} s, torch {torch.__version__}, 1 thread")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--real", type=Path, help="a TIFF volume that fits in memory")
    parser.add_argument("--save", type=Path, help="folder of the networks trained here")
    parser.add_argument("--parts", nargs="*", default=["halo", "moves", "empty"])
    parser.add_argument("--weights", nargs="*", default=[], help="files of more networks to measure")
    parser.add_argument("--compact-steps", type=int, default=120)
    parser.add_argument("--full-steps", type=int, default=30, help="0: without the full-size network")
    parser.add_argument("--only", default="", help="networks whose name contains this")
    parser.add_argument("--move-full-size", action="store_true", help="minutes more")
    return parser.parse_args()


# --- volumes -----------------------------------------------------------------------------------------


def phantom() -> NDArray[np.float32]:
    made = Phantom(shape=(124, 86, 94), cells_per_mm3=3000.0, seed=5)
    return made.render(Box.whole(made.shape)).astype(np.float32)


def to_input(stored: NDArray[np.float32]) -> Volume:
    """Map a volume to [0, 100] by the range of its tissue; without the local background of a run."""
    extrema = intensity.finite_extrema(stored)
    q = intensity.scale_for(stored.dtype, extrema.minimum, extrema.maximum).quantise(stored)
    joint = intensity.joint_histogram(q, intensity.tile_statistics(q))
    low, high = intensity.tissue_range(
        joint, intensity.find_tissue(joint), low_percentile=1.0, high_percentile=99.9
    )
    scaled = (np.clip(q.astype(np.float32), low, high) - np.float32(low)) * np.float32(100 / (high - low))
    return scaled.astype(np.float32)


def calibration_windows(volume: Volume) -> Iterator[Volume]:
    """All windows of 64^3 on a lattice of 16, those first in which most stands out of the tissue."""
    starts = product(*(range(0, max(n - WINDOW, 0) + 1, 16) for n in volume.shape))
    windows = [volume[tuple(slice(a, a + WINDOW) for a in start)] for start in starts]
    yield from sorted(windows, key=lambda w: float(np.median(w) - np.percentile(w, 99)))


def calibrated(weights: Weights, windows: Iterable[Volume]) -> NormStatistics:
    return calibrate(weights, np.stack(list(windows)[:CALIBRATION_WINDOWS])[:, None])


class Mirrored:
    """A volume without end: mirrored at its borders, as a run does."""

    def __init__(self, volume: Volume) -> None:
        self.shape: Triple = (volume.shape[0], volume.shape[1], volume.shape[2])
        self._margin = 2 * WINDOW
        self._padded = np.pad(
            volume, [(self._margin, self._margin + -n % 128) for n in volume.shape], "reflect"
        )

    def read(self, box: Box) -> Volume:
        """Return the voxels of a box, which may leave the volume."""
        return np.ascontiguousarray(self._padded[box.shift((self._margin,) * 3).slices])


# --- networks ----------------------------------------------------------------------------------------


def networks(arguments: argparse.Namespace, volumes: list[Volume]) -> Iterator[Network]:
    whole: Triple = (128, 88, 96)
    compact = (16, 32, 64)
    if arguments.only in "compact, shipped":
        yield Network("compact, shipped", load_weights("compact"), whole, compact, 3)
    for path in arguments.weights:
        more = load_weights(path)
        small = more.channels[0] <= COMPACT_CHANNELS[0]
        yield Network(Path(path).stem, more, *((whole, compact, 3) if small else ((32, 32, 32), (16,), 2, 1)))
    name = f"compact, {arguments.compact_steps} steps without decay"
    if arguments.only in name:
        trained = trained_briefly(
            COMPACT_CHANNELS, arguments.compact_steps, 32, 1, 2e-3, volumes, arguments.save
        )
        yield Network(name, trained, whole, compact, 3)
    for name, channels in (("compact, random", COMPACT_CHANNELS), ("full size, random", FULL_CHANNELS)):
        if arguments.only in name:
            torch.manual_seed(0)
            encoder = UNet(1, 2, channels=channels, dropout=0.0, softmax=True)
            random = Weights(encoder.state_dict(), channels, 2, 1, {}, "", "random")
            yield Network(name, random, (32, 32, 32), (16,), 2, 1)
    name = f"full size, {arguments.full_steps} steps without decay"
    if arguments.full_steps and arguments.only in name:
        trained = trained_briefly(FULL_CHANNELS, arguments.full_steps, 24, 1, 1e-3, volumes, arguments.save)
        yield Network(name, trained, (32, 32, 32), (16,), 2, 1)


def trained_briefly(
    channels: tuple[int, int, int, int],
    steps: int,
    side: int,
    batch: int,
    learning_rate: float,
    volumes: list[Volume],
    folder: Path | None,
) -> Weights:
    """Train as `train_compact.py` does, with no weight decay; take it from `folder` if it is there."""
    kept = folder / f"wnet3d-{channels[0]}-{steps}.safetensors" if folder else None
    if kept and kept.is_file():
        return load_weights(kept)
    dense = [
        Phantom(shape=(96, 96, 96), cells_per_mm3=d, seed=int(d), tissue="full") for d in (700.0, 8000.0)
    ]
    volumes = [*volumes, *(to_input(p.render(Box.whole(p.shape)).astype(np.float32)) for p in dense)]

    def draw(rng: np.random.Generator) -> Volume:
        for _ in range(50):
            volume = volumes[int(rng.integers(len(volumes)))]
            start = [int(rng.integers(n - side + 1)) for n in volume.shape]
            crop = volume[tuple(slice(a, a + side) for a in start)]
            if (crop > np.median(crop) + 15).mean() >= 0.001:
                break
        return crop

    torch.manual_seed(0)
    network = WNet3D(channels=channels, dropout=0.1)
    train(
        network,
        draw,
        steps=steps,
        batch=batch,
        learning_rate=learning_rate,
        weight_decay=0.0,
        seed=0,
        reconstruction_weight=0.005,
        intensity_sigma=50.0,
        variation=IntensityVariation(gain=0.25, gamma=0.15, offset=3.0, noise=2.0),
        precision="bfloat16",
    )
    if kept:
        save_weights(kept, {f"encoder.{k}": v for k, v in network.encoder.state_dict().items()}, {})
        return load_weights(kept)
    return Weights(network.encoder.state_dict(), channels, 2, 1, {}, "", "trained briefly")


# --- 1: halo -----------------------------------------------------------------------------------------


def halo_table(chosen: list[Network], volumes: dict[str, NDArray[np.float32]]) -> None:
    print("\nLargest difference of p (voxels flipped at 0.5), against one patch with a halo of 48:\n")
    header = [
        "network",
        "reach",
        "volume",
        "foreground",
        "arithmetic",
        "voxels",
        *(f"halo {h}" for h in HALOS),
    ]
    print("| " + " | ".join(header) + " |\n" + "|---" * len(header) + "|", flush=True)
    for network in chosen:
        for name, stored in islice(volumes.items(), network.volumes):
            values = to_input(stored)
            statistics = calibrated(network.weights, calibration_windows(values))
            exact: dict[str, Volume] = {}
            for precision in PRECISIONS:
                row, exact[precision] = halo_row(network, Mirrored(values), statistics, precision)
                print(f"| {network.name} | {row[0]} | {name} | {' | '.join(row[1:])} |", flush=True)
            apart = np.abs(exact["bfloat16"] - exact["float32"])
            flipped = (exact["bfloat16"] >= 0.5) != (exact["float32"] >= 0.5)
            print(
                f"| | | {name} | | bfloat16 to float32 | {apart.size:,} |"
                + " |" * 5
                + f" {apart.max():.1e} ({flipped.sum():,}) |",
                flush=True,
            )


def halo_row(
    network: Network, volume: Mirrored, statistics: NormStatistics, precision: str
) -> tuple[list[str], Volume]:
    def predictor(halo: int) -> Predictor:
        return Predictor(
            network.weights, statistics=statistics, halo_voxels=halo, precision=precision, threads=1
        )

    exact_predictor = predictor(EXACT_HALO_VOXELS)
    region = brightest(volume, network.region)
    exact = exact_predictor.predict(volume.read(region.dilate(EXACT_HALO_VOXELS)))
    row = [str(exact_predictor.reach_voxels), f"{100 * (exact >= 0.5).mean():.1f} %", precision]
    for halo in HALOS:
        ready, worst, flipped, compared = predictor(halo), 0.0, 0, 0
        for patch in patches(region, network):
            found = ready.predict(volume.read(patch.dilate(halo)))
            wanted = exact[patch.slices_in(region)]
            worst = max(worst, float(np.abs(found - wanted).max()))
            flipped += int(((found >= 0.5) != (wanted >= 0.5)).sum())
            compared += patch.size
        row += [f"{compared:,}"] * (halo == HALOS[0]) + [f"{worst:.1e} ({flipped:,})"]
    return row, exact


def patches(region: Box, network: Network) -> Iterator[Box]:
    """Patches of every size, the first of each at the region's corner, others anywhere on the lattice."""
    rng = np.random.default_rng(0)
    for size in network.sizes:
        for number in range(network.origins):
            last = [(n - size) // LATTICE for n in region.shape]
            z, y, x = (0 if number == 0 else LATTICE * int(rng.integers(n + 1)) for n in last)
            yield Box((z, y, x), (z + size, y + size, x + size)).shift(region.start)


def brightest(volume: Mirrored, shape: Triple) -> Box:
    """Find the box of this shape, on the lattice, with most voxels above half of the range."""
    starts = [range(0, max(n - side, 0) + 1, LATTICE) for n, side in zip(volume.shape, shape, strict=True)]
    boxes = [Box.whole(shape).shift(start) for start in product(*starts)]
    return max(boxes, key=lambda box: int((volume.read(box) > 50).sum()))


# --- 2: moves ----------------------------------------------------------------------------------------


def move_table(chosen: list[Network], volumes: dict[str, NDArray[np.float32]]) -> None:
    print(
        "\nThe grid moved along all axes; foreground at 0.5, cells by Voronoi-Otsu with Otsu's threshold:\n"
    )
    header = ["network", "volume", "norms", "grid moved by", "Dice of foreground", "largest difference of p"]
    header += ["cells", "F1 of cells"]
    print("| " + " | ".join(header) + " |\n" + "|---" * len(header) + "|", flush=True)
    for (name, stored), network in product(volumes.items(), chosen):
        values = to_input(stored)
        statistics = calibrated(network.weights, calibration_windows(values))
        norms: tuple[tuple[Norm, int, int, tuple[int, ...]], ...] = (
            ("window", 48, 8, (12, 20, 36)),
            ("calibrated", 64, 32, (8, 24, 12, 20, 36)),
        )
        for norm, core, halo, moves in norms:
            predictor = Predictor(
                network.weights,
                norm=norm,
                statistics=statistics,
                halo_voxels=halo,
                precision="float32",
                threads=1,
            )
            still = on_grid(predictor, Mirrored(values), core, 0)
            cells = voronoi_otsu(still, SIGMA, SIGMA)
            print(f"| {network.name} | {name} | {norm} | 0 | | | {cells.max():,} | |", flush=True)
            for move in moves:
                moved = on_grid(predictor, Mirrored(values), core, move)
                labels = voronoi_otsu(moved, SIGMA, SIGMA)
                figures = f"{dice(moved >= 0.5, still >= 0.5):.4f} | {np.abs(moved - still).max():.1e} | "
                figures += f"{labels.max():,} | {f1_of_labels(labels, cells):.3f}"
                print(f"| {network.name} | {name} | {norm} | {move} | {figures} |", flush=True)


def on_grid(predictor: Predictor, volume: Mirrored, core: int, move: int) -> Volume:
    """Probability of the whole volume, by cores on a grid that starts `move` voxels before it."""
    result = np.empty(volume.shape, np.float32)
    starts = [range(-(move % core), n, core) for n in volume.shape]
    for z, y, x in product(*starts):
        patch = Box((z, y, x), (z + core, y + core, x + core))
        predicted = predictor.predict(volume.read(patch.dilate(predictor.halo_voxels)))
        inside = patch.clip(volume.shape)
        result[inside.slices] = predicted[inside.slices_in(patch)]
    return result


def dice(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> float:
    return 2 * int((a & b).sum()) / max(int(a.sum()) + int(b.sum()), 1)


# --- 3: empty space ----------------------------------------------------------------------------------


def empty_table(chosen: list[Network], stored: NDArray[np.float32]) -> None:
    scene = beside_empty_space(stored)
    print(f"\nCells found in {' x '.join(map(str, scene.shape))} voxels, by planes:\n")
    header = ["network", "range", "norms", "volume", "tissue without cells", "camera background"]
    print("| " + " | ".join(header) + " |\n" + "|---" * len(header) + "|", flush=True)
    ends = (stored.shape[0], stored.shape[0] + SLAB)
    for network in chosen:
        for (span, norm), probability in ways(network.weights, scene):
            labels = voronoi_otsu(probability(), SIGMA, SIGMA)
            print(f"| {network.name} | {span} | {norm} | {counts(labels, ends)} |", flush=True)
    for name, labels in runs(chosen, scene):
        print(f"| {name} | {counts(labels, ends)} |", flush=True)


def beside_empty_space(stored: NDArray[np.float32]) -> NDArray[np.float32]:
    """Planes of the volume, of tissue without cells as bright as its median, of darkness."""
    shape: Triple = (SLAB, stored.shape[1], stored.shape[2])
    tissue = Phantom(
        shape=shape,
        n_cells=0,
        seed=9,
        tissue="full",
        tissue_level=float(np.median(stored)),
        falloff=0.0,
        shading=0.0,
        artefacts_per_mm3=0.0,
    ).render(Box.whole(shape))
    camera = np.random.default_rng(0).normal(110, 8, shape).round()
    return np.concatenate([stored, tissue, camera]).astype(np.float32)


def ways(
    weights: Weights, scene: NDArray[np.float32]
) -> Iterator[tuple[tuple[str, str], Callable[[], Volume]]]:
    """Range and norms as they can be taken; the foreground class is the same for all."""
    values = to_input(scene)
    tissue = calibrated(weights, calibration_windows(values))
    spread = list(calibration_windows(values))
    anywhere = calibrated(weights, spread[:: max(len(spread) // CALIBRATION_WINDOWS, 1)])

    def ours(norm: Norm, statistics: NormStatistics, core: int, halo: int) -> Callable[[], Volume]:
        predictor = Predictor(
            weights, norm=norm, statistics=statistics, halo_voxels=halo, precision="float32", threads=1
        )
        return lambda: on_grid(predictor, Mirrored(values), core, 0)

    yield (
        ("each window's extrema", "each window's (the original)"),
        lambda: rescaled_windows(weights, scene, tissue.foreground_class),
    )
    yield ("one for the volume", "each window's"), ours("window", tissue, 48, 8)
    yield ("one for the volume", "calibrated on windows from anywhere"), ours("calibrated", anywhere, 64, 32)
    yield ("one for the volume", "calibrated on tissue with cells"), ours("calibrated", tissue, 64, 32)


def rescaled_windows(weights: Weights, scene: NDArray[np.float32], foreground: int) -> Volume:
    """Do to each 64^3 window what the original's plugin does: extrema to [0, 100], network, rescale again."""
    encoder = weights.build_encoder()

    def unit(x: torch.Tensor) -> torch.Tensor:
        return (x - x.min()) / (x.max() - x.min()).clamp(min=1e-6)

    def one(x: torch.Tensor) -> torch.Tensor:
        return unit(encoder.logits(100 * unit(x))[:, foreground : foreground + 1])

    with torch.inference_mode():
        image = torch.from_numpy(scene)[None, None]
        found = sliding_window_inference(
            image, (WINDOW,) * 3, 1, one, overlap=0.25, mode="gaussian", sigma_scale=0.01
        )
    result: Volume = found[0, 0].numpy()
    return result


def runs(chosen: list[Network], scene: NDArray[np.float32]) -> Iterator[tuple[str, NDArray[np.integer]]]:
    """Run the whole pipeline: local background, range and threshold of tissue, its own choice of windows."""
    from braincensus import RunConfig, run
    from braincensus.cluster import connect, resources_for

    compute = RunConfig().merged({"compute": {"workers": 1, "threads_per_worker": 1, "dashboard_port": 0}})
    with (
        tempfile.TemporaryDirectory() as folder,
        connect(compute.compute, resources_for(compute.compute)) as (client, _),
    ):
        methods: list[tuple[str, dict[str, object]]] = []
        for network in chosen:
            file = Path(folder) / f"{len(methods)}.safetensors"
            state = {f"encoder.{k}": v for k, v in network.weights.encoder.items()}
            save_weights(file, state, {})
            given = {"model": "wnet3d", "weights": str(file)}
            methods += [
                (f"{network.name} | whole pipeline | {norm}", {**given, "norm": norm})
                for norm in ("window", "calibrated")
            ]
        methods.append(("intensity | whole pipeline | none", {"model": "intensity"}))
        for name, foreground in methods:
            config = compute.merged({"foreground": foreground, "input": {"voxel_size_um": VOXEL_SIZE_UM}})
            result = run(scene, Path(folder) / "out.zarr", config=config, client=client, fresh=True)
            yield name, np.asarray(result.labels[:])


def counts(labels: NDArray[np.integer], ends: tuple[int, int]) -> str:
    """Cells by the plane in the middle of each one's extent."""
    present, first = np.unique(labels, return_index=True)
    backwards = labels[::-1]
    _, last = np.unique(backwards, return_index=True)
    plane = labels.shape[1] * labels.shape[2]
    middle = (first // plane + labels.shape[0] - 1 - last // plane) / 2
    part = np.digitize(middle[present > 0], ends)
    return " | ".join(f"{int((part == k).sum()):,}" for k in range(3))


if __name__ == "__main__":
    main()
