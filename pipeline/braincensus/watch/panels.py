"""The page's panels of text and bars: from a run's numbers to HTML. Pure; text from outside is escaped."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from html import escape
from pathlib import PurePath
from typing import Any

from braincensus.progress import COUNTED, STAGE_TITLES
from braincensus.watch.state import BLOCK_STATES

COLOURS = {
    "waiting": "#d9dde2",
    "running": "#e69f00",
    "done": "#0072b2",
    "kept": "#56b4e9",
    "retried": "#cc79a7",
    "failed": "#8b0000",
}
"""Of Okabe and Ito, told apart by every kind of colour vision; failed is the darkest, too."""

INK, MUTED, RULE = "#1f2a33", "#66727d", "#e3e7eb"

STYLE = f"""
:host {{ display: block; width: 100%; }}
.bk-clearfix {{ display: block; width: 100%; }}
* {{ box-sizing: border-box; }}
div, td, th, span {{ font-family: Helvetica, Arial, "Liberation Sans", sans-serif; color: {INK}; }}
.muted {{ color: {MUTED}; }}
h2 {{ font: 600 13px Helvetica, Arial, sans-serif; letter-spacing: .02em; margin: 0 0 8px; color: {INK}; }}
.head {{ display: flex; align-items: baseline; gap: 14px; flex-wrap: wrap; }}
.name {{ font-size: 22px; font-weight: 600; }}
.path {{ font-size: 13px; color: {MUTED}; margin-top: 3px; overflow-wrap: anywhere; }}
.chip {{ font-size: 12px; font-weight: 600; padding: 2px 9px; border-radius: 9px; color: white;
  align-self: center; }}
.whole {{ height: 14px; border-radius: 7px; background: {COLOURS["waiting"]}; overflow: hidden;
  margin: 12px 0 12px; }}
.whole > div {{ height: 100%; }}
.figures {{ display: flex; gap: 34px; flex-wrap: wrap; }}
.figures b {{ display: block; font-size: 21px; font-weight: 600; font-variant-numeric: tabular-nums; }}
.figures span {{ font-size: 12px; color: {MUTED}; }}
table {{ border-collapse: collapse; width: 100%; font-size: 13px; font-variant-numeric: tabular-nums; }}
th {{ text-align: right; font-weight: 400; font-size: 11.5px; color: {MUTED}; padding: 0 0 5px 10px;
  border-bottom: 1px solid {RULE}; }}
td {{ text-align: right; padding: 6px 0 6px 10px; border-bottom: 1px solid {RULE}; white-space: nowrap; }}
th:first-child, td:first-child {{ text-align: left; padding-left: 0; }}
tr:last-child td {{ border-bottom: 0; }}
tr.now td {{ font-weight: 600; }}
tr.later td {{ color: {MUTED}; }}
td.wide {{ width: 34%; }}
.bar {{ height: 9px; border-radius: 5px; background: {COLOURS["waiting"]}; overflow: hidden; display: flex; }}
.bar > div {{ height: 100%; }}
.legend {{ font-size: 12px; display: flex; gap: 4px 16px; flex-wrap: wrap; }}
.legend i, .dot {{ display: inline-block; width: 10px; height: 10px; border-radius: 2px; margin-right: 5px;
  vertical-align: -1px; }}
.verdict {{ font-size: 19px; font-weight: 600; }}
.small {{ font-size: 12.5px; line-height: 1.45; }}
pre {{ font: 12px/1.45 Menlo, Consolas, "DejaVu Sans Mono", monospace; white-space: pre-wrap; margin: 0 0 6px;
  overflow-wrap: anywhere; color: {INK}; }}
