"""Runs that are disturbed for real: processes killed, files damaged, disks that end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from distributed import Client, LocalCluster

from braincensus import RunConfig, run
from braincensus_kernels.boxes import Box
from braincensus_kernels.phantom import Phantom

from .injection import SHAPE, Cluster, Config, Started, configuration, result_bytes

__all__ = ["Started", "configuration", "result_bytes"]


@pytest.fixture(scope="session")
def brain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A volume on disk."""
    path = tmp_path_factory.mktemp("faults") / "brain.npy"
    np.save(path, Phantom(shape=SHAPE, n_cells=120, seed=8, tissue="full").render(Box.whole(SHAPE)))
    return path


@pytest.fixture(scope="session")
def client() -> Iterator[Client]:
    """A cluster for the runs to which nothing happens: starting one takes longer than such a run."""
    with (
        LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address="127.0.0.1:0") as cluster,
        Client(cluster) as connected,
    ):
        yield connected


@pytest.fixture(scope="session")
def undisturbed(brain: Path, client: Client) -> Path:
    """The census of a run to which nothing happened. Its name is in its metadata: all are called out.zarr."""
    output = brain.parent / "undisturbed" / "out.zarr"
    run(brain, output, config=RunConfig().merged(configuration()), client=client)
    return output


@pytest.fixture(scope="session")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A scheduler and two workers as processes of their own, for runs on a cluster."""
    cluster = Cluster(tmp_path_factory.mktemp("nodes"))
    yield cluster
    cluster.close()


@pytest.fixture
def cluster(nodes: Cluster) -> Cluster:
    """The same, whole again."""
    nodes.repair()
    return nodes


@pytest.fixture
def start(brain: Path) -> Iterator[Callable[..., Started]]:
    """Start runs that are gone when the test ends."""
    started: list[Started] = []

    def begin(output: Path, config: Config | None = None, source: Path = brain) -> Started:
        started.append(Started(source, output, configuration() if config is None else config))
        return started[-1]

    yield begin
    for run_ in started:
        run_.close()
