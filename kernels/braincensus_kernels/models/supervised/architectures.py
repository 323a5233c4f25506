"""MONAI's two modules, as `networks.py` wants them; imported only to build one, since MONAI takes seconds."""

from __future__ import annotations

from typing import cast

from monai.networks.nets.segresnet import SegResNetVAE
from monai.networks.nets.swin_unetr import SwinUNETR, WindowAttention
from torch import Tensor, nn

from braincensus_kernels.boxes import Triple

VAE = "vae_"
"""How names of SegResNet's variational branch begin."""


class SegResNet(SegResNetVAE):  # type: ignore[misc]
    """MONAI's, giving the logits alone; the variational branch takes no gradients."""

    def __init__(self, filters: int, image: Triple) -> None:
        super().__init__(image, init_filters=filters, out_channels=1, dropout_prob=0.3)
        for name, parameter in self.named_parameters():
            if name.startswith(VAE):
                parameter.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logit of foreground, of the extent of `x`."""
        features, skips = self.encode(x)
        skips.reverse()
        logits: Tensor = self.decode(features, skips)
        return logits

    def drop_vae(self) -> None:
        """Forget the variational branch."""
        for name in [name for name, _ in self.named_children() if name.startswith(VAE)]:
            delattr(self, name)


def swinunetr(features: int) -> nn.Module:
    """Return MONAI's SwinUNETR, version 2."""
    network = SwinUNETR(
        in_channels=1, out_channels=1, feature_size=features, drop_rate=0.5, attn_drop_rate=0.5, use_v2=True
    )
    return cast(nn.Module, network)


def attend_in_parts(network: nn.Module) -> None:
    """Let attention never hold its whole matrix where no gradient is asked for: half the memory.

    Logits differ by 1e-6.
    """
    for module in network.modules():
        if isinstance(module, WindowAttention):
            module.use_flash_attention = True
