"""The files in configs/ray/: what Ray, Google Cloud and Kubernetes would say of them."""

import itertools
import json
import os
import re
import resource
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import googleapiclient.discovery
import jsonschema
import pytest
import yaml
from googleapiclient.discovery_cache import get_static_doc
from googleapiclient.http import HttpMockSequence
from ray.autoscaler._private.gcp import config as gcp
from ray.autoscaler._private.gcp.node_provider import GCPNodeProvider
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.serve.schema import ServeDeploySchema

from cluster import ray_node
from cluster.needs import need_of
from cluster.nodes import Cluster, Node
from cluster.placement import check_capacity
from cluster.ray_node import proxy_environment
from engine.config import EngineConfig, parse_config

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "configs" / "ray"
LAUNCHED = sorted(path for path in FOLDER.glob("*.yaml") if not path.name.startswith("kuberay"))
GOOGLE = [path for path in LAUNCHED if path.name.startswith("gcp")]
KUBERAY = FOLDER / "kuberay-v6e-16.yaml"
RAYSERVICE_SCHEMA = ROOT / "tests" / "data" / "kuberay" / "rayservice_schema.json"


def by_name(path: Path) -> str:
    return path.stem


def read(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


def served_config(path: Path) -> EngineConfig:
    (application,) = read(path)["applications"]
    return parse_config(application["args"])


def test_all_promised_files_are_there():
    names = {path.name for path in FOLDER.glob("*.yaml")}
    assert names >= {"gcp-v6e-4.yaml", "gcp-v6e-16.yaml", "local.yaml", "kuberay-v6e-16.yaml"}


@pytest.mark.parametrize("path", [*LAUNCHED, KUBERAY], ids=by_name)
def test_file_opens_with_its_commands_the_hardware_and_what_to_expect(path: Path):
    lines = path.read_text().splitlines()
    comment = list(itertools.takewhile(lambda line: line.startswith("#"), lines))
    words = [line.removeprefix("#").split(maxsplit=1) for line in comment if line != "#"]
    known = ("command", "hardware", "expect")
    assert [word[0] for word in words if word[0] in known] == list(known)
    # Whatever file a command names is there.
    named = re.findall(r"(?:configs|docs|scripts)/[\w./-]+\w", "\n".join(comment))
    assert f"configs/ray/{path.name}" in named
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("path", LAUNCHED, ids=by_name)
def test_ray_takes_the_file_and_every_node_gets_code_token_and_locked_packages(path: Path):
    config = prepare_config(read(path))
    validate_config(config)

    assert config["file_mounts"] == {
        "~/qwen-on-ray": ".",
        "~/.ray/auth_token": "~/.ray/auth_token",
    }
    for setup in (config["head_setup_commands"], config["worker_setup_commands"]):
        commands = "\n".join(setup)
        (option,) = re.findall(r"scripts/setup(?: --(\w+))?", commands)
        assert (ROOT / f"requirements{option and f'-{option}'}.lock").exists()
        assert "node-environment' >> ~/.bashrc" in commands
    (head,) = [line for line in config["head_start_ray_commands"] if "ray start" in line]
    assert "--dashboard-host=127.0.0.1" in head
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in head
    # `ray up` exports 1 before the command, unless its own environment says otherwise.
    assert head.startswith("RAY_enable_autoscaler_v2=0 ")
    (worker,) = [line for line in config["worker_start_ray_commands"] if "ray start" in line]
    assert "--address=$RAY_HEAD_IP:6379" in worker


def google_service(name: str, version: str, answers: list[dict[str, Any]]) -> Any:
    """One of Google's services that gives these answers, and checks what it is asked."""
    http = HttpMockSequence([({"status": "200"}, json.dumps(answer)) for answer in answers])
    return googleapiclient.discovery.build(name, version, http=http, static_discovery=True)


@pytest.fixture
def google(monkeypatch: pytest.MonkeyPatch) -> None:
    """An account at Google Cloud in which Ray's launcher finds a project, roles and a subnet."""

    def clients(provider: Mapping[str, Any]) -> tuple[Any, ...]:
        project = {"projectId": provider["project_id"], "lifecycleState": "ACTIVE"}
        account = {"projectId": provider["project_id"], "email": "ray@project"}
        subnets = {"items": [{"selfLink": f"regions/{provider['region']}/subnetworks/default"}]}
        policies = [{"bindings": []}, {}]
        return (
            google_service("cloudresourcemanager", "v1", [project, *policies]),
            google_service("iam", "v1", [account]),
            google_service("compute", "v1", [subnets]),
            google_service("tpu", "v2alpha1", []) if provider.get("_has_tpus") else None,
        )

    monkeypatch.setattr(gcp, "construct_clients_from_provider_config", clients)


def unknown_fields(value: Any, kind: str, schemas: Mapping[str, Any], path: str) -> Iterator[str]:
    """Fields that one of Google's objects does not have, or has with another type."""
    properties = schemas[kind]["properties"]
    for name, each in value.items():
        here = f"{path}.{name}"
        if name not in properties:
            yield here
            continue
        expected = properties[name]
        types = {"boolean": bool, "array": list, "string": (str, int)}
        if not isinstance(each, types.get(expected.get("type"), object)):
            yield f"{here}: {each!r}"
        items = each if isinstance(each, list) else [each]
        reference = expected.get("items", expected).get("$ref")
        for item in items if reference else ():
            yield from unknown_fields(item, reference, schemas, here)


@pytest.mark.parametrize("path", GOOGLE, ids=by_name)
def test_google_launcher_makes_a_cpu_head_and_tpu_workers_out_of_the_file(path: Path, google: None):
    config = read(path)
    assert config["provider"]["availability_zone"].startswith(config["provider"]["region"])
    # Without a key of the user's the launcher would make one and write it into his home.
    config["auth"]["ssh_private_key"] = "~/.ssh/key"
    ready = GCPNodeProvider.bootstrap_config(prepare_config(config))
    ready = GCPNodeProvider.fillout_available_node_types_resources(ready)

    kinds = {
        name: gcp.get_node_type(node_type["node_config"]).value
        for name, node_type in ready["available_node_types"].items()
    }
    (workers,) = [name for name in kinds if name != "head"]
    assert kinds == {"head": "compute", workers: "tpu"}
    resources = ready["available_node_types"][workers]["resources"]
    assert resources["TPU"] == 4
    assert resources[f"TPU-{workers}-head"] == 1
    head = ready["available_node_types"]["head"]["node_config"]
    assert head["networkInterfaces"][0]["subnetwork"].endswith("default")
    assert ready["provider"]["_has_tpus"]


@pytest.mark.parametrize("path", GOOGLE, ids=by_name)
def test_google_knows_all_that_is_asked_of_its_machines(path: Path):
    compute = json.loads(get_static_doc("compute", "v1") or "{}")["schemas"]
    tpu = json.loads(get_static_doc("tpu", "v2alpha1") or "{}")["schemas"]
    for name, node_type in read(path)["available_node_types"].items():
        kind, schemas = ("Instance", compute) if name == "head" else ("Node", tpu)
        assert list(unknown_fields(node_type["node_config"], kind, schemas, name)) == []


def test_fields_that_google_lacks_are_found():
    schemas = json.loads(get_static_doc("tpu", "v2alpha1") or "{}")["schemas"]
    node = {"acceleratorTyp": "v6e-4", "schedulingConfig": {"preemptible": "no", "spott": True}}
    assert list(unknown_fields(node, "Node", schemas, "tpu")) == [
        "tpu.acceleratorTyp",
        "tpu.schedulingConfig.preemptible: 'no'",
        "tpu.schedulingConfig.spott",
    ]


def test_slices_of_one_host_come_and_go_and_those_of_several_stay():
    one, several = (
        read(FOLDER / f"gcp-{name}.yaml")["available_node_types"][name]
        for name in ("v6e-4", "v6e-16")
    )
    assert one["min_workers"] < one["max_workers"]
    assert several["min_workers"] == several["max_workers"]


@pytest.mark.parametrize(
    ("cluster_file", "model_file", "num_hosts"),
    [("gcp-v6e-4.yaml", "qwen7b.yaml", 1), ("gcp-v6e-16.yaml", "qwen3-32b-v6e-16.yaml", 4)],
)
def test_cluster_holds_the_model_that_its_commands_serve(
    cluster_file: str, model_file: str, num_hosts: int
):
    path = FOLDER / cluster_file
    assert f"'serve run configs/{model_file}'" in path.read_text()
    (workers,) = [
        node_type
        for name, node_type in read(path)["available_node_types"].items()
        if name != "head"
    ]
    hosts = tuple(
        Node(
            node_id=str(index),
            address=f"10.0.0.{index}",
            resources=workers["resources"],
            labels={
                "ray.io/tpu-slice-name": "slice",
                "ray.io/tpu-worker-id": str(index),
                "ray.io/tpu-topology": "4x4" if num_hosts == 4 else "2x2",
            },
        )
        for index in range(num_hosts)
    )
    need = need_of(served_config(ROOT / "configs" / model_file))
    assert need.num_hosts == num_hosts
    check_capacity(need, Cluster(nodes=hosts, maxima={}))


def source_environment(settings: Mapping[str, str], files: int) -> dict[str, str]:
    """A shell's variables after scripts/node-environment, its folder and its limit on files."""
    command = f"ulimit -n {files} && . {ROOT}/scripts/node-environment && ulimit -Sn && pwd && env"
    printed = subprocess.run(
        ["bash", "-c", command],
        cwd="/",
        env={"PATH": os.environ["PATH"], **settings},
        check=True,
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    shown = {"files": printed[0], "folder": printed[1]}
    return shown | dict(line.split("=", 1) for line in printed[2:] if "=" in line)


@pytest.fixture
def environment_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], dict[str, str]]:
    """What the nodes that we start are told where so many files may be open; not its own ports."""
    for name in proxy_environment(ROOT):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(ray_node, "has_haproxy", lambda: True)

    def environment(files: int) -> dict[str, str]:
        monkeypatch.setattr(resource, "getrlimit", lambda _: (files, files))
        every = proxy_environment(ROOT)
        return {
            name: value
            for name, value in every.items()
            if str(ROOT) not in value
            and not name.endswith(("STATS_PORT", "METRICS_PORT", "PROXY_HTTP_PORT"))
        }

    return environment


