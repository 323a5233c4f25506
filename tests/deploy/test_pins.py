"""Each extra resolves together with the Dask that we pin: dask-cuda pins Dask too."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from .conftest import DEPLOY

ROOT = DEPLOY.parent


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("extra", ["cuda13", "cuda12", "slurm", "kubernetes"])
def test_an_extra_resolves_with_our_dask(extra, tmp_path):
    report = tmp_path / "report.json"
    options = [
        "--dry-run",
        "--ignore-installed",
        "--quiet",
        "--report",
        report,
        "-c",
        ROOT / "constraints.txt",
    ]
    command = [sys.executable, "-m", "pip", "install", *options, f"{ROOT}[{extra}]"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if re.search(r"NewConnectionError|No matching distribution found for hatchling", done.stderr):
        pytest.skip("no package index is reachable")
    assert done.returncode == 0, done.stderr[-2000:]
    chosen = {
        p["metadata"]["name"]: p["metadata"]["version"] for p in json.loads(report.read_text())["install"]
    }
    pinned = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M))
    assert chosen["dask"] == pinned["dask"]
    assert chosen["distributed"] == pinned["distributed"]
