"""The configuration of a run: one typed, frozen value. Defaults live here and nowhere else.

Sections follow the data flow. A YAML file holds the same fields (`braincensus config` prints
one with comments), and every command-line option is one of them. Lengths carry their unit in
their name; triples are ``z, y, x``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from braincensus.errors import ConfigError, explain


def _as_triple(value: Any) -> Any:
    """One number stands for all three axes."""
    return (value, value, value) if isinstance(value, int | float) and not isinstance(value, bool) else value


PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Positive = Annotated[int, Field(gt=0)]
TripleFloat = Annotated[tuple[PositiveFloat, PositiveFloat, PositiveFloat], BeforeValidator(_as_triple)]
TripleInt = Annotated[tuple[Positive, Positive, Positive], BeforeValidator(_as_triple)]
TripleSigma = Annotated[
    tuple[
        Annotated[float, Field(ge=0, le=50)],
        Annotated[float, Field(ge=0, le=50)],
        Annotated[float, Field(ge=0, le=50)],
    ],
    BeforeValidator(_as_triple),
]
Probability = Annotated[float, Field(ge=0, le=1)]
Percentile = Annotated[float, Field(ge=0, le=100)]

HUNG_AFTER_S = 120.0
"""How long a worker or the scheduler may be silent; see `Compute.hung_after_s`."""

_MODELS = "wnet3d, segresnet, swinunetr or intensity"
_METHODS = "voronoi-otsu, components or watershed"


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class InputSelection(_Section):
    """Which part of the input is the volume."""

    channel: int = Field(0, ge=0, description="channel, counted from 0")
    timepoint: int = Field(0, ge=0, description="time point, counted from 0")
    level: int = Field(0, ge=0, description="pyramid level, 0 is full resolution")
    voxel_size_um: TripleFloat | None = Field(
        None, description="z, y, x in um; null: read it from the metadata (an error if there is none)"
    )
    on_unreadable: Literal["fail", "skip"] = Field(
        "fail",
        description="damaged chunks and planes of the input: fail names the first; skip counts their voxels "
        "as 0 in every stage, and lists them",
    )


class Intensity(_Section):
    """Intensity as every model sees it: flat tissue, one fixed range for the whole volume."""

    low_percentile: Percentile = Field(1.0, description="percentile of tissue that maps to 0")
    high_percentile: Percentile = Field(
        99.9, description="percentile of tissue that maps to the top of the range"
    )
    tissue_threshold: float | Literal["auto"] = Field(
        "auto",
        description="tiles of 8x8x8 voxels whose median is below this are background, not tissue; "
        "auto: found from the histogram of tile medians, if it has two separate modes",
    )
    background_um: PositiveFloat | None = Field(
        100.0,
        description="intensity is divided by the local background of tissue, smooth over this scale, "
        "so that shading and bright or dark regions do not count; null: leave it as it is",
    )


class WNet3DForeground(_Section):
    """Foreground probability from the self-supervised network of CellSeg3D."""

    model: Literal["wnet3d"] = Field("wnet3d", description=_MODELS)
    weights: str = Field(
        "compact",
        description="a name (`braincensus weights list`; compact is shipped), or a .safetensors or .pth file",
    )
    norm: Literal["calibrated", "window"] = Field(
        "calibrated",
        description="calibrated: frozen statistics, so that the network is a fixed local function; "
        "window: statistics of each 64^3 window, as the original plugin",
    )
    patch_voxels: TripleInt = Field(
        (128, 128, 128), description="voxels that one network patch writes; multiples of 8"
    )
    halo_voxels: int = Field(
        32,
        ge=0,
        le=96,
        multiple_of=8,
        description="context around a patch; 48 is exact for any weights, far less for the shipped ones",
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="arithmetic of the network; auto: bfloat16 where the processor is faster with it"
    )
    calibration: Literal["volume", "stored"] = Field(
        "volume",
        description="volume: the norms' statistics are measured on this volume; stored: those in the file of "
        "weights (`braincensus weights calibrate`), the same for every volume of a study",
    )
    calibration_windows: Positive = Field(8, description="windows of tissue that set the norm statistics")
    calibration_seed: int = Field(0, ge=0, description="seed of the choice of those windows")


class SupervisedForeground(_Section):
    """What both networks that are trained with labels have. Train one with `braincensus train-supervised`."""

    weights: str | None = Field(
        None, description="required: a name (`braincensus weights list`), or a .safetensors or .pth file"
    )
    norm: Literal["calibrated", "window"] = Field(
        "calibrated",
        description="calibrated: statistics frozen for the whole volume; window: those of each patch",
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="arithmetic of the network; auto: bfloat16 on a GPU that has it, else float32"
    )
    input_percentiles: tuple[Percentile, Percentile] | None = Field(
        None,
        description="percentiles of tissue that the network sees as 0 and 1, in place of intensity's; null: "
        "as the weights were trained (they record it), else 1 and 99",
    )
    threshold: Probability | None = Field(
        None,
        description="probability below this counts as 0, where labelling.foreground_threshold is null; null: "
        "what training chose, else the paper's (segresnet 0.3, swinunetr 0.4)",
    )
    calibration_windows: Positive = Field(8, description="windows of tissue that set the norm statistics")
    calibration_seed: int = Field(0, ge=0, description="seed of the choice of those windows")

    @model_validator(mode="after")
    def _percentiles_are_a_range(self) -> Self:
        if self.input_percentiles is not None and self.input_percentiles[0] >= self.input_percentiles[1]:
            raise ValueError("input_percentiles is a range, low before high")
        return self


class SegResNetForeground(SupervisedForeground):
    """Foreground probability from a SegResNet trained with labels."""

    model: Literal["segresnet"] = Field("segresnet", description=_MODELS)
    patch_voxels: TripleInt = Field(
        (128, 128, 128), description="voxels that one network patch writes; multiples of 8"
    )
    halo_voxels: int = Field(
        32, ge=0, le=128, multiple_of=8, description="context around a patch; 128 is exact (norm: calibrated)"
    )

    @model_validator(mode="after")
    def _fits_the_network(self) -> Self:
        _check_patch(self.patch_voxels, 0, step=8, why="the network halves three times")
        return self


class SwinUNETRForeground(SupervisedForeground):
    """Foreground probability from a SwinUNETR trained with labels."""

    model: Literal["swinunetr"] = Field("swinunetr", description=_MODELS)
    patch_voxels: TripleInt = Field(
        (48, 48, 48),
        description="voxels that one network patch writes; multiples of 8, and of 32 with the halo on both "
        "sides. Part of the result: the network sees nothing beyond a patch and its halo",
    )
    halo_voxels: int = Field(8, ge=0, le=128, multiple_of=8, description="context around a patch")

    @model_validator(mode="after")
    def _fits_the_network(self) -> Self:
        _check_patch(self.patch_voxels, 0, step=8, why="patches lie on a lattice of 8")
        _check_patch(self.patch_voxels, self.halo_voxels, step=32, why="the network halves five times")
        if self.norm == "window" and all(n + 2 * self.halo_voxels <= 32 for n in self.patch_voxels):
            raise ValueError(
                "patch_voxels + 2 * halo_voxels must be more than 32 somewhere: norms need voxels"
            )
        return self


def _check_patch(patch: tuple[int, int, int], halo: int, *, step: int, why: str) -> None:
    if any((n + 2 * halo) % step for n in patch):
        fits = ",".join(str(-(-(n + 2 * halo) // step) * step - 2 * halo) for n in patch)
        what = f"patch_voxels + 2 * {halo} (halo_voxels)" if halo else "patch_voxels"
        raise ValueError(f"{what} must be multiples of {step} ({why}); patch_voxels {fits} would do")


class IntensityForeground(_Section):
    """Foreground from intensity alone: contrast to the local background, range-mapped; no network."""

    model: Literal["intensity"] = Field("intensity", description=_MODELS)


Foreground = Annotated[
    WNet3DForeground | SegResNetForeground | SwinUNETRForeground | IntensityForeground,
    Field(discriminator="model"),
]


class _Labelling(_Section):
    """What all labellers have: how the foreground is smoothed, closed and cut off, and how cells merge."""

    sigma_unit: Literal["voxels", "um"] = Field("voxels", description="unit of all sigmas of this section")
    foreground_threshold: Probability | None = Field(
        None, description="probability below this counts as 0 before labelling (the paper: 0.6, 0.65)"
    )
    closing_radius_um: PositiveFloat | None = Field(
        None, description="morphological closing of the foreground by a ball, which fills small holes"
    )
    least_threshold: Probability = Field(
        0.15, description="otsu is never taken below this: where there are no cells, it would split noise"
    )
    merge_border: tuple[Probability, Probability] | None = Field(
        None,
        description="cells that touch are one cell if the mean probability along their border is in this "
        "range (the paper's skull nuclei: [0.35, 1.0])",
    )

    @model_validator(mode="after")
    def _border_range_is_one(self) -> Self:
        if self.merge_border is not None and self.merge_border[0] > self.merge_border[1]:
            raise ValueError("merge_border is a range, low before high")
        return self


class VoronoiOtsu(_Labelling):
    """Voronoi-Otsu: one cell for each local maximum, grown through the foreground."""

    method: Literal["voronoi-otsu"] = Field("voronoi-otsu", description=_METHODS)
    spot_sigma: TripleSigma = Field(
        (0.65, 0.65, 0.65), description="blur before seeds are found; larger: fewer"
    )
    outline_sigma: TripleSigma = Field(
        (0.65, 0.65, 0.65), description="blur before the outline is thresholded"
    )
    seeds: Literal["plateau", "strict"] = Field(
        "plateau", description="plateau: one seed per flat maximum; strict: flat maxima give none"
    )
    threshold: Literal["otsu"] | Probability = Field(
        "otsu", description="outline threshold: otsu (of the whole volume's tissue) or a number from 0 to 1"
    )
    max_radius_um: PositiveFloat = Field(
        50.0, description="a cell's voxels lie within this geodesic distance of its seed; sets the halo"
    )


class ConnectedComponents(_Labelling):
    """Connected components of the foreground: cells that touch are one. Of any size, exact all the same."""

    method: Literal["components"] = Field("components", description=_METHODS)
    outline_sigma: TripleSigma = Field((0.0, 0.0, 0.0), description="blur before the threshold")
    threshold: Literal["otsu"] | Probability = Field(
        0.5, description="of the foreground: a number from 0 to 1, or otsu (of the whole volume's tissue)"
    )


class Watershed(_Labelling):
    """Watershed: the foreground flooded from seeds, down from where it is most certain."""

    method: Literal["watershed"] = Field("watershed", description=_METHODS)
    outline_sigma: TripleSigma = Field((0.0, 0.0, 0.0), description="blur before the thresholds")
    threshold: Literal["otsu"] | Probability = Field(
        0.3, description="of the foreground: a number from 0 to 1, or otsu (of the whole volume's tissue)"
    )
    seeds: Literal["threshold", "distance"] = Field(
        "threshold",
        description="threshold: what is above seed_threshold; distance: what is farthest from the background",
    )
    seed_threshold: Probability = Field(
        0.9, description="seeds by threshold: what is above it (and above threshold)"
    )
    min_seed_voxels: Positive = Field(3, description="seeds by threshold: smaller ones are none")
    seed_sigma: TripleSigma = Field(
        (1.0, 1.0, 1.0), description="seeds by distance: blur of the distance; larger: fewer"
    )
    max_radius_um: PositiveFloat = Field(
        50.0,
        description="a cell's voxels lie within this geodesic distance of a seed; sets the halo; distances "
        "are cut off there",
    )

    @model_validator(mode="after")
    def _seeds_are_foreground(self) -> Self:
        if self.threshold != "otsu" and self.seed_threshold < self.threshold:
            raise ValueError("seed_threshold must not be below threshold: seeds are foreground")
        return self


Labelling = Annotated[VoronoiOtsu | ConnectedComponents | Watershed, Field(discriminator="method")]


class Filters(_Section):
    """Which cells are kept; applied to whole cells, after stitching."""

    min_volume_um3: float | None = Field(None, ge=0, description="smaller cells are removed")
    max_volume_um3: float | None = Field(None, gt=0, description="larger cells are removed")
    max_object_volume_um3: float | None = Field(
        None,
        gt=0,
        description="cells that touch, directly or through others, are one object: larger ones are artefacts "
        "and removed whole",
    )
    min_sphericity: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None, description="less round cells are removed; a ball has 1"
    )
    min_mean_intensity: float | None = Field(
        None, allow_inf_nan=False, description="dimmer cells are removed; in the input's own units"
    )
    max_mean_intensity: float | None = Field(
        None, allow_inf_nan=False, description="brighter cells are removed; in the input's own units"
    )


class Density(_Section):
    """The density map."""

    bin_um: TripleFloat = Field((100.0, 100.0, 100.0), description="grid of the density map, um")


class Compute(_Section):
    """Where and how the run is computed; nothing here changes the result beyond float rounding."""

    block_voxels: TripleInt | None = Field(
        None, description="core of a label block, voxels; null: chosen from the memory of a worker"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: cuda where there is one")
    cluster: str = Field(
        "local",
        description="local, cuda (this machine's GPUs), slurm:FILE, kubernetes:FILE, or the address of a "
        "Dask scheduler: tcp://HOST:PORT, tls://HOST:PORT",
    )
    workers: Positive | None = Field(
        None, description="worker processes of a local cluster; null: from the cores"
    )
    threads_per_worker: Positive | None = Field(
        None, description="threads that one block's arithmetic uses; null: the cores divided by the workers"
    )
    memory_limit_gib: PositiveFloat | None = Field(
        None, description="memory of one local worker; null: its share of what is free"
    )
    worker_wait_s: PositiveFloat = Field(
        1800.0, description="how long the first worker of a queue, Kubernetes or scheduler may take to come"
    )
    hung_after_s: PositiveFloat = Field(
        HUNG_AFTER_S,
        description="a worker silent for so many seconds is restarted and its blocks go to others; a silent "
        "scheduler ends the run",
    )
    tls_ca_file: str | None = Field(
        None,
        description="certificate of the cluster's CA, for tls:// and slurm; null: Dask's own configuration",
    )
    tls_cert: str | None = Field(None, description="certificate that the CA signed")
    tls_key: str | None = Field(None, description="its key; null: it is in the file of the certificate")
    dashboard_port: int = Field(8787, ge=0, le=65535, description="of a local cluster; 0: any")
    dashboard_host: str = Field(
        "127.0.0.1",
        min_length=1,
        description="where a local cluster's dashboard listens; anything but this machine lets others look",
    )


class RunConfig(_Section):
    """Everything that determines a run, apart from the input itself.

    Examples
    --------
    >>> config = RunConfig()
    >>> config.foreground.model
    'wnet3d'
    >>> config.merged({"labelling": {"spot_sigma": 1.0}}).labelling.spot_sigma
    (1.0, 1.0, 1.0)
    """

    input: InputSelection = InputSelection()
    intensity: Intensity = Intensity()
    foreground: Foreground = WNet3DForeground()
    labelling: Labelling = VoronoiOtsu()
    filters: Filters = Filters()
    density: Density = Density()
    compute: Compute = Compute()

    @classmethod
    def from_yaml(cls, path: str | Path) -> RunConfig:
        """Read a YAML file; absent fields keep their defaults.

        Raises
        ------
        ConfigError
            If the file is missing, is not YAML, or holds a field that is unknown or out of range.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as err:
            raise ConfigError(f"cannot read the configuration {path}: {err}") from err
        try:
            loaded = yaml.safe_load(text) or {}
        except yaml.YAMLError as err:
            raise ConfigError(f"the configuration {path} is not valid YAML: {err}") from err
        if not isinstance(loaded, dict):
            raise ConfigError(
                explain(
                    f"the configuration {path} is not a mapping",
                    found=type(loaded).__name__,
                    remedy="start from what `braincensus config` prints",
                )
            )
        return cls().merged(loaded, source=str(path))

    def merged(self, changes: dict[str, Any], *, source: str = "the options") -> RunConfig:
        """Return a copy with nested fields replaced, checked as a whole.

        Raises
        ------
        ConfigError
            Naming every field that is unknown or out of range.
        """
        data = _deep_merge(self.model_dump(mode="python"), changes)
        try:
            return RunConfig.model_validate(data)
        except ValidationError as err:
            lines = [
                f"  {'.'.join(str(part) for part in e['loc'])}: {e['msg']}, got {e.get('input')!r}"
                for e in err.errors()
            ]
            raise ConfigError(
                "\n".join(
                    [
                        f"{source}: not a valid configuration",
                        *lines,
                        "  `braincensus config` lists every field",
                    ]
                )
            ) from None


