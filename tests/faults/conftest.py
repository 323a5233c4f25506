"""Runs that are disturbed for real: processes killed, files damaged, disks that end."""

from __future__ import annotations

import hashlib
import json
import os
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
from braincensus_kernels.boxes import Box
from braincensus_kernels.phantom import Phantom

SHAPE = (72, 72, 72)
BLOCK = 24
"""27 blocks a stage: enough to die in the middle of one."""

_SCRIPT = """
import json, sys
import braincensus
if __name__ == "__main__":
    config = braincensus.RunConfig().merged(json.loads(sys.argv[3]))
    braincensus.run(sys.argv[1], sys.argv[2], config=config)
"""


def configuration(**sections: dict[str, object]) -> dict[str, dict[str, object]]:
    """Return the configuration of all runs here, with changes."""
    changes: dict[str, dict[str, object]] = {
        "input": {"voxel_size_um": 5.0},
        "foreground": {"model": "intensity"},
        "compute": {"workers": 1, "threads_per_worker": 1, "dashboard_port": 0, "block_voxels": BLOCK},
    }
    for name, section in sections.items():
        changes[name] = {**changes.get(name, {}), **section}
    return changes


@pytest.fixture(scope="session")
def brain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A volume on disk."""
    path = tmp_path_factory.mktemp("faults") / "brain.npy"
    np.save(path, Phantom(shape=SHAPE, n_cells=120, seed=8, tissue="full").render(Box.whole(SHAPE)))
    return path


@pytest.fixture(scope="session")
def client() -> Iterator[Client]:
    """A cluster for the runs to which nothing happens: starting one takes longer than such a run."""
    with (
        LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address="127.0.0.1:0") as cluster,
        Client(cluster) as connected,
    ):
        yield connected


@pytest.fixture(scope="session")
def undisturbed(brain: Path, client: Client) -> Path:
    """The census of a run to which nothing happened. Its name is in its metadata: all are called out.zarr."""
    output = brain.parent / "undisturbed" / "out.zarr"
    run(brain, output, config=RunConfig().merged(configuration()), client=client)
    return output


def result_bytes(output: Path) -> dict[str, str]:
    """Return a digest of every file of the result: voxels, tables, density; not of what tells times."""
    kept = {}
    for path in sorted(output.rglob("*")):
        name = str(path.relative_to(output))
        if path.is_file() and not name.startswith(("braincensus/", "tables/blocks/")) and name != "zarr.json":
            kept[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return kept


class Started:
    """A run in a process group of its own."""

    def __init__(self, brain: Path, output: Path, config: dict[str, dict[str, object]]) -> None:
        self.output = output
        self.process = subprocess.Popen(
            [sys.executable, "-c", _SCRIPT, str(brain), str(output), json.dumps(config)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def wait_for(self, stage: str, blocks: int, timeout_s: float = 120) -> None:
        """Wait until so many blocks of a stage are marked as done."""
        marks = self.output / "braincensus" / "done" / stage
        until = time.monotonic() + timeout_s
        while time.monotonic() < until:
            if len(list(marks.glob("*/*.safetensors"))) >= blocks:
                return
            if self.process.poll() is not None:
                raise AssertionError(f"the run ended before: {self.finish()}")
            time.sleep(0.01)
        raise AssertionError(f"{stage} has not come to {blocks} blocks")

    def workers(self) -> list[int]:
        """Return the worker processes of its cluster."""
        import psutil

        return [
            child.pid
            for child in psutil.Process(self.process.pid).children(recursive=True)
            if "spawn_main" in " ".join(child.cmdline())
        ]

    def signal(self, number: int) -> None:
        """Send a signal to the client alone."""
        os.kill(self.process.pid, number)

    def kill_all(self) -> None:
        """Kill client, scheduler and workers at once, as a power cut would."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(30)

    def finish(self, timeout_s: float = 240) -> str:
        """Wait for the end; returns what was printed."""
        text, _ = self.process.communicate(timeout=timeout_s)
        return str(text)


@pytest.fixture
def start(brain: Path) -> Iterator[Callable[..., Started]]:
    """Start runs that are gone when the test ends."""
    started: list[Started] = []

    def begin(output: Path, config: dict[str, dict[str, object]] | None = None) -> Started:
        started.append(Started(brain, output, configuration() if config is None else config))
        return started[-1]

    yield begin
    for run_ in started:
        if run_.process.poll() is None:
            run_.kill_all()
        if run_.process.stdout is not None:
            run_.process.stdout.close()
