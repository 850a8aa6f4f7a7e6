"""Everything at once, on one machine: Serve, a router, a leader, and a gang of two processes.

The model is tiny and random, so its text means nothing; that it is the very text which one process
without Ray generates is what counts.
"""

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import msgspec
import openai
import psutil
import pytest
import ray
import ray._private.worker
from dashboards import own_expressions, ray_expressions, series_in
from jax.profiler import ProfileData
from processes import descendants, listens
from prometheus_server import run_prometheus
from ray import serve
from ray.serve.config import HTTPOptions
from tiny_tokenizer import write_tiny_tokenizer

import serve_app
from cluster.engine_choice import Route
from cluster.metrics import ENGINE_METRICS, ray_name
from cluster.openai.engine_client import EngineInfo
from cluster.ray_node import has_haproxy
from engine.config import EngineConfig
from engine.llm import LLM, Completion
from engine.request import SamplingParams
from engine.stats import EngineStats
from engine.text.chat_template import load_chat_template
from engine.text.tokenizer import load_tokenizer
from tests.e2e.mixed_load import MixedLoad, leftovers_of, make_works

DATA = Path(__file__).parents[1] / "data"
MESSAGES = [{"role": "user", "content": "Tell me a story."}]
TIMEOUT_S = 120

# Not slow by its mark, so that an older Python serves a whole cluster, too.
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    for path in (DATA / "tiny-qwen2").iterdir():
        shutil.copy(path, directory / path.name)
    return write_tiny_tokenizer(directory)


@pytest.fixture(scope="module")
def args(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    return {
        "model_path": str(checkpoint),
        "served_model_name": "tiny",
        "device": "cpu",
        "dtype": "float32",
        "tp_size": 2,
        "nnodes": 2,
        "context_length": 256,
        "max_total_tokens": 2048,
        "max_running_requests": 4,
        "chunked_prefill_size": 32,
        "profile_dir": str(tmp_path_factory.mktemp("traces")),
    }


@pytest.fixture(scope="module")
def base_url(local_ray: None, args: dict[str, object]) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    serve.start(
        http_options=HTTPOptions(host="127.0.0.1", port=port),
        tracing_config={"enabled": True, "sampling_ratio": 1.0},
    )
    serve.run(serve_app.build(args), name="tiny", route_prefix="/")
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()


@pytest.fixture(scope="module")
def logs(local_ray: None) -> Path:
    """What /tmp/ray/session_latest/logs is for a Ray that was started by `ray start`."""
    node = ray._private.worker._global_node
    assert node is not None
    return Path(node.get_logs_dir_path())


@pytest.fixture
async def client(base_url: str) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(
        base_url=f"{base_url}/v1", api_key="EMPTY", timeout=TIMEOUT_S, max_retries=0
    ) as client:
        yield client


async def engine_stats() -> EngineStats:
    handle = serve.get_deployment_handle("Engine", app_name="tiny")
    return msgspec.msgpack.decode(
        await handle.describe.remote(route=Route()), type=EngineInfo
    ).stats


async def stream_text(
    client: openai.AsyncOpenAI,
    max_tokens: int = 40,
    on_text: Callable[[], None] = lambda: None,
) -> str:
    stream = await client.chat.completions.create(
        model="tiny",
        messages=MESSAGES,  # type: ignore[arg-type]
        max_tokens=max_tokens,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    text = ""
    async for chunk in stream:
        if content := chunk.choices[0].delta.content:
            text += content
            on_text()
    return text


async def complete(client: openai.AsyncOpenAI, max_tokens: int, **sampling: float) -> str:
    completion = await client.chat.completions.create(
        model="tiny",
        messages=MESSAGES,  # type: ignore[arg-type]
        max_tokens=max_tokens,
        extra_body={"ignore_eos": True, **sampling},
    )
    return completion.choices[0].message.content or ""


@pytest.fixture(scope="module")
def reference(checkpoint: Path, args: dict[str, object]) -> Completion:
    """What one process answers to MESSAGES."""
    tokenizer = load_tokenizer(checkpoint)
    template = load_chat_template(checkpoint, tokenizer)
    assert template is not None
    config = EngineConfig.model_validate({**args, "nnodes": 1, "tp_size": 1})
    with LLM(config) as llm:
        sampling = SamplingParams(
            temperature=0.0, max_tokens=40, ignore_eos=True, prompt_logprobs=2
        )
        return llm.generate(
            [template.render(MESSAGES, add_generation_prompt=True, kwargs={})], sampling
        )[0]


@pytest.fixture
def expected_text(reference: Completion) -> str:
    return reference.text


async def test_two_hosts_stream_the_text_of_one_process(base_url, client, expected_text):
    assert await stream_text(client) == expected_text


async def test_an_echoed_prompt_has_the_logprobs_of_one_process(client, reference):
    answer = await client.completions.create(
        model="tiny", prompt=reference.prompt_token_ids, max_tokens=1, echo=True, logprobs=2
    )
    got = answer.choices[0].logprobs.token_logprobs
    expected = [one.logprob for one in reference.prompt_logprobs]
    assert got[0] is None
    assert got[1:-1] == pytest.approx(expected, abs=1e-3)


async def test_readiness_names_every_rank(base_url):
    state = httpx.get(f"{base_url}/health/ready").raise_for_status().json()
    assert [rank["state"] for rank in state["ranks"]] == ["ready", "ready"]


def test_an_answer_has_one_request_id(base_url):
    body = {"model": "tiny", "messages": MESSAGES, "max_tokens": 1}
    response = httpx.post(f"{base_url}/v1/chat/completions", json=body, timeout=TIMEOUT_S)
    assert response.status_code == 200
    assert len(response.headers.get_list("x-request-id")) == 1


@pytest.mark.parametrize(
    ("files", "line"),
    [
        ("serve/replica_*_Engine_*.log", "Epoch 1 serves after"),
        ("serve/replica_*_Router_*.log", "Router takes requests for tiny"),
        ("worker-*.err", "rank 1 is ready after"),
    ],
)
def test_logs_lie_where_the_troubleshooting_page_says(base_url, logs: Path, files: str, line: str):
    assert any(line in path.read_text() for path in logs.glob(files))


WEATHER = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Berlin", "Oslo"]},
        "degrees": {"type": "integer", "minimum": -40, "maximum": 50},
        "is_windy": {"type": "boolean"},
    },
    "required": ["city", "degrees", "is_windy"],
    "additionalProperties": False,
}


