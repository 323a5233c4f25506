"""What a run may use: workers, and the threads, memory and device of each. Starts no job, pod or process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import psutil
from dask.system import CPU_COUNT
from distributed import Client
from distributed.system import MEMORY_LIMIT

from braincensus.cluster.files import KubernetesFile, SlurmFile, read_cluster_file
from braincensus.cluster.kinds import read_kind
from braincensus.cluster.scheduler import scheduler_client, wait_for_workers
from braincensus.config import HUNG_AFTER_S, Compute
from braincensus.errors import ConfigError, explain
from braincensus.heartbeats import ask_workers, loss, telling_of_loss
from braincensus_kernels.backend import cuda_available

GIB = 1024**3
_THREADS_OF_A_LOCAL_WORKER = 8
_SHARE_OF_FREE_MEMORY = 0.8
_LOOKING = "looking at the workers"


@dataclass(frozen=True)
class Resources:
    """What a run may use: worker processes, threads and bytes of each, and the device."""

    workers: int
    threads: int
    memory_bytes: int
    device: Literal["cpu", "cuda"]
    cluster: str


@telling_of_loss(_LOOKING)
def resources_for(compute: Compute, client: Client | None = None, *, wait_s: float = 0) -> Resources:
    """Say what a run would use, without starting anything.

    Parameters
    ----------
    compute
        The configuration's section. Of a SLURM or Kubernetes cluster its file tells, of a scheduler its
        workers, of this machine its cores, memory and GPUs.
    client
        A caller's cluster; its workers are then the resources.
    wait_s
        How long a scheduler without workers is given to get one.

    Raises
    ------
    ConfigError
        If the device is cuda and there is none, the file cannot be used, or the scheduler cannot be reached
        or has no workers.
    BlockError
        If the scheduler is lost meanwhile.
    """
    if client is not None:
        return resources_of(client, compute)
    named = read_kind(compute.cluster)
    if named.kind == "scheduler":
        with scheduler_client(compute) as remote:
            if wait_s:
                wait_for_workers(remote, compute, wait_s)
            return resources_of(remote, compute)
    if named.kind in ("slurm", "kubernetes"):
        if named.kind == "slurm":
            return _resources_in(read_cluster_file(named.where, SlurmFile), compute)
        return _resources_in(read_cluster_file(named.where, KubernetesFile), compute)
    return _local_resources(compute)


def _local_resources(compute: Compute) -> Resources:
    if compute.cluster == "cuda" and compute.device == "cpu":
        raise ConfigError("--cluster cuda and --device cpu contradict each other: use --cluster local")
    device = local_device(compute)
    gpus = _gpus() if device == "cuda" else 0
    if compute.workers is not None and gpus and compute.workers > gpus:
        raise ConfigError(
            explain(
                f"--workers {compute.workers}: a worker holds one GPU",
                expected=f"at most {gpus}, the GPUs of this machine (CUDA_VISIBLE_DEVICES counts)",
                remedy="leave --workers out, or use --device cpu",
            )
        )
    workers = compute.workers or gpus or max(1, CPU_COUNT // _THREADS_OF_A_LOCAL_WORKER)
    threads = compute.threads_per_worker or max(1, CPU_COUNT // workers)
    if compute.memory_limit_gib is not None:
        memory = int(compute.memory_limit_gib * GIB)
    else:
        free = min(psutil.virtual_memory().available, MEMORY_LIMIT)
        memory = int(_SHARE_OF_FREE_MEMORY * free / workers)
    return Resources(workers, threads, memory, device, compute.cluster)


def _resources_in(file: SlurmFile | KubernetesFile, compute: Compute) -> Resources:
    if compute.device == "cuda" and not file.gpus:
        raise ConfigError(
            explain(
                f"--device cuda: the workers of {compute.cluster} have no GPU",
                expected="--gres=gpu:1 in job_extra_directives"
                if isinstance(file, SlurmFile)
                else "gpus: 1 in resources",
                remedy="add it to the file, or use --device cpu (or auto)",
            )
        )
    device: Literal["cpu", "cuda"] = "cuda" if file.gpus and compute.device != "cpu" else "cpu"
    return Resources(file.most_workers, file.threads, file.memory_bytes, device, compute.cluster)


def resources_of(client: Client, compute: Compute) -> Resources:
    """Ask a scheduler what its workers have; the least that any has counts."""
    workers = client.scheduler_info(n_workers=-1).get("workers", {}).values()
    if not workers:
        if client.status != "running":  # it knows of none because it has lost the scheduler
            raise loss(_LOOKING)
        raise ConfigError(
            explain(
                f"the cluster at {client.scheduler.address} has no workers",
                remedy=f"start one with `dask worker {client.scheduler.address}`, then run again",
            )
        )
    memory = [w["memory_limit"] for w in workers if w["memory_limit"]]
    threads = min(w["nthreads"] for w in workers)
    return Resources(
        workers=len(workers),
        threads=threads,
        memory_bytes=min(memory) if memory else int(psutil.virtual_memory().available / len(workers)),
        device=_device_of(compute, client),
        cluster=client.scheduler.address,
    )


def local_device(compute: Compute) -> Literal["cpu", "cuda"]:
    """Choose the device of this machine."""
    if compute.device == "cpu":
        return "cpu"
    found = cuda_available()
    if not found and (compute.device == "cuda" or compute.cluster == "cuda"):
        option = "--cluster cuda" if compute.cluster == "cuda" else "--device cuda"
        raise _no_gpu(f"{option}: no usable GPU here", remedy="use --device cpu (or auto), --cluster local")
    return "cuda" if found else "cpu"


def _device_of(compute: Compute, client: Client) -> Literal["cpu", "cuda"]:
    """Choose the device of a cluster: its workers have the GPUs; the machine that asks may have none."""
    if compute.device == "cpu":
        return "cpu"
    found = gpus_of_workers(client, hung_after_s=compute.hung_after_s)
    if all(found) and found:
        return "cuda"
    if any(found):
        raise ConfigError(
            explain(
                f"{found.count(True)} of the cluster's {len(found)} workers have a usable GPU",
                expected="all or none: one run computes on one kind of device",
                remedy="use --device cpu, or a scheduler whose workers are alike",
            )
        )
    if compute.device == "cuda":
        raise _no_gpu("--device cuda: no usable GPU on the workers", remedy="use --device cpu (or auto)")
    return "cpu"


def gpus_of_workers(client: Client, *, hung_after_s: float = HUNG_AFTER_S) -> list[bool]:
    """Ask each worker whether it has a usable GPU."""
    answers = ask_workers(client, cuda_available, hung_after_s=hung_after_s, stage="looking for GPUs")
    return [answer for answer in answers.values() if isinstance(answer, bool)]


def _no_gpu(problem: str, *, remedy: str) -> ConfigError:
    return ConfigError(
        explain(
            problem,
            expected="an NVIDIA GPU, its driver, and the extra cuda13 or cuda12",
            cause="no GPU, or `pip install 'braincensus[cuda13]'` was not run",
            remedy=remedy,
        )
    )


def _gpus() -> int:
    import cupy  # an extra: there is a GPU, so it is there

    return int(cupy.cuda.runtime.getDeviceCount())
