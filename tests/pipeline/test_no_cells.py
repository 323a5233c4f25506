"""A volume without cells has 0 cells: an answer, whole and readable, not an error and not noise."""

from __future__ import annotations

import numpy as np
import pytest
from distributed import Client, LocalCluster

from braincensus import RunConfig, run
from braincensus_kernels.boxes import Box
from braincensus_kernels.metrics import match_centroids
from braincensus_kernels.phantom import Phantom

SHAPE = (72, 72, 64)


@pytest.fixture(scope="module")
def client():
    with (
        LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address="127.0.0.1:0") as cluster,
        Client(cluster) as client,
    ):
        yield client


def census(phantom, client, folder, changes):
    config = RunConfig().merged(
        {"input": {"voxel_size_um": (5.0, 5.26, 5.26)}, "compute": {"block_voxels": 40}, **changes}
    )
    return run(phantom.render(Box.whole(SHAPE)), folder / "out.zarr", config=config, client=client)


def test_the_default_finds_nothing_in_a_brain_without_cells(client, tmp_path):
    phantom = Phantom(shape=SHAPE, n_cells=0, seed=4, artefacts_per_mm3=0)
    result = census(phantom, client, tmp_path, {})
    assert result.n_cells == 0
    assert len(result.cells) == len(result.cells.to_pandas()) == 0
    assert not result.labels[:].any()
    assert result.seams["exact"]
    assert (result.density[:] == 0).all()


def test_the_default_finds_five_cells_where_there_are_five(client, tmp_path):
    phantom = Phantom(shape=SHAPE, n_cells=5, seed=4, artefacts_per_mm3=0)
    found = census(phantom, client, tmp_path, {}).cells.to_pandas()
    truth = phantom.cells()
    assert len(found) == 5
    axes = list(zip("zyx", phantom.voxel_size_um, strict=True))
    true_um = np.stack([truth[axis] * size for axis, size in axes], axis=1)
    match = match_centroids(found[["z_um", "y_um", "x_um"]].to_numpy(), true_um, 10.0)
    assert match.n_matched == 5


def test_a_threshold_above_everything_gives_a_whole_output_with_no_cell(client, tmp_path):
    phantom = Phantom(shape=SHAPE, n_cells=20, seed=4, tissue="full")
    changes = {"foreground": {"model": "intensity"}, "labelling": {"threshold": 1.0}}
    result = census(phantom, client, tmp_path, changes)
    assert result.n_cells == 0
    assert not result.labels[:].any()
    assert "volume_um3" in result.cells.columns
    assert (result.density[:] == 0).all()
