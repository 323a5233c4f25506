"""A run is watched for real: page, metrics and report, of schedulers here and in other processes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

import numpy as np
import pytest
from bokeh.document import Document
from dask.utils import key_split
from distributed import Client, LocalCluster
from prometheus_client.parser import text_string_to_metric_families

from braincensus import BlockError, BraincensusError, ConfigError, RunConfig, run
from braincensus.blocks import BlockGrid
from braincensus.progress import Silent
from braincensus.result import Result
from braincensus.tasks import map_blocks
from braincensus.watch.page import document
from braincensus.watch.plugin import NAME, WatchPlugin
from braincensus.watch.state import RETRIED, RunState
from braincensus.watch.tell import Watch, showing
from braincensus_kernels.boxes import Box
from braincensus_kernels.phantom import Phantom

SHAPE = (48, 48, 48)
CONFIG = RunConfig().merged(
    {
        "input": {"voxel_size_um": 5.0},
        "foreground": {"model": "intensity"},
        "compute": {"block_voxels": 24},
    }
)


class Told(Silent):
    """Remembers what a run says."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def message(self, text: str) -> None:
        self.said.append(text)


@dataclass(frozen=True)
class Watched:
    cluster: LocalCluster
    client: Client
    result: Result
    said: list[str]

    @property
    def plugin(self) -> WatchPlugin:
        plugin = self.cluster.scheduler.plugins[NAME]
        assert isinstance(plugin, WatchPlugin)
        return plugin

    @property
    def address(self) -> str:
        return str(self.client.dashboard_link).rsplit("/", 1)[0]


@pytest.fixture(scope="module")
def brain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("watch") / "brain.npy"
    np.save(path, Phantom(shape=SHAPE, n_cells=40, seed=3, tissue="full").render(Box.whole(SHAPE)))
    return path


@pytest.fixture(scope="module")
def watched(brain: Path) -> Iterator[Watched]:
    """A cluster on which a run has ended."""
    with (
        LocalCluster(
            n_workers=1,
            threads_per_worker=1,
            processes=False,
            protocol="tcp://",
            dashboard_address="127.0.0.1:0",
        ) as cluster,
        Client(cluster) as client,
    ):
        told = Told()
        result = run(brain, brain.parent / "first.zarr", config=CONFIG, client=client, progress=told)
        yield Watched(cluster, client, result, told.said)


def texts_of(plugin: WatchPlugin) -> dict[str, str]:
    """Open the page and return what its panels say."""
    doc = Document()
    document(plugin, plugin.scheduler, {"prefix": "/", "pages": [], "plots": []}, doc)
    doc.to_json()  # what a browser would be sent
    return {root.name: root.text for root in doc.roots if hasattr(root, "text")}


