"""Two applications of one YAML file: their models, overrides and logs, and what changes them alive.

Both have a gang of one host. They are deployed as `serve run FILE` and `serve deploy FILE` do.
"""

import asyncio
import hashlib
import json
import shutil
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
import ray
import ray._private.worker
import ray.util
from ray import serve
from ray.serve._private import api
from ray.serve.config import HTTPOptions
from ray.serve.context import _get_global_client
from ray.serve.schema import ApplicationStatus, ServeDeploySchema
from tiny_tokenizer import write_tiny_tokenizer

DATA = Path(__file__).parents[1] / "data"
TIMEOUT_S = 120
START_TIMEOUT_S = 240
POLL_S = 0.05

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def make_checkpoint(name: str, directory: Path) -> Path:
    shutil.copytree(DATA / name, directory, dirs_exist_ok=True)
    return write_tiny_tokenizer(directory)


def application(name: str, checkpoint: Path, **more: Any) -> dict[str, Any]:
    return {
        "name": name,
        "import_path": "serve_app:build",
        "route_prefix": f"/{name}",
        "args": {
            "model_path": str(checkpoint),
            "served_model_name": f"tiny-{name}",
            "device": "cpu",
            "dtype": "float32",
            "context_length": 256,
            "max_total_tokens": 2048,
            "max_running_requests": 4,
            "chunked_prefill_size": 32,
        },
        **more,
    }


