"""The volume as foreground models see it: flat tissue in one fixed range. Part of stage 2.

Any box can be asked for: the range and the background's tiles come from the first stage and are the
volume's, so a voxel's value does not depend on the box. Beyond the volume's true border the volume is
mirrored; that, too, depends on nothing but the volume.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from braincensus.planning import LATTICE
from braincensus.stages.intensity import TILE_MEDIAN, TILE_TOP, IntensityRange, tiles_of
from braincensus.store import Output
from braincensus.volume import Volume
from braincensus_kernels.background import background_reach_tiles, local_background
from braincensus_kernels.boxes import Box, Triple

if TYPE_CHECKING:
    from braincensus.tasks import Context

WNET3D_TOP = 100.0
"""The paper's input range, chosen to suit SoftNCuts' intensity sigma."""


@dataclass(frozen=True)
class ScaledVolume:
    """A volume, its range, and where the tiles of its background are."""

    volume: Volume
    output: Output
    intensity: IntensityRange
    background_um: float | None

    @classmethod
    def of(cls, context: Context, intensity: IntensityRange) -> ScaledVolume:
        """Put together what the workers need of a run's volume."""
        plan = context.plan
        return cls(
            plan.volume, context.output, replace(intensity, windows=()), plan.config.intensity.background_um
        )

    @property
    def floor(self) -> float:
        """The least background to divide by: what tissue at its darkest may have."""
        return max(self.intensity.tissue_threshold, self.intensity.low, 1.0)

    def read(self, box: Box) -> np.ndarray:
        """Return voxels inside the volume in the integer units of the range's scale, as float32."""
        return self.intensity.scale.quantise(self.volume.read(box)).astype(np.float32)

    def network_input(self, box: Box, *, top: float = WNET3D_TOP) -> np.ndarray:
        """Return `box`, which may leave the volume (mirrored there), as float32 in [0, `top`]."""
        inside, index = _mirrored_box(box, self.volume.shape)
        low, high = np.float32(self.intensity.low), np.float32(self.intensity.high)
        scaled = self.read(inside)
        if self.background_um is not None:
            scaled *= np.float32(self.intensity.median) / np.maximum(self.background(inside), self.floor)
        np.clip(scaled, low, high, out=scaled)
        scaled -= low
        scaled *= np.float32(top) / (high - low)
        return np.ascontiguousarray(scaled[np.ix_(*index)])

    def is_dark(self, box: Box) -> bool:
        """Whether `network_input` is 0 at every voxel of `box`, known without reading the volume.

        The division by the background brightens most where that is least, and rounding keeps order: if the
        brightest voxel, brightened so, is not above the range's low end, no voxel is.
        """
        inside = _mirrored_box(box, self.volume.shape)[0]
        brightest, low = self._brightest(inside), np.float32(self.intensity.low)
        if self.background_um is not None and brightest <= low:
            divisor = max(self.background(inside).min(), np.float32(self.floor))
            brightest *= np.float32(self.intensity.median) / divisor
        return bool(brightest <= low)

    def is_below_background(self, box: Box) -> bool:
        """Whether every voxel of `box` is darker than its background, known without reading the volume."""
        brightest = self._brightest(box)
        return bool(brightest < self.intensity.median and brightest < self.background(box).min())

    def _brightest(self, box: Box) -> np.float32:
        brightest: np.float32 = self.output.read_block(TILE_TOP, tiles_of(box)).max()
        return brightest

    def background(self, box: Box) -> np.ndarray:
        """Return the local background of tissue at every voxel of `box`, inside the volume."""
        if self.background_um is None:
            return np.full(box.shape, self.intensity.median, dtype=np.float32)
        z, y, x = (self.background_um / (LATTICE * size) for size in self.volume.voxel_size_um)
        margin = background_reach_tiles((z, y, x))
        tiles = tiles_of(box).dilate(margin).clip(tiles_of(self.volume.box).shape)
        return local_background(
            self.output.read_block(TILE_MEDIAN, tiles),
            tiles=tiles,
            box=box,
            volume_shape=self.volume.shape,
            sigma_tiles=(z, y, x),
            tissue_threshold=self.intensity.tissue.threshold,
            floor=self.intensity.median,
        )


def _mirrored_box(box: Box, shape: Triple) -> tuple[Box, list[np.ndarray]]:
    """Return the voxels that `box` needs and, for each axis, which of them to take (mirrored outside)."""
    positions = [_mirrored(np.arange(a, b), n) for a, b, n in zip(box.start, box.stop, shape, strict=True)]
    start = [int(p.min()) for p in positions]
    stop = [int(p.max()) + 1 for p in positions]
    inside = Box((start[0], start[1], start[2]), (stop[0], stop[1], stop[2]))
    return inside, [p - s for p, s in zip(positions, start, strict=True)]


def _mirrored(position: np.ndarray, extent: int) -> np.ndarray:
    """Reflect positions outside ``0..extent-1`` back inside, without repeating the border voxel."""
    if extent == 1:
        return np.zeros_like(position)
    period = 2 * (extent - 1)
    folded = np.abs(position) % period
    mirrored: np.ndarray = np.minimum(folded, period - folded)
    return mirrored
