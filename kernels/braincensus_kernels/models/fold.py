"""Turn an encoder with frozen norms into fewer, cheaper convolutions that compute the same thing.

With frozen statistics a norm is ``scale * x + shift``, so everything between two ReLUs is linear,
and neighbouring linear layers become one:

1. a norm goes into the convolution after it (through max pooling too: see `Convolution.upper`);
2. a 3x3x3 convolution and the 1x1x1 after it become one 3x3x3 where that is less work;
3. a transposed convolution and the 3x3x3 after it become one 2x2x2 convolution at the coarse
   resolution with eight times the channels, one set for each of the eight positions of a fine voxel
   in its coarse one: 8 products where there were 27;
4. of two classes only the difference of their logits matters;
5. the coarser levels are left out if no input in [0, 100] lets them move a logit by more than 1e-6, by
   interval arithmetic: weight decay can silence levels that training did not use.

Exact only where nothing is padded between the layers, so `predict.py` convolves without padding.
Steps 2 and 3 save 27 % of the multiply-adds of the published size; arithmetic here is float64.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from itertools import product
from typing import cast

import torch
from torch import Tensor, nn

from braincensus_kernels.models import winograd
from braincensus_kernels.models.calibrate import NormStatistics, affine_of_norm
from braincensus_kernels.models.training import INPUT_TOP
from braincensus_kernels.models.winograd import Winograd
from braincensus_kernels.models.wnet3d import UNet

_SILENT_LOGIT = 1e-6

Affine = tuple[Tensor, Tensor]
"""Scale and shift of each channel."""

# Along one axis, which (3-tap index, 2-tap index) pairs meet at tap k of slot r. Slot 0 is the odd fine
# voxel of coarse voxel j and slot 1 the even one of j + 1: neighbours, that see coarse j and j + 1 alone.
_MEETINGS: dict[tuple[int, int], tuple[tuple[int, int], ...]] = {
    (0, 0): ((0, 0), (1, 1)),
    (0, 1): ((2, 0),),
    (1, 0): ((0, 1),),
    (1, 1): ((1, 0), (2, 1)),
}


@dataclass(frozen=True)
class Convolution:
    """An unpadded convolution, and what follows it.

    `upper` is None for a ReLU or nothing. Otherwise it tells, for each channel, whether the ReLU is mirrored:
    where the norm's scale is negative, the channel's sign is flipped before pooling, because the maximum of
    ``-|s| x`` is minus the minimum. The activation is then ``min(x, 0)`` for those channels.
    """

    weight: Tensor
    bias: Tensor | None
    relu: bool = True
    upper: Tensor | None = None
    bounds: tuple[Tensor, Tensor] | None = None
    """What `upper` means to ``clamp``: least and largest value of each channel (made by `to`)."""
    fast: Winograd | None = None
    """The same, faster on a CPU in float32, where there is a way (made by `to`); it clamps, too."""

    def to(self, device: str, dtype: torch.dtype) -> Convolution:
        """Return a copy in the arithmetic of the network."""
        weight = self.weight.to(device, dtype).contiguous(memory_format=torch.channels_last_3d)
        bias = None if self.bias is None else self.bias.to(device, dtype)
        ready = replace(self, weight=weight, bias=bias)
        if torch.device(device).type == "cpu" and dtype is torch.float32 and winograd.pays(self.weight):
            return replace(ready, weight=weight[:, :, :1, :1, :1], fast=self._winograd())  # not both forms
        if self.upper is None:
            return ready
        low, high = (part.to(device, dtype).view(1, -1, 1, 1, 1) for part in self._clamp())
        return replace(ready, bounds=(low, high))

    def _clamp(self) -> tuple[Tensor, Tensor]:
        """Least and largest value of each channel."""
        channels = self.weight.shape[0]
        if self.upper is not None:
            return torch.where(self.upper, -torch.inf, 0.0), torch.where(self.upper, 0.0, torch.inf)
        low = torch.full((channels,), 0.0 if self.relu else -torch.inf)
        return low, torch.full((channels,), torch.inf)

    def _winograd(self) -> Winograd:
        bias = torch.zeros(self.weight.shape[0]) if self.bias is None else self.bias
        floats = [part.float().cpu().numpy() for part in (bias, *self._clamp())]
        return Winograd(winograd.transform(self.weight), *floats)


@dataclass(frozen=True)
class UpStep:
    """A block of the way up: `skip` on the finer features plus `up` on the coarser ones, ReLU, `second`."""

    skip: Convolution
    up: Convolution | Tensor
    """Eight times the channels of `skip`, slots in order z, y, x, channel; or, where the coarser levels are
    left out, what they give: a constant (2, 2, 2, channels)."""
    second: Convolution

    def to(self, device: str, dtype: torch.dtype) -> UpStep:
        """Return a copy in the arithmetic of the network."""
        up = self.up.to(device, dtype)
        return UpStep(self.skip.to(device, dtype), up, self.second.to(device, dtype))


@dataclass(frozen=True)
class FoldedEncoder:
    """The whole encoder for inference, without a norm."""

    down: tuple[tuple[Convolution, ...], ...]
    """Of the levels that matter, full resolution first."""
    up: tuple[UpStep, ...]
    """To the quarter, half and full resolution, or the last of these; full resolution last."""
    head_weight: Tensor
    """(1, channels): logit of foreground against the other; if K > 2, (K, channels), foreground first."""
    head_bias: Tensor

    def to(self, device: str, dtype: torch.dtype) -> FoldedEncoder:
        """Return a copy in the arithmetic of the network; the head stays in float32."""
        return FoldedEncoder(
            tuple(tuple(conv.to(device, dtype) for conv in level) for level in self.down),
            tuple(step.to(device, dtype) for step in self.up),
            self.head_weight.to(device, torch.float32),
            self.head_bias.to(device, torch.float32),
        )


class FrozenNorm(nn.Module):
    """``scale * x + shift`` per channel: what a GroupNorm is once its statistics are fixed."""

    scale: Tensor
    shift: Tensor

    def __init__(self, scale: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale.float().view(1, -1, 1, 1, 1))
        self.register_buffer("shift", shift.float().view(1, -1, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Return the normed features."""
        return x * self.scale + self.shift


