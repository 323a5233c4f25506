"""Clusters of separate processes, and what `deploy/` holds."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from distributed import Client, LocalCluster

from braincensus import RunConfig, run
from braincensus.progress import Silent
from braincensus_kernels.boxes import Box
from braincensus_kernels.phantom import Phantom

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
SHAPE = (48, 48, 48)
BLOCK = 24


def configuration(**compute: object) -> RunConfig:
    """Return the configuration of all runs here: a fast model, 8 blocks a stage."""
    return RunConfig().merged(
        {
            "input": {"voxel_size_um": 5.0},
            "foreground": {"model": "intensity"},
            "compute": {
                "workers": 1,
                "threads_per_worker": 1,
                "dashboard_port": 0,
                "block_voxels": BLOCK,
                **compute,
            },
        }
    )


@pytest.fixture(scope="session")
def brain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A volume on disk."""
    path = tmp_path_factory.mktemp("deploy") / "brain.npy"
    np.save(path, Phantom(shape=SHAPE, n_cells=60, seed=8, tissue="full").render(Box.whole(SHAPE)))
    return path


@pytest.fixture(scope="session")
def local(brain: Path) -> dict[str, str]:
    """What a run on this machine alone gives. Metadata have its name: all outputs are called out.zarr."""
    output = brain.parent / "local" / "out.zarr"
    with (
        LocalCluster(
            n_workers=1, threads_per_worker=1, processes=False, dashboard_address="127.0.0.1:0"
        ) as cluster,
        Client(cluster) as client,
    ):
        assert run(brain, output, config=configuration(), client=client).n_cells > 20
    return result_bytes(output)


def program(name: str) -> str | None:
    """Find a program on the path, or beside the interpreter."""
    return shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))


def result_bytes(output: Path) -> dict[str, str]:
    """Return a digest of every file of the result: voxels, tables, density; not of what tells times."""
    kept = {}
    for path in sorted(output.rglob("*")):
        name = str(path.relative_to(output))
        if path.is_file() and not name.startswith(("braincensus/", "tables/blocks/")) and name != "zarr.json":
            kept[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return kept


class Told(Silent):
    """Keeps the messages of a run."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def message(self, text: str) -> None:
        """Keep it."""
        self.messages.append(text)


class Process:
    """One command in a process group of its own, whose output goes to a file."""

    def __init__(self, command: list[str], log: Path, env: dict[str, str] | None = None) -> None:
        self.log = log
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True, env=env
            )

    def wait_for(self, pattern: str, timeout_s: float = 60) -> str:
        """Wait until the output has a line like this; returns the first group of the pattern."""
        until = time.monotonic() + timeout_s
        while time.monotonic() < until:
            found = re.search(pattern, self.text())
            if found:
                return found.group(1)
            if self.process.poll() is not None:
                break
            time.sleep(0.05)
        raise AssertionError(f"no {pattern} in: {self.text()}")

    def text(self) -> str:
        """Return the output so far."""
        return self.log.read_text(errors="replace")

    def stop(self) -> None:
        """Kill what is left of the group."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait(10)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    """Start processes that are gone when the test ends."""
    started: list[Process] = []

    def begin(*command: object, env: dict[str, str] | None = None) -> Process:
        log = tmp_path / f"process{len(started)}.log"
        started.append(Process([str(part) for part in command], log, env))
        return started[-1]

    yield begin
    for process in reversed(started):
        process.stop()


@pytest.fixture
def start_cluster(start: Callable[..., Process]) -> Callable[..., tuple[str, str]]:
    """Start a scheduler and workers as processes of their own; returns its address and its dashboard's."""

    def begin(*options: object, protocol: str = "tcp", workers: int = 1) -> tuple[str, str]:
        dask = [sys.executable, "-m", "dask"]
        local = ["--host", "127.0.0.1", "--protocol", protocol, "--dashboard-address", "127.0.0.1:0"]
        scheduler = start(*dask, "scheduler", *local, "--port", 0, *options)
        address = scheduler.wait_for(rf"Scheduler at:\s+({protocol}://\S+)")
        dashboard = scheduler.wait_for(r"dashboard at:\s+(http://\S+)/status")
        for _ in range(workers):
            memory = ["--nthreads", 1, "--memory-limit", "1GiB"]
            start(*dask, "worker", address, *local, *memory, *options)
        return address, dashboard

    return begin
