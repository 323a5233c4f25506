"""Supervised training of SegResNet and SwinUNETR on volumes with labels: drawn by hand, or a census's own.

    1 volumes and labels -> pairs; blocks held out                 pairs.py
    2 sources                    range of tissue                   crops.py
    3 checkpoint?                go on from it                     record.py
    4 epoch by epoch             threshold, Dice, best weights     the kernels
    5 card, curve, weights       the weights last                  supervised_record.py

A census labels with WNet3D, which needs no labels itself; a network trained on that can do better than its
teacher: it sees many cells and few mistakes, and mistakes have nothing in common to be learnt.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from braincensus.errors import BraincensusError, ConfigError, OutputError, explain
from braincensus.store.files import writing
from braincensus.training.card import hardware
from braincensus.training.crops import Source, measure
from braincensus.training.pairs import (
    Block,
    Pair,
    Split,
    draw_labelled_crops,
    middles,
    pair,
    pair_of_census,
    split_blocks,
)
from braincensus.training.processes import processes
from braincensus.training.recipe import check_bfloat16
from braincensus.training.record import Places, load_checkpoint, save_checkpoint
from braincensus.training.supervised_record import Told, write_card, write_losses, write_picture
from braincensus.training.wnet3d import reproducible
from braincensus.volume import Volume, open_volume
from braincensus_kernels.models.supervised.augment import Augmentation
from braincensus_kernels.models.supervised.losses import LossName
from braincensus_kernels.models.supervised.networks import (
    EXTENT_STEP,
    KINDS,
    PUBLISHED_PERCENTILES,
    PUBLISHED_SIZE,
    TITLES,
    Kind,
    build_network,
    network_metadata,
    save_supervised,
)
from braincensus_kernels.models.supervised.predict import resolve_supervised_precision
from braincensus_kernels.models.supervised.training import (
    SupervisedEpoch,
    SupervisedSettings,
    SupervisedTrainer,
)
from braincensus_kernels.models.training_signs import TrainingError

PUBLISHED_BATCH: dict[Kind, int] = {"segresnet": 10, "swinunetr": 5}

_TRAINING_CROPS, _HELD_OUT_CROPS = 16, 32  # looked at after each epoch, at most
_PICTURED = 3
_MUCH_BETTER = 1.5
_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class SupervisedRecipe:
    """All that a supervised training depends on, but for volumes, labels and the machine. CellSeg3D's values.

    Attributes
    ----------
    kind, size
        Which network, and its features at full resolution; None for the published 8 and 48.
    epochs, steps_per_epoch
        How long. None: as many steps as it takes to see each block that is trained on once.
    batch
        Crops in each step; None for the published 10 (SegResNet) and 5 (SwinUNETR).
    crop_voxels
        Side of a crop, a multiple of 8 from 16 on (SegResNet), of 32 from 64 on (SwinUNETR).
    augment
        Whether crops are shifted in intensity, flipped, turned and deformed.
    validation_share
        Of the blocks: held out.
    precision
        ``float32`` or ``bfloat16``; ``auto`` is bfloat16 on a GPU that has it.
    """

    kind: Kind = "segresnet"
    size: int | None = None
    epochs: int = 50
    steps_per_epoch: int | None = None
    batch: int | None = None
    learning_rate: float = 1e-3
    crop_voxels: int = 64
    loss: LossName = "generalized-dice"
    augment: bool = True
    validation_share: float = 0.2
    seed: int = 0
    precision: str = "auto"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(explain("no such network", expected=" or ".join(KINDS), found=repr(self.kind)))
        step = EXTENT_STEP[self.kind]
        checks: tuple[tuple[str, Any, bool, str], ...] = (
            ("epochs", self.epochs, self.epochs >= 1, "1 or more"),
            ("steps_per_epoch", self.steps_per_epoch, (self.steps_per_epoch or 1) >= 1, "1 or more"),
            (
                "crop_voxels",
                self.crop_voxels,
                self.crop_voxels >= 2 * step and self.crop_voxels % step == 0,
                f"a multiple of {step}, {2 * step} or more, for {TITLES[self.kind]}",
            ),
            (
                "validation_share",
                self.validation_share,
                0 < self.validation_share <= 0.5,
                "above 0, up to 0.5",
            ),
            (
                "precision",
                self.precision,
                self.precision in ("auto", "float32", "bfloat16"),
                "auto, float32 or bfloat16",
            ),
        )
        for name, value, good, expected in checks:
            if not good:
                raise ConfigError(explain(f"{name} cannot be used", expected=expected, found=repr(value)))
        try:
            self.settings(1)
            network_metadata(self.kind, size=self.size)
        except ValueError as err:
            raise ConfigError(f"these training options cannot be used: {err}") from err

    def changed(self, **changes: Any) -> SupervisedRecipe:
        """Return a recipe with some values changed.

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
        return replace(self, **changes)

    def settled(self, training_blocks: int, device: str) -> SupervisedRecipe:
        """Return the recipe with everything that was left open decided."""
        batch = PUBLISHED_BATCH[self.kind] if self.batch is None else self.batch
        precision = resolve_supervised_precision(self.precision, device)
        check_bfloat16(precision, device, self.crop_voxels, step=EXTENT_STEP[self.kind])
        return replace(
            self,
            size=PUBLISHED_SIZE[self.kind] if self.size is None else self.size,
            batch=batch,
            steps_per_epoch=self.steps_per_epoch or max(1, -(-training_blocks // batch)),
            precision=precision,
        )

    def settings(self, steps: int) -> SupervisedSettings:
        """Return what the kernels' trainer needs to know."""
        return SupervisedSettings(
            steps=steps,
            batch=PUBLISHED_BATCH[self.kind] if self.batch is None else self.batch,
            learning_rate=self.learning_rate,
            seed=self.seed,
            loss=self.loss,
            augmentation=Augmentation() if self.augment else None,
            warm_up_steps=min(20, steps // 10),
        )


@dataclass(frozen=True)
class SupervisedResult:
    """What a supervised training wrote."""

    weights: Path
    card: Path
    losses: Path
    picture: Path
    sha256: str
    steps: int
    seconds: float
    best: SupervisedEpoch
    """The epoch whose weights were kept, with its threshold and its Dice."""
    warnings: tuple[str, ...]

    def __str__(self) -> str:
        """Summarise in one line."""
        best = self.best
        return (
            f"{self.steps} steps in {self.seconds / 60:.1f} min; epoch {best.epoch} is kept: "
            f"Dice {best.validation_dice:.3f} on what was held out, at threshold {best.threshold:g}; "
            f"about them: {self.card.name}, {self.losses.name}, {self.picture.name}"
        )


def train_supervised(
    pairs: Sequence[Pair],
    out: str | Path,
    *,
    recipe: SupervisedRecipe | None = None,
    device: str = "cpu",
    threads: int | None = None,
    overwrite: bool = False,
    resume: bool = False,
    checkpoint_every: int = 50,
    progress: Callable[[int, int], None] | None = None,
    message: Callable[[str], None] | None = None,
    **changes: Any,
) -> SupervisedResult:
    """Train SegResNet or SwinUNETR on labelled volumes, and write its weights.

    Parameters
    ----------
    pairs
        From `pair` or `pair_of_census`, of any size: labels of at most 1024 blocks are looked at, then one
        crop is read at a time. Each volume is mapped to [0, 1] by the 1st to 99th percentile of its tissue,
        as a run does it.
    out
        Where the weights go, ``.safetensors``. Beside them, under the same name: the model card (``.md``),
        the loss of every step and what was seen after every epoch (``.csv``), their curves with examples
        (``.png``), and while it goes on, the checkpoint (``.checkpoint.safetensors``).
    recipe
        All numbers of the training; None for `SupervisedRecipe`'s defaults.
    device
        ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
    threads
        CPU threads; None for torch's current setting.
    overwrite
        Whether existing files may be replaced.
    resume
        Go on from the checkpoint of an interrupted training, if there is one, else start.
    checkpoint_every
        Steps from one checkpoint to the next; there is one after each epoch, too.
    progress
        Called as ``progress(done, steps)``.
    message
        Called with one line whenever there is something to tell a person.
    **changes
        Values of the recipe to change: ``kind="swinunetr"``, ``epochs=100``.

    Raises
    ------
    ConfigError
        On an option that cannot be used, labels without cells, a volume smaller than a crop, or a checkpoint
        of another training.
    InputError
        On a volume that cannot be read, or holds NaN or one value only.
    OutputError
        If the output exists, or cannot be written.
    BraincensusError
        If training does not get anywhere; no weights are written then.

    Notes
    -----
    The same recipe on the same CPU with the same number of threads gives the same weights, interrupted or
    not. On a GPU the last bits may differ: the gradient of MONAI's upsampling is summed in any order there.
    """
    places = Places(Path(out))
    chosen = (recipe or SupervisedRecipe()).changed(**changes)
    if not pairs:
        raise ConfigError("no volume to train on")
    for name, value in (("threads", threads), ("checkpoint_every", checkpoint_every)):
        if value is not None and value < 1:
            raise ConfigError(explain(f"{name} cannot be used", expected="1 or more", found=str(value)))
    places.check(overwrite=overwrite, resume=resume)
    with processes(device) as group, reproducible(threads):
        if group.count > 1:
            raise ConfigError("supervised training uses one process; start it without torchrun")
        attempt = _Attempt(places, chosen, pairs, group.device, message)
        attempt.begin(resume=resume)
        attempt.walk(checkpoint_every=checkpoint_every, progress=progress)
        return attempt.finish()


def train_supervised_from_paths(
    inputs: Sequence[str | Path],
    out: str | Path,
    *,
    labels: Sequence[str | Path],
    from_census: Sequence[str | Path],
    voxel_size_um: tuple[float, float, float] | None,
    channel: int,
    level: int,
    **options: Any,
) -> SupervisedResult:
    """Open volumes and labels, or censuses, then do as `train_supervised`, whose options the others are."""
    if bool(labels) == bool(from_census):
        raise ConfigError(
            explain(
                "where the labels are is not clear",
                expected="--labels LABELS for each INPUT, or --from-census OUTPUT",
                found="both" if labels else "neither",
            )
        )
    volumes = [
        open_volume(path, channel=channel, level=level, voxel_size_um=voxel_size_um) for path in inputs
    ]
    given, what = (labels, "labels") if labels else (from_census, "censuses")
    if len(volumes) != len(given) and (labels or volumes):
        raise ConfigError(
            explain(
                f"volumes and {what} do not pair up",
                expected="one for each volume, in the same order",
                found=f"{len(volumes)} volumes, {len(given)} {what}",
            )
        )
    if labels:
        pairs = [
            pair(
                volume,
                open_volume(path, voxel_size_um=volume.voxel_size_um),
                labelled_by=Path(path).name,
            )
            for volume, path in zip(volumes, labels, strict=True)
        ]
    else:
        known: list[Volume | None] = [*volumes] or [None] * len(from_census)
        pairs = [pair_of_census(path, volume=volume) for path, volume in zip(from_census, known, strict=True)]
    return train_supervised(pairs, out, **options)


@dataclass
class _Attempt:
    """A training from where it begins or goes on to where it ends."""

    places: Places
    recipe: SupervisedRecipe
    pairs: Sequence[Pair]
    device: str
    message: Callable[[str], None] | None
    seconds: float = 0.0

    def begin(self, *, resume: bool) -> None:
        """Read what there is to learn from; make the network; bring it to where the checkpoint is."""
        side = self.recipe.crop_voxels
        self.sources: list[Source] = [
            measure(each.volume, side, percentiles=PUBLISHED_PERCENTILES) for each in self.pairs
        ]
        self.split: Split = split_blocks(
            self.pairs, side=side, share=self.recipe.validation_share, seed=self.recipe.seed
        )
        self.recipe = recipe = self.recipe.settled(len(self.split.training), self.device)
        assert recipe.steps_per_epoch is not None
        self.steps = recipe.epochs * recipe.steps_per_epoch
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            network = build_network(recipe.kind, size=recipe.size, patch_voxels=side)
        self.trainer = SupervisedTrainer(
            network,
            draw_labelled_crops(self.pairs, self.sources, self.split, side),
            recipe.settings(self.steps),
            device=self.device,
            precision=recipe.precision,
        )
        self.volumes = [
            {**source.about(), "labelled_by": each.labelled_by}
            for source, each in zip(self.sources, self.pairs, strict=True)
        ]
        self.about: dict[str, Any] = {
            "format": _FORMAT,
            "settings": asdict(recipe),
            "volumes": [
                {**about, "identity": each.volume.identity, "labels_identity": each.labels.identity}
                for about, each in zip(self.volumes, self.pairs, strict=True)
            ],
            "hardware": hardware(self.device, 1),
        }
        if resume and self.places.checkpoint.exists():
            self._restore()
        else:
            self.places.clear()
        done = len(self.trainer.history)
        self._say(
            f"{f'goes on after step {done} of' if done else 'trains for'} {self.steps} steps, "
            f"{recipe.steps_per_epoch} to an epoch, on {len(self.split.training)} blocks "
            f"({len(self.split.held_out)} held out); cells are {100 * self.split.cells_share:.2g} % of them"
        )

    def walk(self, *, checkpoint_every: int, progress: Callable[[int, int], None] | None) -> None:
        """Do the steps that are left."""
        trainer, per_epoch = self.trainer, self.recipe.steps_per_epoch
        assert per_epoch is not None
        if progress is not None:
            for done in range(1, len(trainer.history) + 1):
                progress(done, self.steps)
        started, before = time.monotonic(), self.seconds
        while len(trainer.history) < self.steps:
            try:
                done = trainer.step().step + 1
            except TrainingError as err:
                raise BraincensusError(
                    explain("the training was stopped; no weights were written", found=str(err))
                ) from err
            ended = done % per_epoch == 0
            if ended:
                self._end_epoch()
            self.seconds = before + time.monotonic() - started
            if ended or done % checkpoint_every == 0:
                save_checkpoint(
                    self.places.checkpoint, trainer.state(), {**self.about, "seconds": self.seconds}
                )
            if progress is not None:
                progress(done, self.steps)

    def finish(self) -> SupervisedResult:
        """Write what a finished training leaves: the best epoch's weights last."""
        recipe, places, trainer = self.recipe, self.places, self.trainer
        best = trainer.take_best()
        warnings = self._warnings(best)
        for text in warnings:
            self._say(text)
        metadata = {
            **network_metadata(
                recipe.kind,
                size=recipe.size,
                patch_voxels=recipe.crop_voxels,
                input_percentiles=PUBLISHED_PERCENTILES,
                threshold=best.threshold,
            ),
            "name": TITLES[recipe.kind],
            "braincensus": version("braincensus"),
            "settings": json.dumps(asdict(recipe), sort_keys=True),
            "volumes": json.dumps(self.volumes),
            "hardware": json.dumps(self.about["hardware"]),
            "seconds": f"{self.seconds:.0f}",
            "best_epoch": json.dumps(asdict(best)),
            "warnings": json.dumps(warnings),
        }
        write_losses(places.losses, trainer.history, trainer.epochs)
        with torch.inference_mode():
            examples = [
                (image, cells, self._predict(image))
                for image, cells in self._middles(_with_cells(self.split.held_out)[:_PICTURED])
            ]
        write_picture(places.picture, trainer.history, trainer.epochs, best, examples)
        with writing(places.weights):
            sha256 = save_supervised(places.weights, trainer.network, metadata)
        told = Told(
            title=TITLES[recipe.kind],
            version=version("braincensus"),
            sha256=sha256,
            settings=asdict(recipe),
            volumes=self.volumes,
            hardware=self.about["hardware"],
            split=self.split,
            epochs=trainer.epochs,
            best=best,
            steps=self.steps,
            seconds=self.seconds,
            parameters=sum(p.numel() for p in trainer.network.parameters() if p.requires_grad),
            percentiles=PUBLISHED_PERCENTILES,
            warnings=warnings,
        )
        write_card(places.card, told)
        places.checkpoint.unlink(missing_ok=True)
        return SupervisedResult(
            places.weights,
            places.card,
            places.losses,
            places.picture,
            sha256,
            self.steps,
            self.seconds,
            best,
            tuple(warnings),
        )

    def _restore(self) -> None:
        state, about = load_checkpoint(self.places.checkpoint)
        self.seconds = float(about.pop("seconds", 0.0))
        now = json.loads(json.dumps(self.about))
        differ = [
            f"{part}: {key} was {then.get(key)}, is {new.get(key)}"
            for part in ("settings", "hardware")
            for then, new in ((about.get(part, {}), now[part]),)
            for key in sorted({*then, *new})
            if then.get(key) != new.get(key)
        ]
        differ += [f"another {part}" for part in ("format", "volumes") if about.get(part) != now[part]]
        if differ:
            raise ConfigError(
                explain(
                    f"{self.places.checkpoint} is of another training",
                    expected="the same settings, volumes, labels and machine",
                    found="; ".join(differ),
                    remedy="the same command as before, or --overwrite to start again",
                )
            )
        try:
            self.trainer.restore(state)
        except ValueError as err:
            raise OutputError(explain(f"cannot go on from {self.places.checkpoint}", found=str(err))) from err

    def _end_epoch(self) -> None:
        epoch = self.trainer.end_epoch(
            self._middles(_spread(self.split.training, _TRAINING_CROPS)),
            self._middles(_spread(self.split.held_out, _HELD_OUT_CROPS)),
        )
        write_losses(self.places.losses, self.trainer.history, self.trainer.epochs)
        self._say(
            f"epoch {epoch.epoch} of {self.recipe.epochs}: loss {epoch.loss:.3f}, "
            f"Dice {epoch.training_dice:.3f} trained on, {epoch.validation_dice:.3f} held out, "
            f"at threshold {epoch.threshold:g}"
        )

    def _middles(self, blocks: Sequence[Block]) -> Any:
        return middles(self.pairs, self.sources, blocks, self.recipe.crop_voxels)

    def _predict(self, image: np.ndarray) -> np.ndarray:
        logits = self.trainer.network(torch.from_numpy(image)[None, None].to(self.device))
        probability: np.ndarray = torch.sigmoid(logits.float())[0, 0].cpu().numpy()
        return probability

    def _warnings(self, best: SupervisedEpoch) -> list[str]:
        found = []
        if best.validation_dice < min(_MUCH_BETTER * best.chance_dice, (1 + best.chance_dice) / 2):
            found.append(
                f"nothing much was learnt: Dice {best.validation_dice:.3f} on what was held out, where "
                f"calling every voxel a cell has {best.chance_dice:.3f}; train longer, or look at the labels"
            )
        return found

    def _say(self, text: str) -> None:
        if self.message is not None:
            self.message(text)


def _spread(blocks: Sequence[Block], count: int) -> list[Block]:
    """Return some of the blocks, with and without cells as often as among all."""
    places = np.linspace(0, len(blocks) - 1, min(count, len(blocks))).round().astype(int)
    return [blocks[int(i)] for i in places]


def _with_cells(blocks: Sequence[Block]) -> list[Block]:
    return sorted((b for b in blocks if b.cells), key=lambda b: -b.cells)
