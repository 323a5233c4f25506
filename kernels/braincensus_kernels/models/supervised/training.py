"""Supervised training on crops with labels: arrays in, a trained network and its history out.

    draw crop and labels -> augment -> network -> loss -> one step             (many to an epoch)
    end of an epoch: fixed crops to train on -> Dice at each threshold -> the best threshold
                     fixed crops held out    -> Dice at that threshold -> the best epoch's weights stay

Crops come in [0, 1] from the caller, who knows where the voxels are, what their range is, and which of them
are held out. The threshold is never chosen on what is held out, so that the Dice there can be believed.

Interruption changes nothing: what a step draws at random depends on the seed and the step's number alone,
so weights, optimiser and history are all there is to keep, as plain tensors (`SupervisedTrainer.state`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import astuple, dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from braincensus_kernels.models.supervised.augment import Augmentation
from braincensus_kernels.models.supervised.losses import LossName, loss
from braincensus_kernels.models.training import (
    arithmetic,
    dropout_of,
    learning_rate_factor,
    refuse_wrong_gradients,
)
from braincensus_kernels.models.training_signs import TrainingError

THRESHOLDS: tuple[float, ...] = (0.01, 0.025, *(round(0.05 * k, 2) for k in range(1, 20)), 0.975, 0.99)
"""Probabilities among which the best one is chosen."""

LabelledCrop = tuple[NDArray[np.float32], NDArray[np.bool_]]
"""A cube of intensities in [0, 1], and where cells are in it."""
DrawLabelledCrop = Callable[[np.random.Generator], LabelledCrop]

_TOLERANCE = 0.01


@dataclass(frozen=True, kw_only=True)
class SupervisedSettings:
    """The loss, the optimiser and their numbers."""

    steps: int
    """Optimiser steps."""
    batch: int
    """Crops in each step."""
    learning_rate: float
    """Of Adam, after the warm-up."""
    seed: int
    """Determines crops, augmentation and dropout."""
    loss: LossName = "generalized-dice"
    augmentation: Augmentation | None = Augmentation()  # noqa: RUF009 (frozen)
    """None for crops as they are."""
    weight_decay: float = 0.0
    """Of Adam."""
    warm_up_steps: int = 20
    """Steps of linear rise of the learning rate."""
    final_learning_rate: float = 0.05
    """Factor to which the learning rate falls, as half a cosine; 1 keeps it constant."""

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1 or not 0 < self.learning_rate < math.inf:
            raise ValueError(
                "steps, batch and learning rate must be positive, got "
                f"{self.steps}, {self.batch}, {self.learning_rate}"
            )
        not_negative = (self.weight_decay, self.warm_up_steps, self.seed)
        if not all(0 <= value < math.inf for value in not_negative):
            raise ValueError(f"weight decay, warm-up and seed must not be negative, got {not_negative}")
        if not 0 <= self.final_learning_rate <= 1:
            raise ValueError(f"final_learning_rate is a factor from 0 to 1, got {self.final_learning_rate}")
        loss(self.loss)


@dataclass(frozen=True)
class SupervisedStep:
    """What one step of training gave."""

    step: int
    loss: float
    learning_rate: float


@dataclass(frozen=True)
class SupervisedEpoch:
    """What was seen at the end of an epoch."""

    epoch: int
    steps: int
    """Done by then."""
    loss: float
    """Mean over the epoch's steps."""
    threshold: float
    """The one of `THRESHOLDS` with the highest Dice on crops that are trained on."""
    training_dice: float
    """There, at that threshold."""
    validation_dice: float
    """At that threshold, on crops held out."""
    chance_dice: float
    """Of calling every voxel held out a cell: what knows nothing reaches."""


