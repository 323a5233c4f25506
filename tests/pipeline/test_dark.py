"""Dark parts are skipped; what is skipped is listed, and every bit is as if it had not been."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distributed import Client, LocalCluster
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from braincensus import Result, RunConfig, open_volume, run
from braincensus.stages import label, segment
from braincensus.stages.intensity import TILE_MEDIAN, TILE_TOP, IntensityRange
from braincensus.stages.scaled import ScaledVolume
from braincensus.store import create_output
from braincensus_kernels.boxes import Box
from braincensus_kernels.intensity import (
    find_tissue,
    joint_histogram,
    scale_for,
    tile_statistics,
    tissue_median,
    tissue_range,
)
from braincensus_kernels.phantom import Phantom

HALF = (48, 96, 96)
SHAPE = (48, 96, 192)


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    """A cluster in this process, so that tests can reach into its workers."""
    with (
        LocalCluster(
            n_workers=1, threads_per_worker=2, processes=False, dashboard_address="127.0.0.1:0"
        ) as cluster,
        Client(cluster) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def brain() -> np.ndarray:
    """Tissue with cells in the first half, camera noise in the other."""
    tissue = Phantom(shape=HALF, n_cells=60, seed=3, tissue="full").render(Box.whole(HALF))
    noise = np.random.default_rng(0).normal(110, 5, HALF).round().astype(np.uint16)
    noise[24:, 48:, 48:] = 0  # padding, as fusing leaves it
    return np.concatenate([tissue, noise], axis=2)


@pytest.fixture
def census(client: Client, brain: np.ndarray, tmp_path: Path) -> Callable[..., Result]:
    def count(name: str, **changes: Any) -> Result:
        config = RunConfig().merged(
            {"input": {"voxel_size_um": (5.0, 5.26, 5.26)}, "compute": {"block_voxels": 40}} | changes
        )
        return run(brain, tmp_path / f"{name}.zarr", config=config, client=client)

    return count


@pytest.mark.parametrize(
    "foreground",
    [
        pytest.param({"model": "intensity"}, id="intensity"),
        pytest.param({"patch_voxels": 24, "halo_voxels": 8, "calibration_windows": 3}, id="wnet3d"),
        pytest.param({"norm": "window"}, id="windows", marks=pytest.mark.slow),
    ],
)
def test_the_same_bits_as_without_skipping(
    census: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, foreground: dict[str, Any]
) -> None:
    monkeypatch.setattr(segment, "_CONTRAST_AT_ONCE", (40, 40, 40))
    skipping = census("skipping", foreground=foreground)
    monkeypatch.setattr(ScaledVolume, "is_dark", lambda self, box: False)
    monkeypatch.setattr(ScaledVolume, "is_below_background", lambda self, box: False)
    monkeypatch.setattr(label, "_FAR_BELOW", 0.0)
    plain = census("plain", foreground=foreground)
    assert len(skipping.dark) > 1
    assert len(plain.dark) == 0
    assert np.array_equal(skipping.probability[:], plain.probability[:])
    assert np.array_equal(skipping.labels[:], plain.labels[:])
    assert skipping.cells.to_arrow() == plain.cells.to_arrow()
    for z0, y0, x0, z1, y1, x1 in skipping.dark.tolist():
        assert x0 >= HALF[2] - 1, "never in tissue"
        if foreground.get("norm") != "window":  # whose norms make cells out of nothing
            assert not skipping.labels[z0:z1, y0:y1, x0:x1].any()
    sizes = np.prod(skipping.dark[:, 3:] - skipping.dark[:, :3], axis=1)
    assert skipping.provenance["foreground"]["dark"] == {"parts": len(sizes), "voxels": int(sizes.sum())}


def scaled(image: np.ndarray, folder: Path, background_um: float | None) -> ScaledVolume:
    """Give what the intensity stage leaves, and the volume in its range."""
    volume = open_volume(image, voxel_size_um=(5.0, 5.26, 5.26))
    output = create_output(folder / "out.zarr", overwrite=True, voxel_size_um=volume.voxel_size_um)
    tiles = tile_statistics(image.astype(np.uint32))
    median = np.where(tiles.constant, np.float32(np.nan), tiles.median)
    for name, values in ((TILE_MEDIAN, median), (TILE_TOP, tiles.top)):
        output.create_array(
            name, shape=median.shape, dtype="float32", chunk=median.shape, shard=None, fill_value=np.nan
        )
        output.write_block(name, Box.whole(median.shape), values)
    joint = joint_histogram(image.astype(np.uint32), tiles)
    tissue = find_tissue(joint)
    low, high = tissue_range(joint, tissue, low_percentile=1.0, high_percentile=99.9)
    intensity = IntensityRange(
        scale_for(volume.dtype, 0.0, 0.0), tissue, low, high, tissue_median(joint, tissue)
    )
    return ScaledVolume(volume, output, intensity, background_um)


@given(
    seed=st.integers(0, 2**32),
    corner=st.tuples(st.integers(-12, 40), st.integers(-12, 80), st.integers(80, 180)),
    side=st.integers(4, 48),
    lit=st.integers(0, 2),
    background_um=st.sampled_from([None, 40.0, 100.0]),
)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_dark_is_zero_everywhere(
    seed: int,
    corner: tuple[int, int, int],
    side: int,
    lit: int,
    background_um: float | None,
    brain: np.ndarray,
    tmp_path: Path,
) -> None:
    """For any box, one that leaves the volume too, and voxels that shine in the dark."""
    rng = np.random.default_rng(seed)
    image = brain.copy()
    box = Box(corner, (corner[0] + side, corner[1] + side, corner[2] + side))
    inside = box.clip(SHAPE)
    assume(inside.size > 0)
    for _ in range(lit):
        position = tuple(int(rng.integers(a, b)) for a, b in zip(inside.start, inside.stop, strict=True))
        image[position] = rng.choice([150, 220, 300, 60_000])
    volume = scaled(image, tmp_path, background_um)
    given_to_network = volume.network_input(box)
    if volume.is_dark(box):
        assert not given_to_network.any()
    elif corner[2] > 120 and lit == 0:
        pytest.fail("far from tissue, without a light, all is dark")
    if volume.is_below_background(inside):
        assert (volume.read(inside) < volume.background(inside)).all()
