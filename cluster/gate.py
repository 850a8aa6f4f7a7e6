"""What stands before and behind each route: key, waiting room, and an error's way to the client."""

import logging

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from cluster.fleet_page import PUBLIC_PATHS
from cluster.openai.errors import ErrorReply, describe_error, describe_status, internal_error
from cluster.service import OpenAIService
from engine.errors import QwenOnRayError

logger = logging.getLogger(__name__)

# The empty one is that of a route prefix without its slash, which is sent on to the page.
_NO_KEY_NEEDED = frozenset(("/health", "/health/ready", "", *PUBLIC_PATHS))
_FOR_ADMINS = frozenset(("/start_profile", "/stop_profile"))
_FOR_THE_ENGINE = frozenset(("/v1/chat/completions", "/v1/completions", "/v1/responses"))


def service_of(request: Request) -> OpenAIService:
    """The service that the request's app answers with."""
    return request.app.state.service


class Gate:
    """Asks for an API key, and whether there is room, before anything else is read.

    Most of a refusal's cost is in what comes after, and who refuses much has streams to send.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (path := _path(scope)) not in _NO_KEY_NEEDED:
            request = Request(scope)
            try:
                entrance = service_of(request).entrance
                request.state.tenant = entrance.check_key(
                    request.headers.get("authorization"), is_admin_needed=path in _FOR_ADMINS
                )
                if path in _FOR_THE_ENGINE and request.method == "POST":
                    entrance.check_room()
            except QwenOnRayError as error:
                await _send_error(request, describe_error(error))(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _path(scope: Scope) -> str:
    # Serve names an application's route prefix in both.
    return scope["path"].removeprefix(scope.get("root_path", ""))


def _send_error(request: Request, reply: ErrorReply) -> Response:
    service_of(request).count_request(reply.status)
    return Response(
        reply.json(),
        status_code=reply.status,
        headers=dict(reply.headers),
        media_type="application/json",
    )


async def on_own_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, QwenOnRayError)
    return _send_error(request, describe_error(error))


async def on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    messages = {
        404: f"Unknown request URL: {request.method} {request.url.path}.",
        405: f"{request.method} is not allowed for {request.url.path}.",
    }
    message = messages.get(error.status_code, error.detail)
    headers = dict(error.headers or {})
    if error.status_code == 405:
        headers["Allow"] = ", ".join(sorted(_methods_of(request)))
    return _send_error(
        request,
        describe_status(
            error.status_code,
            message,
            code="unknown_url" if error.status_code == 404 else None,
            headers=headers,
        ),
    )


def _methods_of(request: Request) -> set[str]:
    """What a path may be asked with: Starlette looks at its first route only."""
    routes = [route for route in request.app.routes if isinstance(route, Route)]
    matching = (route for route in routes if route.matches(request.scope)[0] != Match.NONE)
    return {method for route in matching for method in route.methods or ()}


async def on_bad_parameter(request: Request, error: Exception) -> Response:
    """A parameter of the address that FastAPI has refused; bodies are not its business."""
    assert isinstance(error, RequestValidationError)
    fault = error.errors()[0]
    param = str(fault["loc"][-1])
    message = f"Invalid value for {param}: {fault['msg']}; got {str(fault['input'])[:80]!r}."
    return _send_error(request, describe_status(400, message, param=param, code="invalid_value"))


async def on_fault(request: Request, error: Exception) -> Response:
    logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return _send_error(request, internal_error())
