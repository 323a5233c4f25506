"""WNet3D: two 3D U-Nets in a row, trained without labels (CellSeg3D; after W-Net, Xia and Kulis 2017).

The encoder turns intensities into class probabilities; the decoder turns those back into
intensities, which keeps them faithful to the image while training. Only the encoder is needed
to predict. Module names are those of the published checkpoints, so that they load strictly.

    image -> encoder -> softmax -> class probabilities -> decoder -> reconstruction
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

GROUPS = 4
"""Groups of every GroupNorm."""

COMPACT_CHANNELS = (16, 32, 64, 128)
FULL_CHANNELS = (64, 128, 256, 512)


def _settle(channels: int, dropout: float) -> list[nn.Module]:
    """ReLU, dropout and norm: what follows every pair of convolutions."""
    return [nn.ReLU(), nn.Dropout(dropout), nn.GroupNorm(GROUPS, channels)]


class InBlock(nn.Module):
    """Two 3x3x3 convolutions at full resolution."""

    def __init__(self, in_channels: int, out_channels: int, dropout: float) -> None:
        super().__init__()
        self.module = nn.Sequential(
            nn.Conv3d(in_channels, out_channels, 3, padding=1),
            *_settle(out_channels, dropout),
            nn.Conv3d(out_channels, out_channels, 3, padding=1),
            *_settle(out_channels, dropout),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return `out_channels` features of the same extent."""
        out: Tensor = self.module(x)
        return out


class Block(nn.Module):
    """Two convolutions of 3x3x3 then 1x1x1; the first pair changes the number of channels."""

    def __init__(self, in_channels: int, out_channels: int, dropout: float) -> None:
        super().__init__()
        self.module = nn.Sequential(
            nn.Conv3d(in_channels, in_channels, 3, padding=1),
            nn.Conv3d(in_channels, out_channels, 1),
            *_settle(out_channels, dropout),
            nn.Conv3d(out_channels, out_channels, 3, padding=1),
            nn.Conv3d(out_channels, out_channels, 1),
            *_settle(out_channels, dropout),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return `out_channels` features of the same extent."""
        out: Tensor = self.module(x)
        return out


class OutBlock(nn.Module):
    """Two 3x3x3 convolutions at full resolution, then 1x1x1 to the output channels."""

    def __init__(self, in_channels: int, hidden_channels: int, out_channels: int, dropout: float) -> None:
        super().__init__()
        self.module = nn.Sequential(
            nn.Conv3d(in_channels, hidden_channels, 3, padding=1),
            *_settle(hidden_channels, dropout),
            nn.Conv3d(hidden_channels, hidden_channels, 3, padding=1),
            *_settle(hidden_channels, dropout),
            nn.Conv3d(hidden_channels, out_channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return `out_channels` raw outputs of the same extent."""
        out: Tensor = self.module(x)
        return out


class UNet(nn.Module):
    """A 3D U-Net of four levels: `in_b conv1 conv2 bot` down, `deconv2 deconv3 out_b` up.

    Parameters
    ----------
    in_channels, out_channels
        Of the image and of the raw output.
    channels
        Features of the four levels, full resolution first; each a multiple of 4.
    dropout
        Probability with which a feature is dropped in training.
    softmax
        Whether the output is a softmax over its channels.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        channels: Sequence[int],
        dropout: float,
        softmax: bool,
    ) -> None:
        super().__init__()
        if len(channels) != 4 or any(c < GROUPS or c % GROUPS for c in channels):
            raise ValueError(f"channels must be four positive multiples of {GROUPS}, got {tuple(channels)}")
        a, b, c, d = channels
        self.channels = (a, b, c, d)
        self.softmax = softmax
        self.pool = nn.MaxPool3d(2)
        self.in_b = InBlock(in_channels, a, dropout)
        self.conv1 = Block(a, b, dropout)
        self.conv2 = Block(b, c, dropout)
        self.bot = Block(c, d, dropout)
        self.deconv2 = Block(2 * c, c, dropout)
        self.deconv3 = Block(2 * b, b, dropout)
        self.out_b = OutBlock(2 * a, a, out_channels, dropout)
        self.conv_trans2 = nn.ConvTranspose3d(d, c, 2, stride=2)
        self.conv_trans3 = nn.ConvTranspose3d(c, b, 2, stride=2)
        self.conv_trans_out = nn.ConvTranspose3d(b, a, 2, stride=2)

    def logits(self, x: Tensor) -> Tensor:
        """Return the raw outputs, before any softmax.

        Raises
        ------
        ValueError
            If an extent is not a multiple of 8: the network halves three times.
        """
        if x.ndim != 5 or any(n % 8 for n in x.shape[2:]):
            raise ValueError(
                f"expected (batch, channel, z, y, x) with extents in multiples of 8, got {tuple(x.shape)}"
            )
        full = self.in_b(x)
        half = self.conv1(self.pool(full))
        quarter = self.conv2(self.pool(half))
        eighth = self.bot(self.pool(quarter))
        quarter = self.deconv2(torch.cat([quarter, self.conv_trans2(eighth)], dim=1))
        half = self.deconv3(torch.cat([half, self.conv_trans3(quarter)], dim=1))
        out: Tensor = self.out_b(torch.cat([full, self.conv_trans_out(half)], dim=1))
        return out

    def forward(self, x: Tensor) -> Tensor:
        """Return probabilities (with `softmax`) or raw outputs, of the extent of `x`."""
        out = self.logits(x)
        return torch.softmax(out, dim=1) if self.softmax else out


class WNet3D(nn.Module):
    """The whole self-supervised network: encoder and decoder.

    Parameters
    ----------
    in_channels, out_channels
        Of the image and of its reconstruction.
    num_classes
        Classes that the encoder tells apart; which one is foreground is not fixed by training.
    channels
        Features of the four levels; (64, 128, 256, 512) is the published size, and
        `COMPACT_CHANNELS` needs 16 times less work.
    dropout
        Probability with which a feature is dropped in training.

    Notes
    -----
    Input intensities are expected in [0, 100], as the soft normalised cut's scale assumes.
    Matches the module tree of CellSeg3D's published checkpoints (github.com/AdaptiveMotorControlLab/
    CellSeg3D), which load strictly.

    Examples
    --------
    >>> network = WNet3D(channels=(4, 4, 4, 4)).eval()
    >>> probabilities, reconstruction = network(torch.zeros(1, 1, 16, 16, 16))
    >>> tuple(probabilities.shape), tuple(reconstruction.shape)
    ((1, 2, 16, 16, 16), (1, 1, 16, 16, 16))
    """

    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = 1,
        num_classes: int = 2,
        channels: Sequence[int] = FULL_CHANNELS,
        dropout: float = 0.65,
    ) -> None:
        super().__init__()
        self.encoder = UNet(in_channels, num_classes, channels=channels, dropout=dropout, softmax=True)
        self.decoder = UNet(num_classes, out_channels, channels=channels, dropout=dropout, softmax=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return class probabilities (batch, class, z, y, x) and the reconstruction, of the shape of `x`."""
        probabilities = self.encoder(x)
        return probabilities, self.decoder(probabilities)
