"""Starting a cluster, or connecting to one, for as long as a run lasts."""

from __future__ import annotations

import logging
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import dask
import psutil
from distributed import Client, LocalCluster
from distributed.deploy.spec import SpecCluster

from braincensus.allocator import ENVIRONMENT
from braincensus.cluster import managers, tls
from braincensus.cluster.kinds import read_kind
from braincensus.cluster.resources import Resources, gpus_of_workers, resources_for, resources_of
from braincensus.cluster.scheduler import scheduler_client, wait_for_workers
from braincensus.config import Compute
from braincensus.errors import ConfigError, explain
from braincensus.progress import Progress, Silent

_CLOSE_S = 20.0
_STARTS = 3
_SPAWNED = "spawn_main"
"""In the command line of a process that multiprocessing has started, as Dask's workers are."""


@contextmanager
def connect(
    compute: Compute, resources: Resources | None, progress: Progress | None = None
) -> Iterator[tuple[Client, Resources]]:
    """Start a cluster, or connect to a scheduler, for as long as the context lasts.

    Parameters
    ----------
    compute
        The configuration's section.
    resources
        What :func:`resources_for` said; None: ask it now.
    progress
        Told what is waited for, and what is not encrypted.

    Yields
    ------
    client, resources
        The client, and what its workers offer.

    Raises
    ------
    ConfigError
        If a cluster cannot be started or reached, or no worker comes in time.
    """
    progress = progress or Silent()
    named = read_kind(compute.cluster)
    if named.kind == "scheduler":
        if compute.cluster.startswith("tcp://") and tls.leaves_this_machine(compute.cluster):
            progress.message(f"{compute.cluster}: what is sent there is not encrypted; tls:// would be")
        with scheduler_client(compute) as client:
            wait_for_workers(client, compute, compute.worker_wait_s)
            yield client, resources_of(client, compute)
        return
    resources = resources or resources_for(compute)
    if named.kind in ("slurm", "kubernetes"):
        start = managers.slurm if named.kind == "slurm" else managers.kubernetes
        progress.message(f"waiting for the first worker of {compute.cluster} (--worker-wait)")
        with (
            start(named.where, compute, progress) as cluster,
            Client(cluster, timeout=managers.CONNECT_S) as client,
        ):
            wait_for_workers(client, compute, compute.worker_wait_s)
            _check_gpus(client, resources, compute)
            yield client, resources
        return
    if tls.heard_beyond_this_machine(compute.dashboard_host):
        progress.message(
            f"the dashboard listens on {compute.dashboard_host} (compute.dashboard_host): whoever reaches "
            "this machine can look at it, without a password; a tunnel lets only you (docs/dashboard.md)"
        )
    with closing_in_time(_local_cluster(resources, compute)) as cluster, Client(cluster) as client:
        yield client, resources


@contextmanager
def closing_in_time(cluster: LocalCluster) -> Iterator[LocalCluster]:
    """Close a cluster of this machine at the end, and no longer wait for workers that do not close in time.

    A worker that was killed while its nanny started it leaves the nanny waiting for ever. What the run gave,
    or why it ended, is what must be told.
    """
    try:
        yield cluster
    finally:
        try:
            cluster.close(timeout=_CLOSE_S)
        except TimeoutError:
            for nanny in list(cluster.workers.values()):
                pid = getattr(nanny, "pid", None)
                if pid:
                    with suppress(OSError):
                        os.kill(pid, signal.SIGKILL)


def _check_gpus(client: Client, resources: Resources, compute: Compute) -> None:
    if resources.device == "cuda" and not all(gpus_of_workers(client, hung_after_s=compute.hung_after_s)):
        raise ConfigError(
            explain(
                f"{compute.cluster} asks for GPUs, but its workers see none that they can use",
                cause="CuPy is not installed there, or the job or pod was given no GPU",
                remedy="install braincensus[cuda13] where the workers run, or use --device cpu",
            )
        )


def _local_cluster(resources: Resources, compute: Compute) -> Any:
    dashboard, port = compute.dashboard_host, compute.dashboard_port
    common: dict[str, Any] = {
        "n_workers": resources.workers,
        "threads_per_worker": resources.threads,
        "memory_limit": resources.memory_bytes,
        "dashboard_address": f"{dashboard}:{managers.free_port(port, dashboard)}",
        "silence_logs": logging.CRITICAL,  # our own message tells what failed
        "host": "127.0.0.1",
    }
    if resources.device == "cuda":
        try:
            from dask_cuda import LocalCUDACluster
        except ImportError as err:
            raise managers.missing_extra("dask-cuda", "cuda13", "one worker for each GPU") from err
        start = LocalCUDACluster
    else:
        start = LocalCluster
    try:
        with _telling_workers(ENVIRONMENT), _forgetting_what_is_half_started():
            return _trying_again(start, common, hung_after_s=compute.hung_after_s)
    except (RuntimeError, OSError, TimeoutError) as err:
        raise ConfigError(
            explain(
                "the workers of this machine could not be started",
                found=f"{type(err).__name__}: {err}; {err.__cause__ or ''}".rstrip("; "),
                cause="too little memory, too many processes; they were killed while they started, or took "
                f"longer than {compute.hung_after_s:g} s (compute.hung_after_s)",
                remedy="run again, with fewer --workers if it stays so: done blocks are kept",
            )
        ) from err


@contextmanager
def _telling_workers(environment: Mapping[str, str]) -> Iterator[None]:
    """Start worker processes with more in their environment; what the user has set himself counts more."""
    usual = dask.config.get("distributed.nanny.pre-spawn-environ")
    for name in environment:
        # Dask leaves its own here when it starts workers, and would take it for the user's the next time.
        if name in usual and os.environ.get(name) == str(usual[name]):
            del os.environ[name]
    with dask.config.set({"distributed.nanny.pre-spawn-environ": {**usual, **environment}}):
        yield


@contextmanager
def _forgetting_what_is_half_started() -> Iterator[None]:
    """Let a signal end a start without a traceback: Dask would close the cluster when Python ends, and fail.

    Its workers notice that this process is gone.
    """
    others = set(SpecCluster._instances)
    try:
        yield
    except BaseException:
        for cluster in set(SpecCluster._instances) - others:
            SpecCluster._instances.discard(cluster)
        raise


def _trying_again(start: Callable[..., Any], options: dict[str, Any], *, hung_after_s: float) -> Any:
    """Start a cluster, again if a worker died meanwhile: Dask gives up all for one, but only then."""
    with warnings.catch_warnings():  # another run may take the port between our look and Dask's
        warnings.filterwarnings("ignore", message=r"\s*Port \d+ is already in use")
        for _ in range(_STARTS - 1):
            with suppress(RuntimeError), _killing_what_hangs(hung_after_s):
                return start(**options)
        with _killing_what_hangs(hung_after_s):
            return start(**options)


@contextmanager
def _killing_what_hangs(hung_after_s: float) -> Iterator[None]:
    """Kill worker processes that have not started in time: Dask would wait for them for ever."""
    here = psutil.Process()
    others = {process.pid for process in here.children()}

    def kill() -> None:
        for process in here.children():
            with suppress(psutil.Error):
                if process.pid not in others and _SPAWNED in " ".join(process.cmdline()):
                    process.kill()

    timer = threading.Timer(hung_after_s, kill)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
