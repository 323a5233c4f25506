"""From the `labelling` section of a configuration to a labeller of blocks: pure values, no I/O.

A labeller is small, frozen and picklable; it knows its reach, and labels one block of foreground
probability as stored (uint16, 65535 is 1). One class for each method; the exactness of each is argued
in the kernel that it calls:

    voronoi-otsu  reach bounded by max_radius_um: exact; a flat maximum that leaves the halo is seen,
                  and the block reads more
    components    reach 1 voxel: exact for any size, joined by the voxels that both sides of a face share
    watershed     exact where the flood from outside cannot arrive: seen, else the block reads more
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import ceil
from typing import Any, ClassVar

from braincensus.config import ConnectedComponents, VoronoiOtsu, Watershed
from braincensus_kernels.block_labels import BlockLabels
from braincensus_kernels.boxes import Box, Triple
from braincensus_kernels.components import label_components
from braincensus_kernels.components import reach_voxels as components_reach
from braincensus_kernels.measure import PROBABILITY_MAX
from braincensus_kernels.morphology import closing_reach
from braincensus_kernels.seeds import SeedRule
from braincensus_kernels.voronoi_otsu import label_block
from braincensus_kernels.voronoi_otsu import reach_voxels as voronoi_otsu_reach
from braincensus_kernels.watershed import distance_reach_voxels, label_distance_watershed, label_watershed
from braincensus_kernels.watershed import reach_voxels as watershed_reach

TripleFloat = tuple[float, float, float]

_NM_PER_UM = 1000


@dataclass(frozen=True)
class Foreground:
    """How stored probability becomes what is labelled: first a floor, then a closing."""

    floor: float | None
    closing_radius_voxels: TripleFloat

    @property
    def closes(self) -> bool:
        """Whether there is any closing."""
        return max(self.closing_radius_voxels) >= 1

    @property
    def reach(self) -> Triple:
        """Voxels around a box that its foreground depends on."""
        return closing_reach(self.closing_radius_voxels) if self.closes else (0, 0, 0)


@dataclass(frozen=True)
class Labeller(ABC):
    """Labels blocks of one volume."""

    outline_sigma: TripleFloat
    """Blur of the probability before its threshold, voxels."""
    joins_by_anchors: ClassVar[bool] = False
    """Whether one thing goes by several names until they are joined at the faces."""
    bytes_per_voxel: ClassVar[int]
    """What labelling holds at most, for each voxel of a block and its halo; as measured where half of them
    are foreground, and some more."""

    @property
    @abstractmethod
    def reach(self) -> Triple:
        """Voxels around a core that its labels depend on (as far as that is certain beforehand)."""

    @abstractmethod
    def label(
        self, image: Any, *, outer: Box, core: Box, volume_shape: Triple, threshold: float
    ) -> BlockLabels:
        """Label one block; `threshold` of the outline is in stored units, 0 to 65535."""


@dataclass(frozen=True)
class VoronoiOtsuLabeller(Labeller):
    """See `braincensus_kernels.voronoi_otsu.label_block`."""

    spot_sigma: TripleFloat
    seeds: SeedRule
    max_steps: int
    bytes_per_voxel = 16

    @property
    def reach(self) -> Triple:
        """Growth, and what finding seeds and outline looks at."""
        return voronoi_otsu_reach(self.spot_sigma, self.outline_sigma, self.max_steps)

    def label(
        self, image: Any, *, outer: Box, core: Box, volume_shape: Triple, threshold: float
    ) -> BlockLabels:
        """Label one block."""
        return label_block(
            image,
            outer=outer,
            core=core,
            volume_shape=volume_shape,
            spot_sigma=self.spot_sigma,
            outline_sigma=self.outline_sigma,
            threshold=threshold,
            seeds=self.seeds,
            max_steps=self.max_steps,
        )


@dataclass(frozen=True)
class ComponentsLabeller(Labeller):
    """See `braincensus_kernels.components.label_components`."""

    joins_by_anchors = True
    bytes_per_voxel = 16

    @property
    def reach(self) -> Triple:
        """The blur, and one voxel of the neighbours."""
        return components_reach(self.outline_sigma)

    def label(
        self, image: Any, *, outer: Box, core: Box, volume_shape: Triple, threshold: float
    ) -> BlockLabels:
        """Label one block."""
        return label_components(
            image,
            outer=outer,
            core=core,
            volume_shape=volume_shape,
            sigma=self.outline_sigma,
            threshold=threshold,
        )


@dataclass(frozen=True)
class WatershedLabeller(Labeller):
    """See `braincensus_kernels.watershed.label_watershed`: seeds by threshold."""

    seed_threshold: float
    min_seed_voxels: int
    max_steps: int
    joins_by_anchors = True
    bytes_per_voxel = 60

    @property
    def reach(self) -> Triple:
        """Blur, seeds, growth, and as much again for the flood of neighbours."""
        return watershed_reach(
            self.outline_sigma, min_seed_voxels=self.min_seed_voxels, max_steps=self.max_steps
        )

    def label(
        self, image: Any, *, outer: Box, core: Box, volume_shape: Triple, threshold: float
    ) -> BlockLabels:
        """Label one block."""
        return label_watershed(
            image,
            outer=outer,
            core=core,
            volume_shape=volume_shape,
            sigma=self.outline_sigma,
            threshold=threshold,
            # Otsu's threshold is not known beforehand, and may lie higher: seeds are foreground.
            seed_threshold=max(self.seed_threshold, threshold),
            min_seed_voxels=self.min_seed_voxels,
            max_steps=self.max_steps,
        )


@dataclass(frozen=True)
class DistanceWatershedLabeller(Labeller):
    """See `braincensus_kernels.watershed.label_distance_watershed`: seeds by distance."""

    seed_sigma: TripleFloat
    spacing_nm: Triple
    limit_nm: int
    max_steps: int
    bytes_per_voxel = 30

    @property
    def reach(self) -> Triple:
        """Blurs, distance, growth, and as much again for the flood of neighbours."""
        return distance_reach_voxels(
            self.outline_sigma,
            seed_sigma=self.seed_sigma,
            spacing=self.spacing_nm,
            limit=self.limit_nm,
            max_steps=self.max_steps,
        )

    def label(
        self, image: Any, *, outer: Box, core: Box, volume_shape: Triple, threshold: float
    ) -> BlockLabels:
        """Label one block."""
        return label_distance_watershed(
            image,
            outer=outer,
            core=core,
            volume_shape=volume_shape,
            sigma=self.outline_sigma,
            threshold=threshold,
            seed_sigma=self.seed_sigma,
            spacing=self.spacing_nm,
            limit=self.limit_nm,
            max_steps=self.max_steps,
        )


def labeller_for(
    settings: VoronoiOtsu | ConnectedComponents | Watershed, voxel_size_um: TripleFloat
) -> Labeller:
    """Build the labeller of a configuration for a voxel size (z, y, x)."""

    def voxels(sigma: TripleFloat) -> TripleFloat:
        if settings.sigma_unit == "voxels":
            return sigma
        return _per_axis(sigma, voxel_size_um)

    outline_sigma = voxels(settings.outline_sigma)
    if isinstance(settings, ConnectedComponents):
        return ComponentsLabeller(outline_sigma)
    max_steps = ceil(settings.max_radius_um / min(voxel_size_um))
    if isinstance(settings, VoronoiOtsu):
        return VoronoiOtsuLabeller(outline_sigma, voxels(settings.spot_sigma), settings.seeds, max_steps)
    if settings.seeds == "threshold":
        seed_threshold = settings.seed_threshold * PROBABILITY_MAX
        return WatershedLabeller(outline_sigma, seed_threshold, settings.min_seed_voxels, max_steps)
    # Whole nanometres: distances are then compared as exact integers, the same in every block.
    z, y, x = (max(1, round(size * _NM_PER_UM)) for size in voxel_size_um)
    limit = round(settings.max_radius_um * _NM_PER_UM)
    return DistanceWatershedLabeller(outline_sigma, voxels(settings.seed_sigma), (z, y, x), limit, max_steps)


def foreground_for(
    settings: VoronoiOtsu | ConnectedComponents | Watershed, voxel_size_um: TripleFloat
) -> Foreground:
    """Build the foreground rule of a configuration for a voxel size (z, y, x)."""
    radius = settings.closing_radius_um
    closing = (0.0, 0.0, 0.0) if radius is None else _per_axis((radius,) * 3, voxel_size_um)
    return Foreground(settings.foreground_threshold, closing)


def _per_axis(lengths_um: TripleFloat, voxel_size_um: TripleFloat) -> TripleFloat:
    z, y, x = (length / size for length, size in zip(lengths_um, voxel_size_um, strict=True))
    return z, y, x
