"""Named weights: what each is, whose it is, and where it can be had. Facts alone: nothing is read or fetched.

    name -> entry -> bundled file (checkpoints.py reads it)
                  -> published home (the pipeline fetches it, when it is told to, and only then)

CellSeg3D publishes archives, each with one ``.pth`` state dict; names of archives and files are those of
the plugin's current release. Its authors give no checksums, so none are here: the first download's is kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

COMPACT = "compact"
"""Name of the weights shipped in the package."""

WNET3D = "wnet3d"
"""The architecture that learns without labels."""


@dataclass(frozen=True)
class Published:
    """Where weights can be downloaded."""

    urls: tuple[str, ...]
    """Of the same archive, the first to be tried first; https."""
    file: str
    """Name of the state dict inside the ``.tar.gz``."""
    about_mb: int
    """Size of the download as its home lists it, for a limit and for patience."""
    home: str
    """A page for people."""


@dataclass(frozen=True)
class NamedWeights:
    """One entry of the registry."""

    name: str
    title: str
    architecture: str
    """``wnet3d`` is read by `checkpoints.py`, the others by `supervised.networks`."""
    expected_input: str
    licence: str
    citation: str
    bundled: str | None = None
    """File in the package's ``weights`` folder."""
    published: Published | None = None

    def __post_init__(self) -> None:
        if (self.bundled is None) == (self.published is None):
            raise ValueError(f"{self.name}: weights are either bundled or published")
        if self.published is not None and not all(u.startswith("https://") for u in self.published.urls):
            raise ValueError(f"{self.name}: only https, got {self.published.urls}")


_CELLSEG3D = "https://huggingface.co/C-Achard/cellseg3d"
_PAPER = (
    'Achard et al., "CellSeg3D, Self-supervised 3D cell segmentation for fluorescence microscopy", eLife, '
    "https://doi.org/10.7554/eLife.99848"
)


def _cellseg3d(stem: str, about_mb: int) -> Published:
    archive = f"{_CELLSEG3D}/resolve/main/{stem}.tar.gz"
    return Published((archive,), f"{stem}.pth", about_mb, f"{_CELLSEG3D}/tree/main")


_ENTRIES = (
    NamedWeights(
        name=COMPACT,
        title="WNet3D of a quarter of the published width, trained by braincensus",
        architecture=WNET3D,
        expected_input="[0, 100]: the 1st to 99.9th percentile of tissue; about 5 um per voxel",
        licence="MIT",
        citation="braincensus; the method is that of " + _PAPER,
        bundled="wnet3d-compact.safetensors",
    ),
    NamedWeights(
        name="cellseg3d-wnet3d",
        title="WNet3D of CellSeg3D, self-supervised",
        architecture=WNET3D,
        expected_input="[0, 100]: minimum to maximum of the image; mesoSPIM nuclei, about 5 um per voxel",
        licence="MIT",
        citation=_PAPER,
        published=_cellseg3d("wnet_latest", 194),
    ),
    NamedWeights(
        name="cellseg3d-segresnet",
        title="SegResNet of CellSeg3D, supervised",
        architecture="monai SegResNetVAE",
        expected_input="quantile-normalised image; 64^3 windows",
        licence="MIT",
        citation=_PAPER,
        published=_cellseg3d("SegResNet_latest", 8),
    ),
    NamedWeights(
        name="cellseg3d-swinunetr",
        title="SwinUNetR of CellSeg3D, supervised",
        architecture="monai SwinUNETR (feature_size 48, use_v2)",
        expected_input="quantile-normalised image; 64^3 windows",
        licence="MIT",
        citation=_PAPER,
        published=_cellseg3d("SwinUNetR_latest", 271),
    ),
)

REGISTRY: Mapping[str, NamedWeights] = MappingProxyType({entry.name: entry for entry in _ENTRIES})
"""Every name, in the order in which it is shown."""
