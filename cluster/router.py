"""The HTTP routes, and the Serve deployment that stands at them. No JAX, and nothing but routes.

`create_app` needs no Ray: a test gives it a service over an engine of its own.
"""

import asyncio
import logging
import os
import random
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import ray.util
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException

from cluster.api_keys import ApiKeys
from cluster.engine_link import EngineLink
from cluster.fleet_page import PAGE_PATH, FleetState, PageFiles
from cluster.gate import (
    Gate,
    on_bad_parameter,
    on_fault,
    on_http_error,
    on_own_error,
    service_of,
)
from cluster.inspection_routes import add_inspection_routes
from cluster.metrics import ROUTER_METRICS
from cluster.openai.body import parse_body
from cluster.openai.heading import make_request_id
from cluster.openai.http import read_body
from cluster.openai.openapi import EVENTS, body_reference, body_schemas, describe_app
from cluster.openai.schema import (
    ChatCompletion,
    ChatCompletionRequest,
    Completion,
    CompletionRequest,
    EmbeddingList,
    EmbeddingRequest,
    ErrorResponse,
    ModelCard,
    ModelList,
    ProfileRequest,
    ProfileStatus,
)
from cluster.ray_metrics import RayMetrics
from cluster.ray_node import warn_of_missing_haproxy
from cluster.request_router import list_running
from cluster.response_routes import add_response_routes, responses_of
from cluster.response_service import ResponseService
from cluster.route_parts import answer_with, caller_of
from cluster.server_info import project_version
from cluster.service import OpenAIService
from cluster.status import read_all
from cluster.user_config import ROUTER_SETTINGS, UserConfig
from cluster.watched_tasks import WatchedTasks
from engine.config import EngineConfig, parse_config
from engine.errors import QwenOnRayError
from engine.hub import resolve_tokenizer
from engine.text.chat_template import load_chat_template
from engine.text.tokenizer import load_tokenizer

logger = logging.getLogger(__name__)

