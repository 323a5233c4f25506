"""The promise: one answer, whatever the blocks and workers. Labels, table, density and probability.

Every run goes through the whole pipeline on a real cluster of processes; nothing is compared within
a tolerance.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from distributed import Client, LocalCluster

from braincensus import RunConfig, open_volume, run
from braincensus_kernels.boxes import Box
from braincensus_kernels.phantom import Phantom

VOXEL_SIZE_UM = (5.0, 5.26, 5.26)
FOREGROUNDS: dict[str, dict[str, object]] = {
    "intensity": {"model": "intensity"},
    "wnet3d": {"model": "wnet3d", "calibration_windows": 3},
}
BLOCKS = [(48, 48, 48), (64, 64, 64), (96, 96, 96), None]


@dataclass(frozen=True)
class Census:
    labels: np.ndarray
    cells: pd.DataFrame
    density: np.ndarray
    probability: np.ndarray
    exact: bool
    faces: int


@pytest.fixture(scope="module")
def clients() -> Iterator[dict[int, Client]]:
    """Clusters of 1 and of 3 worker processes, one thread each."""
    options = {"threads_per_worker": 1, "dashboard_address": "127.0.0.1:0", "memory_limit": "4GiB"}
    with (
        LocalCluster(n_workers=1, **options) as one,
        LocalCluster(n_workers=3, **options) as three,
        Client(one) as first,
        Client(three) as second,
    ):
        yield {1: first, 3: second}


@pytest.fixture(scope="module", params=["c5image", "phantom"])
def image(request: pytest.FixtureRequest) -> np.ndarray:
    """The real volume and a phantom of 160^3: 2 to 4 blocks along each axis."""
    if request.param == "c5image":
        path = request.getfixturevalue("c5image_path")
        volume = open_volume(path, voxel_size_um=VOXEL_SIZE_UM)
        return volume.read(volume.box)
    return Phantom(shape=(160, 160, 160), n_cells=900, seed=11).render(Box.whole((160, 160, 160)))


def census(
    image: np.ndarray,
    folder: Path,
    client: Client,
    block: tuple[int, int, int] | None,
    model: str,
    labelling: dict[str, object] | None = None,
) -> Census:
    shape = block or image.shape
    config = RunConfig().merged(
        {
            "input": {"voxel_size_um": VOXEL_SIZE_UM},
            "foreground": FOREGROUNDS[model],
            "compute": {"block_voxels": shape},
            "labelling": labelling or {},
        }
    )
    result = run(image, folder / "out.zarr", config=config, client=client, fresh=True)
    return Census(
        labels=np.asarray(result.labels[:]),
        cells=result.cells.to_pandas(),
        density=np.asarray(result.density[:]),
        probability=np.asarray(result.probability[:]),
        exact=result.seams["exact"],
        faces=result.seams["faces"],
    )


@pytest.mark.parametrize("model", ["intensity", "wnet3d"])
def test_any_block_size_and_any_number_of_workers_give_one_answer(image, clients, tmp_path, model):
    whole = census(image, tmp_path, clients[1], None, model)
    assert whole.faces == 0
    assert len(whole.cells) > 200
    assert whole.labels.max() == len(whole.cells)
    assert np.array_equal(np.bincount(whole.labels.ravel())[1:], whole.cells["volume_voxels"])
    for number, block in enumerate(BLOCKS[:-1]):
        workers = (3, 1, 3)[number]
        again = census(image, tmp_path, clients[workers], block, model)
        assert np.array_equal(again.probability, whole.probability), block
        assert np.array_equal(again.labels, whole.labels), block
        pd.testing.assert_frame_equal(again.cells, whole.cells, check_exact=True)
        assert np.array_equal(again.density, whole.density), block
        assert again.exact
        assert again.faces > 0


LABELLERS: dict[str, dict[str, object]] = {
    "components": {"method": "components", "threshold": 0.2},
    "watershed": {"method": "watershed", "threshold": "otsu", "seed_threshold": 0.6},
    "distance": {"method": "watershed", "threshold": "otsu", "seeds": "distance", "merge_border": (0.8, 1)},
}


@pytest.mark.parametrize("labeller", LABELLERS)
def test_every_labeller_gives_one_answer(c5image_path, clients, tmp_path, labeller):
    """On the real volume, through the whole pipeline."""
    volume = open_volume(c5image_path, voxel_size_um=VOXEL_SIZE_UM)
    image, how = volume.read(volume.box), LABELLERS[labeller]
    whole = census(image, tmp_path, clients[1], None, "intensity", how)
    again = census(image, tmp_path, clients[3], (40, 48, 33), "intensity", how)
    assert len(whole.cells) > 100
    assert np.array_equal(again.labels, whole.labels)
    pd.testing.assert_frame_equal(again.cells, whole.cells, check_exact=True)
    assert np.array_equal(again.density, whole.density)
    assert again.exact
