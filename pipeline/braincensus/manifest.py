"""What each stage depends on, and what of an earlier run is still good. Decided before anything runs.

A stage's key is a hash of its own settings and of the key before it. Blocks are marked as done under the
key of their stage (`store.marks`), so a changed setting undoes its own stage and those that follow, and none
before: another spot sigma labels anew, but never runs the network again.

    settings of each stage -> keys -> compared with those of the earlier run -> kept, or redone and why
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from braincensus.errors import OutputError, explain
from braincensus.planning import Plan
from braincensus.stages.label import needs_touching
from braincensus.store import Output
from braincensus.store.files import jsonable

STAGES = ("intensity", "segment", "threshold", "label", "stitch", "relabel", "measure")
"""In the order of the flow. The coarser levels go with the stage that made the finest one."""

_VERSIONS = dict.fromkeys(STAGES, 1) | {"intensity": 3, "segment": 3, "stitch": 2}
"""Raised when a change of the code changes what a stage gives for the same settings."""

WORK_OF: Mapping[str, tuple[str, ...]] = {
    "intensity": ("tile_median", "tile_top"),
    "segment": ("norm_statistics.safetensors", "dark.npy"),
    "label": ("local_labels", "ids", "owned", "foreign", "faces", "touching"),
    "stitch": (
        "merged",
        "seeds",
        "excluded.npy",
        "contributors.npy",
        "contributors_from.npy",
        "aliases_none.npy",
        "aliases_joined.npy",
        "aliases_audited.npy",
        "aliases_merged.npy",
    ),
}
"""Working files of each stage."""
_IMAGES_OF = {"segment": "", "relabel": "labels/cells"}
_TABLES_OF = {"measure": ("tables/cells/table.parquet", "tables/blocks/table.parquet", "density/0")}
_SHORT_LIVED = ("label", "stitch")
"""Stages whose working files go when a run has finished: whatever follows must do them again."""

Settings = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Continuation:
    """What a run on an existing output will do.

    Attributes
    ----------
    keys
        Of each stage.
    settings
        What they were made from, for the next run to compare with.
    redone
        Stages whose earlier results are of no use, in order, each with the reason.
    finished
        Whether all is there: nothing is to be done.
    """

    keys: dict[str, str]
    settings: Settings
    redone: dict[str, str]
    finished: bool

    def report(self) -> str:
        """Say for people what is kept and what is redone, and why."""
        if self.finished:
            return "everything is there already: the same input, the same settings"
        kept = [stage for stage in STAGES if stage not in self.redone]
        lines = [f"continuing an earlier run: done blocks of {', '.join(kept)} are kept"] if kept else []
        reasons: dict[str, list[str]] = {}
        for stage, reason in self.redone.items():
            reasons.setdefault(reason, []).append(stage)
        lines += [f"redone: {', '.join(stages)} ({reason})" for reason, stages in reasons.items()]
        return "\n".join(lines)


def settings_of(plan: Plan, *, weights_sha256: str) -> Settings:
    """Return what each stage depends on, apart from the stages before it; JSON-able."""
    volume, config, grid = plan.volume, plan.config, plan.label_grid
    foreground = {k: v for k, v in config.foreground.model_dump(mode="json").items() if k != "weights"}
    labelling = config.labelling
    blocks = {"block_voxels": grid.block_shape}
    every: Settings = {
        "intensity": {
            "input": volume.identity,
            "on_unreadable": config.input.on_unreadable,
            "block_voxels": plan.scan_tasks.block_shape,
        },
        "segment": {
            "intensity": config.intensity.model_dump(mode="json"),
            "foreground": foreground,
            "weights_sha256": weights_sha256,
            "voxel_size_um": volume.voxel_size_um,
            "patch_voxels": plan.segmentation.patch,
            "precision": plan.segmentation.precision,
            "device": plan.resources.device,
            "region_voxels": plan.segment_grid.block_shape,
        },
        "threshold": {
            "threshold": labelling.threshold,
            "least_threshold": labelling.least_threshold,
            "outline_sigma": plan.labeller.outline_sigma,
            "foreground": asdict(plan.foreground),
            **blocks,
        },
        "label": {
            "labeller": {"method": labelling.method, **asdict(plan.labeller)},
            "touching": needs_touching(plan),
            "halo_voxels": grid.halo,
        },
        "stitch": {
            "merge_border": labelling.merge_border,
            "filters": config.filters.model_dump(mode="json"),
        },
        "relabel": {},
        "measure": {"density": config.density.model_dump(mode="json")},
    }
    return {stage: jsonable(own | {"version": _VERSIONS[stage]}) for stage, own in every.items()}


def keys_of(settings: Settings) -> dict[str, str]:
    """Return the key of each stage: a hash of its settings and of all before it."""
    keys: dict[str, str] = {}
    before = ""
    for stage in STAGES:
        text = json.dumps([before, settings[stage]], sort_keys=True)
        before = keys[stage] = hashlib.sha256(text.encode()).hexdigest()
    return keys


def begin(settings: Settings) -> Continuation:
    """Return what a run on a new output does: everything."""
    return Continuation(keys_of(settings), settings, {}, finished=False)


def continue_from(output: Output, settings: Settings) -> Continuation:
    """Compare with what the earlier run of an output recorded; nothing is changed.

    Raises
    ------
    OutputError
        If it is the census of another input, or says nothing about itself.
    """
    earlier = recorded_settings(output)
    if not earlier:
        raise OutputError(
            explain(
                f"{output.path} cannot be continued",
                found="an output that does not say what its stages depended on",
                cause="another version of braincensus",
                remedy="start over with --fresh (fresh=True), or give another output",
            )
        )
    _refuse_another_input(output, earlier, settings)
    keys, old_keys = keys_of(settings), keys_of({**{stage: {} for stage in STAGES}, **earlier})
    redone: dict[str, str] = {}
    reason = ""
    for stage in STAGES:
        if keys[stage] != old_keys[stage] and not reason:
            reason = _difference(stage, earlier.get(stage, {}), settings[stage])
        if reason:
            redone[stage] = reason
    complete = output.status == "complete"
    if complete and redone:
        for stage in _SHORT_LIVED:
            redone.setdefault(stage, "its working files were removed when the earlier run finished")
    in_order = {stage: redone[stage] for stage in STAGES if stage in redone}
    return Continuation(keys, settings, in_order, finished=complete and not redone)


def recorded_settings(output: Output) -> Settings:
    """Return what an earlier run recorded that its stages depended on; empty where it did not, or not so."""
    recorded = output.provenance.get("manifest")
    settings = recorded.get("settings") if isinstance(recorded, dict) else None
    if not isinstance(settings, dict) or not all(isinstance(stage, dict) for stage in settings.values()):
        return {}
    return settings


def discard(output: Output, stages: Mapping[str, str]) -> None:
    """Remove what these stages left, marks and all."""
    for stage in stages:
        output.remove_work(f"done/{stage}", *WORK_OF.get(stage, ()))
        if stage in _IMAGES_OF:
            output.remove_levels(_IMAGES_OF[stage])
        output.remove_parts(*_TABLES_OF.get(stage, ()))


def tidy(output: Output) -> None:
    """Remove the working files that a finished output does not need to be labelled anew."""
    for stage in _SHORT_LIVED:
        output.remove_work(f"done/{stage}", *WORK_OF.get(stage, ()))


def _refuse_another_input(output: Output, earlier: Settings, settings: Settings) -> None:
    before = earlier.get("intensity", {}).get("input", {})
    before = before if isinstance(before, dict) else {}
    now = settings["intensity"]["input"]
    if before == now:
        return
    differs = sorted(k for k in {*before, *now} if before.get(k) != now.get(k))
    raise OutputError(
        explain(
            f"{output.path} is the census of another input",
            expected=", ".join(f"{k} {_short(before.get(k))}" for k in differs),
            found=", ".join(f"{k} {_short(now.get(k))}" for k in differs),
            cause="another volume, channel or level, or one that was changed since",
            remedy="give another output, or start over with --fresh (fresh=True)",
        )
    )


def _difference(stage: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Name the settings that differ, with both values."""
    changed = []
    for path, old, new in _leaves(before, now):
        changed.append(f"{'.'.join(path)}: {_short(old)} -> {_short(new)}")
    return "; ".join(changed[:3]) + (f" and {len(changed) - 3} more" if len(changed) > 3 else "") or stage


def _leaves(before: Any, now: Any, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any, Any]]:
    if before == now:
        return []
    if isinstance(before, dict) and isinstance(now, dict):
        found = []
        for key in sorted({*before, *now}):
            found += _leaves(before.get(key), now.get(key), (*path, key))
        return found
    return [(path, before, now)]


def _short(value: Any) -> str:
    text = json.dumps(value) if not isinstance(value, str) else value
    return text if len(text) <= 60 else text[:57] + "..."
