"""Volumes with labels, and which of their regions are held out. First step of a supervised training.

    volume, labels (drawn by hand, or a finished census) -> Pair -> blocks -> trained on | held out -> crops

Volumes are cut into blocks a little larger than a crop. A seeded order of the blocks says which are looked
at, and which of those are held out: one in five, of those with cells and of those without. A crop to train
on may lie anywhere, but never on a voxel of a block that is held out. Two crops of one cell are nearly the
same; were they drawn first and held out after, validation would praise what was learnt by heart.

Nothing is loaded whole: labels of at most `_BLOCKS` blocks are read once, then one crop at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from braincensus.errors import ConfigError, InputError, explain
from braincensus.result import open_result
from braincensus.training.crops import Source
from braincensus.volume import Volume, open_volume
from braincensus_kernels.boxes import Box, Triple
from braincensus_kernels.models.supervised.training import DrawLabelledCrop, LabelledCrop
from braincensus_kernels.models.training import INPUT_TOP

_BLOCKS = 1024
_SHARE_WITH_CELLS = 0.8  # of crops to train on: cells are rare, and a crop without any teaches little
_TRIES = 8
_MADE_BY = (("foreground", "model"), ("labelling", "method"))


@dataclass(frozen=True)
class Pair:
    """A volume and the labels of its voxels."""

    volume: Volume
    labels: Volume
    """Whole numbers: 0 is background, all others are cells."""
    labelled_by: str
    """For people."""

    def cells(self, box: Box) -> NDArray[np.bool_]:
        """Read where cells are."""
        found: NDArray[np.bool_] = self.labels.read(box) > 0
        return found


@dataclass(frozen=True)
class Block:
    """A region of one of the volumes."""

    pair: int
    box: Box
    cells: int
    """Voxels of cells in it."""

    def middle(self, side: int) -> Box:
        """Return the crop in its middle."""
        z, y, x = ((a + b - side) // 2 for a, b in zip(self.box.start, self.box.stop, strict=True))
        return Box((z, y, x), (z + side, y + side, x + side))


@dataclass(frozen=True)
class Split:
    """Blocks to train on and blocks held out, in the seeded order."""

    training: tuple[Block, ...]
    held_out: tuple[Block, ...]

    @property
    def cells_share(self) -> float:
        """Voxels of cells, of those looked at."""
        blocks = self.training + self.held_out
        return sum(b.cells for b in blocks) / sum(b.box.size for b in blocks)


def pair(volume: Volume, labels: Volume, *, labelled_by: str = "given labels") -> Pair:
    """Put a volume and its labels together.

    Raises
    ------
    ConfigError
        If they differ in shape.
    InputError
        If the labels are not whole numbers.
    """
    if labels.shape != volume.shape:
        raise ConfigError(
            explain(
                f"the labels {labels.source} do not fit the volume {volume.source}",
                expected=f"labels of {_times(volume.shape)} voxels, as the volume has",
                found=_times(labels.shape),
                cause="another level of the pyramid, or labels of a crop",
                remedy="give labels and volume of the same voxels (--level chooses the volume's)",
            )
        )
    if labels.dtype.kind not in "bui":
        raise InputError(
            explain(
                f"{labels.source} does not hold labels",
                expected="whole numbers: 0 for background, others for cells",
                found=f"{labels.dtype} values",
                cause="an image or a probability",
                remedy="threshold a probability first, or give the labels",
            )
        )
    return Pair(volume, labels, labelled_by)


def pair_of_census(output: str | Path, *, volume: Volume | None = None) -> Pair:
    """Take a finished census as labels: what its foreground model and labelling found.

    Parameters
    ----------
    output
        Of `braincensus run`.
    volume
        The volume it counted; None to open it from where the census says that it was.

    Raises
    ------
    OutputError
        If there is no finished output.
    InputError
        If the volume is not there any more, or has changed.
    ConfigError
        If `volume` is of another shape.
    """
    result = open_result(output)
    about = result.provenance
    recorded, selection = about["input"], about["config"]["input"]
    if volume is None:
        if not Path(recorded["source"]).exists():
            raise InputError(
                explain(
                    f"the volume that {output} counted is not where it was",
                    expected=recorded["source"],
                    cause="it was moved, given as an array, or named from another folder",
                    remedy="give it: INPUT before --from-census, or volume=open_volume(...)",
                )
            )
        volume = open_volume(
            recorded["source"],
            channel=selection["channel"],
            timepoint=selection["timepoint"],
            level=selection["level"],
            voxel_size_um=selection["voxel_size_um"],
        )
        if volume.identity != recorded["identity"]:
            changed = [k for k in recorded["identity"] if volume.identity.get(k) != recorded["identity"][k]]
            raise InputError(
                explain(
                    f"{recorded['source']} is not what {output} counted",
                    found=f"another {', '.join(changed) or 'identity'}",
                    cause="it was written anew since",
                    remedy="count it again; or, if its voxels are the same, give it as INPUT",
                )
            )
    labels = open_volume(result.labels, voxel_size_um=volume.voxel_size_um)
    model, method = (about["config"][part][name] for part, name in _MADE_BY)
    name = Path(output).name
    return pair(
        volume,
        labels,
        labelled_by=f"{name}, a census ({model}, {method}) that found {result.n_cells:,} cells",
    )


def split_blocks(pairs: Sequence[Pair], *, side: int, share: float, seed: int) -> Split:
    """Look at the labels of blocks in a seeded order, and hold some of them out.

    Parameters
    ----------
    pairs
        Of volumes no smaller than a crop.
    side
        Of a crop.
    share
        Of the blocks to hold out.
    seed
        Of the order.

    Raises
    ------
    ConfigError
        If there are no cells, or all in one block.
    """
    grids = [tuple(max(1, n // side) for n in p.volume.shape) for p in pairs]
    first = np.concatenate([[0], np.cumsum([int(np.prod(grid)) for grid in grids])])
    order = np.random.default_rng((seed, 11)).permutation(int(first[-1]))[:_BLOCKS]
    looked_at = []
    for number in order:
        at = int(np.searchsorted(first, number, side="right")) - 1
        index = np.unravel_index(int(number - first[at]), grids[at])
        box = _block(pairs[at].volume.shape, grids[at], tuple(int(i) for i in index))
        looked_at.append(Block(at, box, int(pairs[at].cells(box).sum())))
    with_cells = [block for block in looked_at if block.cells]
    without = [block for block in looked_at if not block.cells]
    if not with_cells:
        raise ConfigError(
            explain(
                "the labels are empty",
                expected="voxels that are not 0",
                found=f"none in {len(looked_at)} blocks of {', '.join(p.labels.source for p in pairs)}",
                cause="another channel or level, or a census that found nothing",
            )
        )
    if len(with_cells) < 2:
        raise ConfigError(
            explain(
                "cells are in one block only: none is left to be held out",
                expected=f"two blocks of {side}^3 voxels with cells, or more",
                found=f"{len(looked_at)} in all, of {', '.join(_times(p.volume.shape) for p in pairs)}",
                remedy="use smaller crops (--crop 32 or 16), or more volumes",
            )
        )
    n_cells = min(max(1, round(share * len(with_cells))), len(with_cells) - 1)
    n_without = round(share * len(without))
    return Split(
        training=(*with_cells[n_cells:], *without[n_without:]),
        held_out=(*with_cells[:n_cells], *without[:n_without]),
    )


def read_pair(pairs: Sequence[Pair], sources: Sequence[Source], number: int, box: Box) -> LabelledCrop:
    """Read a crop of one of the volumes: intensities in [0, 1] by the range of its tissue, and cells."""
    source = sources[number]
    image = source.scaled(source.read(box)) / np.float32(INPUT_TOP)
    return image, pairs[number].cells(box)


def middles(
    pairs: Sequence[Pair], sources: Sequence[Source], blocks: Sequence[Block], side: int
) -> Iterator[LabelledCrop]:
    """Read the crop in the middle of each block."""
    for block in blocks:
        yield read_pair(pairs, sources, block.pair, block.middle(side))


def draw_labelled_crops(
    pairs: Sequence[Pair], sources: Sequence[Source], split: Split, side: int
) -> DrawLabelledCrop:
    """Return the function that draws crops to train on: four in five around blocks with cells."""
    with_cells = [block for block in split.training if block.cells]
    without = [block for block in split.training if not block.cells]
    held_out = [
        [np.array([getattr(b.box, end) for b in split.held_out if b.pair == number]).reshape(-1, 3)
         for end in ("start", "stop")]
        for number in range(len(pairs))
    ]  # fmt: skip

    def is_free(number: int, start: NDArray[np.int64]) -> bool:
        starts, stops = held_out[number]
        return not bool(((start < stops) & (start + side > starts)).all(axis=1).any())

    def draw(rng: np.random.Generator) -> LabelledCrop:
        kind = with_cells if not without or rng.random() < _SHARE_WITH_CELLS else without
        block = kind[int(rng.integers(len(kind)))]
        low, high = np.array(block.box.start), np.array(block.box.stop)
        room = np.array(pairs[block.pair].volume.shape) - side
        for _ in range(_TRIES):
            start = np.clip(rng.integers(low - side // 2, high - side // 2), 0, room)
            if is_free(block.pair, start):
                break
        else:
            start = rng.integers(low, high - side + 1)
        z, y, x = (int(v) for v in start)
        return read_pair(pairs, sources, block.pair, Box((z, y, x), (z + side, y + side, x + side)))

    return draw


def _block(shape: Triple, grid: tuple[int, ...], index: tuple[int, ...]) -> Box:
    """Return one of the blocks, all nearly of one size, that the volume is cut into."""
    start = [n * i // k for n, i, k in zip(shape, index, grid, strict=True)]
    stop = [n * (i + 1) // k for n, i, k in zip(shape, index, grid, strict=True)]
    return Box((start[0], start[1], start[2]), (stop[0], stop[1], stop[2]))


def _times(shape: Triple) -> str:
    return " x ".join(map(str, shape))
