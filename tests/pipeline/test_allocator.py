"""Freed memory is allocated again while a block is at work, and is the system's again after it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from braincensus.allocator import ENVIRONMENT, glibc
from braincensus.cluster import connect, managers
from braincensus.cluster.files import KubernetesFile, SlurmFile, read_cluster_file
from braincensus.config import Compute

MEASURE = """
import resource, threading, time
import numpy as np
import psutil
from braincensus.allocator import giving_back_memory

held = []

def work():
    with giving_back_memory():
        for _ in range(40):
            np.ones(64 << 20, np.uint8)
        held.append(psutil.Process().memory_info().rss)
        time.sleep(0.1)

thread = threading.Thread(target=work)  # as in a worker
thread.start()
thread.join()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt, held[0] - psutil.Process().memory_info().rss)
"""


def faults_and_given_back(environment: dict[str, str]) -> tuple[int, int]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    ran = subprocess.run(
        [sys.executable, "-c", MEASURE],
        capture_output=True,
        text=True,
        check=True,
        env=clean | {"NUMPY_MADVISE_HUGEPAGE": "0"} | environment,
    )
    faults, given_back = (int(number) for number in ran.stdout.split())
    return faults, given_back


@pytest.mark.skipif(glibc() is None, reason="the C library is not glibc")
def test_memory_is_kept_for_a_block_and_given_back_after_it() -> None:
    hurried, _ = faults_and_given_back({"MALLOC_TRIM_THRESHOLD_": "65536"})
    kept, given_back = faults_and_given_back(ENVIRONMENT)
    assert kept < hurried / 5
    assert given_back > 48 << 20


@pytest.mark.parametrize("file", ["docker/Dockerfile", "docker/Dockerfile.cuda", "slurm/census-nodes.sbatch"])
def test_deployments_say_the_same(file: str) -> None:
    text = (Path(__file__).parents[2] / "deploy" / file).read_text()
    assert {name: re.findall(rf"\b{name}=(\S+)", text) for name in ENVIRONMENT} == {
        name: [value] for name, value in ENVIRONMENT.items()
    }


@pytest.mark.parametrize(
    ("set_here", "expected"), [(None, str(1 << 30)), ("65536", str(1 << 30)), ("7", "7")]
)
def test_local_workers_are_told(set_here: str | None, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever Dask left in the environment when it started workers before (65536); not what the user set."""

    def told() -> dict[str, str]:
        return dict(os.environ)

    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    if set_here is not None:
        monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", set_here)
    compute = Compute(workers=1, threads_per_worker=1, dashboard_port=0)
    with connect(compute, None) as (client, _):
        (found,) = client.run(told).values()
    assert {name: found[name] for name in ENVIRONMENT} == ENVIRONMENT | {"MALLOC_TRIM_THRESHOLD_": expected}


def test_jobs_and_pods_are_told_and_a_file_may_say_otherwise() -> None:
    deploy = Path(__file__).parents[2] / "deploy"
    job = read_cluster_file(str(deploy / "slurm" / "cluster-cpu.yaml"), SlurmFile)
    job = job.model_copy(update={"job_script_prologue": ("export MALLOC_ARENA_MAX=4",)})
    lines = managers.slurm_options(job, None, 0)["job_script_prologue"]
    assert lines == [*(f"export {name}={value}" for name, value in ENVIRONMENT.items()), lines[-1]]
    assert lines[-1] == "export MALLOC_ARENA_MAX=4"
    pods = read_cluster_file(str(deploy / "kubernetes" / "cluster-cpu.yaml"), KubernetesFile)
    pods = pods.model_copy(update={"env": {"MALLOC_ARENA_MAX": "4"}})
    (container,) = managers.worker_spec(pods)["spec"]["containers"]
    said = {entry["name"]: entry["value"] for entry in container["env"]}
    assert said == ENVIRONMENT | {"MALLOC_ARENA_MAX": "4"}
