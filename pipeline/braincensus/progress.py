"""What a run tells while it is under way; the command line draws it, the API can ignore it."""

from __future__ import annotations

from typing import Protocol

STAGE_TITLES = {
    "convert": "converting the input",
    "phantom": "writing the phantom",
    "intensity": "intensity range",
    "segment": "foreground",
    "threshold": "threshold",
    "label": "labelling",
    "stitch": "stitching",
    "relabel": "final labels",
    "measure": "cell table, density",
    "pyramid": "pyramids",
    "train": "training",
    "calibrate": "calibrating",
}
"""What people are shown for the name of a stage."""

COUNTED = {"measure", "train", "calibrate"}
"""Stages that count something else than voxels."""


class Progress(Protocol):
    """Receives what happens during a run; every method must return quickly."""

    def message(self, text: str) -> None:
        """Show one line that stays: an assumption made, an address, a warning."""

    def start(self, stage: str, voxels: int) -> None:
        """Begin a stage that will work through this many voxels."""

    def advance(self, stage: str, voxels: int) -> None:
        """Count voxels that are done."""

    def finish(self, stage: str, seconds: float) -> None:
        """End a stage."""


class Silent:
    """Says nothing: the default of the Python API."""

    def message(self, text: str) -> None:
        """Ignore."""

    def start(self, stage: str, voxels: int) -> None:
        """Ignore."""

    def advance(self, stage: str, voxels: int) -> None:
        """Ignore."""

    def finish(self, stage: str, seconds: float) -> None:
        """Ignore."""
