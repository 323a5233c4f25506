"""Before a long run: can it be read, written and done where it would be, and how long will it take.

    where it is called: may the output be written, can the input be read (a sample of it)
    on every worker:    the same versions, the same files, a GPU with enough free memory
    on all workers:     the run's own stages over a part of the volume, timed

Nothing stays: what is written meanwhile lies in a folder beside the output that is removed.
"""

from __future__ import annotations

import os
import platform
import shutil
import socket
import tempfile
import time
import uuid
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from distributed import Client

from braincensus.blocks import BlockGrid
from braincensus.config import HUNG_AFTER_S
from braincensus.errors import BlockError, BraincensusError, ConfigError, InputError, OutputError, explain
from braincensus.formats.readers import PartReader
from braincensus.heartbeats import ask_workers
from braincensus.planning import Plan
from braincensus.store.files import writing
from braincensus.volume import Volume
from braincensus_kernels.boxes import Box

_SAMPLES = 12
_COMPARED = ("braincensus", "dask", "distributed", "numpy", "torch", "zarr", "numcodecs", "numba", "scipy")
_MUST_AGREE = ("braincensus", "dask", "distributed", "torch", "numpy", "zarr")
"""Packages whose version a result, or whether tasks can be sent at all, depends on."""
_SIDES = (1024, 768, 512, 384, 256, 192, 128, 96, 64)
_MEASURED_S = 60.0


@dataclass(frozen=True)
class Finding:
    """What one check found."""

    check: str
    fine: bool
    text: str


@dataclass(frozen=True)
class Measured:
    """How fast the stages went over a part of the volume, and what that makes for all of it."""

    part: Box
    seconds: dict[str, float]
    """Of each stage, for the whole volume."""

    @property
    def total_seconds(self) -> float:
        """Of all stages."""
        return sum(self.seconds.values())


@dataclass(frozen=True)
class Preflight:
    """What was found before a run."""

    plan: Plan
    findings: tuple[Finding, ...]
    kept: str
    """What would be kept of an earlier run, and redone; empty where there is none."""
    measured: Measured | None
    """None: not asked for, or not possible; the findings say why."""

    @property
    def seconds(self) -> float:
        """Time of the run: as measured, or as the plan guesses."""
        return self.measured.total_seconds if self.measured else sum(self.plan.seconds.values())


def check_output(output: Path) -> Finding:
    """Try to write beside the output.

    Raises
    ------
    OutputError
        If that is not possible.
    """
    place = nearest_folder(output)
    with writing(output):
        descriptor, name = tempfile.mkstemp(prefix=".preflight.", dir=place)
        os.write(descriptor, b"x" * 4096)
        os.close(descriptor)
        Path(name).unlink()
    free = shutil.disk_usage(place).free
    return Finding("output folder", True, f"{place} can be written to, {free / 1024**3:,.1f} GiB free")