@pytest.fixture(scope="module")
def applications(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What stands under `applications:` in the YAML file."""
    plain = make_checkpoint("tiny-qwen2", tmp_path_factory.mktemp("qwen2"))
    other = make_checkpoint("tiny-qwen3", tmp_path_factory.mktemp("qwen3"))
    return [
        application("qwen2", plain),
        application(
            "qwen3",
            other,
            logging_config={"encoding": "JSON"},
            deployments=[
                {"name": "Router", "num_replicas": 2, "ray_actor_options": {"num_cpus": 0.05}},
                {"name": "Engine", "logging_config": {"encoding": "JSON", "log_level": "DEBUG"}},
            ],
        ),
    ]


def deploy(applications: list[dict[str, Any]]) -> None:
    """Hand Serve the applications of a file, as `serve deploy` does."""
    client = _get_global_client()
    assert client is not None
    client.deploy_apps(ServeDeploySchema.model_validate({"applications": applications}))


async def settled(*names: str) -> None:
    """Wait until Serve says that applications run."""
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while True:
        status = serve.status().applications
        states = [status[name].status for name in names if name in status]
        if states == [ApplicationStatus.RUNNING] * len(names):
            return
        assert ApplicationStatus.DEPLOY_FAILED not in states, status
        assert time.monotonic() < deadline_s, status
        await asyncio.sleep(POLL_S)


@pytest.fixture(scope="module")
def base_url(local_ray: None, applications: list[dict[str, Any]]) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    api.serve_start(http_options=HTTPOptions(host="127.0.0.1", port=port))
    try:
        deploy(applications)
        asyncio.run(settled("qwen2", "qwen3"))
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()


@pytest.fixture
async def client(base_url: str) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=base_url, timeout=TIMEOUT_S) as client:
        yield client


@pytest.fixture(scope="module")
def logs(base_url: str) -> Path:
    node = ray._private.worker._global_node
    assert node is not None
    return Path(node.get_logs_dir_path()) / "serve"


def lines_of(logs: Path, application: str, deployment: str) -> list[str]:
    paths = logs.glob(f"replica_{application}_{deployment}_*.log")
    return [line for path in paths for line in path.read_text().splitlines()]


async def found(read: Callable[[], list[Any]]) -> list[Any]:
    """Wait for something to be there."""
    async with asyncio.timeout(TIMEOUT_S):
        while not (there := read()):
            await asyncio.sleep(POLL_S)
    return there


def body(application: str, **more: Any) -> dict[str, Any]:
    model = f"tiny-{application}"
    return {"model": model, "prompt": "hello", "max_tokens": 4, "ignore_eos": True, **more}


async def complete(client: httpx.AsyncClient, application: str, **more: Any) -> httpx.Response:
    return await client.post(f"/{application}/v1/completions", json=body(application, **more))


async def test_each_application_serves_its_own_model_below_its_own_prefix(client):
    texts = {}
    for name in ("qwen2", "qwen3"):
        (card,) = (await client.get(f"/{name}/v1/models")).json()["data"]
        assert card["id"] == f"tiny-{name}"
        answer = await complete(client, name, temperature=0, max_tokens=20)
        texts[name] = answer.raise_for_status().json()["choices"][0]["text"]
        assert (await client.get(f"/{name}/fleet")).json()["model"] == f"tiny-{name}"
        page = await client.get(f"/{name}/")
        assert "qwen-on-ray" in page.text
        assert (await client.get(f"/{name}/page/fleet.js")).status_code == 200
        metrics = (await client.get(f"/{name}/metrics")).text
        assert f'model_name="tiny-{name}"' in metrics
        assert metrics.count("model_name=") == metrics.count(f'model_name="tiny-{name}"')
    assert texts["qwen2"] != texts["qwen3"]
    other = await client.post("/qwen2/v1/completions", json=body("qwen3"))
    assert (other.status_code, other.json()["error"]["code"]) == (404, "model_not_found")


async def test_overrides_of_a_file_hold_for_the_deployment_that_they_name(base_url, logs):
    status = serve.status().applications
    assert status["qwen2"].deployments["Router"].replica_states == {"RUNNING": 1}
    assert status["qwen3"].deployments["Router"].replica_states == {"RUNNING": 2}
    lost = "ray_actor_options of this router replaced those of the program"
    await found(lambda: [line for line in lines_of(logs, "qwen3", "Router") if lost in line])
    assert not [line for line in lines_of(logs, "qwen2", "Router") if lost in line]


async def test_a_request_is_found_in_json_logs_by_both_of_its_ids(client, logs):
    answer = await complete(client, "qwen3")

    def records(deployment: str) -> list[dict[str, Any]]:
        found = map(json.loads, lines_of(logs, "qwen3", deployment))
        return [record for record in found if answer.json()["id"] in record["message"]]

    for deployment, start in (("Router", "timeline {"), ("Engine", "cmpl-")):
        (record,) = await found(partial(records, deployment))
        assert record["message"].startswith(start)
        assert record["request_id"] == answer.headers["x-request-id"]
        assert (record["application"], record["deployment"]) == ("qwen3", f"qwen3_{deployment}")


async def test_a_logging_config_holds_where_it_stands(client, logs):
    for name in ("qwen2", "qwen3"):
        await complete(client, name)
    ends = "attempt 0, ended after 4 tokens: whole"
    (line, *_) = await found(
        lambda: [line for line in lines_of(logs, "qwen3", "Engine") if ends in line]
    )
    assert json.loads(line)["levelname"] == "DEBUG"
    # Of the application's logging_config this deployment's own takes the place.
    routers = map(json.loads, lines_of(logs, "qwen3", "Router"))
    assert not [record for record in routers if record["levelname"] == "DEBUG"]
    plain = lines_of(logs, "qwen2", "Engine")
    assert [line for line in plain if line.startswith("INFO") and "Epoch 1 serves" in line]
    assert not [line for line in plain if ends in line]


def actors() -> list[str]:
    named = cast("list[dict[str, str]]", ray.util.list_named_actors(all_namespaces=True))
    return [actor["name"] for actor in named]


def replicas(application: str) -> set[str]:
    return {name for name in actors() if name.startswith(f"SERVE_REPLICA::{application}#")}


def test_hosts_have_names_that_say_whose_they_are(base_url):
    for name in ("qwen2", "qwen3"):
        (engine,) = {each.rpartition("#")[2] for each in replicas(name) if "#Engine#" in each}
        host = socket.gethostname()
        assert f"tiny-{name}/{engine}/epoch1/rank0@{host}" in actors()


def with_user_config(
    applications: list[dict[str, Any]], **user_configs: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The same applications, the first of them with a user_config for each deployment named."""
    overrides = [{"name": name, "user_config": each} for name, each in user_configs.items()]
    return [{**applications[0], "deployments": overrides}, *applications[1:]]


class Streams:
    """Streams one after the other, so that there is always one under way."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self._client = client
        self._is_over = asyncio.Event()
        self.texts: list[str] = []

    async def run(self, headers: Mapping[str, str]) -> None:
        request = body("qwen2", temperature=0, max_tokens=200, stream=True)
        while not self._is_over.is_set():
            async with self._client.stream(
                "POST", "/qwen2/v1/completions", json=request, headers=headers
            ) as answer:
                lines = [line async for line in answer.aiter_lines() if line.startswith("data: ")]
            assert (answer.status_code, lines[-1]) == (200, "data: [DONE]"), lines
            events = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
            self.texts.append("".join(event["choices"][0]["text"] for event in events))

    def end(self) -> None:
        self._is_over.set()


async def status_of(client: httpx.AsyncClient, key: str = "", **more: Any) -> int:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    answer = await client.post(
        "/qwen2/v1/completions", json=body("qwen2", max_tokens=1, **more), headers=headers
    )
    return answer.status_code


async def until(wanted: int, ask: Callable[[], Awaitable[int]]) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while await ask() != wanted:
            await asyncio.sleep(POLL_S)


async def test_a_user_config_changes_limits_keys_and_levels_of_what_goes_on_running(
    client, logs, applications, tmp_path
):
    key_file = tmp_path / "keys"
    key_file.write_text(hashlib.sha256(b"first").hexdigest())
    before = replicas("qwen2")
    streams = Streams(client)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(streams.run({"authorization": "Bearer first"}))
        await found(lambda: streams.texts)
        limits = {"max_queued_requests": 1, "api_key_file": str(key_file)}
        changes = {"Router": limits, "Engine": {"log_level": "debug"}}
        deploy(with_user_config(applications, **changes))
        await until(401, lambda: status_of(client))
        # More choices than may wait; where the stream waits, it is refused before it is read.
        await until(400, lambda: status_of(client, "first", n=2))
        await found(lambda: [line for line in lines_of(logs, "qwen2", "Engine") if "DEBUG" in line])
        streams.end()
    assert len(streams.texts) > 1
    assert set(streams.texts) == {streams.texts[0]}

    key_file.write_text(hashlib.sha256(b"second").hexdigest())
    changes["Router"] = {**limits, "api_keys_revision": 2}
    deploy(with_user_config(applications, **changes))
    await until(200, lambda: status_of(client, "second"))
    assert await status_of(client, "first") == 401

    deploy(with_user_config(applications, Router={"max_queued_requests": 0}))
    refused = "user_config of Router: --max-queued-requests=0"
    await found(lambda: [line for line in lines_of(logs, "qwen2", "Router") if refused in line])
    assert await status_of(client, "second", n=2) == 400

    deploy(with_user_config(applications, Router={}))
    await until(200, lambda: status_of(client, n=2))
    await settled("qwen2", "qwen3")
    assert replicas("qwen2") == before