@pytest.mark.parametrize("files", [1024, 4096, 16_000])
def test_nodes_that_others_start_are_told_what_ours_are(
    files: int, environment_of: Callable[[int], dict[str, str]]
):
    shown = source_environment({}, files)
    ours = environment_of(files)
    assert {name: value for name, value in shown.items() if name.startswith("RAY_SERVE")} == ours
    assert int(ours["RAY_SERVE_HAPROXY_MAXCONN"]) * 2.5 < files
    assert shown["files"] == str(files)
    assert shown["RAY_AUTH_MODE"] == "token"
    assert shown["folder"] == str(ROOT)
    assert shown["PATH"].startswith(f"{ROOT}/.venv/bin:")
    assert shown["PYTHONPATH"] == str(ROOT)


def test_what_a_node_was_told_before_stays():
    settings = {
        "RAY_SERVE_ENABLE_HA_PROXY": "0",
        "RAY_AUTH_MODE": "disabled",
        "PYTHONPATH": "/own",
        "UV_PROJECT_ENVIRONMENT": "/image",
    }
    shown = source_environment(settings, 1024)
    assert shown["RAY_SERVE_ENABLE_HA_PROXY"] == "0"
    assert shown["RAY_AUTH_MODE"] == "disabled"
    assert shown["PYTHONPATH"] == f"{ROOT}:/own"
    assert shown["PATH"].startswith("/image/bin:")