def sample_boxes(volume: Volume, samples: int = _SAMPLES, *, seed: int = 0) -> list[Box]:
    """Return the chunks to read: the first, the last, the middle, and some from anywhere."""
    grid = BlockGrid(volume.shape, volume.chunks)
    n = len(grid)
    rng = np.random.default_rng(seed)
    numbers = {0, n - 1, n // 2, *rng.integers(0, n, max(0, samples - 3)).tolist()}
    return [grid[number].core for number in sorted(numbers)]


def check_input(volume: Volume, samples: int = _SAMPLES) -> Finding:
    """Read a sample of the input's chunks.

    Raises
    ------
    InputError
        If one cannot be read; names it.
    """
    if volume.needs_copy:
        return Finding("input read", True, "not block-wise readable: it is copied first, and read whole then")
    boxes = sample_boxes(volume, samples)
    lowest, highest, empty = np.inf, -np.inf, 0
    began = time.perf_counter()
    for box in boxes:
        voxels = volume.read(box)
        lowest, highest = min(lowest, float(voxels.min())), max(highest, float(voxels.max()))
        empty += not voxels.any()
    rate = sum(box.size for box in boxes) * volume.dtype.itemsize / (time.perf_counter() - began)
    text = f"{len(boxes)} chunks read, values {lowest:g} to {highest:g}, {rate / 1e6:,.0f} MB/s"
    if empty:
        text += f"; {empty} of them hold nothing but 0"
    return Finding("input read", lowest < highest, text)


def check_workers(
    client: Client, volume: Volume, output: Path | None, *, hung_after_s: float = HUNG_AFTER_S
) -> list[Finding]:
    """Ask every worker what it runs, and whether it reaches the same files.

    Raises
    ------
    ConfigError, InputError, OutputError
        If a worker has other versions of what must agree, or does not reach the input or the output.
    BlockError
        If the scheduler hangs, or no worker is left.
    """
    here = _versions()
    box = sample_boxes(volume, 1)[0]
    expected = None if volume.needs_copy else _checksum(volume, box)
    with _token(output) as (path, token):
        answers = ask_workers(
            client,
            _answer,
            None if expected is None else volume,
            box,
            str(path) if path else None,
            hung_after_s=hung_after_s,
            stage="checking the workers",
        )
    # Those that went meanwhile have answered with OSError.
    answers = {address: answer for address, answer in answers.items() if not isinstance(answer, OSError)}
    if not answers:
        raise BlockError(
            explain(
                "checking the workers: none answers",
                cause="they ended, or the scheduler did",
                remedy="start them again, then run again: done blocks are kept",
            )
        )
    for address, answer in sorted(answers.items()):
        if isinstance(answer, Exception):
            raise _cannot_answer(address, answer)
        who = f"the worker {address} on {answer['host']}"
        _refuse_versions(who, here, answer["versions"])
        _refuse_files(who, answer, expected, token, volume, output)
    hosts = sorted({answer["host"] for answer in answers.values()})
    n = len(answers)
    files = "the same input and output" if output else "the same input"
    findings = [
        Finding("workers", True, f"{n} on {len(hosts)} machine(s), with the versions that are here"),
        Finding("shared files", True, f"every worker reaches {files}"),
    ]
    minor = sorted(
        {
            f"{name} {answer['versions'][name]} ({answer['host']})"
            for answer in answers.values()
            for name in _COMPARED
            if name not in _MUST_AGREE and answer["versions"][name] != here[name]
        }
    )
    if minor:
        findings.append(Finding("versions", False, f"differ from those here: {', '.join(minor)}"))
    return findings


def check_gpus(client: Client, plan: Plan) -> list[Finding]:
    """Compare the free memory of every GPU with what the network needs at once."""
    if plan.resources.device != "cuda":
        return []
    need = plan.memory_bytes["segment"]
    after = plan.config.compute.hung_after_s
    answers = ask_workers(client, _free_of_gpu, hung_after_s=after, stage="looking at GPUs")
    free = [answer for answer in answers.values() if isinstance(answer, tuple)]
    if not free:
        return [Finding("GPU memory", False, "no worker could tell")]
    name, least = min(free, key=lambda gpu: gpu[1])
    text = f"{len(free)} x {name}, {least / 1024**3:.1f} GiB free, {need / 1024**3:.1f} GiB needed at most"
    return [Finding("GPU memory", need <= least, text)]


def part_of(plan: Plan) -> Box:
    """Choose the part of the volume to measure on: in the middle, of about a minute's work."""
    shape = plan.volume.shape
    most = prod(shape) * min(1.0, _MEASURED_S / sum(plan.seconds.values()))
    side = next((side for side in _SIDES if prod(min(n, side) for n in shape) <= most), _SIDES[-1])
    z, y, x = (min(n, side) for n in shape)
    start = tuple((n - m) // 2 // 8 * 8 for n, m in zip(shape, (z, y, x), strict=True))
    return Box((start[0], start[1], start[2]), (start[0] + z, start[1] + y, start[2] + x))


def measure(plan: Plan, part: Box, run: Callable[[Volume, str], tuple[Plan, dict[str, float]]]) -> Measured:
    """Time the run's stages on a part, after a smaller part that warms the workers up.

    Parameters
    ----------
    plan
        Of the whole volume.
    part
        Which part.
    run
        Runs the stages over a volume, called by a name; returns its plan and the seconds of each stage.
    """
    warm = Box(part.start, tuple(min(a + 64, b) for a, b in zip(part.start, part.stop, strict=True)))  # type: ignore[arg-type]
    run(cut_out(plan.volume, warm), "warm-up")
    small, seconds = run(cut_out(plan.volume, part), "part")
    scale = prod(plan.volume.shape) / part.size
    grown = {
        "segment": _read_for_each(plan.segment_grid) / _read_for_each(small.segment_grid),
        "label": _read_for_each(plan.label_grid) / _read_for_each(small.label_grid),
    }
    return Measured(part, {stage: s * scale * grown.get(stage, 1.0) for stage, s in seconds.items()})


def cut_out(volume: Volume, part: Box) -> Volume:
    """Return a part of a volume as a volume."""
    return replace(
        volume,
        source=f"{volume.source}, {part}",
        shape=part.shape,
        identity={**volume.identity, "part": [*part.start, *part.stop]},
        reader=PartReader(volume.reader, part.start),
    )


def _read_for_each(grid: BlockGrid) -> float:
    """Return how many voxels are read for each that is written, border blocks and all."""

    def along(n: int, block: int, halo: int) -> float:
        spans = ((a, min(a + block, n)) for a in range(0, n, block))
        return sum(min(b + halo, n) - max(a - halo, 0) for a, b in spans) / n

    axes: Iterator[tuple[int, int, int]] = zip(grid.volume_shape, grid.block_shape, grid.halo, strict=True)
    return prod(along(n, block, halo) for n, block, halo in axes)


def nearest_folder(output: Path) -> Path:
    """Return the folder in which the output, or the folders above it, would be made."""
    place = output.absolute().parent
    while not place.exists() and place != place.parent:
        place = place.parent
    return place


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _COMPARED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found


def _checksum(volume: Volume, box: Box) -> int:
    return zlib.crc32(volume.read(box).data)


def _answer(volume: Volume | None, box: Box, token_file: str | None) -> dict[str, Any]:
    """Run on a worker."""
    answer: dict[str, Any] = {"versions": _versions(), "host": socket.gethostname()}
    if volume is not None:
        try:
            answer["checksum"] = _checksum(volume, box)
        except BraincensusError as err:
            answer["unreadable"] = str(err)
    if token_file is not None:
        path = Path(token_file)
        try:
            answer["token"] = path.read_text()
            mine = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
            mine.write_text("x")
            mine.unlink()
        except OSError as err:
            answer["unwritable"] = f"{type(err).__name__}: {err}"
    return answer


def _free_of_gpu() -> tuple[str, int]:
    """Run on a worker."""
    import torch

    free, _ = torch.cuda.mem_get_info()
    return torch.cuda.get_device_name(), int(free)


@contextmanager
def _token(output: Path | None) -> Iterator[tuple[Path | None, str]]:
    """Leave a word beside the output that only who sees the same folder can read."""
    if output is None:
        yield None, ""
        return
    token = uuid.uuid4().hex
    place = nearest_folder(output)
    with writing(output):
        folder = Path(tempfile.mkdtemp(prefix=f".{output.name}.preflight.", dir=place))
        folder.chmod(0o755)
        path = folder / "token"
        path.write_text(token)
    try:
        yield path, token
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _cannot_answer(address: str, err: Exception) -> ConfigError:
    return ConfigError(
        explain(
            f"the worker {address} cannot run what the client sends",
            found=f"{type(err).__name__}: {err}",
            cause="braincensus is not installed there, or another version",
            remedy="install the same: pip install -c constraints.txt . (or one container image for all)",
        )
    )


def _refuse_versions(who: str, here: dict[str, str], there: dict[str, str]) -> None:
    differ = [name for name in _MUST_AGREE if here[name] != there[name]]
    if here["python"].rpartition(".")[0] != there["python"].rpartition(".")[0]:
        differ.insert(0, "python")
    if differ:
        raise ConfigError(
            explain(
                f"{who} runs other versions than the client",
                expected=", ".join(f"{name} {here[name]}" for name in differ),
                found=", ".join(f"{name} {there[name]}" for name in differ),
                cause="environments that were made at different times",
                remedy="install the same: pip install -c constraints.txt . (or one container image for all)",
            )
        )


def _refuse_files(
    who: str, answer: dict[str, Any], expected: int | None, token: str, volume: Volume, output: Path | None
) -> None:
    if "unreadable" in answer:
        raise InputError(
            explain(
                f"{who} cannot read the input",
                expected=f"{volume.source} at the same path on every worker",
                found=answer["unreadable"].replace("\n", "; "),
                cause="a disk that is not mounted there, or a path that is relative or local",
                remedy="put the input on a file system that every worker mounts at the same path",
            )
        )
    if answer.get("checksum") != expected:
        raise InputError(
            explain(
                f"{who} reads another input at the path {volume.source}",
                cause="a local copy, or another file system at the same path",
                remedy="use one shared file system",
            )
        )
    if (output is not None and answer.get("token") != token) or "unwritable" in answer:
        raise OutputError(
            explain(
                f"{who} does not reach the output",
                expected=f"{output} in the same, writable folder on every worker",
                found=answer.get("unwritable", "another folder at this path"),
                cause="a disk that is not mounted there, or no permission",
                remedy="write to a file system that every worker mounts at the same path",
            )
        )
