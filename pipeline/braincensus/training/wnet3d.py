"""Self-supervised training of WNet3D on volumes: beside the flow, before a run that uses the weights.

    1 volumes -> sources        range and place of tissue                      crops.py
    2 checkpoint?               go on from it, if it is that of this training  record.py
    3 step by step              losses, pictures, warnings, checkpoints        the kernels; record, pictures
    4 calibration               norms on windows of tissue, into the weights
    5 weights and model card    the weights last: they are what looks finished card.py

No labels are needed. What a step does depends on the recipe, the volumes and the step's number alone, so an
interrupted training goes on to the same bits. Several processes (torchrun) share each batch; all walk through
the same steps, the first alone reads what is read once, writes and talks.
"""

from __future__ import annotations

import json
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch

from braincensus.errors import BraincensusError, ConfigError, InputError, OutputError, explain
from braincensus.store.files import write_whole, writing
from braincensus.training.card import hardware, text_of_card
from braincensus.training.crops import (
    HIGH_PERCENTILE,
    LOW_PERCENTILE,
    Source,
    calibration_windows,
    draw_crops,
    measure,
)
from braincensus.training.pictures import choose_examples, draw_examples, save_pixels
from braincensus.training.processes import Processes, processes
from braincensus.training.recipe import Recipe
from braincensus.training.record import (
    Board,
    LossLog,
    Places,
    draw_losses,
    load_checkpoint,
    save_checkpoint,
)
from braincensus.volume import Volume, open_volume
from braincensus_kernels.models.calibrate import calibrate
from braincensus_kernels.models.checkpoints import save_weights
from braincensus_kernels.models.training import Trainer, TrainingError, TrainingStep
from braincensus_kernels.models.wnet3d import WNet3D

_PICTURES = 8  # over the whole training, where nothing else is asked for
_RECENT = 20  # steps, of which a message gives the mean
_CALIBRATION_WINDOWS = 8
_CALIBRATION_SIDE = 64
_FORMAT = 1


class TrainingInterruptedError(BraincensusError):
    """A training that was told to stop, and can go on."""

    def __init__(self, message: str, signal_number: int = signal.SIGINT) -> None:
        super().__init__(message)
        self.signal_number = signal_number


class TrainingWarning(UserWarning):
    """A sign that a training goes wrong."""


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
    foreground_class: int
    warnings: tuple[str, ...]

    def __str__(self) -> str:
        """Summarise in one line."""
        return (
            f"{self.steps} steps in {self.seconds / 60:.1f} min, loss {self.final_loss:.4g} at the end; "
            f"foreground is class {self.foreground_class}; "
            f"about them: {self.card.name}, {self.losses.name}, {self.picture.name}"
        )


def train_wnet3d(
    inputs: Sequence[Volume | str | Path],
    out: str | Path,
    *,
    recipe: Recipe | None = None,
    device: str = "cpu",
    threads: int | None = None,
    overwrite: bool = False,
    resume: bool = False,
    checkpoint_every: int = 100,
    picture_every: float | None = None,
    tensorboard: bool = False,
    progress: Callable[[int, int], None] | None = None,
    message: Callable[[str], None] | None = None,
    **changes: Any,
) -> TrainingResult:
    """Train WNet3D without labels, and write its weights.

    Parameters
    ----------
    inputs
        Volumes, or paths that hold their voxel size, of any size: 128 blocks of 128^3 spread over each are
        read to find its tissue and range, then one crop at a time.
    out
        Where the weights go, ``.safetensors``: encoder and decoder, and the calibration of the norms. Beside
        them, under the same name: the model card (``.md``), the loss of every step (``.csv``) and its curve
        (``.png``), pictures of what the network makes of three examples (``.pictures/``), and while it goes
        on, the checkpoint (``.checkpoint.safetensors``).
    recipe
        All numbers of the training; None for `Recipe`'s defaults. `Recipe.published` has CellSeg3D's.
    device
        ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
    threads
        CPU threads; None for torch's current setting.
    overwrite
        Whether existing files may be replaced.
    resume
        Go on from the checkpoint of an interrupted training, if there is one, else start.
    checkpoint_every
        Steps from one checkpoint to the next.
    picture_every
        Epochs from one picture of the examples to the next, fractions allowed; None for about eight over the
        whole training, 0 for none.
    tensorboard
        Whether to write TensorBoard's logs (``.tensorboard/``).
    progress
        Called as ``progress(done, steps)``.
    message
        Called with one line whenever there is something to tell a person. Without it, signs that the training
        goes wrong are given as `TrainingWarning`.
    **changes
        Values of the recipe to change: ``steps=2000``, ``channels=(64, 128, 256, 512)``.

    Returns
    -------
    TrainingResult
        In all processes.

    Raises
    ------
    ConfigError
        On an option that cannot be used, a volume smaller than a crop, or a checkpoint of another training.
    InputError
        On a volume that cannot be read, or holds NaN or one value only.
    OutputError
        If the output exists, or cannot be written.
    TrainingInterruptedError
        If it was told to stop, by Ctrl-C or SIGTERM: the step was finished, a checkpoint written.
    BraincensusError
        If training does not get anywhere; no weights are written then.

    Notes
    -----
    The same recipe on the same machine with the same number of threads and processes gives the same weights,
    interrupted or not. A checkpoint is removed once the weights are written: the learning rate has then
    come to its end, so that there is nothing to go on to, and it is three times as large as they are.
    """
    return _train(
        lambda: [item if isinstance(item, Volume) else open_volume(item) for item in inputs],
        len(inputs),
        Places(Path(out)),
        (recipe or Recipe()).changed(**changes),
        device=device,
        threads=threads,
        overwrite=overwrite,
        resume=resume,
        checkpoint_every=checkpoint_every,
        picture_every=picture_every,
        tensorboard=tensorboard,
        progress=progress,
        message=message,
    )


