"""What a training leaves on the disk while it goes on: losses, their curve, checkpoints, TensorBoard's logs.

All is whole or absent, or a line at a time: a training that is killed at any instant can be read, and goes
on from its last checkpoint. Only the first process writes.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import uuid
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import IO, Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from braincensus.errors import ConfigError, OutputError, explain
from braincensus.store.files import PARTIAL, writing
from braincensus_kernels.models.training import TrainingStep

_NAMES = tuple(field.name for field in fields(TrainingStep))
_ABOUT = "braincensus_training"


@dataclass(frozen=True)
class Places:
    """Where everything of one training lies: beside the weights, under the same name."""

    weights: Path

    @property
    def card(self) -> Path:
        """The model card."""
        return self.weights.with_suffix(".md")

    @property
    def losses(self) -> Path:
        """The figures of every step."""
        return self.weights.with_suffix(".csv")

    @property
    def picture(self) -> Path:
        """The curve of the losses."""
        return self.weights.with_suffix(".png")

    @property
    def pictures(self) -> Path:
        """Folder of what the network makes of examples, at chosen epochs."""
        return self.weights.with_suffix(".pictures")

    @property
    def tensorboard(self) -> Path:
        """Folder of TensorBoard's logs."""
        return self.weights.with_suffix(".tensorboard")

    @property
    def checkpoint(self) -> Path:
        """What an interrupted training goes on from."""
        return self.weights.with_suffix(".checkpoint.safetensors")

    def check(self, *, overwrite: bool, resume: bool) -> None:
        """Refuse to touch what is there, unless told to.

        Raises
        ------
        ConfigError
            If the weights' name cannot be used.
        OutputError
            If anything is in the way.
        """
        if self.weights.suffix != ".safetensors":
            raise ConfigError(
                explain(
                    "the weights need another name",
                    expected="NAME.safetensors",
                    found=self.weights.name or "nothing",
                )
            )
        if resume and overwrite:
            raise ConfigError(
                "to go on (--resume) and to start again (--overwrite) exclude each other: give one of them"
            )
        if overwrite or (resume and self.checkpoint.exists()):
            return
        if self.checkpoint.exists():
            raise OutputError(
                explain(
                    "a training under this name was interrupted",
                    found=self.checkpoint.name,
                    remedy="go on with it: --resume (resume=True), or start again: --overwrite",
                )
            )
        finished = (self.weights, self.card, self.losses, self.picture, self.pictures, self.tensorboard)
        existing = [path.name for path in finished if path.exists()]
        if existing:
            raise OutputError(
                explain(
                    "the output exists",
                    found=", ".join(existing),
                    remedy="give another name, or --overwrite (overwrite=True)",
                )
            )

    def clear(self) -> None:
        """Remove what an earlier training left and a new one does not replace at once."""
        with writing(self.weights):
            for path in (self.checkpoint, self.picture):
                path.unlink(missing_ok=True)
            for folder in (self.pictures, self.tensorboard):
                shutil.rmtree(folder, ignore_errors=True)


class LossLog:
    """The figures of every step as CSV, a line at a time, on the disk at once."""

    def __init__(self, path: Path, history: Sequence[TrainingStep]) -> None:
        self._path = path
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}{PARTIAL}")
            # Written anew from what the checkpoint remembers: lines after it are those of steps to be redone.
            self._file: IO[str] = partial.open("w", newline="")
            self._rows = csv.writer(self._file, lineterminator="\n")
            self._rows.writerow(_NAMES)
            for record in history:
                self._write(record)
            self._file.flush()
            os.replace(partial, path)

    def append(self, record: TrainingStep) -> None:
        """Add the next step.

        Raises
        ------
        OutputError
            If the disk is full.
        """
        with writing(self._path):
            self._write(record)
            self._file.flush()

    def close(self) -> None:
        """No more steps."""
        with writing(self._path):
            self._file.close()

    def _write(self, record: TrainingStep) -> None:
        step, *values = astuple(record)
        self._rows.writerow((step, *(f"{value:.6g}" for value in values)))


