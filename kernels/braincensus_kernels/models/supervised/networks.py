"""The two supervised networks, and their weights in and out of files. `training.py` and `predict.py` ask.

    kind, size -> build_network -> image (n, 1, z, y, x) in [0, 1] -> logit of foreground, same shape
    file -> load_supervised -> SupervisedWeights -> network

Architectures are MONAI's, of the sizes that CellSeg3D published, with one channel in and one out. Names and
shapes in files are those of MONAI's modules, so that published state dicts load strictly, and files written
here load there. SegResNet was published with a variational branch that regularises training; CellSeg3D
uses only the first output, so that the branch is never trained. It is checked like the rest and dropped.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from braincensus_kernels.models.checkpoints import (
    as_float32,
    check_finite,
    check_state,
    file_sha256,
    read_state,
    save_weights,
)
from braincensus_kernels.models.registry import REGISTRY

Kind = Literal["segresnet", "swinunetr"]
KINDS: tuple[Kind, ...] = get_args(Kind)

PUBLISHED_SIZE: Mapping[Kind, int] = {"segresnet": 8, "swinunetr": 48}
"""Features at full resolution: `init_filters` of SegResNet, `feature_size` of SwinUNETR."""
SIZE_STEP: Mapping[Kind, int] = {"segresnet": 8, "swinunetr": 12}
"""Sizes are multiples: of the groups of a norm, of the heads of an attention."""
EXTENT_STEP: Mapping[Kind, int] = {"segresnet": 8, "swinunetr": 32}
"""Extents of an input are multiples: SegResNet halves three times, SwinUNETR five."""
PUBLISHED_THRESHOLD: Mapping[Kind, float] = {"segresnet": 0.3, "swinunetr": 0.4}
"""Probability from which CellSeg3D takes a voxel as foreground."""
PUBLISHED_PERCENTILES = (1.0, 99.0)
"""Of the image's intensities: what is mapped to 0 and to 1."""

TITLES: Mapping[Kind, str] = {"segresnet": "SegResNet", "swinunetr": "SwinUNETR"}

_NETWORK = "network"
_PERCENTILES = "input_percentiles"
_THRESHOLD = "threshold"
_SMALLEST_VAE_FILTERS = 16
_FIRST: Mapping[Kind, str] = {
    "segresnet": "convInit.conv.weight",
    "swinunetr": "swinViT.patch_embed.proj.weight",
}


def build_network(kind: Kind, *, size: int | None = None, patch_voxels: int = 64) -> nn.Module:
    """Return a network with random weights, as for training.

    Parameters
    ----------
    kind
        ``segresnet`` (dropout 0.3) or ``swinunetr`` (version 2, dropout 0.5 of features and attention).
    size
        Features at full resolution; None for the published ones, 8 and 48.
    patch_voxels
        Side of the cubes on which it is trained. Only shapes of SegResNet's variational branch depend on it.

    Returns
    -------
    module
        Its forward takes (n, 1, z, y, x) in [0, 1], extents in multiples of 8 or 32, and gives logits of the
        same shape.

    Raises
    ------
    ValueError
        On an unknown kind, or a size or patch that the network cannot have.

    Examples
    --------
    >>> network = build_network("segresnet").eval()
    >>> tuple(network(torch.zeros(1, 1, 16, 16, 24)).shape)
    (1, 1, 16, 16, 24)
    """
    size = _checked_size(kind, size)
    least = 2 * EXTENT_STEP[kind]
    if patch_voxels < least or patch_voxels % EXTENT_STEP[kind]:
        raise ValueError(
            f"{TITLES[kind]} trains on patches of a multiple of {EXTENT_STEP[kind]} voxels, {least} or more, "
            f"got {patch_voxels}"
        )
    from braincensus_kernels.models.supervised.architectures import SegResNet, swinunetr

    return SegResNet(size, (patch_voxels,) * 3) if kind == "segresnet" else swinunetr(size)