def freeze(encoder: UNet, statistics: NormStatistics) -> UNet:
    """Return a copy of the encoder whose norms use these statistics, otherwise as it was: the reference.

    Raises
    ------
    ValueError
        If the statistics are of another network.
    """
    frozen = copy.deepcopy(encoder).eval()
    for name, norm in _norms(frozen).items():
        block, _, index = name.split(".")
        scale, shift = _frozen_affine(norm, name, statistics)
        getattr(frozen, block).module[int(index)] = FrozenNorm(scale, shift)
    return frozen


def fold(encoder: UNet, statistics: NormStatistics) -> FoldedEncoder:
    """Fold the frozen norms, and linear pairs, of an encoder.

    Raises
    ------
    ValueError
        If the statistics are of another network, or there are fewer than two classes.
    """
    affine = {name: _frozen_affine(norm, name, statistics) for name, norm in _norms(encoder).items()}
    in_b, into_half = _down(encoder, affine, "in_b", None)
    conv1, into_quarter = _down(encoder, affine, "conv1", into_half)
    conv2, into_eighth = _down(encoder, affine, "conv2", into_quarter)
    bot, from_eighth = _down(encoder, affine, "bot", into_eighth)
    deconv2, from_quarter = _up(encoder, affine, "deconv2", encoder.conv_trans2, into_eighth, from_eighth)
    deconv3, from_half = _up(encoder, affine, "deconv3", encoder.conv_trans3, into_quarter, from_quarter)
    out_b, into_head = _up(encoder, affine, "out_b", encoder.conv_trans_out, into_half, from_half)

    weight, bias = _fold_input(*_linear(encoder.out_b.module[8]), into_head)
    assert bias is not None
    classes, foreground = weight.shape[0], statistics.foreground_class
    if classes < 2:
        raise ValueError(f"an encoder of {classes} class tells nothing apart")
    rows = weight.reshape(classes, -1)
    if classes == 2:
        rows, bias = (
            (rows[foreground] - rows[1 - foreground])[None],
            (bias[foreground] - bias[1 - foreground])[None],
        )
    else:
        order = [foreground, *(k for k in range(classes) if k != foreground)]
        rows, bias = rows[order], bias[order]
    return _without_silent_levels(
        FoldedEncoder((in_b, conv1, conv2, bot), (deconv2, deconv3, out_b), rows, bias)
    )


def _norms(encoder: UNet) -> dict[str, nn.GroupNorm]:
    return {name: m for name, m in encoder.named_modules() if isinstance(m, nn.GroupNorm)}


