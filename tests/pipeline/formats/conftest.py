"""Small stores as the microscopes and their programs write them; fixtures that are functions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

SIDECAR = """[Metadata for file] D:/data/brain.tiff
[z_stepsize] 9.0
[z_planes] 99

CFG
[Laser] 488 nm
[Intensity (%)] 20
[Zoom] 2x
[Pixelsize in um] {pixel}
[Filter] 525/50
[Shutter] Left

POSITION
[x_pos] 10.0
[z_start] 0
[z_end] 200
[z_stepsize] {step}
[z_planes] {planes}
[rot] 0

CAMERA PARAMETERS
[camera_exposure] 0.02
[x_pixels] {x_pixels}
[y_pixels] {y_pixels}
"""


def _voxels(shape: tuple[int, ...] = (20, 50, 60), dtype: Any = np.uint16) -> np.ndarray:
    """Voxels that all differ from their neighbours, so that a shift or a transposition shows."""
    return (np.arange(np.prod(shape)) % 60_013).reshape(shape).astype(dtype)


def _sidecar(
    path: Path,
    *,
    step: float = 5,
    pixel: float = 5.26,
    planes: int = 20,
    x_pixels: int = 60,
    y_pixels: int = 50,
) -> None:
    text = SIDECAR.format(step=step, pixel=pixel, planes=planes, x_pixels=x_pixels, y_pixels=y_pixels)
    path.write_text(text)


def _write_image(
    path: Path,
    levels: list[np.ndarray],
    *,
    axes: str = "zyx",
    zarr_format: int = 3,
    scales: list[list[float]] | None = None,
    unit: str | None = "micrometer",
    chunks: tuple[int, ...] | None = None,
    version: str | None = None,
    multiscale: dict[str, Any] | None = None,
    level_attributes: list[dict[str, Any]] | None = None,
    **array_options: Any,
) -> Path:
    """Write an OME-Zarr image; `multiscale` overrides parts of its metadata (None removes one)."""
    group = zarr.open_group(path, mode="w", zarr_format=zarr_format)
    for i, level in enumerate(levels):
        array = group.create_array(
            str(i), shape=level.shape, dtype=level.dtype, chunks=chunks or (16,) * level.ndim, **array_options
        )
        array[...] = level
        if level_attributes:
            array.attrs.update(level_attributes[i])
    version = version or ("0.5" if zarr_format == 3 else "0.4")
    described: dict[str, Any] = {
        "version": version,
        "axes": [
            {"name": n, "type": "space"} | ({"unit": unit} if unit else {})
            if n in "zyx"
            else {"name": n, "type": {"c": "channel", "t": "time"}[n]}
            for n in axes
        ],
        "datasets": [
            {"path": str(i)}
            | ({"coordinateTransformations": [{"type": "scale", "scale": scales[i]}]} if scales else {})
            for i in range(len(levels))
        ],
    }
    described.update(multiscale or {})
    described = {k: v for k, v in described.items() if v is not None}
    if zarr_format == 3:
        group.attrs["ome"] = {"version": version, "multiscales": [described]}
    else:
        group.attrs["multiscales"] = [described]
    return path


@pytest.fixture
def voxels() -> Any:
    return _voxels


@pytest.fixture
def sidecar() -> Any:
    return _sidecar


@pytest.fixture
def write_image() -> Any:
    return _write_image
