"""Self-supervised training of WNet3D on crops: arrays in, a trained network and its history out.

    draw crop -> flip, turn, vary intensity -> encoder -> soft normalised cut  ┐
                                               decoder -> reconstruction error ┴-> one backward pass

Crops come in [0, 100] from the caller, who knows where the voxels are and what their range is.

Interruption changes nothing: what a step draws at random depends on the seed and the step's number alone
(`training_crops.py`), so weights, optimiser and history are all there is to keep, as plain tensors
(`Trainer.state`). A training that goes on from them gives the same bits as one that was never stopped. For
the same reason the crops of the next step can be drawn, by a thread, while this one computes.

Several processes (torch's process group, set up by the caller) share each batch: every one takes its part
of the crops, and gradients are averaged by DistributedDataParallel. The loss is a mean over the batch, so
that they train what one process would, up to rounding and dropout. Nothing else is worth sharing: network
and optimiser take under 1 GB at full size, while crops fill the memory, and those are what is divided.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import astuple, dataclass, fields
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.nn import functional

from braincensus_kernels.models.soft_ncuts import SoftNCutsForm, soft_ncuts
from braincensus_kernels.models.training_crops import (
    INPUT_TOP,
    DrawCrop,
    IntensityVariation,
    crops_from_arrays,
    draw_batch,
)
from braincensus_kernels.models.training_signs import (
    WINDOW,
    TrainingError,
    TrainingStep,
    everything_is_one_class,
    figures,
    signs,
)
from braincensus_kernels.models.wnet3d import WNet3D

__all__ = [
    "INPUT_TOP",
    "DrawCrop",
    "IntensityVariation",
    "Trainer",
    "TrainingError",
    "TrainingSettings",
    "TrainingStep",
    "crops_from_arrays",
    "train",
]


LEAST_IN_BFLOAT16 = 3
"""Voxels that features must have along each axis for bfloat16 to be trained on a CPU."""


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """The loss, the optimiser and their numbers."""

    steps: int
    """Optimiser steps."""
    batch: int
    """Crops in each step, over all processes."""
    learning_rate: float
    """Of Adam, after the warm-up."""
    seed: int
    """Determines crops, flips, turns, variation and dropout."""
    weight_decay: float = 0.01
    """Of Adam."""
    warm_up_steps: int = 20
    """Steps of linear rise of the learning rate."""
    final_learning_rate: float = 0.05
    """Factor to which the learning rate falls, as half a cosine; 1 keeps it constant."""
    ncuts: SoftNCutsForm = "class-mean"
    """Form of the soft normalised cut; see `soft_ncuts`."""
    ncuts_weight: float = 0.5
    """Of the cut in the loss."""
    reconstruction: Literal["mse", "bce"] = "mse"
    """Mean squared error in [0, 100], or binary cross-entropy of the decoder's sigmoid in [0, 1]."""
    reconstruction_weight: float = 0.005
    """Of the reconstruction in the loss."""
    intensity_sigma: float = 1.0
    """Of the cut."""
    spatial_sigma_voxels: float = 4.0
    """Of the cut."""
    radius_voxels: int = 2
    """Of the cut."""
    variation: IntensityVariation | None = None
    """Random change of intensities; None for none."""

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1 or not 0 < self.learning_rate < math.inf:
            raise ValueError(
                "steps, batch and learning rate must be positive, got "
                f"{self.steps}, {self.batch}, {self.learning_rate}"
            )
        if self.reconstruction not in ("mse", "bce"):
            raise ValueError(f"the reconstruction's error must be mse or bce, got {self.reconstruction!r}")
        not_negative = (self.ncuts_weight, self.reconstruction_weight, self.weight_decay, self.warm_up_steps)
        if not all(0 <= value < math.inf for value in (*not_negative, self.seed)):
            raise ValueError(
                f"weights, warm-up and seed must not be negative, got {(*not_negative, self.seed)}"
            )
        if not 0 <= self.final_learning_rate <= 1:
            raise ValueError(f"final_learning_rate is a factor from 0 to 1, got {self.final_learning_rate}")
        self.cut()

    def cut(self) -> nn.Module:
        """Return the soft normalised cut of these settings."""
        return soft_ncuts(
            self.ncuts,
            intensity_sigma=self.intensity_sigma,
            spatial_sigma_voxels=self.spatial_sigma_voxels,
            radius_voxels=self.radius_voxels,
        )


