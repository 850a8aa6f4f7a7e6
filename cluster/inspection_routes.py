"""Routes that generate nothing: tokens of a text, the server's version and its configuration."""

from functools import partial
from typing import Any

from fastapi import FastAPI, Request

from cluster.gate import service_of
from cluster.openai.body import parse_body
from cluster.openai.http import read_body
from cluster.openai.openapi import body_reference
from cluster.openai.tokenization import (
    DetokenizeAnswer,
    DetokenizeRequest,
    TokenizeAnswer,
    TokenizeRequest,
    detokenize,
    tokenize,
)
from cluster.route_parts import caller_of
from cluster.server_info import describe_server, project_version


def add_inspection_routes(app: FastAPI) -> None:
    """Add them to an app."""

    @app.post("/tokenize", openapi_extra=body_reference(TokenizeRequest))
    async def tokenize_text(request: Request) -> TokenizeAnswer:
        """The tokens of a prompt, or of a chat as its template writes it."""
        body = parse_body(TokenizeRequest, await read_body(request), unsupported={})
        service = service_of(request)
        info = await service.engine.engine_info()
        work = partial(tokenize, body=body, info=info)
        return await service.inspect_text(work, body.model, caller_of(request))

    @app.post("/detokenize", openapi_extra=body_reference(DetokenizeRequest))
    async def detokenize_text(request: Request) -> DetokenizeAnswer:
        """The text of tokens, control tokens and all."""
        body = parse_body(DetokenizeRequest, await read_body(request), unsupported={})
        service = service_of(request)
        info = await service.engine.engine_info()
        work = partial(detokenize, body=body, info=info)
        return await service.inspect_text(work, body.model, caller_of(request))

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": project_version()}

    @app.get("/get_server_info")
    async def server_info(request: Request) -> dict[str, Any]:
        """The configuration as it came out, with each engine's limits; no keys are shown."""
        service = service_of(request)
        status, engines = await service.engine.engine_info(), await service.engine.engines()
        return describe_server(service.config, status, engines)
