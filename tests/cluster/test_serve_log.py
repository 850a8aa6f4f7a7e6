"""Lines of a replica's modules on their way into Serve's log."""

import logging
from collections.abc import Iterator

import pytest

from cluster.serve_log import log_into_serve


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(f"{record.levelname} {record.name} {record.getMessage()}")


@pytest.fixture
def serve_lines() -> Iterator[list[str]]:
    """What reaches a handler of Serve's own logger, whose level is Serve's default."""
    loggers = [logging.getLogger(name) for name in ("ray.serve", "cluster", "engine")]
    before = [(logger.level, logger.propagate, list(logger.handlers)) for logger in loggers]
    lines = Lines()
    loggers[0].handlers = [lines]
    loggers[0].setLevel(logging.INFO)
    yield lines.texts
    for logger, (level, propagate, handlers) in zip(loggers, before, strict=True):
        logger.setLevel(level)
        logger.propagate = propagate
        logger.handlers = handlers


@pytest.mark.parametrize(
    ("level", "levels_shown"),
    [("debug", ["DEBUG", "INFO", "ERROR"]), ("info", ["INFO", "ERROR"]), ("error", ["ERROR"])],
)
def test_a_replica_logs_from_its_own_level_on(
    level: str, levels_shown: list[str], serve_lines: list[str]
) -> None:
    log_into_serve(level)
    log_into_serve(level)  # a second one in the same process says nothing twice
    for name in ("cluster.replica", "engine.core"):
        serve_lines.clear()
        logger = logging.getLogger(name)
        logger.debug("step %d", 1)
        logger.info("step %d", 2)
        logger.error("step %d", 3)
        steps = {"DEBUG": 1, "INFO": 2, "ERROR": 3}
        assert serve_lines == [f"{shown} {name} step {steps[shown]}" for shown in levels_shown]
