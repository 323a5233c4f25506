"""The weights of a run, loaded on the client, and what of the run follows from them."""

from __future__ import annotations

from braincensus.config import IntensityForeground, RunConfig, SupervisedForeground, WNet3DForeground
from braincensus.errors import ConfigError, InputError, explain
from braincensus.weights.files import find_weights
from braincensus.weights.supervised import load_for, settled
from braincensus_kernels.models.calibrate import stored_calibration
from braincensus_kernels.models.checkpoints import Weights, load_weights
from braincensus_kernels.models.predict import resolve_precision
from braincensus_kernels.models.supervised.networks import SupervisedWeights
from braincensus_kernels.models.supervised.predict import resolve_supervised_precision


def load(foreground: WNet3DForeground | SupervisedForeground) -> Weights | SupervisedWeights:
    """Load the weights that a configuration names.

    Raises
    ------
    ConfigError
        If there are none of that name, or they lack the calibration that is asked for.
    InputError
        If the file cannot be used.
    """
    if isinstance(foreground, SupervisedForeground):
        return load_for(foreground)
    found = find_weights(foreground.weights)
    try:
        weights = load_weights(found)
        stored = stored_calibration(weights) if foreground.calibration == "stored" else None
    except ValueError as err:
        raise InputError(f"the weights {foreground.weights} cannot be used: {err}") from err
    if foreground.calibration == "stored" and stored is None:
        raise ConfigError(
            explain(
                f"the weights {foreground.weights} bring no calibration",
                expected="norm statistics in the file, for foreground.calibration: stored",
                remedy="`braincensus weights calibrate` measures and stores them; or leave "
                "foreground.calibration out",
            )
        )
    return weights


def settle(config: RunConfig, weights: Weights | SupervisedWeights, device: str) -> tuple[RunConfig, str]:
    """Return the configuration with what the weights say where it is open, and the precision on a device."""
    foreground = config.foreground
    assert not isinstance(foreground, IntensityForeground), "it has no weights"
    if isinstance(weights, SupervisedWeights):
        return settled(config, weights), resolve_supervised_precision(foreground.precision, device)
    return config, resolve_precision(foreground.precision, device)