async def answer_in_json(client: openai.AsyncOpenAI, seed: int, *, is_stream: bool) -> str:
    """An answer in JSON of a model that knows none."""
    answer = await client.chat.completions.create(
        model="tiny",
        messages=MESSAGES,  # type: ignore[arg-type]
        max_tokens=100,
        seed=seed,
        stream=is_stream,  # type: ignore[arg-type]
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "weather", "strict": True, "schema": WEATHER},
        },
    )
    if not is_stream:
        return answer.choices[0].message.content
    return "".join([chunk.choices[0].delta.content or "" async for chunk in answer])


async def test_answers_follow_a_schema_beside_others_that_do_not(client, expected_text):
    texts, *others = await asyncio.gather(
        asyncio.gather(*(answer_in_json(client, seed, is_stream=False) for seed in range(4))),
        stream_text(client),
        stream_text(client),
    )
    for text in texts:
        jsonschema.validate(json.loads(text), WEATHER)
    assert others == [expected_text] * 2
    again = [await answer_in_json(client, seed, is_stream=True) for seed in range(4)]
    assert again == texts
    assert (await engine_stats()).compiles_total == 0


async def test_many_clients_at_once_each_get_their_own_text(client, expected_text):
    texts = await asyncio.gather(*(stream_text(client, 20 + index) for index in range(12)))
    for index, text in enumerate(texts):
        assert expected_text.startswith(text[:-1]), index


async def test_responses_are_kept_by_the_leader_and_cancelled_through_it(client):
    fields = {"model": "tiny", "temperature": 0, "max_output_tokens": 16}
    first = await client.responses.create(input=MESSAGES, **fields)
    assert first.store
    second = await client.responses.create(
        input="Go on.", previous_response_id=first.id, stream=True, **fields
    )
    *_, ended = [event async for event in second]
    assert ended.type == "response.incomplete"
    # The conversation before it is the prompt's beginning, which the engine had cached.
    assert ended.response.usage.input_tokens_details.cached_tokens >= 16
    assert await client.responses.retrieve(ended.response.id) == ended.response
    await client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        await client.responses.retrieve(first.id)

    stream = await client.responses.create(
        **fields | {"max_output_tokens": 200}, input="Hello", stream=True
    )
    created = await anext(aiter(stream))
    cancelled = await client.responses.cancel(created.response.id)
    assert (cancelled.status, cancelled.id) == ("cancelled", created.response.id)
    *_, last = [event async for event in stream]
    assert last.type == "error"
    async with asyncio.timeout(TIMEOUT_S):
        while (await engine_stats()).num_pages_used:
            await asyncio.sleep(0.05)


async def test_a_response_in_the_background_is_read_again_from_any_event(client):
    fields = {"model": "tiny", "temperature": 0, "max_output_tokens": 100}
    whole = await client.responses.create(input="Hello", **fields)
    stream = await client.responses.create(input="Hello", background=True, stream=True, **fields)
    seen = []
    async for event in stream:
        seen.append(event)
        if event.type == "response.output_text.delta":
            break
    await stream.close()
    response_id, number = seen[0].response.id, seen[-1].sequence_number
    rest = await client.responses.retrieve(response_id, stream=True, starting_after=number)
    seen += [event async for event in rest]
    assert [event.sequence_number for event in seen] == list(range(len(seen)))
    texts = [event.delta for event in seen if event.type == "response.output_text.delta"]
    assert "".join(texts) == whole.output_text == seen[-1].response.output_text
    kept = await client.responses.retrieve(response_id)
    assert (kept.status, kept.output_text) == (whole.status, whole.output_text)


async def test_a_response_in_the_background_outlives_its_router(client):
    fields = {"model": "tiny", "temperature": 0, "max_output_tokens": 150}
    whole = await client.responses.create(input="Once", **fields)
    response = await client.responses.create(input="Once", background=True, **fields)
    for process in descendants():
        if "Router" in " ".join(process.cmdline()):
            process.kill()
    async with asyncio.timeout(TIMEOUT_S):
        while True:
            # Until a router is there again, and the lease of the one that is gone has run out.
            try:
                response = await client.responses.retrieve(response.id)
            except openai.APIError:
                await asyncio.sleep(0.5)
                continue
            if response.status not in ("queued", "in_progress"):
                break
            await asyncio.sleep(0.5)
    assert response.error is None
    assert (response.status, response.output_text) == (whole.status, whole.output_text)


async def test_a_client_that_goes_away_frees_its_pages(client):
    stream = await client.chat.completions.create(
        model="tiny",
        messages=MESSAGES,  # type: ignore[arg-type]
        max_tokens=200,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    async for chunk in stream:
        if chunk.choices[0].delta.content:
            break
    await stream.close()
    async with asyncio.timeout(TIMEOUT_S):
        while (stats := await engine_stats()).num_running or stats.num_pages_used:
            await asyncio.sleep(0.02)
    assert stats.finished_total["abort"] >= 1


async def test_a_stop_string_ends_the_request_in_the_engine_too(client, expected_text):
    stop = expected_text[10:14]
    completion = await client.chat.completions.create(
        model="tiny",
        messages=MESSAGES,  # type: ignore[arg-type]
        max_tokens=200,
        temperature=0,
        stop=[stop],
        extra_body={"ignore_eos": True},
    )
    assert completion.choices[0].finish_reason == "stop"
    assert completion.choices[0].message.content == expected_text[: expected_text.index(stop)]
    async with asyncio.timeout(TIMEOUT_S):
        while (await engine_stats()).num_running:
            await asyncio.sleep(0.02)


async def test_requests_of_all_kinds_are_answered_right_and_leave_nothing_behind(base_url):
    load = MixedLoad(base_url, "tiny", make_works(12, num_sentences=3))
    try:
        await load.learn_answers()
        async with asyncio.timeout(TIMEOUT_S), load.asking(6):
            while load.tally.whole.total() < 30 or load.tally.left < 5:
                await asyncio.sleep(0.05)
    finally:
        await load.close()
    assert load.tally.errors == []
    assert len(load.tally.whole) >= 4
    async with httpx.AsyncClient(base_url=base_url, timeout=TIMEOUT_S) as client:
        async with asyncio.timeout(TIMEOUT_S):
            # Engines tell their figures each second; one that has leaked never tells this.
            while leftovers_of((await client.get("/fleet")).json()):
                await asyncio.sleep(0.05)


async def test_a_prompt_that_cannot_fit_is_refused_with_both_lengths(client):
    with pytest.raises(openai.BadRequestError, match=r"tokens.*256"):
        await client.completions.create(model="tiny", prompt="word " * 400)


async def test_every_rank_writes_a_trace_of_the_steps_asked_for(base_url, client, args):
    httpx.post(f"{base_url}/start_profile", json={"num_steps": 5}).raise_for_status()
    directory = Path(str(args["profile_dir"]))

    async def traces() -> list[Path]:
        await stream_text(client)  # A trace begins and ends with steps.
        return list(directory.rglob("*.xplane.pb"))

    async with asyncio.timeout(TIMEOUT_S):
        while len(paths := await traces()) < 2:
            pass
    assert {path.relative_to(directory).parts[0] for path in paths} == {"rank-0", "rank-1"}
    for path in paths:
        planes = ProfileData.from_file(str(path)).planes
        steps = {
            dict(event.stats)["step_num"]
            for plane in planes
            for line in plane.lines
            for event in line.events
            if event.name == "step"
        }
        # The step during which a trace begins may be missing, and some come while it is ended.
        assert len(steps) >= 4
        assert sorted(steps) == list(range(min(steps), max(steps) + 1))


def test_haproxy_stands_in_front_where_ray_has_it(base_url):
    port = httpx.URL(base_url).port
    assert port is not None
    listening = {name for process, name in descendants().items() if listens(process, port)}
    assert listening == ({"haproxy"} if has_haproxy() else {"ray::ProxyActor"})


def timelines(logs: Path) -> dict[str, dict[str, Any]]:
    """What requests have left in the logs of this application's routers, by their ids.

    Other tests' applications lie in the same folder, some of whose logs are JSON.
    """
    lines = [
        line
        for path in logs.glob("serve/replica_tiny_Router_*.log")
        for line in path.read_text().splitlines()
        if "timeline {" in line
    ]
    records = [json.loads(line[line.index("{") :]) for line in lines]
    return {record["request_id"]: record for record in records}


def router_spans(logs: Path) -> list[dict[str, Any]]:
    """The spans that this application's routers have written so far, the last perhaps not yet."""
    return [
        json.loads(span)
        for path in logs.glob("serve/spans/*Router*_tracing.json")
        for span in re.findall(r"^\{.*?^\}", path.read_text(), re.M | re.S)
    ]


def _response_id(span: dict[str, Any]) -> str | None:
    return span["attributes"].get("gen_ai.response.id")


async def test_a_request_leaves_its_timeline_in_the_log_and_its_spans_in_serves_trace(
    client: openai.AsyncOpenAI, logs: Path
) -> None:
    answer = await client.chat.completions.create(
        model="tiny",
        messages=MESSAGES,  # type: ignore[arg-type]
        max_tokens=5,
        extra_body={"ignore_eos": True},
    )
    async with asyncio.timeout(TIMEOUT_S):
        while not (timeline := timelines(logs).get(answer.id)):
            await asyncio.sleep(0.05)
    (choice,) = timeline["choices"]
    (visit,) = choice["visits"]
    assert (choice["tokens"], choice["finish_reason"]) == (5, "length")
    assert (visit["epoch"], visit["attempt"], visit["preemptions"]) == (1, 0, 0)
    assert 0 <= visit["queued_ms"] + visit["prefill_ms"] <= visit["first_token_ms"]
    assert visit["first_token_ms"] <= choice["ended_ms"] <= timeline["ended_ms"]

    request, spans = None, []
    async with asyncio.timeout(TIMEOUT_S):
        while request is None:
            await asyncio.sleep(0.05)
            spans = router_spans(logs)
            request = next((span for span in spans if _response_id(span) == answer.id), None)
    assert request["parent_id"] in {span["context"]["span_id"] for span in spans}
    phases = [span for span in spans if span["parent_id"] == request["context"]["span_id"]]
    assert [span["name"] for span in phases] == ["queued", "prefill", "decode"]


@pytest.mark.skipif(
    shutil.which("prometheus") is None, reason="needs Prometheus: apt-get install prometheus"
)
async def test_every_panel_has_data_in_a_prometheus_that_scrapes_this(
    base_url: str, client: openai.AsyncOpenAI, tmp_path: Path
) -> None:
    nodes = [node for node in ray.nodes() if node["Alive"]]
    panels = own_expressions()
    rays = [expression for expression in ray_expressions() if _can_have_data(expression)]
    assert len(rays) > 20
    with run_prometheus(
        tmp_path,
        ray_targets=[f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}" for node in nodes],
        router=base_url.removeprefix("http://"),
    ) as prometheus:
        missing = [*panels, *rays]
        deadline_s = time.monotonic() + TIMEOUT_S
        while missing := prometheus.without_data(missing):
            assert time.monotonic() < deadline_s, missing
            # Rates need what changes between two scrapes.
            await complete(client, 20)
        assert prometheus.health_of_targets() == {"ray": ["up"] * len(nodes), "qwen-on-ray": ["up"]}
        assert set(prometheus.alerts().values()) == {"inactive"}
        assert prometheus.query("sum(vllm:generation_tokens_total)")[0] > 0
        by_ray = prometheus.query("ray_vllm_cache_config_info")
        assert by_ray == prometheus.query("vllm:cache_config_info") == [1.0]


def _can_have_data(expression: str) -> bool:
    listed = {ray_name(series) for metric in ENGINE_METRICS for series in metric.series}
    # Sums over days begin with the second day.
    return series_in(expression) <= listed and not re.search(r"\[(24h|1d|1w)", expression)


def rank_processes() -> list[psutil.Process]:
    """The gang's processes under this test's own Ray."""
    return [
        process for process, name in descendants().items() if name.startswith("ray::HostWorker")
    ]


async def test_what_runs_on_a_killed_rank_goes_on_as_if_nothing_had_happened(client):
    sampled = {"temperature": 1.0, "seed": 7}
    whole = await stream_text(client, 200)
    whole_sampled = await complete(client, 200, **sampled)
    victims = rank_processes()
    assert len(victims) == 2

    def kill_a_rank() -> None:
        if victims:
            os.kill(victims.pop().pid, signal.SIGKILL)
            victims.clear()

    streamed, answered = await asyncio.gather(
        stream_text(client, 200, on_text=kill_a_rank), complete(client, 200, **sampled)
    )
    assert not victims
    assert streamed == whole
    assert answered == whole_sampled
    assert len(rank_processes()) == 2


def test_the_leader_and_the_routers_hold_no_jax(base_url):
    for process, name in descendants().items():
        if name.startswith("ray::ServeReplica"):
            assert "jaxlib" not in Path(f"/proc/{process.pid}/maps").read_text()


async def test_nothing_was_compiled_while_all_this_was_served(base_url):
    async with httpx.AsyncClient(base_url=base_url, timeout=TIMEOUT_S) as client:
        async with asyncio.timeout(TIMEOUT_S):
            # Routers ask the engine each second: this is after its last start.
            while (await shown(client, "engine_up")) != 1:
                await asyncio.sleep(0.1)
        assert await shown(client, "engine_steps_total") > 0
        assert await shown(client, "engine_compiles_total") == 0


async def test_what_a_killed_rank_has_cost_is_told(base_url, logs: Path):
    async with httpx.AsyncClient(base_url=base_url, timeout=TIMEOUT_S) as client:
        assert await shown(client, "engine_epoch") == 2
        assert await shown(client, "engine_restarts_total", 'cause="died",') == 1
        # The stream and the whole answer; they may have been turned away while it restarted.
        assert await shown(client, "engine_requests_moved_total") >= 2
        assert await shown(client, "router_choices_moved_total") >= 2
    visits = [
        choice["visits"]
        for timeline in timelines(logs).values()
        for choice in timeline["choices"]
        if len(choice["visits"]) > 1
    ]
    assert visits
    for first, last in visits:
        assert first["attempt"] < last["attempt"]
        assert (first["epoch"], last["epoch"]) == (1, 2)


async def shown(client: httpx.AsyncClient, name: str, labels: str = "") -> float:
    """The value of a series of this project's own, which has one, at /metrics."""
    text = (await client.get("/metrics")).text
    values = re.findall(rf"^qwen_on_ray:{name}\{{{labels}.*\}} (\S+)", text, re.M)
    assert len(values) == 1, f"{name}: {values}"
    return float(values[0])
