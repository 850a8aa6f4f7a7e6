"""Everything this project raises on purpose; knows nothing of what raises it.

    QwenOnRayError
    ├── ConfigError                a flag, a field or a combination of them that cannot work
    ├── CheckpointError            a checkpoint that is missing, unsupported or misshapen
    ├── CapacityError              too little device memory, or too few devices
    ├── RequestError               a request that can never be served as it stands (HTTP 400)
    │   ├── ContextLengthError     prompt and requested output exceed the context
    │   ├── ModelNotFoundError     a model name that is not served here (HTTP 404)
    │   ├── ResponseNotFoundError  a response that is not kept here (HTTP 404)
    │   ├── AuthenticationError    no API key, or one that is not known here (HTTP 401)
    │   ├── PermissionDeniedError  an API key that may not do this (HTTP 403)
    │   ├── RequestTooLargeError   a body of more bytes than are read (HTTP 413)
    │   ├── StreamResumedError     its client asked for the rest of it elsewhere (HTTP 409)
    │   └── StreamGoneError        nobody knows the stream whose rest is asked for (HTTP 410)
    └── EngineError                the engine cannot serve this request at present (HTTP 503)
        ├── EngineBusyError        too many requests wait already (HTTP 429)
        ├── EngineNotReadyError    still starting, or rebuilding its gang
        ├── EngineDiedError        a host died while the request ran
        ├── RequestGivenUpError    hosts died of it, it seems, so it is not tried again (HTTP 500)
        └── HostError              a host that cannot run the model, though others might

Messages say what was got, what is allowed and what to do, with the real flag.
"""


class QwenOnRayError(Exception):
    """Base of every error that this project raises on purpose."""


class ConfigError(QwenOnRayError):
    """A flag, a field, or a combination of them, that cannot work."""


class CheckpointError(QwenOnRayError):
    """A checkpoint that is missing, unsupported or misshapen."""


class CapacityError(QwenOnRayError):
    """Too little device memory, or too few devices, for what was asked."""


class RequestError(QwenOnRayError):
    """A request that can never be served as it stands.

    Attributes:
        param: The OpenAI field at fault, or None.
        code: OpenAI's machine-readable code, or None.
        status: The HTTP status that says the same.
    """

    status = 400

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class ContextLengthError(RequestError):
    """The prompt, or prompt and requested output together, exceed the context."""

    def __init__(self, message: str, *, param: str | None = "messages") -> None:
        super().__init__(message, param=param, code="context_length_exceeded")


class ModelNotFoundError(RequestError):
    """A model name that is not served here."""

    status = 404

    def __init__(self, message: str) -> None:
        super().__init__(message, param="model", code="model_not_found")


class ResponseNotFoundError(RequestError):
    """A response that is not kept here, or is another key's."""

    status = 404

    def __init__(self, message: str) -> None:
        super().__init__(message, param="response_id", code="response_not_found")


class AuthenticationError(RequestError):
    """No API key, or one that is not known here."""

    status = 401

    def __init__(self, message: str) -> None:
        super().__init__(message, code="invalid_api_key")


class PermissionDeniedError(RequestError):
    """An API key that is known and may not do this."""

    status = 403

    def __init__(self, message: str) -> None:
        super().__init__(message, code="permission_denied")


class RequestTooLargeError(RequestError):
    """A body of more bytes than are read."""

    status = 413


class StreamResumedError(RequestError):
    """The client of a request that is under way has asked for the rest of it elsewhere."""

    status = 409


class StreamGoneError(RequestError):
    """Nobody who is left knows the stream of which the rest is asked for."""

    status = 410

    def __init__(self, message: str) -> None:
        super().__init__(message, code="stream_gone")


class EngineError(QwenOnRayError):
    """The engine cannot serve this request at present; the same request may work later.

    Attributes:
        status: The HTTP status that says the same.
    """

    status = 503


class EngineBusyError(EngineError):
    """Too many requests wait already.

    Args:
        message: What is full.
        retry_after_s: When there is likely to be room; None if that is not known.
    """

    status = 429

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class EngineNotReadyError(EngineError):
    """The engine is still starting, or is rebuilding its gang."""


DEATH_CAUSES = ("died", "silent", "failed", "leader")
"""A host's process ended; it did not answer; it reported an error; the leader's own code failed."""


class EngineDiedError(EngineError):
    """A host of the engine died while the request ran.

    Attributes:
        cause: What it died of, one of `DEATH_CAUSES`.
    """

    def __init__(self, message: str, *, cause: str = "died") -> None:
        super().__init__(message)
        self.cause = cause


class RequestGivenUpError(EngineError):
    """Hosts died more than once as they computed a request; one more try may kill the next."""

    status = 500


class HostError(EngineError):
    """A host's device is missing or held by someone else: it cannot run its part of the model."""
