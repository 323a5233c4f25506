"""Phantoms that are nowhere stored: a small JSON file, or the `Phantom` itself; voxels are made when read.

A volume of terabytes for which nobody needs a disk. Its cells are known, and any box of it can be had by
itself, the same whoever asks.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from braincensus.errors import InputError, explain
from braincensus.formats.checks import check_index
from braincensus.formats.readers import Found, Reader, Voxels, VoxelSize
from braincensus_kernels.boxes import Box
from braincensus_kernels.phantom import Phantom

ENDING = ".phantom.json"
"""What the names of such files end in."""

_KIND = "braincensus phantom"
_CHUNK = 128  # nothing is stored in chunks; what is worth asking for at once


@dataclass(frozen=True)
class PhantomReader(Reader):
    """Makes voxels of a phantom."""

    phantom: Phantom

    def _read(self, box: Box) -> Voxels:
        return self.phantom.render(box)


def open_phantom(source: Phantom | Path, *, channel: int, timepoint: int, level: int) -> Found:
    """Open a phantom, or the file of one.

    Raises
    ------
    InputError
        If the file does not describe a phantom.
    ConfigError
        If another channel, time point or level than the first is asked for.
    """
    phantom = read_phantom_file(source) if isinstance(source, Path) else source
    for word, value in (("channel", channel), ("timepoint", timepoint), ("level", level)):
        check_index(value, 1, word=word, what="a phantom")
    z, y, x = (min(n, _CHUNK) for n in phantom.shape)
    return Found(
        format="phantom, made when read",
        reader=PhantomReader(phantom),
        shape=phantom.shape,
        dtype=np.dtype(np.uint16),
        chunks=(z, y, x),
        voxel_size=VoxelSize(phantom.voxel_size_um, "the phantom"),
        identity={"kind": "phantom", "dtype": "uint16", **json.loads(json.dumps(asdict(phantom)))},
    )


def write_phantom_file(path: Path, phantom: Phantom) -> None:
    """Write what a phantom is made from, as JSON of a few lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {"kind": _KIND, **asdict(phantom)}
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def read_phantom_file(path: Path) -> Phantom:
    """Read what `write_phantom_file` wrote.

    Raises
    ------
    InputError
        If it is not such a file, or one whose phantom cannot be made.
    """
    try:
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if document.pop("kind") != _KIND:
            raise ValueError("it is of another kind")
        parameters: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in document.items()}
        return Phantom(**parameters)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as err:
        raise InputError(
            explain(
                f"{path} does not describe a phantom",
                expected="what `braincensus phantom NAME.phantom.json` writes",
                found=f"{type(err).__name__}: {err}",
            )
        ) from err
