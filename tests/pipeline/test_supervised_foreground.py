"""SegResNet and SwinUNETR as foreground models: one answer for any blocks, their range, clear refusals."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from distributed import Client, LocalCluster

from braincensus import ConfigError, InputError, RunConfig, open_volume, plan, run
from braincensus.cluster import GIB, Resources
from braincensus.config import SwinUNETRForeground
from braincensus.planning import Plan, make_plan
from braincensus.stages.supervised import SupervisedNetwork
from braincensus_kernels.boxes import Box
from braincensus_kernels.models.checkpoints import save_weights
from braincensus_kernels.models.supervised.networks import (
    Kind,
    build_network,
    network_metadata,
    save_supervised,
)
from braincensus_kernels.models.wnet3d import WNet3D
from braincensus_kernels.phantom import Phantom

VOXEL_SIZE_UM = (5.0, 5.26, 5.26)
SHAPE = (32, 48, 56)
SIZE: dict[Kind, int] = {"segresnet": 8, "swinunetr": 12}
# Not the defaults, so that there are several patches in each direction, the last of them beyond the border.
SMALL: dict[Kind, dict[str, Any]] = {
    "segresnet": {"patch_voxels": 32, "halo_voxels": 8, "calibration_windows": 1},
    "swinunetr": {"patch_voxels": (16, 48, 48), "halo_voxels": 8, "calibration_windows": 1},
}


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    cluster = LocalCluster(
        n_workers=2,
        threads_per_worker=1,
        processes=False,
        dashboard_address="127.0.0.1:0",
        memory_limit="6GiB",
    )
    with cluster, Client(cluster) as connected:
        yield connected


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Random networks that tell bright from dark no better than chance, but firmly."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    for kind, size in SIZE.items():
        network = build_network(kind, size=size)
        last = network.get_submodule("conv_final.2.conv" if kind == "segresnet" else "out.conv.conv")
        with torch.no_grad():
            last.weight.mul_(8)  # type: ignore[operator]
        about = network_metadata(kind, size=size, input_percentiles=(2.0, 98.0), threshold=0.35)
        save_supervised(folder / f"{kind}.safetensors", network, about)
    save_weights(folder / "wnet3d.safetensors", WNet3D(channels=(4, 8, 8, 8)).state_dict(), {})
    return {path.stem: str(path) for path in folder.iterdir()}


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return Phantom(shape=SHAPE, cells_per_mm3=8000.0, tissue="full", seed=3).render(Box.whole(SHAPE))


def settings(kind: Kind, weights: dict[str, str], **changes: dict[str, Any]) -> RunConfig:
    return RunConfig().merged(
        {
            "input": {"voxel_size_um": VOXEL_SIZE_UM},
            "foreground": {
                "model": kind,
                "weights": weights[kind],
                **SMALL[kind],
                **changes.pop("foreground", {}),
            },
            "labelling": {"max_radius_um": 15, "threshold": 0.5},
            **changes,
        }
    )


@pytest.mark.parametrize("kind", SIZE)
def test_any_block_size_gives_one_answer(
    kind: Kind, weights: dict[str, str], image: np.ndarray, client: Client, tmp_path: Path
) -> None:
    found = []
    for block in (SHAPE, (24, 40, 32)):
        config = settings(kind, weights, compute={"block_voxels": block})
        result = run(image, tmp_path / f"{block[0]}.zarr", config=config, client=client)
        assert result.seams["exact"]
        found.append(result)
    one, several = found
    assert one.seams["faces"] == 0 < several.seams["faces"]
    assert one.n_cells > 20
    assert np.array_equal(one.probability[:], several.probability[:])
    assert np.array_equal(one.labels[:], several.labels[:])
    pd.testing.assert_frame_equal(one.cells.to_pandas(), several.cells.to_pandas(), check_exact=True)
    about = several.provenance
    assert about["foreground"]["model"] == kind
    assert about["foreground"]["reach_voxels"] == (122 if kind == "segresnet" else None)
    # What the weights say of their training is what was done, and recorded.
    assert about["config"]["intensity"]["high_percentile"] == 98.0
    assert about["config"]["labelling"]["foreground_threshold"] == 0.35


def planned(shape: tuple[int, int, int], foreground: dict[str, Any]) -> Plan:
    volume = open_volume(np.zeros((1, 1, 1), np.uint16), voxel_size_um=VOXEL_SIZE_UM)
    config = RunConfig().merged({"foreground": {"model": "swinunetr", "weights": "x", **foreground}})
    where = Resources(1, 1, 16 * GIB, "cpu", "local")
    return make_plan(replace(volume, shape=shape), config, where, channels=(12,), precision="float32")


def test_patches_of_swinunetr_have_one_shape_even_at_the_border() -> None:
    made = planned((50, 96, 40), {})
    assert made.segmentation.patch == (48, 48, 48)
    foreground = made.config.foreground
    assert isinstance(foreground, SwinUNETRForeground)
    nowhere: Any = None
    network = SupervisedNetwork(
        nowhere, foreground, made.segmentation, "", "", "cpu", 1, False, model="swinunetr"
    )
    patches = [patch for block in made.segment_grid for patch in network.patches(block.core)]
    assert {patch.shape for patch in patches} == {(48, 48, 48)}
    assert sorted(patch.start for patch in patches) == [(z, y, 0) for z in (0, 48) for y in (0, 48)]


def test_a_threshold_or_range_that_is_asked_for_comes_first(
    weights: dict[str, str], image: np.ndarray
) -> None:
    asked = settings(
        "segresnet",
        weights,
        foreground={"input_percentiles": [0.5, 99.9]},
        labelling={"foreground_threshold": 0.0},
    )
    made = plan(image, config=asked).config
    assert (made.intensity.low_percentile, made.intensity.high_percentile) == (0.5, 99.9)
    assert made.labelling.foreground_threshold == 0.0
    other = plan(image, config=settings("segresnet", weights, foreground={"threshold": 0.6})).config
    assert other.labelling.foreground_threshold == 0.6


def test_wrong_weights_are_refused_before_anything_runs(
    weights: dict[str, str], image: np.ndarray, tmp_path: Path
) -> None:
    for kind, given, message in (
        ("segresnet", "wnet3d", "they are a WNet3D's"),
        ("segresnet", "swinunetr", "holds a SwinUNETR, expected a SegResNet"),
        ("swinunetr", "segresnet", "holds a SegResNet, expected a SwinUNETR"),
        ("wnet3d", "segresnet", "does not hold a WNet3D encoder"),
    ):
        config = RunConfig().merged(
            {
                "input": {"voxel_size_um": VOXEL_SIZE_UM},
                "foreground": {"model": kind, "weights": weights[given]},
            }
        )
        with pytest.raises(InputError, match=message):
            run(image, tmp_path / "out.zarr", config=config)
        assert not (tmp_path / "out.zarr").exists()


def test_without_weights_the_error_says_how_to_get_some(image: np.ndarray) -> None:
    config = RunConfig().merged(
        {"input": {"voxel_size_um": VOXEL_SIZE_UM}, "foreground": {"model": "swinunetr"}}
    )
    with pytest.raises(ConfigError) as caught:
        plan(image, config=config)
    for said in ("train-supervised", "--network swinunetr", "weights fetch cellseg3d-swinunetr", "--weights"):
        assert said in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "swinunetr", "patch_voxels": 56}, "multiples of 32 .* patch_voxels 80,80,80 would do"),
        ({"model": "swinunetr", "patch_voxels": 48, "halo_voxels": 16}, "patch_voxels 64,64,64 would do"),
        ({"model": "swinunetr", "patch_voxels": 16, "norm": "window"}, "more than 32 somewhere"),
        ({"model": "segresnet", "patch_voxels": 60}, "multiples of 8 .* patch_voxels 64,64,64 would do"),
        ({"model": "segresnet", "input_percentiles": [99, 1]}, "low before high"),
    ],
)
def test_patches_that_do_not_fit_the_network_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RunConfig().merged({"foreground": changes})


def test_the_plan_counts_a_calibration_of_all_windows() -> None:
    needs = [
        planned((50, 96, 40), {"calibration_windows": n, "norm": norm}).memory_bytes["segment"]
        for n, norm in ((1, "calibrated"), (8, "calibrated"), (8, "window"))
    ]
    assert needs[1] - needs[0] > 64**3 * 7 * 500
    assert needs[2] <= needs[0]
