"""Self-supervised training of WNet3D on volumes: beside the flow, before a run that uses the weights.

    volumes -> range of the tissue -> crops, read where they lie -> kernels' training -> weights, model card,
                                                                                         losses, their picture

No labels are needed. Volumes are never read whole: the range is measured on blocks spread over the
volume, and each crop is one small read.
"""

from __future__ import annotations

import csv
import io
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from braincensus.errors import BraincensusError, ConfigError, InputError, OutputError, explain
from braincensus.store.files import write_whole, writing
from braincensus.volume import Volume, open_volume
from braincensus_kernels.boxes import Box, Triple
from braincensus_kernels.intensity import (
    IntensityScale,
    add_histograms,
    find_tissue,
    joint_histogram,
    scale_for,
    tile_statistics,
    tissue_range,
)
from braincensus_kernels.models.checkpoints import save_weights
from braincensus_kernels.models.predict import LATTICE, resolve_precision
from braincensus_kernels.models.training import (
    INPUT_TOP,
    IntensityVariation,
    TrainingError,
    TrainingStep,
    train,
)
from braincensus_kernels.models.wnet3d import COMPACT_CHANNELS, WNet3D

_BLOCK = 128
_BLOCKS_FOR_RANGE = 64
_TRIES = 50
_TISSUE_SHARE = 0.6
_CONTRAST = 15.0  # of the input's 100: what stands out of tissue by this much may be a cell
_CONTRAST_SHARE = 0.001
_VARIATION = IntensityVariation(gain=0.25, gamma=0.15, offset=3.0, noise=2.0)


@dataclass(frozen=True)
class TrainingResult:
    """What a training wrote."""

    weights: Path
    card: Path
    losses: Path
    picture: Path
    sha256: str
    steps: int
    seconds: float
    final_loss: float
    """Mean over the last tenth of the steps."""

    def __str__(self) -> str:
        """Summarise in one line."""
        return (
            f"{self.steps} steps in {self.seconds / 60:.1f} min, loss {self.final_loss:.4g} at the end; "
            f"about them: {self.card.name}, {self.losses.name}, {self.picture.name}"
        )


@dataclass(frozen=True)
class _Source:
    volume: Volume
    scale: IntensityScale
    low: float
    high: float

    def read(self, box: Box) -> NDArray[np.float32]:
        """Return a box as float32 in [0, 100]."""
        values = self.volume.read(box)
        _refuse_nonfinite(values, self.volume, box)
        q = self.scale.quantise(values).astype(np.float32)
        scaled = (np.clip(q, self.low, self.high) - np.float32(self.low)) * np.float32(
            INPUT_TOP / (self.high - self.low)
        )
        return scaled.astype(np.float32)