def _frozen_affine(norm: nn.GroupNorm, name: str, statistics: NormStatistics) -> Affine:
    if name not in statistics.mean or statistics.mean[name].shape != (norm.num_groups,):
        raise ValueError(f"the norm statistics are of another network: none of the right size for {name}")
    return affine_of_norm(norm, statistics.mean[name], statistics.variance[name])


def _linear(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight and bias of a convolution, float64 on the CPU."""
    conv = cast(nn.Conv3d, layer)
    assert conv.bias is not None
    return conv.weight.detach().double().cpu(), conv.bias.detach().double().cpu()


def _fold_input(weight: Tensor, bias: Tensor, affine: Affine | None) -> tuple[Tensor, Tensor]:
    """Let the convolution take the features as they were before ``scale * x + shift``."""
    if affine is None:
        return weight, bias
    scale, shift = affine
    return weight * scale.view(1, -1, 1, 1, 1), bias + torch.einsum("oizyx,i->o", weight, shift)


def _then_pointwise(weight: Tensor, bias: Tensor, layer: nn.Module) -> tuple[Tensor, Tensor]:
    """Append a 1x1x1 convolution."""
    point, point_bias = _linear(layer)
    point = point[:, :, 0, 0, 0]
    return torch.einsum("om,mizyx->oizyx", point, weight), point @ bias + point_bias


def _layers(encoder: UNet, block: str) -> tuple[list[nn.Module], list[nn.Module], str, str]:
    """Convolutions of the two halves of a block, and the names of their norms."""
    layers = getattr(encoder, block).module
    convs = [isinstance(layer, nn.Conv3d) for layer in layers]
    norms = [i for i, layer in enumerate(layers) if isinstance(layer, nn.GroupNorm)]
    first = [layers[i] for i in range(norms[0]) if convs[i]]
    second = [layers[i] for i in range(norms[0], norms[1]) if convs[i]]
    return first, second, f"{block}.module.{norms[0]}", f"{block}.module.{norms[1]}"


def _half_block(layers: list[nn.Module], affine: Affine | None) -> list[tuple[Tensor, Tensor]]:
    """One half of a block: 3x3x3, and the 1x1x1 after it, joined where that is less work."""
    weight, bias = _fold_input(*_linear(layers[0]), affine)
    if len(layers) == 1:
        return [(weight, bias)]
    point, point_bias = _linear(layers[1])
    apart = weight.numel() + point.numel()
    if point.shape[0] * weight.shape[1] * 27 <= apart:
        return [_then_pointwise(weight, bias, layers[1])]
    return [(weight, bias), (point, point_bias)]


def _down(
    encoder: UNet, affine: dict[str, Affine], block: str, before: Affine | None
) -> tuple[tuple[Convolution, ...], Affine]:
    """Fold a block of the way down; returns it and the affine that its output still needs."""
    first, second, first_norm, second_norm = _layers(encoder, block)
    parts = _half_block(first, before)
    convs = [Convolution(w, b, relu=i == len(parts) - 1) for i, (w, b) in enumerate(parts)]
    parts = _half_block(second, affine[first_norm])
    convs += [Convolution(w, b, relu=i == len(parts) - 1) for i, (w, b) in enumerate(parts)]
    scale, shift = affine[second_norm]
    flipped = scale < 0
    if bool(flipped.any()):
        sign = torch.where(flipped, -1.0, 1.0).double()
        last = convs[-1]
        assert last.bias is not None
        convs[-1] = Convolution(last.weight * sign.view(-1, 1, 1, 1, 1), last.bias * sign, upper=flipped)
    return tuple(convs), (scale.abs(), shift)


def _up(
    encoder: UNet,
    affine: dict[str, Affine],
    block: str,
    transposed: nn.ConvTranspose3d,
    skip_affine: Affine,
    coarse_affine: Affine,
) -> tuple[UpStep, Affine]:
    """Fold a block of the way up with the transposed convolution before it."""
    first, second, first_norm, second_norm = _layers(encoder, block)
    if block == "out_b":
        second = second[:1]  # the 1x1x1 after the last norm is the head
    weight, bias = _linear(first[0])
    if len(first) == 2:
        weight, bias = _then_pointwise(weight, bias, first[1])
    from_skip = skip_affine[0].numel()
    skip_weight, bias = _fold_input(weight[:, :from_skip], bias, skip_affine)
    up_weight, bias = _compose_up(weight[:, from_skip:], bias, transposed)
    up_weight, up_bias = _fold_input(up_weight, bias, coarse_affine)
    ((second_weight, second_bias),) = _half_block(second, affine[first_norm])
    step = UpStep(
        skip=Convolution(skip_weight, None, relu=False),
        up=Convolution(up_weight, up_bias, relu=False),
        second=Convolution(second_weight, second_bias),
    )
    return step, affine[second_norm]


def _compose_up(weight: Tensor, bias: Tensor, transposed: nn.ConvTranspose3d) -> tuple[Tensor, Tensor]:
    """Join a 2x2x2 transposed convolution of stride 2 and the 3x3x3 convolution after it."""
    assert transposed.bias is not None
    taps = transposed.weight.detach().double().cpu().permute(2, 3, 4, 1, 0).contiguous()
    kernel = weight.permute(2, 3, 4, 0, 1).contiguous()
    slots = torch.zeros(2, 2, 2, 2, 2, 2, kernel.shape[3], taps.shape[4], dtype=torch.float64)
    for (rz, kz), z_pairs in _MEETINGS.items():
        for (ry, ky), y_pairs in _MEETINGS.items():
            for (rx, kx), x_pairs in _MEETINGS.items():
                for (wz, tz), (wy, ty), (wx, tx) in product(z_pairs, y_pairs, x_pairs):
                    slots[rz, ry, rx, kz, ky, kx].addmm_(kernel[wz, wy, wx], taps[tz, ty, tx])
    composed = slots.permute(0, 1, 2, 6, 7, 3, 4, 5).reshape(-1, taps.shape[4], 2, 2, 2)
    through = torch.einsum("omzyx,m->o", weight, transposed.bias.detach().double().cpu())
    return composed, (bias + through).repeat(8)


Interval = tuple[Tensor, Tensor]
"""Centre and radius of the values that each channel can take."""


def _without_silent_levels(net: FoldedEncoder) -> FoldedEncoder:
    """Replace what the coarser levels give by its middle where it cannot vary enough to matter."""
    half = torch.full((1,), INPUT_TOP / 2, dtype=torch.float64)
    features: Interval = (half, half)
    skips = []
    for level in net.down:
        for conv in level:
            features = _range_after(conv, features)
        skips.append(features)
    kept = net
    for index, step in enumerate(net.up):  # from the coarsest on
        assert isinstance(step.up, Convolution)
        slots = (8, step.skip.weight.shape[0])
        centre, radius = (part.view(slots) for part in _range_after(step.up, features))
        if _most_effect(net, index, radius) > _SILENT_LOGIT:
            break
        first = UpStep(step.skip, centre.view(2, 2, 2, -1), step.second)
        kept = replace(net, down=net.down[: 3 - index], up=(first, *net.up[index + 1 :]))
        skip_centre, skip_radius = _range_after(step.skip, skips[2 - index])
        middle = (centre.amax(0) + centre.amin(0)) / 2
        joined = skip_centre + middle, skip_radius + (radius + (centre - middle).abs()).amax(0)
        features = _range_after(step.second, _rectified(joined))
    return kept


def _range_after(conv: Convolution, features: Interval) -> Interval:
    """Bound each channel after a convolution, and what follows it, whatever the features in their bounds."""
    weight = conv.weight.sum((2, 3, 4)), conv.weight.abs().sum((2, 3, 4))
    centre, radius = weight[0] @ features[0], weight[1] @ features[1]
    if conv.bias is not None:
        centre = centre + conv.bias
    if conv.upper is not None:
        sign = torch.where(conv.upper, -1.0, 1.0).double()
        centre, radius = _rectified((sign * centre, radius))
        return sign * centre, radius
    return _rectified((centre, radius)) if conv.relu else (centre, radius)


def _rectified(features: Interval) -> Interval:
    """Bound ``max(x, 0)``; an interval on one side of 0 keeps its radius to the last digit, however small."""
    centre, radius = features
    top = (centre + radius).clamp(min=0) / 2
    return (
        torch.where(centre >= radius, centre, top),
        torch.where(centre >= radius, radius, top),
    )


def _most_effect(net: FoldedEncoder, index: int, change: Tensor) -> float:
    """Bound the change of a logit when what step `index` gets from its coarser level changes by `change`."""

    def spread(conv: Convolution, by: Tensor) -> Tensor:
        return conv.weight.abs().sum((2, 3, 4)) @ by

    by = spread(net.up[index].second, change.amax(0))  # a ReLU does not enlarge a change
    for step in net.up[index + 1 :]:
        assert isinstance(step.up, Convolution)
        by = spread(step.second, spread(step.up, by).view(8, -1).amax(0))
    return float((net.head_weight.abs() @ by).max())
