"""Norm statistics measured once and kept with the weights, for a study whose volumes shall be treated alike.

A run calibrates on its own volume by default, which suits it best. Between volumes that makes a difference
of a treatment's own kind: a brain with few cells is measured with another network than one with many. With
the statistics of a reference volume in the file (``foreground.calibration: stored``) all of them meet the
same function.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from distributed import Client

from braincensus import census
from braincensus.config import RunConfig, WNet3DForeground
from braincensus.errors import ConfigError
from braincensus.progress import Progress
from braincensus.stages.norms import Calibration
from braincensus.store.files import writing
from braincensus.weights.files import check_out, read_weights
from braincensus_kernels.models.calibrate import CALIBRATION, CALIBRATION_OF
from braincensus_kernels.models.checkpoints import Checkpoint, save_weights


def calibrate_weights(
    input: Any,
    out: Path,
    *,
    config: RunConfig | None = None,
    client: Client | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Calibration:
    """Measure norm statistics on a volume, as a run does, and write the weights with them.

    Parameters
    ----------
    input, config, client, progress
        As for `braincensus.run`; the weights are those of ``config.foreground``.
    out
        Where the weights go, ``.safetensors``; a folder that the workers reach.
    overwrite
        Whether a file there may be replaced.

    Returns
    -------
    Calibration
        What was measured, and on which windows.

    Raises
    ------
    BraincensusError
        As `braincensus.run`, or if these weights have no norms to calibrate.
    """
    config = config or RunConfig()
    if not isinstance(config.foreground, WNet3DForeground):
        raise ConfigError(f"foreground model {config.foreground.model} has no norms to keep with weights")
    config = config.merged({"foreground": {"calibration": "volume", "norm": "calibrated"}})
    check_out(out, overwrite=overwrite)
    assert isinstance(config.foreground, WNet3DForeground)
    loaded = read_weights(config.foreground.weights)
    if not isinstance(loaded, Checkpoint):
        raise ConfigError(f"{config.foreground.weights} is no WNet3D: only its norms are kept with weights")
    calibration, volume = census.calibrate(
        input, folder=out.absolute().parent, config=config, client=client, progress=progress
    )
    about = {
        "volume": Path(volume.source).name,
        "shape": list(volume.shape),
        "voxel_size_um": list(volume.voxel_size_um),
        "windows": [list(box.start) for box in calibration.windows],
    }
    metadata = dict(loaded.weights.metadata) | {
        CALIBRATION: calibration.statistics.to_json(),
        CALIBRATION_OF: json.dumps(about),
    }
    with writing(out):
        save_weights(out, loaded.state, metadata)
    return calibration
