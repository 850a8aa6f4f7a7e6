"""What Starlette does not do as OpenAI's clients expect: bounded bodies."""

from starlette.requests import ClientDisconnect, Request

from engine.errors import RequestError, RequestTooLargeError

# A prompt of 2^20 token ids, as `151643, `, fills it; as text it takes about half. A body is parsed
# in the event loop that carries all streams: of this size the worst JSON takes half a second.
MAX_BODY_BYTES = 8 * 1024 * 1024


async def read_body(request: Request, max_bytes: int = MAX_BODY_BYTES) -> bytes:
    """Read a request's body.

    Raises:
        RequestTooLargeError: It has more than `max_bytes`; the rest is not read.
        RequestError: The client left before its end.
    """
    parts = []
    num_bytes = 0
    try:
        async for part in request.stream():
            num_bytes += len(part)
            if num_bytes > max_bytes:
                raise RequestTooLargeError(
                    f"The body has more than {max_bytes} bytes. Send less at a time."
                )
            parts.append(part)
    except ClientDisconnect:
        raise RequestError("The body is incomplete: the client closed the connection.") from None
    return b"".join(parts)
