"""What `--cluster` names: one of five kinds, and where."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from braincensus.errors import ConfigError, explain

_SCHEMES = ("tcp", "tls")
_MANAGERS = ("slurm", "kubernetes")


@dataclass(frozen=True)
class Named:
    """The kind of a cluster, and its file or address."""

    kind: Literal["local", "cuda", "slurm", "kubernetes", "scheduler"]
    where: str = ""


def read_kind(cluster: str) -> Named:
    """Take `--cluster` apart.

    Raises
    ------
    ConfigError
        If it is none of the kinds.

    Examples
    --------
    >>> read_kind("slurm:gpu.yaml")
    Named(kind='slurm', where='gpu.yaml')
    >>> read_kind("tls://scheduler:8786").kind
    'scheduler'
    """
    if cluster in ("local", "cuda"):
        return Named("local" if cluster == "local" else "cuda")
    scheme, _, rest = cluster.partition(":")
    if scheme in _MANAGERS and rest and not rest.startswith("//"):
        return Named("slurm" if scheme == "slurm" else "kubernetes", rest)
    host, _, port = rest.removeprefix("//").rpartition(":")
    if scheme in _SCHEMES and rest.startswith("//") and host and port.isdecimal() and 0 < int(port) < 65536:
        return Named("scheduler", cluster)
    raise ConfigError(
        explain(
            f"--cluster {cluster!r} is not understood",
            expected="local, cuda, slurm:FILE, kubernetes:FILE, tcp://HOST:PORT or tls://HOST:PORT",
            cause=_cause(cluster, scheme, rest),
        )
    )


def _cause(cluster: str, scheme: str, rest: str) -> str:
    if scheme in _MANAGERS:
        return f"no file is named: {scheme}:my-cluster.yaml (examples are in deploy/{scheme})"
    if scheme in _SCHEMES:
        return f"no host or no port: {scheme}://scheduler:8786"
    if "://" not in cluster and rest.isdecimal():
        return f"the protocol is missing: tcp://{cluster}, or tls://{cluster}"
    return ""
