"""SLURM without SLURM: the real dask-jobqueue and the real job scripts; stand-ins for sbatch and its kin."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from braincensus import ConfigError, run
from braincensus.cluster import connect, managers, resources_for
from braincensus.cluster.files import SlurmFile, read_cluster_file
from braincensus.config import Compute

from .conftest import DEPLOY, Told, configuration, program, result_bytes

pytest.importorskip("dask_jobqueue")
STANDIN = Path(__file__).parent / "slurm" / "standin.py"
SCRIPTS = sorted((DEPLOY / "slurm").glob("*.sbatch"))


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Put the stand-ins on the path, and return the folder of their jobs; nothing of them is left running."""
    programs, jobs = tmp_path / "bin", tmp_path / "jobs"
    programs.mkdir()
    for name in ("sbatch", "scancel", "squeue", "scontrol", "srun"):
        program = programs / name
        program.write_text(f"#!{sys.executable}\n{STANDIN.read_text().partition(chr(10))[2]}")
        program.chmod(0o755)
    for name, call in (("braincensus", "from braincensus.cli import app; app()"), ("dask", None)):
        program = programs / name
        lines = call or "from dask.__main__ import main; main()"
        program.write_text(f'#!{sys.executable}\nif __name__ == "__main__":\n    {lines}\n')
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_STANDIN", str(jobs))
    monkeypatch.chdir(tmp_path)
    jobs.mkdir()
    yield jobs
    for pid in jobs.glob("*/pid"):
        try:
            os.killpg(int(pid.read_text()), signal.SIGKILL)
        except ProcessLookupError:
            continue


def cluster_file(folder: Path, **changes: object) -> str:
    fields = {"cores": 1, "memory": "1GB", "workers": 1, "interface": "lo", "log_directory": str(folder)}
    path = folder / f"cluster{len(list(folder.glob('cluster*.yaml')))}.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in {**fields, **changes}.items() if v is not None}))
    return f"slurm:{path}"


def refused(compute: Compute) -> str:
    with pytest.raises(ConfigError) as err, connect(compute, None):
        pass
    return str(err.value)


def test_a_plan_submits_nothing(slurm, tmp_path):
    cluster = cluster_file(
        tmp_path, cores=16, processes=4, memory="64GB", workers=None, adapt={"minimum": 4, "maximum": 40}
    )
    resources = resources_for(Compute(cluster=cluster))
    assert (resources.workers, resources.threads, resources.memory_bytes) == (40, 4, 16 * 10**9)
    assert resources.device == "cpu"
    assert not list(slurm.iterdir())
    gpu = cluster_file(tmp_path, job_extra_directives=["--gres=gpu:a100:1"])
    assert resources_for(Compute(cluster=gpu)).device == "cuda"
    assert resources_for(Compute(cluster=gpu, device="cpu")).device == "cpu"
    with pytest.raises(ConfigError, match=r"have no GPU[\s\S]*--gres=gpu:1"):
        resources_for(Compute(cluster=cluster, device="cuda"))


def test_the_script_of_a_job_is_what_slurm_takes(slurm, tmp_path):
    from dask_jobqueue import SLURMCluster

    for name in ("cluster-cpu.yaml", "cluster-gpu.yaml"):
        file = read_cluster_file(str(DEPLOY / "slurm" / name), SlurmFile)
        options = managers.slurm_options(file, None, 0)
        with SLURMCluster(
            **{**options, "scheduler_options": {"dashboard_address": "127.0.0.1:0"}}
        ) as cluster:
            script = cluster.job_script()
        for line in (f"-p {file.queue}", "-t 08:00:00", f"--cpus-per-task={file.cores}", "--requeue"):
            assert f"#SBATCH {line}\n" in script
        assert "--dashboard-address 127.0.0.1:0" in script, "nothing listens that was not asked for"
        assert "--lifetime=7h30m" in script
        assert "${TMPDIR:-/tmp}" in script
    assert "#SBATCH --gres=gpu:1\n" in script


