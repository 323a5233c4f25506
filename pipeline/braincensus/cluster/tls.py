"""Certificates for a `tls://` scheduler: from the configuration, or from Dask's own.

Dask checks that the other side's certificate was signed by the CA, not the name in it: whoever has a
certificate of that CA may connect, and run what he likes. So the CA must be the cluster's own.
"""

from __future__ import annotations

import ipaddress
import socket
import ssl
from pathlib import Path
from urllib.parse import urlsplit

import psutil
from distributed import Security

from braincensus.config import Compute
from braincensus.errors import ConfigError, explain

_FIELDS = ("tls_ca_file", "tls_cert", "tls_key")


def security_of(compute: Compute) -> Security | None:
    """Return the certificates that the configuration or Dask's names, checked; None where neither names any.

    Raises
    ------
    ConfigError
        If a file is missing, cannot be read or is no certificate, or the key is another certificate's.
    """
    given = {name: getattr(compute, name) for name in _FIELDS if getattr(compute, name) is not None}
    if given:
        # The key may be in the certificate's file; a key of Dask's own configuration would belong to another.
        missing = [name for name in _FIELDS[:2] if name not in given]
        if missing:
            raise ConfigError(
                explain(
                    f"compute.{missing[0]} is not given",
                    expected="tls_ca_file and tls_cert together, and tls_key where it is a file of its own",
                    found=", ".join(given),
                )
            )
        key = given.get("tls_key", given["tls_cert"])
        roles = {f"tls_{role}_cert": given["tls_cert"] for role in ("client", "scheduler", "worker")}
        keys = {f"tls_{role}_key": key for role in ("client", "scheduler", "worker")}
        for name, path in given.items():
            _check_readable(f"compute.{name}", path)
        security = Security(tls_ca_file=given["tls_ca_file"], **roles, **keys, require_encryption=True)
    else:
        security = Security()
        if security.tls_ca_file is None and security.tls_client_cert is None:
            return None
        for name, path in (
            ("ca-file", security.tls_ca_file),
            ("client.cert", security.tls_client_cert),
            ("client.key", security.tls_client_key),
        ):
            if path is not None and "\n" not in path:
                _check_readable(f"distributed.comm.tls.{name} of Dask's configuration", path)
    try:
        security.get_connection_args("client")
    except (ssl.SSLError, OSError) as err:
        raise ConfigError(
            explain(
                "the TLS certificates cannot be used",
                found=f"{type(err).__name__}: {err}",
                expected=f"PEM files: CA {security.tls_ca_file}, certificate {security.tls_client_cert}",
                cause="the key belongs to another certificate"
                if "KEY_VALUES_MISMATCH" in str(err)
                else "a file that is not PEM, or is cut off",
            )
        ) from err
    return security


def required(compute: Compute) -> Security:
    """Return the certificates for a `tls://` address.

    Raises
    ------
    ConfigError
        As :func:`security_of`, or if there are none.
    """
    security = security_of(compute)
    if security is None or security.tls_ca_file is None or security.tls_client_cert is None:
        raise ConfigError(
            explain(
                f"{compute.cluster} needs certificates, and none are given",
                expected="a CA file, and a certificate and key that it signed",
                remedy="--tls-ca-file, --tls-cert and --tls-key (compute.tls_ca_file and so on in the "
                "configuration), or distributed.comm.tls in Dask's own configuration",
            )
        )
    return security


def written(security: Security, folder: Path) -> Security:
    """Write certificates that are held in memory to files, and return them as these."""
    fields: dict[str, str] = {"tls_ca_file": security.tls_ca_file}
    for role in ("client", "scheduler", "worker"):
        for part in ("cert", "key"):
            fields[f"tls_{role}_{part}"] = getattr(security, f"tls_{role}_{part}")
    for name, text in fields.items():
        path = folder / f"{name}.pem"
        path.touch(mode=0o600)
        path.write_text(text)
        fields[name] = str(path)
    return Security(**fields, require_encryption=True)


def _check_readable(what: str, path: str) -> None:
    try:
        with Path(path).expanduser().open("rb") as file:
            file.read(1)
    except OSError as err:
        raise ConfigError(
            explain(
                f"{what}: {path} cannot be read",
                found=f"{type(err).__name__}: {err.strerror}",
                cause="a wrong path" if isinstance(err, FileNotFoundError) else "another user's file",
            )
        ) from err


def leaves_this_machine(address: str) -> bool:
    """Say whether a scheduler's address is another machine's, or cannot be told.

    Examples
    --------
    >>> leaves_this_machine("tcp://127.0.0.1:8786"), leaves_this_machine("tcp://192.0.2.7:8786")
    (False, True)
    """
    own = {entry.address.partition("%")[0] for entries in psutil.net_if_addrs().values() for entry in entries}
    found = _addresses(urlsplit(address).hostname or "")
    return not found or any(not _is_loopback(address) and address not in own for address in found)


def heard_beyond_this_machine(host: str) -> bool:
    """Say whether others can reach what listens on a host, or whether that cannot be told.

    Examples
    --------
    >>> [heard_beyond_this_machine(host) for host in ("127.0.0.1", "localhost", "0.0.0.0", "192.0.2.7")]
    [False, False, True, True]
    """
    return not all(map(_is_loopback, _addresses(host) or {"0.0.0.0"}))


def _addresses(host: str) -> set[str]:
    """Return what a name stands for; nothing if that is not known."""
    try:
        return {str(entry[4][0]) for entry in socket.getaddrinfo(host, None)}
    except OSError:
        return set()


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback
