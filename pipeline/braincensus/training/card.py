"""The model card: how weights were made, on what, and what is known about them. Last step of a training."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from braincensus_kernels.models.calibrate import NormStatistics
from braincensus_kernels.models.training import TrainingStep


def hardware(device: str, processes: int) -> dict[str, Any]:
    """Return what the training runs on; two that agree in this give the same bits."""
    kind = torch.device(device).type
    return {
        "device": torch.cuda.get_device_name(device) if kind == "cuda" else _processor(),
        "threads": torch.get_num_threads() if kind == "cpu" else None,
        "processes": processes,
        "torch": torch.__version__,
    }


def text_of_card(
    *,
    version: str,
    name: str,
    sha256: str,
    settings: Mapping[str, Any],
    volumes: Sequence[Mapping[str, Any]],
    machine: Mapping[str, Any],
    history: Sequence[TrainingStep],
    seconds: float,
    warnings_seen: Sequence[str],
    statistics: NormStatistics,
    calibration_of: str,
    parameters: int,
) -> str:
    """Return the card, Markdown."""
    first, last = _tenth(history, 0), _tenth(history, -1)
    steps_per_epoch = settings["steps_per_epoch"]
    brightness = ", ".join(f"class {k}: {v:.1f}" for k, v in enumerate(statistics.class_intensity))
    seen_range = (
        "the 1st to 99.9th percentile of each volume's tissue, as a run does it"
        if settings["input_range"] == "tissue"
        else "the minimum to maximum of each crop, as published; a run uses the range of tissue instead"
    )
    lines = [
        f"# WNet3D weights: {name}",
        "",
        f"Trained by braincensus {version}, no labels: soft normalised cut ({settings['ncuts']} form) and",
        f"reconstruction ({settings['reconstruction']}), one backward pass. Encoder and decoder, "
        f"{parameters:,} parameters;",
        "prediction uses the encoder alone.",
        "",
        f"- SHA-256 `{sha256}`",
        f"- Input: [0, 100], from {seen_range}.",
        f"- Foreground: class {statistics.foreground_class} of {settings['num_classes']}. Training does not "
        "fix which one: it is the brightest",
        f"  on the calibration windows (mean intensity of {brightness}).",
        f"- Calibration of the norms, in the file: {calibration_of}.",
        "",
        "## Data",
        "",
        *(
            f"- {v['name']}: {v['shape']} voxels of {v['voxel_size_um']} um; 0 to 100 is "
            f"{v['range'][0]:g} to {v['range'][1]:g}; tissue {100 * v['tissue_share']:.0f} %"
            for v in volumes
        ),
        "",
        "## Training",
        "",
        f"{len(history)} steps in {seconds:.0f} s, {len(history) / steps_per_epoch:.3g} epochs of "
        f"{steps_per_epoch} steps. {_machine(machine)}",
        "",
        "| | loss | cut | reconstruction | smallest class |",
        "|---|---|---|---|---|",
        *(
            f"| mean of the {when} tenth | {v[0]:.4g} | {v[1]:.4g} | {v[2]:.4g} | {v[3]:.3f} |"
            for when, v in (("first", first), ("last", last))
        ),
        "",
        "Warnings while training:" if warnings_seen else "No warnings while training.",
        *(f"- {text}" for text in warnings_seen),
        "",
        "## Settings",
        "",
        *(f"- {key}: {value}" for key, value in settings.items()),
        "",
        "## Limits",
        "",
        "- Not checked against known cells. Look at the probabilities on your data first.",
        "- The losses are those of training; they do not say how well cells are found.",
        "- Other stains, voxel sizes or microscopes than those above were not seen.",
        "",
    ]
    return "\n".join(lines)


def _tenth(history: Sequence[TrainingStep], which: int) -> tuple[float, float, float, float]:
    n = max(1, len(history) // 10)
    part = history[:n] if which == 0 else history[-n:]
    return (
        sum(r.loss for r in part) / n,
        sum(r.ncuts for r in part) / n,
        sum(r.reconstruction for r in part) / n,
        sum(r.smallest_class for r in part) / n,
    )


def _machine(machine: Mapping[str, Any]) -> str:
    threads = f", threads: {machine['threads']}" if machine["threads"] is not None else ""
    processes = f"{machine['processes']} processes, each " if machine["processes"] > 1 else ""
    return f"{processes}{machine['device']}{threads}; torch {machine['torch']}."


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or "CPU"
