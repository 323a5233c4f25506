"""What Grafana asks Prometheus for is what schedulers and workers really serve."""

from __future__ import annotations

import json
import re
import time
import urllib.request

import yaml
from distributed import Client

from braincensus import RunConfig, run
from braincensus_kernels.phantom import Phantom

from .conftest import DEPLOY

_WORDS = {"sum", "max", "by", "rate", "increase"}


def metrics(url: str) -> dict[str, set[str]]:
    """Return the names that a server serves, each with its labels."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    found: dict[str, set[str]] = {}
    for name, labels in re.findall(r"^(\w+)(?:\{(.*)\})? ", text, re.M):
        found.setdefault(name, set()).update(re.findall(r'(\w+)="', labels))
    return found


def test_panels_ask_for_metrics_that_are_served(start_cluster, tmp_path):
    address, dashboard = start_cluster()
    with Client(address) as client:
        client.wait_for_workers(1, timeout=60)
        held = client.submit(abs, -1)
        held.result()
        config = RunConfig().merged({"foreground": {"model": "intensity"}})
        run(Phantom(shape=(48, 48, 48), n_cells=10), tmp_path / "out.zarr", config=config, client=client)
        (worker,) = client.scheduler_info()["workers"].values()
        port = worker["services"]["dashboard"]
        until = time.monotonic() + 20
        served: dict[str, set[str]] = {}
        while "dask_scheduler_tasks_compute_seconds_total" not in served and time.monotonic() < until:
            served = metrics(dashboard)
        served |= metrics(f"http://127.0.0.1:{port}")
    assert len(served) > 30
    panels = json.loads((DEPLOY / "grafana" / "dashboard.json").read_text())["panels"]
    assert len(panels) >= 10
    asked = set()
    for panel in panels:
        for target in panel["targets"]:
            names, labels = taken_apart(target["expr"])
            assert names, target["expr"]
            for name in names:
                known = served.get(name)
                assert known is not None, f"{panel['title']}: nobody serves {name}"
                assert labels <= known | {"instance"}, f"{panel['title']}: {name} has {known}"
            asked |= names
    ours = {"voxels_total", "blocks", "stage_seconds", "retries_total"}
    assert {f"braincensus_{name}" for name in ours} <= asked


def taken_apart(expression: str) -> tuple[set[str], set[str]]:
    """Return the metrics of a PromQL expression, and the labels that it uses."""
    labels = {
        word for group in re.findall(r"by \(([^)]*)\)", expression) for word in re.split(r",\s*", group)
    }
    labels |= set(re.findall(r"(\w+)\s*(?:=|!=|=~)\"", expression))
    bare = re.sub(r"by \([^)]*\)|\{[^}]*\}|\[[^\]]*\]", " ", expression)
    return set(re.findall(r"[a-zA-Z_]\w*", bare)) - _WORDS, labels


def test_a_panel_of_a_metric_that_nobody_serves_would_be_seen():
    assert taken_apart('sum by (a, b) (rate(x_total{c!="d"}[2m]))') == ({"x_total"}, {"a", "b", "c"})


def test_prometheus_scrapes_the_ports_that_are_published():
    jobs = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yaml").read_text())["scrape_configs"]
    assert {job["job_name"] for job in jobs} == {"dask-scheduler", "dask-worker"}
    (monitor,) = yaml.safe_load_all((DEPLOY / "kubernetes" / "manifests" / "podmonitor.yaml").read_text())
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    cluster = yaml.safe_load((DEPLOY / "kubernetes" / "manifests" / "daskcluster.yaml").read_text())
    for part in ("worker", "scheduler"):
        ports = cluster["spec"][part]["spec"]["containers"][0]["ports"]
        assert endpoint["port"] in {port["name"] for port in ports}
