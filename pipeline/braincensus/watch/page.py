"""The page ``/braincensus`` beside Dask's own: a Bokeh document that asks the plugin twice a second.

It is one more application of the scheduler's web server, with the same navigation, the same address and
the same (local) copy of Bokeh's scripts; where Dask's dashboard is off there is nothing to add it to.
"""

from __future__ import annotations

import zlib
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from bokeh.document import Document
from bokeh.models import (
    ColumnDataSource,
    Div,
    FixedTicker,
    HoverTool,
    LabelSet,
    NumeralTickFormatter,
    Range1d,
    Select,
)
from bokeh.plotting import figure
from bokeh.server.server import BokehTornado
from distributed import Scheduler
from distributed.dashboard.components import add_periodic_callback
from distributed.dashboard.core import BokehApplication
from distributed.dashboard.scheduler import template_variables
from tornado.ioloop import IOLoop

from braincensus.progress import STAGE_TITLES
from braincensus.watch import panels
from braincensus.watch.panels import COLOURS, MUTED, RULE, STYLE, Worker
from braincensus.watch.state import BLOCK_STATES, shares

if TYPE_CHECKING:
    from braincensus.watch.plugin import Seen, WatchPlugin

PATH = "/braincensus"
_EVERY_MS = 500
_NAME_ROWS = 4
_NAME_WIDTH = 0.0125
"""Of a letter in the plot of rates, as a share of the plot."""
_VIEWS = {"top": (0, "y", "x"), "side": (2, "y", "z")}
_AXIS = {"z": 0, "y": 1, "x": 2}
_MAP_WIDTH, _MAP_HEIGHT, _LEAST_SIDE = 560, 460, 40
_MOST_LINES = 64

_TEMPLATE = """
{% extends "base.html" %}
{% block extra_resources %}
<script>document.title = "braincensus";</script>
<style>
  html, body { background: #f4f6f8; height: auto; }
  .bc { display: grid; gap: 14px; max-width: 1560px; margin: 14px auto 10px;
        grid-template-columns: minmax(0, 1.02fr) minmax(0, 1fr); }
  .bc > div { background: white; border: 1px solid #e3e7eb; border-radius: 8px; padding: 16px 18px; }
  .bc .full { grid-column: 1 / -1; }
  .bc .column { display: flex; flex-direction: column; gap: 14px; background: none; border: 0; padding: 0; }
  .bc .column > div { background: white; border: 1px solid #e3e7eb; border-radius: 8px; padding: 16px 18px; }
  .bc .views { display: flex; gap: 6px; justify-content: center; margin: 2px 0 10px; }
  @media (max-width: 1000px) { .bc { grid-template-columns: minmax(0, 1fr); } }
</style>
{% endblock %}
{% block content %}
{% from macros import embed %}
<div class="bc">
  <div class="full">{{ embed(roots.choice) }}{{ embed(roots.heading) }}</div>
  <div class="column">
    <div>{{ embed(roots.map_title) }}
      <div class="views">{{ embed(roots.top) }}{{ embed(roots.side) }}</div>
      {{ embed(roots.legend) }}</div>
    <div>{{ embed(roots.seams) }}</div>
    <div>{{ embed(roots.notes) }}</div>
  </div>
  <div class="column">
    <div>{{ embed(roots.stages) }}</div>
    <div>{{ embed(roots.rate) }}</div>
    <div>{{ embed(roots.workers) }}</div>
  </div>
</div>
{{ plot_script }}
{% endblock %}
"""


def add_page(scheduler: Scheduler, plugin: WatchPlugin) -> None:
    """Serve the page on a scheduler, and name it in the navigation of the others.

    Raises
    ------
    RuntimeError
        If the scheduler serves no dashboard.
    """
    stock = [app for app in scheduler.http_application.applications if isinstance(app, BokehTornado)]
    if not stock:
        raise RuntimeError("the dashboard of this scheduler is off")
    variables = template_variables(scheduler)
    if "braincensus" not in variables["pages"]:
        variables["pages"].append("braincensus")
    application = BokehApplication(
        {PATH: partial(document, plugin)}, scheduler, prefix=stock[0].prefix, template_variables=variables
    )
    scheduler.http_application.add_application(application)
    application.initialize(IOLoop.current())
    application.start()


