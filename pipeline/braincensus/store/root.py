"""The attributes of the output's root, the only judge of what the output is and whether it is whole."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from braincensus.store.files import write_json

KEY = "braincensus"
"""Our one key among the root's attributes."""

RESERVED = ("status", "token", "layout", "voxel_size_um", "begun")
"""What the store itself keeps under that key."""


def root_attributes(place: Path) -> dict[str, Any] | None:
    """Return the attributes of a zarr v3 group, or None where there is no such group."""
    try:
        document = json.loads((place / "zarr.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(document, dict) or document.get("node_type") != "group":
        return None
    attributes = document.get("attributes", {})
    return attributes if isinstance(attributes, dict) else None


def recorded_at(place: Path) -> dict[str, Any] | None:
    """Return what a run recorded about itself, or None where no output is."""
    recorded = (root_attributes(place) or {}).get(KEY)
    return recorded if isinstance(recorded, dict) and "status" in recorded else None


def write_group(place: Path, attributes: Mapping[str, Any]) -> None:
    """Write a zarr v3 group with these attributes and no others, in one move."""
    write_json(place / "zarr.json", {"attributes": dict(attributes), "zarr_format": 3, "node_type": "group"})


def progress(recorded: Mapping[str, Any]) -> str:
    """Say for people how far the run got that wrote this."""
    begun = f"begun {recorded.get('begun', 'at an unknown time')}"
    if recorded.get("status") == "complete":
        cells = f", {recorded['n_cells']:,} cells" if isinstance(recorded.get("n_cells"), int) else ""
        return f"a run {begun}, finished{cells}"
    steps = [name for name in recorded if name not in RESERVED]
    return f"a run {begun}, which recorded {', '.join(steps) or 'nothing'} so far"
