"""Weights in and out of files: strict, and without ever running code from a file.

safetensors files hold nothing but arrays; ``.pth`` files are opened with ``weights_only``. What a
file holds must be exactly what the network has: anything missing, extra or of another shape is listed.
Three sets of names are known, nothing between them: a whole network (``encoder.`` and ``decoder.``), an
encoder with that prefix, an encoder without it. A decoder is checked as strictly, though predicting
does without it: a file that is half right is the wrong file.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from braincensus_kernels.models.registry import COMPACT, REGISTRY
from braincensus_kernels.models.wnet3d import UNet, WNet3D

_LEVELS = ("in_b.module.4.weight", "conv1.module.6.weight", "conv2.module.6.weight", "bot.module.6.weight")


@dataclass(frozen=True)
class Weights:
    """An encoder's weights, with where they came from."""

    encoder: Mapping[str, Tensor] = field(repr=False)
    """Float32, keyed as `UNet.state_dict`."""
    channels: tuple[int, int, int, int]
    num_classes: int
    in_channels: int
    metadata: Mapping[str, str]
    sha256: str
    """Of the file."""
    source: str

    def build_encoder(self) -> UNet:
        """Return the encoder in evaluation mode; its forward ends in a softmax."""
        encoder = UNet(self.in_channels, self.num_classes, channels=self.channels, dropout=0.0, softmax=True)
        encoder.load_state_dict(dict(self.encoder), strict=True)
        return encoder.eval()


@dataclass(frozen=True)
class Checkpoint:
    """All that a file holds: the encoder, and the decoder if it is there."""

    weights: Weights
    decoder: Mapping[str, Tensor] | None = field(repr=False)
    """Float32, keyed as `UNet.state_dict`; None where the file holds an encoder alone."""

    @property
    def state(self) -> dict[str, Tensor]:
        """The state dict: of a `WNet3D`, or its encoder's part, with the prefix."""
        state = {f"encoder.{key}": value for key, value in self.weights.encoder.items()}
        return state | {f"decoder.{key}": value for key, value in (self.decoder or {}).items()}

    @property
    def parameters(self) -> int:
        """How many numbers there are."""
        return sum(value.numel() for value in self.state.values())

    def build_network(self) -> WNet3D:
        """Return the whole network in evaluation mode.

        Raises
        ------
        ValueError
            If there is no decoder.
        """
        if self.decoder is None:
            raise ValueError(f"{self.weights.source} holds an encoder alone, no whole network")
        weights = self.weights
        rebuilt = int(self.decoder["out_b.module.8.weight"].shape[0])
        network = WNet3D(
            weights.in_channels, rebuilt, weights.num_classes, channels=weights.channels, dropout=0.0
        )
        network.load_state_dict(self.state, strict=True)
        return network.eval()


def load_weights(source: str | Path) -> Weights:
    """Read the encoder's weights.

    Parameters
    ----------
    source
        ``"compact"`` for the shipped ones, or the path of a ``.safetensors``, ``.pth`` or ``.pt`` file:
        a state dict of a whole WNet3D (the decoder is dropped) or of an encoder alone, of any channels.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the file is of another kind, is damaged, would run code, or does not hold exactly an encoder or
        a whole network.

    Examples
    --------
    >>> load_weights("compact").channels
    (16, 32, 64, 128)
    """
    return load_checkpoint(source).weights


def load_checkpoint(source: str | Path) -> Checkpoint:
    """Read all that a file of weights holds; arguments and errors as `load_weights`.

    Examples
    --------
    >>> load_checkpoint("compact").parameters
    1581554
    """
    name = str(source)
    entry = REGISTRY.get(name)
    if entry is not None and entry.bundled is not None:
        data = resources.files("braincensus_kernels.models").joinpath("weights", entry.bundled)
        with resources.as_file(data) as path:
            return _load(path, name)
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}; give a .safetensors or .pth file, or {COMPACT!r}")
    return _load(path, name)