def document(plugin: WatchPlugin, scheduler: Scheduler, extra: dict[str, Any], doc: Document) -> None:
    """Make the page for one browser."""
    from distributed.dashboard.components.scheduler import BOKEH_THEME, env

    page = Page(plugin)
    page.update()
    add_periodic_callback(doc, page, _EVERY_MS)
    for root in page.roots:
        doc.add_root(root)
    doc.title = "braincensus"
    doc.theme = BOKEH_THEME
    doc.template = env.from_string(_TEMPLATE)
    doc.template_variables.update(extra)


class Page:
    """What one browser sees; `update` is called while it is open."""

    def __init__(self, plugin: WatchPlugin) -> None:
        self._plugin = plugin
        self._chosen = "newest"
        self._shown: tuple[Any, ...] = ()
        self._texts = {
            name: Div(text="", name=name, stylesheets=[STYLE], sizing_mode="stretch_width", margin=0)
            for name in ("heading", "stages", "map_title", "legend", "seams", "workers", "notes")
        }
        self._choice = Select(name="choice", options=[], value="newest", visible=False, width=420)
        self._choice.on_change("value", self._choose)
        self._views = {name: _View(name) for name in _VIEWS}
        self._rate = _Rate()
        self.roots = [
            self._choice,
            *self._texts.values(),
            *(view.figure for view in self._views.values()),
            self._rate.figure,
        ]

    def update(self) -> None:
        """Show the latest."""
        self._set("workers", panels.workers(_workers(self._plugin.scheduler)))
        self._offer()
        seen = self._seen()
        if seen is None:
            self._set("heading", panels.nothing_yet())
            return
        told = seen.snapshot
        retries = told["retries"] + sum(seen.retries.values())
        self._set("heading", panels.heading(told, silent_s=seen.silent_s(), retries=retries))
        self._set("stages", panels.stages(told, seen.retries))
        self._set("map_title", panels.map_title(told))
        self._set("seams", panels.seams(told))
        self._set("notes", panels.notes(told, seen.failures))
        self._rate.show(told)
        states = self._plugin.blocks(seen)
        if states is None:
            return
        counts = np.bincount(states, minlength=len(BLOCK_STATES)).tolist()
        self._set("legend", panels.legend(dict(zip(BLOCK_STATES, counts, strict=True))))
        about = told["blocks"]
        shown = (told["run"], about["stage"], about["step"], states.tobytes(), id(seen.picture))
        if shown != self._shown:
            self._shown = shown
            for view in self._views.values():
                view.show(told, states, seen.picture)

    def _seen(self) -> Seen | None:
        runs = self._plugin.runs
        if self._chosen in runs:
            return runs[self._chosen]
        return max(runs.values(), key=lambda seen: (seen.running, seen.heard), default=None)

    def _offer(self) -> None:
        """Let the user choose where there are several runs."""
        options = [("newest", "the newest run")]
        options += [
            (run, f"{seen.snapshot['output']} ({seen.snapshot['status']})")
            for run, seen in self._plugin.runs.items()
        ]
        if options != self._choice.options:
            self._choice.options = options
        self._choice.visible = len(options) > 2

    def _choose(self, attribute: str, old: str, new: str) -> None:
        self._chosen = new
        self.update()

    def _set(self, name: str, text: str) -> None:
        if self._texts[name].text != text:
            self._texts[name].text = text