def save_checkpoint(path: Path, state: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write the state of a training, whole and durably, in place of the last one.

    Parameters
    ----------
    path
        Of a safetensors file: nothing but arrays and text, no code to be run when it is read.
    state
        From `Trainer.state`.
    about
        What a training that goes on from it is compared with, as JSON holds it.
    """
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}{PARTIAL}")
    with writing(path):
        try:
            try:
                save_file(dict(state), partial, metadata={_ABOUT: json.dumps(about)})
            except SafetensorError as err:  # how a full disk is reported
                raise OSError(str(err)) from err
            with partial.open("rb+") as file:
                os.fsync(file.fileno())
            partial.chmod(0o644)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_checkpoint` wrote.

    Raises
    ------
    OutputError
        If it is damaged, or something else.
    """
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})[_ABOUT])
            return {key: file.get_tensor(key) for key in file.keys()}, about  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, ValueError) as err:
        raise OutputError(
            explain(
                f"cannot go on from {path}",
                expected="a checkpoint that a training wrote",
                found=str(err).strip() or type(err).__name__,
                remedy="start again: --overwrite (overwrite=True)",
            )
        ) from err


def draw_losses(
    file: Any, history: Sequence[TrainingStep], *, steps_per_epoch: int, reconstruction: str
) -> None:
    """Draw the curves as PNG: both losses, and how the classes share the voxels."""
    figure = Figure(figsize=(12, 4))
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3)
    figure.subplots_adjust(left=0.06, right=0.98, top=0.84, bottom=0.13, wspace=0.24)
    steps = np.array([record.step + 1 for record in history])
    errors = {"mse": "mean squared error", "bce": "cross-entropy"}
    for axes, values, title in (
        (left, [r.ncuts for r in history], "encoder: soft normalised cut"),
        (middle, [r.reconstruction for r in history], f"decoder: {errors[reconstruction]}"),
    ):
        width = max(1, len(values) // 30)
        smooth = np.convolve(values, np.ones(width) / width, mode="valid")
        axes.plot(steps, values, color="0.8", linewidth=0.8)
        axes.plot(steps[width - 1 :], smooth, color="tab:blue")
        axes.set_title(title)
        if min(values) > 0:
            axes.set_yscale("log")
    right.plot(steps, [r.largest_class for r in history], color="tab:blue", label="largest class")
    right.plot(steps, [r.smallest_class for r in history], color="tab:orange", label="smallest class")
    right.plot(
        steps, [r.likeness for r in history], color="0.6", linewidth=0.8, label="likeness to the image"
    )
    right.set_ylim(0, 1)
    right.set_title("classes: mean probability")
    right.legend(frameon=False, fontsize=9, loc="center right")
    for axes in (left, middle, right):
        axes.set_xlabel("step")
        if len(history) > 3 * steps_per_epoch:
            across = axes.secondary_xaxis(
                "top", functions=(lambda x: x / steps_per_epoch, lambda x: x * steps_per_epoch)
            )
            across.set_xlabel("epoch", fontsize=9)
    figure.savefig(file, format="png", dpi=110)


class Board:
    """TensorBoard's logs of a training.

    Raises
    ------
    ConfigError
        If TensorBoard is not installed.
    """

    def __init__(self, folder: Path, *, from_step: int) -> None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # of what TensorBoard itself imports
                from torch.utils.tensorboard import SummaryWriter
        except ImportError as err:
            raise ConfigError(
                explain(
                    "TensorBoard's logs were asked for, and it is not installed",
                    found=str(err),
                    remedy='pip install "braincensus[tensorboard]", or do without --tensorboard',
                )
            ) from err
        with writing(folder):
            # Events after `from_step` of an earlier attempt are hidden: those steps are done again.
            self._writer: Any = SummaryWriter(str(folder), purge_step=from_step, flush_secs=10)

    def append(self, record: TrainingStep) -> None:
        """Add the next step."""
        for name, value in zip(_NAMES[1:], astuple(record)[1:], strict=True):
            self._writer.add_scalar(f"training/{name}", value, record.step)

    def picture(self, step: int, pixels: np.ndarray) -> None:
        """Add a picture, uint8 (height, width, 3)."""
        self._writer.add_image("examples", pixels, step, dataformats="HWC")

    def text(self, name: str, text: str, step: int) -> None:
        """Add a text, Markdown."""
        self._writer.add_text(name, text, step)

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()
