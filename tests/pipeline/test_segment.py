"""The segment stage refuses what would look like any other probability once it is stored."""

from pathlib import Path

import numpy as np
import pytest
from distributed import Client, LocalCluster

from braincensus import InputError, OutputError, RunConfig, open_result, run
from braincensus.stages import segment
from braincensus_kernels.boxes import Box


def test_probabilities_that_are_not_numbers_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: object, core: object) -> tuple[np.ndarray, list[Box], segment.Spared]:
        probability = np.zeros((40, 40, 40), np.float32)
        probability[3, 4, 5] = np.nan
        return probability, [], segment.Spared()

    monkeypatch.setattr(segment._Contrast, "foreground", broken)
    volume = np.random.default_rng(0).integers(100, 1000, (40, 40, 40)).astype(np.uint16)
    config = RunConfig().merged({"input": {"voxel_size_um": 5.0}, "foreground": {"model": "intensity"}})
    message = r"(?s)intensity gave probabilities that are not numbers.*1 of 64,000.*segment, block 0"
    with (
        LocalCluster(n_workers=1, processes=False, dashboard_address="127.0.0.1:0") as cluster,
        Client(cluster) as client,
        pytest.raises(InputError, match=message),
    ):
        run(volume, tmp_path / "out.zarr", config=config, client=client)
    with pytest.raises(OutputError, match="has not finished"):
        open_result(tmp_path / "out.zarr")
