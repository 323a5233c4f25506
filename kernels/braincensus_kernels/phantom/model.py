"""Phantoms: synthetic light-sheet volumes whose cells are known, rendered box by box.

First in the flow of a test or a demo: a phantom stands where a microscope would, and its
list of cells is what a census is compared with. Nothing here ever holds the volume.

Every random number is a hash of the seed and of *where* it is used (a tile, a cell, a voxel),
never of the order of use, so a voxel has one value whatever box it is rendered in:

1. **How many.** A lattice of tiles covers the volume. The number of cells is split over planes
   of tiles, rows of a plane, tiles of a row, by repeated halving: each half takes a binomial
   share by its tissue volume, but never more than fits. Counts so add up to the number asked
   for, vary from place to place as random counts do, and those of one row need no other row's.
2. **Where.** Cells are placed by random trials no closer than the minimum separation. A cell
   belongs to the part of its tile that its first trial fell in: around a corner, along an edge,
   on a face, or the inside. Parts are wide enough that two of one kind are always farther apart
   than the separation, so that placing corners, then edges, faces and insides needs a tile's 26
   neighbours and no more.
3. **What they look like.** A cell is a ball of uniform brightness blurred by the point-spread
   function, from a table; tissue, artefacts, shading and noise are functions of position.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from math import ceil, exp, isfinite, pi, prod, sqrt
from typing import Any, Literal

import numba
import numpy as np
import numpy.typing as npt
from scipy.special import erf, ndtri

from braincensus_kernels.boxes import Box, Triple

TripleFloat = tuple[float, float, float]
Cells = dict[str, npt.NDArray[Any]]

# Largest share of tissue that spheres of the minimum separation's diameter may fill. Random trials jam
# at 0.38; at half of that every cell finds room in practice.
_MAX_PACKING = 0.19
_TILE_VOXELS = 48  # least side of a tile of the cell lattice
_RADII = 33  # distinct radii; a table of blurred balls holds each
_SAMPLES = 6  # sample points along each axis of a tile that the tissue's surface cuts
_TRIALS = 64  # in a cell's own part of a tile before it moves to the inside
_TRIALS_INSIDE = 200_000
_ARTEFACT_TILE_UM = 300.0
_ARTEFACT_RADIUS_UM = (30.0, 90.0)
# Scales of the texture along z and across, um; the finest are as anisotropic as the blur makes them.
_TEXTURE_UM = ((25.0, 10.0), (50.0, 25.0), (100.0, 100.0), (400.0, 400.0))
# Standard deviation of cubic B-spline noise with uniform [-1, 1] coefficients, averaged over position.
_SPLINE_STD = sqrt((151 / 315) ** 3 / 3)

# What a hash is for, so that no two uses share one.
_COUNT, _PLACE, _LOOK, _ARTEFACT, _TEXTURE, _NOISE = range(1, 7)

_jit: Any = numba.njit(cache=True, nogil=True)
_U = np.uint64


@dataclass(frozen=True, kw_only=True)
class Phantom:
    """A synthetic volume with known cells; see the module for how it is made.

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
        """Centre, inverse semi-axes, and q = sum |u|^4 where tissue is whole and where it ends."""
        size = np.array(self.shape) * self._size_um
        semi = 0.48 * size
        edge = min(3 * max(self.voxel_size_um), 0.2 * float(semi.min()))
        whole = (1 - edge / float(semi.min())) ** 4
        if self.tissue == "full":
            return np.concatenate([size / 2, np.zeros(3), [1.0, 2.0]])
        return np.concatenate([size / 2, 1 / semi, [whole, 1.0]])

    @property
    def _tiles(self) -> _Tiles:
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
        counts, labels = tiles.counts(self, lo, hi)
        size = self._size_um
        rows, lost = _place(
            _U(_key(self.seed, _PLACE)),
            _U(_key(self.seed, _LOOK)),
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
            _gaussians(),
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
        """The distinct radii, at equal steps of probability of a normal cut at two standard deviations."""
        low, high = 0.022750131948179195, 0.9772498680518208
        mean, spread = self.radius_um
        levels = low + (high - low) * (np.arange(_RADII) + 0.5) / _RADII
        return np.asarray(mean + spread * ndtri(levels), dtype=np.float64)

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
        _paint_labels(out, np.array(box.start), self._size_um, cells)
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
        _add_balls(light, start, size, cells[:, 1:4].copy(), which, cells[:, 5].copy(), *table.arrays)
        self._add_artefacts(light, box)
        self._add_tissue(light, box)
        shade_z, shade_x = self._shades(box)
        _expose(
            light,
            out,
            start,
            np.array(self.shape),
            shade_z,
            shade_x,
            self.camera_offset,
            self.counts_per_photon,
            self.read_noise**2,
            _U(_key(self.seed, _NOISE)),
            _gaussians(),
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
    def _blur(self) -> _BlurTable:
        return _blur_table(tuple(self._radii.tolist()), *self.psf_sigma_um, *self.psf_tail)

    def _shades(self, box: Box) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        z = (np.arange(box.start[0], box.stop[0]) + 0.5) / self.shape[0]
        x = (np.arange(box.start[2], box.stop[2]) + 0.5) / self.shape[2]
        # math.exp one by one: the vectorised one may round differently by position in the array.
        shade_z = np.array([exp(-self.falloff * v) for v in z], np.float32)
        return shade_z, (1 - self.shading * (2 * x - 1) ** 2).astype(np.float32)

    def _add_artefacts(self, light: npt.NDArray[np.float32], box: Box) -> None:
        if not self.artefacts_per_mm3:
            return
        size = self._size_um
        reach = max(_ARTEFACT_RADIUS_UM[1], self._blur.reach_um)
        lo = np.maximum(0, np.floor((np.array(box.start) * size - reach) / _ARTEFACT_TILE_UM)).astype(
            np.int64
        )
        hi = np.floor((np.array(box.stop) * size + reach) / _ARTEFACT_TILE_UM).astype(np.int64) + 1
        found = _artefacts(
            _U(_key(self.seed, _ARTEFACT)),
            lo,
            hi,
            np.array(self.shape) * size,
            self._tissue,
            self.artefacts_per_mm3 * (_ARTEFACT_TILE_UM / 1000) ** 3,
            self.brightness[1],
        )
        large = found[found[:, 4] > 0]
        _add_blobs(light, np.array(box.start), size, large)
        small = found[found[:, 4] == 0]
        which = np.zeros(len(small), np.int64)
        _add_balls(
            light,
            np.array(box.start),
            size,
            small[:, :3].copy(),
            which,
            small[:, 3].copy(),
            *self._blur.arrays,
        )

    def _add_tissue(self, light: npt.NDArray[np.float32], box: Box) -> None:
        size = self._size_um
        scales = [s for s in _TEXTURE_UM if s[1] >= 1.5 * size.max()]
        amount = self.texture / sqrt(len(scales)) / _SPLINE_STD if scales else 0.0
        texture = np.ones(light.shape, np.float32)
        for number, scale in enumerate(scales if amount else []):
            _add_texture(
                texture,
                np.array(box.start),
                size / np.array([scale[0], scale[1], scale[1]]),
                _U(_key(self.seed, _TEXTURE, number)),
                np.float32(amount),
            )
        _add_tissue(
            light, texture, np.array(box.start), size, self._tissue, self.tissue_level - self.camera_offset
        )


@dataclass(frozen=True)
class _Tiles:
    """The lattice of tiles: how much tissue each row of tiles has, and how many cells fit there."""

    voxels: Triple
    grid: Triple
    row_voxels: npt.NDArray[np.int64]
    row_capacity: npt.NDArray[np.int64]

    @classmethod
    def plan(cls, phantom: Phantom) -> _Tiles:
        # Five separations: enough for the parts around corners, edges and faces to lie apart (see _place).
        side = [max(ceil(5 * phantom.separation_um / v), _TILE_VOXELS) for v in phantom.voxel_size_um]
        grid = [-(-n // s) for n, s in zip(phantom.shape, side, strict=True)]
        voxels, capacity = np.zeros((2, grid[0], grid[1]), np.int64)
        for z in range(grid[0]):
            row_voxels, row_capacity = cls._rows(phantom, side, grid, z, 0, grid[1])
            voxels[z], capacity[z] = row_voxels.sum(axis=1), row_capacity.sum(axis=1)
        return cls((side[0], side[1], side[2]), (grid[0], grid[1], grid[2]), voxels, capacity)

    @staticmethod
    def _rows(
        phantom: Phantom, side: Any, grid: Any, z: int, y0: int, y1: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        voxels = _tissue_voxels(
            z,
            y0,
            y1,
            grid[2],
            np.array(side),
            np.array(phantom.shape),
            phantom._size_um,
            phantom._tissue,
        )
        ball_um3 = pi / 6 * phantom.separation_um**3
        capacity = np.floor(voxels * (_MAX_PACKING * prod(phantom.voxel_size_um) / ball_um3))
        return voxels, capacity.astype(np.int64)

    def counts(
        self, phantom: Phantom, lo: list[int], hi: list[int]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Cells of each tile of a range, and the label of the first one of each."""
        key = _key(phantom.seed, _COUNT)
        out, first = np.zeros((2, *(b - a for a, b in zip(lo, hi, strict=True))), np.int64)
        planes = _split(_U(key), phantom.count, self.row_voxels.sum(axis=1), self.row_capacity.sum(axis=1))
        plane_first = np.cumsum(planes) - planes
        for z in range(lo[0], hi[0]):
            rows = _split(_U(_key(key, 1, z)), planes[z], self.row_voxels[z], self.row_capacity[z])
            row_first = np.cumsum(rows) - rows
            voxels, capacity = self._rows(phantom, self.voxels, self.grid, z, lo[1], hi[1])
            for y in range(lo[1], hi[1]):
                tiles = _split(_U(_key(key, 2, z, y)), rows[y], voxels[y - lo[1]], capacity[y - lo[1]])
                out[z - lo[0], y - lo[1]] = tiles[lo[2] : hi[2]]
                tile_first = np.cumsum(tiles) - tiles + (1 + plane_first[z] + row_first[y])
                first[z - lo[0], y - lo[1]] = tile_first[lo[2] : hi[2]]
        return out, first


# What is derived from a phantom is cached beside it and not in it, so that a phantom that is sent to a
# worker is a few numbers.
@lru_cache(maxsize=8)
def _tiles_of(phantom: Phantom) -> _Tiles:
    return _Tiles.plan(phantom)


@dataclass(frozen=True)
class _BlurTable:
    """Blurred balls of each radius, 1 at their centre, by distance across z and along it."""

    values: npt.NDArray[np.float32]  # radius, across, along
    step_um: float
    across_um: float
    along_um: float

    @property
    def reach_um(self) -> float:
        return max(self.across_um, self.along_um)

    @property
    def arrays(self) -> tuple[npt.NDArray[np.float32], float, float, float]:
        return self.values, self.step_um, self.across_um, self.along_um


@lru_cache(maxsize=8)
def _blur_table(
    radii: tuple[float, ...], sigma_z: float, sigma: float, tail: float, factor: float
) -> _BlurTable:
    """Blur evenly, which has a closed form for a ball; the rest, along z, is a weighted sum of that."""
    step = sigma / 4
    across = float(radii[-1]) + 4 * sigma
    widest = sigma_z * (factor if tail else 1.0)
    along = float(radii[-1]) + 3.5 * widest
    rho = np.arange(ceil(across / step) + 2) * step
    z = np.arange(ceil(along / step) + 2) * step
    shift = np.arange(-ceil(3.5 * widest / step), ceil(3.5 * widest / step) + 1) * step
    kernel = (1 - tail) * _normal(shift, sqrt(sigma_z**2 - sigma**2), step)
    kernel += tail * _normal(shift, sqrt((sigma_z * factor) ** 2 - sigma**2), step)
    reach = z[-1] + shift[-1]
    line = np.arange(-round(reach / step), round(reach / step) + 1) * step
    distance = np.sqrt(rho[:, None] ** 2 + line**2)
    values = np.zeros((len(radii), len(rho), len(z)), np.float32)
    windows = np.lib.stride_tricks.sliding_window_view(np.arange(len(line)), len(kernel))
    middle = len(line) // 2 - len(kernel) // 2
    for i, radius in enumerate(radii):
        even = _blurred_ball(distance, float(radius), sigma)
        blurred = even[:, windows[middle : middle + len(z)]] @ kernel
        # Down to exactly 0 at the table's end, so that no cell stops in a visible step.
        fade = np.minimum(1, (across - rho) / sigma).clip(0)[:, None] * np.minimum(
            1, (along - z) / sigma_z
        ).clip(0)
        values[i] = blurred / blurred[0, 0] * fade
    return _BlurTable(values, step, across, along)


def _normal(x: npt.NDArray[Any], sigma: float, step: float) -> npt.NDArray[np.float64]:
    if sigma < step / 2:
        return np.asarray(x == 0, dtype=np.float64)
    w = np.exp(-0.5 * (x / sigma) ** 2)
    return np.asarray(w / w.sum(), dtype=np.float64)


def _blurred_ball(d: npt.NDArray[np.float64], radius: float, sigma: float) -> npt.NDArray[np.float64]:
    """Return a ball of brightness 1 blurred by an isotropic Gaussian, at distance `d` from its centre."""
    d = np.maximum(d, 1e-3 * sigma)
    a, b = (radius - d) / (sqrt(2) * sigma), (radius + d) / (sqrt(2) * sigma)
    wave = sigma / (sqrt(2 * pi) * d) * (np.exp(-(a**2)) - np.exp(-(b**2)))
    return np.asarray(0.5 * (erf(a) + erf(b)) - wave, dtype=np.float64)


@cache
def _gaussians() -> npt.NDArray[np.float32]:
    """Tabulate the quantiles of the normal distribution: 16 random bits to one normal number."""
    return np.asarray(ndtri((np.arange(65536) + 0.5) / 65536), dtype=np.float32)


# -- hashes (the mixing function of splitmix64) -----------------------------------------------------

_MASK = (1 << 64) - 1


def _key(seed: int, *where: int) -> int:
    """Derive the key of one use of the seed: `_hash`, chained, in Python."""
    key = seed
    for part in where:
        key = (key ^ ((part + 0x9E3779B97F4A7C15) * 0xD1342543DE82EF95)) & _MASK
        key = ((key ^ (key >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        key = ((key ^ (key >> 27)) * 0x94D049BB133111EB) & _MASK
        key ^= key >> 31
    return key


@_jit
def _hash(key, part):  # type: ignore[no-untyped-def]
    key = key ^ ((_U(part) + _U(0x9E3779B97F4A7C15)) * _U(0xD1342543DE82EF95))
    key = (key ^ (key >> _U(30))) * _U(0xBF58476D1CE4E5B9)
    key = (key ^ (key >> _U(27))) * _U(0x94D049BB133111EB)
    return key ^ (key >> _U(31))


@_jit
def _unit(key):  # type: ignore[no-untyped-def]
    return np.float64(key >> _U(11)) * (1.0 / 9007199254740992.0)


# -- 1. how many ------------------------------------------------------------------------------------


@_jit
def _fourth(u):  # type: ignore[no-untyped-def]
    return (u * u) * (u * u)


@_jit
def _tissue_voxels(z, y0, y1, nx, side, shape, size, tissue):  # type: ignore[no-untyped-def]
    """Voxels of tissue in the tiles of some rows of one plane; counted at sample points where cut."""
    out = np.zeros((y1 - y0, nx), np.int64)
    # The least and the greatest |u|^4 of an axis over a tile; sums of them decide most tiles.
    low, high = np.zeros((3, max(y1 - y0, nx))), np.zeros((3, max(y1 - y0, nx)))
    for axis in range(3):
        first = z if axis == 0 else (y0 if axis == 1 else 0)
        n = 1 if axis == 0 else (y1 - y0 if axis == 1 else nx)
        for i in range(n):
            a = ((first + i) * side[axis] * size[axis] - tissue[axis]) * tissue[3 + axis]
            b = (min((first + i + 1) * side[axis], shape[axis]) * size[axis] - tissue[axis]) * tissue[
                3 + axis
            ]
            high[axis, i] = max(_fourth(a), _fourth(b))
            low[axis, i] = 0.0 if a <= 0 <= b else min(_fourth(a), _fourth(b))
    for y in range(y1 - y0):
        for x in range(nx):
            if low[0, 0] + low[1, y] + low[2, x] > tissue[6]:
                continue
            start = (z * side[0], (y0 + y) * side[1], x * side[2])
            ez = min(side[0], shape[0] - start[0])
            ey = min(side[1], shape[1] - start[1])
            ex = min(side[2], shape[2] - start[2])
            if high[0, 0] + high[1, y] + high[2, x] <= tissue[6]:
                out[y, x] = ez * ey * ex
                continue
            hits = 0
            for i in range(_SAMPLES):
                qz = _fourth(((start[0] + (i + 0.5) / _SAMPLES * ez) * size[0] - tissue[0]) * tissue[3])
                for j in range(_SAMPLES):
                    qy = _fourth(((start[1] + (j + 0.5) / _SAMPLES * ey) * size[1] - tissue[1]) * tissue[4])
                    for k in range(_SAMPLES):
                        qx = _fourth(
                            ((start[2] + (k + 0.5) / _SAMPLES * ex) * size[2] - tissue[2]) * tissue[5]
                        )
                        hits += qz + qy + qx <= tissue[6]
            # A sliver that few points hit has a volume too uncertain to promise cells room in it.
            if hits >= 12:
                out[y, x] = ez * ey * ex * hits // _SAMPLES**3
    return out


@_jit
def _binomial(key, n, p):  # type: ignore[no-untyped-def]
    """Binomial for small n; for large n a rounded normal of the same mean and variance."""
    if n <= 64:
        hits = 0
        for i in range(n):
            hits += _unit(_hash(key, i)) < p
        return np.int64(hits)
    g = -6.0
    for i in range(12):
        g += _unit(_hash(key, i))
    return np.int64(np.floor(n * p + np.sqrt(n * p * (1 - p)) * g + 0.5))


@_jit
def _split(key, total, weights, capacity):  # type: ignore[no-untyped-def]
    """Split a number over places by halving; never more than a place's capacity."""
    n = len(weights)
    out = np.zeros(n, np.int64)
    sum_w, sum_c = np.zeros(n + 1, np.int64), np.zeros(n + 1, np.int64)
    for i in range(n):
        sum_w[i + 1], sum_c[i + 1] = sum_w[i] + weights[i], sum_c[i] + capacity[i]
    stack = np.zeros((128, 3), np.int64)
    stack[0, 1], stack[0, 2] = n, total
    depth = 1
    while depth:
        depth -= 1
        a, b, count = stack[depth, 0], stack[depth, 1], stack[depth, 2]
        if count == 0:
            continue
        if b - a == 1:
            out[a] = count
            continue
        mid = (a + b) // 2
        whole = sum_w[b] - sum_w[a]
        left = _binomial(_hash(_hash(key, a), b), count, (sum_w[mid] - sum_w[a]) / whole)
        left = max(left, count - (sum_c[b] - sum_c[mid]), 0)
        left = min(left, sum_c[mid] - sum_c[a], count)
        stack[depth, 0], stack[depth, 1], stack[depth, 2] = a, mid, left
        stack[depth + 1, 0], stack[depth + 1, 1], stack[depth + 1, 2] = mid, b, count - left
        depth += 2
    return out


# -- 2. where ---------------------------------------------------------------------------------------


@_jit
def _part(u, tile, reach):  # type: ignore[no-untyped-def]
    """Part of a tile: on each axis near the low side (1), near the high side (2) or neither (0)."""
    side = np.zeros(3, np.int64)
    d = np.zeros(3)
    for axis in range(3):
        side[axis] = 1 if u[axis] < tile[axis] - u[axis] else 2
        d[axis] = min(u[axis], tile[axis] - u[axis])
    for kind in (3, 2, 1):  # corner, edge, face: near on this many axes
        near = (d[0] < reach[kind]) + (d[1] < reach[kind]) + (d[2] < reach[kind])
        if near >= kind:
            code = 0
            for axis in range(3):
                code = code * 3 + (side[axis] if d[axis] < reach[kind] else 0)
            return kind, code
    return 0, 0


@_jit
def _place(  # type: ignore[no-untyped-def]
    key, look, lo, counts, labels, tile, end, tissue, separation, clustered, spread, radii, brightness, gauss
):
    """Place the cells of a range of tiles; exact for those that are not at the range's border.

    Around corners is within reach[3] of a lattice plane on all three axes, along edges within reach[2]
    on two, on faces within reach[1] on one. With half a separation for faces and 1/sqrt(2) more for each
    next, two parts of one kind are a separation apart, and a part comes near those of an earlier kind
    only if they bound it; a tile of 4.9 separations keeps opposite sides apart as well.
    """
    reach = np.array([0.0, 0.5, 0.5 + np.sqrt(0.5), 0.5 + 2 * np.sqrt(0.5)]) * (separation * 1.0001)
    nz, ny, nx = counts.shape
    total = counts.sum()
    rows = np.zeros((total, 6))
    kind = np.zeros(total, np.int64)
    code = np.zeros(total, np.int64)
    home = np.zeros((total, 3))
    middle = np.zeros((total, 3))  # of the cluster, if any
    keys = np.zeros(total, np.uint64)
    in_cluster = np.zeros(total, np.bool_)
    u, p, size = np.zeros(3), np.zeros(3), np.zeros(3)
    n = 0
    for z in range(nz):
        for y in range(ny):
            for x in range(nx):
                tile_key = _hash(_hash(_hash(key, lo[0] + z), lo[1] + y), lo[2] + x)
                look_key = _hash(_hash(_hash(look, lo[0] + z), lo[1] + y), lo[2] + x)
                corner = ((lo[0] + z) * tile[0], (lo[1] + y) * tile[1], (lo[2] + x) * tile[2])
                for axis in range(3):
                    size[axis] = min(tile[axis], end[axis] - corner[axis])
                for j in range(counts[z, y, x]):
                    cell = _hash(tile_key, 1 + j)
                    keys[n] = cell
                    in_cluster[n] = _unit(_hash(cell, 0)) < clustered
                    trial = 0
                    while True:  # ends: a tile with cells has a twentieth of its volume or more in tissue
                        trial += 1
                        for axis in range(3):
                            t = _unit(_hash(_hash(cell, trial), axis))
                            home[n, axis] = corner[axis]
                            if in_cluster[n] and trial < _TRIALS:
                                m = _unit(_hash(_hash(tile_key, 0), axis)) * size[axis]
                                middle[n, axis] = m
                                t = m + spread * gauss[np.int64(t * 65536)]
                            else:
                                t *= size[axis]
                            u[axis] = t
                            p[axis] = corner[axis] + t
                        if _free(u, p, size, tissue):
                            break
                    kind[n], code[n] = _part(u, tile, reach)
                    rows[n, 0] = labels[z, y, x] + j
                    rows[n, 4] = radii[np.int64(_unit(_hash(_hash(look_key, j), 0)) * len(radii))]
                    share = 0.5 * (_unit(_hash(_hash(look_key, j), 1)) + _unit(_hash(_hash(look_key, j), 2)))
                    rows[n, 5] = brightness[0] * (brightness[1] / brightness[0]) ** share
                    n += 1

    # Buckets of one separation, each a linked list, find what is near.
    origin = np.zeros(3)
    shape = np.zeros(3, np.int64)
    for axis in range(3):
        origin[axis] = lo[axis] * tile[axis]
        shape[axis] = np.int64(counts.shape[axis] * tile[axis] / separation) + 1
    head = np.full((shape[0], shape[1], shape[2]), -1, np.int32)
    after = np.full(total, -1, np.int32)
    lost = 0
    bucket = np.zeros(3, np.int64)
    for stage in (3, 2, 1, 0):
        for i in range(total):
            if kind[i] != stage:
                continue
            for axis in range(3):
                size[axis] = min(tile[axis], end[axis] - home[i, axis])
            done = False
            limit = _TRIALS if stage else _TRIALS_INSIDE
            for trial in range(limit):
                cell = _hash(keys[i], 1000 + 1000000 * stage + trial)
                rest = code[i]
                for axis in (2, 1, 0):
                    side = rest % 3
                    rest //= 3
                    t = _unit(_hash(cell, axis))
                    if in_cluster[i] and trial < 200:
                        # Wider and wider, so that a full cluster spills over its edge.
                        t = middle[i, axis] + spread * (1 + 0.02 * trial) * gauss[np.int64(t * 65536)]
                    elif side == 1:
                        t *= min(reach[stage], size[axis])
                    elif side == 2:
                        t = tile[axis] - reach[stage] * (1 - t)
                    else:
                        t *= size[axis]
                    u[axis] = t
                    p[axis] = home[i, axis] + t
                if not _free(u, p, size, tissue):
                    continue
                k, c = _part(u, tile, reach)
                if k != stage or c != code[i]:
                    continue
                clash = False
                for axis in range(3):
                    bucket[axis] = np.int64((p[axis] - origin[axis]) / separation)
                for bz in range(max(0, bucket[0] - 1), min(shape[0], bucket[0] + 2)):
                    for by in range(max(0, bucket[1] - 1), min(shape[1], bucket[1] + 2)):
                        for bx in range(max(0, bucket[2] - 1), min(shape[2], bucket[2] + 2)):
                            other = head[bz, by, bx]
                            while other >= 0 and not clash:
                                dz, dy = rows[other, 1] - p[0], rows[other, 2] - p[1]
                                dx = rows[other, 3] - p[2]
                                clash = dz * dz + dy * dy + dx * dx < separation * separation
                                other = after[other]
                if not clash:
                    done = True
                    break
            if done:
                rows[i, 1], rows[i, 2], rows[i, 3] = p[0], p[1], p[2]
                after[i] = head[bucket[0], bucket[1], bucket[2]]
                head[bucket[0], bucket[1], bucket[2]] = i
            elif stage:
                kind[i], code[i] = 0, 0
            else:
                lost += 1
    return rows, lost


@_jit
def _free(u, p, size, tissue):  # type: ignore[no-untyped-def]
    """Whether a place is in its tile, the volume and the tissue."""
    q = 0.0
    for axis in range(3):
        if u[axis] < 0 or u[axis] >= size[axis]:
            return False
        q += _fourth((p[axis] - tissue[axis]) * tissue[3 + axis])
    return q <= tissue[6]


@_jit
def _paint_labels(out, start, size, cells):  # type: ignore[no-untyped-def]
    nz, ny, nx = out.shape
    for i in range(len(cells)):
        r = cells[i, 4]
        cz, cy, cx = cells[i, 1] / size[0] - 0.5, cells[i, 2] / size[1] - 0.5, cells[i, 3] / size[2] - 0.5
        for z in range(max(0, int(np.ceil(cz - r / size[0])) - start[0]), nz):
            dz = ((z + start[0]) - cz) * size[0]
            if dz > r:
                break
            for y in range(max(0, int(np.ceil(cy - r / size[1])) - start[1]), ny):
                dy = ((y + start[1]) - cy) * size[1]
                if dy > r:
                    break
                for x in range(max(0, int(np.ceil(cx - r / size[2])) - start[2]), nx):
                    dx = ((x + start[2]) - cx) * size[2]
                    if dx > r:
                        break
                    if dz * dz + dy * dy + dx * dx <= r * r:
                        out[z, y, x] = np.uint32(cells[i, 0])


# -- 3. what they look like -------------------------------------------------------------------------


@_jit
def _span(centre, reach, size, start, n):  # type: ignore[no-untyped-def]
    """First and last voxel of a box, along one axis, whose centre is within reach of a place in um."""
    a = int(np.ceil((centre - reach) / size - 0.5)) - start
    b = int(np.floor((centre + reach) / size - 0.5)) - start + 1
    return max(a, 0), min(b, n)


@_jit
def _add_balls(light, start, size, centres, which, peaks, table, step, across, along):  # type: ignore[no-untyped-def]
    for i in range(len(centres)):
        z0, z1 = _span(centres[i, 0], along, size[0], start[0], light.shape[0])
        y0, y1 = _span(centres[i, 1], across, size[1], start[1], light.shape[1])
        x0, x1 = _span(centres[i, 2], across, size[2], start[2], light.shape[2])
        ball = table[which[i]]
        for z in range(z0, z1):
            t = abs((z + start[0] + 0.5) * size[0] - centres[i, 0]) / step
            k = int(t)
            t -= k
            for y in range(y0, y1):
                dy = (y + start[1] + 0.5) * size[1] - centres[i, 1]
                for x in range(x0, x1):
                    dx = (x + start[2] + 0.5) * size[2] - centres[i, 2]
                    s = np.sqrt(dy * dy + dx * dx)
                    if s >= across:
                        continue
                    s /= step
                    j = int(s)
                    s -= j
                    near = ball[j, k] * (1 - t) + ball[j, k + 1] * t
                    far = ball[j + 1, k] * (1 - t) + ball[j + 1, k + 1] * t
                    light[z, y, x] += np.float32(peaks[i] * (near * (1 - s) + far * s))


@_jit
def _artefacts(key, lo, hi, end, tissue, mean, bright):  # type: ignore[no-untyped-def]
    """Artefacts of a range of their own tiles: z, y, x, brightness, radius (0: a small one)."""
    found = np.zeros((max(hi[0] - lo[0], 0) * max(hi[1] - lo[1], 0) * max(hi[2] - lo[2], 0) * 8, 5))
    n = 0
    p = np.zeros(3)
    for z in range(lo[0], hi[0]):
        for y in range(lo[1], hi[1]):
            for x in range(lo[2], hi[2]):
                tile_key = _hash(_hash(_hash(key, z), y), x)
                for j in range(8):
                    one = _hash(tile_key, j)
                    if _unit(one) >= mean / 8:
                        continue
                    q = 0.0
                    outside = False
                    for axis in range(3):
                        corner = z if axis == 0 else (y if axis == 1 else x)
                        p[axis] = (corner + _unit(_hash(one, axis))) * _ARTEFACT_TILE_UM
                        outside |= p[axis] >= end[axis]
                        q += _fourth((p[axis] - tissue[axis]) * tissue[3 + axis])
                    if outside or q > tissue[6]:
                        continue
                    found[n, 0], found[n, 1], found[n, 2] = p[0], p[1], p[2]
                    if _unit(_hash(one, 3)) < 0.5:
                        found[n, 3] = bright * (0.5 + 2.5 * _unit(_hash(one, 4)))
                        radius = _unit(_hash(one, 5))
                        found[n, 4] = _ARTEFACT_RADIUS_UM[0] * (1 - radius) + _ARTEFACT_RADIUS_UM[1] * radius
                    else:
                        found[n, 3] = bright * (10 + 30 * _unit(_hash(one, 4)))
                    n += 1
    return found[:n]


@_jit
def _add_blobs(light, start, size, blobs):  # type: ignore[no-untyped-def]
    for i in range(len(blobs)):
        r = blobs[i, 4]
        z0, z1 = _span(blobs[i, 0], r, size[0], start[0], light.shape[0])
        y0, y1 = _span(blobs[i, 1], r, size[1], start[1], light.shape[1])
        x0, x1 = _span(blobs[i, 2], r, size[2], start[2], light.shape[2])
        for z in range(z0, z1):
            dz = (z + start[0] + 0.5) * size[0] - blobs[i, 0]
            for y in range(y0, y1):
                dy = (y + start[1] + 0.5) * size[1] - blobs[i, 1]
                for x in range(x0, x1):
                    dx = (x + start[2] + 0.5) * size[2] - blobs[i, 2]
                    s = 1 - (dz * dz + dy * dy + dx * dx) / (r * r)
                    if s > 0:
                        light[z, y, x] += np.float32(blobs[i, 3] * s * s)


@_jit
def _spline(start, n, step):  # type: ignore[no-untyped-def]
    """Node before each voxel centre, and the cubic B-spline weights of the four around it."""
    node = np.zeros(n, np.int64)
    weight = np.zeros((n, 4), np.float32)
    for i in range(n):
        t = (start + i + 0.5) * step
        node[i] = int(np.floor(t))
        t -= node[i]
        weight[i, 0] = (1 - t) ** 3 / 6
        weight[i, 1] = (4 - 6 * t * t + 3 * t * t * t) / 6
        weight[i, 2] = (1 + 3 * t + 3 * t * t - 3 * t * t * t) / 6
        weight[i, 3] = t * t * t / 6
    return node, weight


@_jit
def _add_texture(texture, start, step, key, amount):  # type: ignore[no-untyped-def]
    """Add smooth noise of one scale: a cubic B-spline with hashed coefficients."""
    nz, ny, nx = texture.shape
    node_z, wz = _spline(start[0], nz, step[0])
    node_y, wy = _spline(start[1], ny, step[1])
    node_x, wx = _spline(start[2], nx, step[2])
    my, mx = node_y[-1] - node_y[0] + 4, node_x[-1] - node_x[0] + 4
    ring = np.zeros((4, my, mx), np.float32)
    plane = np.zeros((my, mx), np.float32)
    line = np.zeros(mx, np.float32)
    held = node_z[0] - 2
    for z in range(nz):
        while held < node_z[z] + 2:
            held += 1
            plane_key = _hash(key, held)
            for j in range(my):
                line_key = _hash(plane_key, node_y[0] - 1 + j)
                for i in range(mx):
                    value = _hash(line_key, node_x[0] - 1 + i)
                    ring[held & 3, j, i] = np.float32(2 * _unit(value) - 1) * amount
        a, b, c, d = (held + 1) & 3, (held + 2) & 3, (held + 3) & 3, held & 3
        for j in range(my):
            for i in range(mx):
                plane[j, i] = (wz[z, 0] * ring[a, j, i] + wz[z, 1] * ring[b, j, i]) + (
                    wz[z, 2] * ring[c, j, i] + wz[z, 3] * ring[d, j, i]
                )
        for y in range(ny):
            j = node_y[y] - node_y[0]
            for i in range(mx):
                line[i] = (wy[y, 0] * plane[j, i] + wy[y, 1] * plane[j + 1, i]) + (
                    wy[y, 2] * plane[j + 2, i] + wy[y, 3] * plane[j + 3, i]
                )
            for x in range(nx):
                i = node_x[x] - node_x[0]
                texture[z, y, x] += (wx[x, 0] * line[i] + wx[x, 1] * line[i + 1]) + (
                    wx[x, 2] * line[i + 2] + wx[x, 3] * line[i + 3]
                )


@_jit
def _add_tissue(light, texture, start, size, tissue, level):  # type: ignore[no-untyped-def]
    nz, ny, nx = light.shape
    qx = np.zeros(nx)
    for x in range(nx):
        qx[x] = _fourth(((start[2] + x + 0.5) * size[2] - tissue[2]) * tissue[5])
    slope = 1 / (tissue[7] - tissue[6])
    for z in range(nz):
        qz = _fourth(((start[0] + z + 0.5) * size[0] - tissue[0]) * tissue[3])
        for y in range(ny):
            qy = _fourth(((start[1] + y + 0.5) * size[1] - tissue[1]) * tissue[4])
            for x in range(nx):
                s = min(max((tissue[7] - (qz + qy + qx[x])) * slope, 0.0), 1.0)
                light[z, y, x] += np.float32(level * (s * s * (3 - 2 * s))) * max(
                    texture[z, y, x], np.float32(0)
                )


@_jit
def _expose(light, out, start, shape, shade_z, shade_x, offset, gain, read, key, gauss):  # type: ignore[no-untyped-def]
    """Shade, and take the picture: photon noise with the skewness of Poisson, read noise, 16 bits."""
    nz, ny, nx = light.shape
    for z in range(nz):
        for y in range(ny):
            row = _U(start[0] + z) * _U(shape[1]) + _U(start[1] + y)
            row_key = _hash(key, row)
            for x in range(nx):
                signal = light[z, y, x] * shade_z[z] * shade_x[x]
                bits = _hash(row_key, start[2] + x)
                g = gauss[bits & _U(0xFFFF)]
                e = gauss[(bits >> _U(16)) & _U(0xFFFF)]
                shot = np.sqrt(gain * signal) * g + gain * (g * g - 1) / 6
                value = offset + signal + shot + np.sqrt(read) * e
                out[z, y, x] = np.uint16(min(max(np.floor(value + 0.5), 0.0), 65535.0))