def rayservice_faults(manifest: Mapping[str, Any]) -> list[str]:
    validator = jsonschema.Draft202012Validator(json.loads(RAYSERVICE_SCHEMA.read_text()))
    return [f"{fault.json_path}: {fault.message}" for fault in validator.iter_errors(manifest)]


def test_kubernetes_takes_the_rayservice():
    manifest = read(KUBERAY)
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", "RayService")
    assert rayservice_faults(manifest) == []

    (workers,) = manifest["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    workers["numOfHost"] = workers.pop("numOfHosts")
    workers["maxReplicas"] = "2"
    assert len(rayservice_faults(manifest)) == 2


def test_rayservice_serves_the_32b_config_on_slices_of_its_size():
    spec = read(KUBERAY)["spec"]
    served = yaml.safe_load(spec["serveConfigV2"])
    ServeDeploySchema.model_validate(served)
    path = ROOT / "configs" / "qwen3-32b-v6e-16.yaml"
    assert served["applications"] == read(path)["applications"]

    config = served_config(path)
    (workers,) = spec["rayClusterConfig"]["workerGroupSpecs"]
    pod = workers["template"]["spec"]
    (container,) = pod["containers"]
    assert workers["numOfHosts"] == config.nnodes
    chips = int(container["resources"]["limits"]["google.com/tpu"])
    assert chips * workers["numOfHosts"] == config.tp_size
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "4x4"
    assert workers["minReplicas"] < workers["maxReplicas"]


def test_rayservice_runs_our_ray_with_token_redis_and_haproxy(
    environment_of: Callable[[int], dict[str, str]],
):
    cluster = read(KUBERAY)["spec"]["rayClusterConfig"]
    (version,) = re.findall(
        r"^ray==(\S+)", (ROOT / "requirements-tpu.lock").read_text(), flags=re.MULTILINE
    )
    assert cluster["rayVersion"] == version
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["gcsFaultToleranceOptions"]["redisAddress"]
    # KubeRay lets a pod's processes open so many files.
    expected = environment_of(65_536)
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for group in groups:
        (container,) = group["template"]["spec"]["containers"]
        told = {variable["name"]: variable["value"] for variable in container["env"]}
        assert {name: told[name] for name in told if name.startswith("RAY_SERVE")} == expected