def test_without_a_dashboard_nothing_listens_beyond_localhost_either():
    file = read_cluster_file(str(DEPLOY / "slurm" / "cluster-cpu.yaml"), SlurmFile)
    asked = file.model_copy(update={"worker_extra_args": ("--no-dashboard",)})
    extra = managers.slurm_options(asked, None, 0)["worker_extra_args"]
    assert extra == ["--no-dashboard", "--dashboard-address", "127.0.0.1:0"]
    asked = file.model_copy(update={"worker_extra_args": ("--dashboard-address=:8790",)})
    assert managers.slurm_options(asked, None, 0)["worker_extra_args"] == ["--dashboard-address=:8790"]


@pytest.mark.slow
@pytest.mark.parametrize("tls", [True, False])
def test_workers_that_are_jobs_give_the_bytes_of_a_local_run(slurm, brain, local, tmp_path, tls):
    cluster = cluster_file(tmp_path, tls=tls, job_extra_directives=["--requeue", "--signal=B:TERM@60"])
    told = Told()
    run(brain, tmp_path / "out.zarr", config=configuration(cluster=cluster), progress=told)
    assert result_bytes(tmp_path / "out.zarr") == local
    (job,) = slurm.iterdir()
    script = (job / "script").read_text()
    assert ("tls://" in script) == tls
    assert any("run code as you" in message for message in told.messages) != tls
    assert (job / "cancelled").exists(), "jobs end with the run"
    assert not list(tmp_path.glob(".certificates.*")), "no certificate is left"


@pytest.mark.slow
@pytest.mark.parametrize("size", [{"workers": None, "adapt": {"minimum": 1, "maximum": 2}}, {"workers": 1}])
def test_another_job_comes_after_one_is_killed(slurm, brain, local, tmp_path, size):
    cluster = cluster_file(tmp_path, **size)
    with connect(Compute(cluster=cluster, dashboard_port=0), None) as (client, resources):
        assert resources.workers == (1 if size.get("workers") else 2)
        (job, *_) = sorted(slurm.iterdir())
        os.killpg(int((job / "pid").read_text()), signal.SIGKILL)
        until = time.monotonic() + 60
        while len(list(slurm.iterdir())) < 2 and time.monotonic() < until:
            time.sleep(0.2)
        client.wait_for_workers(1, timeout=60)
        run(brain, tmp_path / "out.zarr", config=configuration(), client=client)
    assert result_bytes(tmp_path / "out.zarr") == local


def test_what_slurm_refuses_is_told(slurm, tmp_path, monkeypatch):
    def compute(**changes: object) -> Compute:
        return Compute(cluster=cluster_file(tmp_path, **changes), dashboard_port=0, worker_wait_s=1)

    nowhere = refused(compute(partition="nowhere"))
    assert "invalid partition specified: nowhere" in nowhere
    assert "sinfo" in nowhere
    waited = refused(compute(job_script_prologue=["exit 1"]))
    assert re.search(r"came within \d s", waited)
    assert "squeue --me" in waited
    monkeypatch.setenv("PATH", "/nowhere")
    assert "there is no `sbatch` here" in refused(compute())
    monkeypatch.setitem(sys.modules, "dask_jobqueue", None)
    assert 'pip install "braincensus[slurm]"' in refused(compute())


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"memroy": "4GB"}, "memroy is unknown: did you mean memory?"),
        ({"workers": None, "adapt": {"minimun": 1, "maximum": 2}}, "did you mean minimum?"),
        ({"memory": "64"}, "is the unit missing"),
        ({"memory": "much"}, "not a size"),
        ({"cores": 0}, "cores: "),
        ({"adapt": {"maximum": 2}}, "either workers, or adapt"),
        ({"workers": 3, "processes": 2, "cores": 4}, "multiple of processes"),
        ({"processes": 2}, "each needs one"),
        ({"job_extra_directives": ["gres=gpu:1"]}, "does not start with -"),
        ({"job_extra_directives": ["--nodes=2"]}, "one task"),
        ({"cores": 2, "processes": 2, "workers": 2, "job_extra_directives": ["--gres=gpu:2"]}, "one worker"),
    ],
)
def test_what_a_file_may_not_say_is_refused(tmp_path, changes, told):
    with pytest.raises(ConfigError, match="cannot be used") as err:
        resources_for(Compute(cluster=cluster_file(tmp_path, **changes)))
    assert told in str(err.value)


