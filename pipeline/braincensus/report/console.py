"""What the command line shows: progress while a run is under way, tables before and after."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress
from rich.table import Table
from rich.text import Text

from braincensus.formats.skipping import unreadable_warning
from braincensus.planning import Plan, gib
from braincensus.preflight_checks import Preflight
from braincensus.progress import COUNTED, STAGE_TITLES
from braincensus.result import Result

_SUSPICIOUS = 4.0
"""Standard deviations from which the density beside seams is no chance."""


class _Rate(ProgressColumn):
    """Mvoxel/s, or nothing for a stage that does not walk through voxels."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        if speed is None or task.fields.get("counted"):
            return Text("")
        return Text(f"{speed / 1e6:.1f} Mvoxel/s", style="progress.data.speed")


class ConsoleProgress:
    """Draws a run's progress: a live bar per stage on a terminal, one line per stage in a log."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars = RichProgress(
            TextColumn("{task.description:<20}"),
            BarColumn(bar_width=30),
            TextColumn("{task.percentage:>4.0f} %"),
            _Rate(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}
        self._totals: dict[str, int] = {}

    def __enter__(self) -> ConsoleProgress:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def message(self, text: str) -> None:
        """Show one line that stays."""
        self._console.print(text, highlight=False)

    def start(self, stage: str, voxels: int) -> None:
        """Begin a stage."""
        self._totals[stage] = voxels
        self._tasks[stage] = self._bars.add_task(
            STAGE_TITLES.get(stage, stage), total=max(voxels, 1), counted=stage in COUNTED
        )

    def advance(self, stage: str, voxels: int) -> None:
        """Count voxels that are done."""
        self._bars.advance(self._tasks[stage], voxels)

    def finish(self, stage: str, seconds: float) -> None:
        """End a stage."""
        self._bars.update(self._tasks[stage], completed=max(self._totals[stage], 1))
        if not self._console.is_terminal:
            rate = (
                "" if stage in COUNTED else f", {self._totals[stage] / max(seconds, 1e-9) / 1e6:.1f} Mvoxel/s"
            )
            self._console.print(
                f"{STAGE_TITLES.get(stage, stage):<22}{seconds:8.1f} s{rate}", highlight=False
            )


def plan_table(found: Preflight, *, price_per_hour: float | None = None) -> Table:
    """Lay out what a run would do, and what was found before it."""
    plan = found.plan
    volume, grid = plan.volume, plan.label_grid
    table = Table(title="Plan", show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column()
    rows = {
        "input": f"{volume.source}\n{volume.format}, {_triple(volume.shape)} voxels {volume.dtype.name}, "
        f"{gib(plan.voxels * volume.dtype.itemsize)}",
        "voxel size": f"{_triple(volume.voxel_size_um)} um ({volume.voxel_size_from})",
        "notes": "\n".join(volume.notes),
        "foreground": _foreground(plan),
        "labelling": _labelling(plan),
        "label blocks": f"{len(grid)} of {_triple(grid.block_shape)} voxels + halo {_triple(grid.halo)}",
        "resources": f"{plan.resources.workers} worker(s) x {plan.resources.threads} thread(s), "
        f"{gib(plan.resources.memory_bytes)} each, {plan.resources.device}, cluster {plan.resources.cluster}",
        "memory per worker": ", ".join(f"{name} {gib(size)}" for name, size in plan.memory_bytes.items()),
        "disk": ", ".join(f"{name} {gib(size)}" for name, size in plan.disk_bytes.items()),
        "an earlier run": found.kept,
        **_time(found, price_per_hour),
        **{finding.check: ("" if finding.fine else "! ") + finding.text for finding in found.findings},
    }
    for name, text in rows.items():
        if text:
            table.add_row(name, text)
    return table


def _time(found: Preflight, price_per_hour: float | None) -> dict[str, str]:
    measured = found.measured
    stages = found.plan.seconds if measured is None else measured.seconds
    text = f"{_duration(found.seconds)} (" + ", ".join(f"{k} {_duration(s)}" for k, s in stages.items()) + ")"
    if measured is None:
        rows = {"time, rough": f"{text}\nof a run from the start; --measure would time it here"}
    else:
        where = f"measured on {_triple(measured.part.shape)} voxels in the middle"
        rows = {"time": f"{text}\nof a run from the start, {where}"}
    if price_per_hour is not None:
        rows["cost"] = f"{found.seconds / 3600 * price_per_hour:,.2f} at {price_per_hour:g} per hour"
    return rows


def result_table(result: Result) -> Table:
    """Lay out what a run found, how sure its seams are, how long it took and where things are."""
    about = result.provenance
    seams = about["seams"]
    shape, size = about["input"]["shape"], about["input"]["voxel_size_um"]
    volume_mm3 = shape[0] * shape[1] * shape[2] * size[0] * size[1] * size[2] * 1e-9
    table = Table(title="Census", show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column()
    table.add_row("cells", f"{result.n_cells:,}")
    table.add_row("density", f"{result.n_cells / volume_mm3:,.0f} cells/mm^3 over {volume_mm3:.3g} mm^3")
    table.add_row("tissue", _tissue(about["intensity"]))
    if about["input"].get("unreadable"):
        table.add_row("[red]not read[/red]", f"[red]{escape(unreadable_warning(about['input']))}[/red]")
    table.add_row("labelling", seams["method"])
    table.add_row("seams", _seams(seams))
    labelling = about["labelling"]
    if labelling["merged_by_border"] or labelling["removed_by_filters"]:
        table.add_row(
            "whole cells",
            f"{labelling['merged_by_border']:,} merged by their border, "
            f"{labelling['removed_by_filters']:,} removed by filters",
        )
    if seams["foreground_voxels"]:
        share = 100 * seams["unreached_voxels"] / seams["foreground_voxels"]
        table.add_row("not in any cell", f"{seams['unreached_voxels']:,} foreground voxels ({share:.2g} %)")
    timings = about["timings_s"]
    table.add_row(
        "time",
        f"{_duration(sum(timings.values()))} ("
        + ", ".join(f"{stage} {_duration(seconds)}" for stage, seconds in timings.items())
        + ")",
    )
    places = {"labels": "labels/cells", "cell table": "tables/cells", "density map": "density"}
    table.add_row("output", str(result.path))
    for name, place in places.items():
        table.add_row(f"  {name}", place)
    return table


def _seams(seams: dict[str, Any]) -> str:
    if seams["faces"] == 0:
        return "none (one block)"
    lines = [f"{seams['faces']:,} faces, {seams['crossings']:,} cells crossing"]
    if seams["exact"]:
        lines[0] = f"[green]exact[/green]: {lines[0]}, 0 of {seams['voxels_compared']:,} voxels disagree"
    else:
        first = seams["disagreements"][0]
        lines[0] = f"[red]not exact[/red]: {lines[0]}, {seams['disagreeing_voxels']:,} voxels disagree"
        lines.append(
            f"first at z,y,x = {_position(first['position'])}: cell {_belief(first['seed_low'])} by the "
            f"lower block, {_belief(first['seed_high'])} by the upper (all in the provenance); "
            f"{seams['merged']} pairs merged by overlap"
        )
    if seams["joined"]:
        lines.append(f"{seams['joined']:,} parts joined to cells larger than a block's view")
    if seams["incomplete"]:
        first = seams["incomplete"][0]
        lines.append(
            f"[red]{len(seams['incomplete'])} block(s) needed a larger halo than memory allows[/red], the "
            f"first from z,y,x = {_position(first['start'])} to {_position(first['stop'])}"
        )
    if (check := seams.get("density_check")) is not None:
        lines.append(_density_check(check))
    return "\n".join(lines)


def _density_check(check: dict[str, Any]) -> str:
    near, expected = (sum(n for n in check[name] if n is not None) for name in ("near", "expected"))
    text = (
        f"density beside seams: {near:,} cells within {check['width_voxels']} voxels, {expected:,.0f} "
        f"expected from farther away (z = {check['z_score']:+.1f})"
    )
    return text if abs(check["z_score"]) < _SUSPICIOUS else f"[red]{text}: cells are lost or doubled[/red]"


def _position(zyx: list[int]) -> str:
    return ",".join(str(n) for n in zyx)


def _belief(seed: int | None) -> str:
    return "none" if seed is None else f"with seed {seed}"


def _tissue(found: dict[str, Any]) -> str:
    share = f"{100 * found['tissue_fraction']:.0f} % of the volume"
    if found["tissue_threshold"] is None:
        return f"{share}; intensity range {found['low']:.4g} to {found['high']:.4g}"
    return (
        f"{share}, above {found['tissue_threshold']:.4g}; "
        f"intensity range {found['low']:.4g} to {found['high']:.4g}"
    )


def _labelling(plan: Plan) -> str:
    settings, foreground = plan.config.labelling, plan.foreground
    parts = [settings.method, f"reach {_triple(plan.labeller.reach)} voxels"]
    if foreground.closes:
        parts.append(
            f"closing of {settings.closing_radius_um:g} um before it, {_triple(foreground.reach)} more"
        )
    if settings.merge_border is not None:
        parts.append(
            "touching cells merged by border probability {:g} to {:g}".format(*settings.merge_border)
        )
    return ", ".join(parts)


def _foreground(plan: Plan) -> str:
    if plan.segmentation.channels is None:
        return "intensity (no network)"
    return (
        f"{plan.config.foreground.model} {'-'.join(str(n) for n in plan.segmentation.channels)}, "
        f"{plan.segmentation.precision}, "
        f"patches of {_triple(plan.segmentation.patch)} + halo {plan.segmentation.halo}"
    )


def _triple(values: tuple[float, ...]) -> str:
    return " x ".join(f"{v:g}" for v in values)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.1f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
