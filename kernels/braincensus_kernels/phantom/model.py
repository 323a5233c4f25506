"""The phantom itself: its parameters, whether they can be had, its cells and its voxels.

The top of the package, and all that others use: asks for counts, places and looks, box by box.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import ceil, isfinite, pi, prod
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from braincensus_kernels.boxes import Box, Triple
from braincensus_kernels.phantom.camera import expose, shades
from braincensus_kernels.phantom.counts import Tiles
from braincensus_kernels.phantom.hashing import LOOK, NOISE, PLACE, gaussians, key_of, u64
from braincensus_kernels.phantom.look import add_artefacts, add_tissue
from braincensus_kernels.phantom.placement import place_cells
from braincensus_kernels.phantom.profiles import BlurTable, add_balls, blur_table, paint_labels, radii
from braincensus_kernels.phantom.tissue import outline

TripleFloat = tuple[float, float, float]
Cells = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True, kw_only=True)
class Phantom:
    """A synthetic volume with known cells; see `braincensus_kernels.phantom` for how it is made.

    The defaults look like mouse cortex with labelled neurons, cleared and imaged on a mesoSPIM at
    5 um: tissue at 430 counts less shading, noise of 17, small bright cells stretched along z.

    Parameters
    ----------
    shape : (int, int, int)
        Voxels, z, y, x; any size.
    voxel_size_um : (float, float, float)
        z, y, x.
    seed : int
        From 0 to 2^63 - 1. The same parameters give the same voxels and cells.
    n_cells : int, optional
        Number of cells with their centre in the volume, exactly.
    cells_per_mm3 : float, optional
        Cells per mm^3 of tissue, if `n_cells` is not given; 1000 if neither is.
    radius_um : (float, float)
        Mean and standard deviation of the radius; kept within two standard deviations.
    brightness : (float, float)
        Range of the peak above tissue, in counts, after blur and before shading; its logarithm
        is triangular.
    min_separation_um : float, optional
        Least distance between the centres of two cells. Default: the largest possible diameter, so
        that no two cells overlap.
    cluster_fraction : float
        Share of the cells of each tile that is gathered in one dense cluster; 0: no clusters. Cells
        of a cluster keep the minimum separation.
    cluster_sigma_um : float
        Standard deviation of the distance, on each axis, of a clustered cell from its cluster.
    tissue : {"blob", "full"}
        ``"blob"``: a rounded block that fills most of the volume, dark outside. ``"full"``: tissue
        everywhere.
    tissue_level, camera_offset : float
        Counts of unshaded tissue (offset included), and of darkness.
    texture : float
        Relative standard deviation of the tissue, over scales from 10 to 400 um.
    falloff : float
        Light is lost with depth as ``exp(-falloff * z)``, z from 0 to 1 through the volume.
    shading : float
        Light is less by this share at both ends of x, as with a sheet that is thickest there.
    psf_sigma_um : (float, float)
        Blur along z and across it; z is the wider.
    psf_tail : (float, float)
        Share of the light in a wider blur along z, and how many times wider that is.
    artefacts_per_mm3 : float
        Bright things that are not cells, in tissue: half large (radius 30 to 90 um), half small and 10
        to 40 times as bright as a cell.
    counts_per_photon, read_noise : float
        Of the camera: variance is ``counts_per_photon * signal + read_noise ** 2``, in counts.

    Raises
    ------
    ValueError
        If a parameter is out of range, or more cells are asked for than fit; the message says how
        many do.

    Notes
    -----
    The z, y, x of a cell are in voxels, whole numbers being the centres of voxels; a cell is *in* a
    box if the voxel that holds its centre is.

    Photon noise is a Gaussian of the Poisson variance with the Poisson skewness, which is
    indistinguishable from Poisson at these counts (10 photons and more), and costs one table look-up.

    Examples
    --------
    >>> phantom = Phantom(shape=(64, 96, 96), n_cells=50, seed=1)
    >>> image = phantom.render(Box((0, 0, 0), (32, 96, 96)))
    >>> image.shape, str(image.dtype)
    ((32, 96, 96), 'uint16')
    >>> len(phantom.cells()["z"])
    50
    """

    shape: Triple
    voxel_size_um: TripleFloat = (5.0, 5.26, 5.26)
    seed: int = 0
    n_cells: int | None = None
    cells_per_mm3: float | None = None
    radius_um: tuple[float, float] = (8.0, 1.0)
    brightness: tuple[float, float] = (300.0, 2500.0)
    min_separation_um: float | None = None
    cluster_fraction: float = 0.0
    cluster_sigma_um: float = 40.0
    tissue: Literal["blob", "full"] = "blob"
    tissue_level: float = 430.0
    camera_offset: float = 110.0
    texture: float = 0.1
    falloff: float = 0.25
    shading: float = 0.1
    psf_sigma_um: tuple[float, float] = (7.0, 4.0)
    psf_tail: tuple[float, float] = (0.4, 3.0)
    artefacts_per_mm3: float = 2.0
    counts_per_photon: float = 1.0
    read_noise: float = 3.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(int(n) for n in self.shape))
        for name in ("voxel_size_um", "radius_um", "brightness", "psf_sigma_um", "psf_tail"):
            object.__setattr__(self, name, tuple(float(v) for v in getattr(self, name)))
        self._check()
        if self.count > self.capacity:
            raise ValueError(
                f"{self.count} cells do not fit: with centres at least {self.separation_um:g} um apart, "
                f"the tissue of a volume of {self.shape} voxels holds at most {self.capacity}"
            )

    def _check(self) -> None:
        if len(self.shape) != 3 or min(self.shape) < 1:
            raise ValueError(f"shape must be three positive numbers of voxels, got {self.shape}")
        if len(self.voxel_size_um) != 3 or not all(isfinite(v) and v > 0 for v in self.voxel_size_um):
            raise ValueError(f"voxel_size_um must be three positive lengths, got {self.voxel_size_um}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be from 0 to 2^63 - 1, got {self.seed}")
        if self.n_cells is not None and self.cells_per_mm3 is not None:
            raise ValueError("give n_cells or cells_per_mm3, not both")
        if self.n_cells is not None and self.n_cells < 0:
            raise ValueError(f"n_cells must be 0 or more, got {self.n_cells}")
        if self.cells_per_mm3 is not None and not 0 <= self.cells_per_mm3 < 1e9:
            raise ValueError(f"cells_per_mm3 must be from 0 to 1e9, got {self.cells_per_mm3}")
        mean, spread = self.radius_um
        if not (mean > 0 and spread >= 0 and mean - 2 * spread > 0):
            raise ValueError(f"radius_um must leave mean - 2 * spread above 0, got {self.radius_um}")
        if not 0 < self.brightness[0] <= self.brightness[1] < 65536:
            raise ValueError(f"brightness must be a range above 0 and up to 65535, got {self.brightness}")
        if self.min_separation_um is not None and not 0 < self.min_separation_um < 1e4:
            raise ValueError(f"min_separation_um must be above 0 and below 1e4, got {self.min_separation_um}")
        if not (0 <= self.cluster_fraction <= 1 and self.cluster_sigma_um > 0):
            raise ValueError("cluster_fraction must be from 0 to 1, and cluster_sigma_um above 0")
        if self.tissue not in ("blob", "full"):
            raise ValueError(f"tissue must be 'blob' or 'full', got {self.tissue!r}")
        if not 0 <= self.camera_offset <= self.tissue_level < 65536:
            raise ValueError("camera_offset and tissue_level must be in order, from 0 to 65535")
        if not (0 <= self.texture <= 0.5 and 0 <= self.falloff <= 10 and 0 <= self.shading < 1):
            raise ValueError("texture must be from 0 to 0.5, falloff from 0 to 10, shading from 0 to below 1")
        if not self.psf_sigma_um[0] >= self.psf_sigma_um[1] > 0:
            raise ValueError(f"psf_sigma_um must be (along z, across), z the wider, got {self.psf_sigma_um}")
        if not (0 <= self.psf_tail[0] < 1 <= self.psf_tail[1]):
            raise ValueError(f"psf_tail must be (share below 1, factor from 1), got {self.psf_tail}")
        if min(self.artefacts_per_mm3, self.counts_per_photon, self.read_noise) < 0:
            raise ValueError("artefacts_per_mm3, counts_per_photon and read_noise must be 0 or more")

    # -- what is asked for, and what fits ---------------------------------------------------------

    @property
    def separation_um(self) -> float:
        """Least distance between the centres of two cells."""
        if self.min_separation_um is not None:
            return float(self.min_separation_um)
        return 2 * (self.radius_um[0] + 2 * self.radius_um[1])

    @property
    def tissue_mm3(self) -> float:
        """Volume of tissue that can hold cells (estimated at sample points along its surface)."""
        return float(self._tiles.row_voxels.sum()) * prod(self.voxel_size_um) * 1e-9

    @property
    def capacity(self) -> int:
        """The most cells that fit."""
        return int(self._tiles.row_capacity.sum())

    @property
    def count(self) -> int:
        """Number of cells in the whole volume."""
        if self.n_cells is not None:
            return self.n_cells
        density = 1000.0 if self.cells_per_mm3 is None else self.cells_per_mm3
        return round(density * self.tissue_mm3)

    @property
    def _size_um(self) -> npt.NDArray[np.float64]:
        return np.array(self.voxel_size_um, np.float64)

    @property
    def _tissue(self) -> npt.NDArray[np.float64]:
        return outline(self.tissue, shape=self.shape, voxel_size_um=self.voxel_size_um)

    @property
    def _tiles(self) -> Tiles:
        return _tiles_of(self)

    # -- cells ------------------------------------------------------------------------------------

    def cells(self, box: Box | None = None) -> Cells:
        """Return the true cells whose centre is in a box; default: in the volume.

        Parameters
        ----------
        box : Box, optional
            In voxels; parts outside the volume hold no cells.

        Returns
        -------
        dict of 1D arrays
            ``label`` (int64, 1 to the number of cells, the same for every box), ``z``, ``y``, ``x``
            (float64, voxels), ``radius_um``, ``brightness`` (float64) and ``volume_um3``, in order of
            label.
        """
        box = Box.whole(self.shape) if box is None else box.clip(self.shape)
        parts = []
        if box.size and self.count:
            # Some tiles at a time: what is placed in vain (neighbours) then stays small beside what is kept.
            z, y, x = self._tiles.voxels
            start = [a // n * n for a, n in zip(box.start, (z, 8 * y, 8 * x), strict=True)]
            aligned = Box((start[0], start[1], start[2]), box.stop)
            parts = [self._cells_in(some.intersect(box)) for some in aligned.tiles((z, 8 * y, 8 * x))]
        rows = np.concatenate(parts) if parts else np.zeros((0, 6))
        return self._columns(rows[np.argsort(rows[:, 0], kind="stable")])

    def cell_parts(self) -> Iterator[Cells]:
        """Yield all true cells in order of label, some at a time, when all are too many for memory."""
        z, y, _ = self._tiles.voxels
        for row in Box.whole(self.shape).tiles((z, y, self.shape[2])):
            cells = self.cells(row)
            if len(cells["label"]):
                yield cells

    def _columns(self, rows: npt.NDArray[np.float64]) -> Cells:
        size = self._size_um
        z, y, x = (rows[:, 1:4] / size - 0.5).T.copy()
        return {
            "label": rows[:, 0].astype(np.int64),
            "z": z,
            "y": y,
            "x": x,
            "radius_um": rows[:, 4].copy(),
            "brightness": rows[:, 5].copy(),
            "volume_um3": 4 / 3 * pi * rows[:, 4] ** 3,
        }

    def _cells_in(self, box: Box) -> npt.NDArray[np.float64]:
        """Cells with their centre in the box: label, z, y, x in um, radius, brightness; by label."""
        box = box.clip(self.shape)
        if not box.size or not self.count:
            return np.zeros((0, 6))
        tiles = self._tiles
        first = [a // t for a, t in zip(box.start, tiles.voxels, strict=True)]
        last = [-(-b // t) for b, t in zip(box.stop, tiles.voxels, strict=True)]
        lo = [max(0, a - 1) for a in first]
        hi = [min(n, b + 1) for b, n in zip(last, tiles.grid, strict=True)]
        counts, labels = tiles.counts(seed=self.seed, total=self.count, lo=lo, hi=hi)
        size = self._size_um
        rows, lost = place_cells(
            u64(key_of(self.seed, PLACE)),
            u64(key_of(self.seed, LOOK)),
            np.array(lo),
            counts,
            labels,
            np.array(tiles.voxels) * size,
            np.array(self.shape) * size,
            self._tissue,
            self.separation_um,
            self.cluster_fraction,
            self.cluster_sigma_um,
            np.array(self._radii),
            np.array(self.brightness, dtype=np.float64),
            gaussians(),
        )
        if lost:
            raise ValueError(
                f"{lost} cells found no room in {box}; ask for fewer cells or a smaller separation"
            )
        voxel = np.floor(rows[:, 1:4] / size)
        inside = ((voxel >= box.start) & (voxel < box.stop)).all(axis=1)
        found: npt.NDArray[np.float64] = rows[inside]
        return found

    @property
    def _radii(self) -> npt.NDArray[np.float64]:
        return radii(*self.radius_um)

    def truth_labels(self, box: Box) -> npt.NDArray[np.uint32]:
        """Return the true instance labels of a box: which cell's ball holds the centre of each voxel.

        Parameters
        ----------
        box : Box
            Inside the volume, in voxels.

        Raises
        ------
        ValueError
            If the box is not inside the volume.
        """
        self._refuse_outside(box)
        cells = self._cells_in(self._reaching(box, float(self._radii[-1])))
        out = np.zeros(box.shape, np.uint32)
        paint_labels(out, np.array(box.start), self._size_um, cells)
        return out

    # -- voxels -----------------------------------------------------------------------------------

    def render(self, box: Box) -> npt.NDArray[np.uint16]:
        """Return the voxels of a box: the same values whatever box they are part of.

        Parameters
        ----------
        box : Box
            Inside the volume, in voxels.

        Returns
        -------
        array of uint16, of the shape of the box

        Raises
        ------
        ValueError
            If the box is not inside the volume.
        """
        self._refuse_outside(box)
        out = np.zeros(box.shape, np.uint16)
        if not box.size:
            return out
        start, size = np.array(box.start), self._size_um
        table = self._blur
        light = np.zeros(box.shape, np.float32)
        cells = self._cells_in(self._reaching(box, table.reach_um))
        which = np.searchsorted(self._radii, cells[:, 4])
        add_balls(light, start, size, cells[:, 1:4].copy(), which, cells[:, 5].copy(), *table.arrays)
        add_artefacts(
            light,
            box,
            seed=self.seed,
            size_um=size,
            end_um=np.array(self.shape) * size,
            tissue=self._tissue,
            per_mm3=self.artefacts_per_mm3,
            brightest=self.brightness[1],
            table=table,
        )
        level = self.tissue_level - self.camera_offset
        add_tissue(
            light, box, seed=self.seed, size_um=size, tissue=self._tissue, texture=self.texture, level=level
        )
        shade_z, shade_x = shades(box, shape=self.shape, falloff=self.falloff, shading=self.shading)
        expose(
            light,
            out,
            start,
            np.array(self.shape),
            shade_z,
            shade_x,
            self.camera_offset,
            self.counts_per_photon,
            self.read_noise**2,
            u64(key_of(self.seed, NOISE)),
            gaussians(),
        )
        return out

    def _refuse_outside(self, box: Box) -> None:
        if not Box.whole(self.shape).contains(box):
            raise ValueError(f"{box} is not inside a volume of {self.shape} voxels")

    def _reaching(self, box: Box, reach_um: float) -> Box:
        """Where the centre of a cell can be that touches a voxel of the box."""
        z, y, x = (ceil(reach_um / v) + 1 for v in self.voxel_size_um)
        return box.dilate((z, y, x)).clip(self.shape)

    @property
    def _blur(self) -> BlurTable:
        return blur_table(tuple(self._radii.tolist()), *self.psf_sigma_um, *self.psf_tail)


# What is derived from a phantom is cached beside it and not in it, so that a phantom that is sent to a
# worker is a few numbers.
@lru_cache(maxsize=8)
def _tiles_of(phantom: Phantom) -> Tiles:
    return Tiles.plan(
        shape=phantom.shape,
        voxel_size_um=phantom.voxel_size_um,
        tissue=phantom._tissue,
        separation_um=phantom.separation_um,
    )