@dataclass(frozen=True)
class ProbabilityCounts:
    """How many voxels, inside and outside of cells, are how probable: their Dice at any of `THRESHOLDS`."""

    counts: NDArray[np.int64]
    """(2, thresholds + 1): outside and inside of cells; by how many thresholds the probability reaches."""

    @classmethod
    def none(cls) -> ProbabilityCounts:
        """Nothing counted yet."""
        return cls(np.zeros((2, len(THRESHOLDS) + 1), np.int64))

    def __add__(self, other: ProbabilityCounts) -> ProbabilityCounts:
        """Add up what was counted."""
        return ProbabilityCounts(self.counts + other.counts)

    @classmethod
    def of(cls, probability: Tensor, cells: Tensor) -> ProbabilityCounts:
        """Count a prediction; both of one shape.

        Examples
        --------
        >>> counted = ProbabilityCounts.of(torch.tensor([0.1, 0.4, 0.9]), torch.tensor([False, True, True]))
        >>> counted.dice(0.4), counted.dice(0.05)
        (1.0, 0.8)
        """
        edges = torch.tensor(THRESHOLDS, dtype=torch.float32, device=probability.device)
        reached = torch.bucketize(probability.float().contiguous(), edges, right=True)
        found = torch.bincount(
            (reached + cells.long() * (len(THRESHOLDS) + 1)).flatten(), minlength=2 * (len(THRESHOLDS) + 1)
        )
        return cls(found.reshape(2, -1).cpu().numpy().astype(np.int64))

    @property
    def cells(self) -> int:
        """Voxels inside of cells."""
        return int(self.counts[1].sum())

    def dice(self, threshold: float) -> float:
        """Dice of the voxels from `threshold` on with those of cells; 1 where there are neither."""
        reached = THRESHOLDS.index(threshold) + 1
        false, right = (int(row[reached:].sum()) for row in self.counts)
        everything = false + right + self.cells
        return 2 * right / everything if everything else 1.0

    def best_threshold(self) -> float:
        """Return the threshold of the highest Dice; of several, that next to 0.5."""
        return max(THRESHOLDS, key=lambda t: (self.dice(t), -abs(t - 0.5)))

    def chance(self) -> float:
        """Dice of all voxels with those of cells."""
        return 2 * self.cells / (int(self.counts.sum()) + self.cells) if self.cells else 0.0