@dataclass(frozen=True)
class SupervisedWeights:
    """A supervised network's weights, with where they came from."""

    state: Mapping[str, Tensor] = field(repr=False)
    """Float32, keyed as MONAI's module; without SegResNet's variational branch."""
    kind: Kind
    size: int
    metadata: Mapping[str, str]
    sha256: str
    """Of the file."""
    source: str
    input_percentiles: tuple[float, float]
    """Percentiles of tissue that the network takes as 0 and 1."""
    threshold: float
    """Probability from which a voxel is foreground: chosen in training, or the published one."""

    @property
    def channels(self) -> tuple[int]:
        """Features at full resolution."""
        return (self.size,)

    @property
    def parameters(self) -> int:
        """How many numbers are learnt."""
        return sum(value.numel() for value in self.state.values() if value.is_floating_point())

    def build(self) -> nn.Module:
        """Return the network in evaluation mode; its forward gives logits."""
        from braincensus_kernels.models.supervised.architectures import attend_in_parts

        network = _blank(self.kind, self.size, vae=False)
        attend_in_parts(network)
        network.load_state_dict(dict(self.state), strict=True)
        return network.eval().requires_grad_(False)


def network_metadata(
    kind: Kind,
    *,
    size: int | None = None,
    patch_voxels: int = 64,
    input_percentiles: tuple[float, float] = PUBLISHED_PERCENTILES,
    threshold: float | None = None,
) -> dict[str, str]:
    """Describe a network for its file: what `load_supervised` reads back.

    Parameters
    ----------
    kind, size, patch_voxels
        As given to `build_network`.
    input_percentiles
        Percentiles of tissue that were mapped to 0 and 1 in training.
    threshold
        Probability from which a voxel is foreground, if training chose one.

    Raises
    ------
    ValueError
        On values out of range.

    Examples
    --------
    >>> network_metadata("swinunetr", threshold=0.4)["network"]
    '{"kind": "swinunetr", "size": 48, "patch_voxels": 64}'
    """
    low, high = input_percentiles
    if not 0 <= low < high <= 100:
        raise ValueError(
            f"percentiles are two numbers from 0 to 100, low before high, got {input_percentiles}"
        )
    if threshold is not None and not 0 <= threshold <= 1:
        raise ValueError(f"a threshold is a probability, got {threshold}")
    described = {"kind": kind, "size": _checked_size(kind, size), "patch_voxels": patch_voxels}
    metadata = {_NETWORK: json.dumps(described), _PERCENTILES: json.dumps([float(low), float(high)])}
    if threshold is not None:
        metadata[_THRESHOLD] = json.dumps(float(threshold))
    return metadata


def save_supervised(path: str | Path, network: nn.Module, metadata: Mapping[str, str]) -> str:
    """Write a network as safetensors, all or nothing; returns the file's SHA-256.

    Parameters
    ----------
    path
        Ends in ``.safetensors``.
    network
        From `build_network`.
    metadata
        From `network_metadata`, with anything else that should be remembered.

    Raises
    ------
    ValueError
        If the network is not the one described, or a value is not finite.
    """
    state = network.state_dict()
    described = _described(metadata, path)
    if described is None:
        raise ValueError(f"the metadata of {path} does not say which network it is; see network_metadata")
    _check(state, *described, path)
    return save_weights(path, state, metadata)


def load_supervised(source: str | Path, *, kind: Kind | None = None) -> SupervisedWeights:
    """Read a supervised network's weights.

    Parameters
    ----------
    source
        Path of a ``.safetensors``, ``.pth`` or ``.pt`` file: a state dict of MONAI's module, of any size, for
        SegResNet with or without its variational branch.
    kind
        Which network it must be; None for whichever it is.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the file is damaged, would run code, or does not hold exactly such a network.
    """
    path = Path(source)
    if not path.is_file():
        entry = REGISTRY.get(str(source))
        raise FileNotFoundError(
            f"{entry.name} is published, not shipped: fetch it from {entry.published.home}, give the file"
            if entry is not None and entry.published is not None
            else f"no weights at {path}; give a .safetensors or .pth file of a supervised network"
        )
    state, metadata = read_state(path)
    found = _recognised(state, path)
    if kind is not None and found != kind:
        raise ValueError(
            f"{path} holds a {TITLES[found]}, expected a {TITLES[kind]}: choose the foreground "
            f"model {found}, or other weights"
        )
    described = _described(metadata, path)
    size = int(state[_FIRST[found]].shape[0])
    if described is not None and described != (found, size):
        raise ValueError(
            f"{path} is described as {described[0]} of size {described[1]}, but holds {found} of size {size}"
        )
    _check(state, found, size, path)
    check_finite(state, str(path))
    return SupervisedWeights(
        state=as_float32({key: value for key, value in state.items() if not _is_vae(key)}),
        kind=found,
        size=size,
        metadata=metadata,
        sha256=file_sha256(path),
        source=str(source),
        input_percentiles=_percentiles(metadata, path),
        threshold=_threshold(metadata, found, path),
    )