def train_from_paths(
    inputs: Sequence[str | Path],
    out: str | Path,
    *,
    voxel_size_um: tuple[float, float, float] | None,
    channel: int,
    level: int,
    recipe: Recipe | None = None,
    device: str = "cpu",
    threads: int | None = None,
    overwrite: bool = False,
    resume: bool = False,
    checkpoint_every: int = 100,
    picture_every: float | None = None,
    tensorboard: bool = False,
    progress: Callable[[int, int], None] | None = None,
    message: Callable[[str], None] | None = None,
    **changes: Any,
) -> TrainingResult:
    """Open the volumes, then do as `train_wnet3d`, whose options the others are."""
    return _train(
        lambda: [
            open_volume(path, channel=channel, level=level, voxel_size_um=voxel_size_um) for path in inputs
        ],
        len(inputs),
        Places(Path(out)),
        (recipe or Recipe()).changed(**changes),
        device=device,
        threads=threads,
        overwrite=overwrite,
        resume=resume,
        checkpoint_every=checkpoint_every,
        picture_every=picture_every,
        tensorboard=tensorboard,
        progress=progress,
        message=message,
    )


def _train(
    open_inputs: Callable[[], list[Volume]],
    number: int,
    places: Places,
    recipe: Recipe,
    *,
    device: str,
    threads: int | None,
    overwrite: bool,
    resume: bool,
    checkpoint_every: int,
    picture_every: float | None,
    tensorboard: bool,
    progress: Callable[[int, int], None] | None,
    message: Callable[[str], None] | None,
) -> TrainingResult:
    _check(number, threads, checkpoint_every, picture_every)
    with processes(device) as group, reproducible(threads):
        group.from_first(lambda: places.check(overwrite=overwrite, resume=resume))
        sources = group.from_first(lambda: [measure(volume, recipe.crop_voxels) for volume in open_inputs()])
        recipe = recipe.settled(sum(source.tissue_voxels for source in sources), group.device)
        attempt = _Attempt(places, recipe, sources, group, message)
        attempt.begin(resume=resume, tensorboard=tensorboard)
        try:
            attempt.walk(
                checkpoint_every=checkpoint_every,
                picture_steps=_picture_steps(picture_every, recipe),
                progress=progress,
            )
            return group.from_first(attempt.finish)
        finally:
            attempt.close()


