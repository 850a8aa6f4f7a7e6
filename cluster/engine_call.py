"""The end of a call to an engine over Serve: its answer, an error of ours, or silence."""

import asyncio
import logging
from typing import Any, cast

import msgspec
import ray.exceptions
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    RayServeException,
    ReplicaUnavailableError,
)
from ray.serve.handle import DeploymentResponse, DeploymentResponseGenerator

from cluster.token_socket import CallError, GenerateEnd
from engine import errors
from engine.errors import EngineError

logger = logging.getLogger(__name__)

# Serve's own failures, such as an engine that was never deployed, are no RayErrors.
CALL_FAILURES = (ray.exceptions.RayError, RayServeException)


async def answer_within(
    timeout_s: float, response: DeploymentResponse[Any] | DeploymentResponseGenerator[Any]
) -> bytes | None:
    """What an engine answers; None if it does not in time, or cannot be called."""
    try:
        # Not `wait_for`, which in Python 3.11 may answer in the place of being cancelled.
        async with asyncio.timeout(timeout_s):
            return await cast("DeploymentResponse[bytes]", response)
    except (TimeoutError, *CALL_FAILURES) as error:
        response.cancel()
        logger.debug("an engine did not answer: %r", error)
        return None


async def await_end(response: DeploymentResponse[bytes]) -> GenerateEnd:
    """The call's end; each way in which Serve and Ray report a failure becomes an error of ours."""
    try:
        return msgspec.msgpack.decode(await response, type=GenerateEnd)
    except ray.exceptions.RayActorError as error:
        # Ray's text names processes and files, which are not for clients.
        logger.info("an engine's leader died: %s", error)
        failure = CallError("EngineDiedError", "The engine's leader died.")
    except BackPressureError as error:
        failure = CallError("EngineBusyError", str(error))
    except (DeploymentUnavailableError, ReplicaUnavailableError) as error:
        failure = CallError("EngineNotReadyError", f"No engine can be called: {error.message}")
    except CALL_FAILURES as error:
        logger.error("a call to an engine failed: %s", error)
        failure = CallError("EngineError", "The engine failed; the router's log says how.")
    return GenerateEnd(error=failure)


def raise_if_failed(end: GenerateEnd) -> None:
    error = end.error
    if error is None:
        return
    kind = getattr(errors, error.kind, EngineError)
    if issubclass(kind, errors.RequestError):
        raised = kind(error.message)
        raised.param, raised.code = error.param, error.code
        raise raised
    raise kind(error.message)
