"""A local cluster that does not start is one clear error; one that others can look at is told."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from braincensus import ConfigError, RunConfig
from braincensus.cluster import connect
from braincensus.progress import Silent


def test_workers_that_are_killed_while_they_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """What distributed raises then; the campaign of faults has seen it."""

    tries = []

    def dies(**options: Any) -> None:
        tries.append(options)
        raise RuntimeError("Nanny failed to start.")

    monkeypatch.setattr(sys.modules[connect.__module__], "LocalCluster", dies)
    compute = RunConfig().merged({"compute": {"workers": 1, "dashboard_port": 0}}).compute
    with (
        pytest.raises(ConfigError, match=r"(?s)could not be started.*Nanny failed.*fewer --workers"),
        connect(compute, None),
    ):
        pass
    assert len(tries) == 3


def test_a_worker_that_is_killed_once_while_it_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """For real: the first process of a worker is killed as soon as it is there."""
    module = sys.modules[connect.__module__]
    start, tries = module.LocalCluster, []

    def first_is_killed(**options: Any) -> Any:
        tries.append(options)
        if len(tries) > 1:
            return start(**options)
        begun = threading.Thread(target=kill_next_child, args=(children(),))
        begun.start()
        try:
            return start(**options)
        finally:
            begun.join()

    monkeypatch.setattr(module, "LocalCluster", first_is_killed)
    compute = RunConfig().merged({"compute": {"workers": 2, "dashboard_port": 0}}).compute
    with connect(compute, None) as (client, _):
        client.wait_for_workers(2, timeout=30)
        assert client.submit(sum, [1, 2]).result(30) == 3
    assert len(tries) == 2, "the kill came in time, and once"


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children()}


def kill_next_child(before: set[int]) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        for child in psutil.Process().children():
            with suppress(psutil.Error):
                if child.pid not in before and "spawn_main" in " ".join(child.cmdline()):
                    child.kill()
                    return
        time.sleep(0.005)


class Said(Silent):
    def __init__(self) -> None:
        self.said: list[str] = []

    def message(self, text: str) -> None:
        self.said.append(text)


@pytest.mark.parametrize(("host", "told"), [("0.0.0.0", True), ("127.0.0.1", False)])
def test_a_dashboard_that_others_reach_is_told(
    host: str, told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stops(**options: Any) -> None:
        assert options["dashboard_address"].startswith(f"{host}:")
        raise RuntimeError("not meant to start")

    monkeypatch.setattr(sys.modules[connect.__module__], "LocalCluster", stops)
    compute = {"workers": 1, "dashboard_port": 0, "dashboard_host": host}
    said = Said()
    with (
        pytest.raises(ConfigError, match="not meant to start"),
        connect(RunConfig().merged({"compute": compute}).compute, None, said),
    ):
        pass
    assert any(f"listens on {host}" in text and "without a password" in text for text in said.said) == told


def test_a_run_without_a_network_does_not_wait_for_torch(tmp_path: Path) -> None:
    """Neither here (in a process of its own, as others import it) nor in its workers."""
    code = """
import subprocess
import sys
import numpy as np
from braincensus import RunConfig, run
from braincensus.cluster import connect, resources_for
from braincensus_kernels.boxes import Box
from braincensus_kernels.phantom import Phantom

if __name__ == "__main__":
    config = RunConfig().merged({
        "foreground": {"model": "intensity"}, "input": {"voxel_size_um": 5.0},
        "compute": {"workers": 1, "threads_per_worker": 1, "dashboard_port": 0},
    })
    image = Phantom(shape=(40, 40, 40), n_cells=20, seed=1, tissue="full").render(Box.whole((40, 40, 40)))
    with connect(config.compute, resources_for(config.compute)) as (client, _):
        run(image, sys.argv[1], config=config, client=client)
        print("torch" in sys.modules, *client.run(lambda: "torch" in __import__("sys").modules).values())
"""
    script = tmp_path / "run.py"
    script.write_text(code)
    command = [sys.executable, str(script), str(tmp_path / "out.zarr")]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["False", "False"]
