"""From the `compute` section to a Dask client: a local cluster, a CUDA cluster, or a scheduler's address.

Nothing listens beyond localhost unless a scheduler's address is given. One worker process holds
one device; its Dask threads are also the threads that one network patch may use, so that torch
and Dask never ask for more threads than there are cores.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import psutil
from distributed import Client, LocalCluster
from distributed.system import MEMORY_LIMIT

from braincensus.config import Compute
from braincensus.errors import ConfigError, explain
from braincensus_kernels.backend import cuda_available

GIB = 1024**3
_THREADS_OF_A_LOCAL_WORKER = 8
_SHARE_OF_FREE_MEMORY = 0.8


@dataclass(frozen=True)
class Resources:
    """What a run may use: worker processes, threads and bytes of each, and the device."""

    workers: int
    threads: int
    memory_bytes: int
    device: Literal["cpu", "cuda"]
    cluster: str


def resources_for(compute: Compute, client: Client | None = None) -> Resources:
    """Say what a run would use, without starting anything.

    Parameters
    ----------
    compute
        The configuration's section.
    client
        A caller's cluster; its workers are then the resources.

    Raises
    ------
    ConfigError
        If the device is cuda and there is none, the cluster cannot be reached, or it has no workers.
    """
    if client is not None:
        return _resources_of(client, compute)
    if compute.cluster != "local":
        with connect(compute, resources=None) as (remote, found):
            del remote
            return found
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    workers = compute.workers or max(1, cores // _THREADS_OF_A_LOCAL_WORKER)
    threads = compute.threads_per_worker or max(1, cores // workers)
    if compute.memory_limit_gib is not None:
        memory = int(compute.memory_limit_gib * GIB)
    else:
        free = min(psutil.virtual_memory().available, MEMORY_LIMIT)
        memory = int(_SHARE_OF_FREE_MEMORY * free / workers)
    return Resources(workers, threads, memory, _device(compute), compute.cluster)


@contextmanager
def connect(compute: Compute, resources: Resources | None) -> Iterator[tuple[Client, Resources]]:
    """Start a local cluster, or connect to a scheduler, for as long as the context lasts.

    Yields
    ------
    client, resources
        The client, and what its workers offer.
    """
    if compute.cluster != "local":
        try:
            client = Client(compute.cluster, timeout=10)
        except (OSError, TimeoutError, ValueError) as err:
            raise ConfigError(
                explain(
                    f"no Dask scheduler answers at {compute.cluster!r}",
                    expected="`local`, or the address of a running scheduler such as tcp://127.0.0.1:8786",
                    found=f"{type(err).__name__}: {err}",
                    remedy="start one with `dask scheduler`, or leave --cluster out",
                )
            ) from err
        with client:
            yield client, _resources_of(client, compute)
        return
    resources = resources or resources_for(compute)
    with _local_cluster(resources, compute.dashboard_port) as cluster, Client(cluster) as client:
        yield client, resources


def _local_cluster(resources: Resources, port: int) -> Any:
    common: dict[str, Any] = {
        "n_workers": resources.workers,
        "threads_per_worker": resources.threads,
        "memory_limit": resources.memory_bytes,
        "dashboard_address": f"127.0.0.1:{_free_port(port)}",
        "silence_logs": logging.CRITICAL,  # our own message tells what failed
    }
    if resources.device == "cuda":
        from dask_cuda import LocalCUDACluster  # an extra: absent without a GPU

        return LocalCUDACluster(**common)
    return LocalCluster(host="127.0.0.1", **common)


def _free_port(port: int) -> int:
    """Fall back to any port where the wanted one is taken, instead of Dask's warning."""
    import socket

    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return 0
    return port


def _resources_of(client: Client, compute: Compute) -> Resources:
    workers = client.scheduler_info(n_workers=-1)["workers"].values()
    if not workers:
        raise ConfigError(
            explain(
                f"the cluster at {client.scheduler.address} has no workers",
                remedy="start one with `dask worker ADDRESS`, then run again",
            )
        )
    memory = [w["memory_limit"] for w in workers if w["memory_limit"]]
    threads = min(w["nthreads"] for w in workers)
    return Resources(
        workers=len(workers),
        threads=threads,
        memory_bytes=min(memory) if memory else int(psutil.virtual_memory().available / len(workers)),
        device=_device(compute, client),
        cluster=client.scheduler.address,
    )


def _device(compute: Compute, client: Client | None = None) -> Literal["cpu", "cuda"]:
    if compute.device == "cpu":
        return "cpu"
    # A cluster's workers have the GPUs; the machine that asks may have none.
    found = cuda_available() if client is None else client.submit(cuda_available, pure=False).result()
    if compute.device == "cuda" and not found:
        raise ConfigError(
            explain(
                "--device cuda: no usable GPU " + ("here" if client is None else "on the workers"),
                expected="an NVIDIA GPU, its driver, and the extra cuda13 or cuda12",
                cause="no GPU, or `pip install 'braincensus[cuda13]'` was not run",
                remedy="use --device cpu (or auto)",
            )
        )
    return "cuda" if found else "cpu"
