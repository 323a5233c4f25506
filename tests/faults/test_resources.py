"""Memory and disks that end: the block goes on alone, or the run says what was missing and goes on later."""

from __future__ import annotations

import errno
import resource
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import dask
import numpy as np
import pytest
from distributed import Client, LocalCluster

from braincensus import BlockError, Result, RunConfig, run
from braincensus.cluster.connect import closing_in_time
from braincensus.stages import network
from braincensus.tasks import map_blocks
from braincensus_kernels.models import predict

from .injection import Started, configuration, limit, result_bytes

Start = Callable[..., Started]
MIB = 2**20


@pytest.fixture
def small() -> Iterator[Client]:
    """A worker of two threads and 1.5 GiB, which a nanny watches; a block may kill it once."""
    settings = {"distributed.scheduler.allowed-failures": 0, "distributed.worker.memory.spill": False}
    with (
        dask.config.set(settings),
        closing_in_time(
            LocalCluster(
                n_workers=1,
                threads_per_worker=2,
                memory_limit=1536 * MIB,
                dashboard_address="127.0.0.1:0",
                silence_logs=50,
            )
        ) as cluster,
        Client(cluster) as client,
    ):
        yield client


def taking() -> Callable[[int, int], int]:
    """Return a block's work; made in here, so that it is sent whole: workers cannot import this module."""

    def take(mib: int, number: int) -> int:
        """Take memory for real, piece by piece, and hold it for a while; block 0 takes none."""
        held = []
        for _ in range(mib // 10 if number else 0):
            held.append(np.ones(10 * MIB, np.uint8))
            time.sleep(0.005)
        time.sleep(1)
        return len(held)

    return take


@pytest.mark.slow
def test_blocks_too_large_beside_each_other_are_done_alone(small: Client) -> None:
    done = dict(map_blocks(taking(), 600, range(3), client=small, stage="test", name="take"))
    assert done == {0: 0, 1: 60, 2: 60}


def test_a_block_too_large_even_alone_is_named(small: Client) -> None:
    blocks = map_blocks(taking(), 6000, range(2), client=small, stage="test", name="take")
    done = []
    message = (
        r"(?s)test, block 1: the worker died each time.*nothing beside it.*out of memory.*smaller blocks"
    )
    with pytest.raises(BlockError, match=message):
        done.extend(blocks)
    assert done == [(0, 0)]


def allocating() -> Callable[[int, int], int]:
    def allocate(gib: int, number: int) -> int:
        return np.zeros(gib * 2**30 if number else 10, np.uint8).size

    return allocate


def test_an_allocation_that_fails_is_named(client: Client) -> None:
    blocks = map_blocks(allocating(), 2**17, range(2), client=client, stage="test", name="allocate")
    with pytest.raises(BlockError, match=r"(?s)test, block 1: not enough memory.*nothing beside it"):
        list(blocks)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(place)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("file systems cannot be mounted here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def fill(disk: Path) -> Path:
    """Take all the room that is left."""
    with (disk / "filler").open("wb", buffering=0) as file:
        while True:
            try:
                file.write(b"x" * 4096)
            except OSError as err:
                assert err.errno == errno.ENOSPC  # noqa: PT017
                return disk / "filler"


def test_a_full_disk(brain: Path, small_disk: Path, undisturbed: Path, client: Client, start: Start) -> None:
    output = small_disk / "out.zarr"
    disturbed = start(output)
    disturbed.wait_for("label", 3)
    filler = fill(small_disk)
    said = disturbed.finish()
    assert disturbed.failed_clearly, said
    assert "is full" in said
    assert "MB are free there" in said
    assert "needed: " in said
    assert "Traceback" not in said
    filler.unlink()
    run(brain, output, config=RunConfig().merged(configuration()), client=client)
    assert result_bytes(output) == result_bytes(undisturbed)


@pytest.mark.slow
def test_files_that_may_grow_no_more(
    brain: Path, undisturbed: Path, client: Client, start: Start, tmp_path: Path
) -> None:
    output = tmp_path / "out.zarr"
    disturbed = start(output)
    disturbed.wait_for("label", 3)
    limit(disturbed.workers(), resource.RLIMIT_FSIZE, lambda _: 1000)
    said = disturbed.finish()
    assert disturbed.failed_clearly, said
    assert "File too large" in said
    assert "is full" in said
    run(brain, output, config=RunConfig().merged(configuration()), client=client)
    assert result_bytes(output) == result_bytes(undisturbed)


# A GPU's memory: there is none here, so its error is raised where it would be, by the network's arithmetic.


@pytest.fixture(scope="module")
def with_network() -> dict[str, dict[str, object]]:
    foreground = {"model": "wnet3d", "patch_voxels": 40, "halo_voxels": 8, "calibration_windows": 3}
    return configuration(foreground=foreground, compute={"block_voxels": 40})


@pytest.fixture(scope="module")
def threads() -> Iterator[Client]:
    """Workers in this process, whose arithmetic can be reached."""
    with (
        LocalCluster(
            n_workers=1, threads_per_worker=1, processes=False, dashboard_address="127.0.0.1:0"
        ) as cluster,
        Client(cluster) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def usual(
    with_network: dict[str, dict[str, object]],
    brain: Path,
    threads: Client,
    tmp_path_factory: pytest.TempPathFactory,
) -> Result:
    output = tmp_path_factory.mktemp("usual") / "out.zarr"
    return run(brain, output, config=RunConfig().merged(with_network), client=threads)


@pytest.mark.parametrize("fails", [1, 2, 10**6])
def test_a_gpu_out_of_memory(
    fails: int,
    with_network: dict[str, dict[str, object]],
    usual: Result,
    brain: Path,
    threads: Client,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Out of memory once: with fewer buffers; twice: on the CPU; always, and no CPU: an error."""
    import torch

    plain, calls = predict.Predictor._compute, [0]

    def compute(self: predict.Predictor, x: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        if calls[0] <= fails:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 4.00 GiB")
        return plain(self, x)

    config = RunConfig().merged(with_network)
    monkeypatch.setattr(predict.Predictor, "_compute", compute)
    made = network.Network.foreground

    def foreground(self: network.Network, core: object) -> object:
        object.__setattr__(self, "may_use_cpu", fails == 2)
        return made(self, core)  # type: ignore[arg-type]

    monkeypatch.setattr(network.Network, "foreground", foreground)
    if fails > 2:
        with pytest.raises(BlockError, match=r"(?s)segment, block \d+: not enough memory.*alone|beside it"):
            run(brain, tmp_path / "out.zarr", config=config, client=threads)
        return
    found = run(brain, tmp_path / "out.zarr", config=config, client=threads)
    assert result_bytes(found.path) == result_bytes(usual.path)
    told = found.provenance["foreground"]["gpu_out_of_memory"]
    assert (told["sparing"] > 0, told["on_cpu"] > 0) == (fails == 1, fails == 2)
    assert "gpu_out_of_memory" not in usual.provenance["foreground"]
