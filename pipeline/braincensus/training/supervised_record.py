"""What a supervised training leaves for a person: losses as CSV, curves and examples as PNG, the card."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from braincensus.store.files import write_whole
from braincensus.training.pairs import Split
from braincensus_kernels.models.supervised.training import SupervisedEpoch, SupervisedStep

_HEAD = ("step", "loss", "learning_rate", "epoch", "threshold", "training_dice", "validation_dice")
_EDGE = "tab:red"

Example = tuple[NDArray[np.float32], NDArray[np.bool_], NDArray[np.float32]]
"""Intensities, cells, and what the network makes of it: all (z, y, x)."""


@dataclass(frozen=True, kw_only=True)
class Told:
    """What the card tells."""

    title: str
    version: str
    sha256: str
    settings: Mapping[str, Any]
    volumes: Sequence[Mapping[str, Any]]
    hardware: Mapping[str, Any]
    split: Split
    epochs: Sequence[SupervisedEpoch]
    best: SupervisedEpoch
    steps: int
    seconds: float
    parameters: int
    percentiles: tuple[float, float]
    warnings: Sequence[str]


def write_losses(path: Path, history: Sequence[SupervisedStep], epochs: Sequence[SupervisedEpoch]) -> None:
    """Write a row for each step; what was seen after an epoch stands in the row of its last step."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(_HEAD)
    ended = {epoch.steps: epoch for epoch in epochs}
    for record in history:
        epoch = ended.get(record.step + 1)
        seen: tuple[Any, ...] = ("", "", "", "")
        if epoch is not None:
            dice = (f"{value:.6g}" for value in (epoch.training_dice, epoch.validation_dice))
            seen = (epoch.epoch, f"{epoch.threshold:g}", *dice)
        rows.writerow((record.step, f"{record.loss:.6g}", f"{record.learning_rate:.6g}", *seen))
    write_whole(path, lambda file: file.write(text.getvalue().encode()), durable=False)


def write_picture(
    path: Path,
    history: Sequence[SupervisedStep],
    epochs: Sequence[SupervisedEpoch],
    best: SupervisedEpoch,
    examples: Sequence[Example],
) -> None:
    """Draw the curves, and below them crops that were held out: input, labels, probability."""
    figure = Figure(figsize=(10, 3.6 + 3.2 * len(examples)), layout="constrained")
    FigureCanvasAgg(figure)
    parts = figure.subfigures(1 + len(examples), 1, squeeze=False)[:, 0]
    left, right = parts[0].subplots(1, 2)
    left.plot([r.step + 1 for r in history], [r.loss for r in history], color="0.8", linewidth=0.8)
    left.plot([e.steps for e in epochs], [e.loss for e in epochs], color="tab:blue", marker=".")
    left.set(title="loss: each step, mean of each epoch", xlabel="step")
    at = [e.epoch for e in epochs]
    right.plot(at, [e.training_dice for e in epochs], color="0.6", marker=".", label="trained on")
    right.plot(at, [e.validation_dice for e in epochs], color="tab:blue", marker=".", label="held out")
    right.plot(at, [e.threshold for e in epochs], color="tab:orange", linewidth=0.8, label="threshold")
    right.axhline(best.chance_dice, color="0.4", linestyle=":", label="every voxel a cell")
    right.plot([best.epoch], [best.validation_dice], "o", color=_EDGE, fillstyle="none", label="kept")
    right.set(title="Dice", xlabel="epoch", ylim=(0, 1))
    right.legend(frameon=False, fontsize=8, ncols=2)
    for part, (image, cells, probability) in zip(parts[1:], examples, strict=True):
        plane = int(cells.sum(axis=(1, 2)).argmax())
        panels = (
            (image[plane], "gray", "held out: input"),
            (cells[plane], "gray", "its labels"),
            (probability[plane], "magma", f"probability; line: {best.threshold:g}"),
        )
        for axes, (values, colours, title) in zip(part.subplots(1, 3), panels, strict=True):
            axes.imshow(values, cmap=colours, vmin=0, vmax=1, interpolation="nearest")
            axes.set(title=title, xticks=[], yticks=[])
            found = probability[plane] >= best.threshold
            if colours == "magma" and found.any() and not found.all():
                axes.contour(found, levels=[0.5], colors="white", linewidths=0.6)
    write_whole(path, lambda file: figure.savefig(file, format="png", dpi=100), durable=False)


def write_card(path: Path, told: Told) -> None:
    """Write the model card, Markdown."""
    best, split, low_high = told.best, told.split, told.percentiles
    machine, threads = told.hardware, told.hardware["threads"]
    lines = [
        f"# {told.title} weights: {path.stem}",
        "",
        f"Trained by braincensus {told.version} on labels. {told.parameters:,} parameters; MONAI's module.",
        "",
        f"- SHA-256 `{told.sha256}`",
        f"- Input: [0, 1], percentile {low_high[0]:g} to {low_high[1]:g} of each volume's tissue.",
        f"- Threshold: {best.threshold:g}, the best of a grid on crops that were trained on; "
        "it is in the file.",
        f"- Dice at that threshold: {best.training_dice:.3f} on crops that were trained on, "
        f"**{best.validation_dice:.3f}** on",
        f"  crops held out. Calling every voxel a cell has {best.chance_dice:.3f}.",
        "",
        "## Data",
        "",
        *(
            f"- {v['name']}: {v['shape']} voxels of {v['voxel_size_um']} um; 0 to 1 is {v['range'][0]:g} to "
            f"{v['range'][1]:g}. Labels: {v['labelled_by']}."
            for v in told.volumes
        ),
        f"- {len(split.training)} blocks were trained on, {len(split.held_out)} held out; "
        f"{100 * split.cells_share:.2g} % of their voxels are cells.",
        "",
        "## Training",
        "",
        f"{told.steps} steps in {told.seconds:.0f} s, {len(told.epochs)} epochs; epoch {best.epoch} is kept.",
        f"{machine['device']}{f', {threads} threads' if threads else ''}; torch {machine['torch']}.",
        "",
        "Warnings:" if told.warnings else "No warnings.",
        *(f"- {text}" for text in told.warnings),
        "",
        "## Settings",
        "",
        *(f"- {key}: {value}" for key, value in told.settings.items()),
        "",
        "## Limits",
        "",
        "- What labels get wrong everywhere is learnt; labels of a census are those of a network.",
        "- Dice of voxels does not say how many cells are found. Count on volumes whose cells are known.",
        "- Other stains, voxel sizes or microscopes than those above were not seen.",
        "",
    ]
    write_whole(path, lambda file: file.write("\n".join(lines).encode()), durable=False)