class _View:
    """The blocks seen along one axis, over a picture of the volume."""

    def __init__(self, name: str) -> None:
        self._axis, self._down, self._across = _VIEWS[name]
        self._name = name
        self._picture = ColumnDataSource({"image": [], "dw": [], "dh": []})
        self._blocks = ColumnDataSource({"image": [], "dw": [], "dh": []})
        self._columns = ColumnDataSource({"image": [], "dw": [], "dh": [], **{n: [] for n in BLOCK_STATES}})
        self._x, self._y = Range1d(0, 1), Range1d(1, 0)
        self.figure = figure(
            name=name,
            x_range=self._x,
            y_range=self._y,
            frame_width=_MAP_WIDTH,
            frame_height=_MAP_HEIGHT,
            tools="",
            toolbar_location=None,
            outline_line_color=RULE,
            x_axis_label=f"{self._across} (mm)",
            y_axis_label=f"{self._down} (mm)",
        )
        _quiet(self.figure)
        # One ticker for good: a page that is slow to connect must not meet models that it does not know.
        self._across_lines, self._down_lines = FixedTicker(ticks=[]), FixedTicker(ticks=[])
        self.figure.xgrid.ticker, self.figure.ygrid.ticker = self._across_lines, self._down_lines
        self.figure.grid.level = "overlay"
        self.figure.grid.grid_line_color = "white"
        self.figure.grid.grid_line_alpha = 0.75
        greys = [f"#{v:02x}{v:02x}{v:02x}" for v in np.linspace(255, 135, 256).astype(int)]
        self.figure.image("image", x=0, y=0, dw="dw", dh="dh", source=self._picture, palette=greys)
        self.figure.image_rgba("image", x=0, y=0, dw="dw", dh="dh", source=self._blocks)
        columns = self.figure.image(
            "image", x=0, y=0, dw="dw", dh="dh", source=self._columns, palette=["#ffffff"], alpha=0
        )
        lines = [(state, f"@{state}") for state in BLOCK_STATES]
        self.figure.add_tools(HoverTool(renderers=[columns], tooltips=lines))

    def show(self, told: dict[str, Any], states: np.ndarray, picture: dict[str, Any] | None) -> None:
        """Draw the blocks."""
        about = told["blocks"]
        voxel_mm = [n / 1000 for n in told["voxel_size_um"]]
        volume = [n * mm for n, mm in zip(told["shape"], voxel_mm, strict=True)]
        counts = about["counts"]
        # Trailing blocks reach beyond the volume; the levels of a pyramid have larger voxels.
        cut = [
            n * side * mm / whole
            for n, side, mm, whole in zip(
                counts, about["extent_voxels"], volume, about["grid_shape"], strict=True
            )
        ]
        width, height = volume[_AXIS[self._across]], volume[_AXIS[self._down]]
        self._fit(volume)
        self._x.end, self._y.start = width, height
        where = {"dw": [cut[_AXIS[self._across]]], "dh": [cut[_AXIS[self._down]]]}
        found = shares(states, (counts[0], counts[1], counts[2]), axis=self._axis)
        if self._axis == 2:  # z is across: rows are y
            found = {name: np.ascontiguousarray(share.T) for name, share in found.items()}
        for lines, axis in ((self._across_lines, self._across), (self._down_lines, self._down)):
            n, length = counts[_AXIS[axis]], cut[_AXIS[axis]]
            between = [length * i / n for i in range(1, n)] if n <= _MOST_LINES else []
            if lines.ticks != between:
                lines.ticks = between
        columns = {name: [share.astype(np.uint32)] for name, share in found.items()}
        self._columns.data = {"image": [np.zeros(found["done"].shape, np.uint8)], **where, **columns}
        self._blocks.data = {"image": [paint(found)], **where}
        if picture is not None:
            pixels = _unpacked(picture[self._name])
            self._picture.data = {"image": [pixels], "dw": [width], "dh": [height]}

    def _fit(self, volume: list[float]) -> None:
        """Give both views one scale, so that the brain has its own proportions."""
        z, y, x = volume
        scale = min(_MAP_WIDTH / (x + z), _MAP_HEIGHT / y)
        self.figure.frame_width = max(_LEAST_SIDE, round(scale * volume[_AXIS[self._across]]))
        self.figure.frame_height = max(_LEAST_SIDE, round(scale * y))


def paint(found: dict[str, np.ndarray]) -> np.ndarray:
    """Colour the columns of a grid: by how much of each is done; what needs to be seen shows on top.

    Parameters
    ----------
    found
        Blocks of each column in each state, as `shares` counts them.

    Returns
    -------
    array
        RGBA, as Bokeh draws it: uint32, a pixel for each column.
    """
    whole = np.maximum(sum(found.values()), 1)
    rgba = np.zeros((*found["done"].shape, 4), np.float64)
    rgba[..., :3] = _rgb("waiting")
    rgba[..., 3] = 0.35
    done = (found["done"] + found["kept"] + found["retried"]) / whole
    colour = sum(found[name][..., None] * _rgb(name) for name in ("done", "kept", "retried"))
    colour = colour / np.maximum(done * whole, 1)[..., None]
    some = done > 0
    strength = (0.25 + 0.75 * done)[..., None]
    rgba[some, :3] = (strength * colour + (1 - strength) * _rgb("waiting"))[some]
    rgba[some, 3] = 0.35 + 0.4 * done[some]
    for name in ("running", "failed"):
        there = found[name] > 0
        rgba[there, :3], rgba[there, 3] = _rgb(name), 0.85
    pixels = (np.clip(rgba, 0, 1) * 255).astype(np.uint8)
    packed: np.ndarray = np.ascontiguousarray(pixels).view(np.uint32)[..., 0]
    return packed


