"""A campaign of faults: runs that are disturbed at drawn moments, continued, and compared byte for byte.

    python benchmarks/faults.py [--faults 100] [--seed 0] [--minutes M] [--only KIND]

Every fault is a real one: processes are killed or stopped, signals sent, limits set, a disk filled, files
damaged. With which foreground model, at which stage, after how many of its blocks, and how much later, is
drawn from the seed. A run that a fault ends must say why (exit status 1, 130 or 143; killed clients apart),
is continued, one in four disturbed once more, and must end with the bytes of a run that nothing disturbed.
Workers note what they really compute, so that work done twice is counted. Exits with 1 if anything is not
as it should be.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import dask
import numpy as np
import psutil
import pyarrow.parquet as pq
import zarr
from distributed import Client, LocalCluster

from braincensus import BraincensusError, RunConfig, run
from braincensus_kernels.boxes import Box
from braincensus_kernels.phantom import Phantom

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.faults.injection import (
    SHAPE,
    TRACING,
    Cluster,
    Config,
    Started,
    configuration,
    limit,
    result_bytes,
    send,
    traced,
)

MODELS: dict[str, dict[str, object]] = {
    "intensity": {"model": "intensity"},
    "wnet3d": {"model": "wnet3d", "patch_voxels": 24, "halo_voxels": 8},
}
STAGES = {"intensity": 1, "segment": 1, "threshold": 27, "label": 27, "relabel": 27}
"""Blocks of each stage; wnet3d has 27 in `segment`."""

HUNG_AFTER_S = 30.0


@dataclass(frozen=True)
class Fault:
    """What happens to a run, and how it should take it.

    Attributes
    ----------
    on_nodes
        Whether the run is on a cluster of two nodes, each a process with a nanny of its own.
    inject
        Does it.
    survives
        Whether the run itself must get to its end.
    silent
        Whether it cannot say anything, because its client is dead.
    repeats
        Blocks that may be computed twice although done: a task that nobody waits for ends beside its
        successor, and what was damaged is done again.
    interrupts
        Blocks that one injection may cost while they are worked on.
    """

    on_nodes: bool
    inject: Callable[[Bench, Started], None]
    survives: bool = False
    silent: bool = False
    repeats: int = 0
    interrupts: int = 1


@dataclass
class Row:
    """What came of the faults of one kind."""

    injected: int = 0
    runs: int = 0
    same_at_once: int = 0
    same_after: int = 0
    clear: int = 0
    interrupted: int = 0
    repeated: int = 0
    lost_or_doubled: int = 0
    longest_end: float = 0.0
    seconds: float = 0.0
    failures: list[str] = field(default_factory=list)


class Bench:
    """The volume, what it should become, and the clusters."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.trace = folder / "trace"
        phantom = Phantom(shape=SHAPE, n_cells=120, seed=8, tissue="full").render(Box.whole(SHAPE))
        self.brain = folder / "brain.zarr"
        zarr.create_array(self.brain, data=phantom, chunks=(24, 24, 24))
        self.trace.mkdir()
        with dask.config.set({"distributed.worker.preload": [str(TRACING)]}):
            os.environ["FAULTS_TRACE"] = str(self.trace)
            self._quiet = LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address="127.0.0.1:0")
        self.client = Client(self._quiet)
        self._nodes: Cluster | None = None
        self.disk = folder / "disk"
        self.disk.mkdir()
        self.has_disk = not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(self.disk)],
            capture_output=True,
            check=False,
        ).returncode
        self.expected: dict[str, dict[str, str]] = {}
        self.cells: dict[str, int] = {}
        for model in MODELS:
            output = folder / model / "out.zarr"
            self.cells[model] = self.go_on(output, model)
            self.expected[model] = result_bytes(output)

    def whole_nodes(self) -> Cluster:
        """Return the cluster of two nodes, with all that was killed started anew."""
        if self._nodes is None:
            self._nodes = Cluster(self.folder / "nodes", trace=self.trace)
        self._nodes.repair()
        return self._nodes

    @property
    def nodes(self) -> Cluster:
        """Return the cluster of two nodes as it is."""
        assert self._nodes is not None
        return self._nodes

    def tidy(self) -> None:
        """End what the fault left: a full disk, damaged chunks, stopped processes."""
        (self.disk / "filler").unlink(missing_ok=True)
        for whole in self.folder.glob("*.whole"):
            shutil.copy2(whole, self.brain.joinpath("c", *whole.name.removesuffix(".whole").split(".")))
            whole.unlink()
        for node in self._nodes.nodes if self._nodes else ():
            with suppress(psutil.Error):
                nanny = psutil.Process(node.pid)
                stopped = nanny.status() == psutil.STATUS_STOPPED
                if stopped:  # they wake up, find that nobody waits for them, and are started anew
                    send([p.pid for p in (nanny, *nanny.children(recursive=True))], signal.SIGCONT)
                    time.sleep(0.5)
                    send([p.pid for p in (nanny, *nanny.children(recursive=True))], signal.SIGKILL)
                    node.wait(30)

    def config(self, model: str, cluster: str = "local") -> Config:
        """Return the configuration of every run of a model."""
        compute = {"cluster": cluster, "hung_after_s": HUNG_AFTER_S}
        return configuration(foreground=MODELS[model], compute=compute)

    def go_on(self, output: Path, model: str) -> int:
        """Run on a cluster to which nothing happens; return the number of cells."""
        config = RunConfig().merged(self.config(model))
        return run(self.brain, output, config=config, client=self.client).n_cells

    def close(self) -> None:
        """Leave nothing behind."""
        if self._nodes is not None:
            self._nodes.close()
        self.client.close()
        self._quiet.close()
        if self.has_disk:
            subprocess.run(["umount", "-l", str(self.disk)], check=False)