def train_wnet3d(
    inputs: Sequence[Volume | str | Path],
    out: str | Path,
    *,
    channels: Sequence[int] = COMPACT_CHANNELS,
    steps: int = 600,
    crop_voxels: int = 48,
    batch: int = 2,
    learning_rate: float = 2e-3,
    seed: int = 0,
    weight_decay: float = 0.01,
    dropout: float = 0.1,
    ncuts_weight: float = 0.5,
    reconstruction_weight: float = 0.005,
    intensity_sigma: float = 50.0,
    variation: IntensityVariation | None = _VARIATION,
    device: str = "cpu",
    precision: str = "auto",
    threads: int | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> TrainingResult:
    """Train WNet3D without labels, and write its weights.

    Parameters
    ----------
    inputs
        Volumes, or paths that hold their voxel size. Each is mapped to [0, 100] by the 1st to 99.9th
        percentile of its tissue, as a run does it; volumes larger than 64 blocks of 128^3 are measured on
        64 blocks spread over them.
    out
        Where the weights go, ``.safetensors``: encoder and decoder. Beside them, under the same name: the
        model card (``.md``), the loss of every step (``.csv``) and its curve (``.png``).
    channels
        Features of the four levels; the published size is (64, 128, 256, 512).
    steps, batch
        Optimiser steps, and crops in each.
    crop_voxels
        Side of a crop, a multiple of 8. Crops that are mostly not tissue, or that nothing stands out of, are
        drawn again.
    learning_rate, weight_decay, dropout, ncuts_weight, reconstruction_weight, variation
        See `braincensus_kernels.models.training.train`.
    intensity_sigma
        Of the soft normalised cut. The published 1 leaves it free where between noise and the brightest
        cells the cut lies; 50 makes it cheapest above the noise (weights halve 6.5 from the class's mean).
    seed
        The same seed on the same machine with the same number of threads gives the same weights.
    precision
        ``auto``, ``float32`` or ``bfloat16``.
    threads
        CPU threads; None for torch's current setting.
    overwrite
        Whether existing files may be replaced.
    progress
        Called as ``progress(done, steps)``.

    Raises
    ------
    ConfigError
        On an option that cannot be used, or a volume smaller than a crop.
    InputError
        On a volume that cannot be read, or holds NaN or one value only.
    OutputError
        If the output exists, or cannot be written.
    BraincensusError
        If training does not get anywhere; nothing is written then.
    """
    out = Path(out)
    _check(inputs, out, channels, crop_voxels, overwrite)
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        sources = [_source(_opened(item), crop_voxels) for item in inputs]
        torch.manual_seed(seed)
        network = WNet3D(channels=tuple(channels), dropout=dropout)
        started = time.monotonic()
        history = train(
            network,
            lambda rng: _draw(sources, (crop_voxels,) * 3, rng),
            steps=steps,
            batch=batch,
            learning_rate=learning_rate,
            seed=seed,
            weight_decay=weight_decay,
            ncuts_weight=ncuts_weight,
            reconstruction_weight=reconstruction_weight,
            intensity_sigma=intensity_sigma,
            variation=variation,
            device=device,
            precision=resolve_precision(precision, device),
            progress=None if progress is None else lambda record: progress(record.step + 1, steps),
        )
        seconds = time.monotonic() - started
    except TrainingError as err:
        raise BraincensusError(
            explain("the training was stopped; nothing was written", found=str(err))
        ) from err
    except BraincensusError:
        raise
    except ValueError as err:
        raise ConfigError(f"these training options cannot be used: {err}") from err
    finally:
        torch.set_num_threads(before)
    settings = {
        "channels": list(channels),
        "steps": steps,
        "crop_voxels": crop_voxels,
        "batch": batch,
        "learning_rate": learning_rate,
        "weight_decay": weight_decay,
        "dropout": dropout,
        "ncuts_weight": ncuts_weight,
        "reconstruction_weight": reconstruction_weight,
        "intensity_sigma": intensity_sigma,
        "variation": None if variation is None else vars(variation),
        "seed": seed,
        "precision": resolve_precision(precision, device),
        "device": torch.device(device).type,
    }
    return _write(network, history, sources, settings, out=out, seconds=seconds)


def train_from_paths(
    inputs: Sequence[str | Path],
    out: str | Path,
    *,
    voxel_size_um: tuple[float, float, float] | None,
    channel: int,
    level: int,
    **options: Any,
) -> TrainingResult:
    """Open the volumes, then `train_wnet3d`, whose options these are."""
    volumes = [
        open_volume(path, channel=channel, level=level, voxel_size_um=voxel_size_um) for path in inputs
    ]
    return train_wnet3d(volumes, out, **options)


def _check(
    inputs: Sequence[Any], out: Path, channels: Sequence[int], crop_voxels: int, overwrite: bool
) -> None:
    if not inputs:
        raise ConfigError("no volume to train on")
    if out.suffix != ".safetensors":
        raise ConfigError(
            explain("the weights need another name", expected="NAME.safetensors", found=out.name or "nothing")
        )
    if len(channels) != 4 or any(c < 4 or c % 4 for c in channels):
        raise ConfigError(
            explain(
                "channels do not make a WNet3D",
                expected="four multiples of 4",
                found=",".join(map(str, channels)),
            )
        )
    if crop_voxels < 16 or crop_voxels % LATTICE:
        raise ConfigError(
            explain(
                "crops of this size cannot be used",
                expected=f"a multiple of {LATTICE}, 16 or more",
                found=str(crop_voxels),
            )
        )
    existing = [path.name for path in (out, *_beside(out)) if path.exists()]
    if existing and not overwrite:
        raise OutputError(
            explain(
                "the output exists",
                found=", ".join(existing),
                remedy="give another name, or --overwrite (overwrite=True)",
            )
        )


def _beside(out: Path) -> tuple[Path, Path, Path]:
    return out.with_suffix(".md"), out.with_suffix(".csv"), out.with_suffix(".png")


def _opened(item: Volume | str | Path) -> Volume:
    return item if isinstance(item, Volume) else open_volume(item)


def _source(volume: Volume, crop_voxels: int) -> _Source:
    """Measure the range of a volume's tissue."""
    if any(n < crop_voxels for n in volume.shape):
        raise ConfigError(
            explain(
                f"{volume.source} is smaller than a crop",
                expected=f"{crop_voxels} voxels or more on each axis",
                found=" x ".join(map(str, volume.shape)),
                remedy="use smaller crops",
            )
        )
    boxes = list(volume.box.tiles((_BLOCK,) * 3))
    if len(boxes) > _BLOCKS_FOR_RANGE:
        boxes = [boxes[int(i)] for i in np.linspace(0, len(boxes) - 1, _BLOCKS_FOR_RANGE)]
    low, high = np.inf, -np.inf
    for box in boxes:
        values = volume.read(box)
        _refuse_nonfinite(values, volume, box)
        low, high = min(low, float(values.min())), max(high, float(values.max()))
    if low == high:
        raise InputError(
            explain(
                f"{volume.source} is constant", found=f"{low:g} everywhere", remedy="check channel and level"
            )
        )
    scale = scale_for(volume.dtype, low, high)
    parts = []
    for box in boxes:
        q = scale.quantise(volume.read(box))
        parts.append(joint_histogram(q, tile_statistics(q)))
    joint = add_histograms(parts)
    bottom, top = tissue_range(joint, find_tissue(joint), low_percentile=1.0, high_percentile=99.9)
    return _Source(volume, scale, bottom, top)


def _refuse_nonfinite(values: NDArray[Any], volume: Volume, box: Box) -> None:
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise InputError(
            explain(
                f"{volume.source} holds values that are not finite",
                found=f"NaN or infinity in voxels {box.start} to {box.stop}",
                remedy="replace them, or crop the volume",
            )
        )


def _draw(sources: Sequence[_Source], side: Triple, rng: np.random.Generator) -> NDArray[np.float32]:
    """Draw a crop that is mostly tissue and that something stands out of, or after many tries the best."""
    best, best_score = None, -1.0
    for _ in range(_TRIES):
        source = sources[int(rng.integers(len(sources)))]
        start = [int(rng.integers(n - s + 1)) for n, s in zip(source.volume.shape, side, strict=True)]
        stop = (start[0] + side[0], start[1] + side[1], start[2] + side[2])
        crop = source.read(Box((start[0], start[1], start[2]), stop))
        tissue = float((crop > 0).mean())
        standing_out = float((crop > np.median(crop) + _CONTRAST).mean())
        if tissue >= _TISSUE_SHARE and standing_out >= _CONTRAST_SHARE:
            return crop
        score = tissue + standing_out
        if score > best_score:
            best, best_score = crop, score
    assert best is not None
    return best


def _write(
    network: WNet3D,
    history: list[TrainingStep],
    sources: Sequence[_Source],
    settings: dict[str, Any],
    *,
    out: Path,
    seconds: float,
) -> TrainingResult:
    """Write everything, the weights last: they are what looks finished."""
    card, losses, picture = _beside(out)
    tail = history[-max(1, len(history) // 10) :]
    final_loss = float(np.mean([record.loss for record in tail]))
    volumes = [
        {
            "name": Path(s.volume.source).name,
            "shape": list(s.volume.shape),
            "voxel_size_um": list(s.volume.voxel_size_um),
        }
        for s in sources
    ]
    write_whole(losses, lambda file: file.write(_losses_csv(history)), durable=False)
    write_whole(picture, lambda file: _draw_losses(history, file), durable=False)
    text = _card(settings, volumes, seconds=seconds, final_loss=final_loss)
    write_whole(card, lambda file: file.write(text.encode()), durable=False)
    metadata = {
        "name": "WNet3D",
        "braincensus": version("braincensus"),
        "settings": json.dumps(settings, sort_keys=True),
        "volumes": json.dumps(volumes),
        "final_loss": f"{final_loss:.6g}",
    }
    with writing(out):
        sha256 = save_weights(out, network.state_dict(), metadata)
    return TrainingResult(out, card, losses, picture, sha256, len(history), seconds, final_loss)


def _losses_csv(history: list[TrainingStep]) -> bytes:
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(("step", "loss", "ncuts", "reconstruction", "learning_rate", "smallest_class"))
    for r in history:
        values = (r.loss, r.ncuts, r.reconstruction, r.learning_rate, r.smallest_class)
        rows.writerow((r.step, *(f"{value:.6g}" for value in values)))
    return text.getvalue().encode()


def _draw_losses(history: list[TrainingStep], file: Any) -> None:
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2)
    steps = [record.step + 1 for record in history]
    for ax, values, title in (
        (axes[0], [record.ncuts for record in history], "soft normalised cut"),
        (axes[1], [record.reconstruction for record in history], "reconstruction, mean squared error"),
    ):
        width = max(1, len(values) // 30)
        smooth = np.convolve(values, np.ones(width) / width, mode="valid")
        ax.plot(steps, values, color="0.8", linewidth=0.8)
        ax.plot(steps[width - 1 :], smooth, color="tab:blue")
        ax.set_title(title)
        ax.set_xlabel("step")
        ax.set_yscale("log")
    figure.savefig(file, format="png", dpi=110)


def _card(
    settings: dict[str, Any], volumes: list[dict[str, Any]], *, seconds: float, final_loss: float
) -> str:
    lines = [
        "# WNet3D weights",
        "",
        f"Trained by braincensus {version('braincensus')}, no labels: soft normalised cut (class-mean form)",
        "and reconstruction, one backward pass. Encoder and decoder; prediction uses the encoder alone.",
        "",
        f"- Time: {seconds:.0f} s. Loss over the last tenth of the steps: {final_loss:.6g}.",
        "- Input: intensities mapped to [0, 100] by the 1st to 99.9th percentile of tissue.",
        "- Which class is foreground is not fixed by training: it is the class that is brighter on average.",
        "",
        "## Data",
        "",
        *(f"- {v['name']}: {v['shape']} voxels of {v['voxel_size_um']} um" for v in volumes),
        "",
        "## Settings",
        "",
        *(f"- {key}: {value}" for key, value in settings.items()),
        "",
        "## Limits",
        "",
        "Not checked against known cells. Look at the probabilities on your data before counting with them.",
        "",
    ]
    return "\n".join(lines)