def save_weights(path: str | Path, state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Write a state dict as safetensors, all or nothing; returns the file's SHA-256.

    Raises
    ------
    ValueError
        If the path does not end in ``.safetensors`` or a value is not finite.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"weights are written as .safetensors, got {path.name!r}")
    arrays = {key: value.detach().cpu().contiguous().clone() for key, value in state.items()}
    check_finite(arrays, str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(suffix=".partial", prefix=path.name, dir=path.parent)
    os.close(handle)
    try:
        save_file(arrays, temporary, metadata=dict(metadata))
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return file_sha256(path)


def _load(path: Path, source: str) -> Checkpoint:
    state, metadata = read_state(path)
    encoder, decoder = _parts(state)
    channels, num_classes, in_channels = _infer_size(encoder, path)
    _check_strict("encoder", encoder, channels, (in_channels, num_classes), path)
    if decoder is not None:
        last = decoder.get("out_b.module.8.weight")
        rebuilt = in_channels if last is None or last.ndim == 0 else int(last.shape[0])
        _check_strict("decoder", decoder, channels, (num_classes, max(rebuilt, 1)), path)
    check_finite(state, str(path))
    weights = Weights(
        encoder=as_float32(encoder),
        channels=channels,
        num_classes=num_classes,
        in_channels=in_channels,
        metadata=metadata,
        sha256=file_sha256(path),
        source=source,
    )
    return Checkpoint(weights, None if decoder is None else as_float32(decoder))


def as_float32(part: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return plain float32 copies; integers stay what they are."""
    return {
        key: (value.detach().float() if value.is_floating_point() else value.detach()).contiguous()
        for key, value in part.items()
    }


def read_state(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a file's state dict and metadata, of whatever network, without running code from it.

    Raises
    ------
    ValueError
        If the file is of another kind, is damaged, or would run code.
    """
    suffix = path.suffix.lower()
    if suffix == ".safetensors":
        return _read_safetensors(path)
    if suffix in (".pth", ".pt"):
        return _read_pickle(path), {}
    raise ValueError(f"{path}: expected .safetensors, .pth or .pt, got {suffix or 'no extension'!r}")


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except SafetensorError as err:
        raise ValueError(f"{path} is not a readable safetensors file ({err}); it may be cut short") from err


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on old pickle protocols: what matters is whether it loads
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as err:
        raise ValueError(
            f"{path} is not a plain state dict of tensors, or is damaged ({type(err).__name__}); "
            "files that would run code when opened are refused"
        ) from err
    if not isinstance(loaded, Mapping) or not all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in loaded.items()
    ):
        raise ValueError(f"{path}: expected a state dict (names to tensors), got {type(loaded).__name__}")
    return cast(dict[str, Tensor], dict(loaded))


def _parts(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
    """Split into encoder and decoder, without their prefixes; a lone encoder may come without one."""
    if not any(key.startswith(("encoder.", "decoder.")) for key in state):
        return dict(state), None
    encoder: dict[str, Tensor] = {}
    decoder: dict[str, Tensor] = {}
    for key, value in state.items():
        if key.startswith("decoder."):
            decoder[key.removeprefix("decoder.")] = value
        else:  # a name without a prefix beside names with one is not the encoder's: kept, to be reported
            encoder[key.removeprefix("encoder.") if key.startswith("encoder.") else f"({key})"] = value
    return encoder, decoder or None


def _infer_size(encoder: Mapping[str, Tensor], path: Path) -> tuple[tuple[int, int, int, int], int, int]:
    needed = (*_LEVELS, "in_b.module.0.weight", "out_b.module.8.weight")
    absent = [key for key in needed if key not in encoder or encoder[key].ndim != 5]
    if absent:
        raise ValueError(f"{path} does not hold a WNet3D encoder: no {', '.join(absent)}")
    a, b, c, d = (int(encoder[key].shape[0]) for key in _LEVELS)
    if any(n < 4 or n % 4 for n in (a, b, c, d)):
        raise ValueError(
            f"{path} does not hold a WNet3D encoder: channels {(a, b, c, d)} are not multiples of 4"
        )
    classes = int(encoder["out_b.module.8.weight"].shape[0])
    return (a, b, c, d), classes, int(encoder["in_b.module.0.weight"].shape[1])


def _check_strict(
    kind: str,
    part: Mapping[str, Tensor],
    channels: tuple[int, int, int, int],
    ends: tuple[int, int],
    path: Path,
) -> None:
    """Compare names, shapes and kinds of number with a `UNet` of these channels in and out (`ends`)."""
    with torch.device("meta"):
        expected = UNet(*ends, channels=channels, dropout=0.0, softmax=False).state_dict()
    check_state(part, expected, f"a WNet3D {kind} of channels {channels}", path)


def check_state(
    state: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str, path: str | Path
) -> None:
    """Compare names, shapes and kinds of number with those of a network; its tensors may be on meta.

    Raises
    ------
    ValueError
        Listing all that is missing, unexpected, of another shape or of another kind of number.
    """
    missing = sorted(set(expected) - set(state))
    unexpected = sorted(set(state) - set(expected))
    both = sorted(set(expected) & set(state))
    misshaped = [
        f"{key}: {tuple(state[key].shape)} for {tuple(expected[key].shape)}"
        for key in both
        if state[key].shape != expected[key].shape
    ]
    kinds = [
        f"{key}: {state[key].dtype}"
        for key in both
        if state[key].is_floating_point() != expected[key].is_floating_point()
    ]
    if missing or unexpected or misshaped or kinds:
        listed = [
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", misshaped),
            ("of another kind of number", kinds),
        ]
        lines = [f"  {title}: {', '.join(keys)}" for title, keys in listed if keys]
        raise ValueError("\n".join([f"{path} does not hold exactly {what}", *lines]))


def check_finite(arrays: Mapping[str, Tensor], where: str) -> None:
    """Refuse NaN and infinity, by name.

    Raises
    ------
    ValueError
        If a value is not finite.
    """
    bad = [key for key, value in arrays.items() if not bool(torch.isfinite(value).all())]
    if bad:
        raise ValueError(f"{where}: values that are not finite in {', '.join(sorted(bad))}")


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