def all_killed(bench: Bench, disturbed: Started) -> None:
    disturbed.kill_all()


def worker_killed(bench: Bench, disturbed: Started) -> None:
    send(disturbed.workers(), signal.SIGKILL)


def worker_killed_again(bench: Bench, disturbed: Started) -> None:
    for _ in range(3):
        send(disturbed.workers(), signal.SIGKILL)
        time.sleep(1.5)


def node_killed(bench: Bench, disturbed: Started) -> None:
    send([bench.nodes.nodes[0].pid, *_below(bench, 0)], signal.SIGKILL)


def node_terminated(bench: Bench, disturbed: Started) -> None:
    bench.nodes.nodes[1].send_signal(signal.SIGTERM)


def node_hangs(bench: Bench, disturbed: Started) -> None:
    send([bench.nodes.nodes[0].pid, *_below(bench, 0)], signal.SIGSTOP)


def worker_hangs(bench: Bench, disturbed: Started) -> None:
    send(disturbed.workers(), signal.SIGSTOP)


def scheduler_killed(bench: Bench, disturbed: Started) -> None:
    bench.nodes.scheduler.kill()
    bench.nodes.scheduler.wait(30)


def scheduler_away(bench: Bench, disturbed: Started) -> None:
    bench.nodes.scheduler.send_signal(signal.SIGSTOP)
    time.sleep(3)
    bench.nodes.scheduler.send_signal(signal.SIGCONT)


def client_killed(bench: Bench, disturbed: Started) -> None:
    workers = disturbed.workers()
    disturbed.signal(signal.SIGKILL)
    disturbed.process.wait(30)
    processes = []
    for pid in workers:
        with suppress(psutil.Error):
            processes.append(psutil.Process(pid))
    _, alive = psutil.wait_procs(processes, timeout=20)
    if alive:
        raise AssertionError(f"workers outlived their client: {alive}")


def client_hit(*numbers: int) -> Callable[[Bench, Started], None]:
    def hit(bench: Bench, disturbed: Started) -> None:
        for number in numbers:
            with suppress(ProcessLookupError):
                disturbed.signal(number)
            time.sleep(0.1)

    return hit


def disk_full(bench: Bench, disturbed: Started) -> None:
    with (bench.disk / "filler").open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(b"x" * 4096)


def files_end(bench: Bench, disturbed: Started) -> None:
    limit(disturbed.workers(), resource.RLIMIT_FSIZE, lambda _: 600)


