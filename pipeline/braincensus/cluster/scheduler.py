"""A scheduler that runs already, by its address; and the wait for workers of any cluster."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from distributed import Client

from braincensus.cluster import tls
from braincensus.cluster.kinds import read_kind
from braincensus.config import Compute
from braincensus.errors import ConfigError, explain

_ANSWER_S = 10


@contextmanager
def scheduler_client(compute: Compute) -> Iterator[Client]:
    """Connect to the scheduler at the address of `compute.cluster`.

    Raises
    ------
    ConfigError
        If no scheduler answers there, or the certificates do not fit.
    """
    encrypted = compute.cluster.startswith("tls://")
    security = tls.required(compute) if encrypted else None
    try:
        client = Client(compute.cluster, timeout=_ANSWER_S, security=security)
    except (OSError, TimeoutError, ValueError, RuntimeError) as err:
        raise _no_answer(compute, err) from err
    with client:
        yield client


def _no_answer(compute: Compute, err: Exception) -> ConfigError:
    told = _chain(err)
    if "CERTIFICATE_VERIFY_FAILED" in told:
        return ConfigError(
            explain(
                f"the scheduler at {compute.cluster} shows a certificate that "
                f"{compute.tls_ca_file or 'the CA'} did not sign",
                found="certificate verify failed",
                cause="another cluster's CA file, or a scheduler that was started with other certificates",
                remedy="--tls-ca-file of the CA that signed the scheduler's certificate",
            )
        )
    if compute.cluster.startswith("tls://"):
        cause = (
            "none runs there, it is plain (tcp://), or it refused our certificate: its CA did not sign that"
        )
    else:
        cause = "none runs there, a firewall, or it wants encryption (tls://)"
    return ConfigError(
        explain(
            f"no Dask scheduler answers at {compute.cluster!r}",
            expected="`local`, or the address of a running scheduler such as tcp://127.0.0.1:8786",
            found=f"{type(err).__name__}: {err}",
            cause=cause,
            remedy="start one with `dask scheduler`, or leave --cluster out",
        )
    )


def _chain(err: BaseException | None) -> str:
    texts = []
    while err is not None:
        texts.append(str(err))
        err = err.__cause__ or err.__context__
    return " ".join(texts)


def wait_for_workers(client: Client, compute: Compute, wait_s: float, *, least: int = 1) -> None:
    """Wait until the first workers are there.

    Raises
    ------
    ConfigError
        If none came in time; says how long that was, and where to look.
    """
    began = time.monotonic()
    try:
        client.wait_for_workers(least, timeout=wait_s)
    except TimeoutError:
        kind = read_kind(compute.cluster).kind
        look = {
            "slurm": "`squeue --me --start` says why jobs wait; the logs are in log_directory",
            "kubernetes": "`kubectl get pods` and `kubectl describe pod` in the cluster's namespace say why",
            "scheduler": f"start one with `dask worker {client.scheduler.address}`; its log says more",
        }
        raise ConfigError(
            explain(
                f"no worker of {compute.cluster} came within {time.monotonic() - began:.0f} s",
                cause="a full queue, a job that failed, or workers that cannot reach "
                f"{client.scheduler.address} (another network interface?)",
                remedy=f"{look.get(kind, 'look at the logs')}; --worker-wait SECONDS waits longer",
            )
        ) from None