def _checked_size(kind: Kind, size: int | None) -> int:
    if kind not in KINDS:
        raise ValueError(f"a supervised network is {' or '.join(KINDS)}, got {kind!r}")
    if size is None:
        return PUBLISHED_SIZE[kind]
    if size < 1 or size % SIZE_STEP[kind]:
        raise ValueError(f"the size of {TITLES[kind]} is a multiple of {SIZE_STEP[kind]}, got {size}")
    return size


def _is_vae(name: str) -> bool:
    return name.startswith("vae_")


def _recognised(state: Mapping[str, Tensor], path: Path) -> Kind:
    """Tell the network by its first layer."""
    for kind in KINDS:
        first = state.get(_FIRST[kind])
        if first is not None and first.ndim == 5 and first.shape[0] and first.shape[0] % SIZE_STEP[kind] == 0:
            return kind
    likely = (
        "they are a WNet3D's, which needs no supervision: choose the foreground model wnet3d"
        if any("in_b.module" in key for key in state)
        else f"no {' and no '.join(_FIRST.values())}; found {', '.join(sorted(state)[:3]) or 'nothing'}"
    )
    raise ValueError(f"{path} holds neither SegResNet's nor SwinUNETR's weights: {likely}")


def _check(state: Mapping[str, Tensor], kind: Kind, size: int, path: str | Path) -> None:
    """Compare a state dict with MONAI's module, name by name; the variational branch may be absent whole."""
    vae = any(_is_vae(key) for key in state)
    expected = _blank(kind, size, vae=vae, inner=state.get("vae_fc1.weight")).state_dict()
    check_state(state, expected, f"MONAI's {TITLES[kind]} of size {size}, one channel in and out", path)
    wrong = [
        k for k, v in expected.items() if not v.is_floating_point() and not torch.equal(v, state[k].cpu())
    ]
    if wrong:
        raise ValueError(f"{path}: constants that are not MONAI's in {', '.join(wrong)}")


def _blank(kind: Kind, size: int, *, vae: bool, inner: Tensor | None = None) -> nn.Module:
    """Return a network to be filled, without touching the random numbers of whoever trains meanwhile.

    `inner` is the first layer inside SegResNet's variational branch, which tells the size of what was trained
    on: the product of the extents alone.
    """
    from braincensus_kernels.models.supervised.architectures import SegResNet

    with torch.random.fork_rng(devices=[]):
        if kind == "swinunetr":
            return build_network(kind, size=size)
        sixteenths = 4 * 4 * 4
        if inner is not None and inner.ndim == 2:
            sixteenths = max(1, int(inner.shape[1]) // _SMALLEST_VAE_FILTERS)
        network = SegResNet(size, (16 * sixteenths, 16, 16))
        if not vae:
            network.drop_vae()
        return network


def _described(metadata: Mapping[str, str], path: str | Path) -> tuple[Kind, int] | None:
    """Return what a file of ours says of its network."""
    if _NETWORK not in metadata:
        return None
    described = _parsed(metadata, _NETWORK, path)
    try:
        kind, size = described["kind"], described["size"]
        return kind, _checked_size(kind, int(size))
    except (KeyError, TypeError, ValueError) as err:
        raise ValueError(f"{path}: the metadata's {_NETWORK!r} is not a network's ({err})") from err


def _percentiles(metadata: Mapping[str, str], path: Path) -> tuple[float, float]:
    if _PERCENTILES not in metadata:
        return PUBLISHED_PERCENTILES
    found = _parsed(metadata, _PERCENTILES, path)
    if isinstance(found, list) and len(found) == 2 and all(isinstance(p, int | float) for p in found):
        low, high = float(found[0]), float(found[1])
        if 0 <= low < high <= 100:
            return low, high
    raise ValueError(f"{path}: the metadata's {_PERCENTILES!r} are not two percentiles, but {found!r}")


def _threshold(metadata: Mapping[str, str], kind: Kind, path: Path) -> float:
    if _THRESHOLD not in metadata:
        return PUBLISHED_THRESHOLD[kind]
    found = _parsed(metadata, _THRESHOLD, path)
    if isinstance(found, int | float) and 0 <= found <= 1:
        return float(found)
    raise ValueError(f"{path}: the metadata's {_THRESHOLD!r} is not a probability, but {found!r}")


def _parsed(metadata: Mapping[str, str], key: str, path: str | Path) -> Any:
    try:
        return json.loads(metadata[key])
    except ValueError as err:
        raise ValueError(f"{path}: the metadata's {key!r} is damaged ({err})") from err
