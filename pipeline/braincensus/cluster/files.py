"""The file of a SLURM or Kubernetes cluster: what it may say, and what each worker then has.

Field names are those of `dask_jobqueue.SLURMCluster` and of Kubernetes, so that their manuals apply. All of a
`SlurmFile` but `workers`, `adapt`, `tls` and `shared_temp_directory` (certificates of a run) is handed on.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar, get_args

import yaml
from dask.utils import parse_bytes
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from braincensus.errors import ConfigError, explain

_GPU = re.compile(r"^\s*(--gres[= ](.*,)?gpu\b|--gpus|-G\b)")
_RESERVED = ("-N ", "--nodes", "-n ", "--ntasks", "--array", "-a ")


def _bytes(text: str) -> str:
    try:
        size = parse_bytes(_as_dask(text))
    except ValueError:
        raise ValueError("not a size such as 64GB or 16Gi") from None
    if size < 2**28:
        raise ValueError("less than 256 MiB: is the unit missing?")
    return text


def _as_dask(text: str) -> str:
    """Kubernetes writes 16Gi where Dask reads 16GiB."""
    return re.sub(r"([KMGT]i)$", r"\1B", text.strip())


Size = Annotated[str, AfterValidator(_bytes)]
Positive = Annotated[int, Field(gt=0)]
DnsName = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=53)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class Adapt(_Part):
    """Workers that come and go with the work."""

    minimum: Positive = 1
    maximum: Positive

    @model_validator(mode="after")
    def _is_a_range(self) -> Self:
        if self.minimum > self.maximum:
            raise ValueError("minimum must not be above maximum")
        return self


class _Sized(_Part):
    workers: Positive | None = None
    adapt: Adapt | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.workers is None) == (self.adapt is None):
            raise ValueError("say either workers, or adapt with minimum and maximum")
        return self

    @property
    def most_workers(self) -> int:
        """Worker processes, where all have come."""
        return self.adapt.maximum if self.adapt is not None else self.workers or 0


class SchedulerOptions(_Part):
    """Where the scheduler listens, which is in the process that runs `braincensus`."""

    host: str | None = None
    interface: str | None = None
    port: Annotated[int, Field(ge=0, le=65535)] | None = None


class SlurmFile(_Sized):
    """A cluster of SLURM jobs. `workers` and `adapt` count worker processes: `processes` of them in a job."""

    cores: Positive
    memory: Size
    processes: Positive = 1
    queue: str | None = Field(None, alias="partition")
    account: str | None = None
    walltime: str | None = None
    job_name: str | None = None
    job_cpu: Positive | None = None
    job_mem: str | None = None
    job_extra_directives: tuple[str, ...] = ()
    job_directives_skip: tuple[str, ...] = ()
    job_script_prologue: tuple[str, ...] = ()
    worker_extra_args: tuple[str, ...] = ()
    local_directory: str | None = None
    log_directory: str | None = None
    shared_temp_directory: str | None = None
    interface: str | None = None
    death_timeout: Positive | None = None
    python: str | None = None
    scheduler_options: SchedulerOptions = SchedulerOptions()
    tls: bool = True

    @model_validator(mode="after")
    def _jobs_are_whole(self) -> Self:
        if self.processes > self.cores:
            raise ValueError(f"{self.processes} processes on {self.cores} cores: each needs one")
        sizes = {
            "workers": self.workers,
            "adapt.minimum": self.adapt.minimum if self.adapt is not None else None,
            "adapt.maximum": self.adapt.maximum if self.adapt is not None else None,
        }
        for name, n in sizes.items():
            if n is not None and n % self.processes:
                raise ValueError(f"{name} must be a multiple of processes ({self.processes})")
        for directive in self.job_extra_directives:
            if not directive.strip().startswith("-"):
                raise ValueError(f"job_extra_directives: {directive!r} does not start with -")
            if directive.strip().startswith(_RESERVED):
                raise ValueError(f"job_extra_directives: {directive!r}: a job is one task, which Dask starts")
        if self.gpus and self.processes > 1:
            raise ValueError("a job with a GPU has one worker process: processes: 1 and --gres=gpu:1")
        return self

    @property
    def gpus(self) -> bool:
        """Whether its jobs ask for GPUs."""
        return any(_GPU.match(directive) for directive in self.job_extra_directives)

    @property
    def threads(self) -> int:
        """Threads of a worker process."""
        return self.cores // self.processes

    @property
    def memory_bytes(self) -> int:
        """Memory of a worker process."""
        return int(parse_bytes(_as_dask(self.memory)) / self.processes)


class PodResources(_Part):
    """What one pod gets: requests and limits alike, so that it is not evicted for using what it was given."""

    cpu: Positive
    memory: Size
    gpus: Annotated[int, Field(ge=0, le=1)] = 0
    ephemeral_storage: str | None = None


class Volume(_Part):
    """A PersistentVolumeClaim that all pods mount; the client must see the same paths."""

    claim: DnsName
    path: Annotated[str, Field(pattern="^/")]
    read_only: bool = False


class WorkerGroup(_Part):
    """Further workers, on nodes of another kind; they need as many threads and GPUs as the first ones."""

    name: DnsName
    workers: Positive
    resources: PodResources | None = None
    image: str | None = None
    node_selector: dict[str, str] = {}
    tolerations: tuple[dict[str, Any], ...] = ()


class KubernetesFile(_Sized):
    """A cluster of pods, which Dask's operator starts."""

    image: str
    resources: PodResources
    name: DnsName = "braincensus"
    namespace: DnsName = "braincensus"
    scheduler_resources: PodResources = PodResources(cpu=1, memory="4Gi")
    volumes: tuple[Volume, ...] = ()
    env: dict[str, str] = {}
    node_selector: dict[str, str] = {}
    tolerations: tuple[dict[str, Any], ...] = ()
    image_pull_secret: DnsName | None = None
    run_as_user: Positive = 1000
    run_as_group: Positive = 1000
    groups: tuple[WorkerGroup, ...] = ()

    @model_validator(mode="after")
    def _workers_are_alike(self) -> Self:
        for group in self.groups:
            own = group.resources or self.resources
            if (own.cpu, own.gpus) != (self.resources.cpu, self.resources.gpus):
                raise ValueError(
                    f"groups: {group.name}: cpu and gpus must be those of the first workers: one run computes"
                    " on one kind of device, and the last digits of probabilities depend on threads"
                )
        names = ["default", *(group.name for group in self.groups)]
        if len(set(names)) < len(names):
            raise ValueError("groups: two have one name (the first workers are `default`)")
        return self

    @property
    def most_workers(self) -> int:
        """Worker pods, where all have come."""
        return super().most_workers + sum(group.workers for group in self.groups)

    @property
    def gpus(self) -> bool:
        """Whether its workers have GPUs."""
        return self.resources.gpus > 0

    @property
    def threads(self) -> int:
        """Threads of a worker."""
        return self.resources.cpu

    @property
    def memory_bytes(self) -> int:
        """Memory of the smallest worker."""
        sizes = [self.resources.memory, *(g.resources.memory for g in self.groups if g.resources)]
        return min(as_bytes(size) for size in sizes)


