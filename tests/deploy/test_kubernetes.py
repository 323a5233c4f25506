"""Kubernetes without a cluster: every manifest and spec that we make, against the schemas of their kinds."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from braincensus import ConfigError
from braincensus.cluster import connect, managers, resources_for
from braincensus.cluster.files import KubernetesFile, as_bytes, read_cluster_file
from braincensus.config import Compute

from .conftest import DEPLOY

jsonschema = pytest.importorskip("jsonschema")
dask_kubernetes = pytest.importorskip("dask_kubernetes")
FOLDER = DEPLOY / "kubernetes"
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
FILES = sorted(FOLDER.glob("cluster-*.yaml"))
DOCUMENTS = [
    pytest.param(document, id=f"{path.stem}-{document['kind']}")
    for path in [*sorted((FOLDER / "manifests").glob("*.yaml")), FOLDER / "helm" / "networkpolicy.yaml"]
    for document in yaml.safe_load_all(path.read_text())
]
MODELS = {
    "Namespace": "V1Namespace",
    "PersistentVolumeClaim": "V1PersistentVolumeClaim",
    "ServiceAccount": "V1ServiceAccount",
    "Role": "V1Role",
    "RoleBinding": "V1RoleBinding",
    "NetworkPolicy": "V1NetworkPolicy",
    "Job": "V1Job",
}
"""Kinds of Kubernetes' own, and their classes in its Python client, made from its OpenAPI schema."""


def closed(schema: Any) -> Any:
    """Return a schema in which a field that it does not name is an error, where the server would drop it."""
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: closed(value) for key, value in schema.items()}
    if isinstance(found.get("properties"), dict) and "x-kubernetes-preserve-unknown-fields" not in found:
        found.setdefault("additionalProperties", False)
    return found


@cache
def dask_schema(kind: str) -> Any:
    charts = Path(dask_kubernetes.__file__).parent / "operator" / "deployment" / "helm"
    text = (charts / "dask-kubernetes-operator" / "crds" / f"{kind.lower()}.yaml").read_text()
    schema = closed(yaml.load(text, _LOADER)["spec"]["versions"][0]["schema"]["openAPIV3Schema"])
    schema["properties"] |= {"apiVersion": {"type": "string"}, "kind": {"type": "string"}, "metadata": {}}
    return schema


def check_dask(document: dict[str, Any]) -> None:
    jsonschema.Draft202012Validator(dask_schema(document["kind"])).validate(document)


def check_kubernetes(value: Any, kind: str, place: str) -> None:
    """Refuse unknown and missing fields of a kind of Kubernetes' own, all the way down."""
    from kubernetes import client

    if value is None:
        return
    if inner := re.fullmatch(r"list\[(.+)\]", kind):
        assert isinstance(value, list), f"{place} is no list"
        for n, part in enumerate(value):
            check_kubernetes(part, inner[1], f"{place}[{n}]")
    elif inner := re.fullmatch(r"dict\(str, (.+)\)", kind):
        for key, part in value.items():
            check_kubernetes(part, inner[1], f"{place}.{key}")
    elif kind.startswith(("V1", "V2", "RbacV1")):
        model = getattr(client, kind)
        fields = {given: name for name, given in model.attribute_map.items()}
        unknown = set(value) - set(fields)
        assert not unknown, f"{place}: {unknown}"
        model(**{fields[key]: part for key, part in value.items()})  # raises where a required one is missing
        for key, part in value.items():
            check_kubernetes(part, model.openapi_types[fields[key]], f"{place}.{key}")
    elif kind in ("str", "bool", "int"):
        assert type(value).__name__ == kind, f"{place}: {value!r} is no {kind}"


@pytest.mark.parametrize("document", [d for d in DOCUMENTS if d.values[0]["kind"] in MODELS])
def test_manifests_fit_the_schemas_of_kubernetes(document):
    check_kubernetes(document, MODELS[document["kind"]], document["kind"])


@pytest.mark.parametrize("document", [d for d in DOCUMENTS if d.values[0]["kind"].startswith("Dask")])
def test_dask_manifests_fit_the_operators_schemas(document):
    check_dask(document)
    for pod in pods(document):
        check_pod(pod)


def test_schemas_refuse_what_is_wrong():
    document = yaml.safe_load((FOLDER / "manifests" / "daskcluster.yaml").read_text())
    document["spec"]["worker"]["spec"]["containers"][0]["imag"] = "x"
    with pytest.raises(jsonschema.ValidationError, match="imag"):
        check_dask(document)
    job = yaml.safe_load((FOLDER / "manifests" / "census-job.yaml").read_text())
    job["spec"]["template"]["spec"]["securityContext"]["runAsNotRoot"] = True
    with pytest.raises(AssertionError, match="runAsNotRoot"):
        check_kubernetes(job, "V1Job", "Job")


def pods(document: dict[str, Any]) -> list[dict[str, Any]]:
    spec = document["spec"]
    return [spec[part]["spec"] for part in ("worker", "scheduler") if part in spec]


