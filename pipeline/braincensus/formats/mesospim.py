"""What mesoSPIM-control writes beside its images: names of tiles, and `_meta.txt` sidecars.

Patterns are tolerant, because both have changed from release to release.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from braincensus.formats.checks import is_voxel_size
from braincensus.formats.readers import Found, VoxelSize
from braincensus_kernels.boxes import Triple

_NAME_PART = {
    "magnification": re.compile(r"Mag[_ ]?([\d.]+ ?x?)", re.I),
    "tile": re.compile(r"Tile[_ ]?(\d+)", re.I),
    "channel": re.compile(r"(?:^|_)Ch[_ ]?(\d+)", re.I),
    "filter": re.compile(r"(?:^|_)Flt[_ ]?([^_]+)", re.I),
    "shutter": re.compile(r"(?:^|_)Sh[_ ]?(\d+|left|right|both)", re.I),
    "rotation": re.compile(r"(?:^|_)Rot[_ ]?(-?\d+)", re.I),
}
_ENTRY = re.compile(r"^\s*\[(?P<key>[^\]]+)\]\s*(?P<value>.*)$")
_NUMBER = re.compile(r"[-+]?(?:\d+[.,]?\d*|[.,]\d+)(?:[eE][-+]?\d+)?")


def parse_name(name: str) -> dict[str, str]:
    """Read what the name of a mesoSPIM file says about it.

    Examples
    --------
    >>> parse_name("brain_Mag5x_Tile3_Ch488_Flt525-50_Sh1_Rot0.ome.zarr")["channel"]
    '488'
    >>> parse_name("something else.tif")
    {}
    """
    found = {part: pattern.search(name) for part, pattern in _NAME_PART.items()}
    return {part: match[1].strip() for part, match in found.items() if match}


@dataclass(frozen=True)
class Sidecar:
    """A `_meta.txt`: what the microscope was set to, by section, because keys repeat."""

    path: Path
    sections: Mapping[str, Mapping[str, str]]

    @classmethod
    def read(cls, path: Path) -> Sidecar:
        """Read a sidecar; lines that are not understood are passed over."""
        sections: dict[str, dict[str, str]] = {"": {}}
        section = ""
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            if match := _ENTRY.match(line):
                key = match["key"].strip().lower()
                sections[section].setdefault(key, match["value"].strip())
            elif line.strip():
                section = line.strip().strip("[]:= ").upper()
                sections.setdefault(section, {})
        return cls(path, sections)

    def number(self, key: str, *, section: str) -> float | None:
        """Return a number from a section, or else from the first section that has the key."""
        holders = [self.sections.get(section, {}), *self.sections.values()]
        text = next((s[key] for s in holders if s.get(key)), "")
        match = _NUMBER.search(text)
        return float(match[0].replace(",", ".")) if match else None

    def voxel_size(self, shape_yx: Sequence[int]) -> tuple[VoxelSize | None, tuple[str, ...]]:
        """Return the voxel size, and what had to be assumed for it.

        The camera's binning is not recorded, but it shows: the images are smaller than the
        camera's `x_pixels` and `y_pixels` by the same whole factor.
        """
        step = self.number("z_stepsize", section="POSITION")
        pixel = self.number("pixelsize in um", section="CFG")
        if step is None or pixel is None or not is_voxel_size(um := (abs(step), pixel, pixel)):
            return None, ()
        notes: tuple[str, ...] = ()
        binning = self._binning(shape_yx)
        if binning > 1:
            um = (um[0], pixel * binning, pixel * binning)
            notes = (
                f"images are binned {binning}x{binning} (camera pixels of {pixel:g} um in {self.path.name})",
            )
        return VoxelSize(um, f"mesoSPIM sidecar {self.path.name}"), notes

    def _binning(self, shape_yx: Sequence[int]) -> int:
        camera = [self.number(k, section="CAMERA PARAMETERS") for k in ("y_pixels", "x_pixels")]
        if None in camera:
            return 1
        pixels = sorted(int(n) for n in camera if n)
        factors = {(p // n, p % n) for p, n in zip(pixels, sorted(shape_yx), strict=False)}
        factor, rest = factors.pop() if len(factors) == 1 else (1, 0)
        return factor if rest == 0 and factor in (2, 4, 8) else 1

    def missing_planes(self, planes: int) -> str | None:
        """Say how many planes the image lacks; the writer is known to lose trailing ones."""
        expected = self.number("z_planes", section="POSITION")
        if expected is None or int(expected) <= planes:
            return None
        missing = int(expected) - planes
        word = "planes" if missing > 1 else "plane"
        return f"{missing} trailing {word} missing: {planes} of {int(expected)} ({self.path.name})"


def add_sidecar(found: Found, path: Path, full_shape: Triple) -> Found:
    """Complete what a format found with what the sidecar says, if there is one.

    `full_shape` is that of the image at full resolution, which the sidecar describes.
    """
    sidecar = sidecar_of(path)
    if sidecar is None:
        return found
    notes: tuple[str, ...] = ()
    described, assumed = sidecar.voxel_size(full_shape[1:])
    if described and found.voxel_size is None:
        found, notes = replace(found, voxel_size=described), assumed
    elif described and found.voxel_size and not np.allclose(described.um, found.voxel_size.um, rtol=0.02):
        notes = (f"{sidecar.path.name} says {', '.join(f'{v:g}' for v in described.um)} um instead",)
    if lost := sidecar.missing_planes(full_shape[0]):
        notes += (lost,)
    return replace(found, notes=found.notes + notes)


def sidecar_of(path: Path) -> Sidecar | None:
    """Find the sidecar of an image file, a folder of planes, or a tile inside an OME-Zarr store."""
    names = [f"{path.name}_meta.txt", f"{_stem(path.name)}_meta.txt"]
    candidates = [path.parent / name for name in names]
    group = path.parent  # a tile: X.ome.zarr/<tile>.ome.zarr, described by X.ome.zarr_<tile>_meta.txt
    candidates += [
        group.parent / f"{g}_{t}_meta.txt"
        for g in (group.name, _stem(group.name))
        for t in (path.name, _stem(path.name))
    ]
    for candidate in candidates:
        if candidate.is_file():
            return Sidecar.read(candidate)
    inside = sorted(path.glob("*_meta.txt")) if path.is_dir() else []
    return Sidecar.read(inside[0]) if len(inside) == 1 else None


def _stem(name: str) -> str:
    return re.sub(r"(\.ome)?\.[A-Za-z0-9]{2,4}$", "", name)