def as_bytes(size: str) -> int:
    """Read a size as Dask or Kubernetes writes it.

    Examples
    --------
    >>> as_bytes("16Gi") == 16 * 2**30, as_bytes("64GB") == 64 * 10**9
    (True, True)
    """
    return int(parse_bytes(_as_dask(size)))


F = TypeVar("F", SlurmFile, KubernetesFile)


def read_cluster_file(path: str, model: type[F]) -> F:
    """Read the YAML file of a cluster.

    Raises
    ------
    ConfigError
        If it is missing, is not YAML, or says what it may not; misspelt fields are told from what is near.
    """
    kind = "slurm" if model is SlurmFile else "kubernetes"
    try:
        loaded = yaml.safe_load(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as err:
        raise ConfigError(
            explain(
                f"--cluster {kind}:{path}: the file cannot be read",
                found=f"{type(err).__name__}: {getattr(err, 'strerror', None) or err}",
                remedy=f"copy an example of deploy/{kind}, and give its path",
            )
        ) from err
    except yaml.YAMLError as err:
        raise ConfigError(f"the cluster file {path} is not valid YAML: {err}") from err
    if not isinstance(loaded, dict):
        raise ConfigError(f"the cluster file {path} is not a mapping: found {type(loaded).__name__}")
    try:
        return model.model_validate(loaded)
    except ValidationError as err:
        problems = [_line(error, model) for error in err.errors()]
        raise ConfigError(
            explain(
                f"the cluster file {path} cannot be used",
                found="\n    ".join(problems),
                remedy=f"deploy/README.md lists what a {kind} file may say",
            )
        ) from None


def _line(error: Any, model: type[BaseModel]) -> str:
    place = ".".join(str(part) for part in error["loc"])
    if error["type"] != "extra_forbidden":
        text = str(error["msg"]).removeprefix("Value error, ")
        return f"{place}: {text}" if place else text
    *parents, name = error["loc"]
    near = difflib.get_close_matches(str(name), _names(model, parents), n=1, cutoff=0.6)
    return f"{place} is unknown" + (f": did you mean {near[0]}?" if near else "")


def _names(model: type[BaseModel], parents: list[Any]) -> list[str]:
    """Return what fields may be called where the path of an error leads."""
    part = model
    for step in parents:
        if isinstance(step, str):
            part = _model_in(part.model_fields[step].annotation) or part
    return [name for key, field in part.model_fields.items() for name in (key, field.alias) if name]


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """Find the model in a type such as ``tuple[WorkerGroup, ...]`` or ``Adapt | None``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_model_in, get_args(annotation))), None)
