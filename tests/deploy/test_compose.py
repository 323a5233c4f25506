"""The containers: what compose.yaml promises, and that the images hold what they need."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from typing import Any

import pytest
import yaml

from .conftest import DEPLOY, program

FOLDER = DEPLOY / "docker"
DOCKERFILES = [FOLDER / "Dockerfile", FOLDER / "Dockerfile.cuda"]


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((FOLDER / "compose.yaml").read_text())["services"]
    return found


def test_only_the_dashboard_is_published_and_only_to_this_machine(services):
    published = [port for service in services.values() for port in service.get("ports", [])]
    assert published
    assert all(port.startswith("127.0.0.1:") and port.endswith(":8787") for port in published)
    networks = yaml.safe_load((FOLDER / "compose.yaml").read_text())["networks"]
    assert networks["dask"]["internal"] is True
    assert services["worker"]["networks"] == services["census"]["networks"] == ["dask"]
    assert all("network_mode" not in service for service in services.values())


def test_every_container_has_a_memory_limit_and_no_rights(services):
    for name, service in services.items():
        assert "mem_limit" in service, name
        assert service["cap_drop"] == ["ALL"]
        assert service["read_only"] is True
        assert "no-new-privileges:true" in service["security_opt"]
        assert not service["user"].startswith("0")
        inputs = next(volume for volume in service["volumes"] if volume["target"] == "/input")
        assert inputs["read_only"] is True
    worker = services["worker"]
    limit = worker["command"][worker["command"].index("--memory-limit") + 1]
    assert limit == worker["mem_limit"] == worker["memswap_limit"], "Dask knows what the container may use"


def test_services_wait_for_health(services):
    assert "/health" in str(services["scheduler"]["healthcheck"]["test"])
    assert "8788/health" in str(services["worker"]["healthcheck"]["test"])
    assert services["worker"]["depends_on"]["scheduler"]["condition"] == "service_healthy"
    assert services["census"]["depends_on"]["worker"]["condition"] == "service_healthy"
    assert services["census"]["profiles"] == ["census"]


def test_commands_are_ones_that_the_programs_take(services):
    from click.testing import CliRunner
    from distributed.cli import dask_scheduler, dask_worker

    for main, name in ((dask_scheduler.main, "scheduler"), (dask_worker.main, "worker")):
        told = CliRunner().invoke(main, ["--help"]).output
        options = [word for word in services[name]["command"] if word.startswith("--")]
        assert options
        assert all(option in told for option in options), options
    assert services["census"]["command"][:2] == ["braincensus", "run"]


def test_docker_compose_takes_it():
    probe = ["docker", "compose", "version"]
    if shutil.which("docker") is None or subprocess.run(probe, capture_output=True, check=False).returncode:
        pytest.skip("docker compose is not installed")
    env = {**os.environ, "BRAINCENSUS_INPUT": "/tmp", "BRAINCENSUS_OUTPUT": "/tmp"}
    for files in (["compose.yaml"], ["compose.yaml", "compose.cuda.yaml"]):
        named = [word for file in files for word in ("-f", FOLDER / file)]
        done = subprocess.run(["docker", "compose", *named, "config", "-q"], env=env, capture_output=True)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_dockerfiles_are_without_complaints(path):
    hadolint = program("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not installed")
    found = subprocess.run([hadolint, path], capture_output=True, text=True, check=False)
    assert found.stdout == ""
    assert found.returncode == 0, found.stderr


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_images_are_not_root_and_copy_what_there_is(path):
    text = path.read_text()
    assert re.search(r"^USER 1000", text, re.M)
    root = DEPLOY.parent
    ignored = (root / ".dockerignore").read_text().splitlines()
    for line in re.findall(r"^COPY (?!--from)(.+)", text, re.M):
        for source in line.split()[:-1]:
            assert (root / source).exists(), source
            assert f"!{source}" in ignored, f"{source} is not in the build's context"
    used = set(
        re.findall(r"\[([\w,${}]+)\]", " ".join(re.findall(r'"\.(\[[^"]+\])"', text))).pop().split(",")
    )
    import tomllib

    extras = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {name.replace("${CUDA}", "13") for name in used} <= set(extras)
