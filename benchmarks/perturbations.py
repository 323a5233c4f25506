"""How far things that every whole brain has move the result: padding, hot voxels, artefacts, shading.

Each perturbation is applied to one volume; the cells found are compared (label overlap, IoU of 0.5
or more, one to one) with those of the unperturbed volume, for three ways to find them:

- plain Otsu: Voronoi-Otsu on raw intensity with Otsu of the whole volume, as the original
- intensity: our `intensity` model (local background, range and Otsu over tissue)
- wnet3d: our default (network with calibrated norms, Otsu of its probability over tissue)

    python benchmarks/perturbations.py [VOLUME.tif --voxel-size 5,5.26,5.26]   # default: a phantom
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from braincensus import RunConfig, open_volume, run
from braincensus.cluster import connect, resources_for
from braincensus_kernels import voronoi_otsu
from braincensus_kernels.boxes import Box
from braincensus_kernels.metrics import f1_of_labels
from braincensus_kernels.phantom import Phantom

SIGMA = 0.65


def camera(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Darkness as a camera records it."""
    return np.random.default_rng(seed).normal(110, 8, shape).round()


def padded(image: np.ndarray, share: float, fill: Callable[[tuple[int, ...]], np.ndarray]) -> np.ndarray:
    """Append planes after the volume until they are this share of it."""
    planes = max(1, round(image.shape[0] * share / (1 - share)))
    return np.concatenate([image, fill((planes, *image.shape[1:])).astype(image.dtype)])


def hot(image: np.ndarray) -> np.ndarray:
    """Set one voxel to the camera's maximum."""
    changed = image.copy()
    changed[tuple(n // 3 for n in image.shape)] = 65535
    return changed


def artefact(image: np.ndarray) -> np.ndarray:
    """Put a cube of 6 voxels at 20000 counts."""
    changed = image.copy()
    z, y, x = (n // 2 for n in image.shape)
    changed[z : z + 6, y : y + 6, x : x + 6] = 20000
    return changed


def shaded(image: np.ndarray) -> np.ndarray:
    """Lose 30 % of the light along z."""
    factor = np.linspace(1.0, 0.7, image.shape[0])[:, None, None]
    return (image * factor).astype(image.dtype)


PERTURBATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "none": lambda image: image,
    "2 % zero padding": lambda image: padded(image, 0.02, np.zeros),
    "5 % zero padding": lambda image: padded(image, 0.05, np.zeros),
    "30 % zero padding": lambda image: padded(image, 0.30, np.zeros),
    "20 % camera background": lambda image: padded(image, 0.20, camera),
    "60 % camera background": lambda image: padded(image, 0.60, camera),
    "one voxel at 65535": hot,
    "a 6^3 artefact at 20000": artefact,
    "30 % shading along z": shaded,
}


def table(
    image: np.ndarray, voxel_size_um: tuple[float, float, float], folder: Path
) -> list[dict[str, object]]:
    """Run every method on every perturbation; one dict per row."""
    configs = {
        "intensity": RunConfig().merged({"foreground": {"model": "intensity"}}),
        "wnet3d": RunConfig(),
    }
    reference: dict[str, np.ndarray] = {}
    rows: list[dict[str, object]] = []
    compute = RunConfig().merged({"compute": {"workers": 1, "dashboard_port": 0}}).compute
    with connect(compute, resources_for(compute)) as (client, _):
        for name, perturb in PERTURBATIONS.items():
            changed = perturb(image)
            row: dict[str, object] = {"perturbation": name}
            for method in ("plain Otsu", *configs):
                if method == "plain Otsu":
                    labels = voronoi_otsu(changed.astype(np.float32), SIGMA, SIGMA)
                else:
                    result = run(
                        changed,
                        folder / "out.zarr",
                        config=configs[method].merged({"input": {"voxel_size_um": voxel_size_um}}),
                        client=client,
                        fresh=True,
                    )
                    labels = np.asarray(result.labels[:])
                same = labels[: image.shape[0]]
                reference.setdefault(method, same)
                row[f"{method}: cells"] = int(labels.max())
                row[f"{method}: F1"] = f1_of_labels(same, reference[method], iou=0.5)
            rows.append(row)
    return rows


def main() -> None:
    """Print the table as markdown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "volume", nargs="?", help="any volume that fits in memory; default: a phantom of 128^3"
    )
    parser.add_argument("--voxel-size", default="5,5.26,5.26", help="z,y,x in um")
    args = parser.parse_args()
    z, y, x = (float(part) for part in args.voxel_size.split(","))
    if args.volume is None:
        image = Phantom(shape=(128, 128, 128), n_cells=600, seed=3, tissue="full").render(
            Box.whole((128,) * 3)
        )
    else:
        volume = open_volume(args.volume, voxel_size_um=(z, y, x))
        image = volume.read(volume.box)
    with tempfile.TemporaryDirectory() as folder:
        rows = table(image, (z, y, x), Path(folder))
    print("| " + " | ".join(rows[0]) + " |")
    print("|" + "---|" * len(rows[0]))
    for row in rows:
        cells = [
            f"{v:.3f}" if isinstance(v, float) else f"{v:,}" if isinstance(v, int) else str(v)
            for v in row.values()
        ]
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
