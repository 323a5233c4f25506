"""Before a long run: what cannot be read, written or trusted is found, and said, before anything is lost."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from distributed import Client, LocalCluster

from braincensus import BlockError, ConfigError, InputError, OutputError, open_volume, preflight_checks
from braincensus_kernels.boxes import Box
from braincensus_kernels.phantom import Phantom

PHANTOM = Phantom(shape=(64, 96, 96), n_cells=60, seed=2)


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    path = tmp_path / "in" / "brain.zarr"
    path.parent.mkdir()
    array = zarr.create_array(path, shape=PHANTOM.shape, chunks=(32, 32, 32), dtype="uint16")
    array[:] = PHANTOM.render(Box.whole(PHANTOM.shape))
    return path


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address="127.0.0.1:0") as cluster,
        Client(cluster) as client,
    ):
        yield client


def test_an_output_that_can_be_written_leaves_nothing(tmp_path: Path) -> None:
    found = preflight_checks.check_output(tmp_path / "not" / "there" / "out.zarr")
    assert found.fine
    assert str(tmp_path) in found.text
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="cannot write"):
        preflight_checks.check_output(tmp_path / "file" / "out.zarr")


def test_the_input_is_sampled(stored: Path) -> None:
    volume = open_volume(stored, voxel_size_um=5.0)
    boxes = preflight_checks.sample_boxes(volume, 8)
    assert boxes[0].start == (0, 0, 0)
    assert boxes[-1].stop == PHANTOM.shape
    assert 3 <= len(boxes) <= 8
    found = preflight_checks.check_input(volume)
    assert found.fine
    assert "chunks read" in found.text


@pytest.mark.parametrize("chunk", ["0/0/0", "1/2/2"])
def test_a_damaged_chunk_at_either_end_is_found(stored: Path, chunk: str) -> None:
    file = stored / "c" / chunk
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(InputError, match=f"in chunk file c/{chunk}"):
        preflight_checks.check_input(open_volume(stored, voxel_size_um=5.0))


def test_an_empty_input_is_no_success(stored: Path) -> None:
    shutil.rmtree(stored / "c")
    found = preflight_checks.check_input(open_volume(stored, voxel_size_um=5.0))
    assert not found.fine
    assert "nothing but 0" in found.text


def test_workers_that_are_as_they_should_be(client: Client, stored: Path, tmp_path: Path) -> None:
    volume = open_volume(stored, voxel_size_um=5.0)
    found = preflight_checks.check_workers(client, volume, tmp_path / "out" / "out.zarr")
    assert all(finding.fine for finding in found)
    assert "2 on 1 machine" in found[0].text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]


@pytest.mark.parametrize(
    ("changed", "refused"),
    [({"torch": "1.0"}, True), ({"python": "3.9.1"}, True), ({"numba": "0.1"}, False)],
)
def test_other_versions_on_a_worker(
    client: Client, stored: Path, monkeypatch: pytest.MonkeyPatch, changed: dict[str, str], refused: bool
) -> None:
    """The workers answer truly; it is the client that claims to have others."""
    here: Any = preflight_checks._versions() | changed
    monkeypatch.setattr(preflight_checks, "_versions", lambda: here)
    volume = open_volume(stored, voxel_size_um=5.0)
    if refused:
        name, value = next(iter(changed.items()))
        with pytest.raises(ConfigError, match=rf"(?s)other versions.*expected: {name} {value}.*constraints"):
            preflight_checks.check_workers(client, volume, None)
    else:
        found = preflight_checks.check_workers(client, volume, None)
        assert [finding.check for finding in found if not finding.fine] == ["versions"]


@pytest.mark.skipif(os.getuid() != 0 or shutil.which("unshare") is None, reason="needs its own mounts")
@pytest.mark.parametrize(
    ("hidden", "error", "message"),
    [
        ("in", InputError, r"(?s)cannot read the input.*same path on every worker"),
        ("out", OutputError, r"(?s)does not reach the output.*every worker mounts"),
    ],
)
def test_a_worker_without_the_disk(
    stored: Path, tmp_path: Path, hidden: str, error: type[Exception], message: str
) -> None:
    """A worker that sees an empty file system where the client sees the input, or the output."""
    (tmp_path / "out").mkdir()
    probe = ["unshare", "--mount", "sh", "-c", f"mount -t tmpfs none {tmp_path / hidden}"]
    if subprocess.run(probe, capture_output=True, check=False).returncode != 0:
        pytest.skip("no mounts of its own here")
    with LocalCluster(n_workers=0, dashboard_address="127.0.0.1:0") as cluster, Client(cluster) as client:
        worker = f"{sys.executable} -m distributed.cli.dask_worker {cluster.scheduler_address} --no-nanny"
        worker += f" --nthreads 1 --no-dashboard --local-directory {tmp_path / 'worker'}"
        script = f"mount -t tmpfs none {tmp_path / hidden} && exec {worker}"
        process = subprocess.Popen(
            ["unshare", "--mount", "sh", "-c", script], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            client.wait_for_workers(1, timeout=60)
            volume = open_volume(stored, voxel_size_um=5.0)
            with pytest.raises(error, match=message):
                preflight_checks.check_workers(client, volume, tmp_path / "out" / "census.zarr")
        finally:
            process.terminate()
            process.wait(30)


def test_a_worker_that_lacks_braincensus(stored: Path, tmp_path: Path) -> None:
    """Its interpreter finds a package of that name that cannot be imported."""
    shadow = tmp_path / "shadow"
    shadow.mkdir()
    (shadow / "braincensus.py").write_text("raise ModuleNotFoundError('No module named braincensus')\n")
    with LocalCluster(n_workers=0, dashboard_address="127.0.0.1:0") as cluster, Client(cluster) as client:
        options = [
            "--no-nanny",
            "--nthreads",
            "1",
            "--no-dashboard",
            "--local-directory",
            str(tmp_path / "w"),
        ]
        process = subprocess.Popen(
            [sys.executable, "-m", "distributed.cli.dask_worker", cluster.scheduler_address, *options],
            env={**os.environ, "PYTHONPATH": str(shadow)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            client.wait_for_workers(1, timeout=60)
            volume = open_volume(stored, voxel_size_um=5.0)
            with pytest.raises(
                ConfigError, match=r"(?s)cannot run what the client sends.*not installed there"
            ):
                preflight_checks.check_workers(client, volume, None)
        finally:
            process.terminate()
            process.wait(30)


def test_a_worker_that_hangs_is_not_waited_for(stored: Path) -> None:
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address="127.0.0.1:0") as cluster,
        Client(cluster) as client,
    ):
        stopped = client.run(os.getpid)
        os.kill(min(stopped.values()), signal.SIGSTOP)
        began = time.monotonic()
        found = preflight_checks.check_workers(
            client, open_volume(stored, voxel_size_um=5.0), None, hung_after_s=4.0
        )
        assert time.monotonic() - began < 60
        assert found[0].check == "workers"


def test_that_no_worker_answers_is_told(
    client: Client, stored: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = {"tcp://127.0.0.1:1": OSError("Timed out trying to connect")}
    monkeypatch.setattr(preflight_checks, "ask_workers", lambda *_, **__: gone)
    with pytest.raises(BlockError, match="none answers"):
        preflight_checks.check_workers(client, open_volume(stored, voxel_size_um=5.0), None)


def test_voxels_that_are_not_numbers_are_left_to_the_run(client: Client, tmp_path: Path) -> None:
    array = zarr.create_array(tmp_path / "nan.zarr", shape=(32, 32, 32), chunks=(32, 32, 32), dtype="float32")
    array[:] = np.nan
    volume = open_volume(tmp_path / "nan.zarr", voxel_size_um=5.0)
    assert all(found.fine for found in preflight_checks.check_workers(client, volume, None))


def test_a_part_is_the_volume_there(stored: Path) -> None:
    volume = open_volume(stored, voxel_size_um=5.0)
    part = preflight_checks.cut_out(volume, Box((8, 16, 24), (40, 80, 64)))
    assert part.shape == (32, 64, 40)
    assert part.identity != volume.identity
    assert np.array_equal(
        part.read(Box((1, 2, 3), (32, 64, 40))), volume.read(Box((9, 18, 27), (40, 80, 64)))
    )