def test_a_file_that_cannot_be_read_is_told(tmp_path):
    with pytest.raises(ConfigError, match=r"No such file[\s\S]*deploy/slurm"):
        resources_for(Compute(cluster=f"slurm:{tmp_path}/none.yaml"))
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match="not valid YAML"):
        resources_for(Compute(cluster=f"slurm:{tmp_path}/bad.yaml"))
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(ConfigError, match="not a mapping"):
        resources_for(Compute(cluster=f"slurm:{tmp_path}/list.yaml"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_bash_without_complaints(script):
    assert subprocess.run(["bash", "-n", script], capture_output=True, check=False).stderr == b""
    shellcheck = program("shellcheck")
    if shellcheck is not None:
        found = subprocess.run([shellcheck, script], capture_output=True, text=True, check=False)
        assert found.stdout == ""


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_ask_for_what_slurm_knows(slurm, script, tmp_path):
    done = subprocess.run(["sbatch", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (job,) = slurm.iterdir()
    asked = json.loads((job / "asked.json").read_text())
    assert "requeue" in asked
    assert asked["open-mode"] == "append"
    assert re.fullmatch(r"B:TERM@\d+", asked["signal"])
    broken = tmp_path / "broken.sbatch"
    broken.write_text(script.read_text().replace("--requeue", "--requeu"))
    refused = subprocess.run(["sbatch", broken], capture_output=True, text=True, check=False)
    assert "unrecognized option '--requeu'" in refused.stderr


def ended(job: Path, timeout_s: float = 120) -> str:
    """Wait for a job; returns its log."""
    pid = int((job / "pid").read_text())
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        try:
            os.killpg(pid, 0)
        except ProcessLookupError:
            return next(job.parents[1].glob("braincensus-*.log")).read_text()
        time.sleep(0.05)
    raise AssertionError(next(job.parents[1].glob("braincensus-*.log")).read_text())


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_preempted_job_goes_on_to_the_same_result(slurm, brain, local, tmp_path, script, monkeypatch):
    monkeypatch.setenv("BRAINCENSUS_CLUSTER", cluster_file(tmp_path))
    output, config = tmp_path / "out.zarr", tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(configuration().model_dump(mode="json")))
    sizes = ["--ntasks=2", "--cpus-per-task=1", "--mem-per-cpu=1G"] if "nodes" in script.name else []
    command = ["sbatch", *sizes, script, brain, output, "--config", config]
    subprocess.run([str(part) for part in command], check=True, capture_output=True)
    job = slurm / "1001"
    until = time.monotonic() + 120
    while not list(output.glob("braincensus/done/*/*/*.safetensors")):
        assert time.monotonic() < until, next(tmp_path.glob("braincensus-*.log")).read_text()
        time.sleep(0.02)
    os.kill(
        int((job / "pid").read_text()), signal.SIGTERM
    )  # as --signal=B:TERM does: to the batch shell alone
    log = ended(job)
    assert "SIGTERM: stopping the run" in log
    assert "stopped; `run` goes on" in log
    assert (job / "requeued").exists()
    assert not result_is_complete(output)
    (job / "requeued").unlink()

    environment = {**os.environ, "PYTHONPATH": f"{STANDIN.parent}:{os.environ.get('PYTHONPATH', '')}"}
    again = "import sys, standin, pathlib; standin.start(pathlib.Path(sys.argv[1]), restart=1)"
    subprocess.run([sys.executable, "-c", again, job], check=True, env=environment)
    log = ended(job)
    assert "start 1" in log
    assert "done before" in log
    assert not (job / "requeued").exists()
    assert result_bytes(output) == local
    assert not list(tmp_path.glob(".braincensus-*")), "no certificate is left"


def result_is_complete(output: Path) -> bool:
    from braincensus import OutputError, open_result

    try:
        open_result(output)
    except OutputError:
        return False
    return True
