"""Clusters that a queue or Kubernetes starts: dask-jobqueue's and dask-kubernetes', from their files."""

from __future__ import annotations

import logging
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from distributed import Security, Status

from braincensus.allocator import ENVIRONMENT
from braincensus.cluster import tls
from braincensus.cluster.files import (
    KubernetesFile,
    PodResources,
    SlurmFile,
    WorkerGroup,
    as_bytes,
    read_cluster_file,
)
from braincensus.config import Compute
from braincensus.errors import ConfigError, explain
from braincensus.progress import Progress

CONNECT_S = 60
_OURS = {"workers", "adapt", "tls", "scheduler_options", "shared_temp_directory"}
_LOGS = "braincensus-logs"


def missing_extra(package: str, extra: str, what: str) -> ConfigError:
    """Return the error of a package that is not installed."""
    return ConfigError(
        explain(f"{package} is not installed; it starts {what}", remedy=f'pip install "braincensus[{extra}]"')
    )


def free_port(port: int, host: str = "127.0.0.1") -> int:
    """Fall back to any port where the wanted one is taken, instead of Dask's warning."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return 0
    return port


@contextmanager
def slurm(path: str, compute: Compute, progress: Progress) -> Iterator[Any]:
    """Submit the jobs of a file; they are cancelled when the context ends.

    Raises
    ------
    ConfigError
        If dask-jobqueue or `sbatch` is missing, or SLURM refuses the job.
    """
    file = read_cluster_file(path, SlurmFile)
    try:
        import dask_jobqueue  # noqa: F401
    except ImportError as err:
        raise missing_extra("dask-jobqueue", "slurm", "workers as SLURM jobs") from err
    if shutil.which("sbatch") is None:
        raise ConfigError(
            explain(
                f"--cluster slurm:{path}: there is no `sbatch` here",
                cause="this is no login or compute node of a SLURM cluster (or no module was loaded)",
                remedy="run it there, or submit deploy/slurm/census.sbatch",
            )
        )
    if not file.tls:
        progress.message(f"slurm:{path}: tls is off; who reaches the scheduler's port can run code as you")
    with (
        _slurm_security(file, compute) as security,
        _slurm_cluster(
            path, file, slurm_options(file, security, free_port(compute.dashboard_port))
        ) as cluster,
    ):
        yield cluster


@contextmanager
def _slurm_cluster(path: str, file: SlurmFile, options: dict[str, Any]) -> Iterator[Any]:
    from dask_jobqueue import SLURMCluster

    least = file.adapt.minimum if file.adapt is not None else file.workers

    async def submit(cluster: Any) -> None:
        cluster.scale(least)
        await cluster  # a refused submission would be logged, and no more, without

    quiet = logging.getLogger("tornado.application")
    level = quiet.level
    try:
        cluster = SLURMCluster(**options)
    except (OSError, ValueError, RuntimeError, TypeError) as err:
        raise _refused(path, err) from err
    with cluster:
        quiet.setLevel(logging.CRITICAL)  # tornado would log the same error as a traceback
        try:
            cluster.sync(submit, cluster)
        except (OSError, ValueError, RuntimeError) as err:
            for job in cluster.workers.values():
                job.status = Status.failed  # as distributed demands when it closes; dask-jobqueue leaves it
            raise _refused(path, err) from err
        finally:
            quiet.setLevel(level)
        # A fixed number, too: a job that ends (its walltime, a dead node) is replaced.
        cluster.adapt(minimum=least, maximum=file.most_workers)
        yield cluster


def slurm_options(file: SlurmFile, security: Security | None, dashboard_port: int) -> dict[str, Any]:
    """Return the keyword arguments of `SLURMCluster`.

    Dashboards stay on the localhost of their machines unless the file's `worker_extra_args` say otherwise.
    """
    options = {key: value for key, value in file.model_dump(exclude=_OURS).items() if value is not None}
    options = {key: list(value) if isinstance(value, tuple) else value for key, value in options.items()}
    extra = options["worker_extra_args"]
    # With --no-dashboard, too: without an address, Dask's web server would listen for everyone all the same.
    if not any(argument.startswith("--dashboard-address") for argument in extra):
        extra += ["--dashboard-address", "127.0.0.1:0"]
    options["log_directory"] = file.log_directory or _LOGS
    exports = [f"export {name}={value}" for name, value in ENVIRONMENT.items()]
    options["job_script_prologue"] = exports + options["job_script_prologue"]  # the file says more
    scheduler = file.scheduler_options.model_dump(exclude_none=True)
    options["scheduler_options"] = {"dashboard_address": f"127.0.0.1:{dashboard_port}", **scheduler}
    return {**options, "security": security, "silence_logs": logging.CRITICAL}


@contextmanager
def _slurm_security(file: SlurmFile, compute: Compute) -> Iterator[Security | None]:
    """Give the certificates of the configuration, or some for this run alone in a folder of our own."""
    given = tls.security_of(compute) if file.tls else None
    if not file.tls or given is not None:
        yield given
        return
    try:
        made = Security.temporary()
    except ImportError as err:
        raise missing_extra("cryptography", "slurm", "an encrypted connection to the jobs") from err
    shared = Path(os.path.expandvars(file.shared_temp_directory or file.log_directory or _LOGS)).expanduser()
    shared.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".certificates.", dir=shared.absolute()) as folder:
        yield tls.written(made, Path(folder))


def _refused(path: str, err: Exception) -> ConfigError:
    return ConfigError(
        explain(
            f"--cluster slurm:{path}: the jobs could not be submitted",
            found=" ".join(str(err).split()),
            remedy="correct the file (partition, account, walltime, memory); `sinfo` lists what there is",
        )
    )


@contextmanager
def kubernetes(path: str, compute: Compute, progress: Progress) -> Iterator[Any]:
    """Create a DaskCluster, which the operator starts; it is deleted when the context ends.

    Raises
    ------
    ConfigError
        If dask-kubernetes is missing, or Kubernetes or the operator does not do it.
    """
    file = read_cluster_file(path, KubernetesFile)
    try:
        from dask_kubernetes.operator import KubeCluster
    except ImportError as err:
        raise missing_extra("dask-kubernetes", "kubernetes", "workers as pods") from err
    progress.message(f"{compute.cluster}: what pods send each other is not encrypted; keep a NetworkPolicy")
    try:
        cluster = KubeCluster(
            custom_cluster_spec=cluster_spec(file),
            namespace=file.namespace,
            resource_timeout=int(compute.worker_wait_s),
            shutdown_on_close=True,
            quiet=True,
        )
    except Exception as err:  # of kr8s, httpx, the operator: one family for the user
        for left in list(KubeCluster._instances):  # else it tries again to delete itself when Python ends
            with suppress(Exception):
                left.close(timeout=10)
        raise _not_started(file, path, err) from err
    with cluster:
        try:
            for group in file.groups:
                cluster.add_worker_group(group.name, custom_spec=worker_spec(file, group))
            if file.adapt is not None:
                cluster.adapt(minimum=file.adapt.minimum, maximum=file.adapt.maximum)
        except Exception as err:
            raise _not_started(file, path, err) from err
        yield cluster


def _not_started(file: KubernetesFile, path: str, err: Exception) -> ConfigError:
    return ConfigError(
        explain(
            f"--cluster kubernetes:{path}: the cluster did not start",
            found=f"{type(err).__name__}: {' '.join(str(err).split())}",
            cause="no kubeconfig or a wrong context, Dask's operator is not installed, or too few rights",
            remedy=f"`kubectl -n {file.namespace} get daskclusters,pods,events` says more; deploy/README.md",
        )
    )


def cluster_spec(file: KubernetesFile) -> dict[str, Any]:
    """Return the DaskCluster that the file describes, as dask-kubernetes makes it and beyond."""
    from dask_kubernetes.operator import make_cluster_spec

    spec: dict[str, Any] = make_cluster_spec(
        name=file.name, image=file.image, n_workers=0, env=dict(file.env), resources=None
    )
    spec["spec"]["worker"] = worker_spec(file)
    scheduler = spec["spec"]["scheduler"]["spec"]
    # dask-kubernetes calls `dask-scheduler` and `dask-worker`, which Dask no longer installs.
    scheduler["containers"][0]["args"][:1] = ["dask", "scheduler"]
    scheduler["containers"][0]["resources"] = _resources(file.scheduler_resources)
    _secure(scheduler, file)
    return spec


def worker_spec(file: KubernetesFile, group: WorkerGroup | None = None) -> dict[str, Any]:
    """Return the workers of a group, or the first ones."""
    from dask_kubernetes.operator import make_worker_spec

    first = file.adapt.minimum if file.adapt is not None else file.workers
    resources = group.resources if group is not None and group.resources is not None else file.resources
    spec: dict[str, Any] = make_worker_spec(
        image=group.image if group is not None and group.image is not None else file.image,
        n_workers=group.workers if group is not None else first,
        env={**ENVIRONMENT, **file.env},
        worker_command="dask worker",
        resources=_resources(resources),
    )
    pod = spec["spec"]
    # Without, a worker would count the node's cores, and take all of the pod's memory for itself.
    pod["containers"][0]["args"] += ["--nthreads", str(resources.cpu)]
    pod["containers"][0]["args"] += ["--memory-limit", str(as_bytes(resources.memory))]
    for key in ("node_selector", "tolerations"):
        value = getattr(group if group is not None else file, key)
        if value:
            pod["nodeSelector" if key == "node_selector" else key] = _plain(value)
    _secure(pod, file)
    return spec


def _secure(pod: dict[str, Any], file: KubernetesFile) -> None:
    """Mount the volumes; no root, no capabilities, no token of the cluster's API."""
    container = pod["containers"][0]
    container["securityContext"] = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    container["volumeMounts"] = [
        {"name": volume.claim, "mountPath": volume.path, "readOnly": volume.read_only}
        for volume in file.volumes
    ]
    pod["volumes"] = [
        {"name": volume.claim, "persistentVolumeClaim": {"claimName": volume.claim}}
        for volume in file.volumes
    ]
    pod["automountServiceAccountToken"] = False
    pod["securityContext"] = {
        "runAsNonRoot": True,
        "runAsUser": file.run_as_user,
        "runAsGroup": file.run_as_group,
        "fsGroup": file.run_as_group,
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    if file.image_pull_secret is not None:
        pod["imagePullSecrets"] = [{"name": file.image_pull_secret}]


def _resources(own: PodResources) -> dict[str, dict[str, str]]:
    amounts = {"cpu": str(own.cpu), "memory": str(as_bytes(own.memory))}
    if own.ephemeral_storage is not None:
        amounts["ephemeral-storage"] = own.ephemeral_storage
    if own.gpus:
        amounts["nvidia.com/gpu"] = str(own.gpus)
    return {"requests": dict(amounts), "limits": amounts}


def _plain(value: Any) -> Any:
    return [dict(entry) for entry in value] if isinstance(value, tuple) else dict(value)
