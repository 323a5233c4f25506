"""Files of weights: where a name leads, what a file holds, and the same in safetensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from braincensus.errors import ConfigError, InputError, OutputError, explain
from braincensus.store.files import writing
from braincensus.weights.fetching import cached
from braincensus_kernels.models.calibrate import CALIBRATION, CALIBRATION_OF, stored_calibration
from braincensus_kernels.models.checkpoints import Checkpoint, load_checkpoint, save_weights
from braincensus_kernels.models.predict import EXACT_HALO_VOXELS, Predictor
from braincensus_kernels.models.registry import REGISTRY, WNET3D
from braincensus_kernels.models.supervised.networks import (
    KINDS,
    TITLES,
    SupervisedWeights,
    load_supervised,
    network_metadata,
)

_SHOWN_ELSEWHERE = ("name", "network", "threshold", "input_percentiles", CALIBRATION, CALIBRATION_OF)
_LONGEST = 300


def find_weights(source: str) -> str:
    """Return what `load_weights` understands: a shipped name, or an absolute path.

    Parameters
    ----------
    source
        A name of the registry, or a path.

    Raises
    ------
    ConfigError
        If published weights of that name were not fetched, or there is no such file.
    InputError
        If fetched weights are not what they were.
    """
    entry = REGISTRY.get(source)
    if entry is not None and entry.bundled is not None:
        return source
    if entry is not None:
        path = cached(source)
        if path is None:
            raise ConfigError(
                explain(
                    f"the weights {source} are not on this machine",
                    found=f"{entry.title}: published, not shipped",
                    remedy=f"`braincensus weights fetch {source}`, once, where there is a network",
                )
            )
        return str(path)
    path = Path(source).expanduser().resolve()
    if not path.is_file():
        raise ConfigError(
            explain(
                f"no weights at {source!r}",
                expected=f"a name ({', '.join(REGISTRY)}), or the path of a .safetensors or .pth file",
                found="no such file",
                remedy="check the path; `braincensus weights list` shows the names",
            )
        )
    return str(path)


def read_weights(source: str) -> Checkpoint | SupervisedWeights:
    """Read a file of weights of any network that runs here, strictly.

    Raises
    ------
    ConfigError, InputError
        As `find_weights`, or if the file does not hold exactly such a network.
    """
    found = find_weights(source)
    entry = REGISTRY.get(source)
    try:
        return load_checkpoint(found)
    except ValueError as not_wnet3d:
        if entry is not None and entry.architecture == WNET3D:
            raise InputError(f"the weights {source} cannot be used: {not_wnet3d}") from not_wnet3d
        try:
            return load_supervised(found)
        except ValueError as not_supervised:
            supervised = ", ".join(TITLES[kind] for kind in KINDS)
            raise InputError(
                explain(
                    f"the weights {source} cannot be used",
                    expected=f"exactly a WNet3D, or one of {supervised}",
                    found=f"as a WNet3D: {not_wnet3d}\n  as the others: {not_supervised}",
                )
            ) from not_supervised


def describe_weights(source: str) -> dict[str, str]:
    """Return what a person wants to know of weights, as title to text, in the order to show it.

    Raises
    ------
    ConfigError, InputError
        As `read_weights`.
    """
    loaded = read_weights(source)
    entry = REGISTRY.get(source)
    rows = {"name": entry.title} if entry is not None else {}
    if isinstance(loaded, SupervisedWeights):
        rows |= {
            "network": f"{TITLES[loaded.kind]} of size {loaded.size}, supervised",
            "parameters": f"{loaded.parameters:,}",
            "input": "percentiles {:g} to {:g} of tissue".format(*loaded.input_percentiles),
            "threshold": f"{loaded.threshold:g}",
        }
        metadata, sha256 = loaded.metadata, loaded.sha256
        use = f"--foreground {loaded.kind} --weights {source}"
    else:
        weights = loaded.weights
        channels = ", ".join(map(str, weights.channels))
        rows |= {
            "network": f"WNet3D, channels {channels}; {weights.num_classes} classes",
            "holds": "encoder and decoder" if loaded.decoder is not None else "the encoder: all that counts",
            "parameters": f"{loaded.parameters:,}",
            **_calibration(loaded),
        }
        metadata, sha256 = weights.metadata, weights.sha256
        use = f"--weights {source}"
    if entry is not None:
        rows |= {"input": entry.expected_input, "licence": entry.licence, "cite": entry.citation}
    rows |= {
        key.replace("_", " "): value if len(value) <= _LONGEST else value[:_LONGEST] + " ..."
        for key, value in metadata.items()
        if key not in _SHOWN_ELSEWHERE and key.replace("_", " ") not in rows
    }
    found = find_weights(source)
    file = {} if found == source else {"file": found}
    return rows | file | {"SHA-256": sha256, "use": f"braincensus run ... {use}"}


def convert_weights(source: str, out: Path, *, encoder_only: bool = False, overwrite: bool = False) -> str:
    """Write weights as safetensors: the same numbers in float32, nothing that could run; returns the SHA-256.

    Parameters
    ----------
    source
        A name or a path, of any network that runs here.
    out
        Ends in ``.safetensors``.
    encoder_only
        Leave WNet3D's decoder out: half the size, all that counting needs.
    overwrite
        Whether a file there may be replaced.

    Raises
    ------
    ConfigError, InputError
        As `read_weights`, or if there is no decoder to leave out.
    OutputError
        If `out` exists, or cannot be written.
    """
    loaded = read_weights(source)
    check_out(out, overwrite=overwrite)
    if isinstance(loaded, SupervisedWeights):
        if encoder_only:
            raise ConfigError(f"{source} is a {TITLES[loaded.kind]}: there is no decoder to leave out")
        state: Mapping[str, Tensor] = loaded.state
        about = network_metadata(
            loaded.kind,
            size=loaded.size,
            input_percentiles=loaded.input_percentiles,
            threshold=loaded.threshold,
        )
        metadata, sha256 = dict(loaded.metadata) | about, loaded.sha256
    else:
        weights = loaded.weights
        state = {k: v for k, v in loaded.state.items() if not (encoder_only and k.startswith("decoder."))}
        metadata, sha256 = dict(weights.metadata), weights.sha256
    metadata |= {"converted_from": Path(source).name, "converted_from_sha256": sha256}
    with writing(out):
        return save_weights(out, state, metadata)


def check_out(out: Path, *, overwrite: bool) -> None:
    """Refuse a place for weights before anything is computed."""
    if out.suffix != ".safetensors":
        raise ConfigError(
            explain("the weights need another name", expected="NAME.safetensors", found=out.name or "nothing")
        )
    if out.exists() and not overwrite:
        raise OutputError(
            explain(f"{out} exists", remedy="give another name, or --overwrite (overwrite=True)")
        )


def _calibration(loaded: Checkpoint) -> dict[str, str]:
    weights = loaded.weights
    try:
        statistics = stored_calibration(weights)
    except ValueError as err:
        raise InputError(str(err)) from err
    if statistics is None:
        return {
            "calibration": "none stored; a run measures it on its volume",
            "looks": f"at most {EXACT_HALO_VOXELS} voxels far; a run says how far with its calibration",
        }
    reach = Predictor(weights, statistics=statistics, halo_voxels=0, precision="float32").reach_voxels
    of = weights.metadata.get(CALIBRATION_OF, "")
    return {
        "calibration": f"stored, of {statistics.windows} windows" + (f": {_short(of)}" if of else ""),
        "foreground": f"class {statistics.foreground_class}, the brighter one",
        "looks": f"{reach} voxels far with the stored calibration: a halo of that is exact",
    }


def _short(of: str) -> str:
    try:
        listed = json.loads(of)
    except ValueError:
        return of
    return ", ".join(f"{k} {v}" for k, v in listed.items()) if isinstance(listed, dict) else of
