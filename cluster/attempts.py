"""Attempts at one request that failed: whether it is worth another, and with which engines not."""

from engine.errors import EngineDiedError, EngineError, RequestGivenUpError

MAX_DEATHS = 2
"""Times that hosts may die at work on a request without a token of it in between."""

MAX_FAILURES = 6
"""Attempts in a row that may bring no token."""


class AttemptError(Exception):
    """An engine did not bring a request to its end, through no fault that is known of its own.

    Args:
        error: What happened.
        engine_id: Which engine it was; empty if that is not known.
        was_computed: Its hosts were at work on the request when they died.
    """

    def __init__(self, error: EngineError, engine_id: str, was_computed: bool) -> None:
        super().__init__(str(error))
        self.error = error
        self.engine_id = engine_id
        self.was_computed = was_computed


class Failures:
    """How often a request's engines have died, and whether to try another.

    Attributes:
        engines: Those that failed it since its last token.
    """

    def __init__(self) -> None:
        self.engines: set[str] = set()
        self._num_failures = 0
        self._num_deaths = 0
        self._has_progressed = False

    def progressed(self) -> None:
        """Tokens have come."""
        self._has_progressed = True

    def take(self, failure: AttemptError) -> None:
        """Count a failure.

        Raises:
            RequestGivenUpError: The request is likely to be the cause.
            EngineDiedError: No engine brings it on.
        """
        if self._has_progressed:
            self.engines.clear()
            self._num_failures = self._num_deaths = 0
            self._has_progressed = False
        self.engines.add(failure.engine_id)
        self._num_failures += 1
        self._num_deaths += failure.was_computed
        if self._num_deaths >= MAX_DEATHS:
            raise RequestGivenUpError(
                f"The engine's hosts died {self._num_deaths} times as they computed this request, "
                f"which is not tried again. {failure.error}"
            )
        if self._num_failures >= MAX_FAILURES:
            raise EngineDiedError(
                f"{self._num_failures} attempts brought no token of this request. {failure.error}"
            )
