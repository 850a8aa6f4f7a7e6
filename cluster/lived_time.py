"""A clock that stands while its event loop is held up."""

import asyncio
import time

TICK_S = 0.1
_MOST_BETWEEN_TICKS_S = 0.3


class LivedTime:
    """Seconds that an event loop has had for its sockets and timers; calling it tells them.

    Time-outs for others' silence go by it: who could not listen has heard no silence. A process
    that has too little of a processor would else take its peers for dead, and give itself more to
    do.
    """

    def __init__(self) -> None:
        self._seconds = 0.0
        self._ticked_s = time.monotonic()

    def __call__(self) -> float:
        since_tick_s = time.monotonic() - self._ticked_s
        return self._seconds + min(since_tick_s, _MOST_BETWEEN_TICKS_S)

    async def tick(self) -> None:
        """Keep it going; runs for ever."""
        while True:
            await asyncio.sleep(TICK_S)
            self._seconds, self._ticked_s = self(), time.monotonic()
