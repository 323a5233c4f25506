"""Cellpose and StarDist as labellers for `label_blocks`: small values that travel; models load once.

Each is a frozen description of a model and its options. Calling it on a block loads the model the first
time in a process and keeps it; one block at a time uses it, because models are not made for two threads.

Both take ``low`` and ``high``, the intensities that become 0 and 1, where these packages would rescale
each image by its own percentiles. A block is not an image: empty tissue stretched to full scale is
noise that looks like cells, and a cell would look different from either side of a seam. Take them once
from the whole volume, such as the 1st and 99.8th percentile of a coarse level.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np

from braincensus.errors import ConfigError, explain
from braincensus.worker import device_slot, keep


def cellpose(
    model: str = "cpsam",
    *,
    low: float,
    high: float,
    gpu: bool | Literal["auto"] = "auto",
    **eval_options: Any,
) -> CellposeLabeller:
    """Label with Cellpose 4, in 3D.

    Parameters
    ----------
    model
        A name that cellpose knows, or a path to weights.
    low, high
        Intensities that become 0 and 1, the same for all blocks.
    gpu
        "auto": where there is one.
    **eval_options
        Of ``CellposeModel.eval``: ``anisotropy``, ``diameter``, ``cellprob_threshold``, ``batch_size``, ...
        Here ``max_size_fraction`` is 1 unless given, as a fraction of a block would depend on blocks.

    Returns
    -------
    A picklable labeller for `label_blocks`.

    Raises
    ------
    ImportError
        If cellpose is not installed.
    ConfigError
        If `low` is not below `high`, or an option is one that this function sets.

    Examples
    --------
    >>> labeller = cellpose("cpsam", low=110, high=900, anisotropy=2.5)        # doctest: +SKIP
    >>> label_blocks(volume, labeller, block_size=256, halo=32, client=client)  # doctest: +SKIP
    """
    _check_installed("cellpose")
    _check_range(low, high)
    _check_free(eval_options, ("do_3D", "z_axis", "channel_axis", "normalize", "stitch_threshold"))
    return CellposeLabeller(str(model), low, high, gpu, {"max_size_fraction": 1.0, **eval_options})


def stardist(
    model: str | Path = "3D_demo", *, low: float, high: float, **predict_options: Any
) -> StarDistLabeller:
    """Label with a 3D model of StarDist.

    Parameters
    ----------
    model
        A name of a pretrained model, or the path of a model's folder.
    low, high
        Intensities that become 0 and 1, the same for all blocks.
    **predict_options
        Of ``StarDist3D.predict_instances``: ``prob_thresh``, ``nms_thresh``, ``n_tiles``, ``scale``, ...

    Returns
    -------
    A picklable labeller for `label_blocks`.

    Raises
    ------
    ImportError
        If stardist is not installed.
    ConfigError
        If `low` is not below `high`, or an option is one that this function sets.

    Examples
    --------
    >>> labeller = stardist("3D_demo", low=110, high=900, prob_thresh=0.6)     # doctest: +SKIP
    >>> label_blocks(volume, labeller, block_size=256, halo=32, client=client)  # doctest: +SKIP
    """
    _check_installed("stardist")
    _check_range(low, high)
    _check_free(predict_options, ("axes", "normalizer", "return_labels", "return_predict"))
    return StarDistLabeller(str(model), low, high, predict_options)


@dataclass(frozen=True)
class CellposeLabeller:
    """What `cellpose` gives."""

    model: str
    low: float
    high: float
    gpu: bool | Literal["auto"]
    options: Mapping[str, Any]

    def __call__(self, block: np.ndarray) -> np.ndarray:
        """Return the masks of a block, zyx."""
        model = keep("cellpose", (self.model, self.gpu), self._load)
        with device_slot:
            masks = model.eval(
                _normalised(block, self.low, self.high),
                do_3D=True,
                z_axis=0,
                # A dict: of True or False, cellpose makes its default for whoever comes after.
                normalize={"normalize": False},
                **copy.deepcopy(dict(self.options)),
            )[0]
        return np.asarray(masks).reshape(block.shape)  # cellpose drops axes of length 1

    def _load(self) -> Any:
        models = import_module("cellpose.models")
        known = [*models.MODEL_NAMES, *models.get_user_models()]
        if self.model not in known and not Path(self.model).exists():
            # Left to itself, cellpose would use its default model instead.
            raise ConfigError(
                explain(
                    f"there is no Cellpose model {self.model!r}",
                    expected=f"a file, or one of {', '.join(known)}",
                    cause="a misspelt name, or a file that this worker does not see",
                )
            )
        gpu = import_module("cellpose.core").use_gpu() if self.gpu == "auto" else self.gpu
        return models.CellposeModel(gpu=gpu, pretrained_model=self.model)


@dataclass(frozen=True)
class StarDistLabeller:
    """What `stardist` gives."""

    model: str
    low: float
    high: float
    options: Mapping[str, Any]

    def __call__(self, block: np.ndarray) -> np.ndarray:
        """Return the instances of a block, zyx."""
        model = keep("stardist", self.model, self._load)
        with device_slot:
            labels = model.predict_instances(
                _normalised(block, self.low, self.high), axes="ZYX", **copy.deepcopy(dict(self.options))
            )[0]
        return np.asarray(labels)

    def _load(self) -> Any:
        kind = import_module("stardist.models").StarDist3D
        folder = Path(self.model)
        if folder.is_dir():
            return kind(None, name=folder.name, basedir=str(folder.absolute().parent))
        model = kind.from_pretrained(self.model)
        if model is None:
            raise ConfigError(
                explain(
                    f"there is no StarDist model {self.model!r}",
                    expected="the name of a pretrained 3D model, or a model's folder",
                    cause="a misspelt name, or a folder that this worker does not see",
                )
            )
        return model


def _normalised(block: np.ndarray, low: float, high: float) -> np.ndarray:
    scaled = block.astype(np.float32)
    scaled -= np.float32(low)
    scaled /= np.float32(high - low)
    return scaled


def _check_installed(package: str) -> None:
    if package not in sys.modules and find_spec(package) is None:
        raise ImportError(f"{package} is not installed: pip install 'braincensus[{package}]'")


def _check_range(low: float, high: float) -> None:
    if not low < high or not np.isfinite([low, high]).all():
        raise ConfigError(
            explain(
                "these intensities span nothing",
                expected="low below high, in the volume's own units",
                found=f"low {low}, high {high}",
                remedy="np.percentile(coarse_level, [1, 99.8])",
            )
        )


def _check_free(options: Mapping[str, Any], taken: tuple[str, ...]) -> None:
    found = sorted(set(options) & set(taken))
    if found:
        raise ConfigError(
            explain(
                f"{', '.join(found)} cannot be set here",
                expected=f"other options than {', '.join(taken)}",
                cause="blocks are always zyx and in 3D, and normalised by low and high, all in the same way",
            )
        )
