"""Weights of a supervised foreground model, before a run: found, checked, and heard on how they were trained.

    foreground.weights -> file -> SupervisedWeights -> settled(config): input's range, probability's floor

A supervised network learnt what it knows in one range of intensities, and training chose the probability
from which its foreground agrees best with the labels. Both belong to the weights, so they come from the file,
unless the configuration says otherwise.
"""

from __future__ import annotations

from braincensus.config import RunConfig, SupervisedForeground
from braincensus.errors import ConfigError, InputError, explain
from braincensus.weights.files import find_weights
from braincensus_kernels.models.registry import REGISTRY
from braincensus_kernels.models.supervised.networks import KINDS, SupervisedWeights, load_supervised


def load_for(foreground: SupervisedForeground) -> SupervisedWeights:
    """Load the weights that a configuration names.

    Raises
    ------
    ConfigError
        If it names none, or there are none of that name.
    InputError
        If they are not those of the model.
    """
    kind = next(kind for kind in KINDS if kind == getattr(foreground, "model", None))
    if foreground.weights is None:
        published = f"cellseg3d-{kind}"
        fetch = f"; or `braincensus weights fetch {published}`, then --weights {published}"
        raise ConfigError(
            explain(
                f"the foreground model {kind} needs weights, and none are shipped",
                expected="--weights FILE or NAME (foreground.weights in the configuration)",
                found="none",
                remedy=f"train it, `braincensus train-supervised INPUT --labels LABELS --network {kind} "
                "--out my.safetensors`, then --weights my.safetensors"
                + (fetch if published in REGISTRY else ""),
            )
        )
    found = find_weights(foreground.weights)
    try:
        return load_supervised(found, kind=kind)
    except (ValueError, FileNotFoundError) as err:
        raise InputError(f"the weights {foreground.weights} cannot be used: {err}") from err


def settled(config: RunConfig, weights: SupervisedWeights) -> RunConfig:
    """Return the configuration with the weights' range and threshold where it leaves them open.

    The percentiles go into the section intensity: the whole run then sees one range, and its record says
    which. Training chose the threshold to agree with labels, which no other model has; a floor below it would
    leave to Otsu what is known. 0 stands for no floor.

    Examples
    --------
    >>> from braincensus.config import SegResNetForeground
    >>> weights = SupervisedWeights({}, "segresnet", 8, {}, "", "x", (1.0, 99.0), 0.45)
    >>> config = settled(RunConfig(foreground=SegResNetForeground(weights="x")), weights)
    >>> config.intensity.high_percentile, config.labelling.foreground_threshold
    (99.0, 0.45)
    """
    foreground = config.foreground
    assert isinstance(foreground, SupervisedForeground)
    low, high = foreground.input_percentiles or weights.input_percentiles
    threshold = foreground.threshold if foreground.threshold is not None else weights.threshold
    changes: dict[str, dict[str, object]] = {
        "intensity": {"low_percentile": low, "high_percentile": high},
        "foreground": {"input_percentiles": (low, high), "threshold": threshold},
    }
    if config.labelling.foreground_threshold is None:
        changes["labelling"] = {"foreground_threshold": threshold}
    return config.merged(changes)