class SupervisedTrainer:
    """Training step by step and epoch by epoch.

    Parameters
    ----------
    network
        From `build_network`; trained in place.
    draw
        Gives one crop with its labels for a random generator: cubes of an extent that the network takes,
        all of one size.
    settings
        Of loss and optimiser.
    device
        As torch names it.
    precision
        ``float32`` or ``bfloat16`` (convolutions and products in bfloat16, the loss and the weights in
        float32).

    Raises
    ------
    ValueError
        On an argument that cannot be used.
    """

    def __init__(
        self,
        network: nn.Module,
        draw: DrawLabelledCrop,
        settings: SupervisedSettings,
        *,
        device: str = "cpu",
        precision: str = "float32",
    ) -> None:
        if precision not in ("float32", "bfloat16"):
            raise ValueError(f"precision must be float32 or bfloat16, got {precision!r}")
        self.network = network.to(device)
        self.settings = settings
        self.history: list[SupervisedStep] = []
        self.epochs: list[SupervisedEpoch] = []
        self.best: SupervisedEpoch | None = None
        """The epoch with the highest Dice on what is held out; the first of equals."""
        self._best_weights: dict[str, Tensor] = {}
        self._draw, self._device, self._precision = draw, device, precision
        refuse_wrong_gradients(network, device, precision)
        self._loss = loss(settings.loss)
        self._optimiser = torch.optim.Adam(
            [parameter for _, parameter in self._learning()],
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
        )

    def step(self) -> SupervisedStep:
        """Do the next step, and return what it gave.

        Raises
        ------
        ValueError
            On a crop of a wrong shape, dtype or range.
        TrainingError
            If the loss is not finite.
        """
        chosen, step = self.settings, len(self.history)
        rate = chosen.learning_rate * learning_rate_factor(
            step, chosen.steps, chosen.warm_up_steps, chosen.final_learning_rate
        )
        for group in self._optimiser.param_groups:
            group["lr"] = rate
        image, labels = self._batch(step)
        self.network.train()
        with dropout_of(chosen.seed, step, 0, self._device), arithmetic(self._device, self._precision):
            logits = self.network(image)
        value: Tensor = self._loss(logits.float(), labels)
        record = SupervisedStep(step, float(value.detach()), rate)
        if not math.isfinite(record.loss):
            raise TrainingError(
                f"step {step}: the loss is not finite ({record.loss}); use a smaller learning rate or float32"
            )
        self._optimiser.zero_grad(set_to_none=True)
        value.backward()  # type: ignore[no-untyped-call]
        self._optimiser.step()
        self.history.append(record)
        return record

    def end_epoch(
        self, trained_on: Iterable[LabelledCrop], held_out: Iterable[LabelledCrop]
    ) -> SupervisedEpoch:
        """Choose the threshold on crops that are trained on, see how well it does on those held out.

        Raises
        ------
        ValueError
            If no step was done since the last epoch.
        """
        before = self.epochs[-1].steps if self.epochs else 0
        since = self.history[before:]
        if not since:
            raise ValueError("an epoch needs a step")
        training, validation = self.evaluate(trained_on), self.evaluate(held_out)
        threshold = training.best_threshold()
        epoch = SupervisedEpoch(
            epoch=len(self.epochs) + 1,
            steps=len(self.history),
            loss=math.fsum(r.loss for r in since) / len(since),
            threshold=threshold,
            training_dice=training.dice(threshold),
            validation_dice=validation.dice(threshold),
            chance_dice=validation.chance(),
        )
        self.epochs.append(epoch)
        if self.best is None or epoch.validation_dice > self.best.validation_dice:
            self.best, self._best_weights = epoch, _copies(self.network.state_dict())
        return epoch

    def evaluate(self, crops: Iterable[LabelledCrop]) -> ProbabilityCounts:
        """Predict crops as they are, and count; they may differ in shape."""
        self.network.eval()
        counted = ProbabilityCounts.none()
        for crop in crops:
            image, labels = self._checked(crop)
            with torch.inference_mode(), arithmetic(self._device, self._precision):
                logits = self.network(image[None, None].to(self._device))
            counted += ProbabilityCounts.of(torch.sigmoid(logits.float())[0, 0].cpu(), labels > 0)
        return counted

    def take_best(self) -> SupervisedEpoch:
        """Put the best epoch's weights in place, in evaluation mode.

        Raises
        ------
        ValueError
            If no epoch has ended.
        """
        if self.best is None:
            raise ValueError("no epoch has ended, so that none is the best")
        self.network.load_state_dict(self._best_weights)
        self.network.eval()
        return self.best

    def state(self) -> dict[str, Tensor]:
        """Return all that the next steps depend on, as plain tensors on the CPU: copies."""
        state = {f"network.{key}": value for key, value in self.network.state_dict().items()}
        state |= {f"best.{key}": value for key, value in self._best_weights.items()}
        for name, parameter in self._learning():
            for key, value in self._optimiser.state[parameter].items():
                state[f"adam.{key}.{name}"] = value
        state["history"] = _rows(self.history, SupervisedStep)
        state["epochs"] = _rows(self.epochs, SupervisedEpoch)
        return _copies(state)

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` gave.

        Raises
        ------
        ValueError
            If it is the state of another network, or of more steps than there shall be.
        """
        try:
            history = [SupervisedStep(int(row[0]), *row[1:]) for row in state["history"].tolist()]
            if len(history) > self.settings.steps:
                raise ValueError(
                    f"the state is that of {len(history)} steps, the training is to have "
                    f"{self.settings.steps}"
                )
            epochs = [SupervisedEpoch(int(row[0]), int(row[1]), *row[2:]) for row in state["epochs"].tolist()]
            self.network.load_state_dict(_under(state, "network."))
            for name, parameter in self._learning() if history else ():
                moments = {key: state[f"adam.{key}.{name}"] for key in ("exp_avg", "exp_avg_sq")}
                self._optimiser.state[parameter] = {
                    "step": state[f"adam.step.{name}"].clone(),
                    **{key: value.to(parameter.device, copy=True) for key, value in moments.items()},
                }
        except (KeyError, RuntimeError, TypeError) as err:
            raise ValueError(f"this is not the state of a training of this network: {err}") from err
        self.history, self.epochs = history, epochs
        self.best = max(epochs, key=lambda e: (e.validation_dice, -e.epoch)) if epochs else None
        self._best_weights = _copies(_under(state, "best."))

    def _learning(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, value) for name, value in self.network.named_parameters() if value.requires_grad]

    def _batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Return the crops of a step: each a function of the seed, the step and its place."""
        images, labels = [], []
        for place in range(self.settings.batch):
            rng = np.random.default_rng((self.settings.seed, step, place))
            image, label = (part.to(self._device) for part in self._checked(self._draw(rng)))
            if self.settings.augmentation is not None:
                image, label = self.settings.augmentation.apply(image, label, seed=int(rng.integers(2**32)))
            images.append(image)
            labels.append(label)
        if len({tuple(image.shape) for image in images}) != 1:
            raise ValueError(f"crops of one batch differ in shape: {[tuple(i.shape) for i in images]}")
        return torch.stack(images)[:, None], torch.stack(labels)[:, None]

    def _checked(self, crop: LabelledCrop) -> tuple[Tensor, Tensor]:
        """Return a crop as float32 tensors."""
        image, labels = crop
        if image.dtype != np.float32 or image.ndim != 3:
            raise ValueError(f"expected float32 (z, y, x), got {image.dtype} {image.shape}")
        if labels.dtype != np.bool_ or labels.shape != image.shape:
            raise ValueError(f"expected boolean labels {image.shape}, got {labels.dtype} {labels.shape}")
        low, high = float(image.min()), float(image.max())
        if not (low >= -_TOLERANCE and high <= 1 + _TOLERANCE):  # written so that NaN is refused
            raise ValueError(f"intensities must be finite and mapped to [0, 1], got {low:g} to {high:g}")
        return torch.from_numpy(np.ascontiguousarray(image)), torch.from_numpy(labels.astype(np.float32))


def _copies(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.detach().cpu().contiguous().clone() for key, value in state.items()}


def _under(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _rows(records: Iterable[Any], kind: type[Any]) -> Tensor:
    rows = [astuple(record) for record in records]
    return torch.tensor(rows, dtype=torch.float64).reshape(len(rows), len(fields(kind)))
