"""The routes of the Responses API. No JAX, and nothing but routes."""

from typing import Annotated, Literal

from fastapi import FastAPI, Query, Request
from fastapi.responses import Response

from cluster.openai.body import parse_body
from cluster.openai.heading import make_request_id
from cluster.openai.http import read_body
from cluster.openai.openapi import EVENTS, body_reference
from cluster.openai.responses_schema import (
    NO_EFFECT_ON_RESPONSES,
    UNSUPPORTED_FOR_RESPONSES,
    DeletedResponse,
    InputItemList,
    ResponseRequest,
)
from cluster.openai.responses_schema import Response as ResponseObject
from cluster.openai.stored_responses import MAX_PAGE_ITEMS, page_of
from cluster.response_service import ResponseService
from cluster.route_parts import answer_with, caller_of
from engine.errors import RequestError

RESPONSES_PATH = "/v1/responses"


def add_response_routes(app: FastAPI) -> None:
    """Add them to an app."""

    @app.post(
        RESPONSES_PATH,
        response_model=ResponseObject,
        responses=EVENTS,
        openapi_extra=body_reference(ResponseRequest),
    )
    async def create_response(request: Request) -> Response:
        body = parse_body(
            ResponseRequest,
            await read_body(request),
            unsupported=UNSUPPORTED_FOR_RESPONSES,
            no_effect=NO_EFFECT_ON_RESPONSES,
        )
        response_id = make_request_id("resp_")
        parts = responses_of(request).respond(body, response_id, caller_of(request))
        return answer_with(request, parts, response_id, is_stream=body.stream, end=b"")

    @app.get(RESPONSES_PATH + "/{response_id}", response_model=ResponseObject, responses=EVENTS)
    async def retrieve_response(
        request: Request,
        response_id: str,
        stream: bool = False,
        starting_after: Annotated[int, Query(ge=0)] | None = None,
    ) -> Response:
        """A response that was kept, or runs in the background.

        Events of the latter can be had too, from behind the one whose number is `starting_after`,
        if it was asked for with both `background` and `stream`.
        """
        responses, caller = responses_of(request), caller_of(request)
        if stream:
            parts = responses.stream(response_id, starting_after, caller)
            return answer_with(request, parts, response_id, is_stream=True, end=b"")
        if starting_after is not None:
            raise RequestError("starting_after needs stream=true.", param="starting_after")
        content = await responses.retrieve(response_id, caller)
        return Response(content, media_type="application/json")

    @app.delete(RESPONSES_PATH + "/{response_id}")
    async def delete_response(request: Request, response_id: str) -> DeletedResponse:
        await responses_of(request).delete(response_id, caller_of(request))
        return DeletedResponse(id=response_id)

    @app.post(RESPONSES_PATH + "/{response_id}/cancel", response_model=ResponseObject)
    async def cancel_response(request: Request, response_id: str) -> Response:
        """End a response that is under way; whoever reads its stream gets an error."""
        content = await responses_of(request).cancel(response_id, caller_of(request))
        return Response(content, media_type="application/json")

    @app.get(RESPONSES_PATH + "/{response_id}/input_items")
    async def list_input_items(
        request: Request,
        response_id: str,
        limit: Annotated[int, Query(ge=1, le=MAX_PAGE_ITEMS)] = 20,
        order: Literal["asc", "desc"] = "desc",
        after: str | None = None,
    ) -> InputItemList:
        """What a response was asked with, without what came before by previous_response_id."""
        items = await responses_of(request).input_items(response_id, caller_of(request))
        return page_of(items, limit=limit, is_ascending=order == "asc", after=after)


def responses_of(request: Request) -> ResponseService:
    """The responses of the request's app."""
    return request.app.state.responses
