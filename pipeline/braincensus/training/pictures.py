"""What the network makes of a few examples, at chosen epochs: after the paper's Figure S2. Beside the flow.

A row for each example: the input, the probability of each class (encoder), the reconstruction (decoder), in
the input's shades. The examples stay the same throughout a training, so that its pictures can be laid side by
side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import imsave
from numpy.typing import NDArray

from braincensus_kernels.models.training import INPUT_TOP, DrawCrop
from braincensus_kernels.models.wnet3d import WNet3D

_EXAMPLES = 3
_LEAST_BRIGHT = 10.0  # what is shown white, at least: noise alone shall not look like cells
_PIXELS = 192  # of a panel, about
_GAP, _HEAD, _DPI = 6, 52, 110


def choose_examples(draw: DrawCrop, seed: int) -> list[NDArray[np.float32]]:
    """Draw the crops that are shown: others than those of any step, the same for one seed."""
    return [draw(np.random.default_rng((seed, 3, number, 5))) for number in range(_EXAMPLES)]


def draw_examples(
    network: WNet3D,
    examples: Sequence[NDArray[np.float32]],
    *,
    title: str,
    reconstruction: str,
    device: str,
) -> NDArray[np.uint8]:
    """Draw the examples' middle planes as the network sees them now; it is left as it was.

    Parameters
    ----------
    network
        In any mode; dropout is off while it is looked at.
    examples
        Float32 crops of one shape, in [0, 100].
    title
        Above the picture.
    reconstruction
        ``mse``, or ``bce``, of which the decoder's sigmoid is shown.
    device
        Where the network is.

    Returns
    -------
    uint8 (height, width, 3)
    """
    training = network.training
    network.eval()
    rows = []
    try:
        with torch.inference_mode():
            for crop in examples:
                middle = crop.shape[0] // 2
                bright = max(float(np.percentile(crop[middle], 99.5)), _LEAST_BRIGHT)
                probabilities, rebuilt = network(torch.from_numpy(crop)[None, None].to(device))
                if reconstruction == "bce":
                    rebuilt = torch.sigmoid(rebuilt) * INPUT_TOP
                rows.append(
                    [
                        _coloured(crop[middle] / bright, "gray"),
                        *(_coloured(plane.cpu().numpy(), "magma") for plane in probabilities[0, :, middle]),
                        _coloured(rebuilt[0, 0, middle].cpu().numpy() / bright, "gray"),
                    ]
                )
    finally:
        network.train(training)
    names = ["input", *(f"encoder: class {k}" for k in range(len(rows[0]) - 2)), "decoder"]
    return _lay_out(rows, names, title)


def save_pixels(file: Any, pixels: NDArray[np.uint8]) -> None:
    """Write pixels as PNG."""
    imsave(file, pixels, format="png")


def _coloured(unit: NDArray[np.float32], colours: str) -> NDArray[np.uint8]:
    """Return a plane of [0, 1] in colours, large enough to look at."""
    times = max(1, _PIXELS // max(unit.shape))
    large = np.kron(np.clip(unit, 0, 1), np.ones((times, times), np.float32))
    coloured: NDArray[np.uint8] = colormaps[colours](large, bytes=True)[..., :3]
    return coloured


def _lay_out(rows: list[list[NDArray[np.uint8]]], names: Sequence[str], title: str) -> NDArray[np.uint8]:
    """Put panels side by side as pixels, and words above them: matplotlib's own layout takes a second."""
    height, width = rows[0][0].shape[:2]
    across, down = width + _GAP, height + _GAP
    sheet = np.full((_HEAD + down * len(rows), _GAP + across * len(names), 3), 255, np.uint8)
    figure = Figure(figsize=(sheet.shape[1] / _DPI, _HEAD / _DPI), dpi=_DPI)
    canvas = FigureCanvasAgg(figure)
    figure.text(0.5, 0.8, title, ha="center", va="center", fontsize=9)
    for number, name in enumerate(names):
        x = (_GAP + across * number + width / 2) / sheet.shape[1]
        figure.text(x, 0.25, name, ha="center", va="center", fontsize=9)
    canvas.draw()
    words = np.asarray(canvas.buffer_rgba())[..., :3]
    sheet[: words.shape[0], : words.shape[1]] = words[: sheet.shape[0], : sheet.shape[1]]
    for down_by, row in enumerate(rows):
        for across_by, panel in enumerate(row):
            top, left = _HEAD + down * down_by, _GAP + across * across_by
            sheet[top : top + height, left : left + width] = panel
    return sheet
