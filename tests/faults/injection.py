"""What the tests and the long campaign disturb: runs and clusters as processes, and what is done to them."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from distributed import Client

Config = dict[str, dict[str, Any]]

SHAPE = (72, 72, 72)
BLOCK = 24
"""27 blocks a stage: enough to die in the middle of one."""

_CLI = "from braincensus.cli import app; app()"
TRACING = Path(__file__).with_name("trace.py")


def configuration(**sections: dict[str, object]) -> Config:
    """Return the configuration of all runs here, with changes."""
    changes: Config = {
        "input": {"voxel_size_um": 5.0},
        "foreground": {"model": "intensity"},
        "compute": {"workers": 1, "threads_per_worker": 1, "dashboard_port": 0, "block_voxels": BLOCK},
    }
    for name, section in sections.items():
        changes[name] = {**changes.get(name, {}), **section}
    return changes


def result_bytes(output: Path) -> dict[str, str]:
    """Return a digest of every file of the result: voxels, tables, density; not of what tells times."""
    kept = {}
    for path in sorted(output.rglob("*")):
        name = str(path.relative_to(output))
        if path.is_file() and not name.startswith(("braincensus/", "tables/blocks/")) and name != "zarr.json":
            kept[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return kept


def marks(output: Path) -> Counter[str]:
    """Count the blocks of each stage that are marked as done."""
    done = output / "braincensus" / "done"
    return Counter(path.parts[-3] for path in done.glob("*/*/*.safetensors"))


class Started:
    """A run by the command line, in a process group of its own."""

    def __init__(self, brain: Path, output: Path, config: Config, *, trace: Path | None = None) -> None:
        self.output = output
        self._settings = tempfile.NamedTemporaryFile("w", suffix=".yaml")  # noqa: SIM115
        json.dump(config, self._settings)
        self._settings.flush()
        self.process = subprocess.Popen(
            [sys.executable, "-c", _CLI, "run", str(brain), str(output), "--config", self._settings.name],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env=_environment(trace),
        )

    def wait_for(self, stage: str, blocks: int, timeout_s: float = 120) -> None:
        """Wait until so many blocks of a stage are marked as done."""
        if not self.came_to(stage, blocks, timeout_s):
            raise AssertionError(f"the run ended before: {self.finish()}")

    def came_to(self, stage: str, blocks: int, timeout_s: float = 120) -> bool:
        """Wait as `wait_for`; say whether it came to that, or ended before."""
        done = self.output / "braincensus" / "done" / stage
        lock = self.output.with_name(f".{self.output.name}.lock")
        until = time.monotonic() + timeout_s
        while time.monotonic() < until:
            if self._holds(lock) and len(list(done.glob("*/*.safetensors"))) >= blocks:
                return True  # begun, also where an earlier run had come as far
            if self.process.poll() is not None:
                return False
            time.sleep(0.01)
        raise AssertionError(f"{stage} has not come to {blocks} blocks")

    def _holds(self, lock: Path) -> bool:
        """Whether the lock is this run's, and not one that a killed run has left behind."""
        try:
            return bool(json.loads(lock.read_text())["pid"] == self.process.pid)
        except (OSError, ValueError):  # there is none, or it is just being written
            return False

    def workers(self) -> list[int]:
        """Return the worker processes of its own cluster."""
        return worker_processes(self.process.pid)

    def signal(self, number: int) -> None:
        """Send a signal to the client alone."""
        os.kill(self.process.pid, number)

    def kill_all(self) -> None:
        """Kill client, scheduler and workers at once, as a power cut would."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(30)

    def finish(self, timeout_s: float = 240) -> str:
        """Wait for the end; returns what was printed."""
        text, _ = self.process.communicate(timeout=timeout_s)
        return str(text)

    @property
    def failed_clearly(self) -> bool:
        """Whether it ended with an error of its own, not with a crash."""
        return self.process.returncode == 1

    def close(self) -> None:
        """Leave nothing behind."""
        if self.process.poll() is None:
            self.kill_all()
        if self.process.stdout is not None:
            self.process.stdout.close()
        self._settings.close()


class Cluster:
    """A scheduler and workers, each a process with its own nanny, as on nodes of a cluster."""

    def __init__(self, folder: Path, *, workers: int = 2, trace: Path | None = None) -> None:
        self._folder, self._n_workers, self._trace = folder, workers, trace
        folder.mkdir(parents=True, exist_ok=True)
        self.nodes: list[subprocess.Popen[bytes]] = []
        self._start_scheduler()
        self.repair()

    def _start_scheduler(self) -> None:
        self._file = self._folder / f"scheduler-{time.monotonic_ns()}.json"
        self.scheduler = self._popen(
            *("scheduler", "--host", "127.0.0.1", "--port", "0", "--scheduler-file", str(self._file)),
            *(
                "--dashboard-address",
                "127.0.0.1:0",
            ),  # without a dashboard, it would listen on 8787 all the same
        )
        until = time.monotonic() + 60
        while not self._file.exists() and time.monotonic() < until:
            time.sleep(0.05)
        time.sleep(0.1)
        self.address = str(json.loads(self._file.read_text())["address"])

    def _popen(self, what: str, *arguments: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", f"distributed.cli.dask_{what}", "--no-dashboard", *arguments],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            env=_environment(self._trace),
        )

    def repair(self) -> None:
        """Start anew what is gone, and wait until all workers are there."""
        if self.scheduler.poll() is None and _is_stopped(self.scheduler.pid):
            self._stop([self.scheduler])
        if self.scheduler.poll() is not None:
            self._stop(self.nodes)
            self._start_scheduler()
        self.nodes = [node for node in self.nodes if node.poll() is None]
        while len(self.nodes) < self._n_workers:
            self.nodes.append(
                self._popen(
                    "worker",
                    *("--scheduler-file", str(self._file), "--host", "127.0.0.1", "--nthreads", "1"),
                    *("--memory-limit", "3GB", "--local-directory", str(self._folder)),
                )
            )
        with Client(self.address, timeout=30) as client:
            client.wait_for_workers(self._n_workers, timeout=90)

    def workers(self) -> list[int]:
        """Return the worker processes; nannies are `nodes`."""
        return [pid for node in self.nodes if node.poll() is None for pid in worker_processes(node.pid)]

    def close(self) -> None:
        """End all of it."""
        self._stop([*self.nodes, self.scheduler])

    def _stop(self, processes: list[subprocess.Popen[bytes]]) -> None:
        for process in processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(30)


def _is_stopped(pid: int) -> bool:
    return bool(psutil.Process(pid).status() == psutil.STATUS_STOPPED)


def worker_processes(pid: int) -> list[int]:
    """Return the processes of Dask workers below a process."""
    found = []
    with suppress(psutil.Error):
        for child in psutil.Process(pid).children(recursive=True):
            with suppress(psutil.Error):
                if "spawn_main" in " ".join(child.cmdline()):
                    found.append(child.pid)
    return found


def send(pids: list[int], number: int) -> None:
    """Send a signal to processes, some of which may be gone."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def limit(pids: list[int], which: int, n_bytes: Callable[[int], int]) -> None:
    """Give running processes a limit: of address space, or of the size of files."""
    import resource

    for pid in pids:
        with suppress(ProcessLookupError, psutil.Error):
            hard = resource.prlimit(pid, which)[1]
            resource.prlimit(pid, which, (n_bytes(pid), hard))


def _environment(trace: Path | None) -> dict[str, str]:
    # A terminal as wide as this keeps messages in one line.
    environment = {**os.environ, "COLUMNS": "1000", "DASK_DISTRIBUTED__LOGGING__DISTRIBUTED": "critical"}
    if trace is not None:
        environment["FAULTSTRACING"] = str(trace)
        environment["DASK_DISTRIBUTED__WORKER__PRELOAD"] = json.dumps([str(TRACING)])
    return environment


def traced(trace: Path) -> Counter[tuple[str, str]]:
    """Return how often the workers noted (begun, kept, done or failed; block)."""
    noted = [path.name.split(":") for path in trace.iterdir()]
    return Counter((word, block.replace("!", "/")) for _, word, block, _ in noted)
