"""How many may wait: the bound on requests that have no token so far.

Requests count as waiting from their arrival until their first token. Past the bound the client
hears at once (HTTP 429) instead of waiting for its own time-out.
"""

import time
from collections import deque
from collections.abc import Callable
from types import TracebackType

from engine.errors import EngineBusyError

MIN_WAIT_S, UNKNOWN_WAIT_S, MAX_WAIT_S = 1.0, 5.0, 60.0
"""What a refused client is told to wait: at least, where nothing is known, at most."""

DRAIN_WINDOW_S = 30.0


class DrainRate:
    """How fast a waiting room has emptied lately, and so how long it takes to have room again.

    Invariant: `_num_requests` and `_num_tokens` are the sums over `_left`.

    Args:
        clock: Monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._left: deque[tuple[float, int, int]] = deque()
        self._num_requests = 0
        self._num_tokens = 0

    def leave(self, num_requests: int, num_tokens: int) -> None:
        """So many sequences, with so many prompt tokens, wait no longer."""
        self._left.append((self._clock(), num_requests, num_tokens))
        self._num_requests += num_requests
        self._num_tokens += num_tokens
        self._forget()

    def seconds_until(self, *, num_requests: int = 0, num_tokens: int = 0) -> float:
        """How long it takes until so much has left, within bounds that a client would accept."""
        self._forget()
        if not self._left:
            return UNKNOWN_WAIT_S
        span_s = max(self._clock() - self._left[0][0], MIN_WAIT_S)
        requests_s = num_requests * span_s / max(1, self._num_requests)
        tokens_s = num_tokens * span_s / max(1, self._num_tokens)
        return min(max(MIN_WAIT_S, requests_s, tokens_s), MAX_WAIT_S)

    def _forget(self) -> None:
        oldest_s = self._clock() - DRAIN_WINDOW_S
        while self._left and self._left[0][0] < oldest_s:
            _, num_requests, num_tokens = self._left.popleft()
            self._num_requests -= num_requests
            self._num_tokens -= num_tokens


class Ticket:
    """One client request's share of the waiting room; leaves it with the `with` block."""

    def __init__(self, admission: "Admission", num_requests: int) -> None:
        self._admission = admission
        self._num_requests = num_requests
        self._num_tokens = 0

    def add_tokens(self, num_tokens: int) -> None:
        """Count prompt tokens, once they are known.

        Raises:
            EngineBusyError: Too many wait already.
        """
        self._admission.add(num_tokens=num_tokens)
        self._num_tokens += num_tokens

    def started(self, num_tokens: int) -> None:
        """One choice of the request, of that many prompt tokens, waits no longer."""
        if self._num_requests > 0:
            self._num_requests -= 1
            self._num_tokens -= num_tokens
            self._admission.remove(num_requests=1, num_tokens=num_tokens)

    def __enter__(self) -> "Ticket":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._admission.remove(num_requests=self._num_requests, num_tokens=self._num_tokens)
        self._num_requests = self._num_tokens = 0


class Admission:
    """The waiting room of one router.

    Invariant: `num_waiting` and `num_waiting_tokens` are the sums over all open tickets.

    Args:
        max_waiting: Sequences (each prompt's n choices count n) that may wait.
        max_waiting_tokens: Prompt tokens that may wait; a request that alone is longer is let in
            when nothing else waits.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        max_waiting: int,
        max_waiting_tokens: int,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._drain_rate = DrainRate(clock)
        self.max_waiting = max_waiting
        self._max_waiting_tokens = max_waiting_tokens
        self.num_waiting = 0
        self.num_waiting_tokens = 0

    def admit(self, num_requests: int) -> Ticket:
        """Let a request of that many sequences wait.

        Raises:
            EngineBusyError: Too many wait already.
        """
        self.add(num_requests=num_requests)
        return Ticket(self, num_requests)

    def check(self, *, num_requests: int = 1, num_tokens: int = 1) -> None:
        """Raise EngineBusyError if it has no room for so much more."""
        excess = self.num_waiting + num_requests - self.max_waiting
        # Who was let in stays, even past a bound that was lowered since.
        if num_requests and excess > 0:
            raise EngineBusyError(
                f"{self.num_waiting} requests wait, and {self.max_waiting} may "
                "(--max-queued-requests). Try again later.",
                retry_after_s=self._drain_rate.seconds_until(num_requests=excess),
            )
        tokens = self.num_waiting_tokens + num_tokens
        if self.num_waiting_tokens and tokens > self._max_waiting_tokens:
            raise EngineBusyError(
                f"{self.num_waiting_tokens} prompt tokens wait, and {self._max_waiting_tokens} may "
                "(--max-queued-tokens). Try again later.",
                retry_after_s=self._drain_rate.seconds_until(
                    num_tokens=min(tokens - self._max_waiting_tokens, self.num_waiting_tokens)
                ),
            )

    def add(self, *, num_requests: int = 0, num_tokens: int = 0) -> None:
        """Grow by so much, or raise EngineBusyError and stay as it is."""
        self.check(num_requests=num_requests, num_tokens=num_tokens)
        self.num_waiting += num_requests
        self.num_waiting_tokens += num_tokens

    def limit(self, max_waiting: int, max_waiting_tokens: int) -> None:
        """Change the bounds; what waits already stays, even past them."""
        self.max_waiting = max_waiting
        self._max_waiting_tokens = max_waiting_tokens

    def remove(self, *, num_requests: int, num_tokens: int) -> None:
        self.num_waiting -= num_requests
        self.num_waiting_tokens -= num_tokens
        if num_requests:
            self._drain_rate.leave(num_requests, num_tokens)