def check_pod(pod: dict[str, Any]) -> None:
    """What every pod promises: no root, no more rights, limits, one device, commands that Dask has."""
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"]["type"] == "RuntimeDefault"
    assert pod["automountServiceAccountToken"] is False
    (container,) = pod["containers"]
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert container["securityContext"]["allowPrivilegeEscalation"] is False
    assert container["resources"]["limits"] == container["resources"]["requests"]
    assert container["args"][0] in ("dask", "braincensus")
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}
    if container["args"][:2] == ["dask", "worker"]:
        limits, args = container["resources"]["limits"], container["args"]
        assert args[args.index("--nthreads") + 1] == limits["cpu"]
        memory = as_bytes(args[args.index("--memory-limit") + 1])
        assert 0.9 * as_bytes(limits["memory"]) < memory <= as_bytes(limits["memory"])
        assert limits.get("nvidia.com/gpu", "1") == "1"


def test_the_jobs_pod_promises_the_same():
    job = yaml.safe_load((FOLDER / "manifests" / "census-job.yaml").read_text())
    check_pod(job["spec"]["template"]["spec"])


def test_services_are_reached_from_within_alone():
    for parameter in DOCUMENTS:
        document = parameter.values[0]
        if document["kind"] == "DaskCluster":
            service = document["spec"]["scheduler"]["service"]
            assert service["type"] == "ClusterIP"
            assert service["selector"]["dask.org/cluster-name"] == document["metadata"]["name"]


def test_kustomize_puts_everything_together():
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed")
    command = ["kubectl", "kustomize", FOLDER / "manifests"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    documents = list(yaml.safe_load_all(done.stdout))
    assert {d["metadata"].get("namespace", "braincensus") for d in documents} == {"braincensus"}
    assert {"DaskCluster", "NetworkPolicy", "Role"} <= {d["kind"] for d in documents}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_specs_of_our_files_fit_the_operators_schemas(path):
    file = read_cluster_file(str(path), KubernetesFile)
    spec = managers.cluster_spec(file)
    check_dask(spec)
    for pod in pods(spec):
        check_pod(pod)
    assert spec["spec"]["scheduler"]["spec"]["containers"][0]["args"][:2] == ["dask", "scheduler"]
    for group in file.groups:
        worker = managers.worker_spec(file, group)
        document = {
            "apiVersion": "kubernetes.dask.org/v1",
            "kind": "DaskWorkerGroup",
            "metadata": {"name": group.name},
            "spec": {"cluster": file.name, "worker": worker},
        }
        check_dask(document)
        check_pod(worker["spec"])
        assert worker["spec"]["nodeSelector"] == group.node_selector


def test_a_plan_creates_nothing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "dask_kubernetes.operator", None)
    resources = resources_for(Compute(cluster=f"kubernetes:{FOLDER}/cluster-gpu.yaml"))
    assert (resources.workers, resources.threads, resources.device) == (3, 8, "cuda")
    assert resources.memory_bytes == 48 * 2**30
    assert resources_for(Compute(cluster=f"kubernetes:{FOLDER}/cluster-cpu.yaml")).workers == 20
    with pytest.raises(ConfigError, match=r'pip install "braincensus\[kubernetes\]"'):
        with_no_cluster(FOLDER / "cluster-cpu.yaml")


def with_no_cluster(path: Path) -> None:
    with connect(Compute(cluster=f"kubernetes:{path}", worker_wait_s=1), None):
        pass


def test_without_a_cluster_the_error_says_where_to_look(tmp_path, monkeypatch: pytest.MonkeyPatch):
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "here",
        "contexts": [{"name": "here", "context": {"cluster": "here", "user": "me"}}],
        "clusters": [{"name": "here", "cluster": {"server": "http://127.0.0.1:9"}}],
        "users": [{"name": "me", "user": {}}],
    }
    (tmp_path / "config").write_text(yaml.safe_dump(config))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "config"))
    with pytest.raises(ConfigError, match=r"the cluster did not start[\s\S]*get daskclusters,pods,events"):
        with_no_cluster(FOLDER / "cluster-cpu.yaml")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"imagee": "x"}, "imagee is unknown: did you mean image?"),
        (
            {"resources": {"cpu": 1, "memory": "1Gi", "gpu": 1}},
            "resources.gpu is unknown: did you mean gpus?",
        ),
        ({"volumes": [{"claim": "a", "pth": "/x"}]}, "volumes.0.pth is unknown: did you mean path?"),
        ({"name": "Census"}, "name: "),
        (
            {"groups": [{"name": "gpu", "workers": 1, "resources": {"cpu": 1, "memory": "1Gi", "gpus": 1}}]},
            "one kind of device",
        ),
        ({"groups": [{"name": "default", "workers": 1}]}, "two have one name"),
    ],
)
def test_what_a_file_may_not_say_is_refused(tmp_path, changes, told):
    fields = {"image": "x", "workers": 1, "resources": {"cpu": 1, "memory": "1Gi"}}
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump({**fields, **changes}))
    with pytest.raises(ConfigError, match="cannot be used") as err:
        resources_for(Compute(cluster=f"kubernetes:{path}"))
    assert told in str(err.value)


def test_values_of_the_chart_have_names_that_it_has():
    values = yaml.safe_load((FOLDER / "helm" / "values.yaml").read_text())
    common = {"image", "resources", "securityContext", "nodeSelector", "tolerations", "replicas", "extraArgs"}
    assert set(values) <= {"scheduler", "worker", "webUI", "jupyter"}
    assert set(values["scheduler"]) <= common | {"serviceType"}
    assert set(values["worker"]) <= common | {"env", "mounts"}
    assert values["jupyter"] == {"enabled": False, "rbac": False}
