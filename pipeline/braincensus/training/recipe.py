"""Every number of a self-supervised training, with its default; here and nowhere else. First step.

Two recipes are known: ours, for the compact network, and the published one, CellSeg3D's own values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

import torch

from braincensus.errors import ConfigError, explain
from braincensus_kernels.models.predict import LATTICE, resolve_precision
from braincensus_kernels.models.soft_ncuts import SoftNCutsForm
from braincensus_kernels.models.training import LEAST_IN_BFLOAT16, IntensityVariation, TrainingSettings
from braincensus_kernels.models.wnet3d import COMPACT_CHANNELS, FULL_CHANNELS, GROUPS

_VARIATION = IntensityVariation(gain=0.25, gamma=0.15, offset=3.0, noise=2.0)

InputRange = Literal["tissue", "crop"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that a training depends on, but for the volumes and the machine.

    Attributes
    ----------
    channels
        Features of the four levels; the published size is (64, 128, 256, 512).
    num_classes
        Classes of the encoder, 2 or more. Which one is foreground is found out after training.
    dropout
        Probability with which a feature is dropped.
    crop_voxels
        Side of a crop, a multiple of 8.
    input_range
        ``tissue``: each volume is mapped to [0, 100] by the 1st to 99.9th percentile of its tissue, as a
        run does it. ``crop``: each crop by its own minimum and maximum, as published.
    steps, epochs
        How long: optimiser steps, or epochs; give one of them.
    steps_per_epoch
        None: as many as it takes to draw as many voxels as there are in tissue.
    precision
        ``auto``, ``float32`` or ``bfloat16``. ``auto`` is bfloat16 on a GPU that has it and on CPUs with AMX;
        with AVX-512 alone, where it makes prediction faster, training is slower (benchmarks/RESULTS.md).
    batch, learning_rate, seed, ...
        See `braincensus_kernels.models.training.TrainingSettings`.
    """

    channels: Sequence[int] = COMPACT_CHANNELS
    num_classes: int = 2
    dropout: float = 0.1
    crop_voxels: int = 48
    input_range: InputRange = "tissue"
    steps: int | None = 600
    epochs: int | None = None
    steps_per_epoch: int | None = None
    batch: int = 2
    learning_rate: float = 2e-3
    seed: int = 0
    weight_decay: float = 0.01
    warm_up_steps: int = 20
    final_learning_rate: float = 0.05
    ncuts: SoftNCutsForm = "class-mean"
    ncuts_weight: float = 0.5
    reconstruction: Literal["mse", "bce"] = "mse"
    reconstruction_weight: float = 0.005
    intensity_sigma: float = 50.0
    """The published 1 leaves it free where between noise and the brightest cells the cut lies; 50 makes it
    cheapest above the noise (weights halve 6.5 from the class's mean)."""
    spatial_sigma_voxels: float = 4.0
    radius_voxels: int = 2
    variation: IntensityVariation | None = _VARIATION
    precision: str = "auto"

    def __post_init__(self) -> None:
        if len(self.channels) != 4 or any(c < GROUPS or c % GROUPS for c in self.channels):
            raise ConfigError(
                explain(
                    "channels do not make a WNet3D",
                    expected=f"four multiples of {GROUPS}",
                    found=",".join(map(str, self.channels)),
                )
            )
        if self.crop_voxels < 2 * LATTICE or self.crop_voxels % LATTICE:
            raise ConfigError(
                explain(
                    "crops of this size cannot be used",
                    expected=f"a multiple of {LATTICE}, {2 * LATTICE} or more",
                    found=str(self.crop_voxels),
                )
            )
        if (self.steps is None) == (self.epochs is None):
            raise ConfigError(
                explain(
                    "the length of the training is not clear",
                    expected="a number of steps, or a number of epochs",
                    found="neither" if self.steps is None else f"{self.steps} steps, {self.epochs} epochs",
                )
            )
        checks: tuple[tuple[str, Any, bool, str], ...] = (
            ("num_classes", self.num_classes, self.num_classes >= 2, "2 or more"),
            ("dropout", self.dropout, 0 <= self.dropout < 1, "from 0, below 1"),
            ("epochs", self.epochs, self.epochs is None or self.epochs >= 1, "1 or more"),
            (
                "steps_per_epoch",
                self.steps_per_epoch,
                self.steps_per_epoch is None or self.steps_per_epoch >= 1,
                "1 or more",
            ),
            ("input_range", self.input_range, self.input_range in ("tissue", "crop"), "tissue or crop"),
        )
        for name, value, good, expected in checks:
            if not good:
                raise ConfigError(explain(f"{name} cannot be used", expected=expected, found=repr(value)))
        object.__setattr__(self, "channels", tuple(int(c) for c in self.channels))
        try:
            self.settings(self.steps if self.steps is not None else 1)
            resolve_precision(self.precision, "cpu")
        except ValueError as err:
            raise ConfigError(f"these training options cannot be used: {err}") from err

    @classmethod
    def published(cls) -> Recipe:
        """Return the values of CellSeg3D's plugin: full size, 50 epochs, each crop in its own range.

        Learning rate and reconstruction weight are the low ends of the paper's ranges, 2e-5 to 2e-3 and
        5e-3 to 5e-1, within which the paper adapts them to the data.
        """
        return cls(
            channels=FULL_CHANNELS,
            dropout=0.65,
            crop_voxels=64,
            input_range="crop",
            steps=None,
            epochs=50,
            learning_rate=2e-5,
            seed=34936339,
            warm_up_steps=0,
            final_learning_rate=1.0,
            intensity_sigma=1.0,
            variation=None,
            precision="float32",
        )

    def changed(self, **changes: Any) -> Recipe:
        """Return a recipe with some values changed; a new number of steps or epochs replaces the other.

        Raises
        ------
        ConfigError
            On a name or a value that cannot be used.
        """
        known = {field.name for field in fields(self)}
        unknown = sorted(changes.keys() - known)
        if unknown:
            raise ConfigError(
                explain(
                    f"no training option {', '.join(map(repr, unknown))}",
                    expected="one of " + ", ".join(sorted(known)),
                )
            )
        if changes.get("steps") is not None:
            changes.setdefault("epochs", None)
        elif changes.get("epochs") is not None:
            changes.setdefault("steps", None)
        return replace(self, **changes)

    def settled(self, tissue_voxels: int, device: str) -> Recipe:
        """Return the recipe with epochs, steps and precision as they are on these volumes and device."""
        precision = _precision(self.precision, device)
        check_bfloat16(precision, device, self.crop_voxels, step=LATTICE)
        per_epoch = self.steps_per_epoch or max(1, -(-tissue_voxels // (self.batch * self.crop_voxels**3)))
        return replace(
            self,
            steps=self.steps if self.epochs is None else self.epochs * per_epoch,
            epochs=None,
            steps_per_epoch=per_epoch,
            precision=precision,
        )

    def settings(self, steps: int) -> TrainingSettings:
        """Return what the kernels' trainer needs to know."""
        taken = {field.name for field in fields(TrainingSettings)} - {"steps"}
        return TrainingSettings(steps=steps, **{name: getattr(self, name) for name in taken})

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, as JSON holds them."""
        return {**asdict(self), "channels": list(self.channels)}


def check_bfloat16(precision: str, device: str, crop_voxels: int, *, step: int) -> None:
    """Refuse crops whose gradients torch would compute wrongly; see the kernels' `refuse_wrong_gradients`.

    Raises
    ------
    ConfigError
        On a CPU, in bfloat16, where a network that shrinks crops by `step` leaves too few voxels.
    """
    least = LEAST_IN_BFLOAT16 * step
    if precision == "bfloat16" and torch.device(device).type == "cpu" and crop_voxels < least:
        raise ConfigError(
            explain(
                "crops of this size cannot be trained in bfloat16 on a CPU",
                expected=f"{least} voxels or more",
                found=str(crop_voxels),
                cause="torch's gradients are wrong there, where features shrink to 2 voxels",
                remedy="larger crops, or --precision float32",
            )
        )


def _precision(precision: str, device: str) -> str:
    """Settle ``auto`` for training."""
    if precision == "auto" and torch.device(device).type == "cpu" and not torch.cpu._is_amx_tile_supported():
        return "float32"
    return resolve_precision(precision, device)
