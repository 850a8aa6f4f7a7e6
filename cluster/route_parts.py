"""What routes that generate have in common: who asks, and the answer's way back."""

from collections.abc import AsyncGenerator

from fastapi import Request
from fastapi.responses import Response

from cluster.gate import service_of
from cluster.openai.engine_client import Caller
from cluster.openai.sse import DONE, AnswerResponse
from engine.errors import RequestError

SESSION_HEADER = "x-session-id"
"""Requests that have the same go to the same engine where that is possible."""

_MAX_SESSION_CHARS = 128
_NOT_LEAVING_HEADER = "x-request-disconnect-disabled"


def caller_of(request: Request) -> Caller:
    """Who sends a request.

    Raises:
        RequestError: Serve would not tell that such a client is gone.
    """
    if _NOT_LEAVING_HEADER in request.headers:
        # Its answer would be generated on.
        raise RequestError(f"{_NOT_LEAVING_HEADER} is not supported.", param=_NOT_LEAVING_HEADER)
    session = request.headers.get(SESSION_HEADER)
    return Caller(
        tenant=request.state.tenant,
        # Many are remembered, and a header may be long.
        session=session[:_MAX_SESSION_CHARS] if session else None,
    )


def answer_with(
    request: Request,
    parts: AsyncGenerator[bytes, None],
    request_id: str,
    *,
    is_stream: bool,
    end: bytes = DONE,
) -> Response:
    """Send what a generator yields, and `end` after a stream that was not broken."""
    return AnswerResponse(
        parts,
        is_stream=is_stream,
        request_id=request_id,
        describe_failure=service_of(request).describe_stream_failure,
        end=end,
    )