@dataclass
class _Attempt:
    """One process's part of a training, from where it begins or goes on to where it ends."""

    places: Places
    recipe: Recipe
    sources: Sequence[Source]
    group: Processes
    message: Callable[[str], None] | None
    seconds: float = 0.0
    warned: dict[str, str] = field(default_factory=dict)
    """Kind of sign to what was said."""
    log: LossLog | None = None
    board: Board | None = None

    def begin(self, *, resume: bool, tensorboard: bool) -> None:
        """Make the network and its trainer; bring them to where the checkpoint is."""
        recipe, group = self.recipe, self.group
        assert recipe.steps is not None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            self.network = WNet3D(
                channels=recipe.channels, num_classes=recipe.num_classes, dropout=recipe.dropout
            )
        self.about = _about(recipe, self.sources, group)
        self.draw = draw_crops(self.sources, recipe.crop_voxels, recipe.input_range)
        try:
            self.trainer = Trainer(
                self.network,
                self.draw,
                recipe.settings(recipe.steps),
                device=group.device,
                precision=recipe.precision,
            )
        except ValueError as err:
            raise ConfigError(f"these training options cannot be used: {err}") from err
        state = group.from_first(lambda: self._checkpoint() if resume else None)
        if state is not None:
            try:
                self.trainer.restore(state)
            except ValueError as err:
                raise OutputError(
                    explain(f"cannot go on from {self.places.checkpoint}", found=str(err))
                ) from err
        if group.first:
            if state is None:
                self.places.clear()
            if tensorboard:
                self.board = Board(self.places.tensorboard, from_step=len(self.history))
                self.board.text("settings", _as_table(recipe.to_dict()), 0)
            self.log = LossLog(self.places.losses, self.history)
        begun = f"goes on after step {len(self.history)} of" if self.history else "trains for"
        self.say(f"{begun} {recipe.steps} steps; an epoch is {recipe.steps_per_epoch} of them")

    @property
    def history(self) -> list[TrainingStep]:
        """What the steps so far gave."""
        return self.trainer.history

    def walk(
        self,
        *,
        checkpoint_every: int,
        picture_steps: set[int],
        progress: Callable[[int, int], None] | None,
    ) -> None:
        """Do the steps that are left."""
        steps = self.trainer.settings.steps
        examples = choose_examples(self.draw, self.recipe.seed) if picture_steps and self.group.first else []
        if progress is not None and self.group.first:
            for done in range(1, len(self.history) + 1):
                progress(done, steps)
        started, before = time.monotonic(), self.seconds
        with _stop_signals() as stop:
            while len(self.history) < steps:
                try:
                    record = self.trainer.step()
                except TrainingError as err:
                    raise self._got_nowhere(err) from err
                except (BraincensusError, OSError) as err:
                    raise self._could_not_read(err) from err
                done = record.step + 1
                self.seconds = before + time.monotonic() - started
                if self.group.first:
                    self._note(record)
                    if done in picture_steps:
                        self._picture(done, examples)
                    if progress is not None:
                        progress(done, steps)
                stopped = self.group.any(stop.number) if done < steps else 0
                if self.group.first and (done % checkpoint_every == 0 or done == steps or stopped):
                    self._save()
                if stopped:
                    raise TrainingInterruptedError(
                        explain(
                            f"stopped after step {done} of {steps}, as {signal.Signals(stopped).name} asked",
                            found=f"all that is needed to go on, in {self.places.checkpoint}",
                            remedy="the same command with --resume (resume=True)",
                        ),
                        stopped,
                    )

    def finish(self) -> TrainingResult:
        """Calibrate, and write what a finished training leaves."""
        recipe, places = self.recipe, self.places
        self.network.eval()
        side = min(_CALIBRATION_SIDE, recipe.crop_voxels)
        windows, where = calibration_windows(
            self.sources, side=side, count=_CALIBRATION_WINDOWS, seed=recipe.seed
        )
        self.say(f"calibrates on {len(windows)} windows of {side}^3 voxels")
        statistics = calibrate(self.network.encoder, windows, device=self.group.device)
        names = ", ".join(dict.fromkeys(str(window["volume"]) for window in where))
        of = (
            f"{len(windows)} windows of {side}^3 voxels of tissue of {names}, 0 to 100 from percentile "
            f"{LOW_PERCENTILE:g} to {HIGH_PERCENTILE:g} of tissue"
        )
        history, tail = self.history, self.history[-max(1, len(self.history) // 10) :]
        final_loss = float(np.mean([record.loss for record in tail]))
        self._curve()
        volumes = [source.about() for source in self.sources]
        metadata = {
            "name": "WNet3D",
            "braincensus": version("braincensus"),
            "settings": json.dumps(recipe.to_dict(), sort_keys=True),
            "volumes": json.dumps(volumes),
            "hardware": json.dumps(self.about["hardware"]),
            "seconds": f"{self.seconds:.0f}",
            "final_loss": f"{final_loss:.6g}",
            "warnings": json.dumps(list(self.warned.values())),
            "calibration": statistics.to_json(),
            "calibration_of": of,
            "calibration_windows": json.dumps(where),
        }
        state = self.network.state_dict()
        with writing(places.weights):
            sha256 = save_weights(places.weights, state, metadata)
        card = text_of_card(
            version=version("braincensus"),
            name=places.weights.stem,
            sha256=sha256,
            settings=recipe.to_dict(),
            volumes=volumes,
            machine=self.about["hardware"],
            history=history,
            seconds=self.seconds,
            warnings_seen=list(self.warned.values()),
            statistics=statistics,
            calibration_of=of,
            parameters=sum(value.numel() for value in state.values()),
        )
        write_whole(places.card, lambda file: file.write(card.encode()), durable=False)
        with writing(places.checkpoint):
            places.checkpoint.unlink(missing_ok=True)
        return TrainingResult(
            places.weights,
            places.card,
            places.losses,
            places.picture,
            sha256,
            len(history),
            self.seconds,
            final_loss,
            statistics.foreground_class,
            tuple(self.warned.values()),
        )

    def say(self, text: str) -> None:
        """Tell a person, from the first process."""
        if self.message is not None and self.group.first:
            self.message(text)

    def close(self) -> None:
        """Let go of the files."""
        if self.log is not None:
            self.log.close()
        if self.board is not None:
            self.board.close()

    def _checkpoint(self) -> dict[str, torch.Tensor] | None:
        """Read the checkpoint, if there is one, and refuse it if it is that of another training."""
        path = self.places.checkpoint
        if not path.exists():
            self.say(f"no checkpoint at {path}: nothing to go on from")
            return None
        state, about = load_checkpoint(path)
        if about.get("format") != _FORMAT:
            raise OutputError(explain(f"cannot go on from {path}", found="a checkpoint of another version"))
        now = json.loads(json.dumps(self.about))
        differing = [
            *_differences(about["settings"], now["settings"]),
            *_differences(
                {f"volume {k}": v for k, v in enumerate(about["volumes"])},
                {f"volume {k}": v for k, v in enumerate(now["volumes"])},
            ),
        ]
        if differing:
            raise ConfigError(
                explain(
                    f"{path} is the checkpoint of another training",
                    found="; ".join(differing),
                    remedy="give the same volumes and options as then, or start again: --overwrite",
                )
            )
        other = _differences(about["hardware"], now["hardware"])
        if other:
            self.say(f"goes on elsewhere, so not to the same bits: {'; '.join(other)}")
        self.seconds, self.warned = float(about["seconds"]), dict(about["warnings"])
        return state

    def _save(self) -> None:
        about = {**self.about, "seconds": self.seconds, "warnings": self.warned}
        save_checkpoint(self.places.checkpoint, self.trainer.state(), about)
        done, steps = len(self.history), self.trainer.settings.steps
        recent = self.history[-_RECENT:]
        loss, cut, error = (
            float(np.mean([getattr(r, name) for r in recent])) for name in ("loss", "ncuts", "reconstruction")
        )
        minutes = self.seconds / done * (steps - done) / 60
        left = f"about {minutes:.0f} min" if minutes >= 1 else "less than a minute"
        self.say(
            f"step {done} of {steps}: loss {loss:.4g} (cut {cut:.4g}, reconstruction {error:.4g}), smallest "
            f"class {recent[-1].smallest_class:.3f}; {left} left"
        )
        if done < steps:  # else `finish` draws it
            self._curve()

    def _note(self, record: TrainingStep) -> None:
        """Record a step, and say so if training goes wrong."""
        assert self.log is not None
        self.log.append(record)
        if self.board is not None:
            self.board.append(record)
        for kind, text in self.trainer.signs().items():
            if kind in self.warned:
                continue
            told = f"step {record.step + 1}: {text}"
            self.warned[kind] = told
            if self.board is not None:
                self.board.text("warnings", told, record.step)
            if self.message is None:
                warnings.warn(told, TrainingWarning, stacklevel=2)
            else:
                self.say(f"warning: {told}")

    def _curve(self) -> None:
        write_whole(
            self.places.picture,
            lambda file: draw_losses(
                file,
                self.history,
                steps_per_epoch=self.recipe.steps_per_epoch or 1,
                reconstruction=self.recipe.reconstruction,
            ),
            durable=False,
        )

    def _picture(self, done: int, examples: list[Any]) -> None:
        assert self.recipe.steps_per_epoch is not None
        title = (
            f"{self.places.weights.stem}: epoch {done / self.recipe.steps_per_epoch:.3g}, step {done}, "
            f"loss {self.history[-1].loss:.4g}"
        )
        pixels = draw_examples(
            self.network,
            examples,
            title=title,
            reconstruction=self.recipe.reconstruction,
            device=self.group.device,
        )
        path = self.places.pictures / f"step-{done:06d}.png"
        write_whole(path, lambda file: save_pixels(file, pixels), durable=False)
        if self.board is not None:
            self.board.picture(done, pixels)

    def _got_nowhere(self, err: TrainingError) -> BraincensusError:
        """Give up: the checkpoint would lead here again. Losses and their curve stay, to be looked at."""
        if self.group.first:
            with writing(self.places.checkpoint):
                self.places.checkpoint.unlink(missing_ok=True)
            if self.history:
                self._curve()
        return BraincensusError(
            explain(
                "the training was stopped; no weights were written",
                found=str(err),
                remedy=f"look at {self.places.losses.name}; start again with --overwrite",
            )
        )

    def _could_not_read(self, err: Exception) -> BraincensusError:
        """Keep what was done until a crop could not be read."""
        if self.group.first and self.history:
            self._save()
        remedy = "\n  then: the same command with --resume (resume=True)" if self.history else ""
        kind = type(err) if isinstance(err, BraincensusError) else InputError
        return kind(f"{err}{remedy}")


def _check(number: int, threads: int | None, checkpoint_every: int, picture_every: float | None) -> None:
    if not number:
        raise ConfigError("no volume to train on")
    for name, value, good, expected in (
        ("threads", threads, threads is None or threads >= 1, "1 or more"),
        ("checkpoint_every", checkpoint_every, checkpoint_every >= 1, "1 step or more"),
        ("picture_every", picture_every, picture_every is None or picture_every >= 0, "0 epochs or more"),
    ):
        if not good:
            raise ConfigError(explain(f"{name} cannot be used", expected=expected, found=repr(value)))


def _picture_steps(every: float | None, recipe: Recipe) -> set[int]:
    """Return after which steps the examples are drawn: the last one among them."""
    assert recipe.steps is not None
    assert recipe.steps_per_epoch is not None
    if every == 0:
        return set()
    apart = recipe.steps / _PICTURES if every is None else every * recipe.steps_per_epoch
    count = int(recipe.steps / max(apart, 1.0))
    return {round(k * max(apart, 1.0)) for k in range(1, count + 1)} | {recipe.steps}


def _about(recipe: Recipe, sources: Sequence[Source], group: Processes) -> dict[str, Any]:
    """Return what makes this training this one."""
    return {
        "format": _FORMAT,
        "settings": recipe.to_dict(),
        "volumes": [
            {
                **source.about(),
                # A copy elsewhere is the same volume: its range, above, is that of its voxels.
                "identity": {
                    k: v for k, v in source.volume.identity.items() if k not in ("path", "mtime_ns")
                },
            }
            for source in sources
        ],
        "hardware": hardware(group.device, group.count),
    }


def _differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """List what differs, for a message."""
    return [
        f"{key} was {_short(then.get(key))}, is {_short(now.get(key))}"
        for key in sorted({*then, *now})
        if then.get(key) != now.get(key)
    ]


def _short(value: Any) -> str:
    if isinstance(value, Mapping) and "name" in value:
        return f"{value['name']} {value.get('shape')} {json.dumps(value.get('identity', {}))}"
    return "nothing" if value is None else json.dumps(value)


def _as_table(settings: Mapping[str, Any]) -> str:
    return "\n".join(["| setting | value |", "|---|---|", *(f"| {k} | {v} |" for k, v in settings.items())])


@contextmanager
def reproducible(threads: int | None) -> Iterator[None]:
    """Set what the bits depend on: CPU threads, and CUDA's choice of algorithms; put it back after."""
    before, chosen, tried = (
        torch.get_num_threads(),
        torch.backends.cudnn.deterministic,
        torch.backends.cudnn.benchmark,
    )
    if threads is not None:
        torch.set_num_threads(threads)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    try:
        yield
    finally:
        torch.set_num_threads(before)
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = chosen, tried


class _Stop:
    """The signal that asked to stop; 0 as long as none did."""

    number = 0


@contextmanager
def _stop_signals() -> Iterator[_Stop]:
    """Let the first Ctrl-C or SIGTERM be noted, to be heeded after the step; a second one acts at once."""
    stop = _Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, _: FrameType | None) -> None:
        stop.number = number
        for each, handler in before.items():
            signal.signal(each, handler)

    for number in before:
        signal.signal(number, note)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
