"""The picture of a census: the cells over a projection of the volume, and their density beside it.

After the flow: reads the volume once (or a coarser level of it), box by box, and draws with
matplotlib's objects alone, so that it works in any process, thread or notebook and leaves no global
state behind.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, floor, log10
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import EllipseCollection
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from braincensus.errors import ConfigError, InputError, OutputError
from braincensus.result import Result
from braincensus.store.files import write_whole
from braincensus.volume import Volume, open_volume
from braincensus_kernels.metrics import Match

TripleFloat = tuple[float, float, float]
_Points = npt.NDArray[np.float64]

_BACKGROUND, _TEXT, _FAINT = "#0b0d12", "#eceff4", "#8b93a1"
_FOUND, _MATCHED, _MISSED, _EXTRA = "#3fd0ff", "#4be08a", "#ff4d6a", "#ffab2e"
_INCHES, _DPI = (16.0, 9.0), 120
_MAX_SIDE = 1600  # pixels of the projection
_READ_VOXELS = 1 << 25  # read at once
_DEFAULT_RADIUS_UM = 8.0
_MANY = 20_000  # from here on cells are points


@dataclass(frozen=True)
class Projection:
    """Brightest voxel along z, seen along z.

    Attributes
    ----------
    pixels : 2D array, yx
    pixel_size_um : (float, float)
        y, x.
    corner_um : (float, float)
        y, x of the outer corner of the first pixel; the centre of the volume's first voxel is at 0.
    size_um : (float, float, float)
        Extent of the volume, zyx.
    """

    pixels: npt.NDArray[Any]
    pixel_size_um: tuple[float, float]
    corner_um: tuple[float, float]
    size_um: TripleFloat


def project(volume: Volume, *, max_side: int = _MAX_SIDE) -> Projection:
    """Project a volume along z, reading a bounded number of voxels at a time.

    Parameters
    ----------
    volume
        As opened by `open_volume`.
    max_side
        Most pixels of a side; a larger volume is projected over squares of voxels.

    Raises
    ------
    InputError
        If stored voxels cannot be read.
    """
    _, ny, nx = volume.shape
    step = ceil(max(ny, nx) / max_side)
    pixels = np.zeros((ceil(ny / step), ceil(nx / step)), volume.dtype)
    pixels[:] = np.finfo(volume.dtype).min if volume.dtype.kind == "f" else np.iinfo(volume.dtype).min
    for box in volume.box.tiles(_read_shape(volume)):
        plane = volume.read(box).max(axis=0)
        (y0, y1), (x0, x1) = ((box.start[axis], box.stop[axis]) for axis in (1, 2))
        plane = np.maximum.reduceat(plane, _starts(y0, y1, step), axis=0)
        plane = np.maximum.reduceat(plane, _starts(x0, x1, step), axis=1)
        seen = pixels[y0 // step : (y1 - 1) // step + 1, x0 // step : (x1 - 1) // step + 1]
        np.maximum(seen, plane, out=seen)
    z_um, y_um, x_um = volume.voxel_size_um
    return Projection(
        pixels,
        (y_um * step, x_um * step),
        (-y_um / 2, -x_um / 2),
        (volume.shape[0] * z_um, ny * y_um, nx * x_um),
    )


def draw_census(
    path: str | Path,
    *,
    image: str | Path | Volume | Projection,
    cells: Any,
    density: npt.NDArray[Any],
    density_bin_um: TripleFloat,
    title: str,
    truth: Any = None,
    match: Match | None = None,
) -> None:
    """Draw a census as a PNG of 1920 x 1080.

    On the left the volume's projection along z with a circle around each cell, on the right the mean
    density along z. If the truth is known, circles are green (found, and true), red (missed) and orange
    (extra).

    Parameters
    ----------
    path
        Of the PNG; replaced if it exists.
    image
        The volume: its path, as opened, or projected already.
    cells
        Table (DataFrame, Arrow table, dict of arrays) with `z_um`, `y_um`, `x_um` and, for the size of
        the circles, `equivalent_diameter_um` or `radius_um`.
    density
        Cells per mm^3, zyx, on a grid that starts at the volume's corner.
    density_bin_um
        Spacing of that grid, zyx.
    title
        Above it all.
    truth, match
        The true cells (a table of the same kind), and which of them were found: `Match` of
        `match_centroids(cells, truth)`. Both or neither.

    Raises
    ------
    ConfigError
        If an argument does not fit the others.
    InputError
        If the volume cannot be read.
    OutputError
        If the picture cannot be written.

    Notes
    -----
    A circle is drawn 1.4 times as large as its cell, so that the cell stays visible in it, and never
    smaller than 1/300 of the picture. Beyond 20,000 cells, circles are points.
    """
    if (truth is None) != (match is None):
        raise ConfigError("a picture needs both the true cells and which were found, or neither")
    if np.ndim(density) != 3:
        raise ConfigError(f"density must be a map of three dimensions, not {np.ndim(density)}")
    found = _points(cells)
    if match is not None and (match.n_found, match.n_true) != (len(found), len(_points(truth))):
        raise ConfigError(
            f"the match is of {match.n_found} found and {match.n_true} true cells, "
            f"the tables have {len(found)} and {len(_points(truth))}"
        )
    projection = image if isinstance(image, Projection) else project(_opened(image))
    figure = Figure(figsize=_INCHES, dpi=_DPI, facecolor=_BACKGROUND)
    canvas = FigureCanvasAgg(figure)
    left, right, bar = _layout(figure, projection)
    _draw_projection(left, projection)
    if match is None:
        groups = [("cell", _FOUND, found)]
    else:
        groups = [
            ("found and true", _MATCHED, found[match.found_index]),
            ("missed", _MISSED, _points(truth)[match.missed]),
            ("extra", _EXTRA, found[match.extra]),
        ]
    _draw_cells(left, groups, projection)
    _draw_scale_bar(right, projection)
    _draw_density(figure, right, bar, density, density_bin_um, projection)
    _write_text(figure, title, len(found), projection, match)
    if match is not None:
        _draw_legend(figure, groups)
    write_whole(Path(path), lambda file: canvas.print_png(file), durable=False)


def draw_result(path: str | Path, result: Result) -> None:
    """Draw a finished census over its input; over its foreground probability if the input is gone.

    Parameters
    ----------
    path
        Of the PNG; replaced if it exists.
    result
        What to draw.

    Raises
    ------
    InputError, OutputError
        As `draw_census`.
    """
    about = result.provenance
    chosen = about["config"]["input"]
    try:
        image = open_volume(
            about["input"]["source"],
            channel=chosen["channel"],
            timepoint=chosen["timepoint"],
            level=chosen["level"],
            voxel_size_um=chosen["voxel_size_um"],
            on_unreadable=chosen.get("on_unreadable", "fail"),
        )
    except (InputError, ConfigError, OutputError):
        image = _opened(result.path)
    draw_census(
        path,
        image=image,
        cells=result.cells.to_arrow(columns=["y_um", "x_um", "equivalent_diameter_um"]),
        density=np.asarray(result.density[:]),
        density_bin_um=tuple(about["config"]["density"]["bin_um"]),
        title=Path(about["input"]["source"]).name,
    )


def _opened(image: str | Path | Volume) -> Volume:
    """Open the coarsest level that still has a voxel for each pixel."""
    if isinstance(image, Volume):
        return image
    volume = open_volume(image)
    level = 1
    while max(volume.shape[1:]) >= 2 * _MAX_SIDE:
        try:
            volume = open_volume(image, level=level)
        except ConfigError:
            break
        level += 1
    return volume


def _read_shape(volume: Volume) -> tuple[int, int, int]:
    """Whole chunks, as many along x, then y, then z, as stay within what is read at once."""
    shape = [min(c, n) for c, n in zip(volume.chunks, volume.shape, strict=True)]
    for axis in (2, 1, 0):
        others = shape[0] * shape[1] * shape[2] // shape[axis]
        times = max(1, _READ_VOXELS // (others * shape[axis]))
        shape[axis] = min(shape[axis] * times, volume.shape[axis])
    return shape[0], shape[1], shape[2]


def _starts(first: int, stop: int, step: int) -> npt.NDArray[np.intp]:
    """Where, among voxels from `first` to `stop`, each pixel of `step` voxels starts."""
    return np.maximum(np.arange(first // step, (stop - 1) // step + 1) * step - first, 0)


def _points(cells: Any) -> _Points:
    """Take y, x and radius of a table, um."""
    names = list(cells.column_names if hasattr(cells, "column_names") else cells)
    missing = [name for name in ("y_um", "x_um") if name not in names]
    if missing:
        raise ConfigError(f"the table of cells has no {' and no '.join(missing)}: it has {', '.join(names)}")
    y, x = (np.asarray(cells[name], dtype=np.float64) for name in ("y_um", "x_um"))
    if "equivalent_diameter_um" in names:
        radius = np.asarray(cells["equivalent_diameter_um"], dtype=np.float64) / 2
    elif "radius_um" in names:
        radius = np.asarray(cells["radius_um"], dtype=np.float64)
    else:
        radius = np.full(len(y), _DEFAULT_RADIUS_UM)
    return np.stack([y, x, radius], axis=1)


# -- drawing ----------------------------------------------------------------------------------------


def _layout(figure: Figure, projection: Projection) -> tuple[Axes, Axes, Axes]:
    """Give both maps the same scale and height, as large as they fit beside each other."""
    width, height = _INCHES
    margin, gap, bar_width, bar_text, top, bottom = 0.5, 0.6, 0.18, 1.1, 1.5, 0.75
    aspect = projection.size_um[2] / projection.size_um[1]
    room = width - 2 * margin - gap - 0.2 - bar_width - bar_text
    tall = min(height - top - bottom, room / 2 / aspect)
    wide = tall * aspect
    x = (width - (2 * wide + gap + 0.2 + bar_width + bar_text)) / 2
    y = bottom + (height - top - bottom - tall) / 2

    def at(x: float, across: float) -> Axes:
        axes: Axes = figure.add_axes((x / width, y / height, across / width, tall / height))
        axes.set_facecolor("black")
        axes.tick_params(bottom=False, left=False, labelbottom=False, labelleft=False)
        for spine in axes.spines.values():
            spine.set_color("#2a2f3a")
        return axes

    return at(x, wide), at(x + wide + gap, wide), at(x + 2 * wide + gap + 0.2, bar_width)


def _view(axes: Axes, projection: Projection) -> None:
    (y, x), (_, height, width) = projection.corner_um, projection.size_um
    axes.set_xlim(x, x + width)
    axes.set_ylim(y + height, y)


def _draw_projection(axes: Axes, projection: Projection) -> None:
    pixels = projection.pixels.astype(np.float32)
    low, high = np.percentile(pixels, [1, 99.8])
    high = max(high, low + 1e-6 + abs(low) * 1e-6)
    (y, x), (dy, dx) = projection.corner_um, projection.pixel_size_um
    extent = (x, x + pixels.shape[1] * dx, y + pixels.shape[0] * dy, y)
    # Few pixels are drawn smooth; many are averaged by matplotlib's own choice.
    smooth = "bicubic" if max(pixels.shape) < 400 else "auto"
    norm = PowerNorm(0.7, vmin=low, vmax=high, clip=True)
    axes.imshow(pixels, cmap="gray", norm=norm, extent=extent, aspect="auto", interpolation=smooth)
    _view(axes, projection)


def _draw_cells(axes: Axes, groups: list[tuple[str, str, _Points]], projection: Projection) -> None:
    total = sum(len(points) for _, _, points in groups)
    smallest = max(projection.size_um[1:]) / 600
    for order, (_, color, points) in enumerate(groups):
        y, x, radius = points.T
        if total > _MANY:
            # Fewer pixels and more transparency the more there are; what is rare stays plain to see.
            crowd = len(points) / _MANY
            axes.scatter(
                x, y, s=float(np.clip(3 / max(crowd, 1) ** 0.5, 0.4, 3)), c=color, linewidths=0,
                alpha=float(np.clip(0.9 / max(crowd, 1) ** 0.4, 0.2, 0.9)), zorder=3 + order,
            )  # fmt: skip
            continue
        size = 2 * np.maximum(1.4 * radius, smallest)
        circles = EllipseCollection(
            size,
            size,
            np.zeros(len(size)),
            units="xy",
            offsets=np.stack([x, y], axis=1),
            offset_transform=axes.transData,
            facecolors="none",
            edgecolors=color,
            linewidths=float(np.interp(total, [100, 1000, 5000, _MANY], [1.6, 1.1, 0.7, 0.4])),
            alpha=0.95,
            zorder=3 + order,
        )
        axes.add_collection(circles, autolim=False)


def _draw_scale_bar(axes: Axes, projection: Projection) -> None:
    # Below the maps, where it hides no cell; both have one scale. x in um, y in shares of the height.
    (_, x), (_, height, width) = projection.corner_um, projection.size_um
    wish = width / 5
    unit = 10.0 ** floor(log10(wish))
    length = max(m * unit for m in (1, 2, 5) if m * unit <= wish)
    inch = width / (axes.get_position().width * _INCHES[0])
    inch_y = inch / height
    bar = Rectangle(
        (x + width - length, -0.27 * inch_y),
        length,
        0.05 * inch_y,
        transform=axes.get_xaxis_transform(),
        clip_on=False,
        facecolor=_TEXT,
        linewidth=0,
    )
    axes.add_patch(bar)
    axes.text(
        x + width - length - 0.12 * inch,
        -0.245 * inch_y,
        f"{length / 1000:g} mm" if length >= 1000 else f"{length:g} µm",
        transform=axes.get_xaxis_transform(),
        color=_TEXT,
        fontsize=12,
        ha="right",
        va="center",
    )


def _draw_density(
    figure: Figure,
    axes: Axes,
    bar: Axes,
    density: npt.NDArray[Any],
    bin_um: TripleFloat,
    projection: Projection,
) -> None:
    # The last bin along z may be cut by the volume, and weighs less.
    ends = np.minimum(np.arange(1, density.shape[0] + 1) * bin_um[0], projection.size_um[0])
    weights = np.maximum(np.diff(ends, prepend=0.0), 0)
    mean = np.tensordot(weights / weights.sum(), np.nan_to_num(np.asarray(density, np.float64)), axes=1)
    top = float(mean.max()) or 1.0
    y, x = projection.corner_um
    extent = (x, x + mean.shape[1] * bin_um[2], y + mean.shape[0] * bin_um[1], y)
    shown = axes.imshow(
        mean, cmap="inferno", vmin=0, vmax=top, extent=extent, aspect="auto", interpolation="nearest"
    )
    _view(axes, projection)
    colorbar = figure.colorbar(shown, cax=bar)
    colorbar.outline.set_edgecolor("#2a2f3a")
    colorbar.ax.tick_params(
        colors=_TEXT, labelsize=11, right=True, labelright=True, left=False, labelleft=False
    )
    colorbar.ax.yaxis.set_major_formatter(
        lambda value, _: f"{value:,.4g}" if value < 1000 else f"{value:,.0f}"
    )
    colorbar.set_label("cells / mm³", color=_TEXT, fontsize=12, labelpad=10)
    axes.set_title("density, mean along z", color=_FAINT, fontsize=12, loc="left", pad=8)


def _write_text(
    figure: Figure, title: str, n_found: int, projection: Projection, match: Match | None
) -> None:
    size = " × ".join(f"{length / 1000:.3g}" for length in projection.size_um)
    counts = f"{n_found:,} cell{'' if n_found == 1 else 's'} in {size} mm"
    if match is not None:
        counts += (
            f"   ·   {match.n_true:,} true   ·   precision {match.precision:.3f}   "
            f"recall {match.recall:.3f}   F1 {match.f1:.3f}"
        )
    left = figure.axes[0]
    box = left.get_position()
    height = _INCHES[1]
    figure.text(
        box.x0, box.y1 + 1.1 / height, title, color=_TEXT, fontsize=22, fontweight="bold", va="center"
    )
    figure.text(box.x0, box.y1 + 0.66 / height, counts, color=_TEXT, fontsize=14, va="center")
    left.set_title(
        f"brightest along z, cells {'circled' if n_found <= _MANY else 'dotted'}",
        color=_FAINT,
        fontsize=12,
        loc="left",
        pad=8,
    )


def _draw_legend(figure: Figure, groups: list[tuple[str, str, _Points]]) -> None:
    handles = [
        Line2D([], [], linestyle="none", marker="o", markersize=9, markerfacecolor="none",
               markeredgewidth=1.8, color=color, label=f"{name}  {len(points):,}")
        for name, color, points in groups
    ]  # fmt: skip
    box = figure.axes[0].get_position()
    figure.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(box.x0 - 0.008, box.y0 - 0.006),
        ncols=3,
        borderaxespad=0.2,
        frameon=False,
        labelcolor=_TEXT,
        fontsize=12,
        handletextpad=0.2,
        columnspacing=1.8,
    )
