"""Every error as OpenAI's error object: the one place where exceptions become HTTP."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from cluster.openai.schema import ErrorDescription, ErrorResponse
from engine.errors import (
    EngineBusyError,
    EngineError,
    QwenOnRayError,
    RequestError,
    RequestGivenUpError,
)

BUSY_RETRY_AFTER_S = 1
NOT_READY_RETRY_AFTER_S = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorReply:
    """An error as it goes to the client."""

    status: int
    error: ErrorDescription
    headers: Mapping[str, str] = field(default_factory=dict)

    def json(self) -> bytes:
        return ErrorResponse(error=self.error).model_dump_json().encode()


def describe_error(error: QwenOnRayError) -> ErrorReply:
    """Say what a client should be told of an error that this project raised."""
    if isinstance(error, RequestError):
        headers = {"WWW-Authenticate": "Bearer"} if error.status == 401 else {}
        return describe_status(
            error.status, str(error), param=error.param, code=error.code, headers=headers
        )
    if isinstance(error, EngineBusyError):
        return ErrorReply(
            status=error.status,
            error=ErrorDescription(
                message=str(error),
                type="rate_limit_error",
                param=None,
                code="rate_limit_exceeded",
            ),
            # Whole seconds, by RFC 9110; less than what is left would only be refused again.
            headers={"Retry-After": str(math.ceil(error.retry_after_s or BUSY_RETRY_AFTER_S))},
        )
    if isinstance(error, RequestGivenUpError):
        return ErrorReply(
            status=error.status,
            error=ErrorDescription(
                message=str(error), type="server_error", param=None, code="request_given_up"
            ),
            # OpenAI's clients send a request again after any status above 499 that does not say so.
            headers={"x-should-retry": "false"},
        )
    status = error.status if isinstance(error, EngineError) else 503
    return ErrorReply(
        status=status,
        error=ErrorDescription(
            message=str(error), type="server_error", param=None, code="service_unavailable"
        ),
        headers={"Retry-After": str(NOT_READY_RETRY_AFTER_S)},
    )


def describe_status(
    status: int,
    message: str,
    *,
    param: str | None = None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> ErrorReply:
    """Describe what is wrong with a request that has no exception of its own (an unknown route)."""
    return ErrorReply(
        status=status,
        error=ErrorDescription(
            message=message, type="invalid_request_error", param=param, code=code
        ),
        headers=headers or {},
    )


def internal_error() -> ErrorReply:
    """Describe a fault of ours; the log has what it was, the client has no use for it."""
    return ErrorReply(
        status=500,
        error=ErrorDescription(
            message="The server made an error; its log says which.",
            type="server_error",
            param=None,
            code="internal_error",
        ),
    )