class Trainer:
    """Training step by step, for who wants to do something in between.

    Parameters
    ----------
    network
        Trained in place.
    draw
        Gives one crop for a random generator: float32 (z, y, x), extents in multiples of 8, values in
        [0, 100]. All crops of a batch must have one shape. It is called from a thread, one call at a time.
    settings
        Of loss and optimiser.
    device
        As torch names it.
    precision
        ``float32`` or ``bfloat16`` (convolutions in bfloat16, the loss and the weights in float32).

    Raises
    ------
    ValueError
        On an argument that cannot be used.

    Notes
    -----
    Where torch's process group is initialised, all its processes must make the same trainer and the same
    calls: each computes its part of a batch, and all end with the same weights.
    """

    def __init__(
        self,
        network: WNet3D,
        draw: DrawCrop,
        settings: TrainingSettings,
        *,
        device: str = "cpu",
        precision: str = "float32",
    ) -> None:
        if precision not in ("float32", "bfloat16"):
            raise ValueError(f"precision must be float32 or bfloat16, got {precision!r}")
        together = distributed.is_available() and distributed.is_initialized()
        self._processes = distributed.get_world_size() if together else 1
        self._rank = distributed.get_rank() if together else 0
        if settings.batch % self._processes:
            raise ValueError(
                f"a batch of {settings.batch} crops cannot be shared by {self._processes} processes"
            )
        self.network = network.to(device)
        if torch.device(device).type == "cpu" and not together:
            # 10 % faster, same values; DistributedDataParallel would lay the gradients out anew.
            network.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        self.settings = settings
        self.history: list[TrainingStep] = []
        self._draw, self._device, self._precision = draw, device, precision
        self._reader = ThreadPoolExecutor(1, "training-crops")
        self._ahead: tuple[int, Future[Tensor]] | None = None
        self._cut = settings.cut().to(device)
        self._optimiser = torch.optim.Adam(
            network.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
        refuse_wrong_gradients(network, device, precision)
        self._forward: nn.Module = (
            nn.parallel.DistributedDataParallel(
                network, device_ids=None if torch.device(device).type == "cpu" else [torch.device(device)]
            )
            if together
            else network
        )

    def step(self) -> TrainingStep:
        """Do the next step, and return what it gave.

        Raises
        ------
        ValueError
            On a crop of a wrong shape, dtype or range.
        TrainingError
            If a value is not finite, or if one class has taken everything.
        """
        chosen, step = self.settings, len(self.history)
        rate = chosen.learning_rate * learning_rate_factor(
            step, chosen.steps, chosen.warm_up_steps, chosen.final_learning_rate
        )
        for group in self._optimiser.param_groups:
            group["lr"] = rate
        image = self._batch(step).to(self._device)
        self.network.train()
        with (
            dropout_of(chosen.seed, step, self._rank, self._device),
            arithmetic(self._device, self._precision),
        ):
            probabilities, reconstruction = self._forward(image)
        probabilities, reconstruction = probabilities.float(), reconstruction.float()
        ncuts = self._cut(probabilities, image)
        error = _reconstruction_error(reconstruction, image, chosen.reconstruction)
        loss = chosen.ncuts_weight * ncuts + chosen.reconstruction_weight * error
        record = self._record(step, rate, loss, ncuts, error, figures(probabilities.detach(), image))
        self._optimiser.zero_grad(set_to_none=True)
        loss.backward()
        self._optimiser.step()
        self.history.append(record)
        if everything_is_one_class(self.history):
            raise TrainingError(
                f"step {step}: all other classes are empty since {WINDOW} steps (mean probability of the "
                f"one {record.largest_class:.6f}): nothing is told apart. Use another seed, a smaller "
                "learning rate, a larger reconstruction weight, or crops with more contrast"
            )
        return record

    def _batch(self, step: int) -> Tensor:
        """Return a step's crops, and have those of the next one drawn meanwhile."""

        def drawn(step: int) -> Tensor:
            return draw_batch(
                self._draw,
                seed=self.settings.seed,
                step=step,
                places=range(self._rank, self.settings.batch, self._processes),
                variation=self.settings.variation,
            )

        ahead, self._ahead = self._ahead, None
        image = ahead[1].result() if ahead is not None and ahead[0] == step else drawn(step)
        if step + 1 < self.settings.steps:
            self._ahead = (step + 1, self._reader.submit(drawn, step + 1))
        return image

    def _record(
        self, step: int, rate: float, loss: Tensor, ncuts: Tensor, error: Tensor, seen: Tensor
    ) -> TrainingStep:
        """Put the step's figures together, the same in all processes, so that all stop if one does."""
        values = torch.cat([torch.stack([loss.detach(), ncuts.detach(), error.detach()]), seen])
        if self._processes > 1:
            distributed.all_reduce(values)
            values /= self._processes
        total, cut, rebuilt, likeness, undecided, *shares = values.tolist()
        if not math.isfinite(total):
            raise TrainingError(
                f"step {step}: the loss is not finite (cut {cut}, error {rebuilt}); "
                "use a smaller learning rate, or float32"
            )
        return TrainingStep(step, total, cut, rebuilt, rate, min(shares), max(shares), likeness, undecided)

    def signs(self) -> dict[str, str]:
        """Return the signs that training goes wrong now: kind to message, with what to change."""
        return signs(
            self.history,
            ncuts_weight=self.settings.ncuts_weight,
            reconstruction_weight=self.settings.reconstruction_weight,
        )

    def state(self) -> dict[str, Tensor]:
        """Return all that the next steps depend on, as plain tensors on the CPU: copies."""
        state = {f"network.{key}": value for key, value in self.network.state_dict().items()}
        for name, parameter in self.network.named_parameters():
            for key, value in self._optimiser.state[parameter].items():
                state[f"adam.{key}.{name}"] = value
        state["history"] = torch.tensor([astuple(r) for r in self.history], dtype=torch.float64).reshape(
            len(self.history), len(fields(TrainingStep))
        )
        return {key: value.detach().cpu().contiguous().clone() for key, value in state.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` gave.

        Raises
        ------
        ValueError
            If it is the state of another network, or of more steps than there shall be.
        """
        try:
            rows = state["history"].tolist()
            history = [TrainingStep(int(row[0]), *row[1:]) for row in rows]
            if [r.step for r in history] != list(range(len(history))) or len(history) > self.settings.steps:
                raise ValueError(
                    f"the state is that of {len(history)} steps, the training is to have "
                    f"{self.settings.steps}"
                )
            prefix = "network."
            self.network.load_state_dict(
                {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
            )
            for name, parameter in self.network.named_parameters() if history else ():
                moments = {key: state[f"adam.{key}.{name}"] for key in ("exp_avg", "exp_avg_sq")}
                self._optimiser.state[parameter] = {
                    "step": state[f"adam.step.{name}"].clone(),
                    **{key: value.to(parameter.device, copy=True) for key, value in moments.items()},
                }
            self.history = history
        except (KeyError, RuntimeError, TypeError) as err:
            raise ValueError(f"this is not the state of a training of this network: {err}") from err


def train(
    network: WNet3D,
    draw: DrawCrop,
    *,
    device: str = "cpu",
    precision: str = "float32",
    progress: Callable[[TrainingStep], None] | None = None,
    warn: Callable[[str], None] | None = None,
    **settings: Any,
) -> list[TrainingStep]:
    """Train `network` in place, without labels.

    Parameters
    ----------
    network
        Trained in place, and left in evaluation mode.
    draw, device, precision
        See `Trainer`.
    progress
        Called after every step.
    warn
        Called once for each kind of sign that training goes wrong.
    **settings
        Of `TrainingSettings`: ``steps``, ``batch``, ``learning_rate``, ``seed``, and any of the others.

    Returns
    -------
    list of TrainingStep
        One for each step.

    Raises
    ------
    ValueError
        On an argument that cannot be used, or a crop of a wrong shape, dtype or range.
    TrainingError
        If a value is not finite, or if one class has taken everything.

    Notes
    -----
    The original steps the encoder and the whole network in the same manner: a weighted sum of the
    soft normalised cut and the reconstruction error (CellSeg3D; Adam, weight decay 0.01).
    """
    trainer = Trainer(network, draw, TrainingSettings(**settings), device=device, precision=precision)
    warned: set[str] = set()
    try:
        while len(trainer.history) < trainer.settings.steps:
            record = trainer.step()
            if progress is not None:
                progress(record)
            for kind, message in trainer.signs().items() if warn is not None else ():
                if warn is not None and kind not in warned:
                    warned.add(kind)
                    warn(message)
    finally:
        network.eval()
    return trainer.history


def learning_rate_factor(step: int, steps: int, warm_up: int, final: float) -> float:
    """Return the learning rate's factor: linear rise, then half a cosine down to `final`."""
    if step < warm_up:
        return (step + 1) / (warm_up + 1)
    done = (step - warm_up) / max(1, steps - warm_up)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * done))


def _reconstruction_error(reconstruction: Tensor, image: Tensor, kind: str) -> Tensor:
    if kind == "mse":
        return functional.mse_loss(reconstruction, image)
    return functional.binary_cross_entropy_with_logits(reconstruction, (image / INPUT_TOP).clamp(0, 1))


def arithmetic(device: str, precision: str) -> AbstractContextManager[object]:
    """Compute in ``float32``, or convolutions in ``bfloat16``."""
    if precision == "float32":
        return nullcontext()
    return torch.autocast(torch.device(device).type, torch.bfloat16)


def refuse_wrong_gradients(network: nn.Module, device: str, precision: str) -> None:
    """Let `network` raise ValueError where torch would compute wrong gradients, on a CPU in bfloat16.

    There the gradient of a 3x3x3 convolution's weights is memory that nobody wrote, now and then, where its
    input has 2 voxels along an axis (torch 2.13, seen in a fifth of the trials; right from 3 voxels on).
    """
    if precision == "bfloat16" and torch.device(device).type == "cpu":
        for module in network.modules():
            if isinstance(module, nn.Conv3d) and max(module.kernel_size) > 1:
                module.register_forward_pre_hook(_refuse_narrow)


def _refuse_narrow(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    extents = tuple(inputs[0].shape[2:])
    if torch.is_grad_enabled() and torch.is_autocast_enabled("cpu") and min(extents) < LEAST_IN_BFLOAT16:
        raise ValueError(
            f"these crops leave the coarsest level {' x '.join(map(str, extents))} voxels, where bfloat16's "
            f"gradients are wrong on CPUs: use float32, or crops that leave {LEAST_IN_BFLOAT16} or more"
        )


@contextmanager
def dropout_of(seed: int, step: int, rank: int, device: str) -> Iterator[None]:
    """Let seed, step and process determine torch's random numbers; the caller's come back after."""
    (drawn,) = np.random.SeedSequence((seed, step, rank, 1)).generate_state(1, np.uint64)
    where = torch.device(device)
    with torch.random.fork_rng(devices=[where] if where.type == "cuda" else []):
        torch.manual_seed(int(drawn >> np.uint64(1)))
        yield