def output_damaged(bench: Bench, disturbed: Started) -> None:
    disturbed.kill_all()
    files = [p for p in (disturbed.output / "braincensus").rglob("*") if p.is_file() and p.stat().st_size]
    for path in random.Random(len(files)).sample(files, min(4, len(files))):
        if path.name != "zarr.json":
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def input_damaged(bench: Bench, disturbed: Started) -> None:
    for chunk in sorted((bench.brain / "c").rglob("*")):
        if chunk.is_file():
            shutil.copy2(chunk, bench.folder / f"{'.'.join(chunk.parts[-3:])}.whole")
            with chunk.open("r+b") as file:
                file.truncate(chunk.stat().st_size // 2)


def _below(bench: Bench, node: int) -> list[int]:
    with suppress(psutil.Error):
        return [p.pid for p in psutil.Process(bench.nodes.nodes[node].pid).children(recursive=True)]
    return []


KINDS = {
    "all killed": Fault(False, all_killed, silent=True),
    "worker killed": Fault(False, worker_killed, survives=True),
    "worker killed three times": Fault(False, worker_killed_again, interrupts=3),
    "node killed": Fault(True, node_killed, survives=True),
    "node terminated (SIGTERM)": Fault(True, node_terminated, survives=True, repeats=1),
    "node hangs (SIGSTOP)": Fault(True, node_hangs, survives=True, repeats=2),
    "worker hangs (SIGSTOP)": Fault(False, worker_hangs, survives=True),
    "scheduler killed": Fault(True, scheduler_killed, interrupts=2, repeats=2),
    "scheduler away for 3 s": Fault(True, scheduler_away, survives=True),
    "client killed, own cluster": Fault(False, client_killed, silent=True),
    "client killed, cluster stays": Fault(True, client_hit(signal.SIGKILL), silent=True, repeats=6),
    "client SIGTERM": Fault(False, client_hit(signal.SIGTERM)),
    "client SIGTERM twice": Fault(False, client_hit(signal.SIGTERM, signal.SIGTERM)),
    "client SIGINT": Fault(False, client_hit(signal.SIGINT)),
    "disk full": Fault(False, disk_full),
    "files may not grow (EFBIG)": Fault(False, files_end),
    "killed, then output damaged": Fault(False, output_damaged, silent=True, repeats=4),
    "input chunks cut short": Fault(False, input_damaged),
}


def one(bench: Bench, kind: str, draw: random.Random, number: int, row: Row) -> None:
    """Inject a fault, perhaps another into the run that continues; then continue to the end and compare."""
    fault = KINDS[kind]
    model = "wnet3d" if draw.random() < 0.3 else "intensity"
    stage = draw.choice(list(STAGES))
    most = 27 if (model, stage) == ("wnet3d", "segment") else STAGES[stage]
    blocks, later = draw.randint(0, most), draw.choice([0.0, draw.uniform(0, 0.6)])
    again = draw.random() < 0.25
    place = (bench.disk if fault.inject is disk_full else bench.folder / "runs") / str(number)
    output = place / "out.zarr"
    shutil.rmtree(bench.trace, ignore_errors=True)
    bench.trace.mkdir()
    what = f"#{number} {kind}, {model}, {stage} {blocks} + {later:.2f} s{', twice' if again else ''}"
    failed = len(row.failures)
    began, injected, code = time.monotonic(), 0, -1
    for attempt in range(3):
        if attempt > again:  # a run to which nothing happens
            try:
                bench.go_on(output, model)
                code = 0
            except BraincensusError as err:
                row.failures.append(f"{what}, run {attempt + 1}: {err}")
            break
        cluster = bench.whole_nodes().address if fault.on_nodes else "local"
        disturbed = Started(bench.brain, output, bench.config(model, cluster), trace=bench.trace)
        hit = False
        try:
            if disturbed.came_to(stage, blocks):
                time.sleep(later)
                if disturbed.process.poll() is None:
                    hit = True
                    injected += 1
                    fault.inject(bench, disturbed)
            at = time.monotonic()
            said = disturbed.finish(180)
            code = disturbed.process.returncode
            if hit:
                row.longest_end = max(row.longest_end, time.monotonic() - at)
            problem = _end_of(fault, hit, code, said, row)
        except subprocess.TimeoutExpired:
            disturbed.kill_all()
            problem = "did not end within 180 s"
        except AssertionError as err:
            problem = str(err)
        finally:
            disturbed.close()
            bench.tidy()
        if problem:
            row.failures.append(f"{what}, run {attempt + 1}: {problem}")
        if code == 0:
            break
    row.runs += 1
    row.injected += injected
    row.seconds += time.monotonic() - began
    if code:
        row.failures.append(f"{what}: did not get to its end")
        print("\n".join(f"FAILURE {text}" for text in row.failures[failed:]), flush=True)
        return
    if result_bytes(output) != bench.expected[model]:
        row.failures.append(f"{what}: other bytes")
    elif attempt == 0:
        row.same_at_once += 1
    else:
        row.same_after += 1
    labels = pq.read_table(output / "tables" / "cells" / "table.parquet", columns=["label"])[
        "label"
    ].to_numpy()
    row.lost_or_doubled += abs(len(labels) - bench.cells[model]) + len(labels) - len(np.unique(labels))
    _count_work(bench, fault, injected, what, row)
    shutil.rmtree(place, ignore_errors=True)
    for text in row.failures[failed:]:
        print(f"FAILURE {text}", flush=True)
    print(f"{what}: {attempt + 1} run(s), {time.monotonic() - began:.0f} s", flush=True)


def _end_of(fault: Fault, hit: bool, code: int, said: str, row: Row) -> str:
    """Return what is wrong with how a run ended."""
    if code == 0:
        return ""
    if not hit:
        return f"nothing was done to it, and it ended with {code}: {said[-900:]}"
    if fault.survives:
        return f"should have survived, ended with {code}: {said[-900:]}"
    if fault.silent:
        return ""
    if "Traceback" in said or code not in (1, 130, 143) or (code == 1 and "error: " not in said):
        return f"no clear end, {code}: {said[-900:]}"
    row.clear += 1
    return ""


def _count_work(bench: Bench, fault: Fault, injected: int, what: str, row: Row) -> None:
    noted = traced(bench.trace)
    words: Counter[str] = Counter()
    for (word, _), times in noted.items():
        words[word] += times
    interrupted = words["begun"] - words["done"] - words["kept"] - words["failed"]
    repeated = sum(times - 1 for (word, _), times in noted.items() if word == "done" and times > 1)
    row.interrupted += interrupted
    row.repeated += repeated
    if interrupted > fault.interrupts * injected:
        row.failures.append(f"{what}: {interrupted} blocks were interrupted, more than were in flight")
    if repeated > fault.repeats * injected:
        row.failures.append(f"{what}: {repeated} done blocks were done again")


def main() -> int:
    """Draw, inject, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=1e9, help="draw no more after this")
    parser.add_argument("--json", type=Path, help="where to leave the figures of the table, too")
    parser.add_argument("--only", default="", help="a part of the name of a kind")
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)
    rows: dict[str, Row] = defaultdict(Row)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        kinds = [kind for kind in KINDS if arguments.only in kind]
        if not bench.has_disk and "disk full" in kinds:
            print("no file system can be mounted here: `disk full` is left out")
            kinds.remove("disk full")
        try:
            number, most = 0, 3 * arguments.faults  # a run may end before its fault
            until = began + 60 * arguments.minutes
            while sum(row.injected for row in rows.values()) < arguments.faults and number < most:
                if time.monotonic() > until:
                    break
                if number % len(kinds) == 0:
                    draw.shuffle(kinds)  # every kind as often, in another order each time
                kind = kinds[number % len(kinds)]
                one(bench, kind, draw, number, rows[kind])
                number += 1
        finally:
            bench.close()
    if arguments.json:
        arguments.json.write_text(json.dumps({kind: vars(row) for kind, row in rows.items()}))
    _print(rows, time.monotonic() - began)
    return 1 if any(row.failures or row.lost_or_doubled for row in rows.values()) else 0


def _print(rows: dict[str, Row], seconds: float) -> None:
    titles = (
        "fault", "injected", "runs disturbed", "same bytes at once", "clear error",
        "same bytes after going on", "cells lost or doubled", "blocks in flight, done again",
        "done blocks done again", "longest wait for the end", "seconds each",
    )  # fmt: skip
    print("| " + " | ".join(titles) + " |")
    print("|" + "---|" * len(titles))
    total = Row()
    for kind in KINDS:
        if kind in rows:
            row = rows[kind]
            _print_row(kind, row)
            for name in (
                "injected",
                "runs",
                "same_at_once",
                "same_after",
                "clear",
                "interrupted",
                "repeated",
            ):
                setattr(total, name, getattr(total, name) + getattr(row, name))
            total.lost_or_doubled += row.lost_or_doubled
            total.longest_end = max(total.longest_end, row.longest_end)
            total.seconds += row.seconds
    _print_row("all", total)
    failures = [text for row in rows.values() for text in row.failures]
    print(f"\n{len(failures)} failures, {seconds / 60:.1f} min")
    for text in failures:
        print(f"\nFAILURE {text}")


def _print_row(kind: str, row: Row) -> None:
    values = (
        kind, row.injected, row.runs, row.same_at_once, row.clear, row.same_after, row.lost_or_doubled,
        row.interrupted, row.repeated, f"{row.longest_end:.1f} s", f"{row.seconds / max(row.runs, 1):.0f}",
    )  # fmt: skip
    print("| " + " | ".join(map(str, values)) + " |")


if __name__ == "__main__":
    sys.exit(main())