pre.bad {{ border-left: 3px solid {COLOURS["failed"]}; padding-left: 8px; }}
pre.again {{ border-left: 3px solid {COLOURS["retried"]}; padding-left: 8px; }}
"""

_STATUS = {
    "running": ("running", "#0072b2"),
    "finished": ("finished", "#00705a"),
    "failed": ("failed", COLOURS["failed"]),
    "stopped": ("stopped", "#66727d"),
    "lost": ("its client is gone", COLOURS["failed"]),
    "silent": ("no news", "#66727d"),
}
_SILENT_S = 15.0
_MOST_WORKERS = 12


@dataclass(frozen=True)
class Worker:
    """What the scheduler knows of a worker; None where it has no GPU, or no limit."""

    name: str
    threads: int
    tasks: int
    cpu_percent: float
    memory: int
    memory_limit: int | None
    gpu_percent: float | None = None
    gpu_memory: int | None = None
    gpu_memory_limit: int | None = None


def nothing_yet() -> str:
    """Say that there is no run."""
    return (
        '<div class="name">braincensus</div><div class="path">No run has told this scheduler anything yet. '
        "The page fills itself when one begins.</div>"
    )


def heading(told: dict[str, Any], *, silent_s: float, retries: int) -> str:
    """Lay out whose run this is, how far it is, and how fast."""
    status = "silent" if told["status"] == "running" and silent_s > _SILENT_S else told["status"]
    text, colour = _STATUS[status]
    if status == "silent":
        text = f"no news for {duration(silent_s)}"
    shape = " × ".join(f"{n:,}" for n in told["shape"])
    size = " × ".join(f"{n:g}" for n in told["voxel_size_um"])
    elapsed = told["elapsed_s"] + (silent_s if status == "running" else 0.0)
    worked = [stage for stage in told["stages"] if stage["name"] not in COUNTED and stage["seconds"] > 0]
    seconds = sum(stage["seconds"] for stage in worked)
    mean = sum(stage["done"] - stage["kept"] for stage in worked) / seconds if seconds else 0.0
    now = told["status"] == "running"
    figures = [
        (f"{100 * told['fraction']:.0f} %", "of the run"),
        (duration(max(0.0, told["left_s"])) if now else "–", "left, about"),
        (duration(elapsed), "so far" if now else "in all"),
        (rate(told["rate_now"]) if now and told["rate_now"] else "–", "Mvoxel/s now"),
        (rate(mean) if mean else "–", "Mvoxel/s, mean of the stages"),
        ("–" if told["cells"] is None else f"{told['cells']:,}", "cells" if not now else "cells so far"),
        (f"{retries:,}", "blocks tried again"),
    ]
    return (
        f'<div class="head"><span class="name">{escape(PurePath(told["output"]).name)}</span>'
        f'<span class="chip" style="background:{colour}">{text}</span></div>'
        f'<div class="path">{escape(told["input"])} &nbsp;→&nbsp; {escape(told["output"])} '
        f"&nbsp;·&nbsp; {shape} voxels of {size} µm (z, y, x)</div>"
        f'<div class="whole"><div style="width:{100 * told["fraction"]:.1f}%;background:{colour}"></div>'
        "</div>"
        '<div class="figures">'
        + "".join(f"<div><b>{value}</b><span>{what}</span></div>" for value, what in figures)
        + "</div>"
    )


def stages(told: dict[str, Any], retries: dict[str, int]) -> str:
    """Lay out the stages: how far, how fast, how long."""
    rows = []
    for stage in told["stages"]:
        name, status = stage["name"], stage["status"]
        kind = {"running": "now", "waiting": "later", "skipped": "later"}.get(status, "")
        again = stage["retries"] + retries.get(name, 0)
        speed = "" if name in COUNTED or stage["done"] <= stage["kept"] else rate(stage["rate"])
        if status == "skipped":
            progress = '<span class="muted">not needed</span>'
        else:
            new = stage["fraction"] * (1 - stage["kept"] / max(stage["total"], 1))
            old = stage["fraction"] - new
            progress = _bar([(old, COLOURS["kept"]), (new, COLOURS["done"])])
        time = "" if status == "skipped" else duration(stage["seconds"]) if stage["seconds"] else ""
        if status == "waiting":
            time = f"≈ {duration(stage['estimate_s'])}"
        rows.append(
            f'<tr class="{kind}"><td>{escape(STAGE_TITLES.get(name, name))}</td>'
            f'<td class="wide">{progress}</td>'
            f"<td>{speed}</td><td>{time}</td><td>{again or ''}</td></tr>"
        )
    return (
        "<h2>Stages</h2><table><tr><th>stage</th><th></th><th>Mvoxel/s</th><th>time</th>"
        "<th>tried again</th></tr>" + "".join(rows) + "</table>"
    )


def map_title(told: dict[str, Any]) -> str:
    """Say what the map shows."""
    about = told["blocks"]
    if about is None:
        return "<h2>Blocks</h2>"
    z, y, x = about["counts"]
    n, volume = z * y * x, tuple(told["shape"])
    whole = tuple(about["grid_shape"])
    if whole[1:] == (1, 1) and volume[1:] != (1, 1):  # of a table, not of the volume
        what = "all at once" if n == 1 else f"{n:,} parts"
    else:
        size = " × ".join(str(side) for side in about["extent_voxels"])
        what = f"{n:,} block{'' if n == 1 else 's'} of {size} voxels{'' if whole == volume else ', reduced'}"
    title = escape(STAGE_TITLES.get(about["stage"], about["stage"]))
    return (
        f"<h2>Blocks: {title} <span class='muted' style='font-weight:400'>"
        f"· {escape(about['step'])} · {what}</span></h2>"
    )


def legend(tally: dict[str, int]) -> str:
    """Explain the colours of the map, with how many blocks there are of each."""
    names = {
        "kept": "done by an earlier run",
        "retried": "done at another try",
    }
    parts = [
        f'<span><i style="background:{COLOURS[name]}"></i>{names.get(name, name)} '
        f"<b>{tally[name]:,}</b></span>"
        for name in BLOCK_STATES
        if tally[name] or name not in names
    ]
    return '<div class="legend">' + "".join(parts) + "</div>"


def seams(told: dict[str, Any]) -> str:
    """Say what the seam audit has found so far."""
    found = told["seams"]
    if not found["faces_in_all"]:
        text = '<span class="muted small">Compared voxel by voxel once all blocks are labelled.</span>'
        return f"<h2>Seams</h2>{text}"
    ended = found["faces"] >= found["faces_in_all"]
    if found["disagreeing"]:
        verdict, colour = f"{found['disagreeing']:,} voxels disagree", COLOURS["failed"]
    else:
        verdict, colour = ("exact" if ended else "exact so far"), "#00705a"
    return (
        "<h2>Seams</h2>"
        f'<div class="verdict" style="color:{colour}">{verdict}</div>'
        '<div class="small muted" style="margin:4px 0 6px">'
        f"{found['faces']:,} of {found['faces_in_all']:,} faces · "
        f"{found['voxels']:,} voxels compared · {found['crossings']:,} cells cross</div>"
        + _bar([(found["faces"] / found["faces_in_all"], colour)])
    )


def workers(found: Iterable[Worker]) -> str:
    """Lay out the workers: what they do, their memory and their GPUs."""
    all_of_them = list(found)
    gpus = any(worker.gpu_percent is not None for worker in all_of_them)
    rows = []
    for worker in all_of_them[:_MOST_WORKERS]:
        gpu = ""
        if gpus:
            gpu = "<td></td><td></td>"
            if worker.gpu_percent is not None:
                gpu = (
                    f"<td>{worker.gpu_percent:.0f} %</td>"
                    f'<td class="wide">{_used(worker.gpu_memory, worker.gpu_memory_limit)}</td>'
                )
        rows.append(
            f"<tr><td>{escape(worker.name)}</td><td>{worker.tasks}</td><td>{worker.cpu_percent:.0f} %</td>"
            f'<td class="wide">{_used(worker.memory, worker.memory_limit)}</td>{gpu}</tr>'
        )
    more = len(all_of_them) - _MOST_WORKERS
    if more > 0:
        rows.append(f'<tr class="later"><td>and {more:,} more</td><td></td><td></td><td></td></tr>')
    head = "<th>worker</th><th>tasks</th><th>CPU</th><th>memory</th>"
    head += "<th>GPU</th><th>GPU memory</th>" if gpus else ""
    none = "" if all_of_them else '<div class="small" style="margin-top:6px">No worker is connected.</div>'
    no_gpu = "" if gpus or not all_of_them else '<span class="muted" style="font-weight:400"> · no GPU</span>'
    return f"<h2>Workers{no_gpu}</h2><table><tr>{head}</tr>{''.join(rows)}</table>{none}"


def notes(told: dict[str, Any], noticed: list[str]) -> str:
    """List failures and retries, the newest first, then what the run said."""
    failures = [*told["failures"], *noticed]
    lines = ["<h2>Failures and retries</h2>"]
    if not failures:
        lines.append('<div class="small muted" style="margin-bottom:12px">None.</div>')
    for text in failures[::-1][:12]:
        kind = "again" if text.endswith("tried again") else "bad"
        lines.append(f'<pre class="{kind}">{escape(text)}</pre>')
    if told["messages"]:
        lines.append('<h2 style="margin-top:14px">Messages</h2>')
        lines += [f"<pre>{escape(text)}</pre>" for text in told["messages"][::-1][:8]]
    return "".join(lines)


def duration(seconds: float) -> str:
    """Write a time for people.

    Examples
    --------
    >>> duration(0.4), duration(42), duration(725), duration(4 * 3600 + 125), duration(30 * 3600)
    ('0.4 s', '42 s', '12 min', '4 h 02 min', '1 d 6 h')
    """
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours < 24 else f"{hours // 24} d {hours % 24} h"


def rate(voxels_per_s: float) -> str:
    """Write a rate in Mvoxel/s.

    Examples
    --------
    >>> rate(0), rate(4.56e5), rate(45.6e6), rate(4.56e9)
    ('0', '0.46', '45.6', '4,560')
    """
    million = voxels_per_s / 1e6
    if million < 0.005:
        return "0"
    return f"{million:.2f}" if million < 1 else f"{million:.1f}" if million < 100 else f"{million:,.0f}"


def _bar(parts: list[tuple[float, str]]) -> str:
    inside = "".join(
        f'<div style="width:{100 * min(1.0, max(0.0, share)):.1f}%;background:{colour}"></div>'
        for share, colour in parts
    )
    return f'<div class="bar">{inside}</div>'


def _used(used: int | None, limit: int | None) -> str:
    if used is None:
        return ""
    amount = f"{used / 1024**3:.1f}"
    if not limit:
        return f"{amount} GiB"
    share = used / limit
    colour = COLOURS["failed"] if share > 0.9 else COLOURS["running"] if share > 0.75 else COLOURS["done"]
    return (
        '<div style="display:flex;align-items:center;gap:8px">'
        f'<div style="flex:1">{_bar([(share, colour)])}</div>'
        f"<span>{amount} of {limit / 1024**3:.1f} GiB</span></div>"
    )
