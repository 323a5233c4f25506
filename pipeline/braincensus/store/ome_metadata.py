"""The attributes of a finished output, as pure values: OME-Zarr 0.5 images and labels, ngio tables.

Positions: a voxel's coordinate is that of its centre, and the centre of the first voxel of full
resolution is the origin. So a coarser grid starts at half its spacing less half a voxel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

VERSION = "0.5"
TripleFloat = tuple[float, float, float]

_AXES = [{"name": name, "type": "space", "unit": "micrometer"} for name in "zyx"]


def grid_origin_um(spacing_um: TripleFloat, voxel_size_um: TripleFloat) -> TripleFloat:
    """Return the centre of the first cell of a coarser grid that shares the volume's corner.

    Examples
    --------
    >>> grid_origin_um((100.0, 100.0, 100.0), (5.0, 5.0, 2.0))
    (47.5, 47.5, 49.0)
    """
    z, y, x = ((spacing - voxel) / 2 for spacing, voxel in zip(spacing_um, voxel_size_um, strict=True))
    return z, y, x


def multiscale(
    name: str, grids: Sequence[tuple[TripleFloat, TripleFloat]], *, how: str | None
) -> list[dict[str, Any]]:
    """Describe an image whose levels ``0, 1, ...`` have these (scale, translation) in um, finest first.

    `how` names the way that coarser levels are made; None where there are none.
    """
    datasets = [
        {
            "path": str(level),
            "coordinateTransformations": [
                {"type": "scale", "scale": list(scale)},
                {"type": "translation", "translation": list(translation)},
            ],
        }
        for level, (scale, translation) in enumerate(grids)
    ]
    image = {"name": name, "axes": _AXES, "datasets": datasets}
    return [image if how is None else {**image, "type": how}]


def image(
    name: str,
    grids: Sequence[tuple[TripleFloat, TripleFloat]],
    *,
    how: str | None,
    label: str,
    color: str,
    top: float,
) -> dict[str, Any]:
    """Attributes of an image of one channel, shown from 0 to `top` in `color` (RRGGBB)."""
    window = {"min": 0.0, "max": top, "start": 0.0, "end": top}
    channel = {
        "active": True,
        "coefficient": 1.0,
        "color": color,
        "family": "linear",
        "inverted": False,
        "label": label,
        "window": window,
    }
    return {
        "version": VERSION,
        "multiscales": multiscale(name, grids, how=how),
        "omero": {"channels": [channel], "rdefs": {"model": "color"}},
    }


def label_image(name: str, grids: Sequence[tuple[TripleFloat, TripleFloat]]) -> dict[str, Any]:
    """Attributes of the instance labels; no colours or properties (77 MB of JSON for 1e6 cells)."""
    return {
        "version": VERSION,
        "multiscales": multiscale(name, grids, how="nearest"),
        "image-label": {"version": VERSION, "source": {"image": "../../"}},
    }


def label_list(names: Sequence[str]) -> dict[str, Any]:
    """Attributes of the ``labels`` group; without the version, ngio would empty the list."""
    return {"version": VERSION, "labels": list(names)}


def feature_table(label: str) -> dict[str, Any]:
    """Attributes of an ngio table with one row per label of a label image."""
    return {
        "type": "feature_table",
        "table_version": "1",
        "backend": "parquet",
        "index_key": "label",
        "index_type": "int",
        "instance_key": "label",
        "region": {"path": f"../labels/{label}"},
    }


def generic_table(index_key: str) -> dict[str, Any]:
    """Attributes of an ngio table of any other kind."""
    return {
        "type": "generic_table",
        "table_version": "1",
        "backend": "parquet",
        "index_key": index_key,
        "index_type": "int",
    }