ROUTER_ENVIRONMENT = MappingProxyType(
    {
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
        "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    }
)
"""Of a router's process.

Serve runs a replica's code and its handles in threads of their own, so that code that blocks does
no harm; each token would change threads twice. Ours does not block: it tokenizes in threads.
"""


def create_app(service: OpenAIService) -> FastAPI:
    """Make the app that answers with `service`."""
    app = FastAPI(
        title="qwen-on-ray",
        description="OpenAI's API for Qwen models, served with JAX under Ray.",
        version=project_version(),
        responses={"4XX": {"model": ErrorResponse}, "5XX": {"model": ErrorResponse}},
    )
    app.state.service = service
    app.state.responses = ResponseService(service)
    _add_routes(app)
    app.add_middleware(Gate)
    app.add_exception_handler(QwenOnRayError, on_own_error)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(RequestValidationError, on_bad_parameter)
    app.add_exception_handler(Exception, on_fault)
    schemas = body_schemas()
    app.openapi = lambda: describe_app(app, schemas, service.config.model_names)
    return app


def _add_routes(app: FastAPI) -> None:
    @app.post(
        "/v1/chat/completions",
        response_model=ChatCompletion,
        responses=EVENTS,
        openapi_extra=body_reference(ChatCompletionRequest),
    )
    async def create_chat_completion(request: Request) -> Response:
        body = parse_body(ChatCompletionRequest, await read_body(request))
        request_id = make_request_id("chatcmpl-")
        parts = service_of(request).chat(body, request_id, caller_of(request))
        return answer_with(request, parts, request_id, is_stream=body.stream)

    @app.post(
        "/v1/completions",
        response_model=Completion,
        responses=EVENTS,
        openapi_extra=body_reference(CompletionRequest),
    )
    async def create_completion(request: Request) -> Response:
        body = parse_body(CompletionRequest, await read_body(request))
        request_id = make_request_id("cmpl-")
        parts = service_of(request).complete(body, request_id, caller_of(request))
        return answer_with(request, parts, request_id, is_stream=body.stream)

    @app.post(
        "/v1/embeddings",
        response_model=EmbeddingList,
        openapi_extra=body_reference(EmbeddingRequest),
    )
    async def create_embeddings(request: Request) -> Response:
        """The hidden states of the inputs' last tokens, each of length one."""
        body = parse_body(EmbeddingRequest, await read_body(request))
        request_id = make_request_id("embd-")
        parts = service_of(request).embed(body, request_id, caller_of(request))
        return answer_with(request, parts, request_id, is_stream=False)

    @app.get("/v1/streams/{request_id}", responses=EVENTS)
    async def resume_stream(request: Request, request_id: str) -> Response:
        """The rest of an answer whose connection broke, from the event in Last-Event-ID on.

        `request_id` is the `id` in the answer's objects; the key is the one that asked for it.
        """
        service, caller = service_of(request), caller_of(request)
        recalled = await service.recall(request_id, request.headers.get("last-event-id"), caller)
        is_stream = recalled.body.stream
        if recalled.response is not None:
            parts = responses_of(request).resume(recalled, caller)
            return answer_with(request, parts, request_id, is_stream=is_stream, end=b"")
        parts = service.resume(recalled, caller)
        return answer_with(request, parts, request_id, is_stream=is_stream)

    @app.get("/v1/models")
    async def list_models(request: Request) -> ModelList:
        return await service_of(request).models()

    @app.get("/v1/models/{model_id:path}")
    async def retrieve_model(request: Request, model_id: str) -> ModelCard:
        return await service_of(request).model(model_id)

    @app.get("/health")
    async def health(request: Request) -> JSONResponse:
        """200 while requests are served, or held until an engine is ready."""
        info = await service_of(request).engine.engine_info()
        return JSONResponse(
            {"status": "ready" if info.is_ready else "starting", "detail": info.status}
        )

    @app.get("/health/ready")
    async def ready(request: Request) -> JSONResponse:
        """200 only if every rank of some engine answered lately."""
        info = await service_of(request).engine.engine_info()
        state = {
            "is_ready": info.is_ready,
            "status": info.status,
            "ranks": [asdict(rank) for rank in info.ranks],
        }
        return JSONResponse(state, status_code=200 if info.is_ready else 503)

    @app.post(
        "/start_profile",
        response_model=ProfileStatus,
        openapi_extra=body_reference(ProfileRequest, is_required=False),
    )
    async def start_profile(request: Request) -> ProfileStatus:
        """Trace the engine's next steps by JAX's profiler, below --profile-dir on every host."""
        body = parse_body(ProfileRequest, await read_body(request) or b"{}")
        return await service_of(request).profile(body.num_steps)

    @app.post("/stop_profile")
    async def stop_profile(request: Request) -> ProfileStatus:
        """End a trace before its steps were taken; one that has ended is left alone."""
        return await service_of(request).profile(0)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics(request: Request) -> Response:
        return Response(await service_of(request).exposition(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/fleet")
    async def fleet(request: Request) -> FleetState:
        """How each engine is, with what happened to them lately; what the page at / shows."""
        return await service_of(request).fleet()

    add_response_routes(app)
    add_inspection_routes(app)
    page = PageFiles()

    @app.get(PAGE_PATH, include_in_schema=False)
    async def show_page() -> Response:
        return page.index()

    @app.get("/page/{name}", include_in_schema=False)
    async def page_file(name: str) -> Response:
        response = page.file(name)
        if response is None:
            raise HTTPException(404)
        return response


def _warn_of_missing_environment() -> None:
    """Say that an override has left out what routers run faster with."""
    if all(os.environ.get(name) == value for name, value in ROUTER_ENVIRONMENT.items()):
        return
    missing = ", ".join(f'{name}: "{value}"' for name, value in ROUTER_ENVIRONMENT.items())
    logger.warning(
        "The ray_actor_options of this router replaced those of the program, its environment among "
        "them; without it a streamed token takes about twice the CPU. Add to them "
        "runtime_env: {env_vars: {%s}}.",
        missing,
    )


def make_service(config: EngineConfig, engine: EngineLink, router_id: str) -> OpenAIService:
    """Read tokenizer, template and keys, and put them together; blocks while they download.

    Raises:
        ConfigError, CheckpointError: Something of them is missing or unreadable.
    """
    directory = resolve_tokenizer(
        config.model_path,
        config.tokenizer_path,
        revision=config.revision,
        download_dir=config.download_dir,
    )
    tokenizer = load_tokenizer(directory)
    template_file = Path(config.chat_template) if config.chat_template else None
    template = load_chat_template(directory, tokenizer, template_file=template_file)
    return OpenAIService(
        config=config,
        tokenizer=tokenizer,
        template=template,
        engine=engine,
        router_id=router_id,
    )


@serve.deployment
@serve.ingress()
class Router:
    """One router replica: the routes above, over a link to the engine's deployment.

    Args:
        config: Fields of `EngineConfig` that differ from their defaults.
        engine: Handle of the deployment of `cluster.replica.Engine`.
    """

    async def __init__(self, config: Mapping[str, Any], engine: DeploymentHandle) -> None:
        parsed = parse_config(config)
        context = serve.get_replica_context()
        router_id = context.replica_id.unique_id
        self._user_config = UserConfig(
            parsed,
            deployment="Router",
            settings=ROUTER_SETTINGS,
            replica=(context.app_name, router_id),
        )
        warn_of_missing_haproxy()
        _warn_of_missing_environment()
        self._link = EngineLink(
            engine,
            bind_host=ray.util.get_node_ip_address(),
            silence_timeout_s=parsed.host_timeout_s,
            hold_timeout_s=parsed.hold_timeout_s,
            # Two routers must not give the same seeds, or equal prompts would get equal answers.
            seeds=random.Random(f"{parsed.random_seed}/{context.rank.rank}"),
            read_statuses=partial(read_all, context.app_name),
            list_running=partial(list_running, engine),
            may_sleep=parsed.fewest_engines == 0,
            keeps_responses=parsed.max_stored_responses > 0,
        )
        try:
            self.service = await asyncio.to_thread(make_service, parsed, self._link, router_id)
        except BaseException:
            await self._link.close()
            raise
        self._app = create_app(self.service)
        # Half a second, for which no stream should stand still when somebody asks for it.
        await asyncio.to_thread(self._app.openapi)
        self._tasks = WatchedTasks()
        labels = {"model_name": parsed.model_names[0], "router": router_id}
        metrics = RayMetrics(ROUTER_METRICS, labels)
        self._tasks.start("publish the metrics", metrics.publish_for_ever(self.service.stats))
        logger.info("Router takes requests for %s.", ", ".join(parsed.model_names))

    def __serve_build_asgi_app__(self) -> FastAPI:
        # Serve calls this after the constructor: the app can hold what only a replica has.
        return self._app

    async def reconfigure(self, user_config: object) -> None:
        """Serve's way to change a deployment without a restart; see `UserConfig.take`."""
        await self._user_config.take(user_config, self._change)

    async def _change(self, config: EngineConfig) -> None:
        keys = await asyncio.to_thread(ApiKeys.of, config.api_key_file)
        self.service.entrance.change(config, keys)

    async def check_health(self) -> None:
        """Serve's question, asked every few seconds; it replaces a replica that raises.

        Raises:
            EngineError: The link to the engine has broken for good.
        """
        self._link.check()
        self._tasks.check()
        self._user_config.is_in_service = True

    async def __del__(self) -> None:
        # Serve calls it for a constructor that failed, too, which has cleaned up by itself.
        if hasattr(self, "service"):
            await self._tasks.close()
            # Another router goes on with them.
            await self._app.state.responses.close()
            await self._link.close()
            self.service.close()
