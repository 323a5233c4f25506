"""A small picture of the volume behind the page's map: tile medians of the intensity stage, projected.

Drawn by a worker, slab by slab, from a map that is 512 times smaller than the volume.
"""

from __future__ import annotations

import zlib
from contextlib import suppress
from typing import Any
from uuid import uuid4

import numpy as np
from distributed import Client, Future

from braincensus.stages.intensity import TILE_MEDIAN
from braincensus.store import Output
from braincensus.watch.tell import Unwatched, Watch
from braincensus_kernels.boxes import Box

_MOST_PIXELS = 320


def show_picture(watch: Unwatched, client: Client, output: Output) -> None:
    """Have a worker draw the volume; a task like others, whose loss is none."""
    if not isinstance(watch, Watch):
        return

    def keep(drawn: Future) -> None:
        with suppress(Exception):
            if drawn.status == "finished":
                watch.picture = drawn.result()
        drawn.release()

    with suppress(Exception):
        future = client.submit(draw, output, key=f"draw-brain-{uuid4().hex[:12]}", pure=False)
        future.add_done_callback(keep)


def draw(output: Output) -> dict[str, Any]:
    """Return the volume seen along z (y, x) and along x (y, z): uint8, at most 320 pixels a side.

    Returns
    -------
    dict
        For ``top`` and ``side``: ``shape``, and ``pixels`` compressed; 255 is the brightest tissue.
    """
    shape, chunk = output.array(TILE_MEDIAN).shape, output.array(TILE_MEDIAN).chunks
    step = tuple(-(-n // _MOST_PIXELS) for n in shape)
    small = tuple(-(-n // s) for n, s in zip(shape, step, strict=True))
    top, side = (np.zeros((small[1], small[a]), np.float32) for a in (2, 0))
    for z in range(0, shape[0], chunk[0]):
        for y in range(0, shape[1], chunk[1]):
            stop = (min(z + chunk[0], shape[0]), min(y + chunk[1], shape[1]), shape[2])
            median = np.nan_to_num(output.read_block(TILE_MEDIAN, Box((z, y, 0), stop)))
            zs, ys, xs = (np.arange(a, b) // s for a, b, s in zip((z, y, 0), stop, step, strict=True))
            np.maximum.at(top, np.ix_(ys, xs), median.max(axis=0))
            np.maximum.at(side, np.ix_(ys, zs), median.max(axis=2).T)
    brightest = float(np.percentile(top, 97)) or 1.0
    return {name: _packed(view / brightest) for name, view in (("top", top), ("side", side))}


def _packed(view: np.ndarray) -> dict[str, Any]:
    pixels = (np.clip(view, 0, 1) * 255).astype(np.uint8)
    return {"shape": list(pixels.shape), "pixels": zlib.compress(pixels.tobytes())}
