"""A scheduler and workers of their own, over TCP and TLS: the same bytes; what a person is told otherwise."""

from __future__ import annotations

import datetime
import ipaddress
from pathlib import Path

import pytest

from braincensus import ConfigError, run
from braincensus.cluster import connect, resources_for
from braincensus.cluster.tls import leaves_this_machine
from braincensus.config import Compute

from .conftest import Told, configuration, result_bytes

pytest.importorskip("cryptography")
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID


class Authority:
    """A CA of its own, and one certificate that it signed, as files."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.ca, self.cert, self.key = folder / "ca.pem", folder / "cert.pem", folder / "key.pem"
        ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
        ca = _certificate("census CA", ca_key.public_key(), issuer="census CA", signer=ca_key, is_ca=True)
        cert = _certificate("census", key.public_key(), issuer="census CA", signer=ca_key, is_ca=False)
        self.ca.write_bytes(ca.public_bytes(serialization.Encoding.PEM))
        self.cert.write_bytes(cert.public_bytes(serialization.Encoding.PEM))
        self.key.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )

    def options(self) -> dict[str, str]:
        return {"tls_ca_file": str(self.ca), "tls_cert": str(self.cert), "tls_key": str(self.key)}


def _certificate(name, key, *, issuer, signer, is_ca):
    now = datetime.datetime.now(datetime.UTC)

    def named(text):
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])

    builder = (
        x509.CertificateBuilder()
        .subject_name(named(name))
        .issuer_name(named(issuer))
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False
        )
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False
        )
    )
    if is_ca:
        usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
        builder = builder.add_extension(usage, critical=True)
    return builder.sign(signer, hashes.SHA256())


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls") / "ours")


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls") / "theirs")


@pytest.mark.slow
def test_a_scheduler_and_workers_over_tcp_give_the_bytes_of_a_local_run(
    brain, local, start_cluster, tmp_path
):
    address, _ = start_cluster(workers=2)
    told = Told()
    run(brain, tmp_path / "out.zarr", config=configuration(cluster=address), progress=told)
    assert result_bytes(tmp_path / "out.zarr") == local
    assert not any("encrypted" in message for message in told.messages), "it stays on this machine"
    resources = resources_for(Compute(cluster=address))
    assert (resources.workers, resources.threads, resources.memory_bytes) == (2, 1, 2**30)


def test_a_scheduler_and_workers_over_tls_give_the_bytes_of_a_local_run(
    brain, local, start_cluster, tmp_path, authority, stranger
):
    options = ["--tls-ca-file", authority.ca, "--tls-cert", authority.cert, "--tls-key", authority.key]
    address, _ = start_cluster(*options, protocol="tls")
    config = configuration(cluster=address, **authority.options())
    run(brain, tmp_path / "out.zarr", config=config)
    assert result_bytes(tmp_path / "out.zarr") == local

    wrong = Compute(cluster=address, **{**authority.options(), "tls_ca_file": str(stranger.ca)})
    with pytest.raises(ConfigError, match=r"shows a certificate that .*ca\.pem did not sign"):
        resources_for(wrong)
    theirs = {"tls_cert": str(stranger.cert), "tls_key": str(stranger.key)}
    unknown = Compute(cluster=address, **{**authority.options(), **theirs})
    with pytest.raises(ConfigError, match="refused our certificate"):
        resources_for(unknown)
    with pytest.raises(ConfigError, match="it wants encryption"):
        resources_for(Compute(cluster=address.replace("tls", "tcp")))


def test_certificates_that_cannot_be_used_are_told_before_anything_connects(authority, stranger, tmp_path):
    def refused(**changes):
        given = {**authority.options(), **changes}
        with pytest.raises(ConfigError) as err:
            resources_for(
                Compute(cluster="tls://127.0.0.1:1", **{k: v for k, v in given.items() if v is not None})
            )
        return str(err.value)

    nothing = refused(tls_ca_file=None, tls_cert=None, tls_key=None)
    assert "needs certificates" in nothing
    assert "--tls-ca-file" in nothing
    assert "compute.tls_cert is not given" in refused(tls_cert=None)
    assert "No such file" in refused(tls_ca_file=str(tmp_path / "none.pem"))
    assert "another certificate" in refused(tls_key=str(stranger.key))
    garbage = tmp_path / "garbage.pem"
    garbage.write_text("no certificate")
    assert "not PEM" in refused(tls_ca_file=str(garbage))


def test_dasks_own_configuration_gives_certificates_too(authority, start_cluster):
    import dask

    options = ["--tls-ca-file", authority.ca, "--tls-cert", authority.cert, "--tls-key", authority.key]
    address, _ = start_cluster(*options, protocol="tls", workers=0)
    own = {
        "distributed.comm.tls.ca-file": str(authority.ca),
        "distributed.comm.tls.client.cert": str(authority.cert),
        "distributed.comm.tls.client.key": str(authority.key),
    }
    with dask.config.set(own), pytest.raises(ConfigError, match="has no workers"):
        resources_for(Compute(cluster=address))


def test_the_wait_for_a_worker_ends_and_says_how_long_it_was(start_cluster):
    address, _ = start_cluster(workers=0)
    compute = Compute(cluster=address, worker_wait_s=1)
    with pytest.raises(ConfigError, match=r"came within 1 s[\s\S]*dask worker[\s\S]*--worker-wait"):
        resources_for(compute, wait_s=compute.worker_wait_s)


def test_a_scheduler_of_another_machine_without_encryption_is_told(monkeypatch: pytest.MonkeyPatch):
    assert leaves_this_machine("tcp://192.0.2.1:8786")
    assert not leaves_this_machine("tcp://localhost:8786")
    assert not leaves_this_machine("tcp://[::1]:8786")
    monkeypatch.setattr("braincensus.cluster.scheduler._ANSWER_S", 0.2)
    told = Told()
    with (
        pytest.raises(ConfigError, match="no Dask scheduler answers"),
        connect(Compute(cluster="tcp://192.0.2.1:8786"), None, told),
    ):
        pass
    assert told.messages == ["tcp://192.0.2.1:8786: what is sent there is not encrypted; tls:// would be"]


@pytest.mark.parametrize(
    ("cluster", "told"),
    [
        ("slurm", "no file is named"),
        ("slurm:", "no file is named"),
        ("kubernetes://x", "no file is named"),
        ("127.0.0.1:8786", "not understood"),
        ("scheduler:8786", "tcp://scheduler:8786"),
        ("tcp://scheduler", "no host or no port"),
        ("tls://scheduler:99999", "no host or no port"),
        ("Local", "expected: local, cuda"),
    ],
)
def test_what_is_no_cluster_is_refused(cluster: str, told: str):
    with pytest.raises(ConfigError, match="not understood") as err:
        resources_for(Compute(cluster=cluster))
    assert told in str(err.value)


def test_cuda_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("braincensus.cluster.resources.cuda_available", lambda: False)
    with pytest.raises(ConfigError, match=r"--cluster cuda: no usable GPU here[\s\S]*cuda13"):
        resources_for(Compute(cluster="cuda"))
    with pytest.raises(ConfigError, match="contradict"):
        resources_for(Compute(cluster="cuda", device="cpu"))