class _Rate:
    """The rate over the whole run, with the stages marked."""

    def __init__(self) -> None:
        self._source = ColumnDataSource({"t": [], "rate": []})
        self._marks = ColumnDataSource({"t": [], "y": [], "text": []})
        self._now: tuple[Any, ...] = ()
        self.figure = figure(
            name="rate",
            height=190,
            sizing_mode="stretch_width",
            tools="",
            toolbar_location=None,
            y_axis_label="Mvoxel/s",
            outline_line_color=None,
            y_range=Range1d(0, 1),
            x_range=Range1d(0, 60),
        )
        _quiet(self.figure)
        self.figure.xgrid.visible = False
        self.figure.ygrid.grid_line_color = RULE
        self.figure.xaxis.formatter = NumeralTickFormatter(format="00:00:00")
        self.figure.varea("t", 0, "rate", source=self._source, fill_color=COLOURS["done"], fill_alpha=0.16)
        self.figure.line("t", "rate", source=self._source, line_color=COLOURS["done"], line_width=2)
        self.figure.segment("t", 0, "t", "y", source=self._marks, line_color=MUTED, line_dash="dotted")
        self.figure.add_layout(
            LabelSet(
                x="t",
                y="y",
                text="text",
                source=self._marks,
                text_font_size="11px",
                text_color=MUTED,
                x_offset=4,
                text_baseline="top",
            )
        )

    def show(self, told: dict[str, Any]) -> None:
        """Draw the rates."""
        history = told["history"]
        if not history:
            return
        times, rates = [t for t, _, _ in history], [r / 1e6 for _, r, _ in history]
        top = 1.3 * max(max(rates), 1e-3)
        end = max(30.0, told["elapsed_s"])
        if (told["run"], len(times), times[-1], top) == self._now:
            return
        self._now = (told["run"], len(times), times[-1], top)
        self.figure.y_range.end, self.figure.x_range.end = top, end
        self._source.data = {"t": times, "rate": rates}
        begins: dict[str, float] = {}
        for t, _, stage in history:
            begins.setdefault(stage, t)
        free = [0.0] * _NAME_ROWS  # from where on each row of names has room
        heights = []
        for stage, t in begins.items():
            row = next((n for n, since in enumerate(free) if t >= since), _NAME_ROWS - 1)
            free[row] = t + end * _NAME_WIDTH * len(STAGE_TITLES.get(stage, stage))
            heights.append(top * (1 - 0.09 * row))
        self._marks.data = {
            "t": list(begins.values()),
            "y": heights,
            "text": [STAGE_TITLES.get(stage, stage) for stage in begins],
        }


def _workers(scheduler: Scheduler) -> list[Worker]:
    """Read what the workers report to the scheduler anyway."""
    found = []
    for state in scheduler.workers.values():
        metrics = state.metrics
        found.append(
            Worker(
                name=str(state.name if state.name is not None else state.address),
                threads=state.nthreads,
                tasks=len(state.processing),
                cpu_percent=float(metrics.get("cpu", 0.0)),
                memory=int(metrics.get("memory", 0)),
                memory_limit=state.memory_limit or None,
                gpu_percent=metrics.get("gpu_utilization"),
                gpu_memory=metrics.get("gpu_memory_used"),
                gpu_memory_limit=metrics.get("gpu-memory-total"),
            )
        )
    return sorted(found, key=lambda worker: (len(worker.name), worker.name))


def _unpacked(packed: dict[str, Any]) -> np.ndarray:
    height, width = packed["shape"]
    return np.frombuffer(zlib.decompress(packed["pixels"]), np.uint8).reshape(height, width)


def _rgb(state: str) -> np.ndarray:
    colour = COLOURS[state]
    return np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])


def _quiet(plot: Any) -> None:
    """Keep axes in the background."""
    plot.background_fill_color = "white"
    plot.border_fill_color = "white"
    plot.axis.axis_line_color = RULE
    plot.axis.major_tick_line_color = RULE
    plot.axis.minor_tick_line_color = None
    plot.axis.major_label_text_color = MUTED
    plot.axis.axis_label_text_color = MUTED
    plot.axis.axis_label_text_font_style = "normal"
    plot.axis.axis_label_text_font_size = "12px"
    plot.axis.major_label_text_font_size = "11px"
