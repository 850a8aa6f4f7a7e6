"""What an engine has done and is doing, in numbers. Knows nothing of where they are shown."""

from dataclasses import dataclass, fields, replace


@dataclass(slots=True)
class EngineStats:
    """Counters since start (`*_total`) and the state after the last step.

    Attributes:
        compiles_total: Programs compiled while serving; anything but 0 is a fault.
        padding_tokens_total: Token rows that compiled programs computed and nobody wanted.
        host_ms_total: Time in planning and in taking results in.
        wait_ms_total: Time in which the leader waited for a result.
        device_ms_total: From dispatch to result, as rank 0 measured it.
    """

    num_running: int = 0
    num_waiting: int = 0
    num_pages_used: int = 0
    num_pages: int = 0
    steps_total: int = 0
    prompt_tokens_total: int = 0
    cached_tokens_total: int = 0
    generated_tokens_total: int = 0
    padding_tokens_total: int = 0
    preemptions_total: int = 0
    requests_total: int = 0
    finished_total: int = 0
    aborted_total: int = 0
    compiles_total: int = 0
    host_ms_total: float = 0.0
    wait_ms_total: float = 0.0
    device_ms_total: float = 0.0

    def counters(self) -> "EngineStats":
        """What stays true of an engine that is gone: its counters, without its state."""
        return replace(self, num_running=0, num_waiting=0, num_pages_used=0, num_pages=0)

    def __add__(self, other: "EngineStats") -> "EngineStats":
        """Both engines' figures as one's."""
        return EngineStats(
            **{
                field.name: getattr(self, field.name) + getattr(other, field.name)
                for field in fields(self)
            }
        )

    @property
    def page_use(self) -> float:
        """Share of the pages that running requests hold, 0 to 1."""
        return self.num_pages_used / self.num_pages if self.num_pages else 0.0