def _deep_merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Replace leaf by leaf; a section whose discriminator changes starts from its own defaults."""
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        if isinstance(value, dict) and isinstance(old, dict):
            switched = any(k in value and value[k] != old.get(k) for k in ("model", "method"))
            merged[key] = value if switched else _deep_merge(old, value)
        else:
            merged[key] = value
    return merged


def commented_yaml() -> str:
    """Return the default configuration as YAML, each field with its meaning as a comment.

    Examples
    --------
    >>> RunConfig.model_validate(yaml.safe_load(commented_yaml())) == RunConfig()
    True
    """
    lines = ["# braincensus: the default configuration. Delete what you do not change. Triples are z, y, x."]
    for name, field in RunConfig.model_fields.items():
        section = field.default
        lines += ["", f"{name}:  # {_first_line(section)}"]
        lines += [f"  {line}" for line in _fields(section)]
        for title, alternative in _ALTERNATIVES.get(name, {}).items():
            lines += [f"# or, {title}:", f"# {name}:", *(f"#   {line}" for line in _fields(alternative))]
    return "\n".join(lines) + "\n"


def _first_line(section: BaseModel) -> str:
    return (type(section).__doc__ or "").strip().splitlines()[0]


def _fields(section: BaseModel) -> list[str]:
    """Write a section's fields, the one that chooses among models or methods first."""
    values = section.model_dump(mode="json")
    chooser = [key for key in ("model", "method") if key in values]
    lines = []
    for key in [*chooser, *(key for key in values if key not in chooser)]:
        about = type(section).model_fields[key].description
        lines.append(f"{key}: {_scalar(values[key])}  # {about}")
    return lines


_ALTERNATIVES: dict[str, dict[str, BaseModel]] = {
    "foreground": {
        "without a network": IntensityForeground(),
        "a network trained with labels": SegResNetForeground(),
        "the other, with attention": SwinUNETRForeground(),
    },
    "labelling": {"connected components": ConnectedComponents(), "watershed": Watershed()},
}


def _scalar(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("...\n").strip()
