"""A cluster of which a part dies or hangs: the run ends with the same bytes, or soon with an error."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import dask
import psutil
import pytest
from distributed import Client
from distributed.client import ClosedClientError, FutureCancelledError
from distributed.comm import CommClosedError

from braincensus import BlockError, RunConfig, preflight_checks, run

from .injection import Cluster, Config, Started, configuration, result_bytes, send

Start = Callable[..., Started]
HUNG_AFTER_S = 10
"""As short as it can be: on a busy machine, a worker that imports its libraries may be silent for seconds."""


def on(cluster: Cluster, **compute: object) -> Config:
    return configuration(compute={"cluster": cluster.address, **compute})


def go_on(brain: Path, output: Path, client: Client) -> None:
    run(brain, output, config=RunConfig().merged(configuration()), client=client)


def test_workers_killed_again_and_again(undisturbed: Path, start: Start, tmp_path: Path) -> None:
    output = tmp_path / "out.zarr"
    disturbed = start(output)
    for stage, blocks in (("threshold", 2), ("label", 9), ("relabel", 3)):
        disturbed.wait_for(stage, blocks)
        send(disturbed.workers(), signal.SIGKILL)
    said = disturbed.finish()
    assert disturbed.process.returncode == 0, said
    assert result_bytes(output) == result_bytes(undisturbed)


def test_the_scheduler_dies(
    cluster: Cluster, brain: Path, undisturbed: Path, client: Client, start: Start, tmp_path: Path
) -> None:
    output = tmp_path / "out.zarr"
    disturbed = start(output, on(cluster))
    disturbed.wait_for("label", 5)
    cluster.scheduler.kill()
    began = time.monotonic()
    said = disturbed.finish()
    assert time.monotonic() - began < 60
    assert disturbed.failed_clearly, said
    assert "the connection to the cluster was lost" in said
    assert "run again: done blocks are kept" in said
    assert "Traceback" not in said
    go_on(brain, output, client)
    assert result_bytes(output) == result_bytes(undisturbed)


@pytest.mark.parametrize("noticed", [False, True])
def test_the_scheduler_dies_before_the_first_block(
    noticed: bool, cluster: Cluster, brain: Path, undisturbed: Path, client: Client, tmp_path: Path
) -> None:
    output = tmp_path / "out.zarr"
    config = RunConfig().merged(configuration())
    with dask.config.set({"distributed.comm.timeouts.connect": "2s"}), Client(cluster.address) as connected:
        cluster.scheduler.kill()
        cluster.scheduler.wait(30)
        until = time.monotonic() + 30
        while noticed and connected.status != "closed" and time.monotonic() < until:
            time.sleep(0.1)
        with pytest.raises(BlockError, match=r"lost|none answers"):
            run(brain, output, config=config, client=connected)
    go_on(brain, output, client)
    assert result_bytes(output) == result_bytes(undisturbed)


@pytest.mark.parametrize(
    "lost", [CommClosedError("closed"), ClosedClientError("closed"), FutureCancelledError("label-3", "lost")]
)
def test_a_loss_is_told_wherever_dask_finds_it(
    lost: Exception, brain: Path, client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def raises(*_: object, **__: object) -> None:
        raise lost

    monkeypatch.setattr(preflight_checks, "ask_workers", raises)
    with pytest.raises(BlockError, match=r"connection to the cluster was lost[\s\S]*done blocks are kept"):
        run(brain, tmp_path / "out.zarr", config=RunConfig().merged(configuration()), client=client)


def test_the_client_dies_alone(cluster: Cluster, undisturbed: Path, start: Start, tmp_path: Path) -> None:
    output = tmp_path / "out.zarr"
    disturbed = start(output, on(cluster))
    disturbed.wait_for("label", 5)
    disturbed.signal(signal.SIGKILL)
    again = start(output, on(cluster))  # on the same cluster, which may still be at work for the dead one
    said = again.finish()
    assert again.process.returncode == 0, said
    assert "label: " in said
    assert result_bytes(output) == result_bytes(undisturbed)


def test_no_worker_outlives_a_client_with_a_cluster_of_its_own(start: Start, tmp_path: Path) -> None:
    disturbed = start(tmp_path / "out.zarr")
    disturbed.wait_for("label", 3)
    workers = disturbed.workers()
    assert workers
    disturbed.signal(signal.SIGKILL)
    processes = [psutil.Process(pid) for pid in workers if psutil.pid_exists(pid)]
    _, alive = psutil.wait_procs(processes, timeout=20)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.slow
def test_a_worker_and_its_nanny_hang(
    cluster: Cluster, undisturbed: Path, start: Start, tmp_path: Path
) -> None:
    output = tmp_path / "out.zarr"
    disturbed = start(output, on(cluster, hung_after_s=HUNG_AFTER_S))
    disturbed.wait_for("label", 4)
    stopped = (
        cluster.nodes[0].pid,
        *[pid for pid in cluster.workers() if psutil.Process(pid).ppid() == cluster.nodes[0].pid],
    )
    send(list(stopped), signal.SIGSTOP)
    try:
        said = disturbed.finish(200)
        assert disturbed.process.returncode == 0, said
        assert result_bytes(output) == result_bytes(undisturbed)
    finally:
        send(list(stopped), signal.SIGCONT)
        time.sleep(1)  # what it still does for the finished run does no harm
        assert result_bytes(output) == result_bytes(undisturbed)
        os.killpg(cluster.nodes[0].pid, signal.SIGKILL)
        cluster.nodes[0].wait(30)


@pytest.mark.slow
def test_a_worker_hangs_that_can_be_restarted(undisturbed: Path, start: Start, tmp_path: Path) -> None:
    output = tmp_path / "out.zarr"
    disturbed = start(output, configuration(compute={"hung_after_s": HUNG_AFTER_S}))
    disturbed.wait_for("threshold", 4)
    send(disturbed.workers(), signal.SIGSTOP)
    said = disturbed.finish(200)
    assert disturbed.process.returncode == 0, said
    assert result_bytes(output) == result_bytes(undisturbed)


@pytest.mark.slow
def test_the_scheduler_hangs_for_a_while(
    cluster: Cluster, undisturbed: Path, start: Start, tmp_path: Path
) -> None:
    output = tmp_path / "out.zarr"
    disturbed = start(output, on(cluster))
    disturbed.wait_for("threshold", 4)
    cluster.scheduler.send_signal(signal.SIGSTOP)
    time.sleep(4)
    cluster.scheduler.send_signal(signal.SIGCONT)
    said = disturbed.finish()
    assert disturbed.process.returncode == 0, said
    assert result_bytes(output) == result_bytes(undisturbed)


@pytest.mark.slow
def test_the_scheduler_hangs_for_good(
    cluster: Cluster, brain: Path, undisturbed: Path, client: Client, start: Start, tmp_path: Path
) -> None:
    output = tmp_path / "out.zarr"
    disturbed = start(output, on(cluster, hung_after_s=HUNG_AFTER_S))
    disturbed.wait_for("threshold", 4)
    cluster.scheduler.send_signal(signal.SIGSTOP)
    said = disturbed.finish(180)
    cluster.scheduler.kill()
    cluster.scheduler.wait(30)
    assert disturbed.failed_clearly, said
    assert "the scheduler does not answer" in said
    go_on(brain, output, client)
    assert result_bytes(output) == result_bytes(undisturbed)


@pytest.mark.slow
def test_no_worker_is_left(
    cluster: Cluster, brain: Path, undisturbed: Path, client: Client, start: Start, tmp_path: Path
) -> None:
    output = tmp_path / "out.zarr"
    disturbed = start(output, on(cluster, hung_after_s=HUNG_AFTER_S))
    disturbed.wait_for("threshold", 4)
    for node in cluster.nodes:
        node.send_signal(signal.SIGTERM)  # as a node that is taken away: nanny and worker end
    said = disturbed.finish(200)
    assert disturbed.failed_clearly, said
    assert "the cluster has no worker that works" in said
    go_on(brain, output, client)
    assert result_bytes(output) == result_bytes(undisturbed)


@pytest.mark.slow
def test_a_node_is_taken_away(cluster: Cluster, undisturbed: Path, start: Start, tmp_path: Path) -> None:
    output = tmp_path / "out.zarr"
    disturbed = start(output, on(cluster))
    disturbed.wait_for("label", 4)
    cluster.nodes[1].send_signal(signal.SIGTERM)
    said = disturbed.finish()
    assert disturbed.process.returncode == 0, said
    assert result_bytes(output) == result_bytes(undisturbed)


@pytest.mark.parametrize(
    ("signals", "code"),
    [
        ((signal.SIGTERM,), 143),
        pytest.param((signal.SIGINT,), 130, marks=pytest.mark.slow),
        pytest.param((signal.SIGTERM, signal.SIGTERM), 143, marks=pytest.mark.slow),
    ],
)
def test_stopped_by_a_signal(
    signals: tuple[int, ...],
    code: int,
    brain: Path,
    undisturbed: Path,
    client: Client,
    start: Start,
    tmp_path: Path,
) -> None:
    output = tmp_path / "out.zarr"
    disturbed = start(output)
    disturbed.wait_for("label", 6)
    for number in signals:
        disturbed.signal(number)
        time.sleep(0.2)
    said = disturbed.finish(40)
    assert disturbed.process.returncode == code, said
    assert "Traceback" not in said
    if len(signals) == 1:
        assert "goes on where it stopped" in said
        assert not output.with_name(".out.zarr.lock").exists()
    go_on(brain, output, client)
    assert result_bytes(output) == result_bytes(undisturbed)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_while_the_workers_start(number: int, start: Start, tmp_path: Path) -> None:
    disturbed = start(tmp_path / "out.zarr")
    until = time.monotonic() + 60
    while not disturbed.workers() and time.monotonic() < until:
        time.sleep(0.01)
    processes = [psutil.Process(pid) for pid in disturbed.workers()]
    disturbed.signal(number)
    said = disturbed.finish(40)
    assert disturbed.process.returncode == 128 + number, said
    assert "Traceback" not in said
    assert "goes on where it stopped" in said
    assert processes
    _, alive = psutil.wait_procs(processes, timeout=20)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


def test_a_worker_hangs_while_it_starts(undisturbed: Path, start: Start, tmp_path: Path) -> None:
    output = tmp_path / "out.zarr"
    disturbed = start(output, configuration(compute={"hung_after_s": HUNG_AFTER_S}))
    until = time.monotonic() + 60
    while not disturbed.workers() and time.monotonic() < until:
        time.sleep(0.01)
    stopped = disturbed.workers()
    send(stopped, signal.SIGSTOP)
    assert stopped
    said = disturbed.finish(120)
    assert disturbed.process.returncode == 0, said
    assert not any(psutil.pid_exists(pid) for pid in stopped)
    assert result_bytes(output) == result_bytes(undisturbed)


def test_a_second_sigterm_while_python_ends_changes_nothing() -> None:
    code = """
import atexit, os, signal, time, typer
from braincensus.cli.common import explaining

app = typer.Typer(pretty_exceptions_enable=False)

@app.command()
def stop() -> None:
    atexit.register(lambda: os.kill(os.getpid(), signal.SIGTERM))
    with explaining():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)

app()
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 143, ended.stderr
    assert "goes on where it stopped" in ended.stderr