def metrics_at(address: str, output: str) -> dict[tuple[str, ...], float]:
    """Scrape, and return the samples of a run by name and labels."""
    with urlopen(f"{address}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    return {
        (sample.name, *(sample.labels[k] for k in sorted(sample.labels) if k != "output")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name.startswith("braincensus_") and sample.labels["output"] == output
    }


class TestPage:
    def test_it_is_served_without_any_other_site(self, watched: Watched) -> None:
        assert f"this run: {watched.address}/braincensus" in watched.said
        with urlopen(f"{watched.address}/braincensus", timeout=10) as answer:
            assert answer.status == 200
            page = answer.read().decode()
        assert "static/js/bokeh.min.js" in page
        assert "cdn" not in page
        with urlopen(f"{watched.address}/static/js/bokeh.min.js", timeout=10) as answer:
            assert answer.status == 200

    def test_dask_pages_are_as_before_and_link_to_it(self, watched: Watched) -> None:
        for name in ("status", "graph", "tasks"):
            with urlopen(f"{watched.address}/{name}", timeout=10) as answer:
                assert 'href="braincensus"' in answer.read().decode()

    def test_it_says_what_the_run_found(self, watched: Watched) -> None:
        (seen,) = (
            s for s in watched.plugin.runs.values() if s.snapshot["output"] == str(watched.result.path)
        )
        assert seen.snapshot["status"] == "finished"
        assert seen.snapshot["fraction"] == 1.0
        assert seen.snapshot["cells"] == watched.result.n_cells > 0
        faces = watched.result.seams["faces"]
        assert seen.snapshot["seams"]["faces"] == seen.snapshot["seams"]["faces_in_all"] == faces == 12
        assert [stage["status"] for stage in seen.snapshot["stages"]] == ["done"] * 8
        assert not seen.snapshot["in_flight"]
        assert seen.picture is not None
        texts = texts_of(watched.plugin)
        assert "first.zarr" in texts["heading"]
        assert f"<b>{watched.result.n_cells:,}</b><span>cells</span>" in texts["heading"]
        assert ">exact<" in texts["seams"]
        assert "12 of 12 faces" in texts["seams"]
        assert "None." in texts["notes"]

    def test_tasks_group_under_their_names(self, watched: Watched) -> None:
        prefixes = set(watched.cluster.scheduler.task_prefixes)
        assert {"label-block", "audit-seams", "merge-cells", "relabel-block", "draw-brain"} <= prefixes
        assert not {name for name in prefixes if any(c.isdigit() for c in name)}
        # A token of letters alone must not become part of a name.
        assert key_split("label-block-17-abcdefabcdef") == "label-block"


class TestMetrics:
    def test_a_scrape_agrees_with_the_result(self, watched: Watched) -> None:
        found = metrics_at(watched.address, str(watched.result.path))
        voxels = float(np.prod(SHAPE))
        assert found["braincensus_cells",] == watched.result.n_cells
        assert found["braincensus_voxels_total", "label"] == voxels
        assert found["braincensus_stage_seconds", "label"] == pytest.approx(
            watched.result.provenance["timings_s"]["label"]
        )
        assert found["braincensus_retries_total", "label"] == 0
        assert found["braincensus_blocks", "measure", "waiting"] == 0
        assert found["braincensus_blocks", "measure", "done"] == 1  # the last: a table of one part
        assert ("braincensus_voxels_total", "measure") not in found  # rows of a table, not voxels


class TestSeveralRuns:
    def test_two_at_once_and_one_after(self, watched: Watched, brain: Path, tmp_path: Path) -> None:
        script = (
            "import json, sys, braincensus, distributed\n"
            "config = braincensus.RunConfig().merged(json.loads(sys.argv[4]))\n"
            "with distributed.Client(sys.argv[3]) as client:\n"
            "    braincensus.run(sys.argv[1], sys.argv[2], config=config, client=client)\n"
        )
        about = [str(brain), str(tmp_path / "two.zarr"), watched.cluster.scheduler_address]
        about.append(
            json.dumps({name: CONFIG.model_dump()[name] for name in ("input", "foreground", "compute")})
        )
        other = subprocess.Popen([sys.executable, "-c", script, *about])
        while other.poll() is None and not any(
            seen.snapshot["output"].endswith("two.zarr") for seen in watched.plugin.runs.values()
        ):
            time.sleep(0.05)
        run(brain, tmp_path / "one.zarr", config=CONFIG, client=watched.client)
        assert other.wait(timeout=60) == 0
        run(brain, tmp_path / "one.zarr", config=CONFIG, client=watched.client, fresh=True)
        ours = [s for s in watched.plugin.runs.values() if str(tmp_path) in s.snapshot["output"]]
        assert sorted(Path(s.snapshot["output"]).name for s in ours) == ["one.zarr", "two.zarr"]  # not thrice
        assert {s.snapshot["status"] for s in ours} == {"finished"}
        assert "one.zarr" in texts_of(watched.plugin)["heading"]  # the newest
        with urlopen(f"{watched.address}/metrics", timeout=10) as answer:
            series = [line.rsplit(" ", 1)[0] for line in answer.read().decode().splitlines()]
        assert len(series) == len(set(series))


def _fail(spec: None, number: int) -> int:
    if number == 2:
        raise ValueError("broken on purpose")
    return number


def _die_once(folder: str, number: int) -> int:
    mark = Path(folder) / str(number)
    if number == 1 and not mark.exists():
        mark.touch()
        time.sleep(1.5)  # longer than between two pictures
        os.kill(os.getpid(), signal.SIGKILL)
    return number


@contextmanager
def watching_blocks(client: Client, grid: BlockGrid, output: str = "out") -> Iterator[Watch]:
    """Show a stage that is no run."""
    state = RunState("r", "in", output, grid.volume_shape, (1, 1, 1), {"label": 1.0}, now=time.monotonic())
    watch = Watch(state, Silent())
    with showing(client, watch, tell=lambda text: None):
        watch.start("label", 4)
        watch.blocks("label", "label-block", grid)
        yield watch


class TestTrouble:
    def test_a_block_that_fails_is_named(self, watched: Watched) -> None:
        grid = BlockGrid((4, 1, 1), (1, 1, 1))
        tasks: dict[str, Any] = {"client": watched.client, "stage": "label", "name": "label-block"}
        with watching_blocks(watched.client, grid) as watch, pytest.raises(BlockError, match="on purpose"):
            list(map_blocks(_fail, None, range(4), watch=watch, **tasks))
        seen = watched.plugin.runs.pop("r")
        states = watched.plugin.blocks(seen)
        assert states is not None
        assert states[2] == 5
        assert "label, block 2: ValueError: broken on purpose" in seen.snapshot["failures"][0]

    def test_a_lost_worker_is_a_retry(self, tmp_path: Path) -> None:
        grid = BlockGrid((4, 1, 1), (1, 1, 1))
        options = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": "127.0.0.1:0"}
        with (
            LocalCluster(**options, silence_logs=50) as cluster,
            Client(cluster, set_as_default=False) as client,
            watching_blocks(client, grid, str(tmp_path)) as watch,
        ):
            tasks = map_blocks(
                _die_once,
                str(tmp_path),
                range(4),
                client=client,
                stage="label",
                name="label-block",
                watch=watch,
            )
            for number, _ in tasks:
                watch.done("label", number, 1, kept=False)
            client.sync(_pause)
            plugin = cluster.scheduler.plugins[NAME]
            seen = plugin.runs["r"]
            # The worker was at block 1, and had perhaps been given another.
            lost = seen.again["label", "label-block"]
            assert 1 in lost
            assert seen.retries == {"label": len(lost)}
            assert any(text.startswith("label, block 1: its worker") for text in seen.failures)
            states = plugin.blocks(seen)
            assert {n for n in range(4) if states[n] == RETRIED} == lost
            address = str(client.dashboard_link).rsplit("/", 1)[0]
            assert metrics_at(address, str(tmp_path))["braincensus_retries_total", "label"] == len(lost)

    def test_a_client_that_is_gone_is_told(self, watched: Watched) -> None:
        grid = BlockGrid((4, 1, 1), (1, 1, 1))
        client = Client(watched.cluster, set_as_default=False)
        state = RunState("gone", "in", "gone", (4, 1, 1), (1, 1, 1), {"label": 1.0}, now=time.monotonic())
        watch = Watch(state, Silent())
        with showing(client, watch, tell=lambda text: None):
            watch.blocks("label", "label-block", grid)
            client.close()
        deadline = time.monotonic() + 10
        while watched.plugin.runs["gone"].running and time.monotonic() < deadline:
            time.sleep(0.05)
        assert watched.plugin.runs.pop("gone").snapshot["status"] == "lost"


async def _pause() -> None:
    import asyncio

    await asyncio.sleep(1.2)


Scheduler = Callable[..., str]


@pytest.fixture
def scheduler(tmp_path: Path) -> Iterator[Scheduler]:
    """Start a scheduler in a process of its own; gives its address."""
    started = []

    def start(*options: str, path: str = "") -> str:
        file = tmp_path / "scheduler.json"
        environment = dict(os.environ)
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [path, environment.get("PYTHONPATH", "")]))
        command = [
            sys.executable,
            "-m",
            "distributed.cli.dask_scheduler",
            "--host",
            "127.0.0.1",
            "--port",
            "0",
        ]
        with (tmp_path / "scheduler.log").open("w") as log:
            started.append(
                subprocess.Popen(
                    [*command, "--scheduler-file", str(file), *options],
                    env=environment,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )
        return str(file)

    yield start
    for process in started:
        process.terminate()
        process.wait(timeout=20)


def told_by(file: str) -> tuple[list[str], str]:
    """Show a run on the scheduler of a file; returns what is said, and the dashboard's address."""
    said: list[str] = []
    with Client(scheduler_file=file, set_as_default=False, timeout=30) as client:
        state = RunState("r", "in", "out", (4, 1, 1), (1, 1, 1), {"label": 1.0}, now=time.monotonic())
        address = str(client.dashboard_link).rsplit("/", 1)[0]
        with showing(client, Watch(state, Silent()), tell=said.append):
            try:
                with urlopen(f"{address}/braincensus", timeout=10) as answer:
                    said.append(str(answer.status))
            except (HTTPError, OSError) as err:
                said.append(str(getattr(err, "code", err)))
    return said, address


class TestOtherProcesses:
    def test_a_scheduler_of_its_own_gets_the_page(self, scheduler: Scheduler) -> None:
        said, address = told_by(scheduler("--dashboard-address", "127.0.0.1:0"))
        assert said == [f"this run: {address}/braincensus", "200"]

    def test_without_a_dashboard_it_is_a_message(self, scheduler: Scheduler) -> None:
        said, _ = told_by(scheduler("--no-dashboard", "--dashboard-address", "127.0.0.1:0"))
        assert "no braincensus page on the Dask dashboard" in said[0]
        assert "off" in said[0]
        assert said[1] == "404"

    def test_without_braincensus_there_it_is_a_message(self, scheduler: Scheduler, tmp_path: Path) -> None:
        (tmp_path / "absent" / "braincensus").mkdir(parents=True)
        (tmp_path / "absent" / "braincensus" / "__init__.py").write_text(
            "raise ModuleNotFoundError(\"No module named 'braincensus'\", name='braincensus')"
        )
        said, _ = told_by(scheduler("--dashboard-address", "127.0.0.1:0", path=str(tmp_path / "absent")))
        assert "install braincensus there" in said[0]
        assert said[1] == "404"


class TestReport:
    def test_it_is_whole_and_stands_alone(self, watched: Watched, brain: Path, tmp_path: Path) -> None:
        report, told = tmp_path / "report.html", Told()
        options: dict[str, Any] = {"config": CONFIG, "client": watched.client, "progress": told}
        run(brain, tmp_path / "out.zarr", performance_report=report, **options)
        page = report.read_text()
        assert page.rstrip().endswith("</html>")
        assert "label-block" in page
        assert not re.search(r'<script[^>]*src="https?:|<link[^>]*stylesheet[^>]*https?:', page)
        assert [p.name for p in tmp_path.iterdir() if "report" in p.name] == ["report.html"]
        assert f"performance report: {report}" in told.said
        run(brain, tmp_path / "out.zarr", performance_report=tmp_path / "second.html", **options)
        assert not (tmp_path / "second.html").exists()
        assert "no performance report: nothing was left to compute" in told.said

    def test_a_run_that_fails_leaves_one_too(self, watched: Watched, tmp_path: Path) -> None:
        np.save(tmp_path / "flat.npy", np.full(SHAPE, 7, np.uint16))
        report = tmp_path / "report.html"
        with pytest.raises(BraincensusError, match="every voxel is 7"):
            run(
                tmp_path / "flat.npy",
                tmp_path / "out.zarr",
                config=CONFIG,
                client=watched.client,
                performance_report=report,
            )
        assert "intensity-block" in report.read_text()
        newest = max(watched.plugin.runs.values(), key=lambda seen: seen.heard)
        assert newest.snapshot["status"] == "failed"
        assert "every voxel is 7" in texts_of(watched.plugin)["notes"]

    def test_a_place_that_cannot_be_written_is_refused_first(self, brain: Path, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="performance report cannot be written"):
            run(brain, tmp_path / "out.zarr", config=CONFIG, performance_report=tmp_path / "no" / "r.html")
        assert not (tmp_path / "out.zarr").exists()
